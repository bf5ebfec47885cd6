"""Arrays from and to files: `.npy`, and `.wav` through the soundfile package. Writing is atomic.

Every refusal is a `FileError`, whose text is one line for the user that names the file.
"""

from __future__ import annotations

import io
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from .problem import DTYPES, dtype_name, numpy_dtype

Array: TypeAlias = npt.NDArray[Any]
StrPath: TypeAlias = str | os.PathLike[str]

SUFFIXES = (".npy", ".wav")
_NPY_MAGIC = b"\x93NUMPY"
_MAX_WAV_BYTES = 2**32 - 4096  # the sizes inside a WAV file are unsigned 32-bit numbers; the rest is for its header


class FileError(Exception):
    """A file cannot be read or written as asked; the text says which, and why, on one line."""


class Signal(NamedTuple):
    """What a file holds: an array, and the sample rate in Hz where the file knows it (.wav)."""

    array: Array
    rate: int | None


def read(path: StrPath, dtype: str | None = None, *, suffixes: tuple[str, ...] = SUFFIXES) -> Signal:
    """Read a `.npy` or `.wav` file.

    Args:
        path: the file. A WAV file gives an array (channels, samples), float32, integer samples scaled to [-1, 1).
        dtype: one of `gpuconv.problem.DTYPES` to convert to; None keeps the file's own (float32 for WAV), which must
            be one of them. bfloat16 is read from the 2-byte raw values as which NumPy writes it.
        suffixes: the formats to accept.

    Returns:
        The array in native byte order, and the sample rate of a WAV file.

    Raises:
        FileError: the file is missing, unreadable, empty, damaged, of another format or dtype; or a package that is
            needed to read it is not installed.
    """
    suffix = _suffix(path, suffixes)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise FileError(f"{path}: is a directory")
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"{path}: is not a regular file")
        if status.st_size == 0:
            raise FileError(f"{path}: is empty")
        with open(path, "rb") as file:
            if suffix == ".npy":
                return Signal(_convert(path, _read_npy(path, file, status.st_size), dtype), None)
            array, rate = _read_wav(path, file, status.st_size, wide=dtype in ("float64", "complex128"))
            return Signal(_convert(path, array, dtype), rate)
    except FileNotFoundError:
        raise FileError(f"{path}: does not exist") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error


def check_output(
    path: StrPath, sources: Mapping[str, StrPath], *, force: bool, suffixes: tuple[str, ...] | None = SUFFIXES
) -> None:
    """Refuse an output path before any work is done for it.

    Args:
        path: where the output will be written.
        sources: the input files by their names for the user; one of them may be replaced only by force.
        force: whether an existing file may be replaced.
        suffixes: the formats to accept; None for any name.

    Raises:
        FileError: an unknown extension, a missing or unwritable folder, not a regular file, or a file that exists.
    """
    if suffixes is not None:
        _suffix(path, suffixes)
    target = Path(os.path.realpath(path))  # through links, as every writer does
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
    """Write an array to a `.npy` or `.wav` file: the whole file or nothing, with the permissions of any new file.

    Args:
        path: the file.
        array: for `.npy` any; for `.wav` (channels, samples) or (1, channels, samples), real. WAV files hold 32-bit
            floats, so that nothing is clipped.
        rate: samples per second, for `.wav`.
        force: replace a file that exists.

    Raises:
        FileError: see `check_output`; an array or a rate that a WAV file cannot hold; a full disk.
    """
    suffix = _suffix(path, SUFFIXES)
    if suffix == ".wav":
        check_wav(path, array.shape, str(array.dtype), rate)
    with _new_file(path, force=force) as file:
        if suffix == ".npy":
            np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
        else:
            file.write(_encode_wav(path, array.reshape(array.shape[-2:]), rate))


def write_text(path: StrPath, text: str) -> None:
    """Write a text file, UTF-8: the whole file or nothing. A file that exists is replaced.

    Raises:
        FileError: it cannot be written.
    """
    with _new_file(path, force=True) as file:
        file.write(text.encode())


def check_wav(path: StrPath, shape: tuple[int, ...], dtype: str, rate: int | None) -> None:
    """Refuse what a WAV file cannot hold.

    Raises:
        FileError: complex data, a batch of several, no sample rate, too many channels, or too many samples.
    """
    if rate is None:
        raise FileError(f"{path}: a .wav file needs a sample rate, and the input file has none; give --rate")
    if not 1 <= rate < 2**31:
        raise FileError(f"{path}: the sample rate must be from 1 to 2147483647 Hz, got {rate}")
    if dtype.startswith("complex"):
        raise FileError(f"{path}: a .wav file holds real samples, the output is {dtype}; write a .npy file")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
        raise FileError(f"{path}: a .wav file holds (channels, samples), the output is {shape}; write a .npy file")
    channels, samples = shape[-2:]
    if not 1 <= channels <= 1024:
        raise FileError(f"{path}: a .wav file holds 1 to 1024 channels, the output has {channels}; write a .npy file")
    if 4 * channels * samples > _MAX_WAV_BYTES:
        raise FileError(f"{path}: a .wav file ends at 4 GiB, the output is larger: {shape}; write a .npy file")
    _soundfile(path)


def _suffix(path: StrPath, suffixes: tuple[str, ...]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise FileError(f"{path}: the name must end in {' or '.join(suffixes)}")
    return suffix


def _read_npy(path: StrPath, file: BinaryIO, size: int) -> Array:
    if file.read(len(_NPY_MAGIC)) != _NPY_MAGIC:
        raise FileError(f"{path}: is not a .npy file")
    file.seek(0)
    # Version 3.0 exists for the names of structured dtypes alone.
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(file)
        header = read_header[version](file) if version in read_header else None
    except Exception as error:  # what NumPy's parser raises for a damaged header is not limited to ValueError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileError(f"{path}: is damaged: its header cannot be read ({reason})") from error
    if header is None:
        raise FileError(f"{path}: is a .npy file of version {version[0]}.{version[1]}, which holds no plain array")
    shape, _, dtype = header
    if dtype.hasobject:
        raise FileError(f"{path}: holds pickled Python objects, which are never loaded")
    if any(extent < 0 for extent in shape):
        raise FileError(f"{path}: is damaged: its header declares the shape {shape}")
    expected, found = math.prod(shape) * dtype.itemsize, size - file.tell()
    if found < expected:
        raise FileError(f"{path}: is truncated: {expected} bytes of data expected for shape {shape}, {found} found")
    file.seek(0)
    return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _read_wav(path: StrPath, file: BinaryIO, size: int, *, wide: bool) -> tuple[Array, int]:
    soundfile = _soundfile(path)
    header = file.read(12)
    if header[:4] == b"RIFF":  # libsndfile gives what is left of a cut file without a word
        declared = int.from_bytes(header[4:8], "little") + 8
        if size < declared < 2**32 + 7:  # programs that write to a pipe leave 2**32 - 1 in place of the length
            raise FileError(f"{path}: is truncated: its header declares {declared} bytes, {size} found")
    file.seek(0)
    try:
        samples, rate = soundfile.read(file, dtype="float64" if wide else "float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise FileError(f"{path}: is not a .wav file that libsndfile can read: {error.error_string}") from error
    return np.ascontiguousarray(samples.T), int(rate)


def _encode_wav(path: StrPath, array: Array, rate: int | None) -> memoryview:
    """The bytes of a WAV file, made in memory: errors of libsndfile's own file access would go unreported."""
    soundfile = _soundfile(path)
    buffer = io.BytesIO()
    with np.errstate(over="ignore"):  # float64 beyond the range of float32 becomes infinity
        samples = array.T.astype(np.float32)
    try:
        soundfile.write(buffer, samples, rate, format="WAV", subtype="FLOAT")
    except soundfile.LibsndfileError as error:
        raise FileError(f"{path}: libsndfile cannot write it: {error.error_string}") from error
    return buffer.getbuffer()


def _convert(path: StrPath, array: Array, dtype: str | None) -> Array:
    try:
        target = None if dtype is None else numpy_dtype(dtype)
    except ModuleNotFoundError as error:
        raise FileError(f"{path}: {error}") from error
    if array.dtype.kind == "V" and array.dtype.names is None and array.dtype.itemsize == 2:
        if dtype != "bfloat16" or target is None:
            raise FileError(f"{path}: holds raw 2-byte values; if they are bfloat16, give --dtype bfloat16")
        return array.view(target)
    if dtype is None:
        if dtype_name(array.dtype) is None:
            convertible = "; give --dtype to convert" if array.dtype.kind in "iuf" else ""
            raise FileError(f"{path}: has dtype {array.dtype}, expected one of {', '.join(DTYPES)}{convertible}")
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind not in "iufc" and dtype_name(array.dtype) is None:
        raise FileError(f"{path}: has dtype {array.dtype}, which does not convert to {dtype}")
    if array.dtype.kind == "c" and not dtype.startswith("complex"):
        raise FileError(f"{path}: has dtype {array.dtype}; converting it to {dtype} would lose the imaginary part")
    with np.errstate(over="ignore"):  # too large for the dtype becomes infinity, as in any conversion
        return array.astype(target, copy=False)


def _soundfile(path: StrPath) -> ModuleType:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package is there, libsndfile is not
        raise FileError(f"{path}: .wav files need the soundfile package: pip install 'gpuconv[audio]'") from error
    return soundfile  # type: ignore[no-any-return]


@contextmanager
def _new_file(path: StrPath, *, force: bool) -> Iterator[IO[bytes]]:
    """A file for writing that appears under its name, complete, when the block ends, and never if it raises."""
    target = Path(os.path.realpath(path))
    part = target.with_name(f".gpuconv-{secrets.token_hex(8)}.part")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        # Mode 0666 less the process's umask, as `open` gives; the tempfile module would make the file private.
        with open(os.open(part, flags, 0o666), "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if force:
            os.replace(part, target)
        else:
            _rename_if_absent(part, target, path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            os.unlink(part)


def _rename_if_absent(part: Path, target: Path, path: StrPath) -> None:
    """Give `part` the name `target`, unless something has taken that name since it was checked."""
    try:
        os.link(part, target)  # fails where the name exists, in one step
    except FileExistsError:
        raise FileError(f"{path}: exists; give --force to replace it") from None
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileError(f"{path}: exists; give --force to replace it") from None
        os.replace(part, target)
