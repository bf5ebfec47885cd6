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
from functools import lru_cache, partial
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np

from ..problem import ConvProblem
from . import costs, limits
from .arrays import Array, Scratch, accumulator, copy_padded, part_of, slices, strided
from .blocking import share
from .geometry import Block, Call
from .taps import Taps
from .threads import run_blocks
from .toeplitz import diagonals, first_input, outputs_per_step, step_inputs, steps, window_length

# The most samples whose windows are rows of one product. These lie far apart, often in the same set of the cache.
_SAMPLES = 24

# The most windows of a row that are copied where the others are read in place.
_COPIES = 4


class _Cut(NamedTuple):
    """A part of every row.

    Attributes:
        window, tile: the inputs of a window, and its outputs.
        apart: the inputs, and the outputs, from one window of a set to the next.
        length: of the part, in outputs.
        at, begin, end: its first output, and the range of those that exist: the first and the last ones may not.
        low, high: the range of the inputs of all windows.
        is_copied: all windows are read from a copy of these inputs.
        rows: for each set of windows that are read in place, or from the copy: the first input, counted from `low`, the
            number of windows, and the first output.
        ends: for each window that is copied apart: the inputs that exist, their place in a window, the first output.
    """

    window: int
    tile: int
    apart: tuple[int, int]
    length: int
    at: int
    begin: int
    end: int
    low: int
    high: int
    is_copied: bool
    rows: list[tuple[int, int, int]]
    ends: list[tuple[slice, slice, int]]


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
            (size,) = share(p, (p.groups, groups))
            samples = max(1, min(p.N, fitting // size))
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
        inside, outside = _within(p, self.tile, first_input(p, first, slice(0, p.K)), whole)
        others = inside + whole - outside + ((last - first) % self.tile > 0 or cuts > 1)
        # The check that the sums are finite, of all elements or of a few of them, and the bias.
        each = costs.ELEMENTWISE * size * (1 if p.transposed else 0.5) + costs.CONVERT.get(p.dtype, 0.0)
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
            "diagonals": self.groups * window * outputs,
            "edges": rows * _COPIES * window,
            "input": rows * (self.length * step_inputs(p) + window),
            "sums": rows * self.length * outputs_per_step(p),
        }
        safe = self.safe.block_memory(p, self.samples, self.groups, 1, self.length * outputs_per_step(p))
        return 0, buffers | {name: max(buffers.get(name, 0), count) for name, count in safe.items()}

    def run(self, call: Call, workers: int) -> None:
        p = call.p
        cuts = _cuts(self, p, call.x_direct)
        blocks = [
            (call, cut, Block(samples, groups, slice(0, 1), cut.begin, cut.end))
            for groups in slices(0, p.groups, self.groups)
            for samples in slices(0, p.N, self.samples)
            for cut in cuts
        ]
        run_blocks(self._prepare, blocks, workers, call.dtype, p.L_out, prepares=True)

    def _prepare(self, call: Call, cut: _Cut, block: Block, scratch: Scratch) -> Callable[[], None]:
        """Prepare a block, and return the function that computes it."""
        p, U, outputs = call.p, cut.window, cut.tile
        samples, groups = block.samples, block.groups
        y = call.y[samples, groups, :, cut.begin : cut.end]
        N, G = y.shape[:2]
        copy, direct = None, call.y_direct and cut.end - cut.begin == cut.length
        if direct:
            sums, (target, at) = y, part_of(call.y, samples, groups, cut.begin)
        else:
            sums, at = scratch.take("sums", N, G, 1, cut.length), 0
            target = sums
        if cut.is_copied:
            source, low = scratch.take("input", N, G, 1, cut.high - cut.low), 0
            copy = partial(copy_padded, call.x[samples, groups], cut.low, cut.high, source)
        else:
            source, low = part_of(call.x, samples, groups, cut.low)
        band, filled = scratch.keep("diagonals", (self, p), partial(self._band, p, cut, scratch))
        if self.groups > G:
            band, filled = band[:G], [(diagonal[:G], taps) for diagonal, taps in filled]
        values = None
        if scratch.band != groups.start:
            scratch.band, values = groups.start, call.w[groups]
        size, far, of_tiles = source.itemsize, source.strides[:2], target.strides[:2]
        products = []
        for first, number, output in cut.rows:
            windows = strided(source, low + first, (N, G, number, U), (*far, cut.apart[0] * size, size))
            tiles = strided(target, at + output, (N, G, number, outputs), (*of_tiles, cut.apart[1] * size, size))
            products.append((windows, band, tiles))
        copies: list[tuple[Array, Array]] = []
        if cut.ends and self.by_sample:
            for existing, inputs, output in cut.ends:
                tiles = strided(target, at + output, (N, G, 1, outputs), (*of_tiles, size, size))
                products.append((call.x[samples, groups, :, existing], band[:, inputs], tiles))
        elif cut.ends:
            ends, pairs = scratch.keep("edges", (self, cut), partial(self._ends, cut, scratch))
            for part, (existing, _, _) in zip(ends, cut.ends, strict=True):
                copies.append((part[:N, :G], call.x[samples, groups, 0, existing]))
            for pair, output, apart in pairs:
                tiles = strided(target, at + output, (N, G, pair.shape[2], outputs), (*of_tiles, apart * size, size))
                products.append((pair[:N, :G], band, tiles))
        if self.by_sample:
            products = [(a.transpose(1, 2, 0, 3), w[:, None], c.transpose(1, 2, 0, 3)) for a, w, c in products]
        bias = call.bias(block, 4)
        # An input that is not finite affects all outputs of its window, for which all of its inputs are multiplied. One
        # of the weight affects all of a group, except where steps have outputs of other taps.
        sample = sums if p.transposed else sums[..., ::outputs]

        def compute() -> None:
            for part, existing in copies:
                part[...] = existing
            if values is not None:
                for diagonal, taps in filled:
                    diagonal[...] = values[..., taps, None]
            if copy is not None:
                copy()
            for windows, bands, tiles in products:
                np.matmul(windows, bands, out=tiles)
            if call.is_spoilt(sample):
                self.safe.compute_outputs(call, block, scratch)
                return
            if bias is not None:
                np.add(sums, bias, out=sums)
            if not direct:
                y[...] = sums[..., cut.begin - cut.at : cut.end - cut.at]

        return compute

    def _band(self, p: ConvProblem, cut: _Cut, scratch: Scratch) -> tuple[Array, list[tuple[Array, slice]]]:
        """Bands of zeros, and views of their diagonals."""
        G, U, outputs = self.groups, cut.window, cut.tile
        band = scratch.take("diagonals", G, U, outputs)
        band[...] = 0
        return band, diagonals(p, band.reshape(G, 1, U, 1, outputs), self.tile, slice(0, p.K))

    def _ends(self, cut: _Cut, scratch: Scratch) -> tuple[list[Array], list[tuple[Array, int, int]]]:
        """Zeros for the windows `cut.ends`: views of the inputs that exist, and pairs of windows.

        Each pair has its first output and the distance of the second one.
        """
        ends = scratch.take("edges", self.samples, self.groups, len(cut.ends), cut.window)
        ends[...] = 0
        pairs = []
        for i in range(0, len(cut.ends), 2):
            outputs = [output for *_, output in cut.ends[i : i + 2]]
            pairs.append((ends[:, :, i : i + 2], outputs[0], outputs[-1] - outputs[0]))
        return [ends[:, :, i, inputs] for i, (_, inputs, _) in enumerate(cut.ends)], pairs


@lru_cache(maxsize=64)
def _cuts(form: Windows, p: ConvProblem, in_place: bool) -> list[_Cut]:
    """The parts of a row; `in_place` says whether BLAS can read the input in place."""
    tile, per_step, step, U = form.tile, outputs_per_step(p), step_inputs(p), window_length(p, form.tile, p.K)
    first, last = steps(p)
    number = -(-(last - first) // form.length)
    apart = form.sets * tile * step, form.sets * tile * per_step
    cuts = []
    for start, stop in pairwise(first + index * (last - first) // number for index in range(number + 1)):
        at, low = start * per_step - (p.padding_left if p.transposed else 0), first_input(p, start, slice(0, p.K))
        count, (whole, rest) = stop - start, divmod(stop - start, tile)
        # The windows within the input are read in place, the few others from copies; if they are many, all of them.
        inside, outside = _within(p, tile, low, whole)
        is_copied = not in_place or inside + whole - outside >= _COPIES
        if is_copied:
            inside, outside = 0, whole
        rows = [(i * tile, -(-(outside - i) // form.sets)) for i in range(inside, min(inside + form.sets, outside))]
        others = [i * tile for i in (*range(inside), *range(outside, whole))]
        if rest and is_copied:
            rows.append((count - tile, 1))
        elif rest:
            others.append(count - tile)
        ends = []
        for index in others:
            begin = low + index * step
            left = min(max(begin, 0), p.L_in)
            right = max(left, min(begin + U, p.L_in))
            ends.append((slice(left, right), slice(left - begin, right - begin), index * per_step))
        cuts.append(
            _Cut(
                U, tile * per_step, apart, count * per_step, at, max(0, at), min(p.L_out, at + count * per_step),
                low, low + (count - tile) * step + U, is_copied,
                [(index * step, lines, index * per_step) for index, lines in rows], ends,
            )
        )  # fmt: skip
    return cuts


def _within(p: ConvProblem, tile: int, low: int, whole: int) -> tuple[int, int]:
    """The range of the windows within the input, of `whole` windows of which the first begins at `low`."""
    step = tile * step_inputs(p)
    inside = min(max(0, -(low // step)), whole)
    return inside, max(inside, min(whole, (p.L_in - window_length(p, tile, p.K) - low) // step + 1))


def _fits(p: ConvProblem) -> bool:
    """Whether the outputs of all steps exist."""
    return not p.transposed or (p.padding_left % p.stride == 0 and (p.L_out + p.padding_left) % p.stride == 0)
