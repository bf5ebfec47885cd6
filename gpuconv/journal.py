"""A journal of finished pieces of work, with which an interrupted call can continue."""

from __future__ import annotations

import errno
import os
import sys
import zlib
from types import TracebackType
from typing import BinaryIO


class JournalError(ValueError):
    """A journal is damaged, in use, or of another call. Neither the journal nor the target has been changed."""


class Journal:
    """The numbers of the pieces that are safely in the target, each with a checksum of its contents.

    The file is text: a line with the fingerprint of the call, then a line for each piece, with a checksum of that line.
    A line is appended after its piece has been written and flushed. An incomplete last line, left by a killed process,
    counts as not written. While a journal is open, no other process can open it (except on Windows).

    Args:
        path: the file; it is created if it does not exist.
        fingerprint: a hexadecimal hash of everything on which the results depend.

    Attributes:
        done: the checksums of the finished pieces by their numbers.

    Raises:
        JournalError: the file is not the journal of this call, is damaged, or another process has it open.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: str) -> None:
        self.path = os.fspath(path)
        self.done: dict[int, int] = {}
        self._fingerprint = fingerprint
        self._file: BinaryIO = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by __exit__)
        try:
            self._lock()
            self._file.seek(0)
            intact = self._parse(self._file.read())
            self._file.truncate(intact)
            if intact == 0:
                self._append(self._header)
        except BaseException:
            self._file.close()
            raise

    @property
    def _header(self) -> bytes:
        return f"gpuconv journal 1 {self._fingerprint}\n".encode()

    def _lock(self) -> None:
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(f"journal {self.path} is in use by another process") from None

    def _parse(self, data: bytes) -> int:
        """Read the entries; returns the number of bytes in complete lines."""
        intact = data.rfind(b"\n") + 1
        if intact == 0 and self._header.startswith(data):
            return 0
        advice = "; delete it to begin anew"
        header, *lines = data[:intact].splitlines(keepends=True) or [data]
        if header != self._header:
            kind = "of another call" if header.startswith(b"gpuconv journal 1 ") else "no journal of gpuconv"
            of = " (other data, weights, settings, max_bytes, device or release)" if "other" in kind else ""
            raise JournalError(f"journal {self.path} is {kind}{of}{advice}")
        for number, line in enumerate(lines, start=2):
            try:
                piece, checksum, _ = line.decode().split()
                entry = int(piece), int(checksum, 16)
            except ValueError:
                entry = -1, 0
            if line != self._line(*entry):
                raise JournalError(f"journal {self.path} is damaged in line {number}{advice}")
            self.done[entry[0]] = entry[1]
        return intact

    def _line(self, piece: int, checksum: int) -> bytes:
        text = f"{piece} {checksum:08x}"
        return f"{text} {zlib.crc32(f'{self._fingerprint} {text}'.encode()):08x}\n".encode()

    def _append(self, line: bytes) -> None:
        """Append a line as a whole, or leave the file as it was."""
        end = self._file.seek(0, os.SEEK_END)
        if self._file.write(line) != len(line):  # a full disk
            self._file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)

    def add(self, piece: int, checksum: int) -> None:
        """Add a piece that has been written and flushed."""
        self._append(self._line(piece, checksum))
        self.done[piece] = checksum

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Remove the file if it is no longer needed: all pieces are finished, or none."""
        if kind is None or not self.done:
            os.unlink(self.path)
        self._file.close()
