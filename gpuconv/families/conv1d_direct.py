"""conv1d_direct: the forward family that refuses nothing.

Contract: cuda_src/conv1d_direct.cu.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..device import Device
from ..problem import DTYPES, ConvProblem
from .base import (
    MAX_GRID,
    Config,
    Family,
    Launch,
    Layout,
    Plan,
    Step,
    base_config,
    conv_arrays,
    index_bits,
    stride_params,
)

# The kernel's launch bounds leave a thread 128 registers, so that two blocks of this size share a multiprocessor.
BLOCK_SIZE = 256


class Conv1dDirect(Family[ConvProblem]):
    """One thread per output element, any strides."""

    name = "conv1d_direct"
    kind = "conv1d"

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan:
        p = problem
        num_outputs = p.N * p.C_out * p.L_out
        grid = min(-(-num_outputs // BLOCK_SIZE), MAX_GRID)
        # The loop over the grid leaves with an index of up to num_outputs + grid*BLOCK_SIZE.
        bits = index_bits(p, layout, num_outputs + grid * BLOCK_SIZE)
        params = {
            "num_outputs": num_outputs,
            "C_out": p.C_out,
            "L_in": p.L_in,
            "L_out": p.L_out,
            "K": p.K,
            "C_in_g": p.C_in_g,
            "C_out_g": p.C_out_g,
            "stride": p.stride,
            "padding_left": p.padding_left,
            "dilation": p.dilation,
            **stride_params(layout, ("out", "in")),
        }
        launch = Launch(grid, BLOCK_SIZE, 0, bits, tuple(params.items()))
        return Plan((Step(base_config(self.name, p.dtype, bits, BLOCK_SIZE), launch, conv_arrays(p)),))

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for bits in (32, 64):
                yield base_config(self.name, dtype, bits, BLOCK_SIZE)
