"""The forms in which a tile of positions is added to the sums of a weight gradient.

- dots: b has a single channel per group, a has few. A view of b as all of its windows is multiplied by a, in vector
  products whose operands stay in the cache.
- taps: b has several channels. It is copied with its channels next to each other, so that each tap is a matrix product
  of a with a view of that copy.
- panels: b has few channels, or few positions. Its windows are copied one below the other into a panel, for one matrix
  product with a.

All forms multiply a by zeros where a window leaves the array. A zero times an infinity or a NaN is NaN, so sums that
are not finite are computed again from only those elements of each window that exist.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..problem import WeightGradientProblem
from .arrays import Array, Scratch, accumulator, copy_padded, is_direct, is_finite
from .correlation import Block, Sizes
from .threads import run_blocks


class WeightSums:
    """The arrays of one call, as views with the groups split off.

    Attributes:
        a: (N, G, R, L_a).
        b: (N, G, C, L_b).
        output: (G, R, C, K).
        dtype: the accumulator.
        a_direct, b_direct: BLAS can read the array in place, and it is not conjugated.
    """

    __slots__ = ("a", "a_direct", "b", "b_direct", "dtype", "form", "output", "roles")

    def __init__(self, p: WeightGradientProblem, form: Sizes, coarse: Array, fine: Array, output: Array) -> None:
        roles = self.roles = form.roles
        self.form = form
        self.dtype = accumulator(p.dtype)
        a, b = (fine, coarse) if roles.swapped else (coarse, fine)
        self.a = a.reshape(roles.N, roles.G, roles.R, roles.L_a)
        self.b = b.reshape(roles.N, roles.G, roles.C, roles.L_b)
        self.output = output.reshape(roles.G, p.C_coarse_g, p.C_fine_g, roles.K)
        if roles.swapped:
            self.output = self.output.swapaxes(1, 2)[..., ::-1]
        self.a_direct = is_direct(self.a, self.dtype) and not roles.conjugate_a
        self.b_direct = is_direct(self.b, self.dtype) and not roles.conjugate_b

    def run(self, workers: int) -> None:
        form = self.form
        shape = (form.slices, *self.output.shape)
        parts = [self.output] if form.slices == 1 else list(np.empty(shape, self.dtype))
        items = [(block, index, parts[index]) for block in form.blocks() for index in range(form.slices)]
        run_blocks(self._compute, items, workers, self.dtype, self.roles.L_a)
        if form.slices > 1:
            total = parts[0]
            with np.errstate(all="ignore"):
                for part in parts[1:]:
                    np.add(total, part, out=total)
                self.output[...] = total

    def _compute(self, block: Block, index: int, part: Array, scratch: Scratch) -> None:
        """The sums of a block over a slice."""
        add = {"dots": self._add_dots, "taps": self._add_taps, "panels": self._add_panel}[self.form.name]
        if self.form.name == "taps":  # the sums of each tap are a matrix
            G, R, C, K = block.shape
            sums = scratch.take("sums", G, K, R, C).transpose(0, 2, 3, 1)
        else:
            sums = scratch.take("sums", *block.shape)
        sums[...] = 0
        within = True
        for samples, positions in self.form.tiles(index):
            low, high = self.roles.window(positions.start, positions.stop, block.taps)
            within &= low >= 0 and high <= self.roles.L_b
            add(sums, block, samples, positions, scratch)
        if not within and not is_finite(sums):
            sums[...] = 0
            for samples, positions in self.form.tiles(index):
                self._add_exactly(sums, block, samples, positions, scratch)
        part[block.groups, block.rows, block.channels, block.taps] = sums

    def _add_dots(self, sums: Array, block: Block, samples: slice, at: slice, scratch: Scratch) -> None:
        roles, (G, R, _, K) = self.roles, block.shape
        N, L = samples.stop - samples.start, at.stop - at.start
        low, high = roles.window(at.start, at.stop, block.taps)
        b = self.b[samples, block.groups, 0]
        if self.b_direct and low >= 0 and high <= roles.L_b:
            b = b[..., low:]
        else:
            staged = scratch.take("b", N, G, high - low)
            copy_padded(b, low, high, staged)
            if roles.conjugate_b:
                np.conjugate(staged, out=staged)
            b = staged
        s_n, s_g, s_l = b.strides
        windows = as_strided(b, (N, G, K, L, 1), (s_n, s_g, s_l * roles.dilation, s_l * roles.stride, s_l))
        product = scratch.take("product", N, G, K, R, 1)
        np.matmul(self._read_a(block, samples, at, scratch)[:, :, None], windows, out=product)
        for sample in product:
            np.add(sums[:, :, 0], sample[..., 0].swapaxes(1, 2), out=sums[:, :, 0])

    def _add_panel(self, sums: Array, block: Block, samples: slice, at: slice, scratch: Scratch) -> None:
        roles, (G, R, C, K) = self.roles, block.shape
        N, L = samples.stop - samples.start, at.stop - at.start
        b = self.b[samples, block.groups, block.channels]
        low, high = roles.window(at.start, at.stop, block.taps)
        if N == 1 and K == 1 and self.b_direct and roles.stride == 1 and low >= 0 and high <= roles.L_b:
            panel = b[0, ..., low:high]
        else:
            panel = scratch.take("b", G, C, K, N, L)
            if low >= 0 and high <= roles.L_b:
                s_n, s_g, s_c, s_l = b.strides
                strides = s_g, s_c, s_l * roles.dilation, s_n, s_l * roles.stride
                panel[...] = as_strided(b[..., low:], panel.shape, strides)
            else:
                by_sample = panel.transpose(2, 3, 0, 1, 4)
                for k in range(K):
                    first, last, read = roles.reading(block.taps.start + k, at.start, at.stop)
                    by_sample[k, ..., : first - at.start] = 0
                    if first < last:
                        by_sample[k, ..., first - at.start : last - at.start] = b[..., read]
                    by_sample[k, ..., last - at.start :] = 0
            if roles.conjugate_b:
                np.conjugate(panel, out=panel)
            panel = panel.reshape(G, C * K, N * L)
        if N == 1:
            a = self._read_a(block, samples, at, scratch)[0]
        else:
            merged = scratch.take("a", G, R, N, L)
            merged[...] = self.a[samples, block.groups, block.rows, at].transpose(1, 2, 0, 3)
            if roles.conjugate_a:
                np.conjugate(merged, out=merged)
            a = merged.reshape(G, R, N * L)
        product = scratch.take("product", G, R, C * K)
        np.matmul(a, panel.swapaxes(1, 2), out=product)
        np.add(sums, product.reshape(sums.shape), out=sums)

    def _add_taps(self, sums: Array, block: Block, samples: slice, at: slice, scratch: Scratch) -> None:
        form, roles, (G, R, C, K) = self.form, self.roles, block.shape
        low, high = roles.window(at.start, at.stop, block.taps)
        staged = scratch.take("b", G, high - low, C)
        copy_padded(self.b[samples.start, block.groups, block.channels], low, high, staged.swapaxes(1, 2))
        if roles.conjugate_b:
            np.conjugate(staged, out=staged)
        s_g, s_l, s_c = staged.strides
        a = self._read_a(block, samples, at, scratch)[0]
        by_tap = sums.transpose(0, 3, 1, 2)
        whole = (at.stop - at.start) // form.depth * form.depth
        for start, stop in ((0, whole), (whole, at.stop - at.start)):
            if start == stop:
                continue
            depth = min(form.depth, stop - start)
            products = (stop - start) // depth
            windows = as_strided(
                staged[:, start * roles.stride :],
                (G, products, K, 1, depth, C),
                (s_g, s_l * roles.stride * depth, s_l * roles.dilation, 0, s_l * roles.stride, s_c),
            )
            product = scratch.take("product", G, products, K, R, C)
            whole_rows = R // form.tile_rows * form.tile_rows
            for begin, end in ((0, whole_rows), (whole_rows, R)):
                if begin < end:
                    rows = min(form.tile_rows, end - begin)
                    tiles = a[:, begin:end, start:stop].reshape(G, -1, rows, products, depth).transpose(0, 3, 1, 2, 4)
                    part = product[..., begin:end, :]
                    np.matmul(tiles[:, :, None], windows, out=part.reshape(*part.shape[:3], -1, rows, C))
            for index in range(products):
                np.add(by_tap, product[:, index], out=by_tap)

    def _add_exactly(self, sums: Array, block: Block, samples: slice, at: slice, scratch: Scratch) -> None:
        roles, (G, R, C, K) = self.roles, block.shape
        for n in range(samples.start, samples.stop):
            for k in range(K):
                first, last, read = roles.reading(block.taps.start + k, at.start, at.stop)
                if first < last:
                    a = self._read_a(block, slice(n, n + 1), slice(first, last), scratch)[0]
                    b = scratch.take("b", G, C, last - first)
                    b[...] = self.b[n, block.groups, block.channels, read]
                    if roles.conjugate_b:
                        np.conjugate(b, out=b)
                    product = scratch.take("product", G, R, C)
                    np.matmul(a, b.swapaxes(1, 2), out=product)
                    np.add(sums[..., k], product, out=sums[..., k])

    def _read_a(self, block: Block, samples: slice, at: slice, scratch: Scratch) -> Array:
        """The part of a for a tile, as (samples, groups, rows, positions): a view if BLAS can read it, else a copy."""
        a = self.a[samples, block.groups, block.rows, at]
        if self.a_direct:
            return a
        staged = scratch.take("a", *a.shape)
        staged[...] = a
        if self.roles.conjugate_a:
            np.conjugate(staged, out=staged)
        return staged
