"""conv1d_tail: few output channels a group, windows that slide through registers.

Contract: cuda_src/conv1d_tail.cu.
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

# Output channels that a kernel computes; others take the next. More than 4 are better served by tiles over channels.
ROWS = (1, 2, 4)
WARP = 32


class Conv1dTail(Family):
    """All output channels of a group in one thread, every input read once."""

    name = "conv1d_tail"
    op = "conv1d"

    def refuse(self, problem: ConvProblem, layout: Layout, device: Device) -> str | None:
        p = problem
        if p.C_out_g > ROWS[-1]:
            return f"needs C_out/groups <= {ROWS[-1]}"
        if p.C_in_g == 0:
            return "needs input channels"
        if p.C_in_g == 1 and p.groups > 1:
            return "needs C_in/groups > 1 or groups = 1"
        if p.stride != 1 or p.dilation != 1:
            return "needs stride 1 and dilation 1"
        if self._slide(p, layout, device) is None:
            return "needs the weights of an input channel to fit in shared memory"
        if self._grid(p, device) > MAX_GRID:
            return f"needs at most {MAX_GRID} blocks"
        return None

    def configure(self, problem: ConvProblem, layout: Layout, device: Device) -> tuple[Config, Launch]:
        p = problem
        slide = self._slide(p, layout, device)
        assert slide is not None, "refused"
        vec = vector(p.dtype)
        strides = stride_params(layout, ("out", "in"))
        vector_stores = (
            layout.output.alignment == 16
            and strides["output_stride_l"] == 1
            and (p.N == 1 or strides["output_stride_n"] % vec == 0)
            and (p.C_out == 1 or strides["output_stride_c"] % vec == 0)
        )
        params = {
            "N": p.N,
            "L_in": p.L_in,
            "L_out": p.L_out,
            "K": p.K,
            "C_in_g": p.C_in_g,
            "C_out_g": p.C_out_g,
            "padding_left": p.padding_left,
            **strides,
            "column_blocks": column_blocks(p.L_out, self._threads(p, device), p.dtype),
            **slide.params(),
            "vector_stores": int(vector_stores),
        }
        bits = self._index_bits(p, layout)
        config = sliding_config(self.name, p.dtype, bits, self._rows(p, layout), is_reversed=False)
        return config, Launch(
            self._grid(p, device), self._threads(p, device), slide.shared_bytes, bits, tuple(params.items())
        )

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for rows in ROWS:
                yield sliding_config(self.name, dtype, 32, rows, is_reversed=False)
            yield sliding_config(self.name, dtype, 64, ROWS[-1], is_reversed=False)

    def _rows(self, p: ConvProblem, layout: Layout) -> int:
        """Only the kernel for the most output channels has 64-bit indices."""
        if self._index_bits(p, layout) == 64:
            return ROWS[-1]
        return next(rows for rows in ROWS if rows >= p.C_out_g)

    def _threads(self, p: ConvProblem, device: Device) -> int:
        return choose_threads(p.L_out, p.N * p.groups, p.dtype, device)

    def _grid(self, p: ConvProblem, device: Device) -> int:
        return column_blocks(p.L_out, self._threads(p, device), p.dtype) * p.N * p.groups

    def _index_bits(self, p: ConvProblem, layout: Layout) -> int:
        # Beyond the arrays the kernel forms positions around the windows of blocks that hang over the last column.
        around = block_columns(p.dtype) + p.K + 4 * vector(p.dtype)
        return index_bits(
            p,
            layout,
            column_blocks(p.L_out, WARP, p.dtype) * p.N * p.groups,
            p.L_out + p.L_in + p.padding_left + around,
            layout.output.reach((p.N, p.C_out + ROWS[-1], p.L_out + around)),
            layout.input.reach((p.N, p.C_in + MAX_CHUNK_CHANNELS, p.L_in)),
        )

    def _slide(self, p: ConvProblem, layout: Layout, device: Device) -> Slide | None:
        return Slide.of(
            p,
            layout.input,
            device,
            rows=self._rows(p, layout),
            taps=p.K,
            threads=self._threads(p, device),
            position=-p.padding_left,
            is_reversed=False,
        )
