"""The gradients of `conv1d` and `conv_transpose1d` with respect to input, weight and bias, as functions of arrays.

Each takes the gradient of a loss with respect to the output and returns that with respect to one of the arguments. For
complex data they follow PyTorch's convention: the gradient is the adjoint applied to `grad_output`, so the other factor
of each product is conjugated.

The gradient of the input of one operation is the other operation with the same weight array, computed by the same
kernels. `gpuconv.reference` has the definitions and the error bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex, TypeVar, cast

from . import calls
from .problem import Padding, Setting

__all__ = [
    "conv1d_bias",
    "conv1d_input",
    "conv1d_weight",
    "conv_transpose1d_bias",
    "conv_transpose1d_input",
    "conv_transpose1d_weight",
]

ArrayT = TypeVar("ArrayT")


def conv1d_input(
    input_size: Sequence[SupportsIndex],
    weight: ArrayT,
    grad_output: ArrayT,
    stride: Setting = 1,
    padding: Padding = 0,
    dilation: Setting = 1,
    groups: SupportsIndex = 1,
    *,
    padding_mode: str = "zeros",
    lengths: Any = None,
    precision: str = "float32",
    algorithm: str | None = None,
    out: ArrayT | None = None,
) -> ArrayT:
    """The gradient of `gpuconv.conv1d` with respect to its input.

        grad_input[n, c, l_in] = sum over c_out, k of conj(weight[c_out, c_in, k]) * grad_output[n, c_out, l_out]
        l_in = l_out*stride - padding_left + k*dilation        (terms without such an l_out do not exist)

    where c is input channel c_in of the group of c_out. The gradient is zero for inputs that no window contains, such
    as the last ones where the stride does not divide the length. In a padding mode other than "zeros" the sum runs over
    all positions that stand for l_in, including those in the padding.

    Args:
        input_size: the shape of the input, (N, C_in, L_in) or (C_in, L_in).
        weight: (C_out, C_in/groups, K). NumPy or CuPy, any strides; never changed.
        grad_output: the gradient of the output, of its shape (N, C_out, L_out) or (C_out, L_out), and of the kind,
            device and dtype of `weight`; with real taps it may also be complex.
        stride, padding, dilation, groups, padding_mode: of the forward call.
        lengths: of the forward call, those of the input. Values of `grad_output` beyond the output length of a sample
            are ignored; the gradient beyond its length is zero.
        precision: "float32", the full precision of the dtype, or "tf32", as in the forward call.
        algorithm: how a GPU computes it: None for the preferred kernel family, "base" for the one that can compute
            every problem, or the name of a `conv_transpose1d` family; see `gpuconv.explain`. "fft" or "auto", as in
            `gpuconv.conv1d`, also apply to NumPy arrays.
        out: an array of shape `input_size`, of the dtype and device of `grad_output`, to write to, which must not
            overlap the arguments.

    Returns:
        An array of shape `input_size`; `out` where it was given.

    Raises:
        ValueError: a shape or a value does not fit; the message names the argument, what was expected and what was
            given. Or the named algorithm cannot compute the problem.
        TypeError: an argument is of the wrong kind, or a dtype is not supported.
        RuntimeError, ImportError: as `gpuconv.conv1d` raises them.

    Example:
        >>> import numpy as np
        >>> from gpuconv import grad
        >>> grad.conv1d_input((1, 1, 6), np.array([[[1.0, 2.0]]]), np.array([[[1.0, 10.0]]]), stride=3)
        array([[[ 1.,  2.,  0., 10., 20.,  0.]]])
    """
    settings = (input_size, stride, padding, dilation, groups, precision, padding_mode)
    return cast(
        ArrayT, calls.run("conv1d_input", (grad_output, weight), settings, out, algorithm=algorithm, lengths=lengths)
    )


def conv1d_weight(
    input: ArrayT,
    weight_size: Sequence[SupportsIndex],
    grad_output: ArrayT,
    stride: Setting = 1,
    padding: Padding = 0,
    dilation: Setting = 1,
    groups: SupportsIndex = 1,
    *,
    padding_mode: str = "zeros",
    lengths: Any = None,
    precision: str = "float32",
    algorithm: str | None = None,
    weight_dtype: Any = None,
    out: ArrayT | None = None,
) -> ArrayT:
    """The gradient of `gpuconv.conv1d` with respect to its weight.

        grad_weight[c_out, c_in, k] = sum over n, l_out of conj(input[n, c, l_in]) * grad_output[n, c_out, l_out]
        l_in = l_out*stride - padding_left + k*dilation        (terms without such an l_in do not exist)

    where c is input channel c_in of the group of c_out. In a padding mode other than "zeros" a position l_in in the
    padding stands for a sample of the input. The order of the sum, and so every bit of the result, depends on the
    shapes and settings, not on the run.

    Args:
        input: (N, C_in, L_in) or (C_in, L_in). NumPy or CuPy, any strides; never changed.
        weight_size: the shape of the weight, (C_out, C_in/groups, K).
        grad_output: the gradient of the output, of its shape (N, C_out, L_out) or (C_out, L_out), and of the kind,
            device and dtype of `input`.
        stride, padding, dilation, groups, padding_mode: of the forward call.
        lengths: of the forward call. Values of `input` beyond the length of a sample, and of `grad_output` beyond its
            output length, are ignored. The error bound counts the terms of samples of full length.
        precision: as in `conv1d_input`.
        algorithm: as in `conv1d_input`, but with the families of `weight_gradient`; "fft" is not possible with
            `lengths`.
        weight_dtype: the dtype of the weight, and so of its gradient: None for that of `input`, or the real dtype of
            complex data whose taps are real (float32 for complex64).
        out: an array of shape `weight_size`, of the weight's dtype on the device of `input`, to write to, which must
            not overlap the arguments.

    Returns:
        An array of shape `weight_size`; `out` where it was given.

    Raises:
        ValueError, TypeError, RuntimeError: as `conv1d_input` raises them.

    Example:
        >>> import numpy as np
        >>> from gpuconv import grad
        >>> grad.conv1d_weight(np.arange(6.0).reshape(1, 1, 6), (1, 1, 2), np.array([[[1.0, 10.0]]]), stride=3)
        array([[[30., 41.]]])
    """
    settings = (weight_size, stride, padding, dilation, groups, precision, padding_mode)
    arrays = (input, grad_output)
    return cast(
        ArrayT,
        calls.run_weight_gradient(
            "conv1d_weight", arrays, settings, out, weight_dtype=weight_dtype, algorithm=algorithm, lengths=lengths
        ),
    )


def conv1d_bias(grad_output: ArrayT, *, lengths: Any = None, out: ArrayT | None = None) -> ArrayT:
    """The gradient of `gpuconv.conv1d` with respect to its bias.

    It is the sum of `grad_output` over samples and positions.

    Args:
        grad_output: the gradient of the output, (N, C_out, L_out) or (C_out, L_out). NumPy or CuPy, any strides.
        lengths: where samples have different lengths, those of `grad_output`: `gpuconv.output_lengths` of the lengths
            of the forward call.
        out: an array of shape (C_out,), of the dtype and device of `grad_output`, to write to, which must not overlap
            it.

    Returns:
        (C_out,); `out` where it was given. Its bits depend on the shape, not on the run.

    Raises:
        ValueError: a shape does not fit.
        TypeError: an argument is of the wrong kind, or a dtype is not supported.
        RuntimeError: a CuPy array was given but no GPU answers.

    Example:
        >>> import numpy as np
        >>> from gpuconv import grad
        >>> grad.conv1d_bias(np.arange(6.0).reshape(1, 2, 3))
        array([ 3., 12.])
    """
    return cast(ArrayT, calls.run("conv1d_bias", (grad_output,), (), out, lengths=lengths))


def conv_transpose1d_input(
    input_size: Sequence[SupportsIndex],
    weight: ArrayT,
    grad_output: ArrayT,
    stride: Setting = 1,
    padding: Padding = 0,
    output_padding: Setting = 0,
    groups: SupportsIndex = 1,
    dilation: Setting = 1,
    *,
    output_size: Setting | None = None,
    lengths: Any = None,
    precision: str = "float32",
    algorithm: str | None = None,
    out: ArrayT | None = None,
) -> ArrayT:
    """The gradient of `gpuconv.conv_transpose1d` with respect to its input.

        grad_input[n, c_in, l_in] = sum over c_out, k of conj(weight[c_in, c_out, k]) * grad_output[n, c, l_out]
        l_out = l_in*stride - padding_left + k*dilation        (terms without such an l_out do not exist)

    where c is output channel c_out of the group of c_in.

    Args:
        weight: (C_in, C_out/groups, K). NumPy or CuPy, any strides; never changed.
        stride, padding, output_padding, groups, dilation, output_size: of the forward call.
        algorithm: as in `conv1d_input`, but with the families of `conv1d`.
        input_size, grad_output, lengths, precision, out: as in `conv1d_input`.

    Returns:
        An array of shape `input_size`; `out` where it was given.

    Raises:
        ValueError, TypeError, RuntimeError: as `conv1d_input` raises them.

    Example:
        >>> import numpy as np
        >>> from gpuconv import grad
        >>> grad.conv_transpose1d_input((1, 1, 2), np.array([[[1.0, 2.0]]]), np.arange(5.0).reshape(1, 1, 5), stride=3)
        array([[[ 2., 11.]]])
    """
    settings = (input_size, stride, padding, output_padding, groups, dilation, output_size, precision)
    return cast(
        ArrayT,
        calls.run("conv_transpose1d_input", (grad_output, weight), settings, out, algorithm=algorithm, lengths=lengths),
    )


def conv_transpose1d_weight(
    input: ArrayT,
    weight_size: Sequence[SupportsIndex],
    grad_output: ArrayT,
    stride: Setting = 1,
    padding: Padding = 0,
    output_padding: Setting = 0,
    groups: SupportsIndex = 1,
    dilation: Setting = 1,
    *,
    output_size: Setting | None = None,
    lengths: Any = None,
    precision: str = "float32",
    algorithm: str | None = None,
    weight_dtype: Any = None,
    out: ArrayT | None = None,
) -> ArrayT:
    """The gradient of `gpuconv.conv_transpose1d` with respect to its weight.

        grad_weight[c_in, c_out, k] = sum over n, l_in of conj(input[n, c_in, l_in]) * grad_output[n, c, l_out]
        l_out = l_in*stride - padding_left + k*dilation        (terms without such an l_out do not exist)

    where c is output channel c_out of the group of c_in. The order of the sum, and so every bit of the result, depends
    on the shapes and settings, not on the run.

    Args:
        weight_size: the shape of the weight, (C_in, C_out/groups, K).
        stride, padding, output_padding, groups, dilation, output_size: of the forward call.
        input, grad_output, lengths, precision, algorithm, weight_dtype, out: as in `conv1d_weight`.

    Returns:
        An array of shape `weight_size`; `out` where it was given.

    Raises:
        ValueError, TypeError, RuntimeError: as `conv1d_input` raises them.

    Example:
        >>> import numpy as np
        >>> from gpuconv import grad
        >>> x, grad_y = np.array([[[1.0, 10.0]]]), np.arange(5.0).reshape(1, 1, 5)
        >>> grad.conv_transpose1d_weight(x, (1, 1, 2), grad_y, stride=3)
        array([[[30., 41.]]])
    """
    settings = (weight_size, stride, padding, output_padding, groups, dilation, output_size, precision)
    arrays = (input, grad_output)
    return cast(
        ArrayT,
        calls.run_weight_gradient(
            "conv_transpose1d_weight",
            arrays,
            settings,
            out,
            weight_dtype=weight_dtype,
            algorithm=algorithm,
            lengths=lengths,
        ),
    )


def conv_transpose1d_bias(grad_output: ArrayT, *, lengths: Any = None, out: ArrayT | None = None) -> ArrayT:
    """The gradient of `gpuconv.conv_transpose1d` with respect to its bias.

    Arguments, result and errors are those of `conv1d_bias`.

    Example:
        >>> import numpy as np
        >>> from gpuconv import grad
        >>> grad.conv_transpose1d_bias(np.arange(6.0).reshape(1, 2, 3))
        array([ 3., 12.])
    """
    return cast(ArrayT, calls.run("conv_transpose1d_bias", (grad_output,), (), out, lengths=lengths))
