"""The check of samples of different lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import cases, reference
from ..lengths import output_lengths
from ..problem import ArraySpec, ConvProblem, WeightGradientProblem, numpy_dtype
from ..report import Failure
from .subject import Subject, same_bits
from .target import Array


class _SampleAlone(NamedTuple):
    """A sample of a batch whose samples have different lengths.

    Attributes:
        problem: that of a call on the sample alone; None where it is too short to have an output.
    """

    n: int
    L_in: int
    L_out: int
    problem: ConvProblem | None


def check_lengths(s: Subject) -> Failure | None:
    """Samples of different lengths, filled up with NaN, must give what each gives alone."""
    samples = _samples_alone(s.problem, s.case.lengths, s.settings)
    p = cases.with_batch(s.problem, len(samples))
    data, u = cases.random_data(p, s.seed), cases.random_grad_output(p, s.seed)
    exact_x = cases.exact_data(p, s.seed, adjoint_too=True).input
    exact_u = cases.exact_grad_output(p, s.seed, exact_x)
    for alone in samples:
        for array, length in (
            (data.input, alone.L_in),
            (exact_x, alone.L_in),
            (u, alone.L_out),
            (exact_u, alone.L_out),
        ):
            array[alone.n, :, length:] = np.nan
    settings = {**s.settings, "lengths": s.case.lengths}
    output, expected = s.target.convolve(p, data, settings), np.zeros(p.output_shape, numpy_dtype(p.dtype))
    grad_input, expected_grad = s.target.gradient("input", p, (data.weight, u), settings), np.zeros_like(data.input)
    weight_sum: Array = np.zeros(p.weight_shape, np.complex128 if p.is_complex else np.float64)
    for n, L_in, L_out, problem in samples:
        if problem is None:
            continue
        x, v = data.input[n : n + 1, :, :L_in], u[n : n + 1, :, :L_out]
        sums = reference.convolution(problem, x, data.weight, data.bias).compare(output[n : n + 1, :, :L_out])
        grads = reference.input_gradient(problem, data.weight, v).compare(grad_input[n : n + 1, :, :L_in])
        for comparison in (sums, grads):
            message = f"sample {n}, or its gradient, must lie within the error bound of the sample alone"
            if (failure := s.judge_comparison(comparison, message, None, problem)) is not None:
                return failure
        expected[n, :, :L_out] = s.target.convolve(problem, data._replace(input=x), s.settings)[0]
        if L_in:
            expected_grad[n, :, :L_in] = s.target.gradient("input", problem, (data.weight, v), s.settings)[0]
        q, v = WeightGradientProblem.of(problem), exact_u[n : n + 1, :, :L_out]
        weight_sum += reference.weight_gradient(q, *q.sides(exact_x[n : n + 1, :, :L_in], v)).exact()
    for found, wanted, L, of in (
        (output, expected, [alone.L_out for alone in samples], "output"),
        (grad_input, expected_grad, [alone.L_in for alone in samples], "gradient with respect to input"),
    ):
        good = same_bits(found, wanted) if s.target.on_gpu else np.ones(found.shape, np.bool_)
        for n, length in enumerate(L):
            good[n, :, length:] = found[n, :, length:] == 0
        message = f"the {of} of each sample must be that of it alone, and zero behind it"
        if (failure := s.judge(good, found, wanted, message, None, p)) is not None:
            return failure
    found = s.target.gradient("weight", p, (exact_x, exact_u), settings)
    message = "the gradient with respect to weight must be the sum of those of the samples"
    return s.expect_equal(found, weight_sum.astype(found.dtype), message, None, p)


def _samples_alone(problem: ConvProblem, lengths: Sequence[int], settings: Mapping[str, Any]) -> list[_SampleAlone]:
    """The samples of a batch of these lengths; `settings` are those of the public function."""
    p, found = problem, []
    L_out = output_lengths(
        lengths, p.K, p.stride, settings.get("padding", 0), p.dilation, transposed=p.transposed,
        output_padding=settings.get("output_padding", 0),
    )  # fmt: skip
    weight = ArraySpec(p.weight_shape, p.dtype)
    bias = ArraySpec((p.C_out,), p.dtype) if p.has_bias else None
    for n, (L_in, length) in enumerate(zip(lengths, L_out.tolist(), strict=True)):
        alone = (
            ConvProblem.of(p.op, ArraySpec((1, p.C_in, L_in), p.dtype), weight, bias, **settings) if length else None
        )
        found.append(_SampleAlone(n, L_in, length, alone))
    return found
