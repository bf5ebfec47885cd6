"""The argument `algorithm` of `gpuconv.torch`: what it launches, and how it travels through traces and batches."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests import NO_TORCH

pytest.importorskip("torch", reason=NO_TORCH)

import torch
from torch import nn
from torch.nn import functional

import gpuconv
from gpuconv import torch as bridge
from gpuconv.problem import Op
from tests.plans import BASE
from tests.torch.test_torch_bridge import OPS, Recorder, compiler, computed
from tests.torch.test_torch_cuda import Gpu, gpu

__all__ = ["compiler", "computed", "gpu"]  # fixtures

pytestmark = pytest.mark.usefixtures("one_torch_thread")

OTHER: dict[Op, Op] = {"conv1d": "conv_transpose1d", "conv_transpose1d": "conv1d"}


def leaves(*, channels: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, channels, 12), (channels, channels, 3))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_an_algorithm_is_launched_by_its_name(op: Op, gpu: Gpu, launched: list[str]) -> None:
    """The name is for the operation alone: derivatives of every order use what is preferred for them."""
    given = [t.detach().half() for t in leaves(channels=64)]  # which tensor cores of every architecture multiply
    x, w, u = (gpu.put(t).requires_grad_() for t in (*given, torch.ones_like(getattr(functional, op)(*given))))
    of_gradients = []
    for algorithm, family in (("base", BASE[op]), (None, f"{op}_mma"), (BASE[op], BASE[op]), (f"{op}_mma",) * 2):
        launched.clear()
        y = getattr(bridge, op)(x, w, algorithm=algorithm)
        assert launched[-1] == family
        launched.clear()
        gradients = torch.autograd.grad(y, (x, w), u, create_graph=True)
        for gradient in gradients:
            torch.autograd.grad(gradient, (x, w, u), gradient.detach(), retain_graph=True, allow_unused=True)
        of_gradients.append(launched.copy())
    assert all(kernels == of_gradients[0] for kernels in of_gradients)
    assert f"{op}_mma" in of_gradients[0]
    with pytest.raises(ValueError, match=rf"^{op}: algorithm '{op}_depthwise' does not take {op} N2 C64->64 .*: needs"):
        getattr(bridge, op)(x, w, algorithm=f"{op}_depthwise")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("op", OPS)
def test_algorithms_are_checked_where_they_have_no_effect(op: Op, device: str) -> None:
    function = getattr(bridge, op)
    x, w = (t.detach().to(device) for t in leaves())
    plain = function(x, w)
    for algorithm in ("base", BASE[op], f"{op}_depthwise"):
        y = function(x, w, algorithm=algorithm)
        assert y.shape == plain.shape
        assert device == "meta" or torch.equal(y, plain)
    known = rf"^{op}: algorithm must be None or one of base, {op}_.*, got "
    with pytest.raises(ValueError, match=rf"{known}'{BASE[OTHER[op]]}'$"):
        function(x, w, algorithm=BASE[OTHER[op]])
    with pytest.raises(TypeError, match=rf"{known}int 1$"):
        function(x, w, algorithm=1)


@pytest.mark.parametrize("op", OPS)
def test_operators_take_an_algorithm_or_none(op: Op) -> None:
    operator = getattr(torch.ops.gpuconv, op).default
    x, w = leaves()
    settings: list[Any] = [1, [1, 1], ""]
    settings += [1, 1, "float32", "zeros"] if op == "conv1d" else [0, 1, 1, "float32"]
    for more in ([], [None], [None, "base"], [[12, 5], None]):  # lengths and an algorithm
        result = torch.library.opcheck(operator, (x, w, None, *settings, *more))
        assert set(result.values()) == {"SUCCESS"}
    for gradient in ("input", "weight"):
        schema = str(getattr(torch.ops.gpuconv, f"{op}_{gradient}").default._schema)
        assert "algorithm" not in schema


def algorithms_in(graph: torch.fx.Graph) -> list[Any]:
    """The algorithms of a graph's convolutions."""
    calls = [node for node in graph.nodes if re.search("conv(_transpose)?1d", str(node.target))]
    return [node.kwargs.get("algorithm", node.args[-1]) for node in calls]


class Model(nn.Module):
    """Both operations, each with an algorithm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(leaves()[1].detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = bridge.conv1d(x, self.weight, padding="same", algorithm="base")
        return bridge.conv_transpose1d(y, self.weight, stride=2, output_size=25, algorithm="conv_transpose1d_phases")


def test_traces_hold_the_algorithm(compiler: Callable[..., Any], tmp_path: Any) -> None:
    model, x = Model(), leaves()[0].detach()
    expected, named = model(x), ["base", "conv_transpose1d_phases"]
    traced = torch.fx.symbolic_trace(model)
    assert algorithms_in(traced.graph) == named
    assert torch.equal(traced(x), expected)
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        assert algorithms_in(program.graph) == named
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert algorithms_in(loaded.graph) == named
    assert torch.equal(loaded.module()(x), expected)

    gradients = []
    for run in (model, compiler(model, backend="aot_eager")):
        model.zero_grad()
        y = run(x)
        assert torch.equal(y, expected)
        y.square().sum().backward()
        gradients.append(model.weight.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]
    with pytest.raises(Exception, match="algorithm must be None or one of base"):
        compiler(lambda x, w: bridge.conv1d(x, w, algorithm="none"), backend="eager")(*leaves())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shared", [True, False])
def test_batches_of_calls_are_one_call_with_the_algorithm(
    op: Op, shared: bool, computed: list[tuple[str, dict[str, Any]]]
) -> None:
    x, w = (torch.stack([t, -2 * t]).detach() for t in leaves())
    w = w[0] if shared else w
    torch.vmap(lambda x, w: getattr(bridge, op)(x, w, algorithm="base"), in_dims=(0, None if shared else 0))(x, w)
    assert [(name, keywords["algorithm"]) for name, keywords in computed] == [(op, "base")]


def test_modes_see_the_algorithm() -> None:
    x, w = leaves()
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is bridge.conv1d:
                seen.append((kwargs or {}).get("algorithm"))
            return func(*args, **(kwargs or {}))

    with Recorder() as recorder, Mode():
        y = bridge.conv1d(x, w, algorithm="base")
    assert (seen, recorder.names) == (["base"], ["conv1d"])
    assert torch.equal(y, bridge.conv1d(x, w))
    assert torch.equal(y.detach(), torch.from_numpy(gpuconv.conv1d(x.detach().numpy(), w.detach().numpy())))
