"""The host's time of one call.

From the root of a checkout:

    python -m bench.overhead [--json FILE]

On a GPU: functional calls, an allocation, and PyTorch's call on the same small problem. The GPU's own work is shorter
than the host's, so its queue never fills.

Without a GPU a call is measured up to its launch: real CuPy arrays on host memory stand in for arrays on a GPU, and a
plan that launches nothing for a real one. Attributes and cache look-ups then cost the same as in a real call.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

import gpuconv
from gpuconv import calls, runtime
from gpuconv.gpus import missing_gpu
from gpuconv.problem import ConvProblem

from .speed.peers import optional_module
from .speed.results import environment, write_json

# Small enough that every kernel is shorter than its launch.
PROBLEM = ConvProblem("conv1d", 1, 8, 8, 64, 3, padding_left=1, padding_right=1, has_bias=True)
SHAPES = (PROBLEM.input_shape, PROBLEM.weight_shape, (PROBLEM.C_out,), PROBLEM.output_shape)

TARGET_US = {"functional call": 8.0, "functional call with out=": 8.0}

CALLS = 200  # between two synchronisations: the driver queues about a thousand
BATCHES = 50


def microseconds(work: Callable[[], object], settle: Callable[[], object], batches: int = BATCHES) -> float:
    """The host's time of one call, over batches that each begin with the GPU idle.

    The 10th percentile of the batches: other programs on the machine can only make a batch longer.
    """
    work()
    times = []
    for _ in range(batches):
        settle()
        start = time.perf_counter_ns()
        for _ in range(CALLS):
            work()
        times.append((time.perf_counter_ns() - start) / CALLS)
    return float(np.percentile(times, 10)) / 1e3


def call_with_out(x: Any, w: Any, b: Any, out: Any) -> Callable[[], object]:
    return lambda: gpuconv.conv1d(x, w, b, 1, PROBLEM.padding, out=out)


def call_with_lengths(x: Any, w: Any, b: Any, out: Any) -> Callable[[], object]:
    lengths = [PROBLEM.L_in - 1]
    return lambda: gpuconv.conv1d(x, w, b, 1, PROBLEM.padding, lengths=lengths, out=out)


def parts_on_gpu() -> dict[str, Callable[[], object]]:
    """What is measured on CuPy's current device."""
    import cupy

    rng = np.random.default_rng(0)
    x, w, b, out = (cupy.asarray(rng.standard_normal(shape, np.float32)) for shape in SHAPES)
    prepared = gpuconv.prepare(w)
    layer = gpuconv.nn.Conv1d(PROBLEM.C_in, PROBLEM.C_out, PROBLEM.K, padding=PROBLEM.padding, device="cuda")
    parts: dict[str, Callable[[], object]] = {
        "functional call": lambda: gpuconv.conv1d(x, w, b, 1, PROBLEM.padding),
        "functional call with out=": call_with_out(x, w, b, out),
        "the same with a prepared weight": call_with_out(x, prepared, b, out),
        "functional call with lengths= and out=": call_with_lengths(x, w, b, out),
        "call of a layer": lambda: layer(x),
        "validation (first call only)": lambda: ConvProblem.conv1d(x, w, b, 1, PROBLEM.padding),
        "allocation": lambda: cupy.empty(PROBLEM.output_shape, np.float32),
    }
    torch = optional_module("torch")
    if torch is not None and torch.cuda.is_available():
        tensors = [torch.from_dlpack(array) for array in (x, w, b)]
        conv1d = torch.nn.functional.conv1d
        parts["PyTorch's call"] = lambda: conv1d(*tensors, 1, PROBLEM.padding_left)
    return parts


def work(*, rehearse: bool = False) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """`parts_on_gpu` as pieces of a step of bench.gpu_report: {"us": microseconds} each."""
    import cupy

    settle = cupy.cuda.Device().synchronize
    for name, part in parts_on_gpu().items():
        yield name, partial(_record, part, settle, 1 if rehearse else BATCHES)


def _record(part: Callable[[], object], settle: Callable[[], object], batches: int) -> dict[str, float]:
    return {"us": round(microseconds(part, settle, batches), 3)}


class _IdleExecutor:
    """An executor that launches nothing."""

    def run(self, *_: Any, **__: Any) -> None:
        pass


def _first_device() -> int:
    """Stands in for CUDA's function. A `Mock` would take longer than the rest of a call."""
    return 0


@contextmanager
def stand_ins() -> Iterator[tuple[Any, ...]]:
    """CuPy arrays (input, weight, bias, out) in host memory, in a context where plans launch nothing.

    Nothing may read or write their elements through CuPy.
    """
    import cupy

    def array(shape: Sequence[int]) -> Any:
        host = np.zeros(int(np.prod(shape)) + 16, np.float32)
        memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, 0)
        start = -host.ctypes.data % 16
        return cupy.ndarray(tuple(shape), np.float32, cupy.cuda.MemoryPointer(memory, start))

    with (
        mock.patch.object(cupy.cuda.runtime, "getDevice", _first_device),
        mock.patch.object(runtime, "make_executor", return_value=_IdleExecutor()),
        mock.patch.object(calls, "_EXECUTORS", {}),
    ):
        yield tuple(map(array, SHAPES))


def measure_without_gpu() -> dict[str, float]:
    """Microseconds of a call up to its launch.

    Raises:
        ImportError: CuPy is not installed.
    """
    with stand_ins() as arrays:
        x, w, b, _ = arrays
        parts: dict[str, Callable[[], object]] = {
            "functional call with out=, without its launch": call_with_out(*arrays),
            "the same with lengths=": call_with_lengths(*arrays),
            "validation (first call only)": lambda: ConvProblem.conv1d(x, w, b, 1, PROBLEM.padding),
        }
        return {name: microseconds(part, lambda: None) for name, part in parts.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad usage. A part that cannot be measured is reported as absent."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
    console = Console()
    missing = missing_gpu()
    absent = {}
    if missing is None:
        where, figures = "GPU", {name: piece()["us"] for name, piece in work()}
    else:
        where = "no GPU: stand-in arrays"
        absent["GPU parts"] = missing
        try:
            figures = measure_without_gpu()
        except ImportError as error:
            figures = {}
            absent["call"] = f"CuPy is not installed: {error}"
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
