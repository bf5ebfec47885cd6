"""Padding that means samples, on NumPy arrays: against PyTorch, by the bound, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gpuconv
from gpuconv import cases, grad, nn, reference
from gpuconv.edge import PADDING_MODES, edge_windows, most_positions, padded_samples, source_indices
from gpuconv.explain import explain
from gpuconv.problem import ArraySpec, ConvProblem, WeightGradientProblem

Array = npt.NDArray[Any]

MODES = PADDING_MODES[1:]
NUMPY_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap", "symmetric": "symmetric"}
ROW = list(range(5))


@pytest.mark.parametrize("mode", MODES)
def test_source_indices_are_what_numpy_pads(mode: str) -> None:
    for L in (1, 2, 5):
        most = {"reflect": L - 1, "replicate": 3 * L}.get(mode, L)
        for left in range(most + 1):
            for right in range(most + 1):
                padded = np.pad(np.arange(L), (left, right), NUMPY_MODES[mode])  # type: ignore[call-overload]
                assert source_indices(mode, -left, L + right, L).tolist() == padded.tolist()
                outside = {*padded[:left].tolist(), *padded[left + L :].tolist()}
                first, second = padded_samples(mode, left, right, L)
                assert sorted([*first, *second]) == sorted(outside)
                assert max(np.bincount(padded)) <= most_positions(mode, left, right, L)


def test_windows_at_the_edges() -> None:
    for L, K, stride, dilation, left, right in np.ndindex(7, 4, 3, 3, 5, 5):
        span = dilation * K + 1 + K  # the dilation is dilation + 1, and there are K + 1 taps
        padded = L + 1 + left + right
        if span > padded:
            continue
        count = (padded - span) // (stride + 1) + 1
        starts = np.arange(count) * (stride + 1) - left
        expected = [int(np.sum(starts < 0)), int(np.sum((starts >= 0) & (starts + span > L + 1)))]
        assert list(edge_windows(count, L + 1, K + 1, stride + 1, left, dilation + 1)) == expected


def problems(count: int, seed: int, dtypes: tuple[str, ...]) -> Iterator[ConvProblem]:
    """Random problems in all modes, with paddings up to what each allows and the more often short rows."""
    rng = np.random.default_rng(seed)
    found = 0
    while found < count:
        mode = MODES[found % len(MODES)]
        groups, C_in_g, C_out_g = (int(rng.choice([1, 1, 2, 3])) for _ in range(3))
        L = int(rng.integers(1, 40))
        most = {"reflect": L - 1, "replicate": 2 * L}.get(mode, L)
        padding: Any = tuple(map(int, rng.integers(0, most + 1, 2)))
        if rng.random() < 0.3:
            padding = ("same", "causal", "valid", int(padding[0]))[int(rng.integers(4))]
        dtype = dtypes[found % len(dtypes)]
        shapes = (int(rng.integers(1, 4)), groups * C_in_g, L), (groups * C_out_g, C_in_g, int(rng.integers(1, 14)))
        x, w = (ArraySpec(shape, dtype) for shape in shapes)
        bias = ArraySpec((groups * C_out_g,), dtype) if rng.random() < 0.5 else None
        stride, dilation = map(int, rng.integers(1, 5, 2))
        try:
            yield ConvProblem.conv1d(x, w, bias, stride, padding, dilation, groups, padding_mode=mode)
        except ValueError:  # a window longer than the row with its padding, or a padding that the mode refuses
            continue
        found += 1


def assert_right(sums: reference.Sums, output: Array, what: object) -> None:
    found = sums.compare(output)
    assert found.right.all(), (str(what), found.worst)


def test_random_problems_lie_within_the_bound() -> None:
    for p in problems(300, 1, ("float32", "float16", "float64", "complex64", "bfloat16")):
        x, w, b = cases.random_data(p, 2)
        settings = cases.call_settings(p)
        assert settings.get("padding_mode") == p.padding_mode
        assert_right(reference.convolution(p, x, w, b), gpuconv.conv1d(x, w, b, **settings), p)
        u, q = cases.random_grad_output(p, 3), WeightGradientProblem.of(p)
        grad_x = grad.conv1d_input(x.shape, w, u, **settings)
        assert_right(reference.input_gradient(p, w, u), grad_x, p)
        grad_w = grad.conv1d_weight(x, w.shape, u, **settings)
        assert_right(reference.weight_gradient(q, *q.sides(x, u)), grad_w, p)


@pytest.mark.torch
@pytest.mark.usefixtures("one_torch_thread")
def test_the_reference_is_pytorch_on_padded_copies() -> None:
    import torch

    for p in problems(300, 4, ("float64", "complex128")):
        data, u = cases.random_data(p, 5), torch.from_numpy(cases.random_grad_output(p, 6))
        x, w = (torch.from_numpy(array).requires_grad_() for array in data[:2])
        b = None if data.bias is None else torch.from_numpy(data.bias)
        padded = x
        if p.padding_mode == "symmetric":  # PyTorch has no name for it
            at = np.pad(np.arange(p.L_in), p.padding, "symmetric")
            padded = x[..., torch.from_numpy(at)]
        elif any(p.padding):
            padded = torch.nn.functional.pad(x, p.padding, p.padding_mode)
        y = torch.nn.functional.conv1d(padded, w, b, p.stride, 0, p.dilation, p.groups)
        grad_x, grad_w = torch.autograd.grad(y, (x, w), u)
        q = WeightGradientProblem.of(p)
        arrays = data.input, data.weight, u.numpy()
        for sums, expected in (
            (reference.convolution(p, *data), y.detach()),
            (reference.input_gradient(p, arrays[1], arrays[2]), grad_x),
            (reference.convolution(p.adjoint(), arrays[2], arrays[1].conj()), grad_x),
            (reference.weight_gradient(q, *q.sides(arrays[0], arrays[2])), grad_w),
        ):
            np.testing.assert_allclose(sums.exact(), expected.numpy(), rtol=1e-12, atol=1e-11, err_msg=str(p))


def test_the_adjoint_is_exact_on_integers() -> None:
    for found in problems(60, 7, ("float32",)):
        p = replace(found, has_bias=False)
        rng = np.random.default_rng(8)
        x, w, u = (
            rng.integers(-3, 4, shape).astype(np.float32) for shape in (p.input_shape, p.weight_shape, p.output_shape)
        )
        settings = cases.call_settings(p)
        y = gpuconv.conv1d(x, w, **settings)
        left = np.sum(y.astype(np.float64) * u)
        assert left == np.sum(grad.conv1d_input(x.shape, w, u, **settings).astype(np.float64) * x)
        assert left == np.sum(grad.conv1d_weight(x, w.shape, u, **settings).astype(np.float64) * w)


@pytest.mark.parametrize("mode", MODES)
def test_rounding_happens_once(mode: str) -> None:
    """Sums at the edges of float16 data that overflow it on the way, or that lose what is added late."""
    x = np.full((1, 1, 6), 40_000, np.float16)
    w = np.array([[[1, 1, -1, -1, 0.5]]], np.float16)
    y = gpuconv.conv1d(x, w, padding=2, padding_mode=mode)
    assert y.tolist() == [[[20_000] * 6]]
    u = np.array([[[0, 60_000, 0, 0, 60_000, 0]]], np.float16)
    p = ConvProblem.conv1d(x, w, padding=2, padding_mode=mode)
    exact = reference.input_gradient(p, w, u).exact()
    with np.errstate(over="ignore"):
        expected = exact.astype(np.float16)
    assert np.array_equal(grad.conv1d_input(x.shape, w, u, padding=2, padding_mode=mode), expected)


@pytest.mark.parametrize(
    ("mode", "padding", "message"),
    [
        (
            "reflect",
            5,
            r"conv1d: padding must be below L_in = 5 on both sides for padding_mode \"reflect\", got \(5, 5\)",
        ),
        ("reflect", (0, 7), r"conv1d: padding must be below L_in = 5 .* got \(0, 7\)"),
        ("circular", (6, 0), r"conv1d: padding must be at most L_in = 5 on both sides .*\"circular\", got \(6, 0\)"),
        ("symmetric", (2, 6), r"conv1d: padding must be at most L_in = 5 .*\"symmetric\", got \(2, 6\)"),
        ("wrap", 1, r"conv1d: padding_mode must be one of .*\"zeros\".*\"symmetric\", got 'wrap'"),
        (None, 1, "conv1d: padding_mode must be one of .* got None"),
        (["reflect"], 1, "conv1d: padding_mode must be one of .* got"),
    ],
)
def test_what_is_refused(mode: Any, padding: Any, message: str) -> None:
    x, w = np.ones((1, 2, 5)), np.ones((3, 2, 3))
    with pytest.raises(ValueError, match=message):
        gpuconv.conv1d(x, w, padding=padding, padding_mode=mode)
    for call in (
        lambda: grad.conv1d_input(x.shape, w, x, padding=padding, padding_mode=mode),
        lambda: grad.conv1d_weight(x, w.shape, x, padding=padding, padding_mode=mode),
    ):
        with pytest.raises(ValueError, match=message.replace("conv1d", "conv1d_[a-z]*")):
            call()


def test_replicate_needs_a_sample() -> None:
    with pytest.raises(ValueError, match='input must have samples for padding_mode "replicate", got L_in = 0'):
        gpuconv.conv1d(np.ones((1, 2, 0)), np.ones((3, 2, 3)), padding=2, padding_mode="replicate")
    assert gpuconv.conv1d(np.ones((0, 2, 4)), np.ones((3, 2, 3)), padding=2, padding_mode="replicate").shape == (
        0,
        3,
        6,
    )


def test_transposed_convolutions_point_at_the_adjoint() -> None:
    x, w = np.ones((1, 2, 5)), np.ones((2, 3, 3))
    assert gpuconv.conv_transpose1d(x, w, padding_mode="zeros").shape == (1, 3, 7)
    message = r'padding_mode must be "zeros", got \'reflect\'; .* gpuconv\.grad\.conv1d_input\(.*"reflect"\)'
    with pytest.raises(ValueError, match=f"^conv_transpose1d: {message}"):
        gpuconv.conv_transpose1d(x, w, padding_mode="reflect")
    with pytest.raises(ValueError, match=f"^ConvTranspose1d: {message}"):
        nn.ConvTranspose1d(2, 3, 3, padding_mode="reflect")
    with pytest.raises(ValueError, match=f"^conv_transpose1d: {message}"):
        explain("conv_transpose1d", x, w, padding_mode="reflect")


def test_layers_have_the_mode() -> None:
    layer = nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular", rng=0, dtype="float64")
    assert layer.padding_mode == "circular"
    assert "padding_mode=circular" in repr(layer)
    x = np.random.default_rng(0).standard_normal((2, 2, 9))
    padded = np.concatenate((x[..., -1:], x, x[..., :2]), axis=-1)
    np.testing.assert_allclose(layer(x), gpuconv.conv1d(padded, layer.weight, layer.bias), rtol=1e-12)


def test_no_copy_of_the_input() -> None:
    """What is allocated beside the output does not grow with the input."""
    import tracemalloc

    x, w = np.ones((1, 4, 400_000), np.float32), np.ones((4, 4, 5), np.float32)
    peaks = []
    for mode in ("zeros", "reflect"):
        out = np.empty_like(x)
        gpuconv.conv1d(x, w, padding=2, padding_mode=mode, out=out)
        tracemalloc.start()
        gpuconv.conv1d(x, w, padding=2, padding_mode=mode, out=out)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 100_000


def test_explanations_name_the_mode_and_what_follows() -> None:
    x, w = ArraySpec((8, 1, 16_000), "float32"), ArraySpec((32, 1, 7), "float32")
    found = explain("conv1d", x, w, padding=3, padding_mode="reflect", device="sm_90")
    assert "padding_mode reflect" in str(found)
    assert "conv1d_edges" in str(found)
    assert found.to_dict()["problem"]["padding_mode"] == "reflect"
    assert [step["kernel"] for step in found.to_dict()["kernel"]["steps"]][-1] == "conv1d_edges"
    back = explain("conv1d", x, w, padding=3, padding_mode="reflect", device="sm_90", direction="grad_input")
    assert back.choice is not None
    assert back.choice.plan.steps[-1].config.kernel == "conv_transpose1d_fold"
    dense = [ArraySpec(shape, "float16") for shape in ((8, 64, 4000), (64, 64, 7))]
    found = explain("conv1d", *dense, padding=3, padding_mode="circular", device="sm_90")
    assert found.choice is not None
    assert found.choice.family == "conv1d_mma"
    assert dict(found.choice.config.macros)["PADDING_MODE"] == "circular"
    on_cpu = explain("conv1d", x, w, padding=3, padding_mode="reflect", device="cpu")
    assert on_cpu.method is not None
    assert "the edges apart" in on_cpu.method.reason


def test_the_case_table_has_every_mode() -> None:
    assert {case.problem.padding_mode for case in cases.CASES} == set(PADDING_MODES)
