"""What `gpuconv.torch` fuses, against PyTorch's own functions one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests import NO_TORCH

pytest.importorskip("torch", reason=NO_TORCH)

import torch
from torch.autograd import forward_ad
from torch.func import vmap
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from gpuconv import reference
from gpuconv import torch as bridge
from gpuconv.fusion import Fused
from gpuconv.problem import ConvProblem, Op
from gpuconv.torch import tensors
from tests.torch.test_torch_bridge import OPS, compiler

__all__ = ["compiler"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_torch_thread")

Function = Callable[[torch.Tensor], torch.Tensor]


def snake(alpha: torch.Tensor, beta: torch.Tensor) -> Function:
    return lambda x: x + torch.sin(alpha[:, None] * x).square() / beta[:, None]


def activations(channels: int, rng: np.random.Generator, dtype: torch.dtype) -> list[tuple[Any, Function]]:
    """Every activation as gpuconv and as PyTorch in float64 take it, with parameters drawn at random."""
    slope, scale = (float(v) for v in rng.uniform(-1.5, 1.5, 2))
    alpha, beta = (torch.from_numpy(rng.uniform(0.3, 2, channels)).to(dtype) for _ in range(2))
    wide, wide_beta = alpha.double(), beta.double()
    return [
        (None, lambda x: x),
        ("relu", functional.relu),
        ("leaky_relu", functional.leaky_relu),
        (("leaky_relu", slope), lambda x: functional.leaky_relu(x, slope)),
        ("elu", functional.elu),
        (("elu", scale), lambda x: functional.elu(x, scale)),
        ("silu", functional.silu),
        ("gelu", functional.gelu),
        (("gelu", "tanh"), lambda x: functional.gelu(x, approximate="tanh")),
        ("tanh", torch.tanh),
        ("sigmoid", torch.sigmoid),
        (("snake", alpha), snake(wide, wide)),
        (("snake", alpha, beta), snake(wide, wide_beta)),
    ]


@pytest.mark.parametrize("seed", range(300))
def test_random_problems_against_pytorch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    op: Op = OPS[seed % 2]
    dtype = (torch.float16, torch.bfloat16, torch.float32, torch.float64)[seed // 2 % 4]
    groups, N, K = (int(rng.integers(1, high)) for high in (4, 4, 6))
    C_in, C_out = (groups * int(rng.integers(1, 9)) for _ in range(2))
    L = int(rng.integers(K * 3, 60))
    shape = (C_in, C_out // groups, K) if op == "conv_transpose1d" else (C_out, C_in // groups, K)
    settings = {"stride": int(rng.integers(1, 4)), "padding": int(rng.integers(0, K)), "groups": groups}
    settings["dilation"] = int(rng.integers(1, 3))
    x, w, b = (torch.from_numpy(rng.standard_normal(s)).to(dtype) for s in ((N, C_in, L), shape, (C_out,)))
    if rng.random() < 0.2:
        x = x[0]
    bias = b if rng.random() < 0.7 else None

    outer, before = activations(C_out, rng, dtype), activations(C_in, rng, dtype)
    activation, after = outer[int(rng.integers(len(outer)))]
    input_activation, first = before[int(rng.integers(len(before)))] if rng.random() < 0.5 else before[0]
    plain = getattr(functional, op)
    exact = plain(first(x.double()), w.double(), None if bias is None else bias.double(), **settings)
    residual = torch.from_numpy(rng.standard_normal(exact.shape)).to(dtype) if rng.random() < 0.6 else None
    exact = after(exact if residual is None else exact + residual.double())

    fuse = {"activation": activation, "input_activation": input_activation, "residual": residual}
    output = getattr(bridge, op)(x, w, bias, **settings, **fuse)
    given = Fused.check(op, activation, input_activation, residual)
    specs = tensors.specs(x, w, bias)
    problem: ConvProblem = getattr(ConvProblem, op)(*specs, **settings).fused(
        Fused(given.fusion, tensors.specs(*given.arrays))
    )
    arrays = {name: tensors.numpy_array(tensor) for name, tensor in given.given.items()}
    data = [None if t is None else tensors.numpy_array(t) for t in (x, w, bias)]
    sums = reference.convolution(problem, data[0], data[1], data[2], arrays)  # type: ignore[arg-type]
    assert sums.within_bound(tensors.numpy_array(output)).all()
    assert sums.within_bound(exact.numpy()).all()  # PyTorch, not rounded


@pytest.mark.parametrize("op", OPS)
def test_there_are_no_derivatives_of_what_is_fused(op: Op) -> None:
    x, w = torch.randn(2, 3, 9), torch.randn(3, 3, 2)
    function = getattr(bridge, op)
    message = rf"^{op}: what is fused \(relu\) has no derivatives"
    with pytest.raises(RuntimeError, match=message):
        function(x.clone().requires_grad_(), w, activation="relu")
    with pytest.raises(RuntimeError, match=rf"^{op}: what is fused \(residual\)"):
        function(x, w, residual=torch.zeros_like(function(x, w)).requires_grad_())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        function(forward_ad.make_dual(x, x), w, activation="relu")
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda x: function(x, w, activation="relu").sum())(x)
    with torch.no_grad():
        function(x.requires_grad_(), w, activation="relu")


@pytest.mark.parametrize("op", OPS)
def test_what_does_not_fit_is_refused_by_name(op: Op) -> None:
    x, w = torch.randn(2, 3, 9), torch.randn(3, 3, 2)
    function = getattr(bridge, op)
    with pytest.raises(TypeError, match=rf"^{op}: residual must be a torch.Tensor, got ndarray; for NumPy"):
        function(x, w, residual=np.zeros((2, 3, 8), np.float32))
    with pytest.raises(TypeError, match=rf"^{op}: activation_alpha must be a torch.Tensor, got ndarray"):
        function(x, w, activation=("snake", np.ones(3, np.float32)))
    with pytest.raises(ValueError, match=rf"^{op}: residual must have shape "):
        function(x, w, residual=torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=rf"^{op}: activation must be one of relu, .*, got 'mish'"):
        function(x, w, activation="mish")


Tensors = dict[str, torch.Tensor]


def everything_fused(op: Op) -> tuple[Callable[..., torch.Tensor], Tensors]:
    """A call that fuses all that there is, and its tensors."""
    generator = torch.Generator().manual_seed(0)
    weight, L_out = ((6, 2, 3), 5) if op == "conv1d" else ((4, 3, 3), 17)
    shapes = {"x": (7, 4, 9), "w": weight, "b": (6,), "residual": (7, 6, L_out)}
    shapes |= {"alpha": (6,), "beta": (6,), "first": (4,)}

    def call(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, residual: torch.Tensor, *of_snake: torch.Tensor) -> Any:
        alpha, beta, first = of_snake
        return getattr(bridge, op)(
            x, w, b, stride=2, padding=1, groups=2, activation=("snake", alpha, beta),
            input_activation=("snake", first), residual=residual,
        )  # fmt: skip

    return call, {name: torch.rand(s, dtype=torch.float64, generator=generator) + 0.2 for name, s in shapes.items()}


@pytest.mark.parametrize("op", OPS)
def test_vmap(op: Op) -> None:
    """It maps one tensor, several or all, along various axes, for batches of samples and for single ones."""
    call, given = everything_fused(op)
    B = 3
    for is_single in (False, True):
        each = {name: t[0] if is_single and name in ("x", "residual") else t for name, t in given.items()}
        axes = {name: number % (t.dim() + 1) for number, (name, t) in enumerate(each.items())}
        batches = {name: torch.stack([t * (i + 1) / B for i in range(B)], axes[name]) for name, t in each.items()}
        for names in ([*given], ["x", "residual"], *([name] for name in given)):
            dims = tuple(axes[name] if name in names else None for name in given)
            chosen = [batches[name] if name in names else t for name, t in each.items()]
            calls = (
                call(*(t if d is None else t.select(d, i) for t, d in zip(chosen, dims, strict=True))) for i in range(B)
            )
            found = vmap(call, in_dims=dims)(*chosen)
            torch.testing.assert_close(found, torch.stack([*calls]), rtol=1e-12, atol=1e-12)
    twice = vmap(vmap(call, in_dims=(0, *[None] * 6)), in_dims=(None, 0, *[None] * 5))
    x, w, *rest = given.values()
    found = twice(torch.stack([x, -x]), torch.stack([w, 2 * w]), *rest)
    torch.testing.assert_close(found[1, 1], call(-x, 2 * w, *rest), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_compile_and_what_tracing_needs(op: Op, compiler: Callable[..., Any]) -> None:
    call, given = everything_fused(op)
    tensors_of = [*given.values()]
    operator = getattr(torch.ops.gpuconv, f"{op}_fused").default
    seen: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = compiler(call, backend=backend)
    assert torch.equal(compiled(*tensors_of), call(*tensors_of))
    assert seen == [operator]
    torch.compiler.reset()
    compiled = compiler(call, backend="aot_eager", dynamic=True)
    for repeat in (1, 2, 3):  # samples
        more = [t.repeat(repeat, 1, 1) if name in ("x", "residual") else t for name, t in given.items()]
        assert torch.equal(compiled(*more), call(*more))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    with pytest.raises(Exception, match="has no derivatives"):
        compiled(tensors_of[0].clone().requires_grad_(), *tensors_of[1:])
    assert call(*(t.to("meta") for t in tensors_of)).shape == call(*tensors_of).shape
    counts = []
    for function in (call, lambda x, w, *_: getattr(functional, op)(x, w, None, 2, 1, groups=2)):
        with FlopCounterMode(display=False) as counter:
            function(*tensors_of)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_autocast() -> None:
    """All tensors are cast, as PyTorch casts those of a convolution; float64 stays."""
    call, given = everything_fused("conv1d")
    narrow = [t.float() for t in given.values()]
    with torch.autocast("cpu", torch.bfloat16):
        found, wide = call(*narrow), call(*given.values())
        compiled = torch.compile(call, backend="eager", fullgraph=True)(*narrow)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, call(*(t.to(torch.bfloat16) for t in narrow)))
    assert torch.equal(compiled, found)
    assert torch.equal(wide, call(*given.values()))
    torch.compiler.reset()


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y = bridge.conv1d(torch.empty(2, 3, 9), torch.empty(4, 3, 2), activation="gelu", residual=torch.empty(2, 4, 8))
    assert y.shape == (2, 4, 8)
