"""gpuconv in PyTorch: `conv1d` and `conv_transpose1d` of tensors with autograd, and `patch` for models as they are.

They are custom operators of the namespace `gpuconv`. Tensors on the CPU are read and written as NumPy arrays, CUDA
tensors as CuPy arrays on PyTorch's current stream, both in place. Derivatives of every order, `torch.compile` and
`torch.export` work; forward-mode derivatives and `torch.func.grad` do not, and say so.

Each operation is linear in its input and in its weight. So there are three operators to an operation, itself and the
gradients in the two, and the derivatives of each are the other two::

    output      = forward(input, weight)
    grad_input  = input_gradient(weight, grad_output)
    grad_weight = weight_gradient(input, grad_output)

This is the only module of gpuconv that imports PyTorch; `import gpuconv` does not import it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from threading import Lock
from typing import Any, SupportsIndex, TypeAlias, cast

import numpy as np
import torch
import torch.nn.functional
from torch.autograd import forward_ad
from torch.library import custom_op

from . import functional, grad, runtime
from .problem import ArraySpec, ConvProblem, Op, Padding, Setting, Settings, check_precision, numpy_dtype
from .text import install_hint

Tensor: TypeAlias = torch.Tensor

__all__ = ["conv1d", "conv_transpose1d", "patch"]


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

    Returns:
        (N, C_out, L_out), or (C_out, L_out) for a single sample: a contiguous tensor. In a region of `torch.autocast`
        the arguments are cast first, as PyTorch does.

    Raises:
        ValueError: a shape or a value does not fit; the message names the argument, what was expected and what came.
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
    checked = Settings.check("conv1d", "conv1d", stride, padding, dilation, groups)
    tensors = _tensors("conv1d", precision, input, weight, bias)
    sides, word = _split(checked.padding)
    result = torch.ops.gpuconv.conv1d.default(
        *tensors, checked.stride, sides, word, checked.dilation, checked.groups, precision
    )
    return cast(Tensor, result)


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
    precision: str = "float32",
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
        precision: "float32", or "tf32" where float32 operands may be rounded to TF32, in the gradients as well.

    Returns:
        (N, C_out, L_out), or (C_out, L_out) for a single sample: a contiguous tensor. In a region of `torch.autocast`
        the arguments are cast first, as PyTorch does.

    Raises:
        ValueError: a shape or a value does not fit; the message names the argument, what was expected and what came.
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
    checked = Settings.check(op, op, stride, padding, dilation, groups, output_padding)
    tensors = _tensors(op, precision, input, weight, bias)
    sides, word = _split(checked.padding)
    result = torch.ops.gpuconv.conv_transpose1d.default(
        *tensors, checked.stride, sides, word, checked.output_padding, checked.groups, checked.dilation, precision
    )
    return cast(Tensor, result)


# What `torch.nn.functional` holds, then what each open `patch` put in its place, the latest last.
_PATCHES: list[Mapping[str, Callable[..., Tensor]]] = []
_PATCHES_LOCK = Lock()


@contextmanager
def patch(*, precision: str = "float32") -> Iterator[None]:
    """In the context, `torch.nn.functional.conv1d` and `conv_transpose1d` are those of this module.

    So `torch.nn.Conv1d` and `torch.nn.ConvTranspose1d`, which call them by these names, run on gpuconv, and so does a
    model made of them. What gpuconv does not take is an error there, never a call of PyTorch's own. Backward passes use
    gpuconv where the forward pass did, in the context or behind it.

    Contexts may be nested; the innermost decides. The functions belong to the process: other threads see the exchange,
    and where contexts of several threads overlap, the one opened last decides until it is closed. Calls of
    `torch.conv1d`, functions imported by name beforehand, scripted and exported models are not reached. What
    `torch.compile` made is compiled anew when it is first called inside, or outside.

    Args:
        precision: of all calls: "float32", or "tf32", with which everything but float32 tensors is refused.

    Raises:
        ValueError: precision is neither of the two.

    Example:
        >>> import torch, gpuconv.torch
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(1, 8, 5, padding=2), torch.nn.ReLU(), torch.nn.Conv1d(8, 1, 5))
        >>> with gpuconv.torch.patch():
        ...     y = model(torch.randn(2, 1, 100))
        >>> y.shape
        torch.Size([2, 1, 96])
    """
    check_precision("patch", precision, "float32")
    ours = {function.__name__: partial(function, precision=precision) for function in (conv1d, conv_transpose1d)}
    with _PATCHES_LOCK:
        if not _PATCHES:
            _PATCHES.append({name: getattr(torch.nn.functional, name) for name in ours})
        _PATCHES.append(ours)
        _exchange()
    try:
        yield
    finally:
        with _PATCHES_LOCK:
            del _PATCHES[next(i for i, functions in enumerate(_PATCHES) if functions is ours)]
            _exchange()
            if len(_PATCHES) == 1:
                _PATCHES.clear()


def _exchange() -> None:
    for name, function in _PATCHES[-1].items():
        setattr(torch.nn.functional, name, function)


# -- arguments ---------------------------------------------------------------------------------------------------------


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
        if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(f"{op}: forward-mode derivatives are not supported, but {name} has a tangent")
    kind = input.device.type
    x, w, b = input, weight, bias
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, w, b = _autocast(x, dtype), _autocast(w, dtype), None if b is None else _autocast(b, dtype)
    check_precision(op, precision, _name(x.dtype))
    return x, w, b


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What PyTorch's own convolutions make of an argument: float64 and complex numbers stay as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _split(padding: tuple[int, int] | str) -> tuple[list[int], str]:
    """Padding as the operators take it: (left, right) and an empty word, or nothing and the word."""
    return ([], padding) if isinstance(padding, str) else (list(padding), "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _keywords(op: Op, settings: Sequence[Any]) -> dict[str, Any]:
    """The settings of an operator as those of the functions of arrays."""
    stride, sides, word, *others = settings
    names = ("dilation", "groups") if op == "conv1d" else ("output_padding", "groups", "dilation")
    return {
        "stride": stride,
        "padding": word or tuple(sides),
        **dict(zip((*names, "precision"), others, strict=True)),
    }


def _output_shape(op: Op, specs: tuple[ArraySpec | None, ...], settings: tuple[Any, ...]) -> tuple[int, ...]:
    """The shape of the output; raises what gpuconv's functions raise. Extents may be symbols."""
    construct: Any = ConvProblem.conv_transpose1d if op == "conv_transpose1d" else ConvProblem.conv1d
    problem: ConvProblem = construct(*specs, **_keywords(op, settings))
    return problem.output_shape


# -- tensors as arrays -------------------------------------------------------------------------------------------------


def _write(result: Tensor, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Tensor:
    """Call a function of arrays with those that share the memory of the tensors among its arguments, and `out`."""
    if not _on_gpu(result):
        arrays = [_numpy_array(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        function(*arrays, **keywords, out=_numpy_array(result))
        return result
    try:
        cupy = runtime.cupy_module()
    except ImportError as error:
        raise ImportError(f"CUDA tensors need CuPy: {install_hint('cuda13', 'cuda12')} ({error})") from error
    # The kernels join the work that PyTorch has queued. Its allocator reuses memory in the order of the same stream.
    with torch.cuda.device(result.device):
        current = torch.cuda.current_stream()
        if hasattr(cupy.cuda.Stream, "from_external"):  # from CuPy 14
            stream = cupy.cuda.Stream.from_external(current)
        else:
            stream = cupy.cuda.ExternalStream(current.cuda_stream)
        with stream:
            arrays = [_cupy_array(cupy, a) if isinstance(a, torch.Tensor) else a for a in arguments]
            function(*arrays, **keywords, out=_cupy_array(cupy, result))
    return result


def _on_gpu(tensor: Tensor) -> bool:
    if tensor.device.type not in ("cpu", "cuda"):
        raise TypeError(f"gpuconv: tensors must be on the CPU or a CUDA device, got one on {tensor.device}")
    return tensor.is_cuda


# Pending conjugations and negations are no concern here: PyTorch carries them out before it calls an operator.


def _numpy_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    plain = tensor.detach()
    if plain.dtype != torch.bfloat16:
        return plain.numpy()
    return plain.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))


def _cupy_array(cupy: Any, tensor: Tensor) -> Any:
    plain = tensor.detach()
    if plain.dtype != torch.bfloat16:
        return cupy.from_dlpack(plain)
    return cupy.from_dlpack(plain.view(torch.int16)).view(numpy_dtype("bfloat16"))


# -- operators ---------------------------------------------------------------------------------------------------------

# Padding is (left, right), or empty where the word "same" or "causal" stands in for it.
_SETTINGS: dict[Op, str] = {
    "conv1d": "SymInt stride, SymInt[] padding, str padding_word, SymInt dilation, SymInt groups, str precision",
    "conv_transpose1d": (
        "SymInt stride, SymInt[] padding, str padding_word, SymInt output_padding, SymInt groups, SymInt dilation, "
        "str precision"
    ),
}


def _register(op: Op) -> None:
    """Register an operation and the gradients in its input and its weight, with their derivatives."""

    def define(
        name: str,
        arguments: str,
        function: Callable[..., Any],
        empty: Callable[..., Tensor],
        fake: Callable[..., Tensor],
    ) -> Any:
        """An operator that calls a function of arrays.

        `empty` makes the tensor for the result of the arguments, and so does `fake` where extents may be symbols.
        """

        def compute(*given: Any) -> Tensor:
            return _write(empty(*given), function, *given[:3], **_keywords(op, given[3:]))

        schema = f"({arguments}, {_SETTINGS[op]}) -> Tensor"
        operator = custom_op(f"gpuconv::{name}", compute, mutates_args=(), schema=schema)
        operator.register_fake(fake)
        return operator

    def output_of(
        shape: Callable[..., tuple[int, ...]], x: Tensor, w: Tensor, b: Tensor | None, *settings: Any
    ) -> Tensor:
        plain = tuple(tuple(value) if isinstance(value, list) else value for value in settings)
        specs = tuple(None if t is None else ArraySpec(tuple(t.shape), _name(t.dtype)) for t in (x, w, b))
        return x.new_empty(shape(op, specs, plain))

    def input_of(size: Sequence[int], w: Tensor, *_: Any) -> Tensor:
        return w.new_empty(size)

    def weight_of(x: Tensor, size: Sequence[int], *_: Any) -> Tensor:
        return x.new_empty(size)

    forward = define(
        op,
        "Tensor input, Tensor weight, Tensor? bias",
        getattr(functional, op),
        partial(output_of, lru_cache(maxsize=4096)(_output_shape)),
        partial(output_of, _output_shape),
    )
    input_gradient = define(
        f"{op}_input",
        "SymInt[] input_size, Tensor weight, Tensor grad_output",
        getattr(grad, f"{op}_input"),
        input_of,
        input_of,
    )
    weight_gradient = define(
        f"{op}_weight",
        "Tensor input, SymInt[] weight_size, Tensor grad_output",
        getattr(grad, f"{op}_weight"),
        weight_of,
        weight_of,
    )

    def keep(places: tuple[int, int], ctx: Any, inputs: tuple[Any, ...], **_: Any) -> None:
        """Keep each of the two factors, found in these places, only where the derivative in the other is wanted."""
        a, b = (inputs[place] for place in places)
        needs_a, needs_b = (ctx.needs_input_grad[place] for place in places)
        ctx.save_for_backward(a if needs_b else None, b if needs_a else None)
        ctx.sizes = a.shape, b.shape
        ctx.settings = inputs[3:]

    # In these, g is the gradient of what the operator returned. No conjugation shows: the operators conjugate.

    def forward_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x, w), (x_size, w_size), settings = ctx.saved_tensors, ctx.sizes, ctx.settings
        needs_x, needs_w, needs_b = ctx.needs_input_grad[:3]
        return (
            input_gradient(x_size, w, g, *settings) if needs_x else None,
            weight_gradient(x, w_size, g, *settings) if needs_w else None,
            _bias_gradient(g) if needs_b else None,
            *[None] * len(settings),
        )

    def input_gradient_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (w, grad_output), (w_size, _), settings = ctx.saved_tensors, ctx.sizes, ctx.settings
        _, needs_w, needs_grad_output = ctx.needs_input_grad[:3]
        return (
            None,
            weight_gradient(g, w_size, grad_output, *settings) if needs_w else None,
            forward(g, w, None, *settings) if needs_grad_output else None,
            *[None] * len(settings),
        )

    def weight_gradient_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x, grad_output), (x_size, _), settings = ctx.saved_tensors, ctx.sizes, ctx.settings
        needs_x, _, needs_grad_output = ctx.needs_input_grad[:3]
        return (
            input_gradient(x_size, g, grad_output, *settings) if needs_x else None,
            None,
            forward(x, g, None, *settings) if needs_grad_output else None,
            *[None] * len(settings),
        )

    forward.register_autograd(forward_backward, setup_context=partial(keep, (0, 1)))
    input_gradient.register_autograd(input_gradient_backward, setup_context=partial(keep, (1, 2)))
    weight_gradient.register_autograd(weight_gradient_backward, setup_context=partial(keep, (0, 2)))


def _register_bias_gradient() -> Any:
    """Register the gradient in a bias, the same for both operations."""

    def bias_of(grad_output: Tensor) -> Tensor:
        return grad_output.new_empty(grad_output.shape[-2])

    def compute(grad_output: Tensor) -> Tensor:
        return _write(bias_of(grad_output), grad.conv1d_bias, grad_output)

    def keep(ctx: Any, inputs: tuple[Tensor], **_: Any) -> None:
        ctx.size = inputs[0].shape

    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g[:, None].expand(ctx.size)

    operator = custom_op("gpuconv::conv_bias", compute, mutates_args=(), schema="(Tensor grad_output) -> Tensor")
    operator.register_fake(bias_of)
    operator.register_autograd(backward, setup_context=keep)
    return operator


_bias_gradient = _register_bias_gradient()
_register("conv1d")
_register("conv_transpose1d")
