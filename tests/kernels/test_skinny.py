"""conv1d_skinny beyond the case table: chunks and buffers, weights of any layout, plans, limits, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gpuconv import cases, dispatch
from gpuconv.costs import clock_under_load
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import ArrayLayout, Layout
from gpuconv.families.base import contiguous_strides
from gpuconv.families.conv1d_skinny import COLUMNS, MAX_COLUMNS, NUM_STAGES, ROWS, Conv1dSkinny
from gpuconv.problem import DTYPES, FORMATS, ConvProblem
from tests import hostcuda
from tests.kernels.arrays import assert_same_bits
from tests.kernels.cuda_cores import assert_bits_of_the_base, check_layouts
from tests.plans import H200, kernel_of, plan_of, refusal_of

SKINNY = Conv1dSkinny()
ONE_SM = replace(H200, num_sms=1)  # whose blocks take many rows


def layer(C_in: int, C_out: int, K: int, N: int, L_out: int, **settings: Any) -> ConvProblem:
    """A layer on an input that is as long as its L_out results need."""
    p = ConvProblem("conv1d", N, C_in, C_out, 10**6, K, has_bias=True, **settings)
    return replace(p, L_in=(L_out - 1) * p.stride + p.dilation * (K - 1) + 1 - sum(p.padding))


def configured(p: ConvProblem, device: Device = H200) -> tuple[dict[str, str], dict[str, int]]:
    config, launch = kernel_of(SKINNY, p, Layout.contiguous(p), device)
    return dict(config.macros), dict(launch.params)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    hostcuda.prebuild(list(SKINNY.configs(H200)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", range(1, MAX_COLUMNS + 1))
def test_every_number_of_columns(columns: int, dtype: str) -> None:
    """Columns are positions of one sample, samples, or both."""
    for N in {1, columns, 2 if columns % 2 == 0 else 1}:
        p = layer(9, 11, 5, N, columns // N, dtype=dtype, stride=2, padding_left=3, padding_right=1)
        assert configured(p)[1]["columns"] == columns
        assert_bits_of_the_base(SKINNY, p)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_around_the_lengths_of_chunks(dtype: str) -> None:
    """One term less and more than a chunk, than as many as there are buffers, than once round."""
    chunks = []
    for terms in (
        1,
        15,
        17,
        255,
        257,
        511,
        513,
        4 * 256 - 1,
        4 * 256 + 1,
        4 * 512 - 1,
        4 * 512,
        4 * 512 + 16,
        6 * 512 + 1,
    ):
        p = layer(terms, 3, 1, 1, 2, dtype=dtype)
        chunks.append(-(-terms // configured(p)[1]["chunk_terms"]))
        assert_bits_of_the_base(SKINNY, p)
    assert {1, NUM_STAGES, NUM_STAGES + 1} <= set(chunks)
    assert max(chunks) > NUM_STAGES + 1


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 31, 33, 70])
def test_rows_that_fill_no_block(rows: int) -> None:
    for device in (H200, ONE_SM):
        for settings in ({}, {"groups": 3}):
            groups = settings.get("groups", 1)
            p = layer(20 * groups, rows * groups, 7, 1, 3, padding_left=2, **settings)
            assert_bits_of_the_base(SKINNY, p, device=device)


def test_blocks_take_every_number_of_rows() -> None:
    chosen = {
        configured(layer(64, rows, 3, 1, columns), device)[1]["block_rows"]
        for device in (H200, ONE_SM)
        for rows in (*ROWS, 100, 600, 1100, 2200, 5000)
        for columns in (1, 4, 16)
    }
    assert chosen == set(ROWS)


@pytest.mark.parametrize("kind", ["ill_scaled", "cancelling", "nonfinite"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_stride_and_dilation(dtype: str, kind: cases.RandomKind) -> None:
    for settings in (
        {"padding_left": 5, "padding_right": 6},
        {"stride": 5, "dilation": 2, "padding_left": 9},
        {"stride": 2, "dilation": 7, "padding_right": 30},
    ):
        assert_bits_of_the_base(SKINNY, layer(10, 6, 9, 2, 4, dtype=dtype, **settings), kind=kind)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_weight_that_is_no_number_spoils_only_results_that_have_its_tap(value: float) -> None:
    p = layer(6, 5, 4, 1, 8, padding_left=3, padding_right=3)
    data = cases.random_data(p, 42)
    data.weight[1, 2, 0] = data.weight[3, 5, 3] = value
    output = hostcuda.compute(p, *data, family="conv1d_skinny", device=H200, schedule="every")
    expected = hostcuda.compute(p, *data, family="conv1d_direct", device=H200)
    assert not np.isfinite(expected).all(axis=2)[0, [1, 3]].any()
    assert np.isfinite(expected[0, [1, 3]]).any(axis=1).all()  # of the same channels, where the tap lies in the padding
    assert_same_bits(output, expected, p)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: str) -> None:
    check_layouts(SKINNY, layer(12, 10, 4, 2, 3, dtype=dtype, stride=2, padding_left=1, dilation=2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_every_alignment(dtype: str) -> None:
    """Rows that are whole vectors or not, that begin at a boundary or not, with gaps between them."""
    vec = 16 // FORMATS[dtype].itemsize
    ways = set()
    for C_in, K, gap, alignment in (
        (8, 6, 0, 16),
        (8, 6, vec, 16),
        (8, 6, 0, FORMATS[dtype].itemsize),
        (8, 6, 1, 16),
        (7, 3, 0, 16),
        (7, 3, vec - 21 % vec, 16),
    ):
        p = layer(C_in, 9, K, 1, 2, dtype=dtype)
        strides = (C_in * K + gap, K, 1)
        layout = Layout.contiguous(p).replaced(weight=ArrayLayout(strides, alignment))
        is_vector = C_in * K % vec == 0 and strides[0] % vec == 0 and alignment == 16
        assert dict(kernel_of(SKINNY, p, layout, H200)[1].params)["vector_weights"] == is_vector
        ways.add(is_vector)
        assert_bits_of_the_base(SKINNY, p, layout)
    assert ways == ({True} if vec == 1 else {True, False})


def test_refusals_name_the_reason() -> None:
    few, many = layer(4, 4, 3, 1, MAX_COLUMNS), layer(4, 4, 3, 1, MAX_COLUMNS + 1)
    assert refusal_of(SKINNY, few, Layout.contiguous(few), H200) is None
    assert refusal_of(SKINNY, many, Layout.contiguous(many), H200) == "needs N * L_out <= 16"
    far = Layout.contiguous(few).replaced(
        input=ArrayLayout((2**40, 2**30, 1), 4),
        output=ArrayLayout(contiguous_strides((1, 4, 16))),
    )
    assert refusal_of(SKINNY, few, far, H200) == "needs offsets below 2**31"
    cramped = replace(H200, shared_per_block=1024)
    assert (
        refusal_of(SKINNY, few, Layout.contiguous(few), cramped)
        == "needs buffers that fit in 1024 bytes of shared memory"
    )


def test_streams_get_few_columns_and_every_multiprocessor_gets_rows() -> None:
    mimi = ConvProblem("conv1d", 1, 512, 1024, 24, 16, 8, has_bias=True)
    policy = ConvProblem("conv1d", 1, 2048, 2048, 4, 5, 1, 2, 2, has_bias=True)
    for p, block_n in ((mimi, 2), (policy, 4)):
        config, launch = kernel_of(SKINNY, p, Layout.contiguous(p), H200)
        candidates = plan_of(SKINNY, p, Layout.contiguous(p), H200).candidates
        assert dict(config.macros)["BLOCK_N"] == str(block_n)
        assert 0.9 * H200.num_sms <= launch.grid <= H200.num_sms
        assert candidates[0][1] == min(us for _, us in candidates)
        # A chain of multiply-adds, four cycles each.
        assert candidates[0][1] >= 4 * p.C_in_g * p.K / (1e3 * clock_under_load(H200))


def test_it_serves_what_tensor_cores_leave() -> None:
    """A layer of tensor cores keeps them for a step of a stream too: its bits must not depend on the length."""
    mimi = ConvProblem("conv1d", 1, 512, 1024, 24, 16, 8, has_bias=True)
    frame = ConvProblem("conv1d", 1, 1, 1001, 2000, 2000, 500)
    for p, arch in ((mimi, "sm_75"), (replace(mimi, dtype="float64"), "sm_90"), (frame, "sm_90")):
        choice = dispatch.choose(p, Layout.contiguous(p), Device.from_arch(arch))
        assert choice is not None
        assert choice.family == "conv1d_skinny", (str(p), arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_launches_keep_the_limits_of_each_gpu(arch: str) -> None:
    device = Device.from_arch(arch)
    configs = set(SKINNY.configs(device))
    for dtype in DTYPES:
        for columns in (*COLUMNS, 3, 11):
            for C_in, C_out, K in ((1, 1, 1), (512, 1024, 16), (3, 70_000, 2), (4096, 33, 1)):
                p = layer(C_in, C_out, K, 1, columns, dtype=dtype)
                config, launch = kernel_of(SKINNY, p, Layout.contiguous(p), device)
                params = dict(launch.params)
                block_n, thread_n = (int(dict(config.macros)[name]) for name in ("BLOCK_N", "THREAD_N"))
                assert config in configs
                assert launch.shared_bytes <= device.shared_per_block
                assert launch.block == 32 * (params["compute_warps"] + NUM_STAGES)
                assert launch.block <= int(dict(config.macros)["MAX_THREADS"]) <= 1024
                assert 32 * params["compute_warps"] >= params["block_rows"] * block_n // thread_n
                assert block_n >= columns
                assert (
                    params["row_blocks"] * params["block_rows"]
                    >= C_out
                    > (params["row_blocks"] - 1) * params["block_rows"]
                )
                assert params["chunk_terms"] % (64 // max(4, p.itemsize)) == 0
