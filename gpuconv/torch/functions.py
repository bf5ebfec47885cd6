"""The two operations on tensors: they check and cast their arguments and call the operators."""

# Much of PyTorch has no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from ..arguments import check_out_dtype, check_padding_mode, check_precision, is_one_of
from ..fusion import FUSED_ARRAYS, ActivationLike, Fused
from ..lengths import check_lengths
from ..problem import MAX_EXTENT, ConvProblem, Op, Padding, Setting, Settings
from ..real_taps import check_real_taps
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
    input_activation: ActivationLike | None = None,
    residual: Tensor | None = None,
    activation: ActivationLike | None = None,
    lengths: Any = None,
    precision: str = "float32",
    algorithm: str | None = None,
    out_dtype: Any = None,
) -> Tensor:
    """`gpuconv.conv1d` of tensors, with derivatives of every order in reverse and forward mode.

    Args:
        input: (N, C_in, L_in), or (C_in, L_in) for a single sample. All tensors are on one device, the CPU or a CUDA
            device, with any strides and, with the exceptions at `weight` and `out_dtype`, of one dtype.
        weight: (C_out, C_in/groups, K); real or complex where `input` is complex.
        bias: (C_out,), or None.
        stride, padding, dilation, groups, padding_mode: as in `gpuconv.conv1d`.
        input_activation, residual, activation: tensors in place of arrays. What is fused has no derivatives.
        lengths: a sequence of ints or a tensor, whose values are read on the CPU: this waits for a CUDA tensor, and
            torch.compile recompiles for other values. They apply to all derivatives.
        precision: it applies to the gradients, too.
        algorithm: for the output alone: gradients are computed as without it. Under `torch.func.vmap` it is that of the
            single call for the whole batch.
        out_dtype: of the sums of integers, `torch.int64` or `torch.int32`, or its name; see `gpuconv.conv1d`.

    Returns:
        (N, C_out, L_out), or (C_out, L_out) for a single sample: a contiguous tensor. In a region of `torch.autocast`
        the arguments are cast first, as PyTorch does.

    Raises:
        ValueError, TypeError: as `gpuconv.conv1d` raises them.
        RuntimeError: something is fused and a derivative is needed; something is fused or has `lengths`, and the model
            is exported to ONNX; or as `gpuconv.conv1d` raises it.
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
        given = (stride, padding, dilation, groups)
        fused_arguments = {"input_activation": input_activation, "residual": residual, "activation": activation}
        more = _given(**fused_arguments, lengths=lengths, out_dtype=out_dtype)
        named = {"padding_mode": padding_mode, "precision": precision, "algorithm": algorithm, **more}
        return _overridden(conv1d, input, weight, bias, *given, **named)
    if algorithm is not None:
        _check_algorithm("conv1d", algorithm)
    out_dtype = None if out_dtype is None else dtype_name(out_dtype)
    checked = _checked("conv1d", stride, padding, dilation, groups)
    tensors = _tensors("conv1d", precision, input, weight, bias)
    own = None if lengths is None else _lengths("conv1d", lengths)
    if _exports_onnx():
        return _as_pytorch("conv1d", checked, *tensors, padding_mode)
    sides, word = _split(checked.padding)
    others = (checked.dilation, checked.groups, precision, padding_mode, own, algorithm)
    settings = (checked.stride, sides, word, *others)
    fused = None
    if activation is not None or input_activation is not None or residual is not None:
        fused = _check_fused("conv1d", tensors[0], out_dtype, activation, input_activation, residual)
    return _convolve("conv1d", tensors, settings, out_dtype, fused)


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
    input_activation: ActivationLike | None = None,
    residual: Tensor | None = None,
    activation: ActivationLike | None = None,
    lengths: Any = None,
    precision: str = "float32",
    algorithm: str | None = None,
    out_dtype: Any = None,
) -> Tensor:
    """`gpuconv.conv_transpose1d` of tensors, with the rules of `conv1d` for tensors and derivatives.

    Args:
        input: (N, C_in, L_in), or (C_in, L_in) for a single sample.
        weight: (C_in, C_out/groups, K).
        bias: (C_out,), or None.
        stride, padding, output_padding, groups, dilation, output_size, padding_mode: as in `gpuconv.conv_transpose1d`.
        input_activation, residual, activation, lengths, precision, algorithm, out_dtype: as in `conv1d`.

    Returns:
        (N, C_out, L_out), or (C_out, L_out) for a single sample: a contiguous tensor.

    Raises:
        ValueError, TypeError, RuntimeError, ImportError: as `conv1d` raises them.

    Example:
        >>> import torch, gpuconv.torch
        >>> gpuconv.torch.conv_transpose1d(torch.tensor([[[1.0, 2.0]]]), torch.ones(1, 1, 3), stride=2)
        tensor([[[1., 1., 3., 2., 2.]]])
    """
    op: Op = "conv_transpose1d"
    if has_torch_function_variadic(input, weight, bias):
        given = (stride, padding, output_padding, groups, dilation)
        more = {
            "output_size": output_size, "padding_mode": padding_mode, "precision": precision, "algorithm": algorithm
        }  # fmt: skip
        more |= _given(input_activation=input_activation, residual=residual, activation=activation)
        more |= _given(lengths=lengths, out_dtype=out_dtype)
        return _overridden(conv_transpose1d, input, weight, bias, *given, **more)
    if not is_one_of(padding_mode, ("zeros",)):
        check_padding_mode(op, op, padding_mode)
    if algorithm is not None:
        _check_algorithm(op, algorithm)
    out_dtype = None if out_dtype is None else dtype_name(out_dtype)
    checked = _checked(op, stride, padding, dilation, groups, output_padding)
    tensors = _tensors(op, precision, input, weight, bias)
    if output_size is not None:
        x, w, b = specs(*(_part("real", tensors) if _has_real_taps(*tensors) else tensors))
        problem = ConvProblem.conv_transpose1d(
            x, w, b, stride, padding, output_padding, groups, dilation, output_size, precision, out_dtype
        )
        checked = checked._replace(padding=problem.padding, output_padding=problem.output_padding)
    own = None if lengths is None else _lengths(op, lengths)
    if _exports_onnx():
        return _as_pytorch(op, checked, *tensors)
    sides, word = _split(checked.padding)
    others = (checked.output_padding, checked.groups, checked.dilation, precision, own, algorithm)
    settings = (checked.stride, sides, word, *others)
    fused = None
    if activation is not None or input_activation is not None or residual is not None:
        fused = _check_fused(op, tensors[0], out_dtype, activation, input_activation, residual)
    return _convolve(op, tensors, settings, out_dtype, fused)


def _lengths(op: Op, lengths: Any) -> list[int]:
    """The lengths of samples as an argument of the operators; the functions of arrays check whether they fit."""
    if _exports_onnx():
        raise RuntimeError(f"{op}: lengths cannot be exported to ONNX; mask the input and the output")
    if isinstance(lengths, torch.Tensor):
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool or lengths.dim() != 1:
            raise TypeError(f"{op}: lengths must be (N,) integers, got {lengths.dtype} of {lengths.dim()} dimensions")
        return [int(length) for length in lengths.tolist()]
    if isinstance(lengths, list | tuple) and {type(length) for length in lengths} <= {int}:  # torch.compile can do this
        return list(lengths)
    N = len(lengths) if hasattr(lengths, "__len__") and getattr(lengths, "shape", None) != () else 0
    return [int(length) for length in check_lengths(op, lengths, N, "L_in", MAX_EXTENT)]


def _given(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}


def _check_fused(op: Op, x: Tensor, out_dtype: str | None, *given: Any) -> Fused:
    """What is fused, with its tensors cast where autocast is on."""
    fused = Fused.check(op, *given)
    if out_dtype is not None:  # only integers have it, which allow no fusion
        check_out_dtype(op, dtype_name(x.dtype), out_dtype, None)
    if _exports_onnx():
        raise RuntimeError(f"{op}: what is fused ({fused.fusion}) cannot be exported to ONNX; apply it to the output")
    for name, tensor in zip(FUSED_ARRAYS, fused.arrays, strict=True):
        if tensor is not None:
            _check_tensor(op, name, tensor, x)
    return Fused(fused.fusion, tuple(_autocast_as(tensor, x) for tensor in fused.arrays))


def _convolve(
    op: Op,
    tensors: tuple[Tensor, Tensor, Tensor | None],
    settings: tuple[Any, ...],
    out_dtype: str | None,
    fused: Fused | None,
) -> Tensor:
    """Call the operator for tensors that have been checked and cast."""
    if _has_real_taps(*tensors):
        return _convolve_parts(op, tensors, settings, out_dtype, fused)
    if fused is not None:
        sides = (fused.fusion.activation, fused.fusion.input_activation)
        words = [None if a is None else a.name for a in sides]
        numbers = [0.0 if a is None else a.parameter for a in sides]
        return operators.FUSED[op](*tensors, *fused.arrays, *settings, *words, *numbers)
    function = operators.conv1d if op == "conv1d" else operators.conv_transpose1d
    return function(*tensors, *settings, out_dtype)


def _has_real_taps(x: Tensor, w: Tensor, _: Tensor | None) -> bool:
    return x.is_complex() and w.is_floating_point()


def _part(name: str, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The "real" or the "imag" parts of the tensors; real tensors are used for both parts."""
    return tuple(t if t is None or not t.is_complex() else getattr(t, name) for t in tensors)


def _convolve_parts(
    op: Op,
    tensors: tuple[Tensor, Tensor, Tensor | None],
    settings: tuple[Any, ...],
    out_dtype: str | None,
    fused: Fused | None,
) -> Tensor:
    """Real taps on complex data: a call for each part of the data, without a complex copy of the taps."""
    fusion, arrays = (None, ()) if fused is None else fused
    given = zip(("input", "weight", "bias", *FUSED_ARRAYS), specs(*tensors, *arrays), strict=False)
    check_real_taps(op, {name: spec for name, spec in given if spec is not None}, fusion)
    parts = []
    for name in ("real", "imag"):
        of_part = None if fusion is None else Fused(fusion, _part(name, arrays))
        parts.append(_convolve(op, _part(name, tensors), settings, out_dtype, of_part))
    return torch.complex(*parts)


def _checked(op: Op, *settings: Any) -> Settings:
    """`Settings.check` with a cache, which is not used for other types: True equals 1, for example, but is refused."""
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
    """Check that these are tensors on one device, and cast them where autocast is on."""
    tensors = {"input": input, "weight": weight} if bias is None else {"input": input, "weight": weight, "bias": bias}
    for name, tensor in tensors.items():
        _check_tensor(op, name, tensor, input)
    if _is_autocast_on(input):
        x, w, b = (_autocast_as(tensor, input) for tensor in (input, weight, bias))
        assert x is not None
        assert w is not None
    else:
        x, w, b = input, weight, bias
    if not is_one_of(precision, ("float32",)):
        check_precision(op, precision, dtype_name(x.dtype))
    return x, w, b


def _check_algorithm(op: Op, algorithm: str) -> None:
    from .. import dispatch  # it loads all kernel families, which most calls on the CPU do not need

    dispatch.check_algorithm(op, op, algorithm)


def _check_tensor(op: Op, name: str, tensor: Any, input: Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        is_array = isinstance(tensor, np.ndarray) or is_cupy_array(tensor)
        hint = f"; for NumPy and CuPy arrays use gpuconv.{op}" if is_array else ""
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}{hint}")
    if tensor.layout != torch.strided or tensor.is_nested:
        got = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{op}: {name} must be a dense tensor, got {got}")
    if tensor.device != input.device:
        raise TypeError(
            f"{op}: all tensors must be on one device, got input on {input.device} and {name} on {tensor.device}"
        )


def _autocast_as(tensor: Tensor | None, input: Tensor) -> Tensor | None:
    """An argument cast as in PyTorch's own convolutions: float64 and complex calls are left alone."""
    if tensor is None or not _is_autocast_on(input):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64 or input.is_complex():
        return tensor
    return tensor.to(torch.get_autocast_dtype("cuda" if input.is_cuda else "cpu"))


def _is_autocast_on(input: Tensor) -> bool:
    return torch.is_autocast_enabled("cuda" if input.is_cuda else "cpu") and (input.is_cuda or input.is_cpu)


class Indifferent(TorchFunctionMode):
    """A mode that does not change calls of the functions of this module."""


def _overridden(
    function: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any, **more: Any
) -> Tensor:
    """Pass a call on to the current mode, or to a subclass of the tensors, such as the proxies of torch.fx."""
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
    """The same operation by PyTorch's own functions, which exporters to other formats support."""
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
    """Padding as two arguments of the operators: (left, right) and an empty word, or an empty tuple and the word."""
    return ((), padding) if isinstance(padding, str) else (padding, "")
