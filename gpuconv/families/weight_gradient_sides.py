"""The weight gradient of a layer of stride 1 with its two sides exchanged: the rows of the result are channels of fine.

    grad_weight[r, c, k] = sum over n, l of coarse[n, r, l] * fine[n, c, l - padding_left + k*dilation]
                         = sum over n, l of fine[n, c, l] * coarse[n, r, l - padding_right + (K - 1 - k)*dilation]

with padding_right = (K - 1)*dilation - padding_left: the same sum with another order of rows, channels and taps.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ..costs import L2_BYTES_PER_CYCLE, SECTOR_BYTES, Code, Work, clock_under_load, cuda_cores, predict_launch
from ..device import Device
from ..problem import WeightGradientProblem
from .arithmetic import WARP
from .base import ArrayLayout, Layout, Plan, round_up

_OTHER = {"coarse": "fine", "fine": "coarse"}


def exchanged(p: WeightGradientProblem) -> WeightGradientProblem | None:
    """The problem whose coarse side is fine; None where there is none."""
    padding_right = (p.K - 1) * p.dilation - p.padding_left
    if p.stride > 1 or p.groups > 1 or p.padding_mode != "zeros" or padding_right < 0 or p.is_complex:
        return None
    return replace(
        p, C_coarse=p.C_fine, C_fine=p.C_coarse, L_coarse=p.L_fine, L_fine=p.L_coarse, padding_left=padding_right
    )


def exchanged_layout(p: WeightGradientProblem, layout: Layout) -> Layout:
    """The layout of the exchanged problem's arrays, whose taps lie in the opposite order."""
    weight = layout["grad_weight"]
    stride_r, stride_c, stride_k = weight.strides
    result = ArrayLayout((stride_c, stride_r, -stride_k), weight.alignment, weight.offset + (p.K - 1) * stride_k)
    return layout.replaced(coarse=layout["fine"], fine=layout["coarse"], grad_weight=result)


def exchanged_plan(plan: Plan) -> Plan:
    """The plan of the exchanged problem, by the names that arrays have in the problem itself."""
    steps = (replace(s, arrays=tuple(name and _OTHER.get(name, name) for name in s.arrays)) for s in plan.steps)
    return replace(plan, steps=tuple(steps))


def cores_us(p: WeightGradientProblem, device: Device) -> float:
    """What families on CUDA cores take at least, in microseconds, for their multiply-adds and bytes."""
    sums = p.flops() / 2
    return predict_launch(
        Work(sums, l2_bytes=p.bytes(), dram_bytes=p.bytes()),
        Code(sums / WARP, 0.0, 0.0),
        blocks=device.num_sms,
        resident=1,
        unit=cuda_cores(device, p.format.accumulator_bytes),
        device=device,
    ).us


def scattered_us(p: WeightGradientProblem, device: Device) -> float:
    """How much longer storing takes the exchanged problem, whose neighbouring results lie together by K taps alone."""
    run = p.K * p.itemsize
    more = math.prod(p.weight_shape) // p.K * (round_up(run, SECTOR_BYTES) - run)
    return more / (L2_BYTES_PER_CYCLE * device.num_sms * 1e3 * clock_under_load(device))
