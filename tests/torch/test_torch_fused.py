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
from torch.nn import functional

from gpuconv import reference
from gpuconv import torch as bridge
from gpuconv.fusion import FUSED_ARRAYS, Fused
from gpuconv.problem import ConvProblem, Op
from gpuconv.torch import tensors
from tests.torch.test_torch_bridge import OPS

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
    arrays = {n: tensors.numpy_array(a) for n, a in zip(FUSED_ARRAYS, given.arrays, strict=True) if a is not None}
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


def test_fake_tensors_and_autocast() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y = bridge.conv1d(torch.empty(2, 3, 9), torch.empty(4, 3, 2), activation="gelu", residual=torch.empty(2, 4, 8))
    assert y.shape == (2, 4, 8)
    x, w, r = torch.randn(2, 3, 9), torch.randn(4, 3, 2), torch.randn(2, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = bridge.conv1d(x, w, activation=("snake", torch.ones(4)), residual=r)
    assert y.dtype == torch.bfloat16
