"""Arrays whose channels are contiguous, on tensor cores: staged 16 bytes at a time, and no bit differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gpuconv
from gpuconv import cases
from gpuconv.cases import Data
from gpuconv.families import ArrayLayout, Layout
from gpuconv.families.weight_gradient_mma import WeightGradientMma
from gpuconv.lengths import Samples
from gpuconv.problem import ConvProblem, WeightGradientProblem, numpy_dtype
from tests import hostcuda
from tests.kernels.arrays import assert_same_bits, channels_last, unaligned
from tests.kernels.tensor_cores import H200
from tests.plans import FORWARD_FAMILIES, kernel_of, plan_of

Array = npt.NDArray[Any]

FAMILY = {family.kind: family for family in FORWARD_FAMILIES if family.name.endswith("_mma")}
WEIGHTS = WeightGradientMma()

# Of 2, 3 and 4 units of 8 channels a chunk, a last chunk of fewer, chunks of 1 to 3 stages and more, several samples in
# a block, groups, planes, segments.
PROBLEMS = (
    ConvProblem("conv1d", 2, 40, 24, 23, 5, 1, 4, 6, has_bias=True),
    ConvProblem("conv1d", 2, 136, 24, 70, 1),
    ConvProblem("conv1d", 1, 104, 18, 70, 2, dilation=30),
    ConvProblem("conv1d", 3, 48, 48, 41, 5, 2, 1, 1, groups=3),
    ConvProblem("conv1d", 13, 72, 24, 10, 3, 1, 1, 1),
    ConvProblem("conv1d", 2, 528, 80, 26, 16, 2, 3, 2, has_bias=True),
    ConvProblem("conv_transpose1d", 2, 48, 16, 9, 7, 3, 2, 1, groups=2, output_padding=2, has_bias=True),
    ConvProblem("conv_transpose1d", 3, 24, 24, 9, 7, 2, 5, 4, 3, output_padding=2, has_bias=True),
)


def pitched(array: Array) -> Array:
    """Channels last, with eight more channels between the positions."""
    N, C, L = array.shape
    buffer = np.full((N, L, C + 8), np.nan, array.dtype)
    buffer[..., :C] = array.swapaxes(-1, -2)
    return buffer[..., :C].swapaxes(-1, -2)


def backwards(array: Array) -> Array:
    """Channels last, positions from the last to the first."""
    return channels_last(array[..., ::-1])[..., ::-1]


def macros_of(problem: ConvProblem, layout: Layout) -> dict[str, str]:
    return dict(kernel_of(FAMILY[problem.op], problem, layout, H200)[0].macros)


def run(problem: ConvProblem, data: Data, view: Callable[[Array], Array], **settings: Any) -> Array:
    """The result for a view of the input, which is loaded by units."""
    x = view(data.input)
    layout = Layout.contiguous(problem).replaced(input=hostcuda.array_layout(x))
    assert "CHANNELS_LAST" in macros_of(problem, layout), str(problem)
    family = FAMILY[problem.op].name
    return hostcuda.compute(problem, x, *data[1:], layout=layout, family=family, **settings)


def layout_of(problem: ConvProblem, place: int) -> tuple[Callable[[Array], Array], Layout]:
    """A view of the input, and the layout with it and, of every other problem, an output of the same kind."""
    C, L = problem.C_out, problem.L_out
    view = (channels_last, pitched, backwards)[place % 3]
    layout = Layout.contiguous(problem).replaced(
        input=hostcuda.array_layout(view(cases.random_data(problem, place).input))
    )
    if place % 2 == 0:
        return view, layout
    strides = ((C * L, 1, C), (-(C + 8) * L, 1, C + 8), (C * L, 1, -C))[place % 3]
    return view, layout.replaced(output=ArrayLayout(strides))


# Operands of 32 bits take one way through the kernels, and differ only in what is done to a unit.
FORWARD = {"bfloat16": range(len(PROBLEMS)), "tf32": (3,), "float32": (4, 7)}


@pytest.mark.parametrize("mode", FORWARD)
def test_arrays_whose_channels_are_contiguous_change_no_bit(mode: str) -> None:
    """Infinities and NaNs among the input feed sums that are formed again."""
    problems = {place: cases.in_format(PROBLEMS[place], mode) for place in FORWARD[mode]}
    layouts = {place: layout_of(p, place) for place, p in problems.items()}
    plans = {place: plan_of(FAMILY[p.op], p, layouts[place][1], H200) for place, p in problems.items()}
    plain = (plan_of(FAMILY[p.op], p, Layout.contiguous(p), H200) for p in problems.values())
    hostcuda.prebuild(step.config for plan in (*plans.values(), *plain) for step in plan.steps)
    for place, p in problems.items():
        macros = {name for step in plans[place].steps for name, _ in step.config.macros}
        is_stored = place % 2 == 1 and (not p.transposed or p.dilation > 1)
        assert ("CHANNELS_LAST" in macros, "OUTPUT_LAST" in macros) == (True, is_stored)
        data, (view, layout), family = cases.random_data(p, place), layouts[place], FAMILY[p.op].name
        data.input[0, 1, :3] = np.inf, np.nan, 1e38
        expected = hostcuda.compute(p, *data, family=family)
        output = hostcuda.compute(p, view(data.input), *data[1:], layout=layout, family=family, schedule="every")
        assert_same_bits(output, expected, str(p))


def test_rows_mean_other_samples_or_end_at_lengths_of_their_own() -> None:
    layer = cases.in_format(ConvProblem("conv1d", 3, 40, 18, 23, 5, 1, 4, 4, has_bias=True), "bfloat16")
    data = cases.random_data(layer, 1)
    p = replace(layer, padding_mode="reflect")
    expected = hostcuda.compute(p, *data, family="conv1d_mma")
    assert_same_bits(run(p, data, channels_last), expected, p.padding_mode)
    p = replace(layer, has_lengths=True)
    table = np.stack(Samples.of("conv1d", layer, layer.padding, [23, 7, 1]), axis=1)
    expected = hostcuda.compute(p, *data, family="conv1d_mma", samples=table)
    assert_same_bits(run(p, data, channels_last, samples=table), expected, "lengths")


# Several units a thread, samples in a chunk, groups, phases; few channels, whose octets are of taps.
GRADIENTS = (
    ConvProblem("conv1d", 3, 40, 48, 60, 5, 1, 2, 2),
    ConvProblem("conv1d", 2, 64, 48, 101, 3, 2, 1, 1, dilation=2, groups=2),
    ConvProblem("conv1d", 9, 24, 16, 12, 3, 1, 1, 1, padding_mode="reflect"),
    ConvProblem("conv_transpose1d", 3, 40, 24, 30, 4, 2, 1),
    ConvProblem("conv1d", 2, 4, 32, 80, 9, 1, 4, 4),
)


OF_WEIGHTS = {"bfloat16": range(len(GRADIENTS)), "tf32": (0,), "float32": (1,)}


@pytest.mark.parametrize("mode", OF_WEIGHTS)
def test_gradients_of_weights_take_either_side(mode: str) -> None:
    jobs = []
    for place in OF_WEIGHTS[mode]:
        p = WeightGradientProblem.of(cases.in_format(GRADIENTS[place], mode))
        rng = np.random.default_rng(place)
        coarse, fine = (rng.standard_normal(p.shapes[side]).astype(numpy_dtype(p.dtype)) for side in ("coarse", "fine"))
        coarse[0, 1, :2], fine[-1, 0, -1] = (np.inf, 1e38), np.nan
        both = ((channels_last, pitched), (True, p.C_fine_g >= 8))
        one = (((np.array, channels_last), (False, True)), ((backwards, np.array), (True, False)))
        for views, expected in (both, *(one if place == 0 else ())):
            a, b = (view(side) for view, side in zip(views, (coarse, fine), strict=True))
            layout = Layout.contiguous(p).replaced(coarse=hostcuda.array_layout(a), fine=hostcuda.array_layout(b))
            config = kernel_of(WEIGHTS, p, layout, H200)[0]
            macros = dict(config.macros)
            assert ("COARSE_LAST" in macros, "FINE_LAST" in macros) == expected
            jobs.append((p, (coarse, fine), (a, b), layout, config))
    plain = {kernel_of(WEIGHTS, p, Layout.contiguous(p), H200)[0] for p, *_ in jobs}
    hostcuda.prebuild([*plain, *(config for *_, config in jobs)])
    for p, arrays, views_of_them, layout, _ in jobs:
        result = hostcuda.compute(p, *views_of_them, family=WEIGHTS.name, layout=layout, schedule="every")
        assert_same_bits(result, hostcuda.compute(p, *arrays, family=WEIGHTS.name), str(p))


def test_what_is_not_aligned_is_loaded_as_other_layouts_are() -> None:
    p = cases.in_format(ConvProblem("conv1d", 2, 48, 48, 23, 5, 1, 4, 4, groups=2), "bfloat16")
    data = cases.random_data(p, 2)
    expected = hostcuda.compute(p, *data, family="conv1d_mma")
    N, C, L = p.input_shape

    def shifted(array: Array) -> Array:
        return unaligned(array.swapaxes(-1, -2)).swapaxes(-1, -2)

    def odd_pitch(array: Array) -> Array:
        buffer = np.zeros((N, L, C + 4), array.dtype)
        buffer[..., :C] = array.swapaxes(-1, -2)
        return buffer[..., :C].swapaxes(-1, -2)

    def odd_samples(array: Array) -> Array:
        buffer = np.zeros((N, C * L + 4), array.dtype)
        rows = np.lib.stride_tricks.as_strided(buffer, (N, C, L), (2 * (C * L + 4), 2, 2 * C))
        rows[...] = array
        return rows

    for view in (shifted, odd_pitch, odd_samples):
        x = view(data.input)
        layout = Layout.contiguous(p).replaced(input=hostcuda.array_layout(x))
        assert "CHANNELS_LAST" not in macros_of(p, layout)
        assert_same_bits(hostcuda.compute(p, x, *data[1:], layout=layout, family="conv1d_mma"), expected, view.__name__)


@pytest.mark.gpu
def test_channels_last_through_the_public_functions(cupy: Any) -> None:
    """A layer and its gradients with views of arrays (N, L, C) give the bits of the same values in (N, C, L)."""
    if int(cupy.cuda.Device().compute_capability) < 80:
        pytest.skip("no asynchronous copies here")
    rng = np.random.default_rng(0)
    x, w, u = (rng.standard_normal(shape).astype(np.float16) for shape in ((2, 40, 50), (24, 40, 3), (2, 24, 50)))

    def as_last(array: Array) -> Any:
        return cupy.asarray(np.ascontiguousarray(array.swapaxes(1, 2))).swapaxes(1, 2)

    weight, of_layouts, staged = cupy.asarray(w), [], []
    for place in (cupy.asarray, as_last):
        a, b, out = place(x), place(u), place(np.zeros_like(u))
        gpuconv.conv1d(a, weight, padding=1, out=out)
        grad_x = gpuconv.grad.conv1d_input(x.shape, weight, b, padding=1)
        grad_w = gpuconv.grad.conv1d_weight(a, w.shape, b, padding=1)
        of_layouts.append([array.get() for array in (out, grad_x, grad_w)])
        staged.append(gpuconv.explain("conv1d", a, weight, padding=1).to_dict()["kernel"]["staging"]["input"])
    assert staged == ["two positions of a channel", "16 bytes of contiguous channels"]
    for name, first, last in zip(("output", "grad_input", "grad_weight"), *of_layouts, strict=True):
        assert_same_bits(last, first, name)
