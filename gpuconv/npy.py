"""`.npy` files that are larger than memory: read and written by slices, and resumable after the process is killed.

Memory maps have slices, too, but crash the process if the file is truncated in the meantime or the disk is full.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .files import Array, FileError, StrPath, convert, publish, read_npy_header

_BLOCK = 2**18  # values that are converted at a time


class NpyFile:
    """The array of an open `.npy` file in C order, whose slices are read from and written to the file.

    Attributes:
        shape: of the array.
        dtype: of the values that are read, in native byte order; the file's, or the one to which they are converted.
    """

    def __init__(
        self, path: StrPath, file: BinaryIO, shape: tuple[int, ...], stored: np.dtype[Any], dtype: str | None = None
    ) -> None:
        self.shape = shape
        self.dtype = convert(path, np.empty(0, stored), dtype).dtype
        self._path, self._file, self._stored, self._to = path, file, stored, dtype
        self._start = file.tell()
        self._state = self._now()

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    @property
    def version(self) -> str:
        """A text that changes when the file changes."""
        return f"{os.path.realpath(self._path)} {self._state}"

    def _runs(self, key: tuple[slice, ...]) -> Iterator[tuple[int, int]]:
        """The contiguous runs of elements of a slice, as (first, count), in order."""
        parts = [range(part.start, part.stop) for part in key]
        while len(parts) > 1 and len(parts[-1]) == self.shape[len(parts) - 1]:
            parts.pop()  # whole rows are contiguous
        inner = math.prod(self.shape[len(parts) :])
        *outer, last = parts
        for index in itertools.product(*outer):
            row = 0
            for i, extent in zip((*index, last.start), self.shape, strict=False):
                row = row * extent + i
            yield row * inner, len(last) * inner

    def __getitem__(self, key: tuple[slice, ...]) -> Array:
        out = np.empty([part.stop - part.start for part in key], self.dtype)
        flat, done = out.reshape(-1), 0
        for first, count in self._runs(key):
            self._file.seek(self._start + first * self._stored.itemsize)
            for start in range(0, count, _BLOCK):
                block = flat[done : done + min(_BLOCK, count - start)]
                if self.dtype == self._stored:
                    self._read_into(block)
                else:
                    raw = np.empty(block.size, self._stored)
                    self._read_into(raw)
                    block[...] = convert(self._path, raw, self._to)
                done += block.size
        if self._file.readable() and not self._file.writable() and self._now() != self._state:
            raise FileError(f"{self._path}: has changed while it was read")
        return out

    def _read_into(self, block: Array) -> None:
        rest = block.view(np.uint8).data
        while rest:
            try:
                count = self._file.readinto(rest)  # type: ignore[attr-defined]
            except OSError as error:
                raise FileError(f"{self._path}: cannot be read: {error.strerror or error}") from error
            if not count:
                raise FileError(f"{self._path}: has become shorter while it was read")
            rest = rest[count:]

    def __setitem__(self, key: tuple[slice, ...], values: Array) -> None:
        flat, done = np.ascontiguousarray(values, self.dtype).reshape(-1), 0
        for first, count in self._runs(key):
            self._file.seek(self._start + first * self._stored.itemsize)
            rest = flat[done : done + count].view(np.uint8).data
            while rest:
                rest = rest[self._file.write(rest) :]
            done += count


@contextmanager
def open_npy(path: StrPath, dtype: str | None) -> Iterator[NpyFile | None]:
    """A `.npy` file for reading by slices; None if it is in Fortran order, in which slices are not contiguous.

    An array with one axis is one channel, with the shape (1, L).

    Raises:
        FileError: as `gpuconv.files.read` raises it.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            shape, fortran_order, stored = read_npy_header(path, file, os.fstat(file.fileno()).st_size)
            yield (
                None if fortran_order else NpyFile(path, file, (1, *shape) if len(shape) == 1 else shape, stored, dtype)
            )
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error


@contextmanager
def resumable_npy(
    path: StrPath, shape: tuple[int, ...], dtype: np.dtype[Any], *, force: bool
) -> Iterator[tuple[NpyFile, Path]]:
    """A `.npy` file for writing by slices, and the path for a journal beside it.

    The file gets its name, complete, when the block ends. If the block raises or the process is killed, the unfinished
    file stays in the folder under another name as long as the journal does, and the next call for this path continues
    with it.

    Raises:
        FileError: it cannot be written, or there is an unfinished file of another shape or dtype.
    """
    target = Path(os.path.realpath(path))
    stem = f".gpuconv-{hashlib.sha256(target.name.encode()).hexdigest()[:16]}"
    part, journal = target.with_name(f"{stem}.part"), target.with_name(f"{stem}.journal")
    header = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    complete = False
    try:
        # If a process was killed after `publish`, this is a hard link to the complete file, so it is never truncated.
        if not journal.exists():
            part.unlink(missing_ok=True)
        with open(os.open(part, flags, 0o666), "r+b", buffering=0) as file:
            found = file.read(len(header.getvalue()))
            if journal.exists() and found not in (b"", header.getvalue()):
                raise FileError(f"{path}: {part} is unfinished work of another call; delete it and {journal.name}")
            file.seek(0)
            file.write(header.getvalue())
            file.truncate(file.tell() + math.prod(shape) * dtype.itemsize)
            if force:
                with suppress(FileNotFoundError):
                    os.chmod(part, stat.S_IMODE(os.stat(target).st_mode))
            yield NpyFile(part, file, shape, dtype, dtype.name), journal
            os.fsync(file.fileno())
        complete = True
        publish(part, target, path, force=force)
        part.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from error
    except FileError as error:
        raise FileError(f"{error} (the complete result is in {part})" if complete else str(error)) from error
    finally:
        if not complete and not journal.exists():
            with suppress(OSError):
                part.unlink()
