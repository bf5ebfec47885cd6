"""conv_transpose1d_tail: few output channels a group, every phase in one thread, windows that slide through registers.

Contract: cuda_src/conv_transpose1d_tail.cu.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..device import Device
from ..problem import DTYPES, ConvProblem
from .base import MAX_GRID, Config, Family, Launch, Layout, index_bits, stride_params
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
# With more rows a block of every eight reads the input anew, and tiles over rows do better.
MAX_ROWS = 32


class ConvTranspose1dTail(Family):
    """All output channels and phases of a group in few threads, inputs read in windows."""

    name = "conv_transpose1d_tail"
    op = "conv_transpose1d"

    def refuse(self, problem: ConvProblem, layout: Layout, device: Device) -> str | None:
        p = problem
        if p.C_out_g > MAX_C_OUT_G:
            return f"needs C_out/groups <= {MAX_C_OUT_G}"
        if p.C_in_g == 0 or p.L_in == 0:
            return "needs input"
        if p.C_in_g == 1 and p.groups > 1:
            return "needs C_in/groups > 1 or groups = 1"
        if p.dilation != 1:
            return "needs dilation 1"
        if p.C_out_g * p.stride > MAX_ROWS:
            return f"needs C_out/groups * stride <= {MAX_ROWS}"
        if self._slide(p, layout, device) is None:
            return "needs the weights of an input channel to fit in shared memory"
        if self._grid(p, layout, device) > MAX_GRID:
            return f"needs at most {MAX_GRID} blocks"
        return None

    def configure(self, problem: ConvProblem, layout: Layout, device: Device) -> tuple[Config, Launch]:
        p = problem
        slide = self._slide(p, layout, device)
        assert slide is not None, "refused"
        params = {
            "N": p.N,
            "L_in": p.L_in,
            "L_out": p.L_out,
            "K": p.K,
            "C_in_g": p.C_in_g,
            "C_out_g": p.C_out_g,
            "stride": p.stride,
            "padding_left": p.padding_left,
            **stride_params(layout, ("in", "out")),
            "row_blocks": self._row_blocks(p, layout, device),
            "column_blocks": self._column_blocks(p, layout, device),
            "columns": self._columns(p),
            "q_begin": p.padding_left // p.stride,
            "taps": self._taps(p),
            **slide.params(),
        }
        bits = self._index_bits(p, layout)
        config = sliding_config(self.name, p.dtype, bits, self._rows(p, layout, device), is_reversed=True)
        return config, Launch(
            self._grid(p, layout, device),
            self._threads(p, layout, device),
            slide.shared_bytes,
            bits,
            tuple(params.items()),
        )

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for rows in ROWS:
                yield sliding_config(self.name, dtype, 32, rows, is_reversed=True)
            yield sliding_config(self.name, dtype, 64, ROWS[-1], is_reversed=True)

    def _taps(self, p: ConvProblem) -> int:
        """Of a phase; an output without padding may lie behind the last tap of its phase."""
        return -(-p.K // p.stride)

    def _columns(self, p: ConvProblem) -> int:
        """Values of q from the first output position to the last, whatever their phase."""
        return (p.L_out - 1 + p.padding_left) // p.stride - p.padding_left // p.stride + 1

    def _rows(self, p: ConvProblem, layout: Layout, device: Device) -> int:
        """Few rows where many would leave schedulers without a second warp, though that reads inputs more often."""
        few, many = ROWS
        if self._index_bits(p, layout) == 64:  # which only the kernel for many has
            return many
        if p.C_out_g * p.stride <= few:
            return few
        warps = column_blocks(self._columns(p), WARP, p.dtype) * p.N * p.groups * -(-p.C_out_g * p.stride // many)
        return many if warps >= 8 * device.num_sms else few

    def _threads(self, p: ConvProblem, layout: Layout, device: Device) -> int:
        blocks = p.N * p.groups * self._row_blocks(p, layout, device)
        return choose_threads(self._columns(p), blocks, p.dtype, device)

    def _column_blocks(self, p: ConvProblem, layout: Layout, device: Device) -> int:
        return column_blocks(self._columns(p), self._threads(p, layout, device), p.dtype)

    def _row_blocks(self, p: ConvProblem, layout: Layout, device: Device) -> int:
        return -(-p.C_out_g * p.stride // self._rows(p, layout, device))

    def _grid(self, p: ConvProblem, layout: Layout, device: Device) -> int:
        return self._row_blocks(p, layout, device) * self._column_blocks(p, layout, device) * p.N * p.groups

    def _index_bits(self, p: ConvProblem, layout: Layout) -> int:
        # Beyond the arrays the kernel forms positions around the windows of blocks that hang over the last column, and
        # the outputs of such columns.
        around = block_columns(p.dtype) + p.K + 4 * vector(p.dtype)
        blocks = column_blocks(self._columns(p), WARP, p.dtype) * p.N * p.groups
        return index_bits(
            p,
            layout,
            blocks * -(-p.C_out_g * p.stride // ROWS[0]),
            p.L_in + (self._columns(p) + around + 2) * p.stride + p.padding_left + p.L_out,
            layout.input.reach((p.N, p.C_in + MAX_CHUNK_CHANNELS, p.L_in)),
        )

    def _slide(self, p: ConvProblem, layout: Layout, device: Device) -> Slide | None:
        return Slide.of(
            p,
            layout.input,
            device,
            threads=self._threads(p, layout, device),
            rows=self._rows(p, layout, device),
            taps=self._taps(p),
            position=-(p.padding_left // p.stride),
            is_reversed=True,
        )
