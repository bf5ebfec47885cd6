"""CUDA's runtime: errors, devices and their properties."""

from __future__ import annotations

import ctypes
from typing import Any

from . import streams
from .errors import Code, CudaError
from .machine import (
    DEVICE_BYTES,
    INT,
    MODEL,
    NUM_DEVICES,
    POINTER,
    RUNTIME,
    SIZE,
    THREAD,
    UINT,
    VERSION,
    c_string,
    device_of,
    enter,
    error_name,
    error_string,
    raise_error,
    runtime,
    store,
)


def _take_last_error() -> int:
    code, THREAD.error = THREAD.error, 0
    return code


RUNTIME["cudaGetErrorName"] = ctypes.CFUNCTYPE(POINTER, INT)(lambda code: c_string(error_name(code)))
RUNTIME["cudaGetErrorString"] = ctypes.CFUNCTYPE(POINTER, INT)(lambda code: c_string(error_string(code)))
RUNTIME["cudaGetLastError"] = ctypes.CFUNCTYPE(INT)(_take_last_error)


@runtime(POINTER)
def cudaRuntimeGetVersion(out: int) -> None:
    store(out, INT, VERSION)


RUNTIME["cudaDriverGetVersion"] = RUNTIME["cudaRuntimeGetVersion"]


@runtime(POINTER)
def cudaGetDeviceCount(out: int) -> None:
    store(out, INT, NUM_DEVICES)


@runtime(POINTER)
def cudaGetDevice(out: int) -> None:
    store(out, INT, THREAD.device if THREAD.context is None else THREAD.context.index)


@runtime(INT)
def cudaSetDevice(index: int) -> None:
    device = device_of(index)
    THREAD.device, THREAD.context = index, device
    raise_error(device)


MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
_ATTRIBUTES = {  # cudaDeviceAttr
    1: 1024,
    **dict(enumerate(MAX_BLOCK, 2)),
    **dict(enumerate(MAX_GRID, 5)),
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


@runtime(POINTER, INT, INT)
def cudaDeviceGetAttribute(out: int, attribute: int, index: int) -> None:
    device_of(index)
    if attribute not in _ATTRIBUTES:
        raise CudaError(Code.NotSupported, f"gpu_on_cpu does not know the device attribute {attribute}")
    store(out, INT, _ATTRIBUTES[attribute])


class DeviceProperties(ctypes.Structure):
    """`cudaDeviceProp` of CUDA 13."""

    _fields_ = (
        ("name", ctypes.c_char * 256),
        ("uuid", ctypes.c_char * 16),
        ("luid", ctypes.c_char * 8),
        ("luidDeviceNodeMask", UINT),
        ("totalGlobalMem", SIZE),
        ("sharedMemPerBlock", SIZE),
        ("regsPerBlock", INT),
        ("warpSize", INT),
        ("memPitch", SIZE),
        ("maxThreadsPerBlock", INT),
        ("maxThreadsDim", INT * 3),
        ("maxGridSize", INT * 3),
        ("totalConstMem", SIZE),
        ("major", INT),
        ("minor", INT),
        ("textureAlignment", SIZE),
        ("texturePitchAlignment", SIZE),
        ("multiProcessorCount", INT),
        ("integrated", INT),
        ("canMapHostMemory", INT),
        ("textures_and_surfaces", INT * 39),
        ("surfaceAlignment", SIZE),
        ("concurrentKernels", INT),
        ("ECCEnabled", INT),
        ("pciBusID", INT),
        ("pciDeviceID", INT),
        ("pciDomainID", INT),
        ("tccDriver", INT),
        ("asyncEngineCount", INT),
        ("unifiedAddressing", INT),
        ("memoryBusWidth", INT),
        ("l2CacheSize", INT),
        ("persistingL2CacheMaxSize", INT),
        ("maxThreadsPerMultiProcessor", INT),
        ("streamPrioritiesSupported", INT),
        ("globalL1CacheSupported", INT),
        ("localL1CacheSupported", INT),
        ("sharedMemPerMultiprocessor", SIZE),
        ("regsPerMultiprocessor", INT),
        ("managedMemory", INT),
        ("isMultiGpuBoard", INT),
        ("multiGpuBoardGroupID", INT),
        ("hostNativeAtomicSupported", INT),
        ("pageableMemoryAccess", INT),
        ("concurrentManagedAccess", INT),
        ("computePreemptionSupported", INT),
        ("canUseHostPointerForRegisteredMem", INT),
        ("cooperativeLaunch", INT),
        ("sharedMemPerBlockOptin", SIZE),
        ("pageableMemoryAccessUsesHostPageTables", INT),
        ("directManagedMemAccessFromHost", INT),
        ("maxBlocksPerMultiProcessor", INT),
        ("accessPolicyMaxWindowSize", INT),
        ("reservedSharedMemPerBlock", SIZE),
        ("others", INT * 76),
    )


_PROPERTIES: dict[str, Any] = {
    "name": f"CPU posing as {MODEL.name}".encode(),
    "totalGlobalMem": DEVICE_BYTES,
    "sharedMemPerBlock": 48 * 1024,
    "regsPerBlock": 64 * 1024,
    "warpSize": 32,
    "maxThreadsPerBlock": 1024,
    "maxThreadsDim": MAX_BLOCK,
    "maxGridSize": MAX_GRID,
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


@runtime(POINTER, INT)
def cudaGetDeviceProperties(out: int, index: int) -> None:
    device_of(index)
    properties = DeviceProperties(**{"uuid": bytes([index + 1]), "pciBusID": index + 1} | _PROPERTIES)
    ctypes.memmove(out, ctypes.addressof(properties), ctypes.sizeof(properties))


@runtime(POINTER, INT, INT)
def cudaDeviceGetPCIBusId(out: int, length: int, index: int) -> None:
    text = f"0000:{device_of(index).index + 1:02x}:00.0".encode()[: length - 1] + b"\0"
    ctypes.memmove(out, text, len(text))


@runtime(POINTER, INT, INT)
def cudaDeviceCanAccessPeer(out: int, index: int, other: int) -> None:
    device_of(index), device_of(other)
    store(out, INT, 0)


@runtime()
def cudaDeviceSynchronize() -> None:
    device = enter()
    for stream in device.streams:
        stream.forbid_capture("the device is waited for while a stream captures")
    streams.QUEUE.run_all(device)
    raise_error(device)
