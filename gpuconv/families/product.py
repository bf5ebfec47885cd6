"""A convolution or transposed convolution as matrix products."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..problem import ConvProblem


class RowTiles(NamedTuple):
    """Tiles of the rows of a product: see conv_transpose1d_mma.cu.

    Attributes:
        full_phases: phases whose rows have all taps, or share tiles with those that have.
        full: tiles of those rows.
        short: tiles of the others, which lack the last tap.
    """

    full_phases: int
    full: int
    short: int

    @property
    def total(self) -> int:
        return self.full + self.short


@dataclass(frozen=True, slots=True)
class Product:
    """Products of rows by (sample, position), each summed over input channels and taps.

    A convolution has one product a group: rows c_out, positions l_out. A transposed convolution is a stride-1
    convolution for each phase of its outputs, l_out + padding_left = q*stride + phase, with positions q; where dilation
    is 1 the rows are pairs (c_out, phase), else each phase has its own product.

    Attributes:
        problem: the operation.
        products: the number of products: groups, or groups times phases.
        rows: rows of a product.
        positions: positions of a sample.
        first: the first position.
        taps: taps of a product; in a transposed convolution those of the phase with the most.
        column_step: distance from one position's input to the next.
        tap_step: distance from one tap's input to the next; negative in a transposed convolution.
        phases_in_rows: whether rows are (c_out, phase), phase inner.
        fold: positions of a channel that are channels of `problem`: see `folded`.
        lead: of those of the first sample, the positions in front of it.
    """

    problem: ConvProblem
    products: int
    rows: int
    positions: int
    first: int
    taps: int
    column_step: int
    tap_step: int
    phases_in_rows: bool
    fold: int = 1
    lead: int = 0

    @classmethod
    def of(cls, problem: ConvProblem) -> Product:
        p = problem
        if not p.transposed:
            return cls(p, p.groups, p.C_out_g, p.L_out, 0, p.K, p.stride, p.dilation, False)
        gcd = math.gcd(p.stride, p.dilation)
        in_rows = p.dilation == 1
        first = p.padding_left // p.stride
        return cls(
            problem=p,
            products=p.groups * (1 if in_rows else p.stride),
            rows=p.C_out_g * (p.stride if in_rows else 1),
            positions=(p.L_out - 1 + p.padding_left) // p.stride - first + 1,
            first=first,
            taps=-(-p.K // (p.stride // gcd)),
            column_step=1,
            tap_step=-(p.dilation // gcd),
            phases_in_rows=in_rows,
        )

    @classmethod
    def folded(cls, problem: ConvProblem) -> Product:
        """The product of a convolution of stride 1 with K/stride taps, whose input[c*stride + r, q] is the given one's
        padded input[c, q*stride + r].

        The stride must divide K, and dilation must do nothing. See folded() in cuda_src/mma_tile.cuh.
        """
        p, taps = problem, problem.K // problem.stride
        view = replace(
            p,
            C_in=p.C_in * p.stride,
            L_in=p.L_out + taps - 1,
            K=taps,
            stride=1,
            padding_left=0,
            padding_right=0,
            padding_mode="zeros",
        )
        return replace(cls.of(view), fold=p.stride, lead=p.padding_left % p.stride)

    @property
    def phases(self) -> int:
        """Output positions for each position of a product."""
        return self.problem.stride if self.problem.transposed else 1

    @property
    def full_phases(self) -> int:
        """Where rows are phases: the first so many have all taps.

        The others lack the last one; but phases without any tap count as having all.
        """
        p = self.problem
        lacks_tap = self.phases_in_rows and p.stride < p.K
        return (p.K % p.stride if lacks_tap else 0) or self.phases

    @property
    def rows_differ(self) -> bool:
        """Whether some rows lack the last tap of others."""
        return self.full_phases < self.phases

    def row_tiles(self, block_m: int, *, apart: bool = False) -> RowTiles:
        """Its tiles of `block_m` rows; `apart` where rows that lack a tap share none with others."""
        phases = self.full_phases if apart else self.phases
        full = self.rows * phases // self.phases
        return RowTiles(phases, -(-full // block_m), -(-(self.rows - full) // block_m))

    @property
    def terms(self) -> int:
        """Products in the sum of one element, including the taps that its phase may lack."""
        return self.problem.C_in_g * self.taps

    def params(self) -> dict[str, int]:
        """The fields of Params that a kernel for phases needs besides those of `conv_fields`."""
        if not self.problem.transposed:
            return {}
        return {"positions": self.positions, "q_begin": self.first, "taps": self.taps}
