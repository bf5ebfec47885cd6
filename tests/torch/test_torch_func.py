"""`gpuconv.torch` under torch.func, PyTorch's counts of operations, and what a first call costs."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import NO_TORCH

pytest.importorskip("torch", reason=NO_TORCH)

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from gpuconv import torch as bridge
from gpuconv.problem import Op
from gpuconv.torch import operators
from tests.strategies import Call, calls
from tests.torch.test_torch import forward
from tests.torch.test_torch_bridge import LAYERS, OPS, drawn, operator_calls

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def loss_of(layer: str) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """A real number that a layer and its arguments make, which no derivative of low order is zero of."""
    op, shapes, keywords = LAYERS[layer]
    given = drawn(shapes, torch.float64, requires_grad=False)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = getattr(bridge, op)(*tensors, **keywords)
        return result.pow(3).sum()

    return loss, [t for t in given if t is not None]


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_torch_func_are_those_of_autograd(layer: str) -> None:
    loss, given = loss_of(layer)
    everything = tuple(range(len(given)))
    leaves = [t.clone().requires_grad_() for t in given]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    gradients = torch.func.grad(loss, argnums=everything)(*given)
    value, pull = vjp(loss, *given)
    assert torch.equal(value, loss(*given))
    for ours, also_ours, theirs in zip(gradients, pull(torch.ones_like(value)), expected, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(also_ours, theirs)
    # Levels nest: the gradient of a function of a gradient.
    second = torch.func.grad(lambda *t: sum(g.pow(2).sum() for g in torch.func.grad(loss, everything)(*t)), everything)
    inner = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    squares = torch.stack([g.pow(2).sum() for g in inner]).sum()
    for ours, theirs in zip(second(*given), torch.autograd.grad(squares, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("outer", [jacrev, jacfwd])
@pytest.mark.parametrize("inner", [jacrev, jacfwd])
@pytest.mark.parametrize("layer", ["strided", "grouped", "up strided", "up dilated", "unbatched"])
def test_second_derivatives_of_torch_func(layer: str, outer: Any, inner: Any) -> None:
    """Each mode is computed as batches of passes, so that every argument of every operator is batched in turn.

    Forward within forward, PyTorch itself would give zeros for what depends on both levels.
    """
    loss, given = loss_of(layer)
    everything = tuple(range(len(given)))
    ours = outer(inner(loss, everything), everything)(*given)
    theirs = torch.autograd.functional.hessian(loss, tuple(given))
    for row, expected_row in zip(ours, theirs, strict=True):
        for block, expected in zip(row, expected_row, strict=True):
            torch.testing.assert_close(block, expected, rtol=1e-10, atol=1e-10)


def test_derivatives_in_forward_mode_compile() -> None:
    """There PyTorch opens the level of such derivatives without telling Python."""
    x, w = (t.detach() for t in drawn(((2, 2, 9), (4, 2, 3)), torch.float64))

    def along(x: torch.Tensor, w: torch.Tensor) -> Any:
        return torch.func.jvp(bridge.conv1d, (x, w), (x.cos(), w.cos()))

    def second(x: torch.Tensor, w: torch.Tensor) -> Any:
        return torch.func.hessian(lambda w: bridge.conv1d(x, w).pow(3).sum())(w)

    for function in (along, second):
        torch.compiler.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, w), function(x, w), rtol=1e-12, atol=1e-12)
    torch.compiler.reset()


PLACES_IN_MEMORY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": torch.clone,
    "axes reversed": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "behind others": lambda t: torch.cat([t.flatten()[:1]] * 3 + [t.flatten()])[3:].view(t.shape),
    "conjugation pending": lambda t: t.conj().resolve_conj().conj(),
    "negation pending": lambda t: t if t.is_complex() else torch.complex(t, -t).conj().imag,
}


def in_every_transform(
    function: Callable[..., torch.Tensor], given: list[torch.Tensor], varied: list[int]
) -> list[torch.Tensor]:
    """The result, and its derivatives to second order in the tensors that vary."""

    def of(*chosen: torch.Tensor) -> torch.Tensor:
        return function(*(dict(enumerate(given)) | dict(zip(varied, chosen, strict=True))).values())

    leaves = [given[i].detach().requires_grad_() for i in varied]
    tangents = tuple(torch.cos(leaf).detach() for leaf in leaves)
    y = of(*leaves)
    u = torch.cos(y).detach().requires_grad_()
    first = torch.autograd.grad(y, leaves, u, create_graph=True)
    (of_u,) = torch.autograd.grad(first, u, tangents, retain_graph=True)
    squares = [g.abs().pow(2).sum() for g in first]
    second = torch.autograd.grad(squares, [u, *leaves], materialize_grads=True)
    along = jvp(of, tuple(t.detach() for t in leaves), tangents)
    batch = vmap(of, -1, -1)(*(torch.stack([t.detach(), 2 * t.detach()], -1) for t in leaves))
    return [y, *first, of_u, *second, *along, batch]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_random_problems_in_every_transform(op: Op) -> None:
    """Against PyTorch's own convolutions, on tensors that lie in memory in every way."""

    @settings(max_examples=30)
    @given(call=calls(op, ("float64", "complex128"), max_length=4), subset=st.integers(1, 7), data=st.data())
    def run(call: Call, subset: int, data: st.DataObject) -> None:
        arrays = [a for a in call.arrays() if a is not None]
        places = [data.draw(st.sampled_from([*PLACES_IN_MEMORY])) for _ in arrays]
        plain = [torch.from_numpy(a) for a in arrays]
        elsewhere = [PLACES_IN_MEMORY[place](t) for place, t in zip(places, plain, strict=True)]
        varied = [i for i in range(len(plain)) if subset >> i & 1] or [0]
        results = [
            in_every_transform(lambda x, w, b=None: getattr(bridge, op)(x, w, b, **call.settings), elsewhere, varied),
            in_every_transform(lambda x, w, b=None: forward(call, x, w, b), plain, varied),
        ]
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    run()


def batched_operator_calls() -> Iterator[Any]:
    """Every operator, with every choice of tensors that are batched, each along another axis."""
    for param in operator_calls():
        name, args = param.values
        tensors = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
        for chosen in itertools.product((False, True), repeat=len(tensors)):
            if any(chosen):
                places = [i for i, batched in zip(tensors, chosen, strict=True) if batched]
                yield pytest.param(name, args, places, id=f"{param.id}-{''.join(map(str, places))}")


@pytest.mark.parametrize(("name", "args", "places"), list(batched_operator_calls()))
def test_batches_of_calls(name: str, args: tuple[Any, ...], places: list[int]) -> None:
    B = 3
    operator = getattr(torch.ops.gpuconv, name).default
    generator = torch.Generator().manual_seed(2)
    dims: list[int | None] = [None] * len(args)
    given = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    for number, place in enumerate(places):
        dims[place] = number % (given[place].dim() + 1)
        shape = [*given[place].shape]
        shape.insert(dims[place], B)
        given[place] = torch.randn(shape, dtype=torch.float64, generator=generator)
    batched = [(place, given[place], dims[place]) for place in places]

    def one(*tensors: torch.Tensor) -> torch.Tensor:
        call = list(given)
        for place, tensor in zip(places, tensors, strict=True):
            call[place] = tensor
        result: torch.Tensor = operator(*call)
        return result

    ours = vmap(one, in_dims=tuple(dim for _, _, dim in batched))(*(t for _, t, _ in batched))
    expected = torch.stack([one(*(t.select(dim, i) for _, t, dim in batched)) for i in range(B)])
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    nested = vmap(vmap(one))(*(t.movedim(dim, 0).expand(2, *t.movedim(dim, 0).shape) for _, t, dim in batched))
    torch.testing.assert_close(nested, expected.expand(2, *expected.shape), rtol=1e-12, atol=1e-12)


def test_no_calls_of_an_empty_batch() -> None:
    assert vmap(bridge.conv1d)(torch.empty(3, 0, 2, 5), torch.empty(3, 4, 2, 3)).shape == (3, 0, 4, 3)


def test_gradients_for_each_sample() -> None:
    """The model runs under patch()."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3, groups=2), nn.Tanh(), nn.ConvTranspose1d(4, 3, 4, stride=2)).double()
    parameters = dict(model.named_parameters())
    x = torch.randn(5, 2, 9, dtype=torch.float64)

    def loss(parameters: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (sample[None],)).pow(2).sum()  # type: ignore[no-any-return]

    def each() -> dict[str, torch.Tensor]:
        result: dict[str, torch.Tensor] = vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        return result

    theirs = each()
    with bridge.patch():
        ours = each()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-12, atol=1e-12)


def test_gradients_for_each_sample_compile() -> None:
    w = torch.randn(4, 2, 3, dtype=torch.float64)
    x = torch.randn(5, 2, 9, dtype=torch.float64)
    each = vmap(torch.func.grad(lambda w, x: bridge.conv1d(x, w, padding=1).pow(2).sum()), in_dims=(None, 0))
    torch.compiler.reset()
    compiled = torch.compile(each, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(w, x), each(w, x), rtol=1e-12, atol=1e-12)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("op", "shapes", "settings"),
    [
        ("conv1d", ((2, 4, 20), (6, 4, 3), (6,)), (2, 1, 2)),
        ("conv1d", ((2, 4, 20), (8, 2, 3), None), (1, 0, 1, 2)),
        ("conv1d", ((4, 20), (6, 4, 5), (6,)), ()),
        ("conv_transpose1d", ((2, 4, 20), (4, 6, 3), (6,)), (2, 1, 1)),
        ("conv_transpose1d", ((2, 4, 20), (4, 3, 3), None), (3, 0, 0, 2, 2)),
        ("conv_transpose1d", ((4, 20), (4, 6, 5), None), ()),
    ],
)
def test_operations_are_counted_as_pytorch_counts_them(op: Op, shapes: Any, settings: tuple[int, ...]) -> None:
    counts = []
    for function in (getattr(bridge, op), getattr(functional, op)):
        leaves = drawn(shapes, torch.float64)
        with FlopCounterMode(display=False) as forward:
            y = function(*leaves, *settings)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1]
    assert all(counts[0])


def test_a_first_call_imports_nothing_large() -> None:
    """Neither torch.compile nor SymPy, which take PyTorch a second; so with derivatives and under patch."""
    program = """
import sys, time
import torch, gpuconv.torch
layer, x = torch.nn.Conv1d(2, 3, 3), torch.randn(1, 2, 9)
before, started = set(sys.modules), time.process_time()
with gpuconv.torch.patch():
    layer(x).sum().backward()
print(time.process_time() - started, len(set(sys.modules) - before), "torch._dynamo" in sys.modules)
"""
    seconds, modules, compiler = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert compiler == "False"
    assert int(modules) < 100
    assert float(seconds) < 0.2


def test_nodes_of_the_graph_name_their_operator() -> None:
    x, w = (torch.randn(shape, requires_grad=True) for shape in ((1, 2, 9), (3, 2, 3)))
    y = bridge.conv1d(x, w)
    (gradient,) = torch.autograd.grad(y.sum(), w, create_graph=True)
    names = [node.name() for t in (y, gradient) if (node := t.grad_fn) is not None]
    assert names == ["gpuconv_conv1dBackward", "gpuconv_conv1d_weightBackward"]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_plain_tensors_need_no_dispatcher(requires_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else would see the call; whoever would, a mode or a profiler, sees it."""
    x, w = torch.randn(1, 2, 9), torch.randn(3, 2, 3).requires_grad_(requires_grad)
    direct = bridge.conv1d(x, w)
    seen: list[Any] = []
    known_way = operators._known_way

    def recording(inputs: tuple[Any, ...]) -> Any:
        seen.append(known_way(inputs))
        return seen[-1]

    monkeypatch.setattr(operators, "_known_way", recording)
    assert torch.equal(bridge.conv1d(x, w), direct)
    assert seen.pop()
    with torch.profiler.profile() as profile:
        assert torch.equal(bridge.conv1d(x, w), direct)
    assert not seen.pop()
    assert "gpuconv::conv1d" in {event.key for event in profile.key_averages()}
    with torch._C._AutoDispatchBelowAutograd():
        assert bridge.conv1d(x, w).grad_fn is None
    bridge.conv1d(x.to(torch.complex64), w.to(torch.complex64).conj())
    assert not seen.pop()


def test_vmap_of_no_calls() -> None:
    """The result has the axis of calls, without elements, and derivatives with respect to what the calls share."""
    x, w, b = torch.randn(0, 2, 4, 9), torch.randn(6, 2, 3, requires_grad=True), torch.randn(6, 0)
    y = vmap(lambda x, b: bridge.conv1d(x, w, b, groups=2), in_dims=(0, 1))(x, b)
    assert y.shape == (0, 2, 6, 7)
    assert torch.equal(torch.autograd.grad(y.sum(), w)[0], torch.zeros_like(w))
    assert vmap(lambda w: bridge.conv1d(torch.ones(4, 9), w, groups=2))(w.detach().expand(0, 6, 2, 3)).shape == (
        0,
        6,
        7,
    )
    assert vmap(vmap(lambda x: bridge.conv1d(x, w)))(torch.randn(3, 0, 1, 2, 9)).shape == (3, 0, 1, 6, 7)
    fused = vmap(lambda x: bridge.conv1d(x, w.detach(), groups=2, activation="relu"))(x)
    assert fused.shape == (0, 2, 6, 7)
    integers = torch.zeros(0, 4, 9, dtype=torch.int8)
    assert vmap(lambda x: bridge.conv_transpose1d(x, integers.new_ones(4, 1, 2)))(integers).dtype == torch.int64

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return bridge.conv1d(x, w, groups=2).sum()

    gradients = vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(x, w.detach())
    assert [g.shape for g in gradients] == [(0, 2, 4, 9), (0, 6, 2, 3)]
