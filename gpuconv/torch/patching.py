"""`patch`, which replaces PyTorch's convolutions by gpuconv's."""

# Much of PyTorch has no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from threading import Lock
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional
import torch.utils.checkpoint
from torch.jit._builtins import _register_builtin
from torch.overrides import _get_current_function_mode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from ..arguments import check_precision
from ..problem import PRECISIONS, Op
from .functions import Indifferent, conv1d, conv_transpose1d
from .operators import untraced


def patch(*, precision: str = "float32", strict: bool = False) -> AbstractContextManager[None]:
    """In the context, `conv1d` and `conv_transpose1d` of this module replace PyTorch's.

    So gpuconv computes `torch.nn.Conv1d` and `torch.nn.ConvTranspose1d`, and the calls of a model: of the functions,
    under whatever name it imported them, of `torch.convolution` along one axis, and of `torch.ops.aten`, which exported
    programs use. A call that gpuconv cannot compute is an error that names the module; PyTorch never computes it
    instead. The result of integers has the dtype of the input, as in PyTorch. Backward passes use gpuconv if the
    forward pass did, inside or after the context, also if `torch.utils.checkpoint` computes the forward pass again.

    Contexts may be nested; the innermost applies. `torch.nn.functional` belongs to the process: other threads see the
    replacement there, and if contexts of several threads overlap, the one opened last applies until it is closed. Under
    other names the functions are replaced only in the thread that opened the context. Functions that `torch.compile`
    has compiled are recompiled when they are first called inside, or outside; a context may also be opened inside a
    compiled function. `torch.onnx.export` writes convolutions of ONNX. TorchScript modules do not change, and
    `torch.jit.script` uses PyTorch's own convolutions also inside the context.

    Args:
        precision: of all calls: "float32", or "tf32", which allows only float32 tensors.
        strict: whether the context ends with an error if PyTorch itself computed convolutions along one axis in this
            thread, such as those of TorchScript modules. The error names the modules and lines. This slows every
            operator down and prevents torch.compile from compiling.

    Returns:
        A context manager, which also decorates functions.

    Raises:
        ValueError: precision is neither of the two.
        RuntimeError: at the end of the context, for `strict`.

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


class _Redirection(Indifferent):
    """While open, replaces PyTorch's functions, under any name, by those of this module in this thread."""

    def __init__(self, precision: str, strict: bool) -> None:
        super().__init__()
        self.precision, self.strict, self.open = precision, strict, True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.open and func in _OPERATIONS:
            func = _REPLACEMENTS[self.precision][_OPERATIONS[func]]
        elif self.open and func in _GENERAL and (call := _along_one_axis(*args, **kwargs)) is not None:
            op, args, kwargs = call
            func = _REPLACEMENTS[self.precision][op]
        return func(*args, **kwargs)


# PyTorch's own operations under all names in Python, and those for any number of axes.
_aten = torch.ops.aten
_OPERATIONS: dict[Any, Op] = {
    torch.conv1d: "conv1d",
    _aten.conv1d: "conv1d",
    _aten.conv1d.default: "conv1d",
    _aten.conv1d.padding: "conv1d",
    torch.conv_transpose1d: "conv_transpose1d",
    _aten.conv_transpose1d: "conv_transpose1d",
    _aten.conv_transpose1d.default: "conv_transpose1d",
}
_GENERAL = {
    torch.convolution,
    torch._convolution,
    _aten.convolution,
    _aten.convolution.default,
    _aten._convolution,
    _aten._convolution.default,
    _aten._convolution.deprecated,
}


def _along_one_axis(
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    *_: Any,
    **__: Any,
) -> tuple[Op, tuple[Any, ...], dict[str, Any]] | None:
    """A call of `torch.convolution` as a call of `conv1d` or `conv_transpose1d`; None for more than one axis.

    Arguments after `groups` only say how PyTorch computes it.
    """
    if not isinstance(weight, torch.Tensor) or weight.dim() != 3:
        return None
    if transposed:
        return "conv_transpose1d", (input, weight, bias, stride, padding, output_padding, groups, dilation), {}
    return "conv1d", (input, weight, bias, stride, padding, dilation, groups), {}


class _Strictness(TorchDispatchMode):
    """While open, records the convolutions along one axis that PyTorch itself computes in this thread.

    It raises no error for them, since an error in TorchScript loses its message, or ends the process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open = True
        self.found: dict[str, None] = {}  # as an ordered set

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.open and func.namespace != "gpuconv" and "conv" in func._opname and "backward" not in func._opname:
            weight = args[1] if len(args) > 1 else None
            if isinstance(weight, torch.Tensor) and weight.dim() == 3:
                self.found[f"{func.name()} of {_caller()}"] = None
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The module, if any, and the line outside of PyTorch from which the current call comes."""
    frame, modules = sys._getframe(2), _modules()
    while frame.f_back and (
        frame.f_globals.get("__name__", "").startswith(("torch.", "gpuconv.torch"))
        or frame.f_code.co_filename.startswith("<")  # generated code, of torch.fx for example
    ):
        frame = frame.f_back
    line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return f"{_path(modules)}, at {line}" if modules else line


def _modules() -> list[torch.nn.Module]:
    """The modules whose methods are being called in this thread, the innermost first."""
    modules: list[torch.nn.Module] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module):
            modules.append(module)
        frame = frame.f_back
    return modules


def _path(modules: list[torch.nn.Module]) -> str:
    """The name of the innermost module in the outermost one that contains it."""
    innermost = modules[0]
    scripted = isinstance(innermost, torch.jit.ScriptModule)
    kind = f"the TorchScript module {innermost.original_name}" if scripted else type(innermost).__name__
    for module in reversed(modules):
        path = next((path for path, held in module.named_modules() if held is innermost), "")
        if path:
            return f"{path} ({kind}) of {type(module).__name__}"
    return kind


class _Patch(NamedTuple):
    """An open context.

    Attributes:
        redirection: its mode, in the thread that opened it.
        everywhere: whether the functions are replaced for other threads, too.
    """

    redirection: _Redirection
    everywhere: bool


# The original values of what `patch` replaces, and the open contexts, the latest last; both belong to the process.
_ORIGINALS: dict[tuple[Any, str], Any] = {}
_PATCHES: list[_Patch] = []
_PATCHES_LOCK = Lock()


def _call(
    function: Callable[..., torch.Tensor],
    input: Any,
    weight: Any,
    bias: Any = None,
    *settings: Any,
    precision: str,
    **named: Any,
) -> torch.Tensor:
    """A function of this module in place of PyTorch's, whose errors name the module that calls it."""
    is_whole = isinstance(input, torch.Tensor) and _is_whole(input)
    if is_whole and isinstance(bias, torch.Tensor) and bias.dtype == input.dtype:
        bias = bias.to(torch.int64)
    try:
        output = function(input, weight, bias, *settings, precision=precision, **named)
    except Exception as error:
        if not torch.compiler.is_dynamo_compiling() and len(error.args) == 1 and (modules := _modules()):
            error.args = (f"{error.args[0]}; called by {_path(modules)}",)
        raise
    return output.to(input.dtype) if is_whole else output


def _is_whole(tensor: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunction():  # with a mode, methods of tensors are slow
        return not (tensor.is_floating_point() or tensor.is_complex())


_REPLACEMENTS = {
    precision: {
        function.__name__: partial(_call, function, precision=precision) for function in (conv1d, conv_transpose1d)
    }
    for precision in PRECISIONS
}
for _functions in _REPLACEMENTS.values():
    for _name_of_op, _function in _functions.items():
        # TorchScript treats them as PyTorch's own. It could not compile them, and would then never compile their
        # callers.
        _register_builtin(_function, f"aten::{_name_of_op}")


def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Replaces the method of `torch.nn.Conv1d`, which copies the input for padding modes other than "zeros"."""
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        return _convolve(self, input, weight, bias)
    # TorchScript compiles only the rest, which is PyTorch's own method.
    if self.padding_mode == "zeros":
        return torch.nn.functional.conv1d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
    padded = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
    return torch.nn.functional.conv1d(padded, weight, bias, self.stride, (0,), self.dilation, self.groups)


def _convolve(layer: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    function: Callable[..., torch.Tensor] = torch.nn.functional.conv1d
    settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
    if layer.padding_mode == "zeros":
        return function(input, weight, bias, *settings)
    if function is torch.conv1d:  # another thread has closed the last context since the method was looked up
        function = _original(torch.nn.Conv1d, "_conv_forward")
        return function(layer, input, weight, bias)
    return function(input, weight, bias, *settings, padding_mode=layer.padding_mode)


@contextmanager
def _patched(precision: str, strict: bool, everywhere: bool) -> Iterator[None]:
    redirection, strictness = _Redirection(precision, strict), _Strictness() if strict else None
    modes = [redirection] if strictness is None else [redirection, strictness]
    mine = _Patch(redirection, everywhere)
    if torch.compiler.is_dynamo_compiling():
        # Compiled code runs later, and of the whole context only the mode can be part of it.
        if strictness is not None:
            raise NotImplementedError("patch: strict=True is not possible in code that torch.compile compiles")
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


@untraced
def _open(patch: _Patch, modes: list[Any]) -> None:
    with _PATCHES_LOCK:
        _PATCHES.append(patch)
        _exchange()
    for mode in modes:
        mode.__enter__()


@untraced
def _close(patch: _Patch, modes: list[Any]) -> None:
    for mode in modes:
        mode.open = False
    # Each thread has a stack of modes. If contexts end in another order or thread than they began, a closed mode stays
    # in its stack, without effect, until it is at the top.
    for get_top in (_get_current_function_mode, _get_current_dispatch_mode):
        while isinstance(top := get_top(), _Redirection | _Strictness) and not top.open:
            top.__exit__(None, None, None)
    with _PATCHES_LOCK:
        _PATCHES[:] = [other for other in _PATCHES if other is not patch]
        _exchange()


def _exchange() -> None:
    """Replace or restore PyTorch's functions as the open contexts require."""
    latest = next((patch.redirection.precision for patch in reversed(_PATCHES) if patch.everywhere), None)
    places: dict[tuple[Any, str], Any] = {
        (torch.nn.functional, name): None if latest is None else _REPLACEMENTS[latest][name]
        for name in ("conv1d", "conv_transpose1d")
    }
    places[torch.nn.Conv1d, "_conv_forward"] = None if latest is None else _conv_forward
    # `checkpoint` itself may have been imported under any name, but it looks these two up when it is called.
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
    """The original that `patch` has replaced; another thread may have restored it in the meantime."""
    return _ORIGINALS.get((holder, name), vars(holder)[name])


# When `torch.utils.checkpoint` runs a function again in the backward pass, it is in a context like that of the forward
# pass. Other threads do not see this context, unless the functions are replaced for them anyway.


def _reentrant(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
    original = _original(torch.utils.checkpoint.CheckpointFunction, "forward").__func__
    return original(ctx, _remembering(function), *args)


def _without_reentrant(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    original = _original(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator")
    return original(_remembering(function), *args, **kwargs)


def _remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in a context like the current one of this thread."""
    own = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, _Redirection) and mode.open]
    shared = [patch.redirection for patch in list(_PATCHES) if patch.everywhere]
    if not own and not shared:
        return function  # a backward pass of another thread has opened the only context
    precision, strict = (own[-1].precision, own[-1].strict) if own else (shared[-1].precision, False)

    def again(*args: Any, **kwargs: Any) -> Any:
        with _patched(precision, strict, everywhere=any(patch.everywhere for patch in list(_PATCHES))):
            return function(*args, **kwargs)

    return again
