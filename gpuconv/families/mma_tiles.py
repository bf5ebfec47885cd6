"""The tiles of the tensor-core engine of cuda_src/mma.cuh: how large a block's share of a product may be."""

from __future__ import annotations

from dataclasses import dataclass

from ..costs import REGISTERS_PER_SM
from .arithmetic import STAGE_PAIRS, UNIT_BYTES, WARP, Access, Arithmetic

NUM_STAGES = 4  # of weights in shared memory, a power of two
RAW_BOXES = 2  # of a layer's own weights there: kBoxes of raw_weights.cuh
SLICE_TABLE_BYTES = 48  # of a row of Slice in mma_epilogue.cuh, besides its elements, at most
MAX_BLOCK_N = 320
MAX_BLOCK_M = 256
MAX_REGISTERS = 255  # of a thread
# Beside its sums, to load four units at two positions ahead: kernels with fewer spill.
PAIR_REGISTERS = 107


@dataclass(frozen=True, slots=True)
class BlockTile:
    """A block's share of a product: block_m rows by block_n columns on warps_m by warps_n warps.

    Attributes:
        min_blocks: blocks that a multiprocessor must be able to hold, which caps the registers of a thread.
    """

    block_m: int
    block_n: int
    warps_m: int
    warps_n: int
    min_blocks: int

    @property
    def warps(self) -> int:
        return self.warps_m * self.warps_n

    @property
    def threads(self) -> int:
        return WARP * self.warps


@dataclass(frozen=True, slots=True)
class Tile(BlockTile):
    """The tile of a convolution.

    Attributes:
        prefetch: units of input that a thread has on their way at a time: see `units_ahead`.
        has_samples: a block may take the positions of several samples, at the cost of an address for each fragment.
        segment_mode: SEGMENT_MODE of mma.cuh; 2 stands for both launches.
    """

    prefetch: int
    has_samples: bool = False
    segment_mode: int = 0

    def units_ahead(self, access: Access) -> int:
        """Units that a task of staging takes; at two positions fewer where registers are missing."""
        registers = min(MAX_REGISTERS, REGISTERS_PER_SM // (self.min_blocks * self.threads))
        spare = registers - self.block_m * self.block_n // self.threads
        has_few = spare < PAIR_REGISTERS or self.segment_mode == 1
        return 2 if access is Access.PAIR and has_few and self.prefetch > 2 else self.prefetch

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
        return (self.block_m, self.block_n) in _RAW_TILES.get((self.segment_mode, self.has_samples), ())

    @property
    def total_bytes(self) -> int:
        """Shared memory for the sums of the segments before."""
        return self.block_m * self.block_n * 4 if self.segment_mode == 1 else 0

    def stage_bytes(self, parts: int) -> int:
        return STAGE_PAIRS * parts * self.block_m * UNIT_BYTES


# Large tiles need less of weights and input from L2 for a product, which otherwise limits layers of few taps. By the
# cost model their many shapes save up to a third of the time, which fewer shapes would spend on rows and columns beyond
# the result: 320 columns hold the 301 positions of a layer, 160 hold 150 or twice 75, and many layers have a multiple
# of 48 or of 96 channels; 144 hold the 129 positions of a phase, and 224 hold 215. Smaller tiles give a layer more
# blocks where larger ones leave multiprocessors idle.
# Warp tiles of 64x64 need 62 % of the bandwidth of shared memory at the rate of mma.sync in 16 bits, of 48x80 66 %, of
# 64x32 92 %. The three sets of sums of a split product leave registers for 64x32. Tiles of 16 columns are for streams,
# where weights are nearly all that is read.
_TILES = (
    Tile(128, 128, 2, 2, 2, 4),
    Tile(128, 256, 2, 4, 1, 4),
    Tile(256, 128, 4, 2, 1, 4),
    Tile(256, 160, 4, 2, 1, 2),
    Tile(96, 320, 2, 4, 1, 4),
    Tile(64, 256, 1, 4, 2, 4),
    Tile(64, 224, 2, 2, 2, 4),
    Tile(64, 128, 2, 2, 3, 4),
    Tile(64, 64, 2, 2, 4, 4),
    Tile(32, 320, 1, 4, 2, 4),
    Tile(32, 256, 1, 4, 3, 4),
    Tile(32, 192, 1, 2, 4, 4),
    Tile(48, 144, 1, 3, 2, 4),
    Tile(32, 32, 2, 2, 4, 4),
    Tile(16, 320, 1, 4, 3, 4),
    Tile(16, 256, 1, 4, 3, 4),
    Tile(16, 128, 1, 4, 4, 4),
    Tile(64, 160, 2, 2, 2, 4, has_samples=True),
    Tile(48, 160, 1, 2, 4, 4, has_samples=True),
    Tile(64, 64, 2, 2, 4, 4, has_samples=True),
    Tile(16, 320, 1, 4, 3, 4, has_samples=True),
    Tile(128, 16, 4, 1, 3, 2),
)
_SPLIT_TILES = (
    Tile(128, 128, 2, 4, 1, 2),
    Tile(128, 96, 4, 2, 1, 4),
    Tile(64, 192, 2, 4, 1, 4),
    Tile(64, 160, 1, 5, 1, 2),
    Tile(64, 128, 2, 2, 2, 2),
    Tile(64, 64, 2, 2, 2, 4),
    Tile(32, 256, 1, 4, 2, 2),
    Tile(32, 128, 1, 4, 3, 4),
    Tile(48, 160, 1, 5, 1, 4),
    Tile(48, 128, 1, 4, 2, 4),
    Tile(32, 32, 2, 2, 4, 4),
    Tile(16, 128, 1, 4, 4, 4),
    Tile(48, 160, 1, 5, 1, 4, has_samples=True),
    Tile(64, 64, 2, 2, 2, 4, has_samples=True),
    Tile(128, 16, 4, 1, 3, 2),
)
# Those of which there are kernels that pack the weights themselves, by segment_mode and has_samples.
_RAW_TILES = {
    (0, False): (
        *((128, 128), (128, 96), (96, 320), (64, 224), (64, 128), (48, 160), (48, 144)),
        *((32, 256), (32, 128), (32, 32), (16, 256), (16, 128), (128, 16)),
    ),
    (0, True): ((64, 160), (64, 64), (16, 320)),
    (1, True): ((64, 64),),
    (2, False): ((128, 128), (64, 224), (64, 64), (32, 128), (64, 16), (32, 16)),
    (2, True): ((32, 160),),
}
# For reductions in segments: a block has shared memory for the sums of the segments before, or sums one segment.
_SEGMENT_TILES = (
    Tile(128, 128, 2, 2, 2, 4, segment_mode=1),
    Tile(96, 256, 2, 4, 1, 4, segment_mode=1),
    Tile(48, 320, 1, 4, 2, 4, segment_mode=1),
    Tile(64, 64, 2, 2, 4, 4, segment_mode=1),
    Tile(64, 64, 2, 2, 4, 4, has_samples=True, segment_mode=1),
    Tile(96, 128, 2, 2, 2, 4, segment_mode=2),
    Tile(64, 224, 2, 2, 2, 4, segment_mode=2),
    Tile(64, 160, 2, 2, 2, 4, has_samples=True, segment_mode=2),
    Tile(48, 160, 1, 2, 4, 4, segment_mode=2),
    Tile(32, 256, 1, 4, 3, 4, segment_mode=2),
    Tile(32, 128, 1, 4, 4, 4, segment_mode=2),
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
    Tile(64, 64, 2, 2, 2, 4, has_samples=True, segment_mode=1),
    Tile(128, 128, 2, 4, 1, 1, segment_mode=2),
    Tile(48, 160, 1, 5, 1, 4, segment_mode=2),
    Tile(32, 160, 1, 5, 2, 4, has_samples=True, segment_mode=2),
    Tile(32, 256, 1, 4, 2, 2, segment_mode=2),
    Tile(64, 64, 2, 2, 2, 4, segment_mode=2),
    Tile(64, 16, 4, 1, 4, 2, segment_mode=2),
    Tile(32, 16, 2, 1, 4, 4, segment_mode=2),
    Tile(128, 16, 4, 1, 3, 2, segment_mode=1),
)


def tiles(arithmetic: Arithmetic, bits: int = 32, *, segments: bool = False) -> tuple[Tile, ...]:
    """The tiles of an arithmetic; few for 64-bit offsets, since arrays that need them fill any of the same kind."""
    whole, cut = (_SPLIT_TILES, _SPLIT_SEGMENT_TILES) if arithmetic.parts == 2 else (_TILES, _SEGMENT_TILES)
    every: tuple[Tile, ...] = cut if segments else whole
    if bits == 32:
        return every
    return tuple(t for t in every if t.segment_mode < 2 and t.block_n in (16, 64))
