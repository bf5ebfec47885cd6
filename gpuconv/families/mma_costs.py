"""How long the launches of conv1d_mma and conv_transpose1d_mma take: their part of the cost model."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..costs import (
    MMA_LATENCY_CYCLES,
    SECTOR_BYTES,
    Code,
    Ending,
    Prediction,
    Work,
    cuda_cores,
    predict_launch,
    tensor_cores,
)
from ..device import Device
from ..problem import ConvProblem
from .arithmetic import ARITHMETICS, STAGE_PAIRS, STAGE_STEPS, UNIT_BYTES, WARP, Access, Arithmetic
from .base import Step, round_up

# Read from the machine code for sm_90 (bench.static): instructions of a stage besides its products,
# fetches and copies; of a warp in the end, for one row of its tile, and for a row that several samples share; of a
# thread that packs one vector.
_STAGE_INSTRUCTIONS = 22
_ENDING_INSTRUCTIONS, _ENDING_INSTRUCTIONS_OF_SAMPLES = 19, 23
_APART_INSTRUCTIONS = 12  # of a lane that stores a result alone
_PACK_INSTRUCTIONS = 140
# Where blocks pack their weights themselves: instructions of a lane to copy a vector, and to pack one, by the bytes of
# an element and the parts of an operand.
_COPY_INSTRUCTIONS = 20
_GATHER_INSTRUCTIONS = {(2, 1): 36, (4, 1): 63, (4, 2): 69}
# Assumptions: cycles until a block's first data arrive and its last are gone; from a load to its data, mostly from L2;
# of the barrier of a stage and its wait for weights, of a block alone; lines that a warp's load looks up in a cycle.
LATENCY_CYCLES = 2500.0
_LOAD_CYCLES = 600.0
_STAGE_CYCLES = 60.0
LINES_PER_CYCLE = 4
ROW_THREADS = 4  # of mma.cuh, that stage the units of a row
_PACK_CYCLES = 2000.0  # of a thread that packs: its divisions, its loads, its stores
# Of a warp that packs 32 vectors of its block, from loads to stores; of both barriers around that.
_GATHER_CYCLES = 80.0
_GATHER_BARRIER_CYCLES = 100.0


def predict_plan(
    launch: TilesLaunch, p: ConvProblem, *, resident: int, segments: int, packed: int, pack_blocks: int, device: Device
) -> float:
    """Microseconds of a plan: the weights packed, the tiles multiplied, the sums of segments added.

    Args:
        launch: of the tiles.
        p: the problem.
        resident: blocks that a multiprocessor holds at a time.
        segments: whose sums another launch adds, where `launch.is_cut`.
        packed: vectors of packed weights, of one part.
        pack_blocks: of the launch that packs them.
        device: the GPU.
    """
    work, code, unit = launch.work(p), launch.code(), tensor_cores(device, launch.arithmetic.itemsize)
    us = predict_launch(work, code, blocks=launch.blocks, resident=resident, unit=unit, device=device).us
    if not launch.raw_vectors:
        us += _predict_packing(p, launch.arithmetic, packed, pack_blocks, device).us
    if launch.is_cut:
        us += _predict_sum_of_segments(p, launch, launch.blocks // segments, segments, device).us
    return us


def input_tasks(access: Access, arithmetic: Arithmetic, units: int, unit_tasks: int, ahead: int, threads: int) -> int:
    """Tasks, of a thread each, in which a block loads the window of a chunk: see mma.cuh.

    Args:
        access: by which it does.
        arithmetic: of the operands. Units of 16-bit elements are copied without registers, by all threads at once.
        units: of the chunk.
        unit_tasks: `Window.unit_tasks`.
        ahead: `Tile.units_ahead`.
        threads: of the block.
    """
    if access is not Access.UNIT:
        return -(-units // ahead) * unit_tasks
    return threads if arithmetic.itemsize == 2 else -(-unit_tasks // ahead) * ROW_THREADS


class TilesLaunch(NamedTuple):
    """A launch of tiles, as far as its time depends on it: fields of `Tile`, `Window` and `Reduction`.

    Attributes:
        weight_tiles: blocks that differ in their weights.
        chunks: of a block.
        stages: of a chunk, on average over blocks.
        is_cut: whether the sums are those of one segment, which another launch adds.
        kept_segments: whose sums a block adds to totals in shared memory.
        tasks: in which a block loads the window of a chunk: `input_tasks`.
        access: by which it loads.
        raw_vectors: of a row's own weights of a chunk, which blocks pack themselves; 0 where these are packed before.
        is_scattered: whether neighbouring positions are in other lines of memory, so that each lane loads its own.
        apart: distance of the results of neighbouring columns, in elements; from 2 on they are stored one by one.
    """

    arithmetic: Arithmetic
    blocks: int
    weight_tiles: int
    chunks: int
    units: int
    stages: float
    samples: int
    used_rows: int
    window_rows: int
    tasks: int
    block_m: int
    block_n: int
    warps_m: int
    warps_n: int
    has_samples: bool
    is_cut: bool
    kept_segments: int
    access: Access
    raw_vectors: int = 0
    is_scattered: bool = False
    apart: int = 1

    @property
    def warps(self) -> int:
        return self.warps_m * self.warps_n

    @property
    def segments_ahead(self) -> int:
        """What one pass of the sum of segments loads: kSegmentsAhead of mma.cuh."""
        fragments = self.block_m * self.block_n // (16 * 8 * self.warps)
        return 4 if fragments <= 4 else 2 if fragments <= 8 else 1

    @property
    def stage_vectors(self) -> int:
        """Vectors of weights that a stage loads."""
        return STAGE_PAIRS * self.arithmetic.parts * self.block_m

    @property
    def terms(self) -> float:
        return self.chunks * self.stages * STAGE_PAIRS * self.arithmetic.channels

    @property
    def staged_vectors(self) -> int:
        """Of the window of a chunk."""
        return self.units * self.window_rows

    @property
    def staged_by_warps(self) -> float:
        """Vectors of all windows, as a warp stages them: one a lane."""
        return self.blocks * self.chunks * self.staged_vectors / WARP

    @property
    def _task_visits(self) -> int:
        """How often warps load and store a task: those for which none is left pass on."""
        return self.blocks * self.chunks * -(-self.tasks // WARP)

    @property
    def _staging_instructions(self) -> float:
        code = self.arithmetic.staging[self.access]
        assert code is not None
        return code.task * self._task_visits + code.element * self.staged_by_warps * self.arithmetic.channels

    @property
    def _staging_wavefronts(self) -> float:
        """Of each vector of the window a lane loads its elements one or two at a time, or all, and stores its parts."""
        a = self.arithmetic
        loads = 4.0 if self.access is Access.UNIT else a.channels / self.access.width
        return self.staged_by_warps * (loads + 4 * a.parts)

    @property
    def _scattered_wavefronts(self) -> float:
        """What scattered loads take more than others."""
        loads = self.staged_by_warps * self.arithmetic.channels if self.is_scattered else 0.0
        return loads * (WARP / LINES_PER_CYCLE - 1)

    def work(self, p: ConvProblem) -> Work:
        a = self.arithmetic
        if self.access is Access.UNIT:
            position_bytes = round_up(self.units * UNIT_BYTES, SECTOR_BYTES)
            input_bytes = self.chunks * self.samples * self.used_rows * position_bytes
        else:
            rows = self.chunks * self.units * a.channels * self.samples
            input_bytes = rows * (self.used_rows * a.itemsize + SECTOR_BYTES - a.itemsize)
        weight_vectors = self.block_m * self.raw_vectors if self.raw_vectors else self.stages * self.stage_vectors
        weight_bytes = self.chunks * weight_vectors * UNIT_BYTES
        gathering = self._gathering()
        stored = (
            self.blocks * self.block_m * self.block_n * 4 if self.is_cut else math.prod(p.output_shape) * p.itemsize
        )
        # Batches of input that come when no stages are left to multiply meanwhile, or before the first; LATENCY_CYCLES
        # has one of those.
        is_copied = self.access is Access.UNIT and a.itemsize == 2
        batches = -(-self.tasks // (WARP * self.warps))
        waits = batches - 1 + (self.chunks - 1) * max(0, batches - self.stages)
        return Work(
            multiply_adds=a.products * self.blocks * self.block_m * self.block_n * self.terms,
            l2_bytes=self.blocks * (input_bytes + weight_bytes) + stored,
            load_share=0.25,
            # Units of 16 bits are copied by a loop of its own.
            staging_instructions=gathering.instructions + (self._staging_instructions if is_copied else 0.0),
            staging_wavefronts=gathering.wavefronts
            + self._scattered_wavefronts
            + (self._staging_wavefronts if is_copied else 0.0),
            visits=self._task_visits,
            dram_bytes=math.prod(p.input_shape) * p.itemsize + self.weight_tiles * weight_bytes + stored,
            waits=LATENCY_CYCLES + waits * _LOAD_CYCLES + gathering.chain,
            ending=self._ending(stored),
        )

    def code(self) -> Code:
        """The estimate of a family; bench.static reads the machine code itself."""
        a = self.arithmetic
        rows, octets = self.block_m // self.warps_m // 16, self.block_n // self.warps_n // 8
        products = STAGE_STEPS * rows * octets * a.products
        fetches = STAGE_STEPS * a.parts * (rows + octets / 2)  # of four matrices
        copies = -(-self.stage_vectors // (WARP * self.warps))
        sums = 4 * rows * octets if a.parts == 2 else 0
        passes = self.blocks * self.warps * self.chunks * self.stages
        gathering = self._gathering()
        if self.raw_vectors:
            copies = 0
        return Code(
            instructions=passes * (products + fetches + copies + sums + _STAGE_INSTRUCTIONS)
            + gathering.instructions
            + self._staging_instructions,
            wavefronts=passes * 4 * (fetches + copies + 1)
            + gathering.wavefronts
            + self._staging_wavefronts
            + self._scattered_wavefronts,
            chain=self.chunks * self.stages * (_STAGE_CYCLES + MMA_LATENCY_CYCLES * STAGE_STEPS),
        )

    def _gathering(self) -> Code:
        """What blocks do that pack their weights themselves: all of them, but for the chain, which is one block's."""
        a = self.arithmetic
        vectors = self.block_m * self.raw_vectors / WARP  # of a chunk, by warps
        every = self.blocks * self.chunks * vectors
        instructions = _COPY_INSTRUCTIONS + _GATHER_INSTRUCTIONS[a.itemsize, a.parts]
        turns = math.ceil(vectors / self.warps)
        return Code(
            instructions=every * instructions,
            wavefronts=every * (4 + a.channels + 4 * a.parts),
            chain=self.chunks * (turns * _GATHER_CYCLES + _GATHER_BARRIER_CYCLES) if turns else 0.0,
        )

    def _ending(self, stored: int) -> Ending:
        warps, results = self.blocks * self.warps, self.blocks * self.block_m * self.block_n
        if self.is_cut:
            return Ending(results / WARP, results / WARP, stored)  # four sums of a lane by one store
        rows = self.block_m // self.warps_m
        each = _ENDING_INSTRUCTIONS_OF_SAMPLES if self.has_samples else _ENDING_INSTRUCTIONS
        # To add four sums to totals takes a load, a store, four additions, and up to twenty moves of the rows behind.
        totals = self.kept_segments * results / WARP / 4
        alone = results / WARP if self.apart > 1 else 0.0  # stores of one result a lane
        itemsize = self.arithmetic.itemsize
        return Ending(
            instructions=warps * rows * each + _APART_INSTRUCTIONS * alone + 22 * totals,
            wavefronts=results / WARP + 2 * warps * rows + alone * (2 + self.apart * itemsize / 4) + 8 * totals,
            stored_bytes=stored,
            sector_bytes=stored * (min(self.apart, SECTOR_BYTES // itemsize) - 1),
        )


def _predict_sum_of_segments(
    p: ConvProblem, launch: TilesLaunch, blocks: int, segments: int, device: Device
) -> Prediction:
    """The launch that adds the sums of segments, in so many blocks, and stores the results."""
    sums = blocks * launch.block_m * launch.block_n
    whole = launch._replace(blocks=blocks, is_cut=False)
    ending = whole.work(p).ending
    work = Work(
        multiply_adds=0.0,
        l2_bytes=4 * segments * sums + ending.stored_bytes,
        dram_bytes=4 * segments * sums + ending.stored_bytes,
        waits=LATENCY_CYCLES + sum(divmod(segments, launch.segments_ahead)) * _LOAD_CYCLES,
        ending=ending,
    )
    # Of a sum an addition, of four a load and its address.
    code = Code(2 * segments * sums / WARP, segments * sums / WARP, 0.0)
    return predict_launch(work, code, blocks=blocks, resident=4, unit=cuda_cores(device, 4), device=device)


def _predict_packing(p: ConvProblem, arithmetic: Arithmetic, vectors: int, blocks: int, device: Device) -> Prediction:
    """The launch of pack_mma_weight; `vectors` of one part. Every weight is read once, in whole sectors."""
    read, written = math.prod(p.weight_shape) * p.itemsize, vectors * arithmetic.parts * UNIT_BYTES
    # A vector passes through shared memory whole, and is read from there element by element.
    code = Code(
        instructions=vectors / WARP * _PACK_INSTRUCTIONS,
        wavefronts=vectors / WARP * (8 + arithmetic.channels + 4 * arithmetic.parts),
        chain=_PACK_CYCLES,
    )
    work = Work(0.0, read + written, dram_bytes=read + written)
    return predict_launch(work, code, blocks=blocks, resident=8, unit=cuda_cores(device, 4), device=device)


def access_of(step: Step) -> Access:
    """The access by which a step of tiles loads the input."""
    macros = dict(step.config.macros)
    if "CHANNELS_LAST" in macros:
        return Access.UNIT
    return Access.PAIR if macros["INPUT_WIDTH"] == "2" else Access.POSITION


def _launch_of(problem: ConvProblem, step: Step) -> TilesLaunch:
    """A step of tiles as the cost model sees it."""
    params, macros = dict(step.launch.params), dict(step.config.macros)
    is_cut = macros["SEGMENT_MODE"] == "2"
    access, ahead = access_of(step), int(macros["PREFETCH"])
    arithmetic = ARITHMETICS[problem.dtype, problem.precision]
    # Those of a chunk, on average over blocks of rows.
    pairs: float = params["pairs"]
    if "product_pairs" in params:
        pairs = params["product_pairs"] / (params["chunks"] * params["row_tiles"])
    return TilesLaunch(
        arithmetic=arithmetic,
        blocks=step.launch.grid,
        weight_tiles=step.launch.grid // (params["column_tiles"] * params["sample_tiles"]),
        chunks=params["segment_chunks"] if is_cut else params["chunks"],
        units=params["units"],
        stages=pairs / STAGE_PAIRS,
        samples=params["block_samples"],
        used_rows=params["planes"] * params["plane_rows"],
        window_rows=params["window_rows"],
        tasks=input_tasks(access, arithmetic, params["units"], params["unit_tasks"], ahead, step.launch.block),
        block_m=int(macros["BLOCK_M"]),
        block_n=int(macros["BLOCK_N"]),
        warps_m=int(macros["WARPS_M"]),
        warps_n=int(macros["WARPS_N"]),
        has_samples=macros["HAS_SAMPLES"] == "1",
        is_cut=is_cut,
        kept_segments=params["segments"] if macros["SEGMENT_MODE"] == "1" else 0,
        access=access,
        raw_vectors=params["units"] * params.get("taps", params["K"]) if "RAW_WEIGHT" in macros else 0,
        is_scattered=params.get("fold", 1) > 1 and access is Access.POSITION,
        apart=params["stride"] if params.get("full_phases", params["stride"]) < params["stride"] else 1,
    )


def work(problem: ConvProblem, step: Step) -> Work:
    """The work of a launch of tiles: every chunk of channels stages a window of the input for all taps."""
    return _launch_of(problem, step).work(problem)


def predict_pass(problem: ConvProblem, step: Step, device: Device) -> Prediction:
    """The time of a step of the plan that multiplies nothing: the packing, or the sum of segments."""
    params = dict(step.launch.params)
    if step.config.kernel == "pack_mma_weight":
        products = step.launch.grid // math.prod(params[f"{name}_parts"] for name in ("out", "phase", "in", "tap"))
        vectors = products * params["product_pairs"] * params["block_rows"]
        arithmetic = ARITHMETICS[problem.dtype, problem.precision]
        return _predict_packing(problem, arithmetic, vectors, step.launch.grid, device)
    return _predict_sum_of_segments(problem, _launch_of(problem, step), step.launch.grid, params["segments"], device)
