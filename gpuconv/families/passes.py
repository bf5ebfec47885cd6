"""The predicted time of the launches before and behind a family's own: packing, sums of sums, outputs at the edges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..costs import FMA_LATENCY_CYCLES, Code, Prediction, Work, cuda_cores, predict_launch
from ..device import Device
from . import mma_costs, slices, tiles
from .base import Step

# Cycles of a block that computes a few outputs at the edges, besides its chain of multiply-adds (an assumption).
_EDGE_CYCLES = 3000.0


def _predict_edges(problem: Any, step: Step, device: Device) -> Prediction:
    """The few outputs onto which padding folds, or whose windows reach over an edge."""
    return predict_launch(
        Work(0.0, 0.0, dram_bytes=0.0),
        Code(0.0, 0.0, _EDGE_CYCLES + FMA_LATENCY_CYCLES * problem.terms),
        blocks=step.launch.grid,
        resident=4,
        unit=cuda_cores(device, 4),
        device=device,
    )


_PASSES: dict[str, Callable[[Any, Step, Device], Prediction]] = {
    "pack_weight": tiles.predict_pass,
    "pack_mma_weight": mma_costs.predict_pass,
    "conv1d_mma": mma_costs.predict_pass,  # that adds the sums of segments
    "conv_transpose1d_mma": mma_costs.predict_pass,
    "sum_slices": slices.predict_pass,
    "conv1d_edges": _predict_edges,
    "conv_transpose1d_fold": _predict_edges,
}


def predict_pass(problem: Any, step: Step, device: Device) -> Prediction:
    """The time of a step that is not the one whose work is `Family.work`."""
    return _PASSES[step.config.kernel](problem, step, device)
