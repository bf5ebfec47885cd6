"""conv1d_narrow beyond the case table: columns of a thread, chunks of weights, layouts, 64-bit offsets, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gpuconv import cases, dispatch
from gpuconv.cases import Data
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import ArrayLayout, Layout
from gpuconv.families.base import contiguous_strides
from gpuconv.families.conv1d_narrow import BLOCK_SIZE, ROWS, Conv1dNarrow
from gpuconv.problem import DTYPES, ConvProblem
from tests import hostcuda
from tests.kernels.arrays import (
    INPUT_LAYOUTS,
    OUTPUT_LAYOUTS,
    assert_same_bits,
    channels_last,
    output_strides,
    scattered,
)
from tests.kernels.test_kernels import DEVICE
from tests.plans import kernel_of, refusal_of

NARROW = Conv1dNarrow()
ONE_SM = replace(DEVICE, num_sms=1)  # which a few hundred columns fill, so that threads take several


def layer(C_in: int, C_out: int, K: int, L_in: int, N: int = 1, **settings: Any) -> ConvProblem:
    return ConvProblem("conv1d", N, C_in, C_out, L_in, K, has_bias=True, **settings)


def thread_l(p: ConvProblem, device: Device = DEVICE) -> int:
    return int(dict(kernel_of(NARROW, p, Layout.contiguous(p), device)[0].macros)["THREAD_L"])


def assert_bits_of_the_base(
    p: ConvProblem, device: Device = DEVICE, layout: Layout | None = None, kind: cases.RandomKind = "normal"
) -> None:
    data = cases.random_data(p, 51, kind)
    output = hostcuda.compute(p, *data, layout=layout, family="conv1d_narrow", device=device, schedule="every")
    expected = hostcuda.compute(p, *data, family="conv1d_direct", device=DEVICE)
    assert_same_bits(output, expected, (p, kind))


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    hostcuda.prebuild(list(NARROW.configs(DEVICE)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", range(1, ROWS[-1] + 1))
def test_every_number_of_channels(rows: int, dtype: str) -> None:
    """One column a thread and several, the ends of samples inside and between blocks."""
    for device, L in ((DEVICE, 130), (ONE_SM, 1500), (ONE_SM, 1540)):
        p = layer(3, rows, 3, L, dtype=dtype, dilation=2, padding_left=2, padding_right=1)
        assert (thread_l(p, device=device) > 1) == (L > 1000 and dtype != "complex128")
        assert_bits_of_the_base(p, device)


@pytest.mark.parametrize("kind", ["ill_scaled", "nonfinite"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
def test_settings(dtype: str, kind: cases.RandomKind) -> None:
    for device, L in ((DEVICE, 200), (ONE_SM, 1300)):
        for p in (
            layer(5, 6, 7, L, 2, dtype=dtype, padding_left=40, padding_right=3, dilation=9),
            layer(4, 2, 4, L, 2, dtype=dtype, stride=3, dilation=2, padding_left=7),
            layer(8, 12, 3, L, dtype=dtype, groups=2, padding_left=1, padding_right=90),
        ):
            assert_bits_of_the_base(p, device, kind=kind)


def test_short_samples_side_by_side() -> None:
    for N, L in ((40, 5), (129, 1), (3, 43)):
        assert_bits_of_the_base(layer(6, 5, 3, L, N, padding_left=1, padding_right=1))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_weights_in_several_chunks(dtype: str) -> None:
    for C_in, K, device, L in ((90, 31, DEVICE, 40), (300, 8, DEVICE, 20), (90, 31, ONE_SM, 1100)):
        p = layer(C_in, 8, K, L, dtype=dtype, padding_left=K // 2, padding_right=K // 2, dilation=1 + (K == 8))
        launch = kernel_of(NARROW, p, Layout.contiguous(p), device)[1]
        assert dict(launch.params)["chunk_terms"] < C_in * K
        assert_bits_of_the_base(p, device)


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex128"])
def test_layouts(dtype: str) -> None:
    for p in (layer(6, 5, 4, 50, 2, dtype=dtype, stride=2, padding_left=1), layer(6, 7, 3, 60, 2, dtype=dtype)):
        data = cases.random_data(p, 52)
        assert data.bias is not None
        for arrange, name in zip(INPUT_LAYOUTS, OUTPUT_LAYOUTS, strict=True):
            given = Data(arrange(data.input), channels_last(scattered(data.weight)), scattered(data.bias))
            layout = Layout.of(
                input=hostcuda.array_layout(given.input),
                weight=hostcuda.array_layout(given.weight),
                bias=hostcuda.array_layout(scattered(data.bias)),
                output=ArrayLayout(output_strides(p, name), p.itemsize),
            )
            for device in (DEVICE, ONE_SM):
                output = hostcuda.compute(
                    p, *given, layout=layout, family="conv1d_narrow", device=device, schedule="every"
                )
                expected = hostcuda.compute(
                    p, np.ascontiguousarray(given.input), data.weight, data.bias, family="conv1d_direct", device=DEVICE
                )
                assert_same_bits(output, expected, (arrange.__name__, name))


def test_offsets_beyond_32_bits() -> None:
    p = layer(3, 6, 3, 50, 2, dtype="float16", padding_left=1)
    far = 2**31 + 7
    layout = Layout.contiguous(p).replaced(
        input=ArrayLayout((far, *contiguous_strides(p.input_shape)[1:]), 2),
        output=ArrayLayout((-far, *contiguous_strides(p.output_shape)[1:]), 2),
    )
    assert kernel_of(NARROW, p, layout, ONE_SM)[1].index_bits == 64
    assert_bits_of_the_base(p, ONE_SM, layout)


def test_which_layers_it_takes() -> None:
    few, many = layer(48, 6, 3, 100), layer(48, 9, 3, 100)
    assert refusal_of(NARROW, few, Layout.contiguous(few), DEVICE) is None
    assert refusal_of(NARROW, many, Layout.contiguous(many), DEVICE) == "needs C_out/groups <= 8"
    long = replace(few, L_in=2**50)
    assert refusal_of(NARROW, long, Layout.contiguous(long), DEVICE) == f"needs at most {2**31 - 1} blocks"
    for p in (
        layer(48, 6, 3, 85_995, 4, dilation=2, padding_left=2, padding_right=2),  # HTDemucs, DConv
        layer(64, 1, 15, 4000, stride=4),
        layer(512, 2, 3, 2000, dilation=8),
    ):
        choice = dispatch.choose(p, Layout.contiguous(p), DEVICE)
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
