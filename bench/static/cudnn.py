"""The time that PyTorch through cuDNN should take for the same call: a model of the peer, never a measurement.

It is compared with our predictions, to find the layers that are likely to be slower than cuDNN's before measuring.
"""

from __future__ import annotations

import math
from typing import TypeAlias

from gpuconv.costs import LAUNCH_US, WARP_ISSUES_PER_CYCLE, clock_under_load, rates_of
from gpuconv.device import Device
from gpuconv.problem import ConvProblem, WeightGradientProblem

# Of the data sheet's rate, what cuDNN's convolutions reach on tensor cores: 450 of 1,070 TFLOP/s in 16 bits on H100
# (444 on data in channels_last, measured in PyTorch's pull request 174752); elsewhere an assumption.
TENSOR_SHARE, TENSOR_SHARE_BEFORE_SM_90 = 0.42, 0.70
# The same on CUDA cores: 42 of 67 TFLOP/s in float32 on H100 (an assumption).
CORE_SHARE = 0.63
# Of the data sheet's bandwidth: large transposes and passes over the output (3.8 of 4.8 TB/s on H200, an assumption),
# and cuDNN's kernel for depthwise layers in float16 (1.58 of 3.35 TB/s on H100, pull request 175280).
COPY_SHARE, DEPTHWISE_SHARE = 0.79, 0.47
# Microseconds that a call takes in addition: cuDNN's own launches before and after the convolution (an assumption).
CALL_US = 8.0
# PyTorch's own depthwise kernel, a thread an output: instructions of a thread, and of each of its taps (an assumption,
# from its source: four divisions, then a load of the input and one of the weight with their addresses and checks).
THREAD_INSTRUCTIONS, TAP_INSTRUCTIONS = 40, 12
# PyTorch lets cuDNN compute float16 depthwise layers of so many channels, without stride and dilation (its source).
CUDNN_DEPTHWISE_CHANNELS = 32


AnyProblem: TypeAlias = ConvProblem | WeightGradientProblem


def predict_cudnn(problem: AnyProblem, device: Device) -> float | None:
    """Microseconds of a call on NCL arrays under CUDA graph replay; None where no figures are known.

    A bias is a pass of its own over the output (PyTorch's source, Convolution.cpp).
    """
    p = problem
    if p.is_complex:
        return None
    bytes_per_us = 1e3 * rates_of(device).dram_gbps * COPY_SHARE
    moved_us = p.bytes() / bytes_per_us
    if p.groups > 1 and p.weight_shape[1] == 1:
        return _depthwise_us(p, device, moved_us) if isinstance(p, ConvProblem) and not p.transposed else None
    on_tensor_cores = p.itemsize == 2 or p.precision == "tf32"
    us = CALL_US + max(p.flops() / _flops_per_us(p, device, on_tensor_cores), moved_us)
    if on_tensor_cores:
        us += 2 * _transposed_bytes(p) / bytes_per_us
    if isinstance(p, ConvProblem) and p.has_bias:
        us += LAUNCH_US + 2 * math.prod(p.output_shape) * p.itemsize / bytes_per_us
    return us


def _transposed_bytes(p: AnyProblem) -> int:
    """Bytes of the arrays that are copied to channels_last, or from it, for tensor cores.

    In 16 bits the weights are copied, too: two transposes come before each convolution and one after it. A layer of one
    tap needs none, since it is a product of matrices in either layout (profiles of PyTorch in apex's issue 530 and of
    TensorFlow in its issue 15897, both on older GPUs). For TF32 there are kernels for both layouts (TensorFlow's pull
    request 56744), but no profile is known, so only input and output are counted.
    """
    if p.K == p.stride == 1:
        return 0
    return p.bytes() - (0 if p.itemsize == 2 else math.prod(p.weight_shape) * p.itemsize)


def _depthwise_us(p: ConvProblem, device: Device, moved_us: float) -> float:
    if p.dtype == "float16" and p.stride == p.dilation == 1 and p.C_in >= CUDNN_DEPTHWISE_CHANNELS:
        return CALL_US + moved_us * COPY_SHARE / DEPTHWISE_SHARE
    instructions = p.N * p.C_out * p.L_out / 32 * (THREAD_INSTRUCTIONS + TAP_INSTRUCTIONS * p.K)
    issued_us = instructions / (WARP_ISSUES_PER_CYCLE * device.num_sms * 1e3 * clock_under_load(device))
    return LAUNCH_US + max(issued_us, moved_us)


def _flops_per_us(p: AnyProblem, device: Device, on_tensor_cores: bool) -> float:
    rates = rates_of(device)
    per_fma = 2e3 * device.num_sms * device.clock_ghz
    if on_tensor_cores:
        share = TENSOR_SHARE if device.arch >= 90 else TENSOR_SHARE_BEFORE_SM_90
        return share * per_fma * (rates.tensor16 if p.itemsize == 2 else rates.tensor16 / 2)
    return CORE_SHARE * per_fma * (rates.fp64 if p.dtype == "float64" else rates.fp32)
