"""The definition of both operations in float64 (complex128), and the error bound that every result must satisfy.

This module is the oracle of gpuconv: it is written to be read beside the formulas, not to be fast.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .problem import ConvProblem

Array = npt.NDArray[Any]

# Unit roundoff u = 2**-(bits of the significand, the hidden one included).
_UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
_LARGEST = {
    "float16": 65504.0,
    "bfloat16": float.fromhex("0x1.fep127"),
    "float32": float.fromhex("0x1.fffffep127"),
    "float64": float.fromhex("0x1.fffffffffffffp1023"),
}
_SMALLEST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}


def compute(problem: ConvProblem, input: Array, weight: Array, bias: Array | None = None) -> Array:
    """Evaluate a problem by its definition, in float64 or complex128.

    conv1d (cross-correlation: the kernel is not flipped), with ``l_in = l_out*stride - padding_left + k*dilation``::

        output[n, c_out, l_out] = bias[c_out] + sum over c_in, k of weight[c_out, c_in, k] * input[n, c_in, l_in]

    conv_transpose1d, with ``l_out = l_in*stride - padding_left + k*dilation``::

        output[n, c_out, l_out] = bias[c_out] + sum over c_in, k of weight[c_in, c_out, k] * input[n, c_in, l_in]

    The sums run over the channels of one group and over the taps whose position exists: a tap that falls into the zero
    padding contributes nothing, whatever the weight.

    Args:
        problem: extents and settings.
        input: `problem.input_shape`, of any dtype that converts to the accumulator.
        weight: `problem.weight_shape`.
        bias: `problem.bias_shape`, or None.

    Returns:
        `problem.output_shape`, float64, or complex128 for complex problems.
    """
    p = problem
    dtype = np.complex128 if p.is_complex else np.float64
    x = np.asarray(input).astype(dtype).reshape(p.N, p.groups, p.C_in_g, p.L_in)
    w = np.asarray(weight).astype(dtype)
    y = np.zeros((p.N, p.groups, p.C_out_g, p.L_out), dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        for k in range(p.K):
            source, target = _positions(p, k)
            if p.transposed:
                w_k = w.reshape(p.groups, p.C_in_g, p.C_out_g, p.K)[..., k]
                y[..., target] += np.einsum("gio,ngil->ngol", w_k, x[..., source])
            else:
                w_k = w.reshape(p.groups, p.C_out_g, p.C_in_g, p.K)[..., k]
                y[..., target] += np.einsum("goi,ngil->ngol", w_k, x[..., source])
        if bias is not None:
            y += np.asarray(bias).astype(dtype).reshape(p.groups, p.C_out_g, 1)
    return y.reshape(p.output_shape)


def _positions(p: ConvProblem, k: int) -> tuple[slice, slice]:
    """The input positions that tap k reads and the output positions it feeds, as slices of equal length."""
    offset = k * p.dilation - p.padding_left
    # Of the pair, the coarse side is indexed by q and the fine side by q*stride + offset.
    coarse, fine = (p.L_in, p.L_out) if p.transposed else (p.L_out, p.L_in)
    first = max(0, -(offset // p.stride))
    last = min(coarse - 1, (fine - 1 - offset) // p.stride)
    if last < first:
        return slice(0), slice(0)
    at_coarse = slice(first, last + 1)
    at_fine = slice(first * p.stride + offset, last * p.stride + offset + 1, p.stride)
    return (at_coarse, at_fine) if p.transposed else (at_fine, at_coarse)


def error_bound(
    problem: ConvProblem, input: Array, weight: Array, bias: Array | None = None, exact: Array | None = None
) -> Array:
    """The largest permitted distance of each output element from `compute`, after Higham's running-error analysis.

    For ``n = problem.terms`` products, accumulated in any order with or without fused multiply-add and rounded once to
    the output dtype::

        |y - y*| <= gamma(n + 2) * (conv(|input|, |weight|) + |bias|) + u_out * |y*| + tiny

    where ``gamma(m) = m*u/(1 - m*u)``, u is the unit roundoff of the accumulator (float32 for float16, bfloat16,
    float32 and complex64; float64 otherwise), u_out that of the output dtype, and n is doubled for complex data, whose
    real and imaginary parts each sum two products a term. `tiny` covers underflow: an operand, a product or a sum
    below the smallest normal number may become zero. The reference's own float64 rounding is added.

    Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1 and 2.8 (underflow).

    Returns:
        `problem.output_shape`, float64; NaN or infinite where the exact value is. For complex problems it bounds the
        real and the imaginary part each.

    Raises:
        ValueError: the reduction is so long that the bound does not exist (``(n + 2)*u >= 1``).
    """
    if exact is None:
        exact = compute(problem, input, weight, bias)
    return _bound_and_magnitude(problem, input, weight, bias, exact)[0]


def within_bound(
    problem: ConvProblem, output: Array, input: Array, weight: Array, bias: Array | None = None
) -> npt.NDArray[np.bool_]:
    """Which elements of `output` are right: within `error_bound` of `compute`, NaN and infinities where they belong.

    An infinity is right, too, where the exact value lies within the bound of the overflow threshold, or where the
    terms of that sign overflow the accumulator on their own; a NaN is where those of both signs do. Where finite data
    overflow float64 itself there is no reference and every value passes.

    Returns:
        `problem.output_shape`, bool.
    """
    p = problem
    exact = compute(p, input, weight, bias)
    bound, magnitude = _bound_and_magnitude(p, input, weight, bias, exact)
    y = _as_wide(p, output)
    if p.is_complex:
        right = _part_within(p, y.real, exact.real, bound, magnitude)
        right &= _part_within(p, y.imag, exact.imag, bound, magnitude)
    else:
        right = _part_within(p, y, exact, bound, magnitude)
    special_x, special_w = ~np.isfinite(_as_wide(p, input)), ~np.isfinite(_as_wide(p, weight))
    special_b = None if bias is None else ~np.isfinite(_as_wide(p, bias))
    if not (special_x.any() or special_w.any() or (special_b is not None and special_b.any())):
        return right
    ones_x, ones_w = np.ones(p.input_shape), np.ones(p.weight_shape)
    fed = compute(_as_float64(p), special_x, ones_w, special_b) + compute(_as_float64(p), ones_x, special_w) > 0
    return np.asarray(np.where(fed, _special_within(p, y, exact, magnitude, input, weight), right))


def _bound_and_magnitude(
    p: ConvProblem, input: Array, weight: Array, bias: Array | None, exact: Array
) -> tuple[Array, Array]:
    """The error bound, and conv(|input|, |weight|) + |bias| over the finite data alone."""
    real, accumulator = _real_dtypes(p)
    n = p.terms * (2 if p.is_complex else 1)
    gamma = _gamma(n + 2, _UNIT_ROUNDOFF[accumulator]) + _gamma(n + 2, _UNIT_ROUNDOFF["float64"])
    x, w = _magnitudes(p, input), _magnitudes(p, weight)
    magnitude = compute(_as_float64(p), x, w, None if bias is None else _magnitudes(p, bias))
    tiny: Any = _SMALLEST_NORMAL[accumulator] * (2 * n + 2) + _SMALLEST_NORMAL[real] * _UNIT_ROUNDOFF[real]
    # A flushed operand takes its whole product with it, however large the other operand is.
    small_x, small_w = _subnormal_parts(p, input), _subnormal_parts(p, weight)
    if small_x.any() or small_w.any():
        tiny = tiny + compute(_as_float64(p), small_x, w) + compute(_as_float64(p), x, small_w)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(gamma * magnitude + _UNIT_ROUNDOFF[real] * np.abs(exact) + tiny), magnitude


def _part_within(p: ConvProblem, y: Array, exact: Array, bound: Array, magnitude: Array) -> npt.NDArray[np.bool_]:
    """Which elements of a real, or of the real or imaginary part of a complex result are right, given finite data."""
    real, accumulator = _real_dtypes(p)
    with np.errstate(invalid="ignore", over="ignore"):
        close = np.abs(y - exact) <= bound
        # The terms of one sign alone sum to (magnitude + exact)/2, or to (magnitude - exact)/2.
        rises = magnitude / 2 + exact / 2 + bound > _LARGEST[accumulator]
        falls = magnitude / 2 - exact / 2 + bound > _LARGEST[accumulator]
        overflow = np.isposinf(y) & (rises | (exact + bound > _LARGEST[real]))
        overflow |= np.isneginf(y) & (falls | (bound - exact > _LARGEST[real]))
        overflow |= np.isnan(y) & rises & falls
    unknown = ~(np.isfinite(exact) & np.isfinite(bound))
    return np.asarray(unknown | close | overflow)


def _special_within(
    p: ConvProblem, y: Array, exact: Array, magnitude: Array, input: Array, weight: Array
) -> npt.NDArray[np.bool_]:
    """Which elements are right among those with a NaN or an infinity in a term."""
    if p.is_complex:  # either part may be the non-finite one: C99 Annex G leaves it open
        return ~np.isfinite(y)
    same = (y == exact) | (np.isnan(y) & np.isnan(exact))
    # Finite terms that overflow meet an infinity, or an infinity meets a flushed operand: NaN is right, too.
    infinite_x, infinite_w = np.isinf(_as_wide(p, input)), np.isinf(_as_wide(p, weight))
    meets = compute(_as_float64(p), infinite_x, _subnormal_parts(p, weight))
    meets += compute(_as_float64(p), _subnormal_parts(p, input), infinite_w)
    excused = (magnitude > _LARGEST[_real_dtypes(p)[1]]) | (meets > 0)
    return np.asarray(same | (excused & ~np.isfinite(y)))


def _real_dtypes(p: ConvProblem) -> tuple[str, str]:
    """The dtype of an output's real part and that of the accumulator."""
    real = {"complex64": "float32", "complex128": "float64"}.get(p.dtype, p.dtype)
    return real, "float64" if real == "float64" else "float32"


def _gamma(m: int, u: float) -> float:
    if m * u >= 1:
        raise ValueError(f"no error bound exists for {m} roundings of unit roundoff {u}")
    return m * u / (1 - m * u)


def _as_wide(p: ConvProblem, array: Any) -> Array:
    return np.asarray(array).astype(np.complex128 if p.is_complex else np.float64)


def _magnitudes(p: ConvProblem, array: Array) -> Array:
    """The absolute values, zero in the place of NaN and infinities."""
    wide = _as_wide(p, array)
    with np.errstate(over="ignore"):
        return np.abs(np.where(np.isfinite(wide), wide, 0.0))


def _subnormal_parts(p: ConvProblem, array: Array) -> Array:
    """The absolute values of what flushing the operands to zero takes away."""
    smallest = _SMALLEST_NORMAL[_real_dtypes(p)[1]]
    wide = _as_wide(p, array)
    parts = np.abs(np.stack((wide.real, wide.imag)))
    return np.asarray(np.sum(parts, axis=0, where=parts < smallest))


def _as_float64(p: ConvProblem) -> ConvProblem:
    """The same problem on float64 data."""
    return ConvProblem(
        p.op, p.N, p.C_in, p.C_out, p.L_in, p.K, p.stride, p.padding_left, p.padding_right, p.dilation, p.groups,
        p.output_padding, "float64", p.has_bias, p.batched,
    )  # fmt: skip
