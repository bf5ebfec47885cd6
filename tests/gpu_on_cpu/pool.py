"""Poisons what CuPy's memory pool takes back, which CUDA's functions do not see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import machine, memory, streams
from .cuda_memory import check_range


@contextmanager
def poisoned_pool() -> Iterator[None]:
    """In the context, and in this thread, memory that goes back to the pool holds poison from then on.

    The poison is queued on the stream that the memory was handed out for, as is whatever uses the memory next. While a
    stream captures nothing is poisoned.
    """
    import cupy

    class Poison(cupy.cuda.MemoryHook):  # type: ignore[misc]
        name = "gpu_on_cpu"

        def __init__(self) -> None:
            self._streams: dict[int, int] = {}  # by address

        def malloc_postprocess(self, *, mem_ptr: int, **_: Any) -> None:
            # On the current GPU. `device_id` is for all of CuPy's pools that on which the first memory was allocated.
            self._streams[mem_ptr] = cupy.cuda.get_current_stream().ptr

        def free_preprocess(self, *, device_id: int, mem_size: int, mem_ptr: int, pmem_id: int) -> None:
            if mem_ptr in self._streams:
                _poison(device_id, self._streams.pop(mem_ptr), mem_ptr, mem_size)

    with Poison():
        yield


def _poison(device: int, handle: int, address: int, num_bytes: int) -> None:
    def run() -> None:
        check_range(address, num_bytes)
        memory.fill_with_poison(address, num_bytes)

    with machine.LOCK:
        stream = machine.DEVICES[device].legacy if handle == 0 else machine.HANDLES.find(handle)
        if isinstance(stream, streams.Stream) and not streams.Capture.active:
            stream.queue(run)
