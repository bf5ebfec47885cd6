"""Finds the CUDA sources and assembles the text of one kernel: macros, ptx.cuh, common.cuh, the family's .cu file.

The text is self-contained: no `-I`, no `-D`. CuPy keys its disk cache by source and options, so a header reached
through an include path would be invisible to that key, and every distinct tuple of options costs an extra compile.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

HEADERS = ("ptx.cuh", "common.cuh")


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
    """The translation unit of a kernel: one `#define` per macro, the headers, and `<kernel>.cu`.

    The headers are `HEADERS` and those that the .cu file names in a comment line of its own, `// Uses: tiled.cuh`.
    `#line` directives make compiler messages point at the real files.
    """
    defines = "".join(f"#define {name} {value}\n" for name, value in macros.items())
    named = re.findall(r"^// Uses: (\S+)$", read(f"{kernel}.cu"), re.MULTILINE)
    files = (*HEADERS, *named, f"{kernel}.cu")
    return defines + "".join(f'#line 1 "{file}"\n{read(file)}' for file in files)


@cache
def params_fields(kernel: str) -> tuple[str, ...]:
    """The field names of the kernel's `struct Params`, in order, as `<kernel>.cu` declares them."""
    match = re.search(r"struct Params \{(.*?)\};", read(f"{kernel}.cu"), re.DOTALL)
    if match is None:
        raise ValueError(f"{kernel}.cu declares no struct Params")
    body = re.sub(r"//[^\n]*", "", match.group(1))
    return tuple(field.strip() for group in re.findall(r"index_t ([^;]+);", body) for field in group.split(","))


def pack_params(params: Mapping[str, int], index_bits: int) -> np.ndarray[tuple[int], np.dtype[np.signedinteger]]:
    """The bytes of a kernel's Params: one int32 or int64 per field, in order.

    Raises:
        OverflowError: a value does not fit, which means that `index_bits` was chosen wrongly.
    """
    dtype = np.int32 if index_bits == 32 else np.int64
    return np.array(list(params.values()), dtype=dtype)
