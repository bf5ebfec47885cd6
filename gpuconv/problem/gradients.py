"""The problems of the gradients with respect to weight and bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ..arguments import ArrayLike, ArraySpec, Op, check_dtype, check_rank
from ..edge import edge_windows
from .base import Kind, Problem
from .forward import ConvProblem

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WeightGradientProblem(Problem):
    """The gradient of a convolution's weight, one correlation for both operations.

    Make it with `WeightGradientProblem.of` from a validated problem. It has two arrays, `coarse` and `fine`; one
    position of coarse corresponds to `stride` positions of fine::

        grad_weight[r, c, k] = sum over n, l of coarse[n, r, l] * fine[n, g*C_fine_g + c, l_fine]
        l_fine = l*stride - padding_left + k*dilation        (terms without such a position do not exist)
        g      = r // C_coarse_g

    - coarse ``(N, C_coarse, L_coarse)``: the output's gradient of conv1d (C_coarse = C_out, L_coarse = L_out), the
      input of conv_transpose1d (C_coarse = C_in, L_coarse = L_in);
    - fine ``(N, C_fine, L_fine)``: the input of conv1d (C_fine = C_in, L_fine = L_in), the output's gradient of
      conv_transpose1d (C_fine = C_out, L_fine = L_out);
    - result ``(C_coarse, C_fine/groups, K)``, the shape of the weight in both.

    For complex data the input, which is either of the two, is conjugated: the gradient is that of PyTorch, the
    direction of steepest ascent, and the adjoint of the operation with respect to its weight.

    The right padding does not appear: L_coarse and L_fine say which positions exist. In a `padding_mode` other than
    "zeros" all positions exist: those outside of fine stand for samples of it.
    """

    result: ClassVar[str] = "grad_weight"

    op: Op
    N: int
    C_coarse: int
    C_fine: int
    L_coarse: int
    L_fine: int
    K: int
    stride: int = 1
    padding_left: int = 0
    dilation: int = 1
    groups: int = 1
    dtype: str = "float32"
    precision: str = "float32"
    padding_mode: str = "zeros"
    has_lengths: bool = False  # as in ConvProblem

    @classmethod
    def of(cls, problem: ConvProblem) -> WeightGradientProblem:
        """The weight gradient of a forward problem. A single sample is a batch of one; the bias is ignored."""
        p = problem
        p.refuse_fusion()
        sides = (p.C_in, p.C_out, p.L_in, p.L_out) if p.transposed else (p.C_out, p.C_in, p.L_out, p.L_in)
        return cls(
            p.op, p.N, *sides, p.K, p.stride, p.padding_left, p.dilation, p.groups, p.dtype, p.precision,
            padding_mode=p.padding_mode, has_lengths=p.has_lengths,
        )  # fmt: skip

    def sides(self, input: T, grad_output: T) -> tuple[T, T]:
        """The two arrays as (coarse, fine)."""
        return (input, grad_output) if self.transposed else (grad_output, input)

    @property
    def kind(self) -> Kind:
        return "weight_gradient"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"coarse": self.coarse_shape, "fine": self.fine_shape, self.result: self.weight_shape}

    @property
    def transposed(self) -> bool:
        """Whether the forward operation is conv_transpose1d, so that coarse is its input."""
        return self.op == "conv_transpose1d"

    @property
    def C_coarse_g(self) -> int:
        """Channels of coarse in one group."""
        return self.C_coarse // self.groups

    @property
    def C_fine_g(self) -> int:
        """Channels of fine in one group."""
        return self.C_fine // self.groups

    @property
    def conjugate_coarse(self) -> bool:
        """Whether coarse is conjugated: it is the input and complex."""
        return self.is_complex and self.transposed

    @property
    def conjugate_fine(self) -> bool:
        """Whether fine is conjugated: it is the input and complex."""
        return self.is_complex and not self.transposed

    @property
    def coarse_shape(self) -> tuple[int, int, int]:
        return (self.N, self.C_coarse, self.L_coarse)

    @property
    def fine_shape(self) -> tuple[int, int, int]:
        return (self.N, self.C_fine, self.L_fine)

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """The shape of the result."""
        return (self.C_coarse, self.C_fine_g, self.K)

    @property
    def terms(self) -> int:
        if self.padding_mode != "zeros":
            return self.N * self.L_coarse
        return self.N * min(self.L_coarse, -(-self.L_fine // self.stride))

    @property
    def edge_windows(self) -> tuple[int, int]:
        """How many of the first and of the last positions of coarse have windows that reach over an edge of fine."""
        return edge_windows(self.L_coarse, self.L_fine, self.K, self.stride, self.padding_left, self.dilation)

    def flops(self) -> int:
        return (8 if self.is_complex else 2) * self.N * self.L_coarse * math.prod(self.weight_shape)

    def __str__(self) -> str:
        return (
            f"{self.op} weight gradient N{self.N} C{self.C_coarse},{self.C_fine} L{self.L_coarse},{self.L_fine} "
            f"K{self.K} s{self.stride} p{self.padding_left} d{self.dilation} g{self.groups} {self.dtype}"
            + (f" {self.precision}" if self.precision != "float32" else "")
            + (f" {self.padding_mode}" if self.padding_mode != "zeros" else "")
            + (" lengths" if self.has_lengths else "")
        )


@dataclass(frozen=True, slots=True)
class BiasGradientProblem(Problem):
    """The gradient of a bias, the same for both operations.

        grad_bias[c] = sum over n, l of grad_output[n, c, l]

    grad_output is ``(N, C, L)``, the result ``(C,)``. Nothing is conjugated.
    """

    result: ClassVar[str] = "grad_bias"

    N: int
    C: int
    L: int
    dtype: str = "float32"
    has_lengths: bool = False  # each sample of grad_output has a length of its own, up to L

    @classmethod
    def of(cls, problem: ConvProblem) -> BiasGradientProblem:
        """The bias gradient of a forward problem."""
        problem.refuse_fusion()
        return cls(problem.N, problem.C_out, problem.L_out, problem.dtype, problem.has_lengths)

    @property
    def kind(self) -> Kind:
        return "bias_gradient"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"grad_output": self.grad_output_shape, self.result: self.bias_shape}

    @property
    def grad_output_shape(self) -> tuple[int, int, int]:
        return (self.N, self.C, self.L)

    @property
    def bias_shape(self) -> tuple[int]:
        """The shape of the result."""
        return (self.C,)

    @property
    def terms(self) -> int:
        return self.N * self.L

    def flops(self) -> int:
        """Floating-point additions, those of complex data counted as two."""
        return (2 if self.is_complex else 1) * math.prod(self.grad_output_shape)

    def __str__(self) -> str:
        return f"bias gradient N{self.N} C{self.C} L{self.L} {self.dtype}" + (" lengths" if self.has_lengths else "")


def gradient_problem(
    caller: str,
    op: Op,
    input: ArrayLike,
    weight: ArrayLike,
    grad_output: ArrayLike,
    settings: Sequence[Any],
) -> ConvProblem:
    """The forward problem of a gradient, checked together with `grad_output`.

    Args:
        caller: the messages begin with it.
        op: the forward operation.
        input: an array, or a specification if its gradient is wanted.
        weight: likewise.
        grad_output: the gradient of the output.
        settings: those of `ConvProblem.conv1d` or `ConvProblem.conv_transpose1d`, in order.

    Raises:
        ValueError: a shape or a value is out of range.
        TypeError: a setting is of the wrong kind, or a dtype is not supported.
    """
    for name, array in (("input", input), ("weight", weight)):
        if not isinstance(array, ArraySpec):  # a specification has the dtype of the other array
            check_dtype(caller, name, array)
    try:
        problem = ConvProblem.of(op, input, weight, None, *settings)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{caller}{str(error).removeprefix(op)}") from None
    found = check_dtype(caller, "grad_output", grad_output)
    if found != problem.dtype:
        other = "weight" if isinstance(input, ArraySpec) else "input"
        raise TypeError(
            f"{caller}: {other} and grad_output must share one dtype, got {other} {problem.dtype}, grad_output "
            f"{found}; pass grad_output.astype({other}.dtype)"
        )
    if tuple(grad_output.shape) != problem.output_shape:
        raise ValueError(
            f"{caller}: grad_output must have the output's shape {problem.output_shape}, got {tuple(grad_output.shape)}"
        )
    return problem


def bias_gradient_problem(caller: str, grad_output: ArrayLike) -> BiasGradientProblem:
    """The problem of a bias gradient; the messages begin with `caller`.

    Raises:
        ValueError: grad_output has another number of axes than 2 or 3.
        TypeError: its dtype is not supported.
    """
    check_rank(caller, "grad_output", grad_output.shape, "(N, C_out, L_out) or (C_out, L_out)", (2, 3))
    dtype = check_dtype(caller, "grad_output", grad_output)
    N, C, L = grad_output.shape if len(grad_output.shape) == 3 else (1, *grad_output.shape)
    return BiasGradientProblem(N, C, L, dtype)
