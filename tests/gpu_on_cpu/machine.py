"""The GPUs that CUDA's functions speak of, and how C code calls those functions.

`RUNTIME` and `DRIVER` hold CUDA's functions by name, ready to be called from C; the files cuda_*.py fill them. A
function raises `CudaError` for an error code. Everything happens under one lock: a call is one step, and kernels run
inside the call that waits for them.
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
from . import memory, streams
from .errors import Code, CudaError

ARCH = os.environ.get("GPU_ON_CPU", "sm_90")
NUM_DEVICES = 2
VERSION = 13020  # of CUDA, which the driver is said to support
DEVICE_BYTES = 40 << 30  # most of it is never touched and takes no memory of the host

INT, UINT, SIZE, FLOAT = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_float
POINTER = ctypes.c_size_t  # and all handles, so that they arrive as integers
ULONGLONG = ctypes.c_ulonglong


# Device 0, what is shared, device 1: a device may use a contiguous range of addresses, which holds what is shared.
_BASE = memory.reserve(3 * memory.ARENA_BYTES)
SHARED = memory.Arena("the host", _BASE + memory.ARENA_BYTES, DEVICE_BYTES)


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
ARENAS = (SHARED, *(device.arena for device in DEVICES))
CORES = launch.TensorCores.of(MODEL)


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


THREAD = _Thread()
LOCK = threading.RLock()


class _Handles:
    """Objects by the numbers that C code knows them by."""

    def __init__(self) -> None:
        self._objects: dict[int, Any] = {}
        self._next = 0x10000

    def add(self, value: object) -> int:
        self._next += 16
        self._objects[self._next] = value
        return self._next

    def find(self, handle: int) -> Any:
        """The object, or None."""
        return self._objects.get(handle)

    def get(self, handle: int, kind: type[Any]) -> Any:
        """The object, which must be of a kind.

        Raises:
            CudaError: it is not.
        """
        value = self.find(handle)
        if not isinstance(value, kind):
            raise CudaError(Code.InvalidResourceHandle, f"{handle:#x} is no {kind.__name__.lower()}")
        return value

    def remove(self, handle: int, kind: type[Any]) -> Any:
        value = self.get(handle, kind)
        del self._objects[handle]
        return value


HANDLES = _Handles()
CONTEXTS = {device: HANDLES.add(device) for device in DEVICES}


def enter() -> Device:
    """The current device, with its context made current; its error, if it has one.

    Raises:
        CudaError: an earlier fault ended the device.
    """
    if THREAD.context is None:
        THREAD.context = DEVICES[THREAD.device]
    raise_error(THREAD.context)
    return THREAD.context


def context() -> Device:
    """The current device of the driver, which makes no context current by itself.

    Raises:
        CudaError: no context is current.
    """
    if THREAD.context is None:
        raise CudaError(Code.DeviceUninitialized, "no context is current in this thread")
    raise_error(THREAD.context)
    return THREAD.context


def raise_error(device: Device) -> None:
    if device.error is not None:
        raise CudaError(device.error.code, device.error.message)


def stream_of(handle: int) -> streams.Stream:
    """The stream of a handle, on the current device.

    Raises:
        CudaError: it belongs to another device.
    """
    device = enter()
    if handle in (0, 1):
        return device.legacy
    if handle == 2:
        return THREAD.default_stream.setdefault(device.index, new_stream(device, blocking=True))
    found: streams.Stream = HANDLES.get(handle, streams.Stream)
    return found


def new_stream(device: Device, *, blocking: bool, priority: int = 0) -> streams.Stream:
    stream = streams.Stream(device, blocking=blocking, priority=priority)
    device.streams.add(stream)
    return stream


def own_stream(handle: int) -> streams.Stream:
    stream = stream_of(handle)
    if stream.owner is not THREAD.context:
        raise CudaError(Code.InvalidResourceHandle, "the stream belongs to another device than the current one")
    return stream


def forbid_during_capture(what: str) -> None:
    """The call is one of those that a capture in global mode forbids.

    Raises:
        CudaError: it is forbidden now.
    """
    streams.forbid_during_capture(what, THREAD.capture_mode)


def store(address: int, kind: Any, value: Any) -> None:
    kind.from_address(address).value = value


def find_arena(address: int) -> memory.Arena | None:
    return next((arena for arena in ARENAS if address in arena), None)


def invalid(message: str) -> CudaError:
    return CudaError(Code.InvalidValue, message)


def device_of(index: int) -> Device:
    if not 0 <= index < NUM_DEVICES:
        raise CudaError(Code.InvalidDevice, f"there is no device {index}")
    return DEVICES[index]


RUNTIME: dict[str, Any] = {}
DRIVER: dict[str, Any] = {}
REFUSED: list[str] = []
"""The functions that were called and are not here."""


def callback(function: Callable[..., None], kinds: tuple[Any, ...]) -> Any:
    def call(*arguments: Any) -> int:
        with LOCK:
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
            THREAD.error = code
            THREAD.message[code] = message
            return code

    return ctypes.CFUNCTYPE(INT, *kinds)(call)


def runtime(*kinds: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A function of CUDA's runtime, under its own name."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        RUNTIME[function.__name__] = callback(function, kinds)
        return function

    return register


def driver(*kinds: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A function of CUDA's driver, under its own name."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        DRIVER[function.__name__] = callback(function, kinds)
        return function

    return register


def refusal(name: str) -> Any:
    """A function that fails with its name."""

    def refuse() -> None:
        REFUSED.append(name)
        print(f"gpu_on_cpu: {name} is not implemented", file=sys.stderr)
        raise CudaError(Code.NotSupported, f"gpu_on_cpu does not implement {name}")

    return callback(refuse, ())


_KEPT: dict[bytes, Any] = {}  # C strings that were handed out


def c_string(text: str) -> int:
    buffer = _KEPT.setdefault(text.encode(), ctypes.create_string_buffer(text.encode()))
    return ctypes.addressof(buffer)


def error_name(code: int) -> str:
    return f"cudaError{Code(code).name}" if code in Code.__members__.values() else f"error {code}"


def error_string(code: int) -> str:
    return THREAD.message.get(code, error_name(code))
