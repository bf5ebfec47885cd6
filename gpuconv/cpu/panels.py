"""panels: the windows of a block are copied side by side into a panel, for one product with the weight.

It can compute every problem, and is chosen for most dense layers. These take 1.5 times as long in the next best form
(geometric mean over the benchmark layers), and up to 4 times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import ClassVar

import numpy as np

from ..problem import ConvProblem
from . import costs, limits
from .arrays import Array, Scratch, accumulator, is_finite, slices, strided
from .blocking import Blocking, parts, tiled
from .geometry import Block, Call, Geometry
from .taps import Taps
from .threads import run_blocks


@dataclass(frozen=True, slots=True)
class Panels:
    """Panels of windows times the weight, each product over `channels` input channels and `taps` tap groups.

    Attributes:
        merged: the positions of all samples of a block are the columns of one product.
        packed: a weight that BLAS cannot read in place is packed before the blocks are computed; otherwise for each
            product.
        concurrent: BLAS computes each product on the calling thread.
        by_window: the elements of a window lie next to each other in a panel, which is copied in long runs; BLAS reads
            it as a transposed operand. Otherwise those of a tap do.
    """

    name: ClassVar[str] = "panels"

    geometry: Geometry
    blocking: Blocking
    safe: Taps
    channels: int
    taps: int
    merged: bool
    packed: bool
    concurrent: bool
    by_window: bool

    @classmethod
    def candidates(cls, p: ConvProblem, geometry: Geometry) -> list[Panels]:
        """Panels for small and for large products, with and without merged samples."""
        first, last = geometry.positions(p)
        merging = [False, True] if p.N > 1 and last - first < limits.SHORT_ROW else [False]
        forms = [make(p, geometry, last - first, merged) for merged in merging for make in (cls._small, cls._large)]
        # If a "large" product is small enough for one thread, the blocks of `_small` fit the cache better.
        return forms[::2] + [form for form in forms[1::2] if not form.concurrent]

    @classmethod
    def _small(cls, p: ConvProblem, geometry: Geometry, Q: int, merged: bool) -> Panels:
        """Products on one thread each, which run at the same time; their operands stay in the first-level cache."""
        J, R, M = geometry.tap_groups, geometry.phases, p.C_out_g
        size, small = accumulator(p.dtype).itemsize, limits.small_product(p.is_complex)
        row = p.N * Q if merged else Q  # columns next to each other
        tile_rows = min(M * R, limits.SMALL_TILE)
        # Where one product has all rows, each part of a panel is read once, so it need not stay in the cache.
        deepest = small // max(tile_rows * min(row, limits.SMALL_TILE), min(row * tile_rows, 1024))
        deepest = max(1, min(deepest, limits.LARGE_DEPTH if tile_rows == M * R else limits.SMALL_DEPTH))
        taps = min(J, deepest)
        channels = min(p.C_in_g, deepest // taps)
        channels = -(-p.C_in_g // -(-p.C_in_g // channels))
        depth = channels * taps
        widest = small // (tile_rows * depth)
        if M * R > limits.SMALL_TILE:
            widest = min(widest, limits.SMALL_TILE * limits.SMALL_DEPTH // depth)
        tile = min(row, max(limits.SMALL_TILE // 2, min(widest, 4096 if tile_rows <= 2 else 1024) // 32 * 32))
        # Equal tiles are one run: without the last, narrower one, each step takes one call instead of two.
        tile = next((even for even in range(tile, tile // 2, -16) if row % even == 0), tile)
        rows = min(M, max(1, 512 // R))
        columns = max(1, min(limits.CONCURRENT_BUFFER // size // depth, limits.SUMS // size // (rows * R)))
        samples, groups, length = 1, 1, Q
        passes = -(-p.C_in_g // channels) * -(-J // taps)
        wanted = parts(p, _overhead(passes))
        if merged:
            columns = max(columns, Q)
            samples = min(p.N, max(1, min(max(tile, columns // p.groups), columns) // Q))
            while -(-p.N // samples) * p.groups * -(-M // rows) < wanted and rows * R >= 8 * limits.SMALL_TILE:
                rows = -(-rows // 2)
        else:
            tiles = max(1, min(-(-Q // tile), columns // tile))
            # Enough blocks for all threads, if necessary smaller ones.
            while p.N * p.groups * -(-Q // (tiles * tile)) * -(-M // rows) < wanted:
                if tiles > 1 and (tiles * tile > 256 or rows * R < 4 * limits.SMALL_TILE):
                    tiles = -(-tiles // 2)
                elif rows * R >= 4 * limits.SMALL_TILE:
                    rows = -(-rows // 2)
                else:
                    break
            length = min(Q, tiles * tile)
        if length == Q and rows == M:
            most = max(1, p.N * p.groups // wanted)
            groups = max(1, min(p.groups, columns // (Q * samples), most))
            if groups == p.groups and not merged:
                samples = max(1, min(p.N, columns // (Q * groups), most // groups))
        return cls._of(p, geometry, (samples, groups, rows, length, tile_rows, tile), channels, taps, merged, True)

    @classmethod
    def _large(cls, p: ConvProblem, geometry: Geometry, Q: int, merged: bool) -> Panels:
        """Products of all rows and of all the depth, as far as they fit, each on all threads of BLAS."""
        R, M, budget = geometry.phases, p.C_out_g, limits.BUFFER // accumulator(p.dtype).itemsize
        deepest = min(limits.LARGE_DEPTH, budget)
        taps = min(geometry.tap_groups, deepest)
        channels = min(p.C_in_g, deepest // taps)
        depth = channels * taps
        length = max(1, min(Q, budget // depth))
        rows = max(1, min(M, budget // (length * R)))
        samples = groups = 1
        if length == Q:
            fitting = budget // (max(depth, rows * R) * Q)
            samples = max(1, min(p.N, 1024 // Q, fitting)) if merged else 1
            if rows == M:
                groups = max(1, min(p.groups, budget // (max(depth, M * R) * Q * samples)))
                if not merged and groups == p.groups:
                    samples = max(1, min(p.N, fitting // groups))
        columns = length * samples if merged else length
        concurrent = rows * R * depth * columns <= limits.small_product(p.is_complex)
        return cls._of(
            p, geometry, (samples, groups, rows, length, rows * R, columns), channels, taps, merged, concurrent
        )

    @classmethod
    def _of(
        cls,
        p: ConvProblem,
        geometry: Geometry,
        sizes: tuple[int, int, int, int, int, int],
        channels: int,
        taps: int,
        merged: bool,
        concurrent: bool,
    ) -> Panels:
        """Panels of these sizes, which pack as much of the weight at a time as fits."""
        per_row = p.C_in_g * geometry.tap_groups * geometry.phases
        budget = limits.PACKED_WEIGHT // accumulator(p.dtype).itemsize
        packed = per_row <= budget
        packing = limits.fit(budget // per_row, p.C_out_g, p.groups)[::-1] if packed else [p.groups, p.C_out_g]
        blocking = Blocking(*sizes, *packing)
        # A product of this size on one thread is slow with a transposed operand.
        by_window = not concurrent and geometry.has_distant_windows and taps >= limits.WORTH_A_WINDOW
        return cls(geometry, blocking, Taps.of(p), channels, taps, merged, packed, concurrent, by_window)

    @property
    def reason(self) -> str:
        if self.merged:
            return "short rows: the windows of many samples side by side, times the weight"
        return "windows side by side, times the weight"

    def multiplies_zeros(self, p: ConvProblem) -> bool:
        geometry = self.geometry
        low, high = geometry.window(*geometry.positions(p), slice(0, geometry.tap_groups))
        return low < 0 or high > p.L_in or geometry.has_absent_taps(p)

    def _checks_weight(self, p: ConvProblem) -> bool:
        """Whether to check the weight, once, instead of all sums: only it is multiplied by zeros, and it is smaller."""
        if not self.multiplies_zeros(p) or self.geometry.has_absent_taps(p):
            return False
        room = limits.STAGED_INPUT // accumulator(p.dtype).itemsize
        return p.C_out * p.C_in_g * p.K <= min(p.N * p.C_out * p.L_out // 4, room)

    def cost(self, p: ConvProblem) -> float:
        geometry, blocking, size = self.geometry, self.blocking, costs.scale(p)
        first, last = geometry.positions(p)
        Q, R, J = last - first, geometry.phases, geometry.tap_groups
        blocks, reread = blocking.num_blocks(p, Q)
        passes = -(-p.C_in_g // self.channels) * -(-J // self.taps)
        depth, rows = p.C_in_g * J, p.C_out_g * R
        columns = p.N * p.groups * Q
        run = run_of_sample = Q if self.merged else min(blocking.tile, Q)
        if run == 1:  # NumPy then loops over another axis
            run = max(8, J)
        if self.by_window:
            run = min(J, self.taps)
        copy = costs.COPY if geometry.stride == 1 or self.by_window else costs.STRIDED_COPY
        panel = reread * costs.copies(columns * depth / run, run, copy * size)
        if self.merged and p.C_in * p.L_in * p.itemsize > 4096:
            panel += reread * costs.FAR_ROW * columns * depth / run_of_sample
        elements = columns * rows
        # The check that the product is finite, and the additions of all passes after the first.
        checked = self.multiplies_zeros(p) and not self._checks_weight(p)
        each = costs.ELEMENTWISE * (checked + 2 * (passes - 1)) * size
        if self.merged or geometry.out_stride > 1 or p.dtype in costs.CONVERT:
            store = costs.STRIDED_COPY if geometry.out_stride == 1 else costs.TRANSPOSING_COPY
            each += store * size + costs.COPY_ROW / run + costs.CONVERT.get(p.dtype, 0.0)
        if p.dtype in costs.CONVERT:
            panel += costs.CONVERT[p.dtype] * columns * p.C_in_g * geometry.stride
        packing = 0.0
        if p.transposed or not self.packed or p.dtype in costs.CONVERT:
            runs = p.groups * rows * p.C_in_g * (1 if self.packed else blocks)
            packing = costs.copies(runs, J, costs.TRANSPOSING_COPY * size)
        tile = min(blocking.tile, Q * blocking.samples if self.merged else min(Q, blocking.length))
        tile_rows = min(blocking.tile_rows, rows)
        count = columns / tile * -(-rows // tile_rows) * passes
        product = costs.products(p, count, tile_rows, depth / passes, tile, self.concurrent)
        if self.by_window:
            product += reread * costs.TRANSPOSING_PACK * size * columns * depth
        rest = panel + each * elements + packing + blocks * _overhead(passes)
        return product + rest if self.concurrent else costs.of_blas(product, rest)

    @property
    def _staged(self) -> int:
        """The bytes that the staged input may take."""
        return limits.STAGED_INPUT if self.concurrent else limits.BUFFER

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        """Bounds on the elements of the scratch buffers: what all threads share, and what each has by name."""
        blocking, depth, R = self.blocking, self.channels * self.taps, self.geometry.phases
        columns = blocking.samples * blocking.groups * blocking.length
        sums = columns * blocking.rows * R
        buffers = {"panel": columns * depth, "sums": sums, "input": self._staged // accumulator(p.dtype).itemsize}
        if depth < p.C_in_g * self.geometry.tap_groups:
            buffers["product"] = sums
        packed = blocking.weight_groups * blocking.weight_rows * R * p.C_in_g * self.geometry.tap_groups
        if not self.packed:
            packed, buffers["weight"] = 0, blocking.groups * blocking.rows * R * depth
        safe = self.safe.block_memory(p, blocking.samples, blocking.groups, blocking.rows, blocking.length)
        return packed, buffers | {name: max(buffers.get(name, 0), count) for name, count in safe.items()}

    def run(self, call: Call, workers: int) -> None:
        _run((self,), call, workers)

    def batches(self, call: Call, packed: Scratch) -> Iterator[list[tuple[Panels, Call, Array, Block]]]:
        """Blocks that can be computed at the same time; the next ones overwrite `packed`."""
        p, geometry, w = call.p, self.geometry, call.w
        if self._checks_weight(p) and is_finite(w):
            call = call.of_finite(call.x, call.w, call.b, call.y)
        flags, pack, weight = w.flags, self._pack_all, None
        if not p.transposed and w.dtype == call.dtype and flags.c_contiguous and flags.aligned:  # it is read in place
            weight = w[..., geometry.first_tap :].reshape(p.groups, p.C_out_g, -1)
        elif not self.packed:
            pack, weight = self._pack, w[..., geometry.first_tap :]
        for batch in self.blocking.batches(p, geometry.positions(p), w, weight, pack, packed):
            yield [(self, call, *block) for block in batch]

    def _pack_all(self, w: Array, scratch: Scratch) -> Array:
        return self._pack(w[..., self.geometry.first_tap :], scratch)

    def _pack(self, w: Array, scratch: Scratch) -> Array:
        """Weight (groups, rows, C_in_g, K) as (groups, rows*phases, C_in_g*tap_groups), zeros for the absent taps."""
        G, M, C, K = w.shape
        R, interleave = self.geometry.phases, self.geometry.interleave
        J = -(-K // interleave)
        packed = scratch.take("weight", G, M, R, C, J)
        if R == 1:
            packed[:, :, 0] = w[..., ::interleave]
        elif J < R:
            for j in range(J):
                taps = min(R, K - j * interleave)
                packed[:, :, :taps, :, j] = w[..., j * interleave : j * interleave + taps].transpose(0, 1, 3, 2)
                packed[:, :, taps:, :, j] = 0
        else:
            for r in range(R):
                tap_groups = -(-(K - r) // interleave)
                packed[:, :, r, :, :tap_groups] = w[..., r::interleave]
                packed[:, :, r, :, tap_groups:] = 0
        return packed.reshape(G, M * R, C * J)

    def _weight(self, weight: Array, channels: slice, taps: slice, scratch: Scratch) -> Array:
        """The part of the weight for one product, as (groups, rows*phases, channels*taps).

        `weight` is (groups, rows*phases, C_in_g*tap_groups), or (groups, rows, C_in_g, K) where it is not packed.
        """
        if weight.ndim == 3:
            J = self.geometry.tap_groups  # either all taps or a single channel
            return weight[..., channels.start * J + taps.start : (channels.stop - 1) * J + taps.stop]
        interleave = self.geometry.interleave
        return self._pack(weight[:, :, channels, taps.start * interleave : taps.stop * interleave], scratch)

    def compute(self, call: Call, weight: Array, block: Block, scratch: Scratch) -> None:
        p, geometry, blocking = call.p, self.geometry, self.blocking
        N, G, M = (part.stop - part.start for part in block[:3])
        T, R, J = block.stop - block.start, geometry.phases, geometry.tap_groups
        direct = call.y_direct and geometry.out_stride == 1 and not self.merged
        if direct:
            sums = call.y[block.samples, block.groups, block.rows, geometry.place(0, block.start, block.stop)]
        else:
            sums = scratch.take("sums", *((1, G, M * R, N * T) if self.merged else (N, G, M * R, T)))
        # (columns of the sums, position of the first one, tiles, columns of a tile); a merged block is one panel.
        runs = [(low, high, block.start + low, (high - low) // tile, tile) for low, high, tile in blocking.tiles(T)]
        if self.merged:
            runs = [(0, N * T, block.start, 1, T)]
        everything = slice(0, p.C_in_g), slice(0, J)
        source = self._read(call, block, *everything, block.start, block.stop, scratch)
        windows = [None if source is None else self._windows(source, *everything, *run[2:]) for run in runs]
        into = sums
        for c in slices(0, p.C_in_g, self.channels):
            for j in slices(0, J, self.taps):
                w = self._weight(weight, c, j, scratch)
                for (low, high, start, tiles, tile), view in zip(runs, windows, strict=True):
                    panel = self._panel(call, block, view, c, j, start, tiles, tile, scratch)
                    cuts = blocking.tiles(high - low) if self.merged else [(0, high - low, tile)]
                    for begin, end, width in cuts:
                        columns = tiled(panel[..., begin:end], width) if self.merged else panel
                        blocking.multiply(w, columns, tiled(into[..., low + begin : low + end], width))
                if into is not sums:
                    np.add(sums, into, out=sums)
                elif c.stop < p.C_in_g or j.stop < J:
                    into = scratch.take("product", *sums.shape)
        low, high = geometry.window(block.start, block.stop, slice(0, J))
        multiplies_zeros = low < 0 or high > p.L_in or geometry.has_absent_taps(p)
        if multiplies_zeros and call.is_spoilt(sums):
            self.safe.compute(call, block, scratch)
            return
        if self.merged:
            sums = sums.reshape(G, M, R, N, T).transpose(3, 0, 1, 2, 4)
        elif not direct:
            sums = sums.reshape(N, G, M, R, T)
        call.add_bias(block, sums)
        if not direct:
            call.store(geometry, block, sums)

    def _panel(
        self,
        call: Call,
        block: Block,
        windows: Array | None,
        channels: slice,
        taps: slice,
        start: int,
        tiles: int,
        tile: int,
        scratch: Scratch,
    ) -> Array:
        """Copy the windows from position `start` to a panel (samples, groups, tiles, channels*taps, tile).

        The panel of a merged block is (1, groups, channels*taps, samples*tile). In memory the last two axes are swapped
        for `by_window`. `windows` is a view of all windows, or None.
        """
        N, G = block.samples.stop - block.samples.start, block.groups.stop - block.groups.start
        C, J = channels.stop - channels.start, taps.stop - taps.start
        outer, columns = ((1, G), (N, tile)) if self.merged else ((N, G, tiles), (tile,))
        panel: Array
        if self.by_window:
            panel = scratch.take("panel", *outer, math.prod(columns), C * J).swapaxes(-2, -1)
        else:
            panel = scratch.take("panel", *outer, C * J, math.prod(columns))
        target = panel.reshape(*outer, C, J, *columns)
        if self.merged:
            target = target.transpose(4, 1, 0, 2, 3, 5)
        if windows is not None:
            np.copyto(target, windows[:, :, :, channels, taps])
        else:
            source = self._read(call, block, channels, taps, start, start + tiles * tile, scratch)
            if source is not None:
                np.copyto(target, self._windows(source, channels, taps, start, tiles, tile))
            else:
                self._copy_by_taps(call, block, channels, taps, start, target)
        return panel

    def _read(
        self, call: Call, block: Block, channels: slice, taps: slice, start: int, stop: int, scratch: Scratch
    ) -> tuple[Array, int] | None:
        """The input of the positions start to stop, and its first position; None where it is too large to be staged."""
        low, high = self.geometry.window(start, stop, taps)
        rows = (block.samples.stop - block.samples.start) * (block.groups.stop - block.groups.start)
        rows *= channels.stop - channels.start
        inside = call.x_direct and low >= 0 and high <= call.p.L_in
        if not inside and rows * (high - low) * call.dtype.itemsize > self._staged:
            return None
        return call.read(block.samples, block.groups, channels, low, high, scratch), low

    def _windows(
        self, source: tuple[Array, int], channels: slice, taps: slice, start: int, tiles: int, tile: int
    ) -> Array:
        """A view of what `_read` returned as (samples, groups, tiles, channels, taps, tile)."""
        geometry, (x, low) = self.geometry, source
        s_n, s_g, s_c, s_l = x.strides
        origin = start * geometry.stride + geometry.offset + taps.start * geometry.dilation - low
        return strided(
            x,
            origin,
            (*x.shape[:2], tiles, channels.stop - channels.start, taps.stop - taps.start, tile),
            (s_n, s_g, s_l * geometry.stride * tile, s_c, s_l * geometry.dilation, s_l * geometry.stride),
        )

    def _copy_by_taps(self, call: Call, block: Block, channels: slice, taps: slice, start: int, panel: Array) -> None:
        """Fill a panel (samples, groups, tiles, channels, taps, tile) whose input is too large to be staged."""
        geometry, tile = self.geometry, panel.shape[5]
        x = call.x[block.samples, block.groups, channels]
        for index in range(panel.shape[2]):
            begin = start + index * tile
            for j in range(panel.shape[4]):
                first, last, read = geometry.reading(taps.start + j, begin, begin + tile, 0, call.p.L_in)
                panel[:, :, index, :, j, : first - begin] = 0
                if first < last:
                    panel[:, :, index, :, j, first - begin : last - begin] = x[..., read]
                panel[:, :, index, :, j, last - begin :] = 0


@dataclass(frozen=True, slots=True)
class PhasePanels:
    """Panels of a transposed problem: of all phases together, or of those with one more tap, then of the others.

    The latter avoids products with absent taps, which can be half of all products.
    """

    name: ClassVar[str] = "panels"

    geometry: Geometry
    parts: tuple[Panels, ...]

    @classmethod
    def candidates(cls, p: ConvProblem) -> list[PhasePanels | Panels]:
        """For a problem that is not transposed, its panels alone."""
        geometry = Geometry.of(p)
        together = Panels.candidates(p, geometry)
        if not p.transposed:
            return [*together]
        found = [cls(geometry, (form,)) for form in together]
        if geometry.has_absent_taps(p):
            apart = geometry.of_equal_phases(p)
            if all(first < last for first, last in (part.positions(p) for part in apart)):
                cheapest = (min(Panels.candidates(p, part), key=lambda form: form.cost(p)) for part in apart)
                found.append(cls(geometry, tuple(cheapest)))
        return [*found]

    @property
    def reason(self) -> str:
        return self.parts[0].reason

    @property
    def concurrent(self) -> bool:
        return all(form.concurrent for form in self.parts)

    def multiplies_zeros(self, p: ConvProblem) -> bool:
        return any(form.multiplies_zeros(p) for form in self.parts)

    def cost(self, p: ConvProblem) -> float:
        return sum(form.cost(p) for form in self.parts)

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        """Bounds on the elements of the scratch buffers: what all threads share, and what each has by name."""
        shared, buffers = zip(*(form.memory(p) for form in self.parts), strict=True)
        names = {name for of_form in buffers for name in of_form}
        return sum(shared), {name: max(of_form.get(name, 0) for of_form in buffers) for name in names}

    def run(self, call: Call, workers: int) -> None:
        if not self.geometry.writes_everything():
            call.fill_with_bias()
        _run(self.parts, call, workers)


def _run(forms: tuple[Panels, ...], call: Call, workers: int) -> None:
    """Compute the blocks of all forms together, so that threads wait for each other only once."""
    packed = [Scratch.borrow(f"weight {index}", call.dtype) for index in range(len(forms))]
    with np.errstate(all="ignore"):
        batches = [form.batches(call, scratch) for form, scratch in zip(forms, packed, strict=True)]
        for together in zip_longest(*batches, fillvalue=[]):
            run_blocks(Panels.compute, [*chain(*together)], workers, call.dtype, call.p.L_out)
    for index, scratch in enumerate(packed):
        scratch.give_back(f"weight {index}")


def _overhead(passes: int) -> float:
    """The interpreter's time for a block, in nanoseconds."""
    return costs.BLOCK + passes * 3.5 * costs.CALL
