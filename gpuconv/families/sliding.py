"""What the families of cuda_src/sliding.cuh share: aligned copies, blocks of taps, shared memory."""

from __future__ import annotations

from dataclasses import dataclass

from ..costs import RESERVED_SHARED_BYTES
from ..device import Device
from ..problem import FORMATS, ConvProblem
from .base import ArrayLayout, Config

MAX_THREADS = 128
# Blocks that a multiprocessor must be able to hold, which caps the registers of a thread at 128; 64-bit offsets take
# registers that only a lower occupancy has.
MIN_BLOCKS = {32: 4, 64: 2}
# Channels of one buffer: with 4 blocks and rows of 2 KiB enough bytes are in flight to hide the latency of memory.
MAX_CHUNK_CHANNELS = 8


def vector(dtype: str) -> int:
    """Elements in 16 bytes: the columns of a thread, and the taps of a block of taps."""
    return 16 // FORMATS[dtype].itemsize


def block_columns(dtype: str) -> int:
    """The columns of the largest block."""
    return MAX_THREADS * vector(dtype)


def choose_threads(columns: int, blocks: int, dtype: str, device: Device) -> int:
    """The threads of a block: the most with which there are still enough blocks for all multiprocessors.

    Args:
        columns: columns of a sample.
        blocks: blocks for the same columns, of all samples, groups and rows.
        dtype: the problem's dtype.
        device: the GPU.
    """
    threads = MAX_THREADS
    while threads > 32 and column_blocks(columns, threads, dtype) * blocks < MIN_BLOCKS[32] * device.num_sms:
        threads //= 2
    return threads


def column_blocks(columns: int, threads: int, dtype: str) -> int:
    return -(-columns // (threads * vector(dtype)))


@dataclass(frozen=True, slots=True)
class Slide:
    """How a block loads its input and weights: the fields of `Slide` in sliding.cuh that the host chooses.

    Attributes:
        shared_bytes: dynamic shared memory of a block.
        slots: instructions of a thread for one input channel, predicted.
    """

    tap_blocks: int
    lead: int
    chunk_channels: int
    copy_elements: int
    shared_bytes: int
    slots: float

    @classmethod
    def of(
        cls,
        p: ConvProblem,
        input: ArrayLayout,
        device: Device,
        *,
        threads: int,
        rows: int,
        taps: int,
        position: int,
        is_reversed: bool,
    ) -> Slide | None:
        """None where one channel's window and weights do not fit in shared memory.

        Args:
            p: the problem.
            input: the layout of its input.
            device: the GPU.
            threads: threads of a block.
            rows: rows of weights, THREAD_C.
            taps: taps of a row.
            position: position of column 0 and tap 0, negated where is_reversed.
            is_reversed: IS_REVERSED.
        """
        vec = vector(p.dtype)
        choices = []
        copy = vec
        while copy >= 1:
            if copy == 1 or (copy * p.itemsize >= 4 and _is_aligned(p, input, copy)):
                lead = position % copy
                tap_blocks = -(-(taps + lead) // vec)
                # A tap block loads a vector of weights for each row and one vector of input. A copy that is not
                # asynchronous goes through a register and costs twice as much.
                weights = rows * vec * p.format.accumulator_bytes / 16
                copies = vec / copy * (3 if copy * p.itemsize >= 4 else 6)
                multiplied = taps + lead if is_reversed else tap_blocks * vec
                slots = multiplied * rows * vec * p.format.multiply_adds + tap_blocks * (weights + 1) + copies
                choices.append((slots, tap_blocks, lead, copy))
            copy //= 2
        slots, tap_blocks, lead, copy = min(choices)

        window_bytes = (threads + tap_blocks) * vec * p.itemsize
        channel_bytes = 2 * (window_bytes + tap_blocks * rows * vec * p.format.accumulator_bytes)
        shares = (
            min(device.shared_per_block, device.shared_per_sm // blocks - RESERVED_SHARED_BYTES)
            for blocks in (MIN_BLOCKS[32], 2, 1)
        )
        fits = next((share // channel_bytes for share in shares if share >= channel_bytes), 0)
        if fits == 0:
            return None
        chunk_channels = min(fits, MAX_CHUNK_CHANNELS, p.C_in_g)
        return cls(tap_blocks, lead, chunk_channels, copy, chunk_channels * channel_bytes, slots)

    def params(self) -> dict[str, int]:
        return {
            "tap_blocks": self.tap_blocks,
            "lead": self.lead,
            "chunk_channels": self.chunk_channels,
            "copy_elements": self.copy_elements,
        }


def _is_aligned(p: ConvProblem, input: ArrayLayout, elements: int) -> bool:
    """Whether every position that is a multiple of `elements` is aligned to the size of so many elements."""
    stride_n, stride_c, stride_l = input.strides
    return (
        stride_l == 1
        and input.alignment % (elements * p.itemsize) == 0
        and p.L_in % elements == 0
        and (p.N == 1 or stride_n % elements == 0)
        and (p.C_in == 1 or stride_c % elements == 0)
    )


def sliding_config(kernel: str, dtype: str, bits: int, rows: int, *, is_reversed: bool) -> Config:
    macros = {
        "BLOCK_L": block_columns(dtype),
        "THREAD_C": rows,
        "IS_REVERSED": int(is_reversed),
        "MIN_BLOCKS": MIN_BLOCKS[bits],
    }
    return Config.for_dtype(kernel, dtype, bits, macros)
