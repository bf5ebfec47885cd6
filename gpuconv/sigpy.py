"""sigpy's convolution of arrays with one to three axes, and its two adjoints, for NumPy and CuPy arrays.

Names, arguments, shapes and dtypes are those of sigpy.conv; sigpy itself is not needed.

The last axis is convolved by `gpuconv.conv1d`. The axes before it are rows: one padded array holds the rows of all data
one after another, so that the rows of a window have equal distances and are channels of a strided view. Windows that
begin in one item of data and end in the next are also computed, and then dropped. With two outer axes, the results for
the taps of the first one are added, in the dtype of the data. With strides, the rows and taps whose index has the same
remainder are one convolution, and the results of all remainders are added. On a GPU the bits of an element of
`convolve` and of the data's adjoint depend on the filter and the strides, not on the extents of the data or on other
data. An infinite tap times a zero between the rows gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np

from . import grad, runtime
from .arguments import check_int, is_one_of
from .functional import conv1d, conv_transpose1d
from .signal.arrays import computable, take
from .text import shown

__all__ = ["convolve", "convolve_data_adjoint", "convolve_filter_adjoint"]

Shape = Sequence[SupportsIndex]


def convolve(
    data: Any, filt: Any, mode: str = "full", strides: Shape | None = None, multi_channel: bool = False
) -> Any:
    """Convolve along the last D axes, 1 <= D <= 3, as `sigpy.convolve` does.

        output[..., c_o, p] = sum over c_i, k of filt[c_o, c_i, k] * data[..., c_i, p*stride + offset - k]

    where p, k, stride and offset have D components. In mode "full" offset is 0, in "valid" min(m, n) - 1.

    Args:
        data: (..., m_1, ..., m_D), or (..., c_i, m_1, ..., m_D) with channels. NumPy or CuPy, any strides.
        filt: (n_1, ..., n_D), or (c_o, c_i, n_1, ..., n_D) with channels.
        mode: "full", m + n - 1 results along an axis, or "valid", the |m - n| + 1 results that need no zeros.
        strides: D integers: every stride-th result is kept, beginning with the first. None for 1.
        multi_channel: whether the arrays have axes of channels.

    Returns:
        (..., p_1, ..., p_D), or (..., c_o, p_1, ..., p_D) with channels, of the dtype of `data`. It may be a strided
        view.

    Raises:
        ValueError: a shape, `mode` or `strides` does not fit; in "valid" data or filter must be at least as large as
            the other in every axis.
        TypeError: an argument is not an array, a dtype is not supported, or the filter's dtype is of a higher kind than
            the data's: complex with real data, or floating-point with integers.

    Example:
        >>> import numpy as np
        >>> from gpuconv import sigpy
        >>> sigpy.convolve(np.eye(3), np.array([[1.0, 2.0], [3.0, 4.0]]), strides=(1, 2))
        array([[1., 0.],
               [3., 2.],
               [0., 5.],
               [0., 3.]])
    """
    data, filt = take("convolve", data=data, filt=filt)
    p = _Problem.of("convolve", data.shape, filt.shape, mode, strides, multi_channel)
    with runtime.current_device_of(data), np.errstate(all="ignore"):
        return _convolve(p, data, filt, _result_type("convolve", data, filt))


def convolve_data_adjoint(
    output: Any,
    filt: Any,
    data_shape: Shape,
    mode: str = "full",
    strides: Shape | None = None,
    multi_channel: bool = False,
) -> Any:
    """Apply the adjoint of `convolve` with respect to the data, as `sigpy.convolve_data_adjoint` does.

        data[..., c_i, q] = sum over c_o, p, k of conj(filt[c_o, c_i, k]) * output[..., c_o, p]
        q = p*stride + offset - k        (terms without such a q do not exist)

    `output` has the shape that `convolve` returns. The result has the shape of the data and the dtype of `output`. The
    other arguments and the errors are those of `convolve`.

    Example:
        >>> import numpy as np
        >>> from gpuconv import sigpy
        >>> sigpy.convolve_data_adjoint(np.array([1.0, 0.0, 10.0]), np.array([1.0, 2.0]), (2,))
        array([ 1., 20.])
    """
    output, filt = take("convolve_data_adjoint", output=output, filt=filt)
    p = _Problem.of("convolve_data_adjoint", data_shape, filt.shape, mode, strides, multi_channel, output.shape)
    with runtime.current_device_of(output), np.errstate(all="ignore"):
        return _data_adjoint(p, output, filt, _result_type("convolve_data_adjoint", output, filt))


def convolve_filter_adjoint(
    output: Any,
    data: Any,
    filt_shape: Shape,
    mode: str = "full",
    strides: Shape | None = None,
    multi_channel: bool = False,
) -> Any:
    """Apply the adjoint of `convolve` with respect to the filter, as `sigpy.convolve_filter_adjoint` does.

        filt[c_o, c_i, k] = sum over ..., p of conj(data[..., c_i, p*stride + offset - k]) * output[..., c_o, p]

    `output` has the shape that `convolve` returns. The result has the shape of the filter and the dtype of `output`.
    The other arguments and the errors are those of `convolve`.

    Example:
        >>> import numpy as np
        >>> from gpuconv import sigpy
        >>> sigpy.convolve_filter_adjoint(np.array([1.0, 0.0, 10.0]), np.array([1.0, 2.0]), (2,))
        array([ 1., 20.])
    """
    output, data = take("convolve_filter_adjoint", output=output, data=data)
    p = _Problem.of("convolve_filter_adjoint", data.shape, filt_shape, mode, strides, multi_channel, output.shape)
    with runtime.current_device_of(output), np.errstate(all="ignore"):
        return _filter_adjoint(p, output, data, _result_type("convolve_filter_adjoint", output, data))


@dataclass(frozen=True, slots=True)
class _Phase:
    """Rows and taps of the outer axes whose indices have the same remainder modulo the stride.

    Attributes:
        taps: the index of the taps, in an array of flipped filters.
        data: the index of the data whose padded rows have the remainder.
        first: which of these padded rows holds the first data, for each outer axis.
    """

    taps: tuple[Any, ...]
    data: tuple[Any, ...]
    first: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Problem:
    """The arrays with all their axes, and how rows lie one after another.

    Attributes:
        data_shape, filt_shape, output_shape: those of the public function's arrays.
        data, filt, output: the same as (B, c_i, m_1, m_2, m_3), (c_o, c_i, n_1, n_2, n_3) and (B, c_o, p_1, p_2, p_3);
            absent axes have one element and come first.
        steps: the strides along the three axes.
        padding: the zeros before and behind the data.
        period: along the outer axes, the number of windows from the first one of an item to that of the next. The zeros
            behind one item are also those before the next.
    """

    data_shape: tuple[int, ...]
    filt_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    data: tuple[int, ...]
    filt: tuple[int, ...]
    output: tuple[int, ...]
    steps: tuple[int, ...]
    padding: tuple[int, ...]
    period: tuple[int, ...]

    @classmethod
    def of(
        cls,
        caller: str,
        data_shape: Shape,
        filt_shape: Shape,
        mode: str,
        strides: Shape | None,
        multi_channel: bool,
        given: Shape | None = None,
    ) -> _Problem:
        """Check the shapes and make the problem; `given` is the shape of the output if the caller has one."""
        outer, taps = _ints(caller, "data_shape", data_shape), _ints(caller, "filt_shape", filt_shape)
        D = len(taps) - (2 if multi_channel else 0)
        if not 1 <= D <= 3:
            raise ValueError(f"{caller}: 1, 2 or 3 axes can be convolved, got {D} with a filter of shape {taps}")
        lead = len(outer) - D - (1 if multi_channel else 0)
        if lead < 0:
            raise ValueError(f"{caller}: data must have {len(outer) - lead} axes or more, got the shape {outer}")
        c_o, c_i = taps[:2] if multi_channel else (1, 1)
        if multi_channel and outer[lead] != c_i:
            raise ValueError(f"{caller}: Data channel mismatch, got {outer[lead]} from data and {c_i} from filt.")
        given_steps = (1,) * D if strides is None else _ints(caller, "strides", strides)
        if len(given_steps) != D:
            raise ValueError(f"{caller}: Strides must have length {D}.")
        absent = (1,) * (3 - D)
        m, n = (*absent, *outer[-D:]), (*absent, *taps[-D:])
        steps = (*absent, *given_steps)
        if min(*m, *n, *steps) < 1:
            raise ValueError(
                f"{caller}: extents and strides must be 1 or more, got data {outer}, filter {taps}, strides {strides}"
            )
        if not is_one_of(mode, ("full", "valid")):
            raise ValueError(f"{caller}: Invalid mode, got {mode if isinstance(mode, str) else shown(mode)}")
        axes = tuple(zip(m, n, steps, strict=True))
        if mode == "valid" and any(a > b for a, b, _ in axes) and any(a < b for a, b, _ in axes):
            raise ValueError(
                f"{caller}: In valid mode, either data or filter must be at least as large as the other in every axis."
            )
        padding = tuple(b - 1 if mode == "full" else max(0, b - a) for a, b, _ in axes)
        p = tuple((a + 2 * pad - b) // s + 1 for (a, b, s), pad in zip(axes, padding, strict=True))
        output = (*outer[:lead], *((c_o,) if multi_channel else ()), *p[-D:])
        if given is not None and tuple(given) != output:
            raise ValueError(f"{caller}: output must have the shape {output}, got {tuple(given)}")
        # No window of an item reaches the data of the next: it ends before (p - 1)*s + n <= m + 2*pad.
        period = tuple(-(-(a + pad) // s) for (a, _, s), pad in zip(axes, padding, strict=True))
        B = math.prod(outer[:lead])
        return cls(outer, taps, output, (B, c_i, *m), (c_o, c_i, *n), (B, c_o, *p), steps, padding, period[:2])

    @property
    def is_empty(self) -> bool:
        """Whether all sums are empty, or there are none."""
        return 0 in (*self.filt, self.data[0])

    @property
    def windows(self) -> int:
        """The number of consecutive windows that contain the windows of all items."""
        return self.span(self.output)

    def span(self, shape: tuple[int, ...]) -> int:
        """The number of rows from the first to the last of all items of this shape."""
        return ((shape[0] - 1) * self.period[0] + shape[2] - 1) * self.period[1] + shape[3]

    def phases(self) -> Iterator[_Phase]:
        """The phases that have taps."""
        for r in np.ndindex(*(min(s, n) for s, n in zip(self.steps[:2], self.filt[2:4], strict=True))):
            begin = [(of - pad) % s for of, pad, s in zip(r, self.padding, self.steps, strict=False)]
            first = [(of + pad) // s for of, pad, s in zip(begin, self.padding, self.steps, strict=False)]
            taps, data = (
                (slice(None), slice(None), *(slice(of, None, s) for of, s in zip(at, self.steps, strict=False)))
                for at in (r, begin)
            )
            yield _Phase(taps, data, (first[0], first[1]))

    def rows(self, array: Any, first: tuple[int, int], before: int, behind: int) -> Any:
        """The rows of all items one after another, (rows, channels, elements), with zeros between them.

        Args:
            array: (B, channels, rows of two axes, elements).
            first: the place of each item's first row in its period.
            before: the rows of zeros before all items.
            behind: the rows of zeros behind all items.
        """
        items = array.transpose(0, 2, 3, 1, 4)
        B, e_1, e_2, *element = items.shape
        if (before, behind, e_1, e_2) == (0, 0, *self.period):
            return items.reshape(-1, *element)
        count = B * self.period[0] * self.period[1]
        rows = runtime.array_module(array).zeros((before + count + behind, *element), array.dtype)
        places = rows[before : before + count].reshape(B, *self.period, *element)
        places[:, first[0] : first[0] + e_1, first[1] : first[1] + e_2] = items
        return rows

    def data_rows(self, data: Any, phase: _Phase, taps: tuple[int, ...]) -> Any:
        """The rows of a phase, followed by as many zeros as the last windows need."""
        reach = self.windows + (taps[2] - 1) * self.period[1] + taps[3] - 1
        behind = max(0, reach - self.data[0] * self.period[0] * self.period[1])
        return self.rows(data[phase.data], phase.first, 0, behind)

    def items(self, rows: Any, shape: tuple[int, ...]) -> Any:
        """A view of rows as items of this shape, with channels second; the rows begin with the first item."""
        B, c, e_1, e_2, elements = shape
        step, *inner = rows.strides
        outer = step * self.period[0] * self.period[1], step * self.period[1], step
        view = _view(rows, (B, e_1, e_2, c, elements), (*outer, *inner))
        return view.transpose(0, 3, 1, 2, 4)


def _view(array: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    return runtime.array_module(array).lib.stride_tricks.as_strided(array, shape, strides)


def _windows(rows: Any, first: int, count: int, taps: int) -> Any:
    """Overlapping windows of rows as channels, (count, taps*channels, elements), as a view."""
    _, channels, elements = rows.shape
    row, channel, element = rows.strides
    if channels > 1 and taps > 1 and row != channels * channel:
        rows = runtime.array_module(rows).ascontiguousarray(rows)
        row, channel, element = rows.strides
    shape = (count, taps * channels, elements)
    return _view(rows[first:], shape, (row, channel if channels > 1 else row, element))


def _as_channels(taps: Any) -> Any:
    """(c_o, c_i, n, K) as (c_o, n*c_i, K), which fits `_windows`."""
    c_o, c_i, n, K = taps.shape
    return taps.swapaxes(1, 2).reshape(c_o, n * c_i, K)


def _add(sums: Any, part: Any) -> Any:
    sums += part
    return sums


def _ints(caller: str, name: str, values: Shape) -> tuple[int, ...]:
    if not isinstance(values, Sequence) and getattr(values, "ndim", 0) != 1:
        raise TypeError(f"{caller}: {name} must be a sequence of ints, got {type(values).__name__} {shown(values)}")
    return tuple(check_int(caller, f"each of {name}", value, "an int") for value in values)


def _result_type(caller: str, first: Any, second: Any) -> Any:
    """The first array's dtype in native byte order, to which the results with the second must be castable."""
    if not np.can_cast(np.result_type(first.dtype, second.dtype), first.dtype, "same_kind"):
        raise TypeError(f"{caller}: results of {first.dtype} and {second.dtype} cannot be cast to {first.dtype}")
    return first.dtype.newbyteorder("=")


def _convolve(p: _Problem, data: Any, filt: Any, dtype: Any) -> Any:
    if p.is_empty:
        return runtime.array_module(data).zeros(p.output_shape, dtype)
    x, w = computable(data.reshape(p.data), filt.reshape(p.filt))
    w = w[..., ::-1, ::-1, ::-1]
    y: Any = None
    for phase in p.phases():
        taps = w[phase.taps]
        rows = p.data_rows(x, phase, taps.shape)
        for a in range(taps.shape[2]):
            windows = _windows(rows, a * p.period[1], p.windows, taps.shape[3])
            part = conv1d(windows, _as_channels(taps[:, :, a]), stride=p.steps[2], padding=p.padding[2])
            y = part if y is None else _add(y, part)
    return p.items(y, p.output).reshape(p.output_shape).astype(dtype, copy=False)


def _data_adjoint(p: _Problem, output: Any, filt: Any, dtype: Any) -> Any:
    data = runtime.array_module(output).zeros(p.data, dtype)
    if p.is_empty:
        return data.reshape(p.data_shape)
    y, w = computable(output.reshape(p.output), filt.reshape(p.filt).conj())
    w = w[..., ::-1, ::-1, ::-1]
    before = (p.filt[2] - 1) // p.steps[0] * p.period[1] + (p.filt[3] - 1) // p.steps[1]
    rows = p.rows(y, (0, 0), before, 0)
    for phase in p.phases():
        taps, target = w[phase.taps], data[phase.data]
        if target.size == 0:
            continue
        # Tap a multiplies a row of data in the window that begins a rows before it, so as channels taps are reversed.
        first = before + phase.first[0] * p.period[1] + phase.first[1] - (taps.shape[3] - 1)
        x: Any = None
        for a in range(taps.shape[2]):
            windows = _windows(rows, first - a * p.period[1], p.span(target.shape), taps.shape[3])
            weight = _as_channels(taps[:, :, a, ::-1].swapaxes(0, 1)).swapaxes(0, 1)
            part = conv_transpose1d(windows, weight, None, p.steps[2], p.padding[2], output_size=p.data[4])
            x = part if x is None else _add(x, part)
        target[...] = p.items(x, target.shape)
    return data.reshape(p.data_shape)


def _filter_adjoint(p: _Problem, output: Any, data: Any, dtype: Any) -> Any:
    filt = runtime.array_module(output).zeros(p.filt, dtype)
    if p.is_empty:
        return filt.reshape(p.filt_shape)
    flipped = filt[..., ::-1, ::-1, ::-1]
    wide = np.result_type(output.dtype, data.dtype)
    y, x = computable(*(a.astype(wide, copy=False) for a in (output.reshape(p.output), data.reshape(p.data))))
    y = p.rows(y, (0, 0), 0, 0)[: p.windows]
    for phase in p.phases():
        taps = flipped[phase.taps]
        c_o, c_i, outer, n, K = taps.shape
        rows = p.data_rows(x, phase, taps.shape)
        for a in range(outer):
            windows = _windows(rows, a * p.period[1], p.windows, n)
            if wide.kind in "fc":
                size = c_o, n * c_i, K
                found = grad.conv1d_weight(windows, size, y, stride=p.steps[2], padding=p.padding[2])
            else:  # integers have no gradients: here the output's elements are the taps
                found = conv1d(windows.swapaxes(0, 1), y.swapaxes(0, 1), padding=p.padding[2], dilation=p.steps[2])
                found = found[..., :K].swapaxes(0, 1)
            taps[:, :, a] = found.reshape(c_o, n, c_i, K).swapaxes(1, 2)
    return filt.reshape(p.filt_shape)
