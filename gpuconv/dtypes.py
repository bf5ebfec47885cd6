"""The dtypes and precisions of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .text import install_hint


@dataclass(frozen=True, slots=True)
class Format:
    """The properties of a dtype, and those of its sums.

    Attributes:
        itemsize: bytes of an element.
        is_complex: whether an element has a real and an imaginary part.
        real: the dtype of an element, or of its parts.
        accumulator: the real dtype of sums.
        roundoff: the unit roundoff of `real`, 2**-(bits of the significand, the hidden one included); 0 of integers.
        smallest_normal, largest: of `real`.
    """

    itemsize: int
    is_complex: bool
    real: str
    accumulator: str
    roundoff: float
    smallest_normal: float
    largest: float

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of a floating-point sum, with both parts of a complex one."""
        return max(4, self.itemsize)

    @property
    def multiply_adds(self) -> int:
        """Real multiply-adds of one product."""
        return 4 if self.is_complex else 1


_BFLOAT16_LARGEST, _SINGLE_LARGEST = float.fromhex("0x1.fep127"), float.fromhex("0x1.fffffep127")
_DOUBLE_LARGEST = float.fromhex("0x1.fffffffffffffp1023")

FORMATS = {
    "float16": Format(2, False, "float16", "float32", 2.0**-11, 2.0**-14, 65504.0),
    "bfloat16": Format(2, False, "bfloat16", "float32", 2.0**-8, 2.0**-126, _BFLOAT16_LARGEST),
    "float32": Format(4, False, "float32", "float32", 2.0**-24, 2.0**-126, _SINGLE_LARGEST),
    "float64": Format(8, False, "float64", "float64", 2.0**-53, 2.0**-1022, _DOUBLE_LARGEST),
    "complex64": Format(8, True, "float32", "float32", 2.0**-24, 2.0**-126, _SINGLE_LARGEST),
    "complex128": Format(16, True, "float64", "float64", 2.0**-53, 2.0**-1022, _DOUBLE_LARGEST),
}
DTYPES = tuple(FORMATS)

# Integers are summed exactly, modulo 2**64.
INTEGERS = ("int8", "uint8", "int16", "int32", "int64")
INTEGER_SUMS = ("int64", "int32")  # the dtypes in which sums can be returned, the default first
FORMATS |= {
    name: Format(np.dtype(name).itemsize, False, name, "int64", 0.0, 0.0, float(np.iinfo(name).max))
    for name in INTEGERS
}

# By precision: the unit roundoff with which operands are rounded, 0 where they are exact.
OPERAND_ROUNDOFF = {"float32": 0.0, "tf32": 2.0**-11}
PRECISIONS = tuple(OPERAND_ROUNDOFF)


def dtype_name(dtype: Any) -> str | None:
    """The name of a supported dtype in `DTYPES`, whatever its byte order; None for every other dtype."""
    name = str(getattr(dtype, "name", dtype))
    return name if name in DTYPES else None


def real_dtype(name: str) -> str:
    """The name of the dtype of the real part, for a dtype in `DTYPES`; a real dtype gives itself."""
    return FORMATS[name].real


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a name in `DTYPES` or `INTEGERS`.

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
