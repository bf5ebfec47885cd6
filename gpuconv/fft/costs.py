"""What a layer costs through the FFT and by direct sums, predicted."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from .. import dispatch
from ..costs import LAUNCH_US, clock_under_load, cuda_cores, memory_bytes_per_cycle
from ..device import Device
from ..families import Layout
from ..problem import ConvProblem, WeightGradientProblem
from .plan import FftProblem, Plan, channels_of, work_dtype


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
    from .. import cpu

    if isinstance(p, ConvProblem):
        return cpu.cost(p)
    # Measured: a product of matrices for each tap, or with few channels products of vectors.
    return p.flops() * (0.01 + 0.13 / (4 + p.C_fine_g)) * _scale(p)


def _scale(p: FftProblem) -> float:
    return work_dtype(p.dtype).itemsize / 4


def _fft_ns(plan: Plan) -> float:
    from ..cpu.costs import CONVERT, FLOP

    p, o, scale = plan.problem, plan.overlap, _scale(plan.problem)
    blocks, per_group = o.rows * o.blocks, -(-channels_of(p)[1] // plan.channels)
    written = channels_of(p)[1] * o.phases_out
    far = _BEYOND_CACHES if o.block * work_dtype(p.dtype).itemsize > _CACHE_BYTES else 1.0
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
    blocks, size = o.rows * o.blocks, work_dtype(p.dtype).itemsize
    chunks, per_group = len(list(plan.chunks())), -(-channels_of(p)[1] // plan.channels)
    written = channels_of(p)[1] * o.phases_out
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
