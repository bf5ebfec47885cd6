"""The passes of a layer: forward, and the gradients of its input and of its weight."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeAlias

import gpuconv
from gpuconv import cases, grad
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


def array_shapes(problem: ConvProblem, direction: Direction) -> tuple[tuple[int, ...], ...]:
    """The shapes of a pass's arrays: input, weight and, where there is one, bias or grad_output."""
    third = problem.bias_shape if direction == "forward" else problem.output_shape
    return (problem.input_shape, problem.weight_shape, *((third,) if third else ()))


def result_shape(problem: ConvProblem, direction: Direction) -> tuple[int, ...]:
    return {"forward": problem.output_shape, "grad_input": problem.input_shape, "grad_weight": problem.weight_shape}[
        direction
    ]


def our_function(problem: ConvProblem, direction: Direction, precision: str) -> Callable[..., Any]:
    """The function of gpuconv for a pass, of (input, weight, bias or grad_output) and `out`."""
    settings = cases.call_settings(problem) | {"precision": precision}
    if direction == "forward":
        forward = gpuconv.conv_transpose1d if problem.transposed else gpuconv.conv1d
        return partial(forward, **settings)
    if direction == "grad_input":
        of_input = grad.conv_transpose1d_input if problem.transposed else grad.conv1d_input
        return lambda x, w, dy, out=None: of_input(x.shape, w, dy, **settings, out=out)
    of_weight = grad.conv_transpose1d_weight if problem.transposed else grad.conv1d_weight
    return lambda x, w, dy, out=None: of_weight(x, w.shape, dy, **settings, out=out)


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
