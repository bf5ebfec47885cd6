"""conv_transpose1d_depthwise: transposed layers with one input channel a group.

Contract: cuda_src/conv_transpose1d_depthwise.cu.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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


class ConvTranspose1dDepthwise(DepthwiseFamily):
    """One input channel and few output channels a group."""

    name = "conv_transpose1d_depthwise"
    kind = "conv_transpose1d"
    activates_input = True

    def variants(self, problem: ConvProblem, layout: Layout, bits: int) -> Iterator[Variant]:
        p = problem
        if can_slide(p, layout, bits):
            yield _Variant(p, p.stride, slide_outputs(p.dtype))
        if can_skip(p, layout, bits):
            yield Skip(p)
        yield _Variant(p, 0, MANY_L)

    def variant_params(self, variant: Variant, partition: Partition) -> dict[str, int]:
        if isinstance(variant, _Variant) and variant.slide_stride == 0:  # such threads use no shared memory
            fields = dict.fromkeys(("taps_pitch", "window", "window_below", "window_pitch", "plane_pitch"), 0)
        else:
            below = variant.window_below if isinstance(variant, _Variant) else 0
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


class _Variant(Slide):
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
