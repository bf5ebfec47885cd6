"""conv1d_col2im and conv_transpose1d_col2im: few output channels a group and many taps, on tensor cores.

Contracts: cuda_src/conv1d_col2im.cu, cuda_src/conv_transpose1d_col2im.cu.

Rows of the product are pairs (tap, output channel), so that few output channels leave no rows of a matrix empty;
results are sums along its diagonals. conv1d_col2im computes the profile head of BPNet, conv_transpose1d_col2im the
gradients of the stem of Enformer and of the dilated kernels of MiniRocket. By the cost model for an H200, CUDA cores
take 1.4 to 4 times as long for these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from ..costs import Ending, Work, blocks_by_shared, predict_launch, tensor_cores
from ..device import Device
from ..problem import ConvProblem
from . import mma, mma_packing
from .arithmetic import ARITHMETICS, NO_ARITHMETIC, UNIT_BYTES, WARP, Access, Arithmetic, arithmetics
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
from .mma_costs import LATENCY_CYCLES, TilesLaunch, access_of, input_tasks
from .mma_tiles import NUM_STAGES, BlockTile, Tile
from .mma_window import MAX_UNITS, MIN_SEGMENTED_TERMS, Reduction, Window
from .offsets import Overhang, index_bits
from .product import Product

MAX_C_OUT_G = 8
# With fewer weights for each input, CUDA cores are as fast: with dilation conv_transpose1d_gather alone, which is slow.
# With fewer input channels the sums along diagonals would take longer than the products.
MIN_WEIGHTS, MIN_DILATED_WEIGHTS = 48, 8
MIN_C_IN_G = 48
# Where a group has fewer weights, the tail families on CUDA cores are faster: by the bytes of an element and the parts
# of an operand. Of 48 channels by 48 weights they take 0.7 to 1.05 of the time in 16 bits (1.5 on sm_80), 0.65 as split
# TF32, and as long in TF32, by the cost model.
MIN_TAIL_WEIGHTS = {(2, 1): 3072, (4, 1): 0, (4, 2): 8192}
# Positions that a block multiplies besides those of its results, by the parts of an operand: three products for one are
# faster than fused multiply-adds only where hardly any are multiplied twice.
MAX_REACH = {1: 128, 2: 32}
# The error bound holds: a result of n = C_in_g * K products is a sum, rounded to nearest, of K sums of C_in_g products,
# and tensor cores form those within 4/3 C_in_g of the 4n/3 + 2 roundings. Of split TF32 arithmetic.py derives that they
# are within 38 + C_in_g/9, and K more roundings stay within n + 2 for any K from MIN_C_IN_G on.

# Tiles of 80 rows hold the 150 of BPNet in two passes. Where rows are short, tiles of few columns suffice.
_TILES = (
    Tile(64, 256, 1, 4, 2, 4),
    Tile(80, 256, 1, 8, 2, 2),
    Tile(32, 256, 1, 4, 3, 4),
    Tile(64, 128, 2, 2, 3, 4),
    Tile(32, 64, 1, 4, 4, 4),
)
# In 16 bits, where accesses load pairs, two units ahead leave no registers in that of 80 rows.
_SHORT_TILES = tuple(replace(tile, prefetch=1) if tile.block_m == 80 else tile for tile in _TILES)
_SPLIT_TILES = (
    Tile(64, 256, 2, 4, 1, 2),
    Tile(32, 256, 1, 4, 2, 2),
    Tile(64, 128, 2, 2, 2, 2),
    Tile(32, 64, 1, 4, 4, 4),
)
MAX_BLOCK_M, MAX_BLOCK_N = 80, 256
# The tile of a block that is always tried, and the only one of 64-bit offsets: its window holds the reach of any layer.
BASE_TILE = (32, 256)
# Of a block's products in shared memory: see kPitch and kLaneSums in col2im.cuh.
PITCH_GAP = 8
LANE_SUMS = 2

# Of the cost model; from the machine code for sm_90: instructions of a warp to add a tap to LANE_SUMS sums of each
# lane, to begin with such sums, and for a result of each lane. Assumed: cycles of a pass that nothing hides, and of a
# tap.
_TAP_INSTRUCTIONS = 7.0
_SUMS_INSTRUCTIONS = 100.0
_RESULT_INSTRUCTIONS = 60.0
_PASS_CYCLES = 1500.0
_TAP_CYCLES = 10.0


@dataclass(frozen=True, slots=True)
class Tiling:
    """A layer cut into tiles.

    Attributes:
        pass_taps: taps of a pass.
        block_results: positions of a block's results.
        column_tiles: blocks of a sample.
        sums_begin: of the sums in shared memory, in vectors.
        us: predicted microseconds of the launch.
    """

    tile: Tile
    window: Window
    pass_taps: int
    passes: int
    block_results: int
    column_tiles: int
    blocks: int
    sums_begin: int
    shared_bytes: int
    us: float = 0.0


def reach_of(problem: ConvProblem) -> int:
    """From the first position that a result reads to the last."""
    return (problem.K - 1) * problem.dilation


def pointwise(problem: ConvProblem) -> Product:
    """The product of one tap of one output channel with each position. That of all has more rows."""
    p = problem
    view = replace(
        p,
        op="conv1d",
        C_out=p.groups,
        L_in=max(1, p.L_in),  # of a piece of nothing but padding, 0
        K=1,
        padding_left=0,
        padding_right=0,
        dilation=1,
        output_padding=0,
        padding_mode="zeros",
        fusion=None,
    )
    return Product.of(view)


def tiles(arithmetic: Arithmetic, device: Device, bits: int = 32) -> tuple[Tile, ...]:
    """The tiles of an arithmetic.

    Compiled for architectures before sm_90, that of 80 rows spills, and those of split products if they load two units
    ahead.
    """
    whole = _SHORT_TILES if arithmetic.itemsize == 2 else _TILES
    found = _SPLIT_TILES if arithmetic.parts == 2 else whole
    if bits != 32:
        found = tuple(tile for tile in found if (tile.block_m, tile.block_n) == BASE_TILE)
    if device.arch >= 90:
        return found
    if arithmetic.parts == 2:
        return tuple(replace(tile, prefetch=1) if tile.prefetch == 2 else tile for tile in found)
    return tuple(tile for tile in found if tile.block_m < 80)


def _tiling(problem: ConvProblem, tile: Tile, access: Access, reduction: Reduction, bits: int) -> Tiling:
    """`tile.block_n` is more than the reach of the layer."""
    p, parts = problem, ARITHMETICS[problem.dtype, problem.precision].parts
    # A window of pairs may begin one position early.
    rows = tile.block_n + (access.width if access is Access.PAIR else 0)
    window = Window(1, tile.block_n, 1, rows, 0, 0, 0, 1, access)
    pass_taps, block_results = tile.block_m // p.C_out_g, tile.block_n - reach_of(p)
    column_tiles = -(-p.L_out // block_results)
    operands = NUM_STAGES * tile.stage_bytes(parts) + window.rows * bits // 8 + reduction.pairs * 4
    operands += min(reduction.chunks, 2) * parts * reduction.units * window.rows * UNIT_BYTES
    products = tile.block_m * (tile.block_n + PITCH_GAP) * 4
    sums_begin = -(-max(operands, products) // UNIT_BYTES)
    return Tiling(
        tile=tile,
        window=window,
        pass_taps=pass_taps,
        passes=-(-p.K // pass_taps),
        block_results=block_results,
        column_tiles=column_tiles,
        blocks=column_tiles * p.N * p.groups,
        sums_begin=sums_begin,
        shared_bytes=sums_begin * UNIT_BYTES + p.C_out_g * block_results * 4,
    )


@lru_cache(maxsize=1024)
def compare_tilings(problem: ConvProblem, bits: int, access: Access, device: Device) -> tuple[Tiling, ...]:
    """The tilings of a layer that fit the device, the cheapest first."""
    p, arithmetic = problem, ARITHMETICS[problem.dtype, problem.precision]
    reduction, found = Reduction.of(pointwise(p), arithmetic), []
    for tile in tiles(arithmetic, device, bits):
        if tile.block_n <= reach_of(p):
            continue
        tiling = _tiling(p, tile, access, reduction, bits)
        if tiling.shared_bytes <= device.shared_per_block and tiling.blocks <= MAX_GRID:
            found.append(replace(tiling, us=_predict(p, tiling, reduction, arithmetic, device)))
    return tuple(sorted(found, key=lambda tiling: tiling.us))


def _launch(
    problem: ConvProblem,
    tile: BlockTile,
    reduction: Reduction,
    arithmetic: Arithmetic,
    *,
    access: Access,
    window_rows: int,
    tasks: int,
    tiles: int,
    passes: int,
) -> TilesLaunch:
    """The products of all passes as a launch of so many tiles."""
    return TilesLaunch(
        arithmetic=arithmetic,
        blocks=tiles,
        weight_tiles=problem.groups * passes,
        chunks=reduction.chunks,
        units=reduction.units,
        stages=reduction.stages,
        samples=1,
        used_rows=window_rows,
        window_rows=window_rows,
        tasks=tasks,
        block_m=tile.block_m,
        block_n=tile.block_n,
        warps_m=tile.warps_m,
        warps_n=tile.warps_n,
        has_samples=False,
        is_cut=False,
        kept_segments=0,
        access=access,
    )


def _work(problem: ConvProblem, launch: TilesLaunch, passes: int, block_results: int) -> Work:
    """What a launch does in so many passes."""
    p, blocks, products = problem, launch.blocks // passes, launch.work(pointwise(problem).problem)
    stored = math.prod(p.output_shape) * p.itemsize
    # Of a block, by warps: groups of sums, results, vectors of two products.
    sums = p.C_out_g * -(-block_results // (WARP * LANE_SUMS))
    results, kept = p.C_out_g * block_results / WARP, passes * launch.block_m * launch.block_n / 2 / WARP
    ending = Ending(
        instructions=blocks
        * (kept + sums * (p.K * _TAP_INSTRUCTIONS + passes * _SUMS_INSTRUCTIONS) + results * _RESULT_INSTRUCTIONS),
        wavefronts=blocks * (2 * kept + LANE_SUMS * sums * (p.K + 2 * passes) + 2 * results),
        stored_bytes=stored,
    )
    chain = passes * _PASS_CYCLES + -(-sums // launch.warps) * p.K * _TAP_CYCLES
    return replace(
        products,
        l2_bytes=products.l2_bytes - products.ending.stored_bytes + stored,
        dram_bytes=p.bytes(),
        waits=LATENCY_CYCLES + passes * (products.waits - LATENCY_CYCLES) + chain,
        ending=ending,
    )


def _predict(
    problem: ConvProblem, tiling: Tiling, reduction: Reduction, arithmetic: Arithmetic, device: Device
) -> float:
    """Predicted microseconds of the launch that multiplies."""
    p, tile, window = problem, tiling.tile, tiling.window
    launch = _launch(
        p,
        tile,
        reduction,
        arithmetic,
        access=window.access,
        window_rows=window.rows,
        tasks=_tasks(tiling, reduction, arithmetic),
        tiles=tiling.blocks * tiling.passes,
        passes=tiling.passes,
    )
    work, code = _work(p, launch, tiling.passes, tiling.block_results), launch.code()
    code = code._replace(chain=code.chain * tiling.passes)
    resident = min(tile.min_blocks, max(1, blocks_by_shared(tiling.shared_bytes, device)))
    cores = tensor_cores(device, p.itemsize)
    return predict_launch(work, code, blocks=tiling.blocks, resident=resident, unit=cores, device=device).us


def _tasks(tiling: Tiling, reduction: Reduction, arithmetic: Arithmetic) -> int:
    tile, window = tiling.tile, tiling.window
    ahead = tile.units_ahead(window.access)
    return input_tasks(window.access, arithmetic, reduction.units, window.unit_tasks, ahead, tile.threads)


class _ConvCol2im(Family[ConvProblem]):
    """Tensor-core tiles over (tap, c_out) by positions of the input, whose diagonals are the results."""

    canonical_order = False
    keeps_lengths = True
    max_parts: ClassVar[int]

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        arithmetic = arithmetics(device).get((p.dtype, p.precision))
        if arithmetic is None:
            return Refusal(NO_ARITHMETIC)
        if arithmetic.parts > self.max_parts:
            return Refusal("needs float16 (sm_75), bfloat16 (sm_80) or float32 with precision tf32 (sm_80)")
        if p.stride != 1:
            return Refusal("needs stride 1")
        if p.C_out_g > MAX_C_OUT_G:
            return Refusal(f"needs C_out/groups <= {MAX_C_OUT_G}")
        if not MIN_C_IN_G <= p.C_in_g < MIN_SEGMENTED_TERMS:
            return Refusal(f"needs C_in/groups from {MIN_C_IN_G} to {MIN_SEGMENTED_TERMS - 1}")
        min_weights = MIN_DILATED_WEIGHTS if p.transposed and reach_of(p) >= p.K else MIN_WEIGHTS
        if p.C_out_g * p.K < min_weights:
            return Refusal(f"needs C_out/groups * K >= {min_weights}")
        min_tail_weights = MIN_TAIL_WEIGHTS[p.itemsize, arithmetic.parts]
        is_tail = p.C_out_g <= mma.MAX_TAIL_CHANNELS and p.dilation == 1
        if is_tail and p.C_in_g * p.C_out_g * p.K < min_tail_weights:
            least = f"C_in/groups * C_out/groups * K >= {min_tail_weights}"
            return Refusal(f"needs {least}, C_out/groups > {mma.MAX_TAIL_CHANNELS} or a dilation")
        most = MAX_REACH[arithmetic.parts]
        if reach_of(p) > most:
            return Refusal(f"needs dilation * (K - 1) <= {most}")
        product, bits = pointwise(p), _index_bits(p, layout, arithmetic)
        access = mma.input_access(product, layout, arithmetic, bits, device)
        if access is Access.PAIR and p.padding_mode != "zeros":
            access = Access.POSITION
        tilings = compare_tilings(p, bits, access, device)
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
        p, tiling, reduction = problem, tilings[0], Reduction.of(pointwise(problem), arithmetic)
        own = {
            "column_tiles": tiling.column_tiles,
            "block_results": tiling.block_results,
            "pass_taps": tiling.pass_taps,
            "passes": tiling.passes,
            "sums_begin": tiling.sums_begin,
            **reduction.params(),
            "num_tiles": tiling.blocks,
            "round_stages": 1,  # a chunk has one stage
            **tiling.window.params(),
        }
        params = params_of(self.name, conv_fields(p, layout), own)
        launch = Launch(tiling.blocks, tiling.tile.threads, tiling.shared_bytes, bits, params)
        config = self._config(p.dtype, p.precision, tiling.tile, bits, tiling.window.access, device)
        step = Step(with_padding_mode(config, p.padding_mode), launch, conv_arrays(p, PACKED))
        pack, packed_bytes = _pack(p, layout, tiling, reduction)
        candidates = tuple((f"{t.passes} times {t.tile.block_m}x{t.tile.block_n}", t.us) for t in tilings)
        return Plan((pack, step), ((PACKED, packed_bytes),), candidates)

    def configs(self, device: Device) -> Iterator[Config]:
        for (dtype, precision), arithmetic in arithmetics(device).items():
            for bits in (32, 64) if arithmetic.parts <= self.max_parts else ():
                for tile in tiles(arithmetic, device, bits):
                    for access in Access:
                        if access is Access.PAIR and (arithmetic.channels == 4 or bits == 64):
                            continue
                        if access is Access.UNIT and device.arch < mma.ASYNC_COPY_ARCH:
                            continue
                        yield self._config(dtype, precision, tile, bits, access, device)
                yield mma_packing.config("pack_col2im_weight", dtype, precision, bits)

    def _config(self, dtype: str, precision: str, tile: Tile, bits: int, access: Access, device: Device) -> Config:
        return mma.kernel_config(
            self.name, dtype, precision, tile, bits, device, phases_in_rows=False, segment_mode=0, access=access
        )

    def staging(self, step: Step) -> dict[str, str]:
        return {"input": access_of(step).words}

    def work(self, problem: ConvProblem, step: Step) -> Work:
        p, params, macros = problem, dict(step.launch.params), dict(step.config.macros)
        arithmetic, access = ARITHMETICS[p.dtype, p.precision], access_of(step)
        tile = BlockTile(*(int(macros[name]) for name in ("BLOCK_M", "BLOCK_N", "WARPS_M", "WARPS_N", "MIN_BLOCKS")))
        ahead = int(macros["PREFETCH"])
        launch = _launch(
            p,
            tile,
            Reduction.of(pointwise(p), arithmetic),
            arithmetic,
            access=access,
            window_rows=params["window_rows"],
            tasks=input_tasks(access, arithmetic, params["units"], params["unit_tasks"], ahead, tile.threads),
            tiles=step.launch.grid * params["passes"],
            passes=params["passes"],
        )
        return _work(p, launch, params["passes"], params["block_results"])


class Conv1dCol2im(_ConvCol2im):
    """The convolution. In float32 it would compute no layer of the benchmark faster than CUDA cores."""

    name = "conv1d_col2im"
    kind = "conv1d"
    maps_edges = True
    max_parts = 1


class ConvTranspose1dCol2im(_ConvCol2im):
    """The transposed convolution of stride 1, a convolution with its taps in reverse."""

    name = "conv_transpose1d_col2im"
    kind = "conv_transpose1d"
    max_parts = 2


def _pack(problem: ConvProblem, layout: Layout, tiling: Tiling, reduction: Reduction) -> tuple[Step, int]:
    """The launch of pack_col2im_weight, and the bytes that it writes."""
    own = {
        "passes": tiling.passes,
        "chunks": reduction.chunks,
        "pairs": reduction.pairs,
        "block_rows": tiling.tile.block_m,
        "units": reduction.units,
        "pass_taps": tiling.pass_taps,
    }
    num_vectors = problem.groups * tiling.passes * reduction.chunks * reduction.pairs * tiling.tile.block_m
    return mma_packing.pack_in_order("pack_col2im_weight", problem, layout, num_vectors, own)


def _index_bits(problem: ConvProblem, layout: Layout, arithmetic: Arithmetic) -> int:
    p, reduction = problem, Reduction.of(pointwise(problem), arithmetic)
    # Tiles extend past the last position, chunks past the last channel.
    overhang = Overhang(channels=MAX_UNITS * arithmetic.channels, positions=2 * MAX_BLOCK_N)
    blocks = (p.L_out + MAX_BLOCK_N) * p.N * p.groups
    vectors = p.groups * reduction.chunks * reduction.pairs * (p.K + 1) * MAX_BLOCK_M * arithmetic.parts
    return index_bits(p, layout, overhang, blocks, vectors)
