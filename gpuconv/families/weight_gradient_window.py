"""How weight_gradient_mma takes the columns of its result and loads and stages the fine side of a chunk."""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple

from ..problem import WeightGradientProblem
from .arithmetic import ARITHMETICS, SPLIT_TERMS, Access
from .base import round_up
from .mma import MIN_CHANNELS

STEP = SPLIT_TERMS  # positions of a step: one product of 16-bit matrices along the reduction, or two
OCTET = 8  # columns of one product
PRODUCT_ROWS = 16  # rows of one product


class Fetch(Enum):
    """What a lane loads of each channel of a unit, of coarse or of fine.

    Attributes:
        width: its positions, which are neighbours in the array.
        align: the multiple of positions at which rows begin and end.
        words: what `explain` says of it.
    """

    POSITION = 1, 1, "one position of a channel"
    RUN = 4, 4, "four positions of a channel"
    PAIRS = 4, 2, "four positions of a channel, two at a time"
    SHIFTED = 4, 1, "four positions of a channel, in words that rows of odd length share"
    UNIT = 1, 1, Access.UNIT.words

    def __init__(self, width: int, align: int, words: str) -> None:
        self.width, self.align, self.words = width, align, words


class Columns(NamedTuple):
    """How the columns of the result, (channel of fine, tap), are grouped by eights.

    Attributes:
        octets: of a group: of eight channels, or of one channel, whose taps are taken by eights.
        taps: of an octet, or blocks of eight taps.
        tap_step: positions from one of them to the next.
        in_taps: whether an octet has eight taps.
    """

    octets: int
    taps: int
    tap_step: int
    in_taps: bool

    @classmethod
    def of(cls, p: WeightGradientProblem, *, in_taps: bool) -> Columns:
        if in_taps:
            return cls(p.C_fine_g, -(-p.K // OCTET), OCTET * p.dilation, True)
        return cls(-(-p.C_fine_g // OCTET), p.K, p.dilation, False)

    @classmethod
    def every(cls, p: WeightGradientProblem, tap_width: int) -> tuple[Columns, ...]:
        """All that the layout allows if `tap_width` neighbouring taps are loaded at once.

        Octets of channels are half empty if these are few, and not even one unit may be full. Neighbouring taps of a
        channel are loaded faster than positions that lie a stride apart.
        """
        of_channels, of_taps = cls.of(p, in_taps=False), cls.of(p, in_taps=True)
        if p.C_fine_g < ARITHMETICS[p.dtype, p.precision].channels:
            return (of_taps,)
        if p.C_fine_g < MIN_CHANNELS:
            return of_taps, of_channels
        return (of_channels, of_taps) if p.stride > 1 < tap_width and p.K >= OCTET else (of_channels,)


class Window(NamedTuple):
    """How the fine side of a chunk lies in shared memory: `positions` of each of some samples, shifted by the taps.

    A plane holds every stride-th position. Taps whose distance is a multiple of the stride share a plane, shifted:
    there are stride / gcd(stride, dilation) planes, or one per tap where that takes fewer rows (taps far apart).
    """

    samples: int
    positions: int
    planes: int
    plane_rows: int
    tap_rows_step: int

    @classmethod
    def of(
        cls, p: WeightGradientProblem, columns: Columns, taps: int, samples: int, positions: int, fetch: Fetch
    ) -> Window:
        """`taps`: of a block, as in `Columns`; `fetch`: of fine. Planes are of whole runs and begin where rows may."""
        tap_step = columns.tap_step
        gcd = math.gcd(p.stride, tap_step)
        planes = min(p.stride // gcd, taps)

        def skew(step: int) -> int:
            """The most rows in front of those that planes need which begin at every step-th tap."""
            begins = range(0, min(columns.taps, step * fetch.align), step)
            return max((tap * tap_step - p.padding_left) % fetch.align for tap in begins)

        if fetch.width > 1 < p.stride:  # a run has positions of several planes
            plane_rows = positions + (taps - 1 + skew(taps)) // p.stride
            whole = fetch.width // math.gcd(fetch.width, p.stride)
            return cls(samples, positions, p.stride, round_up(plane_rows, whole), 1)
        plane_rows = round_up(positions + (taps - 1) // planes * (tap_step // gcd) + skew(taps), fetch.width)
        tap_rows = round_up(positions + skew(1), fetch.width)
        if planes * plane_rows >= taps * tap_rows:
            return cls(samples, positions, taps, tap_rows, 0)
        return cls(samples, positions, planes, plane_rows, tap_step // gcd)

    @property
    def rows(self) -> int:
        return self.samples * self.planes * self.plane_rows
