"""Helpers of all forms and gradients on the CPU: scratch buffers, slices, views and copies of arrays."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from ..dtypes import FORMATS
from . import limits

Array = npt.NDArray[Any]
T = TypeVar("T")

# The most elements of a dot product that BLAS computes on the calling thread.
_SHORT_DOT = 8192


@cache
def accumulator(dtype: str) -> np.dtype[Any]:
    """The dtype in which data of a dtype are summed."""
    return np.dtype(dtype if FORMATS[dtype].is_complex else FORMATS[dtype].accumulator)


class Scratch:
    """Buffers that one worker reuses for each of its blocks.

    Attributes:
        dtype: of the buffers.
        band: identifies the contents of the buffer "band", so that they need not be made again.
    """

    __slots__ = ("_buffers", "_kept", "_size", "_views", "band", "dtype")

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._buffers: dict[str, Array] = {}
        self._views: dict[str, Array] = {}  # what `take` returned last
        self._kept: dict[str, tuple[object, object]] = {}  # by name: the key, and what `keep` returned
        self._size = 0
        self.band: object = None

    def take(self, name: str, *shape: int) -> Array:
        view = self._views.get(name)
        if view is not None and view.shape == shape:
            return view
        size = math.prod(shape)
        buffer = self._buffers.pop(name, None)
        if buffer is None or buffer.size < size:
            self._size += size - (0 if buffer is None else buffer.size)
            self._views.pop(name, None)
            del buffer, view  # freed before the larger one is allocated
            buffer = np.empty(size, self.dtype)
        self._buffers[name] = buffer
        self._views[name] = view = buffer[:size].reshape(shape)
        return view

    def keep(self, name: str, key: object, make: Callable[[], T]) -> T:
        """What `make` returned last for an equal key: a buffer that it took by this name, and views of it.

        Nothing else may take a buffer of this name.
        """
        kept = self._kept.get(name)
        if kept is not None and kept[0] == key:
            return cast(T, kept[1])
        self._kept.pop(name, None)
        made = make()
        self._kept[name] = key, made
        return made

    @classmethod
    def borrow(cls, purpose: str, dtype: np.dtype[Any]) -> Scratch:
        """Buffers that the calling thread kept for a purpose, or new ones; nothing else uses them until `give_back`.

        Memory that is new to the process costs a microsecond for each page, often more than the computation.
        """
        kept = _KEPT.scratch.pop(purpose, None)
        if kept is None or kept.dtype != dtype:
            return cls(dtype)
        kept.band = None
        return kept

    def give_back(self, purpose: str) -> None:
        """Keep the buffers for the next call of this thread, unless they are large."""
        if self._size * self.dtype.itemsize <= limits.KEPT_SCRATCH:
            _KEPT.scratch[purpose] = self


class _Kept(threading.local):
    """The buffers that a thread keeps between its calls, by purpose."""

    def __init__(self) -> None:
        self.scratch: dict[str, Scratch] = {}


_KEPT = _Kept()


def is_direct(array: Array, dtype: np.dtype[Any]) -> bool:
    """Whether BLAS can read the matrices (..., rows, positions) of an array in place.

    They need unit stride along rows, and rows that do not overlap.
    """
    flags, strides = array.flags, array.strides
    size = dtype.itemsize
    if array.dtype != dtype or strides[3] != size or not flags.aligned:
        return False
    if flags.c_contiguous or array.shape[2] == 1:
        return True
    return strides[2] % size == 0 and strides[2] >= array.shape[3] * size


def strided(array: Array, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """A view (shape, strides in bytes) that begins `offset` elements along the last axis of an array.

    The caller ensures that the view stays within the array. For contiguous arrays the constructor of ndarray is used,
    which is ten times as fast as `as_strided`.
    """
    if array.flags.c_contiguous:
        view: Array = np.ndarray(shape, array.dtype, array, offset * array.itemsize, strides)
    else:
        view = as_strided(array[..., offset:], shape, strides)
    return view


def part_of(array: Array, samples: slice, groups: slice, start: int) -> tuple[Array, int]:
    """The arguments of `strided` for views of ``array[samples, groups, :, start:]``: the array itself if possible."""
    if not array.flags.c_contiguous:
        return array[samples, groups], start
    return array, (samples.start * array.strides[0] + groups.start * array.strides[1]) // array.itemsize + start


def copy_swapped(source: Array, out: Array) -> None:
    """``out[...] = source``, where the last two axes of `out` are swapped in memory.

    A copy of NumPy loops along the axis that is contiguous in the result, however short it is. An addition loops along
    the last axis if the layouts differ, so adding zero can take as little as a third of the time.
    """
    if source.shape[-1] > source.shape[-2] and source.dtype == out.dtype:
        np.add(source, 0, out=out)
    else:
        out[...] = source


def copy_padded(
    source: Array, low: int, high: int, out: Array, copy: Callable[[Array, Array], None] | None = None
) -> None:
    """Copy the positions from low to high of the last axis into `out`, zeros where there are none.

    `copy` copies the positions that exist; None for a plain assignment.
    """
    first = min(max(low, 0), high)
    last = max(min(high, source.shape[-1]), first)
    if low < first:
        out[..., : first - low] = 0
    if copy is None:
        out[..., first - low : last - low] = source[..., first:last]
    else:
        copy(source[..., first:last], out[..., first - low : last - low])
    if last < high:
        out[..., last - low :] = 0


def is_finite(block: Array) -> bool:
    # A sum takes less time than a check of each element. Since it may overflow, only a finite one is conclusive.
    total = math.nan
    if block.dtype.kind == "f":
        if block.flags.c_contiguous:
            if block.size <= _SHORT_DOT:
                total = float(np.vdot(block, block))  # which takes a third of the time of a sum
        elif block.strides[-1] != block.itemsize:
            total = float(np.add.reduce(block, axis=None))
    return math.isfinite(total) or bool(np.isfinite(block).all())


def slices(start: int, stop: int, length: int) -> list[slice]:
    """Consecutive slices of a length from start to stop; the last one may be shorter."""
    if 0 < stop - start <= length:
        return [slice(start, stop)]
    return [slice(at, min(at + length, stop)) for at in range(start, stop, length)]
