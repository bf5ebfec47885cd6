"""The definition of both operations and of their gradients in float64 (complex128), and the bound of their errors.

This module is the oracle of gpuconv: it is written to be read beside the formulas, not to be fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from .dtypes import FORMATS, INTEGERS, OPERAND_ROUNDOFF, Format
from .edge import source_indices
from .problem import BiasGradientProblem, ConvProblem, WeightGradientProblem

Array = npt.NDArray[Any]


def compute(problem: ConvProblem, input: Array, weight: Array, bias: Array | None = None) -> Array:
    """Evaluate a problem by its definition, in float64 or complex128.

    conv1d (cross-correlation: the kernel is not flipped), with ``l_in = l_out*stride - padding_left + k*dilation``::

        output[n, c_out, l_out] = bias[c_out] + sum over c_in, k of weight[c_out, c_in, k] * input[n, c_in, l_in]

    conv_transpose1d, with ``l_out = l_in*stride - padding_left + k*dilation``::

        output[n, c_out, l_out] = bias[c_out] + sum over c_in, k of weight[c_in, c_out, k] * input[n, c_in, l_in]

    The sums run over the channels of one group and over the taps whose position exists: a tap that falls into the zero
    padding contributes nothing, whatever the weight. In another `padding_mode` a convolution is that of the padded
    input, and a transposed one, the adjoint, adds what lies in the padding of its output to the samples that are meant.

    Args:
        problem: extents and settings.
        input: `problem.input_shape`, of any dtype that converts to the accumulator.
        weight: `problem.weight_shape`.
        bias: `problem.bias_shape`, or None.

    Returns:
        `problem.output_shape`, float64, or complex128 for complex problems; the exact result for problems of integers.
    """
    return convolution(problem, input, weight, bias).exact()


def error_bound(
    problem: ConvProblem, input: Array, weight: Array, bias: Array | None = None, exact: Array | None = None
) -> Array:
    """The largest permitted distance of each output element from `compute`: `Sums.error_bound`.

    The ``n`` of the formula is `problem.terms`.
    """
    return convolution(problem, input, weight, bias).error_bound(exact)


def within_bound(
    problem: ConvProblem, output: Array, input: Array, weight: Array, bias: Array | None = None
) -> npt.NDArray[np.bool_]:
    """Which elements of `output` are right: `Sums.within_bound`."""
    return convolution(problem, input, weight, bias).within_bound(output)


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """A computed result beside what it should be, element by element.

    Attributes:
        right: which elements are right: see `Sums.within_bound`.
        exact: what `Sums.exact` gives.
        bound: what `Sums.error_bound` gives.
        output: the computed result, in the dtype of `exact`.
    """

    right: npt.NDArray[np.bool_]
    exact: Array
    bound: Array
    output: Array

    @property
    def worst(self) -> float:
        """The largest distance from `exact` as a fraction of the bound, of the real and of the imaginary part each.

        0 where there is no element whose distance and bound are finite.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            distance = self.output - self.exact
            fraction = np.maximum(np.abs(distance.real), np.abs(distance.imag)) / self.bound
        return float(fraction.max(initial=0.0, where=np.isfinite(fraction)))


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """A result by its definition, each element a sum of products, and how far from it a computed one may be.

    Attributes:
        dtype: of the data and of the result.
        terms: the most terms that an element sums, apart from the addend.
        products: the real products of a term in each of the real and imaginary part: 2 for complex data, else 1.
        left, right: the arrays whose elements are multiplied.
        addend: the array whose elements are added to the sums, or None.
        evaluate: (left, right, addend) -> the result, in the dtype of its arguments.
        precision: of the problem: "tf32" allows for operands rounded to TF32.
        out_dtype: of the result, where that is not `dtype`: of integers, whose result is exact and wraps around.
    """

    dtype: str
    terms: int
    products: int
    left: Array
    right: Array
    addend: Array | None
    evaluate: Callable[[Array, Array, Array | None], Array]
    precision: str = "float32"
    out_dtype: str | None = None

    def exact(self) -> Array:
        """The result in float64, complex128 for complex data, or `out_dtype`."""
        with np.errstate(invalid="ignore", over="ignore"):
            addend = None if self.addend is None else self._as_wide(self.addend)
            wide = self.evaluate(self._as_wide(self.left), self._as_wide(self.right), addend)
        return wide if self.out_dtype is None else wide.astype(self.out_dtype)

    def error_bound(self, exact: Array | None = None) -> Array:
        """The largest permitted distance of each element from `exact`, after Higham's running-error analysis.

        For ``n = terms`` products, accumulated in any order with or without fused multiply-add and rounded once to
        the output dtype::

            |y - y*| <= gamma(n + 2) * (sum of |left| * |right| + |addend|) + u_out * |y*| + tiny

        where ``gamma(m) = m*u/(1 - m*u)``, u is the unit roundoff of the accumulator (float32 for float16, bfloat16,
        float32 and complex64; float64 otherwise), u_out that of the output dtype, and n is doubled for complex data,
        whose real and imaginary parts each sum two products a term. `tiny` covers underflow: an operand, a product or
        a sum below the smallest normal number may become zero. The reference's own float64 rounding is added.

        float16 and bfloat16 data, and float32 data in TF32, may be summed by tensor cores, which do not round as IEEE
        arithmetic does; for them n + 2 becomes 4n/3 + 2. An instruction adds b products to a sum: it cuts all of them
        off 24 bits below the leading bit of the largest, which loses less than u of it each, and rounds the result
        toward zero, which loses at most u more as the sum is one of the terms cut off (25 bits, and less, on sm_90). So
        b products cost b + 1 units. b is at least 4; where the channels do not fill the last block, the sum costs a
        third more in all, as with nine channels in three blocks. In TF32 each operand moves by up to 2**-11 of itself,
        which adds (2**-10 + 2**-22) times the magnitude.

        The bound of integers is zero.

        Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1 and 2.8 (underflow);
        M. Fasi et al., Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7, 2021 (alignment, blocks).

        Args:
            exact: what the method of this name gives, where the caller has it.

        Returns:
            The shape of the result, float64; NaN or infinite where the exact value is. For complex data it bounds the
            real and the imaginary part each.

        Raises:
            ValueError: the reduction is so long that the bound does not exist (``(n + 2)*u >= 1``).
        """
        exact = self.exact() if exact is None else exact
        return np.zeros(exact.shape) if self._is_integer else self._bound_and_magnitude(exact)[0]

    def within_bound(self, output: Array) -> npt.NDArray[np.bool_]:
        """Which elements of `output` are right: within `error_bound`, NaN and infinities where they belong.

        An infinity is right, too, where the exact value lies within the bound of the overflow threshold, or where the
        terms of that sign overflow the accumulator on their own; a NaN is where those of both signs do. Where finite
        data overflow float64 itself there is no reference and every value passes.

        Returns:
            The shape of the result, bool.
        """
        return self.compare(output).right

    def compare(self, output: Array) -> Comparison:
        """`output` beside what it should be."""
        exact = self.exact()
        if self._is_integer:
            return Comparison(np.asarray(output == exact), exact, np.zeros(exact.shape), output)
        bound, magnitude = self._bound_and_magnitude(exact)
        y = self._as_wide(output)
        return Comparison(self._within(y, exact, bound, magnitude), exact, bound, y)

    def _within(self, y: Array, exact: Array, bound: Array, magnitude: Array) -> npt.NDArray[np.bool_]:
        if self._is_complex:
            right = self._part_within(y.real, exact.real, bound, magnitude)
            right &= self._part_within(y.imag, exact.imag, bound, magnitude)
        else:
            right = self._part_within(y, exact, bound, magnitude)
        arrays = (self.left, self.right, self.addend)
        special = [None if array is None else ~np.isfinite(self._as_wide(array)) for array in arrays]
        if not any(mask is not None and mask.any() for mask in special):
            return right
        masks_l, masks_r, masks_a = (None if mask is None else mask.astype(np.float64) for mask in special)
        assert masks_l is not None
        assert masks_r is not None
        fed = self.evaluate(masks_l, np.ones_like(masks_r), masks_a)
        fed = fed + self.evaluate(np.ones_like(masks_l), masks_r, None)
        return np.asarray(np.where(fed > 0, self._special_within(y, exact, magnitude), right))

    def _bound_and_magnitude(self, exact: Array) -> tuple[Array, Array]:
        """The error bound, and the sum of |left| * |right| + |addend| over the finite data alone."""
        real, accumulator = self._formats
        n = self.terms * self.products
        on_tensor_cores = self.dtype in ("float16", "bfloat16") or self.precision == "tf32"
        roundings = n + (-(-n // 3) if on_tensor_cores else 0) + 2
        gamma = _gamma(roundings, accumulator.roundoff) + _gamma(n + 2, FORMATS["float64"].roundoff)
        operand = OPERAND_ROUNDOFF[self.precision]
        gamma += (1 + gamma) * (2 * operand + operand**2)
        left, right = self._magnitudes(self.left), self._magnitudes(self.right)
        tiny: Any = accumulator.smallest_normal * (2 * n + 2) + real.smallest_normal * real.roundoff
        with np.errstate(invalid="ignore", over="ignore"):
            magnitude = self.evaluate(left, right, None if self.addend is None else self._magnitudes(self.addend))
            # A flushed operand takes its whole product with it, however large the other operand is.
            small_left, small_right = self._subnormal_parts(self.left), self._subnormal_parts(self.right)
            if small_left.any() or small_right.any():
                tiny = tiny + self.evaluate(small_left, right, None) + self.evaluate(left, small_right, None)
            return np.asarray(gamma * magnitude + real.roundoff * np.abs(exact) + tiny), magnitude

    def _part_within(self, y: Array, exact: Array, bound: Array, magnitude: Array) -> npt.NDArray[np.bool_]:
        """Which elements of a real, or of the real or imaginary part of a complex result are right, on finite data."""
        real, accumulator = self._formats
        with np.errstate(invalid="ignore", over="ignore"):
            close = np.abs(y - exact) <= bound
            # The terms of one sign alone sum to (magnitude + exact)/2, or to (magnitude - exact)/2.
            rises = magnitude / 2 + exact / 2 + bound > accumulator.largest
            falls = magnitude / 2 - exact / 2 + bound > accumulator.largest
            overflow = np.isposinf(y) & (rises | (exact + bound > real.largest))
            overflow |= np.isneginf(y) & (falls | (bound - exact > real.largest))
            overflow |= np.isnan(y) & rises & falls
        unknown = ~(np.isfinite(exact) & np.isfinite(bound))
        return np.asarray(unknown | close | overflow)

    def _special_within(self, y: Array, exact: Array, magnitude: Array) -> npt.NDArray[np.bool_]:
        """Which elements are right among those with a NaN or an infinity in a term."""
        if self._is_complex:  # either part may be the non-finite one: C99 Annex G leaves it open
            return ~np.isfinite(y)
        same = (y == exact) | (np.isnan(y) & np.isnan(exact))
        # Finite terms that overflow meet an infinity, or an infinity meets a flushed operand: NaN is right, too.
        infinite_left, infinite_right = (np.isinf(self._as_wide(a)).astype(np.float64) for a in (self.left, self.right))
        meets = self.evaluate(infinite_left, self._subnormal_parts(self.right), None)
        meets = meets + self.evaluate(self._subnormal_parts(self.left), infinite_right, None)
        excused = (magnitude > self._formats[1].largest) | (meets > 0)
        return np.asarray(same | (excused & ~np.isfinite(y)))

    @property
    def _is_integer(self) -> bool:
        return self.dtype in INTEGERS

    @property
    def _is_complex(self) -> bool:
        return FORMATS[self.dtype].is_complex

    @property
    def _formats(self) -> tuple[Format, Format]:
        """Those of the result's real part and of the accumulator."""
        found = FORMATS[self.dtype]
        return found, FORMATS[found.accumulator]

    def _as_wide(self, array: Any) -> Array:
        wide = np.int64 if self._is_integer else np.complex128 if self._is_complex else np.float64
        return np.asarray(array).astype(wide)

    def _magnitudes(self, array: Array) -> Array:
        """The absolute values, zero in the place of NaN and infinities."""
        wide = self._as_wide(array)
        with np.errstate(over="ignore"):
            return np.abs(np.where(np.isfinite(wide), wide, 0.0))

    def _subnormal_parts(self, array: Array) -> Array:
        """The absolute values of what flushing the operands to zero takes away."""
        smallest = self._formats[1].smallest_normal
        wide = self._as_wide(array)
        parts = np.abs(np.stack((wide.real, wide.imag)))
        return np.asarray(np.sum(parts, axis=0, where=parts < smallest))


def _gamma(m: int, u: float) -> float:
    if m * u >= 1:
        raise ValueError(f"no error bound exists for {m} roundings of unit roundoff {u}")
    return m * u / (1 - m * u)


def convolution(problem: ConvProblem, input: Array, weight: Array, bias: Array | None = None) -> Sums:
    """The output of a problem; `compute` has the formula."""
    p = problem
    evaluate = partial(_convolve, p)
    return Sums(p.dtype, p.terms, _products(p), input, weight, bias, evaluate, p.precision, p.out_dtype)


def _convolve(p: ConvProblem, input: Array, weight: Array, bias: Array | None) -> Array:
    if p.padding_mode != "zeros":
        if not p.transposed:
            return _convolve(_without_padding(p), input[..., _samples_meant(p)], weight, bias)
        y = _folded(_convolve(_without_padding(p), input, weight, None), _samples_meant(p), p.L_out)
        return y if bias is None else y + bias[:, np.newaxis]
    x = input.reshape(p.N, p.groups, p.C_in_g, p.L_in)
    y = np.zeros((p.N, p.groups, p.C_out_g, p.L_out), input.dtype)
    for k in range(p.K):
        source, target = _positions(p, k)
        if p.transposed:
            w_k = weight.reshape(p.groups, p.C_in_g, p.C_out_g, p.K)[..., k]
            y[..., target] += np.einsum("gio,ngil->ngol", w_k, x[..., source])
        else:
            w_k = weight.reshape(p.groups, p.C_out_g, p.C_in_g, p.K)[..., k]
            y[..., target] += np.einsum("goi,ngil->ngol", w_k, x[..., source])
    if bias is not None:
        y += bias.reshape(p.groups, p.C_out_g, 1)
    return y.reshape(p.output_shape)


def input_gradient(problem: ConvProblem, weight: Array, grad_output: Array) -> Sums:
    """The gradient of the input of a problem: what each output that it feeds passes back.

    With l_in and l_out as in `compute`, for conv1d and conv_transpose1d::

        grad_input[n, c_in, l_in] = sum over c_out, k of conj(weight[c_out, c_in, k]) * grad_output[n, c_out, l_out]
        grad_input[n, c_in, l_in] = sum over c_out, k of conj(weight[c_in, c_out, k]) * grad_output[n, c_out, l_out]

    An input that no window contains has the gradient zero.

    Args:
        problem: the forward problem.
        weight: `problem.weight_shape`.
        grad_output: `problem.output_shape`.

    Returns:
        Sums of the shape `problem.input_shape`.
    """
    p = problem
    terms = p.adjoint().terms if p.L_in else 0
    return Sums(p.dtype, terms, _products(p), weight, grad_output, None, partial(_input_gradient, p), p.precision)


def _input_gradient(p: ConvProblem, weight: Array, grad_output: Array, _: Array | None) -> Array:
    if p.padding_mode != "zeros":
        if p.transposed:
            return _input_gradient(_without_padding(p), weight, grad_output[..., _samples_meant(p)], None)
        return _folded(_input_gradient(_without_padding(p), weight, grad_output, None), _samples_meant(p), p.L_in)
    w, dy = weight.conj(), grad_output.reshape(p.N, p.groups, p.C_out_g, p.L_out)
    dx = np.zeros((p.N, p.groups, p.C_in_g, p.L_in), grad_output.dtype)
    for k in range(p.K):
        source, target = _positions(p, k)
        if p.transposed:
            w_k = w.reshape(p.groups, p.C_in_g, p.C_out_g, p.K)[..., k]
            dx[..., source] += np.einsum("gio,ngol->ngil", w_k, dy[..., target])
        else:
            w_k = w.reshape(p.groups, p.C_out_g, p.C_in_g, p.K)[..., k]
            dx[..., source] += np.einsum("goi,ngol->ngil", w_k, dy[..., target])
    return dx.reshape(p.input_shape)


def weight_gradient(problem: WeightGradientProblem, coarse: Array, fine: Array) -> Sums:
    """The gradient of the weight; `WeightGradientProblem` has the formula.

    Args:
        problem: extents and settings; its method `sides` tells which of input and grad_output is which.
        coarse: `problem.coarse_shape`, or that without the batch axis of one sample.
        fine: `problem.fine_shape`, likewise.

    Returns:
        Sums of the shape `problem.weight_shape`.
    """
    p = problem
    return Sums(p.dtype, p.terms, _products(p), coarse, fine, None, partial(_weight_gradient, p), p.precision)


def _weight_gradient(p: WeightGradientProblem, coarse: Array, fine: Array, _: Array | None) -> Array:
    if p.padding_mode != "zeros":
        behind = (p.L_coarse - 1) * p.stride + (p.K - 1) * p.dilation + 1 - p.padding_left  # the last window
        samples = source_indices(p.padding_mode, -p.padding_left, behind, p.L_fine)
        padded = replace(p, L_fine=len(samples), padding_left=0, padding_mode="zeros")
        return _weight_gradient(padded, coarse, fine[..., samples], None)
    c = coarse.reshape(p.N, p.groups, p.C_coarse_g, p.L_coarse)
    f = fine.reshape(p.N, p.groups, p.C_fine_g, p.L_fine)
    dw = np.zeros((p.groups, p.C_coarse_g, p.C_fine_g, p.K), coarse.dtype)
    for k in range(p.K):
        at_coarse, at_fine = _meeting(p.L_coarse, p.L_fine, p.stride, k * p.dilation - p.padding_left)
        c_k = c[..., at_coarse].conj() if p.conjugate_coarse else c[..., at_coarse]
        f_k = f[..., at_fine].conj() if p.conjugate_fine else f[..., at_fine]
        dw[..., k] = np.einsum("ngrl,ngcl->grc", c_k, f_k)
    return dw.reshape(p.weight_shape)


def bias_gradient(problem: BiasGradientProblem, grad_output: Array) -> Sums:
    """The gradient of the bias; `BiasGradientProblem` has the formula.

    Args:
        problem: extents.
        grad_output: `problem.grad_output_shape`, or that without the batch axis of one sample.

    Returns:
        Sums of the shape `problem.bias_shape`: each term is an element times one, a single product of complex data too.
    """
    p = problem
    return Sums(p.dtype, p.terms, 1, grad_output, np.ones(()), None, partial(_bias_gradient, p))


def _bias_gradient(p: BiasGradientProblem, grad_output: Array, one: Array, _: Array | None) -> Array:
    return np.asarray((grad_output.reshape(p.grad_output_shape) * one).sum(axis=(0, 2)))


def _without_padding(p: ConvProblem) -> ConvProblem:
    """The problem whose longer row, of the input or of the transposed output, is that of `p` with its padding."""
    L_in = p.L_in if p.transposed else p.L_in + p.padding_left + p.padding_right
    return replace(p, L_in=L_in, padding_left=0, padding_right=0, padding_mode="zeros")


def _samples_meant(p: ConvProblem) -> npt.NDArray[np.intp]:
    """The samples that the positions of that row mean."""
    L = p.L_out if p.transposed else p.L_in
    return source_indices(p.padding_mode, -p.padding_left, L + p.padding_right, L)


def _folded(padded: Array, samples: npt.NDArray[np.intp], L: int) -> Array:
    """The sums over the positions that mean a sample, for each of L samples."""
    result = np.zeros((*padded.shape[:-1], L), padded.dtype)
    at: Any = (..., samples)
    np.add.at(result, at, padded)
    return result


def _products(p: ConvProblem | WeightGradientProblem) -> int:
    return 2 if p.is_complex else 1


def _positions(p: ConvProblem, k: int) -> tuple[slice, slice]:
    """The input positions that tap k reads and the output positions it feeds, as slices of equal length."""
    offset = k * p.dilation - p.padding_left
    if p.transposed:
        return _meeting(p.L_in, p.L_out, p.stride, offset)
    at_output, at_input = _meeting(p.L_out, p.L_in, p.stride, offset)
    return at_input, at_output


def _meeting(coarse: int, fine: int, stride: int, offset: int) -> tuple[slice, slice]:
    """The positions q < coarse and q*stride + offset < fine, not below zero, as slices of equal length."""
    first = max(0, -(offset // stride))
    last = min(coarse - 1, (fine - 1 - offset) // stride)
    if last < first:
        return slice(0), slice(0)
    return slice(first, last + 1), slice(first * stride + offset, last * stride + offset + 1, stride)
