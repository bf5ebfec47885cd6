"""`algorithm="fft"` and "auto": convolutions, their transposes and weight gradients by the FFT of overlapping blocks.

`gpuconv.overlap` makes blocks of a problem. The spectra of the blocks are multiplied by those of the taps, for each
frequency a product of matrices over the channels of a group, and the results of each block are those that the circular
convolution leaves whole (overlap-save, for all operations: each result comes from one block, and none are added up). A
weight gradient adds the products of the spectra of all blocks, and transforms back their sum.

Everything here runs on NumPy's and on CuPy's arrays, but for the transforms, which are cuFFT's through cupy.fft, or
SciPy's, or without SciPy NumPy's. On a GPU gpuconv's own kernels multiply the matrices, and all transforms have one
shape, which follows from the layer alone: the bits of a result depend on the samples of its block, and no others.

Blocks are computed some at a time, so that the memory for them follows from the layer, and not from N or L.

Errors are bounded by norms (`gpuconv.reference.Sums.error_bound`): a result that is small beside the others of its
block has a large relative error, and a NaN or an infinity spoils all results of its block.

Source: T. G. Stockham, High-speed convolution and correlation, AFIPS 1966.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from . import dispatch, runtime
from .costs import LAUNCH_US, clock_under_load, cuda_cores, memory_bytes_per_cycle
from .device import Device
from .dispatch import BY_FFT, AlgorithmError
from .dtypes import FORMATS, INTEGERS
from .edge import source_indices
from .families import Layout
from .overlap import Overlap
from .problem import ConvProblem, Problem, WeightGradientProblem

FftProblem: TypeAlias = ConvProblem | WeightGradientProblem

# Bytes of the samples of a batch of blocks, and of the spectra of taps that are held at a time: the former stay in the
# caches. One block, and the spectra of one output channel, may be larger; they are taken by themselves.
BATCH_BYTES = {"cpu": 2**20, "gpu": 2**24}
SPECTRA_BYTES = {"cpu": 2**26, "gpu": 2**29}

# Fewer products of two spectra than these are computed one after the other: NumPy's products of small matrices cost
# some 200 ns each, and there is one for each frequency.
SMALL_PRODUCT = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """How a problem is computed: a pure function of the problem and of whether it is on a GPU.

    Attributes:
        given: the problem.
        problem: that whose blocks are computed: where the padding of the given one means samples of its output, the one
            whose output is longer by the padding, and what lies in that is added to those samples.
        overlap: its blocks.
        groups: that are computed at a time.
        channels: output channels of each of them that are computed at a time; of a weight gradient those of `coarse`.
        batch: blocks that are computed at a time.
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
        channels_read, written = _channels(p)
        read = channels_read * overlap.phases_in
        of_channel = read * overlap.phases_out * overlap.block * _work_dtype(p.dtype).itemsize
        channels = max(1, min(written, SPECTRA_BYTES[kind] // max(1, of_channel)))
        of_block = max(read, channels * overlap.phases_out, 1) * overlap.block * _work_dtype(p.dtype).itemsize
        groups = 1
        if channels >= written:
            of_group = max(1, of_channel * written)
            groups = max(1, min(p.groups, SPECTRA_BYTES[kind] // of_group, BATCH_BYTES[kind] // of_block))
        batch = max(1, BATCH_BYTES[kind] // (of_block * groups))
        return cls(problem, p, overlap, groups, channels, batch, on_gpu)

    @property
    def read(self) -> int:
        """Channels of the input of a group, times their phases."""
        return _channels(self.problem)[0] * self.overlap.phases_in

    @property
    def written(self) -> int:
        """Output channels of a group that are computed at a time, times their phases."""
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

    @property
    def workspace_bytes(self) -> int:
        """A bound on the memory beside the arrays of the call.

        It follows from the layer, but for one more output where what lies in its padding is added to it.
        """
        size = _work_dtype(self.problem.dtype).itemsize
        spectrum, block = self.frequencies * _spectral_dtype(self.problem.dtype).itemsize, self.overlap.block * size
        copies = 2 if self.by_matrices else 1  # with the frequency in front, and behind
        taps = self.groups * self.read * self.written * (copies + 1) * spectrum
        of_read = block * (2 if self.on_gpu else 1) + copies * spectrum
        of_written = block + (copies + (0 if self.by_matrices else 1)) * spectrum
        blocks = self.batch * self.groups * (self.read * of_read + self.written * of_written)
        p = self.problem
        fold = 0
        if isinstance(p, ConvProblem) and isinstance(self.given, ConvProblem) and p is not self.given:
            fold = p.N * p.C_out * (p.L_out + 2 * max(self.given.padding)) * size
        return taps + blocks + fold

    @property
    def spectra_bytes(self) -> int:
        """What a prepared weight keeps for it."""
        p = self.problem
        spectrum = self.frequencies * _spectral_dtype(p.dtype).itemsize
        return p.groups * self.read * _channels(p)[1] * self.overlap.phases_out * spectrum

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Groups and output channels of each of them that are computed at a time."""
        for first in range(0, self.problem.groups, self.groups):
            groups = slice(first, min(first + self.groups, self.problem.groups))
            for channel in range(0, _channels(self.problem)[1], self.channels):
                yield groups, slice(channel, min(channel + self.channels, _channels(self.problem)[1]))

    def batches(self) -> Iterator[tuple[slice, slice, slice]]:
        """Samples, rows and blocks that are computed at a time: `batch` blocks in all, or fewer."""
        o = self.overlap
        rows = min(o.rows, self.batch)
        blocks = min(o.blocks, self.batch // rows)
        samples = self.batch // (rows * max(1, blocks))
        for n in range(0, self.problem.N, samples):
            for b in range(0, o.blocks, max(1, blocks)):
                for r in range(0, o.rows, rows):
                    yield (
                        slice(n, min(n + samples, self.problem.N)),
                        slice(r, min(r + rows, o.rows)),
                        slice(b, min(b + blocks, o.blocks)),
                    )


def _channels(p: FftProblem) -> tuple[int, int]:
    """Those of a group that are read in blocks, and those of the result; of a weight gradient fine and coarse."""
    return (p.C_in_g, p.C_out_g) if isinstance(p, ConvProblem) else (p.C_fine_g, p.C_coarse_g)


def _work_dtype(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype if FORMATS[dtype].is_complex else FORMATS[dtype].accumulator)


def _spectral_dtype(dtype: str) -> np.dtype[Any]:
    return np.result_type(_work_dtype(dtype), np.complex64)


def transforms(xp: ModuleType) -> Any:
    """What has the functions fft, ifft, rfft and irfft of the arrays of NumPy or CuPy.

    Raises:
        ImportError: of CuPy's arrays, where cuFFT cannot be loaded.
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


def refusal(problem: Problem) -> str | None:
    """Why the FFT does not take a problem; None where it does."""
    if not isinstance(problem, ConvProblem | WeightGradientProblem):
        return "takes convolutions and the gradients of their inputs and weights"
    if problem.dtype in INTEGERS:
        return f"takes no {problem.dtype}, whose sums are exact"
    if isinstance(problem, ConvProblem) and problem.fusion:
        return f"fuses nothing ({problem.fusion})"
    return None


@lru_cache(maxsize=4096)
def choose(problem: Problem, algorithm: str | None, device: Device | None) -> Plan | None:
    """The plan by which a call computes a problem through the FFT, or None where it sums directly.

    Args:
        problem: of any kind.
        algorithm: of the call, "fft" or "auto"; others stand for direct sums.
        device: the GPU, or None for the CPU.

    Raises:
        AlgorithmError: the algorithm is "fft", which does not take the problem.
    """
    if algorithm not in BY_FFT:
        return None
    reason = refusal(problem)
    if reason is not None:
        if algorithm == "fft":
            raise AlgorithmError(f"{problem.kind}: algorithm 'fft' does not take {problem}: {reason}")
        return None
    assert isinstance(problem, ConvProblem | WeightGradientProblem)
    if algorithm == "auto":
        found = costs(problem, device)
        if found.direct_us <= found.fft_us:
            return None
    return Plan.of(problem, on_gpu=device is not None)


class Costs(NamedTuple):
    """What one sample of a layer costs that is as long as so many blocks, predicted, in microseconds.

    On a CPU of one core.
    """

    direct_us: float
    fft_us: float
    blocks: int


# Nanoseconds on one core, of float32; wider numbers cost as many times more. Measured as those of `gpuconv.cpu.costs`.
# A transform, for a sample and a binary digit of the block length, and how much more it costs where a block is larger
# than the caches; a copy of a sample, and of taps, which are conjugated and ordered anew; for a frequency the product
# of two spectra, an element of a matrix in another order, and what a product of matrices costs beside its operations.
_TRANSFORM_NS, _CACHE_BYTES, _BEYOND_CACHES = 0.13, 2**20, 2.5
_COPY_NS, _TAPS_NS = 0.6, 3.0
_PRODUCT_NS, _REORDER_NS, _MATRIX_NS = 0.4, 1.0, 200.0

# Multiply-adds of CUDA cores that kernels reach, where no cost model of theirs says it, and those on small matrices of
# complex numbers, as parts of the peak; and launches of a batch beside its products. Assumptions.
_DIRECT_SHARE, _PRODUCT_SHARE, _LAUNCHES = 0.5, 0.4, 12

# Samples that one cuFFT kernel transforms in shared memory; longer blocks pass through memory again (an assumption).
_ONE_PASS = 2**13


@lru_cache(maxsize=4096)
def costs(problem: FftProblem, device: Device | None) -> Costs:
    """Both ways of computing a layer, on a GPU or for None on the CPU, by the cost models of either.

    They follow from the layer alone, whatever N and L of the problem are: the taps are transformed once for the batch.
    """
    one = _one_batch(problem, Plan.of(problem, on_gpu=device is not None))
    plan = Plan.of(one, on_gpu=device is not None)
    if device is None:
        return Costs(_direct_ns(one) / 1e3, _fft_ns(plan) / 1e3, plan.overlap.rows * plan.overlap.blocks)
    return Costs(_direct_us_on(one, device), _fft_us_on(plan, device), plan.overlap.rows * plan.overlap.blocks)


def _one_batch(p: FftProblem, plan: Plan) -> FftProblem:
    """A layer with a single sample of the length of a batch of blocks, without padding."""
    common = math.gcd(p.stride, p.dilation)
    stride, dilation, rows = p.stride, p.dilation, p.dilation // common
    if rows > plan.batch or p.stride // common > p.K:  # rows are as samples without dilation, phases have one tap
        stride, dilation, rows = min(p.stride // common, p.K), 1, 1
    length = rows * (plan.batch // rows) * plan.overlap.new
    window = (length - 1) * stride + (p.K - 1) * dilation + 1
    plain: dict[str, Any] = {
        "N": 1, "stride": stride, "dilation": dilation, "padding_left": 0, "padding_mode": "zeros", "has_lengths": False
    }  # fmt: skip
    if isinstance(p, WeightGradientProblem):
        return replace(p, L_coarse=length, L_fine=window, **plain)
    plain.update(padding_right=0, output_padding=0, batched=True, has_bias=False)
    # Of the transposed operation rows are longer by all taps but one.
    return replace(p, L_in=max(1, length - rows * (plan.overlap.taps - 1)) if p.transposed else window, **plain)


def _direct_ns(p: FftProblem) -> float:
    from . import cpu

    if isinstance(p, ConvProblem):
        return cpu.cost(p)
    # Measured: a product of matrices for each tap, or with few channels products of vectors.
    return p.flops() * (0.01 + 0.13 / (4 + p.C_fine_g)) * _scale(p)


def _scale(p: FftProblem) -> float:
    return _work_dtype(p.dtype).itemsize / 4


def _fft_ns(plan: Plan) -> float:
    from .cpu.costs import CONVERT, FLOP

    p, o, scale = plan.problem, plan.overlap, _scale(plan.problem)
    blocks, per_group = o.rows * o.blocks, -(-_channels(p)[1] // plan.channels)
    written = _channels(p)[1] * o.phases_out
    far = _BEYOND_CACHES if o.block * _work_dtype(p.dtype).itemsize > _CACHE_BYTES else 1.0
    transform = o.block * math.log2(o.block) * _TRANSFORM_NS * far
    sides = per_group * plan.read + written  # what is read is transformed anew for each chunk of output channels
    one = sides * (transform + o.block * (_COPY_NS + CONVERT.get(p.dtype, 0.0)))
    products = plan.frequencies * plan.read * written
    if plan.by_matrices:
        one += products * 8 * FLOP + plan.frequencies * sides * _REORDER_NS
        one += plan.frequencies * per_group * _MATRIX_NS / plan.batch
    else:
        one += products * _PRODUCT_NS
    taps = plan.read * written * (transform + o.block * _TAPS_NS)
    return p.groups * (blocks * one + taps) * scale


def _direct_us_on(p: FftProblem, device: Device) -> float:
    found = dispatch.choose(p, Layout.contiguous(p), device)
    if found is not None and found.plan.candidates:
        return found.plan.candidates[0][1]
    unit = cuda_cores(device, p.format.accumulator_bytes, is_complex=p.is_complex)
    cycles = p.flops() / 2 / (unit.rate * device.num_sms * _DIRECT_SHARE)
    cycles = max(cycles, p.bytes() / (memory_bytes_per_cycle(device) * device.num_sms))
    return LAUNCH_US + cycles / (1e3 * clock_under_load(device))


def _fft_us_on(plan: Plan, device: Device) -> float:
    p, o = plan.problem, plan.overlap
    blocks, size = o.rows * o.blocks, _work_dtype(p.dtype).itemsize
    chunks, per_group = len(list(plan.chunks())), -(-_channels(p)[1] // plan.channels)
    written = _channels(p)[1] * o.phases_out
    passes = 2 * -(-math.log2(o.block) // math.log2(_ONE_PASS))  # a read and a write each
    # Samples are staged, copied to a batch that is cleared first, and transformed; results are transformed, divided by
    # the block length, and stored; spectra change their order before and behind a product of matrices.
    order = 2 if plan.by_matrices else 0
    moved = blocks * o.block * size * (per_group * plan.read * (5 + passes + order) + written * (passes + 6 + order))
    spectra = plan.read * written * o.block * size
    moved = p.groups * (moved + spectra * (1 + passes + order))
    memory = moved / (memory_bytes_per_cycle(device) * device.num_sms)
    unit = cuda_cores(device, size, is_complex=True)
    products = p.groups * blocks * plan.frequencies * plan.read * written * 4
    arithmetic = products / (unit.rate * device.num_sms * _PRODUCT_SHARE)
    return _LAUNCHES * chunks * LAUNCH_US + (memory + arithmetic) / (1e3 * clock_under_load(device))


class Executor:
    """A plan with what repeated calls need, in the place of `runtime.Executor`.

    Attributes:
        plan: what is computed.
    """

    __slots__ = ("_conjugate_weight", "plan")

    def __init__(self, plan: Plan, *, conjugate_weight: bool = False) -> None:
        self.plan = plan
        self._conjugate_weight = conjugate_weight

    def run(self, *arrays: Any, prepared: runtime.PreparedWeight | None = None, samples: Any = None) -> None:
        """Compute on the current device and CuPy's current stream; writes all of the last array, the result.

        Raises:
            ImportError: cuFFT cannot be loaded.
            RuntimeError: the current stream is being captured into a CUDA graph.
        """
        p, output = self.plan.problem, arrays[-1]
        xp = runtime.array_module(output)
        if self.plan.on_gpu:
            what = f"{p.kind}: algorithm 'fft' makes plans of cuFFT, which cannot be done"
            runtime.refuse_during_capture(what, output.data.device_id)
        operands = [None if array is None else runtime.aligned(array) for array in arrays[:-1]]
        result = runtime.aligned(output)
        with np.errstate(all="ignore"):  # of NaN and infinities
            if isinstance(p, ConvProblem):
                x, weight, *others = operands
                work = _Convolution(self.plan, weight, self._conjugate_weight, prepared, xp)
                work.run(x, others[0] if others else None, result)
            else:
                _WeightGradient(self.plan, xp).run(*p.sides(*operands), result)
        if result is not output:
            runtime.assign(output, result)


class _Work:
    """What every step of a plan needs: the library of the arrays, its transforms and the dtypes."""

    def __init__(self, plan: Plan, xp: ModuleType) -> None:
        self.plan, self.overlap, self.xp, self._library = plan, plan.overlap, xp, transforms(xp)
        self.dtype, self.spectral_dtype = _work_dtype(plan.problem.dtype), _spectral_dtype(plan.problem.dtype)

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
        # As a convolution with a group for each of them, and one tap: bits do not depend on the number of columns.
        p = _product_problem(left.shape, right.shape[-1], str(left.dtype))
        y = self.xp.empty((*left.shape[:3], right.shape[-1]), left.dtype)
        operands = right.reshape(p.input_shape), left.reshape(p.weight_shape), y.reshape(p.output_shape)
        _product_executor(p, int(y.data.device_id)).run(*operands)
        return y


def _product_problem(left: tuple[int, int, int, int], columns: int, dtype: str) -> ConvProblem:
    groups, frequencies, M, depth = left
    products = groups * frequencies
    return ConvProblem("conv1d", 1, products * depth, products * M, columns, 1, groups=products, dtype=dtype)


def products(plan: Plan, device: Device) -> list[dispatch.Choice | None]:
    """The kernels that multiply the matrices of a plan on a GPU."""
    if not plan.by_matrices:
        return []
    dtype, found = str(_spectral_dtype(plan.problem.dtype)), []
    for groups, channels in plan.chunks():
        written = (channels.stop - channels.start) * plan.overlap.phases_out
        depth, columns = plan.read, plan.batch
        if isinstance(plan.problem, WeightGradientProblem):
            depth, columns = columns, depth
        found.append(_product_problem((groups.stop - groups.start, plan.frequencies, written, depth), columns, dtype))
    return [dispatch.choose(p, Layout.contiguous(p), device) for p in dict.fromkeys(found)]


@lru_cache(maxsize=256)
def _product_executor(problem: ConvProblem, device_index: int) -> runtime.Executor:  # noqa: ARG001 (one for each GPU)
    return runtime.make_executor(problem, ("input", "weight"), (None, None), None)


class _Convolution(_Work):
    """A forward or transposed convolution, or the gradient of an input.

    Args:
        plan: of it.
        weight: as the problem has it.
        conjugate: whether to take the conjugates of the weights.
        prepared: keeps the spectra, if the caller has it.
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
        """The spectra of all chunks of a weight."""
        return [self._spectra(weight, *chunk) for chunk in self.plan.chunks()]

    def _spectra(self, weight: Any, groups: slice, channels: slice) -> Any:
        """The conjugates of the spectra of the taps of a chunk, with which blocks correlate.

        (groups, channels of the result, of the input, frequencies), or with the frequencies before the channels.
        """
        p, o = self.plan.problem, self.overlap
        of_input, of_result = _channels(p)
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
        if 0 in y.shape:
            return
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
        of_input, of_result = _channels(p)
        number, written = groups.stop - groups.start, channels.stop - channels.start
        first = groups.start * of_result + channels.start
        x = x[:, groups.start * of_input : groups.stop * of_input]
        y = y[:, first : first + number * written]
        if bias is not None:
            of_chunk = bias[first : first + number * written].astype(self.dtype, copy=False)
            bias = xp.repeat(of_chunk, o.phases_out)[:, np.newaxis]
        for samples, rows, blocks in self.plan.batches():
            windows = o.windows(x[samples], rows, blocks, self.dtype, xp)
            several = windows.shape[:3]
            spectra = self._multiply(taps, self.spectra_of(windows, number))
            results = self.inverse(spectra, o.new)[: math.prod(several)]
            results = results.reshape(*several, number * written * o.phases_out, o.new)
            if bias is not None:
                results += bias
            o.store(results, y[samples], rows, blocks, xp)

    def _multiply(self, taps: Any, spectra: Any) -> Any:
        """The spectra of results, (blocks, groups, channels, frequencies)."""
        if self.plan.by_matrices:
            return self.product(taps, self.matrices(spectra, (1, 3, 2, 0))).transpose(3, 0, 2, 1)
        result = taps[:, :, 0] * spectra[:, :, :1]
        for c in range(1, spectra.shape[2]):
            result += taps[:, :, c] * spectra[:, :, c : c + 1]
        return result

    def _fold(self, padded: Any, output: Any) -> None:
        """Add the results in the padding to those that it means, and round them."""
        p = self.plan.given
        assert isinstance(p, ConvProblem)
        left, right, L = p.padding_left, p.padding_right, p.L_out
        sums = padded[..., left : left + L]
        for first, stop in ((-left, 0), (L, L + right)):
            values = padded[..., left + first : left + stop]
            if p.padding_mode == "replicate" and first < stop:
                sums[..., 0 if first < 0 else L - 1] += values.sum(axis=-1)
            elif first < stop:  # no sample is meant twice
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
        if output.size == 0:
            return
        if 0 in coarse.shape or 0 in fine.shape:
            output[...] = 0
            return
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
        plan, o, xp = self.plan, self.overlap, self.xp
        shape: tuple[int, ...] = (groups, coarse.shape[1] // groups, fine.shape[1] // groups * o.phases_in)
        shape = (groups, plan.frequencies, *shape[1:]) if plan.by_matrices else (*shape, plan.frequencies)
        sums = xp.zeros(shape, self.spectral_dtype)
        for samples, rows, blocks in plan.batches():
            left = self.spectra_of(o.pieces(coarse[samples], rows, blocks, self.dtype, xp), groups).conj()
            right = self.spectra_of(o.windows(fine[samples], rows, blocks, self.dtype, xp), groups)
            if plan.by_matrices:
                sums += self.product(self.matrices(left, (1, 3, 2, 0)), self.matrices(right, (1, 3, 0, 2)))
            else:
                for a, b in zip(left, right, strict=True):
                    sums += a[:, :, np.newaxis] * b[:, np.newaxis]
        return sums.transpose(0, 2, 3, 1) if plan.by_matrices else sums
