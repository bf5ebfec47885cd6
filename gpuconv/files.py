"""Arrays from and to files and pipes: `.npy`, and `.wav`, which soundfile decodes. Writing a file is atomic.

All errors for the user are a `FileError`, with a message of one line that names the file.
"""

from __future__ import annotations

import io
import math
import os
import secrets
import stat
import sys
import tokenize
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from . import wav
from .problem import DTYPES, INTEGERS, dtype_name, numpy_dtype
from .text import install_hint

Array: TypeAlias = npt.NDArray[Any]
StrPath: TypeAlias = str | os.PathLike[str]

SUFFIXES = (".npy", ".wav")
STANDARD = "-"  # the name of standard input and of standard output
_SUPPORTED = (*DTYPES, *INTEGERS)  # dtypes of `.npy` files
_NPY_MAGIC = b"\x93NUMPY"
_MAX_WAV_BYTES = 2**32 - 4096  # sizes in a WAV file are unsigned 32-bit numbers; the difference is for its header
_MAX_AXES = 32  # the limit of the oldest supported NumPy
_BLOCK = 2**18  # values that are converted at a time
_SAMPLE_BYTES = {  # of encodings whose samples all have the same number of bytes, by libsndfile's names
    "PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8, "ULAW": 1, "ALAW": 1,
}  # fmt: skip
_MAX_SAMPLES_PER_BYTE = 64  # of all other encodings; a header that declares more is damaged


class FileError(Exception):
    """A file cannot be read or written; the message, of one line, names the file and the reason."""


class Signal(NamedTuple):
    """The contents of a file: an array, the sample rate in Hz (of .wav files), and warnings for the user."""

    array: Array
    rate: int | None
    notes: tuple[str, ...] = ()


def read(
    path: StrPath, dtype: str | None = None, *, suffixes: tuple[str, ...] = SUFFIXES, allow_truncated: bool = False
) -> Signal:
    """Read a `.npy` or `.wav` file, or either from standard input.

    A file named `.wav` may be a WAV, RF64, W64 or AIFF file of any encoding that libsndfile decodes.

    Args:
        path: the file; "-" for standard input, whose format is recognised by its first bytes. A WAV file gives an array
            (channels, samples), float32, with integer samples scaled to [-1, 1).
        dtype: one of `gpuconv.problem.DTYPES` to convert to; None keeps the file's own (float32 for WAV), which must
            be one of them, or of `INTEGERS` there. bfloat16 is read from raw 2-byte values, as NumPy writes it.
        suffixes: the formats to accept.
        allow_truncated: read what a WAV file has although it is shorter than its header says, or contradicts it.

    Returns:
        The array in native byte order; the sample rate of a WAV file; warnings about the file.

    Raises:
        FileError: the file is missing, unreadable, empty, damaged, of another format or dtype; or a package that is
            needed to read it is not installed.
    """
    if path == STANDARD:
        data = _standard_input()
        suffix = ".wav" if data.startswith(wav.MAGICS) and ".wav" in suffixes else ".npy"
        return _read("standard input", io.BytesIO(data), len(data), suffix, dtype, allow_truncated)
    suffix = _suffix(path, suffixes)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise FileError(f"{path}: is a directory")
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            return _read(path, file, status.st_size, suffix, dtype, allow_truncated)
    except FileNotFoundError:
        raise FileError(f"{path}: does not exist") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error


def _standard_input() -> bytes:
    if sys.stdin is None or sys.stdin.closed:
        raise FileError("standard input: is closed")
    if sys.stdin.isatty():
        raise FileError("standard input: is a terminal, expected a file or a pipe")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise FileError(f"standard input: cannot be read: {error.strerror or error}") from error


def _read(path: StrPath, file: BinaryIO, size: int, suffix: str, dtype: str | None, allow_truncated: bool) -> Signal:
    if size == 0:
        raise FileError(f"{path}: is empty")
    if suffix == ".npy":
        return Signal(convert(path, _read_npy(path, file, size), dtype), None)
    return _read_wav(path, file, size, dtype, allow_truncated)


def check_output(
    path: StrPath, sources: Mapping[str, StrPath], *, force: bool, suffixes: tuple[str, ...] | None = SUFFIXES
) -> None:
    """Check an output path before any work is done for it.

    Args:
        path: where the output will be written; "-" for standard output, unless `suffixes` is None.
        sources: the input files, by the names that the messages use; one of them may be replaced only by force.
        force: whether an existing file may be replaced.
        suffixes: the formats to accept; None for any name.

    Raises:
        FileError: an unknown extension, a missing or unwritable folder, not a regular file, or a file that exists.
    """
    if path == STANDARD and suffixes is not None:
        if sys.stdout.isatty():
            raise FileError("standard output: is a terminal, expected a file or a pipe")
        return
    if suffixes is not None:
        _suffix(path, suffixes)
    target = Path(os.path.realpath(path))  # the file behind a symbolic link, as for writing
    try:
        exists = target.exists()
        if target.is_dir():
            raise FileError(f"{path}: is a directory")
        if exists and not target.is_file():
            raise FileError(f"{path}: is not a regular file")
        if not target.parent.is_dir():
            raise FileError(f"{path}: the folder {target.parent} does not exist")
        if not os.access(target.parent, os.W_OK):
            raise FileError(f"{path}: the folder {target.parent} is not writable")
        if exists and not force:
            for name, source in sources.items():
                if os.path.exists(source) and os.path.samefile(target, source):
                    raise FileError(f"{path}: is the {name} file itself; give --force to replace it")
            raise FileError(f"{path}: exists; give --force to replace it")
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from error


def write(path: StrPath, array: Array, rate: int | None = None, *, force: bool = False) -> None:
    """Write an array to a `.npy` or `.wav` file, or either to standard output.

    A file is written as a whole or not at all. It has the permissions of the file that it replaces, else those of any
    new file. This takes 1 MiB of memory besides the array.

    Args:
        path: the file; "-" for standard output, in WAV format if `rate` is given.
        array: for `.npy` any; for `.wav` (channels, samples) or (1, channels, samples), real. WAV files hold 32-bit
            floats, so that no sample is clipped.
        rate: samples per second, for `.wav`.
        force: replace a file that exists.

    Raises:
        FileError: see `check_output`; an array or a rate that a WAV file cannot hold; a full disk.
        BrokenPipeError: the reader of standard output has closed it.
    """
    is_standard = path == STANDARD
    suffix = (".npy" if rate is None else ".wav") if is_standard else _suffix(path, SUFFIXES)
    if suffix == ".wav":
        check_wav(path, array.shape, str(array.dtype), rate)
    if is_standard:
        try:
            sys.stdout.flush()
            _write(_Sink(sys.stdout.buffer), suffix, array, rate)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise FileError(f"standard output: cannot be written: {error.strerror or error}") from error
        return
    with _new_file(path, force=force) as file:
        _write(file, suffix, array, rate)


def _write(file: Any, suffix: str, array: Array, rate: int | None) -> None:
    if suffix == ".npy" or rate is None:
        np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
    else:
        wav.write_floats(file, array.reshape(array.shape[-2:]), rate, _BLOCK)


class _Sink:
    """A stream with only the method `write`: NumPy would query the position of a file object, which a pipe lacks."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:  # an unbuffered pipe (PYTHONUNBUFFERED) may take only a part
            rest = rest[self._stream.write(rest) :]


def write_text(path: StrPath, text: str) -> None:
    """Write a text file in UTF-8, as a whole or not at all. A file that exists is replaced.

    Raises:
        FileError: it cannot be written.
    """
    write_bytes(path, text.encode(), force=True)


def write_bytes(path: StrPath, data: bytes, *, force: bool = False) -> None:
    """Write a file of any format, as a whole or not at all.

    Args:
        path: the file.
        data: its contents.
        force: replace a file that exists.

    Raises:
        FileError: it cannot be written.
    """
    with _new_file(path, force=force) as file:
        file.write(data)


def check_wav(path: StrPath, shape: tuple[int, ...], dtype: str, rate: int | None) -> None:
    """Check that a WAV file can hold an array.

    Raises:
        FileError: complex data, a batch of several, no sample rate, too many channels, or too many samples.
    """
    if rate is None:
        raise FileError(f"{path}: a .wav file needs a sample rate, and the input file has none; give --rate")
    if not 1 <= rate < 2**31:
        raise FileError(f"{path}: the sample rate must be from 1 to 2147483647 Hz, got {rate}")
    if dtype.startswith("complex") or dtype in INTEGERS:
        what = "32-bit floats" if dtype in INTEGERS else "real samples"
        raise FileError(f"{path}: a .wav file holds {what}, the output is {dtype}; write a .npy file")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
        raise FileError(f"{path}: a .wav file holds (channels, samples), the output is {shape}; write a .npy file")
    channels, samples = shape[-2:]
    if not 1 <= channels <= 1024:
        raise FileError(f"{path}: a .wav file holds 1 to 1024 channels, the output has {channels}; write a .npy file")
    if 4 * channels * samples > _MAX_WAV_BYTES:
        raise FileError(f"{path}: a .wav file ends at 4 GiB, the output is larger: {shape}; write a .npy file")


def _suffix(path: StrPath, suffixes: tuple[str, ...]) -> str:
    if not os.fspath(path):
        raise FileError("the name of a file is empty")
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise FileError(f"{path}: the name must end in {' or '.join(suffixes)}")
    return suffix


def _read_npy(path: StrPath, file: BinaryIO, size: int) -> Array:
    shape, _, _ = read_npy_header(path, file, size)
    file.seek(0)
    try:
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    except (ValueError, OverflowError) as error:  # elements of no bytes, more than NumPy can count
        raise FileError(f"{path}: is damaged: its header declares the shape {shape}") from error


def read_npy_header(path: StrPath, file: BinaryIO, size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """The shape, whether the order is Fortran's, and the dtype; the file's position is then behind the header."""
    if file.read(len(_NPY_MAGIC)) != _NPY_MAGIC:
        raise FileError(f"{path}: is not a .npy file")
    file.seek(0)
    # Version 3.0 differs from 2.0 only in the encoding of the names in structured dtypes, which are refused below.
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
        (3, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(file)
        header = read_header[version](file) if version in read_header else None
    except Exception as error:  # for a damaged header NumPy's parser raises other errors than ValueError, too
        text = error.args[0] if isinstance(error, tokenize.TokenError) else str(error)  # without line numbers
        reason = text.splitlines()[0] if text else type(error).__name__
        raise FileError(f"{path}: is damaged: its header cannot be read ({reason})") from error
    if header is None:
        raise FileError(f"{path}: is a .npy file of version {version[0]}.{version[1]}, which holds no plain array")
    shape, fortran_order, dtype = header
    if dtype.hasobject:
        raise FileError(f"{path}: holds pickled Python objects, which are never loaded")
    if dtype.subdtype is not None:
        raise FileError(f"{path}: has dtype {dtype}, expected one of {', '.join(_SUPPORTED)}")
    if any(extent < 0 or isinstance(extent, bool) for extent in shape) or len(shape) > _MAX_AXES:
        raise FileError(f"{path}: is damaged: its header declares the shape {shape}")
    expected, found = math.prod(shape) * dtype.itemsize, size - file.tell()
    if found < expected:
        raise FileError(f"{path}: is truncated: {expected} bytes of data expected for shape {shape}, {found} found")
    return shape, fortran_order, dtype


def _read_wav(path: StrPath, file: BinaryIO, size: int, dtype: str | None, allow_truncated: bool) -> Signal:
    soundfile = _soundfile(path)
    header = wav.read_header(file, size)
    try:
        sound = soundfile.SoundFile(wav.Part(file, 0, size))
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: libsndfile takes it for raw samples
        reason = getattr(error, "error_string", "format not recognised")
        raise FileError(f"{path}: is not a .wav file that libsndfile can read: {reason}") from error
    with sound:
        if header is None:
            raise FileError(f"{path}: holds {sound.format}, expected WAV, RF64, W64 or AIFF")
        width = _SAMPLE_BYTES.get(sound.subtype)
        found = wav.find_samples(file, header, width and width * sound.channels)
        if found.trouble is not None and not allow_truncated:
            raise FileError(f"{path}: {found.trouble}; --allow-truncated reads what is there")
        frames = sound.frames if width is None else found.num_bytes // (width * sound.channels)
        if width is None and frames * sound.channels > _MAX_SAMPLES_PER_BYTE * found.num_bytes:
            raise FileError(f"{path}: is damaged: {found.num_bytes} bytes cannot hold the {frames} samples it declares")
        source = sound
        if frames != sound.frames:  # libsndfile uses the length in the header, which is wrong
            part = wav.Part(file, found.offset, frames * width * sound.channels)
            is_big = header.chunks.order == "big" and sound.endian != "LITTLE"
            source = soundfile.SoundFile(
                part, "r", sound.samplerate, sound.channels, sound.subtype, "BIG" if is_big else "LITTLE", "RAW"
            )
        target = np.dtype(np.float32) if dtype is None else _target(path, dtype)
        wide = target in (np.float64, np.complex128)
        array = np.empty((sound.channels, frames), target)
        step, done = max(1, _BLOCK // sound.channels), 0
        with np.errstate(over="ignore"):
            while done < frames:
                try:
                    block = source.read(min(step, frames - done), "float64" if wide else "float32", always_2d=True)
                except soundfile.LibsndfileError as error:
                    raise FileError(f"{path}: libsndfile cannot decode it: {error.error_string}") from error
                if not len(block):
                    break
                array[:, done : done + len(block)] = block.T
                done += len(block)
        if done < frames and not allow_truncated:
            raise FileError(f"{path}: is damaged: {done} of {frames} samples could be decoded")
    notes = [note for note in (found.trouble, found.note) if note is not None]
    return Signal(array[:, :done], int(sound.samplerate), tuple(f"{path}: {note}" for note in notes))


def convert(path: StrPath, array: Array, dtype: str | None) -> Array:
    """The array of a file in the dtype `dtype`, or in its own if that is None, in native byte order.

    Raises:
        FileError: the array does not convert, or is complex and would become real; or `dtype` is None and the array's
            own dtype is not supported.
    """
    target = None if dtype is None else _target(path, dtype)
    if array.dtype.kind == "V" and array.dtype.names is None and array.dtype.itemsize == 2:
        if dtype != "bfloat16" or target is None:
            raise FileError(f"{path}: holds raw 2-byte values; if they are bfloat16, give --dtype bfloat16")
        return array.view(target)
    if dtype is None:
        if dtype_name(array.dtype) is None and array.dtype.name not in INTEGERS:
            convertible = "; give --dtype to convert" if array.dtype.kind in "iuf" else ""
            raise FileError(f"{path}: has dtype {array.dtype}, expected one of {', '.join(_SUPPORTED)}{convertible}")
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind not in "iufc" and dtype_name(array.dtype) is None:
        raise FileError(f"{path}: has dtype {array.dtype}, which does not convert to {dtype}")
    if array.dtype.kind == "c" and not dtype.startswith("complex"):
        raise FileError(f"{path}: has dtype {array.dtype}; converting it to {dtype} would lose the imaginary part")
    with np.errstate(over="ignore"):  # values too large for the dtype become infinity, as in any conversion
        return array.astype(target, copy=False)


def _target(path: StrPath, dtype: str) -> np.dtype[Any]:
    try:
        return numpy_dtype(dtype)
    except ModuleNotFoundError as error:
        raise FileError(f"{path}: {error}") from error


def _soundfile(path: StrPath) -> ModuleType:
    try:
        import soundfile
    except ModuleNotFoundError as error:
        raise FileError(f"{path}: .wav files need the soundfile package: {install_hint('audio')}") from error
    except (ImportError, OSError) as error:  # the package is there, libsndfile is not
        raise FileError(f"{path}: .wav files need the soundfile package, which cannot be loaded: {error}") from error
    return soundfile  # type: ignore[no-any-return]


@contextmanager
def _new_file(path: StrPath, *, force: bool) -> Iterator[IO[bytes]]:
    """A file for writing that gets its name when the block ends; if the block raises, there is no file."""
    target = Path(os.path.realpath(path))
    part = target.with_name(f".gpuconv-{secrets.token_hex(8)}.part")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        # Mode 0666 less the process's umask, as `open` gives; the tempfile module would make the file private.
        with open(os.open(part, flags, 0o666), "w+b") as file:
            if force:
                with suppress(FileNotFoundError):
                    os.chmod(part, stat.S_IMODE(os.stat(target).st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(part, target, path, force=force)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            os.unlink(part)


def publish(part: Path, target: Path, path: StrPath, *, force: bool) -> None:
    """Give `part` the name `target`; without force, refuse a name that exists by now."""
    if force:
        os.replace(part, target)
        return
    try:
        os.link(part, target)  # fails where the name exists, in one step
    except FileExistsError:
        raise FileError(f"{path}: exists; give --force to replace it") from None
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileError(f"{path}: exists; give --force to replace it") from None
        os.replace(part, target)
