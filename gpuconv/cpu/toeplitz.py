"""toeplitz: neighbouring outputs of a group together, as the product of their common window with a banded matrix.

A row is cut into windows, each of which gives a tile of outputs. Where one window holds a whole short row, the samples
are the rows of one product, and neither input nor output is copied. Where many samples have short rows of several
channels, they are copied with the channels next to each other: each window is then contiguous in every sample, and
narrow bands multiply few zeros. Many taps are divided among several bands.

It is for short rows, groups of few channels and long kernels. The layers for which it is chosen take 1.7 times as long
in the next best form (geometric mean over the benchmark layers), and up to 12 times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..problem import ConvProblem
from . import costs, limits
from .arrays import Array, Scratch, accumulator, copy_swapped, is_finite, slices, strided
from .blocking import share
from .geometry import Block, Call
from .taps import Taps
from .threads import run_blocks

# The most windows of a product.
_LINES = 512


@dataclass(frozen=True, slots=True)
class Toeplitz:
    """Windows of `tile` steps times banded matrices, each of which holds at most `taps` taps.

    Step q is the output q of conv1d, or the `stride` outputs of conv_transpose1d from ``q*stride - padding_left`` on.

    Attributes:
        safe: the form that computes a block again.
        samples, groups, windows: those of a block.
        lines: the rows of one product, each of them a window.
        whole: one window holds a row; its band has only the inputs and outputs that exist.
        channels_last: input and output are copied with their channels next to each other. A window is then contiguous
            in a sample, and the samples are the rows of one product for each window.
        concurrent: BLAS computes each product on the calling thread.
    """

    name: ClassVar[str] = "toeplitz"

    safe: Taps
    samples: int
    groups: int
    windows: int
    lines: int
    tile: int
    taps: int
    whole: bool
    channels_last: bool
    concurrent: bool

    @classmethod
    def of(cls, p: ConvProblem, tile: int, channels_last: bool = False) -> Toeplitz | None:
        """None where even the smallest band or block is too large."""
        size, small = accumulator(p.dtype).itemsize, limits.small_product(p.is_complex)
        first, last = steps(p)
        whole = tile == last - first and not channels_last
        per_row = -(-(last - first) // tile)
        outputs, budget = p.C_out_g * tile * outputs_per_step(p), limits.BUFFER // size
        depth = min(limits.BAND_DEPTH, budget // max(outputs, 16)) // p.C_in_g
        taps = _taps_within(p, tile, depth)
        if taps < min(p.K, max(1, tile // 4)):
            return None
        window = p.C_in_g * window_length(p, tile, taps)
        lines = min(small // (window * outputs), _LINES)
        concurrent = lines >= 8
        if channels_last and (
            taps < p.K or not concurrent or p.groups * window * outputs * size > limits.PACKED_WEIGHT
        ):
            return None
        if concurrent:
            budget = max(limits.CONCURRENT_BUFFER // size, window * max(outputs, 16))
        # The most elements of a window in any buffer: its copy, its outputs, or the input from it to the next window.
        unit = max(window, outputs, p.C_in_g * tile * step_inputs(p))
        if channels_last:  # blocks have whole rows: the share of each window in these
            unit = max(p.C_in_g * span(p, tile, per_row), outputs * per_row) // per_row + 1
        if unit * (per_row if channels_last else 1) > budget:
            return None
        most = max(1, budget // unit)
        windows = min(per_row, most)
        # Rows of one sample lie next to each other, those of one group in a page of memory each. So a block has all
        # groups where whole rows are read in place, and then enough samples for its products.
        samples = max(1, min(p.N, most // windows))
        enough = min(samples, _LINES) if whole else samples
        groups = max(1, min(p.groups, budget // (unit * windows * enough), budget // (window * outputs)))
        if whole:
            samples = max(1, min(p.N, most // groups))
        if whole and concurrent and groups == p.groups:
            (samples,) = share(p, (p.N, samples))
        elif channels_last:
            groups, samples = share(p, (p.groups, groups), (p.N, samples))
        elif concurrent:
            groups, samples, fewer = share(p, (p.groups, groups), (p.N, samples), (per_row, windows))
            # Where there are several bands, each block fills them again.
            windows = fewer if taps == p.K else max(fewer, min(windows, limits.WORTH_A_BAND))
        side_by_side = samples if channels_last else samples * windows
        lines = min(lines, side_by_side) if concurrent else side_by_side
        return cls(Taps.of(p), samples, groups, windows, lines, tile, taps, whole, channels_last, concurrent)

    @property
    def reason(self) -> str:
        if self.whole:
            return "short rows: each sample is a line of one product with a banded matrix"
        if self.channels_last:
            return "short rows: channels side by side, each sample a line of the product for each window"
        return "few channels per group, or many taps: banded matrices use each window for several outputs"

    def multiplies_zeros(self, p: ConvProblem) -> bool:
        return True

    def cost(self, p: ConvProblem) -> float:
        size, per_step = costs.scale(p), outputs_per_step(p)
        first, last = steps(p)
        per_row = -(-(last - first) // self.tile)
        passes = -(-p.K // self.taps)
        blocks = -(-p.N // self.samples) * -(-p.groups // self.groups) * -(-per_row // self.windows)
        U, outputs = window_length(p, self.tile, self.taps), p.C_out_g * self.tile * per_step
        kept = min(U, p.L_in) if self.whole else U
        window, count = p.C_in_g * kept, p.N * p.groups * per_row  # of all windows
        bands = p.groups * (1 if passes == 1 else -(-p.N // self.samples) * -(-per_row // self.windows) * passes)
        diagonals = p.C_in_g * p.C_out_g * self.taps * self.tile
        filling = bands * size * (costs.DIAGONAL * diagonals + costs.COPY * p.C_in_g * U * outputs)
        if self.whole:
            filling += bands * size * costs.STRIDED_COPY * window * outputs
        filling += bands / min(self.groups, p.groups) * costs.CALL * (3 + (_phases(p) if p.transposed else 0))
        lines = min(self.lines, p.N * per_row)
        product = costs.products(p, passes * count / lines, lines, window, outputs, self.concurrent)
        # Rows of the same group are read and written one after the other, but lie far apart in memory.
        copy = 2 * costs.ROW * p.N * p.groups if p.groups > 1 and p.N > 1 else 0.0
        if self.channels_last:
            inputs = p.N * p.groups * p.C_in_g * span(p, self.tile, per_row)
            copy += costs.swaps(inputs, max(p.C_in_g, p.L_in), size)
        elif not self.whole or p.dtype in costs.CONVERT:
            copy += passes * costs.copies(count * p.C_in_g, kept, costs.COPY * size)
        each = costs.ELEMENTWISE * (1 + 2 * (passes - 1)) * size
        if p.dtype in costs.CONVERT:
            copy += costs.CONVERT[p.dtype] * min(count * window, p.N * p.C_in * p.L_in)
            each += costs.CONVERT[p.dtype]
        result = count * outputs * each
        if self.channels_last:
            result += costs.swaps(count * outputs, max(p.C_out_g, p.L_out), size)
        elif not self.whole or p.dtype in costs.CONVERT:
            result += costs.copies(count * p.C_out_g, self.tile * per_step, costs.COPY * size)
        rest = copy + filling + result + blocks * (costs.BLOCK + passes * 6 * costs.CALL)
        return product + rest if self.concurrent else costs.of_blas(product, rest)

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        """Bounds on the elements of the scratch buffers: what all threads share, and what each has by name."""
        U, per_step = window_length(p, self.tile, self.taps), outputs_per_step(p)
        window, outputs = p.C_in_g * U, p.C_out_g * self.tile * per_step
        lines = self.groups * self.samples * self.windows
        inputs = self.groups * self.samples * p.C_in_g * span(p, self.tile, self.windows + 1)
        rows = max(p.C_in_g * p.L_in, p.C_out_g * p.L_out)
        band, sums = self.groups * window * outputs, lines * outputs
        if self.channels_last:
            buffers = {"rows": inputs, "tiles": sums, "input": self.groups * self.samples * rows}
        else:
            buffers = {"band": band, "panel": lines * window, "sums": sums, "input": inputs}
        if self.whole:
            buffers["full band"] = band
        if self.taps < p.K:
            buffers["product"] = sums
        shared = p.groups * window * outputs if self.channels_last else 0
        safe = self.safe.block_memory(p, self.samples, self.groups, p.C_out_g, self.windows * self.tile)
        return shared, buffers | {name: max(buffers.get(name, 0), count) for name, count in safe.items()}

    def run(self, call: Call, workers: int) -> None:
        p = call.p
        blocks = [
            Block(samples, groups, slice(0, p.C_out_g), at.start, at.stop)
            for groups in slices(0, p.groups, self.groups)
            for samples in slices(0, p.N, self.samples)
            for at in slices(*steps(p), self.windows * self.tile)
        ]
        if self.channels_last:
            self._run_channels_last(call, blocks, workers)
        else:
            run_blocks(self._compute, [(call, block) for block in blocks], workers, call.dtype, p.L_out)

    def _compute(self, call: Call, block: Block, scratch: Scratch) -> None:
        p = call.p
        N, G, M = (part.stop - part.start for part in block[:3])
        W, length = -(-(block.stop - block.start) // self.tile), self.tile * outputs_per_step(p)
        y = call.y[block.samples, block.groups]
        # The outputs of the block; the first and the last ones may not exist.
        at = block.start * outputs_per_step(p) - (p.padding_left if p.transposed else 0)
        low, high = max(0, at), min(p.L_out, at + W * length)
        size = call.dtype.itemsize
        direct = self.whole and call.y_direct and (M == 1 or y.strides[2] == p.L_out * size)
        if direct:
            sums = as_strided(y, (G, N, M * p.L_out), (y.strides[1], y.strides[0], size))
        else:
            sums = scratch.take("sums", G, N * W, M * (high - low if self.whole else length))
        into = sums
        for taps in slices(0, p.K, self.taps):
            band, first, last = self._band(call, block, taps, scratch)
            panel = self._panel(call, block, W, first, last, scratch)
            self._multiply(panel, band, into)
            if into is not sums:
                np.add(sums, into, out=sums)
            elif taps.stop < p.K:
                into = scratch.take("product", *sums.shape)
        if call.is_spoilt(sums):
            self.safe.compute_outputs(call, block._replace(start=low, stop=high), scratch)
            return
        if self.whole:
            by_sample = sums.reshape(G, N, M, high - low).swapaxes(0, 1)
            call.add_bias(block, y if direct else by_sample)
            if not direct:
                y[...] = by_sample
            return
        by_sample = sums.reshape(G, N, W, M, length).transpose(1, 0, 3, 2, 4)
        call.add_bias(block, by_sample)
        begin, end = -(-(low - at) // length), (high - at) // length  # the windows of which all outputs exist
        if begin < end:
            part = y[..., at + begin * length : at + end * length]
            part.reshape(*part.shape[:3], end - begin, length)[...] = by_sample[..., begin:end, :]
        for window in {0, W - 1} - set(range(begin, end)):
            start = at + window * length
            from_, to = max(low, start), min(high, start + length)
            y[..., from_:to] = by_sample[..., window, from_ - start : to - start]

    def _run_channels_last(self, call: Call, blocks: list[Block], workers: int) -> None:
        """Compute blocks of whole rows for `channels_last`, all with the same bands."""
        p = call.p
        scratch = Scratch.borrow("band", call.dtype)
        band, filled = scratch.keep("bands", (self, p), partial(self._bands, p, scratch))
        with np.errstate(all="ignore"):
            for diagonal, taps in filled:
                diagonal[...] = call.w[..., taps, None]
            # Where a window has only the inputs of its single step, the only zeros are those of the padding, so that it
            # is enough to check the bands.
            if band.shape[3] == 1 and p.dilation == 1 and is_finite(band):
                call = call.of_finite(call.x, call.w, call.b, call.y)
        bands = band.reshape(p.groups, 1, 1, -1, band.shape[3] * p.C_out_g)
        run_blocks(
            self._prepare, [(call, bands, block) for block in blocks], workers, call.dtype, p.L_out, prepares=True
        )
        scratch.give_back("band")

    def _bands(self, p: ConvProblem, scratch: Scratch) -> tuple[Array, list[tuple[Array, slice]]]:
        """Bands of zeros of all groups for `channels_last`, and views of their diagonals."""
        outputs = self.tile * outputs_per_step(p)
        band = scratch.take("bands", p.groups, window_length(p, self.tile, p.K), p.C_in_g, outputs, p.C_out_g)
        band[...] = 0
        return band, diagonals(p, band.transpose(0, 2, 1, 4, 3), self.tile, slice(0, p.K))

    def _prepare(self, call: Call, bands: Array, block: Block, scratch: Scratch) -> Callable[[], None]:
        """Prepare a block for `channels_last`, and return the function that computes it."""
        p, M, C = call.p, call.p.C_out_g, call.p.C_in_g
        y, x = call.y[block.samples, block.groups], call.x[block.samples, block.groups]
        N, G = x.shape[:2]
        # Conversions take several times as long on short runs, so they are a step of their own, along whole rows.
        converted, rows = x, y
        if x.dtype != call.dtype:
            buffer = scratch.take("input", N * G * max(C * p.L_in, M * p.L_out))
            converted, rows = (buffer[: a.size].reshape(a.shape) for a in (x, y))
        key = self, p, block.start, N, G
        inputs, panel, products, sums, results = scratch.keep("rows", key, partial(self._rows, *key[1:], scratch))
        bias = call.bias(block, 4)

        def compute() -> None:
            if converted is not x:
                converted[...] = x
            copy_swapped(converted[..., inputs], panel)
            for windows, tiles in products:
                np.matmul(windows, bands[block.groups], out=tiles)
            if call.is_spoilt(sums):
                self.safe.compute_outputs(call, block._replace(start=0, stop=p.L_out), scratch)
                return
            if bias is not None:
                np.add(results, bias, out=results)
            copy_swapped(results, rows)
            if rows is not y:
                y[...] = rows

        return compute

    def _rows(
        self, p: ConvProblem, start: int, N: int, G: int, scratch: Scratch
    ) -> tuple[slice, Array, list[tuple[Array, Array]], Array, Array]:
        """The buffers of a block for `channels_last`, which begins at step `start`.

        Returns:
            The inputs that windows read, where they are copied to, between zeros; the windows of each product, and its
            result; all sums, and those of outputs that exist. Copies and outputs are (N, G, channels, positions).
        """
        W, C, M, length = self.windows, p.C_in_g, p.C_out_g, self.tile * outputs_per_step(p)
        panel = scratch.take("rows", N, G, span(p, self.tile, W), C)
        panel[...] = 0
        sums = scratch.take("tiles", N, G, W, length * M)
        s_n, s_g, s_l, s_c = panel.strides
        products, whole, step = [], N // self.lines * self.lines, self.tile * step_inputs(p)
        for low, high in ((0, whole), (whole, N)):
            if low < high:
                lines = min(self.lines, high - low)
                shape = (G, W, (high - low) // lines, lines, window_length(p, self.tile, p.K) * C)
                windows = strided(panel[low:], 0, shape, (s_g, step * s_l, lines * s_n, s_n, s_c))
                products.append((windows, sums[low:high].reshape(-1, lines, *sums.shape[1:]).transpose(2, 3, 0, 1, 4)))
        first = first_input(p, start, slice(0, p.K))
        left = min(max(first, 0), first + panel.shape[2])
        right = max(left, min(first + panel.shape[2], p.L_in))
        at = start * outputs_per_step(p) - (p.padding_left if p.transposed else 0)
        outputs = sums.reshape(N, G, W * length, M)[:, :, -at : p.L_out - at].swapaxes(2, 3)
        return slice(left, right), panel[:, :, left - first : right - first].swapaxes(2, 3), products, sums, outputs

    def _band(self, call: Call, block: Block, taps: slice, scratch: Scratch) -> tuple[Array, int, int]:
        """The banded matrix (groups, C_in_g*inputs, C_out_g*outputs) from the inputs of a window to its outputs.

        The other two values are the range of input positions of the first window.
        """
        p, groups = call.p, block.groups
        G, C, M, T = groups.stop - groups.start, p.C_in_g, p.C_out_g, self.tile
        per_step, U = outputs_per_step(p), window_length(p, T, taps.stop - taps.start)
        low = first_input(p, block.start, taps)
        first, last = 0, U
        at = block.start * per_step - (p.padding_left if p.transposed else 0)
        begin, end = 0, T * per_step
        if self.whole:
            first = min(max(0, -low), U - 1)
            last = max(min(U, p.L_in - low), first + 1)
            begin, end = max(0, -at), min(end, p.L_out - at)
        shape = (G, C, last - first, M, end - begin)
        matrix = (G, C * (last - first), M * (end - begin))
        made_of = groups.start, taps.start
        if scratch.band == made_of:
            return scratch.take("band", *shape).reshape(matrix), low + first, low + last
        scratch.band = made_of
        cut = (last - first, end - begin) != (U, T * per_step)
        full = scratch.take("full band" if cut else "band", G, C, U, M, T * per_step)
        fill_band(p, call.w[groups], full, T, taps)
        if not cut:
            return full.reshape(matrix), low, low + U
        band = scratch.take("band", *shape)
        band[...] = full[:, :, first:last, :, begin:end]
        return band.reshape(matrix), low + first, low + last

    def _panel(self, call: Call, block: Block, W: int, first: int, last: int, scratch: Scratch) -> Array:
        """The windows of a block as (groups, samples, windows, C_in_g*inputs) or (groups, 1, samples*windows, ...)."""
        p, step = call.p, self.tile * step_inputs(call.p)
        N, G, C, U = (
            block.samples.stop - block.samples.start,
            block.groups.stop - block.groups.start,
            p.C_in_g,
            last - first,
        )
        behind = first + (W - 1) * step + U
        if call.x_direct and first >= 0 and behind <= p.L_in:
            x = call.x[block.samples, block.groups]
            s_n, s_g, s_c, s_l = x.strides
            joined = C == 1 or s_c == U * s_l
            if W == 1 and joined and s_n >= C * U * s_l:
                return as_strided(x[..., first:], (G, 1, N, C * U), (s_g, s_n, s_n, s_l))
            if C == 1 and step >= U and W >= 32:
                return as_strided(x[..., first:], (G, N, W, U), (s_g, s_n, s_l * step, s_l))
        panel = scratch.take("panel", G, N, W, C, U)
        # Windows within the input are copied from the input, the others from a padded copy of it.
        inside = min(max(0, -(first // step)), W)
        outside = max(min(W, (p.L_in - last) // step + 1), inside)
        for begin, end in ((0, inside), (inside, outside), (outside, W)):
            if begin < end:
                at = first + begin * step
                x = call.read(block.samples, block.groups, slice(0, C), at, at + (end - begin - 1) * step + U, scratch)
                s_n, s_g, s_c, s_l = x.strides
                part = panel[:, :, begin:end]
                np.copyto(part, as_strided(x, part.shape, (s_g, s_n, s_l * step, s_c, s_l)))
        return panel.reshape(G, 1, N * W, C * U)

    def _multiply(self, panel: Array, band: Array, sums: Array) -> None:
        """``sums[g] = panel[g] @ band[g]`` of sums (groups, windows of all samples, outputs)."""
        G, parts, rows, depth = panel.shape
        outputs = sums.shape[2]
        if parts > 1:
            np.matmul(panel, band[:, None], out=sums.reshape(G, parts, rows, outputs))
            return
        whole = rows // self.lines * self.lines
        for low, high in ((0, whole), (whole, rows)):
            if low < high:
                lines = min(self.lines, high - low)
                a, c = panel[:, 0, low:high], sums[:, low:high]
                np.matmul(a.reshape(G, -1, lines, depth), band[:, None], out=c.reshape(G, -1, lines, outputs))


def fill_band(p: ConvProblem, w: Array, band: Array, tile: int, taps: slice) -> None:
    """Fill bands (groups, C_in_g, inputs of a window, C_out_g, its outputs) of these taps of the weight."""
    band[...] = 0
    for diagonal, part in diagonals(p, band, tile, taps):
        diagonal[...] = w[..., part, None]


def diagonals(p: ConvProblem, band: Array, tile: int, taps: slice) -> list[tuple[Array, slice]]:
    """Views of bands as (groups, C_out_g, C_in_g, some taps, tile), each with these taps: all that is not zero."""
    G, C, _, M, _ = band.shape
    s_g, s_c, s_u, s_m, s_o = band.strides
    if not p.transposed:
        shape = (G, M, C, taps.stop - taps.start, tile)
        return [(strided(band, 0, shape, (s_g, s_m, s_c, s_u * p.dilation, s_u * p.stride + s_o)), taps)]
    # Tap k of input l contributes to the output l*stride + k*dilation; both are counted from the first step.
    common = math.gcd(p.stride, p.dilation)
    interleave = p.stride // common
    last = (taps.stop - 1) * p.dilation // p.stride
    found = []
    for k in range(taps.start, min(taps.start + interleave, taps.stop)):
        behind, output = divmod(k * p.dilation, p.stride)
        of_phase = slice(k, taps.stop, interleave)
        of_band = as_strided(
            band[:, :, last - behind :, :, output:],
            (G, M, C, len(range(k, taps.stop, interleave)), tile),
            (s_g, s_m, s_c, -s_u * (p.dilation // common), s_u + s_o * p.stride),
        )
        found.append((of_band, of_phase))
    return found


def outputs_per_step(p: ConvProblem) -> int:
    return p.stride if p.transposed else 1


def _phases(p: ConvProblem) -> int:
    return min(p.stride // math.gcd(p.stride, p.dilation), p.K)


def steps(p: ConvProblem) -> tuple[int, int]:
    """The range of steps that have outputs."""
    if not p.transposed:
        return 0, p.L_out
    return p.padding_left // p.stride, -(-(p.L_out + p.padding_left) // p.stride)


def candidates(p: ConvProblem) -> list[Toeplitz]:
    """Forms with several numbers of steps of a window."""
    first, last = steps(p)
    count = last - first
    tiles = {min(tile, count) for tile in (1, 4, 8, 16, 32, 64)}
    found = []
    if count <= limits.SHORT_ROW:
        tiles.add(count)
        if p.N >= limits.LINES_OF_SAMPLES and p.C_in_g > 1:
            found = [Toeplitz.of(p, tile, channels_last=True) for tile in (1, 2, 4) if tile < count]
    found += [Toeplitz.of(p, tile) for tile in sorted(tiles)]
    return [form for form in found if form is not None]


def first_input(p: ConvProblem, step: int, taps: slice) -> int:
    """The first input position that these taps read for a step."""
    if not p.transposed:
        offset: int = taps.start * p.dilation - p.padding_left
        return step * p.stride + offset
    behind: int = (taps.stop - 1) * p.dilation // p.stride
    return step - behind


def step_inputs(p: ConvProblem) -> int:
    """The input positions from one step to the next."""
    return 1 if p.transposed else p.stride


def span(p: ConvProblem, tile: int, windows: int) -> int:
    """The number of input positions of so many windows of all taps."""
    return (windows - 1) * tile * step_inputs(p) + window_length(p, tile, p.K)


def window_length(p: ConvProblem, tile: int, taps: int) -> int:
    """The most input positions that so many taps read for a tile."""
    reach = (taps - 1) * p.dilation
    if not p.transposed:
        return (tile - 1) * p.stride + reach + 1
    return tile + -(-reach // p.stride)


def _taps_within(p: ConvProblem, tile: int, longest: int) -> int:
    """The number of taps whose window is at most `longest`."""
    room = longest - ((tile - 1) * p.stride + 1) if not p.transposed else (longest - tile) * p.stride
    return 0 if room < 0 else min(p.K, room // p.dilation + 1)
