"""How `gpuconv.chunked` and `gpuconv.dask` cut a problem into pieces, and how they compute a piece."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import functional
from .arguments import ArraySpec, Op
from .edge import source_indices
from .fusion import FUSED_ARRAYS, Fused
from .lengths import Samples, follows_length
from .problem import ConvProblem
from .problem.parts import call_settings, chunk
from .real_taps import are_real_taps, check_real_taps

_ALIGNED = 64  # outputs: most pieces are a multiple of this, so that their rows are aligned for wide accesses


class Read(NamedTuple):
    """Samples of the source from `start` to `stop` - 1; `at` selects some of them, None all."""

    start: int
    stop: int
    at: npt.NDArray[np.intp] | None


class Piece(NamedTuple):
    """A part of the output.

    Attributes:
        whole: the problem of which it is a part, as long as the input that the padding mode refers to.
        problem: the problem of the part, with its extents and padding.
        samples: the range along N.
        outputs: the range along L_out.
        positions: the range of the input; the padding mode says what positions outside of the source stand for.
        lengths: those of the samples, where the piece has all outputs of samples of different lengths.
        padding: "same" where the padding of each of these samples follows its length; None for that of `problem`.
    """

    whole: ConvProblem
    problem: ConvProblem
    samples: slice
    outputs: slice
    positions: range
    lengths: tuple[int, ...] | None = None
    padding: str | None = None

    @classmethod
    def of(cls, problem: ConvProblem, samples: slice, outputs: slice) -> Piece:
        """The piece of a problem with these samples and outputs, at least one of each."""
        p = replace(problem, N=samples.stop - samples.start)
        if outputs == slice(0, p.L_out):
            return cls(p, p, samples, outputs, range(p.L_in))
        if p.transposed and p.L_in == 0:  # no output has a term, so any padding will do that leaves their number
            surplus = p.dilation * (p.K - 1) + 1 - p.stride - (outputs.stop - outputs.start)
            part = replace(p, padding_left=0, padding_right=max(surplus, 0), output_padding=max(-surplus, 0))
            return cls(p, part, samples, outputs, range(0))
        if p.padding_mode == "zeros":
            part, read = chunk(p, outputs.start, outputs.stop)
            return cls(p, part, samples, outputs, range(read.start, read.stop))
        left = p.padding_left
        padded = p.L_in + left + p.padding_right
        inside = replace(p, padding_mode="zeros", L_in=padded, padding_left=0, padding_right=0)
        part, read = chunk(inside, outputs.start, outputs.stop)
        return cls(p, part, samples, outputs, range(read.start - left, read.stop - left))

    @property
    def reads(self) -> list[Read]:
        """The reads from the source that give the samples at the positions, in order."""
        first, stop, L_in = self.positions.start, self.positions.stop, self.whole.L_in
        if 0 <= first <= stop <= L_in:
            return [Read(first, stop, None)]
        found = []
        for low, high in ((first, min(stop, 0)), (max(first, 0), min(stop, L_in)), (max(first, L_in), stop)):
            if low >= high:
                continue
            if 0 <= low < L_in:
                found.append(Read(low, high, None))
            else:
                at = source_indices(self.whole.padding_mode, low, high, L_in)
                start = int(at.min())
                found.append(Read(start, int(at.max()) + 1, at - start))
        return found

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
    def cut(
        cls, p: ConvProblem, itemsize: int, out_itemsize: int, max_bytes: int, sets: int, *, has_lengths: bool
    ) -> Pieces:
        """Cut a problem so that the arrays of `sets` pieces take at most `max_bytes`.

        With lengths of samples, a result that ends within its piece is copied in front of zeros.
        """
        limit = max_bytes // sets
        span = p.dilation * (p.K - 1) + 1
        arrays = 1 + p.fuses.has_residual + has_lengths

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
        return Piece.of(p, samples, outputs)


class Lengths(NamedTuple):
    """The samples of a call with lengths of their own.

    Attributes:
        samples: what follows from their lengths.
        padding: "same" where the padding of each follows its length, else None.
    """

    samples: Samples
    padding: str | None

    @classmethod
    def of(cls, problem: ConvProblem, padding: Any, lengths: Any) -> Lengths:
        """Check the lengths; `padding` is the argument of the call.

        Raises:
            ValueError, TypeError: as `Samples.of` raises them.
        """
        follows = follows_length(problem, padding)
        return cls(Samples.of(problem.op, problem, padding, lengths), "same" if follows else None)

    def parts(self, problem: ConvProblem, samples: slice, outputs: slice) -> list[Piece]:
        """The pieces of the problem that these samples and outputs need. All other outputs are zero."""
        p, found = problem, self.samples
        if outputs == slice(0, p.L_out):
            lengths = tuple(found.L_in[samples].tolist())
            return [Piece.of(p, samples, outputs)._replace(lengths=lengths, padding=self.padding)]
        parts = []
        for start, stop in Samples(*(array[samples] for array in found)).runs():
            n = samples.start + start
            last = min(outputs.stop, int(found.L_out[n]))
            if outputs.start < last:
                left, right = int(found.padding_left[n]), int(found.padding_right[n])
                alone = replace(p, L_in=int(found.L_in[n]), padding_left=left, padding_right=right)
                parts.append(Piece.of(alone, slice(n, samples.start + stop), slice(outputs.start, last)))
        return parts


def problem_of(
    op: Op, source: Any, weight: Any, bias: Any | None, settings: tuple[Any, ...], fused: Fused
) -> tuple[ConvProblem, np.dtype[Any], np.dtype[Any]]:
    """The problem, and the dtypes of input and output in native byte order; of real taps the problem of each part.

    Of the arrays only `.shape` and `.dtype` are read.
    """
    dtype = np.dtype(source.dtype).newbyteorder("=")
    if not are_real_taps(weight, source):
        p = ConvProblem.of(op, source, weight, bias, *settings).fused(fused)
        return p, dtype, dtype if p.out_dtype is None else np.dtype(p.out_dtype)
    given = {"input": source, "weight": weight, "bias": bias, "residual": fused.arrays[0]}
    check_real_taps(op, {name: array for name, array in given.items() if array is not None}, fused.fusion)
    real = (None if a is None else ArraySpec(tuple(a.shape), weight.dtype) for a in (source, weight, bias))
    residual = fused.arrays[0]
    added = None if residual is None else ArraySpec(tuple(residual.shape), weight.dtype)
    of_part = Fused(fused.fusion, (added, *fused.arrays[1:]))
    return ConvProblem.of(op, *real, *settings).fused(of_part), dtype, dtype


def compute(
    piece: Piece,
    input: Any,
    residual: Any | None,
    weight: Any,
    bias: Any | None,
    *of_channels: Any,
    algorithm: str | None,
) -> Any:
    """The output of a piece; `of_channels` are the arrays of activations, in their order."""
    p, settings = piece.problem, call_settings(piece.problem)
    if piece.padding is not None:
        settings["padding"] = piece.padding
    function: Callable[..., Any] = functional.conv_transpose1d if p.transposed else functional.conv1d
    fused = p.fuses.as_arguments(dict(zip(FUSED_ARRAYS[1:], of_channels, strict=True)))
    return function(
        input, weight, bias, **settings, **fused, algorithm=algorithm, residual=residual, lengths=piece.lengths
    )
