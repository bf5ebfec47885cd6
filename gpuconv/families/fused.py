"""Adds what a problem fuses to the plan of any family: macros, arrays and parameters of the steps that store results.

A family plans the convolution alone. This module adds what its kernels fuse (cuda_src/finish.cuh). If they cannot
activate the input as they load it, a step before them writes the activated input to a buffer (contract:
cuda_src/activate.cu). Both give the same bits, since both round to the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..fusion import ACTIVATION_ARRAYS, INPUT_ACTIVATION_ARRAYS, RESIDUAL, Activation
from ..problem import ConvProblem, Problem
from .base import (
    ACTIVATED,
    MAX_GRID,
    ArrayLayout,
    Config,
    Family,
    Launch,
    Layout,
    Plan,
    Refusal,
    Step,
    base_config,
    contiguous_strides,
    params_of,
)
from .offsets import Overhang, index_bits

BLOCK_SIZE = 256


def plan(
    family: Family[Any], problem: Problem, layout: Layout, plan_without: Callable[[Layout], Plan | Refusal]
) -> Plan | Refusal:
    """The family's plan of a problem with what the problem fuses, or why it does not take it.

    `plan_without` gives the plan that fuses nothing, for arrays of a layout.
    """
    if not isinstance(problem, ConvProblem) or not problem.fusion:
        return plan_without(layout)
    p, activation, shape = problem, problem.fuses.input_activation, problem.shapes["input"]
    if activation is None or family.activates_input or 0 in shape:
        found = plan_without(layout)
        if isinstance(found, Refusal):
            return found
        loaded = activation if family.activates_input else None
        return Plan(tuple(finishing(s, p, layout, loaded) for s in found.steps), found.scratch, found.candidates)
    found = plan_without(layout.replaced(input=ArrayLayout(contiguous_strides(shape))))
    if isinstance(found, Refusal):
        return found
    steps = [finishing(_reading_activated(step), p, layout, None) for step in found.steps]
    first = next(place for place, step in enumerate(steps) if ACTIVATED in step.arrays)
    steps.insert(first, _activate(p, layout, activation))
    scratch = (*found.scratch, (ACTIVATED, math.prod(shape) * p.itemsize))
    return Plan(tuple(steps), scratch, found.candidates)


def finishing(step: Step, p: ConvProblem, layout: Layout, input_activation: Activation | None) -> Step:
    """The step with what it fuses, if it stores results; steps that pack weights or store partial sums unchanged."""
    if "output" not in step.arrays or dict(step.config.macros).get("SEGMENT_MODE") == "2":
        return step
    macros: dict[str, str] = {}
    arrays: list[str | None] = []
    if p.fuses.has_residual:
        macros["HAS_RESIDUAL"] = "1"
        arrays.append(RESIDUAL)
    fields: dict[str, int] = {}
    for prefix, activation, names in (
        ("ACTIVATION", p.fuses.activation, ACTIVATION_ARRAYS),
        ("INPUT_ACTIVATION", input_activation, INPUT_ACTIVATION_ARRAYS),
    ):
        if activation is not None:
            more, of_channels = _activation(prefix, activation, names, layout, fields)
            macros |= more
            arrays += of_channels
    return extended(step, macros, arrays, fields)


def _activation(
    prefix: str, activation: Activation, names: tuple[str, str], layout: Layout, fields: dict[str, int]
) -> tuple[dict[str, str], tuple[str | None, ...]]:
    """The macros and arrays of an activation; the strides of the arrays are added to `fields`."""
    if not activation.arrays:
        return {prefix: activation.name, f"{prefix}_PARAMETER": repr(activation.parameter)}, ()
    for name in names:
        fields[f"{name}_stride"] = layout[name].strides[0] if name in layout else 0
    return {prefix: activation.name}, tuple(name if name in layout else None for name in names)


def extended(step: Step, macros: dict[str, str], arrays: Sequence[str | None], fields: dict[str, int]) -> Step:
    """The step with more macros, and with more arrays and fields of Params after its own."""
    launch = step.launch
    params = (*launch.params, *fields.items())
    return Step(
        extended_config(step.config, macros, len(fields)),
        Launch(launch.grid, launch.block, launch.shared_bytes, launch.index_bits, params),
        (*step.arrays, *arrays),
    )


def extended_config(config: Config, macros: dict[str, str], num_fields: int) -> Config:
    """The specialisation with more macros, and with more fields of Params."""
    own = dict(config.macros)
    own["PARAMS_BYTES"] = str(int(own["PARAMS_BYTES"]) + num_fields * int(own["INDEX_BITS"]) // 8)
    return Config.of(config.kernel, {**own, **macros})


def _reading_activated(step: Step) -> Step:
    arrays = tuple(ACTIVATED if name == "input" else name for name in step.arrays)
    return Step(step.config, step.launch, arrays)


def _activate(p: ConvProblem, layout: Layout, activation: Activation) -> Step:
    """The step that writes the activated input."""
    num_elements = p.N * p.C_in * p.L_in
    grid = min(-(-num_elements // BLOCK_SIZE), MAX_GRID)
    bits = index_bits(p, layout, Overhang(arrays=()), num_elements + grid * BLOCK_SIZE)
    strides = zip(("n", "c", "l"), layout["input"].strides, strict=True)
    params = params_of(
        "activate",
        {},
        {
            "num_elements": num_elements,
            "C_in": p.C_in,
            "L_in": p.L_in,
            **{f"input_stride_{axis}": stride for axis, stride in strides},
        },
    )
    step = Step(
        base_config("activate", p.dtype, bits, BLOCK_SIZE),
        Launch(grid, BLOCK_SIZE, 0, bits, params),
        ("input", ACTIVATED),
    )
    fields: dict[str, int] = {}
    macros, arrays = _activation("INPUT_ACTIVATION", activation, INPUT_ACTIVATION_ARRAYS, layout, fields)
    return extended(step, macros, arrays, fields)
