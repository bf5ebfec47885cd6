"""The checks of the operations themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from .. import cases, reference
from ..cases import Data
from ..problem import INTEGERS, numpy_dtype
from ..report import Failure
from .subject import Subject, exact_result, same_bits
from .target import Array, Target


def check_exact(s: Subject) -> Failure | None:
    data = cases.exact_data(s.problem, s.seed)
    return s.expect_equal(s.run(data), exact_result(s.problem, data), "must equal the reference", data)


def check_integers(s: Subject) -> Failure | None:
    p = s.problem if s.problem.dtype in INTEGERS else cases.in_integers(s.problem, s.number_format)
    data = cases.integer_data(p, s.seed)
    return s.expect_equal(s.run(data, p), reference.compute(p, *data), "integers must equal the reference", data, p)


def check_fused(s: Subject) -> Failure | None:
    return check_fusion(s, s.settings, "what is fused must lie within the error bound of the reference")[1]


def check_fusion(s: Subject, settings: dict[str, Any], message: str) -> tuple[Array, Failure | None]:
    """Fuse something with the case, on plain arrays and on arrays with gaps; the result and the failure, if any."""
    p, fused = cases.with_fusion(s.problem, s.seed, s.case.fusion)
    data = cases.random_data(s.problem, s.seed)
    sums = reference.convolution(p, *data, fused)
    output = np.empty(p.output_shape, numpy_dtype(p.dtype))
    for arrange in (Target.put, every_other):
        arrays = [None if array is None else arrange(s.target, array) for array in data]
        more = cases.fusion_settings(p, {name: arrange(s.target, array) for name, array in fused.items()})
        out = arrange(s.target, np.full_like(output, np.nan))
        s.target.convolve_into(out, s.problem, *arrays, settings={**settings, **more})
        output = s.target.get(out)
        failure = s.judge_comparison(sums.compare(output), message, data, p)
        if failure is not None:
            return output, failure
    return output, None


def check_layout(s: Subject) -> Failure | None:
    return check_strided_arrays(s, s.settings, "must equal the reference, on strided arrays")


def check_strided_arrays(s: Subject, settings: dict[str, Any], message: str) -> Failure | None:
    """Run the case on arrays with gaps, reversed arrays and arrays with swapped axes, none of which is contiguous."""
    p = s.problem
    data = cases.exact_data(p, s.seed)
    out = every_other(s.target, np.full(p.output_shape, np.nan, numpy_dtype(p.dtype)))
    weight = swapped_axes(s.target, data.weight)
    bias = None if data.bias is None else every_other(s.target, data.bias)
    for arrange in (every_other, swapped_axes):
        out.fill(np.nan)
        s.target.convolve_into(out, p, arrange(s.target, data.input), weight, bias, settings=settings)
        failure = s.expect_equal(s.target.get(out), exact_result(p, data), message, data)
        if failure is not None:
            return failure
    return None


def check_random(kind: cases.RandomKind) -> Callable[[Subject], Failure | None]:
    def check(s: Subject) -> Failure | None:
        data = cases.random_data(s.problem, s.seed, kind)
        return s.expect_bound(s.run(data), "must lie within the error bound of the reference", data)

    return check


def check_impulse(s: Subject) -> Failure | None:
    data = cases.impulse_data(s.problem, s.seed)
    output, expected = s.run(data), exact_result(s.problem, data)
    # Compared by value: the sign of a zero depends on weights that are multiplied by the zeros of the input.
    return s.judge(output == expected, output, expected, "an impulse must give the weights", data, s.problem)


def check_groups(s: Subject) -> Failure | None:
    p = s.problem
    data = cases.exact_data(p, s.seed)
    output = s.run(data)
    expected = np.full_like(output, np.nan)
    chosen = sorted({0, p.groups // 2, p.groups - 1})
    for g in chosen:
        alone, channels_in, channels_out = cases.one_group(p, g)
        part = Data(
            data.input[..., channels_in, :],
            data.weight[channels_in if p.transposed else channels_out],
            None if data.bias is None else data.bias[channels_out],
        )
        expected[..., channels_out, :] = s.run(part, alone)
    compared = np.isin(np.arange(p.C_out) // p.C_out_g, chosen)[:, np.newaxis]
    good = s.equal(output, expected) | ~compared
    return s.judge(good, output, expected, "must equal the convolution of its group alone", data, p)


def check_bias(s: Subject) -> Failure | None:
    p = replace(s.problem, has_bias=True)
    data = cases.exact_data(p, s.seed)
    assert data.bias is not None
    wide = np.complex128 if p.is_complex else np.float64
    without = s.run(data._replace(bias=None), replace(p, has_bias=False)).astype(wide)
    expected = (without + data.bias.astype(wide)[:, np.newaxis]).astype(data.bias.dtype)
    return s.expect_equal(s.run(data, p), expected, "must equal the result without bias, plus the bias", data, p)


def check_batch(s: Subject) -> Failure | None:
    p = cases.with_batch(s.problem, 5)
    data = cases.random_data(p, s.seed)
    whole = s.run(data, p)
    output = whole.copy()
    for n in (0, p.N - 1):
        output[n] = s.run(data._replace(input=data.input[n : n + 1]), cases.with_batch(p, 1))[0]
    return s.expect_invariance(output, whole, "each sample alone must give what it gives in the batch", data, p)


def check_chunks(s: Subject) -> Failure | None:
    p = s.problem
    data = cases.random_data(p, s.seed)
    inner, whole = cases.inner_outputs(p), s.run(data)
    output = whole.copy()
    for start, stop in chunk_bounds(len(inner)):
        piece, positions = cases.chunk(p, inner[start], inner[stop - 1] + 1)
        part = s.run(data._replace(input=data.input[..., positions]), piece)
        output[..., inner[start] : inner[stop - 1] + 1] = part
    message = "the input in chunks must give what the whole gives"
    return s.expect_invariance(output, whole, message, data, p)


def check_repeat(s: Subject) -> Failure | None:
    p = s.problem
    data = cases.random_data(p, s.seed)
    arrays = [None if array is None else s.target.put(array) for array in data]
    fresh = s.target.convolve_into(None, p, *arrays, settings=s.settings)
    output, expected = s.target.get(fresh), s.run(data)
    good = same_bits(output, expected) & np.isfinite(output)
    return s.judge(good, output, expected, "a second call must give the same bits", data, p)


def chunk_bounds(L_out: int) -> Iterable[tuple[int, int]]:
    """Three uneven pieces of ``0 <= l_out < L_out``, for L_out >= 3."""
    first, second = L_out // 3, min(2 * L_out // 3 + L_out % 2, L_out - 1)
    return ((0, first), (first, second), (second, L_out))


def every_other(target: Target, array: Array) -> Any:
    """The array as every second element of a buffer of NaN, with the last axis reversed."""
    buffer = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)
    buffer[..., ::-2] = array
    return target.put(buffer)[..., ::-2]


def swapped_axes(target: Target, array: Array) -> Any:
    """The array with its last two axes swapped in memory."""
    return target.put(np.ascontiguousarray(array.swapaxes(-1, -2))).swapaxes(-1, -2)
