"""Convolution and correlation along one axis."""

from __future__ import annotations

import math
from typing import Any, SupportsIndex

import numpy as np

from .. import runtime
from ..functional import conv1d
from ..text import shown
from .arrays import axis_last, check_one_of, computable, on_the_gpu_of_its_arrays, put_back, result_type, take
from .fft import by_fft, floating

MODES = ("full", "same", "valid")

METHODS = ("auto", "direct", "fft")

# The fewest taps for which "auto" uses the FFT: on two CPUs it became faster between 512 and 1024 taps.
FFT_FROM = 1024

# From this ratio of lengths on, the longer array is cut into blocks: transforms of all of it would not fit the caches.
_BLOCKS_FROM = 16


@on_the_gpu_of_its_arrays
def convolve(in1: Any, in2: Any, mode: str = "full", method: str = "auto", *, axis: SupportsIndex | None = None) -> Any:
    """Convolve two arrays along one axis, as `scipy.signal.convolve` does.

        out[l] = sum over k of in1[l - k] * in2[k]

    Args:
        in1: NumPy or CuPy, any strides; the axis has L elements.
        in2: with as many axes; all but `axis` are broadcast against in1's. The axis has K elements.
        mode: "full" (L + K - 1 elements), "same" (the middle L) or "valid" (those that need no zeros).
        method: "direct", "fft", or "auto", which uses the FFT for long kernels of floating-point numbers.
        axis: may be left out for arrays of one axis.

    Returns:
        An array of the kind of the arguments, in the dtype of NumPy's promotion.

    Raises:
        ValueError: shapes, `mode`, `method` or `axis` do not fit.
        TypeError: an argument is not an array, or a dtype is not supported.

    Example:
        >>> import numpy as np
        >>> from gpuconv import signal
        >>> signal.convolve(np.array([1, 2, 3]), np.array([0, 1]), "same")
        array([0, 1, 2])
    """
    x, h, place = _operands("convolve", in1, in2, axis)
    check_one_of("convolve", "method", method, METHODS)
    if x.ndim == 0:
        return x * h
    if _swap("convolve", mode, x.shape[-1], h.shape[-1]):
        x, h = h, x
    return put_back(convolve_last_axis(x, h, mode, _method(method, x, h)), place)


@on_the_gpu_of_its_arrays
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
    check_one_of("correlate", "method", method, METHODS)
    if x.ndim == 0:
        return x * h.conj()
    swapped = _swap("correlate", mode, x.shape[-1], h.shape[-1])
    if swapped:
        x, h = h, x
    result = convolve_last_axis(x, h[..., ::-1].conj(), mode, _method(method, x, h))
    return put_back(result[..., ::-1].conj() if swapped else result, place)


@on_the_gpu_of_its_arrays
def oaconvolve(in1: Any, in2: Any, mode: str = "full", axes: Any = None) -> Any:
    """Convolve by the FFT of overlapping blocks, as `scipy.signal.oaconvolve` does, along one axis.

    This is `gpuconv.conv1d` with ``algorithm="fft"``: the length of a block follows from the shorter array alone.

    Args:
        in1: NumPy or CuPy.
        in2: with as many axes; all but the convolved one are broadcast against in1's.
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
            raise ValueError(f"oaconvolve: axes must name one axis, got {shown(axes)}")
        axes = axes[0]
    x, h, place = _operands("oaconvolve", in1, in2, axes)
    if x.ndim == 0:
        return x * h
    if _swap("oaconvolve", mode, x.shape[-1], h.shape[-1]):
        x, h = h, x
    L, K = x.shape[-1], h.shape[-1]
    if 0 in (L, K, *np.broadcast_shapes(x.shape[:-1], h.shape[:-1])):
        return put_back(convolve_last_axis(*floating(x, h), mode, "fft"), place)
    return put_back(_cut(_in_blocks(x, h), mode, L, min(L, K), K), place)


def _operands(caller: str, in1: Any, in2: Any, axis: SupportsIndex | None) -> tuple[Any, Any, int]:
    """The two arrays with the axis moved to the end, and its former place."""
    in1, in2 = take(caller, in1=in1, in2=in2)
    got = f"got shapes {tuple(in1.shape)} and {tuple(in2.shape)}"
    if in1.ndim != in2.ndim:
        raise ValueError(f"{caller}: in1 and in2 must have the same number of axes, {got}")
    if in1.ndim == 0:
        return in1, in2, -1
    if axis is None and in1.ndim > 1:
        name = "axes" if caller == "oaconvolve" else "axis"
        raise ValueError(
            f"{caller}: {name} must be given for arrays of {in1.ndim} axes; gpuconv.signal works along one"
        )
    x, place = axis_last(caller, in1, -1 if axis is None else axis)
    h = axis_last(caller, in2, place)[0]
    try:
        np.broadcast_shapes(x.shape[:-1], h.shape[:-1])
    except ValueError:
        raise ValueError(f"{caller}: all axes of in1 and in2 but the convolved one must broadcast, {got}") from None
    return x, h, place


def _swap(caller: str, mode: str, L: int, K: int) -> bool:
    """Whether "valid" needs the arrays swapped."""
    check_one_of(caller, "mode", mode, MODES)
    return mode == "valid" and K > L


def _method(method: str, x: Any, h: Any) -> str:
    if method != "auto":
        return method
    is_long = min(x.shape[-1], h.shape[-1]) >= FFT_FROM
    return "fft" if is_long and result_type(x, h).kind in "fc" else "direct"


def convolve_last_axis(x: Any, h: Any, mode: str, method: str) -> Any:
    """The convolution along the last axis; the others are broadcast."""
    L, K = x.shape[-1], h.shape[-1]
    shape = np.broadcast_shapes(x.shape[:-1], h.shape[:-1])
    if 0 in (L, K, *shape):
        return runtime.array_module(x).zeros(
            (*shape, 0) if 0 in (L, K) else (*shape, _length(mode, L, K)), result_type(x, h)
        )
    if method == "fft":
        full = _in_blocks(x, h) if max(L, K) > _BLOCKS_FROM * min(L, K) else by_fft(x, h)
        result = _cut(full, mode, L, min(L, K), K)
        dtype = result_type(x, h)
        return (result.round() if dtype.kind in "iub" else result).astype(dtype)
    padding = {"full": (K - 1, K - 1), "same": (K - 1 - (K - 1) // 2, (K - 1) // 2), "valid": (0, 0)}[mode]
    return _filter(x, h[..., ::-1], padding, 1)


def _length(mode: str, L: int, K: int) -> int:
    return {"full": L + K - 1, "same": L, "valid": L - K + 1}[mode]


def _cut(full: Any, mode: str, L: int, shortest: int, K: int) -> Any:
    """The part of a full result for a mode, where in1 has L elements and in2 has K."""
    if mode == "valid":
        return full[..., shortest - 1 : max(L, K)]
    start = (K - 1) // 2 if mode == "same" else 0
    return full[..., start : start + _length(mode, L, K)]


def _in_blocks(x: Any, h: Any) -> Any:
    """The full convolution through the FFT of blocks whose length follows from the shorter array."""
    x, h = floating(*((h, x) if h.shape[-1] > x.shape[-1] else (x, h)))
    edge = h.shape[-1] - 1
    return _filter(x, h[..., ::-1], (edge, edge), 1, "fft")


def _filter(x: Any, w: Any, padding: tuple[int, int], stride: int, algorithm: str | None = None) -> Any:
    """conv1d of the last axis, with taps that may differ between signals, in the dtype of NumPy's promotion."""
    xp, result = runtime.array_module(x), result_type(x, w)
    x, w = computable(x, w)
    rank = max(x.ndim, w.ndim)
    x, w = (a.reshape((1,) * (rank - a.ndim) + a.shape) for a in (x, w))
    # Signals with the same taps become samples, others groups.
    own = [axis for axis in range(rank - 1) if w.shape[axis] > 1]
    shared = [axis for axis in range(rank - 1) if w.shape[axis] == 1]
    extents = np.broadcast_shapes(x.shape[:-1], w.shape[:-1])
    x = xp.broadcast_to(x, (*(extents[a] if a in own else x.shape[a] for a in range(rank - 1)), x.shape[-1]))
    order = [*shared, *own, rank - 1]
    groups = math.prod(extents[axis] for axis in own)
    signals = x.transpose(order).reshape(-1, groups, x.shape[-1])
    taps = w.transpose(order).reshape(groups, 1, w.shape[-1])
    y = conv1d(signals, taps, stride=stride, padding=padding, groups=groups, algorithm=algorithm)
    y = y.reshape(*(extents[axis] for axis in order[:-1]), y.shape[-1]).transpose(np.argsort(order).tolist())
    return (y != 0) if result.kind == "b" else y.astype(result, copy=False)
