"""The two operations on tensors: their arguments are checked and cast, and the operators called."""

# Much of PyTorch has no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
import torch.nn.functional
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..arguments import check_precision
from ..problem import ConvProblem, Op, Padding, Setting, Settings
from . import operators
from .tensors import NO_TANGENTS, Tensor, dtype_name, has_tangent, specs


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Setting = 1,
    padding: Padding = 0,
    dilation: Setting = 1,
    groups: SupportsIndex = 1,
    *,
    precision: str = "float32",
    algorithm: str | None = None,
) -> Tensor:
    """`gpuconv.conv1d` of tensors, with the arguments of `torch.nn.functional.conv1d`.

    Args:
        input: (N, C_in, L_in), or (C_in, L_in) for a single sample, of any strides, on the CPU or a CUDA device.
        weight: (C_out, C_in/groups, K), of the device and dtype of `input`.
        bias: (C_out,), or None.
        stride: step of the window, in samples.
        padding: zeros on both sides, in samples: an int, a pair (left, right), "valid", "same" (also with a stride) or
            "causal".
        dilation: distance between taps, in samples.
        groups: input and output channels are cut into this many groups that do not mix.
        precision: "float32", or "tf32" where float32 operands may be rounded to TF32, in the gradients as well.
        algorithm: how a GPU computes the output, as in `gpuconv.conv1d`: None, "base" or the name of a kernel
            family. Under `torch.func.vmap` it is that of the one call which the whole batch becomes. Gradients, and
            tensors on the CPU, are computed as without it.

    Returns:
        (N, C_out, L_out), or (C_out, L_out) for a single sample: a contiguous tensor. In a region of `torch.autocast`
        the arguments are cast first, as PyTorch does.

    Raises:
        ValueError: a shape or a value does not fit; the message names the argument, what was expected and what came.
            The kernel family that `algorithm` names does not take the problem.
        TypeError: an argument is of the wrong kind, on another device, or a dtype is not one of float16, bfloat16,
            float32, float64, complex64 and complex128.
        NotImplementedError: a forward-mode derivative is asked for.
        ImportError: CuPy is needed for a CUDA tensor, or ml_dtypes for bfloat16, and is not installed.

    Example:
        >>> import torch, gpuconv.torch
        >>> x = torch.arange(5.0).reshape(1, 1, 5).requires_grad_()
        >>> y = gpuconv.torch.conv1d(x, torch.ones(1, 1, 3), padding="same")
        >>> y.detach()
        tensor([[[1., 3., 6., 9., 7.]]])
        >>> torch.autograd.grad(y.sum(), x)
        (tensor([[[2., 3., 3., 3., 2.]]]),)
    """
    if has_torch_function_variadic(input, weight, bias):
        settings: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        settings |= {"precision": precision, "algorithm": algorithm}
        return _overridden(conv1d, input, weight, bias, **settings)
    if algorithm is not None:
        _check_algorithm("conv1d", algorithm)
    checked = Settings.check("conv1d", "conv1d", stride, padding, dilation, groups)
    tensors = _tensors("conv1d", precision, input, weight, bias)
    if _exports_onnx():
        return _as_pytorch("conv1d", checked, *tensors)
    sides, word = _split(checked.padding)
    others = (checked.dilation, checked.groups, precision, algorithm)
    return operators.conv1d(*tensors, checked.stride, sides, word, *others)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Setting = 1,
    padding: Padding = 0,
    output_padding: Setting = 0,
    groups: SupportsIndex = 1,
    dilation: Setting = 1,
    *,
    output_size: Setting | None = None,
    precision: str = "float32",
    algorithm: str | None = None,
) -> Tensor:
    """`gpuconv.conv_transpose1d` of tensors, with the arguments of `torch.nn.functional.conv_transpose1d`.

    Args:
        input: (N, C_in, L_in), or (C_in, L_in) for a single sample, of any strides, on the CPU or a CUDA device.
        weight: (C_in, C_out/groups, K), of the device and dtype of `input`.
        bias: (C_out,), or None.
        stride: distance between the windows that neighbouring input samples feed, in output samples.
        padding: output samples trimmed: an int from both sides, a pair (left, right), "valid" (none) or "same"
            (L_out = L_in*stride).
        output_padding: output samples added on the right, below max(stride, dilation).
        groups: input and output channels are cut into this many groups that do not mix.
        dilation: distance between taps, in output samples.
        output_size: the wanted L_out, in place of output_padding.
        precision: "float32", or "tf32" where float32 operands may be rounded to TF32, in the gradients as well.
        algorithm: how a GPU computes the output, as in `gpuconv.conv_transpose1d`: None, "base" or the name of a kernel
            family. Under `torch.func.vmap` it is that of the one call which the whole batch becomes. Gradients, and
            tensors on the CPU, are computed as without it.

    Returns:
        (N, C_out, L_out), or (C_out, L_out) for a single sample: a contiguous tensor. In a region of `torch.autocast`
        the arguments are cast first, as PyTorch does.

    Raises:
        ValueError: a shape or a value does not fit; the message names the argument, what was expected and what came.
            The kernel family that `algorithm` names does not take the problem.
        TypeError: an argument is of the wrong kind, on another device, or a dtype is not one of float16, bfloat16,
            float32, float64, complex64 and complex128.
        NotImplementedError: a forward-mode derivative is asked for.
        ImportError: CuPy is needed for a CUDA tensor, or ml_dtypes for bfloat16, and is not installed.

    Example:
        >>> import torch, gpuconv.torch
        >>> gpuconv.torch.conv_transpose1d(torch.tensor([[[1.0, 2.0]]]), torch.ones(1, 1, 3), stride=2)
        tensor([[[1., 1., 3., 2., 2.]]])
    """
    op: Op = "conv_transpose1d"
    if has_torch_function_variadic(input, weight, bias):
        settings: dict[str, Any] = {"stride": stride, "padding": padding, "output_padding": output_padding}
        settings |= {"groups": groups, "dilation": dilation, "output_size": output_size}
        settings |= {"precision": precision, "algorithm": algorithm}
        return _overridden(conv_transpose1d, input, weight, bias, **settings)
    if algorithm is not None:
        _check_algorithm(op, algorithm)
    checked = Settings.check(op, op, stride, padding, dilation, groups, output_padding)
    tensors = _tensors(op, precision, input, weight, bias)
    if output_size is not None:
        x, w, b = specs(*tensors)
        problem = ConvProblem.conv_transpose1d(
            x, w, b, stride, padding, output_padding, groups, dilation, output_size, precision
        )
        checked = checked._replace(padding=problem.padding, output_padding=problem.output_padding)
    if _exports_onnx():
        return _as_pytorch(op, checked, *tensors)
    sides, word = _split(checked.padding)
    others = (checked.output_padding, checked.groups, checked.dilation, precision, algorithm)
    return operators.conv_transpose1d(*tensors, checked.stride, sides, word, *others)


def _tensors(
    op: Op, precision: str, input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors, once they are known to be some on one device; cast where autocast is on."""
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got layout {tensor.layout}")
        if tensor.device != input.device:
            raise TypeError(
                f"{op}: all tensors must be on one device, got input on {input.device} and {name} on {tensor.device}"
            )
        # PyTorch itself would give zeros without a word.
        if forward_ad._current_level >= 0 and has_tangent(tensor):
            raise NotImplementedError(f"{op}: {NO_TANGENTS}, but {name} has a tangent")
    kind = input.device.type
    x, w, b = input, weight, bias
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, w, b = _autocast(x, dtype), _autocast(w, dtype), None if b is None else _autocast(b, dtype)
    check_precision(op, precision, dtype_name(x.dtype))
    return x, w, b


def _check_algorithm(op: Op, algorithm: str) -> None:
    from .. import dispatch  # with all kernel families, which most calls on the CPU do not need

    dispatch.check_algorithm(op, op, algorithm)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What PyTorch's own convolutions make of an argument: float64 and complex numbers stay as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _overridden(function: Callable[..., Tensor], *tensors: Tensor | None, **settings: Any) -> Tensor:
    """What a mode, or a class of the tensors, such as the proxies of torch.fx, makes of a call."""
    result: Tensor = handle_torch_function(function, tensors, *tensors, **settings)
    return result


def _exports_onnx() -> bool:
    return (torch.compiler.is_compiling() or torch._C._is_tracing()) and torch.onnx.is_in_onnx_export()


def _as_pytorch(op: Op, settings: Settings, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """The same made of PyTorch's own functions, which exporters to other formats know."""
    s, padding, d, groups, extra = settings
    x_spec, w_spec, b_spec = specs(x, w, b)
    if op == "conv1d":
        left, right = ConvProblem.conv1d(x_spec, w_spec, b_spec, s, padding, d, groups).padding
        if left == right:
            return torch.conv1d(x, w, b, s, left, d, groups)
        return torch.conv1d(torch.nn.functional.pad(x, (left, right)), w, b, s, 0, d, groups)
    problem = ConvProblem.conv_transpose1d(x_spec, w_spec, b_spec, s, padding, extra, groups, d)
    left, right = problem.padding
    both = min(left, right)
    y = torch.conv_transpose1d(x, w, b, s, both, problem.output_padding, groups, d)
    return y if left == right else y[..., left - both : y.shape[-1] - (right - both)]


def _split(padding: tuple[int, int] | str) -> tuple[list[int], str]:
    """Padding as the operators take it: (left, right) and an empty word, or nothing and the word."""
    return ([], padding) if isinstance(padding, str) else (list(padding), "")
