"""planes: elementwise products of whole planes (channels, positions) of a depthwise input with the plane of each tap.

A tap shifts all rows alike, so it shifts the plane as one long row; its plane holds the weight of each channel, and
zeros where the shift crosses from one row into the next. NumPy's inner loop is then as long as the plane, however short
the rows are. It stays because depthwise layers of short rows (N 512, C 64, L 8, K 3) take four times as long in any
other form. The planes of the weight are built once for all samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..problem import ConvProblem
from . import costs, limits
from .arrays import Array, Scratch, accumulator, slices
from .blocking import parts, share
from .geometry import Block, Call, Geometry
from .taps import Taps
from .threads import run_blocks


@dataclass(frozen=True, slots=True)
class Planes:
    """Blocks of `samples` and `groups`, of rows of `length` positions (those of the input or the output).

    Attributes:
        shifts: of the taps that read anything: the tap, and how far behind the output it reads the input.
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
        """None where outputs are not next to each other, or the planes of all taps are too large."""
        geometry = Geometry.of(p)
        if p.C_in_g != 1 or p.C_out_g != 1 or geometry.stride != 1 or geometry.out_stride != 1:
            return None
        length, size = max(p.L_in, p.L_out), accumulator(p.dtype).itemsize
        # The tap that reaches most of the row goes first: its product need not be added to anything.
        at = [(k, geometry.out_left + geometry.offset + k * geometry.dilation) for k in range(min(p.K, limits.PLANES))]
        shifts = tuple(sorted((s for s in at if -p.L_out < s[1] < p.L_in), key=lambda s: (abs(s[1]), s)))
        room = min(limits.PLANE, limits.CONCURRENT_BUFFER // max(1, len(shifts))) // size
        if p.K > limits.PLANES or not shifts or length > room:
            return None
        groups = max(1, min(p.groups, room // length))
        samples = max(1, min(p.N, limits.PLANE_BLOCK // size // (groups * length)))
        groups, samples = share(parts(p), (p.groups, groups), (p.N, samples))
        return cls(shifts, Taps.of(p), samples, groups, length)

    def multiplies_zeros(self, p: ConvProblem) -> bool:
        return True

    def cost(self, p: ConvProblem) -> float:
        size, taps = costs.scale(p), len(self.shifts)
        chunks = -(-p.groups // self.groups)
        blocks = chunks * -(-p.N // self.samples)
        run = p.groups * self.length / chunks
        # Products and sums, the check that they are finite, and the bias.
        passes = costs.rows(p.N * chunks, run, costs.ELEMENTWISE * size) * (2 * taps + 1)
        filling = taps * costs.copies(p.groups, self.length, costs.COPY * size) * 2
        rest = 0.0
        if p.dtype in costs.CONVERT:
            rest += costs.copies(p.N * chunks, run, 2 * costs.CONVERT[p.dtype])
        if p.L_out < self.length:
            rest += costs.copies(p.N * p.groups, p.L_out, costs.COPY * size)
        if p.L_in < self.length:
            rest += costs.copies(p.N * p.groups, p.L_in, costs.COPY * size)
        calls = blocks * (costs.BLOCK + 2.5 * taps * costs.CALL) + chunks * taps * costs.CALL
        return passes + filling + rest + calls

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        """Bounds on the elements of the scratch buffers: what all threads share, and what each has by name."""
        plane = self.groups * self.length
        buffers = dict.fromkeys(("input", "sums", "product"), self.samples * plane) | {"band": len(self.shifts) * plane}
        safe = self.safe.block_memory(p, self.samples, self.groups, 1, p.L_out)
        return 0, buffers | {name: max(buffers.get(name, 0), count) for name, count in safe.items()}

    def run(self, call: Call, workers: int) -> None:
        p = call.p
        blocks = [
            (call, Block(samples, groups, slice(0, 1), 0, p.L_out))
            for groups in slices(0, p.groups, self.groups)
            for samples in slices(0, p.N, self.samples)
        ]
        run_blocks(self._compute, blocks, workers, call.dtype, self.groups * self.length)

    def _compute(self, call: Call, block: Block, scratch: Scratch) -> None:
        p, L, size = call.p, self.length, call.dtype.itemsize
        y = call.y[block.samples, block.groups]
        N, G = y.shape[:2]
        x = call.read(block.samples, block.groups, slice(0, 1), 0, L, scratch)
        if x.strides[1] != L * size:
            staged = scratch.take("input", *x.shape)
            staged[...] = x
            x = staged
        direct = call.y_direct and p.L_out == L and y.strides[1] == L * size
        rows = y if direct else scratch.take("sums", N, G, 1, L)
        x, sums = x.reshape(N, G * L), rows.reshape(N, G * L)
        planes = self._planes(call, block.groups, scratch)
        product = scratch.take("product", N, G * L)
        for index, ((_, shift), plane) in enumerate(zip(self.shifts, planes, strict=True)):
            fed = slice(max(0, -shift), G * L - max(0, shift))
            read = slice(fed.start + shift, fed.stop + shift)
            if index == 0:
                np.multiply(x[:, read], plane[fed], out=sums[:, fed])
                sums[:, : fed.start] = 0
                sums[:, fed.stop :] = 0
            else:
                np.multiply(x[:, read], plane[fed], out=product[:, fed])
                np.add(sums[:, fed], product[:, fed], out=sums[:, fed])
        if call.is_spoilt(sums):
            self.safe.compute_outputs(call, block, scratch)
            return
        if call.b is None:
            np.add(sums, 0, out=sums)  # products of zero can be -0, their sum is +0
        else:
            call.add_bias(block, rows)
        if not direct:
            y[...] = rows[..., : p.L_out]

    def _planes(self, call: Call, groups: slice, scratch: Scratch) -> Array:
        """The weight of each tap at each output of these groups (taps, groups*length), zeros where it reads nothing."""
        p, G = call.p, groups.stop - groups.start
        planes = scratch.take("band", len(self.shifts), G, self.length)
        if scratch.band != groups.start:
            scratch.band = groups.start
            planes[...] = 0
            for plane, (k, shift) in zip(planes, self.shifts, strict=True):
                plane[:, max(0, -shift) : min(p.L_out, p.L_in - shift)] = call.w[groups, 0, 0, k, None]
        return planes.reshape(len(self.shifts), -1)
