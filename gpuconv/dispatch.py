"""Chooses the kernel family of a problem from the problem, the layout of its arrays and the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from .device import Device
from .families import (
    FAMILIES,
    ArrayLayout,
    Config,
    Family,
    Launch,
    Layout,
    Plan,
    Refusal,
    Step,
    conv1d_depthwise_push,
    fused,
    lengths,
    windows,
)
from .families.base import contiguous_strides
from .fusion import RESIDUAL
from .problem import FORMATS, ConvProblem, Kind, Problem
from .text import shown

# Algorithms that are not kernel families: gpuconv.fft computes through the FFT, or for "auto" whichever costs less.
BY_FFT = ("fft", "auto")


class StridedPointer(NamedTuple):
    """Where an array lies in memory: its strides, and the address of its first element, in bytes."""

    strides: tuple[int, ...]
    address: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What a GPU call runs.

    Attributes:
        family: the name of the kernel family.
        plan: its launches and scratch buffers.
        refusals: (family, reason) of every preferred family that refused.
    """

    family: str
    plan: Plan
    refusals: tuple[tuple[str, str], ...] = ()

    @property
    def step(self) -> Step:
        """The launch of the family's own kernel, not of those that prepare for it or add up its sums."""
        return next(step for step in self.plan.steps if step.config.kernel == self.family)

    @property
    def config(self) -> Config:
        """The specialisation of the family's own kernel."""
        return self.step.config

    @property
    def staging(self) -> dict[str, str]:
        """What one access loads or stores of each array that the family's kernels transpose; see `Family.staging`."""
        (family,) = (family for family in FAMILIES if family.name == self.family)
        own = (family.staging(step) for step in self.plan.steps if step.config.kernel == self.family)
        return {array: words for found in own for array, words in found.items()}

    @property
    def launch(self) -> Launch:
        """The launch of the family's own kernel."""
        return self.step.launch


def lay_out(problem: Problem, pointers: Mapping[str, StridedPointer | None]) -> tuple[Layout, tuple[str, ...]]:
    """The layout that kernels see, and the names of the arrays that must be copied because kernels cannot read them.

    Args:
        problem: the problem to which the arrays belong.
        pointers: by the names of `problem.shapes`; None or no entry for an array that is newly allocated.
    """
    fresh, copies = Layout.contiguous(problem), []
    found: dict[str, ArrayLayout] = {}
    for name, shape in problem.shapes.items():
        pointer = pointers.get(name)
        if pointer is None:
            continue
        strides = pointer.strides
        if len(strides) < len(shape):  # (C, L) is (1, C, L)
            strides = (0, *strides)
        array = ArrayLayout.of(shape, strides, pointer.address, FORMATS[problem.dtype_of(name)].itemsize)
        if array is None:
            copies.append(name)
        else:
            found[name] = array
    layout = fresh.replaced(**found)
    if RESIDUAL in layout and layout[RESIDUAL].strides != layout["output"].strides:
        # Kernels read the residual at the offset of the result, so both must have the same strides: contiguous ones.
        strides = contiguous_strides(problem.shapes["output"])
        odd = [name for name in (RESIDUAL, "output") if layout[name].strides != strides]
        layout = layout.replaced(**{name: ArrayLayout(strides) for name in odd})
        copies += odd
    return layout, tuple(copies)


class AlgorithmError(ValueError):
    """There is no algorithm of this name, or it cannot compute the problem."""


def families(kind: Kind) -> tuple[Family[Any], ...]:
    """The families of a kind of problem, by preference; the last one is the base family, which refuses nothing."""
    return tuple(family for family in FAMILIES if family.kind == kind)


def algorithms(kind: Kind) -> tuple[str, ...]:
    """The values of the argument `algorithm`: "base", the kernel families by preference, and `BY_FFT`."""
    by_fft = () if kind == "bias_gradient" else BY_FFT
    return ("base", *(family.name for family in families(kind)), *by_fft)


def check_algorithm(caller: str, kind: Kind, algorithm: str | None) -> None:
    """Refuse a name that is no algorithm for a kind of problem; the message begins with `caller`.

    Raises:
        AlgorithmError: there is no algorithm of that name.
        TypeError: it is neither None nor a str.
    """
    expected = f"None or one of {', '.join(algorithms(kind))}"
    if algorithm is not None and not isinstance(algorithm, str):
        raise TypeError(f"{caller}: algorithm must be {expected}, got {type(algorithm).__name__} {shown(algorithm)}")
    if algorithm is not None and algorithm not in algorithms(kind):
        raise AlgorithmError(f"{caller}: algorithm must be {expected}, got {shown(algorithm)}")


def of_sums_over_lengths(caller: str, algorithm: str | None) -> str | None:
    """The algorithm of a weight gradient whose samples have different lengths: None in place of "auto".

    Raises:
        AlgorithmError: it is "fft".
    """
    if algorithm == "fft":
        raise AlgorithmError(f"{caller}: algorithm 'fft' takes no lengths; expected None, 'auto' or a kernel family")
    return None if algorithm == "auto" else algorithm


@lru_cache(maxsize=4096)
def choose(problem: Problem, layout: Layout, device: Device, algorithm: str | None = None) -> Choice | None:
    """The family that computes a problem, and its plan; None where the problem is empty and nothing is launched.

    The choice is a pure function of its arguments and never depends on a timing. `algorithm` is None or "auto" for the
    first family that does not refuse, "base" for the one that refuses nothing, or the name of a family.

    Raises:
        AlgorithmError: the named family refuses the problem, there is none of that name, or it is "fft".
    """
    if problem.is_empty:
        return None
    own = families(problem.kind)
    if algorithm == "fft":
        raise AlgorithmError(f"{problem.kind}: algorithm 'fft' is no kernel family")
    if algorithm not in (None, "auto"):
        check_algorithm(problem.kind, problem.kind, algorithm)
        (family,) = own[-1:] if algorithm == "base" else (family for family in own if family.name == algorithm)
        plan = plan_of(family, problem, layout, device)
        if isinstance(plan, Refusal):
            raise AlgorithmError(f"{problem.kind}: algorithm {algorithm!r} does not take {problem}: {plan.reason}")
        return Choice(family.name, plan)
    refusals: list[tuple[str, str]] = []
    for family in own:
        plan = plan_of(family, problem, layout, device)
        if not isinstance(plan, Refusal):
            return Choice(family.name, plan, tuple(refusals))
        refusals.append((family.name, plan.reason))
    raise AssertionError(f"every family refused {problem}: {refusals}")


def plan_of(family: Family[Any], problem: Problem, layout: Layout, device: Device) -> Plan | Refusal:
    """How a family computes a problem in its padding mode, with what is fused, or why it does not."""
    if problem.dtype not in family.dtypes:
        return Refusal(f"takes no {problem.dtype}")
    return fused.plan(family, problem, layout, lambda inner: lengths.plan(family, problem, inner, device))


@dataclass(frozen=True, slots=True)
class Push:
    """What a push of a stream runs, where the kernel that computes also stores the new samples.

    Attributes:
        choice: its plan has the arrays of `families.windows` besides those of the problem.
        blocks: the number of blocks that move the window.
        window: the shape of the array that the plan calls the input.
        channels_last: whether that shape is (N, places, C_in); else it is (N, C_in, places).
        period: samples after which the same place of the window is written again.
    """

    choice: Choice
    blocks: int
    window: tuple[int, int, int]
    channels_last: bool
    period: int


@lru_cache(maxsize=1024)
def choose_push(
    problem: ConvProblem,
    length: int,
    layout: Layout,
    new_samples: ArrayLayout,
    device: Device,
    algorithm: str | None = None,
) -> Push | Refusal:
    """How a stream convolves and stores `length` new samples that follow those it holds, with the bits of one call.

    Args:
        problem: the problem of the samples that it holds, followed by the new ones.
        length: the number of new samples.
        layout: that of the arrays of the problem; the input's has no effect.
        new_samples: the layout of the new samples, (N, C_in, length).
        device: the GPU.
        algorithm: that of `choose`.

    Raises:
        AlgorithmError: as `choose` raises it.
    """
    p = problem
    layout = layout.replaced(input=windows.window_layout(p))
    # Streams prepare their weights.
    layout = replace(layout, arrays=(*layout.arrays, (windows.NEW_SAMPLES, new_samples)), is_prepared=True)
    choice = choose(p, layout, device, algorithm)
    if choice is None:
        return Refusal("needs a result")
    if choice.family == "conv1d_depthwise":  # others of its layers run on tensor cores
        plan = conv1d_depthwise_push.plan(p, layout, length)
        if isinstance(plan, Plan):
            ring = conv1d_depthwise_push.ring_shape(p, length)
            return Push(Choice(choice.family, plan), windows.blocks(plan), ring, channels_last=True, period=ring[1])
    plan = windows.moving(choice.plan, p, layout, length)
    if isinstance(plan, Refusal):
        return plan
    shape = windows.window_shape(p)
    return Push(Choice(choice.family, plan), windows.blocks(plan), shape, channels_last=False, period=p.L_in)
