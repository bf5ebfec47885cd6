"""The functions of CUDA's runtime and driver that CuPy calls for gpuconv, by NVIDIA's documentation.

`RUNTIME` and `DRIVER` hold them by name, ready to be called from C. A function raises `CudaError` for an error code.
Everything happens under one lock: a call is one step, and kernels run inside the call that waits for them.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from gpuconv.device import Device as Model

from ..hostcuda import launch
from . import memory, modules, streams
from .errors import Code, CudaError

ARCH = os.environ.get("GPU_ON_CPU", "sm_90")
NUM_DEVICES = 2
VERSION = 13020  # of CUDA, which the driver is said to support
DEVICE_BYTES = 4 << 30

_INT, _UINT, _SIZE, _FLOAT = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_float
_POINTER = ctypes.c_size_t  # and all handles, so that they arrive as integers
_ULONGLONG = ctypes.c_ulonglong


# -- what there is -----------------------------------------------------------------------------------------------------

# Device 0, what is shared, device 1: a device may use a contiguous range of addresses, which holds what is shared.
_BASE = memory.reserve(3 * memory.ARENA_BYTES)
_SHARED = memory.Arena("the host", _BASE + memory.ARENA_BYTES, DEVICE_BYTES)


class Device(streams.Owner):
    """A GPU.

    Attributes:
        index: its number.
        arena: its memory.
        bounds: the addresses that its kernels may use.
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.arena = memory.Arena(f"device {index}", _BASE + 2 * index * memory.ARENA_BYTES, DEVICE_BYTES)
        first = _BASE + index * memory.ARENA_BYTES
        self.bounds = (first, first + 2 * memory.ARENA_BYTES)


MODEL = Model.from_arch(ARCH)
DEVICES = tuple(Device(index) for index in range(NUM_DEVICES))
_ARENAS = (_SHARED, *(device.arena for device in DEVICES))
_CORES = launch.TensorCores.of(MODEL)


class _Thread(threading.local):
    """What CUDA keeps for each thread.

    Attributes:
        device: the runtime's current device.
        context: the device whose primary context is current; None before a call needed one.
        error: the last error of the runtime.
        message: what it says.
        capture_mode: of cudaThreadExchangeStreamCaptureMode.
        default_stream: the per-thread default streams by device.
    """

    def __init__(self) -> None:
        self.device = 0
        self.context: Device | None = None
        self.error = 0
        self.message: dict[int, str] = {}
        self.capture_mode = streams.GLOBAL
        self.default_stream: dict[int, streams.Stream] = {}


_THREAD = _Thread()
_LOCK = threading.RLock()


class _Handles:
    """Objects by the numbers that C code knows them by."""

    def __init__(self) -> None:
        self._objects: dict[int, Any] = {}
        self._next = 0x10000

    def add(self, value: object) -> int:
        self._next += 16
        self._objects[self._next] = value
        return self._next

    def get(self, handle: int, kind: type[Any]) -> Any:
        value = self._objects.get(handle)
        if not isinstance(value, kind):
            raise CudaError(Code.InvalidResourceHandle, f"{handle:#x} is no {kind.__name__.lower()}")
        return value

    def remove(self, handle: int, kind: type[Any]) -> Any:
        value = self.get(handle, kind)
        del self._objects[handle]
        return value


_HANDLES = _Handles()
_CONTEXTS = {device: _HANDLES.add(device) for device in DEVICES}


def _enter() -> Device:
    """The current device, with its context made current; its error, if it has one.

    Raises:
        CudaError: an earlier fault ended the device.
    """
    if _THREAD.context is None:
        _THREAD.context = DEVICES[_THREAD.device]
    _raise_error(_THREAD.context)
    return _THREAD.context


def _context() -> Device:
    """The current device of the driver, which makes no context current by itself.

    Raises:
        CudaError: no context is current.
    """
    if _THREAD.context is None:
        raise CudaError(Code.DeviceUninitialized, "no context is current in this thread")
    _raise_error(_THREAD.context)
    return _THREAD.context


def _raise_error(device: Device) -> None:
    if device.error is not None:
        raise CudaError(device.error.code, device.error.message)


def _stream(handle: int) -> streams.Stream:
    """The stream of a handle, on the current device.

    Raises:
        CudaError: it belongs to another device.
    """
    device = _enter()
    if handle in (0, 1):
        return device.legacy
    if handle == 2:
        return _THREAD.default_stream.setdefault(device.index, _new_stream(device, blocking=True))
    found: streams.Stream = _HANDLES.get(handle, streams.Stream)
    return found


def _new_stream(device: Device, *, blocking: bool, priority: int = 0) -> streams.Stream:
    stream = streams.Stream(device, blocking=blocking, priority=priority)
    device.streams.add(stream)
    return stream


def _own_stream(handle: int) -> streams.Stream:
    stream = _stream(handle)
    if stream.owner is not _THREAD.context:
        raise CudaError(Code.InvalidResourceHandle, "the stream belongs to another device than the current one")
    return stream


def _unsafe(what: str) -> None:
    """The call is one of those that a capture in global mode forbids.

    Raises:
        CudaError: it is forbidden now.
    """
    streams.forbid_during_capture(what, _THREAD.capture_mode)


def _store(address: int, kind: Any, value: Any) -> None:
    kind.from_address(address).value = value


def _find_arena(address: int) -> memory.Arena | None:
    return next((arena for arena in _ARENAS if address in arena), None)


def _invalid(message: str) -> CudaError:
    return CudaError(Code.InvalidValue, message)


# -- calls from C ------------------------------------------------------------------------------------------------------

RUNTIME: dict[str, Any] = {}
DRIVER: dict[str, Any] = {}
REFUSED: list[str] = []
"""The functions that were called and are not here."""


def _callback(function: Callable[..., None], kinds: tuple[Any, ...]) -> Any:
    def call(*arguments: Any) -> int:
        with _LOCK:
            collecting = gc.isenabled()
            gc.disable()  # a finalizer of CuPy's would call here again in the midst of this call
            try:
                function(*arguments)
                return 0
            except CudaError as error:
                code, message = int(error.code), error.message
            except BaseException as error:
                traceback.print_exc()
                code, message = int(Code.Unknown), f"gpu_on_cpu itself failed: {error!r}"
            finally:
                if collecting:
                    gc.enable()
            _THREAD.error = code
            _THREAD.message[code] = message
            return code

    return ctypes.CFUNCTYPE(_INT, *kinds)(call)


def _runtime(*kinds: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A function of CUDA's runtime, under its own name."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        RUNTIME[function.__name__] = _callback(function, kinds)
        return function

    return register


def _driver(*kinds: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A function of CUDA's driver, under its own name."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        DRIVER[function.__name__] = _callback(function, kinds)
        return function

    return register


def refusal(name: str) -> Any:
    """A function that fails with its name."""

    def refuse() -> None:
        REFUSED.append(name)
        print(f"gpu_on_cpu: {name} is not implemented", file=sys.stderr)
        raise CudaError(Code.NotSupported, f"gpu_on_cpu does not implement {name}")

    return _callback(refuse, ())


# -- errors ------------------------------------------------------------------------------------------------------------

_KEPT: dict[bytes, Any] = {}  # C strings that were handed out


def _c_string(text: str) -> int:
    buffer = _KEPT.setdefault(text.encode(), ctypes.create_string_buffer(text.encode()))
    return ctypes.addressof(buffer)


def _error_name(code: int) -> str:
    return f"cudaError{Code(code).name}" if code in Code.__members__.values() else f"error {code}"


def _error_string(code: int) -> str:
    return _THREAD.message.get(code, _error_name(code))


def _take_last_error() -> int:
    code, _THREAD.error = _THREAD.error, 0
    return code


RUNTIME["cudaGetErrorName"] = ctypes.CFUNCTYPE(_POINTER, _INT)(lambda code: _c_string(_error_name(code)))
RUNTIME["cudaGetErrorString"] = ctypes.CFUNCTYPE(_POINTER, _INT)(lambda code: _c_string(_error_string(code)))
RUNTIME["cudaGetLastError"] = ctypes.CFUNCTYPE(_INT)(_take_last_error)


@_driver(_INT, _POINTER)
def cuGetErrorName(code: int, out: int) -> None:
    _store(out, _POINTER, _c_string(_error_name(code)))


@_driver(_INT, _POINTER)
def cuGetErrorString(code: int, out: int) -> None:
    _store(out, _POINTER, _c_string(_error_string(code)))


# -- devices -----------------------------------------------------------------------------------------------------------


def _device(index: int) -> Device:
    if not 0 <= index < NUM_DEVICES:
        raise CudaError(Code.InvalidDevice, f"there is no device {index}")
    return DEVICES[index]


@_runtime(_POINTER)
def cudaRuntimeGetVersion(out: int) -> None:
    _store(out, _INT, VERSION)


RUNTIME["cudaDriverGetVersion"] = RUNTIME["cudaRuntimeGetVersion"]


@_runtime(_POINTER)
def cudaGetDeviceCount(out: int) -> None:
    _store(out, _INT, NUM_DEVICES)


@_runtime(_POINTER)
def cudaGetDevice(out: int) -> None:
    _store(out, _INT, _THREAD.device if _THREAD.context is None else _THREAD.context.index)


@_runtime(_INT)
def cudaSetDevice(index: int) -> None:
    device = _device(index)
    _THREAD.device, _THREAD.context = index, device
    _raise_error(device)


_MAX_GRID = (2**31 - 1, 65535, 65535)
_MAX_BLOCK = (1024, 1024, 64)
_ATTRIBUTES = {  # cudaDeviceAttr
    1: 1024,
    **dict(enumerate(_MAX_BLOCK, 2)),
    **dict(enumerate(_MAX_GRID, 5)),
    8: 48 * 1024,
    9: 64 * 1024,
    10: 32,
    12: 64 * 1024,
    13: 1_000_000,
    15: 1,
    16: MODEL.num_sms,
    17: 0,
    20: 0,
    31: 1,
    36: 1_000_000,
    38: MODEL.l2_bytes,
    39: MODEL.threads_per_sm,
    40: 1,
    41: 1,
    75: MODEL.arch // 10,
    76: MODEL.arch % 10,
    69: 1 << 17,
    78: 1,
    81: MODEL.shared_per_sm,
    82: 64 * 1024,
    83: 1,
    87: 2,
    96: 0,
    97: MODEL.shared_per_block,
    106: 32,
    115: 1,
}


@_runtime(_POINTER, _INT, _INT)
def cudaDeviceGetAttribute(out: int, attribute: int, index: int) -> None:
    _device(index)
    if attribute not in _ATTRIBUTES:
        raise CudaError(Code.NotSupported, f"gpu_on_cpu does not know the device attribute {attribute}")
    _store(out, _INT, _ATTRIBUTES[attribute])


class DeviceProperties(ctypes.Structure):
    """`cudaDeviceProp` of CUDA 13."""

    _fields_ = (
        ("name", ctypes.c_char * 256),
        ("uuid", ctypes.c_char * 16),
        ("luid", ctypes.c_char * 8),
        ("luidDeviceNodeMask", _UINT),
        ("totalGlobalMem", _SIZE),
        ("sharedMemPerBlock", _SIZE),
        ("regsPerBlock", _INT),
        ("warpSize", _INT),
        ("memPitch", _SIZE),
        ("maxThreadsPerBlock", _INT),
        ("maxThreadsDim", _INT * 3),
        ("maxGridSize", _INT * 3),
        ("totalConstMem", _SIZE),
        ("major", _INT),
        ("minor", _INT),
        ("textureAlignment", _SIZE),
        ("texturePitchAlignment", _SIZE),
        ("multiProcessorCount", _INT),
        ("integrated", _INT),
        ("canMapHostMemory", _INT),
        ("textures_and_surfaces", _INT * 39),
        ("surfaceAlignment", _SIZE),
        ("concurrentKernels", _INT),
        ("ECCEnabled", _INT),
        ("pciBusID", _INT),
        ("pciDeviceID", _INT),
        ("pciDomainID", _INT),
        ("tccDriver", _INT),
        ("asyncEngineCount", _INT),
        ("unifiedAddressing", _INT),
        ("memoryBusWidth", _INT),
        ("l2CacheSize", _INT),
        ("persistingL2CacheMaxSize", _INT),
        ("maxThreadsPerMultiProcessor", _INT),
        ("streamPrioritiesSupported", _INT),
        ("globalL1CacheSupported", _INT),
        ("localL1CacheSupported", _INT),
        ("sharedMemPerMultiprocessor", _SIZE),
        ("regsPerMultiprocessor", _INT),
        ("managedMemory", _INT),
        ("isMultiGpuBoard", _INT),
        ("multiGpuBoardGroupID", _INT),
        ("hostNativeAtomicSupported", _INT),
        ("pageableMemoryAccess", _INT),
        ("concurrentManagedAccess", _INT),
        ("computePreemptionSupported", _INT),
        ("canUseHostPointerForRegisteredMem", _INT),
        ("cooperativeLaunch", _INT),
        ("sharedMemPerBlockOptin", _SIZE),
        ("pageableMemoryAccessUsesHostPageTables", _INT),
        ("directManagedMemAccessFromHost", _INT),
        ("maxBlocksPerMultiProcessor", _INT),
        ("accessPolicyMaxWindowSize", _INT),
        ("reservedSharedMemPerBlock", _SIZE),
        ("others", _INT * 76),
    )


_PROPERTIES: dict[str, Any] = {
    "name": f"CPU posing as {MODEL.name}".encode(),
    "totalGlobalMem": DEVICE_BYTES,
    "sharedMemPerBlock": 48 * 1024,
    "regsPerBlock": 64 * 1024,
    "warpSize": 32,
    "maxThreadsPerBlock": 1024,
    "maxThreadsDim": _MAX_BLOCK,
    "maxGridSize": _MAX_GRID,
    "totalConstMem": 64 * 1024,
    "major": MODEL.arch // 10,
    "minor": MODEL.arch % 10,
    "multiProcessorCount": MODEL.num_sms,
    "concurrentKernels": 1,
    "asyncEngineCount": 1,
    "unifiedAddressing": 1,
    "l2CacheSize": MODEL.l2_bytes,
    "maxThreadsPerMultiProcessor": MODEL.threads_per_sm,
    "streamPrioritiesSupported": 1,
    "sharedMemPerMultiprocessor": MODEL.shared_per_sm,
    "regsPerMultiprocessor": 64 * 1024,
    "managedMemory": 1,
    "sharedMemPerBlockOptin": MODEL.shared_per_block,
    "maxBlocksPerMultiProcessor": 32,
}


@_runtime(_POINTER, _INT)
def cudaGetDeviceProperties(out: int, index: int) -> None:
    _device(index)
    properties = DeviceProperties(**{"uuid": bytes([index + 1]), "pciBusID": index + 1} | _PROPERTIES)
    ctypes.memmove(out, ctypes.addressof(properties), ctypes.sizeof(properties))


@_runtime(_POINTER, _INT, _INT)
def cudaDeviceGetPCIBusId(out: int, length: int, index: int) -> None:
    text = f"0000:{_device(index).index + 1:02x}:00.0".encode()[: length - 1] + b"\0"
    ctypes.memmove(out, text, len(text))


@_runtime(_POINTER, _INT, _INT)
def cudaDeviceCanAccessPeer(out: int, index: int, other: int) -> None:
    _device(index), _device(other)
    _store(out, _INT, 0)


@_runtime()
def cudaDeviceSynchronize() -> None:
    device = _enter()
    for stream in device.streams:
        stream.forbid_capture("the device is waited for while a stream captures")
    streams.QUEUE.run_all(device)
    _raise_error(device)


@_driver(_POINTER)
def cuCtxGetCurrent(out: int) -> None:
    _store(out, _POINTER, 0 if _THREAD.context is None else _CONTEXTS[_THREAD.context])


@_driver(_POINTER)
def cuCtxSetCurrent(handle: int) -> None:
    _THREAD.context = _HANDLES.get(handle, Device) if handle else None


@_driver(_POINTER)
def cuCtxGetDevice(out: int) -> None:
    _store(out, _INT, _context().index)


@_driver(_INT)
def cuDevicePrimaryCtxRelease_v2(index: int) -> None:
    _device(index)


@_driver(_POINTER, _POINTER)
def cuStreamGetCtx(handle: int, out: int) -> None:
    owner = _stream(handle).owner
    assert isinstance(owner, Device)
    _store(out, _POINTER, _CONTEXTS[owner])


# -- memory ------------------------------------------------------------------------------------------------------------


def _allocate(out: int, size: int, arena: memory.Arena) -> None:
    _store(out, _POINTER, arena.allocate(size).address if size else 0)


def _free(address: int) -> None:
    """Free what is not in use any more: the device ends its work first, as cudaFree makes it."""
    if address == 0:
        return
    arena = _find_arena(address)
    found = arena.find(address) if arena else None
    if arena is None or found is None or found.address != address:
        raise _invalid(f"{address:#x} is no allocation" + (f": {arena.describe(address)}" if arena else ""))
    for device in DEVICES:
        streams.QUEUE.run_all(device)
    arena.free(found)


@_runtime(_POINTER, _SIZE)
def cudaMalloc(out: int, size: int) -> None:
    device = _enter()
    _unsafe("cudaMalloc")
    _allocate(out, size, device.arena)


@_runtime(_POINTER, _SIZE, _UINT)
def cudaHostAlloc(out: int, size: int, _flags: int) -> None:
    _enter()
    _unsafe("an allocation")
    _allocate(out, size, _SHARED)


RUNTIME["cudaMallocManaged"] = RUNTIME["cudaHostAlloc"]


@_runtime(_POINTER)
def cudaFreeHost(address: int) -> None:
    _enter()
    _unsafe("cudaFree")
    _free(address)


RUNTIME["cudaFree"] = RUNTIME["cudaFreeHost"]


@_runtime(_POINTER, _SIZE, _POINTER)
def cudaMallocAsync(out: int, size: int, handle: int) -> None:
    stream = _own_stream(handle)
    if stream.capture is not None:
        raise CudaError(Code.NotSupported, "gpu_on_cpu: cudaMallocAsync during a capture")
    _allocate(out, size, _enter().arena)


@_runtime(_POINTER, _POINTER)
def cudaFreeAsync(address: int, handle: int) -> None:
    arena = _find_arena(address)
    found = arena.find(address) if arena else None
    if arena is None or found is None:
        raise _invalid(f"{address:#x} is no allocation")
    _own_stream(handle).queue(lambda: arena.free(found))


@_runtime(_POINTER, _POINTER)
def cudaMemGetInfo(free: int, total: int) -> None:
    arena = _enter().arena
    _store(free, _SIZE, arena.capacity - arena.used)
    _store(total, _SIZE, arena.capacity)


class PointerAttributes(ctypes.Structure):
    """`cudaPointerAttributes` of CUDA 13."""

    _fields_ = (
        ("type", _INT),
        ("device", _INT),
        ("devicePointer", _POINTER),
        ("hostPointer", _POINTER),
        ("reserved", ctypes.c_long * 8),
    )


@_runtime(_POINTER, _POINTER)
def cudaPointerGetAttributes(out: int, address: int) -> None:
    _enter()
    arena = _find_arena(address)
    attributes = PointerAttributes(type=0, device=-2, hostPointer=address)  # not known to CUDA
    if arena is not None and arena.find(address) is not None:
        owner = next((device.index for device in DEVICES if device.arena is arena), _THREAD.device)
        attributes = PointerAttributes(
            type=1 if arena is _SHARED else 2,
            device=owner,
            devicePointer=address,
            hostPointer=address if arena is _SHARED else 0,
        )
    ctypes.memmove(out, ctypes.addressof(attributes), ctypes.sizeof(attributes))


def _check_range(address: int, size: int) -> None:
    arena = _find_arena(address)
    if arena is not None and size:
        arena.check(address, size)


def _is_pageable(address: int) -> bool:
    """Whether an address is the host's own memory, which CUDA copies from before a call returns."""
    return _find_arena(address) is None


def _copy(target: int, source: int, size: int, stream: streams.Stream) -> None:
    """Queue a copy; one to pageable memory is waited for, one from there has been read when this returns."""
    for address in (target, source):
        _check_range(address, size)
    if size == 0:
        return
    pageable_target, pageable_source = _is_pageable(target), _is_pageable(source)
    if pageable_source and stream.capture is None:
        staged = ctypes.string_at(source, size)

        def run() -> None:
            _check_range(target, size)
            ctypes.memmove(target, staged, size)
    else:

        def run() -> None:
            for address in (target, source):
                _check_range(address, size)
            ctypes.memmove(target, source, size)

    stream.queue(run)
    if pageable_target and stream.capture is None:
        stream.wait()


def _copy_and_wait(target: int, source: int, size: int) -> None:
    device = _enter()
    _unsafe("a synchronous copy")
    _copy(target, source, size, device.legacy)
    device.legacy.wait()
    _raise_error(device)


@_runtime(_POINTER, _POINTER, _SIZE, _INT)
def cudaMemcpy(target: int, source: int, size: int, _kind: int) -> None:
    _copy_and_wait(target, source, size)


@_runtime(_POINTER, _INT, _POINTER, _INT, _SIZE)
def cudaMemcpyPeer(target: int, target_device: int, source: int, source_device: int, size: int) -> None:
    for index in (target_device, source_device):  # a copy between devices waits for both
        streams.QUEUE.run_all(_device(index))
    _copy_and_wait(target, source, size)


def _copy_in_stream(target: int, source: int, size: int, handle: int) -> None:
    stream = _own_stream(handle)
    _copy(target, source, size, stream)
    _raise_error(_enter())


@_runtime(_POINTER, _POINTER, _SIZE, _INT, _POINTER)
def cudaMemcpyAsync(target: int, source: int, size: int, _kind: int, handle: int) -> None:
    _copy_in_stream(target, source, size, handle)


@_runtime(_POINTER, _INT, _POINTER, _INT, _SIZE, _POINTER)
def cudaMemcpyPeerAsync(
    target: int, target_device: int, source: int, source_device: int, size: int, handle: int
) -> None:
    _device(target_device), _device(source_device)
    _copy_in_stream(target, source, size, handle)


def _set(address: int, value: int, size: int, stream: streams.Stream) -> None:
    def run() -> None:
        _check_range(address, size)
        ctypes.memset(address, value, size)

    if _is_pageable(address):
        raise _invalid(f"{address:#x} is no device memory")
    _check_range(address, size)
    stream.queue(run)


@_runtime(_POINTER, _INT, _SIZE)
def cudaMemset(address: int, value: int, size: int) -> None:
    device = _enter()
    _unsafe("cudaMemset")
    _set(address, value, size, device.legacy)


@_runtime(_POINTER, _INT, _SIZE, _POINTER)
def cudaMemsetAsync(address: int, value: int, size: int, handle: int) -> None:
    _set(address, value, size, _own_stream(handle))


# -- streams, events, graphs -------------------------------------------------------------------------------------------


def _create_stream(out: int, flags: int = 0, priority: int = 0) -> None:
    stream = _new_stream(_enter(), blocking=not flags & 1, priority=priority)
    _store(out, _POINTER, _HANDLES.add(stream))


RUNTIME["cudaStreamCreate"] = _callback(_create_stream, (_POINTER,))
RUNTIME["cudaStreamCreateWithFlags"] = _callback(_create_stream, (_POINTER, _UINT))
RUNTIME["cudaStreamCreateWithPriority"] = _callback(_create_stream, (_POINTER, _UINT, _INT))


@_runtime(_POINTER)
def cudaStreamDestroy(handle: int) -> None:
    stream = _HANDLES.remove(handle, streams.Stream)
    stream.owner.streams.discard(stream)  # its work still runs when its turn comes


@_runtime(_POINTER)
def cudaStreamSynchronize(handle: int) -> None:
    stream = _stream(handle)
    stream.wait()
    assert isinstance(stream.owner, Device)
    _raise_error(stream.owner)


@_runtime(_POINTER)
def cudaStreamQuery(handle: int) -> None:
    stream = _stream(handle)
    stream.forbid_capture("a stream that captures is asked")
    if stream.tail is not None and not stream.tail.done:
        streams.QUEUE.step()  # so that asking again ends
        raise CudaError(Code.NotReady, "the stream has work")
    _enter()


@_runtime(_POINTER, _POINTER, _UINT)
def cudaStreamWaitEvent(handle: int, event: int, _flags: int) -> None:
    _HANDLES.get(event, streams.Event).make_wait(_stream(handle))


@_runtime(_POINTER, _POINTER)
def cudaStreamGetFlags(handle: int, out: int) -> None:
    _store(out, _UINT, not _stream(handle).blocking)


@_runtime(_POINTER, _POINTER)
def cudaStreamGetPriority(handle: int, out: int) -> None:
    _store(out, _INT, _stream(handle).priority)


@_runtime(_POINTER, _POINTER)
def cudaStreamIsCapturing(handle: int, out: int) -> None:
    stream = _stream(handle)
    if stream is stream.owner.legacy and any(other.capture for other in stream.owner.blocking_streams()):
        raise CudaError(Code.StreamCaptureImplicit, "the legacy default stream is asked while a stream captures")
    _store(out, _INT, 0 if stream.capture is None else 1 if stream.capture.is_valid else 2)


@_runtime(_POINTER, _INT)
def cudaStreamBeginCapture(handle: int, mode: int) -> None:
    stream = _stream(handle)
    if stream.capture is not None:
        raise CudaError(Code.IllegalState, "the stream captures already")
    if stream is stream.owner.legacy:
        raise CudaError(Code.StreamCaptureUnsupported, "the legacy default stream cannot capture")
    streams.Capture(stream, mode)


@_runtime(_POINTER, _POINTER)
def cudaStreamEndCapture(handle: int, out: int) -> None:
    stream = _stream(handle)
    _store(out, _POINTER, 0)
    if stream.capture is None:
        raise CudaError(Code.IllegalState, "the stream does not capture")
    if stream.capture.origin is not stream:
        raise CudaError(Code.StreamCaptureUnmatched, "another stream began the capture")
    if stream.capture.mode != streams.RELAXED and stream.capture.thread != threading.get_ident():
        raise CudaError(Code.StreamCaptureWrongThread, "another thread began the capture")
    _store(out, _POINTER, _HANDLES.add(stream.capture.end()))


@_runtime(_POINTER, _POINTER, _ULONGLONG)
def cudaGraphInstantiate(out: int, graph: int, _flags: int) -> None:
    _store(out, _POINTER, _HANDLES.add(tuple(_HANDLES.get(graph, list))))


@_runtime(_POINTER, _POINTER)
def cudaGraphUpload(executable: int, handle: int) -> None:
    _HANDLES.get(executable, tuple)
    _stream(handle)


@_runtime(_POINTER, _POINTER)
def cudaGraphLaunch(executable: int, handle: int) -> None:
    streams.launch_graph(list(_HANDLES.get(executable, tuple)), _stream(handle))


@_runtime(_POINTER)
def cudaGraphDestroy(graph: int) -> None:
    _HANDLES.remove(graph, list)


@_runtime(_POINTER)
def cudaGraphExecDestroy(executable: int) -> None:
    _HANDLES.remove(executable, tuple)


def _create_event(out: int, flags: int = 0) -> None:
    _enter()
    _store(out, _POINTER, _HANDLES.add(streams.Event(timed=not flags & 2)))


RUNTIME["cudaEventCreate"] = _callback(_create_event, (_POINTER,))
RUNTIME["cudaEventCreateWithFlags"] = _callback(_create_event, (_POINTER, _UINT))


@_runtime(_POINTER)
def cudaEventDestroy(handle: int) -> None:
    _HANDLES.remove(handle, streams.Event)


@_runtime(_POINTER, _POINTER)
def cudaEventRecord(event: int, handle: int) -> None:
    _HANDLES.get(event, streams.Event).record(_stream(handle))


@_runtime(_POINTER)
def cudaEventSynchronize(handle: int) -> None:
    event = _HANDLES.get(handle, streams.Event)
    event.forbid_capture()
    streams.QUEUE.run_until([event.work])
    _enter()


@_runtime(_POINTER)
def cudaEventQuery(handle: int) -> None:
    event = _HANDLES.get(handle, streams.Event)
    event.forbid_capture()
    if event.work is not None and not event.work.done:
        streams.QUEUE.step()  # so that asking again ends
        raise CudaError(Code.NotReady, "the event has not been reached")
    _enter()


@_runtime(_POINTER, _POINTER, _POINTER)
def cudaEventElapsedTime(out: int, first: int, last: int) -> None:
    begin, end = (_HANDLES.get(handle, streams.Event) for handle in (first, last))
    for event in (begin, end):
        if event.work is None or not event.timed:
            raise CudaError(Code.InvalidResourceHandle, "an event without a time")
        if not event.work.done:
            raise CudaError(Code.NotReady, "the event has not been reached")
    _store(out, _FLOAT, 1e3 * (end.seconds - begin.seconds))


@_runtime()
def cudaProfilerStop() -> None:
    _enter()


RUNTIME["cudaProfilerStart"] = RUNTIME["cudaProfilerStop"]


# -- modules and launches ----------------------------------------------------------------------------------------------


@_driver(_POINTER, _POINTER)
def cuModuleLoadData(out: int, image: int) -> None:
    device = _context()
    _unsafe("cuModuleLoadData")
    _store(out, _POINTER, _HANDLES.add(modules.Module(ctypes.string_at(image), device.index)))


@_driver(_POINTER, ctypes.c_char_p)
def cuModuleLoad(out: int, path: bytes) -> None:
    device = _context()
    _unsafe("cuModuleLoad")
    with open(path, "rb") as file:
        _store(out, _POINTER, _HANDLES.add(modules.Module(file.read().rstrip(b"\0"), device.index)))


@_driver(_POINTER)
def cuModuleUnload(module: int) -> None:
    _HANDLES.remove(module, modules.Module)


@_driver(_POINTER, _POINTER, ctypes.c_char_p)
def cuModuleGetFunction(out: int, module: int, name: bytes) -> None:
    _store(out, _POINTER, _HANDLES.add(_HANDLES.get(module, modules.Module).function(name.decode())))


_MAX_THREADS_ATTRIBUTE, _STATIC_SHARED_ATTRIBUTE, _DYNAMIC_SHARED_ATTRIBUTE = 0, 1, 8  # CUfunction_attribute


@_driver(_POINTER, _INT, _POINTER)
def cuFuncGetAttribute(out: int, attribute: int, handle: int) -> None:
    _context()
    function: modules.Function = _HANDLES.get(handle, modules.Function)
    values = {
        _MAX_THREADS_ATTRIBUTE: function.entry.max_threads,
        _STATIC_SHARED_ATTRIBUTE: function.entry.shared_bytes,
        _DYNAMIC_SHARED_ATTRIBUTE: function.max_dynamic_shared,
    }
    if attribute not in values:
        raise CudaError(Code.NotSupported, f"gpu_on_cpu does not know the function attribute {attribute}")
    _store(out, _INT, values[attribute])


@_driver(_POINTER, _INT, _INT)
def cuFuncSetAttribute(handle: int, attribute: int, value: int) -> None:
    _context()
    function: modules.Function = _HANDLES.get(handle, modules.Function)
    if attribute != _DYNAMIC_SHARED_ATTRIBUTE:
        raise CudaError(Code.NotSupported, f"gpu_on_cpu does not know the function attribute {attribute}")
    if not 0 <= value <= MODEL.shared_per_block - function.entry.shared_bytes:
        raise _invalid(f"{function.entry.name}: {value} bytes of dynamic shared memory are more than {ARCH} has")
    function.max_dynamic_shared = value


@_driver(_POINTER, *[_UINT] * 7, _POINTER, _POINTER, _POINTER)
def cuLaunchKernel(
    handle: int, grid: int, grid_y: int, grid_z: int, block: int, block_y: int, block_z: int, shared: int,
    stream_handle: int, parameters: int, extra: int,
) -> None:  # fmt: skip
    device = _context()
    function: modules.Function = _HANDLES.get(handle, modules.Function)
    entry = function.entry
    stream = _own_stream(stream_handle)
    if function.device != device.index:
        raise CudaError(Code.InvalidResourceHandle, f"{entry.name} was loaded on another device")
    if (grid_y, grid_z, block_y, block_z) != (1, 1, 1, 1):
        raise CudaError(Code.NotSupported, f"gpu_on_cpu: {entry.name} is launched in two dimensions")
    for what, value, most in (
        ("blocks", grid, _MAX_GRID[0]),
        ("threads", block, entry.max_threads),
        ("bytes of dynamic shared memory", shared, function.max_dynamic_shared),
    ):
        if value > most or (value == 0 and "bytes" not in what):
            raise _invalid(f"{entry.name} is launched with {value} {what}, of at most {most}")
    if extra:
        raise CudaError(Code.NotSupported, "gpu_on_cpu: cuLaunchKernel with `extra`")
    values = bytearray(sum(entry.parameters[-1]) if entry.parameters else 0)
    for i, (offset, size) in enumerate(entry.parameters):
        address = _POINTER.from_address(parameters + 8 * i).value
        if not address:
            raise _invalid(f"{entry.name}: kernelParams[{i}] is null, which a driver would read from")
        values[offset : offset + size] = ctypes.string_at(address, size)
    schedule = "forward" if streams.QUEUE.eager else streams.QUEUE.random.choice(["forward", "reverse", "random"])
    seed = streams.QUEUE.random.getrandbits(32)

    def run() -> None:
        modules.run(
            function, grid, block, shared, bytes(values),
            bounds=device.bounds, cores=_CORES, schedule=schedule, seed=seed, arenas=_ARENAS,
        )  # fmt: skip

    stream.queue(run)
    _raise_error(device)
