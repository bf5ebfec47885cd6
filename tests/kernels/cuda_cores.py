"""What the tests of the families on CUDA cores share: the bits of the base family, and arrays of every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuconv import cases
from gpuconv.cases import Data
from gpuconv.device import Device
from gpuconv.families import ArrayLayout, Family, Layout
from gpuconv.families.base import contiguous_strides
from gpuconv.problem import ConvProblem
from tests import hostcuda
from tests.kernels.arrays import (
    INPUT_LAYOUTS,
    OUTPUT_LAYOUTS,
    Array,
    assert_same_bits,
    channels_last,
    output_strides,
    scattered,
)
from tests.plans import BASE, H200, kernel_of


def assert_same_numbers(output: Array, expected: Array, what: object) -> None:
    """The same bits, except that a NaN may have any encoding."""
    nan = [np.isnan(y.view(y.real.dtype)) for y in (output, expected)]
    bits = [y.view(f"u{y.real.itemsize}") for y in (output, expected)]
    bad = (nan[0] != nan[1]) | (bits[0] != bits[1]) & ~nan[0]
    if bad.any():
        pytest.fail(f"{what}: {bad.sum()} numbers differ, the first at {np.argwhere(bad)[0]}")


def assert_bits_of_the_base(
    family: Family[Any],
    problem: ConvProblem,
    layout: Layout | None = None,
    *,
    device: Device = H200,
    kind: cases.RandomKind = "normal",
) -> None:
    """Random data, three orders of the threads, both sides of every array guarded."""
    data = cases.random_data(problem, 31, kind)
    output = hostcuda.compute(problem, *data, layout=layout, family=family.name, device=device, schedule="every")
    expected = hostcuda.compute(problem, *data, family=BASE[problem.op])
    assert_same_numbers(output, expected, (str(problem), layout, kind))


def check_layouts(family: Family[Any], problem: ConvProblem, device: Device = H200) -> None:
    """Strided, reversed, permuted, broadcast and packed arrays are read and written in place, with the same bits."""
    p, data = problem, cases.random_data(problem, 33)
    for arrange, name in zip(INPUT_LAYOUTS, OUTPUT_LAYOUTS, strict=True):
        bias = None if data.bias is None else scattered(data.bias)
        given = Data(arrange(data.input), channels_last(scattered(data.weight)), bias)
        layout = Layout.of(
            input=hostcuda.array_layout(given.input),
            weight=hostcuda.array_layout(given.weight),
            **({} if bias is None else {"bias": hostcuda.array_layout(bias)}),
            output=ArrayLayout(output_strides(p, name), p.itemsize),
        )
        output = hostcuda.compute(p, *given, layout=layout, family=family.name, device=device, schedule="every")
        plain = data._replace(input=np.ascontiguousarray(given.input))
        expected = hostcuda.compute(p, *plain, family=BASE[p.op])
        assert_same_bits(output, expected, (str(p), arrange.__name__, name))


def far_apart(problem: ConvProblem) -> Layout:
    """Samples of the input and of the output more than 2**31 elements apart."""
    p, far = problem, 2**31 + 7
    return Layout.contiguous(p).replaced(
        input=ArrayLayout((far, *contiguous_strides(p.input_shape)[1:]), p.itemsize),
        output=ArrayLayout((-far, *contiguous_strides(p.output_shape)[1:]), p.itemsize),
    )


def check_offsets_beyond_32_bits(family: Family[Any], problem: ConvProblem, device: Device = H200) -> None:
    layout = far_apart(problem)
    assert kernel_of(family, problem, layout, device)[1].index_bits == 64
    assert_bits_of_the_base(family, problem, layout, device=device)
