"""Weight gradients on tensor cores, executed on the CPU (tests/hostcuda): values, bits, edges, shared memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuconv import dispatch, reference
from gpuconv.cases import CASES
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import ArrayLayout, Config, Layout, slices
from gpuconv.families import weight_gradient_mma as mma
from gpuconv.families.arithmetic import ARITHMETICS, arithmetics
from gpuconv.families.base import contiguous_strides
from gpuconv.families.slices import Slices
from gpuconv.families.weight_gradient_costs import GradientLaunch
from gpuconv.families.weight_gradient_window import OCTET, STEP, Columns, Fetch, Window
from gpuconv.problem import WeightGradientProblem
from tests import hostcuda
from tests.hostcuda import Counts, Program
from tests.hostcuda.banks import wavefronts
from tests.kernels.arrays import assert_same_bits, channels_last, unaligned
from tests.kernels.test_gradient_kernels import check_layouts, exact_result, integers, normal, shapes
from tests.plans import kernel_of, refusal_of

Array = npt.NDArray[Any]

NAME = "weight_gradient_mma"
FAMILY = mma.WeightGradientMma()
DEVICE = Device.from_arch("sm_90")
MODES = tuple(ARITHMETICS)  # (dtype, precision)
HALF, SINGLE = ("float16", "float32"), ("float32", "float32")
EVERY_TILE = (
    *((mode, tile) for mode in (HALF, SINGLE) for tile in mma.TILES[ARITHMETICS[mode].parts]),
    *((("float32", "tf32"), tile) for tile in mma.TILES[1] if tile.block_m in (48, 128)),
)


def problem(
    C_coarse: int, C_fine: int, L: int, K: int, mode: tuple[str, str] = HALF, L_fine: int | None = None, **settings: Any
) -> WeightGradientProblem:
    """Two samples of a layer that pads half of its taps, unless the settings say otherwise."""
    settings = {"N": 2, "op": "conv1d", "stride": 1, "dilation": 1, **settings}
    span = settings["dilation"] * (K - 1)
    settings.setdefault("padding_left", span // 2)
    if L_fine is None:
        L_fine = max(1, (L - 1) * settings["stride"] + 1 + span - 2 * settings["padding_left"])
    return WeightGradientProblem(
        C_coarse=C_coarse, C_fine=C_fine, L_coarse=L, L_fine=L_fine, K=K, dtype=mode[0], precision=mode[1], **settings
    )


def takes(p: WeightGradientProblem, device: Device = DEVICE) -> bool:
    return refusal_of(FAMILY, p, Layout.contiguous(p), device) is None


def table(mode: tuple[str, str]) -> Iterator[tuple[str, WeightGradientProblem]]:
    """The cases of the table that the family takes in a mode."""
    for case in CASES:
        p = replace(WeightGradientProblem.of(case.at(mode[0])), precision=mode[1])
        if 0 not in (*p.coarse_shape, *p.fine_shape, *p.weight_shape) and takes(p):
            yield case.name, p


def run(p: WeightGradientProblem, coarse: Array, fine: Array, **how: Any) -> Array:
    return hostcuda.compute(p, coarse, fine, family=NAME, **how)


def expect_exact(p: WeightGradientProblem, **how: Any) -> None:
    assert takes(p), p
    arrays = integers(p)
    assert_same_bits(run(p, *arrays, **how), exact_result(p, *arrays), p)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Most kernels that the tests need, compiled together, which is faster than one by one."""
    of_table = {kernel_of(FAMILY, p, Layout.contiguous(p), DEVICE)[0] for mode in MODES for _, p in table(mode)}
    of_tiles = {FAMILY._config(tile, *mode, (Fetch.RUN, Fetch.RUN), 32) for mode, tile in EVERY_TILE}
    hostcuda.prebuild([*of_table, *of_tiles])


@pytest.fixture
def use_tile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that leaves the family a single tile. Sums are cut as if it had all tiles."""
    every, cut, most = mma.TILES, mma._cut, mma.MOST_NARROW_TILES

    def cut_with_all(p: WeightGradientProblem) -> tuple[Slices, tuple[float, ...]]:
        with patch.multiple(mma, TILES=every, MOST_NARROW_TILES=most):
            return cut(p)

    def forget() -> None:
        mma._tilings.cache_clear()
        dispatch.choose.cache_clear()

    def use(parts: int, tile: mma.Tile) -> None:
        monkeypatch.setattr(mma, "TILES", {**mma.TILES, parts: (tile,)})
        monkeypatch.setattr(mma, "MOST_NARROW_TILES", math.inf)
        monkeypatch.setattr(mma, "_cut", cut_with_all)
        forget()

    yield use
    forget()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_table(mode: tuple[str, str]) -> None:
    """Integers are exact; normal data are within the bound, and NaN and infinities are where they belong."""
    taken = list(table(mode))
    assert len(taken) >= (2 if mode == SINGLE else 10)  # few of its sums have as many terms as the split needs
    for i, (name, p) in enumerate(taken):
        arrays = integers(p)
        assert_same_bits(run(p, *arrays, schedule=i), exact_result(p, *arrays), name)
        arrays = normal(p, nonfinite=i % 2 == 1)
        assert reference.weight_gradient(p, *arrays).within_bound(run(p, *arrays, placement="start")).all(), name


def test_rows_that_are_no_whole_eights_of_units(use_tile: Any) -> None:
    """A tile of 48 rows has 12 units of 32-bit data, which lanes take by eights, or 6 of 16-bit data, by fours."""
    (tile,) = (tile for tile in mma.TILES[1] if tile.block_m == 48)
    use_tile(1, tile)
    p = problem(48, 16, 61, 3)
    arrays = normal(p)
    assert_same_bits(run(p, *arrays), run(p, *map(unaligned, arrays)), p)
    tile = next(tile for tile in mma.TILES[2] if tile.block_m == 48)
    use_tile(2, tile)
    p = problem(48, 16, 60, 3, SINGLE)
    coarse, fine = normal(p)  # not integers: of those the sums that are formed again would be exact, too
    view = channels_last(coarse)
    layout = Layout.contiguous(p).replaced(coarse=hostcuda.array_layout(view))
    macros = dict(kernel_of(FAMILY, p, layout, DEVICE)[0].macros)
    assert (macros["BLOCK_M"], macros["COARSE_LAST"]) == ("48", "1")
    assert_same_bits(run(p, view, fine, layout=layout), run(p, coarse, fine), p)


@pytest.mark.parametrize(
    "p",
    [
        problem(24, 20, 150, 5),  # wide loads of both
        problem(24, 20, 152, 4, stride=3, padding_left=1),  # of coarse alone
        problem(9, 10, 75, 3),  # of neither
        problem(40, 8, 12, 3, N=20),  # several samples in a chunk
        problem(20, 3, 66, 19, stride=4, padding_left=5),  # octets of taps, the last of which is not whole
        problem(17, 1, 70, 44, ("float32", "tf32"), stride=3, dilation=2),
        problem(20, 40, 136, 3, ("bfloat16", "float32"), dilation=40),  # a plane for each tap
        problem(17, 24, 68, 7, ("float32", "tf32"), dilation=3),
        problem(16, 9, 70, 2, ("float32", "tf32"), stride=2),
        problem(20, 12, 132, 3, SINGLE, groups=1),
        problem(32, 16, 33, 9, SINGLE, groups=2),
    ],
    ids=str,
)
def test_bits_depend_on_no_schedule_and_need_no_nan_fallback(p: WeightGradientProblem) -> None:
    """Shared memory that is read too early holds NaNs here, and the fallback would repair what a GPU leaves wrong."""
    layout = Layout.contiguous(p)
    config, launch = kernel_of(FAMILY, p, layout, DEVICE)
    program = Program.without_nan_fallback(config)
    coarse, fine = normal(p)
    cut = mma._slices(p)
    results = []
    for kernel in (config, program):
        sums = np.empty((cut.count, *p.weight_shape), np.float32)
        result = np.empty(p.weight_shape, coarse.dtype)
        arrays: dict[str, Array | None] = {"coarse": coarse, "fine": fine, "partial": sums, "grad_weight": None}
        if cut.count == 1:
            arrays.update(partial=None, grad_weight=result)
        output = "partial" if cut.count > 1 else "grad_weight"
        results.append(hostcuda.run(kernel, launch, arrays, outputs=[output], schedule="every", device=DEVICE))
    assert_same_bits(*results, p)


def fetches(p: WeightGradientProblem, **arrays: ArrayLayout) -> tuple[Fetch, Fetch]:
    return mma._fetches(p, Layout.contiguous(p).replaced(**arrays), 32, DEVICE)


def test_rows_are_loaded_as_wide_as_their_layout_allows() -> None:
    for mode, odd in ((HALF, Fetch.SHIFTED), (SINGLE, Fetch.POSITION)):
        for L, expected in ((152, Fetch.RUN), (150, Fetch.PAIRS), (151, odd)):
            p = problem(24, 20, L, 5, mode)
            assert fetches(p) == (expected, expected), p
            assert fetches(replace(p, padding_mode="reflect")) == (expected, Fetch.POSITION)
            assert fetches(problem(24, 20, L, 4, mode, 4 * L, stride=3)) == (expected, Fetch.RUN)
            assert fetches(problem(24, 20, L, 4, mode, 4 * L, stride=3, dilation=2)) == (expected, Fetch.POSITION)
    assert fetches(problem(24, 20, 152, 3, padding_left=0)) == (Fetch.RUN, Fetch.PAIRS)
    assert fetches(problem(24, 20, 151, 4, padding_left=0)) == (Fetch.SHIFTED, Fetch.PAIRS)
    # Only neighbouring rows share words, and no word lies before the array.
    p = problem(24, 20, 151, 5)
    for strides, alignment, expected in (
        ((24 * 153, 153, 1), 4, Fetch.SHIFTED),
        ((24 * 153 + 1, 153, 1), 4, Fetch.SHIFTED),
        ((0, 153, 1), 4, Fetch.SHIFTED),
        ((24 * 152, 152, 1), 16, Fetch.POSITION),
        ((24 * 153, 153, 1), 2, Fetch.POSITION),
        ((24 * 151, -151, 1), 4, Fetch.POSITION),
        ((-24 * 151, 151, 1), 4, Fetch.POSITION),
        ((24 * 302, 302, 2), 4, Fetch.POSITION),
    ):
        assert fetches(p, coarse=ArrayLayout(strides, alignment))[0] is expected, strides


# Rows of odd length: in both arrays, runs that are whole and runs that end after one to three positions.
SHIFTED = (
    problem(16, 9, 33, 3, padding_left=1),
    problem(9, 16, 35, 2, N=1, padding_left=2, dilation=3, L_fine=35),
    problem(20, 12, 41, 5, padding_left=7, groups=1),
    problem(17, 8, 5, 3, N=15),  # several samples in a chunk, of which the last ones do not exist
    problem(30, 27, 71, 3, groups=3),
    problem(7, 9, 37, 3),  # fewer rows than a unit has
    problem(6, 9, 75, 3, N=1),
)


@pytest.fixture
def small_tile(use_tile: Any) -> None:
    (tile,) = (tile for tile in mma.TILES[1] if (tile.block_m, tile.block_n) == (16, 128))
    use_tile(1, tile)


@pytest.mark.usefixtures("small_tile")
def test_words_that_two_rows_share() -> None:
    """Results have the same bits as with loads of single elements, and do not depend on what lies between rows."""
    for p in SHIFTED:
        coarse, fine = normal(p)
        expected = run(p, *map(unaligned, (coarse, fine)))
        views = padded(coarse), padded(fine)
        of_coarse, of_fine = map(hostcuda.array_layout, views)
        layout = Layout.contiguous(p).replaced(coarse=of_coarse, fine=of_fine)
        for arrays, place in (((coarse, fine), Layout.contiguous(p)), (views, layout)):
            output = run(p, *arrays, layout=place, schedule="reverse", placement="start")
            assert_same_bits(output, expected, (p, place))
        assert mma._fetches(p, layout, 32, DEVICE) == (Fetch.SHIFTED, Fetch.SHIFTED)


@pytest.mark.usefixtures("small_tile")
def test_rows_of_strided_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of positions belongs to several planes; results have the same bits as with loads of single positions."""
    monkeypatch.setattr(mma, "_alternatives", lambda p, widest, _: ((Columns.of(p, in_taps=False), widest),))
    monkeypatch.setitem(mma.TILES, 2, tuple(t for t in mma.TILES[2] if (t.block_m, t.block_n) == (16, 128)))
    for mode, fetch, lengths in (
        (HALF, Fetch.RUN, (40, 88)),
        (HALF, Fetch.PAIRS, (38, 86)),
        (HALF, Fetch.SHIFTED, (39, 87)),
        (SINGLE, Fetch.RUN, (40, 88)),
    ):
        for stride, K, padding, C_fine in ((2, 3, 1, 9), (3, 7, 2, 16), (4, 4, 0, 8), (5, 2, 1, 12), (8, 13, 6, 10)):
            L, L_fine = lengths
            p = problem(16, C_fine, L, K, mode, L_fine, N=9, stride=stride, padding_left=padding)
            assert fetches(p) == (fetch, fetch)
            assert dict(kernel_of(FAMILY, p, Layout.contiguous(p), DEVICE)[0].macros)["FINE_STRIDED"] == "1"
            arrays = normal(p)
            output = run(p, *arrays, schedule=stride, placement="start")
            assert_same_bits(output, run(p, *map(unaligned, arrays)), p)


def padded(array: Array) -> Array:
    """The array in rows of odd length that end in at least one NaN."""
    N, C, L = array.shape
    buffer = np.full((N, C, L + 1 + L % 2), np.nan, array.dtype)
    assert buffer.ctypes.data % 4 == 0
    buffer[..., :L] = array
    return buffer[..., :L]


@pytest.mark.usefixtures("small_tile")
def test_no_word_is_read_that_is_partly_outside_of_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guard pages cannot find such a word, since it lies in one page with elements."""
    whole = Program.of
    load, start = "return *reinterpret_cast<const Run*>(from);", "    Sums acc;\n    multiply_slice("
    check = """
        const bool in_coarse = from >= begin[0] && from + kWidth <= end[0];
        const bool in_fine = from >= begin[1] && from + kWidth <= end[1];
        if (!in_coarse && !in_fine) *(volatile int*)0 = 0;
        """
    bounds = """
    begin[0] = coarse, begin[1] = fine;
    end[0] = coarse + (p.N - 1) * p.coarse_stride_n + (p.C_coarse - 1) * p.coarse_stride_c + p.L_coarse;
    end[1] = fine + (p.N - 1) * p.fine_stride_n + (p.groups * p.C_fine_g - 1) * p.fine_stride_c + p.L_fine;
    """

    def checked(config: Config) -> Program:
        program = whole(config)
        if config.kernel != NAME:
            return program
        text = program.text
        assert load in text
        assert start in text
        declared = "static const storage_t *begin[2], *end[2];\ntemplate <int kWidth>\nstruct alignas("
        text = text.replace("template <int kWidth>\nstruct alignas(", declared)
        return replace(program, text=text.replace(load, check + load).replace(start, bounds + start))

    def careless(config: Config) -> Program:
        exact = "channels.ends_array || end == 0 ? end : end + 1"
        assert exact in checked(config).text
        return replace(checked(config), text=checked(config).text.replace(exact, "end + 1"))

    monkeypatch.setattr(Program, "of", checked)
    for p in SHIFTED[:5]:
        expect_exact(p)
    monkeypatch.setattr(Program, "of", careless)
    with pytest.raises(hostcuda.HostCudaError, match="null pointer"):
        expect_exact(SHIFTED[1])


@given(
    taps=st.integers(1, 40),
    dilation=st.sampled_from((1, 2, 3, 4, 6, 17, 256)),
    padding=st.integers(0, 9),
    fetch=st.sampled_from((Fetch.RUN, Fetch.PAIRS, Fetch.SHIFTED)),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_planes_hold_all_rows_of_their_taps(
    taps: int, dilation: int, padding: int, fetch: Fetch, data: st.DataObject
) -> None:
    """Planes of aligned runs begin as few rows before those that their taps need as suits all blocks."""
    p = problem(8, 8, 300, taps, dilation=dilation, padding_left=padding)
    of_block = data.draw(st.integers(1, taps))
    window = Window.of(p, Columns.of(p, in_taps=False), of_block, 1, 32, fetch)
    assert window.plane_rows % fetch.width == 0
    longest = 0
    for begin in range(0, taps, of_block):
        first = begin * dilation - padding
        for tap in range(of_block):
            rounds, plane = divmod(tap, window.planes)
            skew = (first + plane * dilation) % fetch.align
            longest = max(longest, rounds * window.tap_rows_step + skew + 32)
    assert window.plane_rows - fetch.width < longest <= window.plane_rows


@pytest.mark.parametrize("mode", [HALF, SINGLE], ids=str)
def test_edges(mode: tuple[str, str]) -> None:
    """Lengths around steps and chunks; channels around octets; strides; padding beyond the input."""
    for L in (16, 17, 31, 32, 33, 47, 64, 65, 96):
        expect_exact(problem(16, 8, L, 3, mode, N=6))
    for C in (8, 9, 15, 16, 17, 23, 33, 72):
        expect_exact(problem(max(C, 16), C, 70, 2, mode, N=1, padding_left=1))
    for stride in range(1, 9):
        expect_exact(problem(16, 9, 36, 5, mode, stride=stride, dilation=1 + stride % 3))
    expect_exact(problem(32, 24, 40, 3, mode, groups=2, op="conv_transpose1d", stride=2))
    expect_exact(problem(16, 8, 90, 3, mode, L_fine=60, padding_left=20))
    expect_exact(problem(16, 8, 64, 2, mode, L_fine=40, padding_left=0, dilation=200))  # a tap that meets nothing
    expect_exact(problem(16, 8, 68, 40, mode, padding_left=7))  # several blocks of taps


@pytest.mark.parametrize("mode", [HALF, SINGLE], ids=str)
def test_octets_of_taps(mode: tuple[str, str]) -> None:
    """With few channels of fine: taps that fill octets or do not, one tile and several, every window, edges."""
    for C, K in ((1, 32), (1, 130), (2, 17), (3, 15), (4, 8), (7, 9)):
        expect_exact(problem(16, C, 40, K, mode, N=3))
    for stride, dilation in ((2, 1), (3, 3), (8, 1), (10, 1), (50, 2), (1, 40)):
        expect_exact(problem(17, 2, 33, 19, mode, stride=stride, dilation=dilation))
    expect_exact(problem(32, 6, 48, 24, mode, groups=2, op="conv_transpose1d", stride=5))
    expect_exact(problem(16, 2, 90, 33, mode, L_fine=60, padding_left=40))
    expect_exact(problem(16, 2, 64, 16, mode, L_fine=40, padding_left=0, dilation=9))  # taps that meet nothing
    p = problem(16, 2, 36, 20, mode)
    for padding_mode in ("reflect", "replicate", "circular"):
        q = replace(p, padding_mode=padding_mode)
        arrays = normal(q)
        assert reference.weight_gradient(q, *arrays).within_bound(run(q, *arrays)).all(), padding_mode


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_octets_of_taps_and_of_channels_have_the_same_bits(
    mode: tuple[str, str], use_tile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strided layers whose taps begin at even positions may use either, also with fewer rows than a unit."""
    configs = set(FAMILY.configs(DEVICE))
    small = next(tile for tile in mma.TILES[ARITHMETICS[mode].parts] if tile.block_m == 16)
    for rows, C, K, stride, groups in ((20, 9, 19, 4, 1), (5, 8, 24, 8, 2)):
        p = problem(rows * groups, C * groups, 36, K, mode, stride * 36, groups=groups, stride=stride, padding_left=6)
        arrays, results = normal(p), []
        for in_taps in (False, True):
            way = Columns.of(p, in_taps=in_taps), (Fetch.POSITION, Fetch.POSITION)
            monkeypatch.setattr(mma, "_alternatives", lambda *_, way=way: (way,))
            use_tile(ARITHMETICS[mode].parts, small)  # and forgets what was chosen
            config, _ = kernel_of(FAMILY, p, Layout.contiguous(p), DEVICE)
            assert dict(config.macros)["TAPS_IN_UNITS"] == str(int(in_taps))
            assert config in configs
            results.append(run(p, *arrays, schedule=stride))
        assert_same_bits(*results, p)


@pytest.mark.parametrize("mode", [HALF, SINGLE], ids=str)
def test_two_taps_are_loaded_at_once_where_they_begin_even(mode: tuple[str, str]) -> None:
    """Bits stay the same. If fine begins at an odd position, its taps are loaded one by one."""
    for C, K, stride, L_fine in ((1, 32, 4, 150), (2, 17, 2, 70), (3, 9, 10, 380)):
        p = problem(17, C, 40, K, mode, L_fine, N=9, stride=stride, padding_left=6)
        coarse, fine = integers(p)
        results = []
        for given_fine, width in ((fine, "2"), (unaligned(fine), "1")):
            layout = Layout.contiguous(p).replaced(fine=hostcuda.array_layout(given_fine))
            config, _ = kernel_of(FAMILY, p, layout, DEVICE)
            assert dict(config.macros).get("TAP_WIDTH", "1") == width
            results.append(run(p, coarse, given_fine, layout=layout, schedule="every"))
        assert_same_bits(*results, p)
        assert_same_bits(results[0], exact_result(p, coarse, fine), p)


def test_fewer_rows_than_a_unit_has() -> None:
    """Also fewer rows than a product has, and groups with few channels on both sides, whose taps fill octets."""
    for mode in MODES:
        for rows, C, K, groups, how in (
            (5, 8, 3, 1, {"dilation": 2}),
            (6, 48, 3, 2, {"dilation": 2}),
            (7, 13, 3, 1, {"dilation": 2}),
            (4, 4, 41, 5, {"stride": 4, "padding_left": 20}),
            (6, 2, 33, 3, {"stride": 2, "padding_left": 7}),
        ):
            p = problem(rows * groups, C * groups, 75, K, mode, groups=groups, **how)
            if mode == SINGLE and C < 8:
                assert not takes(p)
                continue
            expect_exact(p, schedule="every")
            arrays = normal(p, nonfinite=True)
            assert reference.weight_gradient(p, *arrays).within_bound(run(p, *arrays)).all(), p


def test_specialisations_for_few_rows_are_those_of_units_that_they_do_not_fill() -> None:
    """In 32 bits there are none: a unit has fewer channels than the least that the family takes."""
    few = [macros for config in FAMILY.configs(DEVICE) if "FEW_ROWS" in (macros := dict(config.macros))]
    assert {macros["DTYPE"] for macros in few} == {"float16", "bfloat16"}


@pytest.mark.parametrize("arch", ["sm_75", "sm_86"])
def test_every_way_of_loading_fits_the_smallest_shared_memory(arch: str) -> None:
    """One tap for each octet, also with two short samples in a chunk, where runs begin early."""
    device = Device.from_arch(arch)
    for mode, arithmetic in arithmetics(device).items():
        for p in (
            problem(512, 512, 400, 2, mode),
            problem(512, 512, 400, 2, mode, dilation=50, padding_left=3),
            problem(512, 512, 400, 2, mode, stride=90, padding_left=3),
            problem(512, 512, 16, 2, mode, N=90, padding_left=3),
        ):
            for fetches in mma._every_fetches(arithmetic, device):
                if fetches[1].width == 1 or 1 in (p.stride, p.dilation):
                    assert mma._tilings.__wrapped__(p, fetches, 1, device, 32), (p, fetches)


def test_samples_of_a_chunk_are_staged_once() -> None:
    """The cost model counts the same bytes for 32 samples whether a chunk has two of them or one."""
    p = problem(16, 16, 16, 3, N=32)
    columns = Columns.of(p, in_taps=False)
    for last in (False, True):
        arrays = {}
        if last:
            arrays = {
                name: hostcuda.array_layout(channels_last(np.empty(shape, np.float16)))
                for name, shape in (("coarse", p.coarse_shape), ("fine", p.fine_shape))
            }
        layout = Layout.contiguous(p).replaced(**arrays)
        fetches = mma._fetches(p, layout, 32, DEVICE)
        assert (fetches == (Fetch.UNIT, Fetch.UNIT)) == last
        staged = []
        for samples in (1, 2):
            window = Window.of(p, columns, 3, samples, 16, fetches[1])
            launch = GradientLaunch(
                arithmetic=ARITHMETICS[HALF], slices=Slices(1, 32, 16, 1), blocks=1, chunk_samples=samples,
                chunk_positions=16, window_rows=window.rows, columns=columns, octets=2, taps=3, fetches=fetches,
                tap_width=1, block_m=16, block_n=128, warps_m=1, warps_n=4, min_blocks=4,
            )  # fmt: skip
            staged.append(launch._staged_bytes(p))
        assert staged[0] == staged[1], last


def test_few_columns_of_many_rows_are_not_worth_three_products() -> None:
    assert [mode for mode in MODES if takes(problem(65, 2, 100, 8, mode))] == [m for m in MODES if m != SINGLE]
    assert all(takes(problem(65, 2, 100, 9, mode)) and takes(problem(64, 2, 100, 8, mode)) for mode in MODES)


def test_slices_cover_every_position_once() -> None:
    for p in shapes():
        if isinstance(p, WeightGradientProblem):
            for cut in Slices.of_tensor_cores(p):
                assert cut.samples == 1 or (cut.pieces == 1 and cut.positions == p.L_coarse), p
                assert cut.pieces == -(-p.L_coarse // cut.positions), p
                assert cut.count == -(-p.N // cut.samples) * cut.pieces, p
                assert cut.pieces == 1 or cut.positions % STEP == 0, p
                assert cut.count == 1 or cut.partial_bytes(p) <= slices.MAX_PARTIAL_BYTES, p


def test_slices_have_about_the_same_samples() -> None:
    """16 samples in three slices: slices of five would leave one sample for a fourth."""
    p = problem(600, 600, 80, 3, N=16, dilation=8)
    assert Slices.of_tensor_cores(p)[0] == Slices(4, 4, 80, 1)


def test_the_cut_depends_on_the_problem_alone() -> None:
    """If the results alone keep a GPU busy there is one slice. Lengths of samples change nothing."""
    p = problem(80, 80, 862, 1024, N=1, stride=256, L_fine=221440)
    assert mma._slices(p).count == 1
    assert Slices.of_tensor_cores(p)[0].count == 2
    for q in (problem(16, 16, 4000, 3), problem(64, 2, 4000, 9, ("float32", "tf32")), problem(48, 24, 999, 5, SINGLE)):
        assert mma._slices(q).count > 1
        assert mma._slices(q) == mma._slices(replace(q, has_lengths=True)), q


def test_short_samples_of_16_bits() -> None:
    for L in (4, 5, 8, 12):
        expect_exact(problem(10, 9, L, 3, N=300 // L * 5))


@pytest.mark.parametrize(("mode", "tile"), EVERY_TILE, ids=str)
def test_bits_do_not_depend_on_tile_or_widths(mode: tuple[str, str], tile: mma.Tile, use_tile: Any) -> None:
    p = problem(20, 12, 40, 5, mode)
    arrays = normal(p)
    expected = run(p, *arrays)
    use_tile(ARITHMETICS[mode].parts, tile)
    assert_same_bits(run(p, *arrays, schedule=3), expected, tile)
    if tile.block_m == 64:
        assert_same_bits(run(p, *map(unaligned, arrays)), expected, tile)


@pytest.mark.parametrize("tile", [t for t in mma.TILES[2] if t.threads < mma.WIDE_THREADS], ids=str)
def test_narrow_tiles(tile: mma.Tile, use_tile: Any) -> None:
    """Full tiles, where some lanes store more columns than others; sums that are NaN are computed again."""
    columns = tile.block_n // OCTET
    p = problem(tile.block_m, 8 if columns > 2 else 2, 4000, columns if columns > 2 else 8, SINGLE)
    long = replace(p, N=64)
    assert kernel_of(FAMILY, long, Layout.contiguous(long), DEVICE)[1].block == tile.threads  # the model prefers it
    use_tile(2, tile)
    launch = kernel_of(FAMILY, p, Layout.contiguous(p), DEVICE)[1]
    assert (launch.block, launch.grid) == (tile.threads, mma._slices(p).count)
    arrays = integers(p)
    assert_same_bits(run(p, *arrays, schedule="every"), exact_result(p, *arrays), p)
    coarse, fine = normal(p)
    coarse[0, -1, 20], fine[1, -1, 30] = np.inf, np.nan
    assert reference.weight_gradient(p, coarse, fine).within_bound(run(p, coarse, fine)).all()


def test_bits_do_not_depend_on_the_chunks_of_samples(use_tile: Any) -> None:
    """A chunk multiplies one short sample or several, depending on its length."""
    p = problem(16, 16, 20, 3, ("bfloat16", "float32"), N=24)
    arrays = normal(p)
    results = []
    for rows, chunk in ((32, (1, 32)), (64, (2, 32))):
        use_tile(1, replace(mma.TILES[1][-1], chunk_rows=rows))
        assert mma._chunk(mma._slices(p), rows) == chunk
        results.append(run(p, *arrays))
    assert_same_bits(*results, p)


@pytest.mark.parametrize(("N", "L", "cut"), [(3, 40, Slices(1, 3, 40, 1)), (1, 138, Slices(5, 1, 32, 5))])
def test_no_chunk_has_steps_behind_the_last_position(
    N: int, L: int, cut: Slices, use_tile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infinities there, which only zeros would meet, cause no second computation of a sum, whatever the chunk."""
    p = problem(16, 16, L, 16, ("float32", "tf32"), N=N, padding_left=22, dilation=3)
    coarse, fine = normal(p)
    fine[:, :, -(-L // STEP) * STEP - 20] = np.inf  # 2 positions behind what the last step meets with the first tap
    results = []
    for rows in (32, 128):
        use_tile(1, replace(mma.TILES[1][-1], chunk_rows=rows))
        monkeypatch.setattr(mma, "_cut", lambda _: (cut, ()))
        results.append(run(p, coarse, fine))
    assert_same_bits(*results, p)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_only_terms_that_exist_count(mode: tuple[str, str]) -> None:
    """Infinities that meet padding or other slices give no NaN; those in a term change its results alone."""
    p = problem(16, 8, 1040, 3, mode, N=1)
    coarse, fine = integers(p)
    cut = mma._slices(p)
    assert cut.pieces > 1
    expected = exact_result(p, coarse, fine)
    coarse[0, 3, 0] = np.inf  # tap 0 meets padding there
    fine[0, 5, cut.positions] = -np.inf  # of all slices and rows whose coarse is zero there a NaN
    output = run(p, coarse, fine)
    assert np.isfinite(output[3, np.arange(8) != 5, 0]).all()
    untouched = np.ones(p.weight_shape, bool)
    untouched[3, :, 1:] = False
    untouched[:, 5, :] = False
    assert_same_bits(output[untouched], expected[untouched], p)
    assert reference.weight_gradient(p, coarse, fine).within_bound(output).all()
    assert not np.isfinite(output[:, 5]).any()


@pytest.mark.parametrize("scale", [2.0**-120, 2.0**-140, 2.0**126], ids=str)
def test_values_that_cannot_be_split(scale: float) -> None:
    p = problem(16, 8, 80, 3, SINGLE)
    coarse, fine = normal(p)
    coarse[:, 2] *= np.float32(scale)
    fine[:, 1] *= np.float32(1 / scale if scale > 1 else 1)
    assert reference.weight_gradient(p, coarse, fine).within_bound(run(p, coarse, fine)).all()


def test_split_sums_are_within_the_bound_of_data_of_one_sign() -> None:
    p = problem(16, 8, 2000, 1, SINGLE, N=1, groups=1)
    rng = np.random.default_rng(0)
    coarse, fine = (rng.uniform(1, 2, shape).astype(np.float32) for shape in (p.coarse_shape, p.fine_shape))
    output = run(p, coarse, fine, device=Device.from_arch("sm_80"))
    sums = reference.weight_gradient(p, coarse, fine)
    exact = sums.exact()
    assert (np.abs(output - exact) <= sums.error_bound(exact)).all()
    assert np.abs(output / exact - 1).max() < 2.0**-19  # truncated sums of all terms would lose more


@pytest.mark.parametrize("mode", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize(("C_fine", "K"), [(9, 3), (3, 11)])
def test_layouts(C_fine: int, K: int, mode: tuple[str, str]) -> None:
    """Views are read and written in place, with the bits of contiguous arrays."""
    p = problem(16, C_fine, 48, K, mode)
    check_layouts(run, p)


@pytest.mark.parametrize("mode", [HALF, SINGLE], ids=str)
def test_offsets_beyond_32_bits(mode: tuple[str, str]) -> None:
    far = 2**31 + 8
    p = problem(16, 8, 72, 3, mode)
    coarse, fine = (ArrayLayout((far, *contiguous_strides(shape)[1:])) for shape in (p.coarse_shape, p.fine_shape))
    layout = Layout.of(coarse=coarse, fine=fine, grad_weight=ArrayLayout((24, 3, 1)))
    config, launch = kernel_of(FAMILY, p, layout, DEVICE)
    assert launch.index_bits == 64
    assert config in set(FAMILY.configs(DEVICE))
    arrays = normal(p)
    assert_same_bits(run(p, *arrays, layout=layout), run(p, *arrays), p)


@pytest.mark.parametrize(
    ("p", "reason"),
    [
        (problem(16, 16, 100, 3, ("float64", "float32")), "needs float16"),
        (problem(4, 16, 100, 3), "at least 5 channels a group on the coarse side"),
        (problem(7, 7, 100, 9), "at least 8 channels a group on the coarse side"),
        (problem(3, 4, 100, 16), "at least 4 channels a group on the coarse side"),
        (problem(16, 7, 100, 7), "at least 8 channels a group on the fine side, or 8 taps"),
        (problem(32, 32, 100, 9, groups=8), "at least 8 channels a group on the coarse side"),
        (problem(4, 16, 100, 3, SINGLE), "at least 5 channels a group on the coarse side"),
        (problem(15, 4, 100, 16, SINGLE), "at least 16 channels a group on the coarse side"),
        (problem(65, 2, 100, 8, SINGLE), "C_fine/groups * K > 16, or at most 64 channels a group on the coarse side"),
        (problem(16, 16, 20, 3, SINGLE), "at least 64 terms"),
        (problem(16, 16, 2, 3, N=20), "longer samples"),
    ],
    ids=str,
)
def test_refusals(p: WeightGradientProblem, reason: str) -> None:
    for device in (DEVICE, replace(DEVICE, num_sms=1)):
        refusal = refusal_of(FAMILY, p, Layout.contiguous(p), device)
        assert refusal is not None
        assert reason in refusal


def test_architectures() -> None:
    for arch in ARCHITECTURES:
        device = Device.from_arch(arch)
        for mode in MODES:
            assert takes(problem(16, 16, 100, 3, mode), device) == (device.arch >= 80 or mode == HALF)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_costs_in_roundings_keep_the_bound(mode: tuple[str, str]) -> None:
    """Count term by term what `_keeps_bound` allows: the terms, and the blocks that have any."""
    rng = np.random.default_rng(1)
    arithmetic, taken = ARITHMETICS[mode], 0
    for _ in range(300):
        N, L, pad = int(2 ** rng.uniform(0, 7)), int(2 ** rng.uniform(0, 9)), int(rng.integers(0, 40))
        p = problem(16, 8, L, 2, mode, N=N, L_fine=int(rng.integers(1, L + 40)), padding_left=pad, stride=1)
        p = replace(p, C_coarse=int(2 ** rng.uniform(4, 12)), C_fine=int(2 ** rng.uniform(3, 12)))
        cut = mma._slices(p)
        if not mma._keeps_bound(p, cut):
            continue
        taken += 1
        exists = (np.arange(L) - pad >= 0) & (np.arange(L) - pad < p.L_fine)
        costs = []
        for piece in range(cut.pieces):
            run_of_piece = exists[piece * cut.positions : (piece + 1) * cut.positions]
            starts = np.flatnonzero(run_of_piece)
            if arithmetic.parts == 1:
                costs.append(starts.size + len(set(starts // arithmetic.channels)))
            else:
                costs.append(len(set(starts // STEP)))
        cost = cut.samples * max(costs) + cut.count - 1
        if arithmetic.parts == 1:
            assert cost <= p.terms + math.ceil(p.terms / 3) + 2, p
        else:
            assert cost + 1 + 36 + p.terms / 400 <= p.terms + 2, p
    assert taken > 100


@pytest.mark.parametrize(
    "p",
    [
        problem(40, 40, 200, 5),
        problem(40, 40, 99, 4, stride=3, dilation=2),
        problem(16, 16, 20, 3, N=9),
        problem(20, 3, 66, 19, stride=4, padding_left=5),
    ],
    ids=str,
)
def test_matrix_loads_meet_no_bank_conflicts(p: WeightGradientProblem) -> None:
    config, launch = kernel_of(FAMILY, p, Layout.contiguous(p), DEVICE)
    coarse, fine = normal(p)
    cut, counts = mma._slices(p), Counts()
    sums = np.empty(cut.count * math.prod(p.weight_shape), np.float32)
    arrays: dict[str, Array | None] = {"coarse": coarse, "fine": fine, "partial": sums, "grad_weight": None}
    hostcuda.run(config, launch, arrays, outputs=["partial"], device=DEVICE, counts=counts)
    assert counts.products > 0
    assert counts.wavefronts == counts.loads


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_pitches_of_shared_memory(mode: tuple[str, str]) -> None:
    """Reading 32-bit fragments and storing eight neighbouring units cause no bank conflicts for any number of rows."""
    arithmetic = ARITHMETICS[mode]
    units = OCTET // arithmetic.channels  # of an octet
    for rows in range(16, 80):
        half, pitch = mma._pitches(rows, arithmetic)
        assert half >= rows
        assert pitch >= units * half
        stores = [16 * (unit // units * pitch + unit % units * half) for unit in range(8)]
        assert wavefronts(stores, 16) == 1
        if units == 2:  # lane g, t reads channel g at position t
            lanes = [(lane // 16 * half + lane % 4) * 16 + lane // 4 % 4 * 4 for lane in range(32)]
            assert wavefronts(lanes, 4) == 1
