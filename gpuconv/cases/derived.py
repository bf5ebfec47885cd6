"""The problem in other number formats, of other batches and of one group, and the terms of a sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from ..edge import source_indices
from ..problem import DTYPES, INTEGER_SUMS, INTEGERS, ConvProblem

# Number formats: dtypes, and float32 with precision="tf32".
NUMBER_FORMATS: tuple[str, ...] = (*DTYPES, "tf32")


def dtype_of(number_format: str) -> str:
    """The dtype of arrays in a number format."""
    return "float32" if number_format == "tf32" else number_format


def in_format(problem: ConvProblem, number_format: str) -> ConvProblem:
    """The problem in another number format, one of `NUMBER_FORMATS`."""
    precision = "tf32" if number_format == "tf32" else "float32"
    return replace(problem, dtype=dtype_of(number_format), precision=precision)


def in_integers(problem: ConvProblem, number_format: str) -> ConvProblem:
    """The problem in integers: the number format selects the dtype of the data and that of the sums."""
    number = NUMBER_FORMATS.index(number_format)
    dtype, sums = INTEGERS[number % len(INTEGERS)], INTEGER_SUMS[number % len(INTEGER_SUMS)]
    return replace(problem, dtype=dtype, precision="float32", out_dtype=sums)


def with_batch(problem: ConvProblem, N: int) -> ConvProblem:
    """The same layer on N samples."""
    return replace(problem, N=N, batched=True)


def one_group(problem: ConvProblem, g: int) -> tuple[ConvProblem, slice, slice]:
    """Group g as a problem of its own, and its input and output channels.

    The first axis of the weight is the output channels, for a transposed operation the input channels.
    """
    p = problem
    alone = replace(p, C_in=p.C_in_g, C_out=p.C_out_g, groups=1)
    return alone, slice(g * p.C_in_g, (g + 1) * p.C_in_g), slice(g * p.C_out_g, (g + 1) * p.C_out_g)


class Term(NamedTuple):
    """One product of an output element: the weight at an index of its array times the input at (channel, l_in).

    `c_in` counts within the group.
    """

    c_in: int
    k: int
    l_in: int
    channel: int
    weight_index: tuple[int, int, int]


def terms_of(problem: ConvProblem, c_out: int, l_out: int) -> Iterator[Term]:
    """The products whose sum is an output element, in the canonical order: c_in outer, k inner."""
    p = problem
    g, c_out_g = divmod(c_out, p.C_out_g)
    for c_in in range(p.C_in_g):
        channel = g * p.C_in_g + c_in
        for k in range(p.K):
            if p.transposed:
                l_in, rest = divmod(l_out + p.padding_left - k * p.dilation, p.stride)
            else:
                l_in, rest = l_out * p.stride - p.padding_left + k * p.dilation, 0
                if p.padding_mode != "zeros":
                    l_in = int(source_indices(p.padding_mode, l_in, l_in + 1, p.L_in)[0])
            if rest == 0 and 0 <= l_in < p.L_in:
                index = (channel, c_out_g, k) if p.transposed else (c_out, c_in, k)
                yield Term(c_in, k, l_in, channel, index)
