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
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from .problem import ITEMSIZE, ConvProblem

Array = npt.NDArray[Any]

_KIB = 1024
_MIB = 1024 * 1024

_ACCUMULATOR = {"float16": "float32", "bfloat16": "float32"}

# Bytes of the scratch buffers. Where several threads run, each has its own, so that they are small.
_PACKED_WEIGHT = 6 * _MIB
_BUFFER = 4 * _MIB
_CONCURRENT_BUFFER = 512 * _KIB

# Elements of a block of the elementwise form: the block, a product and the input stay in a second-level cache of 1 MiB.
_ELEMENTWISE_BLOCK = 32 * 1024

# OpenBLAS computes a product of at most this many multiply-adds on the calling thread, and on machines with AVX-512
# without packing its operands (kernel/x86_64/sgemm_small_kernel_permit_skylakex.c; interface/gemm.c has 64**3 for
# others). Only such products run at the same time on several threads; larger ones take turns.
_SMALL_PRODUCT = 100**3
_SMALL_PRODUCT_COMPLEX = 64**3

# Bytes of the largest weight that is multiplied in small products; larger ones leave the second-level cache.
_TILED_WEIGHT = 1024 * _KIB

# Operations from which a second thread pays: starting it costs some 0.1 ms.
_WORTH_THREADS = 4_000_000

# Extra memory grows with the number of threads, so it is bounded.
_MAX_WORKERS = 8


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
    return _plan(problem)[0]


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
    if output.size == 0:
        return
    call = _Call(problem, input, weight, bias, output)
    if input.size == 0:
        call.fill_with_bias()
    else:
        _plan(problem)[1].run(call)


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


def _accumulator_size(p: ConvProblem) -> int:
    return ITEMSIZE[_ACCUMULATOR.get(p.dtype, p.dtype)]


class _Scratch:
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
        self.dtype = np.dtype(_ACCUMULATOR.get(p.dtype, p.dtype))
        self.x = input.reshape(p.N, G, C, p.L_in)
        self.w = weight.reshape(G, C, M, p.K).transpose(0, 2, 1, 3) if p.transposed else weight.reshape(G, M, C, p.K)
        self.b = None if bias is None else bias.reshape(G, M)
        self.y = output.reshape(p.N, G, M, p.L_out)
        self.x_direct = _is_direct(self.x, self.dtype)
        self.y_direct = _is_direct(self.y, self.dtype)

    def fill_with_bias(self) -> None:
        self.y[...] = 0 if self.b is None else self.b[:, :, None]

    def bias(self, groups: slice, rows: slice) -> Array | None:
        """(groups, rows) in the accumulator's dtype."""
        return None if self.b is None else self.b[groups, rows].astype(self.dtype, copy=False)

    def read(self, samples: slice, groups: slice, channels: slice, low: int, high: int, scratch: _Scratch) -> Array:
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

    def store(self, samples: slice, groups: slice, rows: slice, start: int, stop: int, sums: Array) -> None:
        """Write `sums` (samples, groups, rows, phases, stop - start) to the outputs."""
        y = self.y[samples, groups, rows]
        for r in range(sums.shape[3]):
            low, high, at = _outputs(self.p, r, start, stop)
            if low < high:
                y[..., at] = sums[..., r, low - start : high - start]


def _is_direct(array: Array, dtype: np.dtype[Any]) -> bool:
    """Whether BLAS takes the matrices (..., rows, positions) of an array: unit stride in rows that do not overlap."""
    size, strides = dtype.itemsize, array.strides
    return (
        array.dtype == dtype
        and array.flags.aligned
        and strides[3] == size
        and strides[2] % size == 0
        and (strides[2] >= array.shape[3] * size or array.shape[2] == 1)
    )


def _is_finite(block: Array) -> bool:
    """Whether every element is finite; a finite sum shows it in one pass that needs no temporary array."""
    return bool(np.isfinite(np.add.reduce(block, axis=None)) or np.isfinite(block).all())


def _slices(start: int, stop: int, length: int) -> list[slice]:
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

    def run(self, call: _Call) -> None: ...


def _run_blocks(call: _Call, compute: Callable[..., None], blocks: Sequence[tuple[Any, ...]], workers: int) -> None:
    """Call ``compute(call, *block, scratch)`` for each block, on at most so many threads.

    The blocks write disjoint parts of the output, so neither their order nor the number of threads changes a bit.
    """
    workers = min(workers, len(blocks), _usable_cpus()) if workers > 1 else 1
    pending = deque(blocks)

    def work() -> None:
        scratch = _Scratch(call.dtype)
        # NumPy copies rows that are shorter than its buffer into it before it computes, even where nothing is to be
        # converted; a buffer shorter than the rows keeps it from doing so.
        buffer_size = np.setbufsize(64 if call.p.L_out >= 64 else 8192)
        try:
            with np.errstate(all="ignore"):
                while pending:
                    try:
                        block = pending.popleft()
                    except IndexError:  # another thread took the last one
                        return
                    compute(call, *block, scratch)
        finally:
            np.setbufsize(buffer_size)

    if workers == 1:
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
    """One product per tap, summed. Block sizes: positions, rows, groups, samples; and the channels of one product."""

    length: int
    rows: int
    groups: int
    samples: int
    channels: int
    workers: int

    @classmethod
    def of(cls, p: ConvProblem) -> _Taps:
        if p.C_in_g == 1:
            workers = _MAX_WORKERS if p.flops() > _WORTH_THREADS else 1
            return cls(*_fit(_ELEMENTWISE_BLOCK, p.L_out, p.C_out_g, p.groups, p.N), 1, workers)
        budget = _BUFFER // 2 // _accumulator_size(p)
        rows, channels = min(p.C_out_g, 256), min(p.C_in_g, 1024)
        largest = max(rows, channels)
        length = min(p.L_out, budget // largest)
        groups = max(1, min(p.groups, budget // (largest * max(length, min(rows, channels)))))
        samples = max(1, min(p.N, budget // (largest * length * groups)))
        return cls(length, rows, groups, samples, channels, 1)

    def workspace(self, p: ConvProblem) -> int:
        return self.workers * self.block_workspace(p, self.samples, self.groups, self.rows, self.length)

    def block_workspace(self, p: ConvProblem, samples: int, groups: int, rows: int, length: int) -> int:
        """A bound on the scratch memory of a part of the output of this size."""
        groups, rows = min(groups, self.groups), min(rows, self.rows)
        columns = min(samples, self.samples) * min(length, self.length)
        operands = groups * self.channels * (rows + columns) if p.C_in_g > 1 else 0
        return (2 * groups * rows * columns + operands) * _accumulator_size(p) + _CONCURRENT_BUFFER

    def run(self, call: _Call) -> None:
        p = call.p
        if p.transposed and len(_phases(p)) < p.stride:
            call.fill_with_bias()
        blocks = self._blocks(p, slice(0, p.N), slice(0, p.groups), slice(0, p.C_out_g), *_positions(p))
        _run_blocks(call, self._compute, list(blocks), self.workers)

    def compute_block(
        self, call: _Call, samples: slice, groups: slice, rows: slice, start: int, stop: int, scratch: _Scratch
    ) -> None:
        """Compute a part of the output whose rest another form computes."""
        for block in self._blocks(call.p, samples, groups, rows, start, stop):
            self._compute(call, *block, scratch)

    def _blocks(
        self, p: ConvProblem, samples: slice, groups: slice, rows: slice, start: int, stop: int
    ) -> Iterator[tuple[slice, slice, slice, _Phase, int, int]]:
        for phase in _phases(p):
            low, high, _ = _outputs(p, phase.phase, start, stop)
            for n in _slices(samples.start, samples.stop, self.samples):
                for g in _slices(groups.start, groups.stop, self.groups):
                    for m in _slices(rows.start, rows.stop, self.rows):
                        for at in _slices(low, high, self.length):
                            yield n, g, m, phase, at.start, at.stop

    def _compute(
        self,
        call: _Call,
        samples: slice,
        groups: slice,
        rows: slice,
        phase: _Phase,
        start: int,
        stop: int,
        scratch: _Scratch,
    ) -> None:
        p = call.p
        _, _, at = _outputs(p, phase.phase, start, stop)
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
            if math.prod(x.shape[:3]) * (high - low) * call.dtype.itemsize <= _CONCURRENT_BUFFER:
                staged = scratch.take("input", *x.shape[:3], high - low)
                staged[...] = x[..., low:high]
                x, origin = staged, low
        for c in _slices(0, p.C_in_g, self.channels):
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


def _multiply_tap(w_tap: Array, x_tap: Array, product: Array, scratch: _Scratch) -> None:
    """``product[n, g] = w_tap[g] @ x_tap[n, g]``, both operands first brought into the form that BLAS takes."""
    w_packed = scratch.take("tap", *w_tap.shape)
    w_packed[...] = w_tap
    if not _is_direct(x_tap, product.dtype):
        x_packed = scratch.take("shifted", *x_tap.shape)
        x_packed[...] = x_tap
        x_tap = x_packed
    np.matmul(w_packed, x_tap, out=product)


# -- panels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Panels:
    """Panels of windows times the weight.

    A block (`samples`, `groups`, `rows`, `length` positions) is computed in tiles of `tile` positions and `tile_rows`
    rows of the weight, each tile a sum of products over `channels` input channels and `taps` tap groups. Where `merged`,
    one tile holds all positions of all samples of the block. Of a weight that cannot be read as it lies, `weight_rows`
    rows of `weight_groups` groups are packed at a time.
    """

    geometry: _Geometry
    safe: _Taps
    samples: int
    groups: int
    rows: int
    length: int
    tile: int
    tile_rows: int
    channels: int
    taps: int
    merged: bool
    weight_groups: int
    weight_rows: int
    workers: int

    @classmethod
    def of(cls, p: ConvProblem) -> _Panels | None:
        """None where even the smallest panel is too large."""
        geometry, size = _Geometry.of(p), _accumulator_size(p)
        first, last = _positions(p)
        Q, J, R = last - first, geometry.tap_groups, geometry.phases
        depth, M = p.C_in_g * J, p.C_out_g
        weight_rows, weight_groups = _fit(_PACKED_WEIGHT // (size * depth * R), M, p.groups)
        if weight_rows * depth * R * size > _PACKED_WEIGHT:
            return None
        packing = (weight_groups, weight_rows)
        merged = Q < 16 and p.N > 1
        small = _SMALL_PRODUCT_COMPLEX if p.is_complex else _SMALL_PRODUCT
        if merged or M * R * depth > _TILED_WEIGHT // size:
            budget = _BUFFER // size
            if depth > budget:
                return None
            rows = min(M, max(1, 4096 // R))
            length = min(Q, budget // depth, max(16, budget // (rows * R)))
            rows = max(1, min(rows, budget // (length * R)))
            samples = max(1, min(p.N, 512 // Q, budget // (max(depth, rows * R) * Q))) if merged else 1
            groups = 1
            if length == Q and rows == M:
                groups = max(1, min(p.groups, budget // (max(depth, M * R) * Q * samples)))
            return cls(
                geometry, _Taps.of(p), samples, groups, rows, length, length, rows * R, p.C_in_g, J, merged, *packing, 1
            )
        budget = _CONCURRENT_BUFFER // size
        taps = min(J, 960)
        channels = min(p.C_in_g, max(1, 960 // taps))
        channels = -(-p.C_in_g // -(-p.C_in_g // channels))
        tile_rows = min(M * R, 16 if channels * taps > small // 2048 else 32 if channels * taps > small // 4096 else 64)
        tile = max(32, small // (tile_rows * channels * taps) // 32 * 32)
        tile = min(Q, tile, 512)
        largest = max(channels * taps, min(M, max(1, 2048 // R)) * R)
        rows = min(M, max(1, budget // (tile * R)))
        tiles = max(1, min(-(-Q // tile), budget // (largest * tile), p.N * p.groups * Q // (16 * tile)))
        length = min(Q, tiles * tile)
        groups = samples = 1
        if length == Q and rows == M:
            groups = max(1, min(p.groups, budget // (largest * Q)))
            if groups == p.groups:
                samples = max(1, min(p.N, budget // (largest * Q * groups)))
        workers = _MAX_WORKERS if p.flops() > _WORTH_THREADS else 1
        return cls(
            geometry, _Taps.of(p), samples, groups, rows, length, tile, tile_rows, channels, taps, False, *packing,
            workers,
        )  # fmt: skip

    def workspace(self, p: ConvProblem) -> int:
        size, R = _accumulator_size(p), self.geometry.phases
        columns = self.samples * self.groups * self.length
        panel = columns * self.channels * self.taps
        sums = columns * self.rows * R * (1 if self.channels * self.taps == p.C_in_g * self.geometry.tap_groups else 2)
        safe = self.safe.block_workspace(p, self.samples, self.groups, self.rows, self.length)
        packed = self.weight_groups * self.weight_rows * p.C_in_g * self.geometry.tap_groups * R * size
        return packed + self.workers * ((panel + sums) * size + self._stage_limit() + safe)

    def _stage_limit(self) -> int:
        return _CONCURRENT_BUFFER if self.workers > 1 else _BUFFER

    def run(self, call: _Call) -> None:
        p, geometry = call.p, self.geometry
        if p.transposed and geometry.phases < p.stride:
            call.fill_with_bias()
        in_place = (
            not p.transposed and call.w.dtype == call.dtype and call.w.flags.c_contiguous and call.w.flags.aligned
        )
        per_groups, per_rows = (p.groups, p.C_out_g) if in_place else (self.weight_groups, self.weight_rows)
        packed = _Scratch(call.dtype)
        first, last = _positions(p)
        for g in _slices(0, p.groups, per_groups):
            for m in _slices(0, p.C_out_g, per_rows):
                w = call.w[g, m]
                weight = w.reshape(*w.shape[:2], -1) if in_place else _pack_windows(geometry, w, packed)
                blocks = [
                    (_part(weight, g, groups, m, rows, geometry.phases), n, groups, rows, at.start, at.stop)
                    for n in _slices(0, p.N, self.samples)
                    for groups in _slices(g.start, g.stop, self.groups)
                    for at in _slices(first, last, self.length)
                    for rows in _slices(m.start, m.stop, self.rows)
                ]
                _run_blocks(call, self._compute, blocks, self.workers)

    def _compute(
        self,
        call: _Call,
        weight: Array,
        samples: slice,
        groups: slice,
        rows: slice,
        start: int,
        stop: int,
        scratch: _Scratch,
    ) -> None:
        p, geometry = call.p, self.geometry
        N, G, T, R = samples.stop - samples.start, weight.shape[0], stop - start, geometry.phases
        direct = call.y_direct and geometry.interleave == 1 and not self.merged
        if direct:
            sums = call.y[samples, groups, rows, _outputs(p, 0, start, stop)[2]]
        elif self.merged:
            sums = scratch.take("sums", 1, G, weight.shape[1], N * T)
        else:
            sums = scratch.take("sums", N, G, weight.shape[1], T)
        whole = stop - T % self.tile
        for begin, end, tile in ((start, whole, self.tile), (whole, stop, stop - whole)):
            if begin == end:
                continue
            tiles = (end - begin) // tile
            # The samples of a merged block are columns of its only tile.
            part = sums if self.merged else sums[..., begin - start : end - start]
            part = part.reshape(*part.shape[:3], tiles, -1).transpose(0, 1, 3, 2, 4)
            into = part
            for c in _slices(0, p.C_in_g, self.channels):
                for j in _slices(0, geometry.tap_groups, self.taps):
                    panel = self._windows(call, samples, groups, c, j, begin, tiles, tile, scratch)
                    at = c.start * geometry.tap_groups + j.start
                    _multiply_tiles(weight[:, :, at : at + panel.shape[3]], panel, into, self.tile_rows)
                    if into is not part:
                        np.add(part, into, out=part)
                    elif self.channels < p.C_in_g or self.taps < geometry.tap_groups:
                        into = scratch.take("product", *part.shape)
        low, high = geometry.window(start, stop, slice(0, geometry.tap_groups))
        absent_taps = geometry.interleave > 1 and geometry.tap_groups * geometry.phases > p.K
        if (low < 0 or high > p.L_in or absent_taps) and not _is_finite(sums):
            self.safe.compute_block(call, samples, groups, rows, start, stop, scratch)
            return
        bias = call.bias(groups, rows)
        if bias is not None:
            sums += np.repeat(bias, R, axis=1)[:, :, None]
        if self.merged:
            call.store(samples, groups, rows, start, stop, sums.reshape(G, -1, R, N, T).transpose(3, 0, 1, 2, 4))
        elif not direct:
            call.store(samples, groups, rows, start, stop, sums.reshape(N, G, -1, R, T))

    def _windows(
        self,
        call: _Call,
        samples: slice,
        groups: slice,
        channels: slice,
        taps: slice,
        start: int,
        tiles: int,
        tile: int,
        scratch: _Scratch,
    ) -> Array:
        """The windows of some tiles as (samples, groups, tiles, channels*taps, tile); the samples of a merged block
        are columns: (1, groups, 1, channels*taps, samples*tile)."""
        geometry = self.geometry
        N, G = samples.stop - samples.start, groups.stop - groups.start
        C, J = channels.stop - channels.start, taps.stop - taps.start
        stop = start + tiles * tile
        low, high = geometry.window(start, stop, taps)
        if self.merged:
            panel = scratch.take("panel", G, C, J, N, tile)
            windows = panel.transpose(3, 0, 1, 2, 4)[:, :, None]
        else:
            panel = windows = scratch.take("panel", N, G, tiles, C, J, tile)
        inside = call.x_direct and low >= 0 and high <= call.p.L_in
        if inside or N * G * C * (high - low) * call.dtype.itemsize <= self._stage_limit():
            x = call.read(samples, groups, channels, low, high, scratch)
            s_n, s_g, s_c, s_l = x.strides
            origin = start * geometry.stride + geometry.offset + taps.start * geometry.dilation - low
            strides = (s_n, s_g, s_l * geometry.stride * tile, s_c, s_l * geometry.dilation, s_l * geometry.stride)
            np.copyto(windows, as_strided(x[..., origin:], windows.shape, strides))
        else:  # the windows span too much to be staged in one piece
            x = call.x[samples, groups, channels]
            for at in range(tiles):
                for j in range(J):
                    begin = start + at * tile
                    first, last, read = geometry.reading(taps.start + j, begin, begin + tile, 0, call.p.L_in)
                    windows[:, :, at, :, j, : first - begin] = 0
                    if first < last:
                        windows[:, :, at, :, j, first - begin : last - begin] = x[..., read]
                    windows[:, :, at, :, j, last - begin :] = 0
        return panel.reshape(1, G, 1, C * J, N * tile) if self.merged else panel.reshape(N, G, tiles, C * J, tile)


def _pack_windows(geometry: _Geometry, w: Array, scratch: _Scratch) -> Array:
    """Weight (groups, rows, C_in_g, K) as (groups, rows*phases, C_in_g*tap_groups), zeros for the absent taps."""
    G, M, C, _ = w.shape
    packed = scratch.take("weight", G, M, geometry.phases, C, geometry.tap_groups)
    if geometry.phases == 1:
        packed[:, :, 0] = w
    else:
        for j in range(geometry.tap_groups):
            taps = w[..., j * geometry.interleave : j * geometry.interleave + geometry.phases]
            packed[:, :, : taps.shape[3], :, j] = taps.swapaxes(2, 3)
            packed[:, :, taps.shape[3] :, :, j] = 0
    return packed.reshape(G, M * geometry.phases, C * geometry.tap_groups)


def _part(weight: Array, all_groups: slice, groups: slice, all_rows: slice, rows: slice, per_row: int) -> Array:
    """Of a packed weight (groups, rows*per_row, depth), the part of some of its groups and rows."""
    return weight[
        groups.start - all_groups.start : groups.stop - all_groups.start,
        (rows.start - all_rows.start) * per_row : (rows.stop - all_rows.start) * per_row,
    ]


def _multiply_tiles(weight: Array, panel: Array, product: Array, tile_rows: int) -> None:
    """``product[n, g, tile] = weight[g] @ panel[n, g, tile]``, by products of `tile_rows` rows."""
    G, R, depth = weight.shape
    whole = R - R % tile_rows
    for low, high in ((0, whole), (whole, R)):
        if low < high:
            rows = min(tile_rows, high - low)
            w = weight[:, low:high].reshape(G, 1, (high - low) // rows, rows, depth)
            part = product[:, :, :, low:high]
            np.matmul(w, panel[:, :, :, None], out=part.reshape(*part.shape[:3], -1, rows, part.shape[4]))


# -- shift-add -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _ShiftAdd:
    """The product of all taps with the input as it lies, then its rows shifted and summed.

    A block is `samples`, `groups`, `rows`, `length` positions. Of a weight that cannot be read as it lies, `weight_rows`
    rows of `weight_groups` groups are packed at a time.
    """

    geometry: _Geometry
    samples: int
    groups: int
    rows: int
    length: int
    weight_groups: int
    weight_rows: int
    workers: int

    @classmethod
    def of(cls, p: ConvProblem) -> _ShiftAdd | None:
        """None where even the smallest block is too large."""
        geometry, size = _Geometry.of(p), _accumulator_size(p)
        first, last = _positions(p)
        Q = last - first
        reach = (geometry.tap_groups - 1) * abs(geometry.dilation) + 1
        weight_rows, weight_groups = _fit(_PACKED_WEIGHT // (size * p.K * p.C_in_g), p.C_out_g, p.groups)
        workers = 1
        budget = (_BUFFER if workers == 1 else _CONCURRENT_BUFFER) // size
        columns = budget // max(p.C_in_g, p.K)  # of the input, and of the product of one row of the weight
        length = min(Q, (columns - reach) // geometry.stride)
        if weight_rows * p.K * p.C_in_g * size > _PACKED_WEIGHT or length < min(Q, 4 * reach // geometry.stride):
            return None
        rows = max(1, min(p.C_out_g, budget // (p.K * (length * geometry.stride + reach))))
        groups = samples = 1
        return cls(geometry, samples, groups, rows, length, weight_groups, weight_rows, workers)

    def workspace(self, p: ConvProblem) -> int:
        geometry, size = self.geometry, _accumulator_size(p)
        span = (self.length - 1) * geometry.stride + (geometry.tap_groups - 1) * abs(geometry.dilation) + 1
        product = self.rows * p.K * span
        sums = self.rows * geometry.phases * self.length
        per_sample = self.samples * self.groups * (product + sums + p.C_in_g * span)
        packed = self.weight_groups * self.weight_rows * p.K * p.C_in_g
        return (packed + self.workers * per_sample) * size

    def run(self, call: _Call) -> None:
        p, geometry = call.p, self.geometry
        if p.transposed and geometry.phases < p.stride:
            call.fill_with_bias()
        in_place = p.transposed and call.w.dtype == call.dtype and call.w.swapaxes(1, 2).flags.c_contiguous
        in_place = in_place and call.w.flags.aligned
        per_groups, per_rows = (p.groups, p.C_out_g) if in_place else (self.weight_groups, self.weight_rows)
        packed = _Scratch(call.dtype)
        first, last = _positions(p)
        for g in _slices(0, p.groups, per_groups):
            for m in _slices(0, p.C_out_g, per_rows):
                w = call.w[g, m].swapaxes(2, 3)
                if not in_place:
                    weight = packed.take("weight", *w.shape)
                    weight[...] = w
                    w = weight
                weight = w.reshape(w.shape[0], -1, p.C_in_g)
                blocks = [
                    (_part(weight, g, groups, m, rows, p.K), n, groups, rows, at.start, at.stop)
                    for n in _slices(0, p.N, self.samples)
                    for groups in _slices(g.start, g.stop, self.groups)
                    for at in _slices(first, last, self.length)
                    for rows in _slices(m.start, m.stop, self.rows)
                ]
                _run_blocks(call, self._compute, blocks, self.workers)

    def _compute(
        self,
        call: _Call,
        weight: Array,
        samples: slice,
        groups: slice,
        rows: slice,
        start: int,
        stop: int,
        scratch: _Scratch,
    ) -> None:
        p, geometry = call.p, self.geometry
        N, G, M = samples.stop - samples.start, groups.stop - groups.start, rows.stop - rows.start
        R, T = geometry.phases, stop - start
        direct = call.y_direct and geometry.interleave == 1
        if direct:
            sums = call.y[samples, groups, rows, None, _outputs(p, 0, start, stop)[2]]
        else:
            sums = scratch.take("sums", N, G, M, R, T)
        bias = call.bias(groups, rows)
        sums[...] = 0 if bias is None else bias[:, :, None, None]
        low, high = geometry.window(start, stop, slice(0, geometry.tap_groups))
        low, high = max(low, 0), min(high, p.L_in)
        if low < high:
            x = call.read(samples, groups, slice(0, p.C_in_g), low, high, scratch)
            product = scratch.take("product", N, G, M * p.K, high - low)
            np.matmul(weight, x, out=product)
            product = product.reshape(N, G, M, p.K, high - low)
            for j in range(geometry.tap_groups):
                first, last, read = geometry.reading(j, start, stop, low, high)
                if first < last:
                    taps = slice(j * geometry.interleave, min(j * geometry.interleave + R, p.K))
                    fed = sums[..., : taps.stop - taps.start, first - start : last - start]
                    np.add(fed, product[..., taps, read.start - low : read.stop - low : read.step], out=fed)
        if not direct:
            call.store(samples, groups, rows, start, stop, sums)


# -- toeplitz --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Toeplitz:
    """Windows of `tile` positions each times a banded matrix, for `groups` groups at a time.

    A block takes `windows` windows of each of `samples` samples.
    """

    geometry: _Geometry
    safe: _Taps
    tile: int
    groups: int
    samples: int
    windows: int
    workers: int

    @classmethod
    def of(cls, p: ConvProblem, tile: int) -> _Toeplitz | None:
        """None where the phases are interleaved, or where even the smallest band or block is too large."""
        geometry, size = _Geometry.of(p), _accumulator_size(p)
        first, last = _positions(p)
        Q = last - first
        if geometry.interleave > 1:
            return None
        window = p.C_in_g * _window_length(geometry, tile)
        outputs = p.C_out_g * tile
        small = _SMALL_PRODUCT_COMPLEX if p.is_complex else _SMALL_PRODUCT
        lines = small // (window * outputs)
        concurrent = lines >= 16 and p.groups >= 4 and p.flops() > _WORTH_THREADS
        budget = (_CONCURRENT_BUFFER if concurrent else _BUFFER) // size
        if window * max(outputs, 16) > budget:
            return None
        groups = max(1, min(p.groups, budget // (window * outputs)))
        lines = min(lines if concurrent else budget, budget // max(window, outputs))
        windows = min(-(-Q // tile), lines)
        samples = min(p.N, lines // windows)
        groups = max(1, min(groups, budget // (max(window, outputs) * windows * samples), -(-p.groups // 8)))
        return cls(geometry, _Taps.of(p), tile, groups, samples, windows, _MAX_WORKERS if concurrent else 1)

    def workspace(self, p: ConvProblem) -> int:
        window, outputs = p.C_in_g * _window_length(self.geometry, self.tile), p.C_out_g * self.tile
        lines = self.samples * self.windows
        per_group = window * outputs + lines * (2 * window + outputs)
        safe = self.safe.block_workspace(p, self.samples, self.groups, p.C_out_g, self.windows * self.tile)
        return self.workers * (self.groups * per_group * _accumulator_size(p) + safe)

    def run(self, call: _Call) -> None:
        _run_blocks(call, self._compute, [(g,) for g in _slices(0, call.p.groups, self.groups)], self.workers)

    def _compute(self, call: _Call, groups: slice, scratch: _Scratch) -> None:
        band = self._band(call, groups, scratch)
        first, last = _positions(call.p)
        for samples in _slices(0, call.p.N, self.samples):
            for at in _slices(first, last, self.windows * self.tile):
                self._compute_block(call, band, samples, groups, at.start, at.stop, scratch)

    def _band(self, call: _Call, groups: slice, scratch: _Scratch) -> Array:
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

    def _compute_block(
        self, call: _Call, band: Array, samples: slice, groups: slice, start: int, stop: int, scratch: _Scratch
    ) -> None:
        p, geometry = call.p, self.geometry
        G, C, U, M, tile = band.shape
        N, windows = samples.stop - samples.start, -(-(stop - start) // tile)
        low, _ = geometry.window(start, stop, slice(0, geometry.tap_groups))
        high = low + (windows - 1) * tile * geometry.stride + U
        x = call.read(samples, groups, slice(0, C), low, high, scratch)
        panel = scratch.take("panel", G, N, windows, C, U)
        s_n, s_g, s_c, s_l = x.strides
        np.copyto(panel, as_strided(x, panel.shape, (s_g, s_n, s_l * tile * geometry.stride, s_c, s_l)))
        sums = scratch.take("sums", G, N * windows, M * tile)
        np.matmul(panel.reshape(G, N * windows, C * U), band.reshape(G, C * U, M * tile), out=sums)
        if not _is_finite(sums):
            self.safe.compute_block(call, samples, groups, slice(0, M), start, stop, scratch)
            return
        bias = call.bias(groups, slice(0, M))
        sums = sums.reshape(G, N, windows, M, tile)
        if bias is not None:
            sums += bias[:, None, None, :, None]
        y = call.y[samples, groups, :, _outputs(p, 0, start, stop)[2]]
        sums = sums.transpose(1, 0, 3, 2, 4)
        whole = (stop - start) // tile
        y[..., : whole * tile].reshape(N, G, M, whole, tile)[...] = sums[..., :whole, :]
        if whole < windows:
            y[..., whole * tile :] = sums[..., whole, : stop - start - whole * tile]


def _window_length(geometry: _Geometry, tile: int) -> int:
    return (tile - 1) * geometry.stride + (geometry.tap_groups - 1) * abs(geometry.dilation) + 1


# -- the choice ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _plan(p: ConvProblem) -> tuple[Method, _Form]:
    name, reason, form = _choose(p)
    return Method(name, reason, form.workspace(p)), form


def _choose(p: ConvProblem) -> tuple[str, str, _Taps | _Panels | _ShiftAdd | _Toeplitz]:
    if not _has_geometry(p):
        if p.C_in_g == 1:
            return "depthwise", "one input channel per group: elementwise", _Taps.of(p)
        return "taps", "transposed with both a stride and a dilation: the phases share no window", _Taps.of(p)
    geometry = _Geometry.of(p)
    if p.C_in_g == 1 and p.C_out_g <= 4:
        if p.L_out > 1 and p.K >= 8:
            form = _Toeplitz.of(p, min(p.L_out, 64 if p.stride == 1 else 32))
            if form is not None:
                return "toeplitz", "long kernel", form
        return "depthwise", "one input channel per group: elementwise", _Taps.of(p)
    if (
        p.C_out_g * geometry.phases * 2 <= p.C_in_g * geometry.tap_groups
        and p.stride == 1
        or p.transposed
        and p.C_out_g * p.K < p.C_in_g * geometry.tap_groups
    ):
        form = _ShiftAdd.of(p)
        if form is not None:
            return "shift_add", "few outputs", form
    form = _Panels.of(p)
    if form is None:
        return "taps", "windows too large for a panel", _Taps.of(p)
    return (
        "phases" if p.transposed else "pointwise" if p.K == 1 else "one_channel" if p.C_in_g == 1 else "panels",
        "dense",
        form,
    )
