"""How the depthwise families deal rows to blocks and threads: the cost model, and magic numbers for divisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..device import Device
from ..problem import ITEMSIZE, ConvProblem

WARP = 32
BLOCK_SIZE = 256


def accumulator_bytes(dtype: str) -> int:
    return max(4, ITEMSIZE[dtype])


def thread_outputs(dtype: str) -> int:
    """Results of one sliding thread: two 16-byte vectors of accumulators."""
    return 2 * max(1, 16 // accumulator_bytes(dtype))


class Divisor(NamedTuple):
    """What `divide` of cuda_src/depthwise.cuh needs: value / divisor = high_half(value * magic) >> shift."""

    magic: int
    shift: int

    @classmethod
    def of(cls, divisor: int) -> Divisor:
        """For 0 <= value < 2**31 and 1 < divisor < 2**31 (Granlund and Montgomery 1994); 1 and more than that: unused.

        With 2**(bits-1) < divisor <= 2**bits the magic number m = floor(2**(31+bits) / divisor) + 1 fits 32 bits and
        m * divisor exceeds 2**(31+bits) by at most divisor <= 2**bits, so that value * m / 2**(31+bits) rounds down to
        the quotient. It is stored as a signed number.
        """
        if not 1 < divisor < 2**31:
            return cls(0, 0)
        bits = (divisor - 1).bit_length()
        magic = (1 << (31 + bits)) // divisor + 1
        return cls(magic - (1 << 32) if magic >= 1 << 31 else magic, bits - 1)


@dataclass(frozen=True, slots=True)
class Deal:
    """How the rows (n, c_out) are dealt.

    Attributes:
        row_threads: threads that work on one row of a block.
        block_rows: rows of one block.
        tiles: blocks along one row.
        row_groups: blocks along the rows.
        shared_bytes: dynamic shared memory.
        cycles: predicted for the whole launch.
    """

    row_threads: int
    block_rows: int
    tiles: int
    row_groups: int
    shared_bytes: int
    cycles: float

    @property
    def grid(self) -> int:
        return self.tiles * self.row_groups

    @property
    def block(self) -> int:
        """Threads: whole warps."""
        return -(-self.row_threads * self.block_rows // WARP) * WARP

    def params(self) -> dict[str, int]:
        tiles, row_threads = Divisor.of(self.tiles), Divisor.of(self.row_threads)
        return {
            "tiles": self.tiles,
            "tiles_magic": tiles.magic,
            "tiles_shift": tiles.shift,
            "row_threads": self.row_threads,
            "row_threads_magic": row_threads.magic,
            "row_threads_shift": row_threads.shift,
        }


# Figures of the cost model: warp instructions that a multiprocessor issues in a cycle; bytes a cycle to and from
# memory, an H200's 4.3 TB/s over 132 multiprocessors at 1.8 GHz; cycles from a block's first load to its last store
# when nothing else runs.
_ISSUE = 4.0
_BYTES_PER_CYCLE = 18.0
_LATENCY_CYCLES = 2000.0


def choose_deal(
    *,
    rows: int,
    threads: int,
    thread_slots: float,
    position_slots: float,
    positions: Callable[[int], int],
    row_bytes: Callable[[int], float],
    shared_bytes: Callable[[int, int], int],
    row_threads_multiple: int,
    device: Device,
) -> Deal | None:
    """The cheapest deal by predicted cycles; None where no block fits the device's shared memory.

    Candidates cut a row into few tiles and fill a block of at most `BLOCK_SIZE` threads with rows. A block costs the
    longer of its instructions and its traffic; blocks of a multiprocessor share both.

    Args:
        rows: of the problem.
        threads: that one row needs altogether.
        thread_slots: instructions of one thread apart from staging.
        position_slots: instructions to stage one position of a window.
        positions: of a row's window, for a number of threads.
        row_bytes: that a tile of a row moves, likewise.
        shared_bytes: of a block, for (row_threads, block_rows).
        row_threads_multiple: which row_threads must be a multiple of.
        device: for its multiprocessors and shared memory.
    """
    best: Deal | None = None
    for row_threads in _candidates(threads, row_threads_multiple):
        tiles = -(-threads // row_threads)
        for block_rows in range(1, min(rows, BLOCK_SIZE // row_threads) + 1):
            shared = shared_bytes(row_threads, block_rows)
            if shared > device.shared_per_block:
                break
            row_groups = -(-rows // block_rows)
            warps = -(-row_threads * block_rows // WARP)
            slots = warps * thread_slots + block_rows * positions(row_threads) * position_slots / WARP
            resident = max(1, min(2048 // (warps * WARP), device.shared_per_sm // (shared + 1024)))
            cycles = max(slots / _ISSUE, block_rows * row_bytes(row_threads) / _BYTES_PER_CYCLE)
            cycles = max(cycles, _LATENCY_CYCLES / resident)
            blocks = tiles * row_groups
            total = cycles * max(1.0, blocks / device.num_sms) + _LATENCY_CYCLES
            if best is None or total < best.cycles:
                best = Deal(row_threads, block_rows, tiles, row_groups, shared, total)
    return best


def _candidates(threads: int, multiple: int) -> Iterable[int]:
    """Threads of a row in one tile: even cuts into few tiles, and halves of a whole block."""
    most = BLOCK_SIZE // multiple * multiple
    fewest_tiles = -(-threads // most)
    found = {round_up(-(-threads // tiles), multiple) for tiles in range(fewest_tiles, fewest_tiles + 6)}
    found |= {size for size in (most, 128, 64, 32, 16, 8) if size % multiple == 0 and size <= threads}
    return sorted((size for size in found if size <= most), reverse=True)


def divisor_params(problem: ConvProblem) -> dict[str, int]:
    channels = Divisor.of(problem.C_out)
    return {"channels_magic": channels.magic, "channels_shift": channels.shift}


def round_up(value: int, multiple: int, rest: int = 0) -> int:
    """The least number not below `value` that is `rest` modulo `multiple`."""
    return value + (rest - value) % multiple
