"""NaN and infinities with long kernels: three or five convolutions of finite numbers instead of one step for each tap.

The forms also multiply by zeros, those of padding for example, and a zero times an infinity is NaN. So values that are
not finite are first replaced by zeros, and the outputs that they affect are determined separately. Let C be the number
of products of an output with a factor that is not finite, and S the sum of the signs of those products, with
sign(NaN) = 0. If C is 0, the output is finite or overflows by itself. If ``|S| = C``, all those products are infinities
of one sign, and so is the output. Otherwise there is a NaN among them, a zero times an infinity, or infinities of both
signs: the output is NaN. C and S are convolutions of ones, zeros and signs, exact in float32 up to 2**24.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..problem import ConvProblem
from . import limits
from .arrays import Array, accumulator, is_finite
from .geometry import Call, Geometry


def takes(p: ConvProblem) -> bool:
    """Whether `run` pays: for many taps, and arrays whose copies fit into the workspace."""
    few = p.is_complex or Geometry.of(p).tap_groups < limits.LONG_KERNEL
    return not few and p.C_in_g * p.K < 2**23 and extra_bytes(p) <= limits.WORKSPACE // 2


def extra_bytes(p: ConvProblem) -> int:
    """A bound on the bytes that `run` uses besides those of the form."""
    size = accumulator(p.dtype).itemsize
    factors = math.prod(p.input_shape) + math.prod(p.weight_shape)
    return factors * (size + 2) + math.prod(p.output_shape) * (4 * size + 3)


def run(call: Call, compute: Callable[[Call], None]) -> None:
    """Compute the call by `compute`, which gets only calls whose inputs and weights are finite."""
    with np.errstate(all="ignore"):
        separate = not is_finite(call.x) or not is_finite(call.w)
    if not separate:
        compute(call.of_finite(call.x, call.w, call.b, call.y))
        return
    x, w = np.empty(call.x.shape, call.dtype), np.empty(call.w.shape, call.dtype)
    counts, signs, sums = (np.zeros(call.y.shape, call.dtype) for _ in range(3))

    def add(to: Array) -> None:
        compute(call.of_finite(x, w, None, sums))
        np.add(to, sums, out=to)

    with np.errstate(all="ignore"):
        for array, infinite, other, signs_of_other in ((call.x, x, call.w, w), (call.w, w, call.x, x)):
            if is_finite(array):
                continue
            infinite[...] = ~np.isfinite(array)
            signs_of_other[...] = 1
            add(counts)
            _sign(array, infinite)
            infinite[np.isfinite(array)] = 0
            _sign(other, signs_of_other)
            add(signs)
        for array, clean in ((call.x, x), (call.w, w)):
            clean[...] = array
            clean[~np.isfinite(array)] = 0
        compute(call.of_finite(x, w, call.b, call.y))
        np.multiply(signs, np.inf, out=sums)
        sums[np.abs(signs) != counts] = np.nan
        # The bias may be an infinity of the other sign.
        if call.b is not None:
            np.add(sums, call.b.astype(call.dtype, copy=False)[..., None], out=sums)
        np.copyto(call.y, sums, where=counts > 0, casting="unsafe")


def _sign(array: Array, out: Array) -> None:
    out[...] = array
    np.sign(out, out=out)
    out[np.isnan(out)] = 0
