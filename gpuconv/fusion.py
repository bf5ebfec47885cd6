"""Fusion with a convolution: an activation of its input, a residual, an activation of its output.

    output = activation(convolution(input_activation(input), weight) + bias + residual)

The activations are those of torch.nn.functional of the same names, and snake:

    relu         max(x, 0)                          silu       x / (1 + exp(-x))
    leaky_relu   x, or slope*x where x < 0          gelu       x * (1 + erf(x/sqrt(2))) / 2
    elu          x, or alpha*(exp(x) - 1) where x < 0
    gelu, "tanh" x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x**3))) / 2
    tanh, sigmoid                                   snake      x + sin(alpha*x)**2 / beta

At infinities they have their limits, where PyTorch's may be NaN. A NaN stays NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from .arguments import ArrayLike, check_dtype
from .dtypes import FORMATS, INTEGERS
from .text import shown

# An activation as an argument: a name, or a name with its parameters, which for snake are arrays.
ActivationLike: TypeAlias = str | Sequence[Any]

# The largest error of an activation in units in the last place of the accumulator, on the CPU and on a GPU. For gelu
# one unit of x is added, since an exponent with a power of x is rounded. For snake they are units of
# abs(x)*(1 + abs(alpha/beta)), a bound of its value, since the argument of its sine is rounded. In addition any result
# may be off by TINY smallest normal numbers.
ULPS = 4
TINY = 4096

# The arrays of a call after input, weight and bias, by their names in a problem.
RESIDUAL = "residual"
ACTIVATION_ARRAYS = ("activation_alpha", "activation_beta")
INPUT_ACTIVATION_ARRAYS = ("input_activation_alpha", "input_activation_beta")
FUSED_ARRAYS = (RESIDUAL, *ACTIVATION_ARRAYS, *INPUT_ACTIVATION_ARRAYS)


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation without its arrays.

    Attributes:
        name: one of `ACTIVATIONS`, or "gelu_tanh".
        parameter: leaky_relu's slope, elu's alpha.
        arrays: the number of arrays: for snake 1 (alpha, which is also beta) or 2, otherwise 0.
    """

    name: str
    parameter: float = 0.0
    arrays: int = 0

    @property
    def steepest(self) -> float:
        """The largest absolute slope; for snake, whose slope depends on its arrays, that for alpha equal to beta."""
        if self.name in ("leaky_relu", "elu"):
            return max(1.0, abs(self.parameter))
        return {"silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13, "sigmoid": 0.25, "snake": 2.0}.get(self.name, 1.0)

    def as_argument(self, arrays: tuple[Any, ...]) -> ActivationLike:
        """The argument of the public functions for it, with its arrays."""
        if self.name in ("leaky_relu", "elu"):
            return self.name, self.parameter
        return ("gelu", "tanh") if self.name == "gelu_tanh" else (self.name, *arrays)

    def __str__(self) -> str:
        if self.name == "gelu_tanh":
            return "gelu (tanh)"
        return f"{self.name} ({self.parameter:g})" if self.name in ("leaky_relu", "elu") else self.name


@dataclass(frozen=True, slots=True)
class Fusion:
    """What a problem fuses."""

    activation: Activation | None = None
    input_activation: Activation | None = None
    has_residual: bool = False

    def __bool__(self) -> bool:
        return self.has_residual or self.activation is not None or self.input_activation is not None

    @property
    def _sides(self) -> dict[str, tuple[Activation | None, tuple[str, str]]]:
        return {
            "activation": (self.activation, ACTIVATION_ARRAYS),
            "input_activation": (self.input_activation, INPUT_ACTIVATION_ARRAYS),
        }

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of the arrays, in the order of `FUSED_ARRAYS`."""
        of_channels = (names[: a.arrays] for a, names in self._sides.values() if a is not None)
        return (*((RESIDUAL,) if self.has_residual else ()), *(name for names in of_channels for name in names))

    def as_arguments(self, arrays: Mapping[str, Any]) -> dict[str, ActivationLike | None]:
        """The arguments `activation` and `input_activation` of the public functions, with the arrays of these names."""
        return {
            argument: None if a is None else a.as_argument(tuple(arrays[name] for name in names[: a.arrays]))
            for argument, (a, names) in self._sides.items()
        }

    def __str__(self) -> str:
        words = [] if self.input_activation is None else [f"input {self.input_activation}"]
        words += ["residual"] if self.has_residual else []
        words += [] if self.activation is None else [str(self.activation)]
        return ", ".join(words)


class Fused(NamedTuple):
    """The fusion arguments of a call, parsed: what is fused, and its arrays."""

    fusion: Fusion
    arrays: tuple[Any | None, ...]  # in the order of FUSED_ARRAYS

    @classmethod
    def check(
        cls,
        caller: str,
        activation: ActivationLike | None,
        input_activation: ActivationLike | None,
        residual: Any | None = None,
    ) -> Fused:
        """Parse the arguments, without their shapes; the messages begin with `caller`.

        Raises:
            ValueError: there is no activation of that name, or a parameter is out of range or missing.
            TypeError: an argument or a parameter is of the wrong kind.
        """
        behind, arrays = _parse(caller, "activation", activation)
        before, input_arrays = _parse(caller, "input_activation", input_activation)
        return cls(Fusion(behind, before, residual is not None), (residual, *arrays, *input_arrays))

    @classmethod
    def take(cls, caller: str, settings: MutableMapping[str, Any]) -> Fused:
        """`check` for those of the keyword arguments of a call that are about fusion; they are removed."""
        return cls.check(caller, *(settings.pop(name, None) for name in ("activation", "input_activation", RESIDUAL)))

    @property
    def given(self) -> dict[str, Any]:
        """The arrays that are not None, by name."""
        return {name: array for name, array in zip(FUSED_ARRAYS, self.arrays, strict=True) if array is not None}


def check_data(caller: str, fusion: Fusion, dtype: str) -> None:
    """Refuse fusion that a dtype of the data does not allow.

    Raises:
        TypeError: an activation for complex data, or anything for integers.
    """
    for name, activation in (("activation", fusion.activation), ("input_activation", fusion.input_activation)):
        if activation is not None and (FORMATS[dtype].is_complex or dtype in INTEGERS):
            raise TypeError(f"{caller}: {name} {activation.name} needs real floating-point data, got {dtype}")
    if fusion.has_residual and dtype in INTEGERS:
        raise TypeError(f"{caller}: a residual needs floating-point data, got {dtype}")


def check_arrays(
    caller: str, fusion: Fusion, arrays: Sequence[Any | None], dtype: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Check the dtypes and shapes of the fused arrays; `shapes` has the expected shapes by name.

    Raises:
        ValueError: an array has another shape.
        TypeError: an array has another dtype, or `check_data` refuses the data.
    """
    check_data(caller, fusion, dtype)
    for name, array in zip(FUSED_ARRAYS, arrays, strict=True):
        if array is None:
            continue
        found = check_dtype(caller, name, array)
        if found != dtype:
            raise TypeError(f"{caller}: {name} must have the dtype of input, {dtype}, got {found}")
        if tuple(array.shape) != shapes[name]:
            raise ValueError(f"{caller}: {name} must have shape {shapes[name]}, got {tuple(array.shape)}")


def _parse(
    caller: str, argument: str, value: ActivationLike | None
) -> tuple[Activation | None, tuple[ArrayLike | None, ArrayLike | None]]:
    """An argument as an activation and its arrays."""
    nothing = (None, None)
    if value is None:
        return None, nothing
    if isinstance(value, str) and value in _PLAIN:
        return _PLAIN[value], nothing
    parts: list[Any] = [value] if isinstance(value, str) else [*value] if isinstance(value, list | tuple) else []
    if not parts or not isinstance(parts[0], str):
        raise TypeError(
            f"{caller}: {argument} must be None, a name or a tuple that begins with one, "
            f"got {type(value).__name__}{'' if hasattr(value, 'shape') else f' {shown(value)}'}"
        )
    name, *parameters = parts
    if name not in ACTIVATIONS:
        raise ValueError(f"{caller}: {argument} must be one of {', '.join(ACTIVATIONS)}, got {shown(name)}")
    words, least, most, read = _PARAMETERS.get(name, ("no parameter", 0, 0, None))
    if not least <= len(parameters) <= most:
        raise ValueError(f"{caller}: {argument} {name} takes {words}, got {len(parameters)} parameters")
    if read is not None and parameters:
        return read(caller, argument, parameters[0]), nothing
    if name != "snake":
        return _PLAIN[name], nothing
    for array in parameters:
        if not (hasattr(array, "shape") and hasattr(array, "dtype")):
            got = f"{type(array).__name__} {shown(array)}"
            raise TypeError(f"{caller}: {argument} snake takes arrays with one value a channel, got {got}")
    beta = parameters[1] if len(parameters) == 2 else None
    return Activation("snake", arrays=len(parameters)), (parameters[0], beta)


def _number(name: str) -> Callable[[str, str, Any], Activation]:
    def read(caller: str, argument: str, value: Any) -> Activation:
        words = f"{caller}: {argument} {name} takes {_PARAMETERS[name][0]}, a finite number"
        if isinstance(value, bool | str | bytes) or getattr(value, "shape", ()) != ():
            raise TypeError(f"{words}, got {type(value).__name__}")
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"{words}, got {type(value).__name__} {shown(value)}") from None
        except OverflowError:
            raise ValueError(f"{words}, got an int of {int(value).bit_length()} bits") from None
        if not math.isfinite(number):
            raise ValueError(f"{words}, got {number}")
        return Activation(name, number)

    return read


def _gelu(caller: str, argument: str, value: Any) -> Activation:
    if not isinstance(value, str) or value not in ("none", "tanh"):
        raise ValueError(f'{caller}: {argument} gelu takes "none" or "tanh", got {shown(value)}')
    return _PLAIN["gelu"] if value == "none" else Activation("gelu_tanh")


ACTIVATIONS = ("relu", "leaky_relu", "elu", "silu", "gelu", "tanh", "sigmoid", "snake")
# The activations that need no parameter, with PyTorch's default of an optional one.
_PLAIN = {
    name: Activation(name, {"leaky_relu": 0.01, "elu": 1.0}.get(name, 0.0)) for name in ACTIVATIONS if name != "snake"
}
# By name: the parameters in words, their least and greatest number, and the function that reads one that is no array.
_PARAMETERS: dict[str, tuple[str, int, int, Callable[[str, str, Any], Activation] | None]] = {
    "leaky_relu": ("a slope", 0, 1, _number("leaky_relu")),
    "elu": ("an alpha", 0, 1, _number("elu")),
    "gelu": ('"none" or "tanh"', 0, 1, _gelu),
    "snake": ("arrays alpha and perhaps beta", 1, 2, None),
}
