"""The predicted costs of a layer through the FFT and by direct sums."""

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
    """The predicted times in microseconds of one sample that is as long as `blocks` blocks; on a CPU, on one core."""

    direct_us: float
    fft_us: float
    blocks: int


# Nanoseconds on one core for float32, measured as those of `gpuconv.cpu.costs`; a number of twice the size costs twice.
_TRANSFORM_NS = 0.13  # for each sample and each binary digit of the block length
_CACHE_BYTES, _BEYOND_CACHES = 2**20, 2.5  # a transform of a block larger than this takes so many times as long
_COPY_NS = 0.6  # for a sample
_TAPS_NS = 3.0  # for a tap, which is conjugated and copied to another place
_PRODUCT_NS = 0.4  # for the product of two spectra at one frequency
_REORDER_NS = 1.0  # for an element of a matrix that is copied to another place
_MATRIX_NS = 200.0  # for a product of matrices, besides its operations

# Assumptions for GPUs.
_DIRECT_SHARE = 0.5  # of the peak of the CUDA cores, for kernels that have no cost model
_PRODUCT_SHARE = 0.4  # of that peak, for products of small matrices of complex numbers
_LAUNCHES = 12  # for a batch, besides those of its products

# Samples that one cuFFT kernel transforms in shared memory; longer blocks pass through memory again (an assumption).
_ONE_PASS = 2**13


@lru_cache(maxsize=4096)
def costs(problem: FftProblem, device: Device | None) -> Costs:
    """The costs of both ways to compute a layer, on a GPU or, for None, on the CPU.

    They follow from the layer alone, not from N and L: they are those of one batch of blocks, for which the taps are
    transformed once.
    """
    one = _one_batch(problem, Plan.of(problem, on_gpu=device is not None))
    plan = Plan.of(one, on_gpu=device is not None)
    if device is None:
        return Costs(_direct_ns(one) / 1e3, _fft_ns(plan) / 1e3, plan.overlap.rows * plan.overlap.blocks)
    return Costs(_direct_us_on(one, device), _fft_us_on(plan, device), plan.overlap.rows * plan.overlap.blocks)


def _one_batch(p: FftProblem, plan: Plan) -> FftProblem:
    """The layer with a single sample as long as a batch of blocks, without padding."""
    common = math.gcd(p.stride, p.dilation)
    stride, dilation, rows = p.stride, p.dilation, p.dilation // common
    if rows > plan.batch or p.stride // common > p.K:  # then a row is like a sample without dilation
        stride, dilation, rows = min(p.stride // common, p.K), 1, 1
    length = rows * (plan.batch // rows) * plan.overlap.new
    window = (length - 1) * stride + (p.K - 1) * dilation + 1
    plain: dict[str, Any] = {
        "N": 1, "stride": stride, "dilation": dilation, "padding_left": 0, "padding_mode": "zeros", "has_lengths": False
    }  # fmt: skip
    if isinstance(p, WeightGradientProblem):
        return replace(p, L_coarse=length, L_fine=window, **plain)
    plain.update(padding_right=0, output_padding=0, batched=True, has_bias=False)
    # Rows of the transposed operation are longer by the taps less one.
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
