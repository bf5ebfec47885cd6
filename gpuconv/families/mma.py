"""The tensor-core engine of cuda_src/mma.cuh: which layers it takes, the order of summation, tiles, staged windows.

Which layers run on tensor cores, and in which order they are summed, follows from the layer and the architecture alone;
N and the lengths decide only how the work is cut into tiles, which changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product as iterate_product

from ..costs import blocks_by_shared
from ..device import Device
from ..problem import ConvProblem
from ..source import params_fields
from .arithmetic import (
    ARITHMETICS,
    MIN_SPLIT_TERMS,
    NO_ARITHMETIC,
    SPLIT_TERMS,
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
    PARTIAL,
    Config,
    Launch,
    Layout,
    Plan,
    Step,
    contiguous_strides,
    conv_arrays,
    conv_fields,
    params_of,
    round_up,
    with_padding_mode,
)
from .mma_costs import TilesLaunch, input_batches, predict_plan
from .offsets import index_bits
from .product import Product
from .weight_boxes import WeightBoxes

NUM_STAGES = 4  # of weights in shared memory, a power of two
RAW_BOXES = 2  # of a layer's own weights there: kBoxes of raw_weights.cuh
PACK_BLOCK_SIZE = 128
SLICE_TABLE_BYTES = 48  # of a row of Slice in mma.cuh, besides its elements, at most
BANK_ROWS = 8  # of 16 bytes, in all banks of shared memory

# Layers with fewer channels than a unit of 16-bit elements are handled by the families for stems and tails.
MIN_CHANNELS = 8
MIN_ROWS = 8
# Half a fragment of 16 rows stays empty below this: three products for one then cost more than fused multiply-adds.
MIN_SPLIT_ROWS = 16
# Layers with so few output channels read more than they multiply, and the tail families serve them: unless so many
# weights meet each input, as in transposed ones, whose rows are many because the stride is.
MAX_TAIL_CHANNELS = 4
MIN_TAIL_WEIGHTS = 64
# Units of a chunk at most: with 8 rows of each fragment side by side, four units are two k-steps for every tap.
MAX_UNITS = 4
# Of the windows of 16 positions, which the shared memory of sm_90 holds beside weights and tables. Where they would
# take more, as with a stride of hundreds, chunks have fewer units.
MAX_WINDOW_BYTES = 184 * 1024
# Reductions of so many terms are cut into segments. Where the rest of the problem does not fill the GPU, blocks of
# their own sum the segments, in larger tiles than it would have blocks for otherwise: by the cost model this saves 5 to
# 20 % of layers with one block for a multiprocessor, and up to 80 % with few. Where the rest does fill it, a block adds
# the sums of its segments in shared memory, for 2 to 5 % of its time. Neither costs accuracy: a product takes part in
# the sums of its segment alone, and in at most MAX_SEGMENTS more.
MIN_SEGMENTED_TERMS = 4096
SEGMENT_STAGES = 64
MIN_SEGMENTS, MAX_SEGMENTS = 4, 32


@dataclass(frozen=True, slots=True)
class Tile:
    """A block's share of the product: block_m rows by block_n columns on warps_m by warps_n warps.

    Attributes:
        min_blocks: blocks that a multiprocessor must be able to hold, which caps the registers of a thread.
        prefetch: vectors of input that a thread has on their way at a time: of so many units, or of half
            as many at two positions.
        has_samples: a block may take the positions of several samples, at the cost of an address for each fragment.
        segment_mode: SEGMENT_MODE of mma.cuh; 2 stands for both launches.
    """

    block_m: int
    block_n: int
    warps_m: int
    warps_n: int
    min_blocks: int
    prefetch: int
    has_samples: bool = False
    segment_mode: int = 0

    @property
    def warps(self) -> int:
        return self.warps_m * self.warps_n

    @property
    def threads(self) -> int:
        return WARP * self.warps

    def slice_bytes(self, itemsize: int) -> int:
        """Shared memory through which results pass in the end."""
        rows = 32 if self.block_m // self.warps_m % 32 == 0 else 16
        return self.warps * rows * ((self.block_n // self.warps_n + 8) * itemsize + SLICE_TABLE_BYTES)

    @property
    def packs_weights(self) -> bool:
        """Whether there are kernels in which blocks pack the weights themselves.

        By the cost model that serves layers of few columns, whose weights are most of what is read, and small ones,
        which take hardly longer than another launch.
        """
        extents = self.block_m, self.block_n
        if self.segment_mode == 1:
            return self.has_samples
        return (self.has_samples and extents == (64, 64)) or (
            not self.has_samples and extents in _RAW_TILES[self.segment_mode]
        )

    @property
    def total_bytes(self) -> int:
        """Shared memory for the sums of the segments before."""
        return self.block_m * self.block_n * 4 if self.segment_mode == 1 else 0

    def stage_bytes(self, parts: int) -> int:
        return STAGE_PAIRS * parts * self.block_m * UNIT_BYTES


# The wide tile of 128x256 halves the weights that come through L2, which otherwise limits 16-bit layers of few taps.
# Warp tiles of 64x64 need 62 % of the bandwidth of shared memory at the rate of mma.sync in 16 bits; of 64x32, 92 %.
# The three sets of sums of a split product leave registers for 64x32. Tiles of 48 rows are for groups of 48 channels;
# those of 16 columns for streams, where weights are nearly all that is read.
_TILES = (
    Tile(128, 128, 2, 2, 2, 4),
    Tile(128, 256, 2, 4, 1, 4),
    Tile(64, 128, 2, 2, 3, 4),
    Tile(64, 64, 2, 2, 4, 4),
    Tile(32, 256, 1, 4, 3, 4),
    Tile(48, 128, 1, 4, 3, 4),
    Tile(32, 64, 1, 4, 4, 4),
    Tile(16, 128, 1, 4, 4, 4),
    Tile(128, 128, 2, 2, 2, 4, has_samples=True),
    Tile(64, 64, 2, 2, 4, 4, has_samples=True),
    Tile(128, 16, 4, 1, 3, 2),
)
_SPLIT_TILES = (
    Tile(128, 128, 2, 4, 1, 2),
    Tile(64, 128, 2, 2, 2, 2),
    Tile(64, 64, 2, 2, 2, 4),
    Tile(32, 128, 1, 4, 3, 4),
    Tile(48, 128, 1, 4, 2, 4),
    Tile(32, 64, 1, 4, 4, 4),
    Tile(16, 128, 1, 4, 4, 4),
    Tile(128, 128, 2, 4, 1, 2, has_samples=True),
    Tile(64, 64, 2, 2, 2, 4, has_samples=True),
    Tile(128, 16, 4, 1, 3, 2),
)
# Those of which there are kernels that pack the weights themselves, besides some of several samples; by segment_mode.
_RAW_TILES = {
    0: ((128, 128), (64, 128), (32, 256), (32, 128), (16, 128), (128, 16)),
    2: ((128, 128), (64, 64), (64, 16)),
}
# For reductions in segments: a block has shared memory for the sums of the segments before, or sums one segment.
_SEGMENT_TILES = (
    Tile(128, 128, 2, 2, 2, 4, segment_mode=1),
    Tile(128, 256, 2, 4, 1, 4, segment_mode=1),
    Tile(64, 128, 2, 2, 2, 4, segment_mode=1),
    Tile(64, 64, 2, 2, 4, 4, segment_mode=1),
    Tile(32, 256, 1, 4, 2, 4, segment_mode=1),
    Tile(48, 128, 1, 4, 3, 4, segment_mode=1),
    Tile(64, 64, 2, 2, 4, 4, has_samples=True, segment_mode=1),
    Tile(128, 128, 2, 2, 2, 4, segment_mode=2),
    Tile(64, 64, 2, 2, 4, 4, segment_mode=2),
    Tile(64, 16, 4, 1, 4, 2, segment_mode=2),
    Tile(128, 16, 4, 1, 3, 2, segment_mode=1),
    Tile(64, 16, 4, 1, 4, 2, segment_mode=1),
)
_SPLIT_SEGMENT_TILES = (
    Tile(128, 128, 2, 4, 1, 1, segment_mode=1),
    Tile(64, 128, 2, 2, 2, 1, segment_mode=1),
    Tile(64, 64, 2, 2, 2, 4, segment_mode=1),
    Tile(48, 128, 1, 4, 2, 4, segment_mode=1),
    Tile(32, 128, 1, 4, 3, 4, segment_mode=1),
    Tile(64, 64, 2, 2, 2, 4, has_samples=True, segment_mode=1),
    Tile(128, 128, 2, 4, 1, 1, segment_mode=2),
    Tile(64, 64, 2, 2, 2, 4, segment_mode=2),
    Tile(64, 16, 4, 1, 4, 2, segment_mode=2),
    Tile(128, 16, 4, 1, 3, 2, segment_mode=1),
)
# The most bytes of partial sums. Segments get blocks of their own only in problems that are small otherwise.
MAX_PARTIAL_BYTES = 64 * 2**20
MAX_BLOCK_N = 256
MAX_BLOCK_M = 128


def tiles(arithmetic: Arithmetic, bits: int = 32, *, segments: bool = False) -> tuple[Tile, ...]:
    """The tiles of an arithmetic; few for 64-bit offsets, since arrays that need them fill any of the same kind."""
    whole, cut = (_SPLIT_TILES, _SPLIT_SEGMENT_TILES) if arithmetic.parts == 2 else (_TILES, _SEGMENT_TILES)
    every: tuple[Tile, ...] = cut if segments else whole
    if bits == 32:
        return every
    return tuple(t for t in every if t.segment_mode < 2 and t.block_n in (16, 64))


def refuse_layer(problem: ConvProblem, rows: int, device: Device) -> str | None:
    """Why tensor cores do not take a layer, by the layer and the architecture alone; `rows` of its product."""
    p = problem
    arithmetic = arithmetics(device).get((p.dtype, p.precision))
    if arithmetic is None:
        return NO_ARITHMETIC
    if p.C_in_g < MIN_CHANNELS:
        return f"needs C_in/groups >= {MIN_CHANNELS}"
    if p.C_out_g <= MAX_TAIL_CHANNELS and p.C_out_g * p.K < MIN_TAIL_WEIGHTS:
        return f"needs C_out/groups > {MAX_TAIL_CHANNELS} or C_out/groups * K >= {MIN_TAIL_WEIGHTS}"
    is_split = arithmetic.parts == 2
    if rows < (MIN_SPLIT_ROWS if is_split else MIN_ROWS):
        return f"needs C_out/groups (times stride for phases) >= {MIN_SPLIT_ROWS if is_split else MIN_ROWS}"
    if is_split and p.terms < MIN_SPLIT_TERMS:
        return f"needs C_in/groups * taps >= {MIN_SPLIT_TERMS} for float32 by split TF32"
    return None


@dataclass(frozen=True, slots=True)
class Reduction:
    """The order of summation of a layer.

    Attributes:
        units: of 16 bytes of channels, in a chunk.
        chunks: of the channels of a group.
        taps: of the product.
        segment_chunks: chunks of a segment, whose sums are formed by themselves.
    """

    units: int
    chunks: int
    taps: int
    segment_chunks: int

    @classmethod
    def of(cls, product: Product, arithmetic: Arithmetic) -> Reduction:
        taps, all_units = product.taps, -(-product.problem.C_in_g // arithmetic.channels)
        unit_bytes = arithmetic.parts * Window.of(product, 1, 16).rows * UNIT_BYTES
        for most in range(MAX_UNITS, 0, -1):
            chunks = -(-all_units // most)
            units = -(-all_units // chunks)
            if min(chunks, 2) * units * unit_bytes <= MAX_WINDOW_BYTES:
                break
        stages = chunks * -(-taps * units // STAGE_PAIRS)
        is_long = stages * STAGE_PAIRS * arithmetic.channels >= MIN_SEGMENTED_TERMS
        segments = min(max(stages // SEGMENT_STAGES, MIN_SEGMENTS), MAX_SEGMENTS) if is_long else 1
        return cls(units, chunks, taps, -(-chunks // segments))

    @property
    def pairs(self) -> int:
        """(tap, unit) pairs of a chunk, filled up to whole stages."""
        return self.stages * STAGE_PAIRS

    @property
    def stages(self) -> int:
        """Of a chunk."""
        return -(-self.taps * self.units // STAGE_PAIRS)

    @property
    def segments(self) -> int:
        return -(-self.chunks // self.segment_chunks)


@dataclass(frozen=True, slots=True)
class Window:
    """How the input that a block reads lies in shared memory: see mma.cuh.

    Neighbouring columns read positions column_step apart, so a plane holds every column_step-th position. Taps whose
    distance is a multiple of column_step share a plane, shifted: there are column_step/gcd(column_step, tap_step)
    planes, or one per tap where that takes fewer rows (taps that are far apart).

    Where one access loads two positions, which begin at an even one, both have rows: neighbours in a plane, which then
    begins one position early where its first is odd, or, where column_step is even, the same row of two planes.
    """

    block_samples: int
    block_positions: int
    planes: int
    plane_rows: int
    tap_rows_first: int
    tap_rows_step: int
    shift: int
    plane_step: int
    width: int = 1  # positions that one access loads

    @classmethod
    def of(cls, product: Product, block_samples: int, block_positions: int, width: int = 1) -> Window:
        """`width` is 2 only where `pairs_positions`."""
        window = cls._of_single_positions(product, block_samples, block_positions)
        if width == 1:
            return window
        # Blocks begin at an even position of a product, and a sample at position 0.
        p = product.problem
        first = (product.first if p.transposed else -p.padding_left) + window.shift
        if product.column_step == 1:
            is_odd = first % 2 == 1 or (window.planes > 1 and window.plane_step % 2 == 1)
            is_odd = is_odd or (p.transposed and not product.phases_in_rows)  # phases begin at positions of their own
            return replace(window, plane_rows=round_up(window.plane_rows + is_odd, width), width=width)
        # Where the first position is odd, the row of each tap is that of the next one.
        planes = product.column_step
        rounds = (product.taps - 1 + first % 2) // planes
        return replace(window, planes=planes, plane_rows=block_positions + rounds, tap_rows_step=1, width=width)

    @staticmethod
    def pairs_positions(product: Product) -> bool:
        """Whether the window has rows for both positions of every pair."""
        step = product.column_step
        return step == 1 or (step % 2 == 0 and product.tap_step == 1 and product.taps >= step)

    @classmethod
    def _of_single_positions(cls, product: Product, block_samples: int, block_positions: int) -> Window:
        taps, step = product.taps, product.tap_step
        gcd = math.gcd(product.column_step, step)
        shared = min(product.column_step // gcd, taps)
        rounds = (taps - 1) // shared  # how often taps come back to the first plane
        shared_rows = block_positions + rounds * (abs(step) // gcd)
        if shared * shared_rows >= taps * block_positions:
            return cls(block_samples, block_positions, taps, block_positions, 0, 0, 0, step)
        if step > 0:
            return cls(block_samples, block_positions, shared, shared_rows, 0, step // gcd, 0, step)
        # Taps go backwards, one position at a time where column_step is 1.
        assert product.column_step == 1
        return cls(block_samples, block_positions, 1, shared_rows, -rounds * step, step, rounds * step, step)

    @property
    def used_rows(self) -> int:
        """Of one sample, those that hold input."""
        return self.planes * self.plane_rows

    @property
    def sample_rows(self) -> int:
        """From one sample to the next.

        Where eight columns that ldmatrix reads together are of different samples, these lie at such distances that the
        rows differ modulo 8: then it meets no bank conflict.
        """
        if self.block_samples == 1 or self.block_positions % BANK_ROWS == 0:
            return self.used_rows
        return self.used_rows + (self.block_positions - self.used_rows) % BANK_ROWS

    @property
    def rows(self) -> int:
        return max(self.block_samples * self.sample_rows, BANK_ROWS)

    @property
    def unit_tasks(self) -> int:
        """Tasks in which the rows of one unit, or of several at once, are staged; 2**32 / 4 fits any index."""
        return self.rows if self.width == 1 else max(self.block_samples * self.used_rows // self.width, 4)

    def params(self) -> dict[str, int]:
        """The fields of Params, in order."""
        return {
            "block_samples": self.block_samples,
            "block_positions": self.block_positions,
            "planes": self.planes,
            "plane_rows": self.plane_rows,
            "sample_rows": self.sample_rows,
            "window_rows": self.rows,
            "unit_tasks": self.unit_tasks,
            "tasks_reciprocal": -(-(2**32) // self.unit_tasks),
            "tap_rows_first": self.tap_rows_first,
            "tap_rows_step": self.tap_rows_step,
            "window_shift": self.shift,
            "plane_step": self.plane_step,
        }


@dataclass(frozen=True, slots=True)
class Tiling:
    """A product cut into tiles, and the microseconds that all launches of its plan take by the cost model.

    Attributes:
        is_raw: blocks read the layer's own weights and pack them; else a launch before has packed them.
    """

    index_bits: int
    tile: Tile
    window: Window
    row_tiles: int
    column_tiles: int
    sample_tiles: int
    blocks: int
    shared_bytes: int
    us: float
    is_raw: bool = False


def shared_bytes(
    product: Product,
    tile: Tile,
    window: Window,
    reduction: Reduction,
    arithmetic: Arithmetic,
    bits: int,
    *,
    is_raw: bool = False,
) -> int:
    itemsize = UNIT_BYTES // arithmetic.channels
    weights = NUM_STAGES * tile.stage_bytes(arithmetic.parts)
    if is_raw:
        boxes = RAW_BOXES * _raw_box_vectors(product, tile, reduction, arithmetic) * UNIT_BYTES
        weights = reduction.stages * tile.stage_bytes(arithmetic.parts) + boxes
    windows = min(reduction.chunks, 2) * arithmetic.parts * reduction.units * window.rows * UNIT_BYTES
    tables = window.rows * bits // 8 + reduction.pairs * 4
    return max(
        tile.total_bytes + weights + windows + tables,
        tile.slice_bytes(itemsize),
    )


def _raw_box_vectors(product: Product, tile: Tile, reduction: Reduction, arithmetic: Arithmetic) -> int:
    """Of a box of the layer's own weights: see Box in raw_weights.cuh."""
    if not product.problem.transposed:
        return tile.block_m * (reduction.units * reduction.taps | 1)
    channels, rest = divmod(tile.block_m, product.phases)
    piece = (channels + (2 if rest else 0)) * product.problem.K // arithmetic.channels + 2
    return reduction.units * arithmetic.channels * (piece | 1)


def _batches(tile: Tile, window: Window, reduction: Reduction) -> int:
    return input_batches(reduction.units, window.unit_tasks, tile.prefetch // window.width, tile.threads)


def input_width(product: Product, layout: Layout, arithmetic: Arithmetic, bits: int) -> int:
    """Neighbouring positions of the input that one access loads: 2 of 16 bits where they lie in one aligned word."""
    p, array = product.problem, layout["input"]
    stride_n, stride_c, stride_l = array.strides
    begins_even = (stride_n % 2 == 0 or p.N == 1) and (stride_c % 2 == 0 or p.C_in == 1) and array.alignment >= 4
    is_word = stride_l == 1 and begins_even and p.L_in % 2 == 0 and arithmetic.channels == 8 and bits == 32
    if p.padding_mode != "zeros" or p.has_lengths:  # positions outside mean other samples, or begin at any place
        return 1
    return 2 if is_word and Window.pairs_positions(product) else 1


def reads_raw_weights(product: Product, layout: Layout, arithmetic: Arithmetic, bits: int) -> bool:
    """Whether blocks can read the layer's own weights: lines of whole vectors, which nothing has packed before."""
    p, weight = product.problem, layout["weight"]
    is_contiguous = weight.strides == contiguous_strides(p.weight_shape) and weight.alignment == UNIT_BYTES
    has_whole_lines = p.weight_shape[1] * p.K % arithmetic.channels == 0
    has_rows = product.phases_in_rows or product.phases == 1
    return is_contiguous and has_whole_lines and has_rows and bits == 32 and not layout.is_prepared


@lru_cache(maxsize=4096)
def compare_tilings(
    product: Product, arithmetic: Arithmetic, bits: int, width: int, device: Device, *, raw: bool = False
) -> tuple[Tiling, ...]:
    """The tilings of a product that fit the device, the cheapest first.

    Args:
        product: of the problem.
        arithmetic: of its tensor cores.
        bits: of an index.
        width: as of `input_width`.
        device: the GPU.
        raw: as of `reads_raw_weights`.
    """
    reduction, samples = Reduction.of(product, arithmetic), product.problem.N
    found = []
    for tile, is_raw in iterate_product(
        tiles(arithmetic, bits, segments=reduction.segments > 1), (False, True) if raw else (False,)
    ):
        if is_raw and not tile.packs_weights:
            continue
        row_tiles = -(-product.rows // tile.block_m)
        block_samples, block_positions = 1, tile.block_n
        if tile.has_samples:
            if product.problem.has_lengths:
                continue
            block_samples, block_positions = min(tile.block_n // product.positions, samples), product.positions
            if block_samples < 2:
                continue
        window = Window.of(product, block_samples, block_positions, width)
        needed = shared_bytes(product, tile, window, reduction, arithmetic, bits, is_raw=is_raw)
        column_tiles = -(-product.positions // block_positions)
        sample_tiles = -(-samples // block_samples)
        blocks = row_tiles * column_tiles * sample_tiles * product.products
        if needed > device.shared_per_block or blocks * reduction.segments > MAX_GRID:
            continue
        if blocks * reduction.segments * tile.block_m * tile.block_n * 4 > MAX_PARTIAL_BYTES and tile.segment_mode == 2:
            continue
        us = _predict(product, tile, window, reduction, arithmetic, blocks, needed, device, is_raw=is_raw)
        found.append(Tiling(bits, tile, window, row_tiles, column_tiles, sample_tiles, blocks, needed, us, is_raw))
    return tuple(sorted(found, key=lambda tiling: tiling.us))


def _predict(
    product: Product,
    tile: Tile,
    window: Window,
    reduction: Reduction,
    arithmetic: Arithmetic,
    blocks: int,
    shared: int,
    device: Device,
    *,
    is_raw: bool,
) -> float:
    """Microseconds of a plan: the weights packed, the tiles multiplied, the sums of segments added."""
    p, is_cut = product.problem, tile.segment_mode == 2
    row_tiles = product.products * -(-product.rows // tile.block_m)
    launch = TilesLaunch(
        arithmetic=arithmetic,
        blocks=blocks * (reduction.segments if is_cut else 1),
        weight_tiles=row_tiles * (reduction.segments if is_cut else 1),
        chunks=reduction.segment_chunks if is_cut else reduction.chunks,
        units=reduction.units,
        stages=reduction.stages,
        samples=window.block_samples,
        used_rows=window.used_rows,
        window_rows=window.rows,
        batches=_batches(tile, window, reduction),
        block_m=tile.block_m,
        block_n=tile.block_n,
        warps_m=tile.warps_m,
        warps_n=tile.warps_n,
        has_samples=tile.has_samples,
        is_cut=is_cut,
        kept_segments=reduction.segments if tile.segment_mode == 1 else 0,
        width=window.width,
        raw_vectors=reduction.units * reduction.taps if is_raw else 0,
    )
    packed = row_tiles * tile.block_m * reduction.chunks * reduction.pairs
    resident = min(tile.min_blocks, max(1, blocks_by_shared(shared, device)))
    return predict_plan(
        launch,
        p,
        resident=resident,
        segments=reduction.segments,
        packed=packed,
        pack_blocks=-(-packed // PACK_BLOCK_SIZE),
        device=device,
    )


def _candidates(tilings: tuple[Tiling, ...]) -> tuple[tuple[str, float], ...]:
    """What `explain` shows of the comparison."""

    def name(t: Tiling) -> str:
        samples = t.window.block_samples
        cut = " by segments" if t.tile.segment_mode == 2 else ""
        raw = ", packing" if t.is_raw else ""
        return f"{t.tile.block_m}x{t.tile.block_n}" + (f" of {samples} samples" if samples > 1 else "") + cut + raw

    return tuple((name(t), t.us) for t in tilings)


def smallest_fits(product: Product, arithmetic: Arithmetic, device: Device) -> bool:
    """Whether the tile with the fewest columns fits the device, which does not depend on N or a length."""
    reduction = Reduction.of(product, arithmetic)
    tile = tiles(arithmetic, segments=reduction.segments > 1)[-1]
    window = Window.of(product, 1, tile.block_n)
    return shared_bytes(product, tile, window, reduction, arithmetic, 64) <= device.shared_per_block


def kernel_config(
    kernel: str,
    dtype: str,
    precision: str,
    tile: Tile,
    bits: int,
    device: Device,
    *,
    phases_in_rows: bool,
    segment_mode: int,
    width: int = 1,
    is_raw: bool = False,
) -> Config:
    arithmetic = ARITHMETICS[dtype, precision]
    # The shared memory of Turing holds one block, seldom two; 64-bit offsets take twice the registers.
    caps_registers = bits == 32 and device.arch >= 80
    macros: dict[str, str | int] = {
        "DTYPE": dtype,
        "INDEX_BITS": bits,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "WARPS_M": tile.warps_m,
        "WARPS_N": tile.warps_n,
        "NUM_STAGES": NUM_STAGES,
        "STAGE_STEPS": STAGE_STEPS,
        "PREFETCH": tile.prefetch,
        "INPUT_WIDTH": width,
        "HAS_SAMPLES": int(tile.has_samples),
        "MIN_BLOCKS": tile.min_blocks if caps_registers else 1,
        "IS_SPLIT": int(arithmetic.parts == 2),
        "SPLIT_TERMS": SPLIT_TERMS,
        "SEGMENT_MODE": segment_mode,
        "MULTIPLY_MATRICES": arithmetic.instruction,
        "PHASES_IN_ROWS": int(phases_in_rows),
        "PARAMS_BYTES": len(params_fields(kernel)) * bits // 8,
    }
    if is_raw:
        macros["RAW_WEIGHT"] = 1
    return Config.of(kernel, macros)


def kernel_configs(kernel: str, device: Device, phases: tuple[bool, ...], *, transposed: bool) -> Iterator[Config]:
    """Every specialisation of a kernel and of its packing on a device."""
    for (dtype, precision), arithmetic in arithmetics(device).items():
        for phases_in_rows in phases:
            for bits in (32, 64):
                for tile in (*tiles(arithmetic, bits), *tiles(arithmetic, bits, segments=True)):
                    for mode in (2, 3) if tile.segment_mode == 2 else (tile.segment_mode,):
                        has_pairs = arithmetic.channels == 8 and bits == 32 and mode != 3
                        can_be_raw = tile.packs_weights and bits == 32
                        for width, is_raw in iterate_product(
                            (1, 2) if has_pairs else (1,), (False, True) if can_be_raw else (False,)
                        ):
                            yield kernel_config(
                                kernel,
                                dtype,
                                precision,
                                tile,
                                bits,
                                device,
                                phases_in_rows=phases_in_rows,
                                segment_mode=mode,
                                width=width,
                                is_raw=is_raw,
                            )
                yield _pack_config(dtype, precision, bits, transposed=transposed, phases_in_rows=phases_in_rows)


def _tiling_params(reduction: Reduction, tiling: Tiling) -> dict[str, int]:
    """The fields of Params that describe the order of summation and the tiles."""
    batches = _batches(tiling.tile, tiling.window, reduction)
    # As few rounds as leave one for every batch.
    round_stages = max(1, -(-reduction.stages // batches))
    if -(-reduction.stages // round_stages) < batches:
        round_stages = max(1, reduction.stages // batches)
    return {
        "row_tiles": tiling.row_tiles,
        "column_tiles": tiling.column_tiles,
        "sample_tiles": tiling.sample_tiles,
        "units": reduction.units,
        "chunks": reduction.chunks,
        "pairs": reduction.pairs,
        "segments": reduction.segments,
        "segment_chunks": reduction.segment_chunks,
        "num_tiles": tiling.blocks,
        "round_stages": round_stages,
        **tiling.window.params(),
    }


def make_plan(
    problem: ConvProblem, layout: Layout, device: Device, product: Product, tilings: tuple[Tiling, ...], kernel: str
) -> Plan:
    """The weights packed, unless blocks do that, then a tensor-core kernel; where segments have blocks of their own,
    their sums added.
    """
    p, tiling = problem, tilings[0]
    tile, bits = tiling.tile, tiling.index_bits
    reduction = Reduction.of(product, ARITHMETICS[p.dtype, p.precision])
    params = params_of(
        kernel,
        conv_fields(p, layout),
        {**product.params(), **_tiling_params(reduction, tiling)},
    )

    # The rows of a single phase are channels, for which less code suffices.
    in_rows = product.phases_in_rows and product.phases > 1

    def step(mode: int, grid: int, shared: int, *more: str) -> Step:
        config = kernel_config(
            kernel,
            p.dtype,
            p.precision,
            tile,
            bits,
            device,
            phases_in_rows=in_rows,
            segment_mode=mode,
            width=1 if mode == 3 else tiling.window.width,  # the second launch reads no input
            is_raw=tiling.is_raw,
        )
        config = with_padding_mode(config, p.padding_mode)
        arrays = conv_arrays(p, "weight" if tiling.is_raw else PACKED)
        return Step(config, Launch(grid, tile.threads, shared, bits, params), (*arrays, *more))

    steps: list[Step] = []
    scratch: list[tuple[str, int]] = []
    if not tiling.is_raw:
        pack, packed_bytes = _pack(p, layout, product, reduction, tile)
        steps.append(pack)
        scratch.append((PACKED, packed_bytes))
    if tile.segment_mode < 2:
        steps.append(step(tile.segment_mode, tiling.blocks, tiling.shared_bytes))
    else:
        segment_blocks = tiling.blocks * reduction.segments
        steps.append(step(2, segment_blocks, tiling.shared_bytes, PARTIAL))
        steps.append(step(3, tiling.blocks, tile.slice_bytes(p.itemsize), PARTIAL))
        scratch.append((PARTIAL, segment_blocks * tile.block_m * tile.block_n * 4))
    return Plan(tuple(steps), tuple(scratch), _candidates(tilings))


def _pack(problem: ConvProblem, layout: Layout, product: Product, reduction: Reduction, tile: Tile) -> tuple[Step, int]:
    """The launch of pack_mma_weight, and the bytes that it writes."""
    p, arithmetic = problem, ARITHMETICS[problem.dtype, problem.precision]
    row_tiles = -(-product.rows // tile.block_m)
    num_vectors = product.products * reduction.chunks * reduction.pairs * row_tiles * tile.block_m  # of one part
    # Neighbours in memory are the channels and taps of a row: those of a whole chunk if they fit.
    taps, channels = -(-reduction.pairs // reduction.units), arithmetic.channels
    fitting = WeightBoxes.max_terms(product) // (channels * taps)
    units = max(
        units for units in range(1, reduction.units + 1) if reduction.units % units == 0 and units <= max(1, fitting)
    )
    boxes = WeightBoxes.of(
        product,
        rows=row_tiles * tile.block_m,
        channels=reduction.chunks * reduction.units * channels,
        taps=taps,
        box_channels=units * channels,
    )
    params = params_of(
        "pack_mma_weight",
        conv_fields(p, layout),
        {
            "row_tiles": row_tiles,
            "block_rows": tile.block_m,
            "chunks": reduction.chunks,
            "units": reduction.units,
            "pairs": reduction.pairs,
            **boxes.params(layout),
        },
    )
    values = (abs(value) for _, value in params)
    bits = index_bits(p, layout, boxes.overhang, num_vectors * arithmetic.parts + tile.block_m, *values)
    config = _pack_config(p.dtype, p.precision, bits, transposed=p.transposed, phases_in_rows=product.phases_in_rows)
    launch = Launch(boxes.grid, PACK_BLOCK_SIZE, boxes.shared_bytes, bits, params)
    return Step(config, launch, ("weight", PACKED)), num_vectors * arithmetic.parts * UNIT_BYTES


def _pack_config(dtype: str, precision: str, bits: int, *, transposed: bool, phases_in_rows: bool) -> Config:
    macros = {"IS_TRANSPOSED": int(transposed), "PHASES_IN_ROWS": int(phases_in_rows)}
    return pack_config("pack_mma_weight", dtype, precision, bits, macros)


def pack_config(kernel: str, dtype: str, precision: str, bits: int, macros: Mapping[str, int]) -> Config:
    """The specialisation of a kernel that packs weights for tensor cores; `macros` are its own."""
    shared: dict[str, str | int] = {
        "DTYPE": dtype,
        "INDEX_BITS": bits,
        "BLOCK_SIZE": PACK_BLOCK_SIZE,
        "IS_SPLIT": int(ARITHMETICS[dtype, precision].parts == 2),
    }
    return Config.of(kernel, {**shared, **macros, "PARAMS_BYTES": len(params_fields(kernel)) * bits // 8})
