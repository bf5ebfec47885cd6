"""Samples with lengths of their own, of tensors: values and derivatives against calls on each sample alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import NO_TORCH

pytest.importorskip("torch", reason=NO_TORCH)

import torch
from torch.func import vmap

import gpuconv
from gpuconv import torch as bridge

pytestmark = pytest.mark.usefixtures("one_torch_thread")

Function = Callable[..., torch.Tensor]

# Function, settings, shape of the weight, lengths.
LAYERS: list[tuple[Function, dict[str, Any], tuple[int, ...], list[int]]] = [
    (bridge.conv1d, {"stride": 2, "padding": (1, 3), "dilation": 2}, (4, 3, 3), [9, 0, 7]),
    (bridge.conv1d, {"stride": 3, "padding": "same"}, (4, 3, 3), [9, 2, 7]),
    (bridge.conv1d, {"padding": 2, "padding_mode": "reflect"}, (4, 3, 3), [8, 3, 5]),
    (bridge.conv_transpose1d, {"stride": 2, "padding": 1, "output_padding": 1}, (3, 4, 3), [6, 0, 4]),
]


def tensors(weight: tuple[int, ...], L: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 3, L), weight, (4,))
    x, w, b = (torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes)
    return x, w, b


@pytest.mark.parametrize(("function", "settings", "weight", "lengths"), LAYERS)
def test_values_and_derivatives(
    function: Function, settings: dict[str, Any], weight: tuple[int, ...], lengths: list[int]
) -> None:
    x, w, b = tensors(weight, max(lengths))
    more = {name: settings[name] for name in ("stride", "padding", "dilation", "output_padding") if name in settings}
    L_out = gpuconv.output_lengths(lengths, 3, **more, transposed=function is bridge.conv_transpose1d).tolist()

    def convolve(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return function(x, w, b, **settings, lengths=lengths)

    y = function(x, w, b, **settings, lengths=torch.tensor(lengths))
    u = torch.randn_like(y)
    loss = torch.zeros((), dtype=torch.float64)
    for n, (length, wanted) in enumerate(zip(lengths, L_out, strict=True)):
        assert not y[n, :, wanted:].any()
        if wanted:
            alone = function(x[n, :, :length], w, b, **settings)
            torch.testing.assert_close(y[n, :, :wanted], alone)
            loss = loss + (alone * u[n, :, :wanted]).sum()
    expected = torch.autograd.grad(loss, (x, w, b))
    torch.testing.assert_close(torch.autograd.grad((y * u).sum(), (x, w, b), retain_graph=True), expected)

    assert torch.autograd.gradcheck(convolve, (x, w, b), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(convolve, (x, w, b), fast_mode=True)
    torch.testing.assert_close(vmap(lambda x: convolve(x, w, b))(torch.stack([x, 2 * x]))[0], y)
    torch.testing.assert_close(vmap(lambda w: convolve(x, w, b))(torch.stack([w, 2 * w]))[0], y)
    # The rules of the operators for the gradients, and of that for a bias.
    gradient = vmap(lambda u: torch.autograd.grad(y, (x, w, b), u, retain_graph=True))
    torch.testing.assert_close([g[0] for g in gradient(torch.stack([u, 2 * u]))], list(expected))
    fused = function(x.detach(), w.detach(), b.detach(), **settings, lengths=lengths, activation="relu")
    torch.testing.assert_close(fused, y.detach().relu())


def test_compiled_programs_hold_the_lengths() -> None:
    x, w, _ = tensors((4, 3, 3), 6)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return bridge.conv1d(x, w, lengths=[6, 2, 4])

    y, expected = compiled(x, w), bridge.conv1d(x, w, lengths=(6, 2, 4))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), w), torch.autograd.grad(expected.sum(), w))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1, 2], r"lengths must have shape \(N,\) = \(3,\), got \(2,\)"),
        ([1, 2, 7], r"lengths must be from 0 to L_in = 6, got lengths\[2\] = 7"),
        (torch.tensor([1.0, 2, 3]), r"lengths must be \(N,\) integers, got torch.float32 of 1 dimensions"),
        ([1, True, 3], r"lengths\[1\] must be an int, got the bool True"),
    ],
)
def test_bad_lengths(lengths: Any, message: str) -> None:
    x, w, b = tensors((4, 3, 3), 6)
    with pytest.raises((TypeError, ValueError), match=f"^conv1d: {message}"):
        bridge.conv1d(x, w, b, lengths=lengths)
