"""How a problem is cut into parts that are computed one after another, and how much memory that takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from ..dtypes import FORMATS
from ..overlap import Overlap
from ..problem import ConvProblem, WeightGradientProblem

FftProblem: TypeAlias = ConvProblem | WeightGradientProblem

# The most bytes of the samples in a batch of blocks, which then stay in the caches, and of the spectra of taps that are
# in memory at once. If one block or the spectra of one output channel have more, they are computed alone.
BATCH_BYTES = {"cpu": 2**20, "gpu": 2**24}
SPECTRA_BYTES = {"cpu": 2**26, "gpu": 2**29}

# Up to this many products of two spectra are computed one by one. As matrices there would be a product for each
# frequency, and each of NumPy's products of small matrices takes some 200 ns.
SMALL_PRODUCT = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """How a problem is computed: a pure function of the problem and of whether it is on a GPU.

    Attributes:
        given: the problem.
        problem: the problem whose blocks are computed. It differs from `given` if that is a transposed convolution
            whose padding stands for samples of its output: then its output has the padding, too, and the results there
            are added to those samples.
        overlap: the blocks of `problem`.
        groups: how many groups are computed at once.
        channels: how many output channels of each of these groups are computed at once; for a weight gradient those
            of `coarse`.
        batch: how many blocks are computed at once.
        on_gpu: whether the arrays are CuPy's.
    """

    given: FftProblem
    problem: FftProblem
    overlap: Overlap
    groups: int
    channels: int
    batch: int
    on_gpu: bool

    @classmethod
    def of(cls, problem: FftProblem, *, on_gpu: bool) -> Plan:
        p = problem
        if isinstance(p, ConvProblem) and p.transposed and p.padding_mode != "zeros":
            p = replace(p, padding_left=0, padding_right=0, padding_mode="zeros")
        overlap, kind = Overlap.of(p), "gpu" if on_gpu else "cpu"
        channels_read, written = channels_of(p)
        read = channels_read * overlap.phases_in
        of_channel = read * overlap.phases_out * overlap.block * work_dtype(p.dtype).itemsize
        channels = max(1, min(written, SPECTRA_BYTES[kind] // max(1, of_channel)))
        of_block = max(read, channels * overlap.phases_out, 1) * overlap.block * work_dtype(p.dtype).itemsize
        groups = 1
        if channels >= written:
            of_group = max(1, of_channel * written)
            groups = max(1, min(p.groups, SPECTRA_BYTES[kind] // of_group, BATCH_BYTES[kind] // of_block))
        batch = max(1, BATCH_BYTES[kind] // (of_block * groups))
        return cls(problem, p, overlap, groups, channels, batch, on_gpu)

    @property
    def read(self) -> int:
        """The number of input channels of a group times the phases."""
        return channels_of(self.problem)[0] * self.overlap.phases_in

    @property
    def written(self) -> int:
        """The number of output channels of a group that are computed at once, times the phases."""
        return self.channels * self.overlap.phases_out

    @property
    def frequencies(self) -> int:
        return self.overlap.block if self.problem.is_complex else self.overlap.block // 2 + 1

    @property
    def by_matrices(self) -> bool:
        """Whether spectra are multiplied as matrices, with the frequency in front of the channels."""
        if isinstance(self.problem, WeightGradientProblem):
            return self.on_gpu or self.read * self.written > SMALL_PRODUCT
        return self.read > 1 and (self.on_gpu or self.read * self.written * self.batch > SMALL_PRODUCT)

    def flops(self) -> int:
        """Floating-point operations of transforms and of products of spectra.

        A transform of n complex numbers counts as 5*n*log2(n), and one of real numbers as half of that, which is usual.
        """
        o, (read, written) = self.overlap, channels_of(self.problem)
        read, chunks, written = read * o.phases_in, -(-written // self.channels), written * o.phases_out
        blocks = self.problem.N * o.rows * o.blocks
        if self.on_gpu:  # a batch that is not full is filled up with zeros
            blocks = self.batch * math.prod(-(-total // step) for total, step in zip(*self._steps(), strict=True))
        transforms = blocks * (chunks * read + written) + read * written
        one = (5 if self.problem.is_complex else 2.5) * o.block * math.log2(o.block)
        return self.problem.groups * (round(transforms * one) + 8 * blocks * self.frequencies * read * written)

    @property
    def workspace_bytes(self) -> int:
        """A bound on the memory besides the arrays of the call, in bytes.

        It follows from the layer alone, except where results in the padding are added to others: this takes a second
        output.
        """
        size = work_dtype(self.problem.dtype).itemsize
        spectrum, block = self.frequencies * spectral_dtype(self.problem.dtype).itemsize, self.overlap.block * size
        copies = 2 if self.by_matrices else 1  # with the frequency in front, and behind
        # Taps, which are a quarter of a block, and their conjugates beside the spectra.
        taps = self.groups * self.read * self.written * ((copies + 1) * spectrum + block // 2)
        of_read = block * (2 if self.on_gpu else 1) + copies * spectrum
        of_written = block + (copies + (0 if self.by_matrices else 1)) * spectrum
        if isinstance(self.problem, WeightGradientProblem):  # samples, the zeros behind them being added in a copy
            of_written = block * (3 if self.on_gpu else 2) + copies * spectrum
        blocks = self.batch * self.groups * (self.read * of_read + self.written * of_written)
        p = self.problem
        fold = 0
        if isinstance(p, ConvProblem) and isinstance(self.given, ConvProblem) and p is not self.given:
            fold = p.N * p.C_out * (p.L_out + 2 * max(self.given.padding)) * size
        return taps + blocks + fold

    @property
    def spectra_bytes(self) -> int:
        """The bytes of the spectra of all taps."""
        p = self.problem
        spectrum = self.frequencies * spectral_dtype(p.dtype).itemsize
        return p.groups * self.read * channels_of(p)[1] * self.overlap.phases_out * spectrum

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """The groups and the output channels of each of these groups that are computed at once, one pair a step."""
        for first in range(0, self.problem.groups, self.groups):
            groups = slice(first, min(first + self.groups, self.problem.groups))
            for channel in range(0, channels_of(self.problem)[1], self.channels):
                yield groups, slice(channel, min(channel + self.channels, channels_of(self.problem)[1]))

    def _steps(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """How many samples, blocks and rows there are, and how many of each a batch has at most."""
        o = self.overlap
        rows = min(o.rows, self.batch)
        blocks = max(1, min(o.blocks, self.batch // rows))
        return (self.problem.N, o.blocks, o.rows), (self.batch // (rows * blocks), blocks, rows)

    def batches(self) -> Iterator[tuple[slice, slice, slice]]:
        """The samples, rows and blocks that are computed at once, in each batch of at most `batch` blocks."""
        totals, steps = self._steps()
        for n in range(0, totals[0], steps[0]):
            for b in range(0, totals[1], steps[1]):
                for r in range(0, totals[2], steps[2]):
                    first = zip((n, b, r), steps, totals, strict=True)
                    samples, blocks, rows = (slice(i, min(i + step, total)) for i, step, total in first)
                    yield samples, rows, blocks


def channels_of(p: FftProblem) -> tuple[int, int]:
    """Channels of a group that are read in blocks, and those of the result (fine and coarse for a weight gradient)."""
    return (p.C_in_g, p.C_out_g) if isinstance(p, ConvProblem) else (p.C_fine_g, p.C_coarse_g)


def work_dtype(dtype: str) -> np.dtype[Any]:
    """The dtype in which data of a dtype are transformed; results have it until they are rounded."""
    return np.dtype(dtype if FORMATS[dtype].is_complex else FORMATS[dtype].accumulator)


def spectral_dtype(dtype: str) -> np.dtype[Any]:
    """The dtype of the spectra of data of a dtype."""
    return np.result_type(work_dtype(dtype), np.complex64)
