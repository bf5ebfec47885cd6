"""How the input of the tensor-core engine of cuda_src/mma.cuh lies in shared memory, and the order of summation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .arithmetic import STAGE_PAIRS, UNIT_BYTES, Access, Arithmetic
from .base import round_up
from .product import Product, RowTiles

BANK_ROWS = 8  # of 16 bytes, in all banks of shared memory
# Units of a chunk at most: with 8 rows of each fragment side by side, four units are two k-steps for every tap.
MAX_UNITS = 4
# Of the windows of 16 positions, which the shared memory of sm_90 holds beside weights and tables. Where they would
# take more, as with a stride of hundreds, chunks have fewer units.
MAX_WINDOW_BYTES = 184 * 1024
# Of the windows of 64 positions, if several chunks have more than two units. Wide windows leave room for one block, or
# for none that packs its weights; float32 in two parts has them from stride 6 on. By the cost model two units for four
# save 20 to 55 % of such layers. With stride 5 they would cost as much as they save.
MAX_WIDE_WINDOW_BYTES = 84 * 1024
# Reductions of so many terms are cut into segments. Where the rest of the problem does not fill the GPU, blocks of
# their own sum the segments, in larger tiles than it would have blocks for otherwise: by the cost model this saves 5 to
# 20 % of layers with one block for a multiprocessor, and up to 80 % with few. Where the rest does fill it, a block adds
# the sums of its segments in shared memory, for 2 to 5 % of its time. Neither costs accuracy: a product takes part in
# the sums of its segment alone, and in at most MAX_SEGMENTS more.
MIN_SEGMENTED_TERMS = 4096
SEGMENT_STAGES = 64
MIN_SEGMENTS, MAX_SEGMENTS = 4, 32


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
        unit_bytes, wide_unit_bytes = (
            arithmetic.parts * Window.of(product, 1, positions).rows * UNIT_BYTES for positions in (16, 64)
        )
        # Where positions are channels, a chunk has those of one channel of the input.
        for most in (4, 2, 1) if product.fold > 1 else range(MAX_UNITS, 0, -1):
            chunks = -(-all_units // most)
            units = -(-all_units // chunks)
            held = min(chunks, 2) * units
            halves = product.fold == 1 and chunks > 1 and units > 2 and held * wide_unit_bytes > MAX_WIDE_WINDOW_BYTES
            if held * unit_bytes <= MAX_WINDOW_BYTES and not halves:
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
        """The stages of a chunk."""
        return -(-self.taps * self.units // STAGE_PAIRS)

    @property
    def short_pairs(self) -> int:
        """Of a chunk, in rows that lack the last tap."""
        return -(-(self.taps - 1) * self.units // STAGE_PAIRS) * STAGE_PAIRS

    def product_pairs(self, row_tiles: RowTiles) -> int:
        """Of packed weights, in all tiles of a product's rows."""
        return self.chunks * (row_tiles.full * self.pairs + row_tiles.short * self.short_pairs)

    @property
    def segments(self) -> int:
        return -(-self.chunks // self.segment_chunks)

    def params(self) -> dict[str, int]:
        """The fields of Params."""
        return {
            "units": self.units,
            "chunks": self.chunks,
            "pairs": self.pairs,
            "segments": self.segments,
            "segment_chunks": self.segment_chunks,
        }


@dataclass(frozen=True, slots=True)
class Window:
    """How the input that a block reads lies in shared memory: see mma_tile.cuh.

    Neighbouring columns read positions column_step apart, so a plane holds every column_step-th position. Taps whose
    distance is a multiple of column_step share a plane, shifted: there are column_step/gcd(column_step, tap_step)
    planes, or one per tap where that takes fewer rows (taps that are far apart).

    Where one access loads two positions, which begin at an even one, both have rows: neighbours in a plane, which then
    begins one position early where its first is odd, or, where column_step is even, the same row of two planes.

    Attributes:
        access: by which the input is loaded.
    """

    block_samples: int
    block_positions: int
    planes: int
    plane_rows: int
    tap_rows_first: int
    tap_rows_step: int
    shift: int
    plane_step: int
    access: Access = Access.POSITION

    @classmethod
    def of(cls, product: Product, block_samples: int, block_positions: int, access: Access = Access.POSITION) -> Window:
        """`access` loads pairs only where `pairs_positions`."""
        window = replace(cls._of_single_positions(product, block_samples, block_positions), access=access)
        if access is not Access.PAIR:
            return window
        # Blocks begin at an even position of a product, and a sample at position 0.
        p = product.problem
        first = (product.first if p.transposed else -p.padding_left) + window.shift
        if product.column_step == 1:
            is_odd = first % 2 == 1 or (window.planes > 1 and window.plane_step % 2 == 1)
            is_odd = is_odd or (p.transposed and not product.phases_in_rows)  # phases begin at positions of their own
            return replace(window, plane_rows=round_up(window.plane_rows + is_odd, access.width))
        # Where the first position is odd, the row of each tap is that of the next one.
        planes = product.column_step
        rounds = (product.taps - 1 + first % 2) // planes
        return replace(window, planes=planes, plane_rows=block_positions + rounds, tap_rows_step=1)

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
        """The rows of one sample that hold input."""
        return self.planes * self.plane_rows

    @property
    def sample_rows(self) -> int:
        """The distance from one sample to the next, in rows.

        Where eight columns that ldmatrix reads together are of different samples, these lie at such distances that the
        rows differ modulo 8: then it meets no bank conflict.
        """
        if self.block_samples == 1 or self.block_positions % BANK_ROWS == 0:
            return self.used_rows
        return self.used_rows + (self.block_positions - self.used_rows) % BANK_ROWS

    @property
    def rows(self) -> int:
        """The rows of a unit.

        Where accesses load units, four neighbouring threads store those of a row, which are so many rows apart, and the
        next four those of the next row: these eight meet no bank conflict.
        """
        return round_up(self._rows, 4, 2) if self.access is Access.UNIT else self._rows

    @property
    def _rows(self) -> int:
        return max(self.block_samples * self.sample_rows, BANK_ROWS)

    @property
    def unit_tasks(self) -> int:
        """Tasks in which the rows of one unit, or of several at once, are staged; 2**32 / 4 fits any index."""
        if self.access is not Access.PAIR:
            return self._rows
        return max(self.block_samples * self.used_rows // self.access.width, 4)

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
