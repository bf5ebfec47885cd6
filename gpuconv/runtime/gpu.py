"""CuPy and its GPUs: the only file that imports CuPy."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..device import Device

# The oldest major version of CuPy that is supported. Older ones pass garbage for a kernel argument that is None.
OLDEST_CUPY = 14


def cupy_module() -> ModuleType:
    """CuPy, imported on first use.

    Raises:
        ImportError: CuPy is not installed (a ModuleNotFoundError), cannot be loaded, or is older than version 14.
    """
    try:
        import cupy  # sys.modules is not enough: while another thread imports CuPy, its entry there is incomplete
    except Exception as error:  # the import also creates a cache folder and loads libraries, which fail in many ways
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            raise
        cause = error.__cause__ or error  # CuPy wraps some errors in a page of advice
        raise ImportError(f"CuPy cannot be loaded: {type(cause).__name__}: {cause}") from error
    return _supported(cupy)


@cache
def _supported(cupy: ModuleType) -> ModuleType:
    from ..text import install_hint

    if int(cupy.__version__.partition(".")[0]) < OLDEST_CUPY:
        raise ImportError(
            f"gpuconv needs CuPy {OLDEST_CUPY}.0 or newer and found CuPy {cupy.__version__}; "
            f"{install_hint('cuda13', 'cuda12')}"
        )
    return cupy


def fft_module() -> ModuleType:
    """cupy.fft, whose library is loaded first.

    Raises:
        ImportError: cuFFT cannot be loaded.
    """
    cupy = cupy_module()
    try:
        from cupy.cuda import cufft  # noqa: F401
    except ImportError as error:
        from ..text import install_hint

        hint = install_hint("cuda13-full")
        raise ImportError(f'algorithm "fft" needs cuFFT, which CuPy cannot load: {error}; {hint}') from error
    module: ModuleType = cupy.fft
    return module


def check_dtype(dtype: np.dtype[Any]) -> None:
    """Refuse a dtype that CuPy arrays cannot have here.

    Raises:
        TypeError: bfloat16 with NumPy before 2.1.2, whose type promotion crashes on it, so that CuPy disables it.
    """
    if dtype.name == "bfloat16" and np.lib.NumpyVersion(np.__version__) < "2.1.2":
        raise TypeError(f"bfloat16 on a GPU needs NumPy 2.1.2 or newer, found NumPy {np.__version__}")


def is_cupy_array(array: object) -> bool:
    """Whether an object is a CuPy array. CuPy is not imported: where there is an array, it has been imported."""
    # While another thread imports CuPy, the module may not have its class yet.
    return isinstance(array, getattr(sys.modules.get("cupy"), "ndarray", ()))


def array_module(array: object) -> ModuleType:
    """CuPy for its arrays, else NumPy."""
    return cupy_module() if is_cupy_array(array) else np


def empty_beside(array: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A new array on the device of another one, in native byte order."""
    if not is_cupy_array(array):
        return np.empty(shape, dtype.newbyteorder("="))
    with current_device_of(array):
        return cupy_module().empty(shape, dtype)


def current_device_of(array: Any) -> AbstractContextManager[Any]:
    """A context in which the GPU of an array is CuPy's current one; it has no effect for NumPy arrays."""
    return cupy_module().cuda.Device(array.data.device_id) if is_cupy_array(array) else _NO_DEVICE


_NO_DEVICE = nullcontext()


def device_count() -> int:
    """The number of GPUs that CuPy can use.

    Raises:
        ImportError: CuPy is not installed, or it is older than version 14.
        RuntimeError: there is no driver, or it is too old.
    """
    return int(cupy_module().cuda.runtime.getDeviceCount())


def cuda_versions() -> tuple[int, int]:
    """The CUDA versions that the driver supports (0 without a driver) and that CuPy was built for, as 13020 for 13.2.

    Raises:
        ImportError: CuPy is not installed, or it is older than version 14.
    """
    runtime = cupy_module().cuda.runtime
    return int(runtime.driverGetVersion()), int(runtime.runtimeGetVersion())


@cache
def device(index: int) -> Device:
    """The GPU with CuPy's index."""
    from ..device import Device

    properties = cupy_module().cuda.runtime.getDeviceProperties(index)
    name = properties["name"]
    return Device(
        name=name.decode() if isinstance(name, bytes) else str(name),
        arch=10 * int(properties["major"]) + int(properties["minor"]),
        num_sms=int(properties["multiProcessorCount"]),
        shared_per_block=int(properties["sharedMemPerBlockOptin"]),
        shared_per_sm=int(properties["sharedMemPerMultiprocessor"]),
        l2_bytes=int(properties["l2CacheSize"]),
    )


def current_index() -> int:
    """CuPy's index of its current GPU."""
    return int(cupy_module().cuda.runtime.getDevice())


def current_gpu() -> Device:
    """CuPy's current GPU."""
    return device(current_index())


def nvrtc_version() -> tuple[int, int] | None:
    """The version of NVRTC, CUDA's compiler at run time; None where it cannot be loaded.

    Raises:
        ImportError: CuPy is not installed, or it is older than version 14.
    """
    nvrtc = cupy_module().cuda.nvrtc
    try:
        major, minor = nvrtc.getVersion()
    except Exception:  # CuPy loads the library at the first call and reports its absence in many ways
        return None
    return int(major), int(minor)


def refuse_during_capture(what: str, device_index: int) -> None:
    """Refuse an operation that waits for a GPU if its current stream is being captured, since that would end it.

    Raises:
        RuntimeError: `what` cannot be done while that stream is being captured.
    """
    cuda = cupy_module().cuda
    with cuda.Device(device_index):
        if cuda.get_current_stream().is_capturing():
            raise RuntimeError(f"{what} while the current stream of GPU {device_index} is being captured")


def is_capturing() -> bool:
    """Whether CuPy's current stream is being captured into a CUDA graph, or was until an error ended that."""
    try:
        return bool(cupy_module().cuda.get_current_stream().is_capturing())
    except RuntimeError:
        return True


def complete(what: str, array: Any) -> None:
    """Wait for the work queued on the current stream of an array's GPU; then all streams can read its results.

    This has no effect for NumPy arrays.

    Raises:
        RuntimeError: `what` cannot be done while that stream is being captured.
    """
    if is_cupy_array(array):
        refuse_during_capture(what, array.data.device_id)
        with current_device_of(array):
            cupy_module().cuda.get_current_stream().synchronize()


def temporary(num_bytes: int) -> Any:
    """A buffer for the kernels that are launched next on the current stream.

    When the caller drops it, it returns to CuPy's pool, which reuses it only on the same stream, after the kernels
    queued until then. While the stream is being captured, allocating and freeing it become nodes of the CUDA graph: the
    memory is allocated whenever the graph runs, on any stream, and is freed with the graph.

    Raises:
        RuntimeError: the stream is being captured, and the GPU or its driver has no stream-ordered allocator.
    """
    cuda = cupy_module().cuda
    return cuda.malloc_async(num_bytes) if cuda.get_current_stream().is_capturing() else cuda.alloc(num_bytes)
