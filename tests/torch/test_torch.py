"""The NumPy path, its gradients and the reference against PyTorch's CPU build in float64 and complex128."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests import NO_TORCH

pytest.importorskip("torch", reason=NO_TORCH)

import torch
from hypothesis import given, settings
from torch.nn import functional

import gpuconv
from gpuconv import grad, reference
from gpuconv.problem import ConvProblem, Op
from tests.api.test_grad import ARGUMENTS, expected, gradient, integers, problem_of, shape_of
from tests.strategies import Call, calls

Array = npt.NDArray[Any]
OPS: tuple[Op, ...] = ("conv1d", "conv_transpose1d")
PROBLEMS = 400  # random calls per operation; some come up twice
GRADIENT_PROBLEMS = 190
LAYOUTS = ("contiguous", "reversed", "transposed", "every second")

pytestmark = pytest.mark.torch


def laid_out(array: Array | None, layout: str) -> Array | None:
    """The same values at other places in memory."""
    if array is None or layout == "contiguous":
        return array
    if layout == "reversed":
        return array[..., ::-1].copy()[..., ::-1]
    if layout == "transposed":
        return array.T.copy().T
    doubled = np.full((*array.shape[:-1], 2 * array.shape[-1]), 77, array.dtype)
    doubled[..., ::2] = array
    return doubled[..., ::2]


def in_torch(call: Call, x: Array, w: Array, b: Array | None) -> Array:
    """PyTorch's result in float64 or complex128."""
    return forward(call, *(None if a is None else as_tensor(a) for a in (x, w, b))).numpy()  # type: ignore[arg-type]


def as_tensor(array: Array) -> torch.Tensor:
    """A copy in float64 or complex128."""
    return torch.from_numpy(np.array(array, np.complex128 if np.iscomplexobj(array) else np.float64, order="C"))


def forward(call: Call, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """The call in PyTorch.

    Its own padding arguments are used where it has them; else the input is padded, or the output cut, beforehand.
    """
    s, d, groups = (call.settings[name] for name in ("stride", "dilation", "groups"))
    left, right, extra = (call.resolved[name] for name in ("padding_left", "padding_right", "output_padding"))
    padding = call.settings["padding"]
    if call.op == "conv1d":
        if padding == "valid" or (padding == "same" and s == 1):
            return functional.conv1d(x, w, b, s, padding, d, groups)
        if left == right:
            return functional.conv1d(x, w, b, s, left, d, groups)
        return functional.conv1d(functional.pad(x, (left, right)), w, b, s, 0, d, groups)
    if left == right:
        return functional.conv_transpose1d(x, w, b, s, left, extra, groups, d)
    y = functional.pad(functional.conv_transpose1d(x, w, None, s, 0, 0, groups, d), (0, extra))
    y = y[..., left : y.shape[-1] - right]
    return y if b is None else y + b[:, None]


def largest_ratio(error: Array, bound: Array) -> float:
    """The largest error in units of its bound, of real and imaginary parts alike; NaN counts as infinite."""
    assert error.shape == bound.shape
    with np.errstate(invalid="ignore"):
        ratios = [np.where(abs(part) == 0, 0, abs(part) / bound) for part in (error.real, error.imag)]
    return float(np.nan_to_num(ratios, nan=np.inf).max(initial=0))


def check(call: Call, layouts: tuple[str, str, str] = ("contiguous",) * 3) -> None:
    """Both paths of the library agree with PyTorch as well as rounding permits."""
    x, w, b = (laid_out(a, layout) for a, layout in zip(call.arrays(), layouts, strict=True))
    assert x is not None
    assert w is not None
    p = call.problem()
    expected = in_torch(call, x, w, b)
    assert expected.shape == p.output_shape

    wide = expected.dtype
    magnitude = in_torch(call, *(None if a is None else abs(a.astype(wide)) for a in (x, w, b)))  # type: ignore[arg-type]
    n = p.terms * (2 if p.is_complex else 1)
    # One summation in float64; PyTorch makes three real products of a complex one, with sums of the parts as factors.
    summation = (n + 4) * 2.0**-53 * magnitude.real
    torch_error = (3 if p.is_complex else 1) * summation
    assert largest_ratio(reference.compute(p, x, w, b) - expected, summation + torch_error) <= 1

    function = gpuconv.conv1d if call.op == "conv1d" else gpuconv.conv_transpose1d
    y = function(x, w, b, **call.settings)
    assert y.dtype == x.dtype
    assert y.shape == p.output_shape
    bound = reference.error_bound(p, x, w, b, exact=expected)
    if p.is_complex:
        bound = bound + torch_error
    assert largest_ratio(y.astype(wide) - expected, bound) <= 1


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("op", OPS)
def test_random_problems(op: Op) -> None:
    seen: set[ConvProblem] = set()

    @settings(max_examples=PROBLEMS)
    @given(call=calls(op))
    def run(call: Call) -> None:
        chosen = np.random.default_rng(call.seed).choice(LAYOUTS, 3)
        check(call, tuple(map(str, chosen)))
        seen.add(call.problem())

    run()
    assert len(seen) >= 250


def large(op: Op, dtype: str, groups: int, shape: tuple[int, ...], K: int, C_out: int, **given: Any) -> Call:
    """A problem of symmetrical padding; `shape` is the input's."""
    settings = {"stride": 1, "padding": 0, "dilation": 1, "groups": groups, **given}
    resolved = {
        "padding_left": settings["padding"],
        "padding_right": settings["padding"],
        "output_padding": settings.get("output_padding", 0),
    }
    C_in = shape[1]
    weight_shape = (C_out, C_in // groups, K) if op == "conv1d" else (C_in, C_out // groups, K)
    return Call(op, shape, weight_shape, True, dtype, settings, resolved, seed=K)


LARGE = [
    large("conv1d", "float32", 1, (2, 96, 700), 7, 128, padding=9, dilation=3),
    large("conv1d", "float32", 1, (1, 1, 16000), 400, 40, stride=160),
    large("conv1d", "float32", 64, (3, 64, 900), 31, 64, padding=15),
    large("conv1d", "float16", 4, (1, 64, 1500), 5, 96, stride=2, padding=2),
    large("conv1d", "complex64", 1, (2, 24, 400), 9, 32, padding=4),
    large("conv1d", "float64", 1, (1, 3, 20000), 101, 2, padding=50),
    large("conv_transpose1d", "float32", 1, (1, 96, 300), 16, 48, stride=8, padding=4),
    large("conv_transpose1d", "float32", 64, (2, 64, 500), 4, 64, stride=2, padding=1),
    large("conv_transpose1d", "bfloat16", 1, (1, 64, 300), 11, 32, stride=5, padding=3, output_padding=2),
    large("conv_transpose1d", "float64", 2, (1, 16, 500), 9, 24, stride=3, dilation=2, padding=5),
]


@pytest.mark.parametrize("call", LARGE, ids=lambda call: str(call.problem()))
def test_large_problems(call: Call) -> None:
    """Long enough for every block of the NumPy path to have neighbours."""
    check(call)


def test_empty_batch() -> None:
    for op in OPS:
        check(large(op, "float32", 2, (0, 4, 20), 3, 6, stride=2))


def check_gradients(call: Call, layouts: tuple[str, str, str]) -> None:
    """All gradients agree with PyTorch's autograd in float64 as well as rounding permits."""
    p = call.problem()
    x, w, _ = call.arrays()
    assert x is not None
    assert w is not None
    rng = np.random.default_rng(call.seed + 1)
    u = rng.standard_normal(p.output_shape)
    if p.is_complex:
        u = u + 1j * rng.standard_normal(p.output_shape)
    x, w, u = (laid_out(a, layout) for a, layout in zip((x, w, u.astype(x.dtype)), layouts, strict=True))

    leaves = [as_tensor(a).requires_grad_() for a in (x, w, np.zeros(p.C_out, x.dtype))]
    torch_gradients = torch.autograd.grad(forward(call, *leaves), leaves, as_tensor(u))
    for argument, from_torch in zip(ARGUMENTS, torch_gradients, strict=True):
        sums = expected(argument, p, x, w, u)
        y = gradient(argument, p, x, w, u, **call.settings)
        assert y.dtype == x.dtype
        assert y.shape == shape_of(argument, p)
        bound = sums.error_bound(from_torch.numpy())
        if p.is_complex:  # PyTorch makes three real products of a complex one, with sums of the parts as factors
            magnitude = sums.evaluate(abs(sums.left), abs(sums.right), None).real
            bound = bound + 3 * (2 * sums.terms + 4) * 2.0**-53 * magnitude
        assert largest_ratio(y.astype(from_torch.numpy().dtype) - from_torch.numpy(), bound) <= 1


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("op", OPS)
def test_random_problems_against_autograd(op: Op) -> None:
    seen: set[ConvProblem] = set()

    @settings(max_examples=GRADIENT_PROBLEMS)
    @given(call=calls(op))
    def run(call: Call) -> None:
        chosen = np.random.default_rng(call.seed).choice(LAYOUTS, 3)
        check_gradients(call, tuple(map(str, chosen)))  # type: ignore[arg-type]
        seen.add(call.problem())

    run()
    assert len(seen) >= 150


def test_the_names_of_torch_nn_grad() -> None:
    """If PyTorch has such a function, the arguments are in the same order."""
    x, w, u = (a.astype(np.float64) for a in integers(problem_of("conv1d", stride=2, padding=1, dilation=2)))
    for ours, theirs, first, second in (
        (grad.conv1d_input, torch.nn.grad.conv1d_input, x.shape, w),
        (grad.conv1d_weight, torch.nn.grad.conv1d_weight, x, w.shape),
    ):
        in_torch = (torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in (first, second, u))
        result = ours(first, second, u, 2, 1, 2, 2)  # type: ignore[operator]
        np.testing.assert_array_equal(result, theirs(*in_torch, 2, 1, 2, 2).numpy())
