"""Whether there is a GPU to compute on, and if not, what is missing."""

from __future__ import annotations

import ctypes
import os
import sys

from . import runtime
from .text import cuda_version, install_hint


class GpuUnavailableError(RuntimeError):
    """A GPU is needed and none can be used; the message names what is missing."""


def has_driver() -> bool:
    """Whether the library of NVIDIA's driver can be loaded. Without it, importing CuPy (100 MB) is of no use."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def missing_gpu() -> str | None:
    """Why this process cannot use a GPU: CuPy, the driver or the device is missing. None if it can."""
    try:
        count = runtime.device_count()
    except ModuleNotFoundError:
        return f"no GPU: CuPy is missing: {install_hint('cuda13', 'cuda12')}"
    except ImportError as error:
        return f"no GPU: {error}"
    except RuntimeError as error:
        driver, needed = runtime.cuda_versions()
        if driver == 0:
            return "no GPU: no NVIDIA driver is loaded here; in a container, start it with --gpus all"
        if driver // 1000 < needed // 1000:
            have, want = cuda_version(driver), cuda_version(needed)
            return f"no GPU: the NVIDIA driver supports CUDA {have}, CuPy was built for CUDA {want}"
        if "cudaErrorNoDevice" in str(error):
            count = 0
        else:
            return f"no GPU: the NVIDIA driver does not answer ({error})"
    if count:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "no GPU: the NVIDIA driver sees no device" + (
        "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}"
    )
