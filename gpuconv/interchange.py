"""Arrays of other libraries as the NumPy and CuPy arrays that share their memory.

PyTorch, JAX and most others export their arrays by DLPack; Numba exports those on a GPU by `__cuda_array_interface__`.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

from . import runtime

# The device types of DLPack's header whose memory the CPU can read, and those of CUDA.
_ON_CPU = frozenset((1, 3))  # kDLCPU, kDLCUDAHost
_ON_GPU = frozenset((2, 13))  # kDLCUDA, kDLCUDAManaged

# Flags of a versioned DLPack capsule.
_READ_ONLY = 1
_IS_COPIED = 2

# The errors of exporters that refuse: each library raises its own.
_REFUSALS = (AssertionError, AttributeError, BufferError, NotImplementedError, RuntimeError, TypeError, ValueError)


def is_known(array: object) -> bool:
    """Whether it is a NumPy or CuPy array."""
    return isinstance(array, np.ndarray) or runtime.is_cupy_array(array)


def is_tensor(array: object) -> bool:
    """Whether it is a PyTorch tensor. PyTorch is not imported: where there is a tensor, it has been imported."""
    return isinstance(array, getattr(sys.modules.get("torch"), "Tensor", ()))


def view(caller: str, name: str, array: Any, *, write: bool = False) -> Any:
    """The NumPy or CuPy array that shares the memory of another library's array.

    CuPy's current stream waits for the work on the exporter's stream. Anything but an array of another library is
    returned unchanged.

    Args:
        caller: the messages begin with it.
        name: of the argument.
        array: an array that exports DLPack or `__cuda_array_interface__`, or anything else.
        write: whether the array will be written to.

    Raises:
        TypeError: its library does not export it, or it is a tensor that requires a gradient.
        ValueError: it will be written to, but is read-only or a copy.
        ImportError: it is on a GPU, and CuPy cannot be used.
    """
    if array is None or is_known(array):
        return array
    if is_tensor(array) and array.requires_grad:
        bridge = f"gpuconv.torch.{caller}" if caller in ("conv1d", "conv_transpose1d") else "gpuconv.torch"
        raise TypeError(
            f"{caller}: {name} is a tensor that requires a gradient: use {bridge}, or pass {name}.detach() if no "
            "gradient is needed"
        )
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _from_dlpack(caller, name, array, write=write)
    if hasattr(array, "__cuda_array_interface__"):
        return _from_cuda_interface(caller, name, array, write=write)
    return array


class _Exporter:
    """Exports an array by DLPack and keeps the flags of its capsule."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.flags = 0

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self._array.__dlpack__(**options)
        self.flags = _flags(capsule)
        return capsule


def _from_dlpack(caller: str, name: str, array: Any, *, write: bool) -> Any:
    try:
        device = int(array.__dlpack_device__()[0])
    except _REFUSALS as error:
        raise _refusal(caller, name, array, error) from error
    if device not in _ON_CPU | _ON_GPU:
        raise TypeError(
            f"{caller}: {name} must be on the CPU or a CUDA device, got {type(array).__name__} on a device of "
            f"DLPack's type {device}"
        )
    library: Any = np if device in _ON_CPU else runtime.cupy_module()
    is_bfloat16 = is_tensor(array) and str(array.dtype) == "torch.bfloat16"
    # NumPy has no bfloat16 in DLPack, so the array is exchanged as one of integers.
    exporter = _Exporter(array.view(sys.modules["torch"].uint16) if is_bfloat16 else array)
    try:
        found = library.from_dlpack(exporter)
    except _REFUSALS as error:
        raise _refusal(caller, name, array, error) from error
    if write and exporter.flags & _READ_ONLY:
        raise ValueError(f"{caller}: {name} must be writeable, got a read-only array")
    if write and exporter.flags & _IS_COPIED:
        raise ValueError(f"{caller}: {name} must be exported without a copy, got a copy")
    if is_bfloat16:
        from .dtypes import numpy_dtype

        return found.view(numpy_dtype("bfloat16"))
    return found


def _from_cuda_interface(caller: str, name: str, array: Any, *, write: bool) -> Any:
    cupy = runtime.cupy_module()
    try:
        interface = array.__cuda_array_interface__
        pointer, is_read_only = interface["data"]
        device = int(cupy.cuda.runtime.pointerGetAttributes(pointer).device) if pointer else None
        with cupy.cuda.Device(device):  # on another current device CuPy would copy the array
            found = cupy.asarray(array)
    except _REFUSALS as error:
        raise _refusal(caller, name, array, error) from error
    if write and is_read_only:
        raise ValueError(f"{caller}: {name} must be writeable, got a read-only array")
    return found


def _refusal(caller: str, name: str, array: Any, error: Exception) -> TypeError:
    return TypeError(f"{caller}: {name} is a {type(array).__name__} that cannot be read in place: {error}")


_VERSIONED = b"dltensor_versioned"
_is_capsule = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_address_in = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _Managed(ctypes.Structure):
    """The beginning of DLPack's DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


def _flags(capsule: Any) -> int:
    """The flags of a capsule that has not been consumed yet; an unversioned one has none."""
    if not _is_capsule(capsule, _VERSIONED):
        return 0
    return int(_Managed.from_address(_address_in(capsule, _VERSIONED)).flags)
