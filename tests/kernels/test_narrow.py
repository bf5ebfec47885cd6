"""conv1d_narrow beyond the case table: columns of a thread, chunks of weights, layouts, 64-bit offsets, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpuconv import cases, dispatch
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import Layout
from gpuconv.families.conv1d_narrow import BLOCK_SIZE, ROWS, Conv1dNarrow
from gpuconv.problem import DTYPES, ConvProblem
from tests import hostcuda
from tests.kernels.cuda_cores import assert_bits_of_the_base, check_layouts, check_offsets_beyond_32_bits
from tests.plans import H200, kernel_of, refusal_of

NARROW = Conv1dNarrow()
ONE_SM = replace(H200, num_sms=1)  # which a few hundred columns fill, so that threads take several


def layer(C_in: int, C_out: int, K: int, L_in: int, N: int = 1, **settings: Any) -> ConvProblem:
    return ConvProblem("conv1d", N, C_in, C_out, L_in, K, has_bias=True, **settings)


def thread_l(p: ConvProblem, device: Device = H200) -> int:
    return int(dict(kernel_of(NARROW, p, Layout.contiguous(p), device)[0].macros)["THREAD_L"])


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    hostcuda.prebuild(list(NARROW.configs(H200)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", range(1, ROWS[-1] + 1))
def test_every_number_of_channels(rows: int, dtype: str) -> None:
    """One column a thread and several, the ends of samples inside and between blocks."""
    for device, L in ((H200, 130), (ONE_SM, 1500), (ONE_SM, 1540)):
        p = layer(3, rows, 3, L, dtype=dtype, dilation=2, padding_left=2, padding_right=1)
        assert (thread_l(p, device=device) > 1) == (L > 1000 and dtype != "complex128")
        assert_bits_of_the_base(NARROW, p, device=device)


@pytest.mark.parametrize("kind", ["ill_scaled", "nonfinite"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
def test_settings(dtype: str, kind: cases.RandomKind) -> None:
    for device, L in ((H200, 200), (ONE_SM, 1300)):
        for p in (
            layer(5, 6, 7, L, 2, dtype=dtype, padding_left=40, padding_right=3, dilation=9),
            layer(4, 2, 4, L, 2, dtype=dtype, stride=3, dilation=2, padding_left=7),
            layer(8, 12, 3, L, dtype=dtype, groups=2, padding_left=1, padding_right=90),
        ):
            assert_bits_of_the_base(NARROW, p, device=device, kind=kind)


def test_short_samples_side_by_side() -> None:
    for N, L in ((40, 5), (129, 1), (3, 43)):
        assert_bits_of_the_base(NARROW, layer(6, 5, 3, L, N, padding_left=1, padding_right=1))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_weights_in_several_chunks(dtype: str) -> None:
    for C_in, K, device, L in ((90, 31, H200, 40), (300, 8, H200, 20), (90, 31, ONE_SM, 1100)):
        p = layer(C_in, 8, K, L, dtype=dtype, padding_left=K // 2, padding_right=K // 2, dilation=1 + (K == 8))
        launch = kernel_of(NARROW, p, Layout.contiguous(p), device)[1]
        assert dict(launch.params)["chunk_terms"] < C_in * K
        assert_bits_of_the_base(NARROW, p, device=device)


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex128"])
def test_layouts(dtype: str) -> None:
    for p in (layer(6, 5, 4, 50, 2, dtype=dtype, stride=2, padding_left=1), layer(6, 7, 3, 60, 2, dtype=dtype)):
        for device in (H200, ONE_SM):
            check_layouts(NARROW, p, device)


def test_offsets_beyond_32_bits() -> None:
    check_offsets_beyond_32_bits(NARROW, layer(3, 6, 3, 50, 2, dtype="float16", padding_left=1), ONE_SM)


def test_which_layers_it_takes() -> None:
    few, many = layer(48, 6, 3, 100), layer(48, 9, 3, 100)
    assert refusal_of(NARROW, few, Layout.contiguous(few), H200) is None
    assert refusal_of(NARROW, many, Layout.contiguous(many), H200) == "needs C_out/groups <= 8"
    long = replace(few, L_in=2**50)
    assert refusal_of(NARROW, long, Layout.contiguous(long), H200) == f"needs at most {2**31 - 1} blocks"
    for p in (
        layer(48, 6, 3, 85_995, 4, dilation=2, padding_left=2, padding_right=2),  # HTDemucs, DConv
        layer(64, 1, 15, 4000, stride=4),
        layer(512, 2, 3, 2000, dilation=8),
    ):
        choice = dispatch.choose(p, Layout.contiguous(p), H200)
        assert choice is not None
        assert choice.family == "conv1d_narrow"
        assert choice.plan.candidates[0][1] == min(us for _, us in choice.plan.candidates)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_launches_keep_the_limits_of_each_gpu(arch: str) -> None:
    device = Device.from_arch(arch)
    configs = set(NARROW.configs(device))
    for dtype in DTYPES:
        for p in (
            layer(1, 1, 1, 1),
            layer(4096, 8, 31, 100),
            layer(48, 6, 3, 85_995, 4),
            layer(10, 80, 5, 33, groups=10),
        ):
            q = replace(p, dtype=dtype)
            config, launch = kernel_of(NARROW, q, Layout.contiguous(q), device)
            assert config in configs
            assert launch.shared_bytes <= 16 * 1024
            assert launch.block == BLOCK_SIZE
            columns = BLOCK_SIZE * int(dict(config.macros)["THREAD_L"]) * dict(launch.params)["column_blocks"]
            assert columns >= q.L_out
            assert launch.grid * BLOCK_SIZE * int(dict(config.macros)["THREAD_L"]) >= q.N * q.L_out * q.groups
