"""Kernels with 32-bit indices compute in 32 bits whatever they form, up to the longest strides that they accept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpuconv import cases, dispatch, reference
from gpuconv.device import Device
from gpuconv.families import FAMILIES, ArrayLayout, Config, Family, Launch, Layout, Plan, Refusal
from gpuconv.families.append import append_launch
from gpuconv.families.base import contiguous_strides
from gpuconv.families.windows import NEW_SAMPLES, WINDOW_STARTS
from gpuconv.problem import BiasGradientProblem, ConvProblem, Op, Problem, WeightGradientProblem
from tests import hostcuda
from tests.plans import refusal_of

H200 = Device.from_arch("sm_90")
MAX_FLOPS = 300_000
BASE = {family.kind: family.name for family in FAMILIES}  # the last of each kind


def problems_of(family: Family[Any]) -> list[Problem]:
    """Cases below `MAX_FLOPS` that a family takes: that of most operations, which has several samples, channels and
    positions where one has, and that whose windows reach furthest outside the samples, by the length of a sample.
    """
    found: list[tuple[ConvProblem, Problem]] = []
    for case in cases.CASES:
        conv: Problem = case.at("float16")
        assert isinstance(conv, ConvProblem)
        p: Problem = conv
        if family.kind == "weight_gradient":
            p = WeightGradientProblem.of(conv)
        elif family.kind == "bias_gradient":
            p = BiasGradientProblem.of(conv)
        is_small = p.kind == family.kind and not p.is_empty and p.flops() < MAX_FLOPS
        if is_small and refusal_of(family, p, Layout.contiguous(p), H200) is None:
            found.append((conv, p))

    def size(pair: tuple[ConvProblem, Problem]) -> tuple[bool, int]:
        _, p = pair
        return min(extent for shape in p.shapes.values() for extent in shape[:2]) > 1, p.flops()

    def reach(pair: tuple[ConvProblem, Problem]) -> float:
        conv, _ = pair
        return max(*conv.padding, conv.dilation * (conv.K - 1)) / conv.L_in

    several = [pair for pair in found if pair[0].L_in > 1]
    chosen = (max(found, key=size), max(several, key=reach))
    return list(dict.fromkeys(p for _, p in chosen))


def conv(op: Op, **settings: int) -> ConvProblem:
    return ConvProblem(op, **{"N": 2, "C_in": 4, "C_out": 4, "L_in": 8, "K": 1, **settings}, dtype="float16")


# Each has a setting of 2**31 and few results.
LONG = (
    conv("conv1d", dilation=2**31),
    conv("conv1d", dilation=2**31, groups=4),
    conv("conv1d", stride=2**31),
    conv("conv1d", K=2, stride=2**31, padding_left=2**31),
    conv("conv1d", K=2, stride=2**31, padding_right=2**31),
    conv("conv_transpose1d", dilation=2**31),
    conv("conv_transpose1d", L_in=1, stride=2**31),
    conv("conv_transpose1d", L_in=2, stride=2**31, padding_left=2**31 - 1),
    conv("conv_transpose1d", L_in=2, stride=2**31, padding_right=2**31 - 1),
)


@pytest.mark.parametrize("p", [*LONG, *map(WeightGradientProblem.of, LONG)], ids=str)
def test_settings_of_32_bits_and_more_are_parameters_of_64(p: Problem) -> None:
    """Fails if a family holds a setting in fewer bits than it has: the base families compute with it, too."""
    rng = np.random.default_rng(0)
    *inputs, _ = p.shapes
    arrays = [rng.integers(-2, 3, p.shapes[name]).astype(np.float16) for name in inputs]
    sums = reference.convolution if isinstance(p, ConvProblem) else reference.weight_gradient
    expected = sums(p, *arrays).exact()
    for family in FAMILIES:
        if family.kind == p.kind and refusal_of(family, p, Layout.contiguous(p), H200) is None:
            output = hostcuda.compute(p, *arrays, family=family.name, device=H200)
            np.testing.assert_array_equal(output, expected, err_msg=family.name)


def longest(low: int, is_narrow: Callable[[int], bool]) -> int:
    """The longest stride with which indices have 32 bits, from one on that is such a stride."""
    high = 2**31
    assert is_narrow(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_narrow(middle) else (low, middle)
    assert low > 2**12, "the kernel has hardly any 32-bit indices"
    return low


def stretched(strides: tuple[int, ...], axis: int, stride: int) -> ArrayLayout:
    """The layout of float16 elements with another stride along one axis."""
    return ArrayLayout((*strides[:axis], stride, *strides[axis + 1 :]), 2)


def longest_stride(family: Family[Any], p: Problem, name: str, axis: int) -> Layout:
    """The layout with the longest stride along one axis of one array with which the family plans 32-bit indices."""
    fresh = Layout.contiguous(p)

    def layout(stride: int) -> Layout:
        return fresh.replaced(**{name: stretched(fresh[name].strides, axis, stride)})

    def is_narrow(stride: int) -> bool:
        plan = family.plan(p, layout(stride), H200)
        return isinstance(plan, Plan) and all(step.launch.index_bits == 32 for step in plan.steps)

    return layout(longest(fresh[name].strides[axis], is_narrow))


ITEMS = [(family, p) for family in FAMILIES for p in problems_of(family)]


@pytest.mark.parametrize(("family", "p"), ITEMS, ids=lambda value: getattr(value, "name", str(value)))
def test_at_the_limit_nothing_overflows(family: Family[Any], p: Problem) -> None:
    """Fails if a kernel forms an offset that its overhang does not cover: hostcuda stops at a signed overflow."""
    rng = np.random.default_rng(0)
    *inputs, _ = p.shapes
    arrays = [rng.integers(-2, 3, p.shapes[name]).astype(np.float16) for name in inputs]
    expected = hostcuda.compute(p, *arrays, family=BASE[p.kind])
    for name, shape in p.shapes.items():
        for axis, extent in enumerate(shape):
            if extent > 1:
                layout = longest_stride(family, p, name, axis)
                output = hostcuda.compute(p, *arrays, layout=layout, family=family.name, device=H200)
                np.testing.assert_array_equal(output, expected, err_msg=f"{p}: {name}, axis {axis}")


@pytest.mark.parametrize("axis", range(3))
def test_pushes_at_the_limit_do_not_overflow(axis: int) -> None:
    """Samples are appended to a window, kept by the kernel that computes, or kept by the kernel of depthwise layers."""
    rng = np.random.default_rng(0)
    new = rng.integers(-2, 3, (2, 4, 2)).astype(np.float16)
    natural = contiguous_strides(new.shape)

    def append(stride: int) -> tuple[Config, Launch]:
        return append_launch("float16", (2, 4, 5), new.shape, stretched(natural, axis, stride))

    stride = longest(natural[axis], lambda stride: append(stride)[1].index_bits == 32)
    window = np.arange(40, dtype=np.float16).reshape(2, 4, 5)
    expected = np.concatenate((window[..., 2:], new), axis=-1)
    arrays = {"input": new, "window": window}
    layouts = {"input": stretched(natural, axis, stride)}
    hostcuda.run(*append(stride), arrays, outputs=["window"], keeps=["window"], layouts=layouts)
    np.testing.assert_array_equal(window, expected)

    for p in (conv("conv1d", L_in=5, K=4), conv("conv1d", L_in=5, K=4, groups=4)):

        def push(stride: int, p: ConvProblem = p) -> dispatch.Push | Refusal:
            return dispatch.choose_push(p, 2, Layout.contiguous(p), stretched(natural, axis, stride), H200)

        stride = longest(natural[axis], lambda stride: isinstance(push(stride), dispatch.Push))
        found = push(stride)
        assert isinstance(found, dispatch.Push)
        (step,) = found.choice.plan.steps
        assert (step.config.kernel == "conv1d_depthwise_push") == (p.groups == 4)
        weight = rng.integers(-2, 3, p.weight_shape).astype(np.float16)
        rows = np.zeros(found.window, np.float16)
        held = rng.integers(-2, 3, (2, 4, 3)).astype(np.float16)
        (rows.transpose(0, 2, 1) if found.channels_last else rows)[..., :3] = held
        output = np.empty(p.output_shape, np.float16)
        given = {"input": rows, "weight": weight, WINDOW_STARTS: np.zeros(found.blocks, np.int32), NEW_SAMPLES: new}
        arrays = {name or "null": {**given, "output": output}[name] if name else None for name in step.arrays}
        changed = ["output", "input", WINDOW_STARTS]
        layouts = {NEW_SAMPLES: stretched(natural, axis, stride)}
        hostcuda.run(step.config, step.launch, arrays, outputs=changed, keeps=changed[1:], layouts=layouts)
        samples = np.concatenate((held, new), axis=-1)
        np.testing.assert_array_equal(output, hostcuda.compute(p, samples, weight, family=BASE["conv1d"]))
