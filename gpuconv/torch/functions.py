"""The two operations on tensors: their arguments are checked and cast, and the operators called."""

# Much of PyTorch has no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, SupportsIndex

import numpy as np
import torch
import torch.nn.functional
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    handle_torch_function,
    has_torch_function_variadic,
)

from ..arguments import check_padding_mode, check_precision
from ..problem import ConvProblem, Op, Padding, Setting, Settings
from ..runtime import is_cupy_array
from . import operators
from .tensors import Tensor, dtype_name, specs


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Setting = 1,
    padding: Padding = 0,
    dilation: Setting = 1,
    groups: SupportsIndex = 1,
    *,
    padding_mode: str = "zeros",
    precision: str = "float32",
    algorithm: str | None = None,
) -> Tensor:
    """`gpuconv.conv1d` of tensors, with derivatives of every order in both modes.

    Args:
        input: (N, C_in, L_in), or (C_in, L_in) for a single sample. All tensors are on one device, the CPU or a CUDA
            device, of one dtype and of any strides.
        weight: (C_out, C_in/groups, K).
        bias: (C_out,), or None.
        stride: see `gpuconv.conv1d`.
        padding: likewise.
        dilation: likewise.
        groups: likewise.
        padding_mode: likewise.
        precision: likewise; it holds for the gradients, too.
        algorithm: likewise, for the output alone: gradients are computed as without it. Under `torch.func.vmap` it is
            that of the one call which the whole batch becomes.

    Returns:
        (N, C_out, L_out), or (C_out, L_out) for a single sample: a contiguous tensor. In a region of `torch.autocast`
        the arguments are cast first, as PyTorch does.

    Raises:
        ValueError, TypeError: as `gpuconv.conv1d` raises them.
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
        settings = (stride, padding, dilation, groups)
        named = {"padding_mode": padding_mode, "precision": precision, "algorithm": algorithm}
        return _overridden(conv1d, input, weight, bias, *settings, **named)
    if algorithm is not None:
        _check_algorithm("conv1d", algorithm)
    checked = _checked("conv1d", stride, padding, dilation, groups)
    tensors = _tensors("conv1d", precision, input, weight, bias)
    if _exports_onnx():
        return _as_pytorch("conv1d", checked, *tensors, padding_mode)
    sides, word = _split(checked.padding)
    others = (checked.dilation, checked.groups, precision, padding_mode, algorithm)
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
    padding_mode: str = "zeros",
    precision: str = "float32",
    algorithm: str | None = None,
) -> Tensor:
    """`gpuconv.conv_transpose1d` of tensors; all that `conv1d` says of tensors and derivatives holds here, too.

    Args:
        input: (N, C_in, L_in), or (C_in, L_in) for a single sample.
        weight: (C_in, C_out/groups, K).
        bias: (C_out,), or None.
        stride: see `gpuconv.conv_transpose1d`.
        padding: likewise.
        output_padding: likewise.
        groups: likewise.
        dilation: likewise.
        output_size: likewise.
        padding_mode: likewise.
        precision: see `conv1d`.
        algorithm: likewise.

    Returns:
        (N, C_out, L_out), or (C_out, L_out) for a single sample: a contiguous tensor.

    Raises:
        ValueError, TypeError, ImportError: as `conv1d` raises them.

    Example:
        >>> import torch, gpuconv.torch
        >>> gpuconv.torch.conv_transpose1d(torch.tensor([[[1.0, 2.0]]]), torch.ones(1, 1, 3), stride=2)
        tensor([[[1., 1., 3., 2., 2.]]])
    """
    op: Op = "conv_transpose1d"
    if has_torch_function_variadic(input, weight, bias):
        settings = (stride, padding, output_padding, groups, dilation)
        more = {
            "output_size": output_size, "padding_mode": padding_mode, "precision": precision, "algorithm": algorithm
        }  # fmt: skip
        return _overridden(conv_transpose1d, input, weight, bias, *settings, **more)
    if padding_mode != "zeros":
        check_padding_mode(op, op, padding_mode)
    if algorithm is not None:
        _check_algorithm(op, algorithm)
    checked = _checked(op, stride, padding, dilation, groups, output_padding)
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


def _checked(op: Op, *settings: Any) -> Settings:
    """`Settings.check`, whose results are kept; not for True, which equals 1 but must be refused, and the like."""
    is_known = not torch.compiler.is_compiling()
    for value in settings:
        kind = type(value)
        if kind is tuple:
            for element in value:
                is_known = is_known and type(element) is int
        elif kind is not int and kind is not str:
            is_known = False
    return _check(op, op, *settings) if is_known else Settings.check(op, op, *settings)


_check = lru_cache(maxsize=4096)(Settings.check)


def _tensors(
    op: Op, precision: str, input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors, once they are known to be some on one device; cast where autocast is on."""
    tensors = {"input": input, "weight": weight} if bias is None else {"input": input, "weight": weight, "bias": bias}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            is_array = isinstance(tensor, np.ndarray) or is_cupy_array(tensor)
            hint = f"; for NumPy and CuPy arrays there is gpuconv.{op}" if is_array else ""
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}{hint}")
        if tensor.layout != torch.strided or tensor.is_nested:
            got = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
            raise TypeError(f"{op}: {name} must be a dense tensor, got {got}")
        if tensor.device != input.device:
            raise TypeError(
                f"{op}: all tensors must be on one device, got input on {input.device} and {name} on {tensor.device}"
            )
    x, w, b = input, weight, bias
    kind = "cuda" if input.is_cuda else "cpu"
    if torch.is_autocast_enabled(kind) and (input.is_cuda or input.is_cpu):
        dtype = torch.get_autocast_dtype(kind)
        x, w, b = _autocast(x, dtype), _autocast(w, dtype), None if b is None else _autocast(b, dtype)
    if precision != "float32":
        check_precision(op, precision, dtype_name(x.dtype))
    return x, w, b


def _check_algorithm(op: Op, algorithm: str) -> None:
    from .. import dispatch  # with all kernel families, which most calls on the CPU do not need

    dispatch.check_algorithm(op, op, algorithm)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What PyTorch's own convolutions make of an argument: float64 and complex numbers stay as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


class Indifferent(TorchFunctionMode):
    """A mode that leaves calls of the functions of this module as they are."""


def _overridden(
    function: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any, **more: Any
) -> Tensor:
    """What a mode, or a class of the tensors, such as the proxies of torch.fx, makes of a call."""
    if (
        type(input) in _PLAIN
        and type(weight) in _PLAIN
        and (bias is None or type(bias) in _PLAIN)
        and torch._C._len_torch_function_stack() == 1
        and isinstance(_get_current_function_mode(), Indifferent)
        and not torch.compiler.is_compiling()
    ):
        with torch._C.DisableTorchFunction():
            return function(input, weight, bias, *settings, **more)
    result: Tensor = handle_torch_function(function, (input, weight, bias), input, weight, bias, *settings, **more)
    return result


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _exports_onnx() -> bool:
    return (torch.compiler.is_compiling() or torch._C._is_tracing()) and torch.onnx.is_in_onnx_export()


def _as_pytorch(
    op: Op, settings: Settings, x: Tensor, w: Tensor, b: Tensor | None, padding_mode: str = "zeros"
) -> Tensor:
    """The same made of PyTorch's own functions, which exporters to other formats know."""
    s, padding, d, groups, extra = settings
    x_spec, w_spec, b_spec = specs(x, w, b)
    if op == "conv1d":
        problem = ConvProblem.conv1d(x_spec, w_spec, b_spec, s, padding, d, groups, padding_mode=padding_mode)
        left, right = problem.padding
        if padding_mode == "zeros" and left == right:
            return torch.conv1d(x, w, b, s, left, d, groups)
        if padding_mode == "symmetric":  # PyTorch has no name for it
            padded = torch.cat((x[..., :left].flip(-1), x, x[..., x.shape[-1] - right :].flip(-1)), -1)
        else:
            mode = "constant" if padding_mode == "zeros" else padding_mode
            padded = torch.nn.functional.pad(x, (left, right), mode)
        return torch.conv1d(padded, w, b, s, 0, d, groups)
    problem = ConvProblem.conv_transpose1d(x_spec, w_spec, b_spec, s, padding, extra, groups, d)
    left, right = problem.padding
    both = min(left, right)
    y = torch.conv_transpose1d(x, w, b, s, both, problem.output_padding, groups, d)
    return y if left == right else y[..., left - both : y.shape[-1] - (right - both)]


def _split(padding: tuple[int, int] | str) -> tuple[tuple[int, ...], str]:
    """Padding as the operators take it: (left, right) and an empty word, or nothing and the word."""
    return ((), padding) if isinstance(padding, str) else (padding, "")
