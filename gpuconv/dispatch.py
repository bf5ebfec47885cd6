"""Chooses the kernel family of a problem from the problem, the layout of its arrays and the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from .device import Device
from .families import FAMILIES, ArrayLayout, Config, Launch, Layout, Pack
from .problem import ConvProblem


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
    """

    family: str
    config: Config
    launch: Launch
    refusals: tuple[tuple[str, str], ...]
    pack: Pack | None = None
    figures: tuple[tuple[str, float], ...] = ()


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
        given = places.get(name)
        if given is None:
            return default
        strides = given.strides if len(given.strides) == len(shape) else (0, *given.strides)  # (C, L) is (1, C, L)
        found = ArrayLayout.of(shape, strides, given.address, p.itemsize)
        if found is None:
            copies.append(name)
            return default
        return found

    layout = Layout(
        input=place("input", fresh.input, (p.N, p.C_in, p.L_in)),
        weight=place("weight", fresh.weight, p.weight_shape),
        bias=None if fresh.bias is None else place("bias", fresh.bias, (p.C_out,)),
        output=place("output", fresh.output, (p.N, p.C_out, p.L_out)),
    )
    return layout, tuple(copies)


@lru_cache(maxsize=4096)
def choose(problem: ConvProblem, layout: Layout, device: Device) -> Choice | None:
    """The family, specialisation and launch of a problem; None where the output is empty and nothing is launched.

    The choice is a pure function of its arguments and never depends on a timing.
    """
    if problem.N == 0 or problem.C_out == 0:
        return None
    refusals: list[tuple[str, str]] = []
    for family in FAMILIES:
        if family.op != problem.op:
            continue
        reason = family.refuse(problem, layout, device)
        if reason is None:
            config, launch = family.configure(problem, layout, device)
            pack = family.pack(problem, layout, device)
            figures = family.figures(problem, layout, device)
            return Choice(family.name, config, launch, tuple(refusals), pack, figures)
        refusals.append((family.name, reason))
    raise AssertionError(f"every family refused {problem}: {refusals}")
