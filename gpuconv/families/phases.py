"""The phases of a transposed convolution: what cuda_src/conv_transpose1d_phases.cu says, as numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..problem import ConvProblem


@dataclass(frozen=True, slots=True)
class Phases:
    """The matrix products of a problem: l_out + padding_left = q*stride + phase.

    Attributes:
        problem: transposed.
        in_rows: one product a group has rows (c_out, phase), phase inner; else every phase has a product, rows c_out.
        products: independent ones, of groups and perhaps phases.
        rows: of a product.
        taps: of the phase with the most.
        gcd: of stride and dilation; phases that it does not divide have no tap.
        tap_step: from one tap of a phase to the next.
        position_step: from one tap's input to the next, backwards.
        q_begin: of the first output position.
        positions: of q, to the last output position, whatever their phase.
    """

    problem: ConvProblem
    in_rows: bool
    products: int
    rows: int
    taps: int
    gcd: int
    tap_step: int
    position_step: int
    q_begin: int
    positions: int

    @property
    def inverse(self) -> int:
        """The inverse of position_step modulo tap_step, by which kernels find a phase's first tap."""
        return pow(self.position_step, -1, self.tap_step)

    @classmethod
    def of(cls, problem: ConvProblem) -> Phases:
        p = problem
        gcd = math.gcd(p.stride, p.dilation)
        in_rows = p.dilation == 1
        q_begin = p.padding_left // p.stride
        return cls(
            problem=p,
            in_rows=in_rows,
            products=p.groups * (1 if in_rows else p.stride),
            rows=p.C_out_g * (p.stride if in_rows else 1),
            taps=-(-p.K // (p.stride // gcd)),
            gcd=gcd,
            tap_step=p.stride // gcd,
            position_step=p.dilation // gcd,
            q_begin=q_begin,
            positions=(p.L_out - 1 + p.padding_left) // p.stride - q_begin + 1,
        )
