"""conv1d_tiled and conv_transpose1d_phases: dense and grouped layers by register tiles.

Contracts: cuda_src/conv1d_tiled.cu, cuda_src/conv_transpose1d_phases.cu.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..costs import Work
from ..device import Device
from ..problem import DTYPES, ConvProblem
from .base import MAX_GRID, Config, Family, Launch, Layout, Plan, Refusal, Step, conv_fields, params_of
from .offsets import Overhang, index_bits
from .product import Product
from .tiles import (
    MAX_BLOCK_N,
    MAX_BLOCK_R,
    PackedWeight,
    Tile,
    compare_tilings,
    pack_config,
    packed_plan,
    tile_work,
    tiles_for,
    tiling_macros,
    walk_params,
)

# Strides that have their own kernel, in which a thread's columns share one address: 2 % (128x128) to 10 % (32x64) fewer
# instructions for a chunk of float32 (bench.static on sm_90). Most layers have these strides.
COLUMN_STEPS = (1, 2)
# With fewer, a tile is mostly empty, and the families for few channels or the base family are as fast.
MIN_ROWS = 5
MIN_TERMS = 8
# There is no family for few input channels of transposed layers, and the base family takes five times as long for 7
# taps of one channel (bench.static: 239 us against 47 us in bfloat16 for 64 channels by 960,000 positions).
MIN_PHASE_TERMS = 4
# With fewer columns a tile mostly waits for its weights, and the base family is faster (bench.static predicts 91 us
# against 165 us for 512 to 1024 channels, K = 16, two columns).
MIN_COLUMNS = 4
# Taps that a phase lacks are packed as zeros. With more zeros than this for each existing tap, as when the stride is
# much larger than K, the packed weights may exceed the GPU's memory; the base family visits only existing taps.
MAX_PACKING = 16


class _Tiled(Family[ConvProblem]):
    def _plan(self, product: Product, layout: Layout, device: Device) -> Plan | Refusal:
        p, q = product.problem, product
        bits = _index_bits(q, layout)
        is_regular = layout["input"].strides[2] == 1 and q.column_step in COLUMN_STEPS and bits == 32
        tilings = compare_tilings(
            q,
            column_step=q.column_step if is_regular and (q.phases_in_rows or not p.transposed) else 0,
            bits=bits,
            device=device,
        )
        tiling, tile = tilings[0], tilings[0].tile
        if tiling.blocks > MAX_GRID:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        packed = PackedWeight.of(tile, q.products, q.terms, q.rows)
        fields = conv_fields(p, layout)
        params = params_of(
            self.name,
            fields,
            {
                **q.params(),
                "row_tiles": tiling.row_tiles,
                "column_tiles": tiling.column_tiles,
                "weight_stride_tile": packed.stride_tile,
                **walk_params(tiling, q.taps, fields["input_stride_c"], q.tap_step * fields["input_stride_l"]),
            },
        )
        config = self._config(tile, tiling.column_step, p.dtype, bits, phases_in_rows=q.phases_in_rows)
        shared_bytes = tile.shared_bytes(p.format.accumulator_bytes)
        launch = Launch(tiling.blocks, tile.threads, shared_bytes, bits, params)
        return packed_plan(q, layout, packed, tilings, config, launch)

    def work(self, problem: ConvProblem, step: Step) -> Work:
        p, q, macros = problem, Product.of(problem), dict(step.config.macros)
        extents = int(macros["BLOCK_M"]), int(macros["BLOCK_N"])
        return tile_work(*extents, step.launch.grid, q.terms, p.dtype, num_bytes=p.bytes(), taps=q.taps)

    def _config(self, tile: Tile, column_step: int, dtype: str, bits: int, *, phases_in_rows: bool) -> Config:
        macros = tiling_macros(tile, column_step, dtype, bits)
        if self.kind == "conv_transpose1d":
            macros["PHASES_IN_ROWS"] = int(phases_in_rows)
        return Config.for_dtype(self.name, dtype, bits, macros)


class Conv1dTiled(_Tiled):
    """Register tiles over c_out by (n, l_out)."""

    name = "conv1d_tiled"
    kind = "conv1d"

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        if p.C_out_g < MIN_ROWS:
            return Refusal(f"needs C_out/groups >= {MIN_ROWS}")
        if p.terms < MIN_TERMS:
            return Refusal(f"needs C_in/groups * K >= {MIN_TERMS}")
        if p.N * p.L_out < MIN_COLUMNS:
            return Refusal(f"needs N * L_out >= {MIN_COLUMNS}")
        return self._plan(Product.of(p), layout, device)

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for tile in tiles_for(dtype, 64):
                yield self._config(tile, 0, dtype, 64, phases_in_rows=False)
            for tile in tiles_for(dtype, 32):
                for column_step in (0, *COLUMN_STEPS):
                    yield self._config(tile, column_step, dtype, 32, phases_in_rows=False)
            for bits in (32, 64):
                yield pack_config(dtype, bits, transposed=False, phases_in_rows=False)


class ConvTranspose1dPhases(_Tiled):
    """Register tiles over (c_out, phase) by (n, q)."""

    name = "conv_transpose1d_phases"
    kind = "conv_transpose1d"

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p, product = problem, Product.of(problem)
        if product.rows < MIN_ROWS:
            return Refusal(f"needs C_out/groups (times stride where dilation is 1) >= {MIN_ROWS}")
        if p.terms < MIN_PHASE_TERMS:
            return Refusal(f"needs C_in/groups * taps of a phase >= {MIN_PHASE_TERMS}")
        if product.phases * product.taps > MAX_PACKING * p.K:
            return Refusal(f"needs stride * taps of a phase <= {MAX_PACKING} * K")
        return self._plan(product, layout, device)

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for tile in tiles_for(dtype, 32):
                yield self._config(tile, 1, dtype, 32, phases_in_rows=True)
            for bits in (32, 64):
                for tile in tiles_for(dtype, bits):
                    for phases_in_rows in (False, True):
                        yield self._config(tile, 0, dtype, bits, phases_in_rows=phases_in_rows)
            for bits in (32, 64):
                for phases_in_rows in (False, True):
                    yield pack_config(dtype, bits, transposed=True, phases_in_rows=phases_in_rows)


def _index_bits(product: Product, layout: Layout) -> int:
    p, q = product.problem, product
    # Blocks extend past the columns of the last sample, and chunks past the last term.
    overhang = Overhang(samples=1, channels=2 * MAX_BLOCK_R, positions=MAX_BLOCK_N)
    columns = (p.N * q.positions + MAX_BLOCK_N) * q.products
    return index_bits(p, layout, overhang, columns, PackedWeight.most_elements(q.products, q.terms, q.rows))
