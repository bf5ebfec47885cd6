"""weight_gradient_tiled: weight gradients of dense and grouped layers by register tiles.

Contract: cuda_src/weight_gradient_tiled.cu.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from ..costs import Work
from ..device import Device
from ..problem import DTYPES, FORMATS, WeightGradientProblem
from .base import MAX_GRID, Config, Family, Launch, Layout, Plan, Refusal, Step, params_of
from .offsets import index_bits
from .slices import Slices, predict_sum, sliced_plan, weight_fields
from .tiles import Tile, predict_tiles, tile_work

# By the size of the accumulator, as in tiles.py. Tiles with few rows or few columns are for groups of few channels.
TILES: dict[int, tuple[Tile, ...]] = {
    4: (Tile(128, 128, 8, 8, 8, 2), Tile(16, 64, 8, 4, 8, 16), Tile(128, 16, 8, 8, 4, 8), Tile(64, 64, 8, 8, 8, 6)),
    8: (Tile(16, 64, 8, 4, 4, 8), Tile(64, 16, 8, 4, 4, 6), Tile(64, 64, 8, 4, 8, 3)),
    16: (Tile(16, 16, 8, 2, 4, 8), Tile(32, 64, 8, 4, 4, 2)),
}
_LARGEST = 128  # the largest extent of a tile
_LOAD_POSITIONS = 8  # kLoadPositions of the .cu file
# With fewer rows or columns most of every tile is empty.
MIN_CHANNELS = 4


class WeightGradientTiled(Family[WeightGradientProblem]):
    """Register tiles over the channels of coarse by (channels of fine, taps)."""

    name = "weight_gradient_tiled"
    kind = "weight_gradient"
    maps_edges = True

    def plan(self, problem: WeightGradientProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        if p.C_coarse_g < MIN_CHANNELS:
            return Refusal(f"needs at least {MIN_CHANNELS} channels a group on the coarse side")
        if p.C_fine_g * p.K < MIN_CHANNELS:
            return Refusal(f"needs at least {MIN_CHANNELS} taps of all channels of a group")
        bits = _index_bits(p, layout)
        tilings = _tilings(p, device, bits)
        tiling, tile = tilings[0], tilings[0].tile
        if tiling.blocks > MAX_GRID:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        slices = Slices.of(p)
        fields = weight_fields(p, layout, slices)
        step_n, step_l = divmod(_LOAD_POSITIONS, p.L_coarse)
        fine_step = p.stride * fields["fine_stride_l"]
        params = params_of(
            self.name,
            fields,
            {
                "row_tiles": tiling.row_tiles,
                "column_tiles": tiling.column_tiles,
                "step_l": step_l,
                "coarse_advance": step_n * fields["coarse_stride_n"] + step_l * fields["coarse_stride_l"],
                "coarse_carry": fields["coarse_stride_n"] - p.L_coarse * fields["coarse_stride_l"],
                "fine_advance": step_n * fields["fine_stride_n"] + step_l * fine_step,
                "fine_carry": fields["fine_stride_n"] - p.L_coarse * fine_step,
            },
        )
        config = self._config(tile, p.dtype, bits)
        shared_bytes = _shared_bytes(tile, p.dtype, bits)
        launch = Launch(tiling.blocks, tile.threads, shared_bytes, bits, params)
        candidates = tuple((f"{t.tile.block_m}x{t.tile.block_n}", t.us) for t in tilings)
        return sliced_plan(p, layout, slices, config, launch, candidates)

    def work(self, problem: WeightGradientProblem, step: Step) -> Work:
        p, macros, slices = problem, dict(step.config.macros), Slices.of(problem)
        return tile_work(
            int(macros["BLOCK_M"]),
            int(macros["BLOCK_N"]),
            step.launch.grid,
            slices.samples * slices.positions,
            p.dtype,
            num_bytes=p.bytes() + slices.partial_bytes(p),
        )

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for bits in (32, 64):
                for tile in _tiles(dtype, bits):
                    yield self._config(tile, dtype, bits)

    def _config(self, tile: Tile, dtype: str, bits: int) -> Config:
        macros = {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_R": tile.block_r,
            "THREAD_M": tile.thread_m,
            "THREAD_N": tile.thread_n,
            "MIN_BLOCKS": tile.min_blocks if bits == 32 else 1,
            "SHARED_BYTES": _shared_bytes(tile, dtype, bits),
        }
        return Config.for_dtype(self.name, dtype, bits, macros)


class _Tiling(NamedTuple):
    """A tile, the tiles along rows and along columns, the blocks of all groups and slices, the predicted time in us."""

    tile: Tile
    row_tiles: int
    column_tiles: int
    blocks: int
    us: float


def _tiles(dtype: str, bits: int) -> tuple[Tile, ...]:
    tiles = TILES[FORMATS[dtype].accumulator_bytes]
    return tiles if bits == 32 else tiles[-1:]  # one tile suffices for arrays that need 64-bit offsets


@lru_cache(maxsize=4096)
def _tilings(p: WeightGradientProblem, device: Device, bits: int) -> tuple[_Tiling, ...]:
    """The cheapest first."""
    slices = Slices.of(p)
    adding = predict_sum(p, slices.count, device).us if slices.count > 1 else 0.0
    found = []
    for tile in _tiles(p.dtype, bits):
        row_tiles, column_tiles = -(-p.C_coarse_g // tile.block_m), -(-p.C_fine_g * p.K // tile.block_n)
        blocks = row_tiles * column_tiles * p.groups * slices.count
        time = predict_tiles(
            tile,
            blocks,
            slices.samples * slices.positions,
            p.dtype,
            device,
            num_bytes=p.bytes() + slices.partial_bytes(p),
            gathers_rows=True,
        )
        found.append(_Tiling(tile, row_tiles, column_tiles, blocks, time.us + adding))
    return tuple(sorted(found, key=lambda tiling: tiling.us))


def _shared_bytes(tile: Tile, dtype: str, bits: int) -> int:
    """Buffers of operands, and an index for each column."""
    padding = max(1, 16 // FORMATS[dtype].accumulator_bytes)
    return tile.shared_bytes(FORMATS[dtype].accumulator_bytes, padding=padding) + tile.block_n * bits // 8


def _index_bits(p: WeightGradientProblem, layout: Layout) -> int:
    # A thread forms addresses of samples and positions behind the last; tiles extend past the last row and column.
    slices = Slices.of(p)
    overhang = slices.overhang(samples=2 + _LOAD_POSITIONS // p.L_coarse, positions=_LARGEST)
    sums = slices.count * math.prod(p.weight_shape)
    terms, columns, rows = slices.samples * p.L_coarse, p.C_fine_g * p.K, p.C_coarse
    return index_bits(p, layout, overhang, sums, *(count + _LARGEST for count in (terms, columns, rows)))
