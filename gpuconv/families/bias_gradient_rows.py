"""bias_gradient_rows: the bias gradient, by sums of rows.

Contract: cuda_src/bias_gradient_rows.cu.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..device import Device
from ..problem import DTYPES, BiasGradientProblem
from .base import MAX_GRID, Config, Family, Launch, Layout, Plan, base_config
from .offsets import Overhang, index_bits
from .slices import Slices, sliced_plan

# Threads of a block. The order of summation depends on it.
BLOCK_SIZE = 128


class BiasGradientRows(Family[BiasGradientProblem]):
    """One block per channel and slice, any strides; takes every problem."""

    name = "bias_gradient_rows"
    kind = "bias_gradient"
    keeps_lengths = True

    def plan(self, problem: BiasGradientProblem, layout: Layout, device: Device) -> Plan:
        p = problem
        slices = Slices.of(p)
        num_sums = slices.count * p.C
        stride_n, stride_c, stride_l = layout["grad_output"].strides
        step_n, step_l = divmod(BLOCK_SIZE, p.L)
        params = {
            "num_sums": num_sums,
            "N": p.N,
            "C": p.C,
            "L_coarse": p.L,
            **slices.params(),
            "step_l": step_l,
            "advance": step_n * stride_n + step_l * stride_l,
            "carry": stride_n - p.L * stride_l,
            "grad_output_stride_n": stride_n,
            "grad_output_stride_c": stride_c,
            "grad_output_stride_l": stride_l,
            "grad_bias_stride": layout["grad_bias"].strides[0],
        }
        grid = min(num_sums, MAX_GRID)
        # A thread may form an address behind the last term.
        overhang = Overhang(samples=2 + BLOCK_SIZE // p.L, rows=1, positions=BLOCK_SIZE)
        terms = slices.samples * slices.positions + BLOCK_SIZE
        bits = index_bits(p, layout, overhang, num_sums + grid, terms)
        config = base_config(self.name, p.dtype, bits, BLOCK_SIZE)
        shared = BLOCK_SIZE * p.format.accumulator_bytes
        launch = Launch(grid, BLOCK_SIZE, shared, bits, tuple(params.items()))
        return sliced_plan(p, layout, slices, config, launch)

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for bits in (32, 64):
                yield base_config(self.name, dtype, bits, BLOCK_SIZE)
