"""conv1d_depthwise: layers with one input channel a group.

Contract: cuda_src/conv1d_depthwise.cu.
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

# Results of a thread that neither slides, skips nor strides. Several results share the loads of taps; a thread has one
# where there are few threads for their window.
MANY_L, ONE_L = 4, 1
# From this stride on, staging is most of a thread's work.
LONG_STRIDE = 8
# Up to this length four results a thread would leave most of a warp idle.
SHORT_L = 64


class Conv1dDepthwise(Family[ConvProblem]):
    """One input channel a group, few outputs each."""

    name = "conv1d_depthwise"
    kind = "conv1d"
    activates_input = True

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        if p.C_in_g != 1:
            return Refusal("needs C_in/groups == 1")
        if p.C_out_g >= MANY_OUTPUTS:
            return Refusal(f"needs C_out/groups < {MANY_OUTPUTS}")
        tiling = _tiling(p, layout, device)
        if tiling is None:
            reason = f"needs the taps and the window of one result in {device.shared_per_block} bytes of shared memory"
            return Refusal(reason)
        if tiling.partition.grid > MAX_GRID:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        partition, shape, bits = tiling.partition, tiling.shape, tiling.bits
        config = self._config(
            shape.slide_stride, shape.is_skipping, isinstance(shape, _Stride), shape.thread_l, p.dtype, bits
        )
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
                **partition.params(p),
                "taps_pitch": shape.taps_pitch,
                "window": shape.window(partition.places),
                "window_pitch": shape.window_pitch(partition.places),
                "plane_pitch": shape.plane_pitch(partition.places, partition.block_rows),
            },
        )

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for stride in SLIDE_STRIDES:
                yield self._config(stride, False, False, slide_outputs(dtype), dtype, 32)
            yield self._config(0, True, False, slide_outputs(dtype), dtype, 32)
            yield self._config(0, False, True, 1, dtype, 32)
            for thread_l in (MANY_L, ONE_L):
                yield self._config(0, False, False, thread_l, dtype, 32)
            yield self._config(0, False, False, MANY_L, dtype, 64)

    def _config(
        self, slide_stride: int, is_skipping: bool, is_striding: bool, thread_l: int, dtype: str, bits: int
    ) -> Config:
        min_blocks = 3 if dtype == "complex128" or slide_stride == 2 else 4 if bits == 64 else MIN_BLOCKS
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
                "IS_STRIDING": int(is_striding),
                "DTYPE_BYTES": FORMATS[dtype].itemsize,
                "THREAD_L": thread_l,
                "PARAMS_BYTES": len(params_fields(self.name)) * bits // 8,
            },
        )


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a specialisation keeps in shared memory.

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
        vec = vector_length(self.problem.dtype)
        return -(-(self.problem.K + vec - 1) // (vec * self.slide_stride))

    @property
    def taps_pitch(self) -> int:
        # Odd, in vectors or accumulators, so that rows of one warp read their taps from different banks.
        if self.slide_stride:
            return round_up(self.steps * self.slide_stride, 2, 1) * vector_length(self.problem.dtype)
        return round_up(self.problem.K, 2, 1)

    def window(self, places: int) -> int:
        p = self.problem
        if self.slide_stride:
            return self.slide_stride * (2 * places + self.steps)
        return (places * self.thread_l - 1) * p.stride + p.dilation * (p.K - 1) + 1

    def window_pitch(self, places: int) -> int:
        # A row's threads begin in the bank behind that of the last thread of the row before.
        if self.slide_stride:
            return round_up(-(-self.window(places) // (2 * self.slide_stride)) + 2, 8, places % 8)
        planes = self.problem.stride * self.plane_pitch(places, 1)
        return round_up(max(planes, self.window(places)), 32, places % 32)

    def plane_pitch(self, places: int, block_rows: int) -> int:
        # Threads that stage neighbouring positions write different banks.
        if self.slide_stride:
            return round_up(block_rows * self.window_pitch(places), 8, 4)
        stride = self.problem.stride
        return 0 if stride == 1 else round_up(-(-self.window(places) // stride), 2, 1)

    def shared_bytes(self, places: int, block_rows: int) -> int:
        if self.slide_stride:
            vectors = 2 * self.slide_stride * self.plane_pitch(places, block_rows)
            windows = vectors * vector_length(self.problem.dtype)
        else:
            windows = block_rows * self.window_pitch(places)
        return (block_rows * self.taps_pitch + windows) * self.problem.format.accumulator_bytes

    def work(self, layout: Layout) -> BlockWork:
        p = self.problem
        multiply_adds = p.K * self.thread_l * p.format.multiply_adds
        slides = self.slide_stride > 0
        vec = vector_length(p.dtype) if slides else 1
        # Instructions in the machine code for sm_90 (bench.static): of a multiply-add and the loads that feed it; of a
        # thread besides, about 10 more for a result; of a position that is staged.
        return BlockWork(
            rows=p.N * p.C_out,
            thread_outputs=self.thread_l,
            row_outputs=p.L_out + (row_skew(p, layout) if slides else 0),
            thread_slots=165.0,
            result_slots=multiply_adds * (1.17 if slides else 3.3) + 45 + 5 * self.thread_l,
            position_slots=5.0 if slides else 14.0,
            window_positions=lambda places: self.window(places) * vec,
            row_bytes=lambda places: (places * self.thread_l + min(p.L_in, self.window(places) * vec)) * p.itemsize,
            shared_bytes=self.shared_bytes,
        )


@dataclass(frozen=True, slots=True)
class _Stride:
    """What the kernel of striding threads keeps in shared memory; windows in vectors of elements as they are stored."""

    problem: ConvProblem
    slide_stride: ClassVar[int] = 0
    is_skipping: ClassVar[bool] = False
    thread_l: ClassVar[int] = 1

    @property
    def vec(self) -> int:
        return 16 // self.problem.itemsize

    @property
    def steps(self) -> int:
        """Vectors of a result, with the zeros that may lead the taps."""
        return -(-(self.problem.K + self.vec - 1) // self.vec)

    @property
    def taps_pitch(self) -> int:
        return self.steps * self.vec

    def window(self, places: int) -> int:
        return (places - 1) * (self.problem.stride // self.vec) + self.steps

    def window_pitch(self, places: int) -> int:
        results, vectors = divmod(self.window(places) - 1, self.problem.stride // self.vec)
        return results * self.plane_pitch(places, 1) + vectors + 1

    def plane_pitch(self, places: int, block_rows: int) -> int:
        return round_up(self.problem.stride // self.vec, 2, 1)

    def shared_bytes(self, places: int, block_rows: int) -> int:
        taps_bytes = self.taps_pitch * self.problem.format.accumulator_bytes
        return block_rows * (taps_bytes + 16 * self.window_pitch(places))

    def work(self, layout: Layout) -> BlockWork:
        p = self.problem
        # Of a vector: its multiply-adds and conversions, its load and step, the loads of its taps. Of a result and of a
        # thread the rest, as in a thread that slides; of a staged vector a copy and its place.
        conversions = self.vec if p.itemsize == 2 else 0
        loads = 4 + self.vec * p.format.accumulator_bytes / 16
        return BlockWork(
            rows=p.N * p.C_out,
            thread_outputs=1,
            row_outputs=p.L_out,
            thread_slots=165.0,
            result_slots=self.steps * (self.vec * p.format.multiply_adds + conversions + loads) + 45,
            position_slots=24.0 / self.vec,
            window_positions=lambda places: self.window(places) * self.vec,
            row_bytes=lambda places: (places + min(p.L_in, self.window(places) * self.vec)) * p.itemsize,
            shared_bytes=self.shared_bytes,
            enough_warps=8,  # copies are asynchronous: whole windows are on their way
        )


def _can_stride(problem: ConvProblem, layout: Layout, bits: int) -> bool:
    """Whether results begin whole vectors apart, and their taps meet most of what lies between."""
    p = problem
    is_whole = p.stride > SLIDE_STRIDES[-1] and p.stride % (16 // p.itemsize) == 0 and p.dilation == 1
    return is_whole and p.stride <= 2 * p.K and layout["input"].strides[2] == 1 and bits == 32


@dataclass(frozen=True, slots=True)
class _Tiling:
    shape: _Shape | Skip | _Stride
    partition: Partition
    bits: int


@lru_cache(maxsize=4096)
def _tiling(problem: ConvProblem, layout: Layout, device: Device) -> _Tiling | None:
    p = problem
    bits = depthwise_index_bits(p, layout, max(MANY_L, slide_outputs(p.dtype)))
    shapes: list[_Shape | Skip | _Stride] = []
    if can_slide(p, layout, bits):
        shapes.append(_Shape(p, p.stride, slide_outputs(p.dtype)))
    if can_skip(p, layout, bits):
        shapes.append(Skip(p))
    if _can_stride(p, layout, bits):
        shapes.append(_Stride(p))
    one = bits == 32 and (p.stride >= LONG_STRIDE or p.L_out <= SHORT_L)
    shapes.append(_Shape(p, 0, ONE_L if one else MANY_L))
    for shape in shapes:
        partition = choose_partition(shape.work(layout), device)
        if partition is not None:
            return _Tiling(shape, partition, bits)
    return None
