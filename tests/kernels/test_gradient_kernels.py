"""The CUDA-core kernels of the weight and bias gradients on the CPU (tests/hostcuda): values, order of sums, bits."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gpuconv import dispatch, grad, reference, runtime
from gpuconv.cases import CASES
from gpuconv.device import Device
from gpuconv.families import ArrayLayout, Family, Layout, slices
from gpuconv.families import weight_gradient_tiled as tiled
from gpuconv.families.base import contiguous_strides
from gpuconv.families.slices import Slices
from gpuconv.problem import DTYPES, BiasGradientProblem, WeightGradientProblem, numpy_dtype
from gpuconv.tasks import SIGNATURES
from tests import hostcuda
from tests.hostcuda import Program
from tests.kernels.arrays import assert_same_bits, channels_last, one_sample_repeated, scattered, unaligned
from tests.kernels.test_kernels import every_third
from tests.plans import GRADIENT_FAMILIES, kernel_of, refusal_of

Array = npt.NDArray[Any]

DEVICE = Device.from_arch("sm_90")
ONE_SM = replace(DEVICE, name="small", num_sms=1, shared_per_block=48 * 1024, shared_per_sm=64 * 1024)
BASE = "weight_gradient_direct"
# Those on CUDA cores, which agree in their bits.
FAMILIES = tuple(f for f in GRADIENT_FAMILIES if f.kind == "weight_gradient" and not f.name.endswith("_mma"))
FAST = tuple(family for family in FAMILIES if family.name != BASE)

by_name = {"ids": lambda value: getattr(value, "name", str(value))}


def takes(family: Family[Any], problem: WeightGradientProblem) -> bool:
    return refusal_of(family, problem, Layout.contiguous(problem), DEVICE) is None


@cache
def problems(dtype: str) -> dict[str, WeightGradientProblem]:
    """The case table as weight gradients, without empty arrays, which never reach a kernel."""
    named = {case.name: WeightGradientProblem.of(case.at(dtype)) for case in CASES}
    return {name: p for name, p in named.items() if 0 not in (*p.coarse_shape, *p.fine_shape, *p.weight_shape)}


def items(families: tuple[Family[Any], ...]) -> list[tuple[Family[Any], str]]:
    """The (family, dtype) of which the family takes at least one case."""
    return [
        (family, dtype)
        for family in families
        for dtype in DTYPES
        if any(takes(family, p) for p in problems(dtype).values())
    ]


def generator(problem: Any) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(problem).encode()))


def as_dtype(problem: Any, draw: Any, *shapes: tuple[int, ...]) -> tuple[Array, ...]:
    parts = [draw(shape) + 1j * draw(shape) if problem.is_complex else draw(shape) for shape in shapes]
    return tuple(part.astype(numpy_dtype(problem.dtype)) for part in parts)


def integers(problem: WeightGradientProblem) -> tuple[Array, Array]:
    """Small integers of which every sum is exact in the dtype; most of coarse is zero where that needs it."""
    p = problem
    rng = generator(p)
    limit = {"float16": 2**11, "bfloat16": 2**8}.get(p.dtype, 2**20)
    coarse, fine = as_dtype(p, lambda shape: rng.integers(-2, 3, shape) + 0.0, p.coarse_shape, p.fine_shape)
    most = limit // (8 if p.is_complex else 4)
    row = coarse.swapaxes(0, 1).reshape(p.C_coarse, -1)
    for r in range(p.C_coarse):
        row[r, rng.permutation(row.shape[1])[most:]] = 0
    return np.ascontiguousarray(row.reshape(p.C_coarse, p.N, p.L_coarse).swapaxes(0, 1)), fine


def normal(problem: WeightGradientProblem, nonfinite: bool = False) -> tuple[Array, Array]:
    rng = generator(problem)
    arrays = as_dtype(problem, rng.standard_normal, problem.coarse_shape, problem.fine_shape)
    if nonfinite:
        for array, values in zip(arrays, ((np.inf, np.nan), (-np.inf,)), strict=True):
            places = rng.permutation(array.size)[: len(values)]
            array.reshape(-1)[places] = values[: len(places)]
    return arrays[0], arrays[1]


def exact_result(problem: WeightGradientProblem, coarse: Array, fine: Array) -> Array:
    return reference.weight_gradient(problem, coarse, fine).exact().astype(coarse.dtype)


def check_layouts(run: Callable[..., Array], p: WeightGradientProblem) -> None:
    """Views are read and written in place, with the bits of contiguous arrays.

    `run` computes a problem from coarse and fine by one family, with settings of `hostcuda.compute`.
    """
    coarse, fine = normal(p)
    expected = run(p, coarse, fine)
    R, C, K = p.weight_shape
    for a, b, strides in (
        (scattered(coarse), channels_last(fine), (2 * C * K, 2 * K, 2)),
        (channels_last(coarse), scattered(fine), (1, R, R * C)),
        (unaligned(coarse), fine, (-C * K, -K, -1)),
    ):
        layout = Layout.of(
            coarse=hostcuda.array_layout(a), fine=hostcuda.array_layout(b), grad_weight=ArrayLayout(strides, p.itemsize)
        )
        assert_same_bits(run(p, a, b, layout=layout, schedule="reverse", placement="start"), expected, strides)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """What the table needs, compiled together, which takes less than one by one."""
    chosen = {
        kernel_of(family, p, Layout.contiguous(p), DEVICE)[0]
        for family in FAMILIES
        for dtype in DTYPES
        for p in problems(dtype).values()
        if takes(family, p)
    }
    sums = {slices.sum_config(dtype, 32) for dtype in DTYPES}
    hostcuda.prebuild([*chosen, *sums])


@pytest.mark.parametrize("family", FAMILIES, **by_name)
def test_the_table_reaches_the_family(family: Family[Any]) -> None:
    table = problems("float32").values()
    assert sum(takes(family, p) for p in table) >= 20
    chosen = [dispatch.choose(p, Layout.contiguous(p), DEVICE) for p in table]
    assert all(chosen)
    cuts = [dict(choice.launch.params) for choice in chosen if choice is not None]
    assert any(len(choice.plan.steps) == 1 for choice in chosen if choice is not None)
    assert any(cut["slice_pieces"] > 1 for cut in cuts)
    assert any(cut["slice_samples"] > 1 for cut in cuts)
    if family in FAST:
        assert sum(choice is not None and choice.family == family.name for choice in chosen) >= 10


@pytest.mark.parametrize(("family", "dtype"), items(FAMILIES), **by_name)
def test_exact(family: Family[Any], dtype: str) -> None:
    """Small integers: the definition bit for bit, whatever the order of the threads."""
    for name, p in problems(dtype).items():
        if takes(family, p):
            arrays = integers(p)
            output = hostcuda.compute(p, *arrays, family=family.name, schedule="every")
            assert_same_bits(output, exact_result(p, *arrays), name)


@cache
def base_result(problem: WeightGradientProblem, nonfinite: bool) -> Array:
    """What the base family makes of `normal`, for all the families that must give the same bits."""
    return hostcuda.compute(problem, *normal(problem, nonfinite), family=BASE)


@pytest.mark.parametrize(("family", "dtype"), items(FAST), **by_name)
def test_rounding(family: Family[Any], dtype: str) -> None:
    """Results are within the bound and have the bits of the base family; NaN and infinities stay where they belong."""
    taken = [(name, p) for name, p in problems(dtype).items() if takes(family, p)]
    for i, (name, p) in enumerate(taken):
        is_nonfinite = i % 2 == 1
        arrays = normal(p, is_nonfinite)
        output, base = hostcuda.compute(p, *arrays, family=family.name), base_result(p, is_nonfinite)
        sums = reference.weight_gradient(p, *arrays)
        assert sums.within_bound(base).all(), name
        if is_nonfinite:  # NaNs have more than one encoding
            assert sums.within_bound(output).all(), name
        else:
            assert_same_bits(output, base, name)


def in_order(problem: WeightGradientProblem, coarse: Array, fine: Array) -> Array:
    """Every element by the C library's fma: slice by slice, n outer and l inner, then the slices."""
    p, cut = problem, Slices.of(problem)
    libm = ctypes.CDLL(find_library("m"))
    fma, real, accumulator = (
        (libm.fma, ctypes.c_double, np.float64) if p.dtype == "float64" else (libm.fmaf, ctypes.c_float, np.float32)
    )
    fma.argtypes, fma.restype = [real] * 3, real
    ways = dict(slices.sum_launch(p, Layout.contiguous(p))[1].params)["ways"]
    output = np.empty(p.weight_shape, coarse.dtype)
    for r, c, k in np.ndindex(*p.weight_shape):
        c_fine = r // p.C_coarse_g * p.C_fine_g + c
        of_slice = []
        for s in range(cut.count):
            group, piece = divmod(s, cut.pieces)
            acc = 0.0
            for n in range(group * cut.samples, min((group + 1) * cut.samples, p.N)):
                for l_coarse in range(piece * cut.positions, min((piece + 1) * cut.positions, p.L_coarse)):
                    l_fine = l_coarse * p.stride - p.padding_left + k * p.dilation
                    if 0 <= l_fine < p.L_fine:
                        acc = fma(float(coarse[n, r, l_coarse]), float(fine[n, c_fine, l_fine]), acc)
            of_slice.append(accumulator(acc))
        total = accumulator(0)
        for way in range(ways):
            of_way = accumulator(0)
            for s in range(way, cut.count, ways):
                of_way += of_slice[s]
            total = of_way if way == 0 else total + of_way
        output[r, c, k] = total
    return output


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "problem",
    [
        WeightGradientProblem("conv1d", 3, 2, 2, 700, 703, 2, 1, 1, 3),  # pieces of samples, added in several ways
        WeightGradientProblem("conv_transpose1d", 37, 4, 2, 9, 20, 3, 2, 1, 1, 2),  # several samples a slice
        WeightGradientProblem("conv1d", 1, 2, 3, 40, 41, 2),  # one slice
    ],
    **by_name,
)
def test_sums_are_formed_in_one_order(problem: WeightGradientProblem, dtype: str) -> None:
    p = replace(problem, dtype=dtype)
    arrays = normal(p)
    expected = in_order(p, *arrays)
    for family in FAMILIES:
        if takes(family, p):
            assert_same_bits(hostcuda.compute(p, *arrays, family=family.name), expected, family.name)


@pytest.mark.parametrize("tile", [tile for tiles in tiled.TILES.values() for tile in tiles], ids=str)
def test_bits_do_not_depend_on_the_tile(tile: tiled.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    (size,) = (size for size, tiles in tiled.TILES.items() if tile in tiles)
    dtype = {4: "float32", 8: "complex64", 16: "complex128"}[size]
    p = WeightGradientProblem("conv1d", 2, 21, 19, 75, 160, 7, 2, 5, 2, dtype=dtype)
    arrays = normal(p)
    monkeypatch.setattr(tiled, "TILES", {size: (tile,)})
    for cached in (tiled._tilings, dispatch.choose):
        cached.cache_clear()
    output = hostcuda.compute(p, *arrays, family="weight_gradient_tiled", schedule="every")
    for cached in (tiled._tilings, dispatch.choose):
        cached.cache_clear()
    assert_same_bits(output, hostcuda.compute(p, *arrays, family=BASE), tile)


def test_bits_do_not_depend_on_the_device() -> None:
    p = WeightGradientProblem("conv1d", 2, 40, 40, 300, 330, 31, groups=40)
    arrays = normal(p)
    expected = hostcuda.compute(p, *arrays)
    for device in (ONE_SM, Device.from_arch("sm_75")):
        assert_same_bits(hostcuda.compute(p, *arrays, device=device), expected, device.name)


def shapes() -> Iterator[WeightGradientProblem | BiasGradientProblem]:
    rng = np.random.default_rng(5)
    for _ in range(300):
        N, L = (int(2 ** rng.uniform(0, top)) for top in (10, 16))
        C, C_g, K = (int(2 ** rng.uniform(0, top)) for top in (10, 10, 6))
        dtype = DTYPES[int(rng.integers(len(DTYPES)))]
        yield WeightGradientProblem("conv1d", N, C, C_g, L, L + K, K, dtype=dtype)
        yield BiasGradientProblem(N, C, L, dtype)


def test_slices_cover_every_position_once() -> None:
    for p in shapes():
        cut = Slices.of(p)
        N, L = p.N, p.L if isinstance(p, BiasGradientProblem) else p.L_coarse
        assert cut.samples == 1 or (cut.pieces == 1 and cut.positions == L), p
        assert cut.pieces == -(-L // cut.positions), p
        assert cut.count == -(-N // cut.samples) * cut.pieces, p
        assert cut.pieces == 1 or cut.positions % 32 == 0, p  # rows stay aligned
        assert cut.count == 1 or cut.partial_bytes(p) <= slices.MAX_PARTIAL_BYTES, p


def test_slices_give_a_gpu_enough_to_do() -> None:
    depthwise = WeightGradientProblem("conv1d", 32, 512, 512, 1500, 1530, 31, groups=512)
    assert Slices.of(depthwise).count * 512 * 31 >= 2**20
    assert Slices.of(depthwise).partial_bytes(depthwise) <= 8 * 2**20
    dense = WeightGradientProblem("conv1d", 8, 512, 512, 3000, 3002, 3)
    assert Slices.of(dense).count * 512 * 512 * 3 >= 2**23
    huge = WeightGradientProblem("conv1d", 64, 4096, 4096, 3000, 3004, 5)
    assert Slices.of(huge) == Slices(1, 64, 3000, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAST, **by_name)
def test_edge_lengths(family: Family[Any], dtype: str) -> None:
    """Lengths around vectors, chunks and tiles, in few and many samples."""
    pairs = family.name == "weight_gradient_pairs"
    channels = {"C_coarse": 3, "C_fine": 3, "groups": 3} if pairs else {"C_coarse": 9, "C_fine": 5, "groups": 1}
    for length in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129):
        for N, K, stride in ((1, 9, 1), (7, 3, 2)):
            p = WeightGradientProblem(
                "conv1d", N, **channels, L_coarse=length, L_fine=length * stride, K=K, stride=stride, padding_left=2,
                dtype=dtype,
            )  # fmt: skip
            assert takes(family, p), p
            arrays = integers(p)
            output = hostcuda.compute(p, *arrays, family=family.name, schedule="reverse", placement="start")
            assert_same_bits(output, exact_result(p, *arrays), p)


@pytest.mark.parametrize("K", [1, 5, 8, 9, 64, 70, 150])
@pytest.mark.parametrize("padding_left", [0, 3])
def test_taps_of_pairs(K: int, padding_left: int) -> None:
    """One thread's taps, several threads' and several tiles of taps, with and without an unaligned window."""
    for stride, dilation, dtype in ((1, 1, "float32"), (1, 1, "float16"), (2, 1, "float32"), (1, 3, "float64")):
        L_fine = 128 + 40 * stride
        p = WeightGradientProblem(
            "conv1d", 2, 2, 4, 80, L_fine, K, stride, padding_left, dilation, groups=2, dtype=dtype
        )
        arrays = integers(p)
        output = hostcuda.compute(p, *arrays, family="weight_gradient_pairs", schedule="every")
        assert_same_bits(output, exact_result(p, *arrays), p)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex128"])
@pytest.mark.parametrize("family", FAMILIES, **by_name)
def test_layouts(family: Family[Any], dtype: str) -> None:
    """Arrays of any strides and alignment are read and written in place, with the same bits."""
    for p in (
        WeightGradientProblem("conv1d", 3, 8, 8, 44, 48, 5, dtype=dtype, groups=8),
        WeightGradientProblem("conv_transpose1d", 3, 8, 6, 44, 91, 4, 2, dtype=dtype),
        WeightGradientProblem("conv1d", 1, 8, 8, 44, 48, 5, dtype=dtype, groups=2),  # one slice
    ):
        if not takes(family, p):
            continue
        coarse, fine = normal(p)
        R, C, K = p.weight_shape
        for a, b, strides in (
            (scattered(coarse), channels_last(fine), (2 * C * K, 2 * K, 2)),
            (channels_last(coarse), scattered(fine), (1, R, R * C)),
            (unaligned(coarse), unaligned(fine), (-C * K, -K, -1)),
            (one_sample_repeated(coarse), fine, (C * K + 3, K, 1)),
        ):
            layout = Layout.of(
                coarse=hostcuda.array_layout(a),
                fine=hostcuda.array_layout(b),
                grad_weight=ArrayLayout(strides, p.itemsize),
            )
            output = hostcuda.compute(p, a, b, layout=layout, family=family.name, schedule="every")
            expected = hostcuda.compute(p, np.ascontiguousarray(a), np.ascontiguousarray(b), family=BASE)
            assert_same_bits(output, expected, (p, strides))


@pytest.mark.parametrize("family", FAMILIES, **by_name)
def test_offsets_beyond_32_bits(family: Family[Any]) -> None:
    """Samples more than 2**31 elements apart, in both inputs; and a result as far apart."""
    far = 2**31 + 8
    p = WeightGradientProblem("conv1d", 3, 4, 4, 70, 72, 3, groups=1, dtype="float16")
    assert takes(family, p)
    coarse, fine = (ArrayLayout((far, *contiguous_strides(shape)[1:])) for shape in (p.coarse_shape, p.fine_shape))
    layout = Layout.of(coarse=coarse, fine=fine, grad_weight=ArrayLayout((far, 3, 1), 2))
    arrays = integers(p)
    config, launch = kernel_of(family, p, layout, DEVICE)
    assert launch.index_bits == 64
    assert config in set(family.configs(DEVICE))
    assert_same_bits(
        hostcuda.compute(p, *arrays, layout=layout, family=family.name), exact_result(p, *arrays), family.name
    )


@pytest.mark.parametrize("name", [BASE, "bias_gradient_rows"])
def test_blocks_that_go_round_again(name: str) -> None:
    """If there are more sums than blocks, a block takes several. A small grid shows this: the largest is too large."""
    (family,) = (family for family in GRADIENT_FAMILIES if family.name == name)
    p: Any = WeightGradientProblem("conv1d", 2, 6, 5, 150, 150, 9) if name == BASE else BiasGradientProblem(2, 7, 500)
    shapes = (p.coarse_shape, p.fine_shape) if name == BASE else (p.grad_output_shape,)
    inputs = as_dtype(p, generator(p).standard_normal, *shapes)
    config, launch = kernel_of(family, p, Layout.contiguous(p), DEVICE)
    assert launch.grid > 3
    sums = []
    for grid in (launch.grid, 3):
        partial = np.empty(Slices.of(p).partial_bytes(p) // 4 or p.C, np.float32)
        arrays = {**{f"input {i}": array for i, array in enumerate(inputs)}, "partial": partial, "result": None}
        hostcuda.run(config, replace(launch, grid=grid), arrays, outputs=["partial"], schedule="every", device=DEVICE)
        sums.append(partial)
    assert_same_bits(*sums, name)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("weight_gradient_pairs", WeightGradientProblem("conv1d", 3, 6, 6, 300, 300, 40, 1, 20, groups=6)),
        ("weight_gradient_pairs", WeightGradientProblem("conv1d", 3, 6, 6, 150, 299, 12, 2, 5, groups=6)),
        ("weight_gradient_pairs", WeightGradientProblem("conv1d", 40, 2, 2, 9, 9, 3, 1, 1, dtype="float16")),
        ("weight_gradient_tiled", WeightGradientProblem("conv1d", 3, 20, 12, 200, 200, 5, 1, 2)),
        ("weight_gradient_tiled", WeightGradientProblem("conv1d", 30, 20, 12, 11, 11, 5, 1, 2, dtype="complex64")),
    ],
    **by_name,
)
def test_no_result_needs_the_nan_fallback(name: str, problem: WeightGradientProblem) -> None:
    # Shared memory that is read too early holds NaNs under hostcuda, and the NaN fallback would repair what a GPU
    # leaves wrong.
    (family,) = (family for family in FAMILIES if family.name == name)
    layout = Layout.contiguous(problem)
    config, launch = kernel_of(family, problem, layout, DEVICE)
    cut = Slices.of(problem)
    assert cut.count > 1
    coarse, fine = normal(problem)
    partial_dtype = np.float32 if problem.itemsize < 4 else coarse.dtype
    shape = (cut.count, *problem.weight_shape)
    sums = [np.empty(shape, partial_dtype) for _ in range(2)]
    base, base_launch = kernel_of(FAMILIES[-1], problem, layout, DEVICE)
    for partial, kernel, how in zip(
        sums, (Program.without_nan_fallback(config), Program.of(base)), (launch, base_launch), strict=True
    ):
        arrays = {"coarse": coarse, "fine": fine, "partial": partial, "grad_weight": None}
        hostcuda.run(kernel, how, arrays, outputs=["partial"], schedule="every", device=DEVICE)
    # A zero's sign may differ before the slices are added to +0.
    np.testing.assert_array_equal(*sums)


BIASES = (
    BiasGradientProblem(2, 5, 37),
    BiasGradientProblem(1, 1, 1),
    BiasGradientProblem(300, 3, 7),
    BiasGradientProblem(700, 2, 13),  # several slices of whole samples
    BiasGradientProblem(2, 3, 9001),  # pieces of samples
    BiasGradientProblem(70, 2, 1000),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", BIASES, ids=str)
def test_bias(problem: BiasGradientProblem, dtype: str) -> None:
    p = replace(problem, dtype=dtype)
    rng = generator(p)
    (dy,) = as_dtype(p, lambda shape: np.where(rng.random(shape) < 100 / p.terms, 1.0, 0.0), p.grad_output_shape)
    expected = reference.bias_gradient(p, dy).exact().astype(dy.dtype)
    output = hostcuda.compute(p, dy, schedule="every" if p.terms < 5000 else "reverse")
    assert_same_bits(output, expected, p)
    (dy,) = as_dtype(p, rng.standard_normal, p.grad_output_shape)
    assert reference.bias_gradient(p, dy).within_bound(hostcuda.compute(p, dy)).all()


def test_bias_of_any_layout() -> None:
    p = BiasGradientProblem(3, 4, 300)
    (dy,) = as_dtype(p, generator(p).standard_normal, p.grad_output_shape)
    expected = hostcuda.compute(p, dy)
    for given, stride in ((scattered(dy), 2), (channels_last(dy), -1), (unaligned(dy), 1)):
        layout = Layout.of(grad_output=hostcuda.array_layout(given), grad_bias=ArrayLayout((stride,), 4))
        assert_same_bits(hostcuda.compute(p, given, layout=layout), expected, stride)
    far = Layout.of(grad_output=ArrayLayout((2**31 + 8, 300, 1)), grad_bias=ArrayLayout((1,)))
    choice = dispatch.choose(p, far, DEVICE)
    assert choice is not None
    assert choice.launch.index_bits == 64
    assert_same_bits(hostcuda.compute(p, dy, layout=far), expected, "64 bits")


@pytest.mark.gpu
def test_two_kernels_are_launched_and_the_same_ones_again(cupy: Any, launched: list[str]) -> None:
    p = WeightGradientProblem("conv_transpose1d", 2, 6, 5, 90, 183, 5, 2, dtype="complex64")
    coarse, fine = normal(p)
    expected = hostcuda.compute(p, coarse, fine)
    x, dy = cupy.asarray(coarse), cupy.asarray(fine)
    for _ in range(2):
        assert_same_bits(grad.conv_transpose1d_weight(x, p.weight_shape, dy, stride=2).get(), expected, p)
    assert launched == ["weight_gradient_tiled", "sum_slices"] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 4, 0), (2, 0, 5)], ids=str)
def test_empty_arrays_give_zeros(cupy: Any, launched: list[str], shape: tuple[int, int, int]) -> None:
    N, C, L = shape
    x, dy = cupy.empty(shape, np.float32), cupy.empty((N, 3, L + 4), np.float32)
    out = cupy.full((3, C, 3), 7, np.float32)
    if L:
        grad.conv1d_weight(x, out.shape, dy, padding=3, out=out)
        np.testing.assert_array_equal(out.get(), np.zeros(out.shape))
    out = cupy.full(C, 7, np.float32)
    grad.conv1d_bias(x, out=out)
    np.testing.assert_array_equal(out.get(), np.zeros(C))
    assert launched == []


def executor(p: WeightGradientProblem | BiasGradientProblem, *arrays: Any) -> runtime.Executor:
    """The executor of a call with these arrays, in the order of the public functions."""
    name = f"{p.op}_weight" if isinstance(p, WeightGradientProblem) else "conv1d_bias"
    return runtime.make_executor(p, SIGNATURES[name].operands, arrays, None)


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "dtype"), items(FAMILIES), **by_name)
def test_gpu_gives_the_bits_of_hostcuda(family: Family[Any], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = runtime.cupy_module()
    monkeypatch.setattr(dispatch, "FAMILIES", (family,))
    dispatch.choose.cache_clear()
    try:
        taken = [(name, p) for name, p in problems(dtype).items() if takes(family, p)]
        for name, p in every_third(taken, DTYPES.index(dtype)):
            coarse, fine = normal(p)
            given = [cupy.asarray(array) for array in ((coarse, fine) if p.transposed else (fine, coarse))]
            output = cupy.empty(p.weight_shape, coarse.dtype)
            executor(p, *given).run(*given, output)
            assert_same_bits(cupy.asnumpy(output), hostcuda.compute(p, coarse, fine, family=family.name), name)
    finally:
        dispatch.choose.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_gives_the_bits_of_hostcuda_for_a_bias(dtype: str) -> None:
    cupy = runtime.cupy_module()
    for problem in BIASES:
        p = replace(problem, dtype=dtype)
        (dy,) = as_dtype(p, generator(p).standard_normal, p.grad_output_shape)
        given = cupy.asarray(dy)
        output = cupy.empty(p.bias_shape, dy.dtype)
        executor(p, given).run(given, output)
        assert_same_bits(cupy.asnumpy(output), hostcuda.compute(p, dy), p)
