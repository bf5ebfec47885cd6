"""Computes a plan, by the same code for NumPy and CuPy arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .. import dispatch, runtime
from ..device import Device
from ..edge import source_indices
from ..families import Layout
from ..families.base import PACKED
from ..problem import ConvProblem, WeightGradientProblem
from .plan import Plan, channels_of, spectral_dtype, work_dtype


def transforms(xp: ModuleType) -> Any:
    """The module with the functions fft, ifft, rfft and irfft for NumPy or CuPy arrays.

    Raises:
        ImportError: cuFFT, which CuPy arrays need, cannot be loaded.
    """
    if xp is not np:
        return runtime.fft_module()
    return _of_numpy()


@lru_cache(maxsize=1)
def _of_numpy() -> Any:
    try:
        import scipy.fft
    except ImportError:
        return np.fft
    return scipy.fft


class Executor:
    """Computes a problem by its plan, as `runtime.Executor` does for direct sums; the problem is not empty."""

    __slots__ = ("_conjugate_weight", "_plan")

    def __init__(self, plan: Plan, *, conjugate_weight: bool = False) -> None:
        self._plan = plan
        self._conjugate_weight = conjugate_weight

    def run(self, *arrays: Any, prepared: runtime.PreparedWeight | None = None, samples: Any = None) -> None:
        """Compute on the current device and CuPy's current stream; writes all of the last array, the result.

        Raises:
            ImportError: cuFFT cannot be loaded.
            RuntimeError: the current stream is being captured into a CUDA graph.
        """
        p, output = self._plan.problem, arrays[-1]
        xp = runtime.array_module(output)
        if self._plan.on_gpu:
            what = f"{p.kind}: algorithm 'fft' makes plans of cuFFT, which cannot be done"
            runtime.refuse_during_capture(what, output.data.device_id)
        operands = [None if array is None else runtime.aligned(array) for array in arrays[:-1]]
        result = runtime.aligned(output)
        with np.errstate(all="ignore"):  # of NaN and infinities
            if isinstance(p, ConvProblem):
                x, weight, *others = operands
                work = _Convolution(self._plan, weight, self._conjugate_weight, prepared, xp)
                work.run(x, others[0] if others else None, result)
            else:
                _WeightGradient(self._plan, xp).run(*p.sides(*operands), result)
        if result is not output:
            runtime.assign(output, result)


class _Work:
    """The base class of both kinds of work: the library of the arrays, its transforms and the dtypes."""

    def __init__(self, plan: Plan, xp: ModuleType) -> None:
        self.plan, self.overlap, self.xp, self._library = plan, plan.overlap, xp, transforms(xp)
        self.dtype, self.spectral_dtype = work_dtype(plan.problem.dtype), spectral_dtype(plan.problem.dtype)

    def forward(self, samples: Any) -> Any:
        """The spectra of samples along the last axis, with zeros behind them up to a block."""
        transform = self._library.fft if self.plan.problem.is_complex else self._library.rfft
        return transform(samples, self.overlap.block)

    def inverse(self, spectra: Any, count: int) -> Any:
        """The first samples of blocks, given their spectra along the last axis."""
        transform = self._library.ifft if self.plan.problem.is_complex else self._library.irfft
        return transform(spectra, self.overlap.block)[..., :count]

    def spectra_of(self, blocks: Any, groups: int) -> Any:
        """The spectra of blocks (samples, rows, blocks, groups * channels, length) as (blocks, groups, channels, ...).

        On a GPU a batch that is not full is filled up with zeros, so that all transforms have one shape.
        """
        *several, channels, length = blocks.shape
        if self.plan.on_gpu:
            full = self.xp.zeros((self.plan.batch, channels, length), self.dtype)
            full[: math.prod(several)].reshape(blocks.shape)[...] = blocks
            blocks = full
        spectra = self.forward(blocks)
        return spectra.reshape(-1, groups, channels // groups, spectra.shape[-1])

    def matrices(self, spectra: Any, order: tuple[int, int, int, int]) -> Any:
        return self.xp.ascontiguousarray(spectra.transpose(order))

    def product(self, left: Any, right: Any) -> Any:
        """The products of matrices (groups, frequencies, M, depth) and (groups, frequencies, depth, columns)."""
        if not self.plan.on_gpu:
            return np.matmul(left, right)
        # A convolution with one tap and a group for each product: its bits do not depend on the number of columns.
        p = _product_problem(left.shape, right.shape[-1], str(left.dtype))
        y = self.xp.empty((*left.shape[:3], right.shape[-1]), left.dtype)
        packed = left if isinstance(left, _Packed) else None
        weight = None if packed is not None else left.reshape(p.weight_shape)
        executor = _product_executor(p, int(y.data.device_id), packed is not None)
        executor.run(right.reshape(p.input_shape), weight, y.reshape(p.output_shape), prepared=packed)
        return y


class _Packed(NamedTuple):
    """Matrices that a prepared weight keeps, in the order in which the kernel that multiplies them reads them."""

    shape: tuple[int, int, int, int]
    dtype: np.dtype[Any]
    memory: Any

    def packed(self, _: runtime.Packs) -> Any:
        return self.memory


def _product_problem(left: tuple[int, int, int, int], columns: int, dtype: str) -> ConvProblem:
    groups, frequencies, M, depth = left
    products = groups * frequencies
    return ConvProblem("conv1d", 1, products * depth, products * M, columns, 1, groups=products, dtype=dtype)


def products(plan: Plan, device: Device) -> list[dispatch.Choice | None]:
    """The kernels that multiply the matrices of a plan on a GPU, each once, for any weight and for a prepared one."""
    if not plan.by_matrices:
        return []
    found = (_choice(p, device, is_prepared) for p in _product_problems(plan) for is_prepared in (False, True))
    return [*dict.fromkeys(found)]


def kept_bytes(plan: Plan, device: Device | None) -> int:
    """The memory in bytes that a prepared weight keeps for a plan on a GPU or, for None, on the CPU.

    It holds the spectra, or their packed form if the kernels of the products pack them.
    """
    if device is None or not plan.by_matrices:
        return plan.spectra_bytes
    total = 0
    for p in _product_problems(plan):
        choice = _choice(p, device, is_prepared=True)
        packed = 0 if choice is None else choice.plan.scratch_bytes(PACKED)
        total += packed or math.prod(p.weight_shape) * p.itemsize
    return total


def _product_problems(plan: Plan) -> Iterator[ConvProblem]:
    """The products of matrices of each chunk of a plan on a GPU."""
    dtype = str(spectral_dtype(plan.problem.dtype))
    for groups, channels in plan.chunks():
        written = (channels.stop - channels.start) * plan.overlap.phases_out
        depth, columns = plan.read, plan.batch
        if isinstance(plan.problem, WeightGradientProblem):
            depth, columns = columns, depth
        yield _product_problem((groups.stop - groups.start, plan.frequencies, written, depth), columns, dtype)


def _choice(problem: ConvProblem, device: Device, is_prepared: bool) -> dispatch.Choice | None:
    return dispatch.choose(problem, replace(Layout.contiguous(problem), is_prepared=is_prepared), device)


@lru_cache(maxsize=256)
def _product_executor(
    problem: ConvProblem,
    device_index: int,  # noqa: ARG001 (one for each GPU)
    is_prepared: bool,
) -> runtime.Executor:
    return runtime.make_executor(problem, ("input", "weight"), (None, None), None, is_prepared=is_prepared)


class _Convolution(_Work):
    """A forward or transposed convolution, or the gradient of an input.

    Args:
        plan: that of the problem.
        weight: that of the problem.
        conjugate: whether the weight is conjugated first.
        prepared: the prepared weight that keeps the spectra, if the caller has one.
        xp: NumPy or CuPy.
    """

    def __init__(
        self, plan: Plan, weight: Any, conjugate: bool, prepared: runtime.PreparedWeight | None, xp: ModuleType
    ) -> None:
        super().__init__(plan, xp)
        self._weight, self._conjugate = weight, conjugate
        self._kept: list[Any] | None = None if prepared is None else prepared.packed(self)

    @property
    def key(self) -> tuple[Any, ...]:
        """The same object for all convolutions whose spectra of one weight are the same."""
        plan, p = self.plan, self.plan.problem
        layout = plan.groups, plan.channels, plan.by_matrices, plan.on_gpu
        return _shared((p.kind, p.groups, p.stride, p.dilation, p.dtype, self._conjugate, *layout))

    def pack(self, weight: Any) -> list[Any]:
        """The spectra of all chunks of a weight, as the products read them."""
        return [self._packed(self._spectra(weight, *chunk)) for chunk in self.plan.chunks()]

    def _packed(self, spectra: Any) -> Any:
        if not (self.plan.on_gpu and self.plan.by_matrices):
            return spectra
        p = _product_problem(spectra.shape, self.plan.batch, str(spectra.dtype))
        packing = _product_executor(p, int(spectra.data.device_id), True).packing
        return spectra if packing is None else _Packed(spectra.shape, spectra.dtype, packing.pack(spectra))

    def _spectra(self, weight: Any, groups: slice, channels: slice) -> Any:
        """The conjugates of the spectra of the taps of a chunk, with which blocks correlate.

        (groups, channels of the result, of the input, frequencies), or with the frequencies before the channels.
        """
        p, o = self.plan.problem, self.overlap
        of_input, of_result = channels_of(p)
        number = groups.stop - groups.start
        if o.transposed:
            w = weight[groups.start * of_input : groups.stop * of_input, channels]
        else:
            first = groups.start * of_result + channels.start
            w = weight[first : first + number * (channels.stop - channels.start)]
        w = o.taps_of(w.astype(self.dtype, copy=False), number, self.xp)
        if self.plan.problem.is_complex and not self._conjugate:
            w = w.conj()
        spectra = self.forward(w).conj()
        return self.matrices(spectra, (0, 3, 1, 2)) if self.plan.by_matrices else spectra

    def run(self, input: Any, bias: Any | None, output: Any) -> None:
        p, xp = self.plan.problem, self.xp
        assert isinstance(p, ConvProblem)
        x, y = (a if a.ndim == 3 else a[np.newaxis] for a in (input, output))
        target = y if p is self.plan.given else xp.empty((p.N, p.C_out, p.L_out), self.dtype)
        if p.transposed or 0 in x.shape:  # there are outputs that no block gives
            target[...] = 0 if bias is None else bias[:, np.newaxis]
        if 0 not in x.shape:
            for place, chunk in enumerate(self.plan.chunks()):
                spectra = self._spectra(self._weight, *chunk) if self._kept is None else self._kept[place]
                self._run_chunk(x, spectra, bias, target, *chunk)
        if target is not y:
            self._fold(target, y)

    def _run_chunk(self, x: Any, taps: Any, bias: Any | None, y: Any, groups: slice, channels: slice) -> None:
        p, o, xp = self.plan.problem, self.overlap, self.xp
        of_input, of_result = channels_of(p)
        number, written = groups.stop - groups.start, channels.stop - channels.start
        first = groups.start * of_result + channels.start
        x = x[:, groups.start * of_input : groups.stop * of_input]
        y = y[:, first : first + number * written]
        if bias is not None:
            of_chunk = bias[first : first + number * written].astype(self.dtype, copy=False)
            bias = xp.repeat(of_chunk, o.phases_out)[:, np.newaxis]
        for samples, rows, blocks in self.plan.batches():
            o.store(self._results(x[samples], taps, bias, rows, blocks, number), y[samples], rows, blocks, xp)

    def _results(self, x: Any, taps: Any, bias: Any | None, rows: slice, blocks: slice, groups: int) -> Any:
        """The results of a batch. This is a function, so that its arrays are freed before those of the next batch."""
        o = self.overlap
        windows = o.windows(x, rows, blocks, self.dtype, self.xp)
        several = windows.shape[:3]
        results = self.inverse(self._multiply(taps, self.spectra_of(windows, groups)), o.new)[: math.prod(several)]
        results = results.reshape(*several, -1, o.new)
        if bias is not None:
            results += bias
        return results

    def _multiply(self, taps: Any, spectra: Any) -> Any:
        """The spectra of results, (blocks, groups, channels, frequencies)."""
        if self.plan.by_matrices:
            return self.product(taps, self.matrices(spectra, (1, 3, 2, 0))).transpose(3, 0, 2, 1)
        result = taps[:, :, 0] * spectra[:, :, :1]
        for c in range(1, spectra.shape[2]):
            result += taps[:, :, c] * spectra[:, :, c : c + 1]
        return result

    def _fold(self, padded: Any, output: Any) -> None:
        """Add the results in the padding to the results that the padding stands for, and round the sums."""
        p = self.plan.given
        assert isinstance(p, ConvProblem)
        left, right, L = p.padding_left, p.padding_right, p.L_out
        sums = padded[..., left : left + L]
        for first, stop in ((-left, 0), (L, L + right)):
            values = padded[..., left + first : left + stop]
            if p.padding_mode == "replicate" and first < stop:
                sums[..., 0 if first < 0 else L - 1] += values.sum(axis=-1)
            elif first < stop:  # each stands for a different sample
                sums[..., self.xp.asarray(source_indices(p.padding_mode, first, stop, L))] += values
        output[...] = sums


@lru_cache(maxsize=4096)
def _shared(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """One object for equal keys."""
    return key


class _WeightGradient(_Work):
    """The gradient of a weight."""

    def run(self, coarse: Any, fine: Any, output: Any) -> None:
        p = self.plan.problem
        assert isinstance(p, WeightGradientProblem)
        coarse, fine = (a if a.ndim == 3 else a[np.newaxis] for a in (coarse, fine))
        for groups, channels in self.plan.chunks():
            number = groups.stop - groups.start
            first = groups.start * p.C_coarse_g + channels.start
            rows = slice(first, first + number * (channels.stop - channels.start))
            sums = self._sums(coarse[:, rows], fine[:, groups.start * p.C_fine_g : groups.stop * p.C_fine_g], number)
            sums = self.inverse(sums, self.overlap.taps)
            if p.conjugate_fine:
                sums = sums.conj()
            sums = sums.reshape(rows.stop - rows.start, -1, self.overlap.taps)
            output[rows] = self.overlap.weight_of(sums, p.K)

    def _sums(self, coarse: Any, fine: Any, groups: int) -> Any:
        """The sum over blocks of conj(coarse) * fine, spectra (groups, channels of coarse, of fine, frequencies)."""
        plan, o = self.plan, self.overlap
        shape: tuple[int, ...] = (groups, coarse.shape[1] // groups, fine.shape[1] // groups * o.phases_in)
        shape = (groups, plan.frequencies, *shape[1:]) if plan.by_matrices else (*shape, plan.frequencies)
        sums = self.xp.zeros(shape, self.spectral_dtype)
        for samples, rows, blocks in plan.batches():
            self._add(coarse[samples], fine[samples], rows, blocks, groups, sums)
        return sums.transpose(0, 2, 3, 1) if plan.by_matrices else sums

    def _add(self, coarse: Any, fine: Any, rows: slice, blocks: slice, groups: int, sums: Any) -> None:
        """Add the products of a batch. This is a function, so that its arrays are freed before the next batch."""
        o, xp = self.overlap, self.xp
        left = self.spectra_of(o.pieces(coarse, rows, blocks, self.dtype, xp), groups)
        xp.conjugate(left, out=left)
        right = self.spectra_of(o.windows(fine, rows, blocks, self.dtype, xp), groups)
        if self.plan.by_matrices:
            sums += self.product(self.matrices(left, (1, 3, 2, 0)), self.matrices(right, (1, 3, 0, 2)))
        else:
            for a, b in zip(left, right, strict=True):
                sums += a[:, :, np.newaxis] * b[:, np.newaxis]
