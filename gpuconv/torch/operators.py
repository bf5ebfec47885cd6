"""The operators of the namespace `gpuconv`, with their derivatives and all else that PyTorch asks of operators.

Each operation is linear in its input and in its weight. So there are three operators to an operation, itself and the
gradients in the two, and the derivatives of each are the other two::

    output      = forward(input, weight)
    grad_input  = input_gradient(weight, grad_output)
    grad_weight = weight_gradient(input, grad_output)
"""

# Much of PyTorch has no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial, reduce
from typing import Any, TypeVar, cast

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from .. import functional, grad
from ..problem import ArraySpec, ConvProblem, Op
from . import tensors
from .tensors import NO_TANGENTS, Tensor, has_tangent, specs

T = TypeVar("T")

# Padding is (left, right), or empty where the word "same" or "causal" stands in for it.
_SETTINGS: dict[Op, str] = {
    "conv1d": "SymInt stride, SymInt[] padding, str padding_word, SymInt dilation, SymInt groups, str precision",
    "conv_transpose1d": (
        "SymInt stride, SymInt[] padding, str padding_word, SymInt output_padding, SymInt groups, SymInt dilation, "
        "str precision"
    ),
}
_SETTINGS_COUNT: dict[Op, int] = {"conv1d": 6, "conv_transpose1d": 7}
_GROUPS = 4  # the place of `groups` among the settings of either

# Operators are defined here and not by `torch.library.custom_op`: its first call imports the whole of torch.compile,
# and the derivatives that it registers do not work under torch.func.
_LIBRARY = torch.library.Library("gpuconv", "FRAGMENT")

_Key = torch._C.DispatchKey


def untraced(function: Callable[..., T]) -> Callable[..., T]:
    """The function as one that torch.compile, once it is imported, does not look into; this imports nothing."""
    disabled: list[Callable[..., T]] = []

    def run(*args: Any) -> T:
        if "torch._dynamo" not in sys.modules:
            return function(*args)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args)

    return run


def _keys(first: Any, *others: Any) -> Any:
    return reduce(lambda keys, key: keys.add(key), others, torch._C.DispatchKeySet(first))


# The keys of plain tensors, and those that every call has while no mode is on.
_ON_CPU = _keys(_Key.CPU, _Key.AutogradCPU, _Key.ADInplaceOrView, _Key.AutocastCPU)
_ON_CUDA = _keys(_Key.CUDA, _Key.AutogradCUDA, _Key.ADInplaceOrView, _Key.AutocastCUDA)
_NO_MODE = _keys(_Key.BackendSelect, _Key.ADInplaceOrView)


def _known_way(inputs: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would call for the derivatives and then compute, as for plain tensors in no mode."""
    if (
        torch.compiler.is_compiling()
        or torch._C._dispatch_tls_local_include_set() != _NO_MODE
        or torch._C._dispatch_tls_local_exclude_set().has(_Key.AutogradOther)
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    first = inputs[0] if isinstance(inputs[0], torch.Tensor) else inputs[1]
    expected = _ON_CUDA if first.is_cuda else _ON_CPU
    for value in inputs[:3]:
        if isinstance(value, torch.Tensor) and torch._C._dispatch_keys(value) != expected:
            return False
    return True


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
    run = untraced(compute)

    # In these, `keys` are those that the dispatcher called with, or None where it was left out: see `_known_way`.

    def below_autograd(keys: Any | None, inputs: tuple[Any, ...]) -> Tensor:
        if keys is None:
            return run(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return cast(Tensor, operator.redispatch(keys & torch._C._after_autograd_keyset, *inputs))

    def forward(ctx: Any, keys: Any | None, *inputs: Any) -> Tensor:
        keep(ctx, ctx.needs_input_grad[1:], *inputs)
        if keys is None or not torch._C._are_functorch_transforms_active():
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

    def differentiable(keys: Any | None, *inputs: Any) -> Tensor:
        if forward_ad._current_level >= 0 and any(isinstance(t, torch.Tensor) and has_tangent(t) for t in inputs):
            raise NotImplementedError(f"gpuconv::{name}: {NO_TANGENTS}")
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            return below_autograd(keys, inputs)
        if keys is None or not torch._C._are_functorch_transforms_active():
            return cast(Tensor, node.apply(keys, *inputs))
        with enable_single_level_autograd_function():
            return cast(Tensor, node.apply(keys, *inputs))

    def call(*inputs: Any) -> Tensor:
        return differentiable(None, *inputs) if _known_way(inputs) else cast(Tensor, operator(*inputs))

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, differentiable, "Autograd", with_keyset=True)
    torch.library.register_fake(operator, fake, lib=_LIBRARY)
    torch.library.register_vmap(operator, batch, lib=_LIBRARY)
    return call


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
            settings = (given[3], tuple(given[4]), *given[5:])
            return tensors.write(lambda: empty(*given[:3], *settings), function, *given[:3], **keywords(op, settings))

        keywords = lru_cache(maxsize=4096)(_keywords)

        algorithm = ", str? algorithm=None" if name == op else ""
        return _define(f"{name}({arguments}, {_SETTINGS[op]}{algorithm}) -> Tensor", compute, fake, *rules)

    # An algorithm may follow the settings of the operation. Neither the shapes nor the gradients depend on it.
    count = _SETTINGS_COUNT[op]

    def output_of(
        shape: Callable[..., tuple[int, ...]], x: Tensor, w: Tensor, b: Tensor | None, *settings: Any
    ) -> Tensor:
        return x.new_empty(shape(op, specs(x, w, b), settings[:count]))

    def input_of(size: Sequence[int], w: Tensor, *_: Any) -> Tensor:
        return w.new_empty(size)

    def weight_of(x: Tensor, size: Sequence[int], *_: Any) -> Tensor:
        return x.new_empty(size)

    def keep(places: tuple[int, int], ctx: Any, needed: tuple[bool, ...], *inputs: Any) -> None:
        """Keep each of the two factors, found in these places, only where the derivative in the other is wanted."""
        a, b = (inputs[place] for place in places)
        needs_a, needs_b = (needed[place] for place in places)
        ctx.save_for_backward(a if needs_b else None, b if needs_a else None)
        ctx.sizes = tuple(a.shape), tuple(b.shape)  # plain tuples are looked up fastest
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
        return tensors.write(lambda: bias_of(grad_output), grad.conv1d_bias, grad_output)

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
conv1d, conv_transpose1d = _register("conv1d"), _register("conv_transpose1d")
