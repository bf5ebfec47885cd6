"""Modules: PTX translated, compiled and loaded, and its kernels launched on hostcuda's fibers.

Shared objects lie in hostcuda's cache, by a hash of the C++ and of all that it includes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..hostcuda import build, launch
from . import memory, ptx
from .errors import Code, CudaError

_HEADER = Path(__file__).resolve().parent / "ptx.h"
_FLAGS = (
    "-fPIC",
    "-std=c++17",
    "-Og",  # more would take longer to compile than these kernels run
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-strict-aliasing",  # registers and memory hold bits
    "-fno-exceptions",
    "-fno-rtti",
    "-fvisibility=hidden",
    "-w",
)
_SECONDS = 120.0  # of processor time that a launch may take
_SHARED_BYTES = 256 * 1024
_DEFAULT_SHARED = 48 * 1024  # bytes of dynamic shared memory that a kernel gets without asking

# enum FaultKind of hostcuda.h
_CODES = {
    1: Code.IllegalAddress,
    2: Code.MisalignedAddress,
    5: Code.LaunchTimeout,
}
_SCHEDULES = {"forward": 0, "reverse": 1, "random": 2}


@dataclass(slots=True, eq=False)
class Function:
    """A kernel of a module that is loaded on a device.

    Attributes:
        device: the device's index.
        entry: what the kernel needs.
        max_dynamic_shared: the bytes of dynamic shared memory that a launch may ask for.
        module: its module's C++.
    """

    device: int
    entry: ptx.Entry
    max_dynamic_shared: int
    module: ptx.Module

    def load(self) -> tuple[int, ctypes.Array[ctypes.c_uint64]]:
        """The kernel's address and the bounds of memory that it reads, compiled when it is first launched."""
        library = _library(self.module)
        address = ctypes.cast(getattr(library, f"ptx_entry_{self.entry.name}"), ctypes.c_void_p).value
        assert address is not None
        return address, (ctypes.c_uint64 * 2).in_dll(library, "ptx_memory")


class Module:
    """A module that is loaded on a device.

    Args:
        image: PTX.
        device: the device's index.

    Raises:
        CudaError: it is not PTX, or not known to the translator.
    """

    def __init__(self, image: bytes, device: int) -> None:
        if image.startswith(b"\x7fELF"):
            raise CudaError(
                Code.NoKernelImageForDevice,
                "gpu_on_cpu runs PTX, not machine code: CUPY_COMPILE_WITH_PTX=1 must be set before CuPy is imported",
            )
        try:
            module = _translated(image)
        except ptx.UnknownPtxError as error:
            raise CudaError(Code.InvalidPtx, f"gpu_on_cpu does not know this PTX: {error}") from None
        self.functions = {
            entry.name: Function(device, entry, max(_DEFAULT_SHARED - entry.shared_bytes, 0), module)
            for entry in module.entries
        }

    def function(self, name: str) -> Function:
        try:
            return self.functions[name]
        except KeyError:
            raise CudaError(Code.SymbolNotFound, f"the module has no kernel {name}") from None


@cache
def _translated(image: bytes) -> ptx.Module:
    return ptx.translate(image.decode())


@cache
def _library(module: ptx.Module) -> ctypes.CDLL:
    flags = (*_FLAGS, *build.machine_flags())
    key = build.digest(_HEADER.read_text(), *flags, module.code)
    name = f"ptx-{key}.so"
    if not (build.cache_folder() / name).exists():
        build.runtime()
        with build.lock(f"ptx-{key[:2]}"):  # others compile other modules meanwhile
            if not (build.cache_folder() / name).exists():
                build.compile_shared(name, module.code, [*flags, f"-I{_HEADER.parent}"], build.runtime_options())
    return build.load(name)


@cache
def _shared_memory_end() -> int:
    """The end of memory for one block, which a guard page follows."""
    base = memory.reserve(_SHARED_BYTES + 2 * (1 << 20))
    memory.open_pages(base + (1 << 20), _SHARED_BYTES)
    return base + (1 << 20) + _SHARED_BYTES


def run(
    function: Function,
    grid: int,
    block: int,
    dynamic_shared: int,
    parameters: bytes,
    *,
    bounds: tuple[int, int],
    cores: launch.TensorCores,
    schedule: str,
    seed: int,
    arenas: Sequence[memory.Arena],
) -> None:
    """Run a launch to its end.

    Args:
        function: the kernel.
        grid: blocks, in one dimension.
        block: threads of a block, in one dimension.
        dynamic_shared: in bytes.
        parameters: the kernel's parameters, each at its offset.
        bounds: the addresses that are the device's memory.
        cores: the arithmetic of its tensor cores.
        schedule: the order of threads: "forward", "reverse" or "random".
        seed: of a random order.
        arenas: to say where a fault is.

    Raises:
        CudaError: the kernel went wrong.
    """
    shared_bytes = function.entry.shared_bytes + dynamic_shared
    address, memory_bounds = function.load()
    memory_bounds[0], memory_bounds[1] = bounds
    buffer = ctypes.create_string_buffer(parameters, max(len(parameters), 1))
    slots = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
    record = launch.LaunchRecord(
        entry=address,
        slots=ctypes.addressof(slots),
        grid=grid,
        block=block,
        shared=_shared_memory_end() - -(-shared_bytes // 16) * 16,
        shared_bytes=shared_bytes,
        schedule=_SCHEDULES[schedule],
        flush_subnormals=function.entry.flush_subnormals,
        seed=seed,
        seconds=_SECONDS,
        block_bytes=cores.block_bytes,
        fraction_bits=cores.fraction_bits,
    )
    fault = launch.execute(record, launch.Counts())
    if fault.kind == 0:
        return
    parts = [fault.message.decode(errors="replace")]
    if fault.address:
        access = {1: "write to ", 0: "read of "}.get(fault.is_write, "at ")
        arena = next((arena for arena in arenas if fault.address in arena), None)
        parts.append(access + (arena.describe(fault.address) if arena else f"address {fault.address:#x}"))
    raise CudaError(
        _CODES.get(fault.kind, Code.LaunchFailure),
        f"{function.entry.name}, block {fault.block}, thread {fault.thread}: {'; '.join(filter(None, parts))}",
    )
