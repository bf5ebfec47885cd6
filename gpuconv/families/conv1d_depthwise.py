"""conv1d_depthwise: layers with one input channel a group.

Contract: cuda_src/conv1d_depthwise.cu.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..device import Device
from ..problem import DTYPES, ITEMSIZE, ConvProblem
from ..source import params_fields
from .base import MAX_GRID, Config, Family, Launch, Layout, index_bits, stride_params
from .depthwise import (
    BLOCK_SIZE,
    Deal,
    accumulator_bytes,
    choose_deal,
    divisor_params,
    round_up,
    thread_outputs,
)

# Many outputs of one input channel are a matrix product: from here on register tiles, which load a position once for
# eight channels, need fewer instructions than this family, which loads it for every channel.
MANY_OUTPUTS = 8
MANY_TAPS = 16

SLIDE_STRIDES = (1, 2)
# Results of a thread that does not slide: several, so that they share the loads of taps, or one where rows are short.
THREAD_L = (4, 1)


class Conv1dDepthwise(Family):
    """One input channel a group, C_out/groups outputs each."""

    name = "conv1d_depthwise"
    op = "conv1d"

    def refuse(self, problem: ConvProblem, layout: Layout, device: Device) -> str | None:
        p = problem
        if p.C_in_g != 1:
            return "needs C_in/groups == 1"
        if p.C_out_g >= MANY_OUTPUTS and (p.groups == 1 or p.K > MANY_TAPS):
            return f"needs C_out/groups < {MANY_OUTPUTS}, or several groups and K <= {MANY_TAPS}"
        plan = _plan(p, layout, device)
        if plan is None:
            return f"needs the taps and the window of one warp in {device.shared_per_block} bytes of shared memory"
        if plan.deal.grid > MAX_GRID:
            return f"needs a grid of at most {MAX_GRID} blocks"
        return None

    def configure(self, problem: ConvProblem, layout: Layout, device: Device) -> tuple[Config, Launch]:
        p = problem
        plan = _plan(p, layout, device)
        assert plan is not None, f"{self.name} was to refuse {p}"
        deal = plan.deal
        params = {
            "N": p.N,
            "C_out": p.C_out,
            "L_in": p.L_in,
            "L_out": p.L_out,
            "K": p.K,
            "C_out_g": p.C_out_g,
            "stride": p.stride,
            "padding_left": p.padding_left,
            "dilation": p.dilation,
            **deal.params(),
            **divisor_params(p),
            "block_rows": deal.block_rows,
            "taps_pitch": plan.shape.taps_pitch,
            "window": plan.shape.window(deal.row_threads),
            "window_pitch": plan.shape.window_pitch(deal.row_threads, deal.block_rows),
            "plane_pitch": plan.shape.plane_pitch(deal.row_threads, deal.block_rows),
            **stride_params(layout, ("out", "in")),
        }
        config = self._config(plan.shape.slide_stride, plan.shape.thread_l, p.dtype, plan.bits)
        return config, Launch(deal.grid, deal.block, deal.shared_bytes, plan.bits, tuple(params.items()))

    def figures(self, problem: ConvProblem, layout: Layout, device: Device) -> tuple[tuple[str, float], ...]:
        plan = _plan(problem, layout, device)
        if plan is None:
            return ()
        return ((f"{plan.deal.block_rows} rows by {plan.deal.row_threads} threads", plan.deal.cycles),)

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for stride in SLIDE_STRIDES:
                yield self._config(stride, thread_outputs(dtype), dtype, 32)
            for thread_l in THREAD_L:
                yield self._config(0, thread_l, dtype, 32)
            yield self._config(0, THREAD_L[0], dtype, 64)

    def _config(self, slide_stride: int, thread_l: int, dtype: str, bits: int) -> Config:
        return Config.of(
            self.name,
            {
                "DTYPE": dtype,
                "INDEX_BITS": bits,
                "BLOCK_SIZE": BLOCK_SIZE,
                "MIN_BLOCKS": _min_blocks(slide_stride, dtype, bits),
                "SLIDE_STRIDE": slide_stride,
                "THREAD_L": thread_l,
                "PARAMS_BYTES": len(params_fields(self.name)) * bits // 8,
            },
        )


def _min_blocks(slide_stride: int, dtype: str, bits: int) -> int:
    """Blocks of a multiprocessor that cap the registers of a thread: the most that leave all values in registers."""
    if dtype == "complex128":
        return 3
    return 4 if slide_stride == 2 or bits == 64 else 5


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a specialisation keeps in shared memory, by the threads of a row.

    Attributes:
        slide_stride: SLIDE_STRIDE of the .cu file.
        thread_l: results of a thread.
    """

    problem: ConvProblem
    slide_stride: int
    thread_l: int

    @property
    def vec(self) -> int:
        """Accumulators of a 16-byte vector."""
        return 16 // accumulator_bytes(self.problem.dtype)

    @property
    def steps(self) -> int:
        """Steps of a sliding thread, with the zeros that may lead the taps."""
        return -(-(self.problem.K + self.vec - 1) // (self.vec * self.slide_stride))

    @property
    def taps_pitch(self) -> int:
        # Odd, in vectors or accumulators, so that rows of one warp read their taps from different banks.
        if self.slide_stride == 0:
            return round_up(self.problem.K, 2 * self.vec, self.vec)
        return round_up(self.steps * self.slide_stride, 2, 1) * self.vec

    def window(self, row_threads: int) -> int:
        if self.slide_stride:
            return self.slide_stride * (2 * row_threads + self.steps)
        p = self.problem
        return (row_threads * self.thread_l - 1) * p.stride + p.dilation * (p.K - 1) + 1

    def window_pitch(self, row_threads: int, block_rows: int) -> int:
        if self.slide_stride:  # the rows' threads read on where the row before them ends, banks considered
            return round_up(-(-self.window(row_threads) // (2 * self.slide_stride)) + 1, 8, row_threads % 8)
        p = self.problem
        size = p.stride * self.plane_pitch(row_threads, block_rows) if p.stride > 1 else self.window(row_threads)
        return round_up(size, 32, row_threads % 32) if p.C_out_g == 1 else size

    def plane_pitch(self, row_threads: int, block_rows: int) -> int:
        if self.slide_stride:  # threads that stage neighbouring vectors of two planes write different banks
            return round_up(block_rows * self.window_pitch(row_threads, block_rows), 8, 4)
        if self.problem.stride == 1:
            return 0
        return round_up(-(-self.window(row_threads) // self.problem.stride), 2, 1)

    def windows(self, block_rows: int) -> int:
        """The most windows that a block's rows share."""
        if self.slide_stride or self.problem.C_out_g == 1:
            return block_rows
        return min(block_rows, (block_rows - 2) // self.problem.C_out_g + 2)

    def shared_bytes(self, row_threads: int, block_rows: int) -> int:
        taps = block_rows * self.taps_pitch
        if self.slide_stride:
            planes = 2 * self.slide_stride
            window = planes * self.plane_pitch(row_threads, block_rows) * self.vec
        else:
            window = self.windows(block_rows) * self.window_pitch(row_threads, block_rows)
        return (taps + window) * accumulator_bytes(self.problem.dtype)


@dataclass(frozen=True, slots=True)
class _Plan:
    shape: _Shape
    deal: Deal
    bits: int


def _plan(problem: ConvProblem, layout: Layout, device: Device) -> _Plan | None:
    p = problem
    slides = (
        p.stride in SLIDE_STRIDES
        and p.dilation == 1
        and layout.input.strides[2] == 1
        and layout.output.strides[2] == 1
        and _index_bits(p, layout) == 32
    )
    plan = _plan_shape(_Shape(p, p.stride, thread_outputs(p.dtype)), layout, device) if slides else None
    if plan is None:
        bits = _index_bits(p, layout)
        few = p.L_out <= BLOCK_SIZE and bits == 32
        plan = _plan_shape(_Shape(p, 0, THREAD_L[1 if few else 0]), layout, device)
    return plan


def _plan_shape(shape: _Shape, layout: Layout, device: Device) -> _Plan | None:
    p = shape.problem
    real = 4 if p.is_complex else 1
    skew = 0
    if shape.slide_stride:
        # The tiles of a row may begin up to this many positions before it, at a 16-byte boundary.
        vec = 16 // p.itemsize
        aligned = layout.output.alignment == 16 and all(stride % vec == 0 for stride in layout.output.strides[:2])
        skew = 0 if aligned else vec - 1
    slides = shape.slide_stride > 0
    # Instructions, from the machine code for sm_90: a multiply-add each plus a twelfth (sliding) or two loads and
    # additions (else), and about 60 of a thread's own; 2 or 7 to stage a position.
    thread_slots = 60 + p.K * real * shape.thread_l * (1.15 if slides else 3.2)
    position_slots = 2.0 if slides else 7.0
    vec_positions = shape.vec if slides else 1
    deal = choose_deal(
        rows=p.N * p.C_out,
        threads=-(-(p.L_out + skew) // shape.thread_l),
        thread_slots=thread_slots,
        position_slots=position_slots,
        positions=lambda row_threads: shape.window(row_threads) * vec_positions,
        row_bytes=lambda row_threads: row_threads * shape.thread_l * (1 + min(p.stride, p.L_in)) * ITEMSIZE[p.dtype],
        shared_bytes=shape.shared_bytes,
        row_threads_multiple=1,
        device=device,
    )
    return None if deal is None else _Plan(shape, deal, _index_bits(p, layout))


def _index_bits(problem: ConvProblem, layout: Layout) -> int:
    # Beyond the arrays the kernel forms positions of the last tile, which may hang over by as much as a block, and rows
    # of the last block.
    p = problem
    hanging = p.L_out + (BLOCK_SIZE + 1) * max(*THREAD_L, thread_outputs(p.dtype))
    span = hanging * p.stride + p.padding_left + p.dilation * p.K + p.L_in + 64 * BLOCK_SIZE
    return index_bits(p, layout, span, hanging, p.N * p.C_out + BLOCK_SIZE)
