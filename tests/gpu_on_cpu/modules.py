"""Modules: PTX translated, compiled and loaded, and its kernels launched on hostcuda's fibers.

Shared objects lie in hostcuda's cache, by a hash of the PTX and of all that makes C++ of it, each with a text file that
says what its kernels need.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from ..hostcuda import build, launch
from . import memory, ptx
from .errors import Code, CudaError

_HERE = Path(__file__).resolve().parent
_FLAGS = (
    "-fPIC",
    "-std=c++17",
    "-O1",
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
    """

    device: int
    entry: ptx.Entry
    address: int
    bounds: ctypes.Array[ctypes.c_uint64]
    max_dynamic_shared: int

    def launch_record(
        self, grid: int, block: int, parameters: ctypes.Array[ctypes.c_char], slots: ctypes.Array[ctypes.c_void_p]
    ) -> launch.LaunchRecord:
        """The launch, but for its shared memory and its order."""
        slots[0] = ctypes.addressof(parameters)
        return launch.LaunchRecord(
            entry=self.address,
            slots=ctypes.addressof(slots),
            grid=grid,
            block=block,
            flush_subnormals=self.entry.flush_subnormals,
            seconds=_SECONDS,
        )


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
        library, entries = _compiled(image)
        bounds = (ctypes.c_uint64 * 2).in_dll(library, "ptx_memory")
        self.functions: dict[str, Function] = {}
        for entry in entries:
            address = ctypes.cast(getattr(library, f"ptx_entry_{entry.name}"), ctypes.c_void_p).value
            assert address is not None
            free = max(_DEFAULT_SHARED - entry.shared_bytes, 0)
            self.functions[entry.name] = Function(device, entry, address, bounds, free)

    def function(self, name: str) -> Function:
        try:
            return self.functions[name]
        except KeyError:
            raise CudaError(Code.SymbolNotFound, f"the module has no kernel {name}") from None


@cache
def _compiled(image: bytes) -> tuple[ctypes.CDLL, tuple[ptx.Entry, ...]]:
    key = build.digest(_sources(), *_FLAGS, image.decode())
    library, description = f"ptx-{key}.so", build.cache_folder() / f"ptx-{key}.json"
    if not description.exists():
        runtime = build.runtime()
        with (build.cache_folder() / f"ptx-{key[:2]}.lock").open("w") as lock:  # others compile other modules meanwhile
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not description.exists():
                _compile(image, library, description, runtime._name)
    entries = json.loads(description.read_text())
    return build.load(library), tuple(
        ptx.Entry(**{**entry, "parameters": tuple(map(tuple, entry["parameters"]))}) for entry in entries
    )


def _compile(image: bytes, library: str, description: Path, runtime: str) -> None:
    try:
        module = ptx.translate(image.decode())
    except ptx.UnknownPtxError as error:
        raise CudaError(Code.InvalidPtx, f"gpu_on_cpu does not know this PTX: {error}") from None
    flags = (*_FLAGS, *build.machine_flags(), f"-I{_HERE}")
    build.compile_shared(library, module.code, flags, [runtime, "-Wl,-rpath,$ORIGIN"])
    partial = description.with_suffix(f".{library}.new")
    partial.write_text(json.dumps([asdict(entry) for entry in module.entries]))
    partial.replace(description)


@cache
def _sources() -> str:
    return "".join((_HERE / name).read_text() for name in ("ptx.h", "ptx.py", "modules.py"))


# -- launches ----------------------------------------------------------------------------------------------------------


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
    slots = (ctypes.c_void_p * 1)()
    buffer = ctypes.create_string_buffer(parameters, max(len(parameters), 1))
    record = function.launch_record(grid, block, buffer, slots)
    record.shared = _shared_memory_end() - -(-shared_bytes // 16) * 16
    record.shared_bytes = shared_bytes
    record.schedule = _SCHEDULES[schedule]
    record.seed = seed
    record.block_bytes, record.fraction_bits = cores.block_bytes, cores.fraction_bits
    function.bounds[0], function.bounds[1] = bounds
    fault = launch.execute(record, launch.Counts())
    if fault.kind == 0:
        return
    access = {1: "write to ", 0: "read of "}.get(fault.is_write, "")
    arena = next((arena for arena in arenas if fault.address in arena), None)
    place = arena.describe(fault.address) if arena else f"address {fault.address:#x}" if fault.address else ""
    message = fault.message.decode(errors="replace")
    raise CudaError(
        _CODES.get(fault.kind, Code.LaunchFailure),
        f"{function.entry.name}, block {fault.block}, thread {fault.thread}: {message}{access}{place}",
    )
