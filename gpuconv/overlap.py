"""How a convolution, its transpose and its weight gradient become blocks of rows that overlap, for `gpuconv.fft`.

With stride s, dilation d and g = gcd(s, d), write a tap as ``k = j*(s/g) + i`` and an output of conv1d as
``l_out = m*(d/g) + r``. The input that it reads is then ``l_in = lcm(s, d)*(m + j) + s*r + d*i - padding_left``. So the
samples whose r and i are fixed form a row of their own, and the operation is a sum over channels c and phases i of
correlations without stride and dilation::

    y[r, c_out][m] = sum over c, i, j of w[c_out, c, i][j] * x[r, c, i][m + j]

For conv_transpose1d the roles are exchanged: the phases belong to the output, and the taps of a phase are reversed.
Each row is cut into blocks: a block of B samples gives B - J + 1 results, where J is the number of taps of a phase.

Block lengths depend only on the number of taps of a phase, and the layer's settings determine where blocks begin, so
that neither N nor L changes which samples share a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from .edge import source_indices
from .problem import ConvProblem, WeightGradientProblem

# The shortest block, and the least ratio of its length to the taps of a phase, with which three quarters of a block are
# new samples. Blocks of twice that length would need a tenth less work, but twice the memory.
SHORTEST_BLOCK = 64
BLOCK_OF_TAPS = 4


class Places(NamedTuple):
    """Where the samples of rows lie: sample m of row r, phase i at ``step*m + row_step*r + phase_step*i + first``."""

    step: int
    row_step: int
    phase_step: int
    first: int

    def at(self, m: int, r: int, i: int) -> int:
        return self.step * m + self.row_step * r + self.phase_step * i + self.first

    def between(self, low: int, high: int, m: int, count: int, r: int, i: int) -> tuple[int, int]:
        """The range of those of `count` samples from m on that lie at positions from low to high - 1."""
        at = self.at(m, r, i)
        first = min(max(0, -((at - low) // self.step)), count)
        return first, max(first, min(count, -((at - high) // self.step)))


@dataclass(frozen=True, slots=True)
class Overlap:
    """The rows and blocks of a problem.

    Attributes:
        taps: J, the taps of a phase.
        phases: s/g, the distance of the taps of a phase, or K if that is less; the last phases may have one tap fewer.
        rows: d/g, the rows of each sample and channel, or the number of results if that is less.
        block: B, the samples of a block.
        read: the places of the samples in the input, of conv1d's weight gradient in `fine`.
        write: those of the results in the output, of the samples in `coarse`.
        start, stop: the results m of each row that are computed.
        mode, left, right: the padding of the input.
        transposed: whether the phases belong to the output.
    """

    taps: int
    phases: int
    rows: int
    block: int
    read: Places
    write: Places
    start: int
    stop: int
    mode: str
    left: int
    right: int
    transposed: bool

    @classmethod
    def of(cls, problem: ConvProblem | WeightGradientProblem) -> Overlap:
        """The rows and blocks of a problem; a transposed one must be padded with zeros."""
        p = problem
        common = math.gcd(p.stride, p.dilation)
        step, spacing = p.stride // common, p.dilation // common
        taps, phases = -(-p.K // step), min(step, p.K)
        block = max(SHORTEST_BLOCK, 1 << (BLOCK_OF_TAPS * taps - 1).bit_length())
        fine = Places(step * p.dilation, p.stride, p.dilation, -p.padding_left)
        coarse = Places(spacing, 1, 0, 0)
        right = 0
        if isinstance(p, WeightGradientProblem):
            positions = p.L_coarse
            right = max(0, (p.L_coarse - 1) * p.stride + (p.K - 1) * p.dilation + 1 - p.padding_left - p.L_fine)
        else:
            positions, right = p.L_in if p.transposed else p.L_out, p.padding_right
        start, stop, rows = 0, -(-positions // spacing), min(spacing, positions)
        if p.transposed and isinstance(p, ConvProblem):
            # Result m sums the inputs m - (taps - 1) to m. Results before `start` are trimmed by the padding.
            reach = p.stride * (spacing - 1) + p.dilation * (phases - 1)
            start = max(0, -((reach - p.padding_left) // fine.step))
            stop = max(start, min(stop + taps - 1, -(-(p.L_out + p.padding_left) // fine.step)))
            coarse = coarse._replace(first=-spacing * (taps - 1))
            return cls(taps, phases, rows, block, coarse, fine, start, stop, "zeros", 0, 0, True)
        return cls(taps, phases, rows, block, fine, coarse, start, stop, p.padding_mode, p.padding_left, right, False)

    @property
    def new(self) -> int:
        """The results of a block."""
        return self.block - self.taps + 1

    @property
    def blocks(self) -> int:
        """The number of blocks of a row."""
        return -(-(self.stop - self.start) // self.new)

    @property
    def phases_in(self) -> int:
        """The phases of each channel of the input."""
        return 1 if self.transposed else self.phases

    @property
    def phases_out(self) -> int:
        """The phases of each channel of the output."""
        return self.phases if self.transposed else 1

    def taps_of(self, weight: Any, groups: int, xp: ModuleType) -> Any:
        """The weight (C_out, C_in/groups, K), or (C_in, C_out/groups, K) of a transposed problem, by phases.

        Returns:
            (groups, C_out/groups * phases_out, C_in/groups * phases_in, taps), which correlate.
        """
        first, second, K = weight.shape
        w = xp.zeros((first, second, self.taps * self.phases), weight.dtype)
        w[..., :K] = weight
        w = w.reshape(groups, first // groups, second, self.taps, self.phases)
        if self.transposed:
            w = w[..., ::-1, :].transpose(0, 2, 4, 1, 3)
            return w.reshape(groups, second * self.phases, first // groups, self.taps)
        return w.transpose(0, 1, 2, 4, 3).reshape(groups, first // groups, second * self.phases, self.taps)

    def weight_of(self, sums: Any, K: int) -> Any:
        """The inverse of `taps_of` where it is not transposed: (C_out, C_in/groups, K) of (C_out, channels, taps)."""
        first, channels, taps = sums.shape
        w = sums.reshape(first, channels // self.phases, self.phases, taps).swapaxes(2, 3)
        return w.reshape(first, channels // self.phases, taps * self.phases)[..., :K]

    def windows(self, x: Any, rows: slice, blocks: slice, dtype: Any, xp: ModuleType) -> Any:
        """Blocks of the input, (N, C, L).

        Returns:
            (N, rows, blocks, C * phases_in, block), a view of rows in `dtype`.
        """
        return self._blocks(x, self.read, self.phases_in, rows, blocks, self.block, self.mode, dtype, xp)

    def pieces(self, coarse: Any, rows: slice, blocks: slice, dtype: Any, xp: ModuleType) -> Any:
        """The `new` samples of `coarse` that belong to the same blocks, (N, rows, blocks, C, new)."""
        return self._blocks(coarse, self.write, 1, rows, blocks, self.new, "zeros", dtype, xp)

    def _blocks(
        self,
        x: Any,
        places: Places,
        phases: int,
        rows: slice,
        blocks: slice,
        length: int,
        mode: str,
        dtype: Any,
        xp: ModuleType,
    ) -> Any:
        N, C, L = x.shape
        count, start = blocks.stop - blocks.start, self.start + blocks.start * self.new
        # Results from `stop` on do not exist, so samples that only these would read are not needed.
        length_of_row = (count - 1) * self.new + length
        samples = min(length_of_row, self.stop - start + length - self.new)
        staged = xp.empty((N, rows.stop - rows.start, C, phases, length_of_row), dtype)
        staged[..., samples:] = 0
        for r in range(rows.start, rows.stop):
            for i in range(phases):
                row = staged[:, r - rows.start, :, i, :samples]
                first, last = places.between(0, L, start, samples, r, i)
                row[..., :first] = 0
                row[..., last:] = 0
                at = places.at(start, r, i)
                row[..., first:last] = x[..., at + places.step * first : at + places.step * last : places.step]
                if mode != "zeros":
                    for low, high in ((-self.left, 0), (L, L + self.right)):
                        first, last = places.between(low, high, start, samples, r, i)
                        if first < last:
                            ends = at + places.step * first, at + places.step * last
                            meant = xp.asarray(source_indices(mode, *ends, L, places.step))
                            row[..., first:last] = x[..., meant]
        n, r, _, i, one = staged.strides
        shape = (N, staged.shape[1], count, C * phases, length)
        return xp.lib.stride_tricks.as_strided(staged, shape, (n, r, self.new * one, i, one))

    def store(self, results: Any, output: Any, rows: slice, blocks: slice, xp: ModuleType) -> None:
        """Write results (N, rows, blocks, C * phases_out, new) of blocks to the output (N, C, L), where they exist."""
        N, C, L = output.shape
        new, step = self.new, self.write.step
        count, start = (blocks.stop - blocks.start) * new, self.start + blocks.start * new
        count = min(count, self.stop - start)
        for r in range(rows.start, rows.stop):
            for i in range(self.phases_out):
                of_row = results[:, r - rows.start, :, i :: self.phases_out]  # (N, blocks, C, new)
                at, stop = self.write.between(0, L, start, count, r, i)
                while at < stop:
                    block, skipped = divmod(at, new)
                    whole = 0 if skipped else (stop - at) // new
                    several, length = (whole, new) if whole else (1, min(new - skipped, stop - at))
                    target = output[..., self.write.at(start + at, r, i) :]
                    n, c, one = target.strides
                    target = xp.lib.stride_tricks.as_strided(
                        target, (N, several, C, length), (n, new * step * one, c, step * one)
                    )
                    target[...] = of_row[:, block : block + several, :, skipped : skipped + length]
                    at += several * length
