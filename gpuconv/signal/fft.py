"""Convolutions by the fast Fourier transform, of whole arrays and of overlapping blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import runtime
from ..problem import DTYPES
from .arrays import result_type

# Where one array is so many times as long as the other it is cut into blocks: transforms of all of it leave the caches.
_BLOCKS_FROM = 16


def by_fft(x: Any, h: Any) -> Any:
    """The full convolution through transforms, in the precision of the data, float32 at least."""
    if max(x.shape[-1], h.shape[-1]) > _BLOCKS_FROM * min(x.shape[-1], h.shape[-1]):
        return overlap_add(x, h)
    x, h, forward, inverse = _transforms(x, h)
    full = x.shape[-1] + h.shape[-1] - 1
    size = _fast_length(full)
    return inverse(forward(x, size) * forward(h, size), size)[..., :full]


def overlap_add(x: Any, h: Any) -> Any:
    """The full convolution of blocks whose length follows from the shorter array."""
    x, h, forward, inverse = _transforms(*((h, x) if h.shape[-1] > x.shape[-1] else (x, h)))
    xp, L, K = runtime.array_module(x), x.shape[-1], h.shape[-1]
    size = _fast_length(max(64, 8 * K))
    step = size - K + 1
    blocks = -(-L // step)
    whole = xp.zeros((*x.shape[:-1], blocks * step), x.dtype)
    whole[..., :L] = x
    spectra = forward(whole.reshape(*x.shape[:-1], blocks, step), size) * forward(h, size)[..., None, :]
    parts = inverse(spectra, size)
    full = xp.zeros((*parts.shape[:-2], (blocks + 1) * step), parts.dtype)
    full[..., : blocks * step] = parts[..., :step].reshape(*parts.shape[:-2], -1)
    tails = full[..., step:].reshape(*parts.shape[:-2], blocks, step)
    tails[..., : K - 1] += parts[..., step:]
    return full[..., : L + K - 1]


def _transforms(x: Any, h: Any) -> tuple[Any, Any, Any, Any]:
    """The arrays in dtypes that FFTs take, and the transform with its inverse."""
    xp = runtime.array_module(x)
    wide = np.result_type(*(np.float64 if a.dtype.kind in "iub" else a.dtype for a in (x, h)), np.float32)
    if wide.name not in DTYPES:
        raise TypeError(f"gpuconv.signal: the dtype {result_type(x, h)} is not supported")
    pair = (xp.fft.fft, xp.fft.ifft) if wide.kind == "c" else (xp.fft.rfft, xp.fft.irfft)
    return x.astype(wide, copy=False), h.astype(wide, copy=False), *pair


def _fast_length(at_least: int) -> int:
    """The smallest product of powers of 2, 3 and 5 from a number on, which FFTs like."""
    best = 1 << (at_least - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            best = min(best, three << max(0, -(-at_least // three) - 1).bit_length())
            three *= 3
        five *= 5
    return best
