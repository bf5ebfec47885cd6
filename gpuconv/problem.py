"""Convolution problems and the problems of their gradients: validated, hashable values that all of gpuconv works on.

The arguments are checked by the functions of `gpuconv.arguments`. The two length formulas exist once, in
`ConvProblem.__post_init__`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, SupportsIndex, TypeAlias, TypeVar

from .arguments import (
    MAX_EXTENT,
    ArrayLike,
    Arrays,
    ArraySpec,
    Op,
    Padding,
    Setting,
    Settings,
    channels_hint,
    check_bias_length,
    check_dtype,
    check_groups,
    check_out_dtype,
    check_padding_limits,
    check_padding_mode,
    check_precision,
    check_rank,
    check_setting,
    check_size,
)
from .dtypes import DTYPES, FORMATS, INTEGER_SUMS, INTEGERS, PRECISIONS, Format, dtype_name, numpy_dtype
from .edge import edge_windows, most_positions

# With the problems come the words that describe them, so that their users need one import.
__all__ = [
    "DTYPES",
    "FORMATS",
    "INTEGERS",
    "INTEGER_SUMS",
    "MAX_EXTENT",
    "PRECISIONS",
    "ArrayLike",
    "ArraySpec",
    "BiasGradientProblem",
    "ConvProblem",
    "Format",
    "Kind",
    "Op",
    "Padding",
    "Problem",
    "Setting",
    "Settings",
    "WeightGradientProblem",
    "bias_gradient_problem",
    "dtype_name",
    "gradient_problem",
    "numpy_dtype",
]

T = TypeVar("T")

Kind: TypeAlias = Literal["conv1d", "conv_transpose1d", "weight_gradient", "bias_gradient"]


class Problem(ABC):
    """What dispatch and runtime know of every kind of problem; each is a frozen value."""

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
        """Of the operands; `dtype_of` knows that of each array."""

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays of its kernels, by name, the result last. A single sample is a batch of one."""

    @property
    @abstractmethod
    def terms(self) -> int:
        """The most products that one element of the result sums: the ``n`` of the error bound."""

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
        """The numbers of the arrays and of the sums."""
        return FORMATS[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.format.itemsize

    @property
    def is_complex(self) -> bool:
        return self.format.is_complex


@dataclass(frozen=True, slots=True)
class ConvProblem(Problem):
    """A 1-D convolution or transposed convolution with every setting resolved.

    Build it with `ConvProblem.conv1d` or `ConvProblem.conv_transpose1d`, which validate; the constructor takes
    resolved values. Extents are counts of elements:

    - input ``(N, C_in, L_in)``, output ``(N, C_out, L_out)``, bias ``(C_out,)``;
    - weight ``(C_out, C_in/groups, K)`` for conv1d, ``(C_in, C_out/groups, K)`` for conv_transpose1d;
    - conv1d: ``l_in = l_out*stride - padding_left + k*dilation``;
    - conv_transpose1d: ``l_out = l_in*stride - padding_left + k*dilation``.

    A position outside of the longer of the two rows, the input of conv1d and the output of conv_transpose1d, means what
    `padding_mode` says (gpuconv.edge). So a convolution reads samples in place of its padding; its adjoint, which is
    transposed, adds what it would write there to the samples that are meant.

    Raises:
        ValueError: an output length below 1, a padding that its mode does not allow, or an array whose size does not
            fit 64-bit offsets.
    """

    result: ClassVar[str] = "output"

    op: Op
    N: int
    C_in: int
    C_out: int
    L_in: int
    K: int
    stride: int = 1
    padding_left: int = 0
    padding_right: int = 0
    dilation: int = 1
    groups: int = 1
    output_padding: int = 0
    dtype: str = "float32"
    has_bias: bool = False
    batched: bool = True
    precision: str = "float32"
    out_dtype: str | None = None  # of bias and output, where that is not `dtype`
    padding_mode: str = "zeros"
    L_out: int = field(init=False)

    def __post_init__(self) -> None:
        span = self.dilation * (self.K - 1) + 1  # the positions from the first tap to the last, both included
        if self.transposed:
            full = (self.L_in - 1) * self.stride + span + self.output_padding
            L_out = full - self.padding_left - self.padding_right
            detail = (
                f"(L_in - 1)*stride - padding_left - padding_right + dilation*(K - 1) + output_padding + 1 = "
                f"({self.L_in} - 1)*{self.stride} - {self.padding_left} - {self.padding_right} + "
                f"{self.dilation}*({self.K} - 1) + {self.output_padding} + 1"
            )
        else:
            full = self.L_in + self.padding_left + self.padding_right
            if span > full:
                raise ValueError(
                    f"{self.op}: the kernel is longer than the padded input: it spans dilation*(K - 1) + 1 = {span} "
                    f"positions, the padded input has {full} (L_in = {self.L_in}, padding = "
                    f"({self.padding_left}, {self.padding_right}))"
                )
            L_out = (full - span) // self.stride + 1
            detail = "floor((L_in + padding_left + padding_right - dilation*(K - 1) - 1)/stride) + 1"
        if L_out < 1:
            raise ValueError(f"{self.op}: the output length must be at least 1, got {L_out} = {detail}")
        # Symbols, which stand for extents while PyTorch traces a program, are limited when numbers take their places.
        if any(isinstance(extent, int) and extent > MAX_EXTENT for extent in (full, span, self.stride)):
            raise ValueError(
                f"{self.op}: extents must fit in 64 bits: the padded length is {full}, the kernel spans {span}"
            )
        object.__setattr__(self, "L_out", L_out)
        if self.padding_mode != "zeros":
            padded = L_out if self.transposed else self.L_in
            check_padding_limits(self.op, self.padding_mode, self.padding_left, self.padding_right, padded)
        for name, shape in (("input", self.input_shape), ("weight", self.weight_shape), ("output", self.output_shape)):
            check_size(self.op, name, shape, self.dtype_of(name))

    @classmethod
    def of(cls, op: Op, *arguments: Any, **settings: Any) -> ConvProblem:
        """`conv1d` or `conv_transpose1d` of the arguments, as `op` says."""
        return (cls.conv_transpose1d if op == "conv_transpose1d" else cls.conv1d)(*arguments, **settings)

    @classmethod
    def conv1d(
        cls,
        input: ArrayLike,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        stride: Setting = 1,
        padding: Padding = 0,
        dilation: Setting = 1,
        groups: SupportsIndex = 1,
        precision: str = "float32",
        padding_mode: str = "zeros",
        out_dtype: Any = None,
    ) -> ConvProblem:
        """Validate the arguments of `gpuconv.conv1d`; only `.shape` and `.dtype` of the arrays are read.

        Raises:
            ValueError: a shape or a value is out of range.
            TypeError: a setting is of the wrong kind, or a dtype is not supported.
        """
        op: Op = "conv1d"
        x = Arrays.check(op, input, weight, bias)
        s, sides, d, g, _ = Settings.check(op, op, stride, padding, dilation, groups)
        C_out, C_in_g, K = weight.shape
        check_groups(op, g, x.C_in, C_out)
        if C_in_g * g != x.C_in:
            raise ValueError(
                f"{op}: input has C_in = {x.C_in} channels, but weight {tuple(weight.shape)} with groups = {g} expects "
                f"C_in = {C_in_g}*{g} = {C_in_g * g}{channels_hint(x, weight, C_in_g * g, weight.shape[2] * g)}"
            )
        check_bias_length(op, bias, C_out)
        span = d * (K - 1) + 1
        if sides == "same":
            L_out = -(-x.L_in // s)
            left, right = _halves(max(0, (L_out - 1) * s + span - x.L_in))
        elif sides == "causal":
            left, right = span - 1, 0
        else:
            left, right = sides
        return cls(
            op, x.N, x.C_in, C_out, x.L_in, K, s, left, right, d, g, 0, x.dtype, bias is not None, x.batched,
            check_precision(op, precision, x.dtype), check_out_dtype(op, x.dtype, out_dtype, bias),
            padding_mode=check_padding_mode(op, op, padding_mode),
        )  # fmt: skip

    @classmethod
    def conv_transpose1d(
        cls,
        input: ArrayLike,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        stride: Setting = 1,
        padding: Padding = 0,
        output_padding: Setting = 0,
        groups: SupportsIndex = 1,
        dilation: Setting = 1,
        output_size: Setting | None = None,
        precision: str = "float32",
        out_dtype: Any = None,
    ) -> ConvProblem:
        """Validate the arguments of `gpuconv.conv_transpose1d`; only `.shape` and `.dtype` of the arrays are read.

        Raises:
            ValueError: a shape or a value is out of range.
            TypeError: a setting is of the wrong kind, or a dtype is not supported.
        """
        op: Op = "conv_transpose1d"
        x = Arrays.check(op, input, weight, bias)
        s, sides, d, g, given = Settings.check(op, op, stride, padding, dilation, groups, output_padding)
        weight_C_in, C_out_g, K = weight.shape
        C_out = C_out_g * g
        check_groups(op, g, x.C_in, C_out)
        if weight_C_in != x.C_in:
            raise ValueError(
                f"{op}: input has C_in = {x.C_in} channels, but weight {tuple(weight.shape)} expects "
                f"C_in = {weight_C_in}{channels_hint(x, weight, weight_C_in)}"
            )
        check_bias_length(op, bias, C_out)
        span = d * (K - 1) + 1
        if isinstance(sides, str):
            # "same", so L_out = L_in*stride: where the kernel is shorter than the stride there is nothing to trim, and
            # output_padding fills the deficit instead.
            extra = max(0, s - span)
            left, right = _halves(max(0, span - s))
        else:
            extra = given
            left, right = sides
        if output_size is not None:
            wanted = check_setting(op, "output_size", output_size)
            if given:
                raise ValueError(
                    f"{op}: give output_padding or output_size, not both; got output_padding = {given} and "
                    f"output_size = {wanted}"
                )
            shortest = (x.L_in - 1) * s - left - right + span  # without output_padding
            longest = shortest + max(s, d) - 1
            smallest, largest = (x.L_in * s, x.L_in * s) if sides == "same" else (max(1, shortest), longest)
            if not smallest <= wanted <= largest:
                valid = f"from {smallest} to {largest}" if smallest <= largest else "(nothing is possible)"
                raise ValueError(
                    f"{op}: output_size must be {valid} for L_in = {x.L_in}, K = {K}, stride = {s}, dilation = {d} and "
                    f"padding = ({left}, {right}), got {wanted}"
                )
            extra = wanted - shortest
        return cls(
            op, x.N, x.C_in, C_out, x.L_in, K, s, left, right, d, g, extra, x.dtype, bias is not None, x.batched,
            check_precision(op, precision, x.dtype), check_out_dtype(op, x.dtype, out_dtype, bias),
        )  # fmt: skip

    @property
    def kind(self) -> Kind:
        return self.op

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"input": (self.N, self.C_in, self.L_in), "weight": self.weight_shape}
        if self.has_bias:
            shapes["bias"] = (self.C_out,)
        shapes[self.result] = (self.N, self.C_out, self.L_out)
        return shapes

    def dtype_of(self, name: str) -> str:
        return self.out_dtype or self.dtype if name in ("bias", self.result) else self.dtype

    @property
    def is_empty(self) -> bool:
        """Whether the output has no elements."""
        return self.N == 0 or self.C_out == 0

    @property
    def transposed(self) -> bool:
        return self.op == "conv_transpose1d"

    @property
    def C_in_g(self) -> int:
        """Input channels of one group."""
        return self.C_in // self.groups

    @property
    def C_out_g(self) -> int:
        """Output channels of one group."""
        return self.C_out // self.groups

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.N, self.C_in, self.L_in) if self.batched else (self.C_in, self.L_in)

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        if self.transposed:
            return (self.C_in, self.C_out_g, self.K)
        return (self.C_out, self.C_in_g, self.K)

    @property
    def bias_shape(self) -> tuple[int] | None:
        return (self.C_out,) if self.has_bias else None

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.N, self.C_out, self.L_out) if self.batched else (self.C_out, self.L_out)

    @property
    def padding(self) -> tuple[int, int]:
        return (self.padding_left, self.padding_right)

    @property
    def terms(self) -> int:
        if self.transposed:
            # The taps k of one output position satisfy k*dilation = l_out + padding_left (mod stride), so they are
            # stride/gcd(stride, dilation) apart.
            step = self.stride // math.gcd(self.stride, self.dilation)
            taps = -(-self.K // step)
            if self.padding_mode != "zeros":
                taps = min(self.most_positions * taps, self.K * self.L_in)
            return self.C_in_g * taps
        return self.C_in_g * self.K

    @property
    def most_positions(self) -> int:
        """How many positions an output element of conv_transpose1d stands for, at most."""
        return most_positions(self.padding_mode, self.padding_left, self.padding_right, self.L_out)

    @property
    def edge_windows(self) -> tuple[int, int]:
        """How many of the first and of the last outputs of conv1d have windows that reach over an edge of the input."""
        return edge_windows(self.L_out, self.L_in, self.K, self.stride, self.padding_left, self.dilation)

    def adjoint(self) -> ConvProblem:
        """The other operation with the same weight array, without bias, from the output's shape to the input's.

        It turns the gradient of the output into that of the input: ``<A x, u> == <x, A' u>``, where the weight of A' is
        conjugated if it is complex. Inputs that no window contains lie behind all of its windows and are zeros.

        Its right padding is negative, a cut of the gradient, where `output_padding` exceeds `padding_right`.

        Raises:
            ValueError: L_in is 0, so there is nothing to compute.
        """
        p = self
        span = p.dilation * (p.K - 1) + 1
        rest = 0 if p.transposed else (p.L_in + p.padding_left + p.padding_right - span) % p.stride
        return ConvProblem(
            "conv1d" if p.transposed else "conv_transpose1d", p.N, p.C_out, p.C_in, p.L_out, p.K, p.stride,
            p.padding_left, p.padding_right - p.output_padding, p.dilation, p.groups, rest, p.dtype, False, p.batched,
            p.precision, padding_mode=p.padding_mode,
        )  # fmt: skip

    def flops(self) -> int:
        rows = self.C_in * self.L_in * self.C_out_g if self.transposed else self.C_out * self.L_out * self.C_in_g
        return (8 if self.is_complex else 2) * self.N * rows * self.K

    def __str__(self) -> str:
        parts = [
            f"{self.op} N{self.N} C{self.C_in}->{self.C_out} L{self.L_in}->{self.L_out} K{self.K}",
            f"s{self.stride} p{self.padding_left},{self.padding_right} d{self.dilation} g{self.groups}",
        ]
        if self.output_padding:
            parts.append(f"op{self.output_padding}")
        parts.append(self.dtype)
        if self.has_bias:
            parts.append("bias")
        if self.precision != "float32":
            parts.append(self.precision)
        if self.padding_mode != "zeros":
            parts.append(self.padding_mode)
        if self.out_dtype is not None:
            parts.append(f"to {self.out_dtype}")
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class WeightGradientProblem(Problem):
    """The gradient of a convolution's weight, one correlation for both operations.

    Make it with `WeightGradientProblem.of` from a validated problem. It relates two arrays: `coarse`, whose positions
    step by `stride` through those of the other, `fine`::

        grad_weight[r, c, k] = sum over n, l of coarse[n, r, l] * fine[n, g*C_fine_g + c, l_fine]
        l_fine = l*stride - padding_left + k*dilation        (terms without such a position do not exist)
        g      = r // C_coarse_g

    - coarse ``(N, C_coarse, L_coarse)``: the output's gradient of conv1d (C_coarse = C_out, L_coarse = L_out), the
      input of conv_transpose1d (C_coarse = C_in, L_coarse = L_in);
    - fine ``(N, C_fine, L_fine)``: the input of conv1d (C_fine = C_in, L_fine = L_in), the output's gradient of
      conv_transpose1d (C_fine = C_out, L_fine = L_out);
    - result ``(C_coarse, C_fine/groups, K)``, the shape of the weight in both.

    Of complex data the input is conjugated, whichever of the two it is: the gradient is that of PyTorch, the direction
    of steepest ascent, and the adjoint of the operation as a map of its weight.

    The right padding does not appear: L_coarse and L_fine say which positions exist. In a `padding_mode` other than
    "zeros" all of them do: those outside of fine mean other samples of it.
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

    @classmethod
    def of(cls, problem: ConvProblem) -> WeightGradientProblem:
        """The weight gradient of a forward problem. A single sample is a batch of one; the bias is ignored."""
        p = problem
        sides = (p.C_in, p.C_out, p.L_in, p.L_out) if p.transposed else (p.C_out, p.C_in, p.L_out, p.L_in)
        return cls(
            p.op, p.N, *sides, p.K, p.stride, p.padding_left, p.dilation, p.groups, p.dtype, p.precision,
            padding_mode=p.padding_mode,
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
        """How many of the first and of the last positions of coarse meet windows that reach over an edge of fine."""
        return edge_windows(self.L_coarse, self.L_fine, self.K, self.stride, self.padding_left, self.dilation)

    def flops(self) -> int:
        return (8 if self.is_complex else 2) * self.N * self.L_coarse * math.prod(self.weight_shape)

    def __str__(self) -> str:
        return (
            f"{self.op} weight gradient N{self.N} C{self.C_coarse},{self.C_fine} L{self.L_coarse},{self.L_fine} "
            f"K{self.K} s{self.stride} p{self.padding_left} d{self.dilation} g{self.groups} {self.dtype}"
            + (f" {self.precision}" if self.precision != "float32" else "")
            + (f" {self.padding_mode}" if self.padding_mode != "zeros" else "")
        )


@dataclass(frozen=True, slots=True)
class BiasGradientProblem(Problem):
    """The gradient of a bias, the same for both operations.

    ::

        grad_bias[c] = sum over n, l of grad_output[n, c, l]

    grad_output is ``(N, C, L)``, the result ``(C,)``. Nothing is conjugated.
    """

    result: ClassVar[str] = "grad_bias"

    N: int
    C: int
    L: int
    dtype: str = "float32"

    @classmethod
    def of(cls, problem: ConvProblem) -> BiasGradientProblem:
        """The bias gradient of a forward problem."""
        return cls(problem.N, problem.C_out, problem.L_out, problem.dtype)

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
        return f"bias gradient N{self.N} C{self.C} L{self.L} {self.dtype}"


def gradient_problem(
    caller: str,
    op: Op,
    input: ArrayLike,
    weight: ArrayLike,
    grad_output: ArrayLike,
    settings: Sequence[Any],
) -> ConvProblem:
    """The forward problem that a gradient belongs to, once it and `grad_output` are known to fit.

    Args:
        caller: opens the messages.
        op: the forward operation.
        input: an array, or a specification where its gradient is wanted.
        weight: likewise.
        grad_output: the gradient of the output.
        settings: those of `ConvProblem.conv1d` or `ConvProblem.conv_transpose1d`, in order.

    Raises:
        ValueError: a shape or a value is out of range.
        TypeError: a setting is of the wrong kind, or a dtype is not supported.
    """
    for name, array in (("input", input), ("weight", weight)):
        if not isinstance(array, ArraySpec):  # whose dtype was taken from the other
            check_dtype(caller, name, array)
    try:
        problem = ConvProblem.of(op, input, weight, None, *settings)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{caller}{str(error).removeprefix(op)}") from None
    found = check_dtype(caller, "grad_output", grad_output)
    if found != problem.dtype:
        other = "weight" if isinstance(input, ArraySpec) else "input"
        raise TypeError(
            f"{caller}: {other} and grad_output must share one dtype, got {other} {problem.dtype}, grad_output {found}"
        )
    if tuple(grad_output.shape) != problem.output_shape:
        raise ValueError(
            f"{caller}: grad_output must have the output's shape {problem.output_shape}, got {tuple(grad_output.shape)}"
        )
    return problem


def bias_gradient_problem(caller: str, grad_output: ArrayLike) -> BiasGradientProblem:
    """The problem of a bias gradient; `caller` opens the messages.

    Raises:
        ValueError: grad_output has another number of axes than 2 or 3.
        TypeError: its dtype is not supported.
    """
    check_rank(caller, "grad_output", grad_output.shape, "(N, C_out, L_out) or (C_out, L_out)", (2, 3))
    dtype = check_dtype(caller, "grad_output", grad_output)
    N, C, L = grad_output.shape if len(grad_output.shape) == 3 else (1, *grad_output.shape)
    return BiasGradientProblem(N, C, L, dtype)


def _halves(total: int) -> tuple[int, int]:
    """Split a total padding over both sides; the odd one goes to the right."""
    return total // 2, total - total // 2
