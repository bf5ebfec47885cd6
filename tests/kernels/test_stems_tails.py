"""What the families for few channels add to the table of cases: plans, layouts, 64-bit indices, alignment, lengths."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gpuconv import cases
from gpuconv.families import ArrayLayout, Family, Layout
from gpuconv.families.conv1d_stem import Conv1dStem
from gpuconv.families.conv_tail import Conv1dTail, ConvTranspose1dTail
from gpuconv.problem import DTYPES, ConvProblem
from tests import hostcuda
from tests.kernels.arrays import assert_same_bits
from tests.kernels.cuda_cores import assert_bits_of_the_base, check_layouts, check_offsets_beyond_32_bits
from tests.plans import BASE, H200, kernel_of, plan_of, refusal_of

STEM, TAIL, TRANSPOSED = Conv1dStem(), Conv1dTail(), ConvTranspose1dTail()
FEW = (STEM, TAIL, TRANSPOSED)

by_name = {"ids": lambda value: getattr(value, "name", value)}


def conv(C_in: int, C_out: int, K: int, L_in: int, N: int = 2, dtype: str = "float32", **settings: Any) -> ConvProblem:
    return ConvProblem("conv1d", N, C_in, C_out, L_in, K, dtype=dtype, has_bias=True, **settings)


def transposed(C_in: int, C_out: int, K: int, L_in: int, dtype: str = "float32", **settings: Any) -> ConvProblem:
    return ConvProblem("conv_transpose1d", 2, C_in, C_out, L_in, K, dtype=dtype, has_bias=True, **settings)


# Every form of window, chunk and tile that the families know, beyond what the table of cases holds.
PROBLEMS: dict[Family, tuple[ConvProblem, ...]] = {
    STEM: (
        conv(1, 20, 7, 388, stride=3),  # the last tap of the last column is the last of the input
        conv(1, 20, 7, 300, stride=3, padding_left=2),  # taps share rows, some rows have one tap fewer
        conv(3, 9, 5, 200, stride=4, dilation=6, padding_left=9, padding_right=4),  # stride and dilation share a factor
        conv(2, 8, 6, 150, dilation=5, padding_left=12),  # rows advance by the dilation
        conv(1, 17, 3, 700, dilation=300),  # a row for each tap
        conv(4, 24, 2, 90, stride=5),  # no taps share a row
        conv(2, 30, 90, 230, stride=2, padding_left=50),  # several chunks of weights
        conv(1, 300, 3, 40, N=1),  # several blocks of channels
        conv(8, 64, 5, 70, groups=4, padding_left=2),
        conv(1, 8, 3, 33, N=9),  # short samples side by side in a tile
        conv(1, 8, 1, 5000, N=3),  # blocks that go through several tiles
        conv(8, 6, 9, 140, groups=2, stride=4),  # fewer channels than a tile
        conv(4, 1, 5, 70, N=6, dilation=3),
    ),
    TAIL: (
        conv(3, 1, 5, 600, padding_left=2),
        conv(20, 2, 3, 90, padding_left=1, padding_right=1),  # several chunks of channels
        conv(5, 3, 9, 1100, padding_left=4),  # several blocks
        conv(9, 4, 1, 64),
        conv(2, 1, 75, 256, padding_left=37, padding_right=37),
        conv(12, 6, 7, 130, groups=3, padding_left=3),
        conv(1, 1, 4, 50),
        conv(2, 1, 3, 1, padding_left=2),
    ),
    TRANSPOSED: (
        transposed(9, 1, 16, 130, stride=8),
        transposed(10, 1, 5, 70, stride=3, padding_left=2, output_padding=1),  # phases with fewer taps
        transposed(3, 2, 3, 40, stride=4),  # phases without a tap
        transposed(6, 3, 9, 33, stride=5, padding_left=11, padding_right=3),  # two blocks of rows
        transposed(8, 4, 7, 300, groups=2, padding_left=3),  # stride 1
        transposed(2, 1, 40, 70, stride=2),  # many taps
    ),
}
ALL = [(family, problem) for family, problems in PROBLEMS.items() for problem in problems]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FEW, **by_name)
def test_bits_of_the_base_family(family: Family[Any], dtype: str) -> None:
    for problem in PROBLEMS[family]:
        for kind in ("normal", "nonfinite"):
            assert_bits_of_the_base(family, replace(problem, dtype=dtype), kind=kind)


@pytest.mark.parametrize("family", FEW, **by_name)
def test_a_weight_that_is_no_number_meets_only_what_exists(family: Family[Any]) -> None:
    """Infinite weights at every tap, positive data: infinity where a tap meets data, never a NaN from the padding."""
    for problem in PROBLEMS[family]:
        data = cases.exact_data(problem, seed=32)
        weight = np.full_like(data.weight, np.inf)
        data = data._replace(input=np.abs(data.input) + 1, weight=weight)
        output = hostcuda.compute(problem, *data, family=family.name, device=H200)
        base = hostcuda.compute(problem, *data, family=BASE[problem.op], device=H200)
        assert not np.isnan(output).any()
        assert_same_bits(output, base, problem)


def test_stems_of_a_small_gpu_load_their_weights_once() -> None:
    """Blocks that go through several rows of tiles, the last of which is not full."""
    device = replace(H200, num_sms=1)
    for p in (
        conv(2, 40, 3, 1500, N=9, padding_left=2),
        conv(1, 16, 90, 900, N=41, stride=2),
        conv(1, 8, 3, 30, N=901),
    ):
        _, launch = kernel_of(STEM, p, Layout.contiguous(p), device)
        assert dict(launch.params)["repeats"] > 1
        assert_bits_of_the_base(STEM, p, device=device)


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex128"])
@pytest.mark.parametrize("family", FEW, **by_name)
def test_layouts(family: Family[Any], dtype: str) -> None:
    for problem in PROBLEMS[family][:4]:
        check_layouts(family, replace(problem, dtype=dtype))


@pytest.mark.parametrize("family", FEW, **by_name)
def test_offsets_beyond_32_bits(family: Family[Any]) -> None:
    for problem in PROBLEMS[family]:
        check_offsets_beyond_32_bits(family, replace(problem, dtype="float16"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("family", [TAIL, TRANSPOSED], **by_name)
def test_copies_of_every_alignment(family: Family[Any], dtype: str) -> None:
    """Paddings move the first tap through every alignment; widths of copies follow from lengths and addresses."""
    widths = set()
    for L_in in (64, 66, 68, 71):
        for padding in range(9):
            if family is TAIL:
                p = conv(3, 1, 8, L_in, dtype=dtype, padding_left=padding, padding_right=3)
            else:
                p = transposed(3, 1, 8, L_in, dtype=dtype, stride=2, padding_left=padding)
            for alignment in {p.itemsize, 8, 16} if padding < 3 else {16}:
                if alignment >= p.itemsize:
                    contiguous = Layout.contiguous(p)
                    layout = contiguous.replaced(input=replace(contiguous["input"], alignment=alignment))
                    _, launch = kernel_of(family, p, layout, H200)
                    widths.add(dict(launch.params)["copy_elements"] * p.itemsize)
                    assert_bits_of_the_base(family, p, layout)
    assert widths >= {"bfloat16": {2, 4, 8}, "float32": {4, 8, 16}, "float64": {8, 16}}[dtype]


@pytest.mark.parametrize("family", [TAIL, TRANSPOSED], **by_name)
def test_copies_stay_inside_rows_with_gaps(family: Family[Any]) -> None:
    """Rows that begin at aligned addresses and end between two."""
    p = conv(3, 1, 8, 71, padding_left=4) if family is TAIL else transposed(3, 1, 8, 71, stride=2)
    layout = Layout.contiguous(p).replaced(input=ArrayLayout((3 * 72, 72, 1)))
    assert dict(kernel_of(family, p, layout, H200)[1].params)["copy_elements"] == 1
    assert_bits_of_the_base(family, p, layout)


def test_strides_that_lead_far_behind_a_short_input() -> None:
    """Offsets from a lane's first column to its others pass 32 bits, where the input ends before these."""
    p = ConvProblem("conv1d", 1, 1, 8, 3, 1, stride=1000)
    layout = Layout.contiguous(p).replaced(input=ArrayLayout((1, 1, 2**20)))
    _, launch = kernel_of(STEM, p, layout, H200)
    assert launch.index_bits == 64
    assert_bits_of_the_base(STEM, p, layout)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tails_store_16_bytes_where_rows_are_aligned(dtype: str) -> None:
    for length, expected in ((64, 1), (65, 0)):
        p = conv(3, 2, 3, length, dtype=dtype, padding_left=1, padding_right=1)
        _, launch = kernel_of(TAIL, p, Layout.contiguous(p), H200)
        assert dict(launch.params)["vector_stores"] == expected
    p = conv(3, 2, 3, 64, dtype=dtype, padding_left=1, padding_right=1)
    contiguous = Layout.contiguous(p)
    shifted = contiguous.replaced(output=replace(contiguous["output"], alignment=8))
    assert dict(kernel_of(TAIL, p, shifted, H200)[1].params)["vector_stores"] == 0


@pytest.mark.parametrize(
    ("family", "problem", "reason"),
    [
        (STEM, conv(5, 16, 3, 50), "C_in/groups from 1 to 4"),
        (STEM, conv(2, 4, 3, 50), "C_out/groups >= 8"),
        (STEM, conv(4, 8, 3, 50, groups=4, stride=2), "C_out/groups >= 8"),
        (STEM, conv(1, 1025, 2048, 9000, stride=512), "fits in shared memory"),
        (TAIL, conv(8, 5, 3, 50), "C_out/groups <= 4"),
        (TAIL, conv(4, 4, 3, 50, groups=4), "C_in/groups > 1 or groups = 1"),
        (TAIL, conv(8, 1, 3, 50, stride=2), "stride 1 and dilation 1"),
        (TAIL, conv(8, 1, 3, 50, dilation=2), "stride 1 and dilation 1"),
        (TAIL, conv(2, 1, 60_000, 60_000), "fit in shared memory"),
        (TRANSPOSED, transposed(8, 5, 3, 50), "C_out/groups <= 4"),
        (TRANSPOSED, transposed(4, 4, 3, 50, groups=4), "C_in/groups > 1 or groups = 1"),
        (TRANSPOSED, transposed(8, 1, 3, 50, dilation=2), "dilation 1"),
        (TRANSPOSED, transposed(8, 1, 256, 50, stride=64), "C_out/groups \\* stride <= 32"),
        (TRANSPOSED, transposed(2, 1, 60_000, 50), "fit in shared memory"),
    ],
    **by_name,
)
def test_refusals_say_why(family: Family[Any], problem: ConvProblem, reason: str) -> None:
    refusal = refusal_of(family, problem, Layout.contiguous(problem), H200)
    assert refusal is not None
    assert re.search(reason, refusal), refusal


def test_stems_choose_by_shape() -> None:
    """Wide tiles for many outputs, small ones for few, tiles of several samples for short samples."""

    def params(p: ConvProblem, layout: Layout | None = None) -> tuple[dict[str, str], dict[str, int]]:
        config, launch = kernel_of(STEM, p, layout or Layout.contiguous(p), H200)
        return dict(config.macros), dict(launch.params)

    wide, few = conv(1, 512, 10, 80_000, N=8, stride=5), conv(1, 16, 10, 400, N=1)
    assert params(wide)[0]["THREAD_L"] == "4"
    assert params(wide)[1]["repeats"] > 1
    assert int(params(few)[0]["THREAD_C"]) < 16
    assert params(few)[1]["step_l"] == 32
    assert params(conv(1, 64, 10, 40, N=1024))[1]["step_n"] == 1
    # Four output channels do not fill a tile of eight.
    discriminator = conv(1024, 1024, 41, 128, N=64, stride=4, groups=256)
    assert params(discriminator)[0]["THREAD_C"] == "4"
    assert params(discriminator)[1]["step_n"] == 1
    # An output with gaps along l is for the kernel with an address for each store.
    gaps = Layout.contiguous(wide)
    gaps = gaps.replaced(output=ArrayLayout((2 * 512 * wide.L_out, 2 * wide.L_out, 2)))
    assert params(wide, gaps)[0]["IS_CONTIGUOUS"] == "0"


def test_candidates_put_the_chosen_tile_first() -> None:
    p = conv(1, 512, 10, 80_000, N=8, stride=5)
    candidates = plan_of(STEM, p, Layout.contiguous(p), H200).candidates
    assert len(candidates) >= 2
    assert [slots for _, slots in candidates] == sorted(slots for _, slots in candidates)
    assert candidates[0][0].startswith("16 channels by 4 columns")
