"""The width of a kernel's indices, given how far beyond the problem's arrays the kernel forms offsets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..fusion import ACTIVATION_ARRAYS, INPUT_ACTIVATION_ARRAYS, RESIDUAL
from ..problem import ConvProblem, Problem, WeightGradientProblem
from .base import Layout
from .product import Product

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Overhang:
    """How far behind the ends of a problem's axes a kernel forms offsets before it checks that the elements exist.

    Attributes:
        samples: samples behind the last.
        rows: channels behind the last of the output; in a weight gradient, of coarse.
        channels: channels behind the last of the input; in a weight gradient, of fine.
        positions: positions behind the last of a product (`Product.positions`); in gradients, of coarse or grad_output.
            None where every position is checked before its offset is formed.
        taps: taps behind the last.
        arrays: the arrays in which it forms such offsets; None for all.
    """

    samples: int = 0
    rows: int = 0
    channels: int = 0
    positions: int | None = None
    taps: int = 0
    arrays: tuple[str, ...] | None = None


def index_bits(problem: Problem, layout: Layout, overhang: Overhang, *counts: int) -> int:
    """32 where every index and offset of a launch fits a signed 32-bit integer, else 64.

    `counts` are the largest values of a kernel's other counters: results, blocks, columns, terms.
    """
    formed = _formed_extents(problem, overhang)
    if overhang.arrays is not None:
        formed |= {name: shape for name, shape in problem.shapes.items() if name not in overhang.arrays}
    # A position outside a row is up to a row away from the sample that it stands for; kernels multiply that distance.
    is_mapped = getattr(problem, "padding_mode", "zeros") != "zeros"
    return width(
        layout,
        {name: formed[name] for name in problem.shapes},
        *counts,
        *_positions(problem, overhang),
        limit=INT32_MAX // 2 if is_mapped else INT32_MAX,
    )


def width(layout: Layout, formed: Mapping[str, tuple[int, ...]], *values: int, limit: int = INT32_MAX) -> int:
    """32 where a signed 32-bit integer holds every offset, stride and index of some arrays, and other values; else 64.

    Args:
        layout: the layouts of the arrays, by name.
        formed: by name, extents that contain every index of which an offset is formed.
        values: other values that are formed.
        limit: the largest value that is allowed.
    """
    found = [*values]
    for name, extents in formed.items():
        # Params also holds the strides of axes of extent 1, which no offset uses.
        found += (layout[name].reach(extents), *map(abs, layout[name].strides), *extents)
    return 32 if max(found) <= limit else 64


def _formed_extents(problem: Problem, overhang: Overhang) -> dict[str, tuple[int, ...]]:
    """For each array, extents that contain every index of which a kernel forms an offset."""
    o = overhang
    if isinstance(problem, ConvProblem):
        p, q = problem, Product.of(problem)
        N, C_in, C_out, taps = p.N + o.samples, p.C_in + o.channels, p.C_out + o.rows, p.K + o.taps
        L_in, L_out = p.L_in, p.L_out
        if o.positions is not None:
            last = q.first + q.positions + o.positions + 1
            L_in = max(L_in, last * q.column_step + (0 if p.transposed else p.padding_left) + p.dilation * taps)
            L_out = max(L_out, last * q.phases)
        return {
            "input": (N, C_in, L_in),
            "weight": (C_in, p.C_out_g + o.rows, taps) if p.transposed else (C_out, p.C_in_g + o.channels, taps),
            "bias": (C_out,),
            "output": (N, C_out, L_out),
            RESIDUAL: (N, C_out, L_out),
            **dict.fromkeys(ACTIVATION_ARRAYS, (C_out,)),
            **dict.fromkeys(INPUT_ACTIVATION_ARRAYS, (C_in,)),
        }
    if isinstance(problem, WeightGradientProblem):
        w = problem
        coarse, fine = w.L_coarse, w.L_fine
        if o.positions is not None:
            coarse += o.positions
            fine = max(fine, coarse * w.stride + w.padding_left + w.dilation * (w.K + o.taps))
        return {
            "coarse": (w.N + o.samples, w.C_coarse + o.rows, coarse),
            "fine": (w.N + o.samples, w.C_fine + o.channels, fine),
            "grad_weight": (w.C_coarse + o.rows, w.C_fine_g + o.channels, w.K + o.taps),
        }
    (N, C, L), result = problem.shapes.values()
    return {"grad_output": (N + o.samples, C + o.rows, L + (o.positions or 0)), "grad_bias": result}


def _positions(problem: Problem, overhang: Overhang) -> Iterator[int]:
    """The largest positions, and intermediate values, that kernels form before they check them."""
    more = overhang.positions or 0
    if isinstance(problem, ConvProblem):
        p, q = problem, Product.of(problem)
        last = q.first + q.positions + more + 1
        # Params also holds the dilation of a single tap, which no offset uses.
        span = p.dilation * max(1, p.K - 1 + overhang.taps) + 1 + p.stride
        yield p.L_in + max(p.padding_left + p.padding_right, last * q.column_step + p.padding_left) + span
        yield p.L_out + max(p.padding_right, last * q.phases) + p.padding_left + span
        if p.transposed:  # the first tap of a phase is found modulo tap_step
            tap_step = p.stride // math.gcd(p.stride, p.dilation)
            yield from (tap_step * tap_step, tap_step * p.dilation, (q.taps + 1) * p.stride, p.K + tap_step)
    elif isinstance(problem, WeightGradientProblem):
        w = problem
        yield (w.L_coarse + more) * w.stride + w.L_fine + w.padding_left + w.dilation * (w.K + overhang.taps)
