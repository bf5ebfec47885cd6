"""The depthwise families beyond the case table: rows of every alignment, arrays in place, lengths around a vector."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gpuconv import cases
from gpuconv.checks import same_bits
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import ArrayLayout, Family, Layout
from gpuconv.families.depthwise import BLOCK_SIZE, Divisor
from gpuconv.problem import DTYPES, FORMATS, ConvProblem
from tests import hostcuda
from tests.kernels.cuda_cores import assert_bits_of_the_base, check_offsets_beyond_32_bits
from tests.plans import BASE, FORWARD_FAMILIES, H200, kernel_of, refusal_of

FORWARD, TRANSPOSED = "conv1d_depthwise", "conv_transpose1d_depthwise"
DEPTHWISE: tuple[Family, ...] = tuple(family for family in FORWARD_FAMILIES if family.name.endswith("_depthwise"))

by_name = {"ids": lambda value: getattr(value, "name", value)}


def depthwise(op: str, C: int, L: int, K: int, **settings: Any) -> ConvProblem:
    """A layer with as many groups as input channels, one output channel each unless `multiplier` says more."""
    multiplier = settings.pop("multiplier", 1)
    return ConvProblem(op, settings.pop("N", 2), C, C * multiplier, L, K, groups=C, **settings)  # type: ignore[arg-type]


def macros(family: Family[Any], problem: ConvProblem, layout: Layout | None = None) -> dict[str, str]:
    return dict(kernel_of(family, problem, layout or Layout.contiguous(problem), H200)[0].macros)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    hostcuda.prebuild([config for family in DEPTHWISE for config in family.configs(H200)])


@pytest.mark.parametrize("family", DEPTHWISE, **by_name)
def test_the_kernel_follows_from_the_layer(family: Family[Any]) -> None:
    base = depthwise(family.kind, 8, 400, 9)
    for problem, slide, skips in (
        (base, "1", "0"),
        (replace(base, stride=2), "2", "0"),
        (replace(base, stride=3), "0", "0"),
        (replace(base, dilation=2), "0", "1"),
        (replace(base, dilation=2, stride=2), "0", "0"),
        (replace(base, dilation=2, L_in=90), "0", "0"),
        (replace(base, N=7, L_in=123), "1", "0"),
        (replace(base, K=301, padding_left=150, padding_right=150), "1", "0"),
    ):
        chosen = macros(family, problem)
        assert (chosen["SLIDE_STRIDE"], chosen["IS_SKIPPING"]) == (slide, skips), str(problem)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_of_whole_vectors_are_copied_as_they_lie(dtype: str) -> None:
    """LEAF and its like; unless most of the input meets no tap."""
    family = next(family for family in DEPTHWISE if family.name == FORWARD)
    vec = 16 // FORMATS[dtype].itemsize
    leaf = depthwise(family.kind, 40, 4000, 401, stride=160, padding_left=200, padding_right=200, dtype=dtype)
    for problem, strides in (
        (leaf, "1"),
        (replace(leaf, stride=8 * vec, K=4 * vec), "1"),
        (replace(leaf, stride=161), "1" if vec == 1 else "0"),
        (replace(leaf, K=79), "0"),
        (replace(leaf, dilation=2), "0"),
    ):
        assert macros(family, problem)["IS_STRIDING"] == strides, str(problem)


@pytest.mark.parametrize("family", DEPTHWISE, **by_name)
def test_refusals_name_the_reason(family: Family[Any]) -> None:
    layer = depthwise(family.kind, 8, 400, 9)
    dense = replace(layer, groups=4)
    wide = depthwise(family.kind, 8, 400, 9, multiplier=8)
    assert refusal_of(family, layer, Layout.contiguous(layer), H200) is None
    assert refusal_of(family, dense, Layout.contiguous(dense), H200) == "needs C_in/groups == 1"
    assert refusal_of(family, wide, Layout.contiguous(wide), H200) == "needs C_out/groups < 8"


def test_a_window_beyond_shared_memory_is_refused() -> None:
    family = next(family for family in DEPTHWISE if family.name == FORWARD)
    far = depthwise("conv1d", 2, 200_000, 2, dilation=100_000)
    near = replace(far, dilation=20_000)
    assert refusal_of(family, near, Layout.contiguous(near), H200) is None
    assert "bytes of shared memory" in (refusal_of(family, far, Layout.contiguous(far), H200) or "")


@pytest.mark.parametrize("family", DEPTHWISE, **by_name)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_launches_keep_the_limits_of_each_gpu(family: Family[Any], arch: str) -> None:
    """Long taps, long strides, long and short rows, many channels: whole warps, shared memory that exists."""
    device = Device.from_arch(arch)
    for dtype in DTYPES:
        for L, K, stride, dilation in (
            (24, 51, 1, 1), (1024, 1024, 1, 1), (16_000, 401, 160, 1), (90_000, 3, 1, 5000), (480_267, 12, 2, 1),
            (4001, 3, 1, 128), (56_448, 7, 1, 9), (128, 2, 1, 2),
        ):  # fmt: skip
            p = depthwise(
                family.kind, 512, L, K, stride=stride, dilation=dilation, dtype=dtype, padding_left=dilation * (K - 1)
            )
            if refusal_of(family, p, Layout.contiguous(p), device) is not None:
                continue
            config, launch = kernel_of(family, p, Layout.contiguous(p), device)
            params = dict(launch.params)
            assert config in set(family.configs(device))
            assert launch.block % 32 == 0
            assert launch.block <= BLOCK_SIZE
            assert params["row_threads"] % 32 == 0 or dict(config.macros)["IS_SKIPPING"] == "0"
            assert launch.shared_bytes <= device.shared_per_block
            assert params["row_threads"] * params["block_rows"] <= launch.block
            covered = params["row_threads"] * params["repeats"] * params["tiles"] * int(dict(config.macros)["THREAD_L"])
            assert covered >= p.L_out
            assert launch.grid == params["tiles"] * -(-p.N * p.C_out // params["block_rows"])


@pytest.mark.parametrize("family", DEPTHWISE, **by_name)
def test_short_rows_fill_the_warps(family: Family[Any]) -> None:
    """A warp at least three quarters full, however short the rows."""
    for L in (24, 31, 100, 200, 418):
        p = depthwise(family.kind, 448, L, 5, N=64, padding_left=2, padding_right=2)
        _, launch = kernel_of(family, p, Layout.contiguous(p), H200)
        params = dict(launch.params)
        assert params["row_threads"] * params["block_rows"] >= 0.75 * launch.block, str(p)


def placed(problem: ConvProblem, first: tuple[int, int], gaps: tuple[int, int]) -> Layout:
    """Input and output `first` elements behind a 16-byte boundary, rows `gaps` elements apart."""
    p = problem

    def array(C: int, L: int, shift: int, gap: int) -> ArrayLayout:
        address = 16 * 64 + shift * p.itemsize
        return ArrayLayout((C * (L + gap), L + gap, 1), min(address & -address, 16))

    return Layout.contiguous(p).replaced(
        input=array(p.C_in, p.L_in, first[0], gaps[0]),
        output=array(p.C_out, p.L_out, first[1], gaps[1]),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("family", DEPTHWISE, **by_name)
def test_rows_of_every_alignment(family: Family[Any], stride: int, dtype: str) -> None:
    """Input and output rows at every distance from a 16-byte boundary, the paddings of every remainder."""
    vec = 16 // FORMATS[dtype].itemsize
    for shift in range(vec):
        first = 1 << shift.bit_length() >> 1  # what an alignment can say: a power of two
        p = depthwise(family.kind, 5, 61 + shift, 6, stride=stride, dtype=dtype, padding_left=shift % 6, has_bias=True)
        for gaps in ((shift, vec - shift), (vec - shift, 0)):
            layout = placed(p, (first % vec, (vec - first) % vec), gaps)
            assert macros(family, p, layout)["SLIDE_STRIDE"] == str(stride if stride < 3 else 0)
            assert_bits_of_the_base(family, p, layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", DEPTHWISE, **by_name)
def test_dilated_rows_of_every_alignment(family: Family[Any], dtype: str) -> None:
    """Every remainder of dilation and padding modulo a vector; rows that end in or behind the last result of a warp."""
    vec = 16 // FORMATS[dtype].itemsize
    for shift in range(vec):
        first = 1 << shift.bit_length() >> 1
        dilation = 2 + shift
        for L_out, gaps in ((255 + shift, (shift, vec - shift)), (128, (vec - shift, 0)), (600, (0, 0))):
            L_in = L_out + dilation * 4 - 2 * shift if family.name == FORWARD else L_out - dilation * 4 + 2 * shift
            p = depthwise(
                family.kind, 3, L_in, 5, dilation=dilation, dtype=dtype, padding_left=shift, padding_right=shift,
                has_bias=True, multiplier=1 + shift % 2,
            )  # fmt: skip
            assert p.L_out == L_out
            layout = placed(p, (first % vec, (vec - first) % vec), gaps)
            assert macros(family, p, layout)["IS_SKIPPING"] == "1"
            assert_bits_of_the_base(family, p, layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_strides_of_every_alignment(dtype: str) -> None:
    """Windows and rows at every distance from a boundary, taps that end in every vector of a stride."""
    family = next(family for family in DEPTHWISE if family.name == FORWARD)
    vec = 16 // FORMATS[dtype].itemsize
    for shift in range(vec):
        first = 1 << shift.bit_length() >> 1
        for stride, K in ((3 * vec if vec < 3 else 2 * vec, 2 * vec + shift), (5 * vec, 11 * vec - shift)):
            p = depthwise(
                family.kind, 3, 40 * stride + shift, K, stride=stride, dtype=dtype, padding_left=K // 2 + shift,
                padding_right=K, has_bias=True, multiplier=1 + shift % 2,
            )  # fmt: skip
            for gaps in ((shift, vec - shift), (0, 0)):
                layout = placed(p, (first % vec, (vec - first) % vec), gaps)
                assert macros(family, p, layout)["IS_STRIDING"] == "1"
                assert_bits_of_the_base(family, p, layout)


@pytest.mark.parametrize("family", DEPTHWISE, **by_name)
def test_dilated_rows_of_several_tiles(family: Family[Any]) -> None:
    """A GPU of one multiprocessor, whose threads compute several results one after the other."""
    small = replace(H200, num_sms=1)
    for L, K, dilation in ((9000, 3, 128), (5000, 7, 9), (2300, 40, 2)):
        p = depthwise(family.kind, 1, L, K, N=1, dilation=dilation, padding_left=dilation * (K // 2))
        launch = kernel_of(family, p, Layout.contiguous(p), small)[1]
        assert dict(launch.params)["tiles"] * dict(launch.params)["repeats"] > 1
        assert_bits_of_the_base(family, p, device=small)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("family", DEPTHWISE, **by_name)
def test_arrays_of_any_strides(family: Family[Any], dtype: str) -> None:
    """Channels last, reversed and repeated arrays are read and written in place, by the kernel that does not slide."""
    p = depthwise(family.kind, 6, 40, 5, stride=2, multiplier=2, N=3, dtype=dtype, padding_left=2, has_bias=True)
    data = cases.random_data(p, 33)
    expected = hostcuda.compute(p, *data, family=BASE[p.op], device=H200)
    for array, strides in (
        (np.ascontiguousarray(data.input.swapaxes(1, 2)).swapaxes(1, 2), (p.C_out * p.L_out, 1, p.C_out)),
        (np.ascontiguousarray(data.input[::-1, :, ::-1])[::-1, :, ::-1], (-p.C_out * p.L_out, -p.L_out, -1)),
    ):
        layout = Layout.contiguous(p).replaced(
            input=hostcuda.array_layout(array), output=ArrayLayout(strides, p.itemsize)
        )
        assert macros(family, p, layout)["SLIDE_STRIDE"] == "0"
        output = hostcuda.compute(
            p, array, data.weight, data.bias, layout=layout, family=family.name, device=H200, schedule="every"
        )
        assert same_bits(output, expected).all()


@pytest.mark.parametrize("family", DEPTHWISE, **by_name)
def test_offsets_beyond_32_bits(family: Family[Any]) -> None:
    check_offsets_beyond_32_bits(family, depthwise(family.kind, 3, 50, 4, dtype="float16"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64", "complex128"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("family", DEPTHWISE, **by_name)
def test_every_number_of_taps(family: Family[Any], stride: int, dtype: str) -> None:
    """From one tap to two rounds of the unrolled loop, which ends in every phase; padding is causal or centred."""
    for K in (*range(1, 14), 23, 24, 25, 26, 47, 48, 49, 50, 51):
        for left, right in ((K - 1, 0), (K // 2, K // 2)):
            p = depthwise(
                family.kind, 3, 33 + K, K, stride=stride, N=1, dtype=dtype, padding_left=left, padding_right=right
            )
            if p.L_out >= 1:
                assert_bits_of_the_base(family, p)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("family", DEPTHWISE, **by_name)
def test_kernels_longer_than_the_sequence(family: Family[Any], stride: int, dtype: str) -> None:
    """Most taps of most results lie in the padding, on either side."""
    for L in (1, 2, 7, 24):
        for left, right in ((25, 25), (50, 0), (0, 50)):
            p = depthwise(
                family.kind, 4, L, 51, stride=stride, dtype=dtype, padding_left=left, padding_right=right, has_bias=True
            )
            if p.L_out >= 1:
                assert_bits_of_the_base(family, p)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 1), (4, 1), (1, 5)])
@pytest.mark.parametrize("family", DEPTHWISE, **by_name)
def test_nothing_comes_of_an_infinite_weight_in_the_padding(family: Family[Any], stride: int, dilation: int) -> None:
    """Infinite and NaN taps spoil the results that they belong to, and no other."""
    padding = 0 if family.name == TRANSPOSED else 6 * dilation  # so that the first and the last results miss taps
    L = 30 if dilation == 1 else 140
    p = depthwise(
        family.kind, 4, L, 7, stride=stride, dilation=dilation, padding_left=padding, padding_right=padding, N=1
    )
    data = cases.random_data(p, 34)
    weight = data.weight.copy()
    weight[:2, :, 0], weight[2:, :, 6] = np.inf, np.nan
    output = hostcuda.compute(p, data.input, weight, family=family.name, device=H200, schedule="every")
    expected = hostcuda.compute(p, data.input, weight, family=BASE[p.op], device=H200)
    assert np.isfinite(expected).any()
    assert np.isnan(expected).any()
    np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("divisor", [2, 3, 5, 7, 84, 255, 256, 257, 641, 2**16, 2**20 - 1, 2**30 + 1, 2**31 - 1])
def test_magic_numbers_divide(divisor: int) -> None:
    """At the multiples of the divisor and beside them, up to the largest 31-bit number."""
    magic, shift = Divisor.of(divisor)
    assert -(2**31) <= magic < 2**31
    top = (2**31 - 1) // divisor
    quotients = {0, 1, 2, top // 2, top - 1, top} | {top * i // 1000 for i in range(1000)}
    for quotient in quotients:
        for value in (quotient * divisor - 1, quotient * divisor, quotient * divisor + 1):
            if 0 <= value < 2**31:
                assert (value * (magic % 2**32) >> 32) >> shift == value // divisor
