"""conv1d_depthwise and conv_transpose1d_depthwise: layers with one input channel a group.

Contracts: cuda_src/conv1d_depthwise.cu, cuda_src/conv_transpose1d_depthwise.cu.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..device import Device
from ..problem import DTYPES, ConvProblem
from .base import Config, Layout, round_up
from .depthwise import (
    MANY_L,
    MIN_BLOCKS,
    SLIDE_STRIDES,
    BlockWork,
    DepthwiseFamily,
    Divisor,
    Partition,
    Skip,
    Slide,
    Variant,
    can_skip,
    can_slide,
    row_skew,
    slide_outputs,
    vector_length,
)

# Results of a thread that neither slides, skips nor strides, where long strides or short rows make fewer results
# better.
ONE_L = 1
# From this stride on, staging is most of a thread's work.
LONG_STRIDE = 8
# Up to this length four results a thread would leave most of a warp idle.
SHORT_L = 64


class Conv1dDepthwise(DepthwiseFamily):
    """One input channel and few output channels a group."""

    name = "conv1d_depthwise"
    kind = "conv1d"
    activates_input = True

    def variants(self, problem: ConvProblem, layout: Layout, bits: int) -> Iterator[Variant]:
        p = problem
        if can_slide(p, layout, bits):
            yield _Forward(p, p.stride, slide_outputs(p.dtype))
        if can_skip(p, layout, bits):
            yield Skip(p)
        if _can_stride(p, layout, bits):
            yield _Stride(p)
        one = bits == 32 and (p.stride >= LONG_STRIDE or p.L_out <= SHORT_L)
        yield _Forward(p, 0, ONE_L if one else MANY_L)

    def min_blocks(self, dtype: str, bits: int, macros: Mapping[str, int]) -> int:
        return 3 if dtype == "complex128" or macros.get("SLIDE_STRIDE") == 2 else 4 if bits == 64 else MIN_BLOCKS

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for stride in SLIDE_STRIDES:
                yield self.config(dtype, 32, slide_outputs(dtype), {"SLIDE_STRIDE": stride})
            yield self.config(dtype, 32, slide_outputs(dtype), {"IS_SKIPPING": 1})
            yield self.config(dtype, 32, 1, {"IS_STRIDING": 1})
            for thread_l in (MANY_L, ONE_L):
                yield self.config(dtype, 32, thread_l, {})
            yield self.config(dtype, 64, MANY_L, {})

    def config(self, dtype: str, bits: int, thread_l: int, macros: Mapping[str, int]) -> Config:
        return super().config(dtype, bits, thread_l, {"IS_STRIDING": 0, **macros})


class _Forward(Slide):
    """Sliding threads; where SLIDE_STRIDE is 0, threads that read one position at a time."""

    __slots__ = ()

    @property
    def steps(self) -> int:
        """Steps of a sliding thread, including the zeros that may precede the taps."""
        vec = vector_length(self.problem.dtype)
        return -(-(self.problem.K + vec - 1) // (vec * self.slide_stride))

    @property
    def taps_pitch(self) -> int:
        return self.taps_pitch_of(self.steps) if self.slide_stride else round_up(self.problem.K, 2, 1)

    def window(self, places: int) -> int:
        p = self.problem
        if self.slide_stride:
            return self.slide_stride * (2 * places + self.steps)
        return (places * self.thread_l - 1) * p.stride + p.dilation * (p.K - 1) + 1

    def window_pitch(self, places: int) -> int:
        # The first thread of a row reads the bank after that of the last thread of the previous row.
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
        # Instructions counted in the machine code for sm_90 (bench.static), for a multiply-add and the loads of its
        # operands, for the rest of a thread and of each result, and to stage one position.
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
    """Striding threads; windows in vectors of elements as they are stored."""

    problem: ConvProblem
    thread_l: ClassVar[int] = 1

    @property
    def macros(self) -> Mapping[str, int]:
        return {"IS_STRIDING": 1}

    @property
    def vec(self) -> int:
        return 16 // self.problem.itemsize

    @property
    def steps(self) -> int:
        """Vectors of a result, including the zeros that may precede the taps."""
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
        # A vector takes its multiply-adds and conversions, its load and the loads of its taps; the rest of a result and
        # of a thread is as in a sliding thread. A staged vector takes a copy and the computation of its address.
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
            enough_warps=8,  # copies are asynchronous, so few warps keep enough loads in flight
        )


def _can_stride(problem: ConvProblem, layout: Layout, bits: int) -> bool:
    """Whether results begin whole vectors apart, and their windows cover most of the input between them."""
    p = problem
    is_whole = p.stride > SLIDE_STRIDES[-1] and p.stride % (16 // p.itemsize) == 0 and p.dilation == 1
    return is_whole and p.stride <= 2 * p.K and layout["input"].strides[2] == 1 and bits == 32


class ConvTranspose1dDepthwise(DepthwiseFamily):
    """One input channel and few output channels a group."""

    name = "conv_transpose1d_depthwise"
    kind = "conv_transpose1d"
    activates_input = True

    def variants(self, problem: ConvProblem, layout: Layout, bits: int) -> Iterator[Variant]:
        p = problem
        if can_slide(p, layout, bits):
            yield _Transposed(p, p.stride, slide_outputs(p.dtype))
        if can_skip(p, layout, bits):
            yield Skip(p)
        yield _Transposed(p, 0, MANY_L)

    def variant_params(self, variant: Variant, partition: Partition) -> dict[str, int]:
        if isinstance(variant, _Transposed) and variant.slide_stride == 0:  # such threads use no shared memory
            fields = dict.fromkeys(("taps_pitch", "window", "window_below", "window_pitch", "plane_pitch"), 0)
        else:
            below = variant.window_below if isinstance(variant, _Transposed) else 0
            fields = {**super().variant_params(variant, partition), "window_below": below}
        return {**Divisor.params(stride=variant.problem.stride), **fields}

    def min_blocks(self, dtype: str, bits: int, macros: Mapping[str, int]) -> int:
        return 4 if bits == 64 or dtype == "complex128" else MIN_BLOCKS

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for stride in SLIDE_STRIDES:
                yield self.config(dtype, 32, slide_outputs(dtype), {"SLIDE_STRIDE": stride})
            yield self.config(dtype, 32, slide_outputs(dtype), {"IS_SKIPPING": 1})
            for bits in (32, 64):
                yield self.config(dtype, bits, MANY_L, {})


class _Transposed(Slide):
    """Sliding threads; where SLIDE_STRIDE is 0, threads that use no shared memory."""

    __slots__ = ()

    @property
    def steps(self) -> int:
        """Steps of a sliding thread, including the zeros that may precede the taps."""
        taps = vector_length(self.problem.dtype) * self.slide_stride
        return -(-(self.problem.K + taps - 1) // taps)

    @property
    def thread_vectors(self) -> int:
        """Vectors of input positions at which a thread's results begin."""
        return 2 // self.slide_stride

    @property
    def taps_pitch(self) -> int:
        return self.taps_pitch_of(self.steps)

    @property
    def window_below(self) -> int:
        return round_up(self.steps, self.thread_vectors)

    def window(self, places: int) -> int:
        return self.window_below + self.thread_vectors * places

    def window_pitch(self, places: int) -> int:
        # The first thread of a row reads the bank after that of the last thread of the previous row.
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
        # Instructions counted in the machine code for sm_90 (bench.static), for a multiply-add and the loads of its
        # operands, for the rest of a thread and of each result, and to stage one position.
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
