"""Chooses the form that computes a problem: the one with the least cost by `costs`, of all that can compute it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

from ..problem import ConvProblem
from . import limits, non_finite, toeplitz
from .arrays import Array, accumulator
from .geometry import Call, Geometry, exchange, useful_taps, with_taps
from .panels import PhasePanels
from .planes import Planes
from .shift_add import ShiftAdd
from .small import Small
from .taps import Taps
from .windows import Windows


@dataclass(frozen=True, slots=True)
class Method:
    """How a problem is computed on the CPU.

    Attributes:
        name: the form.
        reason: why it is chosen.
        workspace_bytes: a bound on the memory used besides input, weight, bias and output. The calling thread keeps up
            to `limits.KEPT_SCRATCH` bytes of it for each thread of its next call.
    """

    name: str
    reason: str
    workspace_bytes: int


class Form(Protocol):
    """A way to compute a problem, with its block sizes."""

    @property
    def name(self) -> str: ...

    @property
    def reason(self) -> str:
        """Why it is chosen, for `explain`."""

    @property
    def concurrent(self) -> bool:
        """Whether blocks are computed on several threads; otherwise BLAS uses the threads."""

    def multiplies_zeros(self, p: ConvProblem) -> bool:
        """Whether padding or absent taps are multiplied, as zeros."""

    def cost(self, p: ConvProblem) -> float:
        """An estimate of the nanoseconds on one core, less what threads of BLAS save (`costs.of_blas`)."""

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        """Bounds on the elements of the scratch buffers: what all threads share, and what each has by name."""

    def run(self, call: Call, workers: int) -> None:
        """Compute the call on at most `workers` threads."""


@dataclass(frozen=True, slots=True)
class Fill:
    """The form for empty sums: it writes the bias, or zeros."""

    name: str
    reason: str
    concurrent: bool = False

    def multiplies_zeros(self, p: ConvProblem) -> bool:
        return False

    def cost(self, p: ConvProblem) -> float:
        return 0.0

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        return 0, {}

    def run(self, call: Call, workers: int) -> None:
        call.fill_with_bias()


class ChosenForm(NamedTuple):
    """The form that computes a problem, and the problem as the form sees it.

    Attributes:
        given: the problem that is to be computed.
        method: what `explain` shows.
        form: the form.
        workers: the most threads.
        problem: the one that the form computes: that of the useful taps, or with input and weight exchanged.
        taps: the useful taps.
        exchanged: input and weight are exchanged.
        separate: NaN and infinities are separated (`non_finite`).
        small: the form, if it is `Small` and can read the given arrays directly.
    """

    given: ConvProblem
    method: Method
    form: Form
    workers: int
    problem: ConvProblem
    taps: slice
    exchanged: bool
    separate: bool
    small: Small | None

    def compute(self, input: Array, weight: Array, bias: Array | None, output: Array) -> None:
        """Compute the given problem, of arrays as `gpuconv.cpu.convolve` takes them."""
        p = self.given
        if self.small is not None:
            b = bias if bias is None or p.groups == 1 else bias.reshape(p.groups, p.C_out_g)
            if self.small.compute(input, weight, b, output):
                return
        self.run(Call.of(p, input, weight, bias, output))

    def run(self, call: Call) -> None:
        if call.p is not self.problem:
            call = call.of_taps(self.problem, self.taps)
            if self.exchanged:
                call = call.exchanged(self.problem)
        if self.separate:
            non_finite.run(call, lambda part: self.form.run(part, self.workers))
        else:
            self.form.run(call, self.workers)


@lru_cache(maxsize=4096)
def choose(p: ConvProblem) -> ChosenForm:
    """The cheapest form whose scratch buffers fit into the memory that a call may use."""
    options = [(form.cost(q), form, q) for q, forms in candidates(p) for form in forms]
    options.sort(key=lambda option: option[0])
    for cost, form, q in options:
        found = chosen_form(p, q, form, cost)
        if found.method.workspace_bytes <= _allowed(p):
            return found
    return chosen_form(p, p, Taps.of(p), 0.0)


def cost(p: ConvProblem) -> float:
    """An estimate of the nanoseconds of the cheapest form on one core, for padding with zeros."""
    return min(form.cost(q) for q, forms in candidates(p) for form in forms)


def _allowed(p: ConvProblem) -> int:
    """The bytes that a call may use besides its arrays."""
    return max(limits.WORKSPACE, (math.prod(p.input_shape) + math.prod(p.output_shape)) * p.itemsize // 4)


def chosen_form(p: ConvProblem, q: ConvProblem, form: Form, cost: float) -> ChosenForm:
    """How `form` computes the problem `p` by way of `q`, which has only useful taps or is exchanged."""
    shared, buffers = form.memory(q)
    size = accumulator(p.dtype).itemsize
    separate = form.multiplies_zeros(q) and non_finite.takes(q)
    shared = shared * size + (non_finite.extra_bytes(q) if separate else 0)
    # The check of the largest buffer for finite values takes one byte per element.
    each = sum(buffers.values()) * size + max(buffers.values(), default=0)
    workers = 1
    if form.concurrent and cost > limits.WORTH_THREADS:
        workers = max(1, min(limits.MAX_WORKERS, (_allowed(p) - shared) // each))
    taps = slice(0, p.K) if q == p else useful_taps(p)
    exchanged = p.transposed and q == exchange(with_taps(p, taps))
    reason = f"few inputs, many taps: their roles exchanged; {form.reason}" if exchanged else form.reason
    small = form if isinstance(form, Small) and q == p and not separate else None
    method = Method(form.name, reason, shared + workers * each)
    return ChosenForm(p, method, form, workers, q, taps, exchanged, separate, small)


def candidates(p: ConvProblem) -> list[tuple[ConvProblem, list[Form]]]:
    """All forms that can compute a problem, and those that can with input and weight exchanged."""
    if 0 in p.output_shape:
        return [(p, [Fill("nothing", "the output is empty")])]
    if 0 in p.input_shape:
        return [(p, [Fill("bias", "the input is empty, so every sum is")])]
    taps = useful_taps(p)
    if taps.start >= taps.stop:
        return [(p, [Fill("bias", "all taps lie in the padding")])]
    if taps != slice(0, p.K):
        p = with_taps(p, taps)
    problems = [p, exchange(p)] if p.transposed and p.L_in < p.K else [p]
    if any(first >= last for first, last in (Geometry.of(q).positions(q) for q in problems)):
        return [(p, [Fill("bias", "no output has a tap")])]
    return [(q, _forms(q)) for q in problems]


def _forms(p: ConvProblem) -> list[Form]:
    forms: list[Form] = [*PhasePanels.candidates(p), *Windows.candidates(p)]
    shift_add = ShiftAdd.of(p)
    forms += [form for form in (Small.of(p), Planes.of(p)) if form is not None]
    if p.C_in_g == 1:
        forms.append(Taps.of(p))
    elif shift_add is not None:
        forms.append(shift_add)
    return [*forms, *toeplitz.candidates(p)]
