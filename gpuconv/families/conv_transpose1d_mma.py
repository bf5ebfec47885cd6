"""conv_transpose1d_mma: dense and grouped transposed layers on tensor cores, each phase a stride-1 convolution.

Contract: cuda_src/conv_transpose1d_mma.cu.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..device import Device
from ..problem import ConvProblem
from . import mma
from .base import MAX_GRID, Config, Family, Launch, Layout, Pack, SecondPass, index_bits, stride_params
from .phases import Phases

# Taps that a phase lacks are packed as zeros, and multiplied; see also conv_transpose1d_phases.
MAX_PACKING = 4


class ConvTranspose1dMma(Family):
    """Tensor-core tiles over (c_out, phase) by (n, q)."""

    name = "conv_transpose1d_mma"
    op = "conv_transpose1d"
    canonical_order = False

    def refuse(self, problem: ConvProblem, layout: Layout, device: Device) -> str | None:
        phases = Phases.of(problem)
        reason = mma.refuse_layer(problem, phases.rows, device)
        if reason is not None:
            return reason
        if problem.stride * phases.taps > MAX_PACKING * problem.K:
            return f"needs stride * taps of a phase <= {MAX_PACKING} * K"
        arithmetic = mma.ARITHMETICS[problem.dtype, problem.precision]
        if not mma.smallest_fits(_product(phases, arithmetic), arithmetic, device):
            return "needs the window of 16 positions in shared memory"
        if not self._tilings(problem, layout, device):
            return f"needs at most {MAX_GRID} blocks"
        return None

    def configure(self, problem: ConvProblem, layout: Layout, device: Device) -> tuple[Config, Launch]:
        p = problem
        phases, arithmetic, bits = Phases.of(p), mma.ARITHMETICS[p.dtype, p.precision], self._index_bits(p, layout)
        tiling, product = self._tilings(p, layout, device)[0], _product(phases, arithmetic)
        strides = stride_params(layout, ("in", "out"))
        params = {
            "N": p.N,
            "L_in": p.L_in,
            "L_out": p.L_out,
            "K": p.K,
            "C_in_g": p.C_in_g,
            "C_out_g": p.C_out_g,
            "row_tiles": tiling.row_tiles,
            "column_tiles": tiling.column_tiles,
            "sample_tiles": tiling.sample_tiles,
            "positions": phases.positions,
            "q_begin": phases.q_begin,
            "phase_gcd": phases.gcd,
            "tap_step": phases.tap_step,
            "position_step": phases.position_step,
            "phase_inverse": phases.inverse,
            "taps": phases.taps,
            "stride": p.stride,
            "padding_left": p.padding_left,
            "dilation": p.dilation,
            **{name: stride for name, stride in strides.items() if not name.startswith("weight")},
            **mma.tiling_params(product, tiling),
        }
        mode = tiling.tile.segment_mode
        config = mma.kernel_config(
            self.name, p.dtype, p.precision, tiling.tile, bits, device, phases_in_rows=phases.in_rows, segment_mode=mode
        )
        return config, mma.launch(tiling, product, bits, params)

    def second_pass(self, problem: ConvProblem, layout: Layout, device: Device) -> SecondPass | None:
        tiling = self._tilings(problem, layout, device)[0]
        if tiling.tile.segment_mode < 2:
            return None
        product = _product(Phases.of(problem), mma.ARITHMETICS[problem.dtype, problem.precision])
        return mma.second_pass(*self.configure(problem, layout, device), product, tiling, problem.itemsize)

    def pack(self, problem: ConvProblem, layout: Layout, device: Device) -> Pack:
        phases, arithmetic = Phases.of(problem), mma.ARITHMETICS[problem.dtype, problem.precision]
        tile = self._tilings(problem, layout, device)[0].tile
        product = _product(phases, arithmetic)
        return mma.make_pack(problem, layout, product, tile, arithmetic, phases_in_rows=phases.in_rows)

    def figures(self, problem: ConvProblem, layout: Layout, device: Device) -> tuple[tuple[str, float], ...]:
        return mma.tiling_figures(self._tilings(problem, layout, device))

    def configs(self, device: Device) -> Iterator[Config]:
        yield from mma.kernel_configs(self.name, device, (False, True), transposed=True)

    def _tilings(self, problem: ConvProblem, layout: Layout, device: Device) -> tuple[mma.Tiling, ...]:
        arithmetic, bits = mma.ARITHMETICS[problem.dtype, problem.precision], self._index_bits(problem, layout)
        return mma.compare_tilings(_product(Phases.of(problem), arithmetic), arithmetic, bits, device)

    def _index_bits(self, problem: ConvProblem, layout: Layout) -> int:
        # As in conv1d_mma; and the products of residues of tap_step.
        p = problem
        phases, arithmetic = Phases.of(p), mma.ARITHMETICS[p.dtype, p.precision]
        product = _product(phases, arithmetic)
        strides = stride_params(layout, ("in", "out"))
        hanging = phases.q_begin + phases.positions + mma.MAX_BLOCK_N + 1
        span = hanging + p.dilation * p.K
        samples = p.N + mma.MAX_BLOCK_N // phases.positions  # a block takes several where they are short
        channels = p.C_out + mma.MAX_BLOCK_M
        vectors = mma.most_weight_vectors(product)
        return index_bits(
            p,
            layout,
            hanging * p.stride + p.padding_left + p.L_out,
            span + p.L_in,
            phases.positions * samples,
            phases.tap_step * phases.tap_step,
            phases.tap_step * p.dilation,
            (phases.taps + 1) * p.stride,
            channels * p.stride,
            samples * abs(strides["output_stride_n"])
            + channels * abs(strides["output_stride_c"])
            + hanging * p.stride * abs(strides["output_stride_l"]),
            samples * abs(strides["input_stride_n"])
            + (p.C_in + mma.MAX_UNITS * arithmetic.channels) * abs(strides["input_stride_c"])
            + span * abs(strides["input_stride_l"]),
            channels * abs(strides["bias_stride"]),
            vectors * arithmetic.parts,
        )


def _product(phases: Phases, arithmetic: mma.Arithmetic) -> mma.Product:
    return mma.Product(
        products=phases.products,
        rows=phases.rows,
        samples=phases.problem.N,
        positions=phases.positions,
        column_step=1,
        tap_step=-phases.position_step,
        reduction=mma.Reduction.of(phases.problem.C_in_g, phases.taps, arithmetic),
    )
