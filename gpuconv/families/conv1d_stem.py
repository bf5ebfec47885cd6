"""conv1d_stem: few input channels a group and many output channels, the input of a tile in shared memory.

Contract: cuda_src/conv1d_stem.cu.

It is for the first layers on waveforms and spectra, in every dtype: with so few input channels register tiles are
mostly empty. Of the benchmark's 81 layers it computes four with few products a sum (wav2vec2, HTDemucs, Conv-TasNet and
MiniRocket), two more in float32 (Enformer, Tacotron 2), and one with four output channels a group (a scale
discriminator). Layers with many products a sum and many output channels run on conv1d_im2col, except in float64 and
complex data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ..costs import FMA_LATENCY_CYCLES, RESERVED_SHARED_BYTES, Code, Work, cuda_cores, predict_launch
from ..device import Device
from ..problem import DTYPES, FORMATS, ConvProblem
from ..text import count
from .base import MAX_GRID, Config, Family, Layout, Plan, Refusal, conv_plan
from .offsets import Overhang, index_bits

WARP = 32
MAX_C_IN_G = 4
MIN_C_OUT_G = 8
MAX_THREADS = 256
MAX_REPEATS = 8


@dataclass(frozen=True, slots=True)
class Tile:
    """What a thread computes: thread_c channels of thread_l columns.

    Attributes:
        min_blocks: blocks that a multiprocessor must be able to hold, which caps the registers of a thread.
    """

    thread_l: int
    thread_c: int
    min_blocks: int


# By the size of the accumulator. The first tile is the widest for which two blocks of 256 threads have registers, so it
# has the fewest loads for each multiply-add. The second is for layers with too few outputs to fill a GPU with wide
# tiles; it also has a kernel with 64-bit indices. The third is for few channels.
TILES: dict[int, tuple[Tile, ...]] = {
    4: (Tile(4, 16, 2), Tile(2, 8, 2), Tile(4, 4, 2)),
    8: (Tile(2, 16, 2), Tile(2, 4, 2)),
    16: (Tile(1, 8, 2), Tile(1, 4, 2)),
}

# Terms that are loaded together: enough to hide the cost of a barrier, few enough to leave shared memory for the input.
_CHUNK_TERMS = 64
_FEWEST_CHUNK_TERMS = 8
# A block computes several tiles, to load weights once, only if each multiprocessor still gets this many blocks.
_BLOCKS_EACH = 8
# Instructions besides the multiply-adds and the loads of their operands, from the machine code for sm_90: for a term,
# for one loaded input or weight, for one result.
_TERM_SLOTS = 1.5
_LOAD_SLOTS = 10.0
_RESULT_SLOTS = 4.0
_BLOCK_CYCLES = 2000.0  # from a block's first load to its last store, besides its multiply-adds (an assumption)


@dataclass(frozen=True, slots=True)
class Tiling:
    """A problem cut into tiles of one shape: see the .cu file for the fields that Params repeats.

    Attributes:
        samples: samples of one tile: 1, or thread_l.
        us: predicted microseconds of the launch.
    """

    tile: Tile
    samples: int
    tiles_of_sample: int
    tiles: int
    warps_c: int
    warps_l: int
    channel_blocks: int
    repeats: int
    row_taps: int
    row_advance: int
    row_pitch: int
    chunk_terms: int
    shared_bytes: int
    us: float

    @property
    def tile_blocks(self) -> int:
        return -(-self.tiles // (self.warps_l * self.repeats))

    @classmethod
    def of(cls, p: ConvProblem, device: Device, tile: Tile, samples: int) -> Tiling | None:
        """None where the input of one tile and a few terms of weights do not fit in shared memory."""
        size = p.format.accumulator_bytes
        terms = p.C_in_g * p.K
        tiles_of_sample = -(-p.L_out // (WARP * tile.thread_l // samples))
        tiles = tiles_of_sample * -(-p.N // samples)

        # Whichever needs fewer entries: taps that are whole strides apart share a row, or each tap has its own row.
        gcd = math.gcd(p.stride, p.dilation)
        shared_row = min(p.stride // gcd, p.K)
        rows = ((shared_row, p.dilation // gcd), (p.K, 0))
        row_taps, row_advance = min(rows, key=lambda row: row[0] * (WARP + (p.K - 1) // row[0] * row[1]))
        row_pitch = WARP + (p.K - 1) // row_taps * row_advance
        entries = p.C_in_g * row_taps * row_pitch
        entry_bytes = entries * tile.thread_l * size

        channel_tiles = -(-p.C_out_g // tile.thread_c)
        max_warps = MAX_THREADS // WARP
        channel_blocks = -(-channel_tiles // max_warps)
        warps_c = -(-channel_tiles // channel_blocks)
        channel_bytes = warps_c * tile.thread_c * size
        # Offsets are whole vectors of four.
        available = (
            min(device.shared_per_block, device.shared_per_sm // tile.min_blocks - RESERVED_SHARED_BYTES)
            - channel_bytes
            - 12
        )
        term_bytes = channel_bytes + 4
        chunk_terms = min(terms, _CHUNK_TERMS, (available - entry_bytes) // term_bytes)
        if chunk_terms < min(terms, _FEWEST_CHUNK_TERMS):
            return None
        warps_l = min(max_warps // warps_c, tiles, (available - chunk_terms * term_bytes) // entry_bytes)

        blocks = channel_blocks * -(-tiles // warps_l) * p.groups
        repeats = max(1, min(MAX_REPEATS, blocks // (_BLOCKS_EACH * device.num_sms)))

        results = tile.thread_l * tile.thread_c
        operand_loads = (tile.thread_l + tile.thread_c) * size / 16
        slots = terms * (results * p.format.multiply_adds + operand_loads + _TERM_SLOTS)
        slots += _RESULT_SLOTS * results
        slots += _LOAD_SLOTS * p.C_in_g * row_taps * -(-row_pitch // WARP) * tile.thread_l / warps_c
        slots += _LOAD_SLOTS * terms * tile.thread_c / (WARP * warps_l * (repeats if terms <= chunk_terms else 1))
        warps = channel_blocks * warps_c * tiles * p.groups  # each of one tile
        weights = channel_blocks * warps_c * tile.thread_c * terms * p.groups * -(-tiles // (warps_l * repeats))
        work = Work(
            multiply_adds=warps * WARP * terms * results * p.format.multiply_adds,
            l2_bytes=p.bytes() + weights * p.itemsize,
            dram_bytes=p.bytes(),
            waits=_BLOCK_CYCLES,
        )
        time = predict_launch(
            work,
            Code(warps * slots, warps * (terms * operand_loads + results), repeats * terms * FMA_LATENCY_CYCLES),
            blocks=channel_blocks * -(-tiles // (warps_l * repeats)) * p.groups,
            resident=tile.min_blocks,
            unit=cuda_cores(device, size, is_complex=p.is_complex),
            device=device,
        )
        return cls(
            tile=tile,
            samples=samples,
            tiles_of_sample=tiles_of_sample,
            tiles=tiles,
            warps_c=warps_c,
            warps_l=warps_l,
            channel_blocks=channel_blocks,
            repeats=repeats,
            row_taps=row_taps,
            row_advance=row_advance,
            row_pitch=row_pitch,
            chunk_terms=chunk_terms,
            shared_bytes=16 * -(-chunk_terms // 4) + (chunk_terms + 1) * channel_bytes + warps_l * entry_bytes,
            us=time.us,
        )


@lru_cache(maxsize=1024)
def _compare_tilings(problem: ConvProblem, device: Device, *, is_wide: bool, is_contiguous: bool) -> tuple[Tiling, ...]:
    """The possible tilings, best first, for 64-bit indices and for outputs that are contiguous along l."""
    large, *others = TILES[problem.format.accumulator_bytes]
    shapes = [(large, 1)] if is_contiguous and not is_wide else []
    for tile in others[:1] if is_wide else others:
        shapes += [(tile, samples) for samples in dict.fromkeys((1, tile.thread_l)) if samples == 1 or problem.N > 1]
    tilings = (Tiling.of(problem, device, tile, samples) for tile, samples in shapes)
    return tuple(sorted((tiling for tiling in tilings if tiling is not None), key=lambda tiling: tiling.us))


class Conv1dStem(Family[ConvProblem]):
    """Tiles of many channels by positions, every input of a tile loaded once."""

    name = "conv1d_stem"
    kind = "conv1d"

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        if not 1 <= p.C_in_g <= MAX_C_IN_G:
            return Refusal(f"needs C_in/groups from 1 to {MAX_C_IN_G}")
        if p.C_out_g < MIN_C_OUT_G and (p.C_in_g == 1 or (p.stride == 1 and p.dilation == 1)):
            return Refusal(f"needs C_out/groups >= {MIN_C_OUT_G}, or C_in/groups > 1 and a stride or a dilation")
        bits = _index_bits(p, layout)
        tilings = _compare_tilings(p, device, is_wide=bits == 64, is_contiguous=layout["output"].strides[2] == 1)
        if not tilings:
            return Refusal("needs an input window, over min(K, stride) taps, that fits in shared memory")
        tiling = tilings[0]
        blocks = tiling.channel_blocks * tiling.tile_blocks * p.groups
        if blocks > MAX_GRID:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        is_large = tiling.tile == TILES[p.format.accumulator_bytes][0]
        candidates = tuple(
            (
                f"{count(t.tile.thread_c, 'channel')} by {count(t.tile.thread_l, 'column')} a thread, "
                f"{count(t.samples, 'sample')} a tile",
                t.us,
            )
            for t in tilings
        )
        return conv_plan(
            self._config(tiling.tile, is_large, p.dtype, bits),
            p,
            layout,
            bits,
            grid=blocks,
            block=WARP * tiling.warps_c * tiling.warps_l,
            shared_bytes=tiling.shared_bytes,
            candidates=candidates,
            own={
                "channel_blocks": tiling.channel_blocks,
                "tile_blocks": tiling.tile_blocks,
                "tiles": tiling.tiles,
                "tiles_of_sample": tiling.tiles_of_sample,
                "repeats": tiling.repeats,
                "warps_c": tiling.warps_c,
                "step_n": 0 if tiling.samples == 1 else 1,
                "step_l": WARP if tiling.samples == 1 else 0,
                "row_taps": tiling.row_taps,
                "row_advance": tiling.row_advance,
                "row_pitch": tiling.row_pitch,
                "chunk_terms": tiling.chunk_terms,
            },
        )

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            large, *others = TILES[FORMATS[dtype].accumulator_bytes]
            yield self._config(large, True, dtype, 32)
            for tile in others:
                yield self._config(tile, False, dtype, 32)
            yield self._config(others[0], False, dtype, 64)

    def _config(self, tile: Tile, is_contiguous: bool, dtype: str, bits: int) -> Config:
        macros = {
            "BLOCK_L": WARP * tile.thread_l,
            "THREAD_C": tile.thread_c,
            "THREAD_L": tile.thread_l,
            "IS_CONTIGUOUS": int(is_contiguous),
            "MAX_THREADS": MAX_THREADS,
            # 64-bit offsets take registers that only a lower occupancy has.
            "MIN_BLOCKS": tile.min_blocks if bits == 32 else 1,
        }
        return Config.for_dtype(self.name, dtype, bits, macros)


def _index_bits(p: ConvProblem, layout: Layout) -> int:
    # Blocks extend past the last channel, sample and tile. A tile extends past the last output by up to its columns,
    # and reads up to 32 taps behind the last. Offsets from a lane's first column to its others are formed even where
    # the input ends before these.
    stride_l = abs(layout["input"].strides[2])
    last_column = p.L_out + 5 * WARP + p.dilation * p.K
    span = last_column * p.stride + p.padding_left + p.dilation * (p.K + WARP)
    tiles = (-(-p.L_out // WARP) + 1) * p.N
    counts = (span, tiles * -(-p.C_out_g // 4) * p.groups, tiles + 2 * MAX_REPEATS * MAX_THREADS)
    inputs = Overhang(samples=5, rows=2 * MAX_THREADS)
    outputs = replace(inputs, positions=4 * WARP, arrays=("output",))
    return max(index_bits(p, layout, inputs, *counts, 4 * WARP * p.stride * stride_l), index_bits(p, layout, outputs))
