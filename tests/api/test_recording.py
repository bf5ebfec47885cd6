"""Signal processing of a recorded electrocardiogram, with SciPy as the independent oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import pywt
import scipy.signal

from gpuconv import reference
from gpuconv.problem import ConvProblem
from tests.conftest import Backend

Array = npt.NDArray[Any]

RATE = 360.0  # Hz
FRAME, HOP = 64, 16
NUM_BINS = FRAME // 2 + 1
WINDOW = scipy.signal.windows.hann(FRAME, sym=False)
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53}


def recording(backend: Backend, dtype: str = "float64") -> Array:
    """The recording in millivolts: 1024 samples, or the first two beats where every thread is emulated."""
    samples = pywt.data.ecg() / 200.0  # 200 steps of the converter per millivolt
    return samples[: 640 if backend.name == "hostcuda" else None].astype(dtype)


def low_pass(num_taps: int, cutoff: float, dtype: str) -> Array:
    """Taps of a filter that passes frequencies below `cutoff`, in Hz."""
    return scipy.signal.firwin(num_taps, cutoff, fs=RATE).astype(dtype)


def problem_of(op: str, x: Array, w: Array, settings: dict[str, Any]) -> ConvProblem:
    return ConvProblem.of(op, x, w, None, **settings)


def assert_agrees(
    backend: Backend, op: str, x: Array, w: Array, expected: Array, slack: Array | float = 0.0, **settings: Any
) -> Array:
    """Compute on the backend; every element, real and imaginary part alike, lies within the bound of `expected`.

    `slack` is what `expected` itself may be off by. Returns what the backend computed.
    """
    y = backend.conv1d(x, w, **settings) if op == "conv1d" else backend.conv_transpose1d(x, w, **settings)
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    bound = reference.error_bound(problem_of(op, x, w, settings), x, w, exact=expected) + slack
    error = y - expected
    assert (np.maximum(abs(error.real), abs(error.imag)) <= bound).all()
    assert bound.max() < 1e-3 * abs(expected).max(), "the bound is too wide to show anything"
    return y


def wide(array: Array) -> Array:
    return array.astype(np.result_type(array.dtype, np.float64))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("num_taps", [5, 40, 61])
def test_filter(backend: Backend, num_taps: int, dtype: str) -> None:
    """A convolution layer does not flip its kernel, a filter does."""
    x, h = recording(backend, dtype), low_pass(num_taps, 35.0, dtype)
    layer = (x.reshape(1, 1, -1), h[::-1].reshape(1, 1, -1))
    causal = scipy.signal.lfilter(wide(h), 1.0, wide(x))
    assert_agrees(backend, "conv1d", *layer, causal.reshape(1, 1, -1), padding="causal")
    valid = scipy.signal.convolve(wide(x), wide(h), "valid", method="direct")
    assert_agrees(backend, "conv1d", *layer, valid.reshape(1, 1, -1), padding="valid")
    full = scipy.signal.convolve(wide(x), wide(h), "full", method="direct")
    assert_agrees(backend, "conv1d", *layer, full.reshape(1, 1, -1), padding=num_taps - 1)
    # (K - 1)//2 zeros on the left, as in PyTorch; SciPy puts the odd one of an even kernel on the other side.
    start = num_taps // 2
    same = full[start : start + len(x)]
    assert_agrees(backend, "conv1d", *layer, same.reshape(1, 1, -1), padding="same")
    if num_taps % 2:
        np.testing.assert_array_equal(same, scipy.signal.convolve(wide(x), wide(h), "same", method="direct"))


def test_filter_bank(backend: Backend) -> None:
    """Baseline, heart beat and noise of one recording as three output channels of one layer."""
    bands = ([5.0], [5.0, 15.0], [40.0])
    passes_zero = (True, False, False)
    bank = np.stack(
        [scipy.signal.firwin(101, band, pass_zero=zero, fs=RATE) for band, zero in zip(bands, passes_zero, strict=True)]
    ).astype(np.float32)
    x = recording(backend, "float32")
    expected = np.stack([scipy.signal.lfilter(wide(h), 1.0, wide(x)) for h in bank])
    assert_agrees(backend, "conv1d", x[np.newaxis], bank[:, np.newaxis, ::-1], expected, padding="causal")


def test_two_leads_with_a_filter_each(backend: Backend) -> None:
    """A filter per channel: groups."""
    x = recording(backend, "float32")
    leads = np.stack((x, np.gradient(x) * 5)).astype(np.float32)
    filters = np.stack((low_pass(31, 30.0, "float32"), low_pass(31, 90.0, "float32")))
    expected = np.stack(
        [scipy.signal.lfilter(wide(h), 1.0, wide(lead)) for h, lead in zip(filters, leads, strict=True)]
    )
    w = filters[:, np.newaxis, ::-1]
    assert_agrees(backend, "conv1d", leads[np.newaxis], w, expected[np.newaxis], padding="causal", groups=2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("factor", "num_taps"), [(2, 31), (3, 40), (5, 4), (8, 129)])
def test_decimation(backend: Backend, factor: int, num_taps: int, dtype: str) -> None:
    x, h = recording(backend, dtype), low_pass(num_taps, RATE / 2 / factor, dtype)
    expected = scipy.signal.upfirdn(wide(h), wide(x), down=factor).reshape(1, 1, -1)
    layer = (x.reshape(1, 1, -1), h[::-1].reshape(1, 1, -1))
    assert_agrees(backend, "conv1d", *layer, expected, stride=factor, padding=num_taps - 1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("factor", "num_taps"), [(2, 31), (3, 40), (5, 4), (8, 129)])
def test_interpolation(backend: Backend, factor: int, num_taps: int, dtype: str) -> None:
    x = recording(backend, dtype)
    h = scipy.signal.firwin(num_taps, 1 / factor).astype(dtype) * factor
    expected = scipy.signal.upfirdn(wide(h), wide(x), up=factor).reshape(1, 1, -1)
    layer = (x.reshape(1, 1, -1), h.reshape(1, 1, -1))
    assert_agrees(backend, "conv_transpose1d", *layer, expected, stride=factor)
    # "same" keeps L_in*stride samples of it.
    surplus = num_taps - factor
    if surplus >= 0:
        kept = expected[..., surplus // 2 : expected.shape[-1] - (surplus - surplus // 2)]
    else:
        kept = np.pad(expected, ((0, 0), (0, 0), (0, -surplus)))
    assert kept.shape[-1] == len(x) * factor
    assert_agrees(backend, "conv_transpose1d", *layer, kept, stride=factor, padding="same")


def test_interpolation_passes_through_the_recording(backend: Backend) -> None:
    """A windowed sinc is zero at the other samples, so the interpolated recording contains the recorded one."""
    x = recording(backend, "float64")
    factor, reach = 4, 12
    h = scipy.signal.firwin(2 * factor * reach + 1, 1 / factor, scale=False) * factor
    y = backend.conv_transpose1d(x[np.newaxis], h.reshape(1, 1, -1), stride=factor, padding=factor * reach)
    np.testing.assert_allclose(y[0, ::factor], x, rtol=0, atol=1e-12)


def fourier_kernels() -> Array:
    """window[n] * exp(-2j*pi*q*n/FRAME) of shape (NUM_BINS, FRAME), complex128."""
    turns = np.outer(np.arange(NUM_BINS), np.arange(FRAME)) % FRAME  # so that the angles are as exact as they can be
    return WINDOW * np.exp(-2j * np.pi / FRAME * turns)


def synthesis_kernels() -> Array:
    """window[n]/FRAME * exp(2j*pi*q*n/FRAME), the inner bins doubled: the real part of their sum is the inverse."""
    weights = np.full((NUM_BINS, 1), 2.0)
    weights[[0, -1]] = 1.0
    return weights / FRAME * fourier_kernels().conj()


def split(kernels: Array, sign: int) -> Array:
    """Real kernels, then those of the imaginary part: (2*NUM_BINS, FRAME)."""
    return np.concatenate((kernels.real, sign * kernels.imag))


def transform(x: Array) -> tuple[Array, dict[str, Any]]:
    """SciPy's transform (NUM_BINS, frames), and the settings under which conv1d sees the same frames."""
    oracle = scipy.signal.ShortTimeFFT(WINDOW, HOP, RATE, phase_shift=None)
    expected = oracle.stft(x)
    first, last = oracle.p_min, oracle.p_max(len(x))
    assert expected.shape == (NUM_BINS, last - first)
    left = FRAME // 2 - first * HOP
    right = (last - 1 - first) * HOP + FRAME - left - len(x)
    return expected, {"stride": HOP, "padding": (left, right)}


def kernel_slack(op: str, x: Array, settings: dict[str, Any], kernels: Array, u: float) -> Array:
    """How far rounded kernels, and sines and cosines of a few units in the last place, move the result."""
    magnitude = reference.compute(problem_of(op, abs(x), abs(kernels), settings), abs(x), abs(kernels))
    return (u + 8 * 2.0**-53) * magnitude


def test_transform_equals_the_transform_of_frames(backend: Backend) -> None:
    """The oracle of the tests below is what it is taken for."""
    x = recording(backend)
    expected, settings = transform(x)
    padded = np.pad(x, settings["padding"])
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::HOP]
    np.testing.assert_allclose(np.fft.rfft(frames * WINDOW).T, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_short_time_fourier_transform_and_back(backend: Backend, dtype: str) -> None:
    """Real and imaginary parts as channels; the inverse divides by the sum of the squared windows."""
    u = UNIT_ROUNDOFF[dtype]
    x = recording(backend, dtype)[np.newaxis]
    bins, settings = transform(wide(x[0]))
    expected = np.concatenate((bins.real, bins.imag))

    w64 = split(fourier_kernels(), 1)[:, np.newaxis]
    w = w64.astype(dtype)
    slack = kernel_slack("conv1d", wide(x), settings, np.broadcast_to(WINDOW, w64.shape), u)
    spectrum = assert_agrees(backend, "conv1d", x, w, expected, slack, **settings)

    # Back: from the transform as computed, so the errors of the way there come on top.
    v64 = split(synthesis_kernels(), -1)[:, np.newaxis]
    v = v64.astype(dtype)
    back = {**settings, "output_size": x.shape[-1]}
    p = problem_of("conv_transpose1d", spectrum, v, back)
    error = reference.error_bound(problem_of("conv1d", x, w, settings), x, w, exact=expected) + slack
    carried = reference.compute(p, error, abs(v))
    carried += kernel_slack("conv_transpose1d", wide(spectrum), back, np.full(v64.shape, 2 / FRAME), u)
    overlapped = wide((WINDOW**2).astype(dtype).reshape(1, 1, -1))
    ones = np.ones((1, spectrum.shape[-1]), dtype)
    coverage = backend.conv_transpose1d(ones, overlapped.astype(dtype), **back)
    np.testing.assert_allclose(coverage, 1.5, rtol=8 * u)  # four Hann windows cover each sample

    signal = wide(x) * 1.5
    y = assert_agrees(backend, "conv_transpose1d", spectrum, v, signal, carried, **back)
    tolerance = (reference.error_bound(p, spectrum, v, exact=signal) + carried) / 1.5 + 12 * u * abs(wide(x))
    restored = y / coverage
    assert (abs(restored - x) <= tolerance).all()
    assert abs(restored - x).max() <= 40 * u * abs(x).max()


def test_complex_transform_and_back(backend: Backend) -> None:
    """The same in complex64: one complex channel per bin."""
    u = UNIT_ROUNDOFF["float32"]
    x = recording(backend, "float32")[np.newaxis].astype(np.complex64)
    expected, settings = transform(wide(x[0].real))
    w = fourier_kernels()[:, np.newaxis].astype(np.complex64)
    slack = kernel_slack("conv1d", wide(x.real), settings, np.broadcast_to(WINDOW, w.shape), u)
    spectrum = assert_agrees(backend, "conv1d", x, w, expected, slack, **settings)

    v = synthesis_kernels()[:, np.newaxis].astype(np.complex64)
    y = backend.conv_transpose1d(spectrum, v, **settings, output_size=x.shape[-1])
    assert y.dtype == np.complex64
    assert abs(y.real / 1.5 - x.real).max() <= 40 * u * abs(x).max()
