"""conv_transpose1d_depthwise: transposed layers with one input channel a group.

Contract: cuda_src/conv_transpose1d_depthwise.cu.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from ..device import Device
from ..problem import DTYPES, FORMATS, ConvProblem
from ..source import params_fields
from .base import MAX_GRID, Config, Family, Layout, Plan, Refusal, conv_plan, round_up
from .depthwise import (
    BLOCK_SIZE,
    MANY_OUTPUTS,
    MIN_BLOCKS,
    SLIDE_STRIDES,
    BlockWork,
    Divisor,
    Partition,
    Skip,
    can_skip,
    can_slide,
    choose_partition,
    depthwise_index_bits,
    row_skew,
    slide_outputs,
    vector_length,
)

# Results of a thread that neither slides nor skips, among which the work on its row is shared.
MANY_L = 4


class ConvTranspose1dDepthwise(Family[ConvProblem]):
    """One input channel a group, few outputs each."""

    name = "conv_transpose1d_depthwise"
    kind = "conv_transpose1d"
    activates_input = True

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        if p.C_in_g != 1:
            return Refusal("needs C_in/groups == 1")
        if p.C_out_g >= MANY_OUTPUTS:
            return Refusal(f"needs C_out/groups < {MANY_OUTPUTS}")
        tiling = _tiling(p, layout, device)
        if tiling.partition.grid > MAX_GRID:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        partition, shape, bits = tiling.partition, tiling.shape, tiling.bits
        has_window = shape.slide_stride > 0 or shape.is_skipping
        config = self._config(shape.slide_stride, shape.is_skipping, shape.thread_l, p.dtype, bits)
        return conv_plan(
            config,
            p,
            layout,
            bits,
            grid=partition.grid,
            block=partition.block,
            shared_bytes=partition.shared_bytes,
            candidates=partition.candidates(),
            own={
                **Divisor.params(stride=p.stride),
                **partition.params(p),
                "taps_pitch": shape.taps_pitch if has_window else 0,
                "window": shape.window(partition.places) if has_window else 0,
                "window_below": shape.window_below if has_window else 0,
                "window_pitch": shape.window_pitch(partition.places) if has_window else 0,
                "plane_pitch": shape.plane_pitch(partition.places, partition.block_rows) if has_window else 0,
            },
        )

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for stride in SLIDE_STRIDES:
                yield self._config(stride, False, slide_outputs(dtype), dtype, 32)
            yield self._config(0, True, slide_outputs(dtype), dtype, 32)
            for bits in (32, 64):
                yield self._config(0, False, MANY_L, dtype, bits)

    def _config(self, slide_stride: int, is_skipping: bool, thread_l: int, dtype: str, bits: int) -> Config:
        min_blocks = 4 if bits == 64 or dtype == "complex128" else MIN_BLOCKS
        return Config.of(
            self.name,
            {
                "DTYPE": dtype,
                "INDEX_BITS": bits,
                "BLOCK_SIZE": BLOCK_SIZE,
                # Caps the registers of a thread: as many blocks as leave all its values in registers.
                "MIN_BLOCKS": min_blocks,
                "SLIDE_STRIDE": slide_stride,
                "IS_SKIPPING": int(is_skipping),
                "DTYPE_BYTES": FORMATS[dtype].itemsize,
                "THREAD_L": thread_l,
                "PARAMS_BYTES": len(params_fields(self.name)) * bits // 8,
            },
        )


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a specialisation keeps in shared memory: nothing, unless its threads slide.

    Attributes:
        slide_stride: SLIDE_STRIDE of the .cu file.
        thread_l: results of a thread.
    """

    problem: ConvProblem
    slide_stride: int
    thread_l: int
    is_skipping: ClassVar[bool] = False

    @property
    def steps(self) -> int:
        """Steps of a sliding thread, with the zeros that may lead the taps."""
        taps = vector_length(self.problem.dtype) * self.slide_stride
        return -(-(self.problem.K + taps - 1) // taps)

    @property
    def thread_vectors(self) -> int:
        """Vectors of input positions that a thread's results begin at."""
        return 2 // self.slide_stride

    @property
    def taps_pitch(self) -> int:
        # Odd, in vectors, so that rows of one warp read their taps from different banks.
        return round_up(self.steps * self.slide_stride, 2, 1) * vector_length(self.problem.dtype)

    @property
    def window_below(self) -> int:
        return round_up(self.steps, self.thread_vectors)

    def window(self, places: int) -> int:
        return self.window_below + self.thread_vectors * places

    def window_pitch(self, places: int) -> int:
        # A row's threads begin in the bank behind that of the last thread of the row before.
        return round_up(-(-self.window(places) // self.thread_vectors) + 2, 8, places % 8)

    def plane_pitch(self, places: int, block_rows: int) -> int:
        # Threads that stage neighbouring vectors write different banks.
        return round_up(block_rows * self.window_pitch(places), 8, 4)

    def shared_bytes(self, places: int, block_rows: int) -> int:
        if self.slide_stride == 0:
            return 0
        windows = self.thread_vectors * self.plane_pitch(places, block_rows) * vector_length(self.problem.dtype)
        return (block_rows * self.taps_pitch + windows) * self.problem.format.accumulator_bytes

    def work(self, layout: Layout) -> BlockWork:
        p = self.problem
        multiply_adds = p.terms * self.thread_l * p.format.multiply_adds
        slides = self.slide_stride > 0
        vec = vector_length(p.dtype)
        # Instructions in the machine code for sm_90 (bench.static): of a multiply-add and the loads that feed it; of a
        # thread besides, about 10 more for a result; of a position that is staged.
        return BlockWork(
            rows=p.N * p.C_out,
            thread_outputs=self.thread_l,
            row_outputs=p.L_out + (row_skew(p, layout) if slides else 0),
            thread_slots=165.0,
            result_slots=multiply_adds * (1.2 if slides else 8.0) + 45 + (5 if slides else 30) * self.thread_l,
            position_slots=5.0,
            window_positions=lambda places: self.window(places) * vec if slides else 0,
            row_bytes=lambda places: places * self.thread_l * p.itemsize * (1 + 1 / p.stride),
            shared_bytes=self.shared_bytes,
        )


@dataclass(frozen=True, slots=True)
class _Tiling:
    shape: _Shape | Skip
    partition: Partition
    bits: int


@lru_cache(maxsize=4096)
def _tiling(problem: ConvProblem, layout: Layout, device: Device) -> _Tiling:
    p = problem
    bits = depthwise_index_bits(p, layout, max(MANY_L, slide_outputs(p.dtype)))
    shapes: list[_Shape | Skip] = []
    if can_slide(p, layout, bits):
        shapes.append(_Shape(p, p.stride, slide_outputs(p.dtype)))
    if can_skip(p, layout, bits):
        shapes.append(Skip(p))
    shapes.append(_Shape(p, 0, MANY_L))
    for shape in shapes:
        partition = choose_partition(shape.work(layout), device)
        if partition is not None:
            return _Tiling(shape, partition, bits)
    raise AssertionError("a block without shared memory fits")
