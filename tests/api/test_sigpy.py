"""gpuconv.sigpy beside the definition, and in place of sigpy's own functions under its linear operators."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.signal

from gpuconv import functional, sigpy
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
    strides = None if rng.random() < 0.3 else rng.integers(1, 4, D)
    return data, filt, {"mode": mode, "strides": strides, "multi_channel": multi_channel}


def widened(*arrays: Any) -> list[Any]:
    """Convert arrays to dtypes that hold every sum exactly, and that SciPy takes."""
    return [a.astype({"c": "complex128", "f": "float64"}.get(a.dtype.kind, "int64")) for a in arrays]


def sides(data_shape: Any, filt_shape: Any, mode: str, strides: Any, multi_channel: bool) -> tuple[Any, ...]:
    """The shapes (B, c_i, m), (c_o, c_i, n), (c_o, ...) of output, and where outputs lie in full convolutions."""
    D = len(filt_shape) - 2 * multi_channel
    m, n = data_shape[-D:], filt_shape[-D:]
    first = [0 if mode == "full" else min(a, b) - 1 for a, b in zip(m, n, strict=True)]
    at = tuple(
        slice(f, a + b - 1 - f, s)
        for f, a, b, s in zip(first, m, n, (1,) * D if strides is None else strides, strict=True)
    )
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
    """The adjoints of data and filter: correlations with the output, placed where it lies in the full convolution."""
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


def test_neighbours_do_not_reach_each_other() -> None:
    """NaN and infinities stay in their item, although windows of several items lie in one array."""
    rng = np.random.default_rng(1)
    for _ in range(60):
        data, filt, settings = draw(rng)
        data, filt = data.astype("complex128"), filt.astype("complex128")
        three = np.stack([data, np.full_like(data, np.nan), data])
        output = sigpy.convolve(three, filt, **settings)
        np.testing.assert_array_equal(output[::2], sigpy.convolve(three[::2], filt, **settings))
        of_data = sigpy.convolve_data_adjoint(output, filt, three.shape, **settings)
        expected = sigpy.convolve_data_adjoint(output[::2], filt, three[::2].shape, **settings)
        np.testing.assert_array_equal(of_data[::2], expected)


@pytest.mark.parametrize(
    ("shape", "filt", "copied"),
    [((2, 9), (3,), 0), ((2, 6, 9), (3, 4), (2 * 8 + 2) * 9), ((2, 5, 6, 9), (2, 3, 4), (2 * 6 * 8 + 8 + 2) * 9)],
)
def test_windows_are_views_of_the_data_or_of_one_padded_copy(
    shape: tuple[int, ...], filt: tuple[int, ...], copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The padded copy has n - 1 rows of zeros for each item, and once more at the end."""
    calls = []

    def conv1d(windows: Any, *rest: Any, **settings: Any) -> Any:
        calls.append(windows)
        return functional.conv1d(windows, *rest, **settings)

    monkeypatch.setattr(sigpy, "conv1d", conv1d)
    data = np.ones(shape)
    output = sigpy.convolve(data, np.ones(filt), "valid")
    assert output.min() == output.max() == np.prod(filt)
    assert all(np.may_share_memory(windows, data) for windows in calls)
    assert len(calls) == (filt[0] if len(filt) == 3 else 1)
    calls.clear()
    sigpy.convolve(data, np.ones(filt))
    whole = [_owner(windows) for windows in calls]
    assert all(array is whole[0] for array in whole)
    assert whole[0] is data if copied == 0 else whole[0].size == copied


def _owner(array: Any) -> Any:
    """The array whose memory a view shows."""
    while getattr(array, "base", None) is not None:
        array = array.base
    return array


def test_empty_batches_and_channels() -> None:
    assert sigpy.convolve(np.ones((0, 5)), np.ones(3)).shape == (0, 7)
    assert sigpy.convolve(np.ones((2, 0, 5)), np.ones((3, 0, 2)), multi_channel=True).tolist() == [[[0] * 6] * 3] * 2
    assert sigpy.convolve(np.ones((2, 1, 5)), np.ones((0, 1, 2)), multi_channel=True).shape == (2, 0, 6)
    assert sigpy.convolve_data_adjoint(np.ones((0, 7)), np.ones(3), (0, 5)).shape == (0, 5)
    assert sigpy.convolve_filter_adjoint(np.ones((0, 7)), np.ones((0, 5)), (3,)).tolist() == [0, 0, 0]


def test_results_have_native_byte_order() -> None:
    x, filt = np.arange(6.0, dtype=">f8"), np.ones(2, ">f8")
    y = sigpy.convolve(x, filt)
    adjoints = sigpy.convolve_data_adjoint(y, filt, (6,)), sigpy.convolve_filter_adjoint(y.astype(">f8"), x, (2,))
    assert {array.dtype.str for array in (y, *adjoints)} == {np.dtype("float64").str}


def test_overflow_gives_no_warning() -> None:
    x, filt = np.full((4, 6), 1e308), np.ones((2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = sigpy.convolve(x, filt, strides=(2, 1))
        assert np.isinf(y).any()
        assert np.isinf(sigpy.convolve_data_adjoint(y, filt, x.shape, strides=(2, 1))).any()


BAD_FOR_BOTH: list[tuple[Any, Any, dict[str, Any], str]] = [
    ((4, 2, 5), (3, 3, 5), {"multi_channel": True}, "Data channel mismatch, got 2 from data and 3 from filt."),
    ((5, 5), (2, 2), {"strides": (1,)}, "Strides must have length 2."),
    ((5, 5), (2, 2), {"mode": "same"}, "Invalid mode, got same"),
    (
        (5, 2),
        (2, 5),
        {"mode": "valid"},
        "In valid mode, either data or filter must be at least as large as the other in every axis.",
    ),
]
BAD: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda x: sigpy.convolve(x, x[None, None, None]), ValueError, "convolve: 1, 2 or 3 axes can be convolved, got 4"),
    (lambda x: sigpy.convolve(x, x, multi_channel=True), ValueError, "1, 2 or 3 axes can be convolved, got -1"),
    (lambda x: sigpy.convolve(x, x[None]), ValueError, "convolve: data must have 2 axes or more, got the shape (5,)"),
    (lambda x: sigpy.convolve(x, x[:0]), ValueError, "extents and strides must be 1 or more"),
    (lambda x: sigpy.convolve(x, x, strides=(0,)), ValueError, "convolve: extents and strides must be 1 or more"),
    (lambda x: sigpy.convolve(x, [1.0]), TypeError, "convolve: filt must be a NumPy or CuPy array, got list"),
    (lambda x: sigpy.convolve(x, 1j * x), TypeError, "results of float64 and complex128 cannot be cast to float64"),
    (lambda x: sigpy.convolve(x.astype("longdouble"), x), TypeError, "is not supported"),
    (
        lambda x: sigpy.convolve_data_adjoint(x, x, (5,)),
        ValueError,
        "convolve_data_adjoint: output must have the shape (9,)",
    ),
    (
        lambda x: sigpy.convolve_data_adjoint(x, x, (5.0,)),
        TypeError,
        "each of data_shape must be an int, got float 5.0",
    ),
    (lambda x: sigpy.convolve(x, x, strides=(1.5,)), TypeError, "convolve: each of strides must be an int, got float"),
    (lambda x: sigpy.convolve_filter_adjoint(x, x, (5,)), ValueError, "convolve_filter_adjoint: output must have"),
]


@pytest.mark.parametrize(("call", "kind", "says"), BAD)
def test_bad_arguments(call: Callable[[Any], Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=re.escape(says)):
        call(np.ones(5))


@pytest.mark.parametrize(("shape", "filt_shape", "settings", "says"), BAD_FOR_BOTH)
def test_bad_arguments_that_sigpy_refuses_in_the_same_words(
    shape: Any, filt_shape: Any, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=f"^convolve: {re.escape(says)}$"):
        sigpy.convolve(np.ones(shape), np.ones(filt_shape), **settings)


def test_sigpys_linear_operators_run_on_these(monkeypatch: pytest.MonkeyPatch) -> None:
    """They give the same as with sigpy's own functions. sigpy needs Numba, which is large, so no extra installs it."""
    theirs = pytest.importorskip("sigpy", reason=NO_SIGPY)
    rng = np.random.default_rng(2)
    used = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            used.append(function)
            return function(*arguments, **settings)

        return call

    for _ in range(100):
        data, filt, settings = draw(rng)
        # sigpy fails on a larger filter in "valid", and SciPy on float16.
        D = filt.ndim - 2 * settings["multi_channel"]
        is_larger = settings["mode"] == "valid" and any(np.less(data.shape[-D:], filt.shape[-D:]))
        if is_larger or data.dtype.kind not in "fc" or "float16" in (data.dtype, filt.dtype):
            continue
        for operator, x in (
            (theirs.linop.ConvolveData(data.shape, filt, **settings), data),
            (theirs.linop.ConvolveFilter(filt.shape, data, **settings), filt),
        ):
            y = integers(rng, operator.oshape, data.dtype.name)
            expected = operator(x), operator.H(y), operator.N(x)
            with monkeypatch.context() as patch:
                for name in sigpy.__all__:
                    patch.setattr(theirs.conv, name, counted(getattr(sigpy, name)))
                found = operator(x), operator.H(y), operator.N(x)
            for ours, his in zip(found, expected, strict=True):
                assert (ours.shape, ours.dtype) == (his.shape, his.dtype)
                np.testing.assert_allclose(ours, his, rtol=1e-5, atol=1e-3)
    assert len(used) > 300
    for shape, filt_shape, settings, says in BAD_FOR_BOTH:
        with pytest.raises(ValueError, match=re.escape(says)):
            theirs.convolve(np.ones(shape), np.ones(filt_shape), **settings)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives(cupy: Any) -> None:
    rng = np.random.default_rng(3)
    for shape, filt_shape, dtype, settings in (
        ((2, 2, 9, 11), (3, 2, 4, 3), "complex64", {"strides": (2, 3), "multi_channel": True}),
        ((2, 4, 5, 6), (2, 3, 3), "float32", {"mode": "valid"}),
        ((2, 4, 5, 6), (2, 3, 3), "int32", {}),
    ):
        data, filt = integers(rng, shape, dtype), integers(rng, filt_shape, dtype)
        output = sigpy.convolve(data, filt, **settings)
        y = integers(rng, output.shape, dtype)
        expected = (
            output,
            sigpy.convolve_data_adjoint(y, filt, shape, **settings),
            sigpy.convolve_filter_adjoint(y, data, filt_shape, **settings),
        )
        data, filt, y = map(cupy.asarray, (data, filt, y))
        found = (
            sigpy.convolve(data, filt, **settings),
            sigpy.convolve_data_adjoint(y, filt, shape, **settings),
            sigpy.convolve_filter_adjoint(y, data, filt_shape, **settings),
        )
        for on_gpu, on_cpu in zip(found, expected, strict=True):
            assert isinstance(on_gpu, cupy.ndarray)
            assert_equal(on_gpu.get(), on_cpu)


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
def test_arrays_of_another_gpu_stay_there(cupy: Any) -> None:
    with cupy.cuda.Device(1):
        data, filt = cupy.ones((4, 5), "float32"), cupy.ones((2, 3), "float32")
    with cupy.cuda.Device(0):
        output = sigpy.convolve(data, filt)
        of_data = sigpy.convolve_data_adjoint(output, filt, data.shape)
        of_filt = sigpy.convolve_filter_adjoint(output, data, filt.shape)
    for array, expected in (
        (output, sigpy.convolve(data.get(), filt.get())),
        (of_data, sigpy.convolve_data_adjoint(output.get(), filt.get(), data.shape)),
        (of_filt, sigpy.convolve_filter_adjoint(output.get(), data.get(), filt.shape)),
    ):
        assert array.data.device_id == 1
        np.testing.assert_array_equal(array.get(), expected)
