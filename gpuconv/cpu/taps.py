"""taps: one product ``weight[:, :, k] * input[:, shifted]`` per tap, summed.

Padding is left out rather than multiplied, so this form is correct for every problem and every value; the others fall
back on it where a sum is not finite. It is chosen where a group has one input channel, so that products are
elementwise, mostly with a stride or a dilation longer than the windows of the other forms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..problem import ConvProblem
from . import costs, limits
from .arrays import Array, Scratch, accumulator, is_direct, slices
from .geometry import Block, Call, Geometry
from .threads import run_blocks


@dataclass(frozen=True, slots=True)
class Taps:
    """Blocks of `samples`, `groups`, `rows` and `length` positions; products over `channels` input channels."""

    name: ClassVar[str] = "taps"
    reason: ClassVar[str] = "one input channel per group, few taps: each is an elementwise product"

    geometry: Geometry
    samples: int
    groups: int
    rows: int
    length: int
    channels: int

    @classmethod
    def of(cls, p: ConvProblem) -> Taps:
        geometry, size = Geometry.of(p), accumulator(p.dtype).itemsize
        if p.C_in_g == 1:
            block = limits.ELEMENTWISE_BLOCK // size
            length, rows, groups, samples = limits.fit(block, p.L_out, p.C_out_g, p.groups, p.N)
            return cls(geometry, samples, groups, rows, length, 1)
        budget = limits.SUMS // size
        rows, channels = min(p.C_out_g, 256), min(p.C_in_g, 256)
        largest = max(rows, channels)
        length = max(1, min(p.L_out, budget // largest))
        groups = max(1, min(p.groups, budget // (largest * max(length, min(rows, channels)))))
        samples = max(1, min(p.N, budget // (largest * length * groups)))
        return cls(geometry, samples, groups, rows, length, channels)

    @property
    def concurrent(self) -> bool:
        return self.channels == 1

    def multiplies_zeros(self, p: ConvProblem) -> bool:
        return False

    def cost(self, p: ConvProblem) -> float:
        """The cost of elementwise products, for problems with one input channel per group."""
        geometry, size = self.geometry, costs.scale(p)
        first, last = geometry.positions(p)
        length = min(last - first, self.length)
        cuts = -(-(last - first) // length)
        blocks = geometry.phases * cuts * -(-p.N * p.C_out // (self.samples * self.groups * self.rows))
        count = geometry.phases * cuts * p.N * p.C_out
        multiply = costs.ELEMENTWISE if geometry.stride == 1 else costs.STRIDED_ELEMENTWISE
        copy = costs.STRIDED_COPY if geometry.out_stride > 1 else 0.0
        if p.dtype in costs.CONVERT:
            copy += costs.CONVERT[p.dtype] * (1 + geometry.stride / p.C_out_g)
        each = costs.rows(count, length, multiply * size) + costs.rows(count, length, costs.ELEMENTWISE * size)
        calls = costs.BLOCK + geometry.tap_groups * 2.5 * costs.CALL
        return blocks * calls + geometry.tap_groups * each + costs.rows(count, length, copy * size)

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        return 0, self.block_memory(p, self.samples, self.groups, self.rows, self.length)

    def block_memory(self, p: ConvProblem, samples: int, groups: int, rows: int, length: int) -> dict[str, int]:
        """As `memory`, for `compute` on a block of this size."""
        groups, rows = min(groups, self.groups), min(rows, self.rows)
        columns = min(samples, self.samples) * min(length, self.length)
        buffers = dict.fromkeys(("sums", "product"), groups * rows * columns)
        buffers["input"] = limits.STAGED_INPUT // accumulator(p.dtype).itemsize
        if p.C_in_g > 1:
            buffers |= {"tap": groups * rows * self.channels, "shifted": groups * self.channels * columns}
        return buffers

    def run(self, call: Call, workers: int) -> None:
        p = call.p
        if not self.geometry.writes_everything():
            call.fill_with_bias()
        everything = Block(slice(0, p.N), slice(0, p.groups), slice(0, p.C_out_g), *self.geometry.positions(p))
        blocks = [(call, phase, block) for phase, block in self._cut(p, everything)]
        run_blocks(self._compute_phase, blocks, workers, call.dtype, p.L_out)

    def compute(self, call: Call, block: Block, scratch: Scratch) -> None:
        """Compute one block for another form."""
        for phase, part in self._cut(call.p, block):
            self._compute_phase(call, phase, part, scratch)

    def compute_outputs(self, call: Call, block: Block, scratch: Scratch) -> None:
        """As `compute`, but `start` and `stop` of the block count outputs instead of positions."""
        geometry = self.geometry
        if not geometry.writes_everything():
            sums = call.y[block.samples, block.groups, block.rows, block.start : block.stop]
            sums[...] = 0
            call.add_bias(block, sums)
        for phase in range(geometry.phases):
            positions = geometry.positions_between(phase, block.start, block.stop)
            for part in self._cut_positions(block, *positions):
                self._compute_phase(call, phase, part, scratch)

    def _cut(self, p: ConvProblem, block: Block) -> Iterator[tuple[int, Block]]:
        for phase in range(self.geometry.phases):
            low, high = self.geometry.outputs(p, phase)
            for part in self._cut_positions(block, max(low, block.start), min(high, block.stop)):
                yield phase, part

    def _cut_positions(self, block: Block, low: int, high: int) -> Iterator[Block]:
        for n in slices(block.samples.start, block.samples.stop, self.samples):
            for g in slices(block.groups.start, block.groups.stop, self.groups):
                for m in slices(block.rows.start, block.rows.stop, self.rows):
                    for at in slices(low, high, self.length):
                        yield Block(n, g, m, at.start, at.stop)

    def _compute_phase(self, call: Call, phase: int, block: Block, scratch: Scratch) -> None:
        p, geometry, (samples, groups, rows, start, stop) = call.p, self.geometry, block
        y = call.y[samples, groups, rows, geometry.place(phase, start, stop)]
        direct = call.y_direct and geometry.out_stride == 1
        sums = y if direct else scratch.take("sums", *y.shape)
        terms = []
        for j in range(geometry.tap_groups):
            k = j * geometry.interleave + phase
            low, high, read = geometry.reading(j, start, stop, 0, p.L_in)
            if low < high and k < p.K:
                terms.append((slice(low - start, high - start), k, read))
        # A tap that contributes to every output of the block comes first: its product is written to the sums directly.
        terms.sort(key=lambda term: term[0].start - term[0].stop)
        fresh = bool(terms) and terms[0][0] == slice(0, stop - start)
        if not fresh:
            sums[...] = 0
        x, origin = call.x[samples, groups], 0
        if terms and x.dtype != call.dtype:
            low, high = min(term[2].start for term in terms), max(term[2].stop for term in terms)
            if math.prod(x.shape[:3]) * (high - low) * call.dtype.itemsize <= limits.STAGED_INPUT:
                staged = scratch.take("input", *x.shape[:3], high - low)
                staged[...] = x[..., low:high]
                x, origin = staged, low
        for c in slices(0, p.C_in_g, self.channels):
            for fed, k, read in terms:
                x_tap = x[:, :, c, read.start - origin : read.stop - origin : geometry.stride]
                w_tap = call.w[groups, rows, c, k]
                product = sums if fresh else scratch.take("product", *sums.shape[:3], fed.stop - fed.start)
                if p.C_in_g == 1:
                    # If a factor had another dtype, NumPy would copy both through its buffer.
                    np.multiply(x_tap, w_tap.astype(call.dtype, copy=False), out=product, dtype=call.dtype)
                else:
                    _multiply_tap(w_tap, x_tap, product, scratch)
                if not fresh:
                    np.add(sums[..., fed], product, out=sums[..., fed])
                fresh = False
        if call.b is None:
            np.add(sums, 0, out=sums)  # turns a product of -0 into +0, as a sum has it
        else:
            call.add_bias(block, sums)
        if not direct:
            y[...] = sums


def _multiply_tap(w_tap: Array, x_tap: Array, product: Array, scratch: Scratch) -> None:
    """``product[n, g] = w_tap[g] @ x_tap[n, g]``; operands that BLAS cannot read in place are copied first."""
    w_packed = scratch.take("tap", *w_tap.shape)
    w_packed[...] = w_tap
    if not is_direct(x_tap, product.dtype):
        x_packed = scratch.take("shifted", *x_tap.shape)
        x_packed[...] = x_tap
        x_tap = x_packed
    np.matmul(w_packed, x_tap, out=product)
