"""conv1d_im2col and conv_transpose1d_im2col: few input channels a group and long kernels, on tensor cores.

Contracts: cuda_src/conv1d_im2col.cu, cuda_src/conv_transpose1d_im2col.cu.

Operands hold neighbouring taps. conv1d_im2col computes learned filter banks and spectrograms, six of the benchmark's 81
layers (sincnet, attnsleep, STFT, resample, and the stems of Enformer and Tacotron 2); conv_transpose1d_im2col gradients
of layers with few output channels and stride 1 (the profile head of BPNet). With so few input channels the operands of
conv1d_mma, which hold neighbouring channels, would be mostly zeros, and by the cost model CUDA cores would take five to
ten times as long, in float32 up to twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ..costs import MMA_LATENCY_CYCLES, Code, Ending, Work, blocks_by_shared, predict_launch, tensor_cores
from ..device import Device
from ..problem import ConvProblem
from . import mma, mma_packing, mma_window
from .arithmetic import (
    ARITHMETICS,
    MIN_SPLIT_TERMS,
    NO_ARITHMETIC,
    STAGE_PAIRS,
    STAGE_STEPS,
    UNIT_BYTES,
    WARP,
    Arithmetic,
    arithmetics,
)
from .base import (
    MAX_GRID,
    PACKED,
    Config,
    Family,
    Launch,
    Layout,
    Plan,
    Refusal,
    Step,
    conv_arrays,
    conv_fields,
    params_of,
    with_padding_mode,
)
from .mma_tiles import NUM_STAGES, Tile
from .offsets import Overhang, index_bits
from .product import Product

# With more, conv1d_mma fills its operands with channels.
MAX_C_IN_G = mma.MIN_CHANNELS - 1
MIN_C_OUT_G = 8
# A sum of n = C_in_g * K products is formed of C_in_g * ceil(K/4) blocks of at least 4, by which the bound allows for
# n/3: from 8 taps on that is so (9 taps are 3 blocks). Of split TF32, whose bound arithmetic.py derives, the sums that
# are added to a total are at most C_in_g * ceil(K/4) / 4 + 1, which is less than n/10 + 2.
MIN_TAPS = 8
# With fewer, writing the results takes most of the time, and conv1d_stem is as fast.
MIN_TERMS = 32

# Tiles of 80 and 48 rows are for filter banks with these numbers of channels; tiles of few columns are for large
# strides, which have large windows. Split products need three sets of sums, so their tiles are smaller.
_TILES = (
    Tile(128, 128, 2, 2, 2, 4),
    Tile(64, 128, 2, 2, 3, 4),
    Tile(80, 160, 1, 5, 2, 4),
    Tile(48, 128, 1, 4, 4, 4),
    Tile(32, 128, 1, 4, 4, 4),
    Tile(16, 128, 1, 4, 4, 4),
    Tile(128, 64, 4, 1, 3, 4),
    Tile(64, 64, 2, 2, 4, 4),
    Tile(64, 16, 4, 1, 4, 4),
)
_SPLIT_TILES = (
    Tile(128, 128, 2, 4, 1, 2),
    Tile(64, 128, 2, 4, 1, 2),
    Tile(48, 128, 1, 4, 2, 4),
    Tile(32, 128, 1, 4, 3, 4),
    Tile(16, 128, 1, 4, 4, 4),
    Tile(64, 64, 2, 2, 2, 4),
)
MAX_BLOCK_M, MAX_BLOCK_N = 128, 160
# By the bytes of an element: the columns whose window must at least fit in shared memory. With fewer columns in TF32,
# tensor cores wait longer for their operands than CUDA cores take.
MIN_COLUMNS = {2: 16, 4: 64}

# Of the cost model, assumed: cycles until a block's first data arrive and its last are stored, and from a load to its
# data. From the machine code for sm_90: the instructions of a warp for a stage (without its products and loads of
# matrices), for a row of the window of each lane, and for a result of each lane.
_LATENCY_CYCLES = 2500.0
_LOAD_CYCLES = 600.0
_STAGE_CYCLES = 60.0
_STAGE_INSTRUCTIONS = 28.0
_ROW_INSTRUCTIONS = 52.0
_RESULT_INSTRUCTIONS = 10.0


@dataclass(frozen=True, slots=True)
class Window:
    """The layout of a block's input in shared memory, in rows of one unit: see the .cu file.

    Attributes:
        planes: those that whole units share.
        plane_rows: rows of each plane.
        plane_step: positions from plane to plane.
        round_rows: rows from a unit to the next one in its plane.
        last_row: row of the last unit of a channel, where that unit is not whole.
        channel_rows: rows of all planes of a channel.
    """

    planes: int
    plane_rows: int
    plane_step: int
    round_rows: int
    last_row: int
    channel_rows: int

    @classmethod
    def of(cls, problem: ConvProblem, unit: int, block_n: int) -> Window:
        p = problem
        whole, step = p.K // unit, unit * p.dilation
        shared = mma_window.Window.of(replace(Product.of(p), taps=whole, tap_step=step), 1, block_n)
        planes, rows, all_planes, last_row = shared.planes, shared.plane_rows, shared.planes, 0
        if p.K % unit:
            last = (p.K - unit) * p.dilation
            if p.stride == 1 and planes == 1 and last < rows:  # the plane has a row for every position
                rows, last_row = block_n + last, last
            else:
                all_planes, last_row = planes + 1, planes * rows
        return cls(planes, rows, step, shared.tap_rows_step, last_row, all_planes * rows)

    def params(self) -> dict[str, int]:
        """The fields of Params, in order."""
        return {
            "planes": self.planes,
            "plane_rows": self.plane_rows,
            "plane_step": self.plane_step,
            "round_rows": self.round_rows,
            "last_row": self.last_row,
            "channel_rows": self.channel_rows,
            "plane_reciprocal": -(-(2**32) // self.plane_rows),
            "channel_reciprocal": -(-(2**32) // self.channel_rows),
        }


@dataclass(frozen=True, slots=True)
class Tiling:
    """A layer cut into tiles.

    Attributes:
        us: predicted microseconds of the launch.
    """

    tile: Tile
    window: Window
    row_tiles: int
    column_tiles: int
    blocks: int
    shared_bytes: int
    us: float


def pairs_of(problem: ConvProblem, arithmetic: Arithmetic) -> int:
    """(unit, channel) pairs of a sum, filled up to whole stages."""
    pairs = -(-problem.K // arithmetic.channels) * problem.C_in_g
    return -(-pairs // STAGE_PAIRS) * STAGE_PAIRS


def tiles(arithmetic: Arithmetic, bits: int = 32) -> tuple[Tile, ...]:
    """The tiles of an arithmetic; with 64-bit offsets only small ones, since such large arrays fill any tile."""
    found = _SPLIT_TILES if arithmetic.parts == 2 else _TILES
    return found if bits == 32 else tuple(tile for tile in found if tile.block_m == 64 and tile.block_n <= 64)


def _shared_bytes(problem: ConvProblem, tile: Tile, window: Window, arithmetic: Arithmetic) -> int:
    stages = NUM_STAGES * tile.stage_bytes(arithmetic.parts)
    rows = arithmetic.parts * problem.C_in_g * window.channel_rows * UNIT_BYTES
    return max(stages + rows + pairs_of(problem, arithmetic) * 4, tile.slice_bytes(problem.itemsize))


@lru_cache(maxsize=1024)
def compare_tilings(problem: ConvProblem, bits: int, device: Device) -> tuple[Tiling, ...]:
    """The tilings of a layer that fit the device, the cheapest first."""
    p, arithmetic = problem, ARITHMETICS[problem.dtype, problem.precision]
    found = []
    for tile in tiles(arithmetic, bits):
        window = Window.of(p, arithmetic.channels, tile.block_n)
        needed = _shared_bytes(p, tile, window, arithmetic)
        row_tiles, column_tiles = -(-p.C_out_g // tile.block_m), -(-p.L_out // tile.block_n)
        blocks = row_tiles * column_tiles * p.N * p.groups
        if needed <= device.shared_per_block and blocks <= MAX_GRID:
            us = _predict(p, tile, window, arithmetic, blocks, needed, device)
            found.append(Tiling(tile, window, row_tiles, column_tiles, blocks, needed, us))
    return tuple(sorted(found, key=lambda tiling: tiling.us))


def _work(
    problem: ConvProblem, arithmetic: Arithmetic, *, blocks: int, block_m: int, block_n: int, rows: int, waits: float
) -> Work:
    """What a launch does; `rows` are those of a block's window."""
    p, a = problem, arithmetic
    pairs, results = pairs_of(p, a), blocks * block_m * block_n
    return Work(
        multiply_adds=results * pairs * a.channels * a.products,
        l2_bytes=blocks * (pairs * a.parts * block_m + rows) * UNIT_BYTES + p.bytes(),
        load_share=0.25,
        staging_instructions=blocks * rows / WARP * _ROW_INSTRUCTIONS,
        # A lane loads the elements of a row one by one and stores 16 bytes of each part.
        staging_wavefronts=blocks * rows / WARP * (a.channels + 4 * a.parts),
        dram_bytes=p.bytes(),
        waits=waits,
        ending=Ending(
            results / WARP * _RESULT_INSTRUCTIONS, 2 * results / WARP, math.prod(p.output_shape) * p.itemsize
        ),
    )


def _predict(
    problem: ConvProblem, tile: Tile, window: Window, arithmetic: Arithmetic, blocks: int, shared: int, device: Device
) -> float:
    """Predicted microseconds of a launch."""
    p, a = problem, arithmetic
    pairs, rows = pairs_of(p, a), p.C_in_g * window.channel_rows
    stages = pairs // STAGE_PAIRS
    waits = _LATENCY_CYCLES + -(-rows // (tile.threads * tile.prefetch)) * _LOAD_CYCLES
    work = _work(p, a, blocks=blocks, block_m=tile.block_m, block_n=tile.block_n, rows=rows, waits=waits)
    passes = blocks * tile.warps * stages
    tiles_m, tiles_n = tile.block_m // tile.warps_m // 16, tile.block_n // tile.warps_n // 8
    fetches = STAGE_STEPS * a.parts * (tiles_m + tiles_n / 2)  # of four matrices
    products = STAGE_STEPS * tiles_m * tiles_n * a.products
    sums = 4 * tiles_m * tiles_n if a.parts == 2 else 0
    code = Code(
        passes * (products + fetches + sums + _STAGE_INSTRUCTIONS) + work.staging_instructions,
        passes * 4 * (fetches + 2) + work.staging_wavefronts,
        stages * (_STAGE_CYCLES + MMA_LATENCY_CYCLES * STAGE_STEPS),
    )
    resident = min(tile.min_blocks, max(1, blocks_by_shared(shared, device)))
    unit = tensor_cores(device, p.itemsize)
    return predict_launch(work, code, blocks=blocks, resident=resident, unit=unit, device=device).us


class _ConvIm2col(Family[ConvProblem]):
    """Tensor-core tiles over c_out by l_out; the reduction runs over neighbouring taps."""

    canonical_order = False
    keeps_lengths = True

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        arithmetic = arithmetics(device).get((p.dtype, p.precision))
        if arithmetic is None:
            return Refusal(NO_ARITHMETIC)
        is_split = arithmetic.parts == 2
        min_rows, min_terms = (mma.MIN_SPLIT_ROWS, MIN_SPLIT_TERMS) if is_split else (MIN_C_OUT_G, MIN_TERMS)
        if p.transposed and p.stride > 1:
            return Refusal("needs stride 1")
        if not 1 <= p.C_in_g <= MAX_C_IN_G:
            return Refusal(f"needs C_in/groups from 1 to {MAX_C_IN_G}")
        if p.C_out_g < min_rows:
            return Refusal(f"needs C_out/groups >= {min_rows}")
        if p.K < MIN_TAPS or p.terms < min_terms:
            return Refusal(f"needs K >= {MIN_TAPS} and C_in/groups * K >= {min_terms}")
        columns = MIN_COLUMNS[p.itemsize]
        smallest = next(tile for tile in tiles(arithmetic, 64) if tile.block_n == columns)
        window = Window.of(p, arithmetic.channels, columns)
        if _shared_bytes(p, smallest, window, arithmetic) > device.shared_per_block:
            return Refusal(f"needs the window of {columns} positions in shared memory")
        bits = _index_bits(p, layout, arithmetic)
        tilings = compare_tilings(p, bits, device)
        if not tilings:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        return self._plan(p, layout, device, bits, arithmetic, tilings)

    def _plan(
        self,
        problem: ConvProblem,
        layout: Layout,
        device: Device,
        bits: int,
        arithmetic: Arithmetic,
        tilings: tuple[Tiling, ...],
    ) -> Plan:
        p, tiling = problem, tilings[0]
        pairs = pairs_of(p, arithmetic)
        own = {
            "row_tiles": tiling.row_tiles,
            "column_tiles": tiling.column_tiles,
            "pairs": pairs,
            **tiling.window.params(),
        }
        params = params_of(self.name, conv_fields(p, layout), own)
        launch = Launch(tiling.blocks, tiling.tile.threads, tiling.shared_bytes, bits, params)
        config = with_padding_mode(self._config(p.dtype, p.precision, tiling.tile, bits, device), p.padding_mode)
        pack, packed_bytes = mma_packing.pack_taps(
            p, layout, row_tiles=tiling.row_tiles, block_rows=tiling.tile.block_m, pairs=pairs
        )
        return Plan(
            (pack, Step(config, launch, conv_arrays(p, PACKED))),
            ((PACKED, packed_bytes),),
            tuple((f"{t.tile.block_m}x{t.tile.block_n}", t.us) for t in tilings),
        )

    def configs(self, device: Device) -> Iterator[Config]:
        for (dtype, precision), arithmetic in arithmetics(device).items():
            for bits in (32, 64):
                for tile in tiles(arithmetic, bits):
                    yield self._config(dtype, precision, tile, bits, device)
                yield mma_packing.config("pack_im2col_weight", dtype, precision, bits, IN_CHUNKS=0)

    def _config(self, dtype: str, precision: str, tile: Tile, bits: int, device: Device) -> Config:
        return mma.kernel_config(self.name, dtype, precision, tile, bits, device, phases_in_rows=False, segment_mode=0)

    def work(self, problem: ConvProblem, step: Step) -> Work:
        p, params, macros = problem, dict(step.launch.params), dict(step.config.macros)
        return _work(
            p,
            ARITHMETICS[p.dtype, p.precision],
            blocks=step.launch.grid,
            block_m=int(macros["BLOCK_M"]),
            block_n=int(macros["BLOCK_N"]),
            rows=p.C_in_g * params["channel_rows"],
            waits=_LATENCY_CYCLES,
        )


class Conv1dIm2col(_ConvIm2col):
    """The convolution."""

    name = "conv1d_im2col"
    kind = "conv1d"
    maps_edges = True


class ConvTranspose1dIm2col(_ConvIm2col):
    """The transposed convolution of stride 1, a convolution with its taps in reverse."""

    name = "conv_transpose1d_im2col"
    kind = "conv_transpose1d"


def _index_bits(problem: ConvProblem, layout: Layout, arithmetic: Arithmetic) -> int:
    p = problem
    # Tiles extend past the last position and channel. A window holds whole units of taps, so it extends past the last
    # tap.
    overhang = Overhang(rows=MAX_BLOCK_M, positions=MAX_BLOCK_N, taps=p.K + arithmetic.channels, arrays=("output",))
    blocks = (p.L_out + MAX_BLOCK_N) * p.N * p.groups
    vectors = pairs_of(p, arithmetic) * (p.C_out_g + MAX_BLOCK_M) * p.groups * arithmetic.parts
    return index_bits(p, layout, overhang, blocks, vectors)
