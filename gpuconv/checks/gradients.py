"""Checks of the gradients: against the reference, as adjoints of the operation, and (with it) through the FFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .. import cases, reference
from ..cases import Data
from ..problem import BiasGradientProblem, WeightGradientProblem, numpy_dtype
from ..report import Failure
from .subject import Subject, number, same_bits
from .target import Argument, Array


def check_adjoint(s: Subject) -> Failure | None:
    p = replace(s.problem, has_bias=False)
    x, weight, _ = cases.exact_data(p, s.seed, adjoint_too=p.L_in > 0)
    y = s.target.convolve(p, Data(x, weight, None), s.settings)
    u = cases.exact_grad_output(p, s.seed, x)
    identities: list[tuple[Argument, Array, Array, Array]] = [("weight", u, weight, s.gradient("weight", x, u))]
    if p.L_in:
        u = cases.exact_data(p.adjoint(), s.seed, adjoint_too=True).input
        identities.append(("input", u, x, s.gradient("input", weight, u)))
    for argument, u, array, gradient in identities:
        left, right = _inner_product(y, u), _inner_product(array, gradient)
        if left != right:
            message = f"<A(input, weight), u> must equal <{argument}, its gradient>"
            return Failure(s.case.name, s.number_format, s.check, str(p), message, bad=1, got=left, expected=right)
    return None


def _inner_product(a: Array, b: Array) -> complex:
    """The inner product of arrays of small integers, exact in float64."""
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    return number(np.sum(a.astype(wide) * b.astype(wide).conj()))


def check_gradients(s: Subject) -> Failure | None:
    p, q = s.problem, WeightGradientProblem.of(s.problem)
    r = BiasGradientProblem.of(p)
    x, weight, _ = cases.exact_data(p, s.seed, adjoint_too=p.L_in > 0)
    sparse = cases.exact_grad_output(p, s.seed, x)
    u = cases.exact_data(p.adjoint(), s.seed, adjoint_too=True).input if p.L_in else sparse
    data, v = cases.random_data(p, s.seed), cases.random_grad_output(p, s.seed)
    on_integers: dict[Argument, tuple[Array, ...]] = {"input": (weight, u), "weight": (x, sparse), "bias": (sparse,)}
    normal: dict[Argument, tuple[Array, ...]] = {"input": (data.weight, v), "weight": (data.input, v), "bias": (v,)}
    expected: dict[Argument, Callable[..., reference.Sums]] = {
        "input": lambda *arrays: reference.input_gradient(p, *arrays),
        "weight": lambda *arrays: reference.weight_gradient(q, *q.sides(*arrays)),
        "bias": lambda *arrays: reference.bias_gradient(r, *arrays),
    }
    for argument, sums_of in expected.items():
        exact = sums_of(*on_integers[argument]).exact().astype(numpy_dtype(p.dtype))
        output = s.gradient(argument, *on_integers[argument])
        failure = s.expect_equal(
            output, exact, f"the gradient with respect to {argument} must equal the reference", None
        )
        if failure is not None:
            return failure
        output = s.gradient(argument, *normal[argument])
        message = f"the gradient with respect to {argument} must lie within the error bound of the reference"
        failure = s.judge_comparison(sums_of(*normal[argument]).compare(output), message, None, p)
        if failure is not None:
            return failure
        again = s.gradient(argument, *normal[argument])
        message = f"a second call must give the same bits of the gradient with respect to {argument}"
        failure = s.judge(same_bits(again, output), again, output, message, None, p)
        if failure is not None:
            return failure
    return None


def check_fft(s: Subject) -> Failure | None:
    p, q = s.problem, WeightGradientProblem.of(s.problem)
    data, u = cases.random_data(p, s.seed), cases.random_grad_output(p, s.seed)
    settings = {**s.settings, "algorithm": "fft"}
    found = {"output": (reference.convolution(p, *data, by_fft=True), s.target.convolve(p, data, settings))}
    if p.L_in:
        sums = reference.input_gradient(p, data.weight, u, by_fft=True)
        found["gradient with respect to input"] = sums, s.target.gradient("input", p, (data.weight, u), settings)
    sums = reference.weight_gradient(q, *q.sides(data.input, u), by_fft=True)
    found["gradient with respect to weight"] = sums, s.target.gradient("weight", p, (data.input, u), settings)
    for of, (sums, result) in found.items():
        message = f"the {of} through the FFT must lie within its error bound"
        if (failure := s.judge_comparison(sums.compare(result), message, None, p)) is not None:
            return failure
    return None
