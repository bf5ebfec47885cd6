"""Few output channels on tensor cores: sums along diagonals, tiles that agree in every bit, and the error bound."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
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
from gpuconv.families import Family, Layout, conv_col2im
from gpuconv.families.arithmetic import ARITHMETICS
from gpuconv.families.conv_col2im import (
    MAX_BLOCK_M,
    MAX_BLOCK_N,
    MAX_REACH,
    MAX_RUN_ROWS,
    MAX_RUN_TERMS,
    MIN_C_IN_G,
    MIN_DILATED_WEIGHTS,
    MIN_ROW_TAPS,
    MIN_WEIGHTS,
    Conv1dCol2im,
    ConvTranspose1dCol2im,
    Runs,
)
from gpuconv.families.mma_tiles import Tile
from gpuconv.problem import ConvProblem
from tests import hostcuda
from tests.hostcuda import Program, TensorCores
from tests.kernels import tensor_cores
from tests.kernels.arrays import assert_same_bits
from tests.kernels.tensor_cores import (
    H200,
    assert_right,
    channels_last,
    check_bank_conflicts,
    check_offsets_beyond_32_bits,
    check_the_layer_alone_decides,
    chosen_result,
    data_of_one_sign,
    leave_one_tile,
)
from tests.plans import BASE, kernel_of

Array = npt.NDArray[Any]

FAMILY: dict[str, Family] = {family.kind: family for family in (Conv1dCol2im(), ConvTranspose1dCol2im())}
MODES = ("float16", "bfloat16", "float32", "tf32")

# Channels that fill no unit, one chunk and several; several blocks; rows of even length and of odd; padding beyond the
# taps; last runs that hold taps of the one before; phases with fewer taps, and results in front of the output.
PROBLEMS = {
    "head": ConvProblem("conv1d", 2, 50, 2, 300, 31, 1, 15, 15, has_bias=True),
    "dilated groups": ConvProblem("conv1d", 3, 100, 10, 83, 12, 1, 25, 40, 3, groups=2, has_bias=True),
    "odd": ConvProblem("conv1d", 2, 67, 3, 131, 25, has_bias=True),
    "stem gradient": ConvProblem("conv_transpose1d", 2, 64, 4, 90, 15, 1, 7, 7, has_bias=True),
    "transposed groups": ConvProblem("conv_transpose1d", 2, 153, 15, 301, 7, 1, 29, 5, 5, groups=3, has_bias=True),
    "filter bank gradient": ConvProblem("conv_transpose1d", 2, 80, 2, 60, 71, 5, 3, 5, output_padding=4, has_bias=True),
    "few rows": ConvProblem("conv_transpose1d", 2, 100, 2, 90, 9, 1, 32, 32, 8, groups=2, has_bias=True),
    "strided groups": ConvProblem("conv_transpose1d", 2, 100, 6, 131, 27, 2, 14, groups=2, has_bias=True),
}
EVERY = {f"{name}-{mode}": (p, mode) for name, p in PROBLEMS.items() for mode in MODES if mode != "bfloat16"}
every_problem = pytest.mark.parametrize(("problem", "mode"), EVERY.values(), ids=EVERY.keys())

at = cases.in_format
takes, run = partial(tensor_cores.takes, FAMILY), partial(tensor_cores.run_by, FAMILY)


@st.composite
def layers(draw: st.DrawFn) -> ConvProblem:
    op, groups, K = draw(st.sampled_from(tuple(FAMILY))), draw(st.sampled_from((1, 1, 2, 3))), draw(st.integers(1, 140))
    stride = draw(st.sampled_from((1, 1, 2, 5) if op == "conv_transpose1d" else (1, 1, 1, 2)))
    dilation = draw(st.integers(1, max(1, 150 // K // stride)))
    span = dilation * (K - 1) + 1
    return ConvProblem(
        op,
        N=1,
        C_in=groups * draw(st.integers(40, 90)),
        C_out=groups * draw(st.integers(1, 9)),
        L_in=span + draw(st.integers(0, 50)),
        K=K,
        stride=stride,
        padding_left=draw(st.integers(0, span - 1)),
        dilation=dilation,
        groups=groups,
    )


def order(problem: ConvProblem, device: Device) -> dict[str, int]:
    """The order of summation, as the kernel is told it."""
    _, launch = kernel_of(FAMILY[problem.op], problem, Layout.contiguous(problem), device)
    return {name: dict(launch.params)[name] for name in ("run_taps", "runs", "units", "chunks", "pairs", "K")}


@settings(max_examples=80)
@given(layer=layers(), mode=st.sampled_from(MODES), arch=st.sampled_from(tuple(ARCHITECTURES)))
def test_the_layer_alone_decides_where_it_runs_and_in_which_order_it_is_summed(
    layer: ConvProblem, mode: str, arch: str
) -> None:
    check_the_layer_alone_decides(FAMILY[layer.op], at(layer, mode), Device.from_arch(arch), order)


def test_the_limits() -> None:
    for op, mode in product(FAMILY, MODES):
        parts = 2 if mode == "float32" else 1
        layer = at(ConvProblem(op, 2, MIN_C_IN_G, 2, 400, MIN_WEIGHTS[parts] // 2), mode)
        assert takes(layer)
        for name, value in (("K", layer.K - 1), ("C_in", MIN_C_IN_G - 1), ("C_in", 4096), ("C_out", 9)):
            assert not takes(replace(layer, **{name: value}))
        K = MAX_REACH[parts] + 1
        assert takes(replace(layer, K=K))
        assert not takes(replace(layer, K=K + 1))
        dilated = replace(layer, C_out=1, K=MIN_DILATED_WEIGHTS, dilation=2)
        assert takes(dilated) == (op == "conv_transpose1d")
        strided = replace(layer, K=80, stride=MAX_RUN_ROWS // 2)
        assert takes(strided) == (op == "conv_transpose1d")
        assert not takes(replace(strided, stride=strided.stride + 1))
        assert not takes(replace(strided, dilation=2))
        assert not takes(replace(layer, C_out=1, K=60, stride=60))
        # Layers that conv1d_mma or conv_transpose1d_mma takes otherwise.
        wide = replace(layer, C_out=8, K=MIN_ROW_TAPS)
        assert takes(wide)
        assert takes(replace(wide, K=MIN_ROW_TAPS - 1)) == (parts == 2)
        most = MAX_RUN_TERMS // Runs.of(wide).run_taps
        assert takes(replace(wide, C_in=most))
        assert takes(replace(wide, C_in=most + 1)) == (parts == 2)
    largest = [tile for arithmetic in ARITHMETICS.values() for tile in conv_col2im.tiles(arithmetic, H200)]
    assert max(tile.block_m for tile in largest) == MAX_BLOCK_M
    assert max(tile.block_n for tile in largest) == MAX_BLOCK_N


@settings(max_examples=200)
@given(C_out=st.integers(1, 8), stride=st.integers(1, 16), K=st.integers(6, 1000))
def test_runs_hold_every_tap_once_and_fit_a_block(C_out: int, stride: int, K: int) -> None:
    """Rows of each phase: the last run alone begins before the one in front of it ends."""
    p = ConvProblem("conv_transpose1d", 1, 64, C_out, 3, K, min(stride, MAX_RUN_ROWS // C_out, K - 1))
    found = Runs.of(p)
    assert found.rows * found.runs <= MAX_BLOCK_M
    for phase in range(p.stride):
        taps = len(range(phase, K, p.stride))
        assert found.taps - 1 <= taps <= found.taps
        assert (found.runs - 1) * found.run_taps < found.taps <= found.runs * found.run_taps
        assert found.run_taps <= taps


@pytest.mark.parametrize("mode", MODES)
def test_only_transposed_layers_have_runs_of_few_rows(mode: str) -> None:
    """And tiles for them among the kernels that are compiled in advance."""
    for op, family in FAMILY.items():
        extents = product(range(1, 9), range(6, 70), (1, 2))
        layers = (at(ConvProblem(op, 2, 64, C_out, 199, K, dilation=d), mode) for C_out, K, d in extents)
        rows = {runs.rows * runs.runs for runs in (Runs.of(layer) for layer in layers if takes(layer))}
        block_rows = {dict(config.macros).get("BLOCK_M") for config in family.configs(H200)}
        assert (min(rows) <= 16) == ("16" in block_rows) == (op == "conv_transpose1d")


def test_runs_of_layers() -> None:
    """Two fragments of rows, which share what they load of the input, unless one suffices for all taps."""

    def runs(*args: Any) -> tuple[int, int]:
        found = Runs.of(ConvProblem("conv_transpose1d", 1, 64, *args))
        return found.run_taps, found.runs

    assert runs(1, 9, 251, 10) == (9, 3)  # SincNet
    assert runs(2, 9, 75) == (5, 15)  # BPNet
    assert runs(4, 9, 15) == (2, 8)  # Enformer
    assert runs(1, 9, 9) == (1, 9)  # MiniRocket


@every_problem
def test_operands_are_read_from_shared_memory_without_bank_conflicts(problem: ConvProblem, mode: str) -> None:
    check_bank_conflicts(run, at(problem, mode))


def fitting(tile: Tile) -> list[str]:
    """The problems whose runs a tile holds."""
    found = {name: Runs.of(p) for name, p in PROBLEMS.items()}
    return [
        name
        for name, runs in found.items()
        if runs.rows * runs.runs <= tile.block_m and runs.rest_taps * PROBLEMS[name].dilation < tile.block_n
    ]


ITEMS = [
    (mode, tile, fitting(tile)[i % len(fitting(tile))])
    for mode in ("float16", "float32")
    for i, tile in enumerate(conv_col2im.tiles(ARITHMETICS[mode, "float32"], H200))
]


@pytest.mark.parametrize(("mode", "tile", "name"), ITEMS, ids=[f"{m}-{t.block_m}x{t.block_n}" for m, t, _ in ITEMS])
def test_every_tile_gives_the_same_bits(mode: str, tile: Tile, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a short input and of a long one; from shared memory that was ready."""
    short = at(PROBLEMS[name], mode)
    found = [short, replace(short, N=1, L_in=short.L_in + 301)]
    expected = [chosen_result(run, p) for p in found]
    leave_one_tile(monkeypatch, conv_col2im, tile)
    monkeypatch.setattr(Program, "of", Program.without_nan_fallback)
    for p, bits in zip(found, expected, strict=True):
        macros = dict(kernel_of(FAMILY[p.op], p, Layout.contiguous(p), H200)[0].macros)
        assert (macros["BLOCK_M"], macros["BLOCK_N"]) == (str(tile.block_m), str(tile.block_n))
        output = run(p, cases.random_data(p, 4), schedule="every" if p is short else "forward")
        assert_same_bits(output, bits, str(p))


@every_problem
def test_bits_do_not_depend_on_where_a_result_lies(problem: ConvProblem, mode: str) -> None:
    """The same signal, some positions further on each time, which also moves pairs to other words."""
    p = replace(at(problem, mode), has_bias=False, padding_left=0, padding_right=0)
    x, w, _ = cases.random_data(p, 2)
    expected = run(p, Data(x, w, None))
    first = (p.K - 1) * p.dilation if p.transposed else 0
    for shift in (1, 2, 7):
        output = run(replace(p, L_in=p.L_in - shift), Data(x[..., shift:], w, None))
        assert_same_bits(output[..., first:], expected[..., first + shift * p.stride :], shift)


@pytest.mark.parametrize("mode", MODES)
def test_contiguous_channels_change_no_bit(mode: str) -> None:
    """Where units are loaded at once."""
    p = at(PROBLEMS["stem gradient"], mode)
    layout = channels_last(p)
    layout = layout.replaced(input=replace(layout["input"], alignment=16))
    config, _ = kernel_of(FAMILY[p.op], p, layout, H200)
    assert "CHANNELS_LAST" in dict(config.macros)
    data = cases.random_data(p, 4)
    assert_same_bits(run(p, data, layout=layout, schedule="every"), chosen_result(run, p), str(p))


@every_problem
def test_offsets_beyond_32_bits(problem: ConvProblem, mode: str) -> None:
    check_offsets_beyond_32_bits(run, FAMILY[problem.op], at(problem, mode))


@every_problem
def test_values_outside_the_window_change_no_bit(problem: ConvProblem, mode: str) -> None:
    p = at(problem, mode)
    x, w, b = cases.random_data(p, 3)
    expected = run(p, Data(x, w, b))
    l_in = p.L_in // 2
    for value in (np.inf, 2.0**-110) if mode == "float32" else (np.inf,):  # neither can be split
        changed = x.copy()
        changed[0, 0, l_in] = value
        output = run(p, Data(changed, w, b))
        starts = np.arange(p.L_out) - p.padding_left
        distance = np.arange(p.L_out) + p.padding_left - l_in * p.stride if p.transposed else l_in - starts
        taps, rest = np.divmod(distance, p.dilation)
        outside = (rest != 0) | (taps < 0) | (taps >= p.K)
        assert outside.any()
        assert same_bits(output[..., outside], expected[..., outside]).all()
        assert not same_bits(output, expected).all()
        if mode == "float32":  # what it feeds is summed in the order of the base family
            of_base = hostcuda.compute(p, changed, w, b, family=BASE[p.op])
            fed = np.s_[0, : p.C_out_g, ~outside]
            assert_same_bits(output[fed], of_base[fed], str(p))


def test_results_that_read_nothing_but_padding_are_the_bias() -> None:
    """As pieces of an output may, which have no input."""
    for op in FAMILY:
        p = at(ConvProblem(op, 2, 64, 6, 0, 9, 1, *((20, 3) if op == "conv1d" else (2, 0)), has_bias=True), "float16")
        data = cases.random_data(p, 11)
        expected = np.broadcast_to(np.reshape(data.bias, (-1, 1)), p.output_shape)
        assert_same_bits(run(p, data, schedule="every"), expected, op)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("C_in", [MIN_C_IN_G, 201])
def test_sums_of_one_sign(mode: str, C_in: int, rule: TensorCores) -> None:
    """The sums of channels are cut off, those of taps rounded."""
    p = at(ConvProblem("conv_transpose1d", 1, C_in, 2, 70, 30), mode)
    for data in data_of_one_sign(p):
        assert_right(p, run(p, data), data, rule)
