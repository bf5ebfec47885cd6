"""The NumPy path of the weight and bias gradients: through BLAS, with bounded extra memory.

The two arrays of a weight gradient play the roles of a `_Correlation`: `a` is read as it lies, `b` in windows, one for
each tap. The positions are cut into tiles, and each tile adds to the sums in one of these forms:

- dots: b is a single channel per group, a has few. A view of b as all of its windows is multiplied by a, in vector
  products whose operands stay in the cache.
- taps: b has several channels. It is copied with its channels next to each other, so that each tap is a matrix product
  of a with a view of that copy.
- panels: b has few channels, or few positions. Its windows are copied one below the other into a panel, for one matrix
  product with a.

Where the stride is one the roles can be swapped, and the array with fewer channels becomes b. All forms multiply a by
zeros where a window leaves the array. A zero is harmless until it meets an infinity or a NaN, so sums that are not
finite are computed again from what exists of each window alone.

Which tiles make up a sum depends on the problem alone. So do the slices into which the positions are cut for several
threads; their sums are added in one order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from .cpu.arrays import Scratch, accumulator, is_direct, is_finite, slices
from .cpu.choice import Method
from .cpu.limits import MIB, WORKSPACE, small_product
from .cpu.threads import run_blocks
from .problem import BiasGradientProblem, WeightGradientProblem

Array = npt.NDArray[Any]

# Bytes of a panel, where there is one thread and where there are several, of a block of sums, of the sums of all slices
# but the first, and of the rows that dots work on: a and a window of b stay in the first- or second-level cache.
_PANEL = 4 * MIB
_CONCURRENT_PANEL = 1 * MIB
_SUMS = 1 * MIB
_PARTIAL_SUMS = 4 * MIB
_DOT_ROW = 16 * 1024

# Rows of a that dots pay for: each is read again for every tap.
_DOT_ROWS = 4

# Positions that dots pay for where there are several samples: each sample, channel and tap is a product of its own.
_DOT_POSITIONS = 48

# Rows of a, windows of b and positions of a large product; the fewest positions of a small one.
_ROWS = 512
_WINDOWS = 512
_POSITIONS = 2048
_FEWEST_POSITIONS = 256

# Channels and positions that taps pay for; rows and channels of a small product of theirs, the most rows that are cut
# into small products, and the multiply-adds of a NumPy call of several products.
_TAPS_CHANNELS = 8
_TAPS_POSITIONS = 64
_SMALL_TILE = 64
_SMALL_ROWS = 256
_CALL = 4_000_000

# Multiply-adds from which a second thread pays, and elements that are worth a thread's time to sum.
_WORTH_THREADS = 20_000_000
_WORTH_A_SUM = 1_000_000

_MAX_WORKERS = 16


def method(problem: WeightGradientProblem) -> Method:
    """The form that `weight_gradient` uses for a problem: a pure function of the problem."""
    return _plan(problem).method


def weight_gradient(problem: WeightGradientProblem, coarse: Array, fine: Array, output: Array) -> None:
    """Compute a weight gradient into `output`, every element of it.

    float16 and bfloat16 are summed in float32 and rounded once. A NaN or an infinity reaches only the elements that
    have it in a term.

    Args:
        problem: extents and settings; the arrays agree with it.
        coarse: `problem.coarse_shape`, or that without the batch axis; native byte order, any strides.
        fine: `problem.fine_shape`, likewise.
        output: `problem.weight_shape`, any strides; it overlaps no other argument.
    """
    plan = _plan(problem)
    if plan.form is None:
        output[...] = 0
        return
    _Call(problem, plan.form, coarse, fine, output).run(plan.workers)


def bias_gradient(problem: BiasGradientProblem, grad_output: Array, output: Array) -> None:
    """Compute a bias gradient into `output`, every element of it; sums as in `weight_gradient`.

    Args:
        problem: extents; the arrays agree with it.
        grad_output: `problem.grad_output_shape`, or that without the batch axis; native byte order, any strides.
        output: `problem.bias_shape`, any strides; it does not overlap grad_output.
    """
    p = problem
    dtype = accumulator(p.dtype)
    values = grad_output.reshape(p.grad_output_shape)
    channels = max(1, _WORTH_A_SUM // max(1, p.N * p.L))

    def compute(c: slice, _: Scratch) -> None:
        # First along the positions: a pairwise sum, which needs no memory.
        output[c] = values[:, c].sum(axis=2, dtype=dtype).sum(axis=0)

    blocks = [(c,) for c in slices(0, p.C, channels)]
    run_blocks(compute, blocks, min(_MAX_WORKERS, len(blocks)), dtype, p.L)


# -- the problem as the forms see it ---------------------------------------------------------------------------------


class _Correlation(NamedTuple):
    """The roles: ``sums[g, r, c, k] = sum over n, l of a[n, g, r, l] * b[n, g, c, l*stride + offset + k*dilation]``.

    Attributes:
        N, G, K: samples, groups, taps.
        R, C: channels of a and of b in one group.
        L_a, L_b: positions.
        swapped: a is the fine array and b the coarse one, so the taps run backwards; else a is the coarse one.
        conjugate_a, conjugate_b: which one is conjugated.
    """

    N: int
    G: int
    K: int
    R: int
    C: int
    L_a: int
    L_b: int
    stride: int
    offset: int
    dilation: int
    swapped: bool
    conjugate_a: bool
    conjugate_b: bool

    @classmethod
    def of(cls, p: WeightGradientProblem) -> _Correlation:
        coarse = p.C_coarse_g, p.L_coarse, p.conjugate_coarse
        fine = p.C_fine_g, p.L_fine, p.conjugate_fine
        swapped = p.stride == 1 and p.C_coarse_g < p.C_fine_g
        (R, L_a, conjugate_a), (C, L_b, conjugate_b) = (fine, coarse) if swapped else (coarse, fine)
        # A position m of fine is l - padding_left + k*dilation, so l is m + padding_left - k*dilation.
        offset = p.padding_left - (p.K - 1) * p.dilation if swapped else -p.padding_left
        return cls(
            p.N, p.groups, p.K, R, C, L_a, L_b, p.stride, offset, p.dilation, swapped, conjugate_a, conjugate_b
        )  # fmt: skip

    def window(self, start: int, stop: int, taps: slice) -> tuple[int, int]:
        """The positions of b that these taps read at the positions start to stop of a: first, and behind the last."""
        low = start * self.stride + self.offset + taps.start * self.dilation
        return low, low + (stop - 1 - start) * self.stride + (taps.stop - 1 - taps.start) * self.dilation + 1

    def reading(self, k: int, start: int, stop: int) -> tuple[int, int, slice]:
        """Those of the positions start to stop of a at which tap k finds an element of b (from, to).

        Also what it finds there.
        """
        shift = self.offset + k * self.dilation
        first = min(max(start, -(shift // self.stride)), stop)
        last = max(min(stop, -((shift - self.L_b) // self.stride)), first)
        return first, last, slice(first * self.stride + shift, (last - 1) * self.stride + shift + 1, self.stride)


class _Block(NamedTuple):
    """A part of the sums."""

    groups: slice
    rows: slice
    channels: slice
    taps: slice

    @property
    def shape(self) -> tuple[int, int, int, int]:
        groups, rows, channels, taps = (part.stop - part.start for part in self)
        return groups, rows, channels, taps


@dataclass(frozen=True, slots=True)
class _Form:
    """Block sizes: of the sums (`groups`, `rows`, `channels`, `taps`) and of a tile (`samples`, `positions`).

    Attributes:
        name: of the form.
        depth: the positions of one product; a tile of taps can have several.
        tile_rows: the rows of one product.
        slices: the parts into which the tiles are cut, each with sums of its own.
    """

    roles: _Correlation
    name: Literal["dots", "taps", "panels"]
    groups: int
    rows: int
    channels: int
    taps: int
    samples: int
    positions: int
    depth: int
    tile_rows: int
    slices: int = 1

    def blocks(self) -> list[_Block]:
        r = self.roles
        return [
            _Block(groups, rows, channels, taps)
            for groups in slices(0, r.G, self.groups)
            for rows in slices(0, r.R, self.rows)
            for channels in slices(0, r.C, self.channels)
            for taps in slices(0, r.K, self.taps)
        ]

    @property
    def num_tiles(self) -> int:
        return -(-self.roles.N // self.samples) * -(-self.roles.L_a // self.positions)

    def tiles(self, index: int) -> Iterator[tuple[slice, slice]]:
        """The samples and positions of the tiles of a slice."""
        per_sample = -(-self.roles.L_a // self.positions)
        for tile in range(index * self.num_tiles // self.slices, (index + 1) * self.num_tiles // self.slices):
            n, l_a = tile // per_sample * self.samples, tile % per_sample * self.positions
            yield slice(n, min(n + self.samples, self.roles.N)), slice(l_a, min(l_a + self.positions, self.roles.L_a))

    def memory(self) -> dict[str, int]:
        """Bounds on the elements of the scratch buffers of one thread."""
        sums = self.groups * self.rows * self.channels * self.taps
        columns = self.groups * self.samples * self.positions
        low, high = self.roles.window(0, self.positions, slice(0, self.taps))
        window = self.groups * self.samples * self.channels * (high - low)
        buffers = {
            "sums": sums,
            "product": sums,
            "a": columns * self.rows,
            "b": columns * self.channels * self.taps if self.name == "panels" else window,
        }
        if self.name == "dots":
            buffers["product"] = sums * self.samples
        if self.name == "taps":
            buffers["product"] = sums * max(1, self.positions // self.depth)
        # The exact form needs of b one window at a time.
        buffers["b"] = max(buffers["b"], self.groups * self.positions * self.channels)
        return buffers

    def is_small(self, p: WeightGradientProblem) -> bool:
        """Whether BLAS computes the products on the calling thread, so that several threads can."""
        if self.name == "dots":
            return True
        windows = self.channels * (self.taps if self.name == "panels" else 1)
        return self.tile_rows * windows * self.depth <= small_product(p.is_complex)


class _Plan(NamedTuple):
    method: Method
    form: _Form | None
    workers: int


_REASONS = {
    "dots": "one channel against few: vector products of windows in place",
    "taps": "several channels: a matrix product for each tap",
    "panels": "few channels or positions: windows side by side, for matrix products",
}


@lru_cache(maxsize=4096)
def _plan(p: WeightGradientProblem) -> _Plan:
    if 0 in p.weight_shape or p.terms == 0:
        return _Plan(Method("nothing", "every sum is empty, or there are none", 0), None, 1)
    roles, size = _Correlation.of(p), accumulator(p.dtype).itemsize
    if roles.C == 1 and roles.R <= _DOT_ROWS and (roles.N == 1 or roles.L_a >= _DOT_POSITIONS):
        form = _dots(p, roles)
    elif roles.C >= _TAPS_CHANNELS and roles.L_a >= _TAPS_POSITIONS:
        form = _taps(p, roles)
    else:
        form = _panels(p, roles)
    concurrent = form.is_small(p) and p.terms * math.prod(p.weight_shape) > _WORTH_THREADS
    if concurrent:
        # Slices for several threads, as far as their sums are small.
        wanted = -(-_MAX_WORKERS // len(form.blocks()))
        number = min(wanted, form.num_tiles, _PARTIAL_SUMS // (math.prod(p.weight_shape) * size))
        form = replace(form, slices=max(1, number))
    buffers = form.memory()
    # The sums are also compared with infinity, one byte per element.
    each = sum(buffers.values()) * size + buffers["sums"]
    shared = form.slices * math.prod(p.weight_shape) * size if form.slices > 1 else 0
    allowed = max(WORKSPACE, (math.prod(p.coarse_shape) + math.prod(p.fine_shape)) * p.itemsize // 4)
    workers = min(_MAX_WORKERS, len(form.blocks()) * form.slices, (allowed - shared) // each) if concurrent else 1
    workers = max(1, workers)
    return _Plan(Method(form.name, _REASONS[form.name], shared + workers * each), form, workers)


def _dots(p: WeightGradientProblem, roles: _Correlation) -> _Form:
    size = accumulator(p.dtype).itemsize
    row, budget = _DOT_ROW // size, _CONCURRENT_PANEL // size
    # A large stride or dilation: the window must not grow with it.
    positions = max(1, min(roles.L_a, row, budget // roles.stride))
    taps = min(roles.K, max(1, budget // roles.dilation))
    low, high = roles.window(0, positions, slice(0, taps))
    samples = min(roles.N, max(1, row // roles.L_a))
    groups = max(1, min(roles.G, budget // (samples * max(high - low, positions * roles.R, taps * roles.R))))
    return _Form(roles, "dots", groups, roles.R, 1, taps, samples, positions, positions, roles.R)


def _taps(p: WeightGradientProblem, roles: _Correlation) -> _Form:
    size, small = accumulator(p.dtype).itemsize, small_product(p.is_complex)
    rows = min(roles.R, _ROWS)
    large_work = p.terms * math.prod(p.weight_shape) > _WORTH_THREADS * 10
    if roles.R <= _SMALL_TILE or (large_work and roles.R <= _SMALL_ROWS):
        tile_rows, channels, budget = min(rows, _SMALL_TILE), min(roles.C, _SMALL_TILE), _CONCURRENT_PANEL // size
        depth = min(_POSITIONS, small // (tile_rows * channels))
    else:
        tile_rows, channels, budget = rows, min(roles.C, _ROWS), _PANEL // size
        depth = _POSITIONS
    depth = max(1, min(roles.L_a, depth, budget // (channels * roles.stride)))
    taps = max(1, min(roles.K, _SUMS // size // (rows * channels), budget // (channels * roles.dilation)))
    work = taps * rows * channels * depth
    products = min(-(-_CALL // work), roles.L_a // depth, budget // (channels * roles.stride * depth))
    products = max(1, min(products, 2 * _SUMS // size // (taps * rows * channels)))
    positions = depth * products
    low, high = roles.window(0, positions, slice(0, taps))
    groups = min(roles.G, budget // (max(channels * (high - low), rows * positions)), -(-_CALL // (work * products)))
    return _Form(roles, "taps", max(1, groups), rows, channels, taps, 1, positions, depth, tile_rows)


def _panels(p: WeightGradientProblem, roles: _Correlation) -> _Form:
    size = accumulator(p.dtype).itemsize
    rows = min(roles.R, _ROWS)
    taps = min(roles.K, _WINDOWS)
    channels = min(roles.C, max(1, _WINDOWS // taps))
    small = small_product(p.is_complex)
    largest, positions = _PANEL, _POSITIONS
    if rows * channels * taps * _FEWEST_POSITIONS <= small:
        largest, positions = _CONCURRENT_PANEL, min(_POSITIONS, small // (rows * channels * taps))
    panel = largest // size
    positions = max(1, min(positions, panel // max(channels * taps, rows)))
    samples = max(1, min(roles.N, positions // roles.L_a))
    positions = min(positions, roles.L_a)
    columns = samples * positions
    sums = _SUMS // size
    groups = max(1, min(roles.G, panel // (columns * max(channels * taps, rows)), sums // (rows * channels * taps)))
    return _Form(roles, "panels", groups, rows, channels, taps, samples, positions, columns, rows)


# -- the forms ---------------------------------------------------------------------------------------------------------


class _Call:
    """The arrays of one call, as views with the groups split off.

    Attributes:
        a: (N, G, R, L_a).
        b: (N, G, C, L_b).
        output: (G, R, C, K).
        dtype: the accumulator.
        a_direct, b_direct: BLAS can read it as it lies, and it needs no conjugation.
    """

    __slots__ = ("a", "a_direct", "b", "b_direct", "dtype", "form", "output", "roles")

    def __init__(self, p: WeightGradientProblem, form: _Form, coarse: Array, fine: Array, output: Array) -> None:
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

    def _compute(self, block: _Block, index: int, part: Array, scratch: Scratch) -> None:
        """The sums of a block over a slice."""
        add = {"dots": self._add_dots, "taps": self._add_taps, "panels": self._add_panel}[self.form.name]
        if self.form.name == "taps":  # each tap is a matrix
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

    def _add_dots(self, sums: Array, block: _Block, samples: slice, at: slice, scratch: Scratch) -> None:
        roles, (G, R, _, K) = self.roles, block.shape
        N, L = samples.stop - samples.start, at.stop - at.start
        low, high = roles.window(at.start, at.stop, block.taps)
        b = self.b[samples, block.groups, 0]
        if self.b_direct and low >= 0 and high <= roles.L_b:
            b = b[..., low:]
        else:
            staged = scratch.take("b", N, G, high - low)
            first = min(max(low, 0), high)
            last = max(min(high, roles.L_b), first)
            staged[..., : first - low] = 0
            staged[..., first - low : last - low] = b[..., first:last]
            staged[..., last - low :] = 0
            if roles.conjugate_b:
                np.conjugate(staged, out=staged)
            b = staged
        s_n, s_g, s_l = b.strides
        windows = as_strided(b, (N, G, K, L, 1), (s_n, s_g, s_l * roles.dilation, s_l * roles.stride, s_l))
        product = scratch.take("product", N, G, K, R, 1)
        np.matmul(self._read_a(block, samples, at, scratch)[:, :, None], windows, out=product)
        for sample in product:
            np.add(sums[:, :, 0], sample[..., 0].swapaxes(1, 2), out=sums[:, :, 0])

    def _add_panel(self, sums: Array, block: _Block, samples: slice, at: slice, scratch: Scratch) -> None:
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

    def _add_taps(self, sums: Array, block: _Block, samples: slice, at: slice, scratch: Scratch) -> None:
        form, roles, (G, R, C, K) = self.form, self.roles, block.shape
        low, high = roles.window(at.start, at.stop, block.taps)
        first = min(max(low, 0), high)
        last = max(min(high, roles.L_b), first)
        staged = scratch.take("b", G, high - low, C)
        staged[:, : first - low] = 0
        staged[:, first - low : last - low] = self.b[samples.start, block.groups, block.channels, first:last].swapaxes(
            1, 2
        )
        staged[:, last - low :] = 0
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

    def _add_exactly(self, sums: Array, block: _Block, samples: slice, at: slice, scratch: Scratch) -> None:
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

    def _read_a(self, block: _Block, samples: slice, at: slice, scratch: Scratch) -> Array:
        """What a tile needs of a, as (samples, groups, rows, positions): a view where BLAS can read it, else a copy."""
        a = self.a[samples, block.groups, block.rows, at]
        if self.a_direct:
            return a
        staged = scratch.take("a", *a.shape)
        staged[...] = a
        if self.roles.conjugate_a:
            np.conjugate(staged, out=staged)
        return staged
