"""gpuconv in PyTorch: `conv1d` and `conv_transpose1d` of tensors with autograd, and `patch` for models as they are.

They are custom operators of the namespace `gpuconv`. Tensors on the CPU are read and written as NumPy arrays, CUDA
tensors as CuPy arrays on PyTorch's current stream, both in place. Derivatives of every order, torch.func, torch.compile
and torch.export work; forward-mode derivatives do not, and say so.

Each operation is linear in its input and in its weight. So there are three operators to an operation, itself and the
gradients in the two, and the derivatives of each are the other two::

    output      = forward(input, weight)
    grad_input  = input_gradient(weight, grad_output)
    grad_weight = weight_gradient(input, grad_output)

This is the only module of gpuconv that imports PyTorch; `import gpuconv` does not import it.
"""

# Much of PyTorch has no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial, reduce
from threading import Lock
from typing import Any, NamedTuple, SupportsIndex, TypeAlias, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional
import torch.utils.checkpoint
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.jit._builtins import _register_builtin
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _get_current_function_mode_stack,
    handle_torch_function,
    has_torch_function_variadic,
)
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import functional, grad, runtime
from .problem import PRECISIONS, ArraySpec, ConvProblem, Op, Padding, Setting, Settings, check_precision, numpy_dtype
from .text import install_hint

Tensor: TypeAlias = torch.Tensor
T = TypeVar("T")

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
    return _conv1d(*tensors, checked.stride, sides, word, checked.dilation, checked.groups, precision, algorithm)


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
        x, w, b = _specs(*tensors)
        problem = ConvProblem.conv_transpose1d(
            x, w, b, stride, padding, output_padding, groups, dilation, output_size, precision
        )
        checked = checked._replace(padding=problem.padding, output_padding=problem.output_padding)
    if _exports_onnx():
        return _as_pytorch(op, checked, *tensors)
    sides, word = _split(checked.padding)
    others = (checked.output_padding, checked.groups, checked.dilation, precision, algorithm)
    return _conv_transpose1d(*tensors, checked.stride, sides, word, *others)


def patch(*, precision: str = "float32", strict: bool = False) -> AbstractContextManager[None]:
    """In the context, PyTorch's `conv1d` and `conv_transpose1d` are those of this module.

    So `torch.nn.Conv1d` and `torch.nn.ConvTranspose1d` run on gpuconv, and so does a model made of them or of calls of
    the functions, under whatever name it imported them. What gpuconv does not take is an error there, never a call of
    PyTorch's own. Backward passes use gpuconv where the forward pass did, in the context or behind it, also where
    `torch.utils.checkpoint` computes the forward pass again.

    Contexts may be nested; the innermost decides. `torch.nn.functional` belongs to the process: other threads see the
    exchange there, and where contexts of several threads overlap, the one opened last decides until it is closed. Under
    other names the functions are reached in the thread that opened the context. What `torch.compile` made is compiled
    anew when it is first called inside, or outside; a context may also be opened within what is compiled.
    `torch.onnx.export` writes the convolutions as ONNX has them. Exported programs and TorchScript stay what they are,
    and `torch.jit.script` takes PyTorch's own convolutions in the context as well.

    Args:
        precision: of all calls: "float32", or "tf32", with which everything but float32 tensors is refused.
        strict: whether the context ends with an error where PyTorch itself carried out convolutions along one axis in
            this thread, such as those of TorchScript modules. It names the callers, slows every operator down and keeps
            torch.compile from compiling.

    Returns:
        A context manager, which also decorates functions.

    Raises:
        ValueError: precision is neither of the two.
        RuntimeError: at the end of the context, as `strict` says.

    Example:
        >>> import torch, gpuconv.torch
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(1, 8, 5, padding=2), torch.nn.ReLU(), torch.nn.Conv1d(8, 1, 5))
        >>> with gpuconv.torch.patch():
        ...     y = model(torch.randn(2, 1, 100))
        >>> y.shape
        torch.Size([2, 1, 96])
    """
    check_precision("patch", precision, "float32")
    return _patched(precision, strict, everywhere=True)


class _Redirection(TorchFunctionMode):
    """While open, calls of PyTorch's functions in this thread are those of this module, whatever name they go by."""

    def __init__(self, precision: str, strict: bool) -> None:
        super().__init__()
        self.precision, self.strict, self.open = precision, strict, True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.open and func is torch.conv1d:
            func = _REPLACEMENTS[self.precision]["conv1d"]
        elif self.open and func is torch.conv_transpose1d:
            func = _REPLACEMENTS[self.precision]["conv_transpose1d"]
        return func(*args, **(kwargs or {}))


class _Strictness(TorchDispatchMode):
    """While open, notes the convolutions along one axis that PyTorch itself carries out in this thread.

    They are no errors at once: an error that passes through TorchScript loses its message, or ends the process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open = True
        self.found: dict[str, None] = {}  # in their order

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.open and func.namespace != "gpuconv" and "conv" in func._opname and "backward" not in func._opname:
            weight = args[1] if len(args) > 1 else None
            if isinstance(weight, torch.Tensor) and weight.dim() == 3:
                self.found[f"{func.name()} of {_caller()}"] = None
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The TorchScript module, if any, and the line outside of PyTorch that the calls at hand come from."""
    script, frame = "", sys._getframe(2)
    while frame.f_back and (
        frame.f_globals.get("__name__", "").startswith(("torch.", "gpuconv.torch"))
        or frame.f_code.co_filename.startswith("<")  # generated, as exported programs are
    ):
        module = frame.f_locals.get("self")
        if isinstance(module, torch.jit.ScriptModule):
            script = f"the TorchScript module {module.original_name}, at "
        frame = frame.f_back
    return f"{script}{frame.f_code.co_filename}:{frame.f_lineno}"


class _Patch(NamedTuple):
    """An open context.

    Attributes:
        redirection: its mode, of the thread that opened it.
        everywhere: whether the functions are exchanged for the other threads, too.
    """

    redirection: _Redirection
    everywhere: bool


# What stood in the places that `patch` exchanges, and the open contexts, the latest last. They belong to the process.
_ORIGINALS: dict[tuple[Any, str], Any] = {}
_PATCHES: list[_Patch] = []
_PATCHES_LOCK = Lock()

_REPLACEMENTS = {
    precision: {function.__name__: partial(function, precision=precision) for function in (conv1d, conv_transpose1d)}
    for precision in PRECISIONS
}
for _functions in _REPLACEMENTS.values():
    for _name_of_op, _function in _functions.items():
        # TorchScript takes them for PyTorch's own. It would fail to compile them, and then to compile their callers
        # for good.
        _register_builtin(_function, f"aten::{_name_of_op}")


def _untraced(function: Callable[..., T]) -> Callable[..., T]:
    """The function as one that torch.compile, once it is imported, does not look into; this imports nothing."""
    disabled: list[Callable[..., T]] = []

    def run(*args: Any) -> T:
        if "torch._dynamo" not in sys.modules:
            return function(*args)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args)

    return run


@contextmanager
def _patched(precision: str, strict: bool, everywhere: bool) -> Iterator[None]:
    redirection, strictness = _Redirection(precision, strict), _Strictness() if strict else None
    modes = [redirection] if strictness is None else [redirection, strictness]
    mine = _Patch(redirection, everywhere)
    if torch.compiler.is_dynamo_compiling():
        # What is compiled runs later. Of all that a context does, the mode alone can be a part of it.
        if strictness is not None:
            raise NotImplementedError("patch: gpuconv cannot be strict within what torch.compile compiles")
        with redirection:
            yield
        return
    try:
        _open(mine, modes)
        yield
        if strictness is not None and strictness.found:
            raise RuntimeError(f"patch: gpuconv did not reach {', '.join(strictness.found)}")
    finally:
        _close(mine, modes)


@_untraced
def _open(patch: _Patch, modes: list[Any]) -> None:
    with _PATCHES_LOCK:
        _PATCHES.append(patch)
        _exchange()
    for mode in modes:
        mode.__enter__()


@_untraced
def _close(patch: _Patch, modes: list[Any]) -> None:
    for mode in modes:
        mode.open = False
    # Modes form a stack for each thread. Where contexts end in another order or in another thread than they began in,
    # a closed one stays, without any effect, until it comes to the top.
    for get_top in (_get_current_function_mode, _get_current_dispatch_mode):
        while isinstance(top := get_top(), _Redirection | _Strictness) and not top.open:
            top.__exit__(None, None, None)
    with _PATCHES_LOCK:
        _PATCHES[:] = [other for other in _PATCHES if other is not patch]
        _exchange()


def _exchange() -> None:
    """Put in place what the open contexts ask for."""
    latest = next((patch.redirection.precision for patch in reversed(_PATCHES) if patch.everywhere), None)
    places: dict[tuple[Any, str], Any] = {
        (torch.nn.functional, name): None if latest is None else _REPLACEMENTS[latest][name]
        for name in ("conv1d", "conv_transpose1d")
    }
    # `checkpoint` itself may have been imported under any name. It looks these two up.
    places[torch.utils.checkpoint.CheckpointFunction, "forward"] = staticmethod(_reentrant) if _PATCHES else None
    places[torch.utils.checkpoint, "_checkpoint_without_reentrant_generator"] = _without_reentrant if _PATCHES else None
    for place, replacement in places.items():
        holder, name = place
        if replacement is not None:
            _ORIGINALS.setdefault(place, vars(holder)[name])
            setattr(holder, name, replacement)
        elif place in _ORIGINALS:
            setattr(holder, name, _ORIGINALS[place])
            del _ORIGINALS[place]


def _original(holder: Any, name: str) -> Any:
    """What `patch` has exchanged; another thread may have put it back since it was to be called."""
    return _ORIGINALS.get((holder, name), vars(holder)[name])


# What `torch.utils.checkpoint` runs again in the backward pass runs in a context like that of the forward pass. Other
# threads do not see it, unless the functions are exchanged anyway.


def _reentrant(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
    original = _original(torch.utils.checkpoint.CheckpointFunction, "forward").__func__
    return original(ctx, _remembering(function), *args)


def _without_reentrant(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    original = _original(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator")
    return original(_remembering(function), *args, **kwargs)


def _remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in a context like the one that holds for this thread now."""
    own = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, _Redirection) and mode.open]
    shared = [patch.redirection for patch in list(_PATCHES) if patch.everywhere]
    if not own and not shared:
        return function  # a backward pass of another thread has opened the only context
    precision, strict = (own[-1].precision, own[-1].strict) if own else (shared[-1].precision, False)

    def again(*args: Any, **kwargs: Any) -> Any:
        with _patched(precision, strict, everywhere=any(patch.everywhere for patch in list(_PATCHES))):
            return function(*args, **kwargs)

    return again


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
        if forward_ad._current_level >= 0 and _has_tangent(tensor):
            raise NotImplementedError(f"{op}: {_NO_TANGENTS}, but {name} has a tangent")
    kind = input.device.type
    x, w, b = input, weight, bias
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, w, b = _autocast(x, dtype), _autocast(w, dtype), None if b is None else _autocast(b, dtype)
    check_precision(op, precision, _name(x.dtype))
    return x, w, b


def _check_algorithm(op: Op, algorithm: str) -> None:
    from . import dispatch  # with all kernel families, which most calls on the CPU do not need

    dispatch.check_algorithm(op, op, algorithm)


_NO_TANGENTS = "forward-mode derivatives are not supported"


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What PyTorch's own convolutions make of an argument: float64 and complex numbers stay as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _specs(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else ArraySpec(tuple(t.shape), _name(t.dtype)) for t in tensors)


def _overridden(function: Callable[..., Tensor], *tensors: Tensor | None, **settings: Any) -> Tensor:
    """What a mode, or a class of the tensors, such as the proxies of torch.fx, makes of a call."""
    result: Tensor = handle_torch_function(function, tensors, *tensors, **settings)
    return result


def _exports_onnx() -> bool:
    return (torch.compiler.is_compiling() or torch._C._is_tracing()) and torch.onnx.is_in_onnx_export()


def _as_pytorch(op: Op, settings: Settings, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """The same made of PyTorch's own functions, which exporters to other formats know."""
    s, padding, d, groups, extra = settings
    x_spec, w_spec, b_spec = _specs(x, w, b)
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _keywords(op: Op, settings: Sequence[Any]) -> dict[str, Any]:
    """The settings of an operator as those of the functions of arrays; its algorithm may be left out."""
    stride, sides, word, *others = settings
    names = ("dilation", "groups") if op == "conv1d" else ("output_padding", "groups", "dilation")
    return {
        "stride": stride,
        "padding": word or tuple(sides),
        **dict(zip((*names, "precision", "algorithm"), others, strict=False)),
    }


def _output_shape(op: Op, specs: tuple[ArraySpec | None, ...], settings: tuple[Any, ...]) -> tuple[int, ...]:
    """The shape of the output; raises what gpuconv's functions raise. Extents may be symbols."""
    construct: Any = ConvProblem.conv_transpose1d if op == "conv_transpose1d" else ConvProblem.conv1d
    problem: ConvProblem = construct(*specs, **_keywords(op, settings))
    return problem.output_shape


# -- tensors as arrays -------------------------------------------------------------------------------------------------


def _write(empty: Callable[[], Tensor], function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Tensor:
    """Call a function of arrays with those that share the memory of the tensors among its arguments.

    Returns its result as a tensor; on a GPU it is written to what `empty` makes.
    """
    if not _on_gpu(next(a for a in arguments if isinstance(a, torch.Tensor))):
        try:
            arrays = [_numpy_array(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        except TypeError:  # a dtype that NumPy has not: what gives the result its shape names the argument
            empty()
            raise
        return _from_numpy(function(*arrays, **keywords))
    try:
        cupy = runtime.cupy_module()
    except ImportError as error:
        raise ImportError(f"CUDA tensors need CuPy: {install_hint('cuda13', 'cuda12')} ({error})") from error
    # The kernels join the work that PyTorch has queued. Its allocator reuses memory in the order of the same stream.
    result = empty()
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
    plain = tensor.detach() if tensor.requires_grad else tensor
    if plain.dtype != torch.bfloat16:
        return plain.numpy()
    return plain.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype.kind in "fc":  # NumPy's own
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


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
_GROUPS = 4  # the place of `groups` among the settings of either
_SETTINGS_COUNT: dict[Op, int] = {"conv1d": 6, "conv_transpose1d": 7}

# Operators are defined here and not by `torch.library.custom_op`: its first call imports the whole of torch.compile,
# and the derivatives that it registers do not work under torch.func.
_LIBRARY = torch.library.Library("gpuconv", "FRAGMENT")

_Key = torch._C.DispatchKey


def _keys(first: Any, *others: Any) -> Any:
    return reduce(lambda keys, key: keys.add(key), others, torch._C.DispatchKeySet(first))


# Of plain tensors in no mode: their keys, those that lead to the derivatives, and what is left behind these.
_ON_CPU = _keys(_Key.CPU, _Key.AutogradCPU, _Key.ADInplaceOrView, _Key.AutocastCPU)
_ON_CUDA = _keys(_Key.CUDA, _Key.AutogradCUDA, _Key.ADInplaceOrView, _Key.AutocastCUDA)
_CPU_DERIVATIVES, _CUDA_DERIVATIVES = _keys(_Key.CPU, _Key.AutogradCPU), _keys(_Key.CUDA, _Key.AutogradCUDA)
_BEHIND_DERIVATIVES = (_keys(_Key.CPU), _keys(_Key.CUDA))
_NO_MODE = _keys(_Key.BackendSelect, _Key.ADInplaceOrView)


def _known_way(inputs: tuple[Any, ...]) -> Any | None:
    """The keys with which the dispatcher would call for the derivatives of plain tensors in no mode; else None."""
    if (
        torch.compiler.is_compiling()
        or torch._C._dispatch_tls_local_include_set() != _NO_MODE
        or torch._C._dispatch_tls_local_exclude_set().has(_Key.AutogradOther)
        or torch._C._autograd._profiler_enabled()
    ):
        return None
    tensors = [value for value in inputs[:3] if isinstance(value, torch.Tensor)]
    expected, keys = (_ON_CUDA, _CUDA_DERIVATIVES) if tensors[0].is_cuda else (_ON_CPU, _CPU_DERIVATIVES)
    return keys if all(torch._C._dispatch_keys(tensor) == expected for tensor in tensors) else None


def _define(
    schema: str,
    compute: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    keep: Callable[..., None],
    backward: Callable[..., tuple[Any, ...]],
    batch: Callable[..., tuple[Tensor, int]],
) -> Any:
    """Register an operator.

    Args:
        schema: its name, arguments and result.
        compute: carries it out.
        fake: makes the tensor for the result where extents may be symbols.
        keep: (ctx, needed, *arguments) stores what `backward` needs; `needed` says of each argument whether its
            gradient is wanted.
        backward: (ctx, needed, gradient of the result) -> the gradients of the arguments.
        batch: the rule of `torch.library.register_vmap`.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.gpuconv, name).default
    run = _untraced(compute)

    def below_autograd(keys: Any, inputs: tuple[Any, ...]) -> Tensor:
        rest = keys & torch._C._after_autograd_keyset
        if rest in _BEHIND_DERIVATIVES:
            return run(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return cast(Tensor, operator.redispatch(rest, *inputs))

    def forward(ctx: Any, keys: Any, *inputs: Any) -> Tensor:
        keep(ctx, ctx.needs_input_grad[1:], *inputs)
        if not torch._C._are_functorch_transforms_active():
            return below_autograd(keys, inputs)
        # PyTorch turns derivatives off here, those of the levels below as well.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return below_autograd(keys, inputs)

    def gradients(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return None, *backward(ctx, ctx.needs_input_grad[1:], g)

    # `differentiable` is called once for each level of torch.func, so the function is one of a single level.
    base: Any = torch.autograd.function._SingleLevelFunction
    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    node: Any = type(base)(f"gpuconv_{name}", (base,), methods)

    def differentiable(keys: Any, *inputs: Any) -> Tensor:
        if forward_ad._current_level >= 0 and any(isinstance(t, torch.Tensor) and _has_tangent(t) for t in inputs):
            raise NotImplementedError(f"gpuconv::{name}: {_NO_TANGENTS}")
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            return below_autograd(keys, inputs)
        if not torch._C._are_functorch_transforms_active():
            return cast(Tensor, node.apply(keys, *inputs))
        with enable_single_level_autograd_function():
            return cast(Tensor, node.apply(keys, *inputs))

    def call(*inputs: Any) -> Tensor:
        keys = _known_way(inputs)
        return cast(Tensor, operator(*inputs)) if keys is None else differentiable(keys, *inputs)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, differentiable, "Autograd", with_keyset=True)
    torch.library.register_fake(operator, fake, lib=_LIBRARY)
    torch.library.register_vmap(operator, batch, lib=_LIBRARY)
    return call


def _register(op: Op) -> Callable[..., Tensor]:
    """Register an operation and the gradients in its input and its weight; returns the former."""

    def define(
        name: str,
        arguments: str,
        function: Callable[..., Any],
        empty: Callable[..., Tensor],
        fake: Callable[..., Tensor],
        *rules: Callable[..., Any],
    ) -> Any:
        """An operator that calls a function of arrays.

        `empty` makes the tensor for the result of the arguments, and so does `fake` where extents may be symbols.
        """

        def compute(*given: Any) -> Tensor:
            settings = tuple(tuple(value) if isinstance(value, list) else value for value in given[3:])
            return _write(lambda: empty(*given[:3], *settings), function, *given[:3], **keywords(op, settings))

        keywords = lru_cache(maxsize=4096)(_keywords)

        algorithm = ", str? algorithm=None" if name == op else ""
        return _define(f"{name}({arguments}, {_SETTINGS[op]}{algorithm}) -> Tensor", compute, fake, *rules)

    # An algorithm may follow the settings of the operation. Neither the shapes nor the gradients depend on it.
    count = _SETTINGS_COUNT[op]

    def output_of(
        shape: Callable[..., tuple[int, ...]], x: Tensor, w: Tensor, b: Tensor | None, *settings: Any
    ) -> Tensor:
        return x.new_empty(shape(op, _specs(x, w, b), settings[:count]))

    def input_of(size: Sequence[int], w: Tensor, *_: Any) -> Tensor:
        return w.new_empty(size)

    def weight_of(x: Tensor, size: Sequence[int], *_: Any) -> Tensor:
        return x.new_empty(size)

    def keep(places: tuple[int, int], ctx: Any, needed: tuple[bool, ...], *inputs: Any) -> None:
        """Keep each of the two factors, found in these places, only where the derivative in the other is wanted."""
        a, b = (inputs[place] for place in places)
        needs_a, needs_b = (needed[place] for place in places)
        ctx.save_for_backward(a if needs_b else None, b if needs_a else None)
        ctx.sizes = a.shape, b.shape
        ctx.settings = inputs[3:]

    # In these, g is the gradient of what the operator returned. No conjugation shows: the operators conjugate.

    def forward_backward(ctx: Any, needed: tuple[bool, ...], g: Tensor) -> tuple[Tensor | None, ...]:
        (x, w), (x_size, w_size), settings = ctx.saved_tensors, ctx.sizes, ctx.settings[:count]
        needs_x, needs_w, needs_b = needed[:3]
        return (
            input_gradient(x_size, w, g, *settings) if needs_x else None,
            weight_gradient(x, w_size, g, *settings) if needs_w else None,
            _bias_gradient(g) if needs_b else None,
            *[None] * len(ctx.settings),
        )

    def input_gradient_backward(ctx: Any, needed: tuple[bool, ...], g: Tensor) -> tuple[Tensor | None, ...]:
        (w, grad_output), (w_size, _), settings = ctx.saved_tensors, ctx.sizes, ctx.settings
        _, needs_w, needs_grad_output = needed[:3]
        return (
            None,
            weight_gradient(g, w_size, grad_output, *settings) if needs_w else None,
            forward(g, w, None, *settings) if needs_grad_output else None,
            *[None] * len(settings),
        )

    def weight_gradient_backward(ctx: Any, needed: tuple[bool, ...], g: Tensor) -> tuple[Tensor | None, ...]:
        (x, grad_output), (x_size, _), settings = ctx.saved_tensors, ctx.sizes, ctx.settings
        needs_x, _, needs_grad_output = needed[:3]
        return (
            input_gradient(x_size, g, grad_output, *settings) if needs_x else None,
            None,
            forward(x, g, None, *settings) if needs_grad_output else None,
            *[None] * len(settings),
        )

    # In these, B calls become one. Where all have one weight, their samples become one batch. Else each gets groups of
    # its own: channels of different groups do not mix.

    def forward_batch(info: Any, dims: tuple[Any, ...], x: Tensor, w: Tensor, b: Any, *settings: Any) -> Any:
        B = info.batch_size
        if dims[1] is None and dims[2] is None:
            return _from_samples(forward(_to_samples(x, dims[0]), w, b, *settings), B, x.dim() == 4)
        rows = None if b is None else _to_rows(b, dims[2], B)
        y = forward(_to_channels(x, dims[0], B), _to_rows(w, dims[1], B), rows, *_grouped(settings, B))
        return _from_channels(y, B)

    def input_gradient_batch(
        info: Any, dims: tuple[Any, ...], size: Sequence[int], w: Tensor, g: Tensor, *settings: Any
    ) -> Any:
        B, (*N, C, L) = info.batch_size, size
        if dims[1] is None:
            samples = [B * n for n in N] or [B]
            return _from_samples(input_gradient([*samples, C, L], w, _to_samples(g, dims[2]), *settings), B, bool(N))
        rows, channels = _to_rows(w, dims[1], B), _to_channels(g, dims[2], B)
        return _from_channels(input_gradient([*N, B * C, L], rows, channels, *_grouped(settings, B)), B)

    def weight_gradient_batch(
        info: Any, dims: tuple[Any, ...], x: Tensor, size: Sequence[int], g: Tensor, *settings: Any
    ) -> Any:
        B, (rows, *rest) = info.batch_size, size
        x, g = _to_channels(x, dims[0], B), _to_channels(g, dims[2], B)
        return weight_gradient(x, [B * rows, *rest], g, *_grouped(settings, B)).unflatten(0, (B, rows)), 0

    forward = define(
        op,
        "Tensor input, Tensor weight, Tensor? bias",
        getattr(functional, op),
        partial(output_of, lru_cache(maxsize=4096)(_output_shape)),
        partial(output_of, _output_shape),
        partial(keep, (0, 1)),
        forward_backward,
        forward_batch,
    )
    input_gradient = define(
        f"{op}_input",
        "SymInt[] input_size, Tensor weight, Tensor grad_output",
        getattr(grad, f"{op}_input"),
        input_of,
        input_of,
        partial(keep, (1, 2)),
        input_gradient_backward,
        input_gradient_batch,
    )
    weight_gradient = define(
        f"{op}_weight",
        "Tensor input, SymInt[] weight_size, Tensor grad_output",
        getattr(grad, f"{op}_weight"),
        weight_of,
        weight_of,
        partial(keep, (0, 2)),
        weight_gradient_backward,
        weight_gradient_batch,
    )

    # Counted as PyTorch counts those of its own convolutions.

    transposed = op == "conv_transpose1d"

    def forward_flops(x: Any, w: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        return conv_flop_count(_batched(x), w, _batched(out_shape), transposed=transposed)

    def input_gradient_flops(size: Any, w: Any, g: Any, *_: Any, **__: Any) -> int:
        return conv_flop_count(_batched(g), w, _batched(size), transposed=not transposed)

    def weight_gradient_flops(x: Any, size: Any, g: Any, *_: Any, **__: Any) -> int:
        sides = [[C, N, L] for N, C, L in (_batched(x), _batched(g))]
        a, b = sides[::-1] if transposed else sides
        return conv_flop_count(a, b, [size[1], size[0], size[2]])

    for name, formula in (
        (op, forward_flops),
        (f"{op}_input", input_gradient_flops),
        (f"{op}_weight", weight_gradient_flops),
    ):
        register_flop_formula(getattr(torch.ops.gpuconv, name))(formula)
    return cast(Callable[..., Tensor], forward)


def _batched(shape: Sequence[int]) -> list[int]:
    return [*shape] if len(shape) == 3 else [1, *shape]


def _grouped(settings: Sequence[Any], B: int) -> list[Any]:
    """The settings with B times the groups."""
    return [value * B if place == _GROUPS else value for place, value in enumerate(settings)]


# An axis of B calls, which lies at `dim` or is missing where all share the tensor, as a part of another axis, and back:
# (result, where the axis lies in it).


def _front(tensor: Tensor, dim: int | None, B: int) -> Tensor:
    return tensor.expand(B, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _to_rows(tensor: Tensor, dim: int | None, B: int) -> Tensor:
    return _front(tensor, dim, B).flatten(0, 1)


def _to_channels(tensor: Tensor, dim: int | None, B: int) -> Tensor:
    return _front(tensor, dim, B).movedim(0, -3).flatten(-3, -2)


def _from_channels(tensor: Tensor, B: int) -> tuple[Tensor, int]:
    return tensor.unflatten(-2, (B, tensor.shape[-2] // B)), tensor.dim() - 2


def _to_samples(tensor: Tensor, dim: int) -> Tensor:
    moved = tensor.movedim(dim, 0)
    return moved.flatten(0, 1) if moved.dim() == 4 else moved


def _from_samples(tensor: Tensor, B: int, batched: bool) -> tuple[Tensor, int]:
    return (tensor.unflatten(0, (B, tensor.shape[0] // B)) if batched else tensor), 0


def _register_bias_gradient() -> Any:
    """Register the gradient in a bias, the same for both operations."""

    def bias_of(grad_output: Tensor) -> Tensor:
        return grad_output.new_empty(grad_output.shape[-2])

    def compute(grad_output: Tensor) -> Tensor:
        return _write(lambda: bias_of(grad_output), grad.conv1d_bias, grad_output)

    def keep(ctx: Any, _: tuple[bool, ...], grad_output: Tensor) -> None:
        ctx.size = grad_output.shape

    def backward(ctx: Any, _: tuple[bool, ...], g: Tensor) -> tuple[Tensor]:
        return (g[:, None].expand(ctx.size),)

    def batch(info: Any, dims: tuple[Any, ...], grad_output: Tensor) -> tuple[Tensor, int]:
        B = info.batch_size
        result = operator(_to_channels(grad_output, dims[0], B))
        return result.unflatten(0, (B, result.shape[0] // B)), 0

    operator = _define("conv_bias(Tensor grad_output) -> Tensor", compute, bias_of, keep, backward, batch)
    return operator


_bias_gradient = _register_bias_gradient()
_conv1d, _conv_transpose1d = _register("conv1d"), _register("conv_transpose1d")
