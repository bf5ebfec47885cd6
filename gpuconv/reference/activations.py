"""The activations in float64, and the error bounds of computed ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import FORMATS, Format
from ..fusion import TINY, ULPS, Activation

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """An activation in float64, with its arrays (C, 1) if it has any."""

    activation: Activation
    alpha: Any = None
    beta: Any = None

    @classmethod
    def of(cls, activation: Activation | None, names: tuple[str, str], fused: Mapping[str, Array]) -> Function | None:
        if activation is None:
            return None
        arrays = [fused[name].astype(np.float64)[:, np.newaxis] for name in names[: activation.arrays]]
        return cls(activation, *(arrays if len(arrays) != 1 else 2 * arrays))

    def __call__(self, x: Array) -> Array:
        with np.errstate(all="ignore"):
            if self.activation.name == "snake":
                angle = self.alpha * x
                return np.asarray(x + np.where(np.isinf(angle), 0, np.sin(angle)) ** 2 / self.beta)
            return np.asarray(_FUNCTIONS[self.activation.name](x, self.activation.parameter))

    def limits(self, shape: tuple[int, ...], sign: float) -> Array:
        """The values of the activation at `sign`, which is plus or minus infinity."""
        return self(np.full(shape, sign))

    def error(self, x: Array, exact: Array, accumulator: Format, moved: Array | float = 0.0) -> Array:
        """The largest distance from `exact`, the value at x, of a value computed at an argument within `moved` of x."""
        e = 2 * ULPS * (accumulator.roundoff + FORMATS["float64"].roundoff)
        with np.errstate(all="ignore"):
            if self.activation.name == "snake":
                steepest = 1 + np.abs(self.alpha / self.beta)
                scale = steepest * np.abs(x)
            else:
                steepest, scale = self.activation.steepest, np.abs(exact)
                if self.activation.name in ("gelu", "gelu_tanh"):
                    scale = scale + np.abs(x) / ULPS
            moved = steepest * moved
            return np.asarray(moved + e * (scale + 2 * moved) + TINY * accumulator.smallest_normal)


def _sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x < 0, small, 1) / (1 + small))


def _gated(x: Array, gate: Array) -> Array:
    """The product of x and its gate; 0 at minus infinity, where the gate is zero."""
    return np.where(np.isneginf(x), 0, x * gate)


_erfc = np.vectorize(math.erfc, otypes=[np.float64])

_FUNCTIONS: dict[str, Callable[[Array, float], Array]] = {
    "relu": lambda x, _: np.where(x < 0, 0, x),
    "leaky_relu": lambda x, slope: np.where(x < 0, slope * x, x),
    "elu": lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(x)),
    "silu": lambda x, _: _gated(x, _sigmoid(x)),
    "gelu": lambda x, _: _gated(x, _erfc(-x / math.sqrt(2)) / 2),
    "gelu_tanh": lambda x, _: _gated(x, _sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "tanh": lambda x, _: np.tanh(x),
    "sigmoid": lambda x, _: _sigmoid(x),
}
