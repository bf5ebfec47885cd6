"""Arrays of many layouts, and the bits of results: what the tests of all kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gpuconv.checks import same_bits
from gpuconv.problem import ConvProblem

Array = npt.NDArray[Any]


def assert_same_bits(output: Array, expected: Array, what: object) -> None:
    good = same_bits(output, expected)
    if not good.all():
        index = tuple(int(i) for i in np.argwhere(~good)[0])
        pytest.fail(f"{what}: {(~good).sum()} elements differ, first {index}: {output[index]} != {expected[index]}")


def scattered(array: Array) -> Array:
    """The array as every third element, last axis reversed, of a buffer of NaN."""
    buffer = np.full((*array.shape[:-1], 3 * array.shape[-1]), np.nan, array.dtype)
    buffer[..., ::-3] = array
    return buffer[..., ::-3]


def channels_last(array: Array) -> Array:
    return np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2)


def reversed_axes(array: Array) -> Array:
    return np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1]


def one_sample_repeated(array: Array) -> Array:
    """The first sample in place of every one, by a stride of zero."""
    return np.broadcast_to(array[:1], array.shape)


def unaligned(array: Array) -> Array:
    """The array one element behind the start of a buffer."""
    buffer = np.empty(array.size + 1, array.dtype)[1:].reshape(array.shape)
    buffer[...] = array
    return buffer


INPUT_LAYOUTS: tuple[Callable[[Array], Array], ...] = (scattered, channels_last, reversed_axes, one_sample_repeated)
OUTPUT_LAYOUTS = ("contiguous", "gaps", "channels last", "reversed")


def output_strides(problem: ConvProblem, name: str) -> tuple[int, int, int]:
    C, L = problem.C_out, problem.L_out
    return {
        "contiguous": (C * L, L, 1),
        "gaps": (C * (2 * L + 3) + 5, 2 * L + 3, 2),
        "channels last": (C * L, 1, C),
        "reversed": (-C * L, -L, -1),
    }[name]
