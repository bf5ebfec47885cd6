"""The interface of all kinds of problems."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, TypeAlias

from ..dtypes import FORMATS, Format

Kind: TypeAlias = Literal["conv1d", "conv_transpose1d", "weight_gradient", "bias_gradient"]


class Problem(ABC):
    """The interface of all kinds of problems for dispatch and runtime; each problem is a frozen value."""

    __slots__ = ()

    result: ClassVar[str]
    """The name of the array that is computed, the last of `shapes`."""

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """Which kernel families compute it."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """The dtype of the operands; `dtype_of` gives that of each array."""

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays of its kernels, by name, the result last. A single sample is a batch of one."""

    @property
    @abstractmethod
    def terms(self) -> int:
        """The largest number of products in an element of the result: the ``n`` of the error bound."""

    @abstractmethod
    def flops(self) -> int:
        """Floating-point operations, a multiply-add counted as two (as eight for complex data), padding included."""

    def bytes(self) -> int:
        """The fewest bytes that must move: every operand read once, the result written once."""
        return sum(math.prod(shape) * FORMATS[self.dtype_of(name)].itemsize for name, shape in self.shapes.items())

    @property
    def is_empty(self) -> bool:
        """Whether nothing is launched: the result has no elements, or is zero since every sum is empty."""
        return any(0 in shape for shape in self.shapes.values())

    def dtype_of(self, name: str) -> str:
        """The dtype of one of the arrays."""
        return self.dtype

    @property
    def format(self) -> Format:
        """The format of the operands and of the sums."""
        return FORMATS[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.format.itemsize

    @property
    def is_complex(self) -> bool:
        return self.format.is_complex
