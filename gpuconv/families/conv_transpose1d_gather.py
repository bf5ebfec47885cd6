"""conv_transpose1d_gather: the transposed family that refuses nothing.

Contract: cuda_src/conv_transpose1d_gather.cu.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..costs import Work
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
    base_work,
    conv_arrays,
    conv_fields,
    index_bits,
    params_of,
)

# The kernel's launch bounds leave a thread 128 registers, so that two blocks of this size share a multiprocessor.
BLOCK_SIZE = 256


class ConvTranspose1dGather(Family[ConvProblem]):
    """One thread per output element, any strides, only the taps of the output's phase."""

    name = "conv_transpose1d_gather"
    kind = "conv_transpose1d"

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan:
        p = problem
        num_outputs = p.N * p.C_out * p.L_out
        grid = min(-(-num_outputs // BLOCK_SIZE), MAX_GRID)
        fields = conv_fields(p, layout)
        tap_step = fields["tap_step"]
        # The kernel multiplies two residues of tap_step, and k_first < tap_step by dilation; the loop over the grid
        # leaves with an index of up to num_outputs + grid*BLOCK_SIZE.
        bits = index_bits(p, layout, num_outputs + grid * BLOCK_SIZE, tap_step * tap_step, tap_step * p.dilation)
        params = params_of(
            self.name,
            fields,
            num_outputs=num_outputs,
        )
        launch = Launch(grid, BLOCK_SIZE, 0, bits, params)
        return Plan((Step(base_config(self.name, p.dtype, bits, BLOCK_SIZE), launch, conv_arrays(p)),))

    def work(self, problem: ConvProblem, step: Step) -> Work:
        return base_work(problem, -(-problem.K // dict(step.launch.params)["tap_step"]))

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for bits in (32, 64):
                yield base_config(self.name, dtype, bits, BLOCK_SIZE)
