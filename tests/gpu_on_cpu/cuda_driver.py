"""CUDA's driver: contexts, modules and launches."""

from __future__ import annotations

import ctypes
import os

from . import modules, streams
from .cuda_devices import MAX_GRID
from .errors import Code, CudaError
from .machine import (
    ARCH,
    ARENAS,
    CONTEXTS,
    CORES,
    HANDLES,
    INT,
    MODEL,
    POINTER,
    THREAD,
    UINT,
    Device,
    c_string,
    context,
    device_of,
    driver,
    error_name,
    error_string,
    forbid_during_capture,
    invalid,
    own_stream,
    raise_error,
    store,
    stream_of,
)


@driver(INT, POINTER)
def cuGetErrorName(code: int, out: int) -> None:
    store(out, POINTER, c_string(error_name(code)))


@driver(INT, POINTER)
def cuGetErrorString(code: int, out: int) -> None:
    store(out, POINTER, c_string(error_string(code)))


@driver(POINTER)
def cuCtxGetCurrent(out: int) -> None:
    store(out, POINTER, 0 if THREAD.context is None else CONTEXTS[THREAD.context])


@driver(POINTER)
def cuCtxSetCurrent(handle: int) -> None:
    THREAD.context = HANDLES.get(handle, Device) if handle else None


@driver(POINTER)
def cuCtxGetDevice(out: int) -> None:
    store(out, INT, context().index)


@driver(INT)
def cuDevicePrimaryCtxRelease_v2(index: int) -> None:
    device_of(index)


@driver(POINTER, POINTER)
def cuStreamGetCtx(handle: int, out: int) -> None:
    owner = stream_of(handle).owner
    assert isinstance(owner, Device)
    store(out, POINTER, CONTEXTS[owner])


@driver(POINTER, POINTER)
def cuModuleLoadData(out: int, image: int) -> None:
    device = context()
    forbid_during_capture("cuModuleLoadData")
    store(out, POINTER, HANDLES.add(modules.Module(ctypes.string_at(image), device.index)))


@driver(POINTER, ctypes.c_char_p)
def cuModuleLoad(out: int, path: bytes) -> None:
    device = context()
    forbid_during_capture("cuModuleLoad")
    try:
        with open(path, "rb") as file:
            image = file.read().rstrip(b"\0")
    except FileNotFoundError:
        raise CudaError(Code.FileNotFound, f"there is no file {os.fsdecode(path)}") from None
    store(out, POINTER, HANDLES.add(modules.Module(image, device.index)))


@driver(POINTER)
def cuModuleUnload(module: int) -> None:
    HANDLES.remove(module, modules.Module)


@driver(POINTER, POINTER, ctypes.c_char_p)
def cuModuleGetFunction(out: int, module: int, name: bytes) -> None:
    store(out, POINTER, HANDLES.add(HANDLES.get(module, modules.Module).function(name.decode())))


_MAX_THREADS_ATTRIBUTE, _STATIC_SHARED_ATTRIBUTE, _DYNAMIC_SHARED_ATTRIBUTE = 0, 1, 8  # CUfunction_attribute


@driver(POINTER, INT, POINTER)
def cuFuncGetAttribute(out: int, attribute: int, handle: int) -> None:
    context()
    function: modules.Function = HANDLES.get(handle, modules.Function)
    values = {
        _MAX_THREADS_ATTRIBUTE: function.entry.max_threads,
        _STATIC_SHARED_ATTRIBUTE: function.entry.shared_bytes,
        _DYNAMIC_SHARED_ATTRIBUTE: function.max_dynamic_shared,
    }
    if attribute not in values:
        raise CudaError(Code.NotSupported, f"gpu_on_cpu does not know the function attribute {attribute}")
    store(out, INT, values[attribute])


@driver(POINTER, INT, INT)
def cuFuncSetAttribute(handle: int, attribute: int, value: int) -> None:
    context()
    function: modules.Function = HANDLES.get(handle, modules.Function)
    if attribute != _DYNAMIC_SHARED_ATTRIBUTE:
        raise CudaError(Code.NotSupported, f"gpu_on_cpu does not know the function attribute {attribute}")
    if not 0 <= value <= MODEL.shared_per_block - function.entry.shared_bytes:
        raise invalid(f"{function.entry.name}: {value} bytes of dynamic shared memory are more than {ARCH} has")
    function.max_dynamic_shared = value


@driver(POINTER, *[UINT] * 7, POINTER, POINTER, POINTER)
def cuLaunchKernel(
    handle: int, grid: int, grid_y: int, grid_z: int, block: int, block_y: int, block_z: int, shared: int,
    stream_handle: int, parameters: int, extra: int,
) -> None:  # fmt: skip
    device = context()
    function: modules.Function = HANDLES.get(handle, modules.Function)
    entry = function.entry
    stream = own_stream(stream_handle)
    if function.device != device.index:
        raise CudaError(Code.InvalidResourceHandle, f"{entry.name} was loaded on another device")
    if (grid_y, grid_z, block_y, block_z) != (1, 1, 1, 1):
        raise CudaError(Code.NotSupported, f"gpu_on_cpu: {entry.name} is launched in two dimensions")
    for what, value, most in (
        ("blocks", grid, MAX_GRID[0]),
        ("threads", block, entry.max_threads),
        ("bytes of dynamic shared memory", shared, function.max_dynamic_shared),
    ):
        if value > most or (value == 0 and "bytes" not in what):
            raise invalid(f"{entry.name} is launched with {value} {what}, of at most {most}")
    if extra:
        raise CudaError(Code.NotSupported, "gpu_on_cpu: cuLaunchKernel with `extra`")
    values = bytearray(sum(entry.parameters[-1]) if entry.parameters else 0)
    for i, (offset, size) in enumerate(entry.parameters):
        address = POINTER.from_address(parameters + 8 * i).value
        if not address:
            raise invalid(f"{entry.name}: kernelParams[{i}] is null, which a driver would read from")
        values[offset : offset + size] = ctypes.string_at(address, size)
    schedule = "forward" if streams.QUEUE.eager else streams.QUEUE.random.choice(["forward", "reverse", "random"])
    seed = streams.QUEUE.random.getrandbits(32)

    def run() -> None:
        modules.run(
            function, grid, block, shared, bytes(values),
            bounds=device.bounds, cores=CORES, schedule=schedule, seed=seed, arenas=ARENAS,
        )  # fmt: skip

    stream.queue(run)
    raise_error(device)
