"""The caches of repeated calls: their keys, and how entries are kept."""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np

from . import runtime
from .fusion import Fusion

# Of a cache: a full one drops its oldest entry, so that a program whose lengths always differ does not fill the memory.
SIZE = 4096
LOCK = Lock()  # for changes; look-ups need none


def keep(cache: dict[tuple[Any, ...], Any], key: tuple[Any, ...], value: Any) -> None:
    """Keep a value for the next call, unless another call is changing a cache; the next call then makes it again.

    No call waits for the lock, since it might wait forever: a finalizer may make a call while its own thread holds the
    lock, and a forked process inherits a lock that another thread held.
    """
    if LOCK.acquire(blocking=False):
        try:
            while len(cache) >= SIZE:
                del cache[next(iter(cache))]
            cache[key] = value
        finally:
            LOCK.release()


def cpu_key(name: str, arrays: tuple[Any, ...], settings: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The cache key of a CPU call: all that its task depends on. None where every call must check its arguments."""
    names = settings_key(settings)
    if names is None:
        return None
    key: list[Any] = [name, names]
    for array in arrays:
        if type(array) is np.ndarray:
            key += (array.shape, array.dtype)
        elif array is None:
            key.append(None)
        else:
            return None
    return tuple(key)


_PLAIN_TYPES = frozenset((int, str, type(None), Fusion))


def settings_key(settings: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The settings as a key, with lists as tuples and NumPy integers as ints; None where they cannot be one.

    A key has only ints, strings, None and a `Fusion`. A bool, for example, makes no key: True equals 1 and would find
    the entry of 1, but must be refused.
    """
    for value in settings:
        kind = type(value)
        if kind not in _PLAIN_TYPES and (kind is not tuple or not _PLAIN_TYPES.issuperset(map(type, value))):
            break
    else:  # the usual case
        return settings

    def plain(value: Any) -> Any:
        if type(value) in _PLAIN_TYPES:
            return value
        if isinstance(value, list | tuple):
            return tuple(map(plain, value))
        if isinstance(value, np.integer):
            return int(value)
        raise TypeError

    try:
        return tuple(map(plain, settings))
    except TypeError:
        return None


def identity(array: Any) -> tuple[Any, ...] | None:
    """The properties of a CuPy array on which an executor depends: arrays with equal identities share an executor.

    All other arrays have the identity ("foreign",).
    """
    if array is None:
        return None
    if not runtime.is_cupy_array(array):
        return ("foreign",)
    data = array.data
    return (array.shape, array.strides, array.dtype, data.device_id, data.ptr & 15)
