"""CUDA's runtime: allocations, copies and fills."""

from __future__ import annotations

import ctypes
import weakref

from . import memory, streams
from .errors import Code, CudaError
from .machine import (
    DEVICES,
    HANDLES,
    INT,
    POINTER,
    RUNTIME,
    SHARED,
    SIZE,
    THREAD,
    UINT,
    device_of,
    enter,
    find_arena,
    forbid_during_capture,
    invalid,
    own_stream,
    raise_error,
    runtime,
    store,
)


def _allocate(out: int, size: int, arena: memory.Arena) -> None:
    store(out, POINTER, arena.allocate(size).address if size else 0)


def _free(address: int) -> None:
    """Free what is no longer in use. The device first ends its work, as with cudaFree."""
    if address == 0:
        return
    arena = find_arena(address)
    found = arena.find(address) if arena else None
    if arena is None or found is None or found.address != address:
        raise invalid(f"{address:#x} is no allocation" + (f": {arena.describe(address)}" if arena else ""))
    for device in DEVICES:
        streams.QUEUE.run_all(device)
    arena.free(found)


@runtime(POINTER, SIZE)
def cudaMalloc(out: int, size: int) -> None:
    device = enter()
    forbid_during_capture("cudaMalloc")
    _allocate(out, size, device.arena)


@runtime(POINTER, SIZE, UINT)
def cudaHostAlloc(out: int, size: int, _flags: int) -> None:
    enter()
    forbid_during_capture("an allocation")
    _allocate(out, size, SHARED)


RUNTIME["cudaMallocManaged"] = RUNTIME["cudaHostAlloc"]


@runtime(POINTER)
def cudaFreeHost(address: int) -> None:
    enter()
    forbid_during_capture("cudaFree")
    _free(address)


RUNTIME["cudaFree"] = RUNTIME["cudaFreeHost"]


class _GraphMemory:
    """The node that allocates memory in a graph; the memory has one address and lives as long as the node.

    Where the node runs and where the memory is freed in the graph, it is poisoned: nothing may be left there from one
    launch to the next. The capture holds the node, so the node refers to it weakly, to die with its graph at once.
    """

    def __init__(self, arena: memory.Arena, size: int, capture: streams.Capture) -> None:
        self.allocation = arena.allocate(size)
        self.capture = weakref.ref(capture)
        self.is_freed = False
        weakref.finalize(self, arena.free, self.allocation)

    def __call__(self) -> None:
        memory.fill_with_poison(self.allocation.address, self.allocation.size)


_graph_memory: weakref.WeakValueDictionary[int, _GraphMemory] = weakref.WeakValueDictionary()  # by address


def _allocate_in_stream(out: int, size: int, handle: int, arena: memory.Arena) -> None:
    stream = own_stream(handle)
    if stream.capture is None:
        _allocate(out, size, arena)
        return
    node = _GraphMemory(arena, size, stream.capture)
    stream.queue(node)
    _graph_memory[node.allocation.address] = node
    store(out, POINTER, node.allocation.address)


@runtime(POINTER, SIZE, POINTER)
def cudaMallocAsync(out: int, size: int, handle: int) -> None:
    _allocate_in_stream(out, size, handle, enter().arena)


@runtime(POINTER, POINTER)
def cudaFreeAsync(address: int, handle: int) -> None:
    arena = find_arena(address)
    found = arena.find(address) if arena else None
    if arena is None or found is None:
        raise invalid(f"{address:#x} is no allocation")
    stream, node = own_stream(handle), _graph_memory.get(address)
    if node is None and stream.capture is not None:
        raise invalid(f"memory from outside of the graph is freed in it: {arena.describe(address)}")
    if node is not None:
        if stream.capture is None or node.capture() is not stream.capture or node.is_freed:
            raise invalid(f"memory of a graph is freed outside of its capture, or twice: {arena.describe(address)}")
        node.is_freed = True
    stream.queue(node or (lambda: arena.free(found)))


# A device has one memory pool, its default one, which keeps nothing that is freed.

_POOLS = {device: HANDLES.add(device.arena) for device in DEVICES}
_thresholds: dict[int, int] = {}
_RELEASE_THRESHOLD, _RESERVED_NOW, _USED_NOW = 4, 5, 7  # cudaMemPoolAttr


@runtime(POINTER, INT)
def cudaDeviceGetMemPool(out: int, index: int) -> None:
    store(out, POINTER, _POOLS[device_of(index)])


RUNTIME["cudaDeviceGetDefaultMemPool"] = RUNTIME["cudaDeviceGetMemPool"]


@runtime(INT, POINTER)
def cudaDeviceSetMemPool(index: int, pool: int) -> None:
    if pool != _POOLS[device_of(index)]:
        raise CudaError(Code.NotSupported, "gpu_on_cpu: another memory pool than the default one")


@runtime(POINTER, SIZE, POINTER, POINTER)
def cudaMallocFromPoolAsync(out: int, size: int, pool: int, handle: int) -> None:
    _allocate_in_stream(out, size, handle, HANDLES.get(pool, memory.Arena))


@runtime(POINTER, INT, POINTER)
def cudaMemPoolGetAttribute(pool: int, attribute: int, out: int) -> None:
    used = HANDLES.get(pool, memory.Arena).used
    values = {_RELEASE_THRESHOLD: _thresholds.get(pool, 0), _RESERVED_NOW: used, _USED_NOW: used}
    if attribute not in values:
        raise CudaError(Code.NotSupported, f"gpu_on_cpu does not know the attribute {attribute} of a memory pool")
    store(out, SIZE, values[attribute])


@runtime(POINTER, INT, POINTER)
def cudaMemPoolSetAttribute(pool: int, attribute: int, value: int) -> None:
    HANDLES.get(pool, memory.Arena)
    if attribute != _RELEASE_THRESHOLD:
        raise CudaError(Code.NotSupported, f"gpu_on_cpu does not know the attribute {attribute} of a memory pool")
    _thresholds[pool] = SIZE.from_address(value).value


@runtime(POINTER, SIZE)
def cudaMemPoolTrimTo(pool: int, _size: int) -> None:
    HANDLES.get(pool, memory.Arena)


@runtime(POINTER, POINTER)
def cudaMemGetInfo(free: int, total: int) -> None:
    arena = enter().arena
    store(free, SIZE, arena.capacity - arena.used)
    store(total, SIZE, arena.capacity)


class PointerAttributes(ctypes.Structure):
    """`cudaPointerAttributes` of CUDA 13."""

    _fields_ = (
        ("type", INT),
        ("device", INT),
        ("devicePointer", POINTER),
        ("hostPointer", POINTER),
        ("reserved", ctypes.c_long * 8),
    )


@runtime(POINTER, POINTER)
def cudaPointerGetAttributes(out: int, address: int) -> None:
    enter()
    arena = find_arena(address)
    attributes = PointerAttributes(type=0, device=-2, hostPointer=address)  # not known to CUDA
    if arena is not None and arena.find(address) is not None:
        owner = next((device.index for device in DEVICES if device.arena is arena), THREAD.device)
        attributes = PointerAttributes(
            type=1 if arena is SHARED else 2,
            device=owner,
            devicePointer=address,
            hostPointer=address if arena is SHARED else 0,
        )
    ctypes.memmove(out, ctypes.addressof(attributes), ctypes.sizeof(attributes))


def check_range(address: int, size: int) -> None:
    arena = find_arena(address)
    if arena is not None and size:
        arena.check(address, size)


def _is_pageable(address: int) -> bool:
    """Whether an address is the host's own memory, which CUDA copies from before a call returns."""
    return find_arena(address) is None


def _copy(target: int, source: int, size: int, stream: streams.Stream) -> None:
    """Queue a copy. A copy to pageable memory is complete when this returns; one from there has been read."""
    for address in (target, source):
        check_range(address, size)
    if size == 0:
        return
    pageable_target, pageable_source = _is_pageable(target), _is_pageable(source)
    if pageable_source and stream.capture is None:
        staged = ctypes.string_at(source, size)

        def run() -> None:
            check_range(target, size)
            ctypes.memmove(target, staged, size)
    else:

        def run() -> None:
            for address in (target, source):
                check_range(address, size)
            ctypes.memmove(target, source, size)

    arenas = (find_arena(target), find_arena(source))
    others = [device for device in DEVICES if device.arena in arenas and device is not stream.owner]
    if stream is stream.owner.legacy and others:
        # In the default stream, a copy between two devices waits for all work of both, and they wait for it.
        waited = [other.tail for device in (*others, stream.owner) for other in (device.legacy, *device.streams)]
        work = stream.queue(run, *waited)
        for device in others:
            device.legacy.tail = work
    else:
        stream.queue(run)
    if pageable_target and stream.capture is None:
        stream.wait()


def _copy_and_wait(target: int, source: int, size: int) -> None:
    device = enter()
    forbid_during_capture("a synchronous copy")
    _copy(target, source, size, device.legacy)
    device.legacy.wait()
    raise_error(device)


@runtime(POINTER, POINTER, SIZE, INT)
def cudaMemcpy(target: int, source: int, size: int, _kind: int) -> None:
    _copy_and_wait(target, source, size)


@runtime(POINTER, INT, POINTER, INT, SIZE)
def cudaMemcpyPeer(target: int, target_device: int, source: int, source_device: int, size: int) -> None:
    for index in (target_device, source_device):  # a copy between devices waits for both
        streams.QUEUE.run_all(device_of(index))
    _copy_and_wait(target, source, size)


def _copy_in_stream(target: int, source: int, size: int, handle: int) -> None:
    stream = own_stream(handle)
    _copy(target, source, size, stream)
    raise_error(enter())


@runtime(POINTER, POINTER, SIZE, INT, POINTER)
def cudaMemcpyAsync(target: int, source: int, size: int, _kind: int, handle: int) -> None:
    _copy_in_stream(target, source, size, handle)


@runtime(POINTER, INT, POINTER, INT, SIZE, POINTER)
def cudaMemcpyPeerAsync(
    target: int, target_device: int, source: int, source_device: int, size: int, handle: int
) -> None:
    device_of(target_device), device_of(source_device)
    _copy_in_stream(target, source, size, handle)


def _set(address: int, value: int, size: int, stream: streams.Stream) -> None:
    def run() -> None:
        check_range(address, size)
        ctypes.memset(address, value, size)

    if _is_pageable(address):
        raise invalid(f"{address:#x} is no device memory")
    check_range(address, size)
    stream.queue(run)


@runtime(POINTER, INT, SIZE)
def cudaMemset(address: int, value: int, size: int) -> None:
    device = enter()
    forbid_during_capture("cudaMemset")
    _set(address, value, size, device.legacy)


@runtime(POINTER, INT, SIZE, POINTER)
def cudaMemsetAsync(address: int, value: int, size: int, handle: int) -> None:
    _set(address, value, size, own_stream(handle))
