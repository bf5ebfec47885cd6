"""Convolutions by the fast Fourier transform of whole arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import runtime
from ..problem import DTYPES
from .arrays import result_type


def by_fft(x: Any, h: Any) -> Any:
    """The full convolution through transforms of the whole arrays, in the precision of the data, at least float32."""
    xp, (x, h) = runtime.array_module(x), floating(x, h)
    forward, inverse = (xp.fft.fft, xp.fft.ifft) if x.dtype.kind == "c" else (xp.fft.rfft, xp.fft.irfft)
    full = x.shape[-1] + h.shape[-1] - 1
    size = _fast_length(full)
    return inverse(forward(x, size) * forward(h, size), size)[..., :full]


def floating(x: Any, h: Any) -> tuple[Any, Any]:
    """The arrays in the dtype in which both are transformed."""
    wide = np.result_type(*(np.float64 if a.dtype.kind in "iub" else a.dtype for a in (x, h)), np.float32)
    if wide.name not in DTYPES:
        raise TypeError(f"gpuconv.signal: the dtype {result_type(x, h)} is not supported")
    return x.astype(wide, copy=False), h.astype(wide, copy=False)


def _fast_length(at_least: int) -> int:
    """The smallest product of powers of 2, 3 and 5 that is at least this number; FFTs of such lengths are fast."""
    best = 1 << (at_least - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            best = min(best, three << max(0, -(-at_least // three) - 1).bit_length())
            three *= 3
        five *= 5
    return best
