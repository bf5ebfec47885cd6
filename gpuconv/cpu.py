"""The NumPy path: both operations on the CPU, through BLAS as NumPy offers it, with bounded extra memory.

A transposed problem is seen as an ordinary convolution that yields ``stride`` neighbouring outputs, its phases, at each
position (`_Geometry`). The output is cut into blocks, and `method` chooses, from the problem alone, how a block is
computed:

- taps: one product ``weight[:, :, k] @ input[:, shifted]`` per tap, summed. Padding is left out rather than multiplied
  by, so this form serves every problem and every value. Where a group has one input channel the product is elementwise.
- panels: the windows of a block are copied side by side into a panel, for one product with the weight as it lies.
- shift-add: one product of all taps with the input as it lies, whose rows are then shifted and summed.
- toeplitz: a few neighbouring outputs of one group as one product of their common window with a banded matrix.

The last three multiply zeros: padding, absent taps, the rest of the band. A zero is harmless until it meets an infinity
or a NaN; the element it spoils is then not finite either. So each block that could be spoilt is checked while it is in
the cache, and one that is not finite is computed again by taps.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from .problem import ITEMSIZE, ConvProblem

Array = npt.NDArray[Any]

_MIB = 1024 * 1024

_ACCUMULATOR = {"float16": "float32", "bfloat16": "float32"}

# Bytes of the largest scratch buffers of one worker.
_PACKED_WEIGHT = 6 * _MIB
_PANEL = 4 * _MIB
_PRODUCT = 2 * _MIB
_STAGED_INPUT = 1 * _MIB
_TAP_CHANNELS = 1024

# Elements per block of the elementwise form: two operands and the result stay in a second-level cache of 1 MiB.
_ELEMENTWISE_BLOCK = 32 * 1024

# OpenBLAS runs a product of at most this many multiply-adds on the calling thread (interface/gemm.c), so that several
# Python threads can run such products at once; larger ones take turns, each using all of the library's threads.
_SINGLE_THREADED = 64 * 1024 * 4

# Operations from which starting a thread pays: it costs some 0.1 ms.
_WORTH_THREADS = 4_000_000

# Extra memory grows with the number of workers, so it is bounded.
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
    if 0 in problem.output_shape:
        return Method("nothing", "the output is empty", 0)
    if 0 in problem.input_shape:
        return Method("bias", "the input is empty, so every sum is", 0)
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
    if output.size == 0:
        return
    call = _Call(problem, input, weight, bias, output)
    if input.size == 0:
        call.fill_with_bias()
        return
    plan = _plan(problem)
    plan.run(call, plan)


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

    def window(self, start: int, stop: int) -> tuple[int, int]:
        """The input positions that the positions start to stop read: the first, and the one behind the last."""
        reach = (self.tap_groups - 1) * self.dilation
        return (
            start * self.stride + self.offset + min(0, reach),
            (stop - 1) * self.stride + self.offset + max(0, reach) + 1,
        )

    def reading(self, j: int, low: int, high: int) -> tuple[int, int]:
        """The positions whose tap group j reads the input positions from low to high."""
        shift = self.offset + j * self.dilation
        return -((shift - low) // self.stride), -((shift - high) // self.stride)


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

    def read(self, samples: slice, groups: slice, start: int, stop: int, scratch: _Scratch) -> Array:
        """The input from position start to stop as (samples, groups, C_in_g, stop - start), zeros outside of it.

        A view where BLAS can read the input as it lies, else a copy in the accumulator's dtype.
        """
        x = self.x[samples, groups]
        if self.x_direct and start >= 0 and stop <= self.p.L_in:
            return x[..., start:stop]
        staged = scratch.take("input", *x.shape[:3], stop - start)
        low = min(max(start, 0), stop)
        high = max(min(stop, self.p.L_in), low)
        staged[..., : low - start] = 0
        staged[..., low - start : high - start] = x[..., low:high]
        staged[..., high - start :] = 0
        return staged

    def store(self, samples: slice, groups: slice, rows: slice, start: int, stop: int, sums: Array) -> None:
        """Add the bias to `sums` (samples, groups, rows, phases, stop - start), in place, and write the outputs."""
        if self.b is not None:
            sums += self.b[groups, rows, None, None]
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


def _run_blocks(call: _Call, compute: Callable[..., None], blocks: Sequence[tuple[Any, ...]], concurrent: bool) -> None:
    """Call ``compute(call, *block, scratch)`` for each block, on several threads if `concurrent`.

    The blocks write disjoint parts of the output, so neither their order nor the number of threads changes a bit.
    """
    workers = min(len(blocks), _usable_cpus(), _MAX_WORKERS) if concurrent else 1
    pending = deque(blocks)

    def work() -> None:
        scratch = _Scratch(call.dtype)
        with np.errstate(all="ignore"):
            while True:
                try:
                    block = pending.popleft()
                except IndexError:
                    return
                compute(call, *block, scratch)

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


# -- taps ------------------------------------------------------------------------------------------------------------


def _run_taps(call: _Call, plan: _Plan) -> None:
    p = call.p
    phases = _phases(p)
    if p.transposed and len(phases) < p.stride:
        call.fill_with_bias()
    blocks = _taps_blocks(p, slice(0, p.N), slice(0, p.groups), slice(0, p.C_out_g), *_positions(p))
    _run_blocks(call, _compute_taps, list(blocks), plan.concurrent)


def _compute_by_taps(
    call: _Call, samples: slice, groups: slice, rows: slice, start: int, stop: int, scratch: _Scratch
) -> None:
    """Compute a block of the output by taps, whatever form the rest is computed by."""
    for block in _taps_blocks(call.p, samples, groups, rows, start, stop):
        _compute_taps(call, *block, scratch)


def _taps_blocks(
    p: ConvProblem, samples: slice, groups: slice, rows: slice, start: int, stop: int
) -> Iterator[tuple[slice, slice, slice, _Phase, int, int]]:
    per_length, per_rows, per_groups, per_samples = _taps_extents(p)
    for phase in _phases(p):
        low, high, _ = _outputs(p, phase.phase, start, stop)
        for n in _slices(samples.start, samples.stop, per_samples):
            for g in _slices(groups.start, groups.stop, per_groups):
                for m in _slices(rows.start, rows.stop, per_rows):
                    for at in _slices(low, high, per_length):
                        yield n, g, m, phase, at.start, at.stop


def _taps_extents(p: ConvProblem) -> list[int]:
    """Block extents: positions, rows, groups, samples."""
    if p.C_in_g == 1:
        return _fit(_ELEMENTWISE_BLOCK, p.L_out, p.C_out_g, p.groups, p.N)
    budget = _PRODUCT // _accumulator_size(p)
    rows, channels = min(p.C_out_g, 256), min(p.C_in_g, _TAP_CHANNELS)
    largest = max(rows, channels)
    length = min(p.L_out, budget // largest)
    groups = max(1, min(p.groups, budget // (largest * max(length, min(rows, channels)))))
    samples = max(1, min(p.N, budget // (largest * length * groups)))
    return [length, rows, groups, samples]


def _taps_bytes(p: ConvProblem) -> int:
    """A bound on the scratch memory of one block."""
    size = _accumulator_size(p)
    length, rows, groups, samples = _taps_extents(p)
    sums = samples * groups * rows * length
    if p.C_in_g == 1:
        return 2 * sums * size + _STAGED_INPUT
    channels = min(p.C_in_g, _TAP_CHANNELS)
    return (2 * sums + groups * channels * (rows + samples * length)) * size + _STAGED_INPUT


def _accumulator_size(p: ConvProblem) -> int:
    return ITEMSIZE[_ACCUMULATOR.get(p.dtype, p.dtype)]


def _compute_taps(
    call: _Call, samples: slice, groups: slice, rows: slice, phase: _Phase, start: int, stop: int, scratch: _Scratch
) -> None:
    p = call.p
    _, _, at = _outputs(p, phase.phase, start, stop)
    y = call.y[samples, groups, rows, at]
    direct = call.y_direct and (at.step is None or at.step == 1)
    sums = y if direct else scratch.take("sums", *y.shape)
    terms = []
    for k, shift in phase.taps:
        low = max(start, -(shift // phase.step))
        high = min(stop, (p.L_in - 1 - shift) // phase.step + 1)
        if low < high:
            read = slice(low * phase.step + shift, (high - 1) * phase.step + shift + 1, phase.step)
            terms.append((slice(low - start, high - start), k, read))
    # A tap that feeds every output of the block goes first, so that its product need not be added to anything.
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
    for c in _slices(0, p.C_in_g, _TAP_CHANNELS):
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
    if call.b is not None:
        sums += call.b[groups, rows, None]
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


def _run_panels(call: _Call, plan: _Plan) -> None:
    p, geometry = call.p, plan.geometry
    if p.transposed and geometry.phases < p.stride:
        call.fill_with_bias()
    in_place = not p.transposed and call.w.dtype == call.dtype and call.w.flags.c_contiguous and call.w.flags.aligned
    per_groups, per_rows = (p.groups, p.C_out_g) if in_place else (plan.weight_groups, plan.weight_rows)
    packed = _Scratch(call.dtype)
    first, last = _positions(p)
    for g in _slices(0, p.groups, per_groups):
        for m in _slices(0, p.C_out_g, per_rows):
            w = call.w[g, m]
            weight = w.reshape(*w.shape[:2], -1) if in_place else _pack_weight(geometry, w, packed)
            blocks = [
                (plan, weight[groups.start - g.start : groups.stop - g.start], n, groups, m, at.start, at.stop)
                for n in _slices(0, p.N, plan.samples)
                for groups in _slices(g.start, g.stop, plan.groups)
                for at in _slices(first, last, plan.length)
            ]
            _run_blocks(call, _compute_panel, blocks, plan.concurrent)


def _pack_weight(geometry: _Geometry, w: Array, scratch: _Scratch) -> Array:
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


def _compute_panel(
    call: _Call,
    plan: _Plan,
    weight: Array,
    samples: slice,
    groups: slice,
    rows: slice,
    start: int,
    stop: int,
    scratch: _Scratch,
) -> None:
    p, geometry = call.p, plan.geometry
    windows = _windows(call, geometry, samples, groups, start, stop, scratch)
    low, high = geometry.window(start, stop)
    spoilable = low < 0 or high > p.L_in or geometry.interleave * geometry.tap_groups > max(p.K, geometry.interleave)
    G, N, T, R = windows.shape[0], samples.stop - samples.start, stop - start, geometry.phases
    direct = call.y_direct and geometry.interleave == 1 and N == 1
    for m in _slices(rows.start, rows.stop, plan.rows):
        if direct:
            sums = call.y[samples.start, groups, m, _outputs(p, 0, start, stop)[2]]
        else:
            sums = scratch.take("sums", G, (m.stop - m.start) * R, N * T)
        np.matmul(weight[:, (m.start - rows.start) * R : (m.stop - rows.start) * R], windows, out=sums)
        if spoilable and not _is_finite(sums):
            _compute_by_taps(call, samples, groups, m, start, stop, scratch)
        elif not direct:
            call.store(samples, groups, m, start, stop, sums.reshape(G, -1, R, N, T).transpose(3, 0, 1, 2, 4))
        elif call.b is not None:
            sums += call.b[groups, m, None]


def _windows(
    call: _Call, geometry: _Geometry, samples: slice, groups: slice, start: int, stop: int, scratch: _Scratch
) -> Array:
    """The windows of a block as (groups, C_in_g*tap_groups, samples*positions)."""
    p = call.p
    N, G, T = samples.stop - samples.start, groups.stop - groups.start, stop - start
    C, J = p.C_in_g, geometry.tap_groups
    low, high = geometry.window(start, stop)
    inside = call.x_direct and low >= 0 and high <= p.L_in
    if not inside and N * G * C * (high - low) * call.dtype.itemsize > _STAGED_INPUT:
        return _windows_by_taps(call, geometry, samples, groups, start, stop, scratch)
    x = call.read(samples, groups, low, high, scratch)
    if J == 1 and geometry.stride == 1 and N == 1:
        return x[0]
    panel = scratch.take("panel", G, C, J, N, T)
    s_n, s_g, s_c, s_l = x.strides
    origin = start * geometry.stride + geometry.offset - low
    strides = (s_g, s_c, s_l * geometry.dilation, s_n, s_l * geometry.stride)
    np.copyto(panel, as_strided(x[..., origin:], (G, C, J, N, T), strides))
    return panel.reshape(G, C * J, N * T)


def _windows_by_taps(
    call: _Call, geometry: _Geometry, samples: slice, groups: slice, start: int, stop: int, scratch: _Scratch
) -> Array:
    """As `_windows`, for windows that span too much to be staged in one piece."""
    p = call.p
    x = call.x[samples, groups].transpose(1, 2, 0, 3)
    panel = scratch.take("panel", *x.shape[:2], geometry.tap_groups, x.shape[2], stop - start)
    for j in range(geometry.tap_groups):
        low, high = geometry.reading(j, 0, p.L_in)
        low = min(max(low, start), stop)
        high = max(min(high, stop), low)
        at = low * geometry.stride + geometry.offset + j * geometry.dilation
        panel[:, :, j, :, : low - start] = 0
        if low < high:
            read = slice(at, at + (high - low - 1) * geometry.stride + 1, geometry.stride)
            panel[:, :, j, :, low - start : high - start] = x[..., read]
        panel[:, :, j, :, high - start :] = 0
    return panel.reshape(x.shape[0], x.shape[1] * geometry.tap_groups, -1)


# -- the choice ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """A form with its block extents; `length` counts positions."""

    method: Method
    run: Callable[[_Call, _Plan], None]
    geometry: _Geometry
    length: int = 1
    rows: int = 1
    groups: int = 1
    samples: int = 1
    weight_groups: int = 1
    weight_rows: int = 1
    concurrent: bool = False


@lru_cache(maxsize=4096)
def _plan(p: ConvProblem) -> _Plan:
    geometry = _Geometry.of(p)
    if p.C_in_g == 1 and (p.C_out_g <= 4 or not _has_geometry(p)):
        return _plan_taps(p, "depthwise", "one input channel per group: elementwise products")
    if not _has_geometry(p):
        return _plan_taps(p, "taps", "transposed with both a stride and a dilation: the phases share no window")
    if p.C_in_g * geometry.tap_groups * _accumulator_size(p) > _PANEL // 16:
        return _plan_taps(p, "taps", "windows too large for a panel")
    return _plan_panels(p, geometry)


def _plan_taps(p: ConvProblem, name: str, reason: str) -> _Plan:
    concurrent = p.C_in_g == 1 and p.flops() > _WORTH_THREADS
    return _Plan(
        Method(name, reason, _taps_bytes(p) * (_MAX_WORKERS if concurrent else 1)),
        _run_taps,
        None,
        concurrent=concurrent,
    )


def _plan_panels(p: ConvProblem, geometry: _Geometry) -> _Plan:
    size = _accumulator_size(p)
    first, last = _positions(p)
    Q, depth, R = last - first, p.C_in_g * geometry.tap_groups, geometry.phases
    panel, product = _PANEL // size, _PRODUCT // size
    length = min(Q, panel // depth, product // min(p.C_out_g * R, 512))
    length = -(-Q // -(-Q // length))
    rows = max(1, min(p.C_out_g, product // (length * R)))
    groups = samples = 1
    if length == Q and rows == p.C_out_g:
        groups = max(1, min(p.groups, panel // (depth * Q), product // (rows * R * Q)))
        if groups == p.groups and Q < 128:
            samples = max(1, min(p.N, 512 // Q, panel // (depth * Q * groups), product // (rows * R * Q * groups)))
    weight_rows, weight_groups = _fit(_PACKED_WEIGHT // (size * depth * R), p.C_out_g, p.groups)
    workspace = (
        (groups * samples * length * (depth + rows * R) + weight_groups * weight_rows * depth * R) * size
        + _STAGED_INPUT
        + _taps_bytes(p)
    )
    if p.transposed:
        name, reason = "phases", "transposed: its phases as one convolution of stride 1"
    elif p.K == 1:
        name, reason = "pointwise", "one tap: a matrix product"
    elif p.C_in_g == 1:
        name, reason = "one_channel", "one input channel per group"
    else:
        name, reason = "panels", "the general case: panels of windows times the weight"
    return _Plan(
        Method(name, reason, workspace),
        _run_panels,
        geometry,
        length,
        rows,
        groups,
        samples,
        weight_groups,
        weight_rows,
    )
