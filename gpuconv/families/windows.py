"""Pushes of streams in one launch: plans in which one kernel both moves and reads the window.

Contract: cuda_src/window.cuh. A push is a problem whose input is the samples that a stream holds, followed by the new
ones. The kernel that would compute it in one call computes it, so the bits are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..device import Device
from ..problem import ConvProblem
from .base import ArrayLayout, Config, Family, Layout, Plan, Refusal, contiguous_strides
from .fused import extended, extended_config
from .offsets import INT32_MAX, width

# The arrays of a push besides those of its problem.
NEW_SAMPLES, WINDOW_STARTS = "new_samples", "window_starts"

# What makes a kernel move the window, and the fields that it takes for that (WINDOW_FIELDS in cuda_src/window.cuh).
_MACROS = {"MOVES_WINDOW": "1"}
_FIELDS = ("num_samples", "window_channels", "window_held", "window_length", *(f"samples_stride_{a}" for a in "ncl"))

# Macros of kernels that never move a window: its rows are contiguous and begin at any sample, streams prepare their
# weights, and the last of the four only adds sums.
_NEVER = (("CHANNELS_LAST", "1"), ("INPUT_WIDTH", "2"), ("RAW_WEIGHT", "1"), ("SEGMENT_MODE", "3"))

# Each block writes all new samples. With more samples for each thread than this, a separate launch is faster.
MOST_SAMPLES = 8


def window_shape(problem: ConvProblem) -> tuple[int, int, int]:
    """The shape of a window that a kernel moves: its rows have twice as many places as it has samples."""
    return problem.N, problem.C_in, 2 * problem.L_in


def window_layout(problem: ConvProblem) -> ArrayLayout:
    """The layout of the input in such a window, where it may begin at any sample."""
    return ArrayLayout(contiguous_strides(window_shape(problem)), problem.itemsize)


def moving(plan: Plan, problem: ConvProblem, layout: Layout, length: int) -> Plan | Refusal:
    """The plan with a kernel that moves the window by `length` new samples before it reads it, or why there is none.

    `layout` is that of the plan, with `window_layout` for the input, and the layout of `NEW_SAMPLES`.
    """
    p = problem
    readers = [step for step in plan.steps if "input" in step.arrays]
    if len(readers) != 1 or readers[0].config.kernel == "activate":
        return Refusal("needs one kernel that reads the input and computes with it")
    (reader,) = readers
    num_samples = p.N * p.C_in * length
    if num_samples > MOST_SAMPLES * reader.launch.block:
        return Refusal(f"needs at most {MOST_SAMPLES} new samples for each thread of a block")
    if p.L_in > INT32_MAX:
        return Refusal("needs windows that begin at a place below 2**31")
    arrays = Layout.of(window=layout["input"], samples=layout[NEW_SAMPLES])
    formed = {"window": window_shape(p), "samples": (p.N, p.C_in, length)}
    # When a thread's loop ends, its index may be up to a block behind the last sample.
    if width(arrays, formed, num_samples + reader.launch.block) > reader.launch.index_bits:
        return Refusal("needs offsets below 2**31")
    values = (num_samples, p.C_in, p.L_in - length, length, *layout[NEW_SAMPLES].strides)
    fields = dict(zip(_FIELDS, values, strict=True))
    moved = extended(reader, _MACROS, (NEW_SAMPLES, WINDOW_STARTS), fields)
    return replace(plan, steps=tuple(moved if step is reader else step for step in plan.steps))


def configs(family: Family[Any], device: Device) -> Iterator[Config]:
    """Every specialisation of a family's kernel that moves a window, with nothing fused."""
    for config in family.configs(device):
        if config.kernel == family.name and not any(macro in config.macros for macro in _NEVER):
            yield extended_config(config, _MACROS, len(_FIELDS))


def blocks(plan: Plan) -> int:
    """How many blocks of a plan move a window; each has its own start."""
    return next(step.launch.grid for step in plan.steps if WINDOW_STARTS in step.arrays)
