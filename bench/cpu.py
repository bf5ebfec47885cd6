"""Measures the NumPy path of gpuconv and PyTorch's CPU build on the benchmark layers.

    python -m bench.cpu [--threads 1,2] [--modes float32,float64] [--direction grad_weight] [--shapes] [--quick]

Each layer runs at its own batch, or at the largest batch that needs at most 2 GiB and 20 GFLOP; a layer that exceeds
this with one sample is left out. Both libraries get the same arrays and the same number of threads, allocate their
output in each call, and are timed in turns in one process, so that a busy machine slows both. The shortest of many
times is reported, since other processes can only make a call longer. Before a layer is timed, parts of the result are
compared with gpuconv.reference, and all of it with PyTorch's; a wrong result is not timed and fails the run.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from bench.arguments import count, counts, listed
from bench.layers import Ceilings, Layer, load
from bench.modes import DIRECTIONS, MODES, Direction, Mode, of_forward, our_function
from bench.speed import peers
from bench.speed.check import PEER_TOLERANCE, Oracle, Verdict, oracle_of
from bench.speed.measure import Absent, Buffers, Case, Method, Refused, Subject, measure
from bench.speed.results import RunResult, ceilings_of, environment, versions, write_json
from bench.speed.schedule import select
from bench.speed.tables import print_report
from gpuconv import cpu
from gpuconv.problem import ConvProblem, WeightGradientProblem, numpy_dtype

Array = npt.NDArray[Any]

MAX_BYTES = 2 * 1024**3
MAX_FLOPS = 20 * 10**9

# The limits of --quick.
QUICK_BYTES = 64 * 1024**2
QUICK_FLOPS = 10**9

# The shortest turn of a library, in seconds.
TURN = 0.03

# Kinds of shapes that no layer has: short rows, many groups, strides with dilation, many taps, half a millisecond of
# work, small calls.
SHAPES: dict[str, ConvProblem] = {
    "short rows 4096x16x8": ConvProblem("conv1d", 4096, 16, 16, 8, 3, 1, 1, 1),
    "short rows 10000x8x16": ConvProblem("conv1d", 10_000, 8, 8, 16, 5, 1, 2, 2),
    "short rows 1024x64x4": ConvProblem("conv1d", 1024, 64, 64, 4, 3, 1, 1, 1),
    "short rows 20000x16x6 to 1": ConvProblem("conv1d", 20_000, 16, 1, 6, 2),
    "transposed short rows": ConvProblem("conv_transpose1d", 4096, 16, 16, 8, 3, 1, 1, 1),
    "groups of 2": ConvProblem("conv1d", 4, 2048, 2048, 100, 3, 1, 1, 1, 1, 1024),
    "groups of 4": ConvProblem("conv1d", 8, 128, 128, 200, 3, 1, 1, 1, 1, 32),
    "groups of 8": ConvProblem("conv1d", 8, 64, 64, 1000, 3, 1, 1, 1, 1, 8),
    "groups of 128": ConvProblem("conv1d", 8, 256, 256, 500, 3, 1, 1, 1, 1, 2),
    "transposed groups of 3 to 2": ConvProblem("conv_transpose1d", 300, 1536, 1024, 5, 3, 1, 0, 0, 1, 512),
    "transposed stride 3 dilation 2": ConvProblem("conv_transpose1d", 8, 64, 32, 200, 4, 3, 0, 0, 2),
    "transposed stride 2": ConvProblem("conv_transpose1d", 8, 128, 64, 512, 3, 2, 1, 1, 1, 1, 1),
    "depthwise stride 4": ConvProblem("conv1d", 8, 256, 256, 4000, 5, 4, 2, 2, 1, 256),
    "one channel K 65536": ConvProblem("conv1d", 1, 1, 1, 131_072, 65_536),
    "one dot product": ConvProblem("conv1d", 1, 1, 1, 2**20 + 1, 2**20 + 1),
    "five channels K 400000": ConvProblem("conv1d", 1, 5, 1, 400_500, 400_000, 10),
    "transposed K 20001 dilation 17": ConvProblem("conv_transpose1d", 1, 1, 1, 10, 20_001, 1, 0, 0, 17),
    "transposed K 96000": ConvProblem("conv_transpose1d", 1, 1, 1, 200, 96_000),
    "depthwise short rows 512x64x8": ConvProblem("conv1d", 512, 64, 64, 8, 3, 1, 1, 1, 1, 64),
    "middle 1x128x200": ConvProblem("conv1d", 1, 128, 128, 200, 5, 1, 2, 2),
    "middle 2x256x100": ConvProblem("conv1d", 2, 256, 256, 100, 3, 1, 1, 1),
    "middle 64x256x8": ConvProblem("conv1d", 64, 256, 256, 8, 3, 1, 1, 1),
    "small call 1x16x100": ConvProblem("conv1d", 1, 16, 16, 100, 3),
    "small padded call 1x8x64": ConvProblem("conv1d", 1, 8, 8, 64, 3, 1, 1, 1, has_bias=True),
    "small transposed call 1x8x64": ConvProblem("conv_transpose1d", 1, 8, 8, 64, 4, 2, 1, 1),
    "tiny call 1x1x8": ConvProblem("conv1d", 1, 1, 1, 8, 3),
}


class CpuEngine:
    """NumPy arrays, a host clock, one set of buffers: the caches of a CPU cannot be kept cold for two libraries.

    Args:
        pause: seconds before each turn, in which the other library's idle threads stop spinning.
        ceilings: of the machine, measured where None.
    """

    def __init__(self, pause: float = 0.15, ceilings: Ceilings | None = None) -> None:
        self.pause = pause
        # Until such a large block has been freed once, glibc returns every large block to the system, and the pages of
        # the next one cost more than many of these convolutions. Times would depend on the order of the layers.
        np.empty(30 * 1024**2, np.uint8)
        self.ceilings = ceilings or measure_ceilings()

    def describe(self) -> dict[str, Any]:
        torch = peers.optional_module("torch")
        return {"kind": "cpu", "name": "CPU", "torch_threads": torch.get_num_threads() if torch else None}

    def elapsed(self, work: Callable[[], None]) -> float:
        start = time.perf_counter_ns()
        work()
        return (time.perf_counter_ns() - start) / 1e3

    def sample(self, work: Callable[[], None]) -> list[float]:
        """A turn: a pause, a call that is not counted, then calls for `TURN` seconds, at least one."""
        time.sleep(self.pause)
        work()
        end = time.perf_counter() + TURN
        times = [self.elapsed(work)]
        while time.perf_counter() < end:
            times.append(self.elapsed(work))
        return times

    def family(self, problem: ConvProblem | WeightGradientProblem) -> str:
        if isinstance(problem, WeightGradientProblem):
            return cpu.weight_gradient.method(problem).name
        return cpu.method(problem).name

    @contextmanager
    def open(self, case: Case) -> Iterator[Buffers]:
        problem, direction = case.problem, case.direction
        data = random_arrays(problem, np.random.default_rng(0), direction)
        oracle = oracle_of(problem, direction, [None if array is None else array.__getitem__ for array in data])
        plain = partial(_prepare_torch, case, data, oracle, partial(peers.plain, problem, direction))
        subjects = [Subject("gpuconv", partial(_prepare_ours, case, data, oracle, plain)), Subject("PyTorch", plain)]
        if direction == "forward" and not (problem.transposed or peers.is_symmetric(problem)):
            padding = partial(_prepare_torch, case, data, oracle, partial(peers.conv_by_padding, problem))
            subjects.append(Subject("PyTorch, F.pad", padding))
        yield Buffers(1, problem.bytes(), subjects)


@dataclass(slots=True)
class _Runner:
    """One implementation on arrays of its own kind; `to_numpy` makes NumPy's of its results."""

    function: Callable[..., Any]
    arguments: Sequence[Any]
    oracle: Oracle
    mode: Mode
    to_numpy: Callable[[Any], Array] = np.asarray
    settings: Callable[[], AbstractContextManager[object]] = nullcontext
    bounded: bool = False
    disagreement: Callable[[Array], str] | None = None
    output: Any = field(default=None)

    def call(self, index: int) -> None:
        self.output = self.function(*self.arguments)

    def capture(self, indices: Sequence[int]) -> None:
        return None

    def verdict(self) -> Verdict:
        output = self.result()
        finite = bool(np.isfinite(output).all())
        verdict = self.oracle.judge(output.__getitem__, mode=self.mode.name, all_finite=finite, bounded=self.bounded)
        if verdict.ok and self.disagreement is not None and (note := self.disagreement(output)):
            return Verdict(False, verdict.error, note)
        return verdict

    def result(self) -> Array:
        with self.settings():
            self.call(0)
            return self.to_numpy(self.output)

    def context(self) -> AbstractContextManager[object]:
        return self.settings()

    def release(self) -> None:
        self.output = None


def random_arrays(
    problem: ConvProblem, rng: np.random.Generator, direction: Direction
) -> tuple[Array, Array, Array | None]:
    """Normal input, weight, and bias or grad_output, scaled so that results have variance 1."""

    def draw(shape: Sequence[int], scale: float) -> Array:
        values = rng.standard_normal(shape, dtype=np.float32)
        if problem.is_complex:
            values = values + 1j * rng.standard_normal(shape, dtype=np.float32)
        return np.asarray((values * np.float32(scale)).astype(numpy_dtype(problem.dtype)))

    scale = 1 / math.sqrt(max(of_forward(problem, direction).terms, 1))
    if direction != "forward":
        return draw(problem.input_shape, 1.0), draw(problem.weight_shape, 1.0), draw(problem.output_shape, scale)
    bias = draw((problem.C_out,), 1.0) if problem.has_bias else None
    return draw(problem.input_shape, 1.0), draw(problem.weight_shape, scale), bias


def _prepare_ours(case: Case, data: Sequence[Array | None], oracle: Oracle, peer: Callable[[], _Runner]) -> _Runner:
    problem, mode, direction = case.problem, case.mode, case.direction

    def disagreement(output: Array) -> str:
        if direction == "grad_weight" and problem.transposed:
            return ""  # PyTorch's CPU build is wrong for some of these in float32, so the reference must do
        try:
            return disagreement_between(output, peer().result(), mode.name)
        except (Absent, Refused):
            return ""  # the windows of the reference must do

    ours = our_function(problem, direction, mode.precision)
    return _Runner(ours, data, oracle, mode, bounded=True, disagreement=disagreement)


def _prepare_torch(
    case: Case, data: Sequence[Array | None], oracle: Oracle, build: Callable[[], peers.Function]
) -> _Runner:
    torch = peers.optional_module("torch")
    if torch is None:
        raise Absent("PyTorch is not installed")
    if case.mode.name == "tf32":
        raise Refused("the CPU has no TF32")
    is_bfloat16 = case.mode.dtype == "bfloat16"  # which PyTorch does not exchange with NumPy

    def tensor(array: Array | None) -> Any:
        if array is None:
            return None
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16) if is_bfloat16 else torch.from_numpy(array)

    def array(result: Any) -> Array:
        if is_bfloat16:
            return np.asarray(result.contiguous().view(torch.uint16).numpy().view(numpy_dtype("bfloat16")))
        return np.asarray(result.numpy())

    return _Runner(build(), [tensor(a) for a in data], oracle, case.mode, array, torch.inference_mode)


def disagreement_between(ours: Array, theirs: Array, mode: str) -> str:
    """What is wrong where two whole outputs of variance 1 differ by more than any rounding; empty where nothing is.

    The windows of the reference cover little of a large output; this covers all of it, with less precision.
    """
    wide = np.complex128 if np.iscomplexobj(ours) else np.float64
    limit = 20 * PEER_TOLERANCE[mode]
    largest = 0.0
    for mine, other in zip(ours.reshape(len(ours), -1), theirs.reshape(len(theirs), -1), strict=True):
        difference = np.abs(mine.astype(wide) - other.astype(wide))
        largest = max(largest, float(difference.max(initial=0.0)))
    return "" if largest <= limit else f"differs from PyTorch by up to {largest:.2g}, more than {limit:.2g}"


def measure_ceilings() -> Ceilings:
    """A large copy, and float32 and float64 matrix products through NumPy's BLAS; best of five."""

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    source = np.random.default_rng(0).standard_normal(2**24)
    target = np.empty_like(source)
    copy = 2 * source.nbytes / best(lambda: np.copyto(target, source))
    flops = {}
    n = 1024
    for dtype in ("float32", "float64"):
        a = source[: n * n].reshape(n, n).astype(dtype)
        flops[dtype] = 2 * n**3 / best(partial(np.matmul, a, a, np.empty_like(a)))
    flops |= dict.fromkeys(("float16", "bfloat16", "tf32"), flops["float32"])
    return Ceilings(f"this CPU, NumPy {versions('numpy')['numpy']}", copy, flops)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--filter", default="", metavar="REGEX", help="only layers whose name matches")
    parser.add_argument("--quick", action="store_true", help="only layers of up to 64 MiB and 1 GFLOP, 3 repeats")
    parser.add_argument("--repeats", type=count, metavar="N", help="turns of each library per layer (default: 7, or 3)")
    parser.add_argument(
        "--shapes", action="store_true", help="kinds of shapes that no layer has, in place of the layers"
    )
    parser.add_argument("--modes", default="float32", help="comma-separated, or all (default: %(default)s)")
    parser.add_argument("--direction", choices=DIRECTIONS, default="forward", help="the pass (default: %(default)s)")
    parser.add_argument("--threads", type=counts, default="2", metavar="N[,N...]", help="of each library (default: 2)")
    parser.add_argument(
        "--pause",
        type=float,
        default=0.15,
        metavar="SECONDS",
        help="before each turn, for the other library's idle threads to stop spinning (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the result there, one file for each number of threads"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a result was wrong, 2 bad usage."""
    parser = build_parser()
    args = parser.parse_args(argv)
    repeats = args.repeats or (3 if args.quick else 7)
    modes = listed(args.modes, {mode.name: mode for mode in MODES}, "mode", parser)
    layers, limits = load(), (QUICK_BYTES, QUICK_FLOPS) if args.quick else (MAX_BYTES, MAX_FLOPS)
    if args.shapes:
        layers = tuple(Layer(name, problem, kind="shape") for name, problem in SHAPES.items())
        limits = sys.maxsize, sys.maxsize
    cases, left_out = select(layers, modes, args.filter, *limits, args.direction)
    if not cases:
        parser.error(f"nothing of this size matches {args.filter!r}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    failed = False
    for threads in args.threads:
        with limited(threads) as libraries:
            engine = CpuEngine(args.pause)
            device = {**engine.describe(), "threads": threads, "libraries": libraries}
            settings = {"direction": args.direction, "repeats": repeats, "filter": args.filter, "threads": threads}
            method = Method(repeats, 1.0, ("eager",), least=True)
            with Progress(console=Console(stderr=True)) as progress:
                measured = [measure(case, engine, method, time.monotonic) for case in progress.track(cases)]
        result = RunResult(
            environment(device), settings, ceilings_of(engine.ceilings), tuple(measured), tuple(left_out)
        )
        console.print(f"{threads} threads; {', '.join(libraries)}; least times", soft_wrap=True, highlight=False)
        print_report(result, console)
        if args.json:
            several = len(args.threads) > 1
            file = args.json.with_stem(f"{args.json.stem}-{threads}") if several else args.json
            write_json(file, result.to_json())
        failed = failed or any(m.ours.status != "measured" for m in measured)
    return 1 if failed else 0


@contextmanager
def limited(threads: int) -> Iterator[list[str]]:
    """Limit this process to so many processors and threads of each library; yields the libraries' versions."""
    from threadpoolctl import threadpool_info, threadpool_limits

    torch = peers.optional_module("torch")
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if usable is not None:
        os.sched_setaffinity(0, sorted(usable)[:threads])
    if torch is not None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads, user_api="blas"):
            blas = [lib for lib in threadpool_info() if lib["internal_api"] != "openmp"]
            names = [f"{lib['internal_api']} {lib['version']} ({lib.get('architecture')})" for lib in blas]
            yield [f"{name} {version}" for name, version in versions("numpy", "torch").items()] + names
    finally:
        if torch is not None:
            torch.set_num_threads(before)
        if usable is not None:
            os.sched_setaffinity(0, usable)


if __name__ == "__main__":
    sys.exit(main())
