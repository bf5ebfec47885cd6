"""weight_gradient_direct: the base family of weight gradients, which takes every problem.

Contract: cuda_src/weight_gradient_direct.cu.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..device import Device
from ..problem import DTYPES, WeightGradientProblem
from .base import MAX_GRID, Config, Family, Launch, Layout, Plan, base_config, params_of
from .offsets import index_bits
from .slices import Slices, sliced_plan, sum_config, weight_fields

# As in conv_direct.py, two blocks share a multiprocessor.
BLOCK_SIZE = 256


class WeightGradientDirect(Family[WeightGradientProblem]):
    """One thread per result and slice, any strides."""

    name = "weight_gradient_direct"
    kind = "weight_gradient"
    maps_edges = True
    keeps_lengths = True

    def plan(self, problem: WeightGradientProblem, layout: Layout, device: Device) -> Plan:
        p = problem
        slices = Slices.of(p)
        num_sums = slices.count * math.prod(p.weight_shape)
        grid = min(-(-num_sums // BLOCK_SIZE), MAX_GRID)
        bits = index_bits(p, layout, slices.overhang(), num_sums + grid * BLOCK_SIZE)
        params = params_of(
            self.name,
            weight_fields(p, layout, slices),
            {"num_sums": num_sums},
        )
        config = base_config(self.name, p.dtype, bits, BLOCK_SIZE)
        launch = Launch(grid, BLOCK_SIZE, 0, bits, params)
        return sliced_plan(p, layout, slices, config, launch)

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for bits in (32, 64):
                yield base_config(self.name, dtype, bits, BLOCK_SIZE)
                yield sum_config(dtype, bits)
