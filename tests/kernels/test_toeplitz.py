"""Depthwise layers with many taps on tensor cores: bits that depend neither on the partition nor on the position."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuconv import cases, dispatch, reference
from gpuconv.cases import Data
from gpuconv.checks import same_bits
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.edge import PADDING_MODES
from gpuconv.families import ArrayLayout, Layout, conv1d_toeplitz
from gpuconv.families.base import contiguous_strides
from gpuconv.families.conv1d_toeplitz import MIN_TAPS, SHAPES, Conv1dToeplitz
from gpuconv.problem import ConvProblem, numpy_dtype
from tests import hostcuda
from tests.hostcuda import AMPERE, HOPPER, Program, TensorCores
from tests.plans import kernel_of, plan_of, refusal_of

Array = npt.NDArray[Any]

H200 = Device.from_arch("sm_90")
FAMILY = Conv1dToeplitz()
MODES = ("float16", "bfloat16", "tf32")

# Whole blocks of taps and others, rows at every alignment, several segments and groups, rows shorter than the taps.
PROBLEMS = {
    "whole blocks": ConvProblem(
        "conv1d", 2, 3, 6, 700, 128, padding_left=63, padding_right=64, groups=3, has_bias=True
    ),
    "odd": ConvProblem("conv1d", 3, 3, 3, 201, 131, padding_left=25, padding_right=70, groups=3, has_bias=True),
    "causal": ConvProblem("conv1d", 1, 2, 2, 1400, 510, padding_left=509, groups=2, has_bias=True),
    "short": ConvProblem("conv1d", 2, 4, 4, 24, 133, padding_left=66, padding_right=66, groups=4, has_bias=True),
}
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


def at(problem: ConvProblem, mode: str) -> ConvProblem:
    return cases.in_format(problem, mode)


def run(problem: ConvProblem, data: Data, **settings: Any) -> Array:
    return hostcuda.compute(problem, *data, family=FAMILY.name, **settings)


def assert_same_bits(output: Array, expected: Array, what: object) -> None:
    assert same_bits(output, expected).all(), what


def assert_right(problem: ConvProblem, output: Array, data: Data, what: object = None) -> None:
    good = reference.within_bound(problem, output, *data)
    assert good.all(), (what, str(problem), np.argwhere(~good)[0], output[~good][0])


@pytest.fixture(params=[AMPERE, HOPPER], ids=["Ampere", "Hopper"])
def rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TensorCores:
    """Tensor cores that add by the rule of each architecture, on whatever device."""
    monkeypatch.setattr(TensorCores, "of", staticmethod(lambda _: request.param))
    found: TensorCores = request.param
    return found


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    K=st.integers(1, 3000),
    channels=st.integers(1, 9),
    multiplier=st.integers(1, 9),
    stride=st.sampled_from((1, 1, 1, 2)),
    dilation=st.sampled_from((1, 1, 1, 2)),
    mode=st.sampled_from((*MODES, "float32")),
    arch=st.sampled_from(tuple(ARCHITECTURES)),
)
def test_the_layer_alone_decides_where_it_runs(
    K: int, channels: int, multiplier: int, stride: int, dilation: int, mode: str, arch: str
) -> None:
    device = Device.from_arch(arch)
    C_out, L_in = channels * multiplier, dilation * (K - 1) + 7
    layer = at(ConvProblem("conv1d", 1, channels, C_out, L_in, K, stride, 5, 0, dilation, channels), mode)
    reason = refusal_of(FAMILY, layer, Layout.contiguous(layer), device)
    is_taken = mode != "float32" and device.arch >= (75 if mode == "float16" else 80) and stride == dilation == 1
    assert (reason is None) == (is_taken and multiplier < 8 and MIN_TAPS[layer.itemsize] <= K)
    for N, longer in ((7, 0), (3, 100_000), (200, 17)):
        p = replace(layer, N=N, L_in=L_in + longer)
        assert refusal_of(FAMILY, p, Layout.contiguous(p), device) == reason
        if reason is None:
            choice = dispatch.choose(p, Layout.contiguous(p), device)
            assert choice is not None
            assert choice.family == FAMILY.name
            assert choice.launch.shared_bytes <= device.shared_per_block
            assert choice.config in set(FAMILY.configs(device))


@pytest.mark.parametrize("mode", MODES)
@every_problem
def test_every_partition_gives_the_same_bits(problem: ConvProblem, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From shared memory that was ready, and right."""
    p = at(problem, mode)
    data = cases.random_data(p, 4)
    expected = run(p, data)
    assert_right(p, expected, data)
    compare = conv1d_toeplitz.compare_partitions
    monkeypatch.setattr(Program, "of", Program.without_nan_fallback)
    for shape in SHAPES:
        monkeypatch.setattr(
            conv1d_toeplitz,
            "compare_partitions",
            lambda *args, shape=shape: tuple(f for f in compare(*args) if (f.tiles, f.groups) == shape),
        )
        dispatch.choose.cache_clear()
        config, launch = kernel_of(FAMILY, p, Layout.contiguous(p), H200)
        assert (int(dict(config.macros)["WARP_TILES"]), dict(launch.params)["groups"]) == shape
        assert_same_bits(run(p, data, schedule="every"), expected, (str(p), shape))
    dispatch.choose.cache_clear()


@pytest.mark.parametrize("mode", MODES)
def test_bits_do_not_depend_on_where_a_result_lies(mode: str, rule: TensorCores) -> None:
    """Fails if the blocks of taps follow the tile: the same signal, one position further on each time."""
    p = at(ConvProblem("conv1d", 1, 2, 2, 420, 131, groups=2), mode)
    x, w, _ = cases.random_data(p, 2)
    expected = run(p, Data(x, w, None))
    for shift in (1, 2, 3, 8, 15, 16, 17, 100):
        piece = replace(p, L_in=p.L_in - shift)
        assert_same_bits(run(piece, Data(x[..., shift:], w, None)), expected[..., shift:], (shift, rule))


@pytest.mark.parametrize("mode", MODES)
@every_problem
def test_views_change_no_bit(problem: ConvProblem, mode: str) -> None:
    p = at(problem, mode)
    x, w, b = cases.random_data(p, 5)
    assert b is not None
    expected = run(p, Data(x, w, b))
    shifted = np.empty(x.size + 1, x.dtype)[1:].reshape(x.shape)
    shifted[...] = x
    views = (
        (shifted, w, b),
        (np.asfortranarray(x), np.asfortranarray(w), np.ascontiguousarray(b[::-1])[::-1]),
        (np.ascontiguousarray(x[::-1, ::-1, ::-1])[::-1, ::-1, ::-1], np.ascontiguousarray(w[..., ::-1])[..., ::-1], b),
    )
    C, L = p.C_out, p.L_out
    padded = -(-L // 8) * 8  # rows that start at multiples of 16 bytes, and those that do not
    strides = ((C * padded, padded, 1), (C * (padded + 1), padded + 1, 1), (-C * L, -L, -1), (C * L, 1, C))
    for i, output in enumerate(strides):
        view = Data(*views[i % len(views)])
        layout = Layout.of(
            input=hostcuda.array_layout(view.input),
            weight=hostcuda.array_layout(view.weight),
            bias=hostcuda.array_layout(b if view.bias is None else view.bias),
            output=ArrayLayout(output, p.itemsize if i == 2 else 16),
        )
        assert_same_bits(run(p, view, layout=layout, schedule="every"), expected, (str(p), output))


@pytest.mark.parametrize("mode", MODES)
def test_offsets_beyond_32_bits(mode: str) -> None:
    """Samples of input and output, and rows of weights, more than 2**31 elements apart in all."""
    p = at(PROBLEMS["whole blocks"], mode)
    data = cases.random_data(p, 6)
    far, fresh = 2**31 + 7, Layout.contiguous(p)
    weight_strides = (2**31 // (p.weight_shape[0] - 1) + 1, *contiguous_strides(p.weight_shape)[1:])
    layout = fresh.replaced(
        input=ArrayLayout((far, *contiguous_strides(p.input_shape)[1:]), p.itemsize),
        weight=ArrayLayout(weight_strides, p.itemsize),
        output=ArrayLayout((-far, *contiguous_strides(p.output_shape)[1:]), p.itemsize),
    )
    assert {step.launch.index_bits for step in plan_of(FAMILY, p, layout, H200).steps} == {64}
    assert_same_bits(run(p, data, layout=layout), run(p, data), str(p))


def assert_like_base(problem: ConvProblem, data: Data) -> Array:
    """The result, once it has NaNs and infinities where the base family has them, and is right elsewhere."""
    y = run(problem, data)
    expected = hostcuda.compute(problem, *data, family="conv1d_direct")
    for test in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(test(y.astype(np.float64)), test(expected.astype(np.float64)), str(problem))
    assert_right(problem, y, data)
    return y


@pytest.mark.parametrize("mode", MODES)
@every_problem
def test_values_that_are_no_numbers_spoil_only_what_they_feed(problem: ConvProblem, mode: str) -> None:
    """Also where other taps of an output fall into the padding: there a weight that is no number counts for nothing."""
    p = at(problem, mode)
    for k in (0, p.K // 2, p.K - 1):
        x, w, b = cases.random_data(p, k)
        w[0, 0, k], w[1, 0, k] = np.nan, np.inf
        y = assert_like_base(p, Data(np.abs(x), w, b)).astype(np.float64)
        assert not np.isfinite(y).all() or k != p.K // 2  # the outer taps may meet no sample
    for l_in in (0, p.L_in // 2, p.L_in - 1):
        x, w, b = cases.random_data(p, l_in)
        x[0, 0, l_in], x[-1, 1, l_in], x[-1, -1, l_in] = np.nan, np.inf, -np.inf
        assert not np.isfinite(assert_like_base(p, Data(x, w, b)).astype(np.float64)).all()
    x, w, b = cases.random_data(p, 7)
    assert b is not None
    b[:2] = np.nan, np.inf
    y = assert_like_base(p, Data(x, w, b)).astype(np.float64)
    assert np.isnan(y[:, 0]).all()
    assert np.isfinite(y[:, 2:]).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [3, 509])
def test_a_weight_that_is_no_number_leaves_the_bits_of_chunks(mode: str, k: int) -> None:
    """Fails if blocks that meet no sample are left out of some tiles and not of others."""
    p = at(replace(PROBLEMS["causal"], padding_right=300), mode)
    x, w, b = cases.random_data(p, 9)
    w[0, 0, k] = np.inf
    data = Data(np.maximum(np.abs(x), 1), w, b)
    whole = run(p, data)
    assert np.isinf(whole[0, 0].astype(np.float64)).any()
    assert np.isfinite(whole[0, 0].astype(np.float64)).any()
    for start, stop in ((0, 40), (450, 700), (501, 502), (1300, p.L_out)):
        piece, positions = cases.chunk(p, start, stop)
        output = run(piece, data._replace(input=data.input[..., positions]))
        assert_same_bits(output, whole[..., start:stop], (start, stop))


@pytest.mark.parametrize("mode", MODES)
def test_values_outside_the_window_change_no_bit(mode: str) -> None:
    """Fails if what a tile's zeros multiply spoils a result, or if its sum is formed in another order then."""
    p = at(ConvProblem("conv1d", 1, 2, 2, 620, 131, groups=2), mode)
    x, w, _ = cases.random_data(p, 3)
    expected = run(p, Data(x, w, None))
    positions = np.arange(p.L_out)
    for l_in in (0, 129, 130, 131, 300, 488, 489, 619):
        changed = x.copy()
        changed[0, 0, l_in] = np.inf
        output = run(p, Data(changed, w, None))
        outside = (positions > l_in) | (positions + p.K <= l_in)
        assert outside.any()
        assert_same_bits(output[..., outside], expected[..., outside], l_in)
        assert_same_bits(output[:, 1], expected[:, 1], l_in)
        assert not np.isfinite(output[0, 0, ~outside].astype(np.float64)).any()


@pytest.mark.parametrize("padding_mode", PADDING_MODES[1:])
@pytest.mark.parametrize("mode", MODES)
def test_padding_that_means_samples_gives_the_bits_of_padded_input(mode: str, padding_mode: str) -> None:
    p = replace(at(PROBLEMS["odd"], mode), padding_mode=padding_mode)
    x, w, b = cases.random_data(p, 13)
    how: Any = {"replicate": "edge", "circular": "wrap"}.get(padding_mode, padding_mode)
    padded = np.pad(x, [(0, 0), (0, 0), p.padding], how)
    inside = replace(p, L_in=padded.shape[-1], padding_left=0, padding_right=0, padding_mode="zeros")
    assert_same_bits(run(p, Data(x, w, b)), run(inside, Data(padded, w, b)), padding_mode)


def powers(rng: np.random.Generator, shape: tuple[int, ...], low: int, end: int) -> Array:
    """Numbers of either sign with exponents from `low` to below `end`."""
    values = rng.uniform(1, 2, shape) * rng.choice((-1.0, 1.0), shape) * 2.0 ** rng.integers(low, end, shape)
    return values.astype(np.float32)


HARD = {
    "mixed magnitudes": ((-60, 60), (-60, 60)),
    "the largest numbers": ((120, 128), (-110, -12)),
    "the largest weights": ((-110, -12), (120, 128)),
    "products that underflow": ((-75, -55), (-75, -55)),
    "subnormal data": ((-149, -120), (0, 80)),
    "subnormal weights": ((0, 80), (-149, -120)),
    "sums that overflow": ((60, 68), (55, 62)),
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("mode", ["tf32", "bfloat16"])
def test_hard_data(mode: str, kind: str, rule: TensorCores) -> None:
    for seed, name in enumerate(("odd", "short")):
        p = at(PROBLEMS[name], mode)
        rng = np.random.default_rng(seed)
        x, w = (powers(rng, s, *r) for s, r in zip((p.input_shape, p.weight_shape), HARD[kind], strict=True))
        # In every other channel alone: it hides the errors of small sums.
        bias = powers(rng, (p.C_out,), -60, 60) * (np.arange(p.C_out) % 2)
        data = Data(*(a.astype(numpy_dtype(p.dtype)) for a in (x, w, bias)))
        assert_right(p, run(p, data), data, (kind, rule))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("K", [129, 133, 141, 1024])
def test_sums_of_one_sign_whose_last_block_is_not_full(K: int, mode: str, rule: TensorCores) -> None:
    """Nothing cancels: what is cut off adds up."""
    p = at(ConvProblem("conv1d", 1, 2, 2, K + 40, K, groups=2), mode)
    rng = np.random.default_rng(K)
    for low in (0, -12):
        x = np.abs(powers(rng, p.input_shape, low, 1))
        w = (2 - 2.0**-7) * 2.0 ** rng.integers(low, 1, p.weight_shape)
        data = Data(*(a.astype(numpy_dtype(p.dtype)) for a in (x, w)), None)
        assert_right(p, run(p, data), data, rule)
