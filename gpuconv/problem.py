"""The convolution problem: one validated, hashable value that every layer of gpuconv works on, and its gradients'.

All argument checking of shapes, dtypes and settings lives here, so NumPy and CuPy arrays are accepted and refused
alike. The two length formulas exist once, in `ConvProblem.__post_init__`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, SupportsIndex, TypeAlias, TypeVar, cast

import numpy as np

from .text import install_hint

Op: TypeAlias = Literal["conv1d", "conv_transpose1d"]
Setting: TypeAlias = SupportsIndex | Sequence[SupportsIndex]
Padding: TypeAlias = Setting | str
T = TypeVar("T")

DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16}
PADDING_MODES = ("zeros",)
PRECISIONS = ("float32", "tf32")

# The largest extent and the largest number of bytes of one array: offsets are signed 64-bit integers.
MAX_EXTENT = 2**63 - 1

# The largest stride and dilation: kernels multiply two of them in 64 bits.
MAX_STEP = 2**31 - 1

_LAYOUTS = {
    "conv1d": {
        "input": "(N, C_in, L_in) or (C_in, L_in)",
        "weight": "(C_out, C_in/groups, K)",
        "bias": "(C_out,)",
    },
    "conv_transpose1d": {
        "input": "(N, C_in, L_in) or (C_in, L_in)",
        "weight": "(C_in, C_out/groups, K)",
        "bias": "(C_out,)",
    },
}


class ArrayLike(Protocol):
    """What validation reads of an array: its shape and its dtype."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


class ArraySpec(NamedTuple):
    """The shape and dtype of an array that need not exist (for `explain`, tests and benchmarks)."""

    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True, slots=True)
class ConvProblem:
    """A 1-D convolution or transposed convolution with every setting resolved.

    Build it with `ConvProblem.conv1d` or `ConvProblem.conv_transpose1d`, which validate; the constructor takes
    resolved values. Extents are counts of elements:

    - input ``(N, C_in, L_in)``, output ``(N, C_out, L_out)``, bias ``(C_out,)``;
    - weight ``(C_out, C_in/groups, K)`` for conv1d, ``(C_in, C_out/groups, K)`` for conv_transpose1d;
    - conv1d: ``l_in = l_out*stride - padding_left + k*dilation``;
    - conv_transpose1d: ``l_out = l_in*stride - padding_left + k*dilation``.

    Raises:
        ValueError: an output length below 1, or an array whose size does not fit 64-bit offsets.
    """

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
        for name, shape in (("input", self.input_shape), ("weight", self.weight_shape), ("output", self.output_shape)):
            check_size(self.op, name, shape, self.dtype)

    # -- construction from arrays ------------------------------------------------------------------------------------

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
    ) -> ConvProblem:
        """Validate the arguments of `gpuconv.conv1d`; only `.shape` and `.dtype` of the arrays are read.

        Raises:
            ValueError: a shape or a value is out of range.
            TypeError: a setting is of the wrong kind, or a dtype is not supported.
        """
        op: Op = "conv1d"
        x = _Arrays.check(op, input, weight, bias)
        s, sides, d, g, _ = Settings.check(op, op, stride, padding, dilation, groups)
        C_out, C_in_g, K = weight.shape
        check_groups(op, g, x.C_in, C_out)
        if C_in_g * g != x.C_in:
            raise ValueError(
                f"{op}: input has C_in = {x.C_in} channels, but weight {tuple(weight.shape)} with groups = {g} expects "
                f"C_in = {C_in_g}*{g} = {C_in_g * g}{_channels_last_hint(x, C_in_g * g, weight.shape[2] * g)}"
            )
        _check_bias_length(op, bias, C_out)
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
            check_precision(op, precision, x.dtype),
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
    ) -> ConvProblem:
        """Validate the arguments of `gpuconv.conv_transpose1d`; only `.shape` and `.dtype` of the arrays are read.

        Raises:
            ValueError: a shape or a value is out of range.
            TypeError: a setting is of the wrong kind, or a dtype is not supported.
        """
        op: Op = "conv_transpose1d"
        x = _Arrays.check(op, input, weight, bias)
        s, sides, d, g, given = Settings.check(op, op, stride, padding, dilation, groups, output_padding)
        weight_C_in, C_out_g, K = weight.shape
        C_out = C_out_g * g
        check_groups(op, g, x.C_in, C_out)
        if weight_C_in != x.C_in:
            raise ValueError(
                f"{op}: input has C_in = {x.C_in} channels, but weight {tuple(weight.shape)} expects "
                f"C_in = {weight_C_in}{_channels_last_hint(x, weight_C_in)}"
            )
        _check_bias_length(op, bias, C_out)
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
            check_precision(op, precision, x.dtype),
        )  # fmt: skip

    # -- derived values ----------------------------------------------------------------------------------------------

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
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEMSIZE[self.dtype]

    @property
    def is_complex(self) -> bool:
        return self.dtype.startswith("complex")

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
        """The most products that one output element sums: the ``n`` of the error bound."""
        if self.transposed:
            # The taps k of one output position satisfy k*dilation = l_out + padding_left (mod stride), so they are
            # stride/gcd(stride, dilation) apart.
            step = self.stride // math.gcd(self.stride, self.dilation)
            return self.C_in_g * -(-self.K // step)
        return self.C_in_g * self.K

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
            p.precision,
        )  # fmt: skip

    def flops(self) -> int:
        """Floating-point operations, a multiply-add counted as two (as eight for complex data), padding included."""
        rows = self.C_in * self.L_in * self.C_out_g if self.transposed else self.C_out * self.L_out * self.C_in_g
        return (8 if self.is_complex else 2) * self.N * rows * self.K

    def bytes(self) -> int:
        """The fewest bytes that must move: input, weight and bias read once, the output written once."""
        elements = self.N * self.C_in * self.L_in + math.prod(self.weight_shape) + self.N * self.C_out * self.L_out
        return (elements + (self.C_out if self.has_bias else 0)) * self.itemsize

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
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class WeightGradientProblem:
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

    The right padding has no part in it: L_coarse and L_fine say which positions exist.
    """

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

    @classmethod
    def of(cls, problem: ConvProblem) -> WeightGradientProblem:
        """That of a forward problem. A single sample is a batch of one; the bias has no part in it."""
        p = problem
        sides = (p.C_in, p.C_out, p.L_in, p.L_out) if p.transposed else (p.C_out, p.C_in, p.L_out, p.L_in)
        return cls(p.op, p.N, *sides, p.K, p.stride, p.padding_left, p.dilation, p.groups, p.dtype, p.precision)

    def sides(self, input: T, grad_output: T) -> tuple[T, T]:
        """The two arrays as (coarse, fine)."""
        return (input, grad_output) if self.transposed else (grad_output, input)

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
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEMSIZE[self.dtype]

    @property
    def is_complex(self) -> bool:
        return self.dtype.startswith("complex")

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
        """The most products that one element of the result sums: the ``n`` of the error bound."""
        return self.N * min(self.L_coarse, -(-self.L_fine // self.stride))

    def flops(self) -> int:
        """Floating-point operations, a multiply-add counted as two (as eight for complex data), padding included."""
        return (8 if self.is_complex else 2) * self.N * self.L_coarse * math.prod(self.weight_shape)

    def bytes(self) -> int:
        """The fewest bytes that must move: coarse and fine read once, the result written once."""
        return sum(map(math.prod, (self.coarse_shape, self.fine_shape, self.weight_shape))) * self.itemsize

    def __str__(self) -> str:
        return (
            f"{self.op} weight gradient N{self.N} C{self.C_coarse},{self.C_fine} L{self.L_coarse},{self.L_fine} "
            f"K{self.K} s{self.stride} p{self.padding_left} d{self.dilation} g{self.groups} {self.dtype}"
            + (f" {self.precision}" if self.precision != "float32" else "")
        )


@dataclass(frozen=True, slots=True)
class BiasGradientProblem:
    """The gradient of a bias, the same for both operations.

    ::

        grad_bias[c] = sum over n, l of grad_output[n, c, l]

    grad_output is ``(N, C, L)``, the result ``(C,)``. Nothing is conjugated.
    """

    N: int
    C: int
    L: int
    dtype: str = "float32"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEMSIZE[self.dtype]

    @property
    def is_complex(self) -> bool:
        return self.dtype.startswith("complex")

    @property
    def grad_output_shape(self) -> tuple[int, int, int]:
        return (self.N, self.C, self.L)

    @property
    def bias_shape(self) -> tuple[int]:
        """The shape of the result."""
        return (self.C,)

    @property
    def terms(self) -> int:
        """The terms that one element of the result sums: the ``n`` of the error bound."""
        return self.N * self.L

    def flops(self) -> int:
        """Floating-point additions, those of complex data counted as two."""
        return (2 if self.is_complex else 1) * math.prod(self.grad_output_shape)

    def bytes(self) -> int:
        """The fewest bytes that must move: grad_output read once, the result written once."""
        return (math.prod(self.grad_output_shape) + self.C) * self.itemsize

    def __str__(self) -> str:
        return f"bias gradient N{self.N} C{self.C} L{self.L} {self.dtype}"


class Settings(NamedTuple):
    """The settings of a layer, checked as far as that needs no array.

    Attributes:
        padding: (left, right), or "same" or "causal", which depend on the extents.
    """

    stride: int
    padding: tuple[int, int] | Literal["same", "causal"]
    dilation: int
    groups: int
    output_padding: int

    @classmethod
    def check(
        cls,
        caller: str,
        op: Op,
        stride: Setting,
        padding: Padding,
        dilation: Setting,
        groups: SupportsIndex,
        output_padding: Setting = 0,
    ) -> Settings:
        """Validate settings; `caller` opens the messages.

        Raises:
            ValueError: a value is out of range.
            TypeError: a value is of the wrong kind.
        """
        s = check_setting(caller, "stride", stride, 1, MAX_STEP)
        d = check_setting(caller, "dilation", dilation, 1, MAX_STEP)
        g = check_int(caller, "groups", groups, "an int", 1)
        p = _padding(caller, padding, ("valid", "same", "causal") if op == "conv1d" else ("valid", "same"))
        extra = check_setting(caller, "output_padding", output_padding, 0)
        if extra >= max(s, d):
            raise ValueError(f"{caller}: output_padding must be below max(stride, dilation) = {max(s, d)}, got {extra}")
        if extra and p == "same":
            raise ValueError(f'{caller}: padding "same" chooses output_padding itself; expected 0, got {extra}')
        return cls(s, p, d, g, extra)


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
            _check_dtype(caller, name, array)
    construct = ConvProblem.conv_transpose1d if op == "conv_transpose1d" else ConvProblem.conv1d
    try:
        problem = construct(input, weight, None, *settings)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{caller}{str(error).removeprefix(op)}") from None
    found = _check_dtype(caller, "grad_output", grad_output)
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
    _check_rank(caller, "grad_output", grad_output.shape, "(N, C_out, L_out) or (C_out, L_out)", (2, 3))
    dtype = _check_dtype(caller, "grad_output", grad_output)
    N, C, L = grad_output.shape if len(grad_output.shape) == 3 else (1, *grad_output.shape)
    return BiasGradientProblem(N, C, L, dtype)


def check_shape(caller: str, op: Op, name: str, shape: Sequence[SupportsIndex]) -> tuple[int, ...]:
    """The argument input_size or weight_size as a tuple of ints.

    Raises:
        ValueError: it has another number of extents, or one is negative.
        TypeError: it is not a sequence of integers.
    """
    layout = _LAYOUTS[op][name.removesuffix("_size")]
    if not isinstance(shape, list | tuple):
        raise TypeError(f"{caller}: {name} must be the extents {layout}, got {type(shape).__name__} {shape!r}")
    _check_rank(caller, name, shape, layout, (2, 3) if name == "input_size" else (3,))
    return tuple(check_int(caller, name, extent, f"the extents {layout}", 0) for extent in shape)


def check_groups(caller: str, groups: int, C_in: int, C_out: int) -> None:
    """Refuse groups that do not divide both channel counts.

    Raises:
        ValueError: naming the channels that are not divided.
    """
    if C_in % groups:
        raise ValueError(f"{caller}: groups must divide the input channels, got groups = {groups} and C_in = {C_in}")
    if C_out % groups:
        raise ValueError(f"{caller}: groups must divide the output channels, got groups = {groups} and C_out = {C_out}")


def check_size(caller: str, name: str, shape: Sequence[int], dtype: str) -> None:
    """Refuse an array that 64-bit offsets cannot address, before anybody tries to allocate it.

    Raises:
        ValueError: naming the array and the bytes it needs.
    """
    if not all(isinstance(extent, int) for extent in shape):
        return  # symbols
    # A zero extent hides nothing: the strides of the other axes must be representable too.
    size = math.prod([max(extent, 1) for extent in shape]) * ITEMSIZE[dtype]  # a list, which torch.compile reads
    if size > MAX_EXTENT:
        raise ValueError(
            f"{caller}: {name} of shape {tuple(shape)} and dtype {dtype} needs {size} bytes, more than 64-bit offsets "
            f"reach ({MAX_EXTENT})"
        )


def check_padding_mode(op: str, padding_mode: str) -> None:
    """Refuse the values of padding_mode that are reserved but not supported yet.

    Raises:
        ValueError: naming what is supported today.
    """
    if padding_mode not in PADDING_MODES:
        raise ValueError(
            f"{op}: padding_mode must be {_listing(PADDING_MODES)} (the only one supported today), got {padding_mode!r}"
        )


def check_precision(op: str, precision: str, dtype: str) -> str:
    """The precision, once it is known to be one and to fit the dtype.

    Raises:
        ValueError: it is not one of `PRECISIONS`, or asks to round what is no float32 to TF32.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"{op}: precision must be one of {_listing(PRECISIONS)}, got {precision!r}")
    if precision == "tf32" and dtype != "float32":
        raise ValueError(f'{op}: precision "tf32" rounds float32 data; expected "float32" for {dtype}, got "tf32"')
    return precision


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


# -- the pieces of validation ----------------------------------------------------------------------------------------


class _Arrays(NamedTuple):
    """What the checks of ranks and dtypes yield."""

    N: int
    C_in: int
    L_in: int
    dtype: str
    batched: bool

    @classmethod
    def check(cls, op: Op, input: ArrayLike, weight: ArrayLike, bias: ArrayLike | None) -> _Arrays:
        for name, array, ranks in (("input", input, (2, 3)), ("weight", weight, (3,)), ("bias", bias, (1,))):
            if array is None:
                if name == "bias":
                    continue
                raise TypeError(f"{op}: {name} must be an array of shape {_LAYOUTS[op][name]}, got None")
            _check_rank(op, name, array.shape, _LAYOUTS[op][name], ranks)
        names = {}
        for name, array in (("input", input), ("weight", weight), ("bias", bias)):
            if array is None:
                continue
            names[name] = _check_dtype(op, name, array)
        if len(set(names.values())) > 1:
            got = ", ".join(f"{name} {dtype}" for name, dtype in names.items())
            raise TypeError(f"{op}: {_listing(tuple(names), quote=False)} must share one dtype, got {got}")
        if weight.shape[2] < 1:
            raise ValueError(f"{op}: weight must have at least one tap (K >= 1), got shape {tuple(weight.shape)}")
        batched = len(input.shape) == 3
        N, C_in, L_in = input.shape if batched else (1, *input.shape)
        return cls(N, C_in, L_in, names["input"], batched)


def _check_rank(caller: str, name: str, shape: Sequence[Any], layout: str, ranks: tuple[int, ...]) -> None:
    if len(shape) not in ranks:
        hints = {
            "input": "; one channel of samples becomes input.reshape(1, -1)",
            "weight": "; the taps of a single channel become weight.reshape(1, 1, -1)",
        }
        raise ValueError(
            f"{caller}: {name} must have shape {layout}, got {len(shape)} dimension"
            f"{'' if len(shape) == 1 else 's'}: {tuple(shape)}{hints.get(name, '') if len(shape) == 1 else ''}"
        )


def _channels_last_hint(x: _Arrays, expected: int, last_of_weight: int | None = None) -> str:
    """How to swap axes where the channels of the input, or of conv1d's weight, seem to come last."""
    if x.L_in == expected:
        return "; the channels of input seem to come last: pass input.swapaxes(-1, -2)"
    if last_of_weight == x.C_in:
        return "; the input channels of weight seem to come last: pass weight.swapaxes(-1, -2)"
    return ""


def _check_dtype(caller: str, name: str, array: ArrayLike) -> str:
    found = dtype_name(array.dtype)
    if found is None:
        raise TypeError(f"{caller}: {name} must have one of the dtypes {_listing(DTYPES)}, got {array.dtype}")
    return found


def check_int(
    caller: str, name: str, value: object, expected: str, at_least: int | None = None, at_most: int | None = None
) -> int:
    """An integer argument (an int or a NumPy integer, never a bool) as an int, within its limits.

    Raises:
        ValueError: it is out of range.
        TypeError: it is not an integer.
    """
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{caller}: {name} must be {expected}, got the bool {value}")
    try:
        result = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{caller}: {name} must be {expected}, got {type(value).__name__} {value!r}") from None
    if at_least is not None and result < at_least:
        raise ValueError(f"{caller}: {name} must be at least {at_least}, got {result}")
    if at_most is not None and result > at_most:
        raise ValueError(f"{caller}: {name} must be at most {at_most}, got {result}")
    return result


def check_setting(
    caller: str, name: str, value: Setting, at_least: int | None = None, at_most: int | None = None
) -> int:
    """A setting along the only axis (an integer, or a list or tuple of one) as an int, within its limits.

    Raises:
        ValueError: it is out of range, or a sequence of another length.
        TypeError: it is not an integer.
    """
    expected = "an int or a sequence of one int"
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise ValueError(f"{caller}: {name} must be {expected}, got {len(value)} values: {value!r}")
        value = value[0]
    return check_int(caller, name, value, expected, at_least, at_most)


def _padding(caller: str, value: Padding, words: tuple[str, ...]) -> tuple[int, int] | Literal["same", "causal"]:
    """Resolve a padding argument, of which `words` are the allowed strings, as far as that needs no extents."""
    expected = f"an int, a pair (left, right) or one of {_listing(words)}"
    if isinstance(value, str):
        if value not in words:
            full = "dilation*(K - 1) on both sides" if "causal" in words else "padding 0 of the transposed convolution"
            hint = f'; SciPy\'s mode "full" is {full}' if value == "full" else ""
            raise ValueError(f"{caller}: padding must be {expected}, got {value!r}{hint}")
        return (0, 0) if value == "valid" else cast(Literal["same", "causal"], str(value))
    values: Sequence[object] = value if isinstance(value, list | tuple) else (value,)
    if len(values) not in (1, 2):
        raise ValueError(f"{caller}: padding must be {expected}, got {len(values)} values: {value!r}")
    sides = [check_int(caller, "padding", v, expected) for v in values]
    if min(sides) < 0:
        raise ValueError(f"{caller}: padding must be at least 0, got {value!r}")
    return sides[0], sides[-1]


def _check_bias_length(op: str, bias: ArrayLike | None, C_out: int) -> None:
    if bias is not None and bias.shape[0] != C_out:
        raise ValueError(f"{op}: bias must have shape (C_out,) = ({C_out},), got {tuple(bias.shape)}")


def _halves(total: int) -> tuple[int, int]:
    """Split a total padding over both sides; the odd one goes to the right."""
    return total // 2, total - total // 2


def _listing(names: Sequence[str], *, quote: bool = True) -> str:
    words = [f'"{name}"' if quote else name for name in names]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
