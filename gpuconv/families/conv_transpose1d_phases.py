"""conv_transpose1d_phases: dense and grouped transposed layers, each phase a stride-1 convolution by register tiles.

Contract: cuda_src/conv_transpose1d_phases.cu.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..device import Device
from ..problem import DTYPES, ConvProblem
from ..source import params_fields
from .base import MAX_GRID, Config, Family, Launch, Layout, Plan, Refusal, conv_fields, index_bits, params_of
from .phases import Phases
from .tiles import (
    MAX_BLOCK_N,
    MAX_BLOCK_R,
    PackedWeight,
    Tile,
    compare_tilings,
    pack_config,
    packed_plan,
    tiles_for,
    tiling_macros,
    walk_params,
)

# Below these a tile is mostly empty, and the families for few channels or the base family do as well.
MIN_ROWS = 5
MIN_TERMS = 8
# Taps that a phase lacks are packed as zeros. Where they are more than this for one that exists, as with a stride far
# beyond K, the packed weights outgrow the layer's (and a GPU's memory), and the base family visits only what exists.
MAX_PACKING = 16


class ConvTranspose1dPhases(Family[ConvProblem]):
    """Register tiles over (c_out, phase) by (n, q)."""

    name = "conv_transpose1d_phases"
    kind = "conv_transpose1d"

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p, phases = problem, Phases.of(problem)
        if phases.rows < MIN_ROWS:
            return Refusal(f"needs C_out/groups (times stride where dilation is 1) >= {MIN_ROWS}")
        if p.terms < MIN_TERMS:
            return Refusal(f"needs C_in/groups * taps of a phase >= {MIN_TERMS}")
        if p.stride * phases.taps > MAX_PACKING * p.K:
            return Refusal(f"needs stride * taps of a phase <= {MAX_PACKING} * K")
        bits = _index_bits(phases, layout)
        tilings = compare_tilings(
            rows=phases.rows,
            samples=p.N,
            positions=phases.positions,
            products=phases.products,
            terms=p.C_in_g * phases.taps,
            column_step=1 if phases.in_rows and layout["input"].strides[2] == 1 and bits == 32 else 0,
            bits=bits,
            dtype=p.dtype,
            device=device,
        )
        tiling, tile = tilings[0], tilings[0].tile
        if tiling.blocks > MAX_GRID:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        packed = PackedWeight.of(tile, phases.products, p.C_in_g * phases.taps, phases.rows)
        fields = conv_fields(p, layout)
        params = params_of(
            self.name,
            fields,
            row_tiles=tiling.row_tiles,
            column_tiles=tiling.column_tiles,
            positions=phases.positions,
            q_begin=phases.q_begin,
            taps=phases.taps,
            **packed.params(),
            **walk_params(
                tiling,
                phases.taps,
                fields["input_stride_c"],
                -phases.position_step * fields["input_stride_l"],
            ),
        )
        config = self._config(tile, tiling.column_step, p.dtype, bits, phases.in_rows)
        shared_bytes = tile.shared_bytes(p.format.accumulator_bytes)
        launch = Launch(tiling.blocks, tile.threads, shared_bytes, bits, params)
        return packed_plan(
            p,
            layout,
            packed,
            tilings,
            config,
            launch,
            rows=phases.rows,
            taps=phases.taps,
            phases_in_rows=phases.in_rows,
        )

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for tile in tiles_for(dtype, 32):
                yield self._config(tile, 1, dtype, 32, phases_in_rows=True)
            for bits in (32, 64):
                for tile in tiles_for(dtype, bits):
                    for phases_in_rows in (False, True):
                        yield self._config(tile, 0, dtype, bits, phases_in_rows)
            for bits in (32, 64):
                for phases_in_rows in (False, True):
                    yield pack_config(dtype, bits, transposed=True, phases_in_rows=phases_in_rows)

    def _config(self, tile: Tile, column_step: int, dtype: str, bits: int, phases_in_rows: bool) -> Config:
        macros = tiling_macros(tile, column_step, dtype, bits)
        macros["PHASES_IN_ROWS"] = int(phases_in_rows)
        return Config.of(self.name, {**macros, "PARAMS_BYTES": len(params_fields(self.name)) * bits // 8})


def _index_bits(phases: Phases, layout: Layout) -> int:
    # As in conv1d_tiled; and the products of residues of tap_step.
    p = phases.problem
    fields = conv_fields(p, layout)
    hanging = phases.q_begin + phases.positions + MAX_BLOCK_N + 1
    span = hanging + p.dilation * p.K
    return index_bits(
        p,
        layout,
        (p.N * phases.positions + MAX_BLOCK_N) * phases.products,
        hanging * p.stride + p.padding_left + p.L_out,
        phases.tap_step * phases.tap_step,
        phases.tap_step * p.dilation,
        (phases.taps + 1) * p.stride,
        p.N * abs(fields["output_stride_n"]) + hanging * p.stride * abs(fields["output_stride_l"]),
        p.N * abs(fields["input_stride_n"])
        + (p.C_in + 2 * MAX_BLOCK_R) * abs(fields["input_stride_c"])
        + span * abs(fields["input_stride_l"]),
        PackedWeight.most_elements(phases.products, p.C_in_g * phases.taps, phases.rows),
    )
