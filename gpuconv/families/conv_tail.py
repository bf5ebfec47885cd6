"""conv1d_tail and conv_transpose1d_tail: few output channels a group; windows slide through registers.

Contracts: cuda_src/conv1d_tail.cu, cuda_src/conv_transpose1d_tail.cu, cuda_src/sliding.cuh.

`conv1d_tail` is for the last layers of decoders and predictors (`encodec.dec_final`, `bpnet.fconv`), in every dtype: by
the cost model they take 1.2 to 1.8 times as long with `conv1d_narrow` in float32 on an H200. `conv_transpose1d_tail` is
for decoders that produce a waveform (`convtasnet.decoder`) and for the gradients with respect to the input of eight
layers whose input is a waveform: by the cost model they take 2.3 times as long with `conv_transpose1d_phases` there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..costs import RESERVED_SHARED_BYTES
from ..device import Device
from ..problem import DTYPES, FORMATS, ConvProblem
from .base import MAX_GRID, ArrayLayout, Config, Family, Layout, Plan, Refusal, conv_fields, conv_plan
from .offsets import Overhang, index_bits

WARP = 32
MAX_THREADS = 128
# With more output channels a group, tiles over channels are faster.
MAX_C_OUT_G = 4
# Blocks that a multiprocessor must be able to hold, which caps the registers of a thread at 128; 64-bit offsets take
# registers that only a lower occupancy has.
MIN_BLOCKS = {32: 4, 64: 2}
# Channels of one buffer: with 4 blocks and rows of 2 KiB enough bytes are in flight to hide the latency of memory.
MAX_CHUNK_CHANNELS = 8
# Every block of eight rows of the transposed operation reads the input again, so with more rows tiles are faster.
MAX_ROWS = 32


def _vector(dtype: str) -> int:
    """Elements in 16 bytes: the columns of a thread, and the taps of a block of taps."""
    return 16 // FORMATS[dtype].itemsize


def _column_blocks(columns: int, threads: int, dtype: str) -> int:
    return -(-columns // (threads * _vector(dtype)))


def _choose_threads(columns: int, blocks: int, dtype: str, device: Device) -> int:
    """The threads of a block: the most with which there are still enough blocks for all multiprocessors.

    Args:
        columns: columns of a sample.
        blocks: blocks for the same columns, of all samples, groups and rows.
        dtype: the problem's dtype.
        device: the GPU.
    """
    threads = MAX_THREADS
    while threads > WARP and _column_blocks(columns, threads, dtype) * blocks < MIN_BLOCKS[32] * device.num_sms:
        threads //= 2
    return threads


@dataclass(frozen=True, slots=True)
class Slide:
    """How a block loads its input and weights: the fields of `Slide` in sliding.cuh that the host chooses.

    Attributes:
        shared_bytes: dynamic shared memory of a block.
    """

    tap_blocks: int
    lead: int
    chunk_channels: int
    copy_elements: int
    shared_bytes: int

    @classmethod
    def of(
        cls, p: ConvProblem, input: ArrayLayout, device: Device, *, threads: int, rows: int, taps: int, position: int
    ) -> Slide | None:
        """None where one channel's window and weights do not fit in shared memory.

        Args:
            p: the problem.
            input: the layout of its input.
            device: the GPU.
            threads: threads of a block.
            rows: rows of weights, THREAD_C.
            taps: taps of a row.
            position: position of column 0 and tap 0, negated in the transposed operation.
        """
        vec = _vector(p.dtype)
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
                multiplied = taps + lead if p.transposed else tap_blocks * vec
                slots = multiplied * rows * vec * p.format.multiply_adds + tap_blocks * (weights + 1) + copies
                choices.append((slots, tap_blocks, lead, copy))
            copy //= 2
        _, tap_blocks, lead, copy = min(choices)

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
        return cls(tap_blocks, lead, chunk_channels, copy, chunk_channels * channel_bytes)

    def params(self) -> dict[str, int]:
        return {
            "tap_blocks": self.tap_blocks,
            "lead": self.lead,
            "chunk_channels": self.chunk_channels,
            "copy_elements": self.copy_elements,
        }


def _reach(p: ConvProblem) -> int:
    """How much further the windows of blocks reach that extend past the last column."""
    return (MAX_THREADS + 4) * _vector(p.dtype) + p.K


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


class _Tail(Family[ConvProblem]):
    """All output channels of a group in few threads, inputs read in windows."""

    rows: ClassVar[tuple[int, ...]]
    """Rows that a kernel computes; only the kernel for the most has 64-bit indices."""

    def _plan(
        self,
        p: ConvProblem,
        layout: Layout,
        device: Device,
        own: dict[str, int],
        *,
        bits: int,
        rows: int,
        columns: int,
        taps: int,
        position: int,
        row_blocks: int = 1,
    ) -> Plan | Refusal:
        """`taps` and `position` as in `Slide.of`; `own` are fields of Params that one of the families has."""
        blocks = p.N * p.groups * row_blocks
        threads = _choose_threads(columns, blocks, p.dtype, device)
        slide = Slide.of(p, layout["input"], device, threads=threads, rows=rows, taps=taps, position=position)
        if slide is None:
            return Refusal("needs the weights of an input channel to fit in shared memory")
        column_blocks = _column_blocks(columns, threads, p.dtype)
        if column_blocks * blocks > MAX_GRID:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        return conv_plan(
            self._config(p.dtype, bits, rows),
            p,
            layout,
            bits,
            grid=column_blocks * blocks,
            block=threads,
            shared_bytes=slide.shared_bytes,
            own={"column_blocks": column_blocks, **slide.params(), **own},
        )

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for rows in self.rows:
                yield self._config(dtype, 32, rows)
            yield self._config(dtype, 64, self.rows[-1])

    def _config(self, dtype: str, bits: int, rows: int) -> Config:
        macros = {
            "BLOCK_L": MAX_THREADS * _vector(dtype),
            "THREAD_C": rows,
            "IS_REVERSED": int(self.kind == "conv_transpose1d"),
            "MIN_BLOCKS": MIN_BLOCKS[bits],
        }
        return Config.for_dtype(self.name, dtype, bits, macros)


class Conv1dTail(_Tail):
    """All output channels of a group in one thread, every input read once."""

    name = "conv1d_tail"
    kind = "conv1d"
    rows = (1, 2, 4)  # output channels; a layer with 3 uses the kernel for 4

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        if p.C_out_g > MAX_C_OUT_G:
            return Refusal(f"needs C_out/groups <= {MAX_C_OUT_G}")
        if p.C_in_g == 0:
            return Refusal("needs input channels")
        if p.C_in_g == 1 and p.groups > 1:
            return Refusal("needs C_in/groups > 1 or groups = 1")
        if p.stride != 1 or p.dilation != 1:
            return Refusal("needs stride 1 and dilation 1")
        overhang = Overhang(rows=self.rows[-1], channels=MAX_CHUNK_CHANNELS, positions=_reach(p))
        bits = index_bits(p, layout, overhang, _column_blocks(p.L_out, WARP, p.dtype) * p.N * p.groups)
        vec, fields = _vector(p.dtype), conv_fields(p, layout)
        vector_stores = (
            layout["output"].alignment == 16
            and fields["output_stride_l"] == 1
            and (p.N == 1 or fields["output_stride_n"] % vec == 0)
            and (p.C_out == 1 or fields["output_stride_c"] % vec == 0)
        )
        return self._plan(
            p,
            layout,
            device,
            {"vector_stores": int(vector_stores)},
            bits=bits,
            rows=self.rows[-1] if bits == 64 else next(rows for rows in self.rows if rows >= p.C_out_g),
            columns=p.L_out,
            taps=p.K,
            position=-p.padding_left,
        )


class ConvTranspose1dTail(_Tail):
    """All output channels and phases of a group in few threads."""

    name = "conv_transpose1d_tail"
    kind = "conv_transpose1d"
    rows = (4, 8)  # (c_out, phase)

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p, all_rows = problem, problem.C_out_g * problem.stride
        if p.C_out_g > MAX_C_OUT_G:
            return Refusal(f"needs C_out/groups <= {MAX_C_OUT_G}")
        if p.C_in_g == 0 or p.L_in == 0:
            return Refusal("needs input")
        if p.C_in_g == 1 and p.groups > 1:
            return Refusal("needs C_in/groups > 1 or groups = 1")
        if p.dilation != 1:
            return Refusal("needs dilation 1")
        if all_rows > MAX_ROWS:
            return Refusal(f"needs C_out/groups * stride <= {MAX_ROWS}")
        q_begin = p.padding_left // p.stride
        columns = (p.L_out - 1 + p.padding_left) // p.stride - q_begin + 1  # values of q, whatever their phase
        taps = -(-p.K // p.stride)  # of a phase; an output without padding may lie behind the last tap of its phase
        (few, many), blocks = self.rows, _column_blocks(columns, WARP, p.dtype) * p.N * p.groups
        overhang = Overhang(channels=MAX_CHUNK_CHANNELS, positions=_reach(p) + 1)
        bits = index_bits(p, layout, overhang, blocks * -(-all_rows // few))
        # Few rows, though they read inputs more often, where many would leave schedulers without a second warp.
        has_warps = all_rows > few and blocks * -(-all_rows // many) >= 8 * device.num_sms
        rows = many if bits == 64 or has_warps else few
        row_blocks = -(-all_rows // rows)
        return self._plan(
            p,
            layout,
            device,
            {"row_blocks": row_blocks, "columns": columns, "q_begin": q_begin, "taps": taps},
            bits=bits,
            rows=rows,
            columns=columns,
            taps=taps,
            position=-q_begin,
            row_blocks=row_blocks,
        )
