"""conv1d_direct: the forward family that refuses nothing.

Contract: cuda_src/conv1d_direct.cu.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..costs import Work
from ..device import Device
from ..problem import DTYPES, INTEGERS, ConvProblem
from .base import MAX_GRID, Config, Family, Layout, Plan, Step, base_config, base_work, conv_base_configs, conv_plan
from .offsets import Overhang, index_bits

# The kernel's launch bounds leave a thread 128 registers, so that two blocks of this size share a multiprocessor.
BLOCK_SIZE = 256


class Conv1dDirect(Family[ConvProblem]):
    """One thread per output element, any strides."""

    name = "conv1d_direct"
    dtypes = (*DTYPES, *INTEGERS)
    kind = "conv1d"

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan:
        p = problem
        num_outputs = p.N * p.C_out * p.L_out
        grid = min(-(-num_outputs // BLOCK_SIZE), MAX_GRID)
        # The loop over the grid leaves with an index of up to num_outputs + grid*BLOCK_SIZE.
        bits = index_bits(p, layout, Overhang(), num_outputs + grid * BLOCK_SIZE)
        dtype = p.dtype if p.out_dtype is None else f"{p.dtype}_to_{p.out_dtype}"
        config = base_config(self.name, dtype, bits, BLOCK_SIZE)
        return conv_plan(config, p, layout, bits, grid=grid, block=BLOCK_SIZE, own={"num_outputs": num_outputs})

    def work(self, problem: ConvProblem, step: Step) -> Work:
        return base_work(problem, problem.K)

    def configs(self, device: Device) -> Iterator[Config]:
        return conv_base_configs(self.name, BLOCK_SIZE)
