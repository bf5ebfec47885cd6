"""The definition of both operations and of their gradients, with the formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import FORMATS, Format
from ..edge import source_indices
from ..fusion import ACTIVATION_ARRAYS, INPUT_ACTIVATION_ARRAYS, RESIDUAL
from ..problem import BiasGradientProblem, ConvProblem, WeightGradientProblem
from .activations import Function
from .fft import error_of_convolution, error_of_weight_gradient
from .sums import Sums, gamma_of

Array = npt.NDArray[Any]


def compute(
    problem: ConvProblem,
    input: Array,
    weight: Array,
    bias: Array | None = None,
    fused: Mapping[str, Array] | None = None,
) -> Array:
    """Evaluate a problem by its definition, in float64 or complex128.

    conv1d (cross-correlation: the kernel is not flipped), with ``l_in = l_out*stride - padding_left + k*dilation``:

        output[n, c_out, l_out] = bias[c_out] + sum over c_in, k of weight[c_out, c_in, k] * input[n, c_in, l_in]

    conv_transpose1d, with ``l_out = l_in*stride - padding_left + k*dilation``:

        output[n, c_out, l_out] = bias[c_out] + sum over c_in, k of weight[c_in, c_out, k] * input[n, c_in, l_in]

    The sums run over the channels of one group and over the taps whose position exists: a tap that falls into the zero
    padding contributes nothing, whatever the weight. In another `padding_mode` a convolution is that of the padded
    input; a transposed one, its adjoint, adds the padding of its output to the samples that the padding stands for.
    `problem.fusion` is applied: `gpuconv.fusion` has the formulas.

    Args:
        problem: extents and settings.
        input: `problem.input_shape`, of any dtype that converts to the accumulator.
        weight: `problem.weight_shape`.
        bias: `problem.bias_shape`, or None.
        fused: the arrays that `problem.fusion` needs, by name.

    Returns:
        `problem.output_shape`, float64, or complex128 for complex problems; the exact result for problems of integers.

    Example:
        >>> import numpy as np, gpuconv
        >>> x, w = np.arange(5.0).reshape(1, 1, 5), np.ones((1, 1, 3))
        >>> problem = gpuconv.explain("conv1d", x, w, padding="same", device="cpu").problem
        >>> gpuconv.reference.compute(problem, x, w)
        array([[[1., 3., 6., 9., 7.]]])
    """
    return convolution(problem, input, weight, bias, fused).exact()


def error_bound(
    problem: ConvProblem,
    input: Array,
    weight: Array,
    bias: Array | None = None,
    exact: Array | None = None,
    fused: Mapping[str, Array] | None = None,
) -> Array:
    """The largest permitted distance of each output element from `compute`: `Sums.error_bound`.

    The ``n`` of the formula is `problem.terms`.

    Example:
        >>> import numpy as np, gpuconv
        >>> x, w = np.ones((1, 1, 4), np.float32), np.full((1, 1, 3), 1 / 3, np.float32)
        >>> problem = gpuconv.explain("conv1d", x, w, device="cpu").problem
        >>> bound = gpuconv.reference.error_bound(problem, x, w)
        >>> bool((np.abs(gpuconv.conv1d(x, w) - gpuconv.reference.compute(problem, x, w)) <= bound).all())
        True
    """
    return convolution(problem, input, weight, bias, fused).error_bound(exact)


def within_bound(
    problem: ConvProblem,
    output: Array,
    input: Array,
    weight: Array,
    bias: Array | None = None,
    fused: Mapping[str, Array] | None = None,
) -> npt.NDArray[np.bool_]:
    """Which elements of `output` are correct: `Sums.within_bound`.

    Example:
        >>> import numpy as np, gpuconv
        >>> x, w = np.ones((1, 1, 4)), np.full((1, 1, 3), 0.1)
        >>> problem = gpuconv.explain("conv1d", x, w, device="cpu").problem
        >>> gpuconv.reference.within_bound(problem, np.array([[[0.3, 0.31]]]), x, w)
        array([[[ True, False]]])
    """
    return convolution(problem, input, weight, bias, fused).within_bound(output)


def convolution(
    problem: ConvProblem,
    input: Array,
    weight: Array,
    bias: Array | None = None,
    fused: Mapping[str, Array] | None = None,
    *,
    by_fft: bool = False,
) -> Sums:
    """The output of a problem; `compute` has the formula. With `by_fft` the bound is that of `algorithm="fft"`.

    Example:
        >>> import numpy as np, gpuconv
        >>> x, w = np.arange(5.0).reshape(1, 1, 5), np.ones((1, 1, 3))
        >>> problem = gpuconv.explain("conv1d", x, w, stride=2, device="cpu").problem
        >>> gpuconv.reference.convolution(problem, x, w).exact()
        array([[[3., 9.]]])
    """
    p, fusion, fused = problem, problem.fuses, fused or {}
    left, left_error = input, None
    activate = Function.of(fusion.input_activation, INPUT_ACTIVATION_ARRAYS, fused)
    if activate is not None:
        left, left_error = _activated_input(activate, input, FORMATS[p.dtype])
    return Sums(
        p.dtype, p.terms, _products(p), left, weight, bias, partial(_convolve, p), p.precision, p.out_dtype, left_error,
        fused[RESIDUAL] if fusion.has_residual else None,
        Function.of(fusion.activation, ACTIVATION_ARRAYS, fused), _error_of_fft(p, input, weight) if by_fft else None,
    )  # fmt: skip


def _error_of_fft(p: ConvProblem, input: Array, weight: Array) -> Array:
    """The error bounds of sums through the FFT, before anything is added to them."""
    if p.padding_mode == "zeros" or not p.transposed:
        return error_of_convolution(p, input, weight)
    # The padding of the output is then added to other results.
    padded, u = _without_padding(p), FORMATS[p.format.accumulator].roundoff
    error = error_of_convolution(padded, input, weight)
    wide = np.complex128 if p.is_complex else np.float64
    magnitude = _convolve(padded, np.abs(input.astype(wide)), np.abs(weight.astype(wide)), None)
    return _folded(error + gamma_of(p.most_positions, u) * (magnitude + error), _samples_meant(p), p.L_out)


def _activated_input(activate: Function, input: Array, real: Format) -> tuple[Array, Array]:
    """The activated input, and the error bound of the computed one, which is rounded to the dtype."""
    x = input.astype(np.float64)
    exact = activate(x)
    error = activate.error(x, exact, FORMATS[real.accumulator])
    with np.errstate(all="ignore"):
        error = error + real.roundoff * (np.abs(exact) + error) + real.smallest_normal * real.roundoff
        # From half a unit beyond the largest number on, values are rounded to infinity.
        exact = np.where(np.abs(exact) >= real.largest * (1 + real.roundoff), np.copysign(np.inf, exact), exact)
    return exact, np.where(np.isfinite(exact), error, 0.0)


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


def input_gradient(problem: ConvProblem, weight: Array, grad_output: Array, *, by_fft: bool = False) -> Sums:
    """The gradient of a problem with respect to its input.

    With l_in and l_out as in `compute`, for conv1d and conv_transpose1d:

        grad_input[n, c_in, l_in] = sum over c_out, k of conj(weight[c_out, c_in, k]) * grad_output[n, c_out, l_out]
        grad_input[n, c_in, l_in] = sum over c_out, k of conj(weight[c_in, c_out, k]) * grad_output[n, c_out, l_out]

    An input that no window contains has the gradient zero.

    Args:
        problem: the forward problem.
        weight: `problem.weight_shape`.
        grad_output: `problem.output_shape`.
        by_fft: whether the bound is that of `algorithm="fft"`.

    Returns:
        Sums of the shape `problem.input_shape`.

    Example:
        >>> import numpy as np, gpuconv
        >>> x, w = np.arange(5.0).reshape(1, 1, 5), np.ones((1, 1, 3))
        >>> problem = gpuconv.explain("conv1d", x, w, device="cpu").problem
        >>> gpuconv.reference.input_gradient(problem, w, np.ones((1, 1, 3))).exact()
        array([[[1., 2., 3., 2., 1.]]])
    """
    p = problem
    terms, of_fft = 0, None
    if p.L_in:
        terms = p.adjoint().terms
        of_fft = _error_of_fft(p.adjoint(), grad_output, weight) if by_fft else None
    evaluate = partial(_input_gradient, p)
    return Sums(p.dtype, terms, _products(p), weight, grad_output, None, evaluate, p.precision, of_fft=of_fft)


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


def weight_gradient(problem: WeightGradientProblem, coarse: Array, fine: Array, *, by_fft: bool = False) -> Sums:
    """The gradient with respect to the weight; `WeightGradientProblem` has the formula.

    Args:
        problem: extents and settings; its method `sides` orders input and grad_output as coarse and fine.
        coarse: `problem.coarse_shape`, or that without the batch axis of one sample.
        fine: `problem.fine_shape`, likewise.
        by_fft: whether the bound is that of `algorithm="fft"`.

    Returns:
        Sums of the shape `problem.weight_shape`.

    Example:
        >>> import numpy as np, gpuconv
        >>> x, w, g = np.arange(5.0).reshape(1, 1, 5), np.ones((1, 1, 3)), np.ones((1, 1, 3))
        >>> problem = gpuconv.explain("conv1d", x, w, direction="grad_weight", device="cpu").problem
        >>> gpuconv.reference.weight_gradient(problem, g, x).exact()
        array([[[3., 6., 9.]]])
    """
    p, of_fft = problem, None
    if by_fft:
        of_fft = error_of_weight_gradient(p, coarse.reshape(p.coarse_shape), fine.reshape(p.fine_shape))
    evaluate = partial(_weight_gradient, p)
    return Sums(p.dtype, p.terms, _products(p), coarse, fine, None, evaluate, p.precision, of_fft=of_fft)


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
    """The gradient with respect to the bias; `BiasGradientProblem` has the formula.

    Args:
        problem: extents.
        grad_output: `problem.grad_output_shape`, or that without the batch axis of one sample.

    Returns:
        Sums of the shape `problem.bias_shape`; each term is an element times one, for complex data also one product.

    Example:
        >>> import numpy as np, gpuconv
        >>> x, w, g = np.arange(5.0).reshape(1, 1, 5), np.ones((1, 1, 3)), np.ones((1, 1, 3))
        >>> problem = gpuconv.explain("conv1d", x, w, direction="grad_bias", device="cpu").problem
        >>> gpuconv.reference.bias_gradient(problem, g).exact()
        array([3.])
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
    """The sample for which each position of that row stands."""
    L = p.L_out if p.transposed else p.L_in
    return source_indices(p.padding_mode, -p.padding_left, L + p.padding_right, L)


def _folded(padded: Array, samples: npt.NDArray[np.intp], L: int) -> Array:
    """For each of L samples, the sum over the positions that stand for it."""
    result = np.zeros((*padded.shape[:-1], L), padded.dtype)
    at: Any = (..., samples)
    np.add.at(result, at, padded)
    return result


def _products(p: ConvProblem | WeightGradientProblem) -> int:
    return 2 if p.is_complex else 1


def _positions(p: ConvProblem, k: int) -> tuple[slice, slice]:
    """The input positions that tap k reads and the output positions it contributes to, as slices of equal length."""
    offset = k * p.dilation - p.padding_left
    if p.transposed:
        return _meeting(p.L_in, p.L_out, p.stride, offset)
    at_output, at_input = _meeting(p.L_out, p.L_in, p.stride, offset)
    return at_input, at_output


def _meeting(coarse: int, fine: int, stride: int, offset: int) -> tuple[slice, slice]:
    """The positions q in [0, coarse) with q*stride + offset in [0, fine), and those of fine, as slices."""
    first = max(0, -(offset // stride))
    last = min(coarse - 1, (fine - 1 - offset) // stride)
    if last < first:
        return slice(0), slice(0)
    return slice(first, last + 1), slice(first * stride + offset, last * stride + offset + 1, stride)
