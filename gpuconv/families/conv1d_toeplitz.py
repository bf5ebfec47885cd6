"""conv1d_toeplitz: depthwise layers with many taps on tensor cores.

Contract: cuda_src/conv1d_toeplitz.cu.

It is for the long kernels of speech recognisers and implicit filters (QuartzNet and Hyena in the benchmark): from about
24 taps on, the multiply-adds on CUDA cores take longer than loading their operands from memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ..costs import MMA_LATENCY_CYCLES, Code, Ending, Work, blocks_by_shared, predict_launch, tensor_cores
from ..device import Device
from ..problem import ConvProblem
from ..text import count
from .arithmetic import ARITHMETICS, UNIT_BYTES, WARP, Arithmetic, arithmetics
from .base import MAX_GRID, Config, Family, Layout, Plan, Refusal, Step, conv_plan, round_up, with_padding_mode
from .depthwise import MANY_OUTPUTS
from .offsets import Overhang, index_bits

BLOCK_SIZE = 128
MIN_BLOCKS = 5  # that a multiprocessor holds at 96 registers a thread
TILE, ROWS = 128, 16
# Tiles that a warp multiplies at a time with the same taps, and how often it does so; (1, 1) is for short rows.
SHAPES = ((4, 1), (4, 2), (4, 4), (1, 1))
MAX_RESULTS = 4 * 4 * TILE
# By the bytes of an element: the fewest taps. With half as many, CUDA cores are as fast.
MIN_TAPS = {2: 64, 4: 128}

# Of the cost model: cycles from a warp's first load to its last store when nothing else runs; instructions, from the
# machine code for sm_90, for a block of taps for a tile, for a vector of the window, for a result, for a warp.
_LATENCY_CYCLES = 2500.0
_BLOCK_INSTRUCTIONS = 6.5
_VECTOR_INSTRUCTIONS = 45.0
_RESULT_INSTRUCTIONS = 8.0
_WARP_INSTRUCTIONS = 200.0


@dataclass(frozen=True, slots=True)
class Partition:
    """How a row is partitioned among warps.

    Attributes:
        tiles: tiles that a warp multiplies at a time.
        groups: groups of such tiles that a warp computes one after the other.
        segments: warps of a row.
        window: vectors of input that a warp stages.
        warp_vectors: vectors of shared memory of a warp.
        us: predicted microseconds of the launch.
    """

    tiles: int
    groups: int
    segments: int
    window: int
    warp_vectors: int
    blocks: int
    us: float

    @property
    def shared_bytes(self) -> int:
        return BLOCK_SIZE // WARP * self.warp_vectors * UNIT_BYTES


def tap_blocks(problem: ConvProblem, arithmetic: Arithmetic) -> int:
    return -(-problem.K // (2 * arithmetic.channels))


def _partition(problem: ConvProblem, arithmetic: Arithmetic, tiles: int, groups: int, device: Device) -> Partition:
    p, unit, results = problem, arithmetic.channels, tiles * groups * TILE
    block, words = 2 * unit, 4 // p.itemsize
    shift, taps = ROWS // block, tap_blocks(p, arithmetic)
    # The inputs of the tiles, those before the first that make it aligned, and those behind that the last block loads.
    inputs = (unit - 1) + results + block * taps + 3 * ROWS
    # Two copies begin in different banks.
    window = round_up(-(-inputs // unit), 8, 2)
    buffer = tiles * TILE * 5 // 4 // unit
    taps_bytes = (taps + 14 * shift) * (12 if shift == 1 else 10) * 4
    warp_vectors = words * window + buffer + -(-taps_bytes // UNIT_BYTES)
    segments = -(-p.L_out // results)
    warps = segments * p.N * p.C_out
    blocks = -(-warps * WARP // BLOCK_SIZE)
    work = _work(p, arithmetic, warps=warps, tiles=groups * tiles, window=window)
    passes = warps * groups * (taps + 7 * shift)
    code = Code(
        instructions=passes * tiles * _BLOCK_INSTRUCTIONS + work.staging_instructions,
        wavefronts=passes * 2 * (tiles + 1) + work.staging_wavefronts,
        chain=groups * (taps + 7 * shift) * MMA_LATENCY_CYCLES,
    )
    shared = BLOCK_SIZE // WARP * warp_vectors * UNIT_BYTES
    resident = max(1, min(MIN_BLOCKS, blocks_by_shared(shared, device)))
    cores = tensor_cores(device, p.itemsize)
    time = predict_launch(work, code, blocks=blocks, resident=resident, unit=cores, device=device)
    return Partition(tiles, groups, segments, window, warp_vectors, blocks, time.us)


def _work(problem: ConvProblem, arithmetic: Arithmetic, *, warps: int, tiles: int, window: int) -> Work:
    """What a launch does; `tiles` are those of a warp."""
    p, block, results = problem, 2 * arithmetic.channels, warps * tiles * TILE
    products = warps * tiles * (tap_blocks(p, arithmetic) + 7 * (ROWS // block))
    stored = math.prod(p.output_shape) * p.itemsize
    return Work(
        multiply_adds=products * ROWS * 8 * block,
        l2_bytes=warps * window * UNIT_BYTES + stored,
        load_share=0.25,
        staging_instructions=warps * (_WARP_INSTRUCTIONS + window / WARP * _VECTOR_INSTRUCTIONS),
        staging_wavefronts=warps * window / WARP * 8 * (4 // p.itemsize),
        dram_bytes=p.bytes(),
        waits=_LATENCY_CYCLES,
        ending=Ending(results / WARP * _RESULT_INSTRUCTIONS, results / WARP * 2, stored),
    )


@lru_cache(maxsize=1024)
def compare_partitions(problem: ConvProblem, device: Device) -> tuple[Partition, ...]:
    """The partitions of a layer's rows that fit the device, the cheapest first."""
    arithmetic = ARITHMETICS[problem.dtype, problem.precision]
    found = (_partition(problem, arithmetic, *shape, device) for shape in SHAPES)
    fitting = (f for f in found if f.shared_bytes <= device.shared_per_block)
    return tuple(sorted(fitting, key=lambda f: f.us))


class Conv1dToeplitz(Family[ConvProblem]):
    """One input channel and few output channels a group, many taps."""

    name = "conv1d_toeplitz"
    kind = "conv1d"
    canonical_order = False
    maps_edges = True
    keeps_lengths = True

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        arithmetic = arithmetics(device).get((p.dtype, p.precision))
        if arithmetic is None or arithmetic.parts > 1:
            return Refusal("needs float16 (sm_75), bfloat16 (sm_80) or float32 with precision tf32 (sm_80)")
        if p.C_in_g != 1 or p.C_out_g >= MANY_OUTPUTS:
            return Refusal(f"needs C_in/groups == 1 and C_out/groups < {MANY_OUTPUTS}")
        if p.stride != 1 or p.dilation != 1:
            return Refusal("needs stride 1 and dilation 1")
        if MIN_TAPS[p.itemsize] > p.K:
            return Refusal(f"needs K >= {MIN_TAPS[p.itemsize]}")
        if _partition(p, arithmetic, 1, 1, device).shared_bytes > device.shared_per_block:
            return Refusal(f"needs the taps and the window of {TILE} results in shared memory")
        partitions = compare_partitions(p, device)
        chosen = partitions[0]
        if chosen.blocks > MAX_GRID:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        bits = _index_bits(p, layout)
        return conv_plan(
            with_padding_mode(self._config(p.dtype, p.precision, chosen.tiles, bits), p.padding_mode),
            p,
            layout,
            bits,
            grid=chosen.blocks,
            block=BLOCK_SIZE,
            shared_bytes=chosen.shared_bytes,
            candidates=tuple((f"{f.groups} times {count(f.tiles, 'tile')} a warp", f.us) for f in partitions),
            own={
                "segments": chosen.segments,
                "groups": chosen.groups,
                "tap_blocks": tap_blocks(p, arithmetic),
                "window": chosen.window,
                "warp_vectors": chosen.warp_vectors,
            },
        )

    def configs(self, device: Device) -> Iterator[Config]:
        for (dtype, precision), arithmetic in arithmetics(device).items():
            if arithmetic.parts == 1:
                for bits in (32, 64):
                    for tiles in dict.fromkeys(tiles for tiles, _ in SHAPES):
                        yield self._config(dtype, precision, tiles, bits)

    def _config(self, dtype: str, precision: str, tiles: int, bits: int) -> Config:
        macros: dict[str, str | int] = {
            "BLOCK_SIZE": BLOCK_SIZE,
            # Caps the registers of a thread; 64-bit offsets take more.
            "MIN_BLOCKS": MIN_BLOCKS if bits == 32 else 4,
            "WARP_TILES": tiles,
            "MULTIPLY_MATRICES": ARITHMETICS[dtype, precision].instruction,
        }
        return Config.for_dtype(self.name, dtype, bits, macros)

    def work(self, problem: ConvProblem, step: Step) -> Work:
        p, params = problem, dict(step.launch.params)
        tiles = params["groups"] * int(dict(step.config.macros)["WARP_TILES"])
        warps = params["segments"] * p.N * p.C_out
        return _work(p, ARITHMETICS[p.dtype, p.precision], warps=warps, tiles=tiles, window=params["window"])


def _index_bits(problem: ConvProblem, layout: Layout) -> int:
    p = problem
    # Warps extend past the last row, and a warp's tiles past the last position. The staged input extends further by the
    # taps.
    hanging = MAX_RESULTS
    overhang = Overhang(samples=1 + BLOCK_SIZE // p.C_out, positions=hanging, taps=4 * ROWS, arrays=("output",))
    warps = (p.L_out // TILE + 2) * p.N * p.C_out + BLOCK_SIZE
    return index_bits(p, layout, overhang, warps, p.L_in + p.L_out + 2 * hanging + p.padding_left + p.K)
