"""conv1d_tiled: dense and grouped layers by register tiles.

Contract: cuda_src/conv1d_tiled.cu.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..device import Device
from ..problem import DTYPES, ConvProblem
from ..source import params_fields
from .base import MAX_GRID, Config, Family, Launch, Layout, Plan, Refusal, conv_fields, index_bits, params_of
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

# Strides that get a kernel of their own, in which one address serves a thread's columns: 2 % (128x128) to 10 % (32x64)
# fewer instructions for a chunk of float32 (bench.static on sm_90), worth it for the strides that most layers have.
COLUMN_STEPS = (1, 2)
# Below these a tile is mostly empty, and the families for few channels or the base family do as well.
MIN_ROWS = 5
MIN_TERMS = 8
# With fewer columns a tile idles while it waits for weights that one thread a row could read as well (bench.static
# predicts 91 us for the base family against 165 us on 512 to 1024 channels, K = 16, two columns).
MIN_COLUMNS = 4


class Conv1dTiled(Family[ConvProblem]):
    """Register tiles over c_out by (n, l_out)."""

    name = "conv1d_tiled"
    kind = "conv1d"

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        if p.C_out_g < MIN_ROWS:
            return Refusal(f"needs C_out/groups >= {MIN_ROWS}")
        if p.C_in_g * p.K < MIN_TERMS:
            return Refusal(f"needs C_in/groups * K >= {MIN_TERMS}")
        if p.N * p.L_out < MIN_COLUMNS:
            return Refusal(f"needs N * L_out >= {MIN_COLUMNS}")
        bits = self._index_bits(p, layout)
        regular = layout["input"].strides[2] == 1 and p.stride in COLUMN_STEPS and bits == 32
        tilings = compare_tilings(
            rows=p.C_out_g,
            samples=p.N,
            positions=p.L_out,
            products=p.groups,
            terms=p.C_in_g * p.K,
            column_step=p.stride if regular else 0,
            bits=bits,
            dtype=p.dtype,
            device=device,
        )
        tiling, tile = tilings[0], tilings[0].tile
        if tiling.blocks > MAX_GRID:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        packed = PackedWeight.of(tile, p.groups, p.C_in_g * p.K, p.C_out_g)
        fields = conv_fields(p, layout)
        params = params_of(
            self.name,
            fields,
            row_tiles=tiling.row_tiles,
            column_tiles=tiling.column_tiles,
            **packed.params(),
            **walk_params(tiling, p.K, fields["input_stride_c"], p.dilation * fields["input_stride_l"]),
        )
        config = self._config(tile, tiling.column_step, p.dtype, bits)
        shared_bytes = tile.shared_bytes(p.format.accumulator_bytes)
        launch = Launch(tiling.blocks, tile.threads, shared_bytes, bits, params)
        return packed_plan(p, layout, packed, tilings, config, launch, rows=p.C_out_g, taps=p.K, phases_in_rows=False)

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for tile in tiles_for(dtype, 64):
                yield self._config(tile, 0, dtype, 64)
            for tile in tiles_for(dtype, 32):
                for column_step in (0, *COLUMN_STEPS):
                    yield self._config(tile, column_step, dtype, 32)
            for bits in (32, 64):
                yield pack_config(dtype, bits, transposed=False, phases_in_rows=False)

    def _index_bits(self, problem: ConvProblem, layout: Layout) -> int:
        # Beyond the arrays the kernel forms positions and offsets of columns of a block that hangs over the last
        # sample, terms of a chunk that hangs over the last term, and the steps of its walks.
        p = problem
        fields = conv_fields(p, layout)
        hanging = p.L_out + MAX_BLOCK_N
        span = hanging * p.stride + p.padding_left + p.dilation * p.K
        return index_bits(
            p,
            layout,
            (p.N * p.L_out + MAX_BLOCK_N) * p.groups,
            span + p.L_in,
            p.N * abs(fields["output_stride_n"]) + hanging * abs(fields["output_stride_l"]),
            p.N * abs(fields["input_stride_n"])
            + (p.C_in + 2 * MAX_BLOCK_R) * abs(fields["input_stride_c"])
            + span * abs(fields["input_stride_l"]),
            PackedWeight.most_elements(p.groups, p.C_in_g * p.K, p.C_out_g),
        )

    def _config(self, tile: Tile, column_step: int, dtype: str, bits: int) -> Config:
        macros = tiling_macros(tile, column_step, dtype, bits)
        return Config.of(self.name, {**macros, "PARAMS_BYTES": len(params_fields(self.name)) * bits // 8})
