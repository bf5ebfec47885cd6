"""The gradients of `conv1d` and `conv_transpose1d` in their input, weight and bias, as functions of arrays.

Each takes the gradient of a loss in the output and returns that in one of the arguments. Of complex data they follow
PyTorch's convention: the gradient is the adjoint applied to `grad_output`, so the other factor of each product is
conjugated.

The gradient of the input of one operation is the other operation with the same weight array, computed by the same
kernels. `gpuconv.reference` has the definitions and the error bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex, TypeVar, cast

from . import cpu, cpu_gradients, runtime
from .arguments import check_shape
from .calls import Function
from .problem import (
    ArraySpec,
    BiasGradientProblem,
    ConvProblem,
    Op,
    Padding,
    Setting,
    WeightGradientProblem,
    bias_gradient_problem,
    gradient_problem,
)

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
    precision: str = "float32",
    out: ArrayT | None = None,
) -> ArrayT:
    """The gradient of `gpuconv.conv1d` in its input.

    ::

        grad_input[n, c, l_in] = sum over c_out, k of conj(weight[c_out, c_in, k]) * grad_output[n, c_out, l_out]
        l_in = l_out*stride - padding_left + k*dilation        (terms without such an l_out do not exist)

    where c is input channel c_in of the group of c_out. Inputs that no window contains, such as the last ones where the
    stride does not divide the length, get zeros.

    Args:
        input_size: the shape of the input, (N, C_in, L_in) or (C_in, L_in).
        weight: (C_out, C_in/groups, K). NumPy or CuPy, any strides; never changed.
        grad_output: the gradient of the output, of its shape (N, C_out, L_out) or (C_out, L_out), and of the kind,
            device and dtype of `weight`.
        stride: of the forward call.
        padding: of the forward call.
        dilation: of the forward call.
        groups: of the forward call.
        precision: "float32", the full precision of the dtype, or "tf32", as in the forward call.
        out: an array of shape `input_size`, of the dtype and device of `weight`, to write to, which must not overlap
            the arguments.

    Returns:
        An array of shape `input_size`; `out` where it was given.

    Raises:
        ValueError: a shape or a value does not fit; the message names the argument, what was expected and what came.
        TypeError: an argument is of the wrong kind, or a dtype is not supported.
        RuntimeError: a CuPy array was given but no GPU answers.

    Example:
        >>> import numpy as np
        >>> from gpuconv import grad
        >>> grad.conv1d_input((1, 1, 6), np.array([[[1.0, 2.0]]]), np.array([[[1.0, 10.0]]]), stride=3)
        array([[[ 1.,  2.,  0., 10., 20.,  0.]]])
    """
    settings = (input_size, stride, padding, dilation, groups, precision)
    return cast(ArrayT, _CONV1D_INPUT((grad_output, weight, None), settings, out))


def conv1d_weight(
    input: ArrayT,
    weight_size: Sequence[SupportsIndex],
    grad_output: ArrayT,
    stride: Setting = 1,
    padding: Padding = 0,
    dilation: Setting = 1,
    groups: SupportsIndex = 1,
    *,
    precision: str = "float32",
    out: ArrayT | None = None,
) -> ArrayT:
    """The gradient of `gpuconv.conv1d` in its weight.

    ::

        grad_weight[c_out, c_in, k] = sum over n, l_out of conj(input[n, c, l_in]) * grad_output[n, c_out, l_out]
        l_in = l_out*stride - padding_left + k*dilation        (terms without such an l_in do not exist)

    where c is input channel c_in of the group of c_out. The order of the sum, and so every bit of the result, depends
    on the shapes and settings, not on the run.

    Args:
        input: (N, C_in, L_in) or (C_in, L_in). NumPy or CuPy, any strides; never changed.
        weight_size: the shape of the weight, (C_out, C_in/groups, K).
        grad_output: the gradient of the output, of its shape (N, C_out, L_out) or (C_out, L_out), and of the kind,
            device and dtype of `input`.
        stride: of the forward call.
        padding: of the forward call.
        dilation: of the forward call.
        groups: of the forward call.
        precision: "float32", the full precision of the dtype, or "tf32", as in the forward call.
        out: an array of shape `weight_size`, of the dtype and device of `input`, to write to, which must not overlap
            the arguments.

    Returns:
        An array of shape `weight_size`; `out` where it was given.

    Raises:
        ValueError: a shape or a value does not fit; the message names the argument, what was expected and what came.
        TypeError: an argument is of the wrong kind, or a dtype is not supported.
        RuntimeError: a CuPy array was given but no GPU answers.

    Example:
        >>> import numpy as np
        >>> from gpuconv import grad
        >>> grad.conv1d_weight(np.arange(6.0).reshape(1, 1, 6), (1, 1, 2), np.array([[[1.0, 10.0]]]), stride=3)
        array([[[30., 41.]]])
    """
    settings = (weight_size, stride, padding, dilation, groups, precision)
    return cast(ArrayT, _CONV1D_WEIGHT((input, grad_output), settings, out))


def conv1d_bias(grad_output: ArrayT, *, out: ArrayT | None = None) -> ArrayT:
    """The gradient of `gpuconv.conv1d` in its bias: the sum of `grad_output` over samples and positions.

    Args:
        grad_output: the gradient of the output, (N, C_out, L_out) or (C_out, L_out). NumPy or CuPy, any strides.
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
    return cast(ArrayT, _CONV1D_BIAS((grad_output,), (), out))


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
    precision: str = "float32",
    out: ArrayT | None = None,
) -> ArrayT:
    """The gradient of `gpuconv.conv_transpose1d` in its input.

    ::

        grad_input[n, c_in, l_in] = sum over c_out, k of conj(weight[c_in, c_out, k]) * grad_output[n, c, l_out]
        l_out = l_in*stride - padding_left + k*dilation        (terms without such an l_out do not exist)

    where c is output channel c_out of the group of c_in.

    Args:
        input_size: the shape of the input, (N, C_in, L_in) or (C_in, L_in).
        weight: (C_in, C_out/groups, K). NumPy or CuPy, any strides; never changed.
        grad_output: the gradient of the output, of its shape (N, C_out, L_out) or (C_out, L_out), and of the kind,
            device and dtype of `weight`.
        stride: of the forward call.
        padding: of the forward call.
        output_padding: of the forward call.
        groups: of the forward call.
        dilation: of the forward call.
        output_size: of the forward call.
        precision: "float32", the full precision of the dtype, or "tf32", as in the forward call.
        out: an array of shape `input_size`, of the dtype and device of `weight`, to write to, which must not overlap
            the arguments.

    Returns:
        An array of shape `input_size`; `out` where it was given.

    Raises:
        ValueError: a shape or a value does not fit; the message names the argument, what was expected and what came.
        TypeError: an argument is of the wrong kind, or a dtype is not supported.
        RuntimeError: a CuPy array was given but no GPU answers.

    Example:
        >>> import numpy as np
        >>> from gpuconv import grad
        >>> grad.conv_transpose1d_input((1, 1, 2), np.array([[[1.0, 2.0]]]), np.arange(5.0).reshape(1, 1, 5), stride=3)
        array([[[ 2., 11.]]])
    """
    settings = (input_size, stride, padding, output_padding, groups, dilation, output_size, precision)
    return cast(ArrayT, _CONV_TRANSPOSE1D_INPUT((grad_output, weight, None), settings, out))


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
    precision: str = "float32",
    out: ArrayT | None = None,
) -> ArrayT:
    """The gradient of `gpuconv.conv_transpose1d` in its weight.

    ::

        grad_weight[c_in, c_out, k] = sum over n, l_in of conj(input[n, c_in, l_in]) * grad_output[n, c, l_out]
        l_out = l_in*stride - padding_left + k*dilation        (terms without such an l_out do not exist)

    where c is output channel c_out of the group of c_in. The order of the sum, and so every bit of the result, depends
    on the shapes and settings, not on the run.

    Args:
        input: (N, C_in, L_in) or (C_in, L_in). NumPy or CuPy, any strides; never changed.
        weight_size: the shape of the weight, (C_in, C_out/groups, K).
        grad_output: the gradient of the output, of its shape (N, C_out, L_out) or (C_out, L_out), and of the kind,
            device and dtype of `input`.
        stride: of the forward call.
        padding: of the forward call.
        output_padding: of the forward call.
        groups: of the forward call.
        dilation: of the forward call.
        output_size: of the forward call.
        precision: "float32", the full precision of the dtype, or "tf32", as in the forward call.
        out: an array of shape `weight_size`, of the dtype and device of `input`, to write to, which must not overlap
            the arguments.

    Returns:
        An array of shape `weight_size`; `out` where it was given.

    Raises:
        ValueError: a shape or a value does not fit; the message names the argument, what was expected and what came.
        TypeError: an argument is of the wrong kind, or a dtype is not supported.
        RuntimeError: a CuPy array was given but no GPU answers.

    Example:
        >>> import numpy as np
        >>> from gpuconv import grad
        >>> x, grad_y = np.array([[[1.0, 10.0]]]), np.arange(5.0).reshape(1, 1, 5)
        >>> grad.conv_transpose1d_weight(x, (1, 1, 2), grad_y, stride=3)
        array([[[30., 41.]]])
    """
    settings = (weight_size, stride, padding, output_padding, groups, dilation, output_size, precision)
    return cast(ArrayT, _CONV_TRANSPOSE1D_WEIGHT((input, grad_output), settings, out))


def conv_transpose1d_bias(grad_output: ArrayT, *, out: ArrayT | None = None) -> ArrayT:
    """The gradient of `gpuconv.conv_transpose1d` in its bias: the sum of `grad_output` over samples and positions.

    Args:
        grad_output: the gradient of the output, (N, C_out, L_out) or (C_out, L_out). NumPy or CuPy, any strides.
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
        >>> grad.conv_transpose1d_bias(np.arange(6.0).reshape(1, 2, 3))
        array([ 3., 12.])
    """
    return cast(ArrayT, _CONV_TRANSPOSE1D_BIAS((grad_output,), (), out))


def _input_function(op: Op) -> Function[ConvProblem]:
    name = f"{op}_input"

    def problem(arrays: tuple[Any, ...], settings: tuple[Any, ...]) -> ConvProblem:
        grad_output, weight, _ = arrays
        x = ArraySpec(check_shape(name, op, "input_size", settings[0]), weight.dtype)
        return gradient_problem(name, op, x, weight, grad_output, settings[1:])

    def compute(p: ConvProblem, grad_output: Any, weight: Any, _: None, output: Any) -> None:
        if p.L_in:
            cpu.convolve(p.adjoint(), grad_output, weight.conj() if p.is_complex else weight, None, output)

    def plan(
        p: ConvProblem, grad_output: Any, weight: Any, _: None, output: Any | None, algorithm: str | None
    ) -> runtime.Plan:
        if not p.L_in:
            return runtime.Plan(p.input_shape, None, ())
        arrays = (grad_output, weight, None, output)
        return runtime.make_plan(p.adjoint(), *arrays, conjugate_weight=p.is_complex, algorithm=algorithm)

    # In the order of the operation that computes it. It has no bias.
    return Function(name, ("grad_output", "weight", "bias"), problem, lambda p: p.input_shape, compute, plan)


def _weight_function(op: Op) -> Function[ConvProblem]:
    name = f"{op}_weight"

    def problem(arrays: tuple[Any, ...], settings: tuple[Any, ...]) -> ConvProblem:
        x, grad_output = arrays
        weight = ArraySpec(check_shape(name, op, "weight_size", settings[0]), x.dtype)
        return gradient_problem(name, op, x, weight, grad_output, settings[1:])

    def compute(p: ConvProblem, input: Any, grad_output: Any, output: Any) -> None:
        q = WeightGradientProblem.of(p)
        cpu_gradients.weight_gradient(q, *q.sides(input, grad_output), output)

    def plan(
        p: ConvProblem, input: Any, grad_output: Any, output: Any | None, algorithm: str | None
    ) -> runtime.GradientPlan:
        q = WeightGradientProblem.of(p)
        return runtime.make_weight_gradient_plan(q, input, grad_output, output, algorithm=algorithm)

    return Function(name, ("input", "grad_output"), problem, lambda p: p.weight_shape, compute, plan)


def _bias_function(op: Op) -> Function[BiasGradientProblem]:
    name = f"{op}_bias"
    return Function(
        name,
        ("grad_output",),
        lambda arrays, _: bias_gradient_problem(name, *arrays),
        lambda p: p.bias_shape,
        cpu_gradients.bias_gradient,
        runtime.make_bias_gradient_plan,
    )


_CONV1D_INPUT, _CONV_TRANSPOSE1D_INPUT = _input_function("conv1d"), _input_function("conv_transpose1d")
_CONV1D_WEIGHT, _CONV_TRANSPOSE1D_WEIGHT = _weight_function("conv1d"), _weight_function("conv_transpose1d")
_CONV1D_BIAS, _CONV_TRANSPOSE1D_BIAS = _bias_function("conv1d"), _bias_function("conv_transpose1d")


def weight_by_family(p: ConvProblem, input: Any, grad_output: Any, out: Any, family: str) -> Any:
    """The gradient of the weight of a problem into `out`, on a GPU by the kernel family of that name."""
    if p.transposed:
        more = (p.stride, p.padding, p.output_padding, p.groups, p.dilation, None, p.precision)
        return _CONV_TRANSPOSE1D_WEIGHT((input, grad_output), (p.weight_shape, *more), out, algorithm=family)
    settings = (p.weight_shape, p.stride, p.padding, p.dilation, p.groups, p.precision)
    return _CONV1D_WEIGHT((input, grad_output), settings, out, algorithm=family)
