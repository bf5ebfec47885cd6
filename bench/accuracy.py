"""The errors of results, for every arithmetic of gpuconv.

From the root of a checkout:

    python -m bench.accuracy [--json FILE]

Each arithmetic computes layers of growing reductions on three kinds of data: normal; cancelling (the terms of a sum
nearly cancel, so that mostly their errors remain); skewed (positive data of many magnitudes, so that the sum is large
and rounding errors have the same sign). The error of every element, against a float64 result, is divided by the error
bound of gpuconv.reference, which it must not exceed, and, to compare arithmetics, by the sum of the magnitudes of the
terms times the roundoff of the accumulator.

On a GPU the kernels run there, and so does PyTorch for comparison. Without a GPU they run on the CPU under
tests/hostcuda, whose matrix products follow the published arithmetic of Hopper's tensor cores, next to PyTorch's CPU
path.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from gpuconv import cases, dispatch, reference, runtime
from gpuconv.cases import Data
from gpuconv.device import Device
from gpuconv.families import Layout
from gpuconv.gpus import missing_gpu
from gpuconv.problem import ConvProblem

from .speed.peers import optional_module
from .speed.results import environment, write_json

Array = npt.NDArray[Any]

DATA = ("normal", "cancelling", "skewed")
# Input channels of dense layers with three taps: 192, 1536 and 6144 products a sum.
CHANNELS = (64, 512, 2048)
ROUNDOFF = 2.0**-24  # of the float32 accumulators


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """A kernel family on data of a dtype, or PyTorch if `family` is None."""

    name: str
    dtype: str
    family: str | None
    precision: str = "float32"


ARITHMETICS = (
    Arithmetic("float32, fused multiply-add", "float32", "conv1d_tiled"),
    Arithmetic("float32, split TF32", "float32", "conv1d_mma"),
    Arithmetic("TF32", "float32", "conv1d_mma", "tf32"),
    Arithmetic("float16", "float16", "conv1d_mma"),
    Arithmetic("bfloat16", "bfloat16", "conv1d_mma"),
    Arithmetic("PyTorch float32", "float32", None),
    Arithmetic("PyTorch float16", "float16", None),
    Arithmetic("PyTorch bfloat16", "bfloat16", None),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """The errors of one arithmetic on one layer and one kind of data.

    Attributes:
        max_of_bound, rms_of_bound: of |y - y*| over the error bound of the arithmetic's own dtype and precision.
        max_units, rms_units: of |y - y*| less the rounding of the output, over 2**-24 times sum |w|*|x|.
    """

    arithmetic: str
    terms: int
    data: str
    max_of_bound: float
    rms_of_bound: float
    max_units: float
    rms_units: float


def layer(channels: int, arithmetic: Arithmetic) -> ConvProblem:
    return ConvProblem(
        "conv1d", 1, channels, 32, 34, 3, dtype=arithmetic.dtype, has_bias=False, precision=arithmetic.precision
    )


def data_of(problem: ConvProblem, kind: str) -> Data:
    if kind != "skewed":
        return cases.random_data(problem, 5, "cancelling" if kind == "cancelling" else "normal")
    rng = np.random.default_rng(5)
    dtype = cases.random_data(problem, 0).input.dtype
    x = np.exp2(rng.uniform(-4, 4, problem.input_shape)).astype(dtype)
    w = np.exp2(rng.uniform(-6, 0, problem.weight_shape)).astype(dtype)
    return Data(x, w, None)


def measure(arithmetic: Arithmetic, channels: int, kind: str, run: Callable[[ConvProblem, Data], Array]) -> Figure:
    """Compute one layer and compare it with the reference.

    Raises:
        AssertionError: a result of gpuconv exceeds its bound.
    """
    problem = layer(channels, arithmetic)
    data = data_of(problem, kind)
    output = np.asarray(run(problem, data)).astype(np.float64)
    exact = reference.compute(problem, *data)
    error, bound = np.abs(output - exact), reference.error_bound(problem, *data, exact=exact)
    if arithmetic.family is not None:
        assert (error <= bound).all(), f"{arithmetic.name} exceeds its bound on {problem}, {kind} data"
    magnitude = reference.compute(problem, *(None if a is None else np.abs(a.astype(np.float64)) for a in data))
    output_roundoff = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(problem.dtype, 0.0)
    units = np.maximum(error - output_roundoff * np.abs(exact), 0) / (ROUNDOFF * magnitude)
    share = error / bound
    return Figure(
        arithmetic.name,
        problem.terms,
        kind,
        float(share.max()),
        float(np.sqrt(np.mean(share**2))),
        float(units.max()),
        float(np.sqrt(np.mean(units**2))),
    )


def runners(on_gpu: bool) -> Callable[[Arithmetic], Callable[[ConvProblem, Data], Array] | None]:
    """Functions that compute an arithmetic on this machine; None for what is not installed."""
    torch = optional_module("torch")
    if on_gpu and torch is not None and not torch.cuda.is_available():
        torch = None

    def by_torch(problem: ConvProblem, data: Data) -> Array:
        device = "cuda" if on_gpu else "cpu"
        torch.backends.cudnn.allow_tf32 = False
        x, w = (torch.from_numpy(a.astype(np.float32)).to(device, getattr(torch, problem.dtype)) for a in data[:2])
        return np.asarray(torch.nn.functional.conv1d(x, w).float().cpu().numpy())

    def on_the_gpu(family: str) -> Callable[[ConvProblem, Data], Array]:
        def run(problem: ConvProblem, data: Data) -> Array:
            cupy = runtime.cupy_module()
            device = runtime.device(0)
            choice = dispatch.choose(problem, Layout.contiguous(problem), device, family)
            x, w = (cupy.asarray(a) for a in data[:2])
            output = cupy.empty(problem.output_shape, x.dtype)
            runtime.Executor(choice, ("input", "weight", "output")).run(x, w, output)
            return np.asarray(cupy.asnumpy(output))

        return run

    def on_the_host(family: str) -> Callable[[ConvProblem, Data], Array]:
        from tests import hostcuda

        device = Device.from_arch("sm_90")
        return lambda problem, data: hostcuda.compute(problem, *data, family=family, device=device)

    def choose(arithmetic: Arithmetic) -> Callable[[ConvProblem, Data], Array] | None:
        if arithmetic.family is None:
            return by_torch if torch is not None else None
        return on_the_gpu(arithmetic.family) if on_gpu else on_the_host(arithmetic.family)

    return choose


def work(*, on_gpu: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """One piece of work for each installed arithmetic, layer and kind of data, as bench.gpu_report needs them."""
    choose = runners(on_gpu)
    for arithmetic in ARITHMETICS:
        run = choose(arithmetic)
        for channels, kind in product(CHANNELS, DATA) if run is not None else ():
            yield f"{arithmetic.name} {channels} {kind}", partial(_record, arithmetic, channels, kind, run)


def _record(*measured: Any) -> dict[str, Any]:
    return asdict(measure(*measured))


def table(figures: Sequence[Figure], where: str) -> Table:
    result = Table(title=f"Errors against float64, {where}", title_justify="left")
    result.add_column("arithmetic")
    result.add_column("products", justify="right")
    result.add_column("data")
    for heading in ("max / bound", "RMS / bound", "max in 2^-24 of the terms", "RMS in 2^-24"):
        result.add_column(heading, justify="right")
    for f in figures:
        result.add_row(
            f.arithmetic, f"{f.terms}", f.data, f"{f.max_of_bound:.3f}", f"{f.rms_of_bound:.4f}",
            f"{f.max_units:.3g}", f"{f.rms_units:.3g}",
        )  # fmt: skip
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file as well")
    arguments = parser.parse_args(argv)

    on_gpu = missing_gpu() is None
    where = runtime.device(0).name if on_gpu else "kernels on the CPU by the published arithmetic of sm_90"
    figures = [Figure(**piece()) for _, piece in work(on_gpu=on_gpu)]
    Console(width=None if sys.stdout.isatty() else 130).print(table(figures, where))
    if arguments.json:
        described = asdict(runtime.device(0)) if on_gpu else {"name": "CPU", "arithmetic": where}
        write_json(arguments.json, {**environment(described), "figures": [asdict(figure) for figure in figures]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
