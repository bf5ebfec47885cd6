"""Chooses the kernel family of a problem from the problem, the layout of its arrays and the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from .device import Device
from .families import (
    FAMILIES,
    GRADIENT_FAMILIES,
    ArrayLayout,
    Config,
    Family,
    GradientLayout,
    Launch,
    Layout,
    Pack,
    SecondPass,
)
from .families.base import gradient_shapes
from .families.slices import Slices, sum_launch
from .problem import BiasGradientProblem, ConvProblem, Op, WeightGradientProblem

GradientProblem: TypeAlias = WeightGradientProblem | BiasGradientProblem


class Place(NamedTuple):
    """Where an array lies in memory: its strides, and the address of its first element, in bytes."""

    strides: tuple[int, ...]
    address: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What a GPU call runs.

    Attributes:
        family: the name of the kernel family.
        config: its specialisation.
        launch: its grid, block, shared memory and parameters.
        refusals: (family, reason) of every preferred family that refused.
        pack: the kernel that runs before it and lays out the weights, where the family wants another layout.
        figures: (configuration, predicted cycles) of those that the family's cost model compared, the chosen one first.
        second_pass: the kernel that runs after it and makes the output, where it leaves partial sums.
    """

    family: str
    config: Config
    launch: Launch
    refusals: tuple[tuple[str, str], ...]
    pack: Pack | None = None
    figures: tuple[tuple[str, float], ...] = ()
    second_pass: SecondPass | None = None

    @property
    def kernels(self) -> tuple[tuple[Config, Launch], ...]:
        """The specialisations that the call runs, with their launches; the family's own first."""
        others = (other for other in (self.pack, self.second_pass) if other is not None)
        return ((self.config, self.launch), *((other.config, other.launch) for other in others))


@dataclass(frozen=True, slots=True)
class GradientChoice:
    """What a GPU call for the gradient of weights or of a bias runs.

    Attributes:
        family: the name of the kernel family.
        config: its specialisation.
        launch: its grid, block, shared memory and parameters.
        refusals: (family, reason) of every preferred family that refused.
        slices: how the sum over samples and positions is cut.
        sum: the kernel that adds the slices and its launch; None where there is one slice.
        partial_bytes: the buffer of the slices' sums; 0 where there is one slice.
        figures: (configuration, predicted cycles) of those that the family's cost model compared, the chosen one first.
    """

    family: str
    config: Config
    launch: Launch
    refusals: tuple[tuple[str, str], ...]
    slices: Slices
    sum: tuple[Config, Launch] | None
    partial_bytes: int
    figures: tuple[tuple[str, float], ...] = ()

    @property
    def kernels(self) -> tuple[tuple[Config, Launch], ...]:
        """The specialisations that the call runs, with their launches; the family's own first."""
        return ((self.config, self.launch), *(() if self.sum is None else (self.sum,)))


def lay_out(problem: ConvProblem, places: Mapping[str, Place | None]) -> tuple[Layout, tuple[str, ...]]:
    """The layout that kernels see, and the names of the arrays that must be copied because kernels cannot read them.

    Args:
        problem: the problem that the arrays belong to.
        places: by "input", "weight", "bias" and "output"; None or no entry for an array that is freshly allocated.
    """
    p = problem
    fresh = Layout.contiguous(p)
    copies: list[str] = []

    def place(name: str, default: ArrayLayout, shape: tuple[int, ...]) -> ArrayLayout:
        found = _array_layout(places.get(name), default, shape, p.itemsize)
        if found is None:
            copies.append(name)
        return found or default

    layout = Layout(
        input=place("input", fresh.input, (p.N, p.C_in, p.L_in)),
        weight=place("weight", fresh.weight, p.weight_shape),
        bias=None if fresh.bias is None else place("bias", fresh.bias, (p.C_out,)),
        output=place("output", fresh.output, (p.N, p.C_out, p.L_out)),
    )
    return layout, tuple(copies)


def _array_layout(
    given: Place | None, default: ArrayLayout, shape: tuple[int, ...], itemsize: int
) -> ArrayLayout | None:
    """The layout of an array; None where kernels cannot read it."""
    if given is None:
        return default
    strides = given.strides if len(given.strides) == len(shape) else (0, *given.strides)  # (C, L) is (1, C, L)
    return ArrayLayout.of(shape, strides, given.address, itemsize)


def lay_out_gradient(
    problem: GradientProblem, inputs: Sequence[Place | None], result: Place | None
) -> tuple[GradientLayout, tuple[int, ...]]:
    """`lay_out` for a gradient: of coarse and fine or of grad_output, and of the result.

    Returns:
        The layout, and the places, in the order of `inputs` and then `result`, of those that must be copied.
    """
    fresh = GradientLayout.contiguous(problem)
    input_shapes, result_shape = gradient_shapes(problem)
    found = [
        _array_layout(place, default, shape, problem.itemsize)
        for place, default, shape in zip(
            (*inputs, result), (*fresh.inputs, fresh.result), (*input_shapes, result_shape), strict=True
        )
    ]
    usable = [layout or default for layout, default in zip(found, (*fresh.inputs, fresh.result), strict=True)]
    copies = tuple(i for i, layout in enumerate(found) if layout is None)
    return GradientLayout(tuple(usable[:-1]), usable[-1]), copies


class AlgorithmError(ValueError):
    """There is no algorithm of this name, or it does not take the problem."""


def algorithms(op: Op) -> tuple[str, ...]:
    """What the argument algorithm of an operation can name: "base", and its kernel families by preference."""
    return ("base", *(family.name for family in FAMILIES if family.op == op))


def check_algorithm(caller: str, op: Op, algorithm: str | None) -> None:
    """Refuse what names no algorithm of the operation; `caller` opens the message.

    Raises:
        AlgorithmError: there is no algorithm of that name.
        TypeError: it is neither None nor a str.
    """
    expected = f"None or one of {', '.join(algorithms(op))}"
    if algorithm is not None and not isinstance(algorithm, str):
        raise TypeError(f"{caller}: algorithm must be {expected}, got {type(algorithm).__name__} {algorithm!r}")
    if algorithm is not None and algorithm not in algorithms(op):
        raise AlgorithmError(f"{caller}: algorithm must be {expected}, got {algorithm!r}")


def choose_family(problem: ConvProblem, layout: Layout, device: Device, name: str) -> Choice:
    """What the named family would run, or with "base" the last one, which refuses nothing.

    Raises:
        AlgorithmError: there is no such family for the operation, or it refuses the problem.
    """
    check_algorithm(problem.op, problem.op, name)
    own = [family for family in FAMILIES if family.op == problem.op]
    (family,) = own[-1:] if name == "base" else (family for family in own if family.name == name)
    reason = family.refuse(problem, layout, device)
    if reason is not None:
        raise AlgorithmError(f"{problem.op}: algorithm {name!r} does not take {problem}: {reason}")
    return _place(family, problem, layout, device, ())


def _place(
    family: Family, problem: ConvProblem, layout: Layout, device: Device, refusals: tuple[tuple[str, str], ...]
) -> Choice:
    config, launch = family.configure(problem, layout, device)
    return Choice(
        family.name,
        config,
        launch,
        refusals,
        pack=family.pack(problem, layout, device),
        figures=family.figures(problem, layout, device),
        second_pass=family.second_pass(problem, layout, device),
    )


@lru_cache(maxsize=4096)
def choose(problem: ConvProblem, layout: Layout, device: Device, algorithm: str | None = None) -> Choice | None:
    """The family, specialisation and launch of a problem; None where the output is empty and nothing is launched.

    The choice is a pure function of its arguments and never depends on a timing. `algorithm` is None for the family
    that is preferred, "base" or the name of a family.

    Raises:
        AlgorithmError: that family refuses the problem.
    """
    if problem.N == 0 or problem.C_out == 0:
        return None
    if algorithm is not None:
        return choose_family(problem, layout, device, algorithm)
    refusals: list[tuple[str, str]] = []
    for family in FAMILIES:
        if family.op != problem.op:
            continue
        reason = family.refuse(problem, layout, device)
        if reason is None:
            return _place(family, problem, layout, device, tuple(refusals))
        refusals.append((family.name, reason))
    raise AssertionError(f"every family refused {problem}: {refusals}")


@lru_cache(maxsize=4096)
def choose_gradient(
    problem: GradientProblem, layout: GradientLayout, device: Device, algorithm: str | None = None
) -> GradientChoice:
    """The family, specialisation and launches of a gradient none of whose arrays is empty.

    The choice is a pure function of its arguments and never depends on a timing. The bits of the result depend on the
    problem and the architecture alone. `algorithm` names a family; None is for the one that is preferred.

    Raises:
        AlgorithmError: that family refuses the problem, or there is none of that name.
    """
    op = "weight_gradient" if isinstance(problem, WeightGradientProblem) else "bias_gradient"
    refusals: list[tuple[str, str]] = []
    for family in GRADIENT_FAMILIES:
        if family.op != op or algorithm not in (None, family.name):
            continue
        reason = family.refuse(problem, layout, device)
        if reason is None:
            config, launch = family.configure(problem, layout, device)
            figures = family.figures(problem, layout, device)
            slices = Slices.of(problem, on_tensor_cores=family.on_tensor_cores)
            total = sum_launch(problem, layout, slices) if slices.count > 1 else None
            partial_bytes = slices.partial_bytes(problem)
            return GradientChoice(family.name, config, launch, tuple(refusals), slices, total, partial_bytes, figures)
        refusals.append((family.name, reason))
    if algorithm is not None:
        told = "; ".join(reason for _, reason in refusals) or "there is no such family"
        raise AlgorithmError(f"algorithm {algorithm!r} does not take {problem}: {told}")
    raise AssertionError(f"every family refused {problem}: {refusals}")
