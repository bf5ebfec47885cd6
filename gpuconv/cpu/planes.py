"""planes: elementwise products of whole planes (channels, positions) of a depthwise input with the plane of each tap.

A tap shifts all rows alike, so it shifts the plane as one long row; the plane of a tap holds the weight of each
channel, and zeros where the shift crosses from one row into the next. NumPy's inner loop is then as long as the plane,
however short the rows are. The planes of the weight are built once for all samples. Depthwise layers of short rows
(N 512, C 64, L 8, K 3) take four times as long in any other form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..problem import ConvProblem
from . import costs, limits
from .arrays import Array, Scratch, accumulator, copy_padded, slices, strided
from .blocking import share
from .geometry import Block, Call, Geometry
from .taps import Taps
from .threads import run_blocks


@dataclass(frozen=True, slots=True)
class Planes:
    """Blocks of `samples` and `groups`, of rows of `length` positions (the longer one of input and output).

    Attributes:
        shifts: the taps that read any input, each with the distance from an output to the input that it reads.
        safe: the form that computes a block again.
    """

    name: ClassVar[str] = "planes"
    reason: ClassVar[str] = "depthwise, few taps: elementwise products of planes of several rows"
    concurrent: ClassVar[bool] = True

    shifts: tuple[tuple[int, int], ...]
    safe: Taps
    samples: int
    groups: int
    length: int

    @classmethod
    def of(cls, p: ConvProblem) -> Planes | None:
        """None where the layer is not depthwise with stride 1, or the planes of all taps are too large."""
        geometry = Geometry.of(p)
        if p.C_in_g != 1 or p.C_out_g != 1 or geometry.stride != 1 or geometry.out_stride != 1:
            return None
        length, size = max(p.L_in, p.L_out), accumulator(p.dtype).itemsize
        at = [(k, geometry.out_left + geometry.offset + k * geometry.dilation) for k in range(min(p.K, limits.PLANES))]
        shifts = tuple(s for s in at if -p.L_out < s[1] < p.L_in)
        room = min(limits.PLANE, limits.CONCURRENT_BUFFER // max(1, len(shifts))) // size
        if p.K > limits.PLANES or not shifts or length > room:
            return None
        groups = max(1, min(p.groups, room // length))
        samples = max(1, min(p.N, limits.PLANE_BLOCK // size // (groups * length)))
        groups, samples = share(p, (p.groups, groups), (p.N, samples))
        return cls(shifts, Taps.of(p), samples, groups, length)

    def multiplies_zeros(self, p: ConvProblem) -> bool:
        return True

    def cost(self, p: ConvProblem) -> float:
        size, taps = costs.scale(p), len(self.shifts)
        chunks = -(-p.groups // self.groups)
        blocks = chunks * -(-p.N // self.samples)
        run = p.groups * self.length / chunks
        # The sums of products, the check that they are finite, and the bias.
        passes = taps * costs.rows(p.N * chunks, run, costs.MULTIPLY_ADD * size)
        passes += 2 * costs.rows(p.N * chunks, run, costs.ELEMENTWISE * size)
        filling = taps * costs.copies(p.groups, self.length, costs.COPY * size) * 2
        rest = 0.0
        if p.dtype in costs.CONVERT:
            rest += costs.copies(p.N * chunks, run, 2 * costs.CONVERT[p.dtype])
        if p.L_out < self.length:
            rest += costs.copies(p.N * p.groups, p.L_out, costs.COPY * size)
        if p.L_in < self.length:
            rest += costs.copies(p.N * p.groups, p.L_in, costs.COPY * size)
        calls = blocks * (costs.BLOCK + 12 * costs.CALL) + chunks * taps * costs.CALL
        return passes + filling + rest + calls

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        """Bounds on the elements of the scratch buffers: what all threads share, and what each has by name."""
        plane = self.groups * self.length
        reach = max(0, *self._ends) - min(0, *self._ends)
        buffers = dict.fromkeys(("input", "sums"), self.samples * plane)
        buffers |= {"ends": 2 * (plane + reach), "band": len(self.shifts) * plane, "bias": plane}
        safe = self.safe.block_memory(p, self.samples, self.groups, 1, p.L_out)
        return 0, buffers | {name: max(buffers.get(name, 0), count) for name, count in safe.items()}

    def run(self, call: Call, workers: int) -> None:
        p = call.p
        blocks = [
            (call, Block(samples, groups, slice(0, 1), 0, p.L_out))
            for groups in slices(0, p.groups, self.groups)
            for samples in slices(0, p.N, self.samples)
        ]
        run_blocks(self._prepare, blocks, workers, call.dtype, self.groups * self.length, prepares=True)

    def _prepare(self, call: Call, block: Block, scratch: Scratch) -> Callable[[], None]:
        """Prepare a block, and return the function that computes it."""
        p, L, size = call.p, self.length, call.dtype.itemsize
        x, y = call.x[block.samples, block.groups], call.y[block.samples, block.groups]
        N, G = y.shape[:2]
        staged = None
        if not call.x_direct or p.L_in < L or x.strides[1] != L * size or x.strides[0] < G * L * size:
            staged = scratch.take("input", N, G, 1, L)
        source = x if staged is None else staged
        direct = call.y_direct and p.L_out == L and y.strides[1] == L * size
        rows = y if direct else scratch.take("sums", N, G, 1, L)
        planes, fill = self._planes(call, block.groups, scratch)
        # A tap that reaches beyond a plane reads the neighbouring sample, which the planes of the weight multiply by
        # zero. The first and the last sample have no neighbour on one side, so they are copied with zeros around them.
        first, last = self._ends
        low, high = min(0, first, last), max(0, first, last)
        sums, step = rows.reshape(N, G * L), source.strides[0] // size
        memory = as_strided(source, ((N - 1) * step + G * L,), (size,))
        outer = [0, N - 1][:N]
        ends = scratch.take("ends", len(outer), G * L + high - low)
        products = [(self._windows(ends[i], first - low, 0, 1, G * L), sums[n : n + 1]) for i, n in enumerate(outer)]
        if N > 2:
            products.append((self._windows(memory, step + first, step, N - 2, G * L), sums[1:-1]))
        bias = call.bias(block, 4)
        # The bias of one row for all samples becomes a plane, too, so that it is added in runs as long.
        plane = scratch.take("bias", G, 1, L) if bias is not None and len(bias) == 1 else None

        def compute() -> None:
            if staged is not None:
                copy_padded(x, 0, L, staged)
            fill()
            for end, n in zip(ends, outer, strict=True):
                copy_padded(memory[n * step : n * step + G * L], low, G * L + high, end)
            for windows, out in products:
                # `einsum` multiplies and adds in one loop, which is over positions, as these are first in order "F".
                np.einsum("kq,qnk->qn", planes, windows, out=out.T, order="F")
            if call.is_spoilt(sums):
                self.safe.compute_outputs(call, block, scratch)
                return
            if plane is not None:
                plane[...] = bias
                np.add(sums, plane.reshape(1, -1), out=sums)
            elif bias is not None:
                np.add(rows, bias, out=rows)
            if not direct:
                y[...] = rows[..., : p.L_out]

        return compute

    @property
    def _ends(self) -> tuple[int, int]:
        """The shifts of the first and the last tap."""
        return self.shifts[0][1], self.shifts[-1][1]

    def _windows(self, x: Array, start: int, step: int, N: int, outputs: int) -> Array:
        """What each tap reads for each output of N samples, as (outputs, N, taps), from `start` on."""
        taps, (first, last), size = len(self.shifts), self._ends, x.itemsize
        apart = (last - first) // max(1, taps - 1)
        return strided(x, start, (outputs, N, taps), (size, step * size, apart * size))

    def _planes(self, call: Call, groups: slice, scratch: Scratch) -> tuple[Array, Callable[[], None]]:
        """The weight of each tap at each output of these groups (taps, groups*length), zero where it reads no input.

        The second value fills it.
        """
        p, G = call.p, groups.stop - groups.start
        planes = scratch.take("band", len(self.shifts), G, self.length)
        parts = []
        if scratch.band != groups.start:
            scratch.band = groups.start
            for plane, (k, shift) in zip(planes, self.shifts, strict=True):
                parts.append((plane[:, max(0, -shift) : min(p.L_out, p.L_in - shift)], call.w[groups, 0, 0, k, None]))

        def fill() -> None:
            if parts:
                planes[...] = 0
            for part, of_tap in parts:
                part[...] = of_tap

        return planes.reshape(len(self.shifts), -1), fill
