"""Axes, dtypes and GPUs of the functions' arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, SupportsIndex, TypeVar

import numpy as np

from .. import memory, runtime
from ..arguments import MAX_STEP, check_int, is_one_of
from ..problem import DTYPES, INTEGERS
from ..text import shown

_P = ParamSpec("_P")

_R = TypeVar("_R")


def on_the_gpu_of_its_arrays(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run the function with the GPU of its first CuPy array as the current one, on which it then allocates.

    Infinities and overflow give no warnings: SciPy's filters and CuPy have none either.
    """

    @wraps(function)
    def on_that_gpu(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        arrays = [value for value in (*args, *kwargs.values()) if runtime.is_cupy_array(value)]
        with runtime.current_device_of(arrays[0] if arrays else None), np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return on_that_gpu


def take(caller: str, **given: Any) -> tuple[Any, ...]:
    """`memory.take` of arrays of numbers; CuPy can compute with these arrays wherever they lie."""
    arrays = memory.take(caller, **given)
    for name, array in zip(given, arrays, strict=True):
        if array.dtype.kind not in "biufc" and array.dtype.name not in DTYPES:
            raise TypeError(f"{caller}: {name} must be of numbers, got the dtype {array.dtype}")
    return tuple(map(runtime.aligned, arrays))


def check_one_of(caller: str, name: str, value: Any, allowed: Sequence[str]) -> None:
    if not is_one_of(value, allowed):
        raise ValueError(f"{caller}: {name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}")


def check_factor(caller: str, name: str, value: Any) -> int:
    """An up- or downsampling factor as an int. As in SciPy, it may be a float without a fraction."""
    if isinstance(value, float | np.floating):
        if not value.is_integer():
            raise ValueError(f"{caller}: {name} must be a whole number, got {shown(value)}")
        value = int(value)
    return check_int(caller, name, value, "a whole number", 1, MAX_STEP)


def check_number(caller: str, name: str, value: Any, dtype: np.dtype[Any]) -> None:
    """Refuse anything but a number that arrays of a dtype can hold."""
    try:
        number = complex(value) if getattr(value, "shape", ()) == () and not isinstance(value, str | bytes) else None
    except (TypeError, ValueError):
        number = None
    if number is None or (number.imag and dtype.kind != "c"):
        kind = "a number" if dtype.kind == "c" else "a real number"
        raise TypeError(f"{caller}: {name} must be {kind}, got {type(value).__name__} {shown(value)}")


def axis_last(caller: str, array: Any, axis: SupportsIndex) -> tuple[Any, int]:
    """The array with an axis moved to the end, and the axis's former place as a negative index."""
    index = check_int(caller, "axis", axis, "an int")
    if not -array.ndim <= index < array.ndim:
        raise ValueError(f"{caller}: axis {index} does not exist in an array of shape {tuple(array.shape)}")
    index = index - array.ndim if index >= 0 else index
    return runtime.array_module(array).moveaxis(array, index, -1), index


def put_back(array: Any, place: int) -> Any:
    return runtime.array_module(array).moveaxis(array, -1, place) if place != -1 else array


def result_type(*arrays: Any) -> np.dtype[Any]:
    return np.result_type(*(array.dtype for array in arrays))


def real_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of the real part."""
    return np.empty(0, dtype).real.dtype


def computable(x: Any, w: Any) -> tuple[Any, Any]:
    """The arrays in dtypes of conv1d, whose result can be cast to the dtype of NumPy's promotion."""
    result = result_type(x, w)
    if result.kind in "iub":
        # Sums modulo 2**64 have the same low bits as sums in any narrower or unsigned dtype.
        name = (
            result.name if result.name in INTEGERS else {"bool": "uint8", "uint16": "int32"}.get(result.name, "int64")
        )
        return x.astype(name, copy=False), w.astype(name, copy=False)
    if result.name not in DTYPES:
        raise TypeError(f"gpuconv.signal: the dtype {result} is not supported")
    taps = real_type(result) if result.kind == "c" and w.dtype.kind != "c" else result
    return x.astype(result, copy=False), w.astype(taps, copy=False)
