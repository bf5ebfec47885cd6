"""Filter banks on tensor cores: windows of neighbouring taps, tiles that agree in every bit, and the error bound."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuconv import cases
from gpuconv.cases import Data
from gpuconv.checks import same_bits
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import Family, Layout, conv_im2col
from gpuconv.families.arithmetic import ARITHMETICS, MIN_SPLIT_TERMS
from gpuconv.families.conv_im2col import MIN_TERMS, Conv1dIm2col, ConvTranspose1dIm2col, Window
from gpuconv.families.mma_tiles import Tile
from gpuconv.problem import ConvProblem, Op
from tests.hostcuda import Program, TensorCores
from tests.kernels import tensor_cores
from tests.kernels.arrays import assert_same_bits
from tests.kernels.tensor_cores import (
    H200,
    assert_like_base,
    assert_right,
    check_bank_conflicts,
    check_offsets_beyond_32_bits,
    check_the_layer_alone_decides,
    chosen_result,
    data_of_one_sign,
    leave_one_tile,
)
from tests.plans import kernel_of

Array = npt.NDArray[Any]

FAMILY: dict[str, Family] = {family.kind: family for family in (Conv1dIm2col(), ConvTranspose1dIm2col())}
MODES = ("float16", "bfloat16", "float32", "tf32")

# Last units that are whole, that share the only plane, that have one of their own; planes that units share, and one for
# each unit; groups, dilations and channels that fill no stage.
PROBLEMS = {
    "whole units": ConvProblem("conv1d", 3, 1, 18, 160, 64, 4, 13, 9, has_bias=True),
    "stride 1": ConvProblem("conv1d", 3, 4, 20, 41, 17, 1, 11, 6, has_bias=True),
    "planes": ConvProblem("conv1d", 2, 2, 40, 170, 53, 10, 25, 31, has_bias=True),
    "dilated groups": ConvProblem("conv1d", 2, 9, 54, 83, 22, 3, 25, 17, 2, groups=3, has_bias=True),
    "far taps": ConvProblem("conv1d", 2, 7, 17, 330, 10, 1, 61, 87, 40, has_bias=True),
    "transposed": ConvProblem("conv_transpose1d", 3, 3, 20, 41, 23, 1, 5, 11, has_bias=True),
    "transposed groups": ConvProblem("conv_transpose1d", 2, 9, 54, 83, 22, 1, 31, 17, 2, groups=3, has_bias=True),
}
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


at = cases.in_format
takes, run = partial(tensor_cores.takes, FAMILY), partial(tensor_cores.run_by, FAMILY)


@st.composite
def layers(draw: st.DrawFn) -> ConvProblem:
    op: Op = draw(st.sampled_from(("conv1d", "conv1d", "conv_transpose1d")))
    groups, K, dilation = draw(st.sampled_from((1, 1, 2, 3))), draw(st.integers(1, 300)), draw(st.integers(1, 40))
    span = dilation * (K - 1) + 1
    return ConvProblem(
        op,
        N=1,
        C_in=groups * draw(st.integers(1, 9)),
        C_out=groups * draw(st.integers(1, 150)),
        L_in=span + draw(st.integers(0, 50)),
        K=K,
        stride=draw(st.one_of(st.integers(1, 20), st.integers(1, 600))) if op == "conv1d" else 1,
        padding_left=draw(st.integers(0, min(span - 1, 40))),  # an output remains
        dilation=dilation,
        groups=groups,
    )


def order(problem: ConvProblem, device: Device) -> dict[str, int]:
    """The order of summation, as the kernel is told it."""
    _, launch = kernel_of(FAMILY[problem.op], problem, Layout.contiguous(problem), device)
    return {name: dict(launch.params)[name] for name in ("pairs", "C_in_g", "K")}


@settings(max_examples=80)
@given(layer=layers(), mode=st.sampled_from(MODES), arch=st.sampled_from(tuple(ARCHITECTURES)))
def test_the_layer_alone_decides_where_it_runs_and_in_which_order_it_is_summed(
    layer: ConvProblem, mode: str, arch: str
) -> None:
    check_the_layer_alone_decides(FAMILY[layer.op], at(layer, mode), Device.from_arch(arch), order)


def test_the_fewest_channels_taps_and_terms() -> None:
    layer = ConvProblem("conv1d", 2, 4, 16, 60, 8)
    assert layer.terms == MIN_TERMS < MIN_SPLIT_TERMS
    assert [mode for mode in MODES if takes(at(layer, mode))] == ["float16", "bfloat16", "tf32"]
    assert all(takes(at(replace(layer, K=16), mode)) for mode in MODES)
    assert not any(takes(at(replace(layer, K=7, C_in=7), mode)) for mode in MODES)
    assert not any(takes(at(replace(layer, C_in=3), mode)) for mode in MODES)
    assert not any(takes(at(replace(layer, K=16, C_in=8), mode)) for mode in MODES)
    assert [mode for mode in MODES if takes(at(replace(layer, K=16, C_out=8), mode))] == ["float16", "bfloat16", "tf32"]
    transposed = replace(layer, op="conv_transpose1d", K=16)
    assert all(takes(at(transposed, mode)) for mode in MODES)
    assert not any(takes(at(replace(transposed, stride=2), mode)) for mode in MODES)


@settings(max_examples=300)
@given(layer=layers(), unit=st.sampled_from((4, 8)), block_n=st.sampled_from((16, 64, 128)))
def test_every_unit_of_every_column_reads_its_positions(layer: ConvProblem, unit: int, block_n: int) -> None:
    """The kernel's formulas for the row that a unit reads and for the position that a row begins at, put together."""
    p = replace(layer, K=layer.K + unit, L_in=layer.L_in + unit * layer.dilation)
    window = Window.of(p, unit, block_n)
    whole, last = divmod(p.K, unit)
    for i in range(whole + (last > 0)):
        round_, plane = divmod(i, window.planes)
        row = window.last_row if i == whole else round_ * window.round_rows + plane * window.plane_rows
        first_tap = p.K - unit if i == whole else i * unit
        for column in (0, 1, block_n - 1):
            plane_of_row, j = divmod(row + column, window.plane_rows)
            assert row + column < window.channel_rows
            shift = plane_of_row * window.plane_step if plane_of_row < window.planes else (p.K - unit) * p.dilation
            assert j * p.stride + shift == column * p.stride + first_tap * p.dilation
            # What is loaded for the last column of a result, where a block hangs over its end by all others.
            assert j < column + 1 + window.plane_rows - block_n


@pytest.mark.parametrize("mode", ["float16", "tf32", "float32"])
def test_operands_are_read_from_shared_memory_without_bank_conflicts(mode: str) -> None:
    for stride in (*range(1, 18), 50, 64):
        for C_in, K, dilation in ((1, 66, 1), (3, 23, 2)):
            span = dilation * (K - 1) + 1
            p = at(ConvProblem("conv1d", 1, C_in, 20, span + 5 * stride, K, stride, 0, 0, dilation), mode)
            check_bank_conflicts(run, p)


ITEMS = [
    (mode, tile, name)
    for mode in ("float16", "float32")
    for tile, name in zip(conv_im2col.tiles(ARITHMETICS[mode, "float32"]), [*PROBLEMS] * 2, strict=False)
]


@pytest.mark.parametrize(("mode", "tile", "name"), ITEMS, ids=[f"{m}-{t.block_m}x{t.block_n}" for m, t, _ in ITEMS])
def test_every_tile_gives_the_same_bits(mode: str, tile: Tile, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a short input and of a long one; from shared memory that was ready."""
    short = at(PROBLEMS[name], mode)
    found = [short, replace(short, N=1, L_in=short.L_in + 140 * short.stride)]
    expected = [chosen_result(run, p) for p in found]
    leave_one_tile(monkeypatch, conv_im2col, tile)
    monkeypatch.setattr(Program, "of", Program.without_nan_fallback)
    for p, bits in zip(found, expected, strict=True):
        macros = dict(kernel_of(FAMILY[p.op], p, Layout.contiguous(p), H200)[0].macros)
        assert (macros["BLOCK_M"], macros["BLOCK_N"]) == (str(tile.block_m), str(tile.block_n))
        output = run(p, cases.random_data(p, 4), schedule="every" if p is short else "forward")
        assert_same_bits(output, bits, str(p))


def test_the_problems_meet_every_form_of_window() -> None:
    forms = set()
    for problem in PROBLEMS.values():
        for unit in (4, 8):
            window = Window.of(problem, unit, 128)
            own = window.channel_rows > window.planes * window.plane_rows
            forms.add((window.planes > 1, window.round_rows > 0, own, problem.K % unit > 0))
    assert {(True, True), (True, False), (False, True)} <= {form[:2] for form in forms}
    assert {(True, True), (False, True), (False, False)} <= {form[2:] for form in forms}


@pytest.mark.parametrize("mode", ["float16", "tf32", "float32"])
@pytest.mark.parametrize("name", ["planes", "dilated groups", "transposed groups"])
def test_offsets_beyond_32_bits(name: str, mode: str) -> None:
    p = at(PROBLEMS[name], mode)
    check_offsets_beyond_32_bits(run, FAMILY[p.op], p)


@every_problem
def test_a_weight_that_is_no_number_counts_once_where_two_units_hold_its_tap(problem: ConvProblem) -> None:
    for mode, unit in (("float16", 8), ("float32", 4)):
        p = at(problem, mode)
        x, w, b = cases.random_data(p, 7)
        w[0, :, p.K - unit + 1] = np.inf
        assert_like_base(run, p, Data(np.abs(x), w, b))


@pytest.mark.parametrize("value", [np.inf, 2.0**-110])  # neither can be split
@every_problem
def test_values_outside_the_window_change_no_bit(problem: ConvProblem, value: float) -> None:
    """Fails if a unit that is not whole holds inputs of which no tap has the weight."""
    for mode in ("float16", "float32") if np.isinf(value) else ("float32",):
        p = at(problem, mode)
        x, w, b = cases.random_data(p, 3)
        expected = run(p, Data(x, w, b))
        for l_in in range(p.L_in // 2, p.L_in // 2 + max(2, p.stride)):  # at every distance from a window's end
            changed = x.copy()
            changed[0, 0, l_in] = value
            output = run(p, Data(changed, w, b))
            starts = np.arange(p.L_out) * p.stride - p.padding_left
            distance = np.arange(p.L_out) + p.padding_left - l_in if p.transposed else l_in - starts
            taps, rest = np.divmod(distance, p.dilation)
            outside = (rest != 0) | (taps < 0) | (taps >= p.K)
            assert outside.any()
            assert same_bits(output[..., outside], expected[..., outside]).all()
            assert not same_bits(output, expected).all()


@pytest.mark.parametrize(
    ("mode", "K"), [(mode, K) for mode in MODES for K in (10 if mode == "float32" else 9, 13, 17, 251)]
)
def test_sums_of_one_sign_whose_last_block_is_not_full(mode: str, K: int, rule: TensorCores) -> None:
    """Nine taps are three blocks of four, which the bound allows for."""
    p = at(ConvProblem("conv1d", 1, 7, 16, K + 20, K), mode)
    for data in data_of_one_sign(p):
        assert_right(p, run(p, data), data, rule)


@pytest.mark.parametrize("mode", ["float16", "float32"])
def test_the_long_sums_of_filter_banks(mode: str) -> None:
    """A ring of stages that goes round many times."""
    for problem in (
        ConvProblem("conv1d", 1, 1, 33, 4096, 2048, 512),
        ConvProblem("conv1d", 2, 1, 80, 411, 251, 10),
        ConvProblem("conv1d", 2, 1, 64, 700, 400, 50, 200, 200, has_bias=True),
    ):
        p = at(problem, mode)
        if takes(p):
            data = cases.random_data(p, 8)
            assert_right(p, run(p, data, schedule="every"), data)
