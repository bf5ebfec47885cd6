"""The passes of a layer: forward, and the gradients of its input and of its weight."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Literal, TypeAlias

from gpuconv.problem import ConvProblem, WeightGradientProblem

Direction: TypeAlias = Literal["forward", "grad_input", "grad_weight"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "grad_input", "grad_weight")


def of_forward(problem: ConvProblem, direction: Direction) -> ConvProblem | WeightGradientProblem:
    """What a pass of a layer computes; the gradient of an input is the other operation."""
    if direction == "forward":
        return problem
    return problem.adjoint() if direction == "grad_input" else WeightGradientProblem.of(problem)


def without_bias(problem: ConvProblem, direction: Direction) -> ConvProblem:
    """The forward problem as far as a pass depends on it: gradients of input and weight know no bias."""
    return problem if direction == "forward" else replace(problem, has_bias=False)


def prediction_key(mode: str, direction: Direction) -> str:
    """Under which name the predictions of a mode and a pass are kept."""
    return mode if direction == "forward" else f"{mode} {direction}"


def directions_of(names: str, parser: argparse.ArgumentParser) -> tuple[Direction, ...]:
    """The passes that a comma-separated list names; "all" is every one.

    Exits through the parser where a name is unknown.
    """
    wanted = {name.strip() for name in names.split(",")}
    if wanted == {"all"}:
        return DIRECTIONS
    if unknown := wanted - set(DIRECTIONS):
        parser.error(f"unknown pass {', '.join(sorted(unknown))}; known: {', '.join(DIRECTIONS)}, all")
    return tuple(direction for direction in DIRECTIONS if direction in wanted)
