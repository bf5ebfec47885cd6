"""Checks that need the arrays themselves: their kind, their device and their memory.

Everything about shapes, dtypes and settings is in `gpuconv.arguments`.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from . import runtime
from .interchange import view


def take(caller: str, **given: Any) -> tuple[Any, ...]:
    """The arguments of a function as NumPy or CuPy arrays of one kind; arrays of other libraries go through `view`.

    Raises:
        TypeError: as `check_kinds` and `view` raise it; it names the argument.
    """
    arrays = {name: view(caller, name, array) for name, array in given.items()}
    check_kinds(caller, arrays)
    return tuple(arrays.values())


def check_kinds(op: str, arrays: dict[str, Any]) -> None:
    """Refuse other objects than arrays, arrays of different kinds or devices, and foreign byte order on a GPU.

    Raises:
        TypeError: it names the argument.
    """
    kinds: dict[str, str] = {}
    for name, array in arrays.items():
        if runtime.is_cupy_array(array):
            if not array.dtype.isnative:  # CuPy can create such views but cannot compute with them
                raise TypeError(f"{op}: {name} must have native byte order on a GPU, got {array.dtype.str}")
            kinds[name] = f"CuPy array on device {array.data.device_id}"
        elif isinstance(array, np.ndarray) and not isinstance(array, np.ma.MaskedArray):
            kinds[name] = "NumPy array"
        else:
            raise TypeError(
                f"{op}: {name} must be a NumPy or CuPy array, got {type(array).__name__}{_hint(name, array)}"
            )
    first, kind_of_first = next(iter(kinds.items()))
    for name, kind in kinds.items():
        if kind != kind_of_first:
            both = {first: kind_of_first, name: kind}
            numpy_name = next((each for each, found in both.items() if found == "NumPy array"), None)
            hint = "" if numpy_name in (None, "out") else f"; pass cupy.asarray({numpy_name})"
            raise TypeError(
                f"{op}: all arrays must be of one kind and on one device, got {first} as a {kind_of_first} "
                f"and {name} as a {kind}{hint}"
            )


def _hint(name: str, array: object) -> str:
    return f"; pass np.asarray({name})" if isinstance(array, list | tuple) else ""


def check_out(op: str, out: Any, inputs: dict[str, Any]) -> None:
    """Refuse an `out` that cannot be written or shares memory with itself or with an input.

    Raises:
        ValueError: it names the input.
    """
    if overlaps_itself(out):
        raise ValueError(f"{op}: out must not overlap itself, got strides {out.strides} for shape {out.shape}")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError(f"{op}: out must be writeable, got a read-only array")
    check_overlap(op, out, inputs)


def check_overlap(op: str, out: Any, inputs: dict[str, Any]) -> None:
    """Refuse an `out` that shares memory with an input.

    Raises:
        ValueError: it names the input.
    """
    low, high = _byte_range(out)
    for name, array in inputs.items():
        if array is None:
            continue
        array_low, array_high = _byte_range(array)
        if array_low < high and low < array_high and _share_memory(out, array):
            raise ValueError(f"{op}: out must not overlap {name}, but they share memory")


def _share_memory(a: Any, b: Any) -> bool:
    """Whether two arrays whose byte ranges overlap have a byte in common."""
    try:
        return bool(np.shares_memory(_Addresses.of(a), _Addresses.of(b), max_work=cast(Any, 100_000)))
    except np.exceptions.TooHardError:  # too costly to decide: treated as overlapping
        return True


def overlaps_itself(array: Any) -> bool:
    """Whether elements of an array may share memory: some stride is smaller than the span of all smaller strides.

    This is False for every view that slicing, transposing and reshaping can make of an ordinary array. It is also True
    for hand-made strides that interleave elements without an overlap.
    """
    if 0 in array.shape:
        return False
    reach = array.dtype.itemsize
    for stride, extent in sorted((abs(s), e) for s, e in zip(array.strides, array.shape, strict=True)):
        if extent > 1:
            if stride < reach:
                return True
            reach += (extent - 1) * stride
    return False


def address(array: Any) -> int:
    """The address of the first element of a NumPy or CuPy array."""
    return int(array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr)


def span(array: Any) -> tuple[int, int]:
    """The bytes of an array, from its first to behind its last, relative to the address of its first element."""
    if getattr(array, "_c_contiguous", False):  # CuPy's attribute; its `flags` would be slower in every call
        return 0, array.nbytes
    if 0 in array.shape:
        return 0, 0
    low = high = 0
    for extent, stride in zip(array.shape, array.strides, strict=True):
        reach = (extent - 1) * stride
        low, high = (low + reach, high) if reach < 0 else (low, high + reach)
    return low, high + array.dtype.itemsize


def _byte_range(array: Any) -> tuple[int, int]:
    """The addresses from the first byte of an array to behind its last; empty for an empty array."""
    start, (low, high) = address(array), span(array)
    return start + low, start + high


class _Addresses:
    """A NumPy array with the addresses of an array, possibly on a GPU; its memory is never read."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface

    @classmethod
    def of(cls, array: Any) -> np.ndarray[Any, Any]:
        interface = {
            "shape": tuple(array.shape),
            "strides": tuple(array.strides),
            "typestr": f"|V{array.dtype.itemsize}",
            "data": (address(array), True),
            "version": 3,
        }
        return np.asarray(cls(interface))
