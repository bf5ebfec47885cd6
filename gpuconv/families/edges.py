"""Padding modes other than zeros in the plans of all families, and the two kernels for outputs at the edges.

Contracts: cuda_src/edge.cuh, cuda_src/conv1d_edges.cu, cuda_src/conv_transpose1d_fold.cu.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..device import Device
from ..edge import PADDING_MODES, padded_samples
from ..problem import DTYPES, BiasGradientProblem, ConvProblem, Problem, WeightGradientProblem
from .base import (
    MAX_GRID,
    Config,
    Family,
    Launch,
    Layout,
    Plan,
    Refusal,
    Step,
    base_config,
    conv_arrays,
    conv_fields,
    params_of,
    reading_samples,
    with_padding_mode,
)
from .offsets import Overhang, index_bits

BLOCK_SIZE, WARP = 256, 32


def plan(family: Family[Any], problem: Problem, layout: Layout, device: Device) -> Plan | Refusal:
    """How a family computes a problem of its kind in any padding mode, or why it does not.

    Families with `Family.maps_edges` read the samples that the padding stands for. Of the others, those on CUDA cores
    compute as with zeros, and a second step computes the outputs whose windows cross an edge, in the canonical order.
    All transposed families compute as with zeros, and a last step recomputes the outputs onto which the padding folds.
    """
    if isinstance(problem, BiasGradientProblem) or _mode(problem) == "zeros":
        return family.plan(problem, layout, device)
    assert isinstance(problem, ConvProblem | WeightGradientProblem)
    p, inside = problem, replace(problem, padding_mode="zeros")
    if isinstance(p, ConvProblem) and p.transposed:
        step = fold_step(p, layout)
    elif family.maps_edges:
        return family.plan(p if any(p.edge_windows) else inside, layout, device)
    elif not isinstance(p, ConvProblem) or not family.canonical_order:
        # A second step sums in another order, so outputs at the edges would have other bits than the rest.
        return Refusal('needs padding_mode "zeros"')
    else:
        edges = p.edge_windows
        if sum(edges) == p.L_out:
            return Refusal("needs a window that does not reach over an edge")
        step = _edges_step(p, layout, *edges) if any(edges) else None
    found = family.plan(inside, layout, device)
    return found if isinstance(found, Refusal) or step is None else replace(found, steps=(*found.steps, step))


def configs() -> Iterator[Config]:
    """Every specialisation of the two kernels."""
    for mode in PADDING_MODES[1:]:
        for dtype in DTYPES:
            for bits in (32, 64):
                yield with_padding_mode(base_config("conv1d_edges", dtype, bits, BLOCK_SIZE), mode)
                yield fold_config(dtype, bits, mode)


def _mode(problem: Problem) -> str:
    return str(getattr(problem, "padding_mode", "zeros"))


def _edges_step(p: ConvProblem, layout: Layout, first: int, last: int) -> Step:
    num_outputs = p.N * p.C_out * (first + last)
    grid = min(-(-num_outputs // BLOCK_SIZE), MAX_GRID)
    bits = index_bits(p, layout, Overhang(), num_outputs + grid * BLOCK_SIZE)
    config = with_padding_mode(base_config("conv1d_edges", p.dtype, bits, BLOCK_SIZE), p.padding_mode)
    own = {"num_outputs": num_outputs, "edges": first + last, "first": first}
    return one_result_step(config, p, layout, grid, bits, own)


def fold_step(p: ConvProblem, layout: Layout) -> Step | None:
    """The step that folds the padding of a transposed operation; None where there is none."""
    first, second = padded_samples(p.padding_mode, p.padding_left, p.padding_right, p.L_out)
    if p.has_lengths:  # in shorter samples the second range lies elsewhere, so the ranges must stay apart
        first, second = padded_samples(p.padding_mode, p.padding_left, p.padding_right, p.L_out, apart=False)
    edges = len(first) + len(second)
    if edges == 0:
        return None
    num_outputs = p.N * p.C_out * edges
    grid = min(-(-num_outputs // (BLOCK_SIZE // WARP)), MAX_GRID)
    # At the end of its loop a lane has advanced to a channel up to 32 behind the last.
    bits = index_bits(p, layout, Overhang(), num_outputs + grid * BLOCK_SIZE, p.C_in_g + WARP)
    own = {
        "num_outputs": num_outputs,
        "edges": edges,
        "first_begin": first.start,
        "first_count": len(first),
        "second_begin": second.start,
        "padded_end": p.L_out + max(p.padding_right, 0),
    }
    config = fold_config(p.dtype, bits, p.padding_mode)
    step = one_result_step(config, p, layout, grid, bits, own, BLOCK_SIZE * p.format.accumulator_bytes)
    return reading_samples(step) if p.has_lengths else step


def fold_config(dtype: str, bits: int, mode: str) -> Config:
    """The specialisation of conv_transpose1d_fold for a mode."""
    config = base_config("conv_transpose1d_fold", dtype, bits, BLOCK_SIZE)
    return Config(config.kernel, (*config.macros, ("FOLD_MODE", mode)))


def one_result_step(
    config: Config, p: ConvProblem, layout: Layout, grid: int, bits: int, own: dict[str, int], shared_bytes: int = 0
) -> Step:
    """The launch of a kernel of cuda_src/one_result.cuh; `own` are the fields of Params that `conv_fields` lacks."""
    params = params_of(config.kernel, conv_fields(p, layout), own)
    return Step(config, Launch(grid, BLOCK_SIZE, shared_bytes, bits, params), conv_arrays(p))
