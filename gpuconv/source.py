"""Finds the CUDA sources and assembles the text of one kernel: its macros, and its .cu file with all that it includes.

The text is self-contained: no `-I`, no `-D`. The key of CuPy's disk cache has the source and the options, so it would
not cover a header in an include path, and every distinct tuple of options costs an extra compilation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np

_INCLUDE = re.compile(r'#include "([^"]+)"')


@cache
def directory() -> Path:
    """The folder of the CUDA sources: inside the installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: the installation is broken.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "cuda_src", package.parent / "cuda_src"):
        if (candidate / "common.cuh").is_file():
            return candidate
    raise FileNotFoundError(f"gpuconv: the CUDA sources are neither in {package} nor beside it; reinstall gpuconv")


@cache
def read(file: str) -> str:
    """The text of one file of `cuda_src`."""
    return (directory() / file).read_text(encoding="utf-8")


def assemble(kernel: str, macros: Mapping[str, str]) -> str:
    """The translation unit of a kernel: one `#define` per macro, then `<kernel>.cu` as `inlined` returns it."""
    return "".join(f"#define {name} {value}\n" for name, value in macros.items()) + inlined(f"{kernel}.cu")


@cache
def inlined(file: str) -> str:
    """The text of one file of `cuda_src`, with each header that it includes where it is first included.

    `#line` directives make compiler messages point at the real files.
    """
    return "".join(f"{line}\n" for line in _inlined_lines(file, set()))


def _inlined_lines(file: str, included: set[str]) -> Iterator[str]:
    """The lines of a file; those of headers in `included` are left out, and new ones are added to it."""
    included.add(file)
    yield f'#line 1 "{file}"'
    for number, line in enumerate(read(file).splitlines(), start=1):
        include = _INCLUDE.fullmatch(line)
        if include is not None and include[1] not in included:
            yield from _inlined_lines(include[1], included)
            yield f'#line {number + 1} "{file}"'
        else:  # compilers that read the assembled text warn of `#pragma once`
            yield "" if include is not None or line == "#pragma once" else line


@cache
def params_fields(kernel: str) -> tuple[str, ...]:
    """The field names of the kernel's `struct Params`, in order, those of the struct that it extends first."""
    return _fields("Params", inlined(f"{kernel}.cu"))


def _fields(struct: str, text: str) -> tuple[str, ...]:
    match = re.search(rf"struct {struct}(?: : (\w+))? \{{(.*?)\}};", text, re.DOTALL)
    if match is None:
        raise ValueError(f"no struct {struct} is declared")
    base = () if match[1] is None else _fields(match[1], text)
    body = re.sub(r"//[^\n]*", "", match[2])
    return (*base, *(field.strip() for group in re.findall(r"index_t ([^;]+);", body) for field in group.split(",")))


def pack_params(params: Mapping[str, int], index_bits: int) -> np.ndarray[tuple[int], np.dtype[np.signedinteger]]:
    """The bytes of a kernel's Params: one int32 or int64 per field, in order.

    Raises:
        OverflowError: a value does not fit, which means that `index_bits` was chosen wrongly.
    """
    dtype = np.int32 if index_bits == 32 else np.int64
    return np.array(list(params.values()), dtype=dtype)
