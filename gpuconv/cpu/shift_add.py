"""shift_add: one product of all taps with the input in place; its rows are then shifted and summed.

It is for layers of few output channels and for transposed ones: the product reads the input once, where panels copy it
K times. The layers for which it is chosen take 1.3 to 1.8 times as long in the next best form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..problem import ConvProblem
from . import costs, limits
from .arrays import Array, Scratch, accumulator
from .blocking import Blocking, share, tiled
from .geometry import Block, Call, Geometry


@dataclass(frozen=True, slots=True)
class ShiftAdd:
    """Products of all taps with the input positions of a block.

    Attributes:
        span: the most input positions that a block reads.
        concurrent: BLAS computes each product on the calling thread.
    """

    name: ClassVar[str] = "shift_add"
    reason: ClassVar[str] = "few output channels or a stride: one product of all taps, then shifted sums"

    geometry: Geometry
    blocking: Blocking
    span: int
    concurrent: bool

    @classmethod
    def of(cls, p: ConvProblem) -> ShiftAdd | None:
        """None where even the smallest block is too large."""
        geometry, size = Geometry.of(p), accumulator(p.dtype).itemsize
        first, last = geometry.positions(p)
        per_row = p.K * p.C_in_g
        weight_rows, weight_groups = limits.fit(limits.PACKED_WEIGHT // (size * per_row), p.C_out_g, p.groups)
        if weight_rows * per_row * size > limits.PACKED_WEIGHT:
            return None
        reach = (geometry.tap_groups - 1) * abs(geometry.dilation)
        tile = limits.small_product(p.is_complex) // (p.C_out_g * per_row) // 16 * 16
        # A block reads `span` input positions, which may have to be staged, and computes the product of some rows with
        # them; of all rows where several threads share the blocks.
        for concurrent in [True, False] if tile >= 64 else [False]:
            staged, product = (limits.CONCURRENT_BUFFER if concurrent else limits.BUFFER) // size, limits.SUMS // size
            span = min(staged // p.C_in_g, product // (p.K * p.C_out_g if concurrent else p.K))
            length = min(last - first, (span - reach - 1) // geometry.stride + 1)
            if length >= min(last - first, 4 * reach // geometry.stride + 1):
                break
        else:
            return None
        span = (length - 1) * geometry.stride + reach + 1
        rows = max(1, min(p.C_out_g, product // (p.K * span)))
        rows = -(-p.C_out_g // -(-p.C_out_g // rows))  # equal blocks
        samples = groups = 1
        if rows == p.C_out_g and length == last - first:
            fitting = max(1, min(product // (rows * p.K * span), staged // (p.C_in_g * span)))
            groups = min(p.groups, weight_groups, fitting)
            if groups == p.groups:
                samples = min(p.N, fitting // groups)
        if concurrent:
            groups, samples = share(p, (p.groups, groups), (p.N, samples))
        tile = min(tile, span) if concurrent else span
        blocking = Blocking(samples, groups, rows, length, rows * p.K, tile, weight_groups, weight_rows)
        return cls(geometry, blocking, span, concurrent)

    def multiplies_zeros(self, p: ConvProblem) -> bool:
        return False

    def cost(self, p: ConvProblem) -> float:
        geometry, blocking, size = self.geometry, self.blocking, costs.scale(p)
        first, last = geometry.positions(p)
        Q = last - first
        blocks, reread = blocking.num_blocks(p, Q)
        lines = p.N * p.groups * -(-Q // blocking.length)  # rows of blocks; each is read once for each part of the rows
        span = min(self.span, p.L_in)
        tile = min(blocking.tile, span)
        rows = min(blocking.rows, p.C_out_g)
        product = costs.products(
            p, lines * reread * -(-span // tile), rows * p.K, p.C_in_g, tile, self.concurrent or self._is_small(p)
        )
        length = min(blocking.length, p.L_in)
        added = costs.ELEMENTWISE if geometry.stride == 1 and geometry.phases == 1 else 2 * costs.ELEMENTWISE
        rest = costs.rows(lines * p.C_out_g * p.K, length, added * size)
        rest += costs.rows(lines * p.C_out_g * geometry.phases, blocking.length, costs.ELEMENTWISE * size)
        if geometry.out_stride > 1 or p.dtype in costs.CONVERT:
            store = costs.TRANSPOSING_COPY if geometry.out_stride > 1 else costs.COPY
            store = store * size + costs.CONVERT.get(p.dtype, 0.0)
            rest += costs.rows(lines * p.C_out_g * geometry.phases, blocking.length, store)
        if p.dtype in costs.CONVERT:
            rest += costs.CONVERT[p.dtype] * lines * p.C_in_g * span
        if not p.transposed or p.dtype in costs.CONVERT:
            rest += costs.TRANSPOSING_COPY * size * p.groups * p.C_out_g * p.K * p.C_in_g
        rest += blocks * (costs.BLOCK + costs.CALL * geometry.tap_groups * 1.5)
        return product + rest if self.concurrent else costs.of_blas(product, rest)

    def _is_small(self, p: ConvProblem) -> bool:
        blocking = self.blocking
        return blocking.rows * p.K * p.C_in_g * blocking.tile <= limits.small_product(p.is_complex)

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        """Bounds on the elements of the scratch buffers: what all threads share, and what each has by name."""
        blocking = self.blocking
        lines = blocking.samples * blocking.groups
        buffers = {
            "product": lines * blocking.rows * p.K * self.span,
            "sums": lines * blocking.rows * self.geometry.phases * blocking.length,
            "input": lines * p.C_in_g * self.span,
        }
        return blocking.weight_groups * blocking.weight_rows * p.K * p.C_in_g, buffers

    def run(self, call: Call, workers: int) -> None:
        p, w = call.p, call.w.swapaxes(2, 3)
        if not self.geometry.writes_everything():
            call.fill_with_bias()
        in_place = (
            p.transposed and w.dtype == call.dtype and call.w.swapaxes(1, 2).flags.c_contiguous and w.flags.aligned
        )
        weight = w.reshape(p.groups, p.C_out_g * p.K, p.C_in_g) if in_place else None
        self.blocking.run(call, self.geometry.positions(p), weight, self._pack, self._compute, workers)

    def _pack(self, w: Array, scratch: Scratch) -> Array:
        """Weight (groups, rows, C_in_g, K) as (groups, rows*K, C_in_g)."""
        G, M, C, K = w.shape
        packed = scratch.take("weight", G, M, K, C)
        packed[...] = w.swapaxes(2, 3)
        return packed.reshape(G, M * K, C)

    def _compute(self, call: Call, weight: Array, block: Block, scratch: Scratch) -> None:
        p, geometry, (samples, groups, rows, start, stop) = call.p, self.geometry, block
        N, G, M = samples.stop - samples.start, groups.stop - groups.start, rows.stop - rows.start
        R, J = geometry.phases, geometry.tap_groups
        direct = call.y_direct and geometry.out_stride == 1
        if direct:
            sums = call.y[samples, groups, rows, None, geometry.place(0, start, stop)]
        else:
            sums = scratch.take("sums", N, G, M, R, stop - start)
        sums[...] = 0
        call.add_bias(block, sums)
        low, high = geometry.window(start, stop, slice(0, J))
        low, high = max(low, 0), min(high, p.L_in)
        if low < high:
            x = call.read(samples, groups, slice(0, p.C_in_g), low, high, scratch)
            product = scratch.take("product", N, G, M * p.K, high - low)
            for begin, end, tile in self.blocking.tiles(high - low):
                columns = tiled(x[..., begin:end], tile)
                self.blocking.multiply(weight, columns, tiled(product[..., begin:end], tile))
            product = product.reshape(N, G, M, p.K, high - low)
            for j in range(J):
                first, last, read = geometry.reading(j, start, stop, low, high)
                if first < last:
                    taps = slice(j * geometry.interleave, min(j * geometry.interleave + R, p.K))
                    fed = sums[..., : taps.stop - taps.start, first - start : last - start]
                    np.add(fed, product[..., taps, read.start - low : read.stop - low : read.step], out=fed)
        if not direct:
            call.store(geometry, block, sums)
