"""Which of a row's L samples a position stands for, inside the row and outside: cuda_src/edge.cuh for NumPy.

This is the only difference between padding modes. For positions from -padding_left to L + padding_right - 1::

    reflect    ... 2 1 | 0 1 2 ... L-1 | L-2 L-3 ...    mirrored, the sample at the edge once
    symmetric  ... 1 0 | 0 1 2 ... L-1 | L-1 L-2 ...    mirrored, the sample at the edge twice
    replicate  ... 0 0 | 0 1 2 ... L-1 | L-1 L-1 ...    the sample at the edge repeated
    circular ... L-2 L-1 | 0 1 2 ... L-1 | 0 1 ...      the samples from the other end
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PADDING_MODES = ("zeros", "reflect", "replicate", "circular", "symmetric")


def source_indices(mode: str, first: int, stop: int, L: int, step: int = 1) -> npt.NDArray[np.intp]:
    """The samples for every step-th position from first to stop - 1, in a mode other than "zeros"."""
    at = np.arange(first, stop, step)
    if mode == "replicate":
        return np.clip(at, 0, L - 1)
    if mode == "circular":
        below, above = at + L, at - L
    else:
        gap = 1 if mode == "symmetric" else 0  # 1 where the samples at the edges are repeated
        below, above = -gap - at, 2 * (L - 1) + gap - at
    return np.where(at < 0, below, np.where(at < L, at, above))


def most_positions(mode: str, left: int, right: int, L: int) -> int:
    """The largest number of positions that stand for the same sample."""
    left, right = max(left, 0), max(right, 0)
    if mode == "zeros":
        return 1
    if mode == "replicate":
        return 1 + (left + right if L == 1 else max(left, right))
    return 1 + (left > 0) + (right > 0)


def padded_samples(mode: str, left: int, right: int, L: int, *, apart: bool = True) -> tuple[range, range]:
    """The samples that occur in the padding, in a mode other than "zeros", as two ranges.

    The first range lies at the row's beginning, the second at its end. Where they overlap, `apart` joins them in the
    first and leaves the second empty.
    """
    left, right = max(left, 0), max(right, 0)
    if mode == "replicate":
        first, second = range(min(left, 1)), range(L - min(right, 1), L)
    elif mode == "circular":
        first, second = range(right), range(L - left, L)
    else:
        gap = 0 if mode == "symmetric" else 1
        first, second = range(gap, gap + left), range(L - gap - right, L - gap)
    if apart and first and second and second.start < first.stop:
        return range(min(first.start, second.start), max(first.stop, second.stop)), range(0)
    return first, second


def edge_windows(count: int, L: int, K: int, stride: int, padding_left: int, dilation: int) -> tuple[int, int]:
    """How many of the first and of the last of `count` windows of K taps reach over an edge of the row."""
    span = dilation * (K - 1) + 1
    first = min(count, -(-max(0, padding_left) // stride))
    behind = -(-(L + padding_left - span + 1) // stride)  # the first one that reaches over the right edge
    return first, count - min(count, max(first, behind))
