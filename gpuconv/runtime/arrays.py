"""Copies of CuPy arrays; arrays whose elements are not aligned are read and written as bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from .gpu import cupy_module, current_device_of, is_cupy_array


def aligned(array: Any) -> Any:
    """An array that CuPy can read: the array itself, or a copy if its elements are not at multiples of their size."""
    if not is_cupy_array(array) or _is_aligned(array):
        return array
    return copied(array)


def copied(array: Any) -> Any:
    """A C-contiguous copy of an array, at any address, on its device."""
    if not is_cupy_array(array):
        return array.copy()
    with current_device_of(array):
        copy = cupy_module().empty(array.shape, array.dtype)
        assign(copy, array)
        return copy


def assign(target: Any, values: Any) -> None:
    """`target[...] = values` for arrays of one shape and dtype, at any addresses.

    CuPy's own kernels read and write whole elements, and a GPU faults on those that are not at multiples of their size.
    """
    if not (_is_aligned(target) and _is_aligned(values)):
        target, values = _as_bytes(target), _as_bytes(values)
    target[...] = values


def add(target: Any, values: Any) -> None:
    """`target += values` for arrays of one shape and dtype, of which `target` may lie at any address."""
    total = aligned(target)
    total += values
    if total is not target:
        assign(target, total)


def clear(array: Any) -> None:
    """Fill an array, at any address, with zeros."""
    if array.size:
        _as_bytes(array).fill(0)


def _is_aligned(array: Any) -> bool:
    return not any(place % array.dtype.itemsize for place in (array.data.ptr, *array.strides))


def _as_bytes(array: Any) -> Any:
    """A view of the bytes of an array; a further axis is over the bytes of an element."""
    itemsize = array.dtype.itemsize
    return cupy_module().ndarray((*array.shape, itemsize), np.uint8, array.data, (*array.strides, 1))
