"""Depthwise layers with many taps on tensor cores: bits that depend neither on the partition nor on the position."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuconv import cases, dispatch
from gpuconv.cases import Data
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import Layout, conv1d_toeplitz
from gpuconv.families.conv1d_toeplitz import MIN_TAPS, SHAPES, Conv1dToeplitz
from gpuconv.problem import ConvProblem
from tests import hostcuda
from tests.hostcuda import Program, TensorCores
from tests.kernels.arrays import assert_same_bits
from tests.kernels.tensor_cores import (
    H200,
    assert_right,
    check_offsets_beyond_32_bits,
    check_the_layer_alone_decides,
    data_of_one_sign,
)
from tests.plans import kernel_of

Array = npt.NDArray[Any]

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


at = cases.in_format


def run(problem: ConvProblem, data: Data, **settings: Any) -> Array:
    return hostcuda.compute(problem, *data, family=FAMILY.name, **settings)


@settings(max_examples=80)
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
    is_taken = mode != "float32" and device.arch >= (75 if mode == "float16" else 80) and stride == dilation == 1
    reason = check_the_layer_alone_decides(FAMILY, layer, device)
    assert (reason is None) == (is_taken and multiplier < 8 and MIN_TAPS[layer.itemsize] <= K)


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
def test_offsets_beyond_32_bits(mode: str) -> None:
    check_offsets_beyond_32_bits(run, FAMILY, at(PROBLEMS["whole blocks"], mode))


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("K", [129, 133, 141, 1024])
def test_sums_of_one_sign_whose_last_block_is_not_full(K: int, mode: str, rule: TensorCores) -> None:
    p = at(ConvProblem("conv1d", 1, 2, 2, K + 40, K, groups=2), mode)
    for data in data_of_one_sign(p):
        assert_right(p, run(p, data), data, rule)
