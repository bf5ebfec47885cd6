"""The finite filters of scipy.signal along one axis of NumPy or CuPy arrays, computed by gpuconv's convolutions.

Names, arguments, results and errors are SciPy's, with two differences. The functions work along one axis: `convolve`,
`correlate` and `oaconvolve` of arrays with more than one take `axis=`, and their other axes are broadcast. And the
direct method is `gpuconv.conv1d`: on a GPU the bits of a result depend neither on the length nor on other signals.
Integers are exact, and wrap around in the dtype that SciPy gives the result.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import wraps
from types import ModuleType
from typing import Any, ParamSpec, SupportsIndex, TypeVar

import numpy as np

from . import runtime
from .functional import conv1d
from .memory import take
from .problem import DTYPES, INTEGERS

__all__ = ["convolve", "correlate", "decimate_fir", "firfilter", "oaconvolve", "resample_poly", "upfirdn"]

MODES = ("full", "same", "valid")
METHODS = ("auto", "direct", "fft")
EXTENSIONS = (
    "constant", "wrap", "edge", "smooth", "symmetric", "reflect", "antisymmetric", "antireflect", "line"
)  # fmt: skip
_BACKGROUNDS = ("maximum", "mean", "median", "minimum")

# From this many taps on, "auto" takes the FFT: on two CPUs it was the faster one from 512 to 1024 on.
FFT_FROM = 1024

# Where one array is so many times as long as the other it is cut into blocks: transforms of all of it leave the caches.
_BLOCKS_FROM = 16

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _on_the_gpu_of_its_arrays(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function with the GPU of its first CuPy array as the current one, where all that it allocates is to lie."""

    @wraps(function)
    def on_that_gpu(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        arrays = [value for value in (*args, *kwargs.values()) if runtime.is_cupy_array(value)]
        with runtime.current_device_of(arrays[0] if arrays else None):
            return function(*args, **kwargs)

    return on_that_gpu


@_on_the_gpu_of_its_arrays
def convolve(in1: Any, in2: Any, mode: str = "full", method: str = "auto", *, axis: SupportsIndex | None = None) -> Any:
    """Convolve two arrays along one axis, as `scipy.signal.convolve` does.

        out[l] = sum over k of in1[l - k] * in2[k]

    Args:
        in1: NumPy or CuPy, any strides; the axis has L elements.
        in2: of as many axes, those but `axis` broadcast against in1's; the axis has K elements.
        mode: "full" (L + K - 1 elements), "same" (the middle L) or "valid" (those that need no zeros).
        method: "direct", "fft", or "auto", which takes the FFT for long kernels of floating-point numbers.
        axis: may be left out for arrays of one axis.

    Returns:
        An array of the kind of the arguments, of the dtype that NumPy's promotion gives.

    Raises:
        ValueError: shapes, `mode`, `method` or `axis` do not fit.
        TypeError: an argument is no array, or a dtype is not supported.

    Example:
        >>> import numpy as np
        >>> from gpuconv import signal
        >>> signal.convolve(np.array([1, 2, 3]), np.array([0, 1]), "same")
        array([0, 1, 2])
    """
    x, h, place = _operands("convolve", in1, in2, axis)
    _check_one_of("method", method, METHODS)
    if x.ndim == 0:
        return x * h
    if _swap(mode, x.shape[-1], h.shape[-1]):
        x, h = h, x
    return _put_back(_convolve(x, h, mode, _method(method, x, h)), place)


@_on_the_gpu_of_its_arrays
def correlate(
    in1: Any, in2: Any, mode: str = "full", method: str = "auto", *, axis: SupportsIndex | None = None
) -> Any:
    """Cross-correlate two arrays along one axis, as `scipy.signal.correlate` does.

        out[l] = sum over k of in1[k] * conj(in2[k - l + K - 1])

    The arguments, the result and the errors are those of `convolve`.

    Example:
        >>> import numpy as np
        >>> from gpuconv import signal
        >>> signal.correlate(np.array([1, 2, 3]), np.array([0, 1, 0.5]))
        array([0.5, 2. , 3.5, 3. , 0. ])
    """
    x, h, place = _operands("correlate", in1, in2, axis)
    _check_one_of("method", method, METHODS)
    if x.ndim == 0:
        return x * h.conj()
    swapped = _swap(mode, x.shape[-1], h.shape[-1])
    if swapped:
        x, h = h, x
    result = _convolve(x, h[..., ::-1].conj(), mode, _method(method, x, h))
    return _put_back(result[..., ::-1].conj() if swapped else result, place)


@_on_the_gpu_of_its_arrays
def oaconvolve(in1: Any, in2: Any, mode: str = "full", axes: Any = None) -> Any:
    """Convolve by the FFT of overlapping blocks, as `scipy.signal.oaconvolve` does, along one axis.

    The length of a block follows from the shorter array alone. Beside the result it takes the memory of two spectra.

    Args:
        in1: NumPy or CuPy.
        in2: of as many axes, those but the convolved one broadcast against in1's.
        mode: as in `convolve`.
        axes: the axis; may be left out for arrays of one axis.

    Returns, Raises:
        As `convolve`; integers give floating-point numbers.

    Example:
        >>> import numpy as np
        >>> from gpuconv import signal
        >>> signal.oaconvolve(np.arange(4.0), np.ones(2)).round(6)
        array([0., 1., 3., 5., 3.])
    """
    if isinstance(axes, list | tuple):
        if len(axes) != 1:
            raise ValueError(f"oaconvolve: axes must name one axis, got {axes!r}")
        axes = axes[0]
    x, h, place = _operands("oaconvolve", in1, in2, axes)
    if x.ndim == 0:
        return x * h
    if _swap(mode, x.shape[-1], h.shape[-1]):
        x, h = h, x
    L = x.shape[-1]
    if 0 in (L, h.shape[-1]):
        return _put_back(_convolve(x, h, mode, "fft"), place)
    return _put_back(_cut(_overlap_add(x, h), mode, L, min(L, h.shape[-1]), h.shape[-1]), place)


@_on_the_gpu_of_its_arrays
def upfirdn(h: Any, x: Any, up: int = 1, down: int = 1, axis: int = -1, mode: str = "constant", cval: float = 0) -> Any:
    """Insert zeros, filter and keep every `down`-th sample, as `scipy.signal.upfirdn` does, without the work for zeros.

        out[l] = sum over k of h[k] * x[(l*down - k)/up]        (terms whose index is no integer do not exist)

    Args:
        h: the filter's taps, (K,).
        x: the signals along `axis`, of L samples; NumPy or CuPy, any strides.
        up: the upsampling factor.
        down: the downsampling factor.
        axis: of x.
        mode: how x goes on beyond its ends: "constant" (`cval`), "wrap", "edge", "smooth", "symmetric", "reflect",
            "antisymmetric", "antireflect" or "line".
        cval: the constant.

    Returns:
        x's shape with ``((L - 1)*up + K - 1)//down + 1`` samples along the axis, floating-point.

    Raises:
        ValueError: a factor is below 1, h has not one axis or no tap, or the mode is unknown.
        TypeError: an argument is no array, or a dtype is not supported.

    Example:
        >>> import numpy as np
        >>> from gpuconv import signal
        >>> signal.upfirdn(np.array([1.0, 1, 1]), np.array([1.0, 2, 3]), 3)
        array([1., 1., 1., 2., 2., 2., 3., 3., 3.])
    """
    h, x = take("upfirdn", h=h, x=x)
    up, down = operator.index(up), operator.index(down)
    if h.ndim != 1 or h.size == 0:
        raise ValueError("h must be 1-D with non-zero length")
    if up < 1 or down < 1:
        raise ValueError("Both up and down must be >= 1")
    _check_one_of("mode", mode, EXTENSIONS)
    x, place = _axis_last("upfirdn", x, axis)
    L, K = x.shape[-1], h.shape[0]
    if L == 0:
        raise ValueError("x must have samples along the axis")
    wide = np.result_type(_result_type(h, x), np.float32)
    h, x = h.astype(wide if h.dtype.kind == "c" else _real(wide), copy=False), x.astype(wide, copy=False)
    length = ((L - 1) * up + K - 1) // down + 1
    if mode != "constant" or cval != 0:
        # Enough samples before and behind that no window reaches further.
        extra = -(-(K - 1) // up)
        x = _extend(x, extra, extra, mode, cval)
        first = extra * up  # where x's own first sample lies, upsampled
    else:
        first = 0
    return _put_back(_polyphase(h, x, up, down, first, length), place)


@_on_the_gpu_of_its_arrays
def firfilter(b: Any, x: Any, axis: int = -1, zi: Any = None) -> Any:
    """Filter by a finite impulse response: `scipy.signal.lfilter` with ``a = 1``.

    Args:
        b: the taps, (K,), K >= 1.
        x: the signals along `axis`, of L samples; NumPy or CuPy, any strides.
        axis: of x.
        zi: what the samples before x add to the first K - 1 results: x's shape with K - 1 in place of L, or an array
            that broadcasts to it; the `zf` of the call before. None for zeros.

    Returns:
        y, of x's shape; with `zi` the pair (y, zf), where zf is the state behind the last sample.

    Raises:
        ValueError: a shape does not fit.
        TypeError: an argument is no array, or a dtype is not supported.

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
    x, place = _axis_last("firfilter", x, axis)
    L, K = x.shape[-1], b.shape[0]
    if zi is None:
        return _put_back(_convolve(x, b, "full", "direct")[..., :L], place)
    state, _ = _axis_last("firfilter", zi, axis if zi.ndim == x.ndim else -1)
    xp, dtype = runtime.array_module(x), _result_type(x, b, state)
    x, b = x.astype(dtype, copy=False), b.astype(dtype if b.dtype.kind == "c" else _real(dtype), copy=False)
    expected = (*x.shape[:-1], K - 1)
    try:
        state = xp.broadcast_to(state, expected)
    except ValueError:
        raise ValueError(
            f"firfilter: zi must have K - 1 = {K - 1} elements along the axis and broadcast to x, got {tuple(zi.shape)}"
        ) from None
    full = _convolve(x, b, "full", "direct") if L else xp.zeros(expected, dtype)
    full[..., : K - 1] += state
    return _put_back(full[..., :L], place), _put_back(full[..., L:], place)


@_on_the_gpu_of_its_arrays
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
        window: of the filter that is designed: ("kaiser", beta), "hamming", "hann", "blackman" or "boxcar"; or an array
            or a list of taps to take in its place.
        padtype: how x goes on beyond its ends: one of the modes of `upfirdn`, or "maximum", "mean", "median" or
            "minimum", which is taken away before and added afterwards.
        cval: the constant of "constant", 0 where None.

    Returns:
        x's shape with ``ceil(L*up/down)`` samples along the axis, floating-point.

    Raises:
        ValueError: a factor is no integer or below 1; window, padtype or cval does not fit.
        TypeError: x is no array, or a dtype is not supported.

    Example:
        >>> import numpy as np
        >>> from gpuconv import signal
        >>> signal.resample_poly(np.ones(6), 1, 2, padtype="line").round(3)
        array([1., 1., 1.])
    """
    (x,) = take("resample_poly", x=x)
    for name, factor in (("up", up), ("down", down)):
        if factor != int(factor):
            raise ValueError(f"{name} must be an integer")
    up, down = int(up), int(down)
    if up < 1 or down < 1:
        raise ValueError("up and down must be >= 1")
    if cval is not None and padtype != "constant":
        raise ValueError(f"cval has no effect when padtype is {padtype}")
    _check_one_of("padtype", padtype, (*_BACKGROUNDS, *EXTENSIONS))
    common = math.gcd(up, down)
    up, down = up // common, down // common
    if up == down == 1:
        return x.copy()
    xp = runtime.array_module(x)
    inexact = x.dtype if x.dtype.kind in "fcV" else np.dtype(np.float64)
    if isinstance(window, list) or hasattr(window, "ndim"):
        h = xp.asarray(window)
        if h.ndim > 1:
            raise ValueError("window must be 1-D")
        h = h.astype(_result_type(h, xp.empty(0, inexact)))
        half = (h.size - 1) // 2
    else:
        half = 10 * max(up, down)
        h = xp.asarray(_low_pass(2 * half + 1, 1 / max(up, down), window).astype(_real(inexact)))
    h = h * h.dtype.type(up)
    signals, place = _axis_last("resample_poly", x.astype(inexact, copy=False), axis)
    background = None
    if padtype in _BACKGROUNDS:
        measure = {"maximum": xp.max, "mean": xp.mean, "median": xp.median, "minimum": xp.min}[padtype]
        background = measure(signals, axis=-1, keepdims=True)
        signals = signals - background
        padtype = "constant"
    signals = signals.astype(_result_type(h, signals), copy=False)
    L = signals.shape[-1]
    length = -(-L * up // down)
    # Output l lies at the filter's middle: it is result l + (half + pre)/down of a filter that begins with `pre` zeros.
    first = half
    if padtype != "constant" or cval:
        extra = -(-(h.size - 1) // up)
        signals = _extend(signals, extra, extra, padtype, 0 if cval is None else cval)
        first += extra * up
    y = _polyphase(h, signals, up, down, first, length)
    return _put_back(y if background is None else y + background, place)


@_on_the_gpu_of_its_arrays
def decimate_fir(x: Any, q: int, n: int | None = None, axis: int = -1, zero_phase: bool = True) -> Any:
    """Low-pass filter and keep every q-th sample: `scipy.signal.decimate` with ``ftype="fir"``.

    Args:
        x: the signals along `axis`; NumPy or CuPy, any strides. Integers and float16 are computed in float64.
        q: the downsampling factor.
        n: the order of the filter, a Hamming window with n + 1 taps; 20*q where None.
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
    q = operator.index(q)
    n = 20 * q if n is None else operator.index(n)
    if q < 2 or n < 0:
        raise ValueError(f"decimate_fir: q must be at least 2 and n at least 0, got q = {q} and n = {n}")
    dtype = x.dtype if x.dtype.kind in "fc" and x.dtype != np.float16 else np.dtype(np.float64)
    taps = runtime.array_module(x).asarray(_low_pass(n + 1, 1 / q, "hamming").astype(_real(dtype)))
    x = x.astype(dtype, copy=False)
    if zero_phase:
        return resample_poly(x, 1, q, axis=axis, window=taps)
    signals, place = _axis_last("decimate_fir", x, axis)
    return _put_back(_polyphase(taps, signals, 1, q, 0, -(-signals.shape[-1] // q)), place)


def _check_one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _axis_last(caller: str, array: Any, axis: SupportsIndex) -> tuple[Any, int]:
    """The array with an axis moved to the end, and where it was, counted from the end."""
    index = operator.index(axis)
    if not -array.ndim <= index < array.ndim:
        raise ValueError(f"{caller}: axis {index} does not exist in an array of shape {tuple(array.shape)}")
    index = index - array.ndim if index >= 0 else index
    return runtime.array_module(array).moveaxis(array, index, -1), index


def _put_back(array: Any, place: int) -> Any:
    return runtime.array_module(array).moveaxis(array, -1, place) if place != -1 else array


def _operands(caller: str, in1: Any, in2: Any, axis: SupportsIndex | None) -> tuple[Any, Any, int]:
    """The two arrays with the axis at the end, and where it was."""
    in1, in2 = take(caller, in1=in1, in2=in2)
    if in1.ndim != in2.ndim:
        raise ValueError("volume and kernel should have the same dimensionality")
    if in1.ndim == 0:
        return in1, in2, -1
    if axis is None and in1.ndim > 1:
        raise ValueError(f"{caller}: axis must be given for arrays of {in1.ndim} axes; gpuconv.signal works along one")
    x, place = _axis_last(caller, in1, -1 if axis is None else axis)
    return x, _axis_last(caller, in2, place)[0], place


def _swap(mode: str, L: int, K: int) -> bool:
    """Whether "valid" needs the arrays the other way round."""
    _check_one_of("mode", mode, MODES)
    return mode == "valid" and K > L


def _method(method: str, x: Any, h: Any) -> str:
    if method != "auto":
        return method
    is_long = min(x.shape[-1], h.shape[-1]) >= FFT_FROM
    return "fft" if is_long and _result_type(x, h).kind in "fc" else "direct"


def _result_type(*arrays: Any) -> np.dtype[Any]:
    return np.result_type(*(array.dtype for array in arrays))


def _real(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of the real part."""
    return np.empty(0, dtype).real.dtype


def _convolve(x: Any, h: Any, mode: str, method: str) -> Any:
    """The convolution along the last axis; the others are broadcast."""
    L, K = x.shape[-1], h.shape[-1]
    shape = np.broadcast_shapes(x.shape[:-1], h.shape[:-1])
    if 0 in (L, K, *shape):
        return runtime.array_module(x).zeros(
            (*shape, 0) if 0 in (L, K) else (*shape, _length(mode, L, K)), _result_type(x, h)
        )
    if method == "fft":
        result = _cut(_by_fft(x, h), mode, L, min(L, K), K)
        dtype = _result_type(x, h)
        return (result.round() if dtype.kind in "iub" else result).astype(dtype)
    padding = {"full": (K - 1, K - 1), "same": (K - 1 - (K - 1) // 2, (K - 1) // 2), "valid": (0, 0)}[mode]
    return _filter(x, h[..., ::-1], padding, 1)


def _length(mode: str, L: int, K: int) -> int:
    return {"full": L + K - 1, "same": L, "valid": L - K + 1}[mode]


def _cut(full: Any, mode: str, L: int, shortest: int, K: int) -> Any:
    """Of a full result the part that a mode wants, where in1 has L elements and in2 has K."""
    if mode == "valid":
        return full[..., shortest - 1 : max(L, K)]
    start = (K - 1) // 2 if mode == "same" else 0
    return full[..., start : start + _length(mode, L, K)]


def _filter(x: Any, w: Any, padding: tuple[int, int], stride: int) -> Any:
    """conv1d of the last axis with taps of their own for each signal, in the dtype that NumPy's promotion gives."""
    xp, result = runtime.array_module(x), _result_type(x, w)
    x, w = computable(x, w)
    rank = max(x.ndim, w.ndim)
    x, w = (a.reshape((1,) * (rank - a.ndim) + a.shape) for a in (x, w))
    # Signals with the same taps are samples, others are groups.
    own = [axis for axis in range(rank - 1) if w.shape[axis] > 1]
    shared = [axis for axis in range(rank - 1) if w.shape[axis] == 1]
    extents = np.broadcast_shapes(x.shape[:-1], w.shape[:-1])
    x = xp.broadcast_to(x, (*(extents[a] if a in own else x.shape[a] for a in range(rank - 1)), x.shape[-1]))
    order = [*shared, *own, rank - 1]
    groups = math.prod(extents[axis] for axis in own)
    signals = x.transpose(order).reshape(-1, groups, x.shape[-1])
    taps = w.transpose(order).reshape(groups, 1, w.shape[-1])
    y = conv1d(signals, taps, stride=stride, padding=padding, groups=groups)
    y = y.reshape(*(extents[axis] for axis in order[:-1]), y.shape[-1]).transpose(np.argsort(order).tolist())
    return (y != 0) if result.kind == "b" else y.astype(result, copy=False)


def computable(x: Any, w: Any) -> tuple[Any, Any]:
    """The arrays in dtypes that conv1d takes, which give the result of NumPy's promotion once it is cast to that."""
    result = _result_type(x, w)
    if result.kind in "iub":
        # Sums modulo 2**64 have the low bits of sums of any narrower or unsigned dtype.
        name = (
            result.name if result.name in INTEGERS else {"bool": "uint8", "uint16": "int32"}.get(result.name, "int64")
        )
        return x.astype(name, copy=False), w.astype(name, copy=False)
    if result.name not in DTYPES:
        raise TypeError(f"gpuconv.signal: the dtype {result} is not supported")
    taps = _real(result) if result.kind == "c" and w.dtype.kind != "c" else result
    return x.astype(result, copy=False), w.astype(taps, copy=False)


def _polyphase(h: Any, x: Any, up: int, down: int, first: int, length: int) -> Any:
    """``y[l] = sum over k of h[k] * x[(l*down + first - k)/up]`` for l < length, over the terms that exist.

    Each of the ``up/gcd`` phases of l is an output channel of one convolution, whose taps are those that meet samples.
    """
    xp = runtime.array_module(x)
    common = math.gcd(up, down)
    phases, step = up // common, down // common
    # Output l = q*phases + r reads x[q*step + i] with the tap k = r*down + first - i*up.
    ends = [(-(-(r * down + first - (h.size - 1)) // up), (r * down + first) // up) for r in range(phases)]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    taps = np.array([[r * down + first - i * up for i in range(low, high + 1)] for r in range(phases)])
    exists = (taps >= 0) & (taps < h.size)
    w = xp.where(xp.asarray(exists), h[xp.asarray(np.where(exists, taps, 0))], xp.zeros((), h.dtype))
    positions = -(-length // phases)
    # The window of output q begins at q*step + low, before x or in it, and the last one may end behind x.
    L = x.shape[-1]
    left = max(0, -low)
    right = max(0, (positions - 1) * step + high + 1 - L)
    result = _result_type(x, h)
    signals, w = computable(x[..., max(0, low) :], w)
    y = conv1d(signals.reshape(-1, 1, signals.shape[-1]), w[:, None, :], stride=step, padding=(left, right))
    y = y[..., :positions].swapaxes(-1, -2).reshape(*x.shape[:-1], positions * phases)[..., :length]
    return (y != 0) if result.kind == "b" else y.astype(result, copy=False)


def _extend(x: Any, left: int, right: int, mode: str, cval: float) -> Any:
    """The signals with so many more samples before and behind, by the modes of `upfirdn`."""
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
    """The samples that positions mean in a mode that repeats or mirrors the signal."""
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
    # Each passage turns the signal by half a circle around its last sample, so the ends rise by their distance.
    rise = (x[..., -1:] - x[..., :1]) * xp.asarray(2 * turn).astype(x.dtype)
    return xp.where(back, 2 * x[..., -1:] - values, values) + rise


def _low_pass(taps: int, cutoff: float, window: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A windowed sinc with gain 1 at frequency 0; `cutoff` is a fraction of the Nyquist frequency."""
    name, *parameters = window if isinstance(window, tuple) else (window,)
    windows: dict[str, Any] = {"hamming": np.hamming, "hann": np.hanning, "blackman": np.blackman, "boxcar": np.ones}
    if name == "kaiser" and len(parameters) == 1:
        weights = np.kaiser(taps, parameters[0])
    elif name in windows and not parameters:
        weights = windows[name](taps)
    else:
        raise ValueError(
            f'window must be ("kaiser", beta), {", ".join(map(repr, windows))} or an array, got {window!r}'
        )
    h = cutoff * np.sinc(cutoff * (np.arange(taps) - (taps - 1) / 2)) * weights
    return np.asarray(h / h.sum())


def _fast_length(at_least: int) -> int:
    """The smallest product of powers of 2, 3 and 5 from a number on, which FFTs like."""
    best = 1 << (at_least - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            best = min(best, three << max(0, -(-at_least // three) - 1).bit_length())
            three *= 3
        five *= 5
    return best


def _transforms(x: Any, h: Any) -> tuple[Any, Any, Any, Any]:
    """The arrays in dtypes that FFTs take, and the transform with its inverse."""
    xp = runtime.array_module(x)
    wide = np.result_type(*(np.float64 if a.dtype.kind in "iub" else a.dtype for a in (x, h)), np.float32)
    if wide.name not in DTYPES:
        raise TypeError(f"gpuconv.signal: the dtype {_result_type(x, h)} is not supported")
    pair = (xp.fft.fft, xp.fft.ifft) if wide.kind == "c" else (xp.fft.rfft, xp.fft.irfft)
    return x.astype(wide, copy=False), h.astype(wide, copy=False), *pair


def _by_fft(x: Any, h: Any) -> Any:
    """The full convolution through transforms, in the precision of the data, float32 at least."""
    if max(x.shape[-1], h.shape[-1]) > _BLOCKS_FROM * min(x.shape[-1], h.shape[-1]):
        return _overlap_add(x, h)
    x, h, forward, inverse = _transforms(x, h)
    full = x.shape[-1] + h.shape[-1] - 1
    size = _fast_length(full)
    return inverse(forward(x, size) * forward(h, size), size)[..., :full]


def _overlap_add(x: Any, h: Any) -> Any:
    """The full convolution of blocks whose length follows from the shorter array."""
    x, h, forward, inverse = _transforms(*((h, x) if h.shape[-1] > x.shape[-1] else (x, h)))
    xp, L, K = runtime.array_module(x), x.shape[-1], h.shape[-1]
    size = _fast_length(max(64, 8 * K))
    step = size - K + 1
    blocks = -(-L // step)
    whole = xp.zeros((*x.shape[:-1], blocks * step), x.dtype)
    whole[..., :L] = x
    spectra = forward(whole.reshape(*x.shape[:-1], blocks, step), size) * forward(h, size)[..., None, :]
    parts = inverse(spectra, size)
    full = xp.zeros((*parts.shape[:-2], (blocks + 1) * step), parts.dtype)
    full[..., : blocks * step] = parts[..., :step].reshape(*parts.shape[:-2], -1)
    tails = full[..., step:].reshape(*parts.shape[:-2], blocks, step)
    tails[..., : K - 1] += parts[..., step:]
    return full[..., : L + K - 1]
