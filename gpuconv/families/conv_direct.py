"""conv1d_direct and conv_transpose1d_gather: the base families, which take every problem.

Contracts: cuda_src/conv1d_direct.cu, cuda_src/conv_transpose1d_gather.cu.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..costs import Work
from ..device import Device
from ..problem import DTYPES, INTEGERS, ConvProblem
from .base import (
    MAX_GRID,
    SUM_DTYPES,
    Config,
    Family,
    Layout,
    Plan,
    Step,
    base_config,
    base_work,
    conv_plan,
    sum_dtype,
    with_padding_mode,
)
from .offsets import Overhang, index_bits

# The kernels' launch bounds leave a thread 128 registers, so that two blocks of this size share a multiprocessor.
BLOCK_SIZE = 256


class _Direct(Family[ConvProblem]):
    dtypes = (*DTYPES, *INTEGERS)
    activates_input = True
    keeps_lengths = True

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan:
        p = problem
        num_outputs = p.N * p.C_out * p.L_out
        grid = min(-(-num_outputs // BLOCK_SIZE), MAX_GRID)
        # When the loop over the grid ends, the index may be up to num_outputs + grid*BLOCK_SIZE.
        bits = index_bits(p, layout, Overhang(), num_outputs + grid * BLOCK_SIZE)
        config = with_padding_mode(base_config(self.name, sum_dtype(p), bits, BLOCK_SIZE), p.padding_mode)
        return conv_plan(config, p, layout, bits, grid=grid, block=BLOCK_SIZE, own={"num_outputs": num_outputs})

    def work(self, problem: ConvProblem, step: Step) -> Work:
        tap_step = dict(step.launch.params).get("tap_step", 1)
        return base_work(problem, -(-problem.K // tap_step))

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in SUM_DTYPES:
            for bits in (32, 64):
                yield base_config(self.name, dtype, bits, BLOCK_SIZE)


class Conv1dDirect(_Direct):
    """One thread per output element, any strides."""

    name = "conv1d_direct"
    kind = "conv1d"
    maps_edges = True


class ConvTranspose1dGather(_Direct):
    """One thread per output element, any strides; visits only the taps of the output's phase."""

    name = "conv_transpose1d_gather"
    kind = "conv_transpose1d"
