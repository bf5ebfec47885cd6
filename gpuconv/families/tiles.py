"""The register tiles of cuda_src/tiled.cuh: their shapes, and the cost model that chooses among them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from ..costs import (
    FMA_LATENCY_CYCLES,
    LOAD_LATENCY_CYCLES,
    RESERVED_SHARED_BYTES,
    Code,
    Ending,
    Prediction,
    Work,
    cuda_cores,
    predict_launch,
)
from ..device import Device
from ..problem import FORMATS, ConvProblem
from .base import (
    PACKED,
    Config,
    Launch,
    Layout,
    Plan,
    Step,
    base_config,
    conv_arrays,
    conv_fields,
    params_of,
    round_up,
)
from .offsets import index_bits
from .product import Product
from .weight_boxes import WeightBoxes

WARP = 32
PACK_BLOCK_SIZE = 256
# The fewest threads that load a term: with 4 bytes each, they read a whole sector of 32 bytes.
MIN_TERM_LANES = 8
MAX_WIDE_BLOCK_N = 128  # with 64-bit indices


@dataclass(frozen=True, slots=True)
class Tile:
    """A block's share of the matrix product: block_m rows by block_n columns in chunks of block_r terms.

    Attributes:
        thread_m, thread_n: rows and columns that one thread holds in registers.
        min_blocks: blocks that a multiprocessor must be able to hold, which caps the registers of a thread.
    """

    block_m: int
    block_n: int
    block_r: int
    thread_m: int
    thread_n: int
    min_blocks: int

    @property
    def lanes_m(self) -> int:
        return WARP // (self.block_n // self.thread_n)

    @property
    def warps(self) -> int:
        return self.block_m // (self.lanes_m * self.thread_m)

    @property
    def threads(self) -> int:
        return WARP * self.warps

    def term_lanes(self, column_step: int) -> int:
        """Threads that load one term of a chunk.

        With columns of one sample a thread needs one address, so few threads share a term and each loads one term of a
        chunk. Other columns need an address each, so a whole warp shares a term.
        """
        return max(MIN_TERM_LANES, self.threads // self.block_r) if column_step else WARP

    def unroll(self, dtype: str, bits: int) -> int:
        """Terms that are multiplied in straight-line code.

        They have about 512 multiply-adds, which fit in the innermost instruction cache; in kernels with 64-bit indices
        half as many, since their other code takes long to compile.
        """
        multiply_adds = self.thread_m * self.thread_n * FORMATS[dtype].multiply_adds
        return min(self.block_r, (512 if bits == 32 else 256) // multiply_adds)

    def shared_bytes(self, accumulator_bytes: int, padding: int = 0) -> int:
        """Shared memory: two buffers of a chunk, or the slices through which results pass at the end.

        `padding` is the number of unused operands after those of the rows, and of the columns, of one term.
        """
        vec = max(1, 16 // accumulator_bytes)
        buffers = 2 * self.block_r * (self.block_m + self.block_n + 2 * padding)
        slices = self.warps * self.lanes_m * vec * self.block_n
        return max(buffers, slices) * accumulator_bytes


# Shapes by the size of the accumulator. A thread with 8 by 8 float32 results needs 4 vector loads for 64 multiply-adds.
# Its sums take 64 registers, of the 128 with which two blocks of 256 threads fit.
TILES: dict[int, tuple[Tile, ...]] = {
    4: (Tile(128, 128, 16, 8, 8, 2), Tile(64, 64, 8, 8, 8, 8), Tile(32, 256, 8, 8, 8, 3), Tile(32, 64, 8, 4, 8, 8)),
    8: (Tile(64, 64, 8, 4, 8, 3), Tile(16, 128, 8, 4, 8, 6)),
    16: (Tile(32, 64, 8, 4, 4, 2), Tile(8, 64, 8, 4, 4, 8)),
}


def tiles_for(dtype: str, bits: int) -> tuple[Tile, ...]:
    """The tiles that have kernels with indices of `bits` bits; 64-bit addresses take too much code in wide ones."""
    tiles = TILES[FORMATS[dtype].accumulator_bytes]
    return tiles if bits == 32 else tuple(tile for tile in tiles if tile.block_n <= MAX_WIDE_BLOCK_N)


# The largest extents of all tiles, which bound how far kernels go past the last row, column and term.
MAX_BLOCK_M = max(tile.block_m for tiles in TILES.values() for tile in tiles)
MAX_BLOCK_N = max(tile.block_n for tiles in TILES.values() for tile in tiles)
MAX_BLOCK_R = max(tile.block_r for tiles in TILES.values() for tile in tiles)

# Of the cost model, assumed: cycles until a block's first data arrive and its last are stored; cycles of a thread that
# packs an element.
_LATENCY_CYCLES = 1500.0
_PACK_CYCLES = 1500.0
_PACK_INSTRUCTIONS = 40  # of a thread for an element
_ENDING_INSTRUCTIONS = 4  # of a result, an assumption
# Instructions of a thread, from the machine code for sm_90: to load an input of regular and of irregular columns (the
# copy, the check that it exists, and for irregular columns an address); more for 16-bit data, which pass through a
# register; and those of each chunk besides loads and multiply-adds, 34 to 48.
_INPUT_INSTRUCTIONS = (3, 6)
_CONVERSION_INSTRUCTIONS = 3
_CHUNK_INSTRUCTIONS = 40
# Operands that are loaded one by one, where a warp loads eight neighbours of four rows: instructions of each operand
# and of a chunk (bench.static, sm_90), and the wavefronts of a warp's load, one a cycle. Then the wavefronts of loading
# a vector from shared memory.
_GATHER_INSTRUCTIONS = 2.5
_GATHER_CHUNK_INSTRUCTIONS = 60
_GATHER_WAVEFRONTS = 4.0
_FETCH_WAVEFRONTS = 2.0


def _term_code(tile: Tile, dtype: str, column_step: int, gathers_rows: bool) -> tuple[float, float]:
    """Instructions and wavefronts of a warp that adds one term to its sums."""
    size = FORMATS[dtype].accumulator_bytes
    vec = max(1, 16 // size)
    fetches = (tile.thread_m + tile.thread_n) / vec
    instructions = tile.thread_m * tile.thread_n * FORMATS[dtype].multiply_adds + fetches
    wavefronts = _FETCH_WAVEFRONTS * fetches
    if gathers_rows:
        loads = (tile.block_m + tile.block_n) / tile.threads
        instructions += _GATHER_INSTRUCTIONS * loads + _GATHER_CHUNK_INSTRUCTIONS / tile.block_r
        return instructions, wavefronts + _GATHER_WAVEFRONTS * loads
    conversion = _CONVERSION_INSTRUCTIONS if FORMATS[dtype].itemsize == 2 else 0
    loads = (tile.block_m / vec + tile.block_n * (_INPUT_INSTRUCTIONS[column_step == 0] + conversion)) / tile.threads
    wavefronts += (4 * tile.block_m / vec + 2 * tile.block_n) / tile.threads
    return instructions + loads + _CHUNK_INSTRUCTIONS / tile.block_r, wavefronts


def predict_tiles(
    tile: Tile,
    blocks: int,
    terms: int,
    dtype: str,
    device: Device,
    *,
    num_bytes: int,
    taps: int = 1,
    column_step: int = 1,
    gathers_rows: bool = False,
) -> Prediction:
    """The time of a launch of `blocks` tiles that sum `terms` products each.

    Args:
        tile: the tile of every block.
        blocks: blocks of the launch.
        terms: terms of a sum.
        dtype: dtype of the data.
        device: the GPU.
        num_bytes: bytes of the operands and the result.
        taps: neighbouring terms that read overlapping columns.
        column_step: see compare_tilings.
        gathers_rows: whether the operands of rows are loaded one by one, not in vectors, as for weight gradients.
    """
    work = tile_work(tile.block_m, tile.block_n, blocks, terms, dtype, num_bytes=num_bytes, taps=taps)
    instructions, wavefronts = _term_code(tile, dtype, column_step, gathers_rows)
    warp_terms = blocks * tile.warps * terms
    chain = -(-terms // tile.block_r) * (LOAD_LATENCY_CYCLES + FMA_LATENCY_CYCLES * tile.block_r)
    shared = tile.shared_bytes(FORMATS[dtype].accumulator_bytes) + RESERVED_SHARED_BYTES
    return predict_launch(
        work,
        Code(warp_terms * instructions, warp_terms * wavefronts, chain),
        blocks=blocks,
        resident=min(tile.min_blocks, max(1, device.shared_per_sm // shared)),
        unit=cuda_cores(device, FORMATS[dtype].accumulator_bytes, is_complex=FORMATS[dtype].is_complex),
        device=device,
    )


def tile_work(
    block_m: int, block_n: int, blocks: int, terms: int, dtype: str, *, num_bytes: int, taps: int = 1
) -> Work:
    """What a launch of tiles does; the arguments are those of `predict_tiles`."""
    held = blocks * block_m * block_n
    operands = block_m * FORMATS[dtype].accumulator_bytes + block_n * FORMATS[dtype].itemsize / taps
    stored = held * FORMATS[dtype].itemsize
    return Work(
        multiply_adds=held * terms * FORMATS[dtype].multiply_adds,
        l2_bytes=blocks * terms * operands + stored,
        dram_bytes=max(num_bytes, stored),
        waits=_LATENCY_CYCLES,
        ending=Ending(held / WARP * _ENDING_INSTRUCTIONS, 2 * held / WARP, stored),
    )


@dataclass(frozen=True, slots=True)
class Tiling:
    """A product of rows by columns cut into tiles.

    Attributes:
        column_step: COLUMN_STEP of tiled.cuh, 0 where columns run through the samples.
        column_tiles: tiles along the columns of one sample, or of all samples where column_step is 0.
        blocks: tiles of all groups and samples.
        us: predicted microseconds of the whole plan.
    """

    tile: Tile
    column_step: int
    row_tiles: int
    column_tiles: int
    blocks: int
    us: float


@lru_cache(maxsize=4096)
def compare_tilings(
    product: Product,
    *,
    column_step: int,
    bits: int,
    device: Device,
) -> tuple[Tiling, ...]:
    """The tilings of a product, the cheapest first.

    `column_step` is the step from one column's input to the next, or 0 where columns are not regular; `bits` is the
    width of an index.
    """
    q, p = product, product.problem
    candidates = []
    for tile in tiles_for(p.dtype, bits):
        row_tiles = -(-q.rows // tile.block_m)
        packed = PackedWeight.of(tile, q.products, q.terms, q.rows)
        packing = _predict_packing(p, packed.num_elements, device).us
        for step in sorted({column_step, 0}, reverse=True):
            all_columns = q.positions if step else p.N * q.positions
            column_tiles = -(-all_columns // tile.block_n)
            blocks = row_tiles * column_tiles * q.products * (p.N if step else 1)
            found = predict_tiles(
                tile, blocks, q.terms, p.dtype, device, num_bytes=p.bytes(), taps=q.taps, column_step=step
            )
            candidates.append(Tiling(tile, step, row_tiles, column_tiles, blocks, packing + found.us))
    return tuple(sorted(candidates, key=lambda tiling: tiling.us))


def _predict_packing(p: ConvProblem, elements: int, device: Device) -> Prediction:
    """The launch of pack_weight. Every weight is read once, in whole sectors."""
    read, written = math.prod(p.weight_shape) * p.itemsize, elements * p.format.accumulator_bytes
    work = Work(0.0, read + written, dram_bytes=read + written)
    code = Code(elements / WARP * _PACK_INSTRUCTIONS, elements / WARP * 4, _PACK_CYCLES)
    blocks = -(-elements // PACK_BLOCK_SIZE)
    return predict_launch(work, code, blocks=blocks, resident=5, unit=cuda_cores(device, 4), device=device)


def predict_pass(problem: ConvProblem, step: Step, device: Device) -> Prediction:
    """The time of the step that packs the weights."""
    params = dict(step.launch.params)
    products = step.launch.grid // math.prod(params[f"{name}_parts"] for name in ("out", "phase", "in", "tap"))
    elements = products * math.prod(params[name] for name in ("row_tiles", "block_rows", "padded_terms"))
    return _predict_packing(problem, elements, device)


def tiling_macros(tile: Tile, column_step: int, dtype: str, bits: int) -> dict[str, str | int]:
    """The macros that tiled.cuh reads."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_R": tile.block_r,
        "THREAD_M": tile.thread_m,
        "THREAD_N": tile.thread_n,
        # 64-bit offsets take registers that only a lower occupancy has.
        "MIN_BLOCKS": tile.min_blocks if bits == 32 else 1,
        "COLUMN_STEP": column_step,
        "TERM_LANES": tile.term_lanes(column_step),
        "UNROLL_R": tile.unroll(dtype, bits),
        "SHARED_BYTES": tile.shared_bytes(FORMATS[dtype].accumulator_bytes),
    }


def walk_params(tiling: Tiling, taps: int, channel_stride: int, tap_stride: int) -> dict[str, int]:
    """The fields of Params that advance a thread's input offset: see Tile in tiled.cuh.

    The strides are those from one channel and from one tap to the next.
    """
    tile = tiling.tile
    channels, rest = divmod(tile.threads // tile.term_lanes(tiling.column_step), taps)
    return {
        "taps_advance": rest,
        "input_advance": channels * channel_stride + rest * tap_stride,
        "input_carry": channel_stride - taps * tap_stride,
    }


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """The shape of packed weights: (products, row_tiles, padded_terms, block_rows), see pack_weight.cu."""

    products: int
    row_tiles: int
    padded_terms: int
    block_rows: int

    @classmethod
    def of(cls, tile: Tile, products: int, terms: int, rows: int) -> PackedWeight:
        return cls(products, -(-rows // tile.block_m), round_up(terms, tile.block_r), tile.block_m)

    @staticmethod
    def most_elements(products: int, terms: int, rows: int) -> int:
        """An upper bound over all tiles."""
        return products * (terms + MAX_BLOCK_R) * (rows + MAX_BLOCK_M)

    @property
    def num_elements(self) -> int:
        return self.products * self.row_tiles * self.stride_tile

    @property
    def stride_tile(self) -> int:
        """Elements from one block of rows to the next."""
        return self.padded_terms * self.block_rows


def packed_plan(
    product: Product,
    layout: Layout,
    packed: PackedWeight,
    tilings: tuple[Tiling, ...],
    config: Config,
    launch: Launch,
) -> Plan:
    """pack_weight, then the tiled kernel with its configuration and launch."""
    p = product.problem
    # The channels and taps of a row are neighbours in memory: a box has as many channels as fit, in multiples of eight
    # if possible.
    channels = -(-packed.padded_terms // product.taps)
    fitting = WeightBoxes.max_terms(product) // product.taps
    boxes = WeightBoxes.of(
        product,
        rows=packed.row_tiles * packed.block_rows,
        channels=channels,
        taps=product.taps,
        box_channels=min(channels, fitting // 8 * 8 or max(1, fitting)),
    )
    params = params_of(
        "pack_weight",
        conv_fields(p, layout),
        {
            "padded_terms": packed.padded_terms,
            "block_rows": packed.block_rows,
            "row_tiles": packed.row_tiles,
            "taps": product.taps,
            **boxes.params(layout),
        },
    )
    values = (abs(value) for _, value in params)
    bits = index_bits(p, layout, boxes.overhang, packed.num_elements + boxes.channels * product.taps, *values)
    pack = pack_config(p.dtype, bits, transposed=p.transposed, phases_in_rows=product.phases_in_rows)
    pack_launch = Launch(boxes.grid, PACK_BLOCK_SIZE, boxes.shared_bytes, bits, params)
    candidates = tuple(
        (f"{t.tile.block_m}x{t.tile.block_n}{'' if t.column_step else ' through samples'}", t.us) for t in tilings
    )
    return Plan(
        (Step(pack, pack_launch, ("weight", PACKED)), Step(config, launch, conv_arrays(p, PACKED))),
        ((PACKED, packed.num_elements * p.format.accumulator_bytes),),
        candidates,
    )


def pack_config(dtype: str, bits: int, *, transposed: bool, phases_in_rows: bool) -> Config:
    base = base_config("pack_weight", dtype, bits, PACK_BLOCK_SIZE)
    macros = {"IS_TRANSPOSED": int(transposed), "PHASES_IN_ROWS": int(phases_in_rows)}
    return Config.of(base.kernel, {**dict(base.macros), **macros})
