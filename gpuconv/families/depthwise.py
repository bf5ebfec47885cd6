"""What the depthwise families share: their plan, the partition of rows among threads, and division by magic numbers.

Contract: cuda_src/depthwise.cuh.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..costs import (
    WARP_ISSUES_PER_CYCLE,
    Code,
    Work,
    blocks_by_shared,
    cuda_cores,
    memory_bytes_per_cycle,
    predict_launch,
)
from ..device import Device
from ..problem import FORMATS, ConvProblem
from ..text import count
from .base import MAX_GRID, Config, Family, Layout, Plan, Refusal, conv_plan, round_up
from .offsets import Overhang, index_bits

WARP = 32
BLOCK_SIZE = 256  # the most threads of a block
MIN_BLOCKS = 5  # that a multiprocessor holds at 48 registers a thread, if it has enough threads
# With so many output channels a group, other families are faster: they load a position once for several channels.
MANY_OUTPUTS = 8
SLIDE_STRIDES = (1, 2)
# Results of a thread that neither slides nor skips; they share the work of finding the thread's row.
MANY_L = 4
# In shorter rows most lanes of a warp of skipping threads would be idle.
SHORTEST_SKIP = 128


def vector_length(dtype: str) -> int:
    """Accumulators of a 16-byte access."""
    return max(1, 16 // FORMATS[dtype].accumulator_bytes)


def slide_outputs(dtype: str) -> int:
    """Results of a sliding thread."""
    return 2 * vector_length(dtype)


def can_slide(problem: ConvProblem, layout: Layout, bits: int) -> bool:
    """Whether the layer has a sliding kernel: the inner axes contiguous, no dilation, a stride that has one."""
    regular = layout["input"].strides[2] == 1 and layout["output"].strides[2] == 1
    return regular and problem.dilation == 1 and problem.stride in SLIDE_STRIDES and bits == 32


def row_skew(problem: ConvProblem, layout: Layout) -> int:
    """How many positions before its row the first tile may begin, to begin at a 16-byte boundary of the output."""
    vec = 16 // problem.itemsize
    aligned = layout["output"].alignment == 16 and all(stride % vec == 0 for stride in layout["output"].strides[:2])
    return 0 if aligned else vec - 1


def can_skip(problem: ConvProblem, layout: Layout, bits: int) -> bool:
    """Whether the layer has a kernel of skipping threads: stride 1, a dilation, contiguous inner axes, long rows."""
    regular = layout["input"].strides[2] == 1 and layout["output"].strides[2] == 1 and bits == 32
    return regular and problem.stride == 1 and problem.dilation > 1 and problem.L_out >= SHORTEST_SKIP


class Divisor(NamedTuple):
    """What `divide` of cuda_src/common.cuh needs: value / divisor = high_half(value * magic) >> shift."""

    magic: int
    shift: int

    @classmethod
    def of(cls, divisor: int) -> Divisor:
        """Valid for 0 <= value < 2**31 and 1 < divisor < 2**31. Kernels handle 1 separately, and 64-bit kernels divide.

        With 2**(bits-1) < divisor <= 2**bits the magic number m = floor(2**(31+bits) / divisor) + 1 fits 32 bits, and
        m * divisor exceeds 2**(31+bits) by at most divisor <= 2**bits, so that value * m / 2**(31+bits) rounds down to
        the quotient (Granlund and Montgomery, 1994). It is stored as the signed number with the same bits.
        """
        if not 1 < divisor < 2**31:
            return cls(0, 0)
        bits = (divisor - 1).bit_length()
        magic = (1 << (31 + bits)) // divisor + 1
        return cls(magic - (1 << 32) if magic >= 1 << 31 else magic, bits - 1)

    @classmethod
    def params(cls, **divisors: int) -> dict[str, int]:
        """The fields NAME_magic and NAME_shift of Params for each divisor."""
        found = {name: cls.of(divisor) for name, divisor in divisors.items()}
        return {f"{name}_{field}": value for name, d in found.items() for field, value in d._asdict().items()}


@dataclass(frozen=True, slots=True)
class BlockWork:
    """What a block does, for the cost model.

    Attributes:
        rows: rows of the problem.
        thread_outputs: results of one thread.
        row_outputs: results of one row, with those that alignment adds.
        thread_slots: instructions that a thread executes once.
        result_slots: instructions for the results of one thread.
        position_slots: instructions to stage one position of a window.
        window_positions: positions of a row's window, for a number of places: threads of a row times repeats.
        row_bytes: bytes that one row's tile moves to and from memory, for a number of places.
        shared_bytes: shared memory of a block, for (places, block_rows).
        thread_bytes: additional shared memory of each thread.
        whole_warps: whether a warp works on one row alone.
        enough_warps: warps of a multiprocessor that reach its full rates.
    """

    rows: int
    thread_outputs: int
    row_outputs: int
    thread_slots: float
    result_slots: float
    position_slots: float
    window_positions: Callable[[int], int]
    row_bytes: Callable[[int], float]
    shared_bytes: Callable[[int, int], int]
    thread_bytes: int = 0
    whole_warps: bool = False
    enough_warps: int = 24


class Variant(Protocol):
    """A way in which the threads of a kernel work, and the shared memory that it needs for a number of places.

    Attributes:
        macros: those that choose it; the others are 0.
        thread_l: results of a thread.
    """

    @property
    def problem(self) -> ConvProblem: ...

    @property
    def macros(self) -> Mapping[str, int]: ...

    @property
    def thread_l(self) -> int: ...

    @property
    def taps_pitch(self) -> int: ...

    def window(self, places: int) -> int: ...

    def window_pitch(self, places: int) -> int: ...

    def plane_pitch(self, places: int, block_rows: int) -> int: ...

    def work(self, layout: Layout) -> BlockWork: ...


@dataclass(frozen=True, slots=True)
class Slide:
    """Sliding threads; where `slide_stride` is 0, the threads of any layer."""

    problem: ConvProblem
    slide_stride: int
    thread_l: int

    @property
    def macros(self) -> Mapping[str, int]:
        return {"SLIDE_STRIDE": self.slide_stride}

    def taps_pitch_of(self, steps: int) -> int:
        """The pitch of taps for so many steps: an odd number of vectors, so that rows use different banks."""
        return round_up(steps * self.slide_stride, 2, 1) * vector_length(self.problem.dtype)


@dataclass(frozen=True, slots=True)
class Skip:
    """Skipping threads."""

    problem: ConvProblem

    @property
    def macros(self) -> Mapping[str, int]:
        return {"IS_SKIPPING": 1}

    @property
    def thread_l(self) -> int:
        return slide_outputs(self.problem.dtype)

    @property
    def taps_pitch(self) -> int:
        return self.problem.K

    def window(self, places: int) -> int:
        vec = vector_length(self.problem.dtype)
        reach = self.problem.dilation * (self.problem.K - 1)
        return -(-(vec - 1 + places * self.thread_l + reach) // vec)

    def window_pitch(self, places: int) -> int:
        return self.window(places) + 2

    def plane_pitch(self, places: int, block_rows: int) -> int:
        return 0

    def shared_bytes(self, places: int, block_rows: int) -> int:
        vec = vector_length(self.problem.dtype)
        return block_rows * (self.window_pitch(places) * vec + self.taps_pitch) * self.problem.format.accumulator_bytes

    def work(self, layout: Layout) -> BlockWork:
        p = self.problem
        vec = vector_length(p.dtype)
        size = p.format.accumulator_bytes
        multiply_adds = self.thread_l * p.format.multiply_adds
        # A tap takes its load and those of the positions that it multiplies; a result passes through shared memory; the
        # rest is as in a sliding thread.
        return BlockWork(
            rows=p.N * p.C_out,
            thread_outputs=self.thread_l,
            row_outputs=p.L_out + row_skew(p, layout),
            thread_slots=165.0,
            result_slots=p.K * (multiply_adds + self.thread_l + 5.0) + 45 + 7 * self.thread_l,
            position_slots=5.0,
            window_positions=lambda places: self.window(places) * vec,
            row_bytes=lambda places: (places * self.thread_l + min(p.L_in, self.window(places) * vec)) * p.itemsize,
            shared_bytes=self.shared_bytes,
            thread_bytes=self.thread_l * size,
            whole_warps=True,
        )


@dataclass(frozen=True, slots=True)
class Partition:
    """How the rows (n, c_out) are partitioned among blocks and threads.

    Attributes:
        row_threads: threads that work on one row of a block.
        repeats: how often each of them computes its results.
        block_rows: rows of one block.
        tiles: blocks along one row.
        row_groups: blocks along the rows.
        shared_bytes: dynamic shared memory.
        us: predicted microseconds of the launch.
    """

    row_threads: int
    repeats: int
    block_rows: int
    tiles: int
    row_groups: int
    shared_bytes: int
    us: float

    @property
    def places(self) -> int:
        """Groups of a thread's results in one tile of a row."""
        return self.row_threads * self.repeats

    @property
    def grid(self) -> int:
        return self.tiles * self.row_groups

    @property
    def block(self) -> int:
        """Threads: whole warps."""
        return round_up(self.row_threads * self.block_rows, WARP)

    def params(self, problem: ConvProblem) -> dict[str, int]:
        """The fields of Params that `find_row` of cuda_src/depthwise.cuh reads, in order."""
        return {
            "tiles": self.tiles,
            **Divisor.params(tiles=self.tiles),
            "row_threads": self.row_threads,
            **Divisor.params(row_threads=self.row_threads),
            "block_rows": self.block_rows,
            "repeats": self.repeats,
            **Divisor.params(C_out=problem.C_out),
        }

    def candidates(self) -> tuple[tuple[str, float], ...]:
        """What `explain` shows: only the chosen partition, since the comparison keeps no other."""
        shape = f"{count(self.block_rows, 'row')} by {count(self.row_threads, 'thread')}"
        return ((f"{shape}, {count(self.repeats, 'time')}", self.us),)


# Of the cost model: cycles from a block's first load to its last store when nothing else runs.
_LATENCY_CYCLES = 2000.0
# Estimated instructions for the start, the barrier and the end of a block.
_BLOCK_SLOTS = 100.0


def choose_partition(work: BlockWork, device: Device) -> Partition | None:
    """The cheapest partition by predicted time; None where no block fits the device's shared memory.

    A multiprocessor issues the instructions and moves the bytes of its blocks. With fewer warps than it needs for its
    full rates, a block takes proportionally longer.
    """
    best: Partition | None = None
    unit, bytes_per_cycle = cuda_cores(device, 4), memory_bytes_per_cycle(device)
    groups = -(-work.row_outputs // work.thread_outputs)
    resident_threads = min(MIN_BLOCKS, device.threads_per_sm // BLOCK_SIZE) * BLOCK_SIZE
    for row_threads, repeats in _row_threads(groups):
        if work.whole_warps and row_threads % WARP:
            continue
        places = row_threads * repeats
        tiles = -(-groups // places)
        for block_rows in _block_rows(min(work.rows, BLOCK_SIZE // row_threads), row_threads):
            shared = work.shared_bytes(places, block_rows) + work.thread_bytes * row_threads * block_rows
            if shared > device.shared_per_block:
                break
            row_groups = -(-work.rows // block_rows)
            warps = -(-row_threads * block_rows // WARP)
            staging = block_rows * work.window_positions(places) * work.position_slots / WARP
            warp_slots = work.thread_slots + repeats * work.result_slots
            slots = _BLOCK_SLOTS + warps * warp_slots + staging
            traffic = block_rows * work.row_bytes(places)
            blocks = tiles * row_groups
            resident = min(32, resident_threads // (warps * WARP), blocks_by_shared(shared, device))
            of_warp = _BLOCK_SLOTS + warp_slots + staging / warps
            alone = work.enough_warps * max(of_warp / WARP_ISSUES_PER_CYCLE, traffic / bytes_per_cycle / warps)
            time = predict_launch(
                Work(0.0, blocks * traffic, dram_bytes=blocks * traffic, waits=_LATENCY_CYCLES),
                Code(blocks * slots, 0.0, alone),
                blocks=blocks,
                resident=max(1, resident),
                unit=unit,
                device=device,
            )
            if best is None or time.us < best.us:
                best = Partition(row_threads, repeats, block_rows, tiles, row_groups, shared, time.us)
    return best


def _block_rows(most: int, row_threads: int) -> list[int]:
    """The numbers of rows of a block to compare, in order: those that fill a number of warps, and a few small ones."""
    full = {WARP * warps // row_threads for warps in range(1, BLOCK_SIZE // WARP + 1)}
    return sorted(rows for rows in {1, 2, 4, 8, 16, most} | full if 1 <= rows <= most)


def _row_threads(groups: int) -> Iterator[tuple[int, int]]:
    """The pairs (threads of a row, repeats) to compare: even cuts of a row into few tiles, and parts of a block."""
    for repeats in (1, 2, 4, 8):
        needed = -(-groups // repeats)
        fewest_tiles = -(-needed // BLOCK_SIZE)
        even = {-(-needed // tiles) for tiles in range(fewest_tiles, fewest_tiles + 5)}
        parts = {size for size in (256, 128, 64, 32, 8, 1) if size <= needed or size == WARP}
        yield from ((row_threads, repeats) for row_threads in sorted(even | parts, reverse=True))
        if needed == 1:
            return


class DepthwiseFamily(Family[ConvProblem]):
    """One input channel and few output channels a group."""

    @abstractmethod
    def variants(self, problem: ConvProblem, layout: Layout, bits: int) -> Iterator[Variant]:
        """The variants that take a layer, in order of preference."""

    @abstractmethod
    def min_blocks(self, dtype: str, bits: int, macros: Mapping[str, int]) -> int:
        """The blocks of a multiprocessor: as many as leave all values of a thread in registers."""

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        if p.C_in_g != 1:
            return Refusal("needs C_in/groups == 1")
        if p.C_out_g >= MANY_OUTPUTS:
            return Refusal(f"needs C_out/groups < {MANY_OUTPUTS}")
        bits = _index_bits(p, layout)
        for variant in self.variants(p, layout, bits):
            partition = choose_partition(variant.work(layout), device)
            if partition is not None:
                break
        else:
            reason = f"needs the taps and the window of one result in {device.shared_per_block} bytes of shared memory"
            return Refusal(reason)
        if partition.grid > MAX_GRID:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        return conv_plan(
            self.config(p.dtype, bits, variant.thread_l, variant.macros),
            p,
            layout,
            bits,
            grid=partition.grid,
            block=partition.block,
            shared_bytes=partition.shared_bytes,
            candidates=partition.candidates(),
            own={**partition.params(p), **self.variant_params(variant, partition)},
        )

    def variant_params(self, variant: Variant, partition: Partition) -> dict[str, int]:
        """The fields of Params that describe the layout of shared memory."""
        return {
            "taps_pitch": variant.taps_pitch,
            "window": variant.window(partition.places),
            "window_pitch": variant.window_pitch(partition.places),
            "plane_pitch": variant.plane_pitch(partition.places, partition.block_rows),
        }

    def config(self, dtype: str, bits: int, thread_l: int, macros: Mapping[str, int]) -> Config:
        """The specialisation of a variant whose threads have `thread_l` results."""
        all_macros = {
            "BLOCK_SIZE": BLOCK_SIZE,
            "MIN_BLOCKS": self.min_blocks(dtype, bits, macros),  # caps the registers of a thread
            "SLIDE_STRIDE": 0,
            "IS_SKIPPING": 0,
            **macros,
            "DTYPE_BYTES": FORMATS[dtype].itemsize,
            "THREAD_L": thread_l,
        }
        return Config.for_dtype(self.name, dtype, bits, all_macros)


def _index_bits(problem: ConvProblem, layout: Layout) -> int:
    # The last block may have rows behind the last row. Positions of its last tile exceed the row by at most a block and
    # a window, which fits in shared memory; conv1d checks them before it forms offsets.
    p = problem
    hanging = (8 * BLOCK_SIZE + 1) * max(MANY_L, slide_outputs(p.dtype)) + 2**17
    span = p.L_in + (p.L_out + hanging) * p.stride + p.padding_left + p.dilation * p.K
    positions = -(-hanging // p.stride) if p.transposed else None
    overhang = Overhang(samples=1 + -(-BLOCK_SIZE // p.C_out), positions=positions)
    return index_bits(p, layout, overhang, 0 if p.transposed else span, p.N * p.C_out + BLOCK_SIZE)
