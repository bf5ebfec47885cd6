"""How far results through the FFT may lie from the exact ones: `Sums.error_bound` has the formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import FORMATS, Format
from ..overlap import Overlap
from ..problem import ConvProblem, WeightGradientProblem
from .sums import gamma_of

Array = npt.NDArray[Any]


def error_of_convolution(problem: ConvProblem, input: Array, weight: Array) -> Array:
    """The bounds of the sums of a finite problem, whose padding is zeros where it is transposed.

    Returns:
        `problem.output_shape`.
    """
    p = problem
    dtype = np.complex128 if p.is_complex else np.float64
    x, w = input.reshape(p.N, p.C_in, p.L_in).astype(dtype), weight.astype(dtype)
    o, error = Overlap.of(p), np.zeros((p.N, p.C_out, p.L_out))
    if error.size and x.size and o.blocks:
        rows, blocks = slice(0, o.rows), slice(0, o.blocks)
        windows = o.windows(x, rows, blocks, dtype, np)
        of_blocks = _norm(windows).reshape(*windows.shape[:3], p.groups, -1)
        taps = o.taps_of(w, p.groups, np)
        factors, rest = _factors(taps, o.block, taps.shape[2], p.format)
        bounds = np.einsum("goc,nrbgc->nrbgo", factors, of_blocks) + rest.sum(axis=2)
        shape = (*windows.shape[:3], p.C_out * o.phases_out, o.new)
        o.store(np.broadcast_to(bounds.reshape(*shape[:-1], 1), shape), error, rows, blocks, np)
    return error.reshape(p.output_shape)


def error_of_weight_gradient(problem: WeightGradientProblem, coarse: Array, fine: Array) -> Array:
    """The bounds of the sums of a finite problem.

    Args:
        problem: extents and settings.
        coarse: `problem.coarse_shape`.
        fine: `problem.fine_shape`.

    Returns:
        `problem.weight_shape`.
    """
    p = problem
    if p.is_empty:
        return np.zeros(p.weight_shape)
    o, dtype = Overlap.of(p), np.complex128 if p.is_complex else np.float64
    rows, blocks = slice(0, o.rows), slice(0, o.blocks)
    pieces = o.pieces(coarse.astype(dtype), rows, blocks, dtype, np)
    norms = _norm(o.windows(fine.astype(dtype), rows, blocks, dtype, np))
    several = norms.shape[:3]
    pieces = pieces.reshape(*several, p.groups, p.C_coarse_g, -1)
    factors, rest = _factors(pieces, o.block, math.prod(several), p.format)
    bounds = np.einsum("nrbgo,nrbgc->goc", factors, norms.reshape(*several, p.groups, -1))
    bounds += rest.sum(axis=(0, 1, 2))[..., np.newaxis]
    sums = np.broadcast_to(bounds.reshape(p.C_coarse, -1, 1), (p.C_coarse, p.C_fine_g * o.phases, o.taps))
    return np.asarray(o.weight_of(sums, p.K))


def _factors(vectors: Array, block: int, products: int, format: Format) -> tuple[Array, Array]:
    """The error of a correlation with vectors (..., taps): at most a factor times the norm of a block, and a rest.

    `products` of spectra are added up. The rest, and a part of the factor, are for underflow: what is smaller than the
    smallest normal number may become zero in each step of a transform.
    """
    accumulator = FORMATS[format.accumulator]
    u, steps = accumulator.roundoff, math.log2(block)
    step = u + gamma_of(4, u) * (math.sqrt(2) + u)
    e = steps * step / (1 - steps * step)
    q = math.sqrt(2) * gamma_of(2 * products + 2, u)
    norms, gains = _norm(vectors), np.abs(np.fft.fft(vectors, block)).max(axis=-1)
    largest = gains + e * math.sqrt(block) * norms
    tiny = 4 * block * steps * accumulator.smallest_normal
    factors = ((1 + e) ** 2 * (1 + q) - 1) * norms + e * (1 + e) * (1 + q) * largest + tiny * math.sqrt(block)
    return factors, tiny * (1 + gains)


def _norm(vectors: Array) -> Array:
    """The 2-norms along the last axis."""
    return np.asarray(np.sqrt(np.einsum("...i,...i->...", vectors, vectors.conj()).real))
