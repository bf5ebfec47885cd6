"""Compiles kernel texts with the host compiler: many into one shared object, cached by what they were made from.

The cache folder is `.hostcuda_cache` at the repository root, or $GPUCONV_HOSTCUDA_CACHE. It holds the compiled runtime,
the shared objects, and for every kernel text a file that names the shared object it is in. It can be moved.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from gpuconv import source
from gpuconv.families import Config

from .errors import BuildError

_HERE = Path(__file__).resolve().parent
_PER_OBJECT = 12  # kernels of one translation unit: enough to share the compiler's start, few enough for two cores

_SANITIZERS = "alignment,signed-integer-overflow,shift,bounds,integer-divide-by-zero,null"
_COMMON_FLAGS = ("-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-exceptions", "-fno-rtti")
_RUNTIME_FLAGS = (*_COMMON_FLAGS, "-std=c++17", "-O3")
_KERNEL_FLAGS = (
    *_COMMON_FLAGS,
    "-std=c++17",  # as CuPy compiles them
    "-Og",  # with -O2 a kernel runs little faster here, and takes more than twice as long to compile
    "-ftree-sra",  # keeps small structs in registers: kernels that sum one element a thread run twice as fast
    "-fno-strict-aliasing",  # kernels reinterpret bytes of shared memory
    "-fvisibility=hidden",
    f"-fsanitize={_SANITIZERS}",
    "-fno-sanitize-recover=all",
    "-w",
)
_KEEP_SUBNORMALS = ("float64", "complex128")  # dtypes: -ftz=true concerns float32 alone


@dataclass(frozen=True, slots=True)
class Program:
    """A kernel text.

    Attributes:
        kernel: the name of its `extern "C" __global__` function.
        text: everything that NVRTC would be given.
        flush_subnormals: run as -ftz=true code on float32 would.
    """

    kernel: str
    text: str
    flush_subnormals: bool = True

    @classmethod
    def of(cls, config: Config) -> Program:
        """The very text that the runtime gives to NVRTC."""
        return cls._with_macros(config.kernel, dict(config.macros))

    @classmethod
    def without_nan_fallback(cls, config: Config) -> Program:
        """The same, but results that need `canonical_sum` keep their NaNs."""
        return cls._with_macros(config.kernel, {**dict(config.macros), "NAN_FALLBACK": "0"})

    @classmethod
    def _with_macros(cls, kernel: str, macros: dict[str, str]) -> Program:
        return cls(kernel, source.assemble(kernel, macros), macros.get("DTYPE") not in _KEEP_SUBNORMALS)

    @classmethod
    def from_text(cls, kernel: str, text: str) -> Program:
        """A text of gpuconv's, which says by its macro DTYPE whether it computes in float32."""
        dtype = re.search(r"^#define DTYPE (\w+)$", text, re.MULTILINE)
        return cls(kernel, text, dtype is None or dtype[1] not in _KEEP_SUBNORMALS)


@dataclass(frozen=True, slots=True)
class Binary:
    """A compiled kernel.

    Attributes:
        entry: calls the kernel for the current thread.
        num_parameters: of the kernel function.
        max_threads: the first argument of its `__launch_bounds__`.
    """

    entry: int
    num_parameters: int
    max_threads: int


@cache
def binary(program: Program) -> Binary:
    """The compiled kernel, from the cache or compiled now."""
    prebuild([program])
    key = _key(program)
    return binary_of(load(_index(key).read_text()), key)


def binary_of(library: ctypes.CDLL, key: str) -> Binary:
    """The kernel that a shared object has under a key."""
    return Binary(
        entry=_address(library, f"hostcuda_entry_{key}"),
        num_parameters=ctypes.c_uint.in_dll(library, f"hostcuda_parameters_{key}").value,
        max_threads=ctypes.c_uint.in_dll(library, f"hostcuda_threads_{key}").value,
    )


def prebuild(programs: Iterable[Program | Config]) -> int:
    """Compile whatever is not in the cache, all of it together; returns how many that were.

    Raises:
        BuildError: with the compiler's first error.
    """
    wanted = {_key(p): p for p in (Program.of(p) if isinstance(p, Config) else p for p in programs)}
    if all(_index(key).exists() for key in wanted):
        return 0
    runtime()
    with lock(digest(*sorted(wanted))[:2]):
        missing = [program for key, program in wanted.items() if not _index(key).exists()]
        pieces = [missing[i : i + _PER_OBJECT] for i in range(0, len(missing), _PER_OBJECT)]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(_build_kernels, pieces))
    return len(missing)


def runtime() -> ctypes.CDLL:
    """The scheduler, loaded."""
    name = _runtime_name()
    if not (cache_folder() / name).exists():
        with lock("runtime"):
            build_runtime()
    return load(name)


def cache_folder() -> Path:
    """Where everything that is compiled is kept; made on first use."""
    folder = os.environ.get("GPUCONV_HOSTCUDA_CACHE")
    path = Path(folder) if folder else _HERE.parent.parent / ".hostcuda_cache"
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Only one process at a time compiles the same, so that parallel test runners do not repeat each other's work."""
    with (cache_folder() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@lru_cache(maxsize=1)
def _compiler() -> str:
    return os.environ.get("CXX", "g++")


@lru_cache(maxsize=1)
def machine_flags() -> tuple[str, ...]:
    """The compiler's options for this processor."""
    # A fused multiply-add in one instruction; without it the C library computes the same bits.
    try:
        has_fma = " fma " in Path("/proc/cpuinfo").read_text()
    except OSError:
        has_fma = False
    return ("-mfma",) if has_fma else ()


@lru_cache(maxsize=1)
def _toolchain() -> str:
    """What every object depends on apart from its own text."""
    try:
        version = subprocess.run([_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"hostcuda needs a host C++ compiler; {_compiler()} did not answer: {error}") from None
    files = "".join((_HERE / name).read_text() for name in ("hostcuda.h", "runtime.cpp", "build.py"))
    return "\n".join([version, *_RUNTIME_FLAGS, *_KERNEL_FLAGS, *machine_flags(), files])


def digest(*texts: str) -> str:
    """A name for what is made from these texts with today's compiler and sources."""
    return hashlib.sha256("\0".join((_toolchain(), *texts)).encode()).hexdigest()[:24]


@lru_cache(maxsize=4096)
def _key(program: Program) -> str:
    return digest(program.kernel, program.text)


def _index(key: str) -> Path:
    return cache_folder() / f"{key}.in"


def _runtime_name() -> str:
    return f"runtime-{digest()}.so"


def build_runtime() -> str:
    """Compile runtime.cpp unless the cache has it; its name in the cache."""
    name = _runtime_name()
    if not (cache_folder() / name).exists():
        compile_shared(name, (_HERE / "runtime.cpp").read_text(), _RUNTIME_FLAGS, ["-lpthread", "-lrt"])
    return name


def runtime_options() -> list[str]:
    """The linker's options for an object that uses the runtime, and finds it beside itself wherever the cache lies."""
    return [f"-L{cache_folder()}", f"-l:{_runtime_name()}", "-Wl,-rpath,$ORIGIN"]


def _build_kernels(programs: Sequence[Program]) -> None:
    keys = [_key(program) for program in programs]
    name = f"kernels-{digest(*keys)}.so"
    text = '#include "hostcuda.h"\n' + "".join(map(_wrap, programs, keys))
    compile_shared(name, text, (*_KERNEL_FLAGS, *machine_flags()), runtime_options())
    for key in keys:
        _write(_index(key), name)


def _wrap(program: Program, key: str) -> str:
    """The text in a namespace of its own, with its kernel renamed, its entry point, and its macros undefined again."""
    bound = re.search(r"__launch_bounds__\(([^,)]+)", program.text)
    defined = sorted(set(re.findall(r"^[ \t]*#[ \t]*define[ \t]+(\w+)", program.text, re.MULTILINE)))
    export = 'extern "C" __attribute__((visibility("default")))'
    return "\n".join(
        [
            f"namespace hostcuda_{key} {{",
            f"#define {program.kernel} {program.kernel}_{key}",
            program.text,
            '#line 1 "hostcuda"',
            f"{export} void hostcuda_entry_{key}(void* const* slots) {{ ::hostcuda::call({program.kernel}, slots); }}",
            f"{export} const unsigned hostcuda_parameters_{key} = ::hostcuda::count_parameters({program.kernel});",
            f"{export} const unsigned hostcuda_threads_{key} = {bound.group(1) if bound else 1024};",
            *(f"#undef {macro}" for macro in (program.kernel, *defined)),
            f"}}  // hostcuda_{key}",
            "",
        ]
    )


def compile_shared(name: str, text: str, flags: Sequence[str], libraries: Sequence[str]) -> None:
    """Compile and link `text` into the cache; the file appears under its name only when it is whole."""
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        unit, objects, shared = Path(folder) / "unit.cpp", Path(folder) / "unit.o", Path(folder) / name
        unit.write_text(text)
        # Two steps: a link that sees -fsanitize would ask for libubsan, whose part runtime.cpp plays.
        _call([_compiler(), *flags, f"-I{_HERE}", "-c", str(unit), "-o", str(objects)])
        _call([_compiler(), "-shared", "-Wl,-z,defs", str(objects), "-o", str(shared), *libraries])
        shared.replace(cache_folder() / name)


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line or "undefined reference" in line]
        raise BuildError("\n".join(errors[:5]) or done.stderr[-2000:])


def _write(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    Path(name).replace(path)


@cache
def load(name: str) -> ctypes.CDLL:
    """A shared object of the cache."""
    return ctypes.CDLL(str(cache_folder() / name))


def _address(library: ctypes.CDLL, symbol: str) -> int:
    address = ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
    assert address is not None
    return address
