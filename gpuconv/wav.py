"""Where the samples of a WAV, RF64, W64 or AIFF file lie, and whether all that its header declares exist.

libsndfile decodes the samples, but it does not warn if a file is truncated, or if a length in the header is too small
and the samples beyond it are lost. So the lengths are checked here first.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

_W64_TAIL = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # the last 12 bytes of all chunk identifiers but the first
_W64_RIFF = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")

# Placeholders for lengths, by writers that cannot go back to fill them in: unclosed files and GStreamer; SoX, for WAV
# and AIFF; arecord; FFmpeg and browsers.
_UNKNOWN = (0, 0x7F000000, 0x7FFFF000, 0x7FFFF024, 0x7FFFFFFF, 0x80000000, 0x80000024, 2**32 - 1)


MAGICS = (b"RIFF", b"RIFX", b"RF64", b"riff", b"FORM")  # the first bytes of the files that `read_header` reads


class Header(NamedTuple):
    """What the chunks of a file say about its samples.

    Attributes:
        size: of the file, in bytes.
        offset: of the first sample.
        declared: bytes of samples; None where the header has a placeholder.
        end: of the file, as its first chunk declares it; None where this is a placeholder.
        frames: samples per channel, if another chunk has them (AIFF).
        chunks: how chunks are written.
    """

    size: int
    offset: int
    declared: int | None
    end: int | None
    frames: int | None
    chunks: _Chunks


class Samples(NamedTuple):
    """The samples of a file.

    Attributes:
        offset: of the first sample, in bytes.
        num_bytes: the bytes of samples that exist.
        trouble: why samples may be missing, or some bytes may not be samples; None if neither is possible.
        note: a warning about something else.
    """

    offset: int
    num_bytes: int
    trouble: str | None = None
    note: str | None = None


class _Chunks(NamedTuple):
    """How the chunks of a container are written.

    Attributes:
        order: of bytes in numbers, as `int.from_bytes` takes it.
        is_wide: W64: identifiers of 16 bytes, lengths of 8 bytes that count the chunk's own head, alignment to 8 bytes.
    """

    order: Any
    is_wide: bool = False

    @property
    def head(self) -> int:
        return 24 if self.is_wide else 8

    def pad(self, length: int) -> int:
        """The bytes between the end of a chunk and the next one."""
        return -length % (8 if self.is_wide else 2)

    def walk(self, file: BinaryIO, position: int, size: int) -> Iterator[tuple[bytes, int, int]]:
        """The chunks from a position on: identifier (4 bytes; empty where there is none), start and length of the body.

        It stops after a chunk that does not end within the file, and after bytes that are not a chunk.
        """
        while position < size:
            file.seek(position)
            head = file.read(self.head)
            name, tail = head[:4], head[4:16] if self.is_wide else b""
            is_chunk = len(head) == self.head and all(32 <= byte < 127 for byte in name)
            if not is_chunk or (self.is_wide and tail != _W64_TAIL):
                yield b"", position, size - position
                return
            length = int.from_bytes(head[16:] if self.is_wide else head[4:], self.order)
            length -= self.head if self.is_wide else 0
            yield name, position + self.head, length
            if length < 0:
                return
            position += self.head + length + self.pad(length)

    def reach_end(self, file: BinaryIO, position: int, size: int) -> bool:
        """Whether there are only whole chunks, none of them samples, from a position to the end of the file."""
        found = [(name, start + length) for name, start, length in self.walk(file, position, size)]
        return all(name not in (b"", b"data", b"SSND") and end <= size for name, end in found)


def read_header(file: BinaryIO, size: int) -> Header | None:
    """Read the chunks of a file of `size` bytes; None if it has another format or no samples."""
    file.seek(0)
    head = file.read(40)
    kind, form = head[:4], head[8:12]
    if kind in (b"RIFF", b"RF64") and form == b"WAVE":
        chunks, start = _Chunks("little"), 12
    elif (kind == b"RIFX" and form == b"WAVE") or (kind == b"FORM" and form in (b"AIFF", b"AIFC")):
        chunks, start = _Chunks("big"), 12
    elif head[:16] == _W64_RIFF and head[24:] == b"wave" + _W64_TAIL:
        chunks, start = _Chunks("little", is_wide=True), 40
    else:
        return None
    total = int.from_bytes(head[16:24] if chunks.is_wide else head[4:8], chunks.order)
    end = None if total in _UNKNOWN or total >= 2**62 else total + (0 if chunks.is_wide else 8)
    wide_length = offset = declared = frames = None
    for name, body, length in chunks.walk(file, start, size):
        file.seek(body)
        if name == b"ds64" and kind == b"RF64":
            total, wide_length = struct.unpack("<QQ", file.read(16).ljust(16, b"\0"))
            end = None if total in _UNKNOWN or total >= 2**62 else total + 8
        elif name == b"COMM" and kind == b"FORM":
            frames = int.from_bytes(file.read(6)[2:], "big")
        elif name == b"SSND" and kind == b"FORM" and offset is None:
            skipped = 8 + int.from_bytes(file.read(4), "big")
            offset, declared = body + skipped, length - skipped
            if length in _UNKNOWN or declared in _UNKNOWN:
                declared = None
        elif name == b"data" and offset is None:
            offset = body
            declared = wide_length if length == 2**32 - 1 and wide_length is not None else length
            is_open = declared in _UNKNOWN or body + declared - 8 in _UNKNOWN or declared >= 2**62
            if is_open or declared == -chunks.head:  # a length of 0 that should count the head
                declared = None
    if offset is None or offset > size or (declared is not None and declared < 0):
        return None
    return Header(size, offset, declared, end, frames, chunks)


def find_samples(file: BinaryIO, header: Header, frame_bytes: int | None) -> Samples:
    """Find the bytes of a file that are samples.

    Args:
        file: the file that `header` describes.
        header: what its chunks say.
        frame_bytes: bytes of one sample of all channels; None where samples are compressed.
    """
    offset, available = header.offset, header.size - header.offset
    declared, frames = header.declared, header.frames
    if declared is None and frames and frame_bytes and frames * frame_bytes < min(_UNKNOWN[1:]):
        declared = frames * frame_bytes
    if declared is None:
        if available == 0 or header.chunks.reach_end(file, offset, header.size):
            return Samples(offset, 0)
        if frame_bytes is None:
            return Samples(offset, available, "its header gives no length, and its samples are compressed")
        found = available - _pad_bytes(file, offset, available, frame_bytes)
        rest = found % frame_bytes
        return Samples(
            offset, found - rest, f"is truncated: it ends within a sample, {rest} bytes over" if rest else None
        )
    if declared > available:
        trouble = f"is truncated: its header declares {declared} bytes of samples, {available} found"
        return Samples(offset, available, trouble)
    frame = frame_bytes or 1
    found = declared - _pad_bytes(file, offset, declared, frame)
    if found % frame:
        trouble = f"is damaged: its header declares {declared} bytes of samples, not a multiple of {frame} (one sample)"
        return Samples(offset, found - found % frame, trouble)
    if frames is not None and frame_bytes is not None and frames * frame != found:
        trouble = f"is damaged: its header declares {frames} samples of {frame} bytes, and {declared} bytes of them"
        return Samples(offset, min(found, frames * frame), trouble)
    tail = offset + declared + header.chunks.pad(declared)
    behind = header.size - tail
    if behind < frame or header.chunks.reach_end(file, tail, header.size):
        return Samples(offset, found)
    # Lengths of 32 bits wrap around at 4 GiB.
    wrapped = found + ((available - declared) >> 32 << 32)
    if not header.chunks.is_wide and wrapped > found and wrapped % frame == 0:
        tail = offset + wrapped + header.chunks.pad(wrapped)
        if header.size <= tail or header.chunks.reach_end(file, tail, header.size):
            return Samples(offset, wrapped)
    if header.end is not None and header.end <= tail and behind < 2**31:
        return Samples(offset, found, note=f"{behind} bytes behind the end that its header declares were not read")
    trouble = (
        f"is damaged: behind the {declared} bytes of samples that its header declares lie {behind} bytes of no chunk"
    )
    return Samples(offset, found, trouble)


def _pad_bytes(file: BinaryIO, offset: int, length: int, frame: int) -> int:
    """1 if a length includes the zero byte that pads an odd number of bytes, else 0."""
    if length % 2 or frame == 1 or length % frame != 1:
        return 0
    file.seek(offset + length - 1)
    return int(file.read(1) == b"\0")


class Part:
    """A part of a file, as a file object that soundfile can read."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        # libsndfile seeks before the start of some damaged files. An exception here would be printed, not raised.
        self._position = max(0, offset + (0, self._position, self._length)[whence])
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, count: int) -> bytes:
        self._file.seek(self._start + self._position)
        data = self._file.read(max(0, min(count, self._length - self._position)))
        self._position += len(data)
        return data


def write_floats(file: Any, array: npt.NDArray[Any], rate: int, block: int) -> None:
    """Write a WAV file of 32-bit floats, in pieces, to any object with a method `write`.

    Args:
        file: the bytes are written to it in order; it need not be seekable.
        array: (channels, samples), real. Values beyond the range of float32 become infinite.
        rate: samples per second.
        block: values to convert at a time.
    """
    channels, samples = array.shape
    length, frame = 4 * channels * samples, 4 * channels
    head = struct.pack("<4sI4s4sI", b"RIFF", length + 50, b"WAVE", b"fmt ", 18)
    head += struct.pack("<HHIIHHH", 3, channels, rate, min(rate * frame, 2**32 - 1), frame, 32, 0)
    file.write(head + struct.pack("<4sII4sI", b"fact", 4, samples, b"data", length))
    step = max(1, block // channels)
    with np.errstate(over="ignore"):
        for start in range(0, samples, step):
            file.write(np.ascontiguousarray(array[:, start : start + step].T).astype("<f4").tobytes())
