"""Checks a result against gpuconv.reference before it is timed.

Whole layers are far too large for a float64 reference, so windows are cut out of them: a few output channels by a
stretch of the output, at the ends of every axis and at random positions. Each window is a convolution problem of its
own. Outside the windows, every element must have been written (outputs are poisoned with NaN where the implementation
accepts one) and be finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuconv import cases, reference
from gpuconv.peers import PEER_TOLERANCE
from gpuconv.problem import ConvProblem, WeightGradientProblem

from ..modes import Direction

Array = npt.NDArray[Any]
Part = tuple[slice, ...]
Fetch = Callable[[Part], Array]

# Products in one window: keeps the reference of a layer well under a second.
_PRODUCTS = 1_000_000
_CHANNELS = 4
_LONGEST = 64
_GRADIENT_PRODUCTS = 50_000_000
_RANDOM_WINDOWS = 6


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a result is right, its relative error over the windows, and what is wrong with it."""

    ok: bool
    error: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Window:
    """A part of the output, and the problem that yields it alone.

    Attributes:
        problem: one sample, one group, the channels and positions of the window.
        input, weight, bias, output: where its arrays lie in those of the whole layer.
    """

    problem: ConvProblem
    input: Part
    weight: Part
    bias: Part
    output: Part


def windows(problem: ConvProblem) -> list[Window]:
    """The windows of a problem: the corners of (sample, group, position), then random ones."""
    p = problem
    rng = np.random.default_rng(0)
    channels = min(p.C_out_g, _CHANNELS)
    length = max(1, min(p.L_out, _LONGEST, _PRODUCTS // (channels * p.terms)))
    corners = [
        (n, g, c, start)
        for n in {0, p.N - 1}
        for g, c in {(0, 0), (p.groups - 1, p.C_out_g - channels)}
        for start in {0, p.L_out - length}
    ]
    last = (p.N - 1, p.groups - 1, p.C_out_g - channels, p.L_out - length)
    scattered = [tuple(int(rng.integers(0, limit + 1)) for limit in last) for _ in range(_RANDOM_WINDOWS)]
    chosen = dict.fromkeys([*sorted(corners), *scattered])
    return [_window(p, n, g, c, channels, start, length) for n, g, c, start in chosen]


def _window(p: ConvProblem, n: int, g: int, c: int, channels: int, start: int, length: int) -> Window:
    one_group = replace(p, N=1, C_in=p.C_in_g, C_out=channels, groups=1, batched=True)
    piece, positions = cases.chunk(one_group, start, start + length)
    inputs = slice(g * p.C_in_g, (g + 1) * p.C_in_g)
    outputs = slice(g * p.C_out_g + c, g * p.C_out_g + c + channels)
    sample = slice(n, n + 1)
    return Window(
        piece,
        input=(sample, inputs, positions),
        weight=(inputs, slice(c, c + channels), slice(None)) if p.transposed else (outputs, slice(None), slice(None)),
        bias=(outputs,),
        output=(sample, outputs, slice(start, start + length)),
    )


class Oracle:
    """The reference of one set of buffers, computed once for all implementations.

    Args:
        windows: yields parts of the result, each with its reference.
    """

    def __init__(self, windows: Iterator[tuple[Part, reference.Sums]]) -> None:
        self._windows = windows
        self._known: list[tuple[Part, reference.Sums, Array]] | None = None

    def judge(self, output: Fetch, *, mode: str, all_finite: bool, bounded: bool) -> Verdict:
        """Judge a result.

        Args:
            output: returns the given part of it.
            mode: the number format, which decides what a peer may show.
            all_finite: whether every element of it is finite.
            bounded: hold it to gpuconv's computed error bound instead of the peers' tolerance.
        """
        if not all_finite:
            return Verdict(False, float("inf"), "not every element is written and finite")
        if self._known is None:
            self._known = [(part, sums, sums.exact()) for part, sums in self._windows]
        squares = np.zeros(2)
        wrong = ""
        for part, sums, exact in self._known:
            y = np.asarray(output(part))
            wide = y.astype(exact.dtype)
            squares += np.sum(np.abs(wide - exact) ** 2), np.sum(np.abs(exact) ** 2)
            if bounded and not wrong and not (right := sums.within_bound(y)).all():
                wrong = _describe(part, right, wide, exact)
        error = float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0
        tolerance = PEER_TOLERANCE[mode]
        if not bounded and not error <= tolerance:
            wrong = f"relative error {error:.1e}, expected at most {tolerance:.0e}"
        return Verdict(not wrong, error, wrong)


def oracle_of(problem: ConvProblem, direction: Direction, arrays: Sequence[Fetch | None]) -> Oracle:
    """The oracle of a pass.

    Args:
        problem: of the forward pass.
        direction: the pass.
        arrays: return the given part of the input, the weight, and the bias (None where there is none) or grad_output,
            as a NumPy array.
    """
    x, w, third = arrays
    assert x is not None
    assert w is not None
    if direction == "forward":
        return Oracle(_of_output(problem, x, w, third))
    assert third is not None, "a gradient is one of an output"
    if direction == "grad_input":
        conjugate: Fetch = (lambda part: w(part).conj()) if problem.is_complex else w
        return Oracle(_of_output(problem.adjoint(), third, conjugate, None))
    p = WeightGradientProblem.of(problem)
    return Oracle(_of_weight(p, x, third) if p.transposed else _of_weight(p, third, x))


def _of_output(
    problem: ConvProblem, input: Fetch, weight: Fetch, bias: Fetch | None
) -> Iterator[tuple[Part, reference.Sums]]:
    for window in windows(problem):
        b = None if bias is None else bias(window.bias)
        yield window.output, reference.convolution(window.problem, input(window.input), weight(window.weight), b)


def _of_weight(p: WeightGradientProblem, coarse: Fetch, fine: Fetch) -> Iterator[tuple[Part, reference.Sums]]:
    """Windows of a weight gradient: a few channels of one group on either side and a few taps."""
    rows, columns = min(p.C_coarse_g, 2), min(p.C_fine_g, 2)
    taps = max(1, min(p.K, _GRADIENT_PRODUCTS // (max(1, p.N * p.L_coarse) * rows * columns)))
    rng = np.random.default_rng(0)
    last = (p.groups - 1, p.C_coarse_g - rows, p.C_fine_g - columns, p.K - taps)
    scattered = [tuple(int(rng.integers(0, limit + 1)) for limit in last) for _ in range(2)]
    everything = slice(None)
    for g, r, c, k in dict.fromkeys([(0, 0, 0, 0), last, *scattered]):
        of_coarse = slice(g * p.C_coarse_g + r, g * p.C_coarse_g + r + rows)
        of_fine = slice(g * p.C_fine_g + c, g * p.C_fine_g + c + columns)
        window = replace(
            p, C_coarse=rows, C_fine=columns, K=taps, groups=1, padding_left=p.padding_left - k * p.dilation
        )
        sums = reference.weight_gradient(window, coarse((everything, of_coarse)), fine((everything, of_fine)))
        yield (of_coarse, slice(c, c + columns), slice(k, k + taps)), sums


def _describe(part: tuple[slice, ...], right: npt.NDArray[np.bool_], got: Array, exact: Array) -> str:
    first = tuple(int(i) for i in np.argwhere(~right)[0])
    place = tuple(axis.start + i for axis, i in zip(part, first, strict=True))
    return (
        f"output{list(place)} is {got[first]:.7g}, expected {exact[first]:.7g}: outside the error bound "
        f"({int((~right).sum())} of {right.size} elements of this window)"
    )
