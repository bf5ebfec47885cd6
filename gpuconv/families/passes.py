"""The predicted time of a plan's other launches: packing weights, adding partial sums, outputs at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..costs import FMA_LATENCY_CYCLES, Code, Prediction, Work, cuda_cores, predict_launch
from ..device import Device
from . import mma_costs, slices, tiles
from .arithmetic import ARITHMETICS, UNIT_BYTES, WARP
from .base import Step

# Cycles of a block that computes a few outputs at the edges, besides its chain of multiply-adds (an assumption).
_EDGE_CYCLES = 3000.0
# Of pack_im2col_weight and pack_col2im_weight: instructions for a vector, from the machine code for sm_90, and cycles
# of a thread (an assumption).
_TAPS_INSTRUCTIONS = 215
_TAPS_CYCLES = 2000.0


def _predict_edges(problem: Any, step: Step, device: Device) -> Prediction:
    """The few outputs onto which padding folds, or whose windows cross an edge."""
    return predict_launch(
        Work(0.0, 0.0, dram_bytes=0.0),
        Code(0.0, 0.0, _EDGE_CYCLES + FMA_LATENCY_CYCLES * problem.terms),
        blocks=step.launch.grid,
        resident=4,
        unit=cuda_cores(device, 4),
        device=device,
    )


def _predict_packed_taps(problem: Any, step: Step, device: Device) -> Prediction:
    """pack_im2col_weight or pack_col2im_weight, which read and write whole sectors."""
    p, a = problem, ARITHMETICS[problem.dtype, problem.precision]
    vectors, read = dict(step.launch.params)["num_vectors"], math.prod(p.weight_shape) * p.itemsize
    moved = read + vectors * a.parts * UNIT_BYTES
    # A warp's loads are in one line where a lane holds neighbouring taps, else in as many as it has rows apart.
    lines = 8 if step.config.kernel == "pack_col2im_weight" else 1
    return predict_launch(
        Work(0.0, moved, dram_bytes=moved),
        Code(
            instructions=vectors / WARP * _TAPS_INSTRUCTIONS,
            wavefronts=vectors / WARP * (lines * a.channels + 4 * a.parts),
            chain=_TAPS_CYCLES,
        ),
        blocks=step.launch.grid,
        resident=10,
        unit=cuda_cores(device, 4),
        device=device,
    )


_PASSES: dict[str, Callable[[Any, Step, Device], Prediction]] = {
    "pack_weight": tiles.predict_pass,
    "pack_mma_weight": mma_costs.predict_pass,
    "pack_im2col_weight": _predict_packed_taps,
    "pack_col2im_weight": _predict_packed_taps,
    "conv1d_mma": mma_costs.predict_pass,  # the step that adds the sums of segments
    "conv_transpose1d_mma": mma_costs.predict_pass,
    "sum_slices": slices.predict_pass,
    "conv1d_edges": _predict_edges,
    "conv_transpose1d_fold": _predict_edges,
}


def predict_pass(problem: Any, step: Step, device: Device) -> Prediction:
    """The time of a step that is not the one whose work is `Family.work`."""
    return _PASSES[step.config.kernel](problem, step, device)
