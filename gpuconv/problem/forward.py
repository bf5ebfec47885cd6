"""Convolution problems. The two length formulas exist once, in `gpuconv.extents`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, SupportsIndex

from ..arguments import (
    MAX_EXTENT,
    ArrayLike,
    Arrays,
    Op,
    Padding,
    Setting,
    Settings,
    channels_hint,
    check_bias_length,
    check_groups,
    check_out_dtype,
    check_padding_limits,
    check_padding_mode,
    check_precision,
    check_setting,
    check_size,
)
from ..edge import edge_windows, most_positions
from ..extents import output_length, resolve_padding
from ..fusion import ACTIVATION_ARRAYS, INPUT_ACTIVATION_ARRAYS, RESIDUAL, Fused, Fusion, check_arrays
from .base import Kind, Problem


@dataclass(frozen=True, slots=True)
class ConvProblem(Problem):
    """A 1-D convolution or transposed convolution with every setting resolved.

    Make it with `ConvProblem.conv1d` or `ConvProblem.conv_transpose1d`, which validate their arguments; the constructor
    takes resolved values. Extents are counts of elements:

    - input ``(N, C_in, L_in)``, output ``(N, C_out, L_out)``, bias ``(C_out,)``;
    - weight ``(C_out, C_in/groups, K)`` for conv1d, ``(C_in, C_out/groups, K)`` for conv_transpose1d;
    - conv1d: ``l_in = l_out*stride - padding_left + k*dilation``;
    - conv_transpose1d: ``l_out = l_in*stride - padding_left + k*dilation``.

    `padding_mode` says what positions outside of a row stand for (`gpuconv.edge`): of the input of conv1d, and of the
    output of conv_transpose1d. So a convolution reads samples in place of its padding; its adjoint, which is
    transposed, adds what falls into the padding to these samples. `gpuconv.fusion` describes `fusion`.

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
    fusion: Fusion | None = None  # None for nothing
    has_lengths: bool = False  # each sample has a length of its own, up to L_in
    L_out: int = field(init=False)

    def __post_init__(self) -> None:
        span = self.dilation * (self.K - 1) + 1  # the positions from the first tap to the last, both included
        if self.transposed:
            full = (self.L_in - 1) * self.stride + span + self.output_padding
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
            detail = "floor((L_in + padding_left + padding_right - dilation*(K - 1) - 1)/stride) + 1"
        L_out = output_length(self.transposed, self.L_in, *self.padding, self.stride, span, self.output_padding)
        if L_out < 1:
            raise ValueError(f"{self.op}: the output length must be at least 1, got {L_out} = {detail}")
        # Symbolic extents, with which PyTorch traces a program, are checked when they are replaced by numbers.
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
        """`conv1d` or `conv_transpose1d`, whichever `op` names, of these arguments."""
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
                f"C_in = {C_in_g}*{g} = {C_in_g * g}{channels_hint(op, x, weight, g)}"
            )
        check_bias_length(op, bias, C_out)
        span = d * (K - 1) + 1
        left, right, _ = resolve_padding(False, sides, x.L_in, s, span)
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
                f"C_in = {weight_C_in}{channels_hint(op, x, weight, g)}"
            )
        check_bias_length(op, bias, C_out)
        span = d * (K - 1) + 1
        left, right, extra = resolve_padding(True, sides, x.L_in, s, span, given)
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

    def fused(self, fused: Fused) -> ConvProblem:
        """The same problem with the fusion of a call, whose arrays are checked.

        Raises:
            ValueError: an array has the wrong shape.
            TypeError: an array has the wrong dtype, an activation is given for complex data, or anything for integers.
        """
        shapes = {**self._fused_shapes, RESIDUAL: self.output_shape}
        check_arrays(self.op, fused.fusion, fused.arrays, self.dtype, shapes)
        return replace(self, fusion=fused.fusion or None)

    @property
    def fuses(self) -> Fusion:
        """`fusion`, an empty one in place of None."""
        return self.fusion or Fusion()

    @property
    def _fused_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all arrays that may be fused, by name."""
        return {
            RESIDUAL: (self.N, self.C_out, self.L_out),
            **dict.fromkeys(ACTIVATION_ARRAYS, (self.C_out,)),
            **dict.fromkeys(INPUT_ACTIVATION_ARRAYS, (self.C_in,)),
        }

    @property
    def kind(self) -> Kind:
        return self.op

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"input": (self.N, self.C_in, self.L_in), "weight": self.weight_shape}
        if self.has_bias:
            shapes["bias"] = (self.C_out,)
        if self.fusion:
            possible = self._fused_shapes
            shapes.update((name, possible[name]) for name in self.fusion.arrays)
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
        """The most positions, with those in the padding, that are added to one output element of conv_transpose1d."""
        return most_positions(self.padding_mode, self.padding_left, self.padding_right, self.L_out)

    @property
    def edge_windows(self) -> tuple[int, int]:
        """How many of the first and of the last outputs of conv1d have windows that reach over an edge of the input."""
        return edge_windows(self.L_out, self.L_in, self.K, self.stride, self.padding_left, self.dilation)

    def adjoint(self) -> ConvProblem:
        """The other operation with the same weight array, without bias, from the output's shape to the input's.

        It maps the gradient of the output to that of the input: ``<A x, u> == <x, A' u>``, where the weight of A' is
        conjugated if it is complex. Inputs that no window contains are at the end of its result and are zeros.

        Its right padding is negative, which crops the gradient, if `output_padding` exceeds `padding_right`.

        Raises:
            ValueError: L_in is 0, so there is nothing to compute; or something is fused.
        """
        p = self
        p.refuse_fusion()
        span = p.dilation * (p.K - 1) + 1
        rest = 0 if p.transposed else (p.L_in + p.padding_left + p.padding_right - span) % p.stride
        return ConvProblem(
            "conv1d" if p.transposed else "conv_transpose1d", p.N, p.C_out, p.C_in, p.L_out, p.K, p.stride,
            p.padding_left, p.padding_right - p.output_padding, p.dilation, p.groups, rest, p.dtype, False, p.batched,
            p.precision, padding_mode=p.padding_mode, has_lengths=p.has_lengths,
        )  # fmt: skip

    def refuse_fusion(self) -> None:
        """Refuse to compute gradients if something is fused.

        Raises:
            ValueError: something is fused; the message names it.
        """
        if self.fusion:
            raise ValueError(
                f"{self.op}: there is no gradient of what is fused ({self.fusion}); compute those of the convolution "
                "without it and of the rest one after the other"
            )

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
        if self.fusion:
            parts.append(f"with {self.fusion}")
        if self.has_lengths:
            parts.append("lengths")
        return " ".join(parts)
