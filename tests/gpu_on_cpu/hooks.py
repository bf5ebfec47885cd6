"""Puts the stand-in under CuPy while CuPy is imported.

CuPy's extensions hold NVIDIA's runtime library as machine code of their own. Its functions are found in the
extension's symbol table, and the first instructions of each become a jump to ours. The driver is `libcuda.so.1`, which
CuPy opens by that name: a library of the same name that is loaded already is what it gets.
"""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import platform
import struct
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ExtensionFileLoader, ModuleSpec, PathFinder
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from ..hostcuda import build

NUM_FUNCTIONS = {"14.0.0": 407, "14.2.0": 437}
"""Functions cuda* in an extension of each CuPy that may be used. Another number means a CUDA that was not examined."""

EXTENSIONS = (
    "cupy_backends.cuda.api.runtime",
    "cupy.cuda.cub",
    "cupy.cuda.jitify",
    "cupy.cuda.thrust",
    "cupy.random._generator_api",
)

# What CuPy's driver extension asks for besides the functions of `machine.DRIVER`.
_REFUSED_DRIVER_FUNCTIONS = (
    "cuCtxCreate_v2",
    "cuCtxDestroy_v2",
    "cuLaunchCooperativeKernel",
    "cuLinkAddData_v2",
    "cuLinkAddFile_v2",
    "cuLinkComplete",
    "cuLinkCreate_v2",
    "cuLinkDestroy",
    "cuModuleGetGlobal_v2",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuOccupancyMaxPotentialBlockSize",
)

_hooked: list[int] = []  # addresses of functions that jump to ours and return an error code
_driver_table: Any = None


class Finder(MetaPathFinder):
    """Finds CuPy's extensions as Python would, and hooks them as they are loaded.

    cuFFT, whose kernels are machine code, is missing, as where CuPy is installed without CUDA's other libraries.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "cupy.cuda.cufft":
            raise ImportError("the stand-in for a GPU has no cuFFT", name=name)
        if name not in EXTENSIONS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


class _Loader(ExtensionFileLoader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = super().create_module(spec)
        _hook(Path(self.path))
        return module


def _hook(path: Path) -> None:
    """Make every cuda* function of a loaded extension jump to ours."""
    from . import cuda_devices, cuda_memory, cuda_streams, machine  # noqa: F401 - they fill the table

    if platform.machine() != "x86_64":
        raise RuntimeError("gpu_on_cpu knows the machine code of x86-64 only")
    expected = NUM_FUNCTIONS.get(version("cupy-cuda13x"))
    if expected is None:
        needed = " or ".join(NUM_FUNCTIONS)
        raise RuntimeError(f"gpu_on_cpu needs cupy-cuda13x {needed}, found {version('cupy-cuda13x')}")
    base = _load_address(path)
    functions = list(_functions(path.read_bytes()))
    if len(functions) != expected:
        raise RuntimeError(f"gpu_on_cpu: {path.name} has {len(functions)} functions cuda*, expected {expected}")
    for name, offset in functions:
        callback = machine.RUNTIME.get(name)
        if callback is None:
            callback = machine.RUNTIME[name] = machine.refusal(name)
        _write_jump(base + offset, _address(callback))
        if name not in ("cudaGetErrorName", "cudaGetErrorString"):
            _hooked.append(base + offset)


def _functions(image: bytes) -> Iterator[tuple[str, int]]:
    """(name, offset from the load address) of the functions cuda* in an ELF file's symbol table."""
    sections_at, size, count = struct.unpack_from("<Q", image, 40)[0], *struct.unpack_from("<HH", image, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", image, sections_at + i * size) for i in range(count)]
    for _, kind, _, _, begin, length, link, _, _, entry in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        names = sections[link][4]
        for at in range(begin, begin + length, entry):
            name_at, info, _, _, value, _ = struct.unpack_from("<IBBHQQ", image, at)
            end = image.index(b"\0", names + name_at)
            name = image[names + name_at : end].decode()
            if info & 15 == 2 and name.startswith("cuda"):  # STT_FUNC
                yield name, value


def _load_address(path: Path) -> int:
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[2] == "00000000" and Path(fields[5]) == path.resolve():
            return int(fields[0].split("-")[0], 16)
    raise RuntimeError(f"gpu_on_cpu: {path} is not loaded")


def _address(callback: Any) -> int:
    address = ctypes.cast(callback, ctypes.c_void_p).value
    assert address is not None
    return address


def _write_jump(address: int, target: int) -> None:
    _write_code(address, b"\x48\xb8" + struct.pack("<Q", target) + b"\xff\xe0")  # mov rax, target; jmp rax


def _write_code(address: int, code: bytes) -> None:
    mprotect = ctypes.CDLL(None).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = address & -mmap.PAGESIZE
    length = address + len(code) - page
    mprotect(page, length, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    ctypes.memmove(address, code, len(code))
    mprotect(page, length, mmap.PROT_READ | mmap.PROT_EXEC)


def _load_driver() -> None:
    """Load a `libcuda.so.1` whose functions jump to ours, before anything asks whether there is one."""
    global _driver_table  # noqa: PLW0603 - there is one driver in a process
    from . import cuda_driver, machine  # noqa: F401 - it fills the table

    for name in _REFUSED_DRIVER_FUNCTIONS:
        machine.DRIVER[name] = machine.refusal(name)
    names = sorted(machine.DRIVER)
    code = "".join(
        f'asm(".globl {name}\\n.type {name}, @function\\n{name}: jmp *gpu_on_cpu_table + {8 * i}(%rip)");'
        for i, name in enumerate(names)
    )
    text = f'extern "C" {{ void* gpu_on_cpu_table[{len(names)}]; }}\nasm(".text");{code}\n'
    library = f"libcuda-{build.digest(text)}.so"
    if not (build.cache_folder() / library).exists():
        build.compile_shared(library, text, ("-fPIC", "-fvisibility=default"), ["-Wl,-Bsymbolic,-soname,libcuda.so.1"])
    loaded = build.load(library)
    _driver_table = (ctypes.c_void_p * len(names)).in_dll(loaded, "gpu_on_cpu_table")
    for i, name in enumerate(names):
        _driver_table[i] = _address(machine.DRIVER[name])


def _answer(code: int) -> None:
    """From now on every function returns this error code at once, without a look at Python's state."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(b"\xb8" + struct.pack("<I", code) + b"\xc3")  # mov eax, code; ret
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    _kept.append(page)
    for function in _hooked:
        _write_jump(function, address)
    if _driver_table is not None:
        from .machine import DRIVER

        for i, name in enumerate(sorted(DRIVER)):
            if not name.startswith("cuGetError"):
                _driver_table[i] = address


_kept: list[mmap.mmap] = []


def _end() -> None:
    """At its end, the interpreter cannot run callbacks any more, and CuPy still frees what it has."""
    _answer(0)
    if _hooked:
        from .machine import REFUSED

        if REFUSED:
            print(f"gpu_on_cpu: the process called what is not implemented: {', '.join(REFUSED)}", file=sys.stderr)
            sys.stdout.flush()
            os._exit(70)


def install() -> None:
    """Let CuPy, when it is imported, find GPUs that are this machine's processor."""
    os.environ.setdefault("CUPY_COMPILE_WITH_PTX", "1")
    os.environ.setdefault("CUPY_ACCELERATORS", "")  # CUB's kernels are machine code
    _load_driver()
    sys.meta_path.insert(0, Finder())
    atexit.register(_end)
    # A child of a process that used CUDA cannot use it: cudaErrorInitializationError.
    os.register_at_fork(after_in_child=lambda: _answer(3) if _hooked else None)
