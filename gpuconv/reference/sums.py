"""A result as sums of products: their exact values, and the bound of a computed result's errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import FORMATS, INTEGERS, OPERAND_ROUNDOFF, Format
from ..fusion import ULPS
from .activations import Function

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """A computed result compared with the exact one, element by element.

    Attributes:
        right: which elements are correct: see `Sums.within_bound`.
        exact: the value of `Sums.exact`.
        bound: the value of `Sums.error_bound`.
        output: the computed result, in the dtype of `exact`.

    Example:
        >>> import numpy as np, gpuconv
        >>> x, w = np.ones((1, 1, 4), np.float32), np.full((1, 1, 3), 1 / 3, np.float32)
        >>> problem = gpuconv.explain("conv1d", x, w, device="cpu").problem
        >>> found = gpuconv.reference.convolution(problem, x, w).compare(gpuconv.conv1d(x, w))
        >>> bool(found.right.all()), found.worst < 1
        (True, True)
    """

    right: npt.NDArray[np.bool_]
    exact: Array
    bound: Array
    output: Array

    @property
    def fractions(self) -> Array:
        """The distance of each element from `exact` as a fraction of its bound; for complex data of the worse part.

        Where that is not finite, it is 0 for a correct element and infinity for a wrong one.
        """
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            distance = self.output - self.exact
            fractions = np.maximum(np.abs(distance.real), np.abs(distance.imag)) / self.bound
        return np.where(np.isfinite(fractions), fractions, np.where(self.right, 0.0, np.inf))

    @property
    def worst(self) -> float:
        """The largest finite one of `fractions`; 0 if there is none."""
        return float(self.fractions.max(initial=0.0, where=np.isfinite(self.fractions)))


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """A result by its definition, each element a sum of products, and the error bound of a computed one.

    Attributes:
        dtype: of the data and of the result.
        terms: the largest number of terms of an element, without the addend.
        products: the real products of a term in the real part, and in the imaginary part: 2 for complex data, else 1.
        left, right: the arrays whose elements are multiplied.
        addend: the array whose elements are added to the sums, or None.
        evaluate: (left, right, addend) -> the result, in the dtype of its arguments.
        precision: of the problem: "tf32" allows for operands rounded to TF32.
        out_dtype: of the result of integers, which is exact and wraps around; None for other data.
        left_error: the largest distance of the computed elements of `left` from `left`; None if these are exact.
        residual: what is added to the sums in addition to the addend, of the result's shape, or None.
        activation: what is then applied to them, or None.
        of_fft: the error bounds of sums through the FFT, of the result's shape; None for direct sums.

    Example:
        >>> import numpy as np, gpuconv
        >>> x, w = np.ones((1, 2, 4), np.float32), np.ones((1, 2, 3), np.float32)
        >>> problem = gpuconv.explain("conv1d", x, w, device="cpu").problem
        >>> sums = gpuconv.reference.convolution(problem, x, w)
        >>> sums.terms, sums.exact(), sums.within_bound(gpuconv.conv1d(x, w))
        (6, array([[[6., 6.]]]), array([[[ True,  True]]]))
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
    left_error: Array | None = None
    residual: Array | None = None
    activation: Function | None = None
    of_fft: Array | None = None

    def exact(self) -> Array:
        """The result in float64, complex128 for complex data, or `out_dtype`."""
        before = self._before_activation()
        if self.activation is not None:
            return self.activation(before)
        return before if self.out_dtype is None else before.astype(self.out_dtype)

    def _before_activation(self) -> Array:
        with np.errstate(invalid="ignore", over="ignore"):
            addend = None if self.addend is None else self._as_wide(self.addend)
            sums = self.evaluate(self._as_wide(self.left), self._as_wide(self.right), addend)
            return sums if self.residual is None else np.asarray(sums + self._as_wide(self.residual))

    def error_bound(self, exact: Array | None = None) -> Array:
        """The largest permitted distance of each element from `exact`, after Higham's running-error analysis.

        For ``n = terms`` products, accumulated in any order with or without fused multiply-add and rounded once to
        the output dtype:

            |y - y*| <= gamma(n + 2) * (sum of |left| * |right| + |addend|) + u_out * |y*| + tiny

        where ``gamma(m) = m*u/(1 - m*u)``, u is the unit roundoff of the accumulator (float32 for float16, bfloat16,
        float32 and complex64; float64 otherwise), u_out that of the output dtype, and n is doubled for complex data,
        whose real and imaginary parts each sum two products a term. `tiny` covers underflow: an operand, a product or
        a sum below the smallest normal number may become zero. The reference's own float64 rounding is added.

        float16 and bfloat16 data, and float32 data in TF32, may be summed by tensor cores, which do not round as IEEE
        arithmetic does; for them n + 2 becomes 4n/3 + 2. An instruction adds b products to a sum: it truncates all of
        them 24 bits below the leading bit of the largest, which loses less than u of it each, and rounds the result
        toward zero, which loses at most u more as the sum is one of the truncated terms (25 bits, and less, on sm_90).
        So b products cost b + 1 units. b is at least 4; where the channels, or the taps of a channel, do not fill the
        last block, the sum costs a third more in all, as with nine of them in three blocks. In TF32 each operand
        changes by up to 2**-11 of itself, which adds (2**-10 + 2**-22) times the magnitude.

        A residual counts as one more addend, with one more rounding. An activation is applied before the rounding to
        the output dtype. With B for the bound without that rounding, s for the largest slope and e for the error of
        the elementary functions, `gpuconv.fusion.ULPS` units in the last place,

            |y - y*| <= (1 + u_out) * (s * B + e * (|y*| + 2 * s * B)) + u_out * |y*| + tiny

        (for snake s * |x| takes the place of |y*|, with s = 1 + |alpha/beta|; for gelu a unit of x is added). The error
        of an activated input is that with B = 0; multiplied by the weights it adds to the error of the sum.

        The bound of integers is zero.

        Through the FFT (`algorithm="fft"`) a bound by norms takes the place of gamma(n + 2) times the magnitude. For
        each result of a block of B samples, with the samples u_c of its channels c and their spectra U_c, and the taps
        w_c and their spectra W_c:

            |y - y*| <= a * sum of |w_c|_2 * |u_c|_2 + b * sum of (max |W_c| + e * sqrt(B) * |w_c|_2) * |u_c|_2
            e = t*h/(1 - t*h),  t = log2(B),  h = u + gamma(4)*(sqrt(2) + u)
            a = (1 + e)**2 * (1 + q) - 1,  b = e * (1 + e) * (1 + q),  q = sqrt(2) * gamma(2*C + 2)

        e bounds the relative error of a transform in the 2-norm, for B a power of two; libraries with a higher radix,
        or with real transforms as complex ones of half the length, are as accurate or better. q bounds the error of a
        sum of C products of two complex numbers. The first term is the error from the transforms of samples and taps
        and from the products, by the Cauchy-Schwarz inequality over the frequencies; the second that of the inverse
        transform, whose input has a 2-norm of at most the sum of max |W_c| * |U_c|_2. In a weight gradient the sums run
        over the blocks, with the samples of coarse as the taps. Transforms overflow before sums of products do: the
        bound is infinite where the sum of (B * |w_c|_2 + sqrt(B)) * |u_c|_2, or any sqrt(B) * |w_c|_2, exceeds a
        quarter of the largest number of the accumulator.

        Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1, 2.8 (underflow), 3.6
        (complex products) and theorem 24.2 (FFT);
        M. Fasi et al., Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7, 2021 (alignment, blocks).

        Args:
            exact: the value of `exact()`, if the caller has it.

        Returns:
            The shape of the result, float64; NaN or infinite where the exact value is. For complex data it bounds both
            the real and the imaginary part.

        Raises:
            ValueError: the reduction is so long that the bound does not exist (``(n + 2)*u >= 1``).
        """
        exact = self.exact() if exact is None else exact
        if self._is_integer:
            return np.zeros(exact.shape)
        return self._bounds(exact if self.activation is None else self._before_activation(), exact).result

    def within_bound(self, output: Array) -> npt.NDArray[np.bool_]:
        """Which elements of `output` are correct: within `error_bound`, NaN and infinities where the exact result is.

        An infinity is also correct where the exact value lies within the bound of the overflow threshold, or where the
        terms of that sign alone overflow the accumulator; a NaN is where the terms of both signs do. Where one part of
        complex data may overflow, either may be infinite or NaN. Where finite data overflow float64 itself there is no
        reference, and every value is accepted.

        Returns:
            The shape of the result, bool.
        """
        return self.compare(output).right

    def compare(self, output: Array) -> Comparison:
        """Compare `output` with the exact result."""
        if self._is_integer:
            exact = self.exact()
            return Comparison(np.asarray(output == exact), exact, np.zeros(exact.shape), output)
        before = self._before_activation()
        exact = before if self.activation is None else self.activation(before)
        bounds = self._bounds(before, exact)
        y = self._as_wide(output)
        return Comparison(self._within(y, before, exact, bounds), exact, bounds.result, y)

    def _within(self, y: Array, before: Array, exact: Array, bounds: _Bounds) -> npt.NDArray[np.bool_]:
        if self.activation is not None:
            right = self._activated_within(y, before, exact, bounds)
        elif self._is_complex:
            right = self._parts_within(y, exact, bounds)
        else:
            right = self._part_within(y, exact, bounds)
        arrays = (self.left, self.right, self.addend)
        special = [None if array is None else ~np.isfinite(self._as_wide(array)) for array in arrays]
        of_residual = None if self.residual is None else ~np.isfinite(self._as_wide(self.residual))
        if not any(mask is not None and mask.any() for mask in (*special, of_residual)):
            return right
        masks_l, masks_r, masks_a = (None if mask is None else mask.astype(np.float64) for mask in special)
        assert masks_l is not None
        assert masks_r is not None
        fed = self.evaluate(masks_l, np.ones_like(masks_r), masks_a)
        fed = fed + self.evaluate(np.ones_like(masks_l), masks_r, None)
        if of_residual is not None:
            fed = fed + of_residual
        return np.asarray(np.where(fed > 0, self._special_within(y, exact, bounds.magnitude), right))

    def _bounds(self, before: Array, exact: Array) -> _Bounds:
        real, accumulator = self._formats
        n = self.terms * self.products
        if self.of_fft is not None:
            addend = None if self.addend is None else self._magnitudes(self.addend)
            with np.errstate(invalid="ignore", over="ignore"):
                magnitude = self.evaluate(self._magnitudes(self.left), self._magnitudes(self.right), addend)
                # The addend is added after the transforms.
                of_sums = self.of_fft + gamma_of(2, accumulator.roundoff) * (np.abs(exact) + self.of_fft)
                of_sums = of_sums + gamma_of(n + 2, FORMATS["float64"].roundoff) * magnitude
                rounded = real.roundoff * (np.abs(exact) + of_sums) + real.smallest_normal * real.roundoff
            return _Bounds(np.asarray(of_sums + rounded), of_sums, magnitude)
        on_tensor_cores = self.dtype in ("float16", "bfloat16") or self.precision == "tf32"
        addends = 2 if self.residual is None else 3
        roundings = n + (-(-n // 3) if on_tensor_cores else 0) + addends
        gamma = gamma_of(roundings, accumulator.roundoff) + gamma_of(n + addends, FORMATS["float64"].roundoff)
        operand = OPERAND_ROUNDOFF[self.precision]
        gamma += (1 + gamma) * (2 * operand + operand**2)
        left, right = self._magnitudes(self.left), self._magnitudes(self.right)
        tiny: Any = accumulator.smallest_normal * (2 * n + 2)
        with np.errstate(invalid="ignore", over="ignore"):
            if self.left_error is not None:
                left = left + self.left_error
                tiny = tiny + self.evaluate(self.left_error, right, None)
            magnitude = self.evaluate(left, right, None if self.addend is None else self._magnitudes(self.addend))
            if self.residual is not None:
                magnitude = magnitude + self._magnitudes(self.residual)
            # If an operand is flushed to zero, its whole product is lost, however large the other operand is.
            small_left, small_right = self._subnormal_parts(self.left), self._subnormal_parts(self.right)
            if small_left.any() or small_right.any():
                tiny = tiny + self.evaluate(small_left, right, None) + self.evaluate(left, small_right, None)
            of_sums = gamma * magnitude + tiny + real.smallest_normal * real.roundoff
            if self.activation is None:
                # What is rounded is the computed sum, which underflow may have made larger than the exact one.
                rounded = real.roundoff * (np.abs(exact) + tiny)
                return _Bounds(np.asarray(of_sums + rounded), of_sums, magnitude)
            moved = self.activation.error(before, exact, accumulator, of_sums)
            result = moved + real.roundoff * (np.abs(exact) + moved) + real.smallest_normal * real.roundoff
            return _Bounds(np.asarray(result), of_sums, magnitude)

    def _overflows(self, exact: Array, bounds: _Bounds) -> tuple[Array, Array]:
        """Which sums may overflow to infinity, and which to minus infinity, before the activation or the rounding."""
        largest = self._formats[1].largest
        # The terms of one sign alone sum to (magnitude + exact)/2, or to (magnitude - exact)/2.
        rises = bounds.magnitude / 2 + exact / 2 + bounds.sums > largest
        return rises, bounds.magnitude / 2 - exact / 2 + bounds.sums > largest

    def _activated_within(self, y: Array, before: Array, exact: Array, bounds: _Bounds) -> npt.NDArray[np.bool_]:
        """Which elements of an activated result are correct, on finite data."""
        assert self.activation is not None
        largest, bound = self._formats[0].largest, bounds.result
        with np.errstate(invalid="ignore", over="ignore"):
            rises, falls = self._overflows(before, bounds)
            right = np.abs(y - exact) <= bound
            right |= (rises & self._is_near(y, self.activation.limits(y.shape, np.inf))) | (rises & falls & np.isnan(y))
            right |= falls & self._is_near(y, self.activation.limits(y.shape, -np.inf))
            right |= np.isposinf(y) & (exact + bound > largest)
            right |= np.isneginf(y) & (bound - exact > largest)
        return np.asarray(right | ~(np.isfinite(before) & np.isfinite(exact) & np.isfinite(bound)))

    def _is_near(self, y: Array, limits: Array) -> npt.NDArray[np.bool_]:
        """Which elements are within the error of `limits`, the values of an activation at an infinity or a NaN."""
        real, accumulator = self._formats
        with np.errstate(invalid="ignore"):
            near = np.abs(y - limits) <= 2 * (real.roundoff + 2 * ULPS * accumulator.roundoff) * np.abs(limits)
        return np.asarray((y == limits) | (np.isnan(y) & np.isnan(limits)) | (np.isfinite(limits) & near))

    def _part_within(self, y: Array, exact: Array, bounds: _Bounds) -> npt.NDArray[np.bool_]:
        """Which elements of a real result, or of one part of a complex result, are correct, on finite data."""
        real, bound = self._formats[0], bounds.result
        with np.errstate(invalid="ignore", over="ignore"):
            close = np.abs(y - exact) <= bound
            rises, falls = self._overflows(exact, bounds)
            overflow = np.isposinf(y) & (rises | (exact + bound > real.largest))
            overflow |= np.isneginf(y) & (falls | (bound - exact > real.largest))
            overflow |= np.isnan(y) & rises & falls
        unknown = ~(np.isfinite(exact) & np.isfinite(bound))
        return np.asarray(unknown | close | overflow)

    def _parts_within(self, y: Array, exact: Array, bounds: _Bounds) -> npt.NDArray[np.bool_]:
        """Which elements of a complex result are correct, on finite data."""
        parts = (y.real, exact.real), (y.imag, exact.imag)
        with np.errstate(invalid="ignore", over="ignore"):
            overflows = np.logical_or.reduce([mask for _, part in parts for mask in self._overflows(part, bounds)])
        # The next complex product makes an infinity in one part a NaN in the other, as zero times infinity.
        right = [self._part_within(*part, bounds) | (overflows & ~np.isfinite(part[0])) for part in parts]
        return np.asarray(right[0] & right[1])

    def _special_within(self, y: Array, exact: Array, magnitude: Array) -> npt.NDArray[np.bool_]:
        """Which elements with a NaN or an infinity in a term are correct."""
        # C99 Annex G does not say which part of complex data is not finite. Transforms make whole blocks wrong.
        if self._is_complex or self.of_fft is not None:
            return ~np.isfinite(y)
        same = (y == exact) | (np.isnan(y) & np.isnan(exact))
        if self.activation is not None:
            same |= self._is_near(y, exact)
        # Where finite terms overflow, or an infinity is multiplied by a flushed operand, NaN is correct, too.
        infinite_left, infinite_right = (np.isinf(self._as_wide(a)).astype(np.float64) for a in (self.left, self.right))
        meets = self.evaluate(infinite_left, self._subnormal_parts(self.right), None)
        lost = self._subnormal_parts(self.left)
        if self.left_error is not None:  # rounded to the dtype, an activated input may be zero
            lost = lost + np.where(np.abs(self.left) <= self.left_error, np.abs(self.left), 0.0)
        meets = meets + self.evaluate(lost, infinite_right, None)
        excused = (magnitude > self._formats[1].largest) | (meets > 0)
        right = same | (excused & ~np.isfinite(y))
        if self.activation is not None:
            for sign in (-np.inf, np.inf):
                right |= excused & self._is_near(y, self.activation.limits(y.shape, sign))
        return np.asarray(right)

    @property
    def _is_integer(self) -> bool:
        return self.dtype in INTEGERS

    @property
    def _is_complex(self) -> bool:
        return FORMATS[self.dtype].is_complex

    @property
    def _formats(self) -> tuple[Format, Format]:
        """The formats of the result's real part and of the accumulator."""
        found = FORMATS[self.dtype]
        return found, FORMATS[found.accumulator]

    def _as_wide(self, array: Any) -> Array:
        wide = np.int64 if self._is_integer else np.complex128 if self._is_complex else np.float64
        return np.asarray(array).astype(wide)

    def _magnitudes(self, array: Array) -> Array:
        """The absolute values, with zero in place of NaN and infinities."""
        wide = self._as_wide(array)
        with np.errstate(over="ignore"):
            return np.abs(np.where(np.isfinite(wide), wide, 0.0))

    def _subnormal_parts(self, array: Array) -> Array:
        """The absolute values of the parts that are lost if operands are flushed to zero."""
        smallest = self._formats[1].smallest_normal
        wide = self._as_wide(array)
        parts = np.abs(np.stack((wide.real, wide.imag)))
        return np.asarray(np.sum(parts, axis=0, where=parts < smallest))


@dataclass(frozen=True, slots=True, eq=False)
class _Bounds:
    """Bounds of the elements of a result.

    Attributes:
        result: the error bounds of the elements.
        sums: the error bounds of the sums, before they are activated or rounded.
        magnitude: the sums of |left| * |right| + |addend| + |residual|, of finite data alone.
    """

    result: Array
    sums: Array
    magnitude: Array


def gamma_of(m: int, u: float) -> float:
    if m * u >= 1:
        raise ValueError(f"no error bound exists for {m} roundings of unit roundoff {u}")
    return m * u / (1 - m * u)
