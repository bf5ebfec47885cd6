"""The dtypes and precisions of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from .text import install_hint

DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16}
PRECISIONS = ("float32", "tf32")


def dtype_name(dtype: Any) -> str | None:
    """The name of a supported dtype in `DTYPES`, whatever its byte order; None for every other dtype."""
    name = str(getattr(dtype, "name", dtype))
    return name if name in ITEMSIZE else None


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a name in `DTYPES`.

    Raises:
        ModuleNotFoundError: "bfloat16" without ml_dtypes installed.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'dtype "bfloat16" needs the package ml_dtypes: {install_hint("bf16")}') from error
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16
