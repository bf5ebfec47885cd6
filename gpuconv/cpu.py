"""The NumPy path: both operations on the CPU, through BLAS as NumPy offers it, with bounded extra memory.

A transposed problem is seen as an ordinary convolution that yields `stride` neighbouring outputs, its phases, at each
position (`_Geometry`). The output is cut into blocks, and `method` chooses, from the problem alone, how a block is
computed:

- taps: one product ``weight[:, :, k] @ input[:, shifted]`` per tap, summed. Padding is left out rather than multiplied
  by, so this form serves every problem and every value. Where a group has one input channel the product is elementwise.
- panels: the windows of a block are copied side by side into a panel, for one product with the weight as it lies.
- shift-add: one product of all taps with the input as it lies, whose rows are then shifted and summed.
- toeplitz: neighbouring outputs of one group together, as the product of their common window with a banded matrix.

Panels and toeplitz multiply zeros: padding, absent taps, the rest of the band. A zero is harmless until it meets an
infinity or a NaN; the element it spoils is then not finite either. So each block that could be spoilt is checked while
it is in the cache, and one that is not finite is computed again by taps.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from .problem import ITEMSIZE, ConvProblem

Array = npt.NDArray[Any]

_MIB = 1024 * 1024

_ACCUMULATOR = {"float16": "float32", "bfloat16": "float32"}

# The memory that all scratch buffers of a call may take, or a quarter of input and output where that is more. It limits
# the number of threads.
_WORKSPACE = 28 * _MIB

# Bytes of single buffers: a packed weight; each buffer where there is one thread, and where there are several; the
# sums of several; the staged input of several; a block of the elementwise form. A NumPy call must last long enough for
# the threads not to wait for each other's interpreter, and yet its operands stay in the cache.
_PACKED_WEIGHT = 6 * _MIB
_BUFFER = 4 * _MIB
_CONCURRENT_BUFFER = 2 * _MIB
_SUMS = 1 * _MIB
_STAGED_INPUT = 1 * _MIB
_ELEMENTWISE_BLOCK = 512 * 1024

# OpenBLAS computes a product of at most this many multiply-adds on the calling thread (interface/gemm.c); of real data
# with AVX-512 larger ones too, without packing the operands (sgemm_small_kernel_permit_skylakex.c). Only such products
# run at the same time on several threads; larger ones take turns, each on all threads of the library.
_SMALL_PRODUCT = 64**3
_SMALL_PRODUCT_AVX512 = 100**3

# Rows and columns of a small product, and its depth where its columns are multiplied by several tiles of rows: 32 KiB
# of float32 columns stay in the first-level cache.
_SMALL_TILE = 64
_SMALL_DEPTH = 128

# Phases from which an output is written position by position: NumPy's inner loop is then long enough.
_MANY_PHASES = 16

# Operations from which small products pay where there are several tiles of rows.
_WORTH_SMALL_PRODUCTS = 500_000_000

# Nanoseconds of work from which a second thread pays.
_WORTH_THREADS = 2_000_000

_MAX_WORKERS = 16

# Outputs that are worth the interpreter's time for a block, some 50 us.
_WORTH_A_BLOCK = 256 * 1024


@dataclass(frozen=True, slots=True)
class Method:
    """How a problem is computed on the CPU.

    Attributes:
        name: the special form.
        reason: why it is chosen.
        workspace_bytes: a bound on the memory used beyond input, weight, bias and output.
    """

    name: str
    reason: str
    workspace_bytes: int


def method(problem: ConvProblem) -> Method:
    """The form that `convolve` uses for a problem: a pure function of the problem."""
    return _plan(problem).method


def convolve(problem: ConvProblem, input: Array, weight: Array, bias: Array | None, output: Array) -> None:
    """Compute a problem into `output`, every element of it.

    float16 and bfloat16 are summed in float32, the bias included, and rounded once. A NaN or an infinity reaches only
    the outputs whose windows contain it.

    Args:
        problem: extents and settings; the arrays agree with it.
        input: `problem.input_shape`, native byte order, any strides.
        weight: `problem.weight_shape`, likewise.
        bias: `problem.bias_shape` or None, likewise.
        output: `problem.output_shape`, any strides; it overlaps no other argument.
    """
    plan = _plan(problem)
    plan.form.run(_Call(problem, input, weight, bias, output), plan.workers)


# -- the problem as the forms see it ---------------------------------------------------------------------------------


class _Geometry(NamedTuple):
    """A convolution that yields `phases` outputs at each position.

    Position q of tap group j reads the input at ``q*stride + offset + j*dilation``. Phase r of tap group j is the tap
    ``k = j*interleave + r`` and makes the output that `_outputs` gives; a conv1d has one phase.
    """

    stride: int
    offset: int
    dilation: int
    tap_groups: int
    phases: int
    interleave: int

    @classmethod
    def of(cls, p: ConvProblem) -> _Geometry:
        """Of a problem that `_has_geometry`."""
        if not p.transposed:
            return cls(p.stride, -p.padding_left, p.dilation, p.K, 1, 1)
        return cls(1, 0, -p.dilation, -(-p.K // p.stride), min(p.stride, p.K), p.stride)

    def window(self, start: int, stop: int, taps: slice) -> tuple[int, int]:
        """The input positions that these tap groups of the positions start to stop read: first, and behind the last."""
        ends = (taps.start * self.dilation, (taps.stop - 1) * self.dilation)
        return start * self.stride + self.offset + min(ends), (stop - 1) * self.stride + self.offset + max(ends) + 1

    def reading(self, j: int, start: int, stop: int, low: int, high: int) -> tuple[int, int, slice]:
        """Those of the positions start to stop whose tap group j reads the input between low and high (from, to).

        Also what they read.
        """
        shift = self.offset + j * self.dilation
        first = min(max(start, -((shift - low) // self.stride)), stop)
        last = max(min(stop, -((shift - high) // self.stride)), first)
        return first, last, slice(first * self.stride + shift, (last - 1) * self.stride + shift + 1, self.stride)


def _has_geometry(p: ConvProblem) -> bool:
    """Not a transposed problem with both a stride and a dilation: its phases read different positions."""
    return not (p.transposed and p.stride > 1 and p.dilation > 1)


def _positions(p: ConvProblem) -> tuple[int, int]:
    """The range of the positions q of a problem: outputs for conv1d, outputs/stride for conv_transpose1d."""
    if not p.transposed:
        return 0, p.L_out
    return p.padding_left // p.stride, -(-(p.L_out + p.padding_left) // p.stride)


def _outputs(p: ConvProblem, phase: int, start: int, stop: int) -> tuple[int, int, slice]:
    """Those of the positions start to stop whose output of this phase exists (from, to), and where it lies.

    Phase r of position q is the output at ``q*stride + r - padding_left`` of a transposed problem; at q of a conv1d.
    """
    if not p.transposed:
        return start, stop, slice(start, stop)
    shift = phase - p.padding_left
    low = max(start, -(shift // p.stride))
    high = max(low, min(stop, -((shift - p.L_out) // p.stride)))
    return low, high, slice(low * p.stride + shift, high * p.stride + shift - p.stride + 1, p.stride)


def accumulator(dtype: str) -> np.dtype[Any]:
    """The dtype in which data of a dtype are summed."""
    return np.dtype(_ACCUMULATOR.get(dtype, dtype))


def _accumulator_size(p: ConvProblem) -> int:
    return ITEMSIZE[_ACCUMULATOR.get(p.dtype, p.dtype)]


class _Block(NamedTuple):
    """A part of the output: samples, groups, output channels of each group, and the positions start to stop."""

    samples: slice
    groups: slice
    rows: slice
    start: int
    stop: int


class Scratch:
    """Buffers that one worker uses again for each of its blocks."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._buffers: dict[str, Array] = {}

    def take(self, name: str, *shape: int) -> Array:
        size = math.prod(shape)
        buffer = self._buffers.pop(name, None)
        if buffer is None or buffer.size < size:
            del buffer  # before its successor is allocated
            buffer = np.empty(size, self._dtype)
        self._buffers[name] = buffer
        return buffer[:size].reshape(shape)


class _Call:
    """The arrays of one call, as views with the groups split off.

    Attributes:
        x: (N, groups, C_in_g, L_in).
        w: (groups, C_out_g, C_in_g, K), for both operations.
        b: (groups, C_out_g) or None.
        y: (N, groups, C_out_g, L_out).
        dtype: the accumulator.
        x_direct: BLAS can read x as it lies.
        y_direct: BLAS can write y as it lies.
    """

    __slots__ = ("b", "dtype", "p", "w", "x", "x_direct", "y", "y_direct")

    def __init__(self, p: ConvProblem, input: Array, weight: Array, bias: Array | None, output: Array) -> None:
        G, C, M = p.groups, p.C_in_g, p.C_out_g
        self.p = p
        self.dtype = accumulator(p.dtype)
        self.x = input.reshape(p.N, G, C, p.L_in)
        self.w = weight.reshape(G, C, M, p.K).transpose(0, 2, 1, 3) if p.transposed else weight.reshape(G, M, C, p.K)
        self.b = None if bias is None else bias.reshape(G, M)
        self.y = output.reshape(p.N, G, M, p.L_out)
        self.x_direct = is_direct(self.x, self.dtype)
        self.y_direct = is_direct(self.y, self.dtype)

    def fill_with_bias(self) -> None:
        self.y[...] = 0 if self.b is None else self.b[:, :, None]

    def bias(self, groups: slice, rows: slice) -> Array | None:
        """(groups, rows) in the accumulator's dtype."""
        return None if self.b is None else self.b[groups, rows].astype(self.dtype, copy=False)

    def read(self, samples: slice, groups: slice, channels: slice, low: int, high: int, scratch: Scratch) -> Array:
        """The input from position low to high as (samples, groups, channels, high - low), zeros outside of it.

        A view where BLAS can read the input as it lies, else a copy in the accumulator's dtype.
        """
        x = self.x[samples, groups, channels]
        if self.x_direct and low >= 0 and high <= self.p.L_in:
            return x[..., low:high]
        staged = scratch.take("input", *x.shape[:3], high - low)
        first = min(max(low, 0), high)
        last = max(min(high, self.p.L_in), first)
        staged[..., : first - low] = 0
        staged[..., first - low : last - low] = x[..., first:last]
        staged[..., last - low :] = 0
        return staged

    def store(self, block: _Block, sums: Array) -> None:
        """Write `sums` (samples, groups, rows, phases, positions) to the outputs."""
        p, (samples, groups, rows, start, stop) = self.p, block
        y, R = self.y[samples, groups, rows], sums.shape[3]
        if R == p.stride >= _MANY_PHASES and stop - start > 1:
            # Position by position: to write each phase apart would touch all cache lines of the output R times.
            at = start * p.stride - p.padding_left
            if at < 0:
                y[..., : at + R] = sums[..., -at:, 0]
                sums, at = sums[..., 1:], at + p.stride
            end = at + (sums.shape[4] - 1) * p.stride
            if end + R > p.L_out:
                y[..., end:] = sums[..., : p.L_out - end, -1]
                sums = sums[..., :-1]
            whole = sums.shape[4]
            outputs = y[..., at : at + whole * R].reshape(*y.shape[:3], whole, R)
            outputs[...] = sums.swapaxes(3, 4)
            return
        for r in range(R):
            low, high, of_phase = _outputs(p, r, start, stop)
            if low < high:
                y[..., of_phase] = sums[..., r, low - start : high - start]


def is_direct(array: Array, dtype: np.dtype[Any]) -> bool:
    """Whether BLAS takes the matrices (..., rows, positions) of an array: unit stride in rows that do not overlap."""
    size, strides = dtype.itemsize, array.strides
    return (
        array.dtype == dtype
        and array.flags.aligned
        and strides[3] == size
        and strides[2] % size == 0
        and (strides[2] >= array.shape[3] * size or array.shape[2] == 1)
    )


def is_finite(block: Array) -> bool:
    return bool(np.isfinite(block).all())


def _either(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    """The buffers that serve two uses one after the other."""
    return {name: max(a.get(name, 0), b.get(name, 0)) for name in a | b}


def slices(start: int, stop: int, length: int) -> list[slice]:
    if 0 < stop - start <= length:
        return [slice(start, stop)]
    return [slice(at, min(at + length, stop)) for at in range(start, stop, length)]


def _fit(budget: int, *extents: int) -> list[int]:
    """The largest blocks of at most `budget` elements, whose first extents are filled first; at least 1 each."""
    sizes = []
    for extent in extents:
        sizes.append(max(1, min(extent, budget)))
        budget //= sizes[-1]
    return sizes


class _Form(Protocol):
    """A way to compute a problem, with its block sizes."""

    @property
    def concurrent(self) -> bool:
        """Whether blocks are computed on several threads; elsewhere the threads are left to BLAS."""

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        """Bounds on the elements of the scratch buffers: what all threads share, and what each has by name."""

    def run(self, call: _Call, workers: int) -> None:
        """Compute the call on at most so many threads."""


def _run_blocks(call: _Call, compute: Callable[..., None], blocks: Sequence[tuple[Any, ...]], workers: int) -> None:
    """Call ``compute(call, *block, scratch)`` for each block; the blocks write disjoint parts of the output."""
    run_blocks(partial(compute, call), blocks, workers, call.dtype, call.p.L_out)


def run_blocks(
    compute: Callable[..., None], blocks: Sequence[tuple[Any, ...]], workers: int, dtype: np.dtype[Any], length: int
) -> None:
    """Call ``compute(*block, scratch)`` for each block, on at most so many threads.

    The blocks write disjoint places, so neither their order nor the number of threads changes a bit. `dtype` is that of
    the scratch buffers, `length` that of the rows that are computed on.
    """
    workers = min(workers, len(blocks), _usable_cpus()) if workers > 1 else 1
    pending = deque(blocks)

    def work() -> None:
        scratch = Scratch(dtype)
        # NumPy copies rows that are shorter than its buffer into it before it computes, even where nothing is to be
        # converted; a buffer shorter than the rows keeps it from doing so.
        buffer_size = np.setbufsize(64 if length >= 64 else 8192)
        try:
            with np.errstate(all="ignore"):
                while pending:
                    try:
                        block = pending.popleft()
                    except IndexError:  # another thread took the last one
                        return
                    compute(*block, scratch)
        finally:
            np.setbufsize(buffer_size)

    if workers <= 1:
        work()
        return
    with ThreadPoolExecutor(workers - 1, thread_name_prefix="gpuconv") as pool:
        others = [pool.submit(work) for _ in range(workers - 1)]
        work()
        for other in others:
            other.result()


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class _Fill:
    """The bias, or zeros: every sum is empty, or there is no output."""

    concurrent: bool = False

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        return 0, {}

    def run(self, call: _Call, workers: int) -> None:
        call.fill_with_bias()


# -- taps ------------------------------------------------------------------------------------------------------------


class _Phase(NamedTuple):
    """The taps of one phase as (k, shift): position q reads the input at ``q*step + shift``."""

    phase: int
    step: int
    taps: tuple[tuple[int, int], ...]


@lru_cache(maxsize=256)
def _phases(p: ConvProblem) -> tuple[_Phase, ...]:
    """The phases that have taps."""
    if not p.transposed:
        return (_Phase(0, p.stride, tuple((k, k * p.dilation - p.padding_left) for k in range(p.K))),)
    taps: dict[int, list[tuple[int, int]]] = {}
    for k in range(p.K):
        position, phase = divmod(k * p.dilation, p.stride)
        taps.setdefault(phase, []).append((k, -position))
    return tuple(_Phase(phase, 1, tuple(taps[phase])) for phase in sorted(taps))


@dataclass(frozen=True, slots=True)
class _Taps:
    """One product per tap, summed: blocks of `samples`, `groups`, `rows`, `length`, products over `channels`."""

    samples: int
    groups: int
    rows: int
    length: int
    channels: int
    concurrent: bool

    @classmethod
    def of(cls, p: ConvProblem) -> _Taps:
        if p.C_in_g == 1:
            block = _ELEMENTWISE_BLOCK // _accumulator_size(p)
            length, rows, groups, samples = _fit(block, p.L_out, p.C_out_g, p.groups, p.N)
            return cls(samples, groups, rows, length, 1, True)
        budget = _SUMS // _accumulator_size(p)
        rows, channels = min(p.C_out_g, 256), min(p.C_in_g, 256)
        largest = max(rows, channels)
        length = min(p.L_out, budget // largest)
        groups = max(1, min(p.groups, budget // (largest * max(length, min(rows, channels)))))
        samples = max(1, min(p.N, budget // (largest * length * groups)))
        return cls(samples, groups, rows, length, channels, False)

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        return 0, self.block_memory(p, self.samples, self.groups, self.rows, self.length)

    def block_memory(self, p: ConvProblem, samples: int, groups: int, rows: int, length: int) -> dict[str, int]:
        """As `memory`, for `compute` on a block of this size."""
        groups, rows = min(groups, self.groups), min(rows, self.rows)
        columns = min(samples, self.samples) * min(length, self.length)
        buffers = dict.fromkeys(("sums", "product"), groups * rows * columns)
        buffers["input"] = _STAGED_INPUT // _accumulator_size(p)
        if p.C_in_g > 1:
            buffers |= {"tap": groups * rows * self.channels, "shifted": groups * self.channels * columns}
        return buffers

    def run(self, call: _Call, workers: int) -> None:
        p = call.p
        if p.transposed and len(_phases(p)) < p.stride:
            call.fill_with_bias()
        everything = _Block(slice(0, p.N), slice(0, p.groups), slice(0, p.C_out_g), *_positions(p))
        _run_blocks(call, self._compute_phase, list(self._cut(p, everything)), workers)

    def compute(self, call: _Call, block: _Block, scratch: Scratch) -> None:
        """Compute a part of an output whose rest another form computes."""
        for phase, part in self._cut(call.p, block):
            self._compute_phase(call, phase, part, scratch)

    def _cut(self, p: ConvProblem, block: _Block) -> Iterator[tuple[_Phase, _Block]]:
        for phase in _phases(p):
            low, high, _ = _outputs(p, phase.phase, block.start, block.stop)
            for n in slices(block.samples.start, block.samples.stop, self.samples):
                for g in slices(block.groups.start, block.groups.stop, self.groups):
                    for m in slices(block.rows.start, block.rows.stop, self.rows):
                        for at in slices(low, high, self.length):
                            yield phase, _Block(n, g, m, at.start, at.stop)

    def _compute_phase(self, call: _Call, phase: _Phase, block: _Block, scratch: Scratch) -> None:
        p, (samples, groups, rows, start, stop) = call.p, block
        at = _outputs(p, phase.phase, start, stop)[2]
        y = call.y[samples, groups, rows, at]
        direct = call.y_direct and at.step in (None, 1)
        sums = y if direct else scratch.take("sums", *y.shape)
        terms = []
        for k, shift in phase.taps:
            low = max(start, -(shift // phase.step))
            high = min(stop, (p.L_in - 1 - shift) // phase.step + 1)
            if low < high:
                read = slice(low * phase.step + shift, (high - 1) * phase.step + shift + 1, phase.step)
                terms.append((slice(low - start, high - start), k, read))
        # A tap that feeds every output of the block goes first: its product need not be added to anything.
        terms.sort(key=lambda term: term[0].start - term[0].stop)
        fresh = bool(terms) and terms[0][0] == slice(0, stop - start)
        if not fresh:
            sums[...] = 0
        x, origin = call.x[samples, groups], 0
        if terms and x.dtype != call.dtype:
            low, high = min(term[2].start for term in terms), max(term[2].stop for term in terms)
            if math.prod(x.shape[:3]) * (high - low) * call.dtype.itemsize <= _STAGED_INPUT:
                staged = scratch.take("input", *x.shape[:3], high - low)
                staged[...] = x[..., low:high]
                x, origin = staged, low
        for c in slices(0, p.C_in_g, self.channels):
            for fed, k, read in terms:
                x_tap = x[:, :, c, read.start - origin : read.stop - origin : phase.step]
                w_tap = call.w[groups, rows, c, k]
                product = sums if fresh else scratch.take("product", *sums.shape[:3], fed.stop - fed.start)
                if p.C_in_g == 1:
                    np.multiply(x_tap, w_tap, out=product, dtype=call.dtype)
                else:
                    _multiply_tap(w_tap, x_tap, product, scratch)
                if not fresh:
                    np.add(sums[..., fed], product, out=sums[..., fed])
                fresh = False
        bias = call.bias(groups, rows)
        if bias is not None:
            sums += bias[:, :, None]
        if not direct:
            y[...] = sums


def _multiply_tap(w_tap: Array, x_tap: Array, product: Array, scratch: Scratch) -> None:
    """``product[n, g] = w_tap[g] @ x_tap[n, g]``, both operands first brought into the form that BLAS takes."""
    w_packed = scratch.take("tap", *w_tap.shape)
    w_packed[...] = w_tap
    if not is_direct(x_tap, product.dtype):
        x_packed = scratch.take("shifted", *x_tap.shape)
        x_packed[...] = x_tap
        x_tap = x_packed
    np.matmul(w_packed, x_tap, out=product)


# -- forms that multiply by the weight as a matrix -------------------------------------------------------------------


class _Blocking(NamedTuple):
    """Block sizes. Of a weight that BLAS cannot read as it lies, `weight_rows` of `weight_groups` are packed at a time.

    Products have at most `tile_rows` rows and `tile` columns.
    """

    samples: int
    groups: int
    rows: int
    length: int
    tile_rows: int
    tile: int
    weight_groups: int
    weight_rows: int

    def run(
        self,
        call: _Call,
        weight: Array | None,
        pack: Callable[[Array, Scratch], Array],
        compute: Callable[[_Call, Array, _Block, Scratch], None],
        workers: int,
    ) -> None:
        """Compute all blocks from the weight (groups, rows*n, depth) for some n, or, if it is None, from packed parts.

        `pack` takes a part (groups, rows, C_in_g, K) of the weight and returns (groups, rows*n, depth).
        """
        p = call.p
        per_groups, per_rows = (self.weight_groups, self.weight_rows) if weight is None else (p.groups, p.C_out_g)
        packed = Scratch(call.dtype)
        first, last = _positions(p)
        if (p.N, p.groups, p.C_out_g, last - first) == self[:4] and (p.groups, p.C_out_g) == (per_groups, per_rows):
            # A small problem is one block, and its time is mostly that of the interpreter.
            matrix = pack(call.w, packed) if weight is None else weight
            block = _Block(slice(0, p.N), slice(0, p.groups), slice(0, p.C_out_g), first, last)
            with np.errstate(all="ignore"):
                compute(call, matrix, block, Scratch(call.dtype))
            return
        columns = [(samples, at) for samples in slices(0, p.N, self.samples) for at in slices(first, last, self.length)]
        for g in slices(0, p.groups, per_groups):
            for m in slices(0, p.C_out_g, per_rows):
                matrix = pack(call.w[g, m], packed) if weight is None else weight
                per_row = matrix.shape[1] // (m.stop - m.start)
                blocks = []
                for groups in slices(g.start, g.stop, self.groups):
                    for rows in slices(m.start, m.stop, self.rows):
                        part = matrix[
                            groups.start - g.start : groups.stop - g.start,
                            (rows.start - m.start) * per_row : (rows.stop - m.start) * per_row,
                        ]
                        blocks += [(part, _Block(n, groups, rows, at.start, at.stop)) for n, at in columns]
                _run_blocks(call, compute, blocks, workers)

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
        """Cut a number of columns into runs of equal tiles: (from, to, columns of a tile)."""
        whole = columns - columns % self.tile
        runs = ((0, whole, self.tile), (whole, columns, columns - whole))
        return [run for run in runs if run[0] < run[1]]


def _tiled(matrix: Array, tile: int) -> Array:
    """A view of (..., rows, columns) as (..., tiles, rows, tile)."""
    tiles: Array = matrix.reshape(*matrix.shape[:-1], -1, tile).swapaxes(-3, -2)
    return tiles


def _parts(p: ConvProblem) -> int:
    """Into how many blocks at least to cut a problem that several threads share."""
    return max(1, min(16, p.N * p.C_out * p.L_out // _WORTH_A_BLOCK))


def _small_product(p: ConvProblem) -> int:
    return small_product(p.is_complex)


def small_product(is_complex: bool) -> int:
    """The largest product, in multiply-adds, that BLAS computes on the calling thread."""
    return _SMALL_PRODUCT_AVX512 if _has_avx512() and not is_complex else _SMALL_PRODUCT


@lru_cache(maxsize=1)
def _has_avx512() -> bool:
    try:
        found = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    except (TypeError, KeyError):  # NumPy before 1.25, or built without
        return False
    return any(name == "X86_V4" or name.startswith("AVX512") for name in found)


# -- panels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Panels:
    """Panels of windows times the weight, each product over `channels` input channels and `taps` tap groups.

    Where `merged`, the positions of all samples of a block are the columns of one product.
    """

    geometry: _Geometry
    blocking: _Blocking
    safe: _Taps
    channels: int
    taps: int
    merged: bool
    concurrent: bool

    @classmethod
    def of(cls, p: ConvProblem) -> _Panels | None:
        """None where even the smallest panel is too large."""
        geometry, size = _Geometry.of(p), _accumulator_size(p)
        first, last = _positions(p)
        depth, R = p.C_in_g * geometry.tap_groups, geometry.phases
        weight_rows, weight_groups = _fit(_PACKED_WEIGHT // (size * depth * R), p.C_out_g, p.groups)
        packing = weight_groups, weight_rows
        if weight_rows * depth * R * size > _PACKED_WEIGHT or depth * size > _BUFFER:
            return None
        # Many rows are better left to BLAS, unless the depth is small: it packs what small products read repeatedly.
        rows, small_work = p.C_out_g * R, p.flops() < _WORTH_SMALL_PRODUCTS
        few_rows = rows <= _SMALL_TILE or (not small_work and (rows <= 4 * _SMALL_TILE or depth <= _SMALL_DEPTH))
        if few_rows and last - first >= _SMALL_TILE // 2:
            return cls._of_small_products(p, geometry, packing)
        return cls._of_large_products(p, geometry, packing)

    @classmethod
    def _of_small_products(cls, p: ConvProblem, geometry: _Geometry, packing: tuple[int, int]) -> _Panels:
        """Many products on one thread each, at the same time; what each of them reads stays in a first-level cache."""
        first, last = _positions(p)
        Q, J, R, M = last - first, geometry.tap_groups, geometry.phases, p.C_out_g
        size, small = _accumulator_size(p), _small_product(p)
        tile_rows = min(M * R, _SMALL_TILE)
        # Where one product takes all rows, each part of a panel is read once, wherever it lies.
        deepest = min(_SMALL_DEPTH, small // _SMALL_TILE**2) if M * R > _SMALL_TILE else small // 1024
        deepest = min(deepest, small // (tile_rows * _SMALL_TILE))
        taps = min(J, deepest)
        channels = min(p.C_in_g, deepest // taps)
        channels = -(-p.C_in_g // -(-p.C_in_g // channels))
        depth = channels * taps
        widest = small // (tile_rows * depth)
        if M * R > _SMALL_TILE:
            widest = min(widest, _SMALL_TILE * _SMALL_DEPTH // depth)
        tile = min(Q, max(_SMALL_TILE // 2, min(widest, 512) // 32 * 32))
        rows = min(M, max(1, 512 // R))
        columns = min(_CONCURRENT_BUFFER // size // depth, _SUMS // size // (rows * R))
        tiles = max(1, min(-(-Q // tile), columns // tile))
        # Some blocks for each of several threads, if need be smaller ones.
        while p.N * p.groups * -(-Q // (tiles * tile)) * -(-M // rows) < _parts(p):
            if tiles > 1 and (tiles * tile > 256 or rows * R < 4 * _SMALL_TILE):
                tiles = -(-tiles // 2)
            elif rows * R >= 4 * _SMALL_TILE:
                rows = -(-rows // 2)
            else:
                break
        length = min(Q, tiles * tile)
        groups = samples = 1
        if length == Q and rows == M:
            groups = max(1, min(p.groups, columns // Q))
            if groups == p.groups:
                samples = max(1, min(p.N, columns // (Q * groups)))
        blocking = _Blocking(samples, groups, rows, length, tile_rows, tile, *packing)
        return cls(geometry, blocking, _Taps.of(p), channels, taps, False, True)

    @classmethod
    def _of_large_products(cls, p: ConvProblem, geometry: _Geometry, packing: tuple[int, int]) -> _Panels:
        """Products of the whole depth, each on all threads of BLAS, for problems of few positions."""
        first, last = _positions(p)
        Q, R, M = last - first, geometry.phases, p.C_out_g
        depth, budget = p.C_in_g * geometry.tap_groups, _BUFFER // _accumulator_size(p)
        length = min(Q, budget // depth)
        rows = max(1, min(M, budget // (length * R)))
        samples = groups = 1
        if length == Q:
            samples = max(1, min(p.N, 512 // Q, budget // (max(depth, rows * R) * Q)))
            if rows == M:
                groups = max(1, min(p.groups, budget // (max(depth, M * R) * Q * samples)))
        blocking = _Blocking(samples, groups, rows, length, rows * R, length * samples, *packing)
        return cls(geometry, blocking, _Taps.of(p), p.C_in_g, geometry.tap_groups, samples > 1, False)

    @property
    def _staged(self) -> int:
        """The bytes that the staged input may take."""
        return _STAGED_INPUT if self.concurrent else _BUFFER

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        blocking, depth, R = self.blocking, self.channels * self.taps, self.geometry.phases
        columns = blocking.samples * blocking.groups * blocking.length
        buffers = {
            "panel": columns * depth,
            "sums": columns * blocking.rows * R,
            "input": self._staged // _accumulator_size(p),
        }
        if depth < p.C_in_g * self.geometry.tap_groups:
            buffers["product"] = buffers["sums"]
        safe = self.safe.block_memory(p, blocking.samples, blocking.groups, blocking.rows, blocking.length)
        packed = blocking.weight_groups * blocking.weight_rows * R * p.C_in_g * self.geometry.tap_groups
        return packed, _either(buffers, safe)

    def run(self, call: _Call, workers: int) -> None:
        p, geometry = call.p, self.geometry
        if p.transposed and geometry.phases < p.stride:
            call.fill_with_bias()
        w = call.w
        in_place = not p.transposed and w.dtype == call.dtype and w.flags.c_contiguous and w.flags.aligned
        weight = w.reshape(p.groups, p.C_out_g, -1) if in_place else None
        self.blocking.run(call, weight, self._pack, self._compute, workers)

    def _pack(self, w: Array, scratch: Scratch) -> Array:
        """Weight (groups, rows, C_in_g, K) as (groups, rows*phases, C_in_g*tap_groups), zeros for the absent taps."""
        G, M, C, K = w.shape
        J, R, interleave = self.geometry.tap_groups, self.geometry.phases, self.geometry.interleave
        packed = scratch.take("weight", G, M, R, C, J)
        if R == 1:
            packed[:, :, 0] = w
        else:
            for j in range(J):
                taps = min(R, K - j * interleave)
                packed[:, :, :taps, :, j] = w[..., j * interleave : j * interleave + taps].swapaxes(2, 3)
                packed[:, :, taps:, :, j] = 0
        return packed.reshape(G, M * R, C * J)

    def _compute(self, call: _Call, weight: Array, block: _Block, scratch: Scratch) -> None:
        p, geometry, blocking = call.p, self.geometry, self.blocking
        N, T, (G, rows, _) = block.samples.stop - block.samples.start, block.stop - block.start, weight.shape
        R, J = geometry.phases, geometry.tap_groups
        direct = call.y_direct and geometry.interleave == 1 and not self.merged
        if direct:
            at = _outputs(p, 0, block.start, block.stop)[2]
            sums = call.y[block.samples, block.groups, block.rows, at]
        else:
            sums = scratch.take("sums", *((1, G, rows, N * T) if self.merged else (N, G, rows, T)))
        everything = slice(0, p.C_in_g), slice(0, J)
        # (columns of the sums, position of the first one, tiles, columns of a tile)
        runs = [
            (slice(low, high), block.start + low, (high - low) // tile, tile) for low, high, tile in blocking.tiles(T)
        ]
        if self.merged:
            runs = [(slice(0, N * T), block.start, 1, T)]
        source = self._read(call, block, *everything, block.start, block.stop, scratch)
        windows = [None if source is None else self._windows(source, *everything, *run[1:]) for run in runs]
        into = sums
        for c in slices(0, p.C_in_g, self.channels):
            for j in slices(0, J, self.taps):
                depth = slice(c.start * J + j.start, (c.stop - 1) * J + j.stop)
                for (columns, start, tiles, tile), view in zip(runs, windows, strict=True):
                    panel = self._panel(call, block, view, c, j, start, tiles, tile, scratch)
                    blocking.multiply(weight[..., depth], panel, _tiled(into[..., columns], panel.shape[4]))
                if into is not sums:
                    np.add(sums, into, out=sums)
                elif depth.stop < p.C_in_g * J:
                    into = scratch.take("product", *sums.shape)
        low, high = geometry.window(block.start, block.stop, slice(0, J))
        absent_taps = R > 1 and J * R > p.K
        if (low < 0 or high > p.L_in or absent_taps) and not is_finite(sums):
            self.safe.compute(call, block, scratch)
            return
        bias = call.bias(block.groups, block.rows)
        if bias is not None:
            sums += (bias if R == 1 else np.repeat(bias, R, axis=1))[:, :, None]
        if self.merged:
            call.store(block, sums.reshape(G, -1, R, N, T).transpose(3, 0, 1, 2, 4))
        elif not direct:
            call.store(block, sums.reshape(N, G, -1, R, T))

    def _panel(
        self,
        call: _Call,
        block: _Block,
        windows: Array | None,
        channels: slice,
        taps: slice,
        start: int,
        tiles: int,
        tile: int,
        scratch: Scratch,
    ) -> Array:
        """The windows from position `start` as (samples, groups, tiles, channels*taps, tile), next to each other.

        Of a merged block as (1, groups, 1, channels*taps, samples*tile). `windows` is a view of all of them, or None.
        """
        N, G = block.samples.stop - block.samples.start, block.groups.stop - block.groups.start
        C, J = channels.stop - channels.start, taps.stop - taps.start
        if self.merged:
            panel = scratch.take("panel", G, C, J, N, tile)
            target = panel.transpose(3, 0, 1, 2, 4)[:, :, None]
        else:
            panel = target = scratch.take("panel", N, G, tiles, C, J, tile)
        if windows is not None:
            np.copyto(target, windows[:, :, :, channels, taps])
        else:
            source = self._read(call, block, channels, taps, start, start + tiles * tile, scratch)
            if source is not None:
                np.copyto(target, self._windows(source, channels, taps, start, tiles, tile))
            else:
                self._copy_by_taps(call, block, channels, taps, start, target)
        return panel.reshape(1, G, 1, C * J, N * tile) if self.merged else panel.reshape(N, G, tiles, C * J, tile)

    def _read(
        self, call: _Call, block: _Block, channels: slice, taps: slice, start: int, stop: int, scratch: Scratch
    ) -> tuple[Array, int] | None:
        """What the positions start to stop read, and where it begins; None where it is too large to be staged."""
        low, high = self.geometry.window(start, stop, taps)
        rows = (block.samples.stop - block.samples.start) * (block.groups.stop - block.groups.start)
        rows *= channels.stop - channels.start
        inside = call.x_direct and low >= 0 and high <= call.p.L_in
        if not inside and rows * (high - low) * call.dtype.itemsize > self._staged:
            return None
        return call.read(block.samples, block.groups, channels, low, high, scratch), low

    def _windows(
        self, source: tuple[Array, int], channels: slice, taps: slice, start: int, tiles: int, tile: int
    ) -> Array:
        """A view of what `_read` returned as (samples, groups, tiles, channels, taps, tile)."""
        geometry, (x, low) = self.geometry, source
        s_n, s_g, s_c, s_l = x.strides
        origin = start * geometry.stride + geometry.offset + taps.start * geometry.dilation - low
        return as_strided(
            x[..., origin:],
            (*x.shape[:2], tiles, channels.stop - channels.start, taps.stop - taps.start, tile),
            (s_n, s_g, s_l * geometry.stride * tile, s_c, s_l * geometry.dilation, s_l * geometry.stride),
        )

    def _copy_by_taps(self, call: _Call, block: _Block, channels: slice, taps: slice, start: int, panel: Array) -> None:
        """Fill a panel (samples, groups, tiles, channels, taps, tile) whose windows are too long to be staged."""
        geometry, tile = self.geometry, panel.shape[5]
        x = call.x[block.samples, block.groups, channels]
        for index in range(panel.shape[2]):
            begin = start + index * tile
            for j in range(panel.shape[4]):
                first, last, read = geometry.reading(taps.start + j, begin, begin + tile, 0, call.p.L_in)
                panel[:, :, index, :, j, : first - begin] = 0
                if first < last:
                    panel[:, :, index, :, j, first - begin : last - begin] = x[..., read]
                panel[:, :, index, :, j, last - begin :] = 0


# -- shift-add -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _ShiftAdd:
    """The product of all taps with the input as it lies, then its rows shifted and summed."""

    geometry: _Geometry
    blocking: _Blocking
    concurrent: bool

    @classmethod
    def of(cls, p: ConvProblem) -> _ShiftAdd | None:
        """None where even the smallest block is too large."""
        geometry, size = _Geometry.of(p), _accumulator_size(p)
        first, last = _positions(p)
        per_row = p.K * p.C_in_g
        weight_rows, weight_groups = _fit(_PACKED_WEIGHT // (size * per_row), p.C_out_g, p.groups)
        if weight_rows * per_row * size > _PACKED_WEIGHT:
            return None
        reach = (geometry.tap_groups - 1) * abs(geometry.dilation)
        tile = _small_product(p) // (p.C_out_g * per_row) // 16 * 16
        concurrent = tile >= 256
        # A block reads `span` input positions, staged at worst, and computes the product of some rows there.
        staged, product = (_CONCURRENT_BUFFER if concurrent else _BUFFER) // size, _SUMS // size
        span = min(staged // p.C_in_g, product // p.K)
        length = min(last - first, (span - reach - 1) // geometry.stride + 1)
        if length < min(last - first, 4 * reach // geometry.stride + 1):
            return None
        rows = min(p.C_out_g, product // (p.K * ((length - 1) * geometry.stride + reach + 1)))
        concurrent = concurrent and rows == p.C_out_g
        blocking = _Blocking(1, 1, rows, length, rows * p.K, tile if concurrent else span, weight_groups, weight_rows)
        return cls(geometry, blocking, concurrent)

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        blocking = self.blocking
        low, high = self.geometry.window(0, blocking.length, slice(0, self.geometry.tap_groups))
        buffers = {
            "product": blocking.rows * p.K * (high - low),
            "sums": blocking.rows * self.geometry.phases * blocking.length,
            "input": p.C_in_g * (high - low),
        }
        return blocking.weight_groups * blocking.weight_rows * p.K * p.C_in_g, buffers

    def run(self, call: _Call, workers: int) -> None:
        p, w = call.p, call.w.swapaxes(2, 3)
        if p.transposed and self.geometry.phases < p.stride:
            call.fill_with_bias()
        in_place = (
            p.transposed and w.dtype == call.dtype and call.w.swapaxes(1, 2).flags.c_contiguous and w.flags.aligned
        )
        weight = w.reshape(p.groups, p.C_out_g * p.K, p.C_in_g) if in_place else None
        self.blocking.run(call, weight, self._pack, self._compute, workers)

    def _pack(self, w: Array, scratch: Scratch) -> Array:
        """Weight (groups, rows, C_in_g, K) as (groups, rows*K, C_in_g)."""
        G, M, C, K = w.shape
        packed = scratch.take("weight", G, M, K, C)
        packed[...] = w.swapaxes(2, 3)
        return packed.reshape(G, M * K, C)

    def _compute(self, call: _Call, weight: Array, block: _Block, scratch: Scratch) -> None:
        p, geometry, (samples, groups, rows, start, stop) = call.p, self.geometry, block
        N, G, M = samples.stop - samples.start, groups.stop - groups.start, rows.stop - rows.start
        R, J = geometry.phases, geometry.tap_groups
        direct = call.y_direct and geometry.interleave == 1
        if direct:
            sums = call.y[samples, groups, rows, None, _outputs(p, 0, start, stop)[2]]
        else:
            sums = scratch.take("sums", N, G, M, R, stop - start)
        bias = call.bias(groups, rows)
        sums[...] = 0 if bias is None else bias[:, :, None, None]
        low, high = geometry.window(start, stop, slice(0, J))
        low, high = max(low, 0), min(high, p.L_in)
        if low < high:
            x = call.read(samples, groups, slice(0, p.C_in_g), low, high, scratch)
            product = scratch.take("product", N, G, M * p.K, high - low)
            for begin, end, tile in self.blocking.tiles(high - low):
                columns = _tiled(x[..., begin:end], tile)
                self.blocking.multiply(weight, columns, _tiled(product[..., begin:end], tile))
            product = product.reshape(N, G, M, p.K, high - low)
            for j in range(J):
                first, last, read = geometry.reading(j, start, stop, low, high)
                if first < last:
                    taps = slice(j * geometry.interleave, min(j * geometry.interleave + R, p.K))
                    fed = sums[..., : taps.stop - taps.start, first - start : last - start]
                    np.add(fed, product[..., taps, read.start - low : read.stop - low : read.step], out=fed)
        if not direct:
            call.store(block, sums)


# -- toeplitz --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Toeplitz:
    """Windows of `tile` positions times banded matrices; blocks of `samples` and `windows`, bands of `groups`."""

    geometry: _Geometry
    safe: _Taps
    samples: int
    groups: int
    windows: int
    tile: int
    concurrent: bool

    @classmethod
    def of(cls, p: ConvProblem, tile: int) -> _Toeplitz | None:
        """None where the phases are interleaved, or where even the smallest band or block is too large."""
        geometry, size = _Geometry.of(p), _accumulator_size(p)
        first, last = _positions(p)
        if geometry.interleave > 1:
            return None
        window, outputs = p.C_in_g * _window_length(geometry, tile), p.C_out_g * tile
        lines = _small_product(p) // (window * outputs)
        concurrent = lines >= 25 and p.groups >= 4
        budget = (_CONCURRENT_BUFFER if concurrent else _BUFFER) // size
        if window * max(outputs, 16) > budget:
            return None
        lines = min(lines if concurrent else budget, budget // max(window, outputs))
        windows = min(-(-(last - first) // tile), lines)
        samples = min(p.N, lines // windows)
        groups = min(
            p.groups, budget // (max(window, outputs) * max(windows * samples, outputs)), -(-p.groups // _parts(p))
        )
        return cls(geometry, _Taps.of(p), samples, max(1, groups), windows, tile, concurrent)

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        window, outputs = p.C_in_g * _window_length(self.geometry, self.tile), p.C_out_g * self.tile
        lines = self.samples * self.windows
        span = self.windows * self.tile * self.geometry.stride + _window_length(self.geometry, self.tile)
        buffers = {
            "band": self.groups * window * outputs,
            "panel": self.groups * lines * window,
            "sums": self.groups * lines * outputs,
            "input": self.groups * self.samples * p.C_in_g * span,
        }
        safe = self.safe.block_memory(p, self.samples, self.groups, p.C_out_g, self.windows * self.tile)
        return 0, _either(buffers, safe)

    def run(self, call: _Call, workers: int) -> None:
        _run_blocks(call, self._compute, [(g,) for g in slices(0, call.p.groups, self.groups)], workers)

    def _compute(self, call: _Call, groups: slice, scratch: Scratch) -> None:
        band = self._band(call, groups, scratch)
        for samples in slices(0, call.p.N, self.samples):
            for at in slices(*_positions(call.p), self.windows * self.tile):
                block = _Block(samples, groups, slice(0, call.p.C_out_g), at.start, at.stop)
                self._compute_block(call, band, block, scratch)

    def _band(self, call: _Call, groups: slice, scratch: Scratch) -> Array:
        """(groups, C_in_g, window, C_out_g, tile): what each input of a window contributes to each of its outputs."""
        geometry, p = self.geometry, call.p
        G, C, M, U = groups.stop - groups.start, p.C_in_g, p.C_out_g, _window_length(geometry, self.tile)
        band = scratch.take("band", G, C, U, M, self.tile)
        band[...] = 0
        origin = -min(0, (geometry.tap_groups - 1) * geometry.dilation)
        s_g, s_c, s_u, s_m, s_t = band.strides
        diagonals = as_strided(
            band[:, :, origin:],
            (G, M, C, p.K, self.tile),
            (s_g, s_m, s_c, s_u * geometry.dilation, s_u * geometry.stride + s_t),
        )
        diagonals[...] = call.w[groups, ..., None]
        return band

    def _compute_block(self, call: _Call, band: Array, block: _Block, scratch: Scratch) -> None:
        p, geometry, (samples, groups, _, start, stop) = call.p, self.geometry, block
        G, C, U, M, tile = band.shape
        N, windows, step = samples.stop - samples.start, -(-(stop - start) // tile), tile * geometry.stride
        low, _ = geometry.window(start, stop, slice(0, geometry.tap_groups))
        first, last = 0, U
        if C == 1:  # leave out what is padding for all windows of the block
            first = min(max(0, -(low + (windows - 1) * step)), U - 1)
            last = max(min(U, p.L_in - low), first + 1)
        band = band[:, :, first:last].reshape(G, C * (last - first), M * tile)
        low += first
        panel = scratch.take("panel", G, N, windows, C, last - first)
        # The windows that lie within the input are copied from where it lies, the others from a padded copy.
        inside = min(max(0, -(low // step)), windows)
        outside = max(min(windows, (p.L_in - low - (last - first)) // step + 1), inside)
        for begin, end in ((0, inside), (inside, outside), (outside, windows)):
            if begin < end:
                at = low + begin * step
                x = call.read(samples, groups, slice(0, C), at, at + (end - begin - 1) * step + last - first, scratch)
                s_n, s_g, s_c, s_l = x.strides
                part = panel[:, :, begin:end]
                np.copyto(part, as_strided(x, part.shape, (s_g, s_n, s_l * step, s_c, s_l)))
        panel = panel.reshape(G, N, windows, -1)
        y = call.y[samples, groups, :, _outputs(p, 0, start, stop)[2]]
        whole, rest = divmod(stop - start, tile)
        # With one output channel the products are the outputs as they lie, but for an incomplete window.
        direct = call.y_direct and M == 1 and (N == 1 or windows >= 32)
        if direct:
            sums = y
            outputs = y[..., : whole * tile].reshape(N, G, whole, tile).swapaxes(0, 1)
            np.matmul(panel[:, :, :whole], band[:, None], out=outputs)
            if rest:
                last_sums = scratch.take("sums", G, N, 1, tile)
                np.matmul(panel[:, :, whole:], band[:, None], out=last_sums)
                y[..., whole * tile :] = last_sums.swapaxes(0, 1)[..., :rest]
        else:
            sums = scratch.take("sums", G, N * windows, M * tile)
            np.matmul(panel.reshape(G, N * windows, -1), band, out=sums)
            sums = sums.reshape(G, N, windows, M, tile).transpose(1, 0, 3, 2, 4)
        if not is_finite(sums):
            self.safe.compute(call, block, scratch)
            return
        bias = call.bias(groups, slice(0, M))
        if bias is not None:
            sums += bias.reshape(G, M, *(1,) * (sums.ndim - 3))
        if not direct:
            y[..., : whole * tile].reshape(N, G, M, whole, tile)[...] = sums[..., :whole, :]
            if rest:
                y[..., whole * tile :] = sums[..., whole, :rest]


def _window_length(geometry: _Geometry, tile: int) -> int:
    return (tile - 1) * geometry.stride + (geometry.tap_groups - 1) * abs(geometry.dilation) + 1


# -- the choice ------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    method: Method
    form: _Form
    workers: int


@lru_cache(maxsize=4096)
def _plan(p: ConvProblem) -> _Plan:
    cost, name, reason, form = _choose(p)
    shared, buffers = form.memory(p)
    shared *= _accumulator_size(p)
    # The largest buffer is also compared with infinity, one byte per element.
    each = sum(buffers.values()) * _accumulator_size(p) + max(buffers.values(), default=0)
    workers = 1
    if form.concurrent and cost > _WORTH_THREADS:
        allowed = max(_WORKSPACE, (math.prod(p.input_shape) + math.prod(p.output_shape)) * p.itemsize // 4)
        workers = max(1, min(_MAX_WORKERS, (allowed - shared) // each))
    return _Plan(Method(name, reason, shared + workers * each), form, workers)


def _choose(p: ConvProblem) -> tuple[float, str, str, _Form]:
    """The cheapest form: its cost in nanoseconds on one core, name, reason, form."""
    if 0 in p.output_shape:
        return 0.0, "nothing", "the output is empty", _Fill()
    if 0 in p.input_shape:
        return 0.0, "bias", "the input is empty, so every sum is", _Fill()
    elementwise = "depthwise", "one input channel per group: each tap is an elementwise product", _Taps.of(p)
    if not _has_geometry(p):
        if p.C_in_g == 1:
            return _cost_of_elementwise(p), *elementwise
        reason = "transposed with a stride and a dilation: the phases read different positions"
        return 0.0, "taps", reason, _Taps.of(p)
    candidates: list[tuple[float, str, str, _Form]] = []
    panels = _Panels.of(p)
    if panels is not None:
        candidates.append((_cost_of_panels(p, panels.concurrent), *_panels_name(p), panels))
    shift_add = _ShiftAdd.of(p)
    if p.C_in_g == 1:
        candidates.append((_cost_of_elementwise(p), *elementwise))
    elif shift_add is not None:
        reason = "one product of all taps: few output channels, or a weight too large to be rearranged"
        candidates.append((_cost_of_shift_add(p, shift_add.concurrent), "shift_add", reason, shift_add))
    for tile in sorted({min(tile, p.L_out) for tile in (1, 4, 8, 16, 32, 64)}):
        toeplitz = _Toeplitz.of(p, tile)
        if toeplitz is not None:
            reason = "few channels per group and many taps: banded matrices reuse each window"
            candidates.append((_cost_of_toeplitz(p, tile, toeplitz.concurrent), "toeplitz", reason, toeplitz))
    if not candidates:
        return 0.0, "taps", "the windows are too large for a panel", _Taps.of(p)
    return min(candidates, key=lambda candidate: candidate[0])


def _panels_name(p: ConvProblem) -> tuple[str, str]:
    if p.transposed:
        return "phases", "transposed: a convolution of stride 1 with stride times the output channels"
    if p.K == 1:
        return "pointwise", "one tap: a matrix product"
    if p.C_in_g == 1:
        return "one_channel", "one input channel per group: windows cut from one row"
    return "panels", "many channels: panels of windows times the weight"


# The costs of the parts of each form in nanoseconds on one core. Only their order matters. Fitted to the benchmark
# layers in float32, with NumPy 2.4 and OpenBLAS 0.3.31 on a Xeon with AVX-512 (Sapphire Rapids).
_FLOP = 0.0075
_COPY = 0.25
_STRIDED_COPY = 0.5
_INTERLEAVE = 0.8
_SHIFT_AND_ADD = 0.25
_ELEMENTWISE = 0.5
_STRIDED_ELEMENTWISE = 0.8
_NUMPY_ROW = 60.0
_NUMPY_LOOP = 5.0
_PACK = 4.0
_PRODUCT_COLUMN = 1.5

# A form that leaves the threads to BLAS computes the rest on one, and waits for the slower thread after each product.
_LARGE_PRODUCT = 1.3
_SERIAL = 2.0


def _flop(p: ConvProblem, concurrent: bool) -> float:
    """A multiplication or an addition in BLAS."""
    return _FLOP * (4 if p.is_complex else 1) * _accumulator_size(p) / 4 * (1.0 if concurrent else _LARGE_PRODUCT)


def _columns(p: ConvProblem) -> int:
    first, last = _positions(p)
    return p.N * p.groups * (last - first)


def _cost_of_interleaving(p: ConvProblem) -> float:
    geometry = _Geometry.of(p)
    return _INTERLEAVE * _columns(p) * p.C_out_g * geometry.phases if geometry.interleave > 1 else 0.0


def _cost_of_panels(p: ConvProblem, concurrent: bool) -> float:
    geometry = _Geometry.of(p)
    depth, rows = p.C_in_g * geometry.tap_groups, p.C_out_g * geometry.phases
    copying = (_COPY if geometry.stride == 1 else _STRIDED_COPY) * depth + _PRODUCT_COLUMN
    if concurrent and rows > _SMALL_TILE:
        copying += _SHIFT_AND_ADD * rows * (depth // _SMALL_DEPTH)
    packing = _PACK * p.groups * rows * depth if p.transposed else 0.0
    rest = _columns(p) * copying + _cost_of_interleaving(p)
    product = 2 * max(rows, 8) * depth * _flop(p, concurrent)
    return _columns(p) * product + (1.0 if concurrent else _SERIAL) * rest + _SERIAL * packing


def _cost_of_shift_add(p: ConvProblem, concurrent: bool) -> float:
    rows = p.C_out_g * p.K
    serial = 1.0 if concurrent else _SERIAL
    product = 2 * max(rows, 8) * p.C_in_g * _Geometry.of(p).stride * _flop(p, concurrent) + _PRODUCT_COLUMN
    packing = 0.0 if p.transposed else _PACK * p.groups * rows * p.C_in_g
    rest = _columns(p) * _SHIFT_AND_ADD * rows + _cost_of_interleaving(p)
    return _columns(p) * product + serial * rest + _SERIAL * packing


def _cost_of_elementwise(p: ConvProblem) -> float:
    geometry = _Geometry.of(p)
    first, last = _positions(p)
    each = (_ELEMENTWISE if geometry.stride == 1 else _STRIDED_ELEMENTWISE) + _NUMPY_ROW / (last - first)
    return _columns(p) * p.C_out_g * (p.K * each + _ELEMENTWISE) + _cost_of_interleaving(p)


def _cost_of_toeplitz(p: ConvProblem, tile: int, concurrent: bool) -> float:
    window, outputs = p.C_in_g * _window_length(_Geometry.of(p), tile), p.C_out_g * tile
    serial = 1.0 if concurrent else _SERIAL
    band = p.groups * outputs * (0.1 * window + p.C_in_g * p.K)
    product = 2 * (outputs + 16) * window * _flop(p, concurrent)
    return _columns(p) / tile * (product + serial * (_COPY * window + _NUMPY_LOOP + 1.1 * outputs)) + serial * band
