"""gpuconv.sigpy beside the definition, and in place of sigpy's own functions under its linear operators."""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.signal

from gpuconv import sigpy
from tests import NO_SIGPY

FLOATS = ("float16", "float32", "float64", "complex64", "complex128")
INTEGERS = ("int8", "uint8", "int32", "int64", "uint64")


def integers(rng: np.random.Generator, shape: Any, dtype: str) -> Any:
    """Small integers, of which every sum here is exact; sometimes strided."""
    kind = np.dtype(dtype).kind
    values = rng.integers(0 if kind == "u" else -3, 4, (2, *shape)).astype(dtype)
    array = values[0] + 1j * values[1] if kind == "c" else values[0]
    array = array.astype(dtype)
    if rng.random() < 0.3:
        array = np.asfortranarray(array)
    return np.flip(np.flip(array).copy()) if rng.random() < 0.3 else array


def draw(rng: np.random.Generator) -> tuple[Any, Any, dict[str, Any]]:
    """Data, filter and settings."""
    D, multi_channel, mode = int(rng.integers(1, 4)), bool(rng.integers(2)), str(rng.choice(("full", "valid")))
    m, n = rng.integers(1, (13, 9, 6)[D - 1], (2, D))
    if mode == "valid" and rng.random() < 0.8:
        m = m + n
    elif mode == "valid":
        m, n = np.minimum(m, n), np.maximum(m, n)
    c_o, c_i = (int(c) for c in rng.integers(1, 4, 2))
    batch = rng.integers(1, 4, rng.integers(0, 3))
    one, other = str(rng.choice(FLOATS)), str(rng.choice(FLOATS))
    if rng.random() < 0.25:
        one = other = str(rng.choice(INTEGERS))
    elif np.dtype(one).kind == "f":
        other = one
    data = integers(rng, (*batch, *([c_i] if multi_channel else []), *m), one)
    filt = integers(rng, (*([c_o, c_i] if multi_channel else []), *n), other)
    strides = None if rng.random() < 0.3 else tuple(int(s) for s in rng.integers(1, 4, D))
    return data, filt, {"mode": mode, "strides": strides, "multi_channel": multi_channel}


def widened(*arrays: Any) -> list[Any]:
    """In dtypes that hold every sum exactly, and that SciPy takes."""
    return [a.astype({"c": "complex128", "f": "float64"}.get(a.dtype.kind, "int64")) for a in arrays]


def sides(data_shape: Any, filt_shape: Any, mode: str, strides: Any, multi_channel: bool) -> tuple[Any, ...]:
    """The shapes (B, c_i, m), (c_o, c_i, n), (c_o, ...) of output, and where outputs lie in full convolutions."""
    D = len(filt_shape) - 2 * multi_channel
    m, n = data_shape[-D:], filt_shape[-D:]
    first = [0 if mode == "full" else min(a, b) - 1 for a, b in zip(m, n, strict=True)]
    at = tuple(slice(f, a + b - 1 - f, s) for f, a, b, s in zip(first, m, n, strides or (1,) * D, strict=True))
    c_o, c_i = filt_shape[:2] if multi_channel else (1, 1)
    return (-1, c_i, *m), (c_o, c_i, *n), at


def expected_convolution(data: Any, filt: Any, **settings: Any) -> Any:
    as_data, as_filt, at = sides(data.shape, filt.shape, **settings)
    x, w = widened(data.reshape(as_data), filt.reshape(as_filt))
    sums = [
        [sum(scipy.signal.convolve(a, b, method="direct")[at] for a, b in zip(item, taps, strict=True)) for taps in w]
        for item in x
    ]
    y = np.array(sums).astype(data.dtype)
    batch = data.shape[: data.ndim - len(at) - settings["multi_channel"]]
    return y.reshape(*batch, *y.shape[1 if settings["multi_channel"] else 2 :])


def expected_adjoints(output: Any, data: Any, filt: Any, **settings: Any) -> tuple[Any, Any]:
    """Those of data and filter: correlations with the output, put where it lies in the full convolution."""
    as_data, as_filt, at = sides(data.shape, filt.shape, **settings)
    x, w, y = widened(data.reshape(as_data), filt.reshape(as_filt), output)
    by_item = y.reshape(len(x), len(w), *output.shape[output.ndim - len(at) :])
    of_data, of_filt = np.zeros(x.shape, y.dtype), np.zeros(w.shape, y.dtype)
    for b, o, i in np.ndindex(len(x), *w.shape[:2]):
        full = np.zeros([m + n - 1 for m, n in zip(x.shape[2:], w.shape[2:], strict=True)], y.dtype)
        full[at] = by_item[b, o]
        of_data[b, i] += scipy.signal.correlate(full, w[o, i], "valid", "direct")
        of_filt[o, i] += scipy.signal.correlate(full, x[b, i], "valid", "direct")
    return of_data.astype(output.dtype).reshape(data.shape), of_filt.astype(output.dtype).reshape(filt.shape)


def assert_equal(found: Any, expected: Any) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(found, expected)


def test_random_problems_and_their_adjoints_are_exact() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        data, filt, settings = draw(rng)
        output = sigpy.convolve(data, filt, **settings)
        assert_equal(output, expected_convolution(data, filt, **settings))
        y = integers(rng, output.shape, output.dtype.name)
        of_data = sigpy.convolve_data_adjoint(y, filt, data.shape, **settings)
        of_filt = sigpy.convolve_filter_adjoint(y, data, filt.shape, **settings)
        for found, expected in zip((of_data, of_filt), expected_adjoints(y, data, filt, **settings), strict=True):
            assert_equal(found, expected)
        product = np.vdot(y.astype("complex128"), output)
        if data.dtype.kind in "fc":  # narrow integers wrap around
            assert np.vdot(of_data.astype("complex128"), data) == product
            assert filt.dtype.kind != data.dtype.kind or np.vdot(of_filt.astype("complex128"), filt) == product


if __name__ == "__main__":
    test_random_problems_and_their_adjoints_are_exact()
