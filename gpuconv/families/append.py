"""append_samples: appends new samples to the window of a stream. It is not a family, since it computes nothing.

Contract: cuda_src/append_samples.cu.
"""

from __future__ import annotations

from ..source import params_fields
from .base import ArrayLayout, Config, Launch, Layout, base_config, contiguous_strides
from .offsets import width

KERNEL = "append_samples"
BLOCK_SIZE = 128


def append_launch(
    dtype: str, window_shape: tuple[int, int, int], input_shape: tuple[int, int, int], layout: ArrayLayout
) -> tuple[Config, Launch]:
    """The kernel and its launch for a contiguous window (N, C, held + L) and an input (N, C, L) of any strides."""
    N, C, L = input_shape
    held = window_shape[-1] - L
    arrays = Layout.of(window=ArrayLayout(contiguous_strides(window_shape)), input=layout)
    # At the end of its loops a thread has advanced up to a block behind the held samples, and behind the new ones.
    bits = width(arrays, {"window": window_shape, "input": input_shape}, held + BLOCK_SIZE, L + BLOCK_SIZE, N * C)
    values = (C, held, L, *layout.strides)
    params = tuple(zip(params_fields(KERNEL), values, strict=True))
    return base_config(KERNEL, dtype, bits, BLOCK_SIZE), Launch(N * C, BLOCK_SIZE, 0, bits, params)
