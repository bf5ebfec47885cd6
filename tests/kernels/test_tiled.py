"""The corners of the register-tiled families: special values, hanging tiles, views, and indices near 32 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gpuconv import dispatch
from gpuconv.families import ArrayLayout, Layout, tiles
from gpuconv.families.tiles import Tile
from gpuconv.problem import FORMATS, ConvProblem, Op, numpy_dtype
from gpuconv.source import pack_params
from tests import hostcuda
from tests.hostcuda import Program
from tests.kernels.cuda_cores import assert_bits_of_the_base, assert_same_numbers, far_apart
from tests.plans import BASE, FORWARD_FAMILIES, H200, kernel_of, plan_of, refusal_of

Array = npt.NDArray[Any]

TILED = {"conv1d": "conv1d_tiled", "conv_transpose1d": "conv_transpose1d_phases"}

# Every way in which a tap can be missing: padding on both sides, phases with fewer taps than others or with none.
PROBLEMS = {
    "padded": ConvProblem("conv1d", 2, 3, 9, 7, 5, 1, 4, 6),
    "strided": ConvProblem("conv1d", 2, 3, 9, 7, 5, 3, 11, 13, 2),
    "phases differ": ConvProblem("conv_transpose1d", 2, 4, 9, 5, 7, 3, 2, 1, output_padding=2),
    "stride beyond K": ConvProblem("conv_transpose1d", 2, 8, 9, 5, 2, 5, 1, 3, output_padding=4),
    "phase by phase": ConvProblem("conv_transpose1d", 2, 4, 9, 5, 7, 3, 5, 4, 2, output_padding=2),
    "phases without taps": ConvProblem("conv_transpose1d", 2, 4, 9, 5, 3, 4, 2, 1, 6, output_padding=3),
}
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "float32") -> Array:
    values = rng.standard_normal(shape)
    if dtype.startswith("complex"):
        values = values + 1j * rng.standard_normal(shape)
    return values.astype(numpy_dtype(dtype))


def arrays(problem: ConvProblem, seed: int = 0) -> tuple[Array, Array, Array | None]:
    p, rng = problem, np.random.default_rng(seed)
    x, w = random(rng, p.input_shape, p.dtype), random(rng, p.weight_shape, p.dtype)
    return x, w, random(rng, (p.C_out,), p.dtype) if p.has_bias else None


def assert_base_bits(problem: ConvProblem, x: Array, w: Array, b: Array | None = None, *, every: bool = False) -> Array:
    """The tiled result, once it has the bits of the base family; a NaN may be any NaN."""
    tiled = hostcuda.compute(problem, x, w, b, family=TILED[problem.op], schedule="every" if every else "forward")
    base = hostcuda.compute(problem, x, w, b, family=BASE[problem.op])
    assert_same_numbers(tiled, base, problem)
    return tiled


@every_problem
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_a_weight_that_is_no_number_spoils_only_outputs_that_have_its_tap(problem: ConvProblem, value: float) -> None:
    p = problem
    for k in range(p.K):
        x, w, _ = arrays(p, seed=k)
        w[0, :, k] = value  # of one output channel, or of one input channel
        y = assert_base_bits(p, np.abs(x), w)
        assert np.isfinite(y).any()
        assert not np.isfinite(y).all()


@every_problem
@pytest.mark.parametrize("value", [np.nan, -np.inf], ids=str)
def test_data_that_are_no_numbers_spoil_only_outputs_that_read_them(problem: ConvProblem, value: float) -> None:
    p = problem
    for l_in in range(p.L_in):
        x, w, _ = arrays(p, seed=l_in)
        x[0, 1, l_in] = value  # where phases lack a tap, it meets a packed zero
        y = assert_base_bits(p, x, w)
        assert np.isfinite(y[1:]).all()


@pytest.mark.parametrize("op", TILED)
@pytest.mark.parametrize("part", [complex(np.nan, 0), complex(0, np.inf), complex(-np.inf, np.nan)], ids=str)
def test_complex_parts_that_are_no_numbers(op: str, part: complex) -> None:
    p = replace(PROBLEMS["padded" if op == "conv1d" else "phases differ"], dtype="complex64")
    x, w, _ = arrays(p)
    w[0, 1, 0] = part
    assert_base_bits(p, x, w)
    x[1, 0, 3] = part.conjugate()
    assert_base_bits(p, x, w)


@every_problem
def test_zeros_subnormals_and_overflow(problem: ConvProblem) -> None:
    p = replace(problem, has_bias=True)
    rng = np.random.default_rng(0)
    tiny, huge = np.finfo("f4").tiny, np.finfo("f4").max
    values = np.array([0.0, -0.0, tiny, -tiny, tiny / 4, -tiny / 4, huge, -huge, 1.0, -1.0, 0.5], "f4")
    for count in (2, 6, len(values)):
        x, w, b = (rng.choice(values[:count], shape) for shape in (p.input_shape, p.weight_shape, (p.C_out,)))
        assert_base_bits(p, x, w, b)
    x, w, b = -np.zeros(p.input_shape, "f4"), np.ones(p.weight_shape, "f4"), -np.zeros(p.C_out, "f4")
    assert not np.signbit(assert_base_bits(p, x, w, b)).any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", TILED)
def test_half_precision_rounds_to_infinity_and_keeps_nan_biases(op: str, dtype: str) -> None:
    p = replace(PROBLEMS["strided" if op == "conv1d" else "phases differ"], dtype=dtype, has_bias=True)
    x, w, b = arrays(p)
    assert b is not None
    x[0] = np.array(6e4, x.dtype)  # float16 sums pass 65,504, which float32 sums hold
    b[2] = np.array(np.nan, b.dtype)
    y = assert_base_bits(p, x, w, b).astype("f4")
    assert np.isnan(y[:, 2]).all()
    assert not np.isnan(np.delete(y, 2, axis=1)).any()
    assert np.isinf(y[0]).any() == (dtype == "float16")


@pytest.fixture
def only_tile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Tile], None]]:
    """Leaves the cost model one tile to choose for a dtype."""

    def leave(dtype: str, tile: Tile) -> None:
        monkeypatch.setitem(tiles.TILES, FORMATS[dtype].accumulator_bytes, (tile,))
        forget()

    def forget() -> None:
        tiles.compare_tilings.cache_clear()
        dispatch.choose.cache_clear()

    yield leave
    forget()


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("op", TILED)
def test_extents_around_those_of_every_tile(op: Op, dtype: str, only_tile: Callable[[str, Tile], None]) -> None:
    for tile in tiles.TILES[FORMATS[dtype].accumulator_bytes]:
        only_tile(dtype, tile)
        for off in (-1, 0, 1):
            terms, rows, columns = tile.block_r + off, max(8, tile.block_m + off), tile.block_n + off
            p = ConvProblem(op, 1, max(8, terms), rows, columns, 1, dtype=dtype)
            assert_base_bits(p, *arrays(p))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_chunks_that_end_in_every_step(dtype: str, only_tile: Callable[[str, Tile], None]) -> None:
    for tile in tiles.TILES[FORMATS[dtype].accumulator_bytes]:
        only_tile(dtype, tile)
        for terms in (max(8, tile.unroll(dtype, 32) + 1), tile.block_r + tile.unroll(dtype, 32), 2 * tile.block_r - 1):
            p = ConvProblem("conv1d", 1, 1, tile.block_m, tile.block_n, terms, 1, 3, terms, dtype=dtype)
            assert_base_bits(p, *arrays(p), every=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("op", TILED)
def test_blocks_that_begin_in_one_sample_and_end_in_another(
    op: Op, dtype: str, only_tile: Callable[[str, Tile], None]
) -> None:
    """Columns that run through samples as long as a block, a little shorter, longer, and much shorter."""
    for tile in tiles.TILES[FORMATS[dtype].accumulator_bytes]:
        only_tile(dtype, tile)
        for length in (tile.block_n - 1, tile.block_n, tile.block_n + 1, tile.block_n * 3 // 2, 7):
            if op == "conv1d":
                p = ConvProblem(op, 3, 3, 8, 3 * length, 3, 3, dtype=dtype)
            else:  # phase by phase
                p = ConvProblem(op, 3, 4, 8, length, 3, 2, 1, 2, 2, dtype=dtype)
            assert_base_bits(p, *arrays(p))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("op", TILED)
def test_rows_columns_and_terms_that_fill_no_tile(op: str, dtype: str) -> None:
    settings = {"stride": 3, "padding_left": 1, "padding_right": 2, "groups": 2, "dtype": dtype, "has_bias": True}
    for C_in_g, C_out_g, K in ((1, 8, 8), (3, 33, 3), (8, 9, 2)):
        for N, L in ((1, 2), (5, 3), (3, 45)):
            L_in = L + K if op == "conv1d" else L
            p = ConvProblem(op, N, 2 * C_in_g, 2 * C_out_g, L_in, K, **settings)
            layout = Layout.contiguous(p)
            if refusal_of(next(f for f in FORWARD_FAMILIES if f.name == TILED[op]), p, layout, H200) is None:
                assert_base_bits(p, *arrays(p), every=N == 5)


@pytest.mark.parametrize("name", ["padded", "phases differ"])
def test_an_empty_input_gives_the_bias(name: str) -> None:
    left, right = (3, 4) if name == "padded" else (0, 0)
    p = replace(PROBLEMS[name], L_in=0, padding_left=left, padding_right=right, has_bias=True)
    x, w, b = arrays(p)
    w[...] = np.inf
    assert b is not None
    y = assert_base_bits(p, x, w, b)
    np.testing.assert_array_equal(y, np.broadcast_to(b[:, None], y.shape))


@every_problem
def test_no_result_needs_the_nan_fallback(problem: ConvProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    # Shared memory that is read too early holds NaNs under hostcuda, and the NaN fallback would repair what a GPU
    # leaves wrong.
    monkeypatch.setattr(Program, "of", Program.without_nan_fallback)
    for N, C_in in ((1, problem.C_in), (3, 17)):  # one chunk of terms and several
        p = replace(problem, N=N, C_in=C_in)
        assert_base_bits(p, *arrays(p), every=True)


@every_problem
def test_views_of_any_strides_and_alignment(problem: ConvProblem) -> None:
    p = replace(problem, has_bias=True)
    x, w, b = arrays(p)
    assert b is not None
    expected = assert_base_bits(p, x, w, b)
    shifted = np.empty(x.size + 1, x.dtype)[1:].reshape(x.shape)
    shifted[...] = x
    apart = np.zeros(tuple(2 * extent for extent in w.shape), w.dtype)[1::2, ::2, 1::2]
    apart[...] = w
    backwards = np.ascontiguousarray(x[::-1, ::-1, ::-1])[::-1, ::-1, ::-1]
    for x_view, w_view, b_view in (
        (shifted, apart, np.ascontiguousarray(b[::-1])[::-1]),
        (np.asfortranarray(x), np.asfortranarray(w), b),
        (backwards, np.ascontiguousarray(w[:, :, ::-1])[:, :, ::-1], b),
    ):
        y = hostcuda.compute(p, x_view, w_view, b_view, family=TILED[p.op], schedule="every")
        assert y.tobytes() == expected.tobytes()
    assert_base_bits(
        p, np.broadcast_to(x[:1, :, :1], x.shape), np.broadcast_to(w[..., :1], w.shape), np.broadcast_to(b[:1], b.shape)
    )


@pytest.mark.parametrize(("dtype", "alignment"), [("complex64", 8), ("complex128", 16), ("float64", 8)])
@pytest.mark.parametrize("op", TILED)
def test_asynchronous_copies_of_arrays_aligned_to_their_elements_only(op: str, dtype: str, alignment: int) -> None:
    p = replace(PROBLEMS["padded" if op == "conv1d" else "phases differ"], dtype=dtype, L_in=40)
    x, w, _ = arrays(p)
    fresh = Layout.contiguous(p)
    layout = fresh.replaced(input=replace(fresh["input"], alignment=alignment))
    y = hostcuda.compute(p, x, w, layout=layout, family=TILED[op], schedule="every")
    assert y.tobytes() == assert_base_bits(p, x, w).tobytes()


def test_arrays_aligned_to_half_an_element_are_copied() -> None:
    shape, strides = (1, 8, 4), (256, 32, 8)
    assert ArrayLayout.of(shape, strides, 4, 8) is None
    assert ArrayLayout.of(shape, (256, 36, 8), 16, 8) is None
    assert ArrayLayout.of(shape, strides, 8, 8) == ArrayLayout((32, 4, 1), 8)


@pytest.mark.parametrize(
    "problem",
    [
        ConvProblem("conv1d", 5, 8, 8, 1, 1, stride=3),
        ConvProblem("conv_transpose1d", 3, 8, 8, 1, 1),
        ConvProblem("conv_transpose1d", 3, 8, 8, 1, 1, dilation=2),
    ],
    ids=str,
)
def test_columns_behind_the_last_sample_overflow_no_offset(problem: ConvProblem) -> None:
    # A block's columns are samples here, dozens behind the last of a few; twenty strides pass 32 bits.
    far_apart = Layout.contiguous(problem).replaced(output=ArrayLayout((2**31 // 20, 1, 1)))
    x, w = np.ones(problem.input_shape, "f4"), np.ones(problem.weight_shape, "f4")
    y = hostcuda.compute(problem, x, w, layout=far_apart, family=TILED[problem.op])
    np.testing.assert_array_equal(y, np.full(problem.output_shape, 8, "f4"))


@pytest.mark.parametrize("name", ["padded", "strided", "phases differ", "phase by phase"])
def test_offsets_beyond_32_bits(name: str, only_tile: Callable[[str, Tile], None]) -> None:
    """Samples more than 2**31 elements apart, in input and output, with every tile that has 64-bit indices."""
    p = replace(PROBLEMS[name], N=3, dtype="float16")
    layout = far_apart(p)
    wide = tiles.tiles_for("float16", 64)
    assert set(wide) < set(tiles.tiles_for("float16", 32))
    family = next(f for f in FORWARD_FAMILIES if f.name == TILED[p.op])
    for tile in wide:
        only_tile("float16", tile)
        assert kernel_of(family, p, layout, H200)[1].index_bits == 64
        assert_bits_of_the_base(family, p, layout)


@pytest.mark.parametrize(
    "problem",
    [
        ConvProblem("conv1d", 1, 2, 1, 2**30, 1, stride=2, dtype="float16"),
        ConvProblem("conv1d", 1, 2**21, 1, 2**10, 2**10, dtype="float16"),
        ConvProblem("conv1d", 1, 8, 8, 2**28, 1, stride=2, dtype="float16"),
        ConvProblem("conv_transpose1d", 1, 2, 1, 2**30, 1, 1, 2**29, 100, dtype="float16"),
        ConvProblem("conv_transpose1d", 1, 8, 8, 2**28, 1, 1, 2**27, 100, dtype="float16"),
    ],
    ids=str,
)
def test_parameters_fit_where_an_array_ends_at_32_bits(problem: ConvProblem) -> None:
    layout = Layout.contiguous(problem)
    for family in FORWARD_FAMILIES:
        if family.kind == problem.op and refusal_of(family, problem, layout, H200) is None:
            for step in plan_of(family, problem, layout, H200).steps:
                params = pack_params(dict(step.launch.params), step.launch.index_bits)
                assert params.tolist() == [value for _, value in step.launch.params]


@pytest.mark.parametrize(
    "problem",
    [
        ConvProblem("conv_transpose1d", 1, 64, 64, 10, 1, stride=2**20),
        ConvProblem("conv_transpose1d", 1, 64, 64, 10, 3, stride=1000, dilation=1000),
        ConvProblem("conv_transpose1d", 1, 64, 64, 1, 8, stride=2**31 - 1),
    ],
    ids=str,
)
def test_packed_weights_stay_of_the_size_of_the_weights(problem: ConvProblem) -> None:
    choice = dispatch.choose(problem, Layout.contiguous(problem), H200)
    assert choice is not None
    assert choice.family == "conv_transpose1d_gather"
    assert ("conv_transpose1d_phases", "needs stride * taps of a phase <= 16 * K") in choice.refusals


def test_no_grid_passes_the_limit() -> None:
    # 2**16 phases of 2**24 samples, of which padding leaves one position each.
    problem = ConvProblem("conv_transpose1d", 2**24, 8, 8, 1, 2**12, 2**16, 3 * 4095, 0, 3)
    choice = dispatch.choose(problem, Layout.contiguous(problem), H200)
    assert choice is not None
    assert choice.launch.grid < 2**31
    assert choice.refusals[-1] == ("conv_transpose1d_phases", "needs at most 2147483647 blocks")
