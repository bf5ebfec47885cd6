"""Filters that change the sample rate of a signal, and an FIR filter with a state."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np

from .. import runtime
from ..arguments import MAX_STEP, check_int, is_one_of
from ..functional import conv1d
from ..text import shown
from .arrays import (
    axis_last,
    check_factor,
    check_number,
    check_one_of,
    computable,
    on_the_gpu_of_its_arrays,
    put_back,
    real_type,
    result_type,
    take,
)
from .convolution import convolve_last_axis

EXTENSIONS = (
    "constant", "wrap", "edge", "smooth", "symmetric", "reflect", "antisymmetric", "antireflect", "line"
)  # fmt: skip

_BACKGROUNDS = ("maximum", "mean", "median", "minimum")


@on_the_gpu_of_its_arrays
def upfirdn(h: Any, x: Any, up: int = 1, down: int = 1, axis: int = -1, mode: str = "constant", cval: float = 0) -> Any:
    """Insert zeros, filter and keep every `down`-th sample, as `scipy.signal.upfirdn` does, without the work for zeros.

        out[l] = sum over k of h[k] * x[(l*down - k)/up]        (terms whose index is no integer do not exist)

    Args:
        h: the filter's taps, (K,).
        x: the signals along `axis`, of L samples; NumPy or CuPy, any strides.
        up: the upsampling factor.
        down: the downsampling factor.
        axis: of x.
        mode: how x is extended beyond its ends: "constant" (`cval`), "wrap", "edge", "smooth", "symmetric", "reflect",
            "antisymmetric", "antireflect" or "line".
        cval: the constant.

    Returns:
        x's shape with ``((L - 1)*up + K - 1)//down + 1`` samples along the axis, floating-point.

    Raises:
        ValueError: a factor is not a whole number or is below 1, h does not have one axis or has no tap, x has no
            samples, or the mode is unknown.
        TypeError: an argument is not an array, or a dtype is not supported.

    Example:
        >>> import numpy as np
        >>> from gpuconv import signal
        >>> signal.upfirdn(np.array([1.0, 1, 1]), np.array([1.0, 2, 3]), 3)
        array([1., 1., 1., 2., 2., 2., 3., 3., 3.])
    """
    h, x = take("upfirdn", h=h, x=x)
    if h.ndim != 1 or h.size == 0:
        raise ValueError(f"upfirdn: h must have the shape (K,) with K >= 1, got {tuple(h.shape)}")
    up, down = check_factor("upfirdn", "up", up), check_factor("upfirdn", "down", down)
    check_one_of("upfirdn", "mode", mode, EXTENSIONS)
    x, place = axis_last("upfirdn", x, axis)
    check_number("upfirdn", "cval", cval, x.dtype)
    L, K = x.shape[-1], h.shape[0]
    if L == 0:
        raise ValueError(f"upfirdn: x must have samples along the axis, got the shape {tuple(x.shape)}")
    wide = np.result_type(h.dtype, x.dtype, np.float32)
    h, x = h.astype(wide if h.dtype.kind == "c" else real_type(wide), copy=False), x.astype(wide, copy=False)
    length = ((L - 1) * up + K - 1) // down + 1
    if mode != "constant" or cval != 0:
        # Enough samples before and behind x for all windows.
        extra = -(-(K - 1) // up)
        x = _extend(x, extra, extra, mode, cval)
        first = extra * up  # where x's own first sample lies, upsampled
    else:
        first = 0
    return put_back(_polyphase(h, x, up, down, first, length), place)


@on_the_gpu_of_its_arrays
def firfilter(b: Any, x: Any, axis: int = -1, zi: Any = None) -> Any:
    """Filter by a finite impulse response: `scipy.signal.lfilter` with ``a = 1``.

    Args:
        b: the taps, (K,), K >= 1.
        x: the signals along `axis`, of L samples; NumPy or CuPy, any strides.
        axis: of x.
        zi: what the samples before x add to the first K - 1 results: x's shape with K - 1 in place of L, or an array
            that broadcasts to it; the `zf` of the previous call. None for zeros.

    Returns:
        y, of x's shape, floating-point; with `zi` the pair (y, zf), where zf is the state after the last sample.

    Raises:
        ValueError: a shape does not fit.
        TypeError: an argument is not an array, or a dtype is not supported.

    Example:
        >>> import numpy as np
        >>> from gpuconv import signal
        >>> b = np.array([1.0, 1.0, 1.0])
        >>> y, state = signal.firfilter(b, np.arange(3.0), zi=np.zeros(2))
        >>> signal.firfilter(b, np.arange(3.0, 6.0), zi=state)[0]
        array([ 6.,  9., 12.])
    """
    b, x, *states = take("firfilter", b=b, x=x, **({} if zi is None else {"zi": zi}))
    zi = states[0] if states else None
    if b.ndim != 1 or b.size == 0:
        raise ValueError(f"firfilter: b must have the shape (K,) with K >= 1, got {tuple(b.shape)}")
    x, place = axis_last("firfilter", x, axis)
    if result_type(x, b).kind in "iub":  # sums in their own dtype would wrap around
        x = x.astype(np.float64)
    L, K = x.shape[-1], b.shape[0]
    if zi is None:
        return put_back(convolve_last_axis(x, b, "full", "direct")[..., :L], place)
    state, _ = axis_last("firfilter", zi, axis if zi.ndim == x.ndim else -1)
    xp, dtype = runtime.array_module(x), result_type(x, b, state)
    x, b = x.astype(dtype, copy=False), b.astype(dtype if b.dtype.kind == "c" else real_type(dtype), copy=False)
    expected = (*x.shape[:-1], K - 1)
    try:
        state = xp.broadcast_to(state, expected)
    except ValueError:
        raise ValueError(
            f"firfilter: zi must have K - 1 = {K - 1} elements along the axis and broadcast to x, got {tuple(zi.shape)}"
        ) from None
    full = convolve_last_axis(x, b, "full", "direct") if L else xp.zeros(expected, dtype)
    full[..., : K - 1] += state
    return put_back(full[..., :L], place), put_back(full[..., L:], place)


@on_the_gpu_of_its_arrays
def resample_poly(
    x: Any,
    up: int,
    down: int,
    axis: int = 0,
    window: Any = ("kaiser", 5.0),
    padtype: str = "constant",
    cval: float | None = None,
) -> Any:
    """Resample by the factor up/down with a linear-phase low-pass filter, as `scipy.signal.resample_poly` does.

    Args:
        x: the signals along `axis`, of L samples; NumPy or CuPy, any strides.
        up: the upsampling factor.
        down: the downsampling factor.
        axis: of x.
        window: that of the designed filter: ("kaiser", beta), "hamming", "hann", "blackman" or "boxcar"; or the taps of
            another filter as an array or a list.
        padtype: how x is extended beyond its ends: one of the modes of `upfirdn`; or "maximum", "mean", "median" or
            "minimum" of x, which is subtracted before and added afterwards.
        cval: the constant of "constant"; None for 0.

    Returns:
        x's shape with ``ceil(L*up/down)`` samples along the axis, floating-point.

    Raises:
        ValueError: a factor is not a whole number or is below 1; window, padtype or cval does not fit.
        TypeError: x is not an array, or a dtype is not supported.

    Example:
        >>> import numpy as np
        >>> from gpuconv import signal
        >>> signal.resample_poly(np.ones(6), 1, 2, padtype="line").round(3)
        array([1., 1., 1.])
    """
    (x,) = take("resample_poly", x=x)
    up, down = check_factor("resample_poly", "up", up), check_factor("resample_poly", "down", down)
    check_one_of("resample_poly", "padtype", padtype, (*_BACKGROUNDS, *EXTENSIONS))
    if cval is not None and padtype != "constant":
        raise ValueError(f"resample_poly: cval must be None for padtype {padtype!r}, which has no constant, got {cval}")
    if cval is not None:
        check_number("resample_poly", "cval", cval, x.dtype)
    common = math.gcd(up, down)
    up, down = up // common, down // common
    if up == down == 1:
        return x.copy()
    xp = runtime.array_module(x)
    inexact = x.dtype if x.dtype.kind in "fcV" else np.dtype(np.float64)
    if isinstance(window, list) or hasattr(window, "ndim"):
        try:
            taps = np.asarray(window) if isinstance(window, list) else window
        except ValueError:  # its rows have different lengths
            raise ValueError(f"resample_poly: window must have one axis, got {shown(window)}") from None
        h = runtime.aligned(xp.asarray(*take("resample_poly", window=taps)))
        if h.ndim != 1 or h.size == 0:
            raise ValueError(f"resample_poly: window must have one axis, with a tap at least, got {tuple(h.shape)}")
        h = h.astype(result_type(h, xp.empty(0, inexact)))
        half = (h.size - 1) // 2
    else:
        half = 10 * max(up, down)
        h = xp.asarray(_low_pass(2 * half + 1, 1 / max(up, down), window).astype(real_type(inexact)))
    h = h * h.dtype.type(up)
    signals, place = axis_last("resample_poly", x.astype(inexact, copy=False), axis)
    wide = result_type(h, signals)
    if wide == np.float16:  # as SciPy: only the taps are rounded to it
        wide = np.dtype(np.float32)
    if signals.shape[-1] == 0:
        return x.astype(wide)
    background = None
    if padtype in _BACKGROUNDS:
        measure = {"maximum": xp.max, "mean": xp.mean, "median": xp.median, "minimum": xp.min}[padtype]
        background = measure(signals, axis=-1, keepdims=True)
        signals = signals - background
        padtype = "constant"
    signals = signals.astype(wide, copy=False)
    L = signals.shape[-1]
    length = -(-L * up // down)
    # The output is aligned with the middle of the filter.
    first = half
    if padtype != "constant" or cval:
        extra = -(-(h.size - 1) // up)
        signals = _extend(signals, extra, extra, padtype, 0 if cval is None else cval)
        first += extra * up
    y = _polyphase(h, signals, up, down, first, length)
    return put_back(y if background is None else y + background, place)


@on_the_gpu_of_its_arrays
def decimate_fir(x: Any, q: int, n: int | None = None, axis: int = -1, zero_phase: bool = True) -> Any:
    """Low-pass filter and keep every q-th sample: `scipy.signal.decimate` with ``ftype="fir"``.

    Args:
        x: the signals along `axis`; NumPy or CuPy, any strides. Integers and float16 are computed in float64.
        q: the downsampling factor.
        n: the order of the filter, which has n + 1 taps and a Hamming window; None for 20*q.
        axis: of x.
        zero_phase: shift the result so that the filter adds no delay.

    Returns:
        x's shape with ``ceil(L/q)`` samples along the axis.

    Raises:
        ValueError: q is below 2, or n below 0.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> import numpy as np
        >>> from gpuconv import signal
        >>> signal.decimate_fir(np.ones(200), 2)[40:44].round(6)
        array([1., 1., 1., 1.])
    """
    (x,) = take("decimate_fir", x=x)
    q = check_int("decimate_fir", "q", q, "an int", 2, MAX_STEP)
    n = 20 * q if n is None else check_int("decimate_fir", "n", n, "an int", 0, MAX_STEP)
    signals, place = axis_last("decimate_fir", x, axis)
    dtype = x.dtype if x.dtype.kind in "fc" and x.dtype != np.float16 else np.dtype(np.float64)
    taps = runtime.array_module(x).asarray(_low_pass(n + 1, 1 / q, "hamming").astype(real_type(dtype)))
    signals = signals.astype(dtype, copy=False)
    if zero_phase:
        return put_back(resample_poly(signals, 1, q, axis=-1, window=taps), place)
    return put_back(_polyphase(taps, signals, 1, q, 0, -(-signals.shape[-1] // q)), place)


def _polyphase(h: Any, x: Any, up: int, down: int, first: int, length: int) -> Any:
    """``y[l] = sum over k of h[k] * x[(l*down + first - k)/up]`` for l < length, over the terms that exist.

    Each of the ``up/gcd`` phases of l is an output channel of a convolution, with the taps that multiply samples. One
    convolution computes neighbouring phases, whose windows together are at most twice as long as each.
    """
    xp, result = runtime.array_module(x), result_type(x, h)
    if 0 in x.shape:
        return xp.zeros((*x.shape[:-1], length), result)
    common = math.gcd(up, down)
    phases, step = min(up // common, length), down // common  # those of which there are results
    # Output l = q*phases + r reads x[q*step + i] with the tap k = r*down + first - i*up.
    ends = [(-(-(r * down + first - (h.size - 1)) // up), (r * down + first) // up) for r in range(phases)]
    longest = 2 * max(1, *(high - low + 1 for low, high in ends))
    positions, parts, start = -(-length // phases), [], 0
    while start < phases:
        low, stop = ends[start][0], start + 1
        while stop < phases and ends[stop][1] - low < longest:
            stop += 1
        high = max(low, ends[stop - 1][1])  # a phase may have no tap
        taps = np.array([[r * down + first - i * up for i in range(low, high + 1)] for r in range(start, stop)])
        exists = (taps >= 0) & (taps < h.size)
        w = xp.where(xp.asarray(exists), h[xp.asarray(np.where(exists, taps, 0))], xp.zeros((), h.dtype))
        # The window of output q begins at q*step + low, which may be before x, and the last window may end behind x.
        end = (positions - 1) * step + high + 1
        signals, w = computable(x[..., max(0, low) : max(0, end)], w)
        signals = signals.reshape(math.prod(x.shape[:-1]), 1, signals.shape[-1])
        left = max(0, -low)
        padding = (left, end - low - left - signals.shape[-1])
        parts.append(conv1d(signals, w[:, None, :], stride=step, padding=padding))
        start = stop
    y = parts[0] if len(parts) == 1 else xp.concatenate(parts, axis=1)
    y = y.swapaxes(-1, -2).reshape(*x.shape[:-1], positions * phases)[..., :length]
    return (y != 0) if result.kind == "b" else y.astype(result, copy=False)


def _extend(x: Any, left: int, right: int, mode: str, cval: float) -> Any:
    """The signals with `left` more samples before and `right` more behind, by the modes of `upfirdn`."""
    xp, L = runtime.array_module(x), x.shape[-1]
    at = np.arange(-left, L + right)
    if mode == "constant":
        inside = xp.asarray((at >= 0) & (at < L))
        return xp.where(inside, x[..., xp.asarray(at.clip(0, L - 1))], xp.asarray(cval).astype(x.dtype))
    if mode == "smooth" and L > 1:
        slopes = x[..., 1] - x[..., 0], x[..., -1] - x[..., -2]
    elif mode == "line" and L > 1:
        slopes = ((x[..., -1] - x[..., 0]) / (L - 1),) * 2
    elif mode in ("smooth", "line"):
        slopes = (xp.zeros_like(x[..., 0]),) * 2
    else:
        return _mirror(xp, x, at, mode)
    dtype = np.result_type(x.dtype, slopes[0].dtype)
    before = x[..., :1] + slopes[0][..., None] * xp.arange(-left, 0).astype(dtype)
    behind = x[..., -1:] + slopes[1][..., None] * xp.arange(1, right + 1).astype(dtype)
    return xp.concatenate((before, x, behind), axis=-1).astype(x.dtype)


def _mirror(xp: ModuleType, x: Any, at: Any, mode: str) -> Any:
    """The samples at these positions of a signal that is extended by a mode that repeats or mirrors it."""
    L = x.shape[-1]
    if mode == "edge":
        return x[..., xp.asarray(at.clip(0, L - 1))]
    if mode == "wrap":
        return x[..., xp.asarray(at % L)]
    whole = mode in ("symmetric", "antisymmetric")  # the first and the last sample are repeated
    if not whole and L == 1:
        return x[..., xp.asarray(np.zeros_like(at))]
    period = 2 * L if whole else 2 * (L - 1)
    turn, place = np.divmod(at, period)
    is_back = place >= L
    place = np.where(is_back, period - (1 if whole else 0) - place, place)
    values = x[..., xp.asarray(place)]
    if mode in ("symmetric", "reflect"):
        return values
    back = xp.asarray(is_back)
    if mode == "antisymmetric":
        return xp.where(back, -values, values)
    # Each extension is the signal rotated by half a turn around its last sample, so it continues the rise from its
    # first to its last sample.
    rise = (x[..., -1:] - x[..., :1]) * xp.asarray(2 * turn).astype(x.dtype)
    return xp.where(back, 2 * x[..., -1:] - values, values) + rise


def _low_pass(taps: int, cutoff: float, window: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A windowed sinc with gain 1 at frequency 0; `cutoff` is a fraction of the Nyquist frequency."""
    name, *parameters = window if isinstance(window, tuple) and window else (window,)
    windows: dict[str, Any] = {"hamming": np.hamming, "hann": np.hanning, "blackman": np.blackman, "boxcar": np.ones}
    if (
        is_one_of(name, ("kaiser",))
        and len(parameters) == 1
        and isinstance(parameters[0], float | np.floating | int | np.integer)
    ):
        weights = np.kaiser(taps, parameters[0])
    elif is_one_of(name, tuple(windows)) and not parameters:
        weights = windows[name](taps)
    else:
        known = f'("kaiser", beta), {", ".join(map(repr, windows))}'
        raise ValueError(f"resample_poly: window must be {known} or an array, got {shown(window)}")
    h = cutoff * np.sinc(cutoff * (np.arange(taps) - (taps - 1) / 2)) * weights
    return np.asarray(h / h.sum())
