"""State dictionaries in `.npz` and `.safetensors` files, read entry by entry, and the folding of weight normalisation.

Source of weight normalisation: Salimans and Kingma, "Weight Normalization", 2016, as torch.nn.utils applies it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .dtypes import numpy_dtype
from .text import install_hint

Array: TypeAlias = npt.NDArray[Any]
StrPath: TypeAlias = str | os.PathLike[str]

# The magnitude and the direction of a normalised weight: by torch.nn.utils.weight_norm, and by its successor in
# torch.nn.utils.parametrizations.
NORMALISED = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))


class EntryError(ValueError):
    """Why an entry of a state dictionary cannot become a parameter."""


@contextmanager
def open_state(caller: str, path: StrPath) -> Iterator[Mapping[str, Any]]:
    """The arrays of a file by name; each is read when it is looked up, which raises `EntryError` where it is damaged.

    Raises:
        OSError: the file cannot be opened.
        ValueError: its name does not end in .npz or .safetensors, or it is damaged.
        ModuleNotFoundError: the file is a `.safetensors` file and the package safetensors is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".npz", ".safetensors"):
        hint = "; PyTorch's own files hold pickled objects, which are never loaded" if suffix in (".pt", ".pth") else ""
        raise ValueError(f'{caller}: the name of a file must end in .npz or .safetensors, got "{path}"{hint}')
    with open(path, "rb") as file, ExitStack() as stack:
        try:
            if suffix == ".npz":
                opened = stack.enter_context(np.load(file, allow_pickle=False))
            else:
                opened = stack.enter_context(_safe_open(caller, path))
        except ModuleNotFoundError:
            raise
        except Exception as error:  # NumPy and zipfile raise many types of errors for damaged files
            raise ValueError(f"{caller}: {path} is damaged: {error or type(error).__name__}") from error
        read = opened.get_tensor if suffix == ".safetensors" else opened.__getitem__

        def entry(key: str) -> Array:
            try:
                if suffix == ".safetensors" and opened.get_slice(key).get_dtype() == "BF16":
                    numpy_dtype("bfloat16")  # where ml_dtypes is missing, its error says what to install
                return np.asarray(read(key))
            except ModuleNotFoundError:
                raise
            except Exception as error:
                raise EntryError(f'"{key}" cannot be read from {path}: {error or type(error).__name__}') from error

        yield Entries(opened.keys(), entry)


def _safe_open(caller: str, path: StrPath) -> Any:
    try:
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{caller}: {path} needs the package safetensors: {install_hint('safetensors')}"
        ) from error
    return safe_open(os.fspath(path), framework="np")


class Entries(Mapping[str, Any]):
    """A mapping that reads an entry when it is looked up.

    Args:
        keys: the names of the entries.
        read: returns the entry of a name.
    """

    def __init__(self, keys: Iterable[str], read: Callable[[str], Any]) -> None:
        self._keys = dict.fromkeys(keys)
        self._read = read

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        return self._read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def select(state: Mapping[str, Any], prefix: str) -> Entries:
    """The entries of a state dictionary whose names begin with a prefix; the prefix is removed from their names."""
    return Entries(
        [str(key)[len(prefix) :] for key in state if str(key).startswith(prefix)], lambda key: state[prefix + key]
    )


def fold(magnitude: Array, direction: Array) -> Array:
    """The weight of weight normalisation, ``w = g * v/||v||``, in float64 or complex128.

    Args:
        magnitude: g, with as many axes as v and the extent 1 in those over which the norm is taken; or of shape (), for
            the norm of the whole weight.
        direction: v, of the weight's shape.

    Raises:
        EntryError: the shapes do not match.
    """
    axes = tuple(axis for axis, extent in enumerate(magnitude.shape) if extent == 1)
    expected = tuple(1 if axis in axes else extent for axis, extent in enumerate(direction.shape))
    if magnitude.ndim and magnitude.shape != expected:
        raise EntryError(f"must have shape {expected}, got {magnitude.shape}")
    wide = direction.astype(np.result_type(direction.dtype, np.float64))
    norm = np.sqrt(np.sum(np.abs(wide) ** 2, axis=axes if magnitude.ndim else None, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):  # a direction of zeros gives NaN, as in PyTorch
        return np.asarray(wide * (magnitude.astype(np.float64) / norm))
