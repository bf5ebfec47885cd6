"""How a problem that is larger than memory is cut into pieces: the arithmetic of `gpuconv.chunked`."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import NamedTuple

from .cases.derived import chunk
from .problem import ConvProblem

_ALIGNED = 64  # outputs, so that the rows of most pieces start at multiples of what kernels access at once


class Piece(NamedTuple):
    """A part of the output.

    Attributes:
        problem: with the extents and the padding of the part.
        samples: along N.
        outputs: along L_out.
        positions: of the input; those outside of the source mean what the padding mode says.
    """

    problem: ConvProblem
    samples: slice
    outputs: slice
    positions: range

    @property
    def of_output(self) -> tuple[slice, ...]:
        p = self.problem
        return (*((self.samples,) if p.batched else ()), slice(0, p.C_out), self.outputs)

    def of_input(self, start: int, stop: int) -> tuple[slice, ...]:
        p = self.problem
        return (*((self.samples,) if p.batched else ()), slice(0, p.C_in), slice(start, stop))


@dataclass(frozen=True)
class Pieces:
    """How a problem is cut: a piece has some whole samples, or some outputs of one sample."""

    problem: ConvProblem
    samples: int
    outputs: int

    @classmethod
    def cut(cls, p: ConvProblem, itemsize: int, out_itemsize: int, max_bytes: int, sets: int) -> Pieces:
        """Cut so that so many sets of arrays of a piece take at most `max_bytes`."""
        limit = max_bytes // sets
        span = p.dilation * (p.K - 1) + 1
        arrays = 2 if p.fuses.has_residual else 1

        def num_bytes(outputs: int) -> int:
            reads = p.L_in
            if outputs < p.L_out:
                reads = (outputs + span) // p.stride + 2 if p.transposed else (outputs - 1) * p.stride + span
            return max(1, 2 * p.C_in * reads * itemsize + arrays * p.C_out * outputs * out_itemsize)

        whole = num_bytes(p.L_out)
        if whole <= limit or (p.transposed and p.L_in == 0):  # without input there is nothing to cut
            return cls(p, max(1, min(p.N, limit // whole)), p.L_out)
        outputs = bisect_right(range(1, p.L_out), limit, key=num_bytes)
        if outputs == 0:
            raise ValueError(
                f"{p.op}: max_bytes must be at least {sets * min(num_bytes(1), whole)} for the input and the output of "
                f"one position, got {max_bytes}"
            )
        return cls(p, 1, outputs - outputs % _ALIGNED if outputs > _ALIGNED else outputs)

    @property
    def rows(self) -> int:
        return -(-self.problem.L_out // self.outputs)

    def __len__(self) -> int:
        return 0 if self.problem.is_empty else -(-self.problem.N // self.samples) * self.rows

    def piece(self, number: int) -> Piece:
        p = self.problem
        n, l_out = number // self.rows * self.samples, number % self.rows * self.outputs
        samples, outputs = slice(n, min(n + self.samples, p.N)), slice(l_out, min(l_out + self.outputs, p.L_out))
        p = replace(p, N=samples.stop - n)
        if self.rows == 1:
            return Piece(p, samples, outputs, range(p.L_in))
        if p.padding_mode == "zeros":
            part, read = chunk(p, outputs.start, outputs.stop)
            return Piece(part, samples, outputs, range(read.start, read.stop))
        left = p.padding_left
        padded = p.L_in + left + p.padding_right
        inside = replace(p, padding_mode="zeros", L_in=padded, padding_left=0, padding_right=0)
        part, read = chunk(inside, outputs.start, outputs.stop)
        return Piece(part, samples, outputs, range(read.start - left, read.stop - left))
