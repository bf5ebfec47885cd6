"""Convolutions of integers, exact modulo 2**64, through float64.

A sum of products of integers is exact in float64 while it stays below 2**53. Where it could be larger, input and weight
are split into limbs, ``x = sum over i of x_i * 2**(i*bits)``, so narrow that the result of each pair of limbs is exact.
These results are shifted and added in 64-bit integers, which wrap around as NumPy's do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from ..problem import ConvProblem
from .arrays import Array

_EXACT_BITS = 53  # the bits of the integers that float64 holds exactly
_WORD_BITS = 64  # the bits of the sums
_BLOCK = 1 << 21  # elements of input and output that are computed at a time, in whole samples

Convolve = Callable[[ConvProblem, Array, Array, None, Array], None]


def in_float64(p: ConvProblem) -> ConvProblem:
    """The float64 problem that computes a problem of integers, or a pair of limbs of it."""
    return replace(p, dtype="float64", out_dtype=None, has_bias=False, batched=True)


def run(convolve: Convolve, p: ConvProblem, input: Array, weight: Array, bias: Array | None, output: Array) -> None:
    """Compute a problem of integers into all elements of `output`.

    Args:
        convolve: computes float64 problems.
        p: extents and settings.
        input: integers.
        weight: integers of the same dtype.
        bias: int64 or int32, or None.
        output: int64 or int32, the dtype of the bias; sums wrap around.
    """
    x = input.reshape(p.N, p.C_in, p.L_in)
    y = (
        output.reshape(p.N, p.C_out, p.L_out)
        if output.flags.c_contiguous
        else np.empty((p.N, p.C_out, p.L_out), output.dtype)
    )
    samples = max(1, _BLOCK // max(1, p.C_in * p.L_in + p.C_out * p.L_out))
    for first in range(0, p.N, samples):
        part = slice(first, first + samples)
        _run(convolve, p, x[part], weight, bias, y[part])
    if not np.shares_memory(y, output):
        output[...] = y.reshape(output.shape)


def _run(convolve: Convolve, p: ConvProblem, x: Array, weight: Array, bias: Array | None, y: Array) -> None:
    in_float = replace(in_float64(p), N=len(x))
    sums = np.zeros(y.shape, np.uint64)
    product = np.empty(y.shape)
    bits = _limb_bits(p, x, weight)
    weights = list(_limbs(weight, bits))
    for shift_x, limb_x in _limbs(x, bits):
        for shift_w, limb_w in weights:
            if shift_x + shift_w < _WORD_BITS:
                convolve(in_float, limb_x, limb_w, None, product)
                sums += product.astype(np.int64).view(np.uint64) << np.uint64(shift_x + shift_w)
    if bias is not None:
        sums += bias.astype(np.int64).view(np.uint64)[:, None]
    np.copyto(y, sums.view(np.int64), casting="unsafe")  # int32 keeps the low half


def _limb_bits(p: ConvProblem, x: Array, weight: Array) -> int:
    """The bits of a limb; 64, for a single limb, where the sums of the data are exact without limbs."""
    largest = [max(-int(a.min(initial=0)), int(a.max(initial=0))) for a in (x, weight)]
    if p.terms * math.prod(largest) < 1 << _EXACT_BITS:
        return _WORD_BITS
    return (_EXACT_BITS - p.terms.bit_length()) // 2


def _limbs(array: Array, bits: int) -> Iterator[tuple[int, Array]]:
    """The limbs in float64, each with the position of its lowest bit. Only the highest limb can be negative."""
    width = 8 * array.itemsize
    for shift in range(0, width, bits):
        limb = array >> shift
        if shift + bits < width:
            limb = limb & ((1 << bits) - 1)
        yield shift, limb.astype(np.float64)
