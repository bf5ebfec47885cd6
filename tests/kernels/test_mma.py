"""Tensor cores: windows, tiles that agree in every bit, and float32 by split TF32 on data made to break it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuconv
from bench.static import sass
from gpuconv import cases, dispatch, reference, source
from gpuconv.cases import Data
from gpuconv.checks import same_bits
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import ArrayLayout, Config, Family, Layout, mma
from gpuconv.families.arithmetic import ARITHMETICS, MIN_SPLIT_TERMS, STAGE_PAIRS, Access
from gpuconv.families.mma_tiles import Tile, tiles
from gpuconv.families.mma_window import MAX_UNITS, Reduction, Window
from gpuconv.families.product import Product
from gpuconv.problem import ConvProblem, Op
from tests import hostcuda
from tests.hostcuda import AMPERE, Program, TensorCores
from tests.kernels import tensor_cores
from tests.kernels.arrays import assert_same_bits, unaligned
from tests.kernels.tensor_cores import (
    H200,
    assert_like_base,
    assert_right,
    check_bank_conflicts,
    check_offsets_beyond_32_bits,
    check_the_layer_alone_decides,
    chosen_result,
    powers,
)
from tests.plans import FORWARD_FAMILIES, kernel_of

Array = npt.NDArray[Any]

FAMILY: dict[str, Family] = {family.kind: family for family in FORWARD_FAMILIES if family.name.endswith("_mma")}
MODES = ("float16", "bfloat16", "float32", "tf32")

# Every way in which a tap can be missing, channels that fill no unit, rows that fill no fragment.
PROBLEMS = {
    "padded": ConvProblem("conv1d", 3, 20, 18, 23, 5, 1, 4, 6, has_bias=True),
    "strided": ConvProblem("conv1d", 3, 34, 34, 29, 5, 3, 11, 13, 2, groups=2, has_bias=True),
    "phases differ": ConvProblem(
        "conv_transpose1d", 2, 44, 14, 9, 7, 3, 2, 1, groups=2, output_padding=2, has_bias=True
    ),
    "phase by phase": ConvProblem("conv_transpose1d", 3, 24, 17, 9, 7, 2, 5, 4, 3, output_padding=2, has_bias=True),
    "phases without taps": ConvProblem(
        "conv_transpose1d", 2, 22, 18, 9, 5, 4, 2, 1, 6, output_padding=3, has_bias=True
    ),
    "positions as channels": ConvProblem("conv1d", 2, 18, 34, 192, 64, 32, groups=2, has_bias=True),
}
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


at = cases.in_format
takes, run = partial(tensor_cores.takes, FAMILY), partial(tensor_cores.run_by, FAMILY)


def program_of(config: Config) -> Program:
    return Program.from_text(config.kernel, source.assemble(config.kernel, dict(config.macros)))


@st.composite
def layers(draw: st.DrawFn) -> ConvProblem:
    op: Op = draw(st.sampled_from(("conv1d", "conv_transpose1d")))
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    if draw(st.integers(0, 7)) == 0:
        stride = draw(st.sampled_from((32, 64, 96, 160)))
        K, C_in, C_out = stride * draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(st.integers(1, 150))
        return ConvProblem("conv1d", 1, groups * C_in, groups * C_out, K + stride, K, stride, groups=groups)
    stride, dilation = draw(st.integers(1, 20)), draw(st.sampled_from((1, 1, 2, 3, 6, 64, 512, 2000)))
    K = draw(st.integers(1, 40))
    span = dilation * (K - 1) + 1
    return ConvProblem(
        op,
        N=1,
        C_in=groups * draw(st.integers(1, 300)),
        C_out=groups * draw(st.integers(1, 150)),
        L_in=span + draw(st.integers(0, 50)),
        K=K,
        stride=stride,
        padding_left=draw(st.integers(0, min(span - 1, 40))),  # an output remains
        padding_right=draw(st.integers(0, min(span, 40))) if op == "conv1d" else 0,
        dilation=dilation,
        groups=groups,
        **{"dtype": "float32"},
    )


def reduction(problem: ConvProblem, device: Device) -> dict[str, int]:
    """The order of summation, as the kernel is told it."""
    _, launch = kernel_of(FAMILY[problem.op], problem, Layout.contiguous(problem), device)
    return {name: dict(launch.params)[name] for name in ("units", "chunks", "pairs", "segments", "segment_chunks")}


@settings(max_examples=80)
@given(layer=layers(), mode=st.sampled_from(MODES), arch=st.sampled_from(tuple(ARCHITECTURES)))
def test_the_layer_alone_decides_where_it_runs_and_in_which_order_it_is_summed(
    layer: ConvProblem, mode: str, arch: str
) -> None:
    check_the_layer_alone_decides(FAMILY[layer.op], at(layer, mode), Device.from_arch(arch), reduction)


def test_float32_needs_terms_enough_for_its_bound_and_others_do_not() -> None:
    few = ConvProblem("conv1d", 2, 9, 16, 40, MIN_SPLIT_TERMS // 9)
    assert few.terms < MIN_SPLIT_TERMS
    assert [mode for mode in MODES if takes(at(few, mode))] == ["float16", "bfloat16", "tf32"]
    assert takes(replace(few, K=few.K + 1))


@every_problem
def test_turing_computes_in_float16(problem: ConvProblem) -> None:
    p, turing = at(problem, "float16"), Device.from_arch("sm_75")
    data = cases.random_data(p, 1)
    assert_right(p, run(p, data, device=turing, schedule="every"), data)
    exact = cases.exact_data(p, 2)
    assert_same_bits(run(p, exact, device=turing), run(p, exact), p)


@st.composite
def products(draw: st.DrawFn) -> Product:
    column_step = draw(st.one_of(st.just(1), st.integers(1, 24)))
    tap_step = draw(st.one_of(st.integers(1, 24), st.integers(1, 600)))
    is_backward = column_step == 1 and draw(st.booleans())
    return Product(
        problem=replace(PROBLEMS["padded"], padding_left=draw(st.integers(0, 4))),
        products=1,
        rows=16,
        positions=1,
        first=0,
        taps=draw(st.integers(1, 48)),
        column_step=column_step,
        tap_step=-tap_step if is_backward else tap_step,
        phases_in_rows=False,
    )


@settings(max_examples=300)
@given(
    product=products(),
    block_samples=st.integers(1, 3),
    block_positions=st.integers(1, 40),
    wanted=st.sampled_from(Access),
)
def test_every_tap_of_every_column_reads_its_position(
    product: Product, block_samples: int, block_positions: int, wanted: Access
) -> None:
    """The kernel's formulas for the row that a tap reads and for the position that a row holds, put together.

    Pairs of rows hold an even position and the next one.
    """
    access = wanted if wanted is not Access.PAIR or Window.pairs_positions(product) else Access.POSITION
    window, taps, width = Window.of(product, block_samples, block_positions, access), product.taps, access.width
    used_rows, sample_rows = window.planes * window.plane_rows, window.sample_rows
    origin = -product.problem.padding_left
    assert window.used_rows == used_rows
    more = 0 if width == 1 else 2 * window.planes
    assert used_rows <= taps * block_positions + more  # never more than one row for each tap and column
    assert used_rows <= sample_rows < used_rows + 8
    rows = max(block_samples * sample_rows, 8)
    assert window.rows == (rows + (2 - rows) % 4 if access is Access.UNIT else rows)
    assert window.unit_tasks == (rows if width == 1 else max(4, block_samples * used_rows // 2))

    in_planes = product.column_step == 1

    def skew(plane: int) -> int:
        return (origin + window.shift + (plane * window.plane_step if in_planes else 0)) % 2 if width == 2 else 0

    def position(row: int) -> int:
        plane, j = divmod(row, window.plane_rows)
        return origin + j * product.column_step + window.shift + plane * window.plane_step - skew(plane)

    for tap in range(taps):
        repeat, plane_of_tap = divmod(tap + (0 if in_planes else skew(0)), window.planes)
        first = window.tap_rows_first + repeat * window.tap_rows_step + plane_of_tap * window.plane_rows
        first += skew(plane_of_tap) if in_planes else 0
        for column in range(block_samples * block_positions):
            sample, q = divmod(column, block_positions)
            row_of_sample, row = divmod(first + sample * sample_rows + q, sample_rows)
            assert row < used_rows
            assert row_of_sample == sample
            assert position(row) == origin + q * product.column_step + tap * product.tap_step
    for task in range(used_rows // 2 if width == 2 else 0):
        pair, j = divmod(task, window.plane_rows)
        row = 2 * task if in_planes else 2 * pair * window.plane_rows + j
        assert position(row) % 2 == 0
        assert position(row + (1 if in_planes else window.plane_rows)) == position(row) + 1


@pytest.mark.parametrize("mode", ["float16", "float32"])
def test_operands_are_read_from_shared_memory_without_bank_conflicts(mode: str) -> None:
    """Wherever a block's columns are of one sample."""
    settings = [(K, s, d) for s in range(1, 17) for K, d in ((2, 1), (3, 2), (5, 5))]
    settings += [(3, 2, d) for d in (3, 7, 16, 31, 64)]
    problems = [ConvProblem("conv1d", 1, 36, 20, 6 * s + d * K, K, s, K, 0, d) for K, s, d in settings]
    problems += [ConvProblem("conv_transpose1d", 1, 40, 20, 19, 2 * s, s) for s in (1, 2, 3, 5, 8, 16)]
    for problem in problems:
        p = at(problem, mode)
        assert takes(p), str(p)
        check_bank_conflicts(run, p)


@pytest.fixture
def only_tile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Tile], None]]:
    """Leaves the cost model one tile to choose, behind a launch that packs the weights."""
    compare = mma.compare_tilings

    def leave(tile: Tile) -> None:
        monkeypatch.setattr(
            mma,
            "compare_tilings",
            lambda *args, **how: tuple(t for t in compare(*args, **how) if t.tile == tile and not t.is_raw),
        )
        dispatch.choose.cache_clear()  # it remembers plans with other tiles

    yield leave
    dispatch.choose.cache_clear()


@pytest.mark.parametrize("mode", ["float16", "float32"])
def test_blocks_of_several_samples_meet_no_bank_conflicts(mode: str, only_tile: Callable[[Tile], None]) -> None:
    """Neither where eight neighbouring columns are of several samples, nor behind the last sample."""
    problems = [
        *(ConvProblem("conv1d", 70, 72, 20, L + K - 1, K) for L in (1, 2, 3, 5, 7, 8, 9, 24, 31) for K in (1, 2, 5)),
        *(
            ConvProblem("conv1d", 9, 72, 20, s * 10 + d * K, K, s, K, 0, d)
            for s in (2, 3, 8)
            for K, d in ((3, 1), (4, 3))
        ),
        *(ConvProblem("conv_transpose1d", 9, 72, 20, 11, 2 * s + 1, s) for s in (1, 2, 5)),
    ]
    only_tile(next(t for t in tiles(ARITHMETICS[mode, "float32"]) if t.has_samples and t.block_m == 64))
    for problem in problems:
        p = at(problem, mode)
        launch = kernel_of(FAMILY[p.op], p, Layout.contiguous(p), H200)[1]
        assert dict(launch.params)["block_samples"] > 1, str(p)
        check_bank_conflicts(run, p)


@pytest.mark.parametrize("mode", ["float16", "float32"])
@pytest.mark.parametrize(
    ("problem", "has_rest"),
    [
        (ConvProblem("conv1d", 1, 70, 20, 600, 13, 3, 2, 3, has_bias=True), False),
        (ConvProblem("conv1d", 1, 70, 20, 600, 1, 7, 0, 5, has_bias=True), True),
        (ConvProblem("conv1d", 1, 70, 20, 600, 2, 1, 3, 3, 512, has_bias=True), True),
        (ConvProblem("conv_transpose1d", 1, 70, 20, 600, 2, 1, 3, 3, 512, has_bias=True), True),
    ],
    ids=["strided", "one tap", "far taps", "transposed far taps"],
)
def test_input_arrives_in_batches(
    problem: ConvProblem,
    has_rest: bool,
    mode: str,
    only_tile: Callable[[Tile], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several batches of a chunk's input, also more than it has stages; from shared memory that was ready."""
    p = at(problem, mode)
    size = (64, 128) if mode == "float32" else (32, 256)
    only_tile(next(t for t in tiles(ARITHMETICS[mode, "float32"]) if (t.block_m, t.block_n) == size))
    config, launch = kernel_of(FAMILY[p.op], p, Layout.contiguous(p), H200)
    params, macros = dict(launch.params), dict(config.macros)
    batches = -(-(-(-params["units"] // int(macros["PREFETCH"])) * params["unit_tasks"]) // launch.block)
    rounds = -(-params["pairs"] // (STAGE_PAIRS * params["round_stages"]))
    assert params["chunks"] > 1
    assert batches > 1
    assert (batches > rounds) == has_rest
    monkeypatch.setattr(Program, "of", Program.without_nan_fallback)
    data = cases.random_data(p, 11)
    assert_right(p, run(p, data, schedule="every"), data)


@pytest.mark.parametrize("mode", ["float16", "float32"])
def test_chunks_may_lack_units_and_units_channels(
    mode: str, only_tile: Callable[[Tile], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole chunks, those that lack channels of the last unit or units; loads of one position and of two."""
    size = (64, 128) if mode == "float32" else (32, 256)
    only_tile(next(t for t in tiles(ARITHMETICS[mode, "float32"]) if (t.block_m, t.block_n) == size))
    monkeypatch.setattr(Program, "of", Program.without_nan_fallback)
    for C_in, L_in in product((8, 15, 16, 17, 24, 30, 31, 32, 33, 57, 62, 64), (14, 15)):
        p = at(ConvProblem("conv1d", 1, C_in, 20, L_in, 8, 1, 3, 2, has_bias=True), mode)
        data = cases.random_data(p, C_in)
        assert_right(p, run(p, data), data)


def test_products_fill_the_main_loop_of_the_square_tile() -> None:
    """In 16 bits for sm_90; none of its sums is in local memory."""
    tile = tiles(ARITHMETICS["float16", "float32"])[0]
    assert (tile.block_m, tile.block_n) == (128, 128)
    config = mma.kernel_config(
        "conv1d_mma", "float16", "float32", tile, 32, H200, phases_in_rows=False, segment_mode=tile.segment_mode
    )
    found = sass.report(config, "sm_90")
    assert not found.uses_local_memory
    assert found.loop.mix["tensor"] == 64
    assert found.loop.useful_share >= 0.6


# Long enough for several segments, of which the last is shorter.
LONG = {
    "conv1d": ConvProblem("conv1d", 2, 530, 20, 26, 16, 2, 3, 2, has_bias=True),
    "conv_transpose1d": ConvProblem("conv_transpose1d", 2, 530, 10, 7, 32, 2, 13, 12, has_bias=True),
    "conv_transpose1d phase by phase": ConvProblem("conv_transpose1d", 2, 530, 20, 7, 31, 2, 43, 42, 3, has_bias=True),
}
KERNELS = ("padded", "phases differ", "strided", "phase by phase")
LONG_KERNELS = ("conv1d", "conv_transpose1d", "conv_transpose1d phase by phase")


def tile_items() -> list[tuple[str, Tile, ConvProblem]]:
    """Every tile of float16 and of split TF32, dealt out to the kernels, with a problem that it may serve."""
    found = []
    for mode in ("float16", "float32"):
        arithmetic = ARITHMETICS[mode, "float32"]
        for i, tile in enumerate(tiles(arithmetic)):
            found.append((mode, tile, PROBLEMS[KERNELS[i % len(KERNELS)]]))
        for i, tile in enumerate(tiles(arithmetic, segments=True)):
            found.append((mode, tile, LONG[LONG_KERNELS[i % len(LONG_KERNELS)]]))
    return found


def tile_names() -> list[str]:
    def name(mode: str, t: Tile, p: ConvProblem) -> str:
        samples, segments = ("samples-" if t.has_samples else ""), ("", "segments-", "cut-")[t.segment_mode]
        return f"{mode}-{t.block_m}x{t.block_n}-{samples}{segments}{p.op}"

    return [name(*item) for item in tile_items()]


@pytest.mark.parametrize(("mode", "tile", "problem"), tile_items(), ids=tile_names())
def test_every_tile_gives_the_same_bits(
    mode: str, tile: Tile, problem: ConvProblem, only_tile: Callable[[Tile], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, and for every column of a long input and of several samples; from shared memory that was ready."""
    several = at(problem, mode)
    long = replace(several, N=1, L_in=150 * (1 if problem.transposed else problem.stride))
    found = [several] if tile.has_samples or tile.segment_mode else [several, long]
    expected = [chosen_result(run, p) for p in found]
    only_tile(tile)
    monkeypatch.setattr(Program, "of", Program.without_nan_fallback)
    for p, bits in zip(found, expected, strict=True):
        macros = dict(kernel_of(FAMILY[p.op], p, Layout.contiguous(p), H200)[0].macros)
        assert (macros["BLOCK_M"], macros["BLOCK_N"]) == (str(tile.block_m), str(tile.block_n))
        has_order = tile.segment_mode == 2 or (p is several and not tile.segment_mode)
        output = run(p, cases.random_data(p, 4), schedule="every" if has_order else "forward")
        assert_same_bits(output, bits, str(p))


def test_the_tiles_meet_several_segments_and_a_shorter_last_one() -> None:
    for mode in ("float16", "float32"):
        orders = [reduction(at(problem, mode), H200) for problem in LONG.values()]
        assert all(order["segments"] > 1 for order in orders)
        assert any(order["chunks"] % order["segment_chunks"] for order in orders)


# Of even lengths: planes of pairs that begin with an even or an odd position, in one plane or two, of several samples.
PAIRED = {
    "odd first": ConvProblem("conv1d", 2, 37, 18, 150, 3, 1, 1, 1),
    "even first": ConvProblem("conv1d", 2, 16, 18, 38, 4, 1, 2, 1, groups=2),
    "far taps": ConvProblem("conv1d", 1, 40, 18, 600, 3, 1, 3, 3, 135),
    "two planes": ConvProblem("conv1d", 2, 40, 18, 64, 3, 2, 1, 1),
    "eight planes": ConvProblem("conv1d", 2, 24, 18, 640, 16, 8, 4, 4),
    "as many taps as planes": ConvProblem("conv1d", 1, 40, 18, 340, 2, 2, 1, 1),
    "short samples": ConvProblem("conv1d", 13, 72, 20, 10, 3, 1, 1, 1),
    "shortest samples": ConvProblem("conv1d", 40, 72, 20, 2, 2, 1),
    "short samples in two planes": ConvProblem("conv1d", 13, 72, 20, 14, 3, 2, 1, 1),
    "transposed": ConvProblem("conv_transpose1d", 2, 40, 18, 200, 5, 1, 2, 2),
    "phase by phase": ConvProblem("conv_transpose1d", 3, 24, 17, 10, 7, 2, 5, 4, 3, output_padding=2),
}


@pytest.mark.parametrize("problem", PAIRED.values(), ids=PAIRED.keys())
def test_pairs_of_positions_change_no_bit(problem: ConvProblem) -> None:
    """Input that begins between words is loaded one position at a time."""
    p = at(problem, "bfloat16")
    x, w, b = cases.random_data(p, 12)
    outputs = []
    for given_input, width in ((x, "2"), (unaligned(x), "1")):
        layout = Layout.contiguous(p).replaced(input=hostcuda.array_layout(given_input))
        assert dict(kernel_of(FAMILY[p.op], p, layout, H200)[0].macros)["INPUT_WIDTH"] == width
        outputs.append(run(p, Data(given_input, w, b), layout=layout, schedule="every"))
    assert_right(p, outputs[0], Data(x, w, b))
    assert_same_bits(outputs[0], outputs[1], str(p))


@pytest.mark.parametrize("mode", MODES)
def test_positions_that_are_channels_are_copied_where_they_are_aligned(mode: str) -> None:
    """With the bits of those that are loaded one by one: over several channels in a segment, and rows with a rest."""
    layer = ConvProblem("conv1d", 2, 40, 34, 64 * 5 + 40, 128, 64, groups=2, has_bias=True)
    p = at(layer, mode)
    x, w, b = cases.random_data(p, 12)
    long, outputs = np.zeros((p.N, p.C_in, p.L_in + 1), x.dtype), []
    long[..., :-1] = x
    for given_input, is_copied in ((x, True), (unaligned(x), False), (long[..., :-1], False)):
        layout = Layout.contiguous(p).replaced(input=hostcuda.array_layout(given_input))
        config, launch = kernel_of(FAMILY[p.op], p, layout, H200)
        assert dict(launch.params)["fold"] == p.stride
        assert ("CHANNELS_LAST" in dict(config.macros)) == is_copied
        outputs.append(run(p, Data(given_input, w, b), layout=layout, schedule="every"))
    assert_right(p, outputs[0], Data(x, w, b))
    assert_same_bits(outputs[1], outputs[0], mode)
    assert_same_bits(outputs[2], outputs[0], mode)


def test_which_layers_have_positions_as_channels() -> None:
    """Those of which every window is of whole strides, and of 16 bits those that conv1d_im2col does not take."""
    layer = at(ConvProblem("conv1d", 1, 8, 16, 400, 64, 32), "float16")
    assert mma.product_of(layer).fold == 32
    for other in ({"K": 65}, {"stride": 16}, {"C_in": 7}, {"dilation": 2}):
        assert mma.product_of(replace(layer, **other)).fold == 1, other
    for padding in ({"padding_left": 33}, {"padding_right": 1}, {"L_in": 31, "padding_right": 33}):
        assert mma.product_of(replace(layer, **padding)).fold == 32, padding
    assert mma.product_of(at(replace(layer, C_in=1), "tf32")).fold == 32


@pytest.mark.parametrize(("mode", "padding"), [("float16", (40, 37)), ("float16", (33, 0)), ("float32", (28, 35))])
def test_padding_changes_no_bit_of_positions_that_are_channels(mode: str, padding: tuple[int, int]) -> None:
    """Pieces and streams of a padded layer have no padding where they read nothing outside the input."""
    left, right = padding
    p = at(ConvProblem("conv1d", 3, 8, 18, 168, 64, 32, left, right, has_bias=True), mode)
    data = cases.random_data(p, 12)
    y = run(p, data, schedule="every")
    assert_right(p, y, data)
    x = np.pad(data.input, ((0, 0), (0, 0), padding))
    inside = replace(p, L_in=x.shape[2], padding_left=0, padding_right=0)
    assert_same_bits(run(inside, data._replace(input=x)), y, mode)


def test_chunks_have_positions_of_one_channel_however_long_kernels_are() -> None:
    p = at(ConvProblem("conv1d", 1, 8, 16, 24 * 1024, 24 * 1024, 32), "float32")
    product, arithmetic = mma.product_of(p), ARITHMETICS[p.dtype, p.precision]
    reduction = Reduction.of(product, arithmetic)
    assert reduction.units < MAX_UNITS  # their window is too large for more
    assert p.stride % (reduction.units * arithmetic.channels) == 0
    assert reduction.chunks * reduction.units * arithmetic.channels == p.C_in * p.stride


def test_where_a_segment_of_positions_that_are_channels_begins() -> None:
    """Many channels times the distance of positions exceed 2**31, which no offset does."""
    p = at(ConvProblem("conv1d", 1, 512, 18, 32, 32, 32), "float16")
    data = cases.random_data(p, 12)
    rows = np.zeros((p.N, p.L_in, 200_000), np.float16)
    x = rows.transpose(0, 2, 1)[:, : p.C_in]
    x[...] = data.input
    layout = Layout.contiguous(p).replaced(input=hostcuda.array_layout(x))
    config, launch = kernel_of(FAMILY[p.op], p, layout, H200)
    assert launch.index_bits == 32
    assert dict(config.macros)["SEGMENT_MODE"] == "2"
    y = run(p, data._replace(input=x), layout=layout)
    assert_same_bits(y, run(p, data), "moved channels")


@pytest.mark.parametrize(
    "problem",
    [
        ConvProblem("conv1d", 1, 24, 18, 41, 3),  # rows begin between words
        ConvProblem("conv1d", 1, 24, 18, 40, 3, 3),  # every second position is in another place of its pair
        ConvProblem("conv1d", 1, 24, 18, 40, 3, 2, dilation=2),  # every second position is not needed
        ConvProblem("conv1d", 1, 24, 18, 40, 3, 4),  # nor is every fourth
    ],
    ids=str,
)
def test_what_is_loaded_one_position_at_a_time(problem: ConvProblem) -> None:
    p = at(problem, "float16")
    assert dict(kernel_of(FAMILY[p.op], p, Layout.contiguous(p), H200)[0].macros)["INPUT_WIDTH"] == "1"


# Rows that end inside of a vector; channels whose phases are all in one slice, some cut, or more than its rows.
LANDINGS = {
    "conv1d": ConvProblem("conv1d", 9, 12, 70, 25, 5, 1, 4, 5, has_bias=True),
    "three phases": ConvProblem("conv_transpose1d", 9, 12, 23, 11, 7, 3, 2, 1, output_padding=2, has_bias=True),
    "eight phases": ConvProblem("conv_transpose1d", 9, 12, 9, 9, 16, 8, 4, 4, has_bias=True),
    "forty phases": ConvProblem("conv_transpose1d", 9, 12, 5, 7, 60, 40, 7, 11, has_bias=True),
}


@pytest.mark.parametrize("has_samples", [False, True], ids=["one sample", "samples"])
@pytest.mark.parametrize("mode", ["bfloat16", "tf32"])
@pytest.mark.parametrize("name", LANDINGS)
def test_results_land_wherever_their_rows_begin(
    name: str, mode: str, has_samples: bool, only_tile: Callable[[Tile], None]
) -> None:
    """At every distance from a multiple of 16 bytes, positions apart, and backwards; with an infinite weight.

    From rows of 80 columns, whose vectors do not fill the lanes that store them.
    """
    p = at(LANDINGS[name], mode)
    arithmetic = ARITHMETICS[p.dtype, p.precision]
    only_tile(next(t for t in tiles(arithmetic) if t.has_samples == has_samples and t.block_n // t.warps_n == 80))
    C, L = p.C_out, p.L_out
    data = cases.random_data(p, 12)
    data.weight[1, 2, -1] = np.inf
    first = None
    pitches = range(L, L + 9) if not has_samples else (L, L + 1, L + 8 - L % 8)
    for strides in (
        *((C * pitch + 3, pitch, 1) for pitch in pitches),
        (C * L, 1, C),
        (-C * L, -L, -1),
        (2 * C * L, 2 * L, 2),
    ):
        layout = Layout.contiguous(p).replaced(output=ArrayLayout(strides, p.itemsize))
        output = run(p, data, layout=layout)
        first = output if first is None else first
        assert_same_bits(output, first, strides)
        assert_right(p, output, data, strides)


@pytest.mark.parametrize("mode", ["float16", "float32"])
@pytest.mark.parametrize("name", ["strided", "phases differ"])
def test_offsets_beyond_32_bits(name: str, mode: str) -> None:
    p = at(PROBLEMS[name], mode)
    check_offsets_beyond_32_bits(run, FAMILY[p.op], p)


@every_problem
def test_half_precision_overflows_when_it_is_stored_and_not_before(problem: ConvProblem) -> None:
    p = at(problem, "float16")
    x, w, b = cases.random_data(p, 8)
    x[0] = 6e4
    assert np.isinf(assert_like_base(run, p, Data(x, w, b))[0].astype(np.float64)).any()


def test_tf32_that_rounds_past_the_largest_number_is_as_good_as_unrounded() -> None:
    p = at(PROBLEMS["padded"], "tf32")
    x, w, b = cases.random_data(p, 9)
    x[0, 0, 5], w[3, 1, 2] = np.finfo("f4").max, -np.finfo("f4").max
    x[0, :, 5] *= np.float32(2.0**-10)
    w[3] *= np.float32(2.0**-10)
    assert_right(p, run(p, Data(x, w, b)), Data(x, w, b))


@pytest.mark.usefixtures("rule")
def test_split_tf32_on_long_sums_of_one_sign_and_of_halves() -> None:
    """Nothing cancels: what is cut off adds up. Significands full of ones, and halfway between two TF32 numbers."""
    p = at(ConvProblem("conv1d", 1, 512, 16, 24, 9), "float32")
    rng = np.random.default_rng(0)
    ones = np.float32(2 - 2.0**-22) - rng.integers(0, 8, p.input_shape) * np.float32(2.0**-23)
    halves = (
        1 + (2 * rng.integers(0, 1024, p.weight_shape) + 1) * 2.0**-11 + rng.integers(-1, 2, p.weight_shape) * 2.0**-23
    )
    for x in (ones, -ones, ones * 2.0 ** rng.integers(-12, 1, p.input_shape)):
        for w in (halves, np.abs(powers(rng, p.weight_shape, -3, 0)), np.full(p.weight_shape, 2 - 2.0**-22)):
            data = Data(x.astype(np.float32), w.astype(np.float32), None)
            assert_right(p, run(p, data), data)


def unflushed(config: Config) -> Program:
    """The kernel with one sum for all large products, where there is one segment."""
    program = program_of(config)
    if config.kernel not in {family.name for family in FAMILY.values()}:
        return program
    text, flush, total = program.text, "add_large_products(total, acc);", "part[i][j][e] + low[i][j][e]"
    assert text.count(flush) == text.count(total) == 1
    return replace(program, text=text.replace(flush, ";").replace(total, f"acc[i][j][e] + ({total})"))


def test_without_the_flush_the_bound_would_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """One product of 1, and then, for the rule of Ampere, blocks of four that lose five units each.

    Next to a sum from 1 on, terms are cut off at u = 2**-24: three of almost 2u to u, one of almost u to 0. A sum that
    has become three units larger is rounded down by one.
    """
    monkeypatch.setattr(TensorCores, "of", staticmethod(lambda _: AMPERE))
    for C_in, sign in ((MIN_SPLIT_TERMS, 1), (512, 1), (512, -1)):
        p = at(ConvProblem("conv1d", 1, C_in, 16, 16, 1), "float32")
        almost = 2 - 2.0**-10
        w = np.full(p.weight_shape, almost * 2.0**-24, np.float32)
        w[:, ::4] /= 2
        w[:, 0] = 1
        data = Data(np.full(p.input_shape, sign, np.float32), w, None)
        assert_right(p, run(p, data), data)
        with monkeypatch.context() as patch:
            patch.setattr(Program, "of", unflushed)
            broken = run(p, data)
        error = np.abs(broken - reference.compute(p, *data))
        assert (error > 1.2 * (p.terms - 4) * 2.0**-24).all()
        assert not reference.within_bound(p, broken, *data).any()


@pytest.mark.gpu
def test_two_launches_through_the_public_function(cupy: Any, launched: list[str]) -> None:
    """The sums of segments go to a buffer of the call's, whether the weight was prepared or not."""
    if int(cupy.cuda.Device().compute_capability) < 80:
        pytest.skip("no TF32 here")
    p = replace(LONG["conv1d"], N=1, has_bias=False)
    data = cases.random_data(p, 10)
    x, w = cupy.asarray(data.input), cupy.asarray(data.weight)
    outputs = [gpuconv.conv1d(x, weight, **cases.call_settings(p)).get() for weight in (w, gpuconv.prepare(w))]
    assert launched == ["pack_mma_weight", "conv1d_mma", "conv1d_mma"] * 2
    assert_right(p, outputs[0], data)
    assert_same_bits(outputs[1], outputs[0], str(p))


# Stages that are not full; planes; phases with fewer taps than others, whose missing taps read a row that they do have.
PADDED = ConvProblem("conv1d", 1, 24, 16, 20, 3, 1, 2, 3)
STRIDED = ConvProblem("conv1d", 1, 36, 16, 33, 5, 3, 4, 4, 2)
PHASES = ConvProblem("conv_transpose1d", 1, 24, 16, 20, 5, 2, 0, 0, 3)
SHORT_PHASES = ConvProblem("conv_transpose1d", 1, 64, 16, 27, 7, 3, 2, 2)  # in rows, two of three without a third tap


def output_positions(p: ConvProblem, l_in: int) -> set[int]:
    """The output positions whose window contains an input position."""
    if p.transposed:
        return {l_in * p.stride - p.padding_left + k * p.dilation for k in range(p.K)}
    starts = (l_in + p.padding_left - k * p.dilation for k in range(p.K))
    return {start // p.stride for start in starts if start % p.stride == 0}


def test_few_output_channels_are_taken_where_many_weights_meet_each_input() -> None:
    """Transposed layers: their rows are many because the stride is."""
    layer = ConvProblem("conv_transpose1d", 3, 40, 1, 13, 64, 16, 11, has_bias=True)
    assert all(takes(at(layer, mode)) for mode in MODES)
    assert not any(takes(at(replace(layer, K=63), mode)) for mode in MODES)
    assert all(takes(at(replace(layer, K=32, C_out=2), mode)) for mode in MODES)
    assert not any(takes(at(replace(layer, op="conv1d", L_in=100), mode)) for mode in MODES)
    for mode in ("float16", "float32"):
        p = at(layer, mode)
        data = cases.random_data(p, 8)
        assert_right(p, run(p, data, schedule="every"), data)


def test_chunks_have_fewer_units_where_windows_are_large() -> None:
    """Only in layers whose windows are wide, or would not fit otherwise; a batch and a sample have the same bits."""
    layer = ConvProblem("conv1d", 2, 20, 16, 2000, 600, 256, 40, 50, has_bias=True)
    assert [mode for mode in MODES if takes(at(layer, mode))] == ["float16", "bfloat16", "tf32"]
    for channels, taps, units in ((20, 600, 1), (20, 200, 3), (64, 150, 2), (64, 16, 2), (64, 10, 4)):
        assert reduction(at(replace(layer, C_in=channels, K=taps), "float16"), H200)["units"] == units
    p = at(layer, "bfloat16")
    x, w, b = cases.random_data(p, 9)
    output = run(p, Data(x, w, b))
    assert_right(p, output, Data(x, w, b))
    assert_same_bits(run(replace(p, N=1), Data(x[1:], w, b)), output[1:], str(p))


@pytest.mark.parametrize(("mode", "value"), [("float32", np.inf), ("float32", 2.0**-110), ("float16", np.inf)])
@pytest.mark.parametrize(
    "problem", [PADDED, STRIDED, PHASES, SHORT_PHASES], ids=["padded", "strided", "phases", "short phases"]
)
def test_values_outside_the_window_change_no_bit(problem: ConvProblem, mode: str, value: float) -> None:
    """Neither of the values can be split."""
    p = at(problem, mode)
    family = FAMILY[p.op].name
    x, w, b = cases.random_data(p, 3)
    expected = hostcuda.compute(p, x, w, b, family=family)
    x[0, 3, 10] = value
    output = hostcuda.compute(p, x, w, b, family=family)
    outside = [l_out for l_out in range(p.L_out) if l_out not in output_positions(p, 10)]
    assert same_bits(output[..., outside], expected[..., outside]).all()
    assert not same_bits(output, expected).all()


# Rows of phases without the last tap: of several samples; in segments; those with more phases meet more channels.
SHORT_ROWS = [
    (ConvProblem("conv_transpose1d", 3, 44, 24, 9, 7, 3, 2, 1, groups=2, has_bias=True), "float32"),
    (ConvProblem("conv_transpose1d", 2, 1040, 8, 8, 7, 2, 3, 2, has_bias=True), "float16"),
    (ConvProblem("conv_transpose1d", 1, 20, 8, 30, 26, 17, 3), "bfloat16"),
]


@pytest.mark.parametrize(("problem", "mode"), SHORT_ROWS, ids=["samples", "segments", "many phases"])
def test_rows_apart_and_together_give_the_same_bits(
    problem: ConvProblem, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every kind of tiling, of packed and of raw weights, also next to an infinity outside of the windows."""
    p, compare = at(problem, mode), mma.compare_tilings
    x, w, b = cases.random_data(p, 6)
    other = x.copy()
    other[-1, 3, 4] = np.inf
    outside = [l_out for l_out in range(p.L_out) if l_out not in output_positions(p, 4)]
    kinds: dict[tuple[object, ...], mma.Tiling] = {}

    def one_of_each_kind(*args: Any, **settings: Any) -> tuple[mma.Tiling, ...]:
        for t in compare(*args, **settings):
            kinds.setdefault((t.row_tiles.short > 0, t.is_raw, t.tile.has_samples, t.tile.segment_mode), t)
        return tuple(kinds.values())

    monkeypatch.setattr(mma, "compare_tilings", one_of_each_kind)
    kernel_of(FAMILY[p.op], p, Layout.contiguous(p), H200)
    assert {kind[:2] for kind in kinds} == set(product((False, True), repeat=2))
    found = []
    for tiling in kinds.values():
        monkeypatch.setattr(mma, "compare_tilings", lambda *_args, only=tiling, **_settings: (only,))
        dispatch.choose.cache_clear()
        found.append((run(p, Data(x, w, b)), run(p, Data(other, w, b))))
    dispatch.choose.cache_clear()
    assert_right(p, found[0][0], Data(x, w, b))
    for kind, outputs in zip(kinds, found, strict=True):
        for output, expected in zip(outputs, found[0], strict=True):
            assert_same_bits(output, expected, (str(p), kind))
        assert_same_bits(outputs[1][..., outside], outputs[0][..., outside], (str(p), kind))


@pytest.mark.parametrize("op", ["conv1d", "conv_transpose1d"])
def test_padding_beside_channels_in_reverse(op: Op) -> None:
    """Offsets of channels are negative, and are added to none where a position does not exist."""
    p = ConvProblem(op, 2, 40, 9, 13, 4, 1, 2, 3, dtype="float16")
    x, w, b = cases.exact_data(p, 5)
    expected = hostcuda.compute(p, x, w, b, family=FAMILY[op].name)
    output = hostcuda.compute(p, np.ascontiguousarray(x[:, ::-1])[:, ::-1], w, b, family=FAMILY[op].name)
    assert same_bits(output, expected).all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_many_short_samples_share_blocks(arch: str) -> None:
    """Also where offsets need 64 bits: a block for each sample would be more than a grid holds."""
    p = ConvProblem("conv1d", 2**29, 32, 32, 1, 1, groups=4, dtype="float16")
    _, launch = kernel_of(FAMILY["conv1d"], p, Layout.contiguous(p), Device.from_arch(arch))
    assert launch.index_bits == 64
    assert launch.grid < p.N * p.groups // 32
    assert dict(launch.params)["block_samples"] == 64


@settings(max_examples=80)
@given(layer=layers(), mode=st.sampled_from(MODES))
def test_the_layer_alone_decides_where_a_sum_is_cut(layer: ConvProblem, mode: str) -> None:
    """From 4,096 terms on, those that fill up stages included, into 4 to 32 segments, whatever N and L are."""
    p = at(layer, mode)
    for N, length in ((1, p.L_in), (50, p.L_in), (3, 8 * p.L_in)):
        product = Product.of(replace(p, N=N, L_in=length))
        arithmetic = ARITHMETICS[p.dtype, p.precision]
        found = Reduction.of(product, arithmetic)
        assert found == Reduction.of(Product.of(p), arithmetic)
    stages = found.chunks * found.stages
    terms = stages * STAGE_PAIRS * arithmetic.channels
    if terms < 4096:
        assert found.segments == 1
    else:
        # Whole chunks: where these are few, there are fewer segments.
        assert min(found.chunks, 2) <= found.segments <= 32
        assert found.segment_chunks >= found.chunks / max(4, min(32, stages / 64))


@pytest.mark.parametrize(
    ("channels", "taps", "stride", "mode", "segments"),
    [
        (256, 16, 8, "bfloat16", 4),
        (255, 16, 8, "bfloat16", 4),  # filled up
        (224, 16, 8, "bfloat16", 1),
        (1366, 3, 1, "tf32", 4),
        (1280, 3, 2, "tf32", 1),
        (1280, 3, 1, "float16", 1),
        (2048, 3, 1, "float32", 6),
        (2048, 16, 8, "float32", 32),
        (48, 128, 1, "float16", 2),  # of two chunks
    ],
)
def test_where_sums_are_cut(channels: int, taps: int, stride: int, mode: str, segments: int) -> None:
    p = at(ConvProblem("conv1d", 1, channels, 64, 5 * taps, taps, stride), mode)
    assert reduction(p, H200)["segments"] == segments


@pytest.mark.parametrize(
    ("taps", "stride", "mode", "units"),
    [(16, 8, "float32", 2), (14, 7, "float32", 2), (10, 5, "float32", 4), (16, 8, "tf32", 4), (16, 8, "bfloat16", 4)],
)
def test_strides_from_which_windows_are_wide(taps: int, stride: int, mode: str, units: int) -> None:
    p = at(ConvProblem("conv1d", 1, 256, 64, 5 * taps, taps, stride), mode)
    assert reduction(p, H200)["units"] == units


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [9, 17, 100, 1000, 4000])
@pytest.mark.parametrize("taps", [1, 3, 16, 500])
def test_segments_keep_the_bound(channels: int, taps: int, mode: str) -> None:
    """A product takes part in the sums of its segment and in one for each segment, each a unit of the bound."""
    p = at(ConvProblem("conv1d", 1, channels, 16, taps, taps), mode)
    arithmetic = ARITHMETICS[p.dtype, p.precision]
    order = Reduction.of(Product.of(p), arithmetic)
    of_segment = min(p.terms, order.segment_chunks * order.units * arithmetic.channels * taps)
    if arithmetic.parts == 1:
        assert 3 * order.segments + 4 * of_segment <= 4 * p.terms + 3 * 3
    elif p.terms >= MIN_SPLIT_TERMS:
        units = 4 + 4 + 8 + 20 + p.terms / 400 + of_segment / 10 + 2 + order.segments
        assert units <= p.terms + 2
