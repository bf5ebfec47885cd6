"""The NumPy path: both operations and their gradients on the CPU, through NumPy's BLAS, in bounded memory.

The output is cut into blocks, and `method` chooses, from the problem alone, the form in which a block is computed:

- small: the windows of a whole small problem are copied side by side, for one product with the weight.
- panels: the windows of a block are copied side by side into a panel, for one product with the weight.
- shift_add: one product of all taps with the input in place; its rows are then shifted and summed.
- toeplitz: neighbouring outputs of one group together, as the product of their common window with a banded matrix;
  for many short rows, the windows of all samples at once.
- windows: as toeplitz, for depthwise rows, whose windows are read in place.
- planes: sums of elementwise products of depthwise planes, of many rows at once.
- taps: one elementwise product per tap, where a group has one input channel.

Integers are computed exactly through float64 (`integers`). In padding modes other than zeros, windows that reach over
an edge are computed from copies (`edges`). What is fused is applied to blocks of the output while they are in the cache
(`fused`).

A transposed problem is treated as a convolution with several outputs at each position (`geometry`), or where the weight
is longer than the input, with the two exchanged. Taps that read only padding are left out. `choice` adds up the costs
of the parts of each form (`costs`) and takes the cheapest.

Most forms multiply zeros: padding, absent taps, the rest of a band. A zero times an infinity or a NaN is NaN, and the
sum is then not finite. So each block where this could happen is checked while it is in the cache, and if it is not
finite, it is computed again by the form taps, which leaves out padding and absent taps. Where there are too many taps
for that, `non_finite` separates such values beforehand.

The result is deterministic and within the bound of `gpuconv.reference`. Its bits depend on the problem and, because of
the order in which BLAS sums, on the layout of the arrays in memory and on the number of BLAS threads.
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
    """Compute a problem into all elements of `output`.

    float16 and bfloat16 are summed in float32, the bias included, and rounded once. A NaN or an infinity affects only
    the outputs whose windows contain it.

    Args:
        problem: extents and settings of the arrays.
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
