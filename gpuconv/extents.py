"""Output lengths, and the paddings that follow from a length, for ints and for arrays of ints.

`span` is dilation*(K - 1) + 1, the positions from the first tap of a window to the last, both included.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np


def output_length(
    transposed: bool, L_in: Any, left: Any, right: Any, stride: int, span: int, output_padding: int = 0
) -> Any:
    """L_out of either operation; the value is below 1 where there is no output."""
    if transposed:
        return (L_in - 1) * stride - left - right + span + output_padding
    return (L_in + left + right - span) // stride + 1


def resolve_padding(
    transposed: bool,
    padding: tuple[int, int] | Literal["same", "causal"],
    L_in: Any,
    stride: int,
    span: int,
    output_padding: int = 0,
) -> tuple[Any, Any, int]:
    """The padding in numbers: left, right and output_padding."""
    if padding == "causal":
        return span - 1, 0, 0
    if padding != "same":
        return *padding, output_padding
    if transposed:
        # L_out = L_in*stride: where the kernel is shorter than the stride there is nothing to trim, and output_padding
        # fills the deficit instead.
        return *_halves(max(0, span - stride)), max(0, stride - span)
    total = (-(-L_in // stride) - 1) * stride + span - L_in  # L_out = ceil(L_in/stride)
    return *_halves(np.maximum(total, 0) if hasattr(total, "ndim") else max(0, total)), 0


def _halves(total: Any) -> tuple[Any, Any]:
    """Split a total padding over both sides; the right side gets one more where it is odd."""
    return total // 2, total - total // 2
