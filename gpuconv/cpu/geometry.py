"""A problem as the forms see it: a convolution that has several outputs, its phases, at each position.

For conv1d a position is an output. For conv_transpose1d, ``l_out = l_in*stride - padding_left + k*dilation``: the taps
``k = j*interleave + r`` of one phase r, with ``interleave = stride / gcd(stride, dilation)``, read the inputs
``q - j*dilation/gcd`` and write the outputs ``q*stride + r*dilation - padding_left`` at positions q that are the same
for all phases. Outputs that no phase writes are the bias.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..problem import ConvProblem
from . import limits
from .arrays import Array, Scratch, accumulator, copy_padded, is_direct, is_finite


class Geometry(NamedTuple):
    """Position q of tap group j reads the input at ``q*stride + offset + j*dilation``.

    Phase r of tap group j is the tap ``k = first_tap + j*interleave + r``, where it exists. Phase r of position q is
    the output at ``q*out_stride + r*out_phase - out_left``.
    """

    stride: int
    offset: int
    dilation: int
    tap_groups: int
    phases: int
    interleave: int
    out_stride: int
    out_phase: int
    out_left: int
    first_tap: int = 0

    @classmethod
    def of(cls, p: ConvProblem) -> Geometry:
        if not p.transposed:
            return cls(p.stride, -p.padding_left, p.dilation, p.K, 1, 1, 1, 0, 0)
        common = math.gcd(p.stride, p.dilation)
        interleave = p.stride // common
        phases = min(interleave, p.K)
        return cls(
            1, 0, -(p.dilation // common), -(-p.K // interleave), phases, interleave,
            p.stride, p.dilation, p.padding_left,
        )  # fmt: skip

    def positions(self, p: ConvProblem) -> tuple[int, int]:
        """The range of positions that have outputs."""
        if self.phases == 1:
            return self.outputs(p, 0)
        first = -((((self.phases - 1) * self.out_phase) - self.out_left) // self.out_stride)
        return first, -(-(p.L_out + self.out_left) // self.out_stride)

    def outputs(self, p: ConvProblem, phase: int) -> tuple[int, int]:
        """The range of positions whose output of this phase exists."""
        return self.positions_between(phase, 0, p.L_out)

    def positions_between(self, phase: int, low: int, high: int) -> tuple[int, int]:
        """The range of positions whose output of this phase lies in the range from low to high."""
        shift = phase * self.out_phase - self.out_left
        first = -((shift - low) // self.out_stride)
        return first, max(first, -((shift - high) // self.out_stride))

    def place(self, phase: int, start: int, stop: int) -> slice:
        """The slice of the outputs of this phase at the positions start to stop, all of which must exist."""
        shift = phase * self.out_phase - self.out_left
        at = start * self.out_stride + shift
        return slice(at, at + (stop - 1 - start) * self.out_stride + 1, self.out_stride)

    @property
    def has_distant_windows(self) -> bool:
        """Whether each element that a tap reads lies in another cache line, and the elements of a window do not."""
        return self.stride >= 16 and self.dilation == 1

    def has_absent_taps(self, p: ConvProblem) -> bool:
        """Whether some phase has no tap in the last tap group."""
        return self.first_tap + (self.tap_groups - 1) * self.interleave + self.phases > p.K

    def of_equal_phases(self, p: ConvProblem) -> tuple[Geometry, Geometry]:
        """Where taps are absent: the phases with a tap in each tap group, and those without one in the last group."""
        full = p.K - (self.tap_groups - 1) * self.interleave
        others = self._replace(
            tap_groups=self.tap_groups - 1,
            phases=self.phases - full,
            out_left=self.out_left - full * self.out_phase,
            first_tap=full,
        )
        return self._replace(phases=full), others

    def writes_everything(self) -> bool:
        """Whether every output belongs to a phase."""
        return self.phases == self.out_stride

    def window(self, start: int, stop: int, taps: slice) -> tuple[int, int]:
        """The range of input positions that these tap groups read at the positions start to stop."""
        ends = (taps.start * self.dilation, (taps.stop - 1) * self.dilation)
        return start * self.stride + self.offset + min(ends), (stop - 1) * self.stride + self.offset + max(ends) + 1

    def reading(self, j: int, start: int, stop: int, low: int, high: int) -> tuple[int, int, slice]:
        """The range of positions within start to stop at which tap group j reads the input between low and high.

        The third value is the slice of the input that they read.
        """
        shift = self.offset + j * self.dilation
        first = min(max(start, -((shift - low) // self.stride)), stop)
        last = max(min(stop, -((shift - high) // self.stride)), first)
        return first, last, slice(first * self.stride + shift, (last - 1) * self.stride + shift + 1, self.stride)


class Block(NamedTuple):
    """A part of the output: samples, groups, output channels of each group, and the positions start to stop."""

    samples: slice
    groups: slice
    rows: slice
    start: int
    stop: int


class Call:
    """The arrays of one call, as views with the groups split off.

    Attributes:
        x: (N, groups, C_in_g, L_in).
        w: (groups, C_out_g, C_in_g, K), for both operations.
        b: (N, groups, C_out_g), or with 1 in place of N or C_out_g; or None.
        y: (N, groups, C_out_g, L_out).
        dtype: the accumulator.
        finite: x and w are known to hold neither NaN nor infinities.
        x_direct: BLAS can read x in place.
        y_direct: BLAS can write y in place.
    """

    __slots__ = ("b", "dtype", "finite", "p", "w", "x", "x_direct", "y", "y_direct")

    def __init__(self, p: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        self.p = p
        self.dtype = accumulator(p.dtype)
        self.x, self.w, self.b, self.y = x, w, b, y
        self.finite = False
        self.x_direct = is_direct(x, self.dtype)
        self.y_direct = is_direct(y, self.dtype)

    @classmethod
    def of(cls, p: ConvProblem, input: Array, weight: Array, bias: Array | None, output: Array) -> Call:
        G, C, M = p.groups, p.C_in_g, p.C_out_g
        w = weight.reshape(G, C, M, p.K).transpose(0, 2, 1, 3) if p.transposed else weight.reshape(G, M, C, p.K)
        b = None if bias is None else bias.reshape(1, G, M)
        return cls(p, input.reshape(p.N, G, C, p.L_in), w, b, output.reshape(p.N, G, M, p.L_out))

    def exchanged(self, p: ConvProblem) -> Call:
        """The call of `exchange(problem)`, on views of the same arrays."""
        b = None if self.b is None else self.b.transpose(2, 1, 0)
        return Call(p, self.w.transpose(1, 0, 2, 3), self.x.transpose(1, 0, 2, 3), b, self.y.transpose(2, 1, 0, 3))

    def of_finite(self, x: Array, w: Array, b: Array | None, y: Array) -> Call:
        """The same call on other arrays, of which x and w are finite."""
        call = Call(self.p, x, w, b, y)
        call.finite = True
        return call

    def of_taps(self, p: ConvProblem, taps: slice) -> Call:
        """The call of a problem with only these taps."""
        return Call(p, self.x, self.w[..., taps], self.b, self.y)

    def is_spoilt(self, sums: Array) -> bool:
        """Whether a zero may have been multiplied by a NaN or an infinity.

        Where all factors are finite, infinite sums are correct: they overflowed.
        """
        return not self.finite and not is_finite(sums)

    def fill_with_bias(self) -> None:
        self.y[...] = 0 if self.b is None else self.b[..., None]

    def add_bias(self, block: Block, sums: Array) -> None:
        """Add the bias to sums (samples, groups, rows, ...)."""
        b = self.bias(block, sums.ndim)
        if b is not None:
            np.add(sums, b, out=sums)

    def bias(self, block: Block, ndim: int) -> Array | None:
        """The bias that is added to the sums of a block, with so many axes."""
        if self.b is None:
            return None
        N, _, M = self.b.shape
        b = self.b[block.samples if N > 1 else slice(1), block.groups, block.rows if M > 1 else slice(1)]
        return b.astype(self.dtype, copy=False).reshape(*b.shape, *(1,) * (ndim - 3))

    def read(self, samples: slice, groups: slice, channels: slice, low: int, high: int, scratch: Scratch) -> Array:
        """The input from position low to high as (samples, groups, channels, high - low), with zeros outside of it.

        It is a view where BLAS can read the input in place, otherwise a copy in the accumulator's dtype.
        """
        x, L = self.x[samples, groups, channels], self.p.L_in
        if self.x_direct and low >= 0 and high <= L:
            return x if high - low == L else x[..., low:high]
        staged = scratch.take("input", *x.shape[:3], high - low)
        copy_padded(x, low, high, staged)
        return staged

    def store(self, geometry: Geometry, block: Block, sums: Array) -> None:
        """Write `sums` (samples, groups, rows, phases, positions) to the outputs that exist."""
        y, (start, stop) = self.y[block.samples, block.groups, block.rows], block[3:]
        if geometry.phases < limits.MANY_PHASES or stop - start == 1:
            self._store_by_phase(geometry, y, sums, start, start, stop)
            return
        # Position by position: writing phase by phase would touch all cache lines of the output once for each phase.
        step, phase = geometry.out_stride, geometry.out_phase
        reach = (geometry.phases - 1) * phase
        first = min(max(start, -(-geometry.out_left // step)), stop)
        last = max(min(stop, (self.p.L_out - 1 + geometry.out_left - reach) // step + 1), first)
        if first < last:
            at, size = first * step - geometry.out_left, y.strides[3]
            shape = (*y.shape[:3], last - first, geometry.phases)
            outputs = as_strided(y[..., at:], shape, (*y.strides[:3], step * size, phase * size))
            outputs[...] = sums[..., first - start : last - start].swapaxes(3, 4)
        for begin, end in ((start, first), (last, stop)):
            self._store_by_phase(geometry, y, sums, start, begin, end)

    def _store_by_phase(self, geometry: Geometry, y: Array, sums: Array, start: int, begin: int, end: int) -> None:
        """Store the positions begin to end of sums whose first position is `start`."""
        if begin == end:
            return
        for r in range(geometry.phases):
            first, last = geometry.outputs(self.p, r)
            first, last = max(first, begin), min(last, end)
            if first < last:
                y[..., geometry.place(r, first, last)] = sums[..., r, first - start : last - start]


def useful_taps(p: ConvProblem) -> slice:
    """The taps from the first to the last that reads the input for any output; empty if none does."""
    d, left, right = p.dilation, p.padding_left, p.padding_right
    reach, behind = (p.L_in, p.L_out) if p.transposed else (p.L_out, p.L_in)
    # The other taps lie in the padding for all outputs, or contribute only to outputs that are cut off.
    first = max(0, -(((reach - 1) * p.stride - left) // d))
    last = min(p.K, -(-(behind + left) // d))
    if first >= last:
        return slice(0, 0)
    # No more may be cut off a side than its padding, which is negative where the input is cropped.
    return slice(min(first, max(0, left) // d), max(last, p.K - max(0, right) // d))


def with_taps(p: ConvProblem, taps: slice) -> ConvProblem:
    """The problem that has only the `useful_taps`, with the same output."""
    left, right = taps.start * p.dilation, (p.K - taps.stop) * p.dilation
    padding = {"padding_left": p.padding_left - left, "padding_right": p.padding_right - right}
    return replace(p, K=taps.stop - taps.start, **padding)


def exchange(p: ConvProblem) -> ConvProblem:
    """The transposed problem with input and weight exchanged.

    ``l_in*stride + k*dilation`` does not change when positions and taps, and stride and dilation, are exchanged.
    Samples and the output channels of a group are exchanged, too: each sample is then a filter.
    """
    return ConvProblem(
        "conv_transpose1d", p.C_out_g, p.C_in, p.groups * p.N, p.K, p.L_in, p.dilation, p.padding_left, p.padding_right,
        p.stride, p.groups, p.output_padding, p.dtype, p.has_bias,
    )  # fmt: skip
