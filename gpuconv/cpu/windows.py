"""windows: neighbouring outputs of a depthwise row together; its overlapping windows are read in place.

As toeplitz, but the windows within the input are not copied, since copies would take longer than the products where a
group has one channel and few taps. Windows overlap, but BLAS does not allow overlapping rows of a matrix; so a matrix
has for example every second or every third window, and each of these matrices is multiplied by the banded matrix of the
row. For many samples of short rows, a matrix has the same window of each sample. The last window of a row ends with the
row and may compute some outputs again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import numpy as np

from ..problem import ConvProblem
from . import costs, limits
from .arrays import Array, Scratch, accumulator, copy_padded, slices, strided
from .blocking import share
from .geometry import Block, Call
from .taps import Taps
from .threads import run_blocks
from .toeplitz import fill_band, first_input, outputs_per_step, step_inputs, steps, window_length

# The most samples whose windows are rows of one product. These lie far apart, often in the same set of the cache.
_SAMPLES = 24

# The most windows of a row that are copied where the others are read in place.
_COPIES = 4


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of `tile` steps, as in `Toeplitz`, times the banded matrix of all taps.

    Attributes:
        safe: the form that computes a block again.
        samples, groups, length: those of a block; `length` counts steps.
        sets: the number of matrices; window i is a row of the matrix i mod `sets`.
        by_sample: a matrix has one window of each sample of the block.
    """

    name: ClassVar[str] = "windows"
    reason: ClassVar[str] = "depthwise rows: banded matrices times windows that are read in place"
    concurrent: ClassVar[bool] = True

    safe: Taps
    samples: int
    groups: int
    length: int
    tile: int
    sets: int
    by_sample: bool

    @classmethod
    def candidates(cls, p: ConvProblem) -> list[Windows]:
        """Forms for one channel per group, where a product has several windows."""
        if p.C_in_g != 1 or p.C_out_g != 1:
            return []
        first, last = steps(p)
        # A tile that divides the row avoids the last windows, each of which is a product of its own.
        even = next((tile for tile in (16, 15, 14, 13, 12) if (last - first) % tile == 0), 16)
        found = [cls._of(p, tile, False) for tile in sorted({4, 8, even, 16, 32})]
        if p.N >= limits.LINES_OF_SAMPLES:
            found += [cls._of(p, tile, True) for tile in (16, 32)]
        return [form for form in found if form is not None]

    @classmethod
    def _of(cls, p: ConvProblem, tile: int, by_sample: bool) -> Windows | None:
        """None where there are too few windows, or a block would be too large."""
        first, last = steps(p)
        per_step, budget = outputs_per_step(p), limits.SUMS // accumulator(p.dtype).itemsize
        step, window, outputs = tile * step_inputs(p), window_length(p, tile, p.K), tile * per_step
        rows = limits.small_product(p.is_complex) // (window * outputs)  # of a product
        longest = budget // max(per_step, step_inputs(p))
        sets = 1 if by_sample else -(-window // step)
        least = tile if by_sample else limits.WINDOWS_OF_A_SET * sets * tile
        if not by_sample:
            longest = min(longest, rows * sets * tile)
        if last - first < least or longest < 2 * limits.WINDOWS_OF_A_SET * tile or window * outputs > budget:
            return None
        length = min(last - first, longest)
        fitting = max(1, budget // (length * max(per_step, step_inputs(p))))
        groups = max(1, min(p.groups, fitting, budget // (window * outputs)))
        if by_sample:
            samples = -(-p.N // -(-p.N // _SAMPLES))
            if samples > min(rows, fitting):
                return None
            groups, length = share(p, (p.groups, min(groups, fitting // samples)), (last - first, length))
        else:
            # Threads share the groups, since all samples use the same bands. A block has as many samples as fit.
            (groups,) = share(p, (p.groups, groups))
            samples = max(1, min(p.N, fitting // groups))
            groups, samples, length = share(p, (p.groups, groups), (p.N, samples), (last - first, length))
        if length < (tile if by_sample else 2 * tile):
            return None
        return cls(Taps.of(p), samples, groups, length, tile, sets, by_sample)

    def multiplies_zeros(self, p: ConvProblem) -> bool:
        return True

    def cost(self, p: ConvProblem) -> float:
        size, per_step = costs.scale(p), outputs_per_step(p)
        first, last = steps(p)
        cuts = -(-(last - first) // self.length)
        blocks = -(-p.N // self.samples) * -(-p.groups // self.groups) * cuts
        rows = p.N * p.groups * cuts
        U, outputs = window_length(p, self.tile, p.K), self.tile * per_step
        bands = p.groups * -(-p.N // self.samples) * cuts
        filling = bands * size * (costs.DIAGONAL * p.K * self.tile + costs.COPY * U * outputs)
        windows = (last - first) / cuts / self.tile
        lines, each_set = (min(self.samples, p.N), 1.0) if self.by_sample else (1, windows / self.sets)
        product = costs.products(p, rows * windows / (lines * each_set), lines * each_set, U, outputs, True)
        whole = (last - first) // self.tile
        inside, outside = self._within(p, first_input(p, first, slice(0, p.K)), whole)
        others = inside + whole - outside + ((last - first) % self.tile > 0 or cuts > 1)
        # The check that the sums are finite, and the bias.
        each = costs.ELEMENTWISE * size + costs.CONVERT.get(p.dtype, 0.0)
        rest = costs.copies(rows, windows * outputs, each)
        if p.has_bias:
            rest += costs.rows(rows, windows * outputs, costs.ELEMENTWISE * size)
        if self.by_sample:
            rest += costs.FAR_LINE * rows * windows
        if others <= _COPIES and p.dtype not in costs.CONVERT:
            if self.by_sample:
                product += costs.products(p, rows / lines * others, lines, U, outputs, True)
            else:
                product += costs.products(p, rows * -(-others // 2), 2, U, outputs, True)
                rest += costs.copies(rows * others, U, costs.COPY * size)
        else:
            staged = costs.COPY * size + costs.CONVERT.get(p.dtype, 0.0)
            rest += costs.copies(rows, windows * self.tile * step_inputs(p), staged)
        if p.dtype in costs.CONVERT or not _fits(p):
            rest += costs.copies(rows, windows * outputs, costs.COPY * size)
        return product + filling + rest + blocks * (costs.BLOCK + (8 + self.sets) * costs.CALL)

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        """Bounds on the elements of the scratch buffers: what all threads share, and what each has by name."""
        window, outputs = window_length(p, self.tile, p.K), self.tile * outputs_per_step(p)
        rows = self.samples * self.groups
        buffers = {
            "band": self.groups * window * outputs,
            "ends": rows * _COPIES * window,
            "input": rows * (self.length * step_inputs(p) + window),
            "sums": rows * self.length * outputs_per_step(p),
        }
        safe = self.safe.block_memory(p, self.samples, self.groups, 1, self.length * outputs_per_step(p))
        return 0, buffers | {name: max(buffers.get(name, 0), count) for name, count in safe.items()}

    def run(self, call: Call, workers: int) -> None:
        p = call.p
        first, last = steps(p)
        cuts = -(-(last - first) // self.length)
        bounds = [first + index * (last - first) // cuts for index in range(cuts + 1)]
        blocks = [
            (call, Block(samples, groups, slice(0, 1), start, stop))
            for groups in slices(0, p.groups, self.groups)
            for samples in slices(0, p.N, self.samples)
            for start, stop in pairwise(bounds)
        ]
        run_blocks(self._prepare, blocks, workers, call.dtype, p.L_out, prepares=True)

    def _prepare(self, call: Call, block: Block, scratch: Scratch) -> Callable[[], None]:
        """Prepare a block, and return the function that computes it."""
        p, tile, taps = call.p, self.tile, slice(0, call.p.K)
        per_step, step, U = outputs_per_step(p), self.tile * step_inputs(p), window_length(p, self.tile, p.K)
        # The outputs of the block; the first and the last ones may not exist.
        at, count = block.start * per_step - (p.padding_left if p.transposed else 0), block.stop - block.start
        begin, end = max(0, at), min(p.L_out, at + count * per_step)
        y = call.y[block.samples, block.groups, :, begin:end]
        direct = call.y_direct and end - begin == count * per_step
        N, G = y.shape[:2]
        sums = y if direct else scratch.take("sums", N, G, 1, count * per_step)
        band, fill = scratch.take("band", G, U, tile * per_step), None
        if scratch.band != block.groups.start:
            scratch.band = block.groups.start
            fill = fill_band(p, call.w[block.groups], band.reshape(G, 1, U, 1, tile * per_step), tile, taps)
        x, low, whole = call.x[block.samples, block.groups], first_input(p, block.start, taps), count // tile
        # The windows within the input are read in place, the few others from copies; if they are many, all of them.
        inside, outside = self._within(p, low, whole)
        copy = None
        if not call.x_direct or inside + whole - outside >= _COPIES:
            high = low + (count - tile) * step_inputs(p) + U
            copied = scratch.take("input", N, G, 1, high - low)
            copy = partial(copy_padded, x, low, high, copied)
            x, low, inside, outside = copied, 0, 0, whole
        products = []

        def multiply(windows: Array, first: int, apart: int, inputs: slice) -> None:
            """Windows (N, G, rows, inputs) give tiles of outputs from step `first` on, so many steps apart.

            The windows have these inputs of whole windows.
            """
            strides = (*sums.strides[:2], apart * per_step * sums.itemsize, sums.itemsize)
            tiles, bands = strided(sums, first * per_step, (N, G, windows.shape[2], tile * per_step), strides), band
            if self.by_sample:
                windows, tiles, bands = windows.transpose(1, 2, 0, 3), tiles.transpose(1, 2, 0, 3), band[:, None]
            products.append((windows, bands[..., inputs, :], tiles))

        everything = slice(0, U)
        for first in range(inside, min(inside + self.sets, outside)):
            shape = (N, G, -(-(outside - first) // self.sets), U)
            strides = (*x.strides[:2], self.sets * step * x.itemsize, x.itemsize)
            multiply(strided(x, low + first * step, shape, strides), first * tile, self.sets * tile, everything)
        copies = []
        if copy is not None and count % tile:
            multiply(x[..., -U:], count - tile, 1, everything)
        elif copy is None:
            others = [index * tile for index in (*range(inside), *range(outside, whole))]
            others += [count - tile] if count % tile else []
            ends = scratch.take("ends", N, G, len(others), U)
            for index, first in enumerate(others):
                start = low + first * step_inputs(p)
                left = min(max(start, 0), p.L_in)
                right = max(left, min(start + U, p.L_in))
                inputs = slice(left - start, right - start)
                if self.by_sample:
                    multiply(x[..., left:right], first, 1, inputs)
                else:
                    copies.append((ends[:, :, index, inputs], x[:, :, 0, left:right]))
            for index in range(0, len(others) if copies else 0, 2):
                pair = others[index : index + 2]
                multiply(ends[:, :, index : index + 2], pair[0], pair[-1] - pair[0], everything)
        bias = call.bias(block, 4)

        def compute() -> None:
            if fill is not None:
                fill()
            if copy is not None:
                copy()
            if copies:
                ends[...] = 0
            for part, existing in copies:
                part[...] = existing
            for windows, bands, tiles in products:
                np.matmul(windows, bands, out=tiles)
            if call.is_spoilt(sums):
                self.safe.compute_outputs(call, block._replace(start=begin, stop=end), scratch)
                return
            if bias is not None:
                np.add(sums, bias, out=sums)
            if not direct:
                y[...] = sums[..., begin - at : end - at]

        return compute

    def _within(self, p: ConvProblem, low: int, whole: int) -> tuple[int, int]:
        """The range of the windows within the input, of `whole` windows of which the first begins at `low`."""
        step = self.tile * step_inputs(p)
        inside = min(max(0, -(low // step)), whole)
        return inside, max(inside, min(whole, (p.L_in - window_length(p, self.tile, p.K) - low) // step + 1))


def _fits(p: ConvProblem) -> bool:
    """Whether the outputs of all steps exist."""
    return not p.transposed or (p.padding_left % p.stride == 0 and (p.L_out + p.padding_left) % p.stride == 0)
