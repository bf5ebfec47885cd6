"""What one call costs the host, by parts.

From the root of a checkout:

    python -m bench.overhead [--json FILE]

On a GPU: a whole functional call with and without `out=`, a `Plan` called by itself, an allocation, a launch, and
PyTorch's call on the same small problem. The GPU's own work is shorter than the host's, so its queue never fills.

Without a GPU the parts up to the launch are measured: real CuPy arrays on host memory stand in for arrays on a GPU, and
a plan that launches nothing for a real one. Attributes and cache look-ups then cost what they cost in earnest.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

import gpuconv
from gpuconv import calls, memory, runtime
from gpuconv.gpus import missing_gpu
from gpuconv.problem import ConvProblem

from .peers import optional_module
from .results import environment, write_json

# Small enough that every kernel is shorter than its launch.
PROBLEM = ConvProblem("conv1d", 1, 8, 8, 64, 3, padding_left=1, padding_right=1, has_bias=True)

TARGET_US = {"functional call": 8.0, "Plan called with out=": 4.0}

_BATCH = 200  # calls between two synchronisations: the driver queues about a thousand
_BATCHES = 50


def microseconds(work: Callable[[], object], settle: Callable[[], object] = lambda: None) -> float:
    """The host's time of one call, over batches that each begin with the GPU idle.

    The 10th percentile of the batches: other programs on the machine can only make a batch longer.
    """
    times = []
    for _ in range(_BATCHES):
        settle()
        start = time.perf_counter_ns()
        for _ in range(_BATCH):
            work()
        times.append((time.perf_counter_ns() - start) / _BATCH)
    return float(np.percentile(times, 10)) / 1e3


def look_up_parts(x: Any, w: Any, b: Any, out: Any) -> dict[str, Callable[[], object]]:
    """What a repeated functional call does before it launches, part by part."""
    settings = (PROBLEM.stride, PROBLEM.padding, PROBLEM.dilation, PROBLEM.groups)
    cupy = runtime.cupy_module()

    def key() -> tuple[Any, ...]:
        identities = (calls._identity(array) for array in (x, w, b, None))
        return ("conv1d", None, calls._as_key(settings), *identities)

    stored = {key(): None}
    made = key()
    return {
        "device of the call": cupy.cuda.runtime.getDevice,
        "key": key,
        "plan look-up": lambda: stored.get(made),
        "overlap check of out=": lambda: memory.check_overlap("conv1d", out, {"input": x, "weight": w, "bias": b}),
        "validation (first call only)": lambda: ConvProblem.conv1d(x, w, b, *settings),
    }


def call_with_out(x: Any, w: Any, b: Any, out: Any) -> Callable[[], object]:
    return lambda: gpuconv.conv1d(x, w, b, 1, PROBLEM.padding, out=out)


# -- without a GPU ----------------------------------------------------------------------------------------------------


class _IdleExecutor:
    """An executor that launches nothing."""

    def __call__(self, *_: Any, **__: Any) -> None:
        pass


@contextmanager
def stand_ins() -> Iterator[tuple[Any, Any, Any, Any]]:
    """CuPy arrays (input, weight, bias, out) that lie in host memory, in a world where plans launch nothing.

    Nothing may read or write their elements through CuPy.
    """
    import cupy

    def array(shape: Sequence[int]) -> Any:
        host = np.zeros(int(np.prod(shape)) + 16, np.float32)
        memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, 0)
        start = -host.ctypes.data % 16
        return cupy.ndarray(tuple(shape), np.float32, cupy.cuda.MemoryPointer(memory, start))

    arrays = tuple(
        array(s) for s in (PROBLEM.input_shape, PROBLEM.weight_shape, (PROBLEM.C_out,), PROBLEM.output_shape)
    )
    with (
        mock.patch.object(cupy.cuda.runtime, "getDevice", return_value=0),
        mock.patch.object(runtime, "make_executor", return_value=_IdleExecutor()),
        mock.patch.object(calls, "_EXECUTORS", {}),
    ):
        yield arrays


def measure_without_gpu() -> dict[str, float]:
    """Microseconds of the parts that need no GPU.

    Raises:
        ImportError: CuPy is not installed.
    """
    with stand_ins() as arrays:
        figures = {name: microseconds(part) for name, part in look_up_parts(*arrays).items()}
        figures["functional call with out=, without its launch"] = microseconds(call_with_out(*arrays))
    return figures


# -- with one ---------------------------------------------------------------------------------------------------------


def measure_on_gpu() -> dict[str, float]:
    """Microseconds of whole calls and of their parts, on CuPy's current device."""
    import cupy

    rng = np.random.default_rng(0)
    x, w, b = (
        cupy.asarray(rng.standard_normal(shape, np.float32))
        for shape in (PROBLEM.input_shape, PROBLEM.weight_shape, (PROBLEM.C_out,))
    )
    out = cupy.empty(PROBLEM.output_shape, np.float32)
    settle = cupy.cuda.Device().synchronize
    plan = runtime.make_executor(PROBLEM, ("input", "weight", "bias"), (x, w, b), out)
    work: dict[str, Callable[[], object]] = {
        "functional call": lambda: gpuconv.conv1d(x, w, b, 1, PROBLEM.padding),
        "functional call with out=": call_with_out(x, w, b, out),
        "Plan called with out=": lambda: plan(x, w, b, out),
        **look_up_parts(x, w, b, out),
        "allocation": lambda: cupy.empty(PROBLEM.output_shape, np.float32),
    }
    torch = optional_module("torch")
    if torch is not None and torch.cuda.is_available():
        tensors = [torch.from_dlpack(array) for array in (x, w, b)]
        conv1d = torch.nn.functional.conv1d

        work["PyTorch's call"] = lambda: conv1d(*tensors, 1, PROBLEM.padding_left)
    figures = {}
    for name, part in work.items():
        part()
        figures[name] = microseconds(part, settle)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad usage. A part that cannot be measured is reported as absent."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
    console = Console()
    missing = missing_gpu()
    absent = {}
    if missing is None:
        where, figures = "GPU", measure_on_gpu()
    else:
        where = "no GPU: stand-in arrays"
        absent["GPU parts"] = missing
        try:
            figures = measure_without_gpu()
        except ImportError as error:
            figures = {}
            absent["look-up"] = f"CuPy is not installed: {error}"
    table = Table("part", "us", "target us", title=f"Host time of one call ({where})")
    for name, value in figures.items():
        target = TARGET_US.get(name)
        table.add_row(name, f"{value:.2f}", "" if target is None else f"{target:.0f}")
    for name, reason in absent.items():
        table.add_row(name, "absent", "")
        console.print(f"{name}: {reason}", highlight=False)
    console.print(table)
    if args.json:
        device = {"kind": "cpu" if missing else "gpu", "name": where}
        write_json(args.json, {"environment": environment(device), "figures_us": figures, "absent": absent})
    return 0


if __name__ == "__main__":
    sys.exit(main())
