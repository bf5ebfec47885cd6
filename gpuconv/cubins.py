"""Kernels compiled in advance: a folder of machine code, from which they are loaded without a compiler.

The folder is $GPUCONV_CACHE_DIR, else `gpuconv` in the user's cache folder. Each file holds NVRTC's output for one
kernel and nothing else, so that a driver can load it by its path::

    <architecture>/<kernel>/<version of NVRTC>-<key>-<digest>.<cubin or ptx>

The key is a hash of the source text with everything that it includes, the compiler's options and gpuconv's version. The
digest is a hash of the contents, by which damage is detected. A file gets its name only when it is complete, so several
processes can fill one folder at the same time.

Machine code is as dangerous as a program: the folder is created for its owner alone, and no folder or file is used that
belongs to anyone but the user or root, or that everybody can write.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from . import __version__
from .source import assemble

if TYPE_CHECKING:
    from .families import Config

NvrtcVersion: TypeAlias = tuple[int, int]

# The options with which CuPy compiles a RawKernel, except the architecture, and include folders that no kernel needs.
OPTIONS = ("-std=c++17", "-ftz=true", "--device-as-default-execution-space")

_NAME = re.compile(r"(\d+)\.(\d+)-([0-9a-f]{32})-([0-9a-f]{32})\.(?:cubin|ptx)")
_PART = ".part"  # the suffix of files that are being written
_ABANDONED_SECONDS = 3600  # a `.part` file older than this was left by a process that ended early


class CacheError(OSError):
    """The folder of compiled kernels, or a file in it, cannot be used; the message names it and the reason."""


class Source(NamedTuple):
    """What machine code is made from, apart from the compiler.

    Attributes:
        arch: "sm_90" and so on.
        kernel: the name of the kernel function.
        key: a hash of gpuconv's version, the options and the text.
        suffix: the form of the code, "cubin" or "ptx".
    """

    arch: str
    kernel: str
    key: str
    suffix: str

    @classmethod
    def of(cls, config: Config, arch: str) -> Source:
        """The source of a specialisation."""
        text = assemble(config.kernel, dict(config.macros))
        # With this variable CuPy has NVRTC produce PTX, which the driver compiles.
        suffix = "ptx" if os.environ.get("CUPY_COMPILE_WITH_PTX") == "1" else "cubin"
        return cls(arch, config.kernel, _digest("\0".join((__version__, *OPTIONS, text)).encode()), suffix)

    @property
    def place(self) -> Path:
        """The folder of the kernel's files."""
        return folder() / self.arch / self.kernel


class Found(NamedTuple):
    """The files of a source in the folder: the one to load, if any, and those that are damaged."""

    path: Path | None
    damaged: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the folder.

    Attributes:
        path: the file.
        arch: "sm_90" and so on.
        kernel: the name of the kernel function.
        nvrtc: the version of the compiler.
        num_bytes: its size.
        used: when it was last read or written, as the file system records it, in seconds since the epoch.
    """

    path: Path
    arch: str
    kernel: str
    nvrtc: NvrtcVersion
    num_bytes: int
    used: float

    @property
    def is_damaged(self) -> bool:
        """Whether its contents are not those that were written. This check does not change `used`."""
        with suppress(FileNotFoundError):
            status = self.path.stat()
            intact = _is_intact(self.path)
            with suppress(OSError):  # the file may belong to another user, or be read-only
                os.utime(self.path, ns=(status.st_atime_ns, status.st_mtime_ns))
            return not intact
        return False


def folder() -> Path:
    """The folder, which need not exist."""
    if given := os.environ.get("GPUCONV_CACHE_DIR"):
        return Path(given)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(caches, "gpuconv")


def is_only_source() -> bool:
    """Whether $GPUCONV_CACHE_ONLY allows only kernels that were compiled in advance."""
    return os.environ.get("GPUCONV_CACHE_ONLY", "0") not in ("", "0")


def path_of(config: Config, arch: str, nvrtc_version: Callable[[], NvrtcVersion | None], major: int) -> Path | None:
    """The file from which a kernel is loaded, if it was compiled in advance.

    It must come from the installed version of NVRTC; where none is installed, or $GPUCONV_CACHE_ONLY is set, it is the
    file of the newest version.

    Args:
        config: the specialisation.
        arch: "sm_90" and so on.
        nvrtc_version: returns the version of NVRTC, or None where it cannot be loaded.
        major: the major version of CUDA for which CuPy was built.

    Raises:
        RuntimeError: there is no such file, and $GPUCONV_CACHE_ONLY is set.
    """
    try:
        found = find(Source.of(config, arch), None if is_only_source() else nvrtc_version(), major=major)
        if found.path is not None:
            return found.path
        trouble = f"{found.damaged[0]}: is damaged" if found.damaged else ""
    except CacheError as error:
        trouble = str(error)
    if is_only_source():
        raise RuntimeError(
            f"{config.kernel} for {arch} was not compiled in advance, which GPUCONV_CACHE_ONLY requires; "
            f"gpuconv warmup --arch {arch} adds kernels to {folder()}{f' ({trouble})' if trouble else ''}"
        )
    if trouble:
        warnings.warn(f"gpuconv: kernels compiled in advance are not used: {trouble}", RuntimeWarning, stacklevel=2)
    return None


def find(source: Source, nvrtc: NvrtcVersion | None, *, major: int | None = None) -> Found:
    """Look for the code of a source.

    Args:
        source: what to look for.
        nvrtc: the version of NVRTC that the code must come from; None for the newest that is found.
        major: the major version of NVRTC that the code must come from; None for any.

    Raises:
        CacheError: the folder cannot be read, or belongs to others.
    """
    damaged: list[Path] = []
    try:
        names = os.listdir(source.place)
        _refuse_foreign(folder())
        for version, name in sorted(_matches(source, names), reverse=True):
            if (nvrtc or version) != version or (major or version[0]) != version[0]:
                continue
            path = source.place / name
            with suppress(FileNotFoundError):  # another process removes files, too
                _refuse_foreign(path)
                if _is_intact(path):
                    return Found(path, tuple(damaged))
                damaged.append(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except CacheError:
        raise
    except OSError as error:
        raise CacheError(f"{folder()}: cannot be read: {error.strerror or error}") from error
    return Found(None, tuple(damaged))


def _matches(source: Source, names: Iterable[str]) -> Iterator[tuple[NvrtcVersion, str]]:
    for name in names:
        match = _NAME.fullmatch(name)
        if match is not None and match[3] == source.key and name.endswith(source.suffix):
            yield (int(match[1]), int(match[2])), name


def store(source: Source, nvrtc: NvrtcVersion, code: bytes, damaged: Iterable[Path] = ()) -> Path:
    """Write the code of a source; returns its file. The files in `damaged`, of the same source, are removed.

    Raises:
        CacheError: the folder cannot be written, or belongs to others.
    """
    path = source.place / f"{nvrtc[0]}.{nvrtc[1]}-{source.key}-{_digest(code)}.{source.suffix}"
    prepare()
    part = None
    try:
        for parent in (source.place.parent, source.place):
            parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=source.place, suffix=_PART, delete=False) as file:
            part = file.name
            file.write(code)
        os.replace(part, path)
        part = None
        for old in damaged:
            if old != path:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise CacheError(f"{folder()}: cannot be written: {error.strerror or error}") from error
    finally:
        if part is not None:
            with suppress(OSError):
                os.unlink(part)
    return path


def prepare() -> None:
    """Create the folder if it does not exist.

    Raises:
        CacheError: it cannot be created, or it belongs to others.
    """
    try:
        folder().parent.mkdir(parents=True, exist_ok=True)
        folder().mkdir(mode=0o700, exist_ok=True)
        _refuse_foreign(folder())
    except CacheError:
        raise
    except OSError as error:
        raise CacheError(f"{folder()}: cannot be made: {error.strerror or error}") from error


def entries() -> list[Entry]:
    """The files of the folder, the most recently used one last.

    Raises:
        CacheError: the folder cannot be read.
    """
    found = []
    for path, status in _files():
        if match := _NAME.fullmatch(path.name):
            used = max(status.st_atime, status.st_mtime)
            version = int(match[1]), int(match[2])
            found.append(Entry(path, path.parts[-3], path.parts[-2], version, status.st_size, used))
    return sorted(found, key=lambda entry: (entry.used, entry.path))


def prune(max_bytes: int | None) -> tuple[int, int]:
    """Remove damaged files, abandoned ones and, until the rest has at most `max_bytes`, the least recently used ones.

    Returns:
        The number of removed files and their bytes, without abandoned ones.

    Raises:
        CacheError: the folder cannot be read, or a file cannot be removed.
    """
    removed: list[Entry] = []
    kept: list[Entry] = []
    for entry in entries():
        (removed if entry.is_damaged else kept).append(entry)
    total = sum(entry.num_bytes for entry in kept)
    for entry in kept:
        if max_bytes is None or total <= max_bytes:
            break
        total -= entry.num_bytes
        removed.append(entry)
    paths = [entry.path for entry in removed]
    paths += (
        path
        for path, status in _files()
        if path.name.endswith(_PART) and status.st_mtime < time.time() - _ABANDONED_SECONDS
    )
    try:
        for path in paths:
            path.unlink(missing_ok=True)  # another process may have removed it
    except OSError as error:
        raise CacheError(f"{error.filename}: cannot be removed: {error.strerror or error}") from error
    return len(removed), sum(entry.num_bytes for entry in removed)


def _files() -> list[tuple[Path, os.stat_result]]:
    """The files in the folders of kernels."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise CacheError(f"{folder()}: cannot be read: {error.strerror or error}") from error

    found = []
    for parent, _, names in os.walk(folder(), onerror=fail):
        if len(Path(parent).relative_to(folder()).parts) == 2:
            for path in (Path(parent, name) for name in names):
                with suppress(FileNotFoundError):  # another process removes files, too
                    found.append((path, path.stat()))
    return found


def _refuse_foreign(path: Path) -> None:
    """Refuse a file or folder that anyone but the user and root could have written.

    Raises:
        CacheError: somebody else could have written it.
    """
    if not hasattr(os, "geteuid"):  # Windows itself protects a user's folder from other users
        return
    status = os.stat(path)
    if status.st_uid not in (0, os.geteuid()):
        raise CacheError(
            f"{path}: belongs to the user {status.st_uid}; machine code must belong to root or to its user, "
            f"{os.geteuid()}"
        )
    if status.st_mode & stat.S_IWOTH:
        raise CacheError(f"{path}: everybody can write it; machine code must be writable by its owner alone")


def _is_intact(path: Path) -> bool:
    """Whether the digest in the name is that of the contents."""
    match = _NAME.fullmatch(path.name)
    return match is not None and match[4] == _digest(path.read_bytes())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
