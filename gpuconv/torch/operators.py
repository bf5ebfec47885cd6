"""The operators of the namespace `gpuconv`, with their derivatives and everything else that PyTorch operators need.

An operation has three tensors: its input, its weight and its output, or the gradients with respect to these. Three
operators compute each of them from the two others, and are linear in both, so that their derivatives are these
operators again::

    grad_input  = input_gradient(input_size, weight, grad_output)
    grad_weight = weight_gradient(input, weight_size, grad_output)
    output      = forward(input, weight, bias)

All have the tensors in this order. In place of its result an operator takes the result's size, the forward operator the
bias.
"""

# Much of PyTorch has no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial, reduce
from typing import Any, TypeVar, cast

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from .. import functional, grad
from ..fusion import FUSED_ARRAYS, Activation, Fused, Fusion
from ..lengths import output_lengths
from ..problem import ArraySpec, ConvProblem, Op
from . import tensors
from .tensors import Tensor, specs

T = TypeVar("T")

# Padding is (left, right), or empty if the word "same" or "causal" replaces it.
_SETTINGS: dict[Op, str] = {
    "conv1d": (
        "SymInt stride, SymInt[] padding, str padding_word, SymInt dilation, SymInt groups, str precision, "
        "str padding_mode, int[]? lengths=None"
    ),
    "conv_transpose1d": (
        "SymInt stride, SymInt[] padding, str padding_word, SymInt output_padding, SymInt groups, SymInt dilation, "
        "str precision, int[]? lengths=None"
    ),
}
_INPUT, _WEIGHT, _OUTPUT = range(3)  # the places of the tensors among the arguments of every operator
_FACTORS = ((_WEIGHT, _OUTPUT), (_INPUT, _OUTPUT), (_INPUT, _WEIGHT))  # by the place of an operator's result
_COUNT = 8  # the number of settings of either operation
_GROUPS, _LENGTHS = 4, 7  # the places of `groups` and of `lengths` among them

# Operators are defined here and not by `torch.library.custom_op`: its first call imports the whole of torch.compile,
# and the derivatives that it registers do not work under torch.func.
_LIBRARY = torch.library.Library("gpuconv", "FRAGMENT")

_Key = torch._C.DispatchKey


def untraced(function: Callable[..., T]) -> Callable[..., T]:
    """The function as one that torch.compile does not trace; this does not import torch.compile."""
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


# The dispatch keys of plain tensors, and those of every call while no mode is on.
_ON_CPU = _keys(_Key.CPU, _Key.AutogradCPU, _Key.ADInplaceOrView, _Key.AutocastCPU)
_ON_CUDA = _keys(_Key.CUDA, _Key.AutogradCUDA, _Key.ADInplaceOrView, _Key.AutocastCUDA)
_NO_MODE = _keys(_Key.BackendSelect, _Key.ADInplaceOrView)


def _known_way(inputs: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would do nothing but record derivatives and compute: plain tensors, and no mode is on."""
    if (
        torch.compiler.is_compiling()
        or torch._C._dispatch_tls_local_include_set() != _NO_MODE
        or torch._C._dispatch_tls_is_dispatch_key_excluded(_Key.AutogradOther)
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    keys = [torch._C._dispatch_keys(value) for value in inputs if isinstance(value, torch.Tensor)]
    return keys.count(_ON_CPU) == len(keys) or keys.count(_ON_CUDA) == len(keys)


def _define(
    schema: str,
    compute: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    keep: Callable[..., None],
    backward: Callable[..., Iterable[Tensor | None]],
    along: Callable[..., Tensor],
    batch: Callable[..., tuple[Tensor, int]],
) -> Any:
    """Register an operator.

    Args:
        schema: its name, arguments and result. At most three inputs, the tensors and sizes, precede the settings.
        compute: computes the result.
        fake: makes an empty tensor for the result; extents may be symbolic.
        keep: (ctx, needed, *inputs) stores what `backward` needs besides `ctx.settings`; `needed` says for each input
            whether its gradient is needed.
        backward: (ctx, needed, gradient of the result) -> the gradients of the inputs.
        along: (inputs, their tangents or None, settings) -> the tangent of the result.
        batch: the rule of `torch.library.register_vmap`.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.gpuconv, name).default
    run = untraced(compute)

    def forward(ctx: Any, keys: Any | None, settings: tuple[Any, ...], *inputs: Any) -> Tensor:
        """Run the operator through the dispatcher with these keys, or directly if they are None."""
        keep(ctx, ctx.needs_input_grad[2:], *inputs)
        ctx.settings = settings
        if keys is not None or forward_ad._current_level >= 0:  # PyTorch hides here whether there are tangents
            ctx.save_for_forward(*(value if isinstance(value, torch.Tensor) else None for value in inputs))
            ctx.inputs = [None if isinstance(value, torch.Tensor) else value for value in inputs]
        if keys is None:
            return run(*inputs, *settings)
        # PyTorch turns derivatives off here, also those of the levels below, which need them.
        with ExitStack() as stack:
            if torch._C._are_functorch_transforms_active():
                stack.enter_context(torch.enable_grad())
                stack.enter_context(forward_ad._set_fwd_grad_enabled(True))
            stack.enter_context(torch._C._AutoDispatchBelowAutograd())
            return cast(Tensor, operator.redispatch(keys & torch._C._after_autograd_keyset, *inputs, *settings))

    def gradients(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return None, None, *backward(ctx, ctx.needs_input_grad[2:], g)

    def tangent(ctx: Any, _keys: None, _settings: None, *tangents: Tensor | None) -> Tensor:
        inputs = [*ctx.inputs]
        # Here, too, PyTorch turns off derivatives that the levels below need. When they are on again, the inputs must
        # not have this level's tangents.
        with forward_ad._set_fwd_grad_enabled(True):
            for place, tensor in enumerate(ctx.saved_tensors):
                if tensor is not None:
                    inputs[place] = forward_ad.unpack_dual(tensor, level=0).primal
            return along(inputs, tangents, ctx.settings)

    # The dispatcher calls it once for each level of torch.func, so the autograd function is one of a single level.
    base: Any = torch.autograd.function._SingleLevelFunction
    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients), "jvp": staticmethod(tangent)}
    node: Any = type(base)(f"gpuconv_{name}", (base,), methods)

    def differentiable(keys: Any, *inputs: Any) -> Tensor:
        with enable_single_level_autograd_function():
            return cast(Tensor, node.apply(keys, inputs[3:], *inputs[:3]))

    def call(*inputs: Any) -> Tensor:
        if not _known_way(inputs[:3]):
            return cast(Tensor, operator(*inputs))
        if (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)) or forward_ad._current_level >= 0:
            return cast(Tensor, node.apply(None, inputs[3:], *inputs[:3]))
        return run(*inputs)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, differentiable, "Autograd", with_keyset=True)
    torch.library.register_fake(operator, fake, lib=_LIBRARY)
    torch.library.register_vmap(operator, _batch_rule(operator, batch), lib=_LIBRARY)
    return call


def _batch_rule(operator: Any, batch: Callable[..., tuple[Tensor, int]]) -> Callable[..., tuple[Tensor, int]]:
    """The rule with which an operator is registered: `batch`, which turns at least one call into one."""

    def rule(info: Any, dims: tuple[Any, ...], *given: Any) -> tuple[Tensor, int]:
        if info.batch_size:
            return batch(info, dims, *given)
        # No result of a single call, whose batched arguments are empty sums.
        single = [
            value.sum(dim, dtype=value.dtype) if isinstance(value, torch.Tensor) and dim is not None else value
            for value, dim in zip(given, dims, strict=True)
        ]
        return operator(*single)[None][:0], 0

    return rule


def _keywords(op: Op, settings: Sequence[Any]) -> dict[str, Any]:
    """The settings of an operator as keyword arguments of the functions of arrays; the last ones may be absent."""
    stride, sides, word, *others = settings
    names = ("output_padding", "groups", "dilation", "precision", "lengths", "algorithm", "out_dtype")
    if op == "conv1d":
        names = ("dilation", "groups", "precision", "padding_mode", "lengths", "algorithm", "out_dtype")
    return {"stride": stride, "padding": word or tuple(sides), **dict(zip(names, others, strict=False))}


def _problem(op: Op, specs: Sequence[ArraySpec | None], settings: Sequence[Any]) -> ConvProblem:
    """The problem of the arguments and settings, without the lengths of samples."""
    keywords = _keywords(op, settings)
    keywords.pop("lengths", None)
    keywords.pop("algorithm", None)
    return ConvProblem.of(op, *specs, **keywords)


def _lengths_in(settings: Sequence[Any]) -> Sequence[int] | None:
    """The lengths among the settings, whose last ones may be absent instead of None."""
    return settings[_LENGTHS] if len(settings) > _LENGTHS else None


def _output_lengths(op: Op, K: int, settings: Sequence[Any]) -> tuple[int, ...] | None:
    """The output lengths of samples; None where all samples have full length."""
    lengths = _lengths_in(settings)
    if lengths is None:
        return None
    known = _keywords(op, settings)
    extra = known.get("output_padding", 0)
    given = (known["stride"], known["padding"], known["dilation"])
    found = output_lengths(list(lengths), K, *given, transposed=op != "conv1d", output_padding=extra)
    return tuple(found.tolist())


def _existing(tensor: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """The tensor with zeros beyond the lengths of its samples; None leaves it unchanged."""
    if lengths is None:
        return tensor
    place = torch.arange(tensor.shape[-1], device=tensor.device)
    exists = place < torch.tensor(lengths, device=tensor.device).reshape(-1, 1, 1)
    return torch.where(exists if tensor.dim() == 3 else exists[0], tensor, tensor.new_zeros(()))


def _output(
    op: Op, specs: tuple[ArraySpec | None, ...], settings: tuple[Any, ...]
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the output; raises what gpuconv's functions raise. Extents may be symbolic."""
    problem = _problem(op, specs, settings)
    return problem.output_shape, getattr(torch, problem.dtype_of(problem.result))


def _register(op: Op) -> Callable[..., Tensor]:
    """Register an operation and its gradients with respect to input and weight; returns the operation."""
    operators: list[Any] = []  # by the places of their results

    def define(
        place: int,
        name: str,
        arguments: str,
        function: Callable[..., Any],
        empty: Callable[..., Tensor],
        fake: Callable[..., Tensor],
        batch: Callable[..., Any],
    ) -> Any:
        """An operator that calls a function of arrays.

        `empty` makes the tensor for the result of the arguments; `fake` does so for symbolic extents.
        """

        def compute(*given: Any) -> Tensor:
            settings = (given[3], tuple(given[4]), *(tuple(v) if isinstance(v, list) else v for v in given[5:]))
            return tensors.write(lambda: empty(*given[:3], *settings), function, *given[:3], **keywords(op, settings))

        keywords = lru_cache(maxsize=4096)(_keywords)

        more = ", str? algorithm=None, str? out_dtype=None" if place == _OUTPUT else ""
        schema = f"{name}({arguments}, {_SETTINGS[op]}{more}) -> Tensor"
        rules = partial(keep, place), partial(backward, place), partial(along, place)
        return _define(schema, compute, fake, *rules, batch)

    # The arguments after these settings, the algorithm and the dtype of sums of integers, do not affect gradients.
    count = _COUNT

    def output_of(
        describe: Callable[..., tuple[tuple[int, ...], torch.dtype]],
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        *settings: Any,
    ) -> Tensor:
        shape, dtype = describe(op, specs(x, w, b), settings)
        return x.new_empty(shape, dtype=dtype)

    def input_of(size: Sequence[int], w: Tensor, *_: Any) -> Tensor:
        return w.new_empty(size)

    def weight_of(x: Tensor, size: Sequence[int], *_: Any) -> Tensor:
        return x.new_empty(size)

    # The derivatives of the operator whose result has this place. They conjugate nothing, as the operators do that.

    def keep(place: int, ctx: Any, needed: tuple[bool, ...], *inputs: Any) -> None:
        """Keep each of the two factors only if the derivative with respect to the other is needed."""
        a, b = _FACTORS[place]
        ctx.save_for_backward(inputs[a] if needed[b] else None, inputs[b] if needed[a] else None)
        ctx.sizes = inputs[a].shape, inputs[b].shape

    def backward(place: int, ctx: Any, needed: tuple[bool, ...], g: Tensor) -> list[Tensor | None]:
        """The gradient with respect to a factor: the operator of its place, on the result's gradient and the other."""
        gradients: list[Tensor | None] = [None, None, None]
        a, b = _FACTORS[place]
        kept = ctx.saved_tensors
        for factor, size, other, tensor in ((a, ctx.sizes[0], b, kept[1]), (b, ctx.sizes[1], a, kept[0])):
            if needed[factor]:
                given: list[Any] = [None, None, None]
                given[place], given[other] = g, tensor
                if factor != _OUTPUT:
                    given[factor] = tuple(size)  # faster than torch.Size as a cache key
                gradients[factor] = operators[factor](*given, *ctx.settings[:count])
        if place == _OUTPUT and needed[_OUTPUT]:
            gradients[_OUTPUT] = _bias_gradient(g, _output_lengths(op, ctx.sizes[1][-1], ctx.settings))
        return gradients

    def along(place: int, inputs: list[Any], tangents: Sequence[Tensor | None], settings: tuple[Any, ...]) -> Tensor:
        """The sum of the operator applied to each factor's tangent and the other factor; a bias is added once."""
        settings = settings[:count]
        if place == _OUTPUT:
            inputs[_OUTPUT] = tangents[_OUTPUT]
        products: list[Tensor] = []
        for factor in _FACTORS[place]:
            if tangents[factor] is not None:
                given = [*inputs]
                given[factor] = tangents[factor]
                products.append(operators[place](*given, *settings))
                if place == _OUTPUT:
                    inputs[_OUTPUT] = None
        if not products:
            whole = inputs[_OUTPUT][:, None].expand(_output(op, specs(*inputs), settings)[0])
            return _existing(whole, _output_lengths(op, inputs[_WEIGHT].shape[-1], settings))
        return products[0] if len(products) == 1 else products[0] + products[1]

    # These functions turn B calls into one. If all have the same weight, their samples become one batch. Otherwise each
    # call gets groups of its own, since channels of different groups do not mix.

    def forward_batch(info: Any, dims: tuple[Any, ...], x: Tensor, w: Tensor, b: Any, *settings: Any) -> Any:
        B = info.batch_size
        if dims[1] is None and dims[2] is None:
            return _from_samples(forward(_to_samples(x, dims[0], B), w, b, *_repeated(settings, B)), B, x.dim() == 4)
        rows = None if b is None else _to_rows(b, dims[2], B)
        y = forward(_to_channels(x, dims[0], B), _to_rows(w, dims[1], B), rows, *_grouped(settings, B))
        return _from_channels(y, B)

    def input_gradient_batch(
        info: Any, dims: tuple[Any, ...], size: Sequence[int], w: Tensor, g: Tensor, *settings: Any
    ) -> Any:
        B, (*N, C, L) = info.batch_size, size
        if dims[1] is None:
            samples = [B * n for n in N] or [B]
            grad_x = input_gradient([*samples, C, L], w, _to_samples(g, dims[2], B), *_repeated(settings, B))
            return _from_samples(grad_x, B, bool(N))
        rows, channels = _to_rows(w, dims[1], B), _to_channels(g, dims[2], B)
        return _from_channels(input_gradient([*N, B * C, L], rows, channels, *_grouped(settings, B)), B)

    def weight_gradient_batch(
        info: Any, dims: tuple[Any, ...], x: Tensor, size: Sequence[int], g: Tensor, *settings: Any
    ) -> Any:
        B, (rows, *rest) = info.batch_size, size
        x, g = _to_channels(x, dims[0], B), _to_channels(g, dims[2], B)
        return weight_gradient(x, [B * rows, *rest], g, *_grouped(settings, B)).unflatten(0, (B, rows)), 0

    input_gradient = define(
        _INPUT,
        f"{op}_input",
        "SymInt[] input_size, Tensor weight, Tensor grad_output",
        getattr(grad, f"{op}_input"),
        input_of,
        input_of,
        input_gradient_batch,
    )
    weight_gradient = define(
        _WEIGHT,
        f"{op}_weight",
        "Tensor input, SymInt[] weight_size, Tensor grad_output",
        getattr(grad, f"{op}_weight"),
        weight_of,
        weight_of,
        weight_gradient_batch,
    )
    forward = define(
        _OUTPUT,
        op,
        "Tensor input, Tensor weight, Tensor? bias",
        getattr(functional, op),
        partial(output_of, lru_cache(maxsize=4096)(_output)),
        partial(output_of, _output),
        forward_batch,
    )
    operators += [input_gradient, weight_gradient, forward]

    # FLOPs, counted as PyTorch counts those of its own convolutions.

    transposed = op == "conv_transpose1d"

    def input_gradient_flops(size: Any, w: Any, g: Any, *_: Any, **__: Any) -> int:
        return conv_flop_count(_batched(g), w, _batched(size), transposed=not transposed)

    def weight_gradient_flops(x: Any, size: Any, g: Any, *_: Any, **__: Any) -> int:
        sides = [[C, N, L] for N, C, L in (_batched(x), _batched(g))]
        a, b = sides[::-1] if transposed else sides
        return conv_flop_count(a, b, [size[1], size[0], size[2]])

    for name, formula in (
        (op, partial(_forward_flops, op)),
        (f"{op}_input", input_gradient_flops),
        (f"{op}_weight", weight_gradient_flops),
    ):
        register_flop_formula(getattr(torch.ops.gpuconv, name))(formula)
    return cast(Callable[..., Tensor], forward)


def _forward_flops(op: Op, x: Any, w: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return conv_flop_count(_batched(x), w, _batched(out_shape), transposed=op == "conv_transpose1d")


def _batched(shape: Sequence[int]) -> list[int]:
    return [*shape] if len(shape) == 3 else [1, *shape]


def _grouped(settings: Sequence[Any], B: int) -> list[Any]:
    """The settings with B times the groups."""
    return [value * B if place == _GROUPS else value for place, value in enumerate(settings)]


def _repeated(settings: Sequence[Any], B: int) -> list[Any]:
    """The settings for B batches joined to one."""
    repeated, lengths = [*settings], _lengths_in(settings)
    if lengths is not None:
        repeated[_LENGTHS] = [*lengths] * B
    return repeated


# These functions merge the axis of B calls into another axis, and split it off again: (result, its place in it). The
# axis is at `dim`, which is None if all calls share the tensor.


def _front(tensor: Tensor, dim: int | None, B: int) -> Tensor:
    return tensor.expand(B, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _to_rows(tensor: Tensor, dim: int | None, B: int) -> Tensor:
    return _front(tensor, dim, B).flatten(0, 1)


def _to_channels(tensor: Tensor, dim: int | None, B: int) -> Tensor:
    return _front(tensor, dim, B).movedim(0, -3).flatten(-3, -2)


def _from_channels(tensor: Tensor, B: int) -> tuple[Tensor, int]:
    return tensor.unflatten(-2, (B, tensor.shape[-2] // B)), tensor.dim() - 2


def _to_samples(tensor: Tensor, dim: int | None, B: int) -> Tensor:
    moved = _front(tensor, dim, B)
    return moved.flatten(0, 1) if moved.dim() == 4 else moved


def _from_samples(tensor: Tensor, B: int, batched: bool) -> tuple[Tensor, int]:
    return (tensor.unflatten(0, (B, tensor.shape[0] // B)) if batched else tensor), 0


def _register_bias_gradient() -> Any:
    """Register the gradient with respect to a bias, the same for both operations."""

    def bias_of(grad_output: Tensor, _: Sequence[int] | None = None) -> Tensor:
        return grad_output.new_empty(grad_output.shape[-2])

    def compute(grad_output: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        given = None if lengths is None else list(lengths)
        return tensors.write(lambda: bias_of(grad_output), grad.conv1d_bias, grad_output, lengths=given)

    def keep(ctx: Any, _: tuple[bool, ...], grad_output: Tensor, lengths: Sequence[int] | None = None) -> None:
        ctx.size, ctx.lengths = grad_output.shape, lengths

    def backward(ctx: Any, _: tuple[bool, ...], g: Tensor) -> tuple[Tensor, None]:
        return _existing(g[:, None].expand(ctx.size), ctx.lengths), None

    def along(inputs: list[Any], tangents: Sequence[Tensor | None], _settings: tuple[Any, ...]) -> Tensor:
        return cast(Tensor, operator(tangents[0], *inputs[1:]))

    def batch(
        info: Any, dims: tuple[Any, ...], grad_output: Tensor, lengths: Sequence[int] | None = None
    ) -> tuple[Tensor, int]:
        B = info.batch_size
        result = operator(_to_channels(grad_output, dims[0], B), lengths)
        return result.unflatten(0, (B, result.shape[0] // B)), 0

    schema = "conv_bias(Tensor grad_output, int[]? lengths=None) -> Tensor"
    operator = _define(schema, compute, bias_of, keep, backward, along, batch)
    return operator


def _is_differentiated(tensor: Tensor | None) -> bool:
    """Whether a tensor requires a gradient, or has a tangent, at this level of torch.func."""
    if tensor is None:
        return False
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    return forward_ad._is_fwd_grad_enabled() and forward_ad.unpack_dual(tensor, level=0).tangent is not None


def _register_fused(op: Op) -> Callable[..., Tensor]:
    """Register an operation that fuses something; it refuses derivatives."""
    arrays = ", ".join(f"Tensor? {name}" for name in FUSED_ARRAYS)
    name, count = f"{op}_fused", _COUNT
    settings = _SETTINGS[op].removesuffix("=None")  # what follows has no default
    schema = (
        f"{name}(Tensor input, Tensor weight, Tensor? bias, {arrays}, {settings}, str? algorithm, str? activation,"
        " str? input_activation, float activation_parameter, float input_activation_parameter) -> Tensor"
    )
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.gpuconv, name).default
    number = 3 + len(FUSED_ARRAYS)

    def fusion_of(given: Sequence[Any], words: Sequence[Any]) -> Fusion:
        residual, *of_channels = given
        counts = [sum(a is not None for a in pair) for pair in (of_channels[:2], of_channels[2:])]
        behind, before = (
            None if word is None else Activation(word, parameter, arrays)
            for word, parameter, arrays in zip(words[:2], words[2:], counts, strict=True)
        )
        return Fusion(behind, before, residual is not None)

    def fake(*given: Any) -> Tensor:
        settings = (given[number], tuple(given[number + 1]), *given[number + 2 : number + count])
        problem = _problem(op, specs(*given[:3]), settings)
        fusion = fusion_of(given[3:number], given[number + count + 1 :])
        shape = problem.fused(Fused(fusion, specs(*given[3:number]))).output_shape
        return cast(Tensor, given[0].new_empty(shape))

    def compute(*given: Any) -> Tensor:
        fusion = fusion_of(given[3:number], given[number + count + 1 :])
        settings = (given[number], tuple(given[number + 1]), *given[number + 2 : number + count + 1])

        def function(x: Any, w: Any, b: Any, *more: Any, **options: Any) -> Any:
            named = dict(zip(FUSED_ARRAYS, more, strict=True))
            fused = {**fusion.as_arguments(named), "residual": named["residual"]}
            return getattr(functional, op)(x, w, b, **_keywords(op, settings), **fused, **options)

        return tensors.write(lambda: fake(*given), function, *given[:number])

    def refuse_derivatives(keys: Any, *given: Any) -> Tensor:
        if any(map(_is_differentiated, given[:number])):
            fusion = fusion_of(given[3:number], given[number + count + 1 :])
            raise RuntimeError(
                f"{op}: what is fused ({fusion}) has no derivatives; call it under torch.no_grad, or apply it to the "
                "output"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return cast(Tensor, operator.redispatch(keys & torch._C._after_autograd_keyset, *given))

    def batch(info: Any, dims: tuple[Any, ...], *given: Any) -> Any:
        """The rule for torch.func.vmap, as `forward_batch` is for the operator that fuses nothing."""
        B, settings = info.batch_size, given[number:]

        def each(convert: Callable[..., Tensor], first: int, last: int) -> list[Tensor | None]:
            pairs = zip(given[first:last], dims[first:last], strict=True)
            return [None if t is None else convert(t, dim, B) for t, dim in pairs]

        if dims[1] is None and dims[2] is None and set(dims[4:number]) == {None}:
            (x,), (residual,) = each(_to_samples, 0, 1), each(_to_samples, 3, 4)
            y = operator(x, *given[1:3], residual, *given[4:number], *_repeated(settings, B))
            return _from_samples(y, B, given[0].dim() - (dims[0] is not None) == 3)
        (x,), (residual,) = each(_to_channels, 0, 1), each(_to_channels, 3, 4)
        rows, of_channels = each(_to_rows, 1, 3), each(_to_rows, 4, number)
        return _from_channels(operator(x, *rows, residual, *of_channels, *_grouped(settings, B)), B)

    run = untraced(compute)

    def call(*given: Any) -> Tensor:
        arrays = given[:number]
        if not _known_way(arrays) or forward_ad._current_level >= 0 or torch._C._any_requires_grad(*arrays):
            return cast(Tensor, operator(*given))
        return run(*given)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, refuse_derivatives, "Autograd", with_keyset=True)
    torch.library.register_fake(operator, fake, lib=_LIBRARY)
    torch.library.register_vmap(operator, _batch_rule(operator, batch), lib=_LIBRARY)
    register_flop_formula(getattr(torch.ops.gpuconv, name))(partial(_forward_flops, op))
    return call


_bias_gradient = _register_bias_gradient()
conv1d, conv_transpose1d = _register("conv1d"), _register("conv_transpose1d")
FUSED: dict[Op, Callable[..., Tensor]] = {op: _register_fused(op) for op in _SETTINGS}
