"""Samples of different lengths in the plans of all families, and the two kernels for their ends.

Contracts: cuda_src/samples.cuh, cuda_src/conv1d_ends.cu, cuda_src/conv_transpose1d_ends.cu, cuda_src/write_samples.cu.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..device import Device
from ..edge import PADDING_MODES
from ..problem import DTYPES, BiasGradientProblem, ConvProblem, Problem, WeightGradientProblem
from . import edges
from .base import (
    MAX_GRID,
    SUM_DTYPES,
    Config,
    Family,
    Launch,
    Layout,
    Plan,
    Refusal,
    Step,
    base_config,
    reading_samples,
    sum_dtype,
    with_lengths,
    with_padding_mode,
)
from .edges import BLOCK_SIZE, WARP
from .offsets import Overhang, index_bits

Integers: TypeAlias = npt.NDArray[np.int64]

# Outputs of a row for which another warp pays, and the warps that keep a multiprocessor busy.
_WARP_OUTPUTS, _WARPS = 256, 32

# Values that a launch of write_samples takes. Parameters may have 4 KiB; short tables need less time on the host.
WRITTEN_VALUES = (24, 96, 480)


def plan(family: Family[Any], problem: Problem, layout: Layout, device: Device) -> Plan | Refusal:
    """How a family computes a problem of its kind, whose samples may have different lengths, or why it does not.

    After kernels with `Family.keeps_lengths` a second step clears the outputs behind the end of each sample. Other
    families on CUDA cores compute whole rows, and the second step also computes the outputs near the ends of samples,
    in the canonical order. In transposed operations the step that folds the padding comes last.
    """
    if not getattr(problem, "has_lengths", False):
        return edges.plan(family, problem, layout, device)
    p = problem
    if not isinstance(p, ConvProblem):
        assert isinstance(p, WeightGradientProblem | BiasGradientProblem)
        if not family.keeps_lengths:
            return Refusal("needs samples of one length")
        # Without a stride, windows reach over an edge in all samples that have windows, or in none.
        if isinstance(p, WeightGradientProblem) and p.stride == 1 and not any(p.edge_windows):
            p = replace(p, padding_mode="zeros")
        found = family.plan(p, layout, device)
        return found if isinstance(found, Refusal) else _keeping_lengths(family, found)
    if family.keeps_lengths:
        own = p if not p.transposed and any(p.padding) else replace(p, padding_mode="zeros")
        found = family.plan(own, layout, device)
    else:
        assert family.canonical_order
        if not p.transposed and p.padding_mode != "zeros" and sum(p.edge_windows) == p.L_out:
            return Refusal("needs a window that does not reach over an edge")
        found = family.plan(replace(p, padding_mode="zeros", has_lengths=False), layout, device)
    if isinstance(found, Refusal):
        return found
    steps = [*(_keeping_lengths(family, found) if family.keeps_lengths else found).steps]
    steps.append(_ends_step(p, layout, device, is_computed=not family.keeps_lengths))
    if p.transposed and p.padding_mode != "zeros" and (fold := edges.fold_step(p, layout)) is not None:
        steps.append(fold)
    return replace(found, steps=tuple(steps))


def configs() -> Iterator[Config]:
    """Every specialisation of the kernels for lengths that belong to no family."""
    for dtype in SUM_DTYPES:
        for bits in (32, 64):
            for mode in PADDING_MODES:
                yield with_lengths(with_padding_mode(base_config("conv1d_ends", dtype, bits, BLOCK_SIZE), mode))
                if mode != "zeros" and dtype in DTYPES:  # integers have no gradients, and only these are folded
                    yield with_lengths(edges.fold_config(dtype, bits, mode))
            yield with_lengths(base_config("conv_transpose1d_ends", dtype, bits, BLOCK_SIZE))
    yield from write_configs()


def write_configs() -> Iterator[Config]:
    """Every specialisation of write_samples."""
    return map(_write_config, WRITTEN_VALUES)


def writes(values: Integers) -> Iterator[tuple[int, Integers]]:
    """The launches that write the table of samples, which has three values a sample.

    Yields the number of values that a launch takes, which `write_launch` describes, and its parameters, as Params of
    cuda_src/write_samples.cu has them.
    """
    count = next((n for n in WRITTEN_VALUES if n >= len(values)), WRITTEN_VALUES[-1])
    for first in range(0, len(values), count):
        part = values[first : first + count]
        params = np.zeros(2 + count, np.int64)
        params[:2] = first, len(part)
        params[2 : 2 + len(part)] = part
        yield count, params


def write_launch(count: int) -> tuple[Config, Launch]:
    """A launch that writes nothing, of the kernel that takes `count` values."""
    names = ("first", "count", *(f"values[{i}]" for i in range(count)))
    return _write_config(count), Launch(1, WARP, 0, 64, tuple((name, 0) for name in names))


def _write_config(count: int) -> Config:
    macros: dict[str, str | int] = {"DTYPE": "float32", "INDEX_BITS": 64, "BLOCK_SIZE": WARP, "NUM_VALUES": count}
    return Config.of("write_samples", {**macros, "PARAMS_BYTES": (2 + count) * 8})


def _keeping_lengths(family: Family[Any], plan: Plan) -> Plan:
    """The plan whose kernel reads the table of samples."""
    return replace(plan, steps=tuple(reading_samples(s) if s.config.kernel == family.name else s for s in plan.steps))


def _ends_step(p: ConvProblem, layout: Layout, device: Device, *, is_computed: bool) -> Step:
    rows = p.N * p.C_out
    parts = max(1, min(-(-p.L_out // _WARP_OUTPUTS), -(-device.num_sms * _WARPS // rows)))
    grid = min(-(-rows * parts * WARP // BLOCK_SIZE), MAX_GRID)
    counts = (rows * parts + grid * (BLOCK_SIZE // WARP), 2 * p.L_out + (parts + 1) * WARP, p.L_in * p.stride)
    bits = index_bits(p, layout, Overhang(), *counts)
    own = {"num_warps": rows * parts, "parts": parts, "is_computed": int(is_computed)}
    config = base_config(f"{p.op}_ends", sum_dtype(p), bits, BLOCK_SIZE)
    if not p.transposed:
        config = with_padding_mode(config, p.padding_mode)
        own["first"] = p.edge_windows[0] if is_computed and p.padding_mode != "zeros" else 0
    return reading_samples(edges.one_result_step(config, p, layout, grid, bits, own))
