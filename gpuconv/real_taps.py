"""Real taps on complex data: which calls have them, and which dtypes fit."""

from __future__ import annotations

from typing import Any

from .arguments import ArrayLike, check_dtype
from .dtypes import real_dtype
from .fusion import Fusion, check_data
from .problem import dtype_name


def are_real_taps(weight: Any, data: Any) -> bool:
    """Whether the weight is real and the data are complex; either may be any object, even one without a dtype."""
    of_weight, of_data = (dtype_name(getattr(array, "dtype", None)) or "" for array in (weight, data))
    return of_data.startswith("complex") and of_weight.startswith(("float", "bfloat"))


def check_real_taps(function: str, given: dict[str, ArrayLike], fusion: Fusion | None) -> None:
    """Check the dtypes of a call with real taps on complex data.

    Args:
        function: the messages begin with it.
        given: the arrays by name, the data first; only their dtypes are read.
        fusion: what is fused.

    Raises:
        TypeError: a dtype does not fit.
    """
    name, data = next(iter(given.items()))
    dtype = check_dtype(function, name, data, integers=name == "input")
    if fusion is not None:
        check_data(function, fusion, dtype)
    for other, array in given.items():
        expected = real_dtype(dtype) if other == "weight" else dtype
        if dtype_name(array.dtype) != expected:
            real = f" or, for real taps, {expected}" if other == "weight" else ""
            raise TypeError(f"{function}: {other} must have the dtype of {name}, {dtype}{real}; got {array.dtype}")
