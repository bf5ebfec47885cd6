"""The values that pass from a kernel family to the runtime: Layout in, Config and Launch out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from ..device import Device
from ..problem import BiasGradientProblem, ConvProblem, Op, WeightGradientProblem
from ..source import params_fields

GradientT = TypeVar("GradientT", WeightGradientProblem, BiasGradientProblem)

INT32_MAX = 2**31 - 1
MAX_GRID = 2**31 - 1  # blocks along grid x, on every architecture since sm_30


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """Where the elements of an array lie.

    Attributes:
        strides: in elements, one per axis.
        alignment: the largest power of two, at most 16, that divides the address of element 0, in bytes.
    """

    strides: tuple[int, ...]
    alignment: int = 16

    @classmethod
    def of(cls, shape: tuple[int, ...], strides: tuple[int, ...], address: int, itemsize: int) -> ArrayLayout | None:
        """The layout of an array given its strides and address in bytes.

        Axes of extent 1 or 0 get their contiguous stride, since no offset ever uses it. None where elements do not lie
        at multiples of their size, which kernels cannot read: such an array must be copied.
        """
        if address % itemsize or any(stride % itemsize for stride in strides):
            return None
        natural = contiguous_strides(shape)
        elements = tuple(
            stride // itemsize if extent > 1 else default
            for extent, stride, default in zip(shape, strides, natural, strict=True)
        )
        return cls(elements, min(address & -address, 16) if address else 16)

    def reach(self, shape: tuple[int, ...]) -> int:
        """The largest absolute element offset that indexing within `shape` forms."""
        return sum((extent - 1) * abs(stride) for extent, stride in zip(shape, self.strides, strict=True) if extent > 0)


@dataclass(frozen=True, slots=True)
class Layout:
    """The layouts of a call's arrays. input and output always have three axes; bias is None when there is none."""

    input: ArrayLayout
    weight: ArrayLayout
    bias: ArrayLayout | None
    output: ArrayLayout

    @classmethod
    def contiguous(cls, problem: ConvProblem) -> Layout:
        """C-contiguous arrays that start at 16-byte boundaries, as fresh allocations do."""
        p = problem
        return cls(
            input=ArrayLayout(contiguous_strides((p.N, p.C_in, p.L_in))),
            weight=ArrayLayout(contiguous_strides(p.weight_shape)),
            bias=ArrayLayout((1,)) if p.has_bias else None,
            output=ArrayLayout(contiguous_strides((p.N, p.C_out, p.L_out))),
        )


@dataclass(frozen=True, slots=True)
class GradientLayout:
    """The layouts of the arrays of a gradient: coarse and fine, or grad_output, and the result. All axes are there."""

    inputs: tuple[ArrayLayout, ...]
    result: ArrayLayout

    @classmethod
    def contiguous(cls, problem: WeightGradientProblem | BiasGradientProblem) -> GradientLayout:
        """C-contiguous arrays that start at 16-byte boundaries, as fresh allocations do."""
        inputs, result = gradient_shapes(problem)
        return cls(
            tuple(ArrayLayout(contiguous_strides(shape)) for shape in inputs), ArrayLayout(contiguous_strides(result))
        )


@dataclass(frozen=True, slots=True)
class Config:
    """One specialisation of a kernel: everything that its source text depends on."""

    kernel: str
    macros: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, kernel: str, macros: Mapping[str, str | int]) -> Config:
        return cls(kernel, tuple((name, str(value)) for name, value in macros.items()))


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        grid: blocks along x; y and z are 1.
        block: threads of a block.
        shared_bytes: dynamic shared memory of a block.
        index_bits: 32 or 64, the width of every field of Params.
        params: the fields of Params, by name, in the order in which the .cu file declares them.
    """

    grid: int
    block: int
    shared_bytes: int
    index_bits: int
    params: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Pack:
    """A kernel that runs before a family's own and lays out the weights anew, in a buffer that takes their place.

    Its arguments are the weights, the buffer and Params.
    """

    config: Config
    launch: Launch
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SecondPass:
    """A kernel that runs after a family's own and makes the output of the partial sums that it left in a buffer.

    Both take the buffer behind their other arrays.
    """

    config: Config
    launch: Launch
    num_bytes: int


class Family(ABC):
    """A kernel family: one `.cu` file and the pure functions that decide when and how it runs.

    Families know neither CuPy nor each other.
    """

    name: ClassVar[str]
    """The one word for the file, the kernel function, the family and the test id: ``<op>_<algorithm>``."""

    op: ClassVar[Op]

    canonical_order: ClassVar[bool] = True
    """Whether it sums as the base families do, c_in outer and k inner: the families that do agree in every bit."""

    @abstractmethod
    def refuse(self, problem: ConvProblem, layout: Layout, device: Device) -> str | None:
        """Why this family does not take the problem ("needs C_in/groups >= 16"), or None if it does.

        `problem.op` is the family's own and no array of the problem is empty.
        """

    @abstractmethod
    def configure(self, problem: ConvProblem, layout: Layout, device: Device) -> tuple[Config, Launch]:
        """The kernel's specialisation and launch for a problem that the family does not refuse."""

    def pack(self, problem: ConvProblem, layout: Layout, device: Device) -> Pack | None:
        """How the weights are packed for `configure`'s kernel, or None where it reads them as they are."""
        return None

    def second_pass(self, problem: ConvProblem, layout: Layout, device: Device) -> SecondPass | None:
        """The kernel that finishes what `configure`'s began, or None where that writes the output."""
        return None

    def figures(self, problem: ConvProblem, layout: Layout, device: Device) -> tuple[tuple[str, float], ...]:
        """(configuration, predicted cycles) of those that `configure` compared, the chosen one first."""
        return ()

    @abstractmethod
    def configs(self, device: Device) -> Iterator[Config]:
        """Every specialisation that `configure` and `pack` can return on a device: what the compile tests build."""


class GradientFamily(ABC, Generic[GradientT]):
    """A kernel family for the gradient of weights or of a bias, like `Family`.

    Its kernels sum the slices of `gpuconv.families.slices`. Their arguments are the inputs, the partial sums (null
    where there is one slice), the result (null where there are several) and Params.
    """

    name: ClassVar[str]
    op: ClassVar[str]
    """The gradient that it computes: "weight_gradient" or "bias_gradient"."""

    on_tensor_cores: ClassVar[bool] = False
    """Whether tensor cores form its sums: then slices are longer, and the bits differ from those of other families."""

    @abstractmethod
    def refuse(self, problem: GradientT, layout: GradientLayout, device: Device) -> str | None:
        """Why this family does not take the problem, or None if it does. No array of the problem is empty."""

    @abstractmethod
    def configure(self, problem: GradientT, layout: GradientLayout, device: Device) -> tuple[Config, Launch]:
        """The kernel's specialisation and launch for a problem that the family does not refuse."""

    def figures(self, problem: GradientT, layout: GradientLayout, device: Device) -> tuple[tuple[str, float], ...]:
        """(configuration, predicted cycles) of those that `configure` compared, the chosen one first."""
        return ()

    @abstractmethod
    def configs(self, device: Device) -> Iterator[Config]:
        """Every specialisation that `configure` can return on a device."""


def gradient_shapes(
    problem: WeightGradientProblem | BiasGradientProblem,
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """The shapes of the inputs and of the result."""
    if isinstance(problem, WeightGradientProblem):
        return (problem.coarse_shape, problem.fine_shape), problem.weight_shape
    return (problem.grad_output_shape,), problem.bias_shape


def round_up(value: int, multiple: int, rest: int = 0) -> int:
    """The smallest integer from `value` on that leaves `rest` when divided by `multiple`."""
    return value + (rest - value) % multiple


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a C-contiguous array."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def index_bits(problem: ConvProblem, layout: Layout, *extra: int) -> int:
    """32 where every index and offset of a launch fits a signed 32-bit integer, else 64.

    `extra` are further values that a kernel forms, such as the padded size of its grid.
    """
    p = problem
    span = p.dilation * (p.K - 1) + 1
    placed = (layout.input, layout.weight, layout.output, *([layout.bias] if layout.bias else []))
    largest = max(
        layout.input.reach((p.N, p.C_in, p.L_in)),
        layout.weight.reach(p.weight_shape),
        layout.bias.reach((p.C_out,)) if layout.bias else 0,
        layout.output.reach((p.N, p.C_out, p.L_out)),
        # Positions before they are clipped to the array, on the fine side of the stride.
        p.L_in + p.padding_left + p.padding_right + span + p.stride,
        p.L_out + p.padding_left + p.padding_right + span + p.stride,
        # Params holds the strides of axes of extent 1, too, which no offset uses.
        *(abs(stride) for array in placed for stride in array.strides),
        *extra,
    )
    return 32 if largest <= INT32_MAX else 64


def gradient_index_bits(
    problem: WeightGradientProblem | BiasGradientProblem, layout: GradientLayout, *extra: int
) -> int:
    """32 where every index and offset of a launch fits a signed 32-bit integer, else 64; see `index_bits`."""
    inputs, result = gradient_shapes(problem)
    reach = [array.reach(shape) for array, shape in zip(layout.inputs, inputs, strict=True)]
    strides = [abs(stride) for array in (*layout.inputs, layout.result) for stride in array.strides]
    largest = max(*reach, layout.result.reach(result), *strides, *extra)
    return 32 if largest <= INT32_MAX else 64


def stride_params(layout: Layout, weight_axes: tuple[str, str]) -> dict[str, int]:
    """The stride fields of Params; `weight_axes` names the first two axes of weight ("out", "in" or the reverse)."""
    fields = dict(zip(("input_stride_n", "input_stride_c", "input_stride_l"), layout.input.strides, strict=True))
    names = (*(f"weight_stride_{axis}" for axis in weight_axes), "weight_stride_k")
    fields.update(zip(names, layout.weight.strides, strict=True))
    fields["bias_stride"] = layout.bias.strides[0] if layout.bias else 0
    fields.update(zip(("output_stride_n", "output_stride_c", "output_stride_l"), layout.output.strides, strict=True))
    return fields


def weight_source_params(problem: ConvProblem, layout: Layout) -> dict[str, int]:
    """The fields of Params by which weight_source.cuh finds a weight, from K on, in order."""
    p = problem
    gcd = math.gcd(p.stride, p.dilation)
    tap_step = p.stride // gcd
    strides = stride_params(layout, ("in", "out") if p.transposed else ("out", "in"))
    return {
        "K": p.K,
        "C_in_g": p.C_in_g,
        "C_out_g": p.C_out_g,
        "stride": p.stride,
        "phase_gcd": gcd,
        "tap_step": tap_step,
        "phase_inverse": pow(p.dilation // gcd, -1, tap_step),
        **{name: strides[name] for name in ("weight_stride_out", "weight_stride_in", "weight_stride_k")},
    }


def base_config(kernel: str, dtype: str, bits: int, block_size: int) -> Config:
    """The specialisation of a one-thread-per-output kernel."""
    fields = len(params_fields(kernel))
    return Config.of(
        kernel,
        {"DTYPE": dtype, "INDEX_BITS": bits, "BLOCK_SIZE": block_size, "PARAMS_BYTES": fields * bits // 8},
    )
