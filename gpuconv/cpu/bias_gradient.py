"""The NumPy path of the bias gradient: the sums of each channel over samples and positions."""

from __future__ import annotations

from ..problem import BiasGradientProblem
from . import limits
from .arrays import Array, Scratch, accumulator, slices
from .threads import run_blocks

# The fewest elements that are worth a block of their own.
_WORTH_A_SUM = 1_000_000


def compute(problem: BiasGradientProblem, grad_output: Array, output: Array) -> None:
    """Compute a bias gradient into all elements of `output`.

    float16 and bfloat16 are summed in float32 and rounded once.

    Args:
        problem: extents of the arrays.
        grad_output: `problem.grad_output_shape`, or that without the batch axis; native byte order, any strides.
        output: `problem.bias_shape`, any strides; it does not overlap grad_output.
    """
    p = problem
    dtype = accumulator(p.dtype)
    values = grad_output.reshape(p.grad_output_shape)
    channels = max(1, _WORTH_A_SUM // max(1, p.N * p.L))

    def sum_channels(c: slice, _: Scratch) -> None:
        # Positions first: NumPy then adds pairwise along contiguous rows, and needs no buffer.
        output[c] = values[:, c].sum(axis=2, dtype=dtype).sum(axis=0)

    blocks = [(c,) for c in slices(0, p.C, channels)]
    run_blocks(sum_channels, blocks, min(limits.MAX_WORKERS, len(blocks)), dtype, p.L)
