"""What every form and every gradient on the CPU works with: scratch buffers, blocks on several threads, NumPy facts."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from ..dtypes import FORMATS

Array = npt.NDArray[Any]


def accumulator(dtype: str) -> np.dtype[Any]:
    """The dtype in which data of a dtype are summed."""
    return np.dtype(dtype if FORMATS[dtype].is_complex else FORMATS[dtype].accumulator)


class Scratch:
    """Buffers that one worker uses again for each of its blocks.

    Attributes:
        band: what the buffer "band" holds: the arguments that it was made from.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._buffers: dict[str, Array] = {}
        self.band: object = None

    def take(self, name: str, *shape: int) -> Array:
        size = math.prod(shape)
        buffer = self._buffers.pop(name, None)
        if buffer is None or buffer.size < size:
            del buffer  # before its successor is allocated
            buffer = np.empty(size, self._dtype)
        self._buffers[name] = buffer
        return buffer[:size].reshape(shape)


def is_direct(array: Array, dtype: np.dtype[Any]) -> bool:
    """Whether BLAS takes the matrices (..., rows, positions) of an array: unit stride in rows that do not overlap."""
    size, strides = dtype.itemsize, array.strides
    return (
        array.dtype == dtype
        and array.flags.aligned
        and strides[3] == size
        and strides[2] % size == 0
        and (strides[2] >= array.shape[3] * size or array.shape[2] == 1)
    )


def strided(array: Array, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """A view (shape, strides in bytes) that begins `offset` elements along the last axis of an array.

    The caller sees to it that it stays within. `as_strided` takes ten times as long as the constructor, which needs a
    contiguous array.
    """
    if array.flags.c_contiguous:
        view: Array = np.ndarray(shape, array.dtype, array, offset * array.itemsize, strides)
    else:
        view = as_strided(array[..., offset:], shape, strides)
    return view


def is_finite(block: Array) -> bool:
    return bool(np.isfinite(block).all())


def slices(start: int, stop: int, length: int) -> list[slice]:
    """Consecutive slices of a length from start to stop."""
    if 0 < stop - start <= length:
        return [slice(start, stop)]
    return [slice(at, min(at + length, stop)) for at in range(start, stop, length)]


def run_blocks(
    compute: Callable[..., None], blocks: Sequence[tuple[Any, ...]], workers: int, dtype: np.dtype[Any], length: int
) -> None:
    """Call ``compute(*block, scratch)`` for each block, on at most so many threads.

    The blocks write disjoint places, so neither their order nor the number of threads changes a bit. An exception,
    KeyboardInterrupt among them, ends all threads after the blocks that they are at. `dtype` is that of the scratch
    buffers, `length` that of the rows that are computed on.
    """
    workers = min(workers, len(blocks), usable_cpus()) if workers > 1 else 1
    pending = deque(blocks)

    def work() -> None:
        scratch = Scratch(dtype)
        # NumPy copies rows that are shorter than its buffer into it before it computes, even where nothing is to be
        # converted; a buffer shorter than the rows keeps it from doing so.
        buffer_size = np.setbufsize(64 if length >= 64 else 8192)
        try:
            with np.errstate(all="ignore"):
                while pending:
                    try:
                        block = pending.popleft()
                    except IndexError:  # another thread took the last one
                        return
                    compute(*block, scratch)
        except BaseException:
            pending.clear()
            raise
        finally:
            np.setbufsize(buffer_size)

    if workers <= 1:
        work()
        return
    with ThreadPoolExecutor(workers - 1, thread_name_prefix="gpuconv") as pool:
        try:
            others = [pool.submit(work) for _ in range(workers - 1)]
            work()
            for other in others:
                other.result()
        except BaseException:
            pending.clear()
            raise


def usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
