"""Runs plans on a GPU: the only package that imports CuPy, and that builds and launches kernels.

`import gpuconv` imports this package but neither CuPy nor the kernel families, which are imported at their first use.
"""

from .arrays import add, aligned, assign, clear, copied
from .executor import Executor, make_executor
from .gpu import (
    array_module,
    check_dtype,
    complete,
    cuda_versions,
    cupy_module,
    current_device_of,
    current_gpu,
    current_index,
    device,
    device_count,
    empty_beside,
    fft_module,
    is_capturing,
    is_cupy_array,
    nvrtc_version,
    refuse_during_capture,
)
from .kernels import DEFAULT_SHARED_BYTES, append, build
from .prepared import Packs, PreparedWeight, prepare

__all__ = [
    "DEFAULT_SHARED_BYTES",
    "Executor",
    "Packs",
    "PreparedWeight",
    "add",
    "aligned",
    "append",
    "array_module",
    "assign",
    "build",
    "check_dtype",
    "clear",
    "complete",
    "copied",
    "cuda_versions",
    "cupy_module",
    "current_device_of",
    "current_gpu",
    "current_index",
    "device",
    "device_count",
    "empty_beside",
    "fft_module",
    "is_capturing",
    "is_cupy_array",
    "make_executor",
    "nvrtc_version",
    "prepare",
    "refuse_during_capture",
]
