"""gpuconv.signal beside scipy.signal, on random problems and on SciPy's published examples."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.signal

from gpuconv import signal, sigpy
from tests.api.test_runtime_cupy import shifted

COUNT = 500  # random problems for each function
FLOATS = ("float32", "float64", "complex64", "complex128")
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


def draw(rng: np.random.Generator, shape: Any, dtype: str) -> Any:
    kind = np.dtype(dtype)
    if kind.kind in "iu":
        return rng.integers(-100 if kind.kind == "i" else 0, 101, shape).astype(dtype)
    values = rng.standard_normal(shape)
    return (values + 1j * rng.standard_normal(shape) if kind.kind == "c" else values).astype(dtype)


def assert_close(found: Any, expected: Any) -> None:
    """One shape, one dtype, and values as close as sums in two orders are; equal for integers."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if expected.dtype.kind in "iub":
        np.testing.assert_array_equal(found, expected)
    else:
        precision = 1e-5 if expected.real.dtype == np.float32 else 1e-12
        np.testing.assert_allclose(found, expected, rtol=0, atol=precision * 30 * (1 + np.abs(expected).max(initial=0)))


def operands(rng: np.random.Generator) -> tuple[Any, Any, str]:
    one, other = (str(rng.choice((*FLOATS, *INTEGERS))) for _ in range(2))
    L, K = rng.integers(1, 60, 2)
    x, h = draw(rng, L, one), draw(rng, K, one if rng.random() < 0.5 else other)
    return x[:: rng.choice((1, -1, 2))], h, str(rng.choice(signal.convolution.MODES))


@pytest.mark.parametrize("method", ["direct", "auto"])
@pytest.mark.parametrize("name", ["convolve", "correlate"])
def test_random_convolutions(name: str, method: str) -> None:
    rng = np.random.default_rng(len(name))
    for _ in range(COUNT):
        x, h, mode = operands(rng)
        assert_close(getattr(signal, name)(x, h, mode, method), getattr(scipy.signal, name)(x, h, mode, "direct"))


@pytest.mark.parametrize("method", ["fft", "overlap"])
def test_random_convolutions_by_fft(method: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(COUNT):
        x, h, mode = operands(rng)
        if method == "overlap":
            x = np.tile(x, int(rng.integers(1, 30)))
            assert_close(signal.oaconvolve(x, h, mode), scipy.signal.convolve(x.astype(_wide(x, h)), h, mode, "direct"))
        elif np.result_type(x, h).kind in "fc":
            assert_close(signal.convolve(x, h, mode, "fft"), scipy.signal.convolve(x, h, mode, "direct"))


def _wide(*arrays: Any) -> np.dtype[Any]:
    """What oaconvolve computes in."""
    return np.result_type(np.float32, *(np.float64 if a.dtype.kind in "iu" else a.dtype for a in arrays))


def signals(rng: np.random.Generator, dtypes: tuple[str, ...]) -> tuple[Any, int]:
    """An array of one to three axes, and one of them."""
    rank = int(rng.integers(1, 4))
    axis = int(rng.integers(-rank, rank))
    shape = list(rng.integers(1, 4, rank))
    shape[axis] = rng.integers(2, 40)  # SciPy reads beyond a signal of one sample
    return draw(rng, shape, str(rng.choice(dtypes))), axis


def test_random_upfirdn() -> None:
    rng = np.random.default_rng(3)
    for _ in range(COUNT):
        x, axis = signals(rng, (*FLOATS, "int32"))
        h = draw(rng, rng.integers(1, 20), str(rng.choice((*FLOATS, "int16"))))
        up, down = (int(factor) for factor in rng.integers(1, 7, 2))
        mode = str(rng.choice(signal.filters.EXTENSIONS))
        settings = (up, down, axis, mode, 0.5 if mode == "constant" and x.dtype.kind != "i" else 0)
        assert_close(signal.upfirdn(h, x, *settings), scipy.signal.upfirdn(h, x, *settings))


@pytest.mark.parametrize("mode", signal.filters.EXTENSIONS)
def test_a_signal_of_one_sample_goes_on_as_itself(mode: str) -> None:
    expected = {"constant": [2, 2, 2], "antisymmetric": [2, -2, 2]}.get(mode, [6, 6, 6])
    assert signal.upfirdn(np.ones(3), np.array([2.0]), mode=mode).tolist() == expected


def test_random_firfilter() -> None:
    rng = np.random.default_rng(4)
    for _ in range(COUNT):
        x, axis = signals(rng, FLOATS)
        b = draw(rng, rng.integers(1, 20), str(rng.choice(FLOATS)))
        expected = scipy.signal.lfilter(b, np.ones(1, b.real.dtype), x, axis)
        assert_close(signal.firfilter(b, x, axis), expected)
        shape = list(x.shape)
        shape[axis] = b.size - 1
        zi = draw(rng, shape, b.real.dtype.name)
        y, zf = signal.firfilter(b, x, axis, zi)
        for found, theirs in zip((y, zf), scipy.signal.lfilter(b, np.ones(1, b.dtype), x, axis, zi), strict=True):
            assert_close(found, theirs.astype(found.dtype))


def test_random_resample_poly() -> None:
    rng = np.random.default_rng(5)
    paddings = ("maximum", "mean", "median", "minimum", *signal.filters.EXTENSIONS)
    for _ in range(COUNT):
        x, axis = signals(rng, (*FLOATS, "int32"))
        up, down = (int(factor) for factor in rng.integers(1, 9, 2))
        padtype = str(rng.choice(paddings[1:2] + paddings[4:] if x.dtype.kind == "c" else paddings))
        window: Any = [("kaiser", 5.0), "hamming", "blackman", draw(rng, rng.integers(1, 30), "float64")][
            rng.integers(4)
        ]
        found = signal.resample_poly(x, up, down, axis, window, padtype)
        assert_close(found, scipy.signal.resample_poly(x, up, down, axis, window, padtype))


@pytest.mark.parametrize("padtype", ["constant", "line", "mean"])
def test_half_precision_is_resampled_in_single(padtype: str) -> None:
    x = draw(np.random.default_rng(12), 60, "float16")
    assert_close(signal.resample_poly(x, 3, 2, padtype=padtype), scipy.signal.resample_poly(x, 3, 2, padtype=padtype))
    assert signal.resample_poly(x[:0], 3, 2).dtype == np.float32


@pytest.mark.parametrize(("up", "down", "K"), [(160, 147, 3201), (147, 160, 3201), (160, 441, 8821), (7, 300, 5)])
def test_rates_with_many_phases(up: int, down: int, K: int) -> None:
    """A NaN spoils few results besides those that have it as a term."""
    rng = np.random.default_rng(13)
    for L in (1, 700, 2000):
        x, h = rng.standard_normal(L), rng.standard_normal(K)
        assert_close(signal.upfirdn(h, x, up, down), scipy.signal.upfirdn(h, x, up, down))
    x[1000] = np.nan
    found, expected = (np.isnan(each.upfirdn(h, x, up, down)).sum() for each in (signal, scipy.signal))
    assert expected <= found <= max(3, 3 * expected)


def test_random_decimate() -> None:
    rng = np.random.default_rng(6)
    for _ in range(COUNT):
        x, axis = signals(rng, (*FLOATS, "int32"))
        q, n = int(rng.integers(2, 7)), int(rng.integers(0, 30)) if rng.random() < 0.5 else None
        zero_phase = bool(rng.integers(2))
        found = signal.decimate_fir(x, q, n, axis, zero_phase)
        assert_close(found, scipy.signal.decimate(x, q, n, "fir", axis, zero_phase))


@pytest.mark.parametrize("mode", signal.convolution.MODES)
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize(
    ("one", "other"), [((3, 4), (3, 4)), ((3, 1), (1, 4)), ((1, 4), (3, 1)), ((1, 1), (3, 4)), ((3, 4), (1, 1))]
)
def test_other_axes_are_broadcast(mode: str, axis: int, one: tuple[int, ...], other: tuple[int, ...]) -> None:
    rng = np.random.default_rng(7)
    x, h = (np.moveaxis(rng.standard_normal((*s, n)), -1, axis) for s, n in ((one, 20), (other, 5)))
    whole = np.moveaxis(np.broadcast_to(np.moveaxis(x, axis, -1), (*np.broadcast_shapes(one, other), 20)), -1, axis)
    for function, expected in (
        (signal.convolve, scipy.signal.oaconvolve(whole, h, mode, axes=axis)),
        (signal.oaconvolve, scipy.signal.oaconvolve(whole, h, mode, axes=axis)),
        (signal.correlate, scipy.signal.oaconvolve(whole, np.flip(h, axis), mode, axes=axis)),
    ):
        keyword = "axes" if function is signal.oaconvolve else "axis"
        assert_close(function(x, h, mode, **{keyword: axis}), expected)


def test_integers_are_exact_where_sums_wrap_around() -> None:
    rng = np.random.default_rng(8)
    for dtype in INTEGERS:
        limits = np.iinfo(dtype)
        x, h = (rng.integers(limits.min, limits.max, n, dtype, endpoint=True) for n in (50, 9))
        assert_close(signal.convolve(x, h), np.convolve(x, h))
    bits = rng.integers(0, 2, 30).astype(bool)
    assert_close(signal.convolve(bits, bits[:4]), np.convolve(bits, bits[:4]))
    np.testing.assert_array_equal(
        signal.convolve(bits, bits[:4].astype("int8")), np.convolve(bits, bits[:4].astype("int8"))
    )


def test_scipys_examples() -> None:
    """The examples in the docstrings of scipy.signal."""
    sig = np.repeat([0.0, 1.0, 0.0], 100)
    window = scipy.signal.windows.hann(50)
    assert_close(signal.convolve(sig, window, mode="same"), scipy.signal.convolve(sig, window, mode="same"))
    steps = np.repeat([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0], 128)
    assert_close(
        signal.correlate(steps, np.ones(128), mode="same"), scipy.signal.correlate(steps, np.ones(128), "same")
    )
    assert signal.upfirdn(np.ones(3), np.array([1.0, 2, 3]), 3).tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert signal.upfirdn(np.array([1.0, 1, 1]), np.array([1.0, 1, 1])).tolist() == [1, 2, 3, 2, 1]
    assert signal.upfirdn(np.array([1.0]), np.array([1.0, 2, 3]), 3).tolist() == [1, 0, 0, 2, 0, 0, 3]
    assert signal.upfirdn(np.array([0.5, 1, 0.5]), np.array([1.0, 1, 1]), 2).tolist() == [0.5, 1, 1, 1, 1, 1, 0.5]
    assert signal.upfirdn(np.array([1.0]), np.arange(10.0), 1, 3).tolist() == [0, 3, 6, 9]
    assert signal.upfirdn(np.array([0.5, 1, 0.5]), np.arange(10.0), 2, 3).tolist() == [0, 1, 2.5, 4, 5.5, 7, 8.5]
    x = np.arange(8.0).reshape(4, 2)
    assert signal.upfirdn(np.array([1.0, 1]), x, 2, axis=0).tolist() == np.repeat(x, 2, axis=0).tolist()
    t = np.linspace(0, 10, 20, endpoint=False)
    y = np.cos(-(t**2) / 6.0)
    assert_close(signal.resample_poly(y, 100, 20), scipy.signal.resample_poly(y, 100, 20))


def test_signals_with_the_same_taps_are_independent_of_each_other_and_of_strides() -> None:
    rng = np.random.default_rng(9)
    x, h = rng.standard_normal((4, 30, 3)), rng.standard_normal(7)
    whole = signal.firfilter(h, x, axis=1)
    for n, c in np.ndindex(4, 3):
        assert_close(signal.firfilter(h, x[n, ::-1, c][::-1]), whole[n, :, c])


def test_blocks_of_a_stream_give_what_the_whole_gives() -> None:
    rng = np.random.default_rng(10)
    x, b = rng.standard_normal((2, 100)), rng.standard_normal(9)
    state, parts = np.zeros((2, 8)), []
    for start, stop in ((0, 3), (3, 3), (3, 50), (50, 51), (51, 100)):
        y, state = signal.firfilter(b, x[:, start:stop], zi=state)
        parts.append(y)
    assert_close(np.concatenate(parts, axis=-1), signal.firfilter(b, x))
    assert_close(state, signal.convolve(x, b[None], axis=1)[:, 100:])


def test_empty_arrays_and_numbers() -> None:
    assert signal.convolve(np.empty(0), np.ones(3)).shape == (0,)
    assert signal.oaconvolve(np.empty((2, 0)), np.ones((2, 3)), axes=1).shape == (2, 0)
    assert signal.convolve(np.empty((0, 5)), np.ones((1, 3)), axis=1).shape == (0, 7)
    assert signal.convolve(np.array(2.0), np.array(3.0)) == 6
    assert signal.firfilter(np.ones(3), np.empty((2, 0))).shape == (2, 0)
    for padtype in ("constant", "line", "mean", "edge"):
        assert signal.resample_poly(np.empty((0, 2), np.float32), 3, 2, padtype=padtype).shape == (0, 2)
    for zero_phase in (True, False):
        assert signal.decimate_fir(np.empty((2, 0)), 3, zero_phase=zero_phase).shape == (2, 0)
        assert signal.decimate_fir(np.empty((0, 9)), 3, zero_phase=zero_phase).shape == (0, 3)


def test_infinities_and_overflow_give_no_warnings() -> None:
    x, h = np.full(2000, 3e38, np.float32), np.ones(1500, np.float32)
    x[3], x[4] = np.inf, -np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not np.isfinite(signal.convolve(x, h, method="fft")).any()
        assert np.isnan(signal.firfilter(h[:3], x, zi=-x[3:5])[0]).any()
        assert np.isinf(signal.upfirdn(h[:3], x[5:], mode="antireflect")).any()
        assert np.isnan(signal.resample_poly(x, 3, 2, padtype="mean")).all()


def test_integers_and_unsigned_integers_give_the_dtype_that_scipy_gives() -> None:
    h, x = np.ones(3, np.int16), np.arange(9, dtype=np.uint16)
    assert signal.upfirdn(h, x).dtype == scipy.signal.upfirdn(h, x).dtype == np.float32


@pytest.mark.parametrize("dtype", [*INTEGERS, "bool"])
def test_filters_of_integers_do_not_wrap_around(dtype: str) -> None:
    """SciPy takes them only where their common dtype is float64, as that of uint64 and int64 is."""
    x = np.full(9, True if dtype == "bool" else np.iinfo(dtype).max, dtype)
    wide = x.astype(float)
    assert_close(signal.firfilter(x[:3], x), scipy.signal.lfilter(wide[:3], 1, wide))
    y, state = signal.firfilter(x[:3], x, zi=x[:2])
    for found, theirs in zip((y, state), scipy.signal.lfilter(wide[:3], 1, wide, zi=wide[:2]), strict=True):
        assert_close(found, theirs)


def test_oaconvolve_of_integers_is_floating_point_without_elements_too() -> None:
    x = np.ones(5, np.int16)
    for length in (5, 0):
        assert signal.oaconvolve(x[:length], x).dtype == np.float64


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda x: signal.convolve(x, x[None]), ValueError, "convolve: in1 and in2 must have the same number of axes"),
        (lambda x: signal.convolve(np.ones((2, 5)), x.repeat(3).reshape(3, 5), axis=1), ValueError,
         "convolve: all axes of in1 and in2 but the convolved one must broadcast, got shapes (2, 5) and (3, 5)"),
        (lambda x: signal.convolve(x, x, "middle"), ValueError, "convolve: mode must be one of 'full', 'same'"),
        (lambda x: signal.correlate(x, x, "middle"), ValueError, "correlate: mode must be one of 'full', 'same', 'v"),
        (lambda x: signal.oaconvolve(x, x, "middle"), ValueError, "oaconvolve: mode must be one of 'full', 'same', "),
        (lambda x: signal.convolve(x, x, method="slow"), ValueError, "convolve: method must be one of 'auto', 'dir"),
        (lambda x: signal.correlate(x, x, method="slow"), ValueError, "correlate: method must be one of 'auto', 'dire"),
        (lambda x: signal.convolve(x[None], x[None]), ValueError, "convolve: axis must be given for arrays of 2 axes"),
        (lambda x: signal.oaconvolve(x[None], x[None]), ValueError, "oaconvolve: axes must be given for arrays of 2 a"),
        (lambda x: signal.convolve(x, x, axis=1), ValueError, "convolve: axis 1 does not exist in an array of shape"),
        (lambda x: signal.convolve(x, x, axis=0.0), TypeError, "convolve: axis must be an int, got float 0.0"),
        (lambda x: signal.convolve(x, [1.0, 2.0]), TypeError, "convolve: in2 must be a NumPy or CuPy array, got list"),
        (lambda x: signal.convolve(x.astype("longdouble"), x), TypeError, "is not supported"),
        (lambda x: signal.oaconvolve(x[None], x[None], axes=(0, 1)), ValueError, "axes must name one axis, got (0, 1)"),
        (lambda x: signal.upfirdn(x[None], x), ValueError, "upfirdn: h must have the shape (K,) with K >= 1, got (1,"),
        (lambda x: signal.upfirdn(x, x, 0), ValueError, "upfirdn: up must be at least 1, got 0"),
        (lambda x: signal.upfirdn(x, x, 1, 1.5), ValueError, "upfirdn: down must be a whole number, got 1.5"),
        (lambda x: signal.upfirdn(x, x, "2"), TypeError, "upfirdn: up must be a whole number, got str '2'"),
        (lambda x: signal.upfirdn(x, x, mode="mirror"), ValueError, "upfirdn: mode must be one of 'constant', 'wrap'"),
        (lambda x: signal.upfirdn(x, x[:0]), ValueError, "upfirdn: x must have samples along the axis, got the shape"),
        (lambda x: signal.firfilter(x[:0], x), ValueError, "firfilter: b must have the shape (K,) with K >= 1, got (0"),
        (lambda x: signal.firfilter(x, x, zi=x), ValueError, "firfilter: zi must have K - 1 = 4 elements along"),
        (lambda x: signal.resample_poly(x, 1.5, 1), ValueError, "resample_poly: up must be a whole number, got 1.5"),
        (lambda x: signal.resample_poly(x, 1, 0), ValueError, "resample_poly: down must be at least 1, got 0"),
        (lambda x: signal.resample_poly(x, 2, 1, padtype="edge", cval=1), ValueError,
         "resample_poly: cval must be None for padtype 'edge', which has no constant, got 1"),
        (lambda x: signal.resample_poly(x, 2, 1, padtype="zero"), ValueError, "resample_poly: padtype must be one of"),
        (lambda x: signal.resample_poly(x, 2, 1, window="gauss"), ValueError, 'resample_poly: window must be ("'),
        (lambda x: signal.resample_poly(x, 2, 1, window=x[None]), ValueError, "resample_poly: window must have one"),
        (lambda x: signal.decimate_fir(x, 1), ValueError, "decimate_fir: q must be at least 2, got 1"),
        (lambda x: signal.decimate_fir(x, 2, -1), ValueError, "decimate_fir: n must be at least 0, got -1"),
        (lambda x: signal.decimate_fir(x, 2.5), TypeError, "decimate_fir: q must be an int, got float 2.5"),
        (lambda x: signal.decimate_fir(x, 2, axis=1), ValueError, "decimate_fir: axis 1 does not exist in an array"),
    ],
)  # fmt: skip
def test_bad_arguments(call: Callable[[Any], Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=re.escape(says)):
        call(np.ones(5))


def test_factors_may_be_floats_without_a_fraction_as_in_scipy() -> None:
    x = np.arange(12.0)
    np.testing.assert_array_equal(signal.resample_poly(x, 3.0, np.float64(2)), signal.resample_poly(x, 3, 2))
    np.testing.assert_array_equal(signal.upfirdn(x[:3], x, 2.0), signal.upfirdn(x[:3], x, 2))


def test_long_kernels_of_floats_take_the_fft_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(
        signal.convolution, "by_fft", lambda x, h: taken.append((x, h)) or np.zeros(x.size + h.size - 1)
    )
    long, short = np.ones(signal.convolution.FFT_FROM), np.ones(signal.convolution.FFT_FROM - 1)
    signal.convolve(long, short)
    signal.convolve(long, long, method="direct")
    signal.convolve(long.astype("int32"), long.astype("int32"))
    assert not taken
    signal.convolve(long, long)
    signal.convolve(short, short, method="fft")
    assert len(taken) == 2


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
def test_arrays_of_another_gpu_stay_there(cupy: Any) -> None:
    x, h = np.arange(120.0).reshape(3, 40), np.arange(1.0, 6.0)
    with cupy.cuda.Device(1):
        on_gpu, taps = cupy.asarray(x), cupy.asarray(h)
    calls: tuple[Callable[[Any, Any], Any], ...] = (
        lambda x, h: signal.convolve(x[0], h, mode="same"),
        lambda x, h: signal.upfirdn(h, x, 3, 2),
        lambda x, h: signal.firfilter(h, x=x),
        lambda x, h: signal.resample_poly(x, 2, 3, window=h, padtype="line"),
        lambda x, h: signal.decimate_fir(x, 2, 6),  # noqa: ARG005
    )
    with cupy.cuda.Device(0):
        for call in calls:
            found = call(on_gpu, taps)
            assert found.data.device_id == 1
            np.testing.assert_allclose(found.get(), call(x, h), rtol=1e-12)


@pytest.mark.gpu
def test_a_gpu_reads_arrays_at_any_address(cupy: Any) -> None:
    x, h, state = np.arange(30.0, dtype=np.float32), np.arange(1.0, 6.0), np.arange(4.0)
    calls: tuple[Callable[[Any, Any, Any], Any], ...] = (
        lambda x, h, _: signal.convolve(x, h),
        lambda x, h, state: signal.firfilter(h, x, zi=state)[0],
        lambda x, h, _: signal.upfirdn(h, x, 2, 3, mode="reflect"),
        lambda x, h, _: signal.resample_poly(x, 2, 3, window=h, padtype="mean"),
        lambda x, *_: signal.decimate_fir(x, 2, 6),
        lambda x, h, _: sigpy.convolve(x, h),
    )
    for call in calls:
        found = call(*(shifted(cupy, array) for array in (x, h, state)))
        np.testing.assert_array_equal(found.get(), call(*map(cupy.asarray, (x, h, state))).get())


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives(cupy: Any) -> None:
    rng = np.random.default_rng(11)
    for dtype in ("float32", "complex64", "uint16"):
        x, h = draw(rng, (2, 3, 30), dtype), draw(rng, 5, dtype)
        on_gpu, taps = cupy.asarray(x), cupy.asarray(h)
        calls: list[Callable[..., Any]] = [
            lambda x, h: signal.convolve(x, h[None, None], "same", "direct", axis=2),
            lambda x, h: signal.correlate(x, h[None, :, None][:, :3], "full", "direct", axis=1),
            lambda x, h: signal.firfilter(h, x, 2),
            lambda x, h: signal.upfirdn(h, x, 3, 2, 1),
            lambda x, h: signal.upfirdn(h, x, 2, 3, -1, "reflect"),
        ]
        if np.dtype(dtype).kind == "f":
            calls += [
                lambda x, _: signal.resample_poly(x, 3, 2, 2, padtype="line"),
                lambda x, _: signal.decimate_fir(x, 3),
                lambda x, h: signal.firfilter(h, x, 2, x[..., :4])[1],
            ]
        for call in calls:
            found = call(on_gpu, taps)
            assert isinstance(found, cupy.ndarray)
            assert_close(found.get(), call(x, h))
