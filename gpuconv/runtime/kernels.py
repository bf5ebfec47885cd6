"""Builds and launches kernels: the only file that names `cupy.RawKernel`."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import aligned
from .gpu import cuda_versions, cupy_module, current_gpu, nvrtc_version

# Modules that only a GPU needs are imported at their first use: `import gpuconv` imports this file but no families.
if TYPE_CHECKING:
    from ..families import Config, Launch

# Bytes of dynamic shared memory that a kernel may use without opting in to more, on every architecture.
DEFAULT_SHARED_BYTES = 48 * 1024


@cache
def build(config: Config, arch: str) -> Any:
    """The kernel of a specialisation for GPUs of an architecture, "sm_90" and so on.

    If it was compiled in advance, CuPy loads the machine code (gpuconv.cubins). Otherwise CuPy compiles it for the
    current device at its first use there; later processes find it in CuPy's disk cache.

    Raises:
        RuntimeError: it was not compiled in advance, which $GPUCONV_CACHE_ONLY requires.
    """
    from .. import cubins, source

    cupy = cupy_module()
    path = cubins.path_of(config, arch, nvrtc_version, cuda_versions()[1] // 1000)
    if path is not None:
        return cupy.RawModule(path=str(path)).get_function(config.kernel)
    return cupy.RawKernel(source.assemble(config.kernel, dict(config.macros)), config.kernel)


class Kernel:
    """A compiled kernel with its launch and its packed parameters."""

    __slots__ = ("_block", "_function", "_grid", "_params", "_shared_bytes")

    def __init__(self, config: Config, launch: Launch) -> None:
        from .. import source

        cupy = cupy_module()
        gpu = current_gpu()
        kernel = build(config, gpu.arch_name)
        # More than the default needs a higher limit. All plans of a kernel, in all threads, share this limit, so each
        # sets the same one: the most that a block can have. The driver needs a current context for this. A new thread
        # has none, and CuPy creates it only when it loads or launches a kernel.
        if launch.shared_bytes > DEFAULT_SHARED_BYTES:
            cupy.cuda.Device().use()
            kernel.max_dynamic_shared_size_bytes = gpu.shared_per_block
        self._function = kernel.kernel
        self._grid = (launch.grid, 1, 1)
        self._block = (launch.block, 1, 1)
        self._shared_bytes = launch.shared_bytes
        # The struct is passed by value: the driver copies it out of this buffer at each launch.
        self._params = cupy.cuda.function.CNumpyArray(source.pack_params(dict(launch.params), launch.index_bits))

    def with_params(self, params: np.ndarray[Any, Any]) -> Kernel:
        """The same kernel and launch with other parameters: those that `source.pack_params` would pack."""
        other = Kernel.__new__(Kernel)
        other._block, other._function, other._grid = self._block, self._function, self._grid
        other._shared_bytes = self._shared_bytes
        other._params = cupy_module().cuda.function.CNumpyArray(params)
        return other

    def launch(self, *pointers: Any) -> None:
        """Launch on the current device and CuPy's current stream. The only place in gpuconv that launches a kernel."""
        self._function(self._grid, self._block, (*pointers, self._params), self._shared_bytes)


def append(window: Any, samples: Any) -> None:
    """Move the samples of a contiguous window (N, C, held + L) forward by L, and write `samples` (N, C, L) behind them.

    This is one launch on the current device and CuPy's current stream; it allocates nothing if `samples` is aligned.
    """
    from ..families.append import append_launch
    from ..families.base import ArrayLayout

    samples = aligned(samples)
    if samples.size == 0:
        return
    itemsize = samples.dtype.itemsize
    layout = ArrayLayout.of(samples.shape, samples.strides, 0, itemsize)
    assert layout is not None  # aligned
    step = append_launch(samples.dtype.name, window.shape, samples.shape, layout)
    _append_kernel(int(samples.data.device_id), *step).launch(samples.data, window.data)


@lru_cache(maxsize=256)
def _append_kernel(device_index: int, config: Config, launch: Launch) -> Kernel:  # noqa: ARG001 (one for each GPU)
    return Kernel(config, launch)
