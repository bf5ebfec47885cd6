"""Chooses the kernel family of a problem, and explains the choice."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .device import Device
from .families import FAMILIES, Config, Launch, Layout
from .problem import ConvProblem


@dataclass(frozen=True, slots=True)
class Choice:
    """What a GPU call runs.

    Attributes:
        family: the name of the kernel family.
        config: its specialisation.
        launch: its grid, block, shared memory and parameters.
        refusals: (family, reason) of every preferred family that refused.
    """

    family: str
    config: Config
    launch: Launch
    refusals: tuple[tuple[str, str], ...]


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
            return Choice(family.name, config, launch, tuple(refusals))
        refusals.append((family.name, reason))
    raise AssertionError(f"every family refused {problem}: {refusals}")
