"""What the public functions compute: their arrays by name, and the problem that their arguments state."""

from __future__ import annotations

from typing import Any, NamedTuple

from .arguments import check_shape
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
        arrays: their names for users; only a bias may be None.
        operands: their names in the problem.
    """

    kind: Kind
    arrays: tuple[str, ...]
    operands: tuple[str, ...]


SIGNATURES = {
    "conv1d": Signature("conv1d", ("input", "weight", "bias"), ("input", "weight", "bias")),
    "conv1d_input": Signature("conv_transpose1d", ("grad_output", "weight"), ("input", "weight")),
    "conv1d_weight": Signature("weight_gradient", ("input", "grad_output"), ("fine", "coarse")),
    "conv1d_bias": Signature("bias_gradient", ("grad_output",), ("grad_output",)),
    "conv_transpose1d": Signature("conv_transpose1d", ("input", "weight", "bias"), ("input", "weight", "bias")),
    "conv_transpose1d_input": Signature("conv1d", ("grad_output", "weight"), ("input", "weight")),
    "conv_transpose1d_weight": Signature("weight_gradient", ("input", "grad_output"), ("coarse", "fine")),
    "conv_transpose1d_bias": Signature("bias_gradient", ("grad_output",), ("grad_output",)),
}


class Task(NamedTuple):
    """What a call computes.

    Attributes:
        problem: None where the result is the gradient of an input without positions.
        shape: of the result.
        conjugate_weight: whether the problem's weight is the conjugate of the one that was given.
        out_dtype: of the result, where that is not the dtype of the first array.
    """

    problem: Problem | None
    shape: tuple[int, ...]
    conjugate_weight: bool = False
    out_dtype: str | None = None

    @classmethod
    def of(cls, function: str, arrays: tuple[Any, ...], settings: tuple[Any, ...]) -> Task:
        """The task of a public function; of the arrays only `.shape` and `.dtype` are read.

        Raises:
            ValueError: a shape or a value is out of range.
            TypeError: a setting is of the wrong kind, or a dtype is not supported.
        """
        op: Op = "conv_transpose1d" if function.startswith("conv_transpose1d") else "conv1d"
        if function == op:
            p = ConvProblem.of(op, *arrays, *settings)
            return cls(p, p.output_shape, out_dtype=p.out_dtype)
        if function == f"{op}_bias":
            bias = bias_gradient_problem(function, *arrays)
            return cls(bias, bias.bias_shape)
        size, *others = settings
        if function == f"{op}_weight":
            x, grad_output = arrays
            weight = ArraySpec(check_shape(function, op, "weight_size", size), x.dtype)
            p = gradient_problem(function, op, x, weight, grad_output, others)
            return cls(WeightGradientProblem.of(p), p.weight_shape)
        grad_output, weight = arrays
        x = ArraySpec(check_shape(function, op, "input_size", size), weight.dtype)
        p = gradient_problem(function, op, x, weight, grad_output, others)
        return cls(p.adjoint() if p.L_in else None, p.input_shape, p.is_complex)
