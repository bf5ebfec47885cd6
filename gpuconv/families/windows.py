"""Pushes of streams in one launch: plans in which one kernel both moves and reads the window.

Contract: cuda_src/window.cuh. A push is a problem whose input is the samples that a stream holds, followed by the new
ones. The kernel that would compute it in one call computes it, so the bits are the same.
"""

from __future__ import annotations

from dataclasses import replace

from ..problem import ConvProblem
from .base import ArrayLayout, Layout, Plan, Refusal, contiguous_strides
from .fused import extended
from .offsets import INT32_MAX, width

# The arrays of a push besides those of its problem.
NEW_SAMPLES, WINDOW_STARTS = "new_samples", "window_starts"

# Each block writes all new samples. With more samples for each thread than this, a separate launch is faster.
MOST_SAMPLES = 8


def window_shape(problem: ConvProblem) -> tuple[int, int, int]:
    """The shape of a window that a kernel moves: its rows hold every sample twice."""
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
    fields = {
        "num_samples": num_samples,
        "window_channels": p.C_in,
        "window_held": p.L_in - length,
        "window_length": length,
        **{f"samples_stride_{axis}": s for axis, s in zip("ncl", layout[NEW_SAMPLES].strides, strict=True)},
    }
    moved = extended(reader, {"MOVES_WINDOW": "1"}, (NEW_SAMPLES, WINDOW_STARTS), fields)
    return replace(plan, steps=tuple(moved if step is reader else step for step in plan.steps))


def blocks(plan: Plan) -> int:
    """How many blocks of a plan move a window; each has its own start."""
    return next(step.launch.grid for step in plan.steps if WINDOW_STARTS in step.arrays)
