"""Blocks of the forms that multiply by the weight as a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ..problem import ConvProblem
from . import costs, limits
from .arrays import Array, Scratch, slices
from .geometry import Block, Call
from .threads import run_blocks


class Blocking(NamedTuple):
    """Block sizes. Products have at most `tile_rows` rows and `tile` columns.

    A weight that BLAS cannot read in place is packed in parts of `weight_rows` rows of `weight_groups` groups.
    """

    samples: int
    groups: int
    rows: int
    length: int
    tile_rows: int
    tile: int
    weight_groups: int
    weight_rows: int

    def num_blocks(self, p: ConvProblem, positions: int) -> tuple[int, int]:
        """The number of blocks of a problem, and how often their columns are read, once for each part of the rows."""
        rows = -(-p.C_out_g // min(self.rows, self.weight_rows))
        groups = -(-p.groups // min(self.groups, self.weight_groups))
        return rows * groups * -(-p.N // self.samples) * -(-positions // self.length), rows

    def run(
        self,
        call: Call,
        positions: tuple[int, int],
        weight: Array | None,
        pack: Callable[[Array, Scratch], Array],
        compute: Callable[[Call, Array, Block, Scratch], None],
        workers: int,
    ) -> None:
        """Compute all blocks; the arguments are those of `batches`."""
        packed = Scratch.borrow("weight 0", call.dtype)
        for batch in self.batches(call.p, positions, call.w, weight, pack, packed):
            run_blocks(compute, [(call, *block) for block in batch], workers, call.dtype, call.p.L_out)
        packed.give_back("weight 0")

    def batches(
        self,
        p: ConvProblem,
        positions: tuple[int, int],
        w: Array,
        weight: Array | None,
        pack: Callable[[Array, Scratch], Array],
        packed: Scratch,
    ) -> Iterator[list[tuple[Array, Block]]]:
        """Blocks that can be computed at the same time, each with its part of the weight as a matrix.

        `weight` is the matrix (groups, rows*n, depth) for some n; None packs parts of `w` into `packed`, each of which
        is overwritten by the next: `pack` takes (groups, rows, C_in_g, K) and returns (groups, rows*n, depth).
        """
        per_groups, per_rows = (self.weight_groups, self.weight_rows) if weight is None else (p.groups, p.C_out_g)
        columns = [(n, at) for n in slices(0, p.N, self.samples) for at in slices(*positions, self.length)]
        for g in slices(0, p.groups, per_groups):
            for m in slices(0, p.C_out_g, per_rows):
                matrix = pack(w[g, m], packed) if weight is None else weight
                per_row = matrix.shape[1] // (m.stop - m.start)
                blocks = []
                for groups in slices(g.start, g.stop, self.groups):
                    for rows in slices(m.start, m.stop, self.rows):
                        part = matrix[
                            groups.start - g.start : groups.stop - g.start,
                            (rows.start - m.start) * per_row : (rows.stop - m.start) * per_row,
                        ]
                        blocks += [(part, Block(n, groups, rows, at.start, at.stop)) for n, at in columns]
                yield blocks

    def multiply(self, weight: Array, columns: Array, product: Array) -> None:
        """``product[n, g, tile] = weight[g] @ columns[n, g, tile]``, at most `tile_rows` rows at a time."""
        G, R, depth = weight.shape
        whole = R - R % self.tile_rows
        for low, high in ((0, whole), (whole, R)):
            if low < high:
                rows = min(self.tile_rows, high - low)
                w = weight[:, low:high].reshape(G, 1, (high - low) // rows, rows, depth)
                part = product[:, :, :, low:high]
                np.matmul(w, columns[:, :, :, None], out=part.reshape(*part.shape[:3], -1, rows, part.shape[4]))

    def tiles(self, columns: int) -> list[tuple[int, int, int]]:
        """Cut a number of columns into runs of equal tiles: (start, stop, columns of a tile)."""
        whole = columns - columns % self.tile
        runs = ((0, whole, self.tile), (whole, columns, columns - whole))
        return [run for run in runs if run[0] < run[1]]


def tiled(matrix: Array, tile: int) -> Array:
    """A view of (..., rows, columns) as (..., tiles, rows, tile)."""
    tiles: Array = matrix.reshape(*matrix.shape[:-1], -1, tile).swapaxes(-3, -2)
    return tiles


def parts(p: ConvProblem, overhead: float = 0.0) -> int:
    """The least number of blocks of a problem for several threads: a power of two, so that they share evenly.

    `overhead` is the interpreter's time for a block in nanoseconds, during which no other thread can use it.
    """
    least = max(limits.WORTH_A_BLOCK, 8 * overhead)
    wanted = min(limits.MAX_WORKERS, int(_work(p) / least))
    # Two blocks may be smaller: otherwise the second thread has nothing to do.
    return 1 << wanted.bit_length() - 1 if wanted > 1 else 1 + (_work(p) > least)


def _work(p: ConvProblem) -> float:
    """An estimate of a problem's nanoseconds: the product, the panel copied for it, and the work on each output."""
    multiply_adds = p.flops() // 2
    return (multiply_adds * (2 * costs.FLOP + costs.COPY / p.C_out_g) + p.N * p.C_out * p.L_out) * costs.scale(p)


def share(p: ConvProblem, *blocks: tuple[int, int]) -> list[int]:
    """Block sizes for pairs (extent, largest size), for at least `parts` blocks where possible; the first is cut first.

    The last block is smaller where possible: a helper starts later than the caller, which then need not wait for it.
    """
    sizes, wanted, longer = [], parts(p), 1 + limits.LATE / _work(p)
    for extent, largest in blocks:
        size = max(-(-extent // wanted), int(extent * longer / wanted)) if wanted > 1 else extent
        size = max(1, min(largest, size))
        if wanted > 1 and size == largest:  # equal blocks, of an even number
            size = max(1, -(-extent // (-(-extent // (2 * size)) * 2)))
        wanted = -(-wanted // -(-extent // size))
        sizes.append(size)
    return sizes
