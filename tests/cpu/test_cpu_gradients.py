"""The NumPy path of the weight and bias gradients: every form, block by block, within the bound and its memory."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gpuconv import reference
from gpuconv.cpu import bias_gradient, limits, threads, weight_gradient
from gpuconv.cpu.arrays import Scratch
from gpuconv.problem import DTYPES, BiasGradientProblem, WeightGradientProblem, numpy_dtype

Array = npt.NDArray[Any]
_MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def _one_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The block sizes also depend on how BLAS computes small products; here it is that of AVX-512."""
    monkeypatch.setattr(limits, "has_avx512", lambda: True)
    weight_gradient._choose.cache_clear()
    yield
    monkeypatch.undo()
    weight_gradient._choose.cache_clear()


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    values = rng.standard_normal(shape)
    return (values + 1j * rng.standard_normal(shape) if "complex" in dtype else values).astype(numpy_dtype(dtype))


def arrays(p: WeightGradientProblem, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return draw(rng, p.coarse_shape, p.dtype), draw(rng, p.fine_shape, p.dtype)


def compute(p: WeightGradientProblem, coarse: Array, fine: Array) -> Array:
    out = np.full(p.weight_shape, np.nan, coarse.dtype)
    weight_gradient.compute(p, coarse, fine, out)
    return out


def assert_right(p: WeightGradientProblem, coarse: Array, fine: Array) -> None:
    assert reference.weight_gradient(p, coarse, fine).within_bound(compute(p, coarse, fine)).all(), p


def problem(
    op: Any, N: int, C_coarse: int, C_fine: int, L_coarse: int, L_fine: int, K: int, *settings: int
) -> WeightGradientProblem:
    """Settings: stride, padding_left, dilation, groups."""
    return WeightGradientProblem(op, N, C_coarse, C_fine, L_coarse, L_fine, K, *settings)


# name of the form: problems for which it is chosen.
CHOSEN = {
    "dots": [
        problem("conv1d", 3, 40, 40, 300, 300, 7, 1, 3, 1, 40),
        problem("conv_transpose1d", 2, 60, 30, 90, 181, 4, 2, 1, 1, 30),
        problem("conv1d", 1, 1, 1, 20000, 20000, 129, 1, 64, 1, 1),
        problem("conv1d", 70, 12, 12, 60, 60, 5, 1, 6, 3, 12),
        problem("conv1d", 1, 1, 1, 9, 9 * 70000, 3, 70000, 0, 1, 1),
    ],
    "taps": [
        problem("conv1d", 2, 30, 20, 700, 700, 5, 1, 8, 4, 1),
        problem("conv1d", 2, 70, 16, 300, 900, 4, 3, 2, 1, 1),
        problem("conv_transpose1d", 1, 16, 40, 200, 400, 6, 2, 2, 1, 2),
        problem("conv1d", 1, 600, 520, 70, 70, 1, 1, 0, 1, 1),
    ],
    "panels": [
        problem("conv1d", 2, 48, 1, 500, 2500, 10, 5, 0, 1, 1),
        problem("conv1d", 20, 24, 24, 30, 30, 3, 1, 1, 1, 1),
        problem("conv1d", 3, 2, 66, 400, 400, 21, 1, 10, 1, 1),
        problem("conv_transpose1d", 2, 33, 2, 100, 399, 8, 4, 3, 1, 1),
        problem("conv1d", 2, 6, 6, 40, 40, 600, 1, 300, 1, 1),
        problem("conv1d", 70, 12, 12, 24, 24, 5, 1, 6, 3, 12),
    ],
}
ALL = [p for problems in CHOSEN.values() for p in problems]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "p"), [(form, p) for form, some in CHOSEN.items() for p in some], ids=str)
def test_the_form_that_is_chosen_is_right(form: str, p: WeightGradientProblem, dtype: str) -> None:
    p = replace(p, dtype=dtype)
    assert weight_gradient.method(p).name == form
    assert_right(p, *arrays(p))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[random.Random], str]:
    """A function that draws tiny block sizes and a form, so that small problems consist of many blocks."""

    def draw_sizes(rng: random.Random) -> str:
        form = rng.choice(["dots", "taps", "panels"])
        sizes = {
            "_PANEL": rng.choice([256, 4096]),
            "_CONCURRENT_PANEL": rng.choice([256, 2048]),
            "_SUMS": rng.choice([64, 4096]),
            "_PARTIAL_SUMS": rng.choice([0, 2**20]),
            "_DOT_ROW": rng.choice([64, 512]),
            "_DOT_POSITIONS": 1,
            "_DOT_ROWS": 10**9 if form == "dots" else 0,
            "_ROWS": rng.choice([1, 3, 512]),
            "_WINDOWS": rng.choice([2, 5, 512]),
            "_POSITIONS": rng.choice([3, 8, 2048]),
            "_FEWEST_POSITIONS": rng.choice([1, 256]),
            "_TAPS_CHANNELS": 1 if form == "taps" else 10**9,
            "_TAPS_POSITIONS": 1,
            "_SMALL_TILE": rng.choice([2, 64]),
            "_SMALL_ROWS": rng.choice([0, 256]),
            "_CALL": rng.choice([1, 500, 10**6]),
            "_WORTH_THREADS": rng.choice([0, 10**9]),
        }
        for name, size in sizes.items():
            monkeypatch.setattr(weight_gradient, name, size)
        weight_gradient._choose.cache_clear()
        return form

    return draw_sizes


def random_problem(rng: random.Random) -> WeightGradientProblem:
    """With windows that leave the arrays on both sides, and more often than not enough positions for several tiles."""
    stride, dilation, groups, K = rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 6)
    L_coarse = rng.randint(1, 30)
    reach = (L_coarse - 1) * stride + (K - 1) * dilation + 1
    left = rng.randint(0, reach // 2)
    op = rng.choice(["conv1d", "conv_transpose1d"])
    return problem(
        op, rng.randint(1, 4), groups * rng.randint(1, 4), groups * rng.randint(1, 4), L_coarse,
        max(1, reach - left - rng.randint(0, reach // 2)), K, stride, left, dilation, groups,
    )  # fmt: skip


def test_every_form_in_tiny_blocks(small_blocks: Callable[[random.Random], str]) -> None:
    names = set()
    for seed in range(400):
        rng = random.Random(seed)
        form = small_blocks(rng)
        p = replace(random_problem(rng), dtype=rng.choice(DTYPES))
        coarse, fine = arrays(p, seed)
        name = weight_gradient.method(p).name
        assert name in (form, "panels")  # dots take one channel
        names.add(name)
        for array in (coarse, fine):
            if rng.random() < 0.3:
                array.reshape(-1)[rng.randrange(array.size)] = rng.choice([np.nan, np.inf, -np.inf])
        if rng.random() < 0.3:
            coarse, fine = coarse[..., ::-1].copy()[..., ::-1], np.asfortranarray(fine)
        assert_right(p, coarse, fine)
    assert names == {"dots", "taps", "panels"}


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("p", [p for p in ALL if p.stride < 100], ids=str)
def test_what_is_not_finite_reaches_its_own_terms_alone(p: WeightGradientProblem, value: float) -> None:
    """In the first position of coarse, whose windows leave the fine array at some taps and not at others."""
    coarse, fine = arrays(p)
    clean = compute(p, coarse, fine)
    coarse[0, 0, 0] = value
    result = compute(p, coarse, fine)
    positions = -p.padding_left + p.dilation * np.arange(p.K)
    touched = np.zeros(p.weight_shape, bool)
    touched[0] = (positions >= 0) & (positions < p.L_fine)
    np.testing.assert_array_equal(~np.isfinite(result), touched)
    sums = reference.weight_gradient(p, coarse, fine)
    assert sums.within_bound(result).all()
    assert np.isfinite(clean).all()


def test_empty_sums_are_zeros() -> None:
    for p in (
        problem("conv1d", 0, 4, 6, 10, 10, 3),
        problem("conv_transpose1d", 2, 4, 6, 0, 3, 3),
        problem("conv1d", 2, 4, 6, 3, 0, 3, 1, 2),
        problem("conv1d", 2, 0, 6, 10, 10, 3),
        problem("conv1d", 2, 4, 0, 10, 10, 3),
        problem("conv1d", 2, 4, 6, 2, 1, 2, 5, 4),  # all windows lie in the padding
    ):
        np.testing.assert_array_equal(compute(p, *arrays(p)), np.zeros(p.weight_shape))


LARGE = {
    "dots": problem("conv1d", 4, 256, 256, 4000, 4000, 31, 1, 15, 1, 256),
    "taps": problem("conv1d", 2, 64, 64, 8000, 8000, 5, 1, 2, 1, 1),
    "panels": problem("conv1d", 2, 256, 1, 20000, 100000, 10, 5, 0, 1, 1),
}
LARGE_PRODUCTS = problem("conv1d", 1, 700, 600, 3000, 3000, 3, 1, 1, 1, 1)


@pytest.mark.parametrize("case", ["plain", "strided", "float16", "complex64", "infinity"])
@pytest.mark.parametrize(("name", "p"), [*LARGE.items(), ("taps", LARGE_PRODUCTS)], ids=str)
def test_measured_memory(name: str, p: WeightGradientProblem, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cpus", lambda: 16)  # as many threads as any machine would start
    monkeypatch.setattr(Scratch, "borrow", classmethod(lambda cls, _, dtype: cls(dtype)))  # nothing is kept
    p = replace(p, dtype=case) if case in DTYPES else p
    coarse, fine = arrays(p)
    out = np.zeros(p.weight_shape, coarse.dtype)
    if case == "strided":
        coarse, out = coarse[..., ::-1].copy()[..., ::-1], np.asfortranarray(out)
    if case == "infinity":
        coarse[0, 0, 0] = np.inf
    bound = weight_gradient.method(p).workspace_bytes
    assert weight_gradient.method(p).name == name
    tracemalloc.start()
    try:
        weight_gradient.compute(p, coarse, fine, out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= bound + _MIB // 2  # the interpreter's own objects
    assert bound <= max(28 * _MIB, (coarse.nbytes + fine.nbytes) // 4)


def test_the_workspace_is_bounded_for_extreme_problems() -> None:
    for p in (
        problem("conv1d", 10**6, 4096, 4096, 10**6, 10**6, 1000, 1, 500, 1, 1),
        problem("conv1d", 1, 4096, 4096, 10**6, 10**6, 1000, 1, 500, 1, 4096),
        problem("conv1d", 10**6, 1, 1, 10, 10**9, 10**5, 10**7, 0, 1, 1),
        problem("conv1d", 1, 64, 64, 1000, 10**9, 9, 10**6, 0, 10**7, 1),
        problem("conv_transpose1d", 3, 10**6, 1, 10**5, 10**6, 3, 10, 0, 1, 1),
        problem("conv_transpose1d", 3, 7, 10**6, 10**5, 10**6, 3, 10, 0, 1, 1),
    ):
        for dtype in DTYPES:
            method = weight_gradient.method(replace(p, dtype=dtype))
            arrays_bytes = (math.prod(p.coarse_shape) + math.prod(p.fine_shape)) * numpy_dtype(dtype).itemsize
            assert 0 < method.workspace_bytes <= max(28 * _MIB, arrays_bytes // 4), (p, dtype)


@pytest.mark.parametrize("p", [*ALL, *LARGE.values()], ids=str)
def test_bits_do_not_depend_on_threads(p: WeightGradientProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_gradient, "_WORTH_THREADS", 0)
    weight_gradient._choose.cache_clear()
    coarse, fine = arrays(p)
    results = []
    for cpus in (1, 2, 5):
        monkeypatch.setattr(threads, "usable_cpus", lambda cpus=cpus: cpus)
        results.append(compute(p, coarse, fine).tobytes())
    assert len(set(results)) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 70), (2, 1, 100_000), (200, 40, 9), (1, 3, 0), (0, 3, 9)], ids=str)
def test_bias_gradients(shape: tuple[int, int, int], dtype: str) -> None:
    p = BiasGradientProblem(*shape, dtype)
    u = draw(np.random.default_rng(0), shape, dtype)
    for array in (u, u.T.copy().T, u[..., ::-1]):
        out = np.full(p.bias_shape, np.nan, u.dtype)
        bias_gradient.compute(p, array, out)
        assert reference.bias_gradient(p, array).within_bound(out).all()


def test_bias_gradients_sum_narrow_data_in_float32() -> None:
    """In float16 the sum would stop at 2048."""
    p = BiasGradientProblem(2, 3, 5000, "float16")
    out = np.zeros(p.bias_shape, np.float16)
    bias_gradient.compute(p, np.ones(p.grad_output_shape, np.float16), out)
    np.testing.assert_array_equal(out, np.full(3, 10000))


def test_bits_of_bias_gradients_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    p = BiasGradientProblem(3, 64, 40_000)
    u = draw(np.random.default_rng(0), p.grad_output_shape, "float32")
    results = []
    for cpus in (1, 5):
        monkeypatch.setattr(threads, "usable_cpus", lambda cpus=cpus: cpus)
        out = np.empty(p.bias_shape, np.float32)
        bias_gradient.compute(p, u, out)
        results.append(out.tobytes())
    assert len(set(results)) == 1
