"""Padding that means samples, of tensors: values and derivatives against PyTorch's padded copies, and `patch`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import NO_TORCH

pytest.importorskip("torch", reason=NO_TORCH)

import torch
from torch import nn
from torch.func import jvp, vmap
from torch.nn import functional

from gpuconv import torch as bridge
from gpuconv.edge import PADDING_MODES, source_indices
from gpuconv.problem import ConvProblem
from gpuconv.torch import functions
from gpuconv.torch.tensors import specs
from tests.torch.test_torch_bridge import compiler

__all__ = ["compiler"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_torch_thread")

MODES = PADDING_MODES[1:]
OF_PYTORCH = ("reflect", "replicate", "circular")


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def padded(mode: str, x: torch.Tensor, left: int, right: int) -> torch.Tensor:
    at = source_indices(mode, -left, x.shape[-1] + right, x.shape[-1])
    return x[..., torch.from_numpy(at)]


@pytest.mark.parametrize("mode", MODES)
def test_derivatives(mode: str) -> None:
    """First and second derivatives, in both modes, agree with PyTorch's on a padded copy."""
    x, w, b = tensors((2, 4, 9), (6, 2, 3), (6,))
    settings = {"stride": 2, "padding": (4, 3), "dilation": 2, "groups": 2, "padding_mode": mode}

    def ours(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return bridge.conv1d(x, w, b, **settings)  # type: ignore[arg-type]

    def theirs(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return functional.conv1d(padded(mode, x, 4, 3), w, b, 2, 0, 2, 2)

    results = []
    for function in (ours, theirs):
        y = function(x, w, b)
        first = torch.autograd.grad(y.square().sum(), (x, w, b), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, b))
        _, along = jvp(function, (x, w, b), (x.detach() + 1, w.detach() - 1, b.detach()))
        results.append([y, *first, *second, along])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)
    assert torch.autograd.gradcheck(ours, (x, w, b), check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_vmap(mode: str) -> None:
    x, w = tensors((3, 2, 4, 9), (3, 6, 4, 3))
    for dims in ((0, 0), (0, None), (None, 0)):
        given = [tensor if dim == 0 else tensor[0] for tensor, dim in zip((x, w), dims, strict=True)]

        def one(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return bridge.conv1d(x, w, padding=3, padding_mode=mode)

        found = vmap(one, in_dims=dims)(*given)
        parts = [one(*(t[i] if dim == 0 else t for t, dim in zip(given, dims, strict=True))) for i in range(3)]
        torch.testing.assert_close(found, torch.stack(parts))


@pytest.mark.parametrize("mode", OF_PYTORCH)
@pytest.mark.parametrize("padding", [3, "same", "valid"])
def test_patched_layers_pad_no_copy(mode: str, padding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv1d(3, 4, 6, padding=padding, padding_mode=mode, dilation=2).double()
    (x,) = tensors((2, 3, 17))
    expected = layer(x)
    gradients = torch.autograd.grad(expected.sum(), (x, *layer.parameters()))
    with bridge.patch(strict=True):
        monkeypatch.setattr(functional, "pad", None)  # whoever calls it fails
        y = layer(x)
        monkeypatch.undo()
        found = torch.autograd.grad(y.sum(), (x, *layer.parameters()))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found, gradients)


def test_patched_layers_are_compiled(compiler: Callable[..., Any]) -> None:
    layer = nn.Conv1d(3, 4, 6, padding=3, padding_mode="reflect").double()
    compiled, (x,) = compiler(layer, backend="eager", fullgraph=True), tensors((2, 3, 17))
    torch.testing.assert_close(compiled(x), layer(x))
    with bridge.patch():
        torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_exporters_get_pytorchs_functions(mode: str) -> None:
    x, w, b = tensors((2, 3, 9), (4, 3, 3), (4,))
    for padding in (2, (3, 1), "same"):
        problem = ConvProblem.conv1d(*specs(x, w, b), padding=padding, padding_mode=mode)  # type: ignore[arg-type]
        settings = functions._checked("conv1d", 1, padding, 1, 1)
        found = functions._as_pytorch("conv1d", settings, x, w, b, mode)
        torch.testing.assert_close(found, bridge.conv1d(x, w, b, padding=padding, padding_mode=mode))
        assert found.shape == problem.output_shape


def test_what_is_refused() -> None:
    x, w = tensors((1, 3, 5), (3, 4, 3))
    with pytest.raises(ValueError, match=r"conv1d: padding must be below L_in = 5 on both sides"):
        bridge.conv1d(x, w.transpose(0, 1), padding=5, padding_mode="reflect")
    with pytest.raises(ValueError, match="padding_mode must be one of"):
        bridge.conv1d(x, w.transpose(0, 1), padding_mode="wrap")
    with pytest.raises(ValueError, match=r"gpuconv\.grad\.conv1d_input"):
        bridge.conv_transpose1d(x, w, padding_mode="reflect")
