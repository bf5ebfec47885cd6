"""conv1d_tail: few output channels a group; windows slide through registers.

Contract: cuda_src/conv1d_tail.cu.

It is for the last layers of decoders and predictors (`encodec.dec_final`, `bpnet.fconv`), in every dtype: by the cost
model they take 1.2 to 1.8 times as long with `conv1d_narrow` in float32 on an H200.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..device import Device
from ..problem import DTYPES, ConvProblem
from .base import MAX_GRID, Config, Family, Layout, Plan, Refusal, conv_fields, conv_plan
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

# Output channels that a kernel computes; a layer with 3 uses that for 4. With more, tiles over channels are faster.
ROWS = (1, 2, 4)
WARP = 32


class Conv1dTail(Family[ConvProblem]):
    """All output channels of a group in one thread, every input read once."""

    name = "conv1d_tail"
    kind = "conv1d"

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        if p.C_out_g > ROWS[-1]:
            return Refusal(f"needs C_out/groups <= {ROWS[-1]}")
        if p.C_in_g == 0:
            return Refusal("needs input channels")
        if p.C_in_g == 1 and p.groups > 1:
            return Refusal("needs C_in/groups > 1 or groups = 1")
        if p.stride != 1 or p.dilation != 1:
            return Refusal("needs stride 1 and dilation 1")
        # The windows of blocks that extend past the last column reach so many positions further.
        around = block_columns(p.dtype) + p.K + 4 * vector(p.dtype)
        overhang = Overhang(rows=ROWS[-1], channels=MAX_CHUNK_CHANNELS, positions=around)
        bits = index_bits(p, layout, overhang, column_blocks(p.L_out, WARP, p.dtype) * p.N * p.groups)
        # Only the kernel for the most output channels has 64-bit indices.
        rows = ROWS[-1] if bits == 64 else next(rows for rows in ROWS if rows >= p.C_out_g)
        threads = choose_threads(p.L_out, p.N * p.groups, p.dtype, device)
        slide = Slide.of(
            p,
            layout["input"],
            device,
            threads=threads,
            rows=rows,
            taps=p.K,
            position=-p.padding_left,
            is_reversed=False,
        )
        if slide is None:
            return Refusal("needs the weights of an input channel to fit in shared memory")
        blocks_of_sample = column_blocks(p.L_out, threads, p.dtype)
        grid = blocks_of_sample * p.N * p.groups
        if grid > MAX_GRID:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        vec = vector(p.dtype)
        fields = conv_fields(p, layout)
        vector_stores = (
            layout["output"].alignment == 16
            and fields["output_stride_l"] == 1
            and (p.N == 1 or fields["output_stride_n"] % vec == 0)
            and (p.C_out == 1 or fields["output_stride_c"] % vec == 0)
        )
        config = sliding_config(self.name, p.dtype, bits, rows, is_reversed=False)
        return conv_plan(
            config,
            p,
            layout,
            bits,
            grid=grid,
            block=threads,
            shared_bytes=slide.shared_bytes,
            own={"column_blocks": blocks_of_sample, **slide.params(), "vector_stores": int(vector_stores)},
        )

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for rows in ROWS:
                yield sliding_config(self.name, dtype, 32, rows, is_reversed=False)
            yield sliding_config(self.name, dtype, 64, ROWS[-1], is_reversed=False)
