"""The GPU that a command uses."""

from __future__ import annotations

import os

from ..gpus import has_driver, missing_gpu
from .errors import EXIT_NO_GPU, CommandError


def use_gpu(choice: str) -> bool:
    """Whether `--device auto|cpu|gpu` means the GPU.

    Raises:
        CommandError: `choice` is "gpu" and none is available.
    """
    if choice == "cpu" or (choice == "auto" and not has_driver()):
        return False
    missing = missing_gpu()
    if missing is not None and choice == "gpu":
        raise CommandError(missing, EXIT_NO_GPU)
    return missing is None


def kernel_cache() -> str:
    return os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")
