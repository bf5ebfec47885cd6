"""Arrays in memory of their own, between pages that may not be touched, with every unused byte poisoned.

Poison is a repeated 16-bit pattern that is a NaN as float16, bfloat16, float32 and float64. Each use has its own, and
arithmetic keeps a NaN's payload, so a result tells which memory it was computed from.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Placement: TypeAlias = Literal["end", "start"]

SHARED_POISON = 0x7FF5
GAP_POISON = 0x7FF3
OUTPUT_POISON = 0x7FF6

_PAGE = mmap.PAGESIZE
_GUARD = 16 * 1024 * 1024  # address space on either side; it costs no memory
_SPARSE = 64 * 1024 * 1024  # from this size on, only pages that hold elements are backed by memory
_PROT_NONE, _MAP_NORESERVE = 0, 0x4000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class GuardedArray:
    """An array whose buffer ends (or starts) at a guard page.

    The buffer runs from the lowest to the highest element. It touches the guard page as closely as the alignment of
    element 0 allows; the bytes that remain (fewer than 16, and at the other side up to a page) and the gaps between
    strided elements hold poison.

    Args:
        name: for messages.
        shape: extents.
        strides: in elements.
        dtype: native byte order; an even number of bytes, or uint8 for contiguous bytes.
        poison: the 16-bit pattern of every byte.
        alignment: the largest power of two that divides the address of element 0; 16 stands for 16 and more.
        placement: the side that touches its guard page.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: np.dtype[Any],
        poison: int,
        alignment: int = 16,
        placement: Placement = "end",
    ) -> None:
        self.name = name
        self.poison = poison
        self.itemsize = dtype.itemsize
        steps = [(extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)]
        empty = 0 in shape
        self.lowest = 0 if empty else sum(min(step, 0) for step in steps)
        self.highest = -1 if empty else sum(max(step, 0) for step in steps)
        before = -self.lowest * self.itemsize  # bytes of the buffer on either side of element 0's address
        after = (self.highest + 1) * self.itemsize

        inner = -(-(before + after + 32) // _PAGE) * _PAGE
        self._size = inner + 2 * _GUARD
        self._base = _mmap(self._size)
        start = self._base + _GUARD
        if placement == "end":
            self.address = start + inner - after
            while not _is_aligned(self.address, alignment):
                self.address -= 1
        else:
            self.address = start + before
            while not _is_aligned(self.address, alignment):
                self.address += 1

        self._pages = [(start, inner)]
        if before + after >= _SPARSE:
            self._pages = _pages_of(self.address, shape, strides, self.itemsize)
        for page, size in self._pages:
            _mprotect(page, size, mmap.PROT_READ | mmap.PROT_WRITE)
            _uint16_at(page, size)[...] = poison
        buffer = memoryview((ctypes.c_char * self._size).from_address(self._base))
        byte_strides = [stride * self.itemsize for stride in strides]
        self.view: Array = np.ndarray(tuple(shape), dtype, buffer, self.address - self._base, byte_strides)

    def free(self) -> None:
        """Unmap the memory; `view` must not be used after."""
        _libc.munmap(self._base, self._size)

    def make_read_only(self) -> None:
        for page, size in self._pages:
            _mprotect(page, size, mmap.PROT_READ)

    def contains(self, address: int) -> bool:
        """Whether the address lies in the buffer or its guards."""
        return self._base <= address < self._base + self._size

    def offset(self, address: int) -> int:
        """The element offset of an address."""
        return (address - self.address) // self.itemsize

    def describe(self, address: int) -> str:
        """Where an address lies: ``"element offset 12 of input (its buffer: 0 to 11)"``."""
        extent = "it is empty" if self.highest < self.lowest else f"its buffer: {self.lowest} to {self.highest}"
        return f"element offset {self.offset(address)} of {self.name} ({extent})"

    def first_gap_written(self) -> int | None:
        """The address of a byte outside the elements that lost its poison, or None. Poisons the elements."""
        if self.itemsize == 1:  # bytes of shared memory, from an even address on
            self.view[...] = np.full(self.view.size, self.poison, np.uint16).view(np.uint8)[: self.view.size]
        else:
            self.view[...] = np.full(self.itemsize // 2, self.poison, np.uint16).view(self.view.dtype)
        for page, size in self._pages:
            changed = np.flatnonzero(_uint16_at(page, size) != self.poison)
            if changed.size:
                return page + 2 * int(changed[0])
        return None


def first_poisoned(values: Array, poison: int) -> tuple[tuple[int, ...], int] | None:
    """The index of the first value that is the poison or was computed from it, and how many there are; or None."""
    kind, itemsize = values.dtype.kind, values.dtype.itemsize
    part = itemsize // 2 if kind == "c" else itemsize
    if part % 2:
        return None
    parts = np.ascontiguousarray(values).view(np.dtype(f"u{part}")).reshape(*values.shape, itemsize // part)
    sign = 1 << (8 * part - 1)
    found = np.isin(parts & np.array(sign - 1, parts.dtype), _traces(poison, part)).any(axis=-1)
    count = int(found.sum())
    if count == 0:
        return None
    first = np.unravel_index(int(found.argmax()), values.shape)
    return tuple(int(i) for i in first), count


def _traces(poison: int, itemsize: int) -> Array:
    """The poison as a number of `itemsize` bytes, as read and as arithmetic leaves it."""
    word = int.from_bytes(poison.to_bytes(2, "little") * (itemsize // 2), "little")
    if itemsize == 8:
        return np.array([word, word | 1 << 51], np.uint64)  # a quiet NaN
    if itemsize == 4:
        # Also through a float accumulator from float16 and bfloat16 data.
        return np.array([word, 0x7F800000 | (poison & 0x3FF) << 13, poison << 16], np.uint32)
    return np.array([word, 0x7C00 | (poison << 16 | poison) >> 13 & 0x3FF], np.uint16)  # also float32 to float16


def _is_aligned(address: int, alignment: int) -> bool:
    if alignment >= 16:
        return address % 16 == 0
    return address % (2 * alignment) == alignment


def _pages_of(address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> list[tuple[int, int]]:
    """The runs (address, bytes) of pages that hold elements."""
    offsets = np.zeros(1, np.int64)
    for extent, stride in zip(shape, strides, strict=True):
        steps = np.arange(extent, dtype=np.int64) * (stride * itemsize)
        offsets = np.unique((offsets[:, None] + steps).ravel())
    pages = np.unique(np.concatenate([(address + offsets) // _PAGE, (address + offsets + itemsize - 1) // _PAGE]))
    runs = np.split(pages, np.flatnonzero(np.diff(pages) != 1) + 1)
    return [(int(run[0]) * _PAGE, len(run) * _PAGE) for run in runs]


def _uint16_at(address: int, size: int) -> npt.NDArray[np.uint16]:
    return np.frombuffer(memoryview((ctypes.c_char * size).from_address(address)), np.uint16)


def _mmap(size: int) -> int:
    address = _libc.mmap(None, size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"hostcuda: mmap of {size} bytes failed (errno {ctypes.get_errno()})")
    return int(address)


def _mprotect(address: int, size: int, protection: int) -> None:
    if _libc.mprotect(address, size, protection) != 0:
        raise MemoryError(f"hostcuda: mprotect of {size} bytes failed (errno {ctypes.get_errno()})")
