"""A problem as the arguments of a call, and the problem of a part of its outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .forward import ConvProblem


def call_settings(problem: ConvProblem) -> dict[str, Any]:
    """The keyword arguments of the public function `problem.op` that give this problem."""
    p = problem
    settings: dict[str, Any] = {
        "stride": p.stride, "padding": p.padding, "dilation": p.dilation, "groups": p.groups
    }  # fmt: skip
    if p.transposed:
        settings["output_padding"] = p.output_padding
    if p.precision != "float32":
        settings["precision"] = p.precision
    if p.padding_mode != "zeros":
        settings["padding_mode"] = p.padding_mode
    if p.out_dtype is not None:
        settings["out_dtype"] = p.out_dtype
    return settings


def inner_outputs(problem: ConvProblem) -> range:
    """The outputs that can be computed from a chunk: all, or in modes other than "zeros" those not at an edge."""
    first, last = (0, 0) if problem.padding_mode == "zeros" else problem.edge_windows
    return range(first, problem.L_out - last)


def chunk(problem: ConvProblem, start: int, stop: int) -> tuple[ConvProblem, slice]:
    """The problem of the outputs ``start <= l_out < stop`` alone, and the positions of the input that it reads.

    An input cut into chunks must give the same bits as the whole. Needs ``0 <= start < stop <= L_out`` within
    `inner_outputs`, and for a transposed operation an input that is not empty.
    """
    p = problem
    span = p.dilation * (p.K - 1) + 1
    if not p.transposed:
        low, high = start * p.stride - p.padding_left, (stop - 1) * p.stride - p.padding_left + span
        first, last = min(max(low, 0), p.L_in), min(max(high, 0), p.L_in)
        left = min(max(-low, 0), high - low)
        right = high - low - left - (last - first)
        return replace(p, L_in=last - first, padding_left=left, padding_right=right), slice(first, last)
    # l_in feeds the outputs from l_in*stride - padding_left on, `span` of them.
    newest = (start + p.padding_left) // p.stride  # the last one whose outputs begin at or before `start`
    first = min(max(-(-(start + p.padding_left - span + 1) // p.stride), 0), newest, p.L_in - 1)
    last = min((stop - 1 + p.padding_left) // p.stride + 1, p.L_in)
    left = p.padding_left + start - first * p.stride
    surplus = (last - first - 1) * p.stride + span - left - (stop - start)
    right, extra = max(surplus, 0), max(-surplus, 0)
    piece = replace(p, L_in=last - first, padding_left=left, padding_right=right, output_padding=extra)
    return piece, slice(first, last)
