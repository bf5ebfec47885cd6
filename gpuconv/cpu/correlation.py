"""A weight gradient as the forms compute it: a correlation of an array with windows of another one, in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..problem import WeightGradientProblem
from . import limits
from .arrays import slices


class Correlation(NamedTuple):
    """``sums[g, r, c, k] = sum over n, l of a[n, g, r, l] * b[n, g, c, l*stride + offset + k*dilation]``.

    Attributes:
        N, G, K: samples, groups, taps.
        R, C: channels of a and of b in one group.
        L_a, L_b: positions.
        swapped: a is the fine array and b the coarse one, so the taps are reversed; otherwise a is the coarse one.
        conjugate_a, conjugate_b: whether the array is conjugated.
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
    def of(cls, p: WeightGradientProblem) -> Correlation:
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
        """The range of positions of b that these taps read at the positions start to stop of a."""
        low = start * self.stride + self.offset + taps.start * self.dilation
        return low, low + (stop - 1 - start) * self.stride + (taps.stop - 1 - taps.start) * self.dilation + 1

    def reading(self, k: int, start: int, stop: int) -> tuple[int, int, slice]:
        """The range of positions of a within start to stop at which tap k reads b, and the slice that it reads."""
        shift = self.offset + k * self.dilation
        first = min(max(start, -(shift // self.stride)), stop)
        last = max(min(stop, -((shift - self.L_b) // self.stride)), first)
        return first, last, slice(first * self.stride + shift, (last - 1) * self.stride + shift + 1, self.stride)


class Block(NamedTuple):
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
class Sizes:
    """Block sizes: of the sums (`groups`, `rows`, `channels`, `taps`) and of a tile (`samples`, `positions`).

    Attributes:
        name: of the form.
        depth: the positions of one product; a tile of taps can have several.
        tile_rows: the rows of one product.
        slices: the parts into which the tiles are divided, each with sums of its own.
    """

    roles: Correlation
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

    def blocks(self) -> list[Block]:
        r = self.roles
        return [
            Block(groups, rows, channels, taps)
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
        # `WeightSums._add_exactly` reads one window of b at a time.
        buffers["b"] = max(buffers["b"], self.groups * self.positions * self.channels)
        return buffers

    def is_small(self, p: WeightGradientProblem) -> bool:
        """Whether BLAS computes the products on the calling thread, so that several threads can."""
        if self.name == "dots":
            return True
        windows = self.channels * (self.taps if self.name == "panels" else 1)
        return self.tile_rows * windows * self.depth <= limits.small_product(p.is_complex)
