"""The predicted time of the launches before and behind a family's own: what packs weights and what adds sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..costs import Prediction
from ..device import Device
from . import mma_costs, slices, tiles
from .base import Step

_PASSES: dict[str, Callable[[Any, Step, Device], Prediction]] = {
    "pack_weight": tiles.predict_pass,
    "pack_mma_weight": mma_costs.predict_pass,
    "conv1d_mma": mma_costs.predict_pass,  # that adds the sums of segments
    "conv_transpose1d_mma": mma_costs.predict_pass,
    "sum_slices": slices.predict_pass,
}


def predict_pass(problem: Any, step: Step, device: Device) -> Prediction:
    """The time of a step that is not the one whose work is `Family.work`."""
    return _PASSES[step.config.kernel](problem, step, device)
