"""`gpuconv info`: show versions, GPUs and what is missing."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import os
import platform
from typing import Any

import numpy as np

from .. import __version__, cubins, runtime
from ..gpus import missing_gpu
from ..text import cuda_version, install_hint, installed_version, shorten, wrap, wrap_rows
from .errors import EXIT_CODES
from .gpu import kernel_cache
from .options import add_json
from .terminal import print_json, terminal_width

# The environment variables that gpuconv reads; the README describes them.
VARIABLES = (
    "GPUCONV_CACHE_DIR", "GPUCONV_CACHE_ONLY", "GPUCONV_TRACEBACK", "XDG_CACHE_HOME", "CUPY_CACHE_DIR",
    "CUPY_COMPILE_WITH_PTX", "CUDA_VISIBLE_DEVICES", "COLUMNS", "NO_COLOR",
)  # fmt: skip

# Packages for single parts of gpuconv, whose versions are read without importing them.
_PACKAGES = ("scipy", "torch", "dask", "safetensors", "matplotlib")

# The names of the versions in the text, where they differ.
_LABELS = {
    "python": "Python", "numpy": "NumPy", "cupy": "CuPy", "cuda_runtime": "CUDA runtime", "nvrtc": "NVRTC",
    "cuda_driver": "NVIDIA driver", "scipy": "SciPy", "torch": "PyTorch",
}  # fmt: skip


def add_to(commands: Any) -> None:
    text = "Print versions, GPUs, the kernel cache, and what is missing and needed for what."
    parser = commands.add_parser(
        "info",
        help="show versions, GPUs and what is missing",
        description=text,
        epilog=f"{EXIT_CODES}\n\nexample:\n  gpuconv info --json",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    facts = _facts()
    if args.json:
        print_json(facts)
        return 0
    versions: dict[str, str | None] = dict(facts["versions"])
    versions["python"] = f"{versions['python']} on {facts['platform']}"
    if versions["cuda_driver"] is not None:
        versions["cuda_driver"] = f"supports CUDA {versions['cuda_driver']}"
    shown = {name: value for name, value in versions.items() if value is not None or name not in _PACKAGES}
    rows = [(_LABELS.get(name, name), value or "not available") for name, value in shown.items()]
    width = terminal_width()
    for gpu in facts["devices"]:
        text = f"{gpu['name']} (sm_{gpu['arch']}), {gpu['num_sms']} multiprocessors, {gpu['l2_bytes'] >> 20} MiB L2"
        rows.append((f"GPU {gpu['index']}", text))
    rows.append(("kernel cache", facts["kernel_cache"]))
    rows.append(("cubin folder", facts["cubin_folder"]))
    rows += (("environment", f"{name}={value}") for name, value in facts["environment"].items() if value is not None)
    lines = wrap_rows(rows, width)
    if facts["missing"]:
        lines += ["", "Missing:"]
        for gap in facts["missing"]:
            lines += wrap(shorten(gap["what"]), width, first="- ", rest="  ")
            lines += wrap(gap["meaning"], width, first="  ", rest="  ")
    print("\n".join(lines))
    return 0


def _facts() -> dict[str, Any]:
    versions: dict[str, str | None] = {
        "gpuconv": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cupy": _version("cupy"),
        "cuda_runtime": None,
        "nvrtc": None,
        "cuda_driver": None,
        "ml_dtypes": _version("ml_dtypes"),
        "soundfile": _version("soundfile"),
        "rich": _version("rich"),
        **{package: installed_version(package) for package in _PACKAGES},
    }
    missing: list[dict[str, str]] = []
    devices: list[dict[str, Any]] = []
    try:
        cuda: Any = None if versions["cupy"] is None else runtime.cupy_module().cuda
    except ImportError:  # CuPy is too old, which `missing_gpu` reports below
        cuda = None
    if cuda is not None:
        versions["cuda_runtime"] = cuda_version(cuda.runtime.runtimeGetVersion())
        if driver := cuda.runtime.driverGetVersion():
            versions["cuda_driver"] = cuda_version(driver)
        if version := runtime.nvrtc_version():
            versions["nvrtc"] = ".".join(map(str, version))
        else:
            what = f"NVRTC, CUDA's run-time compiler: {install_hint('cuda13', 'cuda12')}"
            meaning = "Only kernels that were compiled in advance can run."
            missing.append({"what": what, "meaning": meaning})
    gap = missing_gpu()
    if gap is None:
        for index in range(runtime.device_count()):
            devices.append({"index": index, **dataclasses.asdict(runtime.device(index))})
    else:
        meaning = "NumPy arrays are convolved on the CPU; CuPy arrays cannot be convolved."
        missing.append({"what": gap, "meaning": meaning})
    for module, extra, meaning in (
        ("ml_dtypes", "bf16", "There is no bfloat16; the other dtypes work."),
        ("soundfile", "audio", "The command line reads and writes .npy files, but no .wav files."),
        ("rich", "cli", "Progress is a plain counter instead of a bar."),
    ):
        if versions[module] is None:
            missing.append({"what": f"{module}: {_trouble(module) or install_hint(extra)}", "meaning": meaning})
    return {
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": devices,
        "kernel_cache": kernel_cache(),
        "cubin_folder": str(cubins.folder()),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "missing": missing,
    }


def _trouble(module: str) -> str | None:
    """Why an optional package that is installed cannot be imported, or None."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return None
    except Exception as error:  # broken installations fail in many ways, and the report must not fail with them
        return f"cannot be loaded: {type(error).__name__}: {error}"
    return None


def _version(module: str) -> str | None:
    """The version of an optional package, or None where it cannot be imported."""
    try:
        imported = runtime.cupy_module() if module == "cupy" else importlib.import_module(module)
    except Exception:  # as above
        return None
    version = getattr(imported, "__version__", None)
    return str(version or importlib.metadata.version(module))
