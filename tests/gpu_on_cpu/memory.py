"""Device memory: host memory at addresses of its own, each allocation between pages that may not be touched.

Addresses are never used twice, so whoever uses a freed allocation meets a page that is gone. An allocation ends at its
guard page, as closely as its alignment allows; the bytes that remain hold poison, and are looked at when it is freed.
Fresh memory holds poison too: a NaN in every floating-point type, and a large number as an integer. The middle of a
very large allocation holds zeros instead, and takes memory of the host only where it is touched.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import Code, CudaError

POISON = 0x7FF4  # hostcuda has other patterns for other memory
ALIGNMENT = 256  # of what cudaMalloc returns
ARENA_BYTES = 1 << 42  # address space of one arena; it costs no memory
GUARD_BYTES = 1 << 22  # between two allocations
POISONED_BYTES = 1 << 26  # at each end of a very large allocation

_PAGE = mmap.PAGESIZE
_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 0x10, 0x4000, 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(slots=True, eq=False)
class Allocation:
    """A piece of an arena.

    Attributes:
        address: of its first byte.
        size: in bytes.
        pages: (address, bytes) of its pages.
        live: whether it may be used; where not, `end` says what became of it.
    """

    address: int
    size: int
    pages: tuple[int, int]
    live: bool = True


def reserve(num_bytes: int) -> int:
    """Address space without memory."""
    return _map(0, num_bytes, 0)


def open_pages(address: int, num_bytes: int) -> None:
    """Let pages of reserved address space be read and written."""
    if _libc.mprotect(address, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE) != 0:
        raise CudaError(Code.MemoryAllocation, f"the host has no {num_bytes} bytes left")


def fill_with_poison(address: int, num_bytes: int) -> None:
    pattern = _bytes_at(address, num_bytes)
    pattern[0::2] = POISON & 0xFF
    pattern[1::2] = POISON >> 8


class Arena:
    """The memory of one device, or that which all devices and the host share.

    Args:
        name: for messages.
        base: of `ARENA_BYTES` of reserved address space.
        capacity: the bytes that may be allocated at a time.
    """

    def __init__(self, name: str, base: int, capacity: int) -> None:
        self.name = name
        self.begin, self.end = base, base + ARENA_BYTES
        self.capacity = capacity
        self.used = 0
        self._next = base
        self._addresses: list[int] = []  # ascending, with the allocations, live or not
        self._allocations: list[Allocation] = []

    def __contains__(self, address: int) -> bool:
        return self.begin <= address < self.end

    def allocate(self, size: int) -> Allocation:
        """A fresh allocation, poisoned.

        Raises:
            CudaError: the capacity is used up.
        """
        if self.used + size > self.capacity:
            raise CudaError(
                Code.MemoryAllocation, f"out of memory: {size} bytes, {self.used} of {self.capacity} in use"
            )
        rounded = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        length = -(-rounded // _PAGE) * _PAGE
        first = self._next + GUARD_BYTES
        self._next = first + length
        open_pages(first, length)
        if length <= 2 * POISONED_BYTES:
            fill_with_poison(first, length)
        else:
            fill_with_poison(first, POISONED_BYTES)
            fill_with_poison(first + length - POISONED_BYTES, POISONED_BYTES)
        allocation = Allocation(first + length - rounded, size, (first, length))
        self._addresses.append(allocation.address)
        self._allocations.append(allocation)
        self.used += size
        return allocation

    def free(self, allocation: Allocation) -> None:
        """Give the pages back.

        Raises:
            CudaError: somebody wrote beside the allocation.
        """
        first, length = allocation.pages
        before, size = allocation.address - first, allocation.size
        beside = ((0, before), (before + size, length))
        changed = [i for begin, end in beside for i in _not_poison(first + begin, end - begin, begin)]
        _map(first, length, _MAP_FIXED)
        allocation.live = False
        self.used -= size
        if changed:
            offset = changed[0] - before
            raise CudaError(
                Code.IllegalAddress,
                f"something wrote beside an allocation of {size} bytes, at its byte {offset}",
            )

    def find(self, address: int) -> Allocation | None:
        """The live allocation that an address lies in."""
        nearest = self._nearest(address)
        inside = nearest is not None and nearest.live and address < nearest.address + max(nearest.size, 1)
        return nearest if inside else None

    def check(self, address: int, num_bytes: int) -> None:
        """Raise where a range is not in one live allocation.

        Raises:
            CudaError: it is not.
        """
        found = self.find(address)
        if found is None or address + num_bytes > found.address + found.size:
            raise CudaError(
                Code.InvalidValue, f"{num_bytes} bytes at {address:#x} are no memory: {self.describe(address)}"
            )

    def describe(self, address: int) -> str:
        """Where an address lies."""
        nearest = self._nearest(address)
        if nearest is None:
            return f"before all memory of {self.name}"
        return (
            f"byte {address - nearest.address} of {'' if nearest.live else 'a freed '}memory of {self.name}, "
            f"allocated with {nearest.size} bytes"
        )

    def _nearest(self, address: int) -> Allocation | None:
        index = bisect.bisect_right(self._addresses, address) - 1
        return self._allocations[index] if index >= 0 else None


def _bytes_at(address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(memoryview((ctypes.c_char * num_bytes).from_address(address)), np.uint8)


def _not_poison(address: int, num_bytes: int, position: int) -> list[int]:
    """The positions of the bytes that differ from poison; `position` is that of the first, which may be odd."""
    if num_bytes == 0:
        return []
    pattern = np.array([POISON & 0xFF, POISON >> 8], np.uint8)[np.arange(position, position + num_bytes) % 2]
    return [position + int(i) for i in np.flatnonzero(_bytes_at(address, num_bytes) != pattern)]


def _map(address: int, num_bytes: int, flags: int) -> int:
    """Map address space that may not be touched, in place of what is there."""
    flags |= mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    result = _libc.mmap(address, num_bytes, _PROT_NONE, flags, -1, 0)
    if result in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"gpu_on_cpu: mmap of {num_bytes} bytes failed (errno {ctypes.get_errno()})")
    return int(result)
