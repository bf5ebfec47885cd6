"""The NumPy path: every form against the reference, its memory, its strides and what may not leak."""

from __future__ import annotations

import math
import random
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bench.layers import load
from gpuconv import cpu, reference
from gpuconv.cpu import choice, limits, threads
from gpuconv.cpu.arrays import Scratch
from gpuconv.cpu.geometry import Call
from gpuconv.cpu.taps import Taps
from gpuconv.problem import DTYPES, ConvProblem, numpy_dtype

Array = npt.NDArray[Any]

_MIB = 1024 * 1024

conv1d = partial(ConvProblem, "conv1d")
conv_transpose1d = partial(ConvProblem, "conv_transpose1d")

# Problems by the method that computes them: N, C_in, C_out, L_in, K, stride, padding (2), dilation, groups, ...
METHODS: dict[str, list[ConvProblem]] = {
    "taps": [
        conv1d(1, 4, 4, 60000, 2, 4, 2, 0, 7, 4, has_bias=True),
        conv1d(8, 64, 64, 4000, 2, 4, 1, 1, 1, 64),
    ],
    "toeplitz": [
        conv1d(40, 64, 128, 40, 3, 1, 1, 1, has_bias=True),
        conv1d(300, 8, 8, 16, 5, 1, 2, 2),
        conv_transpose1d(300, 16, 12, 8, 3, 2, 1, 0, 2, 2, 1, has_bias=True),
        conv_transpose1d(3, 1, 10, 700, 64, 32, 5, 3),
        conv1d(2, 8, 8, 700, 131, 1, 15, 15, 1, 8, has_bias=True),
        conv1d(64, 30, 30, 24, 51, 1, 25, 25, 1, 30),
        conv1d(1, 1, 1, 1500, 600, has_bias=True),
        conv_transpose1d(2, 8, 8, 500, 120, 1, 3, 10, 1, 8),
        conv_transpose1d(300, 4, 6, 8, 5, 3, 2, 1, 2, 2, 1, has_bias=True),
    ],
    "small": [
        conv1d(1, 1, 1, 8, 3),
        conv1d(2, 1, 24, 500, 10, 5, 0, 4, has_bias=True),
        conv1d(1, 16, 16, 100, 3, 1, 1, 2, has_bias=True),
        conv_transpose1d(1, 1, 1, 20, 700, has_bias=True),
        conv_transpose1d(2, 4, 4, 50, 6, 2, 1, 1, 3, 4, 1),
        conv_transpose1d(1, 3, 5, 300, 4, 4, 5, 2, 6, has_bias=True),
    ],
    "panels": [
        conv_transpose1d(4, 64, 64, 300, 6, 2, 1, 1, 3, 4, 1),
        conv1d(2, 20, 30, 700, 3, 1, 1, 1, has_bias=True),
        conv1d(2, 20, 150, 700, 3, 2, 2, 0, 3, 2),
        conv1d(2, 64, 96, 500, 11, 1, 25, 25, 5),
        conv1d(1, 128, 256, 700, 1),
        conv1d(100, 16, 64, 24, 16, 1, 15, 15, 2, has_bias=True),
        conv_transpose1d(8, 4, 16, 400, 8, 4, 2, 2, has_bias=True),
        conv_transpose1d(20, 8, 6, 400, 5, 3, 2, 1, 2, 2, 1, has_bias=True),
        conv1d(8, 6, 6, 3000, 3, 1, 1, 1, 2, 6, has_bias=True),
    ],
    "windows": [
        conv1d(2, 64, 64, 900, 7, 1, 3, 3, 1, 64, has_bias=True),
        conv1d(1, 256, 256, 4000, 5, 4, 2, 2, 1, 256),
        conv_transpose1d(8, 64, 64, 500, 3, 2, 1, 1, 1, 64, 1, has_bias=True),
        conv1d(3, 1, 1, 5003, 40),
    ],
    "planes": [
        conv1d(512, 64, 64, 8, 3, 1, 1, 1, 1, 64),
        conv1d(64, 256, 256, 40, 2, 1, 0, 0, 2, 256, has_bias=True),
        conv_transpose1d(64, 96, 96, 60, 2, 1, 0, 1, 3, 96, has_bias=True),
        conv1d(32, 300, 300, 10, 4, 1, 12, 3, 4, 300),
    ],
    "shift_add": [
        conv1d(2, 48, 2, 400, 7, 1, 3, 3, has_bias=True),
        conv_transpose1d(2, 64, 1, 200, 8, 4, 2, 2),
        conv_transpose1d(1, 256, 64, 9, 10, 5, 0, 0, has_bias=True),
        conv_transpose1d(2, 64, 4, 300, 5, 3, 2, 1, 2, has_bias=True),
    ],
}
ALL = [problem for problems in METHODS.values() for problem in problems]


def with_dtype(problem: ConvProblem, dtype: str) -> ConvProblem:
    p = problem
    return ConvProblem(
        p.op, p.N, p.C_in, p.C_out, p.L_in, p.K, p.stride, p.padding_left, p.padding_right, p.dilation, p.groups,
        p.output_padding, dtype, p.has_bias, p.batched,
    )  # fmt: skip


def with_batch(problem: ConvProblem, N: int) -> ConvProblem:
    p = problem
    return ConvProblem(
        p.op, N, p.C_in, p.C_out, p.L_in, p.K, p.stride, p.padding_left, p.padding_right, p.dilation, p.groups,
        p.output_padding, p.dtype, p.has_bias, p.batched,
    )  # fmt: skip


def arrays(problem: ConvProblem, seed: object = 0, integers: bool = False) -> tuple[Array, Array, Array | None]:
    """Input, weight and bias: normal deviates, or integers from -3 to 3."""
    rng = np.random.default_rng([ord(c) for c in str(seed)])

    def array(shape: tuple[int, ...]) -> Array:
        def part() -> Array:
            return rng.integers(-3, 4, shape).astype(float) if integers else rng.standard_normal(shape)

        return (part() + 1j * part() if problem.is_complex else part()).astype(numpy_dtype(problem.dtype))

    return (
        array(problem.input_shape),
        array(problem.weight_shape),
        array((problem.C_out,)) if problem.has_bias else None,
    )


def poisoned(problem: ConvProblem) -> Array:
    """An output whose unwritten elements show."""
    return np.full(problem.output_shape, np.nan, numpy_dtype(problem.dtype))


def convolve(problem: ConvProblem, x: Array, w: Array, b: Array | None) -> Array:
    y = poisoned(problem)
    cpu.convolve(problem, x, w, b, y)
    return y


def assert_within_bound(problem: ConvProblem, y: Array, x: Array, w: Array, b: Array | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # infinities that a test puts there
        within = reference.within_bound(problem, y, x, w, b)
    wrong = np.argwhere(~within)
    assert not wrong.size, f"{problem} ({cpu.method(problem).name}): {len(wrong)} wrong, the first at {wrong[0]}"


def random_problem(rng: random.Random, dtype: str) -> ConvProblem:
    while True:
        groups = rng.choice([1, 1, 2, 3, 8])
        stride, dilation = rng.choice([1, 1, 2, 3, 8, 17, 40]), rng.choice([1, 1, 2, 5])
        op = rng.choice(["conv1d", "conv_transpose1d"])
        N = rng.choice([1, 1, 2, 5])
        left = rng.choice([0, 0, 1, 4, 20])
        try:
            return ConvProblem(
                op,
                N,
                groups * rng.choice([1, 1, 2, 3, 9]),
                groups * rng.choice([1, 1, 2, 5, 9]),
                rng.choice([1, 2, 7, 30, 100, 300]),
                rng.choice([1, 2, 3, 5, 8, 31, 64]),
                stride,
                left,
                rng.choice([0, left, 7]),
                dilation,
                groups,
                rng.randrange(max(stride, dilation)) if op == "conv_transpose1d" else 0,
                dtype,
                rng.random() < 0.5,
                N > 1 or rng.random() < 0.7,
            )
        except ValueError:  # no output position is left
            continue


def fortran(array: Array) -> Array:
    return np.asfortranarray(array)


def reversed_in_memory(array: Array) -> Array:
    return np.flip(np.flip(array).copy())


def spread(array: Array) -> Array:
    wide = np.full(tuple(2 * extent for extent in array.shape), np.nan, array.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def transposed_in_memory(array: Array) -> Array:
    return np.ascontiguousarray(array.T).T


def unaligned(array: Array) -> Array:
    raw = np.zeros(array.nbytes + 1, np.uint8)
    view = raw[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


LAYOUTS = [fortran, reversed_in_memory, spread, transposed_in_memory, unaligned]


@pytest.fixture(autouse=True)
def _one_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The choice of the method also depends on how BLAS computes small products; here it is that of AVX-512."""
    monkeypatch.setattr(limits, "has_avx512", lambda: True)
    choice.choose.cache_clear()
    yield
    monkeypatch.undo()
    choice.choose.cache_clear()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[random.Random], None]:
    """A function that draws tiny block sizes, so that small problems consist of many blocks of every kind."""

    def draw(rng: random.Random) -> None:
        buffer = rng.choice([1, 2, 4, 16]) * 1024
        sizes = {
            "BUFFER": 4 * buffer,
            "CONCURRENT_BUFFER": buffer,
            "PACKED_WEIGHT": rng.choice([1, 4, 64]) * 1024,
            "SMALL_TILE": rng.choice([32, 64]),
            "SMALL_DEPTH": rng.choice([4, 16, 128]),
            "LARGE_DEPTH": rng.choice([3, 20, 10_000]),
            "BAND_DEPTH": rng.choice([20, 100, 4096]),
            "SUMS": buffer,
            "STAGED_INPUT": rng.choice([0, buffer]),
            "ELEMENTWISE_BLOCK": rng.choice([64, 400, 4000]),
            "WORTH_THREADS": rng.choice([0, 10**9]),
            "MANY_PHASES": rng.choice([2, 16]),
        }
        for name, size in sizes.items():
            monkeypatch.setattr(limits, name, size)
        avx512 = rng.random() < 0.5
        monkeypatch.setattr(limits, "has_avx512", lambda: avx512)
        choice.choose.cache_clear()

    return draw


def chosen_forms(problem: ConvProblem) -> list[choice.ChosenForm]:
    """Every form that can compute the problem, whichever is chosen, on one thread and on several."""
    found = [
        choice.chosen_form(problem, q, form, cost)
        for q, forms in choice.candidates(problem)
        for form in forms
        for cost in (0.0, math.inf)
    ]
    if problem.C_in_g and problem.L_in and 0 not in problem.output_shape:
        found.append(choice.chosen_form(problem, problem, Taps.of(problem), 0.0))
    return found


def put_non_finite(arrays: list[Array], rng: random.Random) -> None:
    for array in rng.choice([arrays[:1], arrays[1:], arrays]):
        for _ in range(rng.choice([1, 2])):
            array.reshape(-1)[rng.randrange(array.size)] = rng.choice([np.nan, np.inf, -np.inf])


@pytest.mark.parametrize(
    ("name", "problem"), [(name, p) for name, problems in METHODS.items() for p in problems], ids=str
)
def test_every_method_is_used_and_right(name: str, problem: ConvProblem) -> None:
    assert cpu.method(problem).name == name
    x, w, b = arrays(problem)
    assert_within_bound(problem, convolve(problem, x, w, b), x, w, b)


def test_the_methods_are_all_of_them() -> None:
    names = {cpu.method(layer.problem(dtype)).name for layer in load() for dtype in DTYPES}
    assert names <= set(METHODS)
    assert {cpu.method(p).name for p in ALL} == set(METHODS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", ALL, ids=str)
def test_integers_are_exact(problem: ConvProblem, dtype: str) -> None:
    p = with_dtype(problem, dtype)
    x, w, b = arrays(p, integers=True)
    # Every partial sum is an integer that float32 holds, so that only the rounding to the output dtype remains.
    exact = reference.compute(p, x, w, b)
    expected = exact.astype(np.float32).astype(x.dtype) if p.itemsize == 2 else exact.astype(x.dtype)
    np.testing.assert_array_equal(convolve(p, x, w, b), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_problems(dtype: str) -> None:
    rng = random.Random(f"random problems, {dtype}")
    for index in range(60):
        p = random_problem(rng, dtype)
        x, w, b = arrays(p, (dtype, index))
        if index % 3 == 0:
            put_non_finite([x, w], rng)
        assert_within_bound(p, convolve(p, x, w, b), x, w, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_in_many_small_blocks(dtype: str, small_blocks: Callable[[random.Random], None]) -> None:
    rng = random.Random(f"small blocks, {dtype}")
    for index in range(12):
        small_blocks(rng)
        p = random_problem(rng, dtype)
        if p.flops() > 10**6:  # tiny blocks take their time
            continue
        x, w, b = arrays(p, (dtype, index))
        if index % 3 == 0:
            put_non_finite([x, w], rng)
        for chosen in rng.sample(some := chosen_forms(p), min(12, len(some))):
            y = poisoned(p)
            chosen.run(Call.of(p, x, w, b, y))
            assert_within_bound(p, y, x, w, b)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_once(dtype: str) -> None:
    p = conv1d(1, 2, 1, 5, 1, dtype=dtype, has_bias=True)
    large = {"float16": 2048.0, "bfloat16": 256.0}[dtype]  # of two neighbours, odd ones above it do not exist
    kind = numpy_dtype(dtype)
    x = np.array([[[large] * 5, [1.0] * 5]]).astype(kind)
    y = convolve(p, x, np.ones((1, 2, 1)).astype(kind), np.ones(1).astype(kind))
    np.testing.assert_array_equal(y.astype(float), large + 2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dtype", ["float16", "float32", "complex128"])
@pytest.mark.parametrize("problem", [problems[0] for problems in METHODS.values()], ids=str)
def test_any_layout(problem: ConvProblem, dtype: str, layout: Callable[[Array], Array]) -> None:
    p = with_dtype(problem, dtype)
    x, w, b = arrays(p, integers=True)
    expected = convolve(p, x, w, b)
    inputs = [None if a is None else layout(a) for a in (x, w, b)]
    for a in inputs:
        if a is not None:
            a.flags.writeable = False
    before = [None if a is None else a.copy() for a in inputs]
    y = layout(poisoned(p))
    cpu.convolve(p, *inputs, y)  # type: ignore[arg-type]
    np.testing.assert_array_equal(y, expected)
    for a, copy in zip(inputs, before, strict=True):
        assert (a is None and copy is None) or np.array_equal(a, copy)


@pytest.mark.parametrize("problem", [problems[0] for problems in METHODS.values()], ids=str)
def test_broadcast_inputs_have_stride_zero(problem: ConvProblem) -> None:
    x, w, b = arrays(problem)
    x = np.broadcast_to(x[:1, :1], x.shape)
    w = np.broadcast_to(w[..., :1], w.shape)
    assert_within_bound(problem, convolve(problem, x, w, b), x, w, b)


def test_an_output_of_every_second_element_leaves_the_others_alone() -> None:
    for problems in METHODS.values():
        p = problems[0]
        for integers in (True, False):  # BLAS may sum in another order there, which shows in rounded sums alone
            x, w, b = arrays(p, integers=integers)
            wide = np.full((*p.output_shape[:-1], 2 * p.L_out), 7.0, np.float32)
            cpu.convolve(p, x, w, b, wide[..., ::2])
            if integers:
                np.testing.assert_array_equal(wide[..., ::2], convolve(p, x, w, b))
            assert reference.within_bound(p, wide[..., ::2], x, w, b).all()
            assert (wide[..., 1::2] == 7).all()


def test_unbatched() -> None:
    for problem in ALL:
        p = with_batch(problem, 1)
        x, w, b = arrays(p)
        single = ConvProblem(
            p.op, 1, p.C_in, p.C_out, p.L_in, p.K, p.stride, p.padding_left, p.padding_right, p.dilation, p.groups,
            p.output_padding, p.dtype, p.has_bias, False,
        )  # fmt: skip
        np.testing.assert_array_equal(convolve(single, x[0], w, b), convolve(p, x, w, b)[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("problem", ALL[:2] + ALL[3:], ids=str)
def test_a_non_finite_input_stays_in_its_windows(problem: ConvProblem, dtype: str) -> None:
    p = with_dtype(with_batch(problem, 2), dtype)
    rng = np.random.default_rng(p.C_in)
    values = rng.permutation([np.nan, np.inf, -np.inf])
    for position, value in zip((0, p.L_in // 2, p.L_in - 1), values, strict=True):
        x, w, b = arrays(p)
        c_in = int(rng.integers(p.C_in))
        x[1, c_in, position] = value
        y = convolve(p, x, w, b)
        assert_within_bound(p, y, x, w, b)
        hit = np.zeros(p.output_shape, bool)
        group = slice(c_in // p.C_in_g * p.C_out_g, (c_in // p.C_in_g + 1) * p.C_out_g)
        for k in range(p.K):
            if p.transposed:
                l_out = position * p.stride - p.padding_left + k * p.dilation
            else:
                l_out, rest = divmod(position + p.padding_left - k * p.dilation, p.stride)
                l_out = -1 if rest else l_out
            if 0 <= l_out < p.L_out:
                hit[1, group, l_out] = True
        np.testing.assert_array_equal(np.isfinite(y), ~hit)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("problem", ALL[:2] + ALL[3:], ids=str)
def test_a_non_finite_weight_does_not_meet_the_padding(problem: ConvProblem, value: float) -> None:
    p = problem
    for k in {0, p.K // 2, p.K - 1}:
        x, w, b = arrays(p)
        w[-1, -1, k] = value
        y = convolve(p, x, w, b)
        assert_within_bound(p, y, x, w, b)
        l_in = np.arange(p.L_in)
        if p.transposed:
            l_out, rest = l_in * p.stride - p.padding_left + k * p.dilation, 0 * l_in
        else:
            l_out, rest = np.divmod(l_in + p.padding_left - k * p.dilation, p.stride)
        hit = np.zeros(p.output_shape, bool)
        hit[:, -1, l_out[(rest == 0) & (l_out >= 0) & (l_out < p.L_out)]] = True
        np.testing.assert_array_equal(np.isfinite(y), ~hit)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
@pytest.mark.parametrize(
    "problem",
    [
        conv1d(2, 1, 2, 300, 200, 1, 120, 90, has_bias=True),
        conv1d(1, 6, 6, 900, 130, 2, 64, 64, 1, 3),
        conv_transpose1d(2, 1, 1, 400, 300, 1, 5, 0, 2, has_bias=True),
    ],
    ids=str,
)
def test_non_finite_values_with_a_long_kernel(problem: ConvProblem, dtype: str) -> None:
    p = with_dtype(problem, dtype)
    assert choice.choose(p).separate == (dtype != "complex64")
    rng = random.Random(f"{p}")
    for index in range(8):
        x, w, b = arrays(p, index, integers=index % 2 == 0)  # some products of zeros and infinities
        put_non_finite([x, w] if b is None else [x, w, b], rng)
        assert_within_bound(p, convolve(p, x, w, b), x, w, b)
    x, w, b = arrays(p)
    x[...] = np.inf
    w[...] = abs(w)
    assert_within_bound(p, convolve(p, x, w, b), x, w, b)


def test_taps_in_the_padding_are_left_out() -> None:
    for p, K in (
        (conv1d(2, 3, 4, 5, 40, 1, 20, 19, has_bias=True), 9),
        (conv1d(1, 2, 2, 7, 9, 2, 18, 0, 3), 3),
        (conv_transpose1d(2, 3, 4, 5, 40, 1, 20, 19, has_bias=True), 9),
    ):
        assert choice.candidates(p)[0][0].K == K, p
        x, w, b = arrays(p)
        w[..., 0] = np.nan  # of a tap that no output needs
        assert_within_bound(p, convolve(p, x, w, b), x, w, b)
        assert np.isfinite(convolve(p, x, w, b)).all()
    for p in (conv_transpose1d(2, 6, 5, 22, 2, 5, 0, 0, 1, 1, 3), conv_transpose1d(2, 4, 5, 20, 3, 2, 0, 0, 5, 1, 4)):
        adjoint = p.adjoint()  # which crops its input
        x, w, _ = arrays(adjoint)
        assert_within_bound(adjoint, convolve(adjoint, x, w, None), x, w, None)
    p = conv1d(2, 3, 4, 1, 2, 1, 1, 2, 3, has_bias=True)  # L_out is 1, and its taps read -1 and 2
    x, w, b = arrays(p)
    assert cpu.method(p).name == "bias"
    assert_within_bound(p, convolve(p, x, w, b), x, w, b)


def test_a_sum_of_zero_is_positive() -> None:
    for p in [
        *ALL,
        conv1d(2, 4, 4, 50, 1, groups=4),
        conv1d(1, 2, 3, 50, 3, 1, 1, 1),
        conv_transpose1d(1, 1, 2, 5, 9, 2),
    ]:
        for chosen in chosen_forms(p):
            y = poisoned(p)
            x, w = np.full(p.input_shape, -1, np.float32), np.zeros(p.weight_shape, np.float32)
            chosen.run(Call.of(p, x, w, None, y))
            assert not np.signbit(y).any(), chosen.form


def test_overflow_is_an_infinity_and_no_warning() -> None:
    for problem in ALL:
        x, w, b = arrays(problem)
        x[...], w[...] = 3e38, 2.0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y = convolve(problem, x, w, b)
        assert_within_bound(problem, y, x, w, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "problem",
    [
        conv1d(0, 4, 6, 10, 3),
        conv1d(2, 4, 0, 10, 3),
        conv1d(2, 0, 6, 10, 3),
        conv1d(2, 0, 6, 10, 3, groups=3),
        conv1d(2, 4, 6, 0, 3, 1, 2, 2),
        conv_transpose1d(0, 4, 6, 10, 3, 2),
        conv_transpose1d(2, 4, 0, 10, 3, 2),
        conv_transpose1d(2, 0, 6, 10, 3, 2),
        conv_transpose1d(2, 4, 6, 0, 9, 2),
    ],
    ids=str,
)
def test_zero_sizes(problem: ConvProblem, has_bias: bool, dtype: str) -> None:
    p = problem
    p = ConvProblem(
        p.op, p.N, p.C_in, p.C_out, p.L_in, p.K, p.stride, p.padding_left, p.padding_right, p.dilation, p.groups,
        p.output_padding, dtype, has_bias,
    )  # fmt: skip
    x, w, b = arrays(p)
    y = convolve(p, x, w, b)
    expected = np.zeros(p.output_shape, x.dtype)
    if b is not None:
        expected[...] = b[:, None]
    np.testing.assert_array_equal(y, expected)
    assert cpu.method(p).name == ("bias" if expected.size else "nothing")
    assert cpu.method(p).workspace_bytes == 0


def test_other_machines_choose_among_the_same_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "has_avx512", lambda: False)
    choice.choose.cache_clear()
    for problem in ALL:
        assert cpu.method(problem).name in METHODS
        x, w, b = arrays(problem)
        assert_within_bound(problem, convolve(problem, x, w, b), x, w, b)


def allowed_memory(problem: ConvProblem) -> int:
    p = problem
    both = (math.prod(p.input_shape) + math.prod(p.output_shape)) * p.itemsize
    return max(32 * _MIB, both // 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_planned_memory_of_the_benchmark_layers(dtype: str) -> None:
    for layer in load():
        p = layer.problem(dtype)
        assert 0 < cpu.method(p).workspace_bytes <= allowed_memory(p), p


def test_planned_memory_of_extreme_problems() -> None:
    extremes = [
        conv1d(1, 1, 1, 2**40, 2**20),
        conv1d(1, 1, 1, 2**40, 3, 2**31 - 1, 0, 0, 2**30),
        conv1d(1, 2**22, 1, 8, 3),
        conv1d(1, 1, 2**22, 8, 3),
        conv1d(1, 2**14, 2**14, 4, 64, 1, 63, 63),
        conv1d(2**20, 3, 5, 4, 3),
        conv1d(1, 2**20, 2**20, 16, 9, 1, 4, 4, 1, 2**20),
        conv_transpose1d(1, 2**14, 2**14, 4, 64, 32),
        conv_transpose1d(1, 64, 64, 2**20, 2**12, 2**12),
        conv_transpose1d(1, 64, 64, 100, 3, 1000),
        conv_transpose1d(1, 2**12, 64, 100, 2**10, 3, 0, 0, 5),
    ]
    for problem in extremes:
        for dtype in DTYPES:
            p = with_dtype(problem, dtype)
            assert 0 < cpu.method(p).workspace_bytes <= allowed_memory(p), p


LARGE = {
    "taps": conv1d(4, 512, 512, 6000, 3, 6, 1, 1, 1, 512),
    "toeplitz": conv1d(4, 512, 512, 1000, 131, 1, 65, 65, 1, 512, has_bias=True),
    "panels": conv1d(2, 64, 64, 20000, 5, 1, 2, 2, has_bias=True),
    "shift_add": conv1d(2, 256, 2, 20000, 7, 1, 3, 3),
}
LARGE_PRODUCTS = conv1d(1, 512, 1024, 1500, 3, 1, 1, 1)


@pytest.mark.parametrize("case", ["plain", "strided", "float16", "complex64", "infinite weight"])
@pytest.mark.parametrize(("name", "problem"), [*LARGE.items(), ("panels", LARGE_PRODUCTS)], ids=str)
def test_measured_memory(name: str, problem: ConvProblem, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cpus", lambda: 16)  # as many threads as any machine would start
    monkeypatch.setattr(Scratch, "borrow", classmethod(lambda cls, _, dtype: cls(dtype)))  # nothing is kept
    p = with_dtype(problem, case) if case in DTYPES else problem
    if case not in DTYPES:
        assert cpu.method(p).name == name
    x, w, b = arrays(p)
    y = np.zeros(p.output_shape, x.dtype)
    if case == "strided":
        x, w, y = reversed_in_memory(x), reversed_in_memory(w), transposed_in_memory(y)
    if case == "infinite weight":
        w[0, 0, 0] = np.inf
    tracemalloc.start()
    try:
        cpu.convolve(p, x, w, b, y)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= cpu.method(p).workspace_bytes + _MIB // 2  # the interpreter's own objects
    assert peak <= allowed_memory(p)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "complex64"])
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("value", [None, np.nan, np.inf])
def test_all_forms_agree(dtype: str, depthwise: bool, value: float | None) -> None:
    """On integers, where each is exact; also with a value that is not finite among them. A real sum of zero is +0."""
    rng, rounds = random.Random(0), 0
    while rounds < 40:
        groups, channels = rng.choice([1, 2, 3, 5]), [1] if depthwise else [1, 2, 3]
        try:
            p = ConvProblem(
                rng.choice(["conv1d", "conv_transpose1d"]), rng.choice([1, 2, 3, 7, 20]),
                groups * rng.choice(channels), groups * rng.choice(channels), rng.choice([1, 2, 3, 5, 8, 17, 300]),
                rng.choice([1, 2, 3, 4, 7]), rng.choice([1, 1, 1, 2, 3]), rng.choice([0, 1, 2, 5]),
                rng.choice([0, 1, 2, 5]), rng.choice([1, 1, 2, 3]), groups, dtype=dtype, has_bias=rng.random() < 0.5,
            )  # fmt: skip
        except ValueError:
            continue
        rounds += 1
        x, w, b = arrays(p, rounds, integers=True)
        if value is not None and x.size:
            x.flat[rng.randrange(x.size)] = value
        expected = poisoned(p)
        choice.chosen_form(p, p, Taps.of(p), 0.0).run(Call.of(p, x, w, b, expected))
        for q, forms in choice.candidates(p):
            for form in forms:
                y = poisoned(p)
                choice.chosen_form(p, q, form, 0.0).run(Call.of(p, x, w, b, y))
                # Which part of a complex number an infinity reaches depends on how its product is made.
                wide = [np.where(np.isfinite(a) | (not p.is_complex), a, np.nan) for a in (y, expected)]
                np.testing.assert_array_equal(*(a.astype(np.complex128) for a in wide), f"{p}: {form}")
                assert p.is_complex or not np.signbit(y[y == 0].astype(np.float32)).any(), f"{p}: {form}"


def test_buffers_are_kept_for_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cpus", lambda: 1)  # a second thread may have nothing left to do
    p = conv1d(4, 16, 16, 4000, 3)
    x, w, b = arrays(p)
    y = poisoned(p)
    cpu.convolve(p, x, w, b, y)
    tracemalloc.start()
    try:
        cpu.convolve(p, x, w, b, y)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000 < choice.choose(p).method.workspace_bytes


def test_buffers_that_are_kept_have_one_user(monkeypatch: pytest.MonkeyPatch) -> None:
    size = np.dtype("float32")
    first = Scratch.borrow("blocks", size)
    second = Scratch.borrow("blocks", size)  # as a finalizer that convolves within a call would
    assert first is not second
    buffer = first.take("panel", 1000)
    first.band = 1
    second.give_back("blocks")
    first.give_back("blocks")
    again = Scratch.borrow("blocks", size)
    assert again is first
    assert np.shares_memory(again.take("panel", 10), buffer)
    assert again.band is None
    monkeypatch.setattr(limits, "KEPT_SCRATCH", 3999)
    again.give_back("blocks")
    assert Scratch.borrow("blocks", size) is not first
    again.give_back("blocks")
    assert Scratch.borrow("blocks", np.dtype("float64")).dtype == np.float64


@pytest.mark.parametrize("problem", [*ALL, *LARGE.values()], ids=str)
def test_bits_do_not_depend_on_threads(problem: ConvProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WORTH_THREADS", 0)
    choice.choose.cache_clear()
    x, w, b = arrays(problem)
    results = []
    for cpus in (1, 2, 5, 1):
        monkeypatch.setattr(threads, "usable_cpus", lambda cpus=cpus: cpus)
        results.append(convolve(problem, x, w, b).tobytes())
    assert len(set(results)) == 1


def test_calls_from_several_threads() -> None:
    expected = [convolve(p, *arrays(p)) for p in ALL]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            results = pool.map(lambda p: convolve(p, *arrays(p)), ALL)
            for result, right in zip(results, expected, strict=True):
                np.testing.assert_array_equal(result, right)


def test_an_error_in_a_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cpus", lambda: 2)

    def fail(*_: object) -> None:
        raise MemoryError("no scratch")

    p = LARGE["taps"]
    x, w, b = arrays(p)
    monkeypatch.setattr(Taps, "_compute_phase", fail)
    buffer_size = np.getbufsize()
    with pytest.raises(MemoryError, match="no scratch"):
        convolve(p, x, w, b)
    assert np.getbufsize() == buffer_size


def test_numpy_settings_are_restored() -> None:
    before = np.getbufsize(), np.geterr()
    for p in ALL:
        convolve(p, *arrays(p))
    assert (np.getbufsize(), np.geterr()) == before
