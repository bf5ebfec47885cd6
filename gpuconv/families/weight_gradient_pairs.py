"""weight_gradient_pairs: weight gradients of depthwise layers and of groups with few channels on one side.

Contract: cuda_src/weight_gradient_pairs.cu.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ..costs import Work
from ..device import Device
from ..problem import DTYPES, FORMATS, WeightGradientProblem
from .base import MAX_GRID, ArrayLayout, Config, Family, Launch, Layout, Plan, Refusal, Step, params_of
from .offsets import index_bits
from .slices import Slices, sliced_plan, sums_work, weight_fields

WARP = 32
THREAD_K = 8
MAX_THREADS = 256
# Blocks that a multiprocessor must be able to hold. The 64 registers that this leaves a thread suffice for float32.
MIN_BLOCKS = {32: 4, 64: 2}
# Each pair reads both of its rows. With more channels the tiled family is faster: it reads a row once for many.
MAX_CHANNELS = 4
# From so many channels on the coarse side and columns (channels by taps) on the fine side on, a register tile is
# faster: loading both rows of each pair takes about 25 instructions a position (bench.static).
MANY_CHANNELS = 16
MANY_COLUMNS = 8
# Shared memory of a block with which several blocks share a multiprocessor.
_SHARED_BYTES = 56 * 1024
_CHUNKS = (64, 32, 16, 8)  # positions, in whole vectors


class WeightGradientPairs(Family[WeightGradientProblem]):
    """One thread per pair of rows and eight taps."""

    name = "weight_gradient_pairs"
    kind = "weight_gradient"
    maps_edges = True

    def plan(self, problem: WeightGradientProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        if min(p.C_coarse_g, p.C_fine_g) > MAX_CHANNELS:
            return Refusal(f"needs at most {MAX_CHANNELS} channels a group on one side")
        if p.C_coarse_g >= MANY_CHANNELS and p.C_fine_g * p.K >= MANY_COLUMNS:
            return Refusal(
                f"needs fewer than {MANY_CHANNELS} channels a group on the coarse side, or fewer than {MANY_COLUMNS} "
                "taps of all channels on the fine side"
            )
        shape = _shape(p, layout, device)
        if shape is None:
            return Refusal(f"needs two windows of 32 pairs in {device.shared_per_block} bytes of shared memory")
        if shape.grid > MAX_GRID:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        slices = Slices.of(p)
        params = params_of(
            self.name,
            weight_fields(p, layout, slices),
            {
                "pairs": shape.pairs,
                "pair_blocks": shape.pair_blocks,
                "block_pairs": shape.block_pairs,
                "tap_threads": shape.tap_threads,
                "chunk": shape.chunk,
                "chunks": -(-slices.positions // shape.chunk),
                "coarse_copy": shape.coarse_copy,
                "fine_copy": shape.fine_copy,
                "lead": shape.lead,
                "window": shape.window,
                "coarse_pitch": shape.coarse_pitch,
                "fine_pitch": shape.fine_pitch,
            },
        )
        launch = Launch(shape.grid, shape.block_pairs * shape.tap_threads, shape.shared_bytes, shape.bits, params)
        return sliced_plan(p, layout, slices, self._config(shape.slides, p.dtype, shape.bits), launch)

    def work(self, problem: WeightGradientProblem, step: Step) -> Work:
        return sums_work(problem, step, step.launch.grid * step.launch.block * THREAD_K)

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for slides in (True, False):
                for bits in (32, 64):
                    yield self._config(slides, dtype, bits)

    def _config(self, slides: bool, dtype: str, bits: int) -> Config:
        macros = {
            "IS_SLIDING": int(slides),
            "THREAD_K": THREAD_K,
            "MAX_THREADS": MAX_THREADS,
            "MIN_BLOCKS": 2 if FORMATS[dtype].itemsize > 4 else MIN_BLOCKS[bits],
        }
        return Config.for_dtype(self.name, dtype, bits, macros)


@dataclass(frozen=True, slots=True)
class _Shape:
    """How a block loads its pairs: the fields of Params that the host chooses.

    Attributes:
        slides: IS_SLIDING of the .cu file.
        bits: width of indices.
        grid: blocks of the launch.
        shared_bytes: dynamic shared memory of a block.
    """

    slides: bool
    bits: int
    pairs: int
    pair_blocks: int
    block_pairs: int
    tap_threads: int
    chunk: int
    coarse_copy: int
    fine_copy: int
    lead: int
    window: int
    coarse_pitch: int
    fine_pitch: int
    grid: int
    shared_bytes: int


@lru_cache(maxsize=4096)
def _shape(p: WeightGradientProblem, layout: Layout, device: Device) -> _Shape | None:
    """None where not even the shortest chunk fits in shared memory."""
    slides = p.stride == 1 and p.dilation == 1
    vec = 16 // p.itemsize
    coarse, fine = layout["coarse"], layout["fine"]
    # Windows that do not slide are read element by element; their rows are an odd number of words apart.
    widest = vec if slides else max(1, 4 // p.itemsize)
    coarse_copy = _copy_elements(coarse, p.L_coarse, widest, p.itemsize)
    fine_copy = _copy_elements(fine, p.L_fine, widest, p.itemsize)
    while fine_copy > 1 and slides and _tap_groups(p, -p.padding_left % fine_copy) > _tap_groups(p, 0):
        fine_copy //= 2  # the lead would need another group of taps
    if fine_copy * p.itemsize < 4:
        fine_copy = 1
    lead = -p.padding_left % fine_copy

    groups = _tap_groups(p, lead if slides else 0)
    tap_tiles = -(-groups * WARP // MAX_THREADS)
    tap_threads = -(-groups // tap_tiles)
    tap_tiles = -(-groups // tap_threads)
    pairs = Slices.of(p).count * p.C_coarse * p.C_fine_g
    block_pairs = WARP * min(max(1, 2 // tap_threads), -(-pairs // WARP))
    pair_blocks = -(-pairs // block_pairs)

    # Chunks and taps extend past the last position.
    overhang = Slices.of(p).overhang(samples=1, positions=_CHUNKS[0], taps=tap_threads * THREAD_K)
    bits = index_bits(p, layout, overhang, pair_blocks * tap_tiles, pairs + block_pairs, pairs * p.K)

    def shape(chunk: int) -> _Shape:
        taps = tap_threads * THREAD_K
        if slides:
            window = chunk + taps
            coarse_pitch, fine_pitch = (vec * _odd(-(-length // vec)) for length in (chunk, window))
        else:
            window = lead + (chunk - 1) * p.stride + (min(taps, p.K) - 1) * p.dilation + 1
            window += -window % fine_copy
            word = max(1, 4 // p.itemsize)
            coarse_pitch, fine_pitch = (word * _odd(-(-length // word)) for length in (chunk, window))
        row_bytes = 5 * bits // 8  # Pair of the .cu file
        shared = block_pairs * (row_bytes + 2 * (coarse_pitch + fine_pitch) * p.itemsize)
        return _Shape(
            slides, bits, pairs, pair_blocks, block_pairs, tap_threads, chunk, coarse_copy, fine_copy, lead, window,
            coarse_pitch, fine_pitch, pair_blocks * tap_tiles, shared,
        )  # fmt: skip

    # A longer chunk reads less of a window twice, but a chunk longer than the slice has no use.
    shapes = [shape(chunk) for chunk in _CHUNKS if chunk <= max(_CHUNKS[-1], 2 * Slices.of(p).positions)]
    fitting = [s for s in shapes if s.shared_bytes <= min(_SHARED_BYTES, device.shared_per_block)]
    fitting += [s for s in reversed(shapes) if s.shared_bytes <= device.shared_per_block]
    return fitting[0] if fitting else None


def _tap_groups(p: WeightGradientProblem, lead: int) -> int:
    return -(-(p.K + lead) // THREAD_K)


def _copy_elements(array: ArrayLayout, length: int, widest: int, itemsize: int) -> int:
    """The most elements of one copy, up to `widest`: copies at multiples of so many elements of a row are aligned."""
    elements = widest
    while elements > 1 and not (
        elements * itemsize >= 4
        and array.strides[2] == 1
        and array.alignment % (elements * itemsize) == 0
        and length % elements == 0
        and all(stride % elements == 0 for stride in array.strides[:2])
    ):
        elements //= 2
    return elements


def _odd(value: int) -> int:
    return value + 1 - value % 2
