"""What dispatch, kernel families and the runtime exchange: a family gets a Layout and returns a Plan or a Refusal."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, TypeVar

from ..costs import Work
from ..device import Device
from ..problem import DTYPES, INTEGER_SUMS, INTEGERS, ConvProblem, Kind, Problem
from ..source import params_fields

ProblemT = TypeVar("ProblemT", bound=Problem)

MAX_GRID = 2**31 - 1  # blocks along grid x, on every architecture since sm_30


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """Where the elements of an array lie.

    Attributes:
        strides: in elements, one per axis.
        alignment: the largest power of two, at most 16, that divides the address of element 0, in bytes.
        offset: elements from the array's address to element 0; a weight gradient's alone may have one.
    """

    strides: tuple[int, ...]
    alignment: int = 16
    offset: int = 0

    @classmethod
    def of(cls, shape: tuple[int, ...], strides: tuple[int, ...], address: int, itemsize: int) -> ArrayLayout | None:
        """The layout of an array given its strides and address in bytes.

        Axes of extent 1 or 0 get their contiguous stride, since no offset uses it. None where elements are not at
        multiples of their size: kernels cannot read such an array, so it must be copied.
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
    """The layouts of a problem's arrays, by the names that the problem gives them.

    Attributes:
        arrays: (name, layout) of each.
        is_prepared: whether the caller keeps what a first step makes of the weight alone (`gpuconv.prepare`).
    """

    arrays: tuple[tuple[str, ArrayLayout], ...]
    is_prepared: bool = False

    def __getitem__(self, name: str) -> ArrayLayout:
        return next(layout for found, layout in self.arrays if found == name)

    def __contains__(self, name: str) -> bool:
        return any(found == name for found, _ in self.arrays)

    @classmethod
    def of(cls, **arrays: ArrayLayout) -> Layout:
        """The layouts of arrays given by name."""
        return cls(tuple(arrays.items()))

    def replaced(self, **arrays: ArrayLayout) -> Layout:
        """The same with other layouts for some of the arrays."""
        return replace(self, arrays=tuple((name, arrays.get(name, layout)) for name, layout in self.arrays))

    @classmethod
    def contiguous(cls, problem: Problem) -> Layout:
        """C-contiguous arrays that start at 16-byte boundaries, as fresh allocations do."""
        return cls(tuple((name, ArrayLayout(contiguous_strides(shape))) for name, shape in problem.shapes.items()))


@dataclass(frozen=True, slots=True)
class Config:
    """One specialisation of a kernel: everything that its source text depends on."""

    kernel: str
    macros: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, kernel: str, macros: Mapping[str, str | int]) -> Config:
        return cls(kernel, tuple((name, str(value)) for name, value in macros.items()))

    @classmethod
    def for_dtype(cls, kernel: str, dtype: str, bits: int, macros: Mapping[str, str | int]) -> Config:
        """The specialisation with these macros besides those that all kernels have."""
        fields = len(params_fields(kernel))
        return cls.of(kernel, {"DTYPE": dtype, "INDEX_BITS": bits, **macros, "PARAMS_BYTES": fields * bits // 8})


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
class Step:
    """One launch of a plan.

    Attributes:
        config: the specialisation of the kernel.
        launch: its grid, block, shared memory and parameters.
        arrays: the kernel's pointers in order, by the names of the problem's arrays and of the plan's scratch buffers;
            None is a null pointer. Params follows them.
    """

    config: Config
    launch: Launch
    arrays: tuple[str | None, ...]


# Names of scratch buffers: packed weights, partial sums that a later step adds, and the activated input.
PACKED, PARTIAL, ACTIVATED = "packed", "partial", "activated"
# The table of the lengths of samples, one for each call: see cuda_src/samples.cuh.
SAMPLES = "samples"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a family computes a problem: a sequence of launches.

    Attributes:
        steps: the launches in order.
        scratch: (name, bytes) of the buffers through which steps pass data to each other.
        candidates: (configuration, predicted microseconds) that the cost model compared, the chosen one first.
    """

    steps: tuple[Step, ...]
    scratch: tuple[tuple[str, int], ...] = ()
    candidates: tuple[tuple[str, float], ...] = ()

    def scratch_bytes(self, name: str) -> int:
        """The size of a scratch buffer; 0 where the plan has none of this name."""
        return dict(self.scratch).get(name, 0)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a family does not take a problem, such as "needs C_in/groups >= 16"."""

    reason: str


class Family(ABC, Generic[ProblemT]):
    """A kernel family: one `.cu` file and the pure functions that decide when and how it runs.

    Families know neither CuPy nor each other.
    """

    name: ClassVar[str]
    """The name of the .cu file, the kernel function, the family and the test id: ``<op>_<algorithm>``."""

    kind: ClassVar[Kind]
    """The kind of problem that it computes."""

    canonical_order: ClassVar[bool] = True
    """Whether it sums in the order of the base family of its kind; all families that do give the same bits."""

    activates_input: ClassVar[bool] = False
    """Whether its kernel can activate the input as it loads it (cuda_src/input.cuh)."""
    dtypes: ClassVar[tuple[str, ...]] = DTYPES
    """The dtypes of the data that it takes."""
    maps_edges: ClassVar[bool] = False
    """Whether its kernels read the samples that padding stands for, in every padding mode; see `families.edges`."""
    keeps_lengths: ClassVar[bool] = False
    """Whether its kernels ignore what follows the end of each sample; see `families.lengths`."""

    @abstractmethod
    def plan(self, problem: ProblemT, layout: Layout, device: Device) -> Plan | Refusal:
        """How the family computes a problem of its kind, or why it does not. `problem.is_empty` is False."""

    @abstractmethod
    def configs(self, device: Device) -> Iterator[Config]:
        """Every specialisation that a plan for a device can have: what the compile tests build.

        A family that maps edges has each of them in the other padding modes, too (`with_padding_mode`).
        """

    def staging(self, step: Step) -> dict[str, str]:
        """What one access loads or stores of each array that its kernel transposes in shared memory, in words."""
        return {}

    def work(self, problem: ProblemT, step: Step) -> Work:
        """The work of the family's own kernel in a plan. Its time is predicted from this and from its machine code.

        By default the work of tiles of BLOCK_M by BLOCK_N where the kernel has these macros, else the problem's
        multiply-adds.
        """
        macros = dict(step.config.macros)
        held = step.launch.grid * int(macros.get("BLOCK_M", 0)) * int(macros.get("BLOCK_N", 0))
        results = math.prod(problem.shapes[problem.result])
        return Work(problem.flops() / 2 * max(1.0, held / results), problem.bytes())


def round_up(value: int, multiple: int, rest: int = 0) -> int:
    """The smallest integer that is at least `value` and leaves `rest` when divided by `multiple`."""
    return value + (rest - value) % multiple


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a C-contiguous array."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def conv_fields(problem: ConvProblem, layout: Layout) -> dict[str, int]:
    """The values that the Params of an operation's kernels may have, by name."""
    p = problem
    gcd = math.gcd(p.stride, p.dilation)
    tap_step, position_step = p.stride // gcd, p.dilation // gcd
    fields = {
        "N": p.N,
        "C_out": p.C_out,
        "L_in": p.L_in,
        "L_out": p.L_out,
        "K": p.K,
        "C_in_g": p.C_in_g,
        "C_out_g": p.C_out_g,
        "stride": p.stride,
        "padding_left": p.padding_left,
        "dilation": p.dilation,
        # The taps of a phase of a transposed convolution are tap_step apart, and their inputs position_step.
        "phase_gcd": gcd,
        "tap_step": tap_step,
        "position_step": position_step,
        "phase_inverse": pow(position_step, -1, tap_step),
        "bias_stride": layout["bias"].strides[0] if "bias" in layout else 0,
    }
    axes = ("in", "out", "k") if p.transposed else ("out", "in", "k")
    for array, names in (("input", ("n", "c", "l")), ("weight", axes), ("output", ("n", "c", "l"))):
        fields.update(zip((f"{array}_stride_{name}" for name in names), layout[array].strides, strict=True))
    return fields


def params_of(kernel: str, fields: Mapping[str, int], own: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """The fields of a kernel's Params in the order of its .cu file, from common `fields` and the kernel's `own`."""
    names = params_fields(kernel)
    assert own.keys() <= set(names), f"{kernel}.cu has no {', '.join(own.keys() - set(names))}"
    return tuple((name, own[name] if name in own else fields[name]) for name in names)


def conv_arrays(problem: ConvProblem, weight: str = "weight") -> tuple[str | None, ...]:
    """The pointers of a kernel of an operation; `weight` is `PACKED` where it reads the weights in another order."""
    return ("input", weight, "bias" if problem.has_bias else None, "output")


def conv_plan(
    config: Config,
    problem: ConvProblem,
    layout: Layout,
    index_bits: int,
    *,
    grid: int,
    block: int,
    own: Mapping[str, int],
    shared_bytes: int = 0,
    candidates: tuple[tuple[str, float], ...] = (),
) -> Plan:
    """The plan of an operation that is one launch; `own` are the fields of Params that `conv_fields` lacks."""
    params = params_of(config.kernel, conv_fields(problem, layout), own)
    launch = Launch(grid, block, shared_bytes, index_bits, params)
    return Plan((Step(config, launch, conv_arrays(problem)),), candidates=candidates)


def base_config(kernel: str, dtype: str, bits: int, block_size: int) -> Config:
    """The specialisation of a one-thread-per-output kernel."""
    return Config.for_dtype(kernel, dtype, bits, {"BLOCK_SIZE": block_size})


def with_padding_mode(config: Config, padding_mode: str) -> Config:
    """The specialisation for a padding mode."""
    if padding_mode == "zeros":
        return config
    return Config(config.kernel, (*config.macros, ("PADDING_MODE", padding_mode)))


def with_lengths(config: Config) -> Config:
    """The specialisation for samples of different lengths."""
    return Config(config.kernel, (*config.macros, ("LENGTHS", "1")))


def reading_samples(step: Step) -> Step:
    """The step in which a kernel reads the table of the lengths of samples."""
    return Step(with_lengths(step.config), step.launch, (*step.arrays, SAMPLES))


SUM_DTYPES = (*DTYPES, *(f"{name}_to_{sums}" for name in INTEGERS for sums in INTEGER_SUMS))
"""What `sum_dtype` can be."""


def sum_dtype(problem: ConvProblem) -> str:
    """The macro DTYPE: the dtype; for integers followed by the dtype of their sums."""
    return problem.dtype if problem.out_dtype is None else f"{problem.dtype}_to_{problem.out_dtype}"


def base_work(problem: ConvProblem, taps: int) -> Work:
    """The work of a one-thread-per-output kernel that visits `taps` taps of each input channel.

    Through L2, 256 outputs of one row share a window of the input and a row of weights.
    """
    p = problem
    outputs = p.N * p.C_out * p.L_out
    window = 256 / p.stride if p.transposed else 256 * p.stride
    span = p.dilation * (p.K - 1) / (p.stride if p.transposed else 1)
    block_bytes = p.C_in_g * (min(window + span, 256.0 * p.K) + p.K) * p.itemsize
    return Work(p.flops() / 2, outputs / 256 * block_bytes + outputs * p.itemsize, taps=taps)
