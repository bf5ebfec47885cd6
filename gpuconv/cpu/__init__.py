"""The NumPy path: both operations and their gradients on the CPU, through BLAS as NumPy offers it, in bounded memory.

The output is cut into blocks, and `method` chooses, from the problem alone, how a block is computed:

- small: the windows of a whole small problem are copied side by side, for one product with the weight.
- panels: the windows of a block are copied side by side into a panel, for one product with the weight as it lies.
- shift_add: one product of all taps with the input as it lies, whose rows are then shifted and summed.
- toeplitz: neighbouring outputs of one group together, as the product of their common window with a banded matrix;
  of many short rows, the windows of all samples at once.
- windows: the same of depthwise rows, whose windows are read where they lie.
- planes: sums of elementwise products of depthwise planes, of many rows at once.
- taps: elementwise products, one per tap, where a group has one input channel.

Integers are computed exactly through float64 (`integers`), and windows that reach over an edge into padding other than
zeros from copies of their own (`edges`).
What is fused is done to blocks of the output while they are in the cache (`fused`).

A transposed problem is seen as a convolution that yields several outputs at each position (`geometry`), or with its
input and its weight exchanged, where the weight is the longer one. Taps that meet nothing but padding are left out.
`choice` adds up what the parts of each form cost (`costs`) and takes the cheapest.

Most forms multiply zeros: padding, absent taps, the rest of a band. A zero is harmless until it meets an infinity or a
NaN; the element it spoils is then not finite either. So each block that could be spoilt is checked while it is in the
cache, and one that is not finite is computed again by taps, which leave out what does not exist. Where there are too
many taps for that, `non_finite` separates such values beforehand.

The result is deterministic and within the bound of `gpuconv.reference`. Its bits depend on the problem, and, since BLAS
sums in an order of its own, on the layout of the arrays in memory and on the number of BLAS's threads as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..problem import INTEGERS, ConvProblem
from . import bias_gradient, edges, fused, integers, weight_gradient
from .arrays import Array, accumulator
from .choice import Method, choose, cost

__all__ = ["Method", "accumulator", "bias_gradient", "convolve", "cost", "method", "weight_gradient"]


def method(problem: ConvProblem) -> Method:
    """The form that `convolve` uses for a problem: a pure function of the problem."""
    return fused.method(problem, _plain_method) if problem.fusion else _plain_method(problem)


def convolve(
    problem: ConvProblem,
    input: Array,
    weight: Array,
    bias: Array | None,
    output: Array,
    fused_arrays: Sequence[Array | None] = (),
) -> None:
    """Compute a problem into `output`, every element of it.

    float16 and bfloat16 are summed in float32, the bias included, and rounded once. A NaN or an infinity reaches only
    the outputs whose windows contain it.

    Args:
        problem: extents and settings; the arrays agree with it.
        input: `problem.input_shape`, native byte order, any strides.
        weight: `problem.weight_shape`, likewise.
        bias: `problem.bias_shape` or None, likewise.
        output: `problem.output_shape`, any strides; it overlaps no other argument.
        fused_arrays: where `problem.fusion` is not empty, those of `gpuconv.fusion.FUSED_ARRAYS` in order.
    """
    if problem.fusion:
        fused.convolve(problem, input, weight, bias, output, fused_arrays, _convolve)
    else:
        _convolve(problem, input, weight, bias, output)


def _plain_method(problem: ConvProblem) -> Method:
    p = integers.in_float64(problem) if problem.dtype in INTEGERS else problem
    return choose(p).method if p.padding_mode == "zeros" else edges.method(p)


def _convolve(problem: ConvProblem, input: Array, weight: Array, bias: Array | None, output: Array) -> None:
    if problem.dtype in INTEGERS:
        integers.run(convolve, problem, input, weight, bias, output)
    elif problem.padding_mode != "zeros":
        edges.convolve(problem, input, weight, bias, output)
    else:
        choose(problem).compute(input, weight, bias, output)
