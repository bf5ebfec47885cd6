"""gpuconv.reference against exact rational arithmetic, NumPy and SciPy; its bound against honest and planted errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import scipy.signal
from hypothesis import given, settings

import gpuconv
from gpuconv import reference
from gpuconv.problem import DTYPES, ConvProblem, Op, numpy_dtype
from tests.strategies import Call, calls, random_array

Array = npt.NDArray[Any]
OPS: tuple[Op, ...] = ("conv1d", "conv_transpose1d")
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
FLOAT32_NORMAL = 2.0**-126


def problem_of(op: Op, x: Array, w: Array, b: Array | None = None, **settings: Any) -> ConvProblem:
    return ConvProblem.of(op, x, w, b, **settings)


def definition(
    call: Call, x: Array, w: Array, b: Array | None
) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.int64]]:
    """Output (N, C_out, L_out) of real data in exact arithmetic, and how many products each element sums."""
    s, d, groups = (call.settings[name] for name in ("stride", "dilation", "groups"))
    left, right, extra = (call.resolved[name] for name in ("padding_left", "padding_right", "output_padding"))
    N, C_in, L_in = x.shape
    K = w.shape[2]
    C_in_g, C_out_g, C_out = C_in // groups, call.C_out // groups, call.C_out
    if call.op == "conv1d":
        L_out = (L_in + left + right - d * (K - 1) - 1) // s + 1
    else:
        L_out = (L_in - 1) * s - left - right + d * (K - 1) + extra + 1
    y = np.full((N, C_out, L_out), Fraction(0))
    if b is not None:
        y[...] = np.array([Fraction(float(value)) for value in b], dtype=object).reshape(C_out, 1)
    exact_x, exact_w = (np.vectorize(lambda v: Fraction(float(v)), otypes=[object])(a) for a in (x, w))
    products = np.zeros(y.shape, np.int64)
    if call.op == "conv1d":
        for n, c_out, l_out, c_in, k in np.ndindex(N, C_out, L_out, C_in_g, K):
            l_in = l_out * s - left + k * d
            if 0 <= l_in < L_in:
                c = c_out // C_out_g * C_in_g + c_in
                y[n, c_out, l_out] += exact_w[c_out, c_in, k] * exact_x[n, c, l_in]
                products[n, c_out, l_out] += 1
    else:
        for n, c, l_in, c_out_g, k in np.ndindex(N, C_in, L_in, C_out_g, K):
            l_out = l_in * s - left + k * d
            if 0 <= l_out < L_out:
                c_out = c // C_in_g * C_out_g + c_out_g
                y[n, c_out, l_out] += exact_w[c, c_out_g, k] * exact_x[n, c, l_in]
                products[n, c_out, l_out] += 1
    return y, products


def three_axes(x: Array) -> Array:
    return x if x.ndim == 3 else x[np.newaxis]


def exact_parts(call: Call, x: Array, w: Array, b: Array | None) -> list[npt.NDArray[np.object_]]:
    """The exact output: [real part], or [real part, imaginary part] of complex data."""
    if not np.iscomplexobj(x):
        return [definition(call, x, w, b)[0]]
    real_b, imag_b = (None, None) if b is None else (b.real, b.imag)
    real = definition(call, x.real, w.real, real_b)[0] - definition(call, x.imag, w.imag, None)[0]
    return [real, definition(call, x.real, w.imag, imag_b)[0] + definition(call, x.imag, w.real, None)[0]]


def as_fractions(y: Array) -> npt.NDArray[np.object_]:
    return np.vectorize(lambda v: Fraction(float(v)), otypes=[object])(y)


@pytest.mark.parametrize("op", OPS)
def test_equals_the_definition_exactly_on_dyadic_rationals(op: Op) -> None:
    @settings(max_examples=120)
    @given(call=calls(op, max_length=8, min_channels=0))
    def check(call: Call) -> None:
        x, w, b = call.arrays("eighths")
        assert x is not None
        assert w is not None
        problem = call.problem()
        y = reference.compute(problem, x, w, b)
        assert y.dtype == (np.complex128 if problem.is_complex else np.float64)
        assert y.shape == problem.output_shape
        parts = [y.real, y.imag] if problem.is_complex else [y]
        for part, exact in zip(parts, exact_parts(call, three_axes(x), w, b), strict=True):
            assert three_axes(part).shape == exact.shape
            assert (as_fractions(three_axes(part)) == exact).all() or exact.size == 0

    check()


@pytest.mark.parametrize("op", OPS)
def test_bound_is_the_documented_formula(op: Op) -> None:
    """Against the formula in exact arithmetic; the reference itself lies inside its own share of the bound."""

    @settings(max_examples=60)
    @given(call=calls(op, ("float16", "bfloat16", "float32", "float64"), max_length=8))
    def check(call: Call) -> None:
        x, w, b = call.arrays()
        assert x is not None
        assert w is not None
        problem = call.problem()
        exact, products = definition(call, three_axes(x), w, b)
        magnitude = definition(call, abs(three_axes(x)), abs(w), None if b is None else abs(b))[0]
        assert products.max() <= problem.terms

        u = Fraction(UNIT_ROUNDOFF["float64" if call.dtype == "float64" else "float32"])
        u_out, u_reference = Fraction(UNIT_ROUNDOFF[call.dtype]), Fraction(UNIT_ROUNDOFF["float64"])
        n = problem.terms
        roundings = n + (-(-n // 3) if call.dtype in ("float16", "bfloat16") else 0) + 2
        gamma = roundings * u / (1 - roundings * u)
        gamma_reference = (n + 2) * u_reference / (1 - (n + 2) * u_reference)
        error = abs(as_fractions(three_axes(reference.compute(problem, x, w, b))) - exact)
        assert (error <= gamma_reference * magnitude).all()

        formula = gamma * magnitude + u_out * abs(exact)
        bound = as_fractions(three_axes(reference.error_bound(problem, x, w, b)))
        underflow = Fraction(2) ** -25 if call.dtype == "float16" else Fraction(2) ** -100
        # In float64 the reference is as inexact as the result; the factors cover the evaluation of the bound.
        expected = formula + gamma_reference * magnitude
        assert (bound >= expected * (1 - Fraction(2) ** -40)).all()
        assert (bound <= expected * (1 + Fraction(2) ** -40) + underflow).all()

    check()


@pytest.mark.parametrize("op", OPS)
def test_bound_of_tf32_allows_for_rounded_operands(op: Op) -> None:
    p, x, w, b = long_problem("float32", op)
    n = p.terms
    roundings = n + -(-n // 3) + 2
    gamma = roundings * 2.0**-24 + (n + 2) * 2.0**-53
    expected = (gamma + 2.0**-10 + 2.0**-22) * reference.compute(p, abs(x), abs(w), abs(b))
    expected += 2.0**-24 * abs(reference.compute(p, x, w, b))
    bound = reference.error_bound(replace(p, precision="tf32"), x, w, b)
    np.testing.assert_allclose(bound, expected, rtol=4 * roundings * 2.0**-24)
    assert (bound > reference.error_bound(p, x, w, b)).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("dtype", "u"), [("complex64", 2.0**-24), ("complex128", 2.0**-53)])
def test_bound_of_complex_data_counts_two_products_a_term(dtype: str, u: float, op: Op) -> None:
    p, x, w, b = long_problem(dtype, op)
    n = 2 * p.terms
    gamma = sum((n + 2) * v / (1 - (n + 2) * v) for v in (u, 2.0**-53))
    magnitude = reference.compute(p, *(abs(a.astype(np.complex128)) for a in (x, w, b))).real
    expected = gamma * magnitude + u * abs(reference.compute(p, x, w, b))
    np.testing.assert_allclose(reference.error_bound(p, x, w, b), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("stride", "dilation", "K"), [*itertools.product((1, 2, 3, 4, 6), (1, 2, 3, 4), (1, 2, 3, 5, 8))]
)
def test_terms_of_the_transposed_operation_are_counted_per_phase(stride: int, dilation: int, K: int) -> None:
    problem = ConvProblem("conv_transpose1d", 1, 2, 1, 40, K, stride=stride, dilation=dilation, dtype="float64")
    counted = reference.compute(problem, np.ones(problem.input_shape), np.ones(problem.weight_shape))
    assert counted.max() == problem.terms


def test_bound_refuses_a_reduction_without_one() -> None:
    for C_in in (2**24 - 3, 2**24 - 2):
        p = ConvProblem("conv1d", 0, C_in, 0, 1, 1)
        x, w = np.zeros(p.input_shape, np.float32), np.zeros(p.weight_shape, np.float32)
        if C_in == 2**24 - 3:
            assert reference.error_bound(p, x, w).shape == p.output_shape
        else:
            with pytest.raises(ValueError, match="no error bound exists for 16777216 roundings"):
                reference.error_bound(p, x, w)


def signals(K: int, dtype: str = "float64") -> tuple[Array, Array]:
    rng = np.random.default_rng(K)
    return random_array(rng, (57,), dtype, "eighths"), random_array(rng, (K,), dtype, "eighths")


def run(op: Op, x: Array, w: Array, **settings: Any) -> Array:
    """The reference on one channel."""
    x3, w3 = x.reshape(1, 1, -1), w.reshape(1, 1, -1)
    return reference.compute(problem_of(op, x3, w3, **settings), x3, w3)[0, 0]


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("K", [1, 2, 3, 8, 57])
def test_special_cases_of_numpy_and_scipy(K: int, dtype: str) -> None:
    x, h = signals(K, dtype)
    full = np.convolve(x, h)
    np.testing.assert_array_equal(run("conv_transpose1d", x, h), full)
    np.testing.assert_array_equal(run("conv1d", x, h[::-1], padding=K - 1), full)
    np.testing.assert_array_equal(run("conv1d", x, h[::-1], padding="causal"), full[:57])
    np.testing.assert_array_equal(run("conv1d", x, h[::-1]), np.convolve(x, h, "valid"))
    if K % 2:  # NumPy leaves the odd sample of an even kernel on the other side
        np.testing.assert_array_equal(run("conv1d", x, h[::-1], padding="same"), np.convolve(x, h, "same"))
        np.testing.assert_array_equal(run("conv_transpose1d", x, h, padding="same"), np.convolve(x, h, "same"))
    for mode, padding in (("valid", 0), ("full", K - 1)):
        expected = scipy.signal.correlate(x, h.conj(), mode, method="direct")  # SciPy conjugates its second argument
        np.testing.assert_array_equal(run("conv1d", x, h, padding=padding), expected)


@pytest.mark.parametrize("step", [1, 2, 3, 5])
@pytest.mark.parametrize("K", [1, 2, 3, 8])
def test_stride_resamples_like_upfirdn(K: int, step: int) -> None:
    x, h = signals(K)
    np.testing.assert_array_equal(run("conv_transpose1d", x, h, stride=step), scipy.signal.upfirdn(h, x, up=step))
    decimated = scipy.signal.upfirdn(h, x, down=step)
    np.testing.assert_array_equal(run("conv1d", x, h[::-1], stride=step, padding=K - 1), decimated)


@pytest.mark.parametrize("op", OPS)
def test_dilation_spreads_the_taps(op: Op) -> None:
    x, h = signals(5)
    spread = np.zeros(13)
    spread[::3] = h
    np.testing.assert_array_equal(run(op, x, h, dilation=3), run(op, x, spread))


def test_channels_are_summed_as_in_a_two_dimensional_correlation() -> None:
    rng = np.random.default_rng(2)
    x, w = (random_array(rng, shape, "float64", "eighths") for shape in ((4, 31), (6, 4, 5)))
    y = reference.compute(problem_of("conv1d", x, w), x, w)
    expected = [scipy.signal.correlate(x, kernel, "valid", method="direct")[0] for kernel in w]
    np.testing.assert_array_equal(y, expected)


def test_input_dtype_and_byte_order_do_not_matter() -> None:
    x, h = signals(4)
    expected = run("conv1d", x, h)
    for dtype in ("<f4", ">f4", ">f8", ml_dtypes.bfloat16):
        x3, w3 = x.astype(dtype).reshape(1, 1, -1), h.astype(dtype).reshape(1, 1, -1)
        np.testing.assert_array_equal(reference.compute(problem_of("conv1d", x3, w3), x3, w3)[0, 0], expected)


class Terms(NamedTuple):
    """The products of every output element, from first to last: factors of shape (terms, N, C_out, L_out).

    Taps that do not exist have both factors zero.
    """

    w: Array
    x: Array
    bias: Array


def terms_of(p: ConvProblem, x: Array, w: Array, b: Array | None) -> Terms:
    """Gather in canonical order, c_in outer and k inner."""
    c_out, l_out = np.arange(p.C_out)[:, np.newaxis], np.arange(p.L_out)
    g = c_out // p.C_out_g
    factors_w, factors_x = [], []
    for c_in, k in itertools.product(range(p.C_in_g), range(p.K)):
        if p.transposed:
            l_in, phase = np.divmod(l_out + p.padding_left - k * p.dilation, p.stride)
            exists = (phase == 0) & (l_in >= 0) & (l_in < p.L_in)
            factor_w = w[g * p.C_in_g + c_in, c_out % p.C_out_g, k]
        else:
            l_in = l_out * p.stride - p.padding_left + k * p.dilation
            exists = (l_in >= 0) & (l_in < p.L_in)
            factor_w = w[c_out, c_in, k]
        taken = three_axes(x)[:, g * p.C_in_g + c_in, np.clip(l_in, 0, p.L_in - 1)]
        factors_x.append(np.where(exists, taken, np.zeros((), x.dtype)))
        factors_w.append(np.broadcast_to(np.where(exists, factor_w, np.zeros((), w.dtype)), taken.shape))
    bias = np.zeros(p.C_out, x.dtype) if b is None else b
    return Terms(np.stack(factors_w), np.stack(factors_x), np.broadcast_to(bias[:, np.newaxis], factors_x[0].shape))


def flush(values: Array) -> Array:
    """What hardware that has no float32 subnormals makes of a value."""
    return np.where(np.abs(values) < FLOAT32_NORMAL, values * 0, values)


def keep(values: Array) -> Array:
    return values


def sequential(terms: Terms, accumulator: Any, ftz: Callable[[Array], Array] = keep) -> Array:
    """Add acc = round(acc + round(w*x)), and the bias last."""
    w, x, bias = (ftz(a.astype(accumulator)) for a in terms)
    acc = np.zeros(bias.shape, accumulator)
    for factor_w, factor_x in zip(w, x, strict=True):
        acc = ftz(acc + ftz(factor_w * factor_x))
    return ftz(acc + bias)


def fused(terms: Terms, accumulator: Any, ftz: Callable[[Array], Array] = keep) -> Array:
    """Add acc = round(acc + w*x) with the sum in a wider type, and the bias last."""
    wide = np.longdouble if accumulator == np.float64 else np.float64
    w, x, bias = (ftz(a.astype(accumulator)) for a in terms)
    acc = np.zeros(bias.shape, accumulator)
    for factor_w, factor_x in zip(w, x, strict=True):
        acc = ftz((acc.astype(wide) + factor_w.astype(wide) * factor_x).astype(accumulator))
    return ftz(acc + bias)


def backwards(terms: Terms, accumulator: Any) -> Array:
    """The bias first, and the terms from last to first."""
    w, x, bias = (a.astype(accumulator) for a in terms)
    acc = bias
    for factor_w, factor_x in zip(w[::-1], x[::-1], strict=True):
        acc = acc + factor_w * factor_x
    return acc


def tree(terms: Terms, accumulator: Any) -> Array:
    """All products, then the sum by halves."""
    w, x, bias = (a.astype(accumulator) for a in terms)
    sums = [*(w * x), bias]
    while len(sums) > 1:
        sums = [sum(sums[i + 1 : i + 2], sums[i]) for i in range(0, len(sums), 2)]
    return sums[0]


ARITHMETICS = (sequential, fused, backwards, tree)


def accumulate(how: Callable[..., Array], terms: Terms, dtype: str, **options: Any) -> Array:
    """One arithmetic on real or complex terms, rounded once to the output dtype."""
    accumulator = np.float64 if dtype in ("float64", "complex128") else np.float32
    if not dtype.startswith("complex"):
        return how(terms, accumulator, **options).astype(numpy_dtype(dtype))

    def part(factors: Iterable[tuple[Array, Array]], bias: Array) -> Array:
        # Interleaved: the two products of a term follow each other, as in a complex multiply-add.
        w, x = (np.stack(side, axis=1).reshape(-1, *bias.shape) for side in zip(*factors, strict=True))
        return how(Terms(w, x, bias), accumulator, **options)

    w, x, bias = terms
    real = part([(w.real, x.real), (-w.imag, x.imag)], bias.real)
    imag = part([(w.real, x.imag), (w.imag, x.real)], bias.imag)
    return (real + 1j * imag).astype(numpy_dtype(dtype))


def right(p: ConvProblem, y: Array, x: Array, w: Array, b: Array | None = None) -> Array:
    return reference.within_bound(p, y.reshape(p.output_shape), x, w, b)


@pytest.mark.parametrize("how", ARITHMETICS)
@pytest.mark.parametrize("op", OPS)
def test_honest_arithmetic_is_within_the_bound(op: Op, how: Callable[..., Array]) -> None:
    @settings(max_examples=100)
    @given(call=calls(op))
    def check(call: Call) -> None:
        x, w, b = call.arrays()
        assert x is not None
        assert w is not None
        p = call.problem()
        assert right(p, accumulate(how, terms_of(p, x, w, b), call.dtype), x, w, b).all()

    check()


def long_problem(dtype: str, op: Op = "conv1d", K: int = 64) -> tuple[ConvProblem, Array, Array, Array]:
    """Sums of 4*K products with a bias."""
    rng = np.random.default_rng(5)
    shapes = ((2, 8, 150), (6, 4, K) if op == "conv1d" else (8, 3, K), (6,))
    x, w, b = (random_array(rng, shape, dtype) for shape in shapes)
    return problem_of(op, x, w, b, groups=2, padding=min(20, K - 1)), x, w, b


@pytest.mark.parametrize("how", ARITHMETICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_long_sums_are_within_the_bound(op: Op, dtype: str, how: Callable[..., Array]) -> None:
    p, x, w, b = long_problem(dtype, op)
    assert right(p, accumulate(how, terms_of(p, x, w, b), dtype), x, w, b).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounding_errors_of_one_sign_are_within_the_bound(dtype: str) -> None:
    """Nearly the worst that the bound allows: every addition loses just under half a unit in the last place."""
    K = 4000
    x = np.full((1, 1, K + 1), 2.0**-12).astype(numpy_dtype(dtype))
    w = np.full((1, 1, K), 2.0**-12).astype(numpy_dtype(dtype))
    b = np.ones(1, numpy_dtype(dtype))
    p = problem_of("conv1d", x, w, b)
    y = accumulate(backwards, terms_of(p, x, w, b), dtype)
    assert (y == 1).all()
    assert right(p, y, x, w, b).all()
    if dtype == "float32":
        error, bound = abs(y - reference.compute(p, x, w, b)), reference.error_bound(p, x, w, b)
        assert (error > 0.99 * bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
class TestPlantedErrors:
    """Errors are planted in long sums, where the bound is widest."""

    def test_missing_tap(self, op: Op, dtype: str) -> None:
        p, x, w, b = long_problem(dtype, op)
        terms = terms_of(p, x, w, b)
        present = terms.x[-1] != 0
        assert present.any()
        assert not present.all()
        terms.x[-1] = 0
        fine = right(p, accumulate(sequential, terms, dtype), x, w, b)
        assert fine[~present].all()
        # The smallest of the products are below the bound, which grows with the other 255.
        assert fine[present].mean() < {"float16": 0.05, "bfloat16": 0.2, "float32": 0.02, "complex64": 0.02}.get(
            dtype, 0.001
        )

    def test_swapped_channels(self, op: Op, dtype: str) -> None:
        p, x, w, b = long_problem(dtype, op)
        swapped = x[:, [1, 0, *range(2, 8)]]
        y = accumulate(sequential, terms_of(p, swapped, w, b), dtype)
        fine = right(p, y, x, w, b)
        assert fine[:, :3].mean() < 0.02
        assert fine[:, 3:].all()  # the other group

    def test_bias_of_another_channel(self, op: Op, dtype: str) -> None:
        p, x, w, b = long_problem(dtype, op)
        assert right(p, accumulate(sequential, terms_of(p, x, w, b[::-1]), dtype), x, w, b).mean() < 0.1

    def test_shifted_by_one_sample(self, op: Op, dtype: str) -> None:
        p, x, w, b = long_problem(dtype, op)
        y = accumulate(sequential, terms_of(p, x, w, b), dtype)
        assert right(p, np.roll(y, 1, axis=-1), x, w, b).mean() < 0.02

    def test_nan_and_infinity_in_place_of_a_number(self, op: Op, dtype: str) -> None:
        p, x, w, b = long_problem(dtype, op)
        y = accumulate(sequential, terms_of(p, x, w, b), dtype)
        for k, wrong in enumerate((np.nan, np.inf, -np.inf)):
            y[0, k, 3] = wrong
            y[1, k, -1] = wrong
        fine = right(p, y, x, w, b)
        np.testing.assert_array_equal(fine, np.isfinite(y.astype(np.complex128)))
        assert np.count_nonzero(~fine) == 6

    def test_one_wrong_element(self, op: Op, dtype: str) -> None:
        p, x, w, b = long_problem(dtype, op)
        y = accumulate(sequential, terms_of(p, x, w, b), dtype)
        bound = reference.error_bound(p, x, w, b)
        index = (1, 4, 77)
        y[index] += numpy_dtype(dtype).type(2.5 * bound[index])
        fine = right(p, y, x, w, b)
        assert not fine[index]
        assert np.count_nonzero(~fine) == 1


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_planted_error_conjugated_weight(op: Op, dtype: str) -> None:
    p, x, w, b = long_problem(dtype, op)
    assert right(p, accumulate(sequential, terms_of(p, x, w.conj(), b), dtype), x, w, b).mean() < 0.001


@pytest.mark.parametrize("op", OPS)
def test_planted_error_in_the_imaginary_part_alone(op: Op) -> None:
    p, x, w, b = long_problem("complex64", op)
    y = accumulate(sequential, terms_of(p, x, w, b), "complex64")
    y.imag[0, 2] += 4 * reference.error_bound(p, x, w, b)[0, 2].astype(np.float32)
    fine = right(p, y, x, w, b)
    assert not fine[0, 2].any()
    assert np.count_nonzero(~fine) == p.L_out


def test_overflow_in_one_part_of_complex_data_excuses_the_other() -> None:
    """As in BLAS, whose product by one makes the other part of an infinity NaN. Finite parts must be right."""
    x, w = np.array([[[1e20 + 1e19j, 1 + 2j]]], np.complex64), np.array([[[1e18 + 9e18j]]], np.complex64)
    p = problem_of("conv1d", x, w)
    fine = np.array([[[complex(1e37, np.inf), -1.7e19 + 1.1e19j]]], np.complex64)
    assert right(p, fine, x, w).all()
    for first in (complex(np.nan, np.inf), complex(np.nan, np.nan), complex(1e37, np.nan)):
        assert right(p, np.where(np.isinf(fine), np.complex64(first), fine), x, w).all()
    for second in (complex(np.nan, 1.1e19), complex(-1.7e19, np.inf)):
        assert right(p, np.where(np.isinf(fine), fine, np.complex64(second)), x, w).tolist() == [[[True, False]]]
    for first in (complex(2e37, np.inf), complex(np.nan, 1e37)):
        assert right(p, np.where(np.isinf(fine), np.complex64(first), fine), x, w).tolist() == [[[False, True]]]


def test_overflow_of_complex_data_on_the_cpu_is_within_the_bound() -> None:
    rng = np.random.default_rng(5)
    x, w = (random_array(rng, shape, "complex64") for shape in ((3, 2, 200), (2, 3, 4)))
    w *= np.float32(2.0**125)
    y = gpuconv.conv_transpose1d(x, w, stride=30)
    assert np.isnan(y.real[np.isinf(y.imag)]).any()
    assert right(problem_of("conv_transpose1d", x, w, stride=30), y, x, w).all()


def round_to_bits(values: Array, bits: int) -> Array:
    """float32 values rounded to `bits` bits of significand, the hidden one included: 11 is TF32, 8 is bfloat16."""
    drop = np.uint32(24 - bits)
    pattern = values.view(np.uint32)
    half_up = (np.uint32(1) << (drop - np.uint32(1))) - np.uint32(1) + ((pattern >> drop) & np.uint32(1))
    return (((pattern + half_up) >> drop) << drop).view(np.float32)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rounded", ["input", "weight", "both"])
@pytest.mark.parametrize(("K", "escape"), [(4, 0.05), (64, 0.7)])
def test_planted_error_operands_rounded_to_tf32(K: int, escape: float, rounded: str, op: Op) -> None:
    """Errors of random sign grow with the root of the number of terms, the bound with the number: some escape."""
    p, x, w, b = long_problem("float32", op, K)
    x_used = x if rounded == "weight" else round_to_bits(x, 11)
    w_used = w if rounded == "input" else round_to_bits(w, 11)
    assert abs(x_used - x).max() < 2.0**-11 * abs(x).max()
    y = accumulate(sequential, terms_of(p, x_used, w_used, b), "float32")
    assert right(p, y, x, w, b).mean() < escape


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_planted_error_accumulator_of_16_bits(op: Op, dtype: str) -> None:
    p, x, w, b = long_problem(dtype, op)
    x, w = abs(x), abs(w)
    y = sequential(terms_of(p, x, w, b), numpy_dtype(dtype))
    assert right(p, y, x, w, b).mean() < 0.3


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_planted_error_float32_anywhere_in_float64_work(op: Op, dtype: str) -> None:
    p, x, w, b = long_problem(dtype, op)
    narrow = np.complex64 if p.is_complex else np.float32
    y = accumulate(sequential, terms_of(p, x, w, b), dtype)
    assert right(p, y.astype(narrow).astype(dtype), x, w, b).mean() < 0.01
    for arrays in ((x.astype(narrow), w, b), (x, w.astype(narrow), b), (x, w, b.astype(narrow))):
        assert right(p, accumulate(sequential, terms_of(p, *arrays), dtype), x, w, b).mean() < 0.01


@pytest.mark.parametrize("terms", [1, 4, 64])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_planted_error_of_a_few_units_in_the_last_place(dtype: str, terms: int) -> None:
    """Data of one sign, so that the bound is a relative one: about (n + 3)*u, and in float64 (2*n + 5)*u."""
    rng = np.random.default_rng(terms)
    x, w = (rng.uniform(1, 2, shape).astype(dtype) for shape in ((1, 1, 200), (1, 1, terms)))
    p = problem_of("conv1d", x, w)
    y = accumulate(sequential, terms_of(p, x, w, None), dtype)
    assert right(p, y, x, w).all()
    units = 2 * terms + 6 if dtype == "float32" else 3 * terms + 8
    wrong = y * numpy_dtype(dtype).type(1 + units * UNIT_ROUNDOFF[dtype])
    assert not right(p, wrong, x, w).any()


def fed_by(call: Call, marked_x: Array, marked_w: Array) -> Array:
    """The output elements with a marked operand in a term, by the loop of the definition; three axes."""
    count_x = definition(call, three_axes(marked_x).astype(float), np.ones(marked_w.shape), None)[0]
    count_w = definition(call, np.ones(three_axes(marked_x).shape), marked_w.astype(float), None)[0]
    return np.asarray(count_x + count_w > 0, dtype=bool)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("op", OPS)
def test_specials_reach_exactly_the_elements_they_feed(op: Op, special: float) -> None:
    """Specials may also be in the weights: a tap in the padding has no effect even if it is infinite."""

    @settings(max_examples=40)
    @given(call=calls(op, max_length=8))
    def check(call: Call) -> None:
        x, w, b = call.arrays()
        assert x is not None
        assert w is not None
        rng = np.random.default_rng(call.seed)
        marked_x, marked_w = np.zeros(x.shape, bool), np.zeros(w.shape, bool)
        marked_x[tuple(rng.integers(x.shape))] = True
        marked_w[tuple(rng.integers(w.shape))] = call.seed % 2
        x[marked_x] = special
        w[marked_w] = special
        p = call.problem()
        exact = reference.compute(p, x, w, b)
        fed = fed_by(call, marked_x, marked_w).reshape(p.output_shape)
        np.testing.assert_array_equal(fed, ~np.isfinite(exact))

        # The right answer passes; one that misses them or spreads them does not.
        y = exact.astype(numpy_dtype(call.dtype))
        assert right(p, y, x, w, b).all()
        harmless = np.where(fed, y.dtype.type(1), y)
        np.testing.assert_array_equal(right(p, harmless, x, w, b), ~fed)
        nan_is_right = fed if p.is_complex else np.isnan(exact)
        np.testing.assert_array_equal(right(p, np.full_like(y, np.nan), x, w, b), nan_is_right)
        if np.isinf(special) and not p.is_complex:
            np.testing.assert_array_equal(right(p, np.full_like(y, -special), x, w, b), fed & (exact == -special))

    check()


def of_one_channel(dtype: str, x: Iterable[float], w: Iterable[float]) -> tuple[ConvProblem, Array, Array]:
    x3, w3 = (np.array([[list(values)]]).astype(numpy_dtype(dtype)) for values in (x, w))
    return problem_of("conv1d", x3, w3), x3, w3


VERDICTS = [
    # dtype, input (as long as the weight), weight, verdict on {result: passes}
    pytest.param("float16", [60000, 60000], [1, 1], {np.inf: True, 65504: False, -np.inf: False, np.nan: False}),
    pytest.param("float16", [-60000, 60000], [1, -1], {-np.inf: True, -65504: False, np.inf: False, np.nan: False}),
    pytest.param("float16", [65504, 16], [1, 1], {np.inf: True, 65504: True, -np.inf: False}, id="float16-tie"),
    pytest.param("float16", [65504, -64], [1, 1], {65440: True, np.inf: False}, id="float16-below"),
    pytest.param("float16", [60000, 60000, -60000], [1, 1, 1], {60000: True, np.inf: False}, id="float16-transient"),
    pytest.param("float32", [3e38, 3e38], [1, 1], {np.inf: True, 3.4e38: False, -np.inf: False, np.nan: False}),
    pytest.param("float32", [-3e38, -3e38], [1, 1], {-np.inf: True, np.inf: False, np.nan: False}),
    # The first two terms overflow the accumulator in one order and not in another.
    pytest.param(
        "float32",
        [3e38, 3e38, -3e38],
        [1, 1, 1],
        {3e38: True, np.inf: True, -np.inf: False, np.nan: False},
        id="float32-transient",
    ),
    pytest.param(
        "float32",
        [3e38, 3e38, -3e38, -3e38],
        [1, 1, 1, 1],
        {0: True, np.inf: True, -np.inf: True, np.nan: True, 1e38: False},
        id="float32-transient-both",
    ),
    pytest.param("float32", [1e30, 1], [1, 1], {1e30: True, np.inf: False, np.nan: False}),
    pytest.param("float32", [np.inf, 1], [1, 1], {np.inf: True, -np.inf: False, np.nan: False, 3e38: False}),
    pytest.param("float32", [np.inf, 1], [0, 1], {np.nan: True, np.inf: False, 1: False}),
    pytest.param("float32", [np.inf, np.inf], [1, -1], {np.nan: True, np.inf: False, -np.inf: False, 0: False}),
    # An infinity meets finite terms that may overflow to the other one.
    pytest.param("float32", [np.inf, 3e38, 3e38], [1, -1, -1], {np.inf: True, np.nan: True, 0: False}),
    # A flushed weight makes 0 * infinity; a plain zero always does.
    pytest.param("float32", [np.inf, 1], [1e-40, 1], {np.inf: True, np.nan: True, 1: False}, id="flushed-infinity"),
    pytest.param("float64", [1e308, 1e308], [1, 1], {np.inf: True}, id="float64-overflow"),
    pytest.param("float64", [1e308, 1e308, -1e308, -1e308], [1] * 4, {np.inf: True, 0: True, np.nan: True}),
    pytest.param("bfloat16", [3e38, 3e38], [1, 1], {np.inf: True, 3.3e38: False, np.nan: False}),
]


@pytest.mark.parametrize(("dtype", "x", "w", "verdicts"), VERDICTS)
def test_verdict_on_overflow_and_infinities(
    dtype: str, x: list[float], w: list[float], verdicts: dict[float, bool]
) -> None:
    p, x3, w3 = of_one_channel(dtype, x, w)
    for result, passes in verdicts.items():
        y = np.full(p.output_shape, result).astype(numpy_dtype(dtype))
        assert right(p, y, x3, w3).all() == passes, result


@pytest.mark.parametrize("how", [sequential, fused])
@pytest.mark.parametrize("ftz", [flush, keep])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("op", OPS)
def test_subnormals_may_be_flushed(
    op: Op, dtype: str, ftz: Callable[[Array], Array], how: Callable[..., Array]
) -> None:
    """Magnitudes from 1e-44 to 1e38, in input, weight and products."""
    p, x, w, b = long_problem(dtype, op)
    rng = np.random.default_rng(11)
    x, w, b = ((a * 10.0 ** rng.integers(-44, 18, a.shape)).astype(a.dtype) for a in (x, w, b))
    terms = terms_of(p, x, w, b)
    assert (flush(terms.x.real.astype(np.float32)) != terms.x.real).any()
    y = accumulate(how, terms, dtype, ftz=ftz)
    assert np.isfinite(y.astype(np.complex128)).all()
    assert right(p, y, x, w, b).all()


def test_flushing_is_excused_only_where_there_is_something_to_flush() -> None:
    """A large sample and a subnormal one do not widen the bound of the elements that neither feeds."""
    p, x, w = of_one_channel("float32", [1e38, *np.linspace(1, 2, 50), 1e-40], [1, 2, 3])
    y = accumulate(sequential, terms_of(p, x, w, None), "float32")
    assert right(p, y, x, w).all()
    y[..., 1:-1] *= np.float32(1 + 1e-5)
    np.testing.assert_array_equal(right(p, y, x, w)[0, 0], [True, *[False] * (p.L_out - 2), True])


@pytest.mark.parametrize("swap", [False, True])
def test_whole_product_may_be_flushed_with_its_operand(swap: bool) -> None:
    small, large = [1e-39, 1], [1e38, 0.25]
    p, x, w = of_one_channel("float32", *((large, small) if swap else (small, large)))
    for result, passes in ((0.25, True), (0.35, True), (0.1, False), (0.7, False)):
        assert right(p, np.full((1, 1, 1), result, np.float32), x, w).all() == passes, result


def test_what_is_left_of_a_sum_after_a_flush_is_rounded() -> None:
    """Without the product of the second operand, which is subnormal, the sum is larger than the exact one."""
    dtype = numpy_dtype("bfloat16")
    x, w = np.array([[[1.0, -(2.0**-127)]]]).astype(dtype), np.array([[[129 / 128, 2.0**127]]]).astype(dtype)
    problem = ConvProblem.conv1d(x, w, bias := np.array([1 / 256]).astype(dtype))
    left = np.float32(129 / 128 + 1 / 256).astype(dtype)  # halfway between two numbers
    assert reference.within_bound(problem, np.full((1, 1, 1), left), x, w, bias).all()


def test_products_of_normal_numbers_may_be_flushed() -> None:
    p, x, w = of_one_channel("float32", [1e-20, 2e-20], [1e-20, 1e-19])
    for result, passes in ((0, True), (2.1e-39, True), (1e-36, False)):
        assert right(p, np.full((1, 1, 1), result, np.float32), x, w).all() == passes, result


def test_float16_subnormals_are_not_flushed() -> None:
    """They are normal numbers of the float32 accumulator: only their last rounding is excused."""
    for x, w, verdicts in (
        ([2.0**-24, 2.0**-23], [1, 1], {3 * 2.0**-24: True, 2.0**-23: False, 2.0**-22: False, 0: False}),
        ([2.0**-12], [2.0**-13], {0: True, 2.0**-24: True, 2.0**-23: False}),
    ):
        p, x3, w3 = of_one_channel("float16", x, w)
        for result, passes in verdicts.items():
            assert right(p, np.full((1, 1, 1), result, np.float16), x3, w3).all() == passes, result


@pytest.mark.parametrize("op", OPS)
def test_empty_sum_is_the_bias(op: Op) -> None:
    b = np.array([1.0, -2.0])
    x, w = np.zeros((3, 0, 9)), np.zeros((2, 0, 4) if op == "conv1d" else (0, 2, 4))
    p = problem_of(op, x, w, b)
    y = reference.compute(p, x, w, b)
    np.testing.assert_array_equal(y, np.broadcast_to(b[:, np.newaxis], p.output_shape))
    assert right(p, y, x, w, b).all()
    assert not right(p, y + 1e-12, x, w, b).any()


@pytest.mark.parametrize("op", OPS)
def test_empty_output(op: Op) -> None:
    for x_shape, C_out in (((0, 3, 9), 2), ((4, 3, 9), 0)):
        x, w = np.zeros(x_shape), np.zeros((C_out, 3, 4) if op == "conv1d" else (3, C_out, 4))
        p = problem_of(op, x, w)
        y = reference.compute(p, x, w)
        assert y.shape == p.output_shape
        assert y.size == 0
        assert right(p, y, x, w).shape == p.output_shape


@pytest.mark.parametrize("op", OPS)
def test_arguments_are_not_changed(op: Op) -> None:
    p, x, w, b = long_problem("float64", op)
    x[0, 0, 0] = np.nan
    before = [a.copy() for a in (x, w, b)]
    reference.within_bound(p, reference.compute(p, x, w, b), x, w, b)
    for a, kept in zip((x, w, b), before, strict=True):
        np.testing.assert_array_equal(a, kept)
