"""The arrays of a layer's parameters: drawn, put on a device, read from a state dictionary."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from . import checkpoint, runtime
from .arguments import check_int
from .checkpoint import EntryError
from .problem import DTYPES, dtype_name
from .text import install_hint, shown

_DRAWN_AT_ONCE = 1 << 15  # initial values that are drawn at a time, in float64


def supported_dtype(caller: str, dtype: Any) -> str:
    """The name of a supported dtype, given by name, as a NumPy dtype or as a scalar type."""
    if isinstance(dtype, str) and dtype in DTYPES:
        return dtype
    try:
        name = dtype_name(np.dtype(dtype))
    except (TypeError, ValueError):
        name = None
    if name is None:
        raise TypeError(f"{caller}: dtype must be one of {', '.join(DTYPES)}, got {shown(dtype)}")
    return name


def converts(source: np.dtype[Any], name: str) -> bool:
    """Whether values of a dtype can become parameters and lose nothing but precision."""
    if source.kind == "c":
        return name.startswith("complex")
    return source.kind in "biuf" or dtype_name(source) is not None


def gpu_index(caller: str, device: str | None) -> int | None:
    """The CuPy index of the GPU that a device string names, which must answer; None for the CPU."""
    if device is None or device == "cpu":
        return None
    expected = '"cpu", "cuda" or "cuda:" and an index'
    if not isinstance(device, str):
        raise TypeError(f"{caller}: device must be {expected}, got {type(device).__name__} {shown(device)}")
    match = re.fullmatch(r"cuda(?::([0-9]+))?", device)
    if match is None:
        hint = '; CuPy\'s current GPU is "cuda"' if device.lower().startswith("gpu") else ""
        raise ValueError(f'{caller}: device must be {expected}, got "{device}"{hint}')
    try:
        count = runtime.device_count()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{caller}: device "{device}" needs the package CuPy: {install_hint("cuda13", "cuda12")}'
        ) from error
    except RuntimeError as error:
        raise RuntimeError(f'{caller}: device is "{device}", but no GPU answers: {error}') from error
    if match[1] is None:
        return runtime.current_index()
    if int(match[1]) >= count:
        raise ValueError(f'{caller}: device must be below "cuda:{count}", one of the GPUs that answer, got "{device}"')
    return int(match[1])


def generator_of(caller: str, rng: int | np.random.Generator | None) -> np.random.Generator:
    if rng is None or isinstance(rng, np.random.Generator):
        return np.random.default_rng(rng)
    return np.random.default_rng(check_int(caller, "rng", rng, "an int seed or a numpy.random.Generator", 0))


def draw_uniform(
    generator: np.random.Generator, bound: float, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> np.ndarray[Any, Any]:
    """Values between -bound and bound, drawn in float64, so that a seed gives the same values in every dtype.

    They are drawn and rounded block by block, since a whole array in float64 would take up to four times the memory.
    """
    values = np.empty(shape, dtype)
    flat = values.reshape(-1)
    for start in range(0, flat.size, _DRAWN_AT_ONCE):
        block = flat[start : start + _DRAWN_AT_ONCE]
        if dtype.kind == "c":
            block[...] = generator.uniform(-bound, bound, (block.size, 2)).view(np.complex128)[:, 0]
        else:
            block[...] = generator.uniform(-bound, bound, block.size)
    return values


def home_of(array: Any) -> int | None:
    """The CuPy index of the GPU that holds an array; None for the CPU."""
    return int(array.data.device_id) if runtime.is_cupy_array(array) else None


def put(array: Any, index: int | None, dtype: np.dtype[Any], *, copy: bool = False) -> Any:
    """A NumPy or CuPy array as a C-contiguous one on a GPU, or on the CPU where `index` is None."""
    home = home_of(array)
    leaves = home is not None and home != index
    if home != index or copy or array.dtype != dtype:
        for gpu in {home, index} - {None}:
            runtime.refuse_during_capture("parameters cannot be copied", cast(int, gpu))
    if home is not None:
        array = runtime.aligned(array)
    if leaves:
        # CuPy copies only contiguous arrays from another GPU, and does not wait for the work queued there.
        cupy = runtime.cupy_module()
        with cupy.cuda.Device(home):
            array = cupy.asnumpy(array) if index is None else array.astype(array.dtype, order="C", copy=False)
            cupy.cuda.get_current_stream().synchronize()
    if index is None:
        return np.asarray(array).astype(dtype, order="C", copy=copy)
    cupy = runtime.cupy_module()
    runtime.check_dtype(dtype)
    with cupy.cuda.Device(index):
        placed = cupy.asarray(array).astype(dtype, order="C", copy=copy)
        if leaves:  # wait for the copy, so that the array is not freed and its memory reused before
            cupy.cuda.get_current_stream().synchronize()
        return placed


def _as_cupy_array(value: Any) -> Any:
    """An object with `__cuda_array_interface__` as a CuPy array on its GPU; `asarray` alone moves it to the current."""
    cupy = runtime.cupy_module()
    address = value.__cuda_array_interface__["data"][0]
    home = cupy.cuda.runtime.pointerGetAttributes(address).device if address else -1
    with cupy.cuda.Device(home if home >= 0 else None):
        return cupy.asarray(value)


def fold_normalised(prefix: str, pair: Sequence[str], state: Mapping[str, Any], own: Any) -> Any:
    """The weight from the two arrays of weight normalisation.

    Raises:
        EntryError: an array cannot be read, or the shapes do not match.
    """
    name, direction_name = (prefix + key for key in pair)
    direction = read_entry(direction_name, state[pair[1]], own)
    magnitude = _as_array(name, state[pair[0]], own)
    try:
        return checkpoint.fold(*(put(array, None, array.dtype) for array in (magnitude, direction)))
    except EntryError as error:
        raise EntryError(f'"{name}" {error}') from error


def read_entry(key: str, value: Any, own: Any) -> Any:
    """An entry of a state dictionary as a NumPy or CuPy array that fits a parameter.

    Raises:
        EntryError: it does not fit.
    """
    array = _as_array(key, value, own)
    if tuple(array.shape) != tuple(own.shape):
        raise EntryError(f'"{key}" must have shape {tuple(own.shape)}, got {tuple(array.shape)}')
    return array


def _as_array(key: str, value: Any, own: Any) -> Any:
    """An entry of a state dictionary as a NumPy or CuPy array of a dtype that converts to a parameter's.

    Raises:
        EntryError: it is not an array, or its dtype does not convert.
    """
    if isinstance(value, np.ma.MaskedArray) or not (
        hasattr(value, "__array__") or hasattr(value, "__cuda_array_interface__")
    ):
        raise EntryError(f'"{key}" must be an array, got {type(value).__name__}')
    try:
        if runtime.is_cupy_array(value):
            array = value
        elif hasattr(value, "__cuda_array_interface__"):
            array = _as_cupy_array(value)
        else:
            array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        raise EntryError(f'"{key}" cannot be read as an array: {error}') from error
    if runtime.is_cupy_array(array) and not array.dtype.isnative:
        raise EntryError(f'"{key}" must have native byte order on a GPU, got {array.dtype.str}')
    if array.dtype == np.dtype("V2") and own.dtype.name == "bfloat16":
        array = array.view(own.dtype)  # NumPy's files keep the bytes of bfloat16 but not the name of the dtype
    if not converts(array.dtype, str(own.dtype.name)):
        raise EntryError(f'"{key}" must have a dtype that converts to {own.dtype}, got {array.dtype}')
    return array
