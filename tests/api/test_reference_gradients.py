"""The definitions of the gradients against plain loops over all products, and their bounds against the formula."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from gpuconv import reference
from gpuconv.problem import BiasGradientProblem, ConvProblem, Op, WeightGradientProblem
from tests.strategies import Call, calls, random_array

Array = npt.NDArray[Any]
OPS: tuple[Op, ...] = ("conv1d", "conv_transpose1d")
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53, "complex64": 2.0**-24, "complex128": 2.0**-53}


def gamma(m: int, u: float) -> float:
    return m * u / (1 - m * u)


def products(call: Call, L_in: int, L_out: int) -> Iterator[tuple[int, int, int, int, tuple[int, int, int]]]:
    """Every product of a sample, whatever is summed: c_in, l_in, c_out, l_out and the place of the weight."""
    s, d, groups = (call.settings[name] for name in ("stride", "dilation", "groups"))
    left, K = call.resolved["padding_left"], call.weight_shape[2]
    C_in_g, C_out_g = call.input_shape[-2] // groups, call.C_out // groups
    for g, i, o, k in np.ndindex(groups, C_in_g, C_out_g, K):
        c_in, c_out = g * C_in_g + i, g * C_out_g + o
        for coarse in range(L_out if call.op == "conv1d" else L_in):
            fine = coarse * s - left + k * d
            l_in, l_out = (fine, coarse) if call.op == "conv1d" else (coarse, fine)
            if 0 <= l_in < L_in and 0 <= l_out < L_out:
                yield c_in, l_in, c_out, l_out, (c_out, i, k) if call.op == "conv1d" else (c_in, o, k)


def sums(p: ConvProblem, x: Array, w: Array, u: Array) -> dict[str, reference.Sums]:
    q = WeightGradientProblem.of(p)
    return {
        "input": reference.input_gradient(p, w, u),
        "weight": reference.weight_gradient(q, *q.sides(x, u)),
        "bias": reference.bias_gradient(BiasGradientProblem.of(p), u),
    }


@pytest.mark.parametrize("op", OPS)
def test_equal_the_definitions_exactly_on_dyadic_rationals(op: Op) -> None:
    @settings(max_examples=60)
    @given(call=calls(op, max_length=6, min_channels=0))
    def check(call: Call) -> None:
        p = call.problem()
        x, w, _ = call.arrays("eighths")
        assert x is not None
        assert w is not None
        u = random_array(np.random.default_rng(call.seed + 1), p.output_shape, p.dtype, "eighths")
        found = sums(p, x, w, u)
        wide = np.complex128 if p.is_complex else np.float64
        x3, u3 = (a.astype(wide).reshape(p.N, *a.shape[-2:]) for a in (x, u))
        exact = {"input": np.zeros(x3.shape, wide), "weight": np.zeros(w.shape, wide), "bias": u3.sum(axis=(0, 2))}
        counts = {"input": np.zeros(x3.shape, int), "weight": np.zeros(w.shape, int)}
        w = w.astype(wide)
        for c_in, l_in, c_out, l_out, at in products(call, p.L_in, p.L_out):
            exact["input"][:, c_in, l_in] += w[at].conj() * u3[:, c_out, l_out]
            exact["weight"][at] += np.vdot(x3[:, c_in, l_in], u3[:, c_out, l_out])
            counts["input"][:, c_in, l_in] += 1
            counts["weight"][at] += p.N
        for argument, result in found.items():
            y = result.exact()
            assert y.dtype == wide
            assert y.shape == {"input": p.input_shape, "weight": p.weight_shape, "bias": (p.C_out,)}[argument]
            np.testing.assert_array_equal(y.reshape(exact[argument].shape), exact[argument])
            if argument in counts:
                assert counts[argument].max(initial=0) <= result.terms
        assert found["bias"].terms == p.N * p.L_out

    check()


LAYERS = {
    "conv1d": ConvProblem("conv1d", 3, 8, 6, 40, 5, 2, 3, 1, 1, 2),
    "conv_transpose1d": ConvProblem("conv_transpose1d", 3, 8, 6, 40, 5, 2, 1, 0, 1, 2),
}


def data(p: ConvProblem, dtype: str) -> tuple[ConvProblem, Array, Array, Array]:
    p = ConvProblem(
        p.op, p.N, p.C_in, p.C_out, p.L_in, p.K, p.stride, p.padding_left, p.padding_right, p.dilation, p.groups,
        dtype=dtype,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    x, w, u = (random_array(rng, shape, dtype) for shape in (p.input_shape, p.weight_shape, p.output_shape))
    return p, x, w, u


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
def test_the_bounds_are_the_documented_formula(op: str, dtype: str) -> None:
    p, x, w, u = data(LAYERS[op], dtype)
    # An input feeds C_out_g = 3 channels: at ceil(K/stride) = 3 positions in conv1d, at K = 5 in conv_transpose1d.
    terms = {
        "input": 3 * 3 if op == "conv1d" else 3 * 5,
        "weight": 3 * (20 if op == "conv1d" else 40),
        "bias": 3 * p.L_out,
    }
    magnitudes = sums(*(data(LAYERS[op], "float64")[0], *(abs(a.astype(complex)) for a in (x, w, u))))
    for argument, result in sums(p, x, w, u).items():
        assert result.terms == terms[argument]
        # A term of complex data is two products in each part, but a term of a bias's gradient is one element.
        n = terms[argument] * (2 if p.is_complex and argument != "bias" else 1)
        roundoff = UNIT_ROUNDOFF[dtype]
        magnitude = magnitudes[argument].exact()
        expected = (gamma(n + 2, roundoff) + gamma(n + 2, 2.0**-53)) * magnitude + roundoff * abs(result.exact())
        np.testing.assert_allclose(result.error_bound(), expected, rtol=1e-12)
        np.testing.assert_allclose(result.error_bound(result.exact()), expected, rtol=1e-12)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", *UNIT_ROUNDOFF])
def test_honest_results_pass_and_planted_errors_do_not(op: str, dtype: str) -> None:
    p, x, w, u = data(LAYERS[op], dtype)
    for argument, result in sums(p, x, w, u).items():
        honest = result.exact().astype(x.dtype)
        assert result.within_bound(honest).all(), argument
        for value in (np.nan, np.inf):
            planted = honest.copy()
            planted.flat[3] = value
            good = result.within_bound(planted)
            assert not good.flat[3]
            assert good.sum() == good.size - 1
        off = result.exact() + 3 * result.error_bound()
        assert not result.within_bound(off.astype(x.dtype)).any(), argument
        if p.is_complex and argument != "bias":
            assert not result.within_bound(sums(p, x.conj(), w.conj(), u)[argument].exact().astype(x.dtype)).any()


@pytest.mark.parametrize("op", OPS)
def test_non_finite_values_belong_where_they_are_a_term(op: str) -> None:
    p, x, w, u = data(LAYERS[op], "float32")
    x[0, 0, 0], w[0, 0, 0], u[1, 5, 3] = np.inf, np.nan, -np.inf
    for argument, result in sums(p, x, w, u).items():
        honest = result.exact().astype(x.dtype)
        spoilt = ~np.isfinite(honest)
        assert 0 < spoilt.sum() < spoilt.size, argument
        assert result.within_bound(honest).all()
        assert not result.within_bound(np.where(spoilt, 0, honest))[spoilt].any()


def test_no_bound_exists_for_the_longest_sums() -> None:
    for length in (2**24 - 3, 2**24 - 2):
        p = BiasGradientProblem(1, 0, length)
        result = reference.bias_gradient(p, np.zeros(p.grad_output_shape, np.float32))
        if length == 2**24 - 3:
            assert result.error_bound().shape == (0,)
        else:
            with pytest.raises(ValueError, match="no error bound exists for 16777216 roundings"):
                result.error_bound()
