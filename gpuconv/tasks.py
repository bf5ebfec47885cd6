"""What the public functions compute: their arrays by name, and the problem of their arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

from .arguments import check_shape
from .fusion import FUSED_ARRAYS, Fused, Fusion
from .problem import (
    ArraySpec,
    ConvProblem,
    Kind,
    Op,
    Problem,
    WeightGradientProblem,
    bias_gradient_problem,
    gradient_problem,
)


class Signature(NamedTuple):
    """The arrays of a public function.

    Attributes:
        kind: of its problem.
        arrays: their names as arguments; a call that fuses nothing has those up to the bias.
        operands: their names in the problem.
    """

    kind: Kind
    arrays: tuple[str, ...]
    operands: tuple[str, ...]


OPTIONAL = frozenset(("bias", *FUSED_ARRAYS))  # arrays that may be None
_FORWARD = ("input", "weight", "bias", *FUSED_ARRAYS)

SIGNATURES = {
    "conv1d": Signature("conv1d", _FORWARD, _FORWARD),
    "conv1d_input": Signature("conv_transpose1d", ("grad_output", "weight"), ("input", "weight")),
    "conv1d_weight": Signature("weight_gradient", ("input", "grad_output"), ("fine", "coarse")),
    "conv1d_bias": Signature("bias_gradient", ("grad_output",), ("grad_output",)),
    "conv_transpose1d": Signature("conv_transpose1d", _FORWARD, _FORWARD),
    "conv_transpose1d_input": Signature("conv1d", ("grad_output", "weight"), ("input", "weight")),
    "conv_transpose1d_weight": Signature("weight_gradient", ("input", "grad_output"), ("coarse", "fine")),
    "conv_transpose1d_bias": Signature("bias_gradient", ("grad_output",), ("grad_output",)),
}


class Task(NamedTuple):
    """What a call computes.

    Attributes:
        problem: None where the result is the gradient of an input without positions.
        shape: of the result.
        conjugate_weight: whether the problem's weight is the conjugate of the given one.
        out_dtype: of the result, if it differs from the dtype of the first array; else None.
        forward: the problem of the forward operation; None for a bias gradient.
    """

    problem: Problem | None
    shape: tuple[int, ...]
    conjugate_weight: bool = False
    out_dtype: str | None = None
    forward: ConvProblem | None = None

    @classmethod
    def of(cls, function: str, arrays: tuple[Any, ...], settings: tuple[Any, ...]) -> Task:
        """The task of a public function; only `.shape` and `.dtype` of the arrays are read.

        If something is fused, its arrays follow the bias, and a `Fusion` follows the settings.

        Raises:
            ValueError: a shape or a value is out of range.
            TypeError: a setting is of the wrong kind, or a dtype is not supported.
        """
        op: Op = "conv_transpose1d" if function.startswith("conv_transpose1d") else "conv1d"
        if function == op:
            if isinstance(settings[-1], Fusion):
                p = ConvProblem.of(op, *arrays[:3], *settings[:-1]).fused(Fused(settings[-1], arrays[3:]))
            else:
                p = ConvProblem.of(op, *arrays, *settings)
            return cls(p, p.output_shape, out_dtype=p.out_dtype, forward=p)
        if function == f"{op}_bias":
            bias = bias_gradient_problem(function, *arrays)
            return cls(bias, bias.bias_shape)
        size, *others = settings
        if function == f"{op}_weight":
            x, grad_output = arrays
            weight = ArraySpec(check_shape(function, op, "weight_size", size), x.dtype)
            p = gradient_problem(function, op, x, weight, grad_output, others)
            return cls(WeightGradientProblem.of(p), p.weight_shape, forward=p)
        grad_output, weight = arrays
        x = ArraySpec(check_shape(function, op, "input_size", size), weight.dtype)
        p = gradient_problem(function, op, x, weight, grad_output, others)
        return cls(p.adjoint() if p.L_in else None, p.input_shape, p.is_complex, forward=p)


def padding_of(function: str, settings: tuple[Any, ...]) -> Any:
    """The argument `padding` among the settings of a public function other than a bias gradient."""
    return settings[1 if function in ("conv1d", "conv_transpose1d") else 2]


def settings_of_samples(
    function: str, settings: tuple[Any, ...], problem: ConvProblem, input_size: tuple[int, ...]
) -> tuple[Any, ...]:
    """The settings of a public function for some samples of a forward problem, whose input has another size."""
    p, own, first = problem, [*settings], 1 if function in ("conv1d", "conv_transpose1d") else 2
    if function.endswith("_input"):
        own[0] = input_size
    if p.transposed:
        padding, output_padding, output_size = first, first + 1, first + 4
        if own[output_size] is not None:  # it is that of the longest sample
            own[padding], own[output_padding], own[output_size] = p.padding, p.output_padding, None
    return tuple(own)
