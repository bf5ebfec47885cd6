"""conv_transpose1d_tail: few output channels a group, all phases in few threads; windows slide through registers.

Contract: cuda_src/conv_transpose1d_tail.cu.

It is for decoders that produce a waveform (`convtasnet.decoder`) and for the gradients with respect to the input of
eight layers whose input is a waveform: by the cost model they take 2.3 times as long with `conv_transpose1d_phases` in
float32 on an H200.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..device import Device
from ..problem import DTYPES, ConvProblem
from .base import MAX_GRID, Config, Family, Layout, Plan, Refusal, conv_plan
from .offsets import Overhang, index_bits
from .sliding import (
    MAX_CHUNK_CHANNELS,
    Slide,
    block_columns,
    choose_threads,
    column_blocks,
    sliding_config,
    vector,
)

# Rows (c_out, phase) that a kernel computes.
ROWS = (4, 8)
WARP = 32
MAX_C_OUT_G = 4
# Every block of eight rows reads the input again, so with more rows tiles over rows are faster.
MAX_ROWS = 32


class ConvTranspose1dTail(Family[ConvProblem]):
    """All output channels and phases of a group in few threads, inputs read in windows."""

    name = "conv_transpose1d_tail"
    kind = "conv_transpose1d"

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        if p.C_out_g > MAX_C_OUT_G:
            return Refusal(f"needs C_out/groups <= {MAX_C_OUT_G}")
        if p.C_in_g == 0 or p.L_in == 0:
            return Refusal("needs input")
        if p.C_in_g == 1 and p.groups > 1:
            return Refusal("needs C_in/groups > 1 or groups = 1")
        if p.dilation != 1:
            return Refusal("needs dilation 1")
        if p.C_out_g * p.stride > MAX_ROWS:
            return Refusal(f"needs C_out/groups * stride <= {MAX_ROWS}")
        q_begin = p.padding_left // p.stride
        columns = (p.L_out - 1 + p.padding_left) // p.stride - q_begin + 1  # values of q, whatever their phase
        taps = -(-p.K // p.stride)  # of a phase; an output without padding may lie behind the last tap of its phase
        # The windows of blocks that extend past the last column reach so many positions further.
        around = block_columns(p.dtype) + p.K + 4 * vector(p.dtype)
        overhang = Overhang(channels=MAX_CHUNK_CHANNELS, positions=around + 1)
        blocks = column_blocks(columns, WARP, p.dtype) * p.N * p.groups * -(-p.C_out_g * p.stride // ROWS[0])
        bits = index_bits(p, layout, overhang, blocks)
        rows = self._rows(p, columns, bits, device)
        row_blocks = -(-p.C_out_g * p.stride // rows)
        threads = choose_threads(columns, p.N * p.groups * row_blocks, p.dtype, device)
        slide = Slide.of(
            p, layout["input"], device, threads=threads, rows=rows, taps=taps, position=-q_begin, is_reversed=True
        )
        if slide is None:
            return Refusal("needs the weights of an input channel to fit in shared memory")
        blocks_of_row = column_blocks(columns, threads, p.dtype)
        grid = row_blocks * blocks_of_row * p.N * p.groups
        if grid > MAX_GRID:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        config = sliding_config(self.name, p.dtype, bits, rows, is_reversed=True)
        return conv_plan(
            config,
            p,
            layout,
            bits,
            grid=grid,
            block=threads,
            shared_bytes=slide.shared_bytes,
            own={
                "row_blocks": row_blocks,
                "column_blocks": blocks_of_row,
                "columns": columns,
                "q_begin": q_begin,
                "taps": taps,
                **slide.params(),
            },
        )

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for rows in ROWS:
                yield sliding_config(self.name, dtype, 32, rows, is_reversed=True)
            yield sliding_config(self.name, dtype, 64, ROWS[-1], is_reversed=True)

    def _rows(self, p: ConvProblem, columns: int, bits: int, device: Device) -> int:
        """Few rows, though they read inputs more often, where many would leave schedulers without a second warp."""
        few, many = ROWS
        if bits == 64:  # only the kernel for many rows has 64-bit indices
            return many
        if p.C_out_g * p.stride <= few:
            return few
        warps = column_blocks(columns, WARP, p.dtype) * p.N * p.groups * -(-p.C_out_g * p.stride // many)
        return many if warps >= 8 * device.num_sms else few
