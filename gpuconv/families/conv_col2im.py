"""conv1d_col2im and conv_transpose1d_col2im: few output channels a group and many taps, on tensor cores.

Contracts: cuda_src/conv1d_col2im.cu, cuda_src/conv_transpose1d_col2im.cu.

Rows of the product are pairs (run of taps, row of results), so that few output channels leave few rows of a matrix
empty; results are sums along its diagonals. conv1d_col2im computes the profile head of BPNet, conv_transpose1d_col2im
the gradients of the filter bank of SincNet, of the stem of Enformer and of the dilated kernels of MiniRocket. By the
cost model for an H200, CUDA cores or conv_transpose1d_mma take 1.2 to 4 times as long for these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

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
    round_up,
    with_padding_mode,
)
from .mma_costs import TilesLaunch, access_of, input_tasks
from .mma_tiles import NUM_STAGES, BlockTile, Tile
from .mma_window import MAX_UNITS, MIN_SEGMENTED_TERMS, Reduction, Window
from .offsets import Overhang, index_bits
from .product import Product

MAX_C_OUT_G = 8
# With fewer weights for each input, by the parts of an operand, CUDA cores are as fast: with dilation
# conv_transpose1d_gather alone, which is slow. With fewer input channels the products would not take longest.
MIN_WEIGHTS, MIN_DILATED_WEIGHTS = {1: 48, 2: 60}, 8
MIN_C_IN_G = 48
# Rows of results, (c_out, phase): with more, conv_transpose1d_mma leaves few rows of a matrix empty, either.
MAX_RUN_ROWS = 12
# Where that takes a layer, so many taps of a row are needed, and at most so many products of a run: it has segments for
# long sums, and needs no launch to pack the weights of small problems.
MIN_ROW_TAPS, MAX_RUN_TERMS = 12, 2048
# Positions that a block multiplies besides those of its results, by the parts of an operand: three products for one are
# faster than fused multiply-adds only where few are multiplied twice.
MAX_REACH = {1: 128, 2: 80}
# The error bound holds: a result of n products is a sum, rounded to nearest, of sums of one run each, and tensor cores
# form those within 4/3 of their products of the 4n/3 + 2 roundings. Of split TF32 arithmetic.py derives that sums of m
# products are within 38 + m/9, and as many more roundings as there are runs stay within n + 2 from m = MIN_C_IN_G on.

# Rows of the product. More would need fewer loads of the input from shared memory, but leave registers for fewer
# columns, so that more are multiplied twice. Warps of 128 columns, 128 sums a thread, load 17 % less than of 64.
MAX_BLOCK_M = 32
# Where rows are short, tiles of few columns suffice.
_TILES = (
    Tile(32, 512, 1, 4, 2, 4),
    Tile(32, 256, 1, 4, 3, 4),
    Tile(32, 64, 1, 4, 4, 4),
    Tile(16, 256, 1, 4, 3, 4),
)
_SPLIT_TILES = (
    Tile(32, 256, 1, 4, 2, 2),
    Tile(32, 128, 1, 4, 3, 4),
    Tile(16, 256, 1, 4, 3, 4),
)
MAX_BLOCK_N = 512
# Of the only tile with 64-bit offsets, by the parts of an operand: more than the reach of any layer. With more, split
# products spill on sm_100 and sm_120.
BASE_COLUMNS = {1: 256, 2: 128}
# Of a block's products in shared memory: see kPitch and kLaneSums in col2im.cuh.
PITCH_GAP = 8
LANE_SUMS = 2

# Of the cost model; from the machine code for sm_90: instructions of a warp to add a product to LANE_SUMS sums of each
# lane, to begin with such sums, and for a result of each lane. Assumed: cycles behind the products that nothing hides,
# and of a run.
_RUN_INSTRUCTIONS = 7.0
_SUMS_INSTRUCTIONS = 100.0
_RESULT_INSTRUCTIONS = 60.0
_ENDING_CYCLES = 1500.0
_RUN_CYCLES = 10.0


@dataclass(frozen=True, slots=True)
class Runs:
    """How the taps of a layer form runs, of which each row of the product sums one: see col2im.cuh.

    Attributes:
        rows: of results, in a group: pairs (c_out, phase).
        taps: of the rows with the most.
        run_taps: taps of a run.
        runs: of a row.
    """

    rows: int
    taps: int
    run_taps: int
    runs: int

    @classmethod
    def of(cls, problem: ConvProblem) -> Runs:
        """The runs that need the least time, by the layer alone.

        Time goes by the taps of a run and the fragments of 16 rows, and one more for the loads of the input that these
        share. There are at least two runs, so that the rows of every phase have as many taps as a run.
        """
        stride = problem.stride if problem.transposed else 1
        rows, taps = problem.C_out_g * stride, -(-problem.K // stride)
        found = ((length, -(-taps // length)) for length in range(1, taps))
        fitting = (f for f in found if rows * f[1] <= MAX_BLOCK_M)
        length, runs = min(fitting, key=lambda f: ((-(-rows * f[1] // 16) + 1) * f[0], f[0]))
        return cls(rows, taps, length, runs)

    @property
    def rest_taps(self) -> int:
        """From the first tap of the first run to that of the last one."""
        return self.taps - self.run_taps

    def params(self) -> dict[str, int]:
        """The fields of Params."""
        return {"taps": self.taps, "run_taps": self.run_taps, "runs": self.runs, "run_rows": self.rows}


@dataclass(frozen=True, slots=True)
class Tiling:
    """A layer cut into tiles.

    Attributes:
        block_results: results of a block and row.
        column_tiles: blocks of a sample.
        us: predicted microseconds of the launch.
    """

    tile: Tile
    window: Window
    block_results: int
    column_tiles: int
    blocks: int
    shared_bytes: int
    us: float = 0.0


def reach_of(problem: ConvProblem) -> int:
    """From the first position that a result reads to the last."""
    return (Runs.of(problem).taps - 1) * problem.dilation


def results_of(problem: ConvProblem) -> int:
    """Results of a row of a sample."""
    p = problem
    return -(-(p.L_out + p.padding_left % p.stride) // p.stride) if p.transposed else p.L_out


def product_of(problem: ConvProblem) -> Product:
    """The product of one run of one row with each position. That of all has more rows."""
    p, run_taps = problem, Runs.of(problem).run_taps
    span = (run_taps - 1) * p.dilation + 1
    view = replace(
        p,
        op="conv1d",
        C_out=p.groups,
        L_in=max(p.L_in, span),  # of a piece of nothing but padding, 0
        K=run_taps,
        stride=1,
        padding_left=0,
        padding_right=0,
        output_padding=0,
        padding_mode="zeros",
        fusion=None,
    )
    return Product.of(view)


def reduction_of(problem: ConvProblem, arithmetic: Arithmetic) -> Reduction:
    """The order of summation of a run, in one segment."""
    reduction = Reduction.of(product_of(problem), arithmetic)
    return replace(reduction, segment_chunks=reduction.chunks)


def tiles(arithmetic: Arithmetic, device: Device, bits: int = 32) -> tuple[Tile, ...]:
    """The tiles of an arithmetic. sm_75 has no shared memory for the products of 512 columns."""
    found = _SPLIT_TILES if arithmetic.parts == 2 else _TILES
    if bits != 32:
        base = MAX_BLOCK_M, BASE_COLUMNS[arithmetic.parts]
        return tuple(tile for tile in found if (tile.block_m, tile.block_n) == base)
    return tuple(tile for tile in found if _product_bytes(tile) <= device.shared_per_block)


def _product_bytes(tile: Tile) -> int:
    """Of a block's products in shared memory."""
    return tile.block_m * (tile.block_n + PITCH_GAP) * 4


def _tiling(problem: ConvProblem, tile: Tile, access: Access, reduction: Reduction, bits: int) -> Tiling:
    """`tile.block_n` is more than the positions from a result's first run to its last."""
    p, parts, runs = problem, ARITHMETICS[problem.dtype, problem.precision].parts, Runs.of(problem)
    # A window of pairs may begin one position early.
    rows = round_up(tile.block_n + (runs.run_taps - 1) * p.dilation + access.width - 1, access.width)
    window = Window(1, tile.block_n, 1, rows, 0, p.dilation, 0, 1, access)
    block_results = tile.block_n - runs.rest_taps * p.dilation
    column_tiles = -(-results_of(p) // block_results)
    operands = NUM_STAGES * tile.stage_bytes(parts) + window.rows * bits // 8 + reduction.pairs * 4
    operands += min(reduction.chunks, 2) * parts * reduction.units * window.rows * UNIT_BYTES
    return Tiling(
        tile=tile,
        window=window,
        block_results=block_results,
        column_tiles=column_tiles,
        blocks=column_tiles * p.N * p.groups,
        shared_bytes=max(operands, _product_bytes(tile)),
    )


@lru_cache(maxsize=1024)
def compare_tilings(problem: ConvProblem, bits: int, access: Access, device: Device) -> tuple[Tiling, ...]:
    """The tilings of a layer that fit the device, the cheapest first."""
    p, arithmetic, runs = problem, ARITHMETICS[problem.dtype, problem.precision], Runs.of(problem)
    reduction, found = reduction_of(p, arithmetic), []
    for tile in tiles(arithmetic, device, bits):
        if tile.block_m < runs.rows * runs.runs or tile.block_n <= runs.rest_taps * p.dilation:
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
    blocks: int,
) -> TilesLaunch:
    """The products as a launch of tiles."""
    return TilesLaunch(
        arithmetic=arithmetic,
        blocks=blocks,
        weight_tiles=problem.groups,
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


def _work(problem: ConvProblem, launch: TilesLaunch, block_results: int) -> Work:
    """What a launch does."""
    p, blocks, products, runs = problem, launch.blocks, launch.work(product_of(problem).problem), Runs.of(problem)
    stored = math.prod(p.output_shape) * p.itemsize
    # Of a block, by warps: groups of sums, results, vectors of two products.
    sums = runs.rows * -(-block_results // (WARP * LANE_SUMS))
    results, kept = runs.rows * block_results / WARP, launch.block_m * launch.block_n / 2 / WARP
    each = runs.runs * _RUN_INSTRUCTIONS + _SUMS_INSTRUCTIONS
    ending = Ending(
        instructions=blocks * (kept + sums * each + results * _RESULT_INSTRUCTIONS),
        wavefronts=blocks * (2 * kept + LANE_SUMS * sums * (runs.runs + 1) + 2 * results),
        stored_bytes=stored,
    )
    chain = _ENDING_CYCLES + -(-sums // launch.warps) * runs.runs * _RUN_CYCLES
    return replace(
        products,
        l2_bytes=products.l2_bytes - products.ending.stored_bytes + stored,
        dram_bytes=p.bytes(),
        waits=products.waits + chain,
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
        blocks=tiling.blocks,
    )
    work = _work(p, launch, tiling.block_results)
    resident = min(tile.min_blocks, max(1, blocks_by_shared(tiling.shared_bytes, device)))
    cores = tensor_cores(device, p.itemsize)
    return predict_launch(work, launch.code(), blocks=tiling.blocks, resident=resident, unit=cores, device=device).us


def _tasks(tiling: Tiling, reduction: Reduction, arithmetic: Arithmetic) -> int:
    tile, window = tiling.tile, tiling.window
    ahead = tile.units_ahead(window.access)
    return input_tasks(window.access, arithmetic, reduction.units, window.unit_tasks, ahead, tile.threads)


class _ConvCol2im(Family[ConvProblem]):
    """Tensor-core tiles over (run, row of results) by positions of the input, whose diagonals are the results."""

    canonical_order = False
    keeps_lengths = True

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        arithmetic = arithmetics(device).get((p.dtype, p.precision))
        if arithmetic is None:
            return Refusal(NO_ARITHMETIC)
        reason = _refuse_layer(p, arithmetic)
        if reason is not None:
            return Refusal(reason)
        product, bits = product_of(p), _index_bits(p, layout, arithmetic)
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
        p, tiling, reduction = problem, tilings[0], reduction_of(problem, arithmetic)
        own = {
            "column_tiles": tiling.column_tiles,
            "results": results_of(p),
            "block_results": tiling.block_results,
            **Runs.of(p).params(),
            **reduction.params(),
            "num_tiles": tiling.blocks,
            "round_stages": mma.round_stages(_tasks(tiling, reduction, arithmetic), tiling.tile, reduction),
            **tiling.window.params(),
        }
        params = params_of(self.name, conv_fields(p, layout), own)
        launch = Launch(tiling.blocks, tiling.tile.threads, tiling.shared_bytes, bits, params)
        config = self._config(p.dtype, p.precision, tiling.tile, bits, tiling.window.access, device)
        step = Step(with_padding_mode(config, p.padding_mode), launch, conv_arrays(p, PACKED))
        pack, packed_bytes = _pack(p, layout, tiling, reduction)
        candidates = tuple((f"{t.tile.block_m}x{t.tile.block_n}", t.us) for t in tilings)
        return Plan((pack, step), ((PACKED, packed_bytes),), candidates)

    def configs(self, device: Device) -> Iterator[Config]:
        for (dtype, precision), arithmetic in arithmetics(device).items():
            for bits in (32, 64):
                for access in Access:
                    if access is Access.PAIR and (arithmetic.channels == 4 or bits == 64):
                        continue
                    if access is Access.UNIT and device.arch < mma.ASYNC_COPY_ARCH:
                        continue
                    for tile in tiles(arithmetic, device, bits):
                        if tile.block_m < MAX_BLOCK_M and self.kind == "conv1d":
                            continue  # the runs of its layers, which have at least MIN_WEIGHTS, take more rows
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
            reduction_of(p, arithmetic),
            arithmetic,
            access=access,
            window_rows=params["window_rows"],
            tasks=input_tasks(access, arithmetic, params["units"], params["unit_tasks"], ahead, tile.threads),
            blocks=step.launch.grid,
        )
        return _work(p, launch, params["block_results"])


class Conv1dCol2im(_ConvCol2im):
    """The convolution, of stride 1."""

    name = "conv1d_col2im"
    kind = "conv1d"
    maps_edges = True


class ConvTranspose1dCol2im(_ConvCol2im):
    """The transposed convolution, a convolution of stride 1 with its taps in reverse for each phase."""

    name = "conv_transpose1d_col2im"
    kind = "conv_transpose1d"


def _refuse_layer(problem: ConvProblem, arithmetic: Arithmetic) -> str | None:
    """Why these families do not take a layer, by the layer alone."""
    p = problem
    if p.stride != 1 and not p.transposed:
        return "needs stride 1"
    if p.stride != 1 and p.dilation != 1:
        return "needs stride 1 or dilation 1"
    if p.C_out_g > MAX_C_OUT_G:
        return f"needs C_out/groups <= {MAX_C_OUT_G}"
    if not MIN_C_IN_G <= p.C_in_g < MIN_SEGMENTED_TERMS:
        return f"needs C_in/groups from {MIN_C_IN_G} to {MIN_SEGMENTED_TERMS - 1}"
    if p.C_out_g * p.stride > MAX_RUN_ROWS:
        return f"needs C_out/groups * stride <= {MAX_RUN_ROWS}"
    if p.stride >= p.K:
        return "needs K > stride"
    runs = Runs.of(p)
    if arithmetic.parts == 1 and runs.rows >= mma.MIN_ROWS:
        if runs.taps < MIN_ROW_TAPS:
            return f"needs K >= {MIN_ROW_TAPS} * stride"
        if p.C_in_g * runs.run_taps > MAX_RUN_TERMS:
            return f"needs C_in/groups <= {MAX_RUN_TERMS // runs.run_taps}"
    min_weights = MIN_DILATED_WEIGHTS if p.transposed and p.dilation > 1 else MIN_WEIGHTS[arithmetic.parts]
    if p.C_out_g * p.K < min_weights:
        return f"needs C_out/groups * K >= {min_weights}"
    most = MAX_REACH[arithmetic.parts]
    if reach_of(p) > most:
        return f"needs dilation * (taps - 1) <= {most}"
    return None


def _pack(problem: ConvProblem, layout: Layout, tiling: Tiling, reduction: Reduction) -> tuple[Step, int]:
    """The launch of pack_col2im_weight, and the bytes that it writes."""
    p = problem
    stride_k = conv_fields(p, layout)["weight_stride_k"]
    own = {
        "chunks": reduction.chunks,
        "pairs": reduction.pairs,
        "block_rows": tiling.tile.block_m,
        "units": reduction.units,
        **Runs.of(p).params(),
        "stride": p.stride,
        "weight_first": 0 if p.transposed else (p.K - 1) * stride_k,
        "weight_stride_k": stride_k if p.transposed else -stride_k,
    }
    num_vectors = p.groups * reduction.chunks * reduction.pairs * tiling.tile.block_m
    return mma_packing.pack_in_order("pack_col2im_weight", problem, layout, num_vectors, own)


def _index_bits(problem: ConvProblem, layout: Layout, arithmetic: Arithmetic) -> int:
    p, reduction = problem, reduction_of(problem, arithmetic)
    # Tiles extend past the last position, chunks past the last channel.
    overhang = Overhang(channels=MAX_UNITS * arithmetic.channels, positions=2 * MAX_BLOCK_N)
    blocks = (results_of(p) + MAX_BLOCK_N) * p.N * p.groups
    vectors = p.groups * reduction.chunks * reduction.pairs * MAX_BLOCK_M * arithmetic.parts
    return index_bits(p, layout, overhang, blocks, vectors)
