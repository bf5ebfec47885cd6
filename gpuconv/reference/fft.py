"""The error bounds of results through the FFT: `Sums.error_bound` has the formula."""

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


@np.errstate(all="ignore")  # of NaN, infinities and what overflows, whose bounds are infinite
def error_of_convolution(problem: ConvProblem, input: Array, weight: Array) -> Array:
    """The error bounds of sums; a transposed problem must be padded with zeros.

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
        factors, rest, fill = _factors(taps, o.block, taps.shape[2], p.format)
        bounds = np.einsum("goc,nrbgc->nrbgo", factors, of_blocks) + rest.sum(axis=2)
        bounds[~(np.einsum("goc,nrbgc->nrbgo", fill, of_blocks) <= 1)] = np.inf
        shape = (*windows.shape[:3], p.C_out * o.phases_out, o.new)
        o.store(np.broadcast_to(bounds.reshape(*shape[:-1], 1), shape), error, rows, blocks, np)
    return error.reshape(p.output_shape)


@np.errstate(all="ignore")
def error_of_weight_gradient(problem: WeightGradientProblem, coarse: Array, fine: Array) -> Array:
    """The error bounds of sums.

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
    norms = norms.reshape(*several, p.groups, -1)
    factors, rest, fill = _factors(pieces, o.block, math.prod(several), p.format)
    bounds = np.einsum("nrbgo,nrbgc->goc", factors, norms) + rest.sum(axis=(0, 1, 2))[..., np.newaxis]
    bounds[~(np.einsum("nrbgo,nrbgc->goc", fill, norms) <= 1)] = np.inf
    sums = np.broadcast_to(bounds.reshape(p.C_coarse, -1, 1), (p.C_coarse, p.C_fine_g * o.phases, o.taps))
    return np.asarray(o.weight_of(sums, p.K))


def _factors(vectors: Array, block: int, products: int, format: Format) -> tuple[Array, Array, Array]:
    """The error of a correlation with vectors (..., taps): at most a factor times the norm of a block, and a rest.

    `products` of spectra are added up. The rest, and a part of the factor, cover underflow: values below the smallest
    normal number may become zero in each step of a transform.

    The third array tells where nothing overflows: its sums of products with the norms are at most 1. Spectra are at
    most sqrt(B) times a norm, and what the inverse transform sums, before it divides by B, at most B times the product
    of both norms. A quarter of the range is kept for what libraries add up on the way.
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
    spectra, limit = math.sqrt(block) * norms, accumulator.largest / 4
    fill = np.where(spectra <= limit, math.sqrt(block) * (1 + spectra) / limit, np.inf)
    return factors, tiny * (1 + gains), fill


def _norm(vectors: Array) -> Array:
    """The 2-norms along the last axis, of numbers whose squares may overflow or underflow."""
    largest = np.abs(vectors).max(axis=-1, keepdims=True)
    scaled = vectors / np.where(largest > 0, largest, 1)
    return np.asarray(largest[..., 0] * np.sqrt(np.einsum("...i,...i->...", scaled, scaled.conj()).real))
