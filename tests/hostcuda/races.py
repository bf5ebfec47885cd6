"""Watches the accesses of kernels for data races: see races.cpp.

    with races.watched():
        hostcuda.compute(problem, input, weight)

raises a `RaceError` that names the first two accesses which nothing orders. A kernel takes some five times as long.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from . import build, launch
from .errors import RaceError
from .memory import GuardedArray

_HERE = Path(__file__).resolve().parent
_FLAGS = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")


class _Region(ctypes.Structure):
    _fields_ = (("address", ctypes.c_size_t), ("bytes", ctypes.c_size_t), ("is_shared", ctypes.c_int))


class _Access(ctypes.Structure):
    _fields_ = (
        ("exists", ctypes.c_int),
        ("is_write", ctypes.c_int),
        *((name, ctypes.c_uint) for name in ("block", "thread", "barriers", "meetings")),
    )

    def __str__(self) -> str:
        return (
            f"the {'write' if self.is_write else 'read'} of block {self.block}, thread {self.thread}, "
            f"after {self.barriers} barriers"
        )


class _Found(ctypes.Structure):
    _fields_ = (("count", ctypes.c_uint64), ("address", ctypes.c_size_t), ("before", _Access), ("after", _Access))


@contextmanager
def watched() -> Iterator[None]:
    """Within, every launch of hostcuda is watched.

    Raises:
        RaceError: by the launch, once it has ended.
    """
    plain = launch._launch

    def watch(program: build.Program, binary: Any, *rest: Any) -> Any:
        guarded: Mapping[str, GuardedArray] = rest[2]
        with _recorded(guarded) as found:
            fault = plain(program, binary, *rest)
        if found.count:
            memory = next(memory for memory in guarded.values() if memory.contains(found.address))
            raise RaceError(
                f"{program.kernel}: nothing orders {found.before} and {found.after}, at "
                f"{memory.describe(found.address)} ({found.count} accesses race)"
            )
        return fault

    with mock.patch.object(build, "binary", _binary), mock.patch.object(launch, "_launch", watch):
        yield


@contextmanager
def _recorded(guarded: Mapping[str, GuardedArray]) -> Iterator[_Found]:
    """The races of a launch on these arrays."""
    found = _Found()
    regions = (_Region * len(guarded))()
    for region, memory in zip(regions, guarded.values(), strict=True):
        region.address = memory.address + memory.lowest * memory.itemsize
        region.bytes = max(0, memory.highest - memory.lowest + 1) * memory.itemsize
        region.is_shared = memory.name == "shared memory"
    library = build.load(_library())
    library.races_begin(regions, ctypes.c_size_t(len(regions)), ctypes.byref(found))
    yield found
    library.races_end()


@cache
def _library() -> str:
    """races.cpp, compiled."""
    text = (_HERE / "races.cpp").read_text()
    name = f"races-{build.digest(text)}.so"
    build.runtime()
    if not (build.cache_folder() / name).exists():
        with build.lock("races"):
            build.compile_shared(name, text, build._RUNTIME_FLAGS, build.runtime_options())
    return name


@cache
def _binary(program: build.Program) -> build.Binary:
    """`build.binary` of a kernel that is watched."""
    library = _library()
    prefix = (_HERE / "races.h").read_text()
    key = build.digest(program.kernel, program.text, prefix, library, *_FLAGS)
    name = f"watched-{key}.so"
    if not (build.cache_folder() / name).exists():
        with build.lock(key[:2]):
            text = f'{prefix}#include "hostcuda.h"\n{build._wrap(program, key)}'
            flags = (*build._KERNEL_FLAGS, *build.machine_flags(), *_FLAGS)
            build.compile_shared(name, text, flags, [*build.runtime_options(), f"-l:{library}"])
    return build.binary_of(build.load(name), key)
