"""Measures the NumPy path beside PyTorch's CPU build."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuconv import cpu
from gpuconv.problem import ConvProblem, WeightGradientProblem, numpy_dtype

from . import peers
from .check import Oracle, Verdict, WeightOracle, oracle_of
from .directions import Direction, of_forward, our_function
from .layers import Ceilings
from .measure import Absent, Buffers, Case, Refused
from .modes import Mode
from .results import versions

Array = npt.NDArray[Any]

# Two sets alternate: the last-level cache of a server holds more than most layers, and gpuconv and its peers share one
# process and one cache, so a cold cache cannot be had here.
SETS = 2

# The idle threads of one library spin for a while after a call and would take the processors from the other's.
SETTLE_SECONDS = 0.01


class CpuEngine:
    """NumPy arrays, a host clock."""

    def __init__(self) -> None:
        self.ceilings = measure_ceilings()

    def describe(self) -> dict[str, Any]:
        torch = peers.optional_module("torch")
        return {
            "kind": "cpu",
            "name": "CPU",
            "torch_threads": torch.get_num_threads() if torch else None,
            "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or "default",
        }

    def settle(self) -> None:
        time.sleep(SETTLE_SECONDS)

    def elapsed(self, work: Callable[[], None]) -> float:
        start = time.perf_counter_ns()
        work()
        return (time.perf_counter_ns() - start) / 1e3

    def family(self, problem: ConvProblem | WeightGradientProblem) -> str:
        if isinstance(problem, WeightGradientProblem):
            return f"numpy {cpu.weight_gradient.method(problem).name}"
        return f"numpy {cpu.method(problem).name}"

    def estimate_seconds(self, case: Case, repeats: int) -> float:
        """A guess at the time of a case at 20 GFLOP/s and 5 GB/s for each of two implementations."""
        p = case.problem
        return 0.3 + 2 * (repeats + 5) * max(p.flops() / 2e10, p.bytes() / 5e9, 1e-3)

    @contextmanager
    def open(self, case: Case) -> Iterator[Buffers]:
        problem = case.problem
        rng = np.random.default_rng(0)
        data = [random_arrays(problem, rng, case.direction) for _ in range(SETS)]
        build = peers.conv_by_trimming
        if case.direction != "forward":
            build = partial(peers.backward, direction=case.direction)
        subjects: list[_Subject] = [
            _Subject("gpuconv", partial(_prepare_ours, case, data)),
            _Subject("PyTorch", partial(_prepare_torch, case, data, build)),
        ]
        if case.direction == "forward" and not (problem.transposed or peers.is_symmetric(problem)):
            subjects.append(_Subject("PyTorch, F.pad", partial(_prepare_torch, case, data, peers.conv_by_padding)))
        yield Buffers(SETS, SETS * problem.bytes(), subjects)


@dataclass(frozen=True, slots=True)
class _Subject:
    name: str
    prepare: Callable[[], _Runner]
    comparable: bool = True
    note: str = ""


@dataclass(slots=True)
class _Runner:
    """One implementation: `convert` turns a buffer set into its arguments' kind, `to_numpy` its results back."""

    problem: ConvProblem
    mode: Mode
    function: Callable[..., Any]
    arguments: Sequence[Sequence[Any]]
    oracle: Oracle | WeightOracle
    to_numpy: Callable[[Any], Array]
    bounded: bool
    disagreement: Callable[[Array], str] | None = None
    outputs: dict[int, Any] = field(default_factory=dict)

    def call(self, index: int) -> None:
        self.outputs[index] = self.function(*self.arguments[index])

    def capture(self, indices: Sequence[int]) -> None:
        return None

    def verdict(self) -> Verdict:
        self.call(0)
        output = self.to_numpy(self.outputs[0])
        finite = bool(np.isfinite(output).all())
        verdict = self.oracle.judge(
            lambda part: output[part], mode=self.mode.name, all_finite=finite, bounded=self.bounded
        )
        if verdict.ok and self.disagreement is not None and (note := self.disagreement(output)):
            return Verdict(False, verdict.error, note)
        return verdict

    def context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def release(self) -> None:
        self.outputs.clear()


@dataclass(slots=True)
class _TorchRunner(_Runner):
    def context(self) -> AbstractContextManager[object]:
        import torch

        return torch.inference_mode()


def random_arrays(
    problem: ConvProblem, rng: np.random.Generator, direction: Direction = "forward"
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


def _oracle(case: Case, data: Sequence[tuple[Array, Array, Array | None]]) -> Oracle | WeightOracle:
    x, w, third = data[0]
    fetch = None if third is None else (lambda part: third[part])
    return oracle_of(case.problem, case.direction, lambda part: x[part], lambda part: w[part], fetch)


def _prepare_ours(case: Case, data: Sequence[tuple[Array, Array, Array | None]]) -> _Runner:
    mode, problem, direction = case.mode, case.problem, case.direction
    if not mode.supported:
        raise Refused(f"precision {mode.precision!r} is not supported today")
    ours = our_function(problem, direction, mode.precision)

    def disagreement(output: Array) -> str:
        if direction == "grad_weight" and problem.transposed:
            return ""  # PyTorch's CPU build is wrong for some of these in float32, so the reference must do
        try:
            build = peers.conv_by_trimming if direction == "forward" else partial(peers.backward, direction=direction)
            peer = _prepare_torch(case, data, build)
        except (Absent, Refused):
            return ""  # the windows of the reference must do
        with peer.context():
            peer.call(0)
            return disagreement_between(output, peer.to_numpy(peer.outputs[0]), mode.name)

    return _Runner(problem, mode, ours, data, _oracle(case, data), np.asarray, True, disagreement)


def _prepare_torch(
    case: Case,
    data: Sequence[tuple[Array, Array, Array | None]],
    build: Callable[[ConvProblem], peers.Function],
) -> _TorchRunner:
    mode, problem = case.mode, case.problem
    torch = peers.optional_module("torch")
    if torch is None:
        raise Absent("PyTorch is not installed")
    if mode.name == "tf32":
        raise Refused("the CPU has no TF32")

    def tensor(array: Array | None) -> Any:
        if array is None:
            return None
        if problem.dtype == "bfloat16":  # PyTorch does not know ml_dtypes
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def array(result: Any) -> Array:
        if problem.dtype == "bfloat16":
            return np.asarray(result.contiguous().view(torch.uint16).numpy().view(numpy_dtype("bfloat16")))
        return np.asarray(result.numpy())

    arguments = [[tensor(a) for a in buffers] for buffers in data]
    return _TorchRunner(problem, mode, build(problem), arguments, _oracle(case, data), array, False)


def disagreement_between(ours: Array, theirs: Array, mode: str) -> str:
    """What is wrong where two whole outputs of variance 1 differ by more than any rounding; empty where nothing is.

    The windows of the reference cover little of a large output; this covers all of it, with less precision.
    """
    from .check import PEER_TOLERANCE

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
    flops |= dict.fromkeys(("float16", "bfloat16"), flops["float32"])
    return Ceilings(f"this CPU, NumPy {versions('numpy')['numpy']}", copy, flops)
