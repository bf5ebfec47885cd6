"""`gpuconv warmup --arch` and `gpuconv cache`."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import gpuconv
from gpuconv import cubins
from gpuconv.cli import main
from gpuconv.cli.options import size
from gpuconv.problem import ArraySpec
from tests.cli.test_cli import in_folder, no_gpu, refusal, run  # noqa: F401 - fixtures

SMALL = ["--input", "1,3,40", "--weight", "4,3,5", "--dtype", "float64", "--algorithm", "base"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of compiled kernels, which does not exist yet."""
    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.usefixtures("no_gpu")
def test_kernels_are_compiled_for_gpus_that_are_not_there(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    pytest.importorskip("cupy")
    text = output(capsys, "warmup", "conv1d", *SMALL, "--arch", "sm_80,sm_90")
    assert re.fullmatch(rf"2 kernels for sm_80, sm_90 ready in \d+\.\d s \(2 compiled\): {folder}\n", text)
    text = output(capsys, "warmup", "conv1d", *SMALL, "--arch", "sm_90", "--jobs", "1")
    assert re.fullmatch(rf"1 kernel for sm_90 ready in \d+\.\d s \(0 compiled\): {folder}\n", text)
    x, w = ArraySpec((1, 3, 40), "float64"), ArraySpec((4, 3, 5), "float64")
    assert gpuconv.is_compiled("conv1d", x, w, arch=("sm_80", "sm_90"), algorithm="base")

    facts = json.loads(output(capsys, "cache", "--json"))
    assert facts.pop("folder") == str(folder)
    assert facts.pop("damaged") == 0
    assert [(group["arch_name"], group["count"]) for group in facts["kernels"]] == [("sm_80", 1), ("sm_90", 1)]
    sizes = [path.stat().st_size for path in folder.glob("*/*/*")]
    assert sum(group["bytes"] for group in facts["kernels"]) == sum(sizes)
    (nvrtc,) = {group["nvrtc"] for group in facts["kernels"]}
    page = output(capsys, "cache")
    assert re.search(rf"\nsm_90   1 kernel, \d\S* kB, by NVRTC {nvrtc}\nall     2 kernels, \d\S* kB\n", page)


@pytest.mark.usefixtures("no_gpu")
def test_kernels_of_a_file_of_layers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cupy")
    lines = [
        output(capsys, "explain", "conv1d", "--input", "1,3,40", "--weight", "4,3,5", *more.split(), "--json")
        for more in ("--arch sm_90", "--arch sm_75 --activation relu --dtype float16")
    ]
    Path("layers.json").write_text("".join(lines))
    options = ["--layers", "layers.json", "--arch", "sm_90", "--dtype", "float64"]
    text = output(capsys, "warmup", *options, "--direction", "forward,grad_bias")
    assert text.startswith("3 kernels for sm_90 ready in ")
    x, w = ArraySpec((1, 3, 40), "float64"), ArraySpec((4, 3, 5), "float64")
    assert gpuconv.is_compiled("conv1d", x, w, arch="sm_90")
    assert gpuconv.is_compiled("conv1d", x, w, arch="sm_90", activation="relu")
    assert gpuconv.is_compiled("conv1d", x, w, arch="sm_90", direction="grad_bias")
    assert not gpuconv.is_compiled("conv1d", x, w, arch="sm_90", direction="grad_weight")


def test_the_cache_is_pruned_and_cleared(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert output(capsys, "cache") == f"folder  {folder}\nall     0 kernels, 0 B\n"
    for age, kernel in enumerate("abc"):
        path = cubins.store(cubins.Source("sm_90", kernel, "0" * 32, "cubin"), (13, 2), b"x" * 400_000)
        os.utime(path, (1000 - age, 1000 - age))
    path.write_bytes(b"")
    damaged = "damaged  1 kernel: warmup replaces, prune removes what is damaged\n"
    assert output(capsys, "cache", "show").endswith(f"all      3 kernels, 800 kB\n{damaged}")
    assert "removed  1 kernel, 0 B\nsm_90    2 kernels, 800 kB, by NVRTC 13.2\n" in output(capsys, "cache", "prune")
    assert "removed  1 kernel, 400 kB\n" in output(capsys, "cache", "prune", "--max-size", "0.5MB")
    facts = json.loads(output(capsys, "cache", "clear", "--json"))
    assert facts.pop("gpuconv") == gpuconv.__version__
    assert facts == {"folder": str(folder), "removed": 1, "removed_bytes": 400_000, "kernels": [], "damaged": 0}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("warmup --arch sm_91", "--arch must be some of sm_75, "),
        ("warmup --jobs 2", "warmup takes --jobs only together with --arch"),
        ("warmup --streams --layers f", "warmup takes --streams only without a problem and layers"),
        ("warmup conv1d --arch sm_90 --layers f", "warmup takes --layers in place of a problem, got both"),
        ("warmup --arch sm_90 --layers none.json", "none.json: does not exist"),
        ("warmup --arch sm_90 --direction forward", "warmup takes settings only together with --input and --weight"),
        ("warmup conv1d --arch sm_90 --input 1,9 --weight 1,2,3", "conv1d: input has C_in = 1 channels"),
        ("cache show --max-size 3", "cache takes --max-size only together with prune"),
        ("cache prune --max-size much", "--max-size must be a size such as 200MB or 1GiB, got 'much'"),
        ("cache fill", "ACTION must be one of show, prune, clear, got 'fill'"),
    ],
)
def test_what_the_commands_refuse(capsys: pytest.CaptureFixture[str], argv: str, message: str) -> None:
    assert refusal(capsys, *argv.split()).startswith(message)


def test_a_folder_that_cannot_be_used_is_one_line(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    pytest.importorskip("cupy")
    folder.write_text("")
    assert refusal(capsys, "warmup", "conv1d", *SMALL, "--arch", "sm_90") == f"{folder}: cannot be made: File exists"
    folder.unlink()
    folder.mkdir(0o777)
    folder.chmod(0o777)
    message = refusal(capsys, "warmup", "conv1d", *SMALL, "--arch", "sm_90")
    assert message == f"{folder}: everybody can write it; machine code must be writable by its owner alone"


def test_without_a_compiler_warmup_says_what_is_missing() -> None:
    done = run("-c", "import sys; sys.modules['cupy'] = None; import gpuconv.cli as c; sys.exit(c.main(sys.argv[1:]))",
               "warmup", "conv1d", *SMALL, "--arch", "sm_90")  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gpuconv: error: kernels are compiled through CuPy, which is missing: pip install")


def test_a_gradient_that_cannot_be_explained_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    argv: list[Any] = ["warmup", "conv1d", *SMALL[:4], "--arch", "sm_90", "--activation", "relu"]
    assert "there is no gradient of what is fused" in refusal(capsys, *argv, "--direction", "grad_weight")


def test_sizes_have_decimal_and_binary_units() -> None:
    sizes = {
        "7": 7,
        "7B": 7,
        "1.5kB": 1500,
        "2K": 2000,
        "200MB": 2 * 10**8,
        "256MiB": 2**28,
        "1 GiB": 2**30,
        "1TB": 10**12,
    }
    assert {text: size(text) for text in sizes} == sizes
    for text in ("", "MB", "-1", "1iB", "1 PB", "0x10", "1e3"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a size such as 200MB or 1GiB, got"):
            size(text)
