"""Weight gradients on tensor cores with their sides exchanged, executed on the CPU: values, layouts, what is chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gpuconv import dispatch, reference
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import ArrayLayout, Layout
from gpuconv.families import weight_gradient_mma as mma
from gpuconv.families.arithmetic import ARITHMETICS
from gpuconv.families.base import contiguous_strides
from gpuconv.families.weight_gradient_sides import exchanged, exchanged_layout
from gpuconv.problem import WeightGradientProblem
from tests import hostcuda
from tests.kernels.arrays import assert_same_bits, channels_last
from tests.kernels.test_gradient_kernels import check_layouts, exact_result, integers, normal
from tests.plans import kernel_of, plan_of

Array = npt.NDArray[Any]

FAMILY = mma.WeightGradientMma()
DEVICE = Device.from_arch("sm_90")
MODES = tuple(ARITHMETICS)  # (dtype, precision)
HALF, SINGLE = ("float16", "float32"), ("float32", "float32")


def problem(
    C_coarse: int, C_fine: int, L: int, K: int, mode: tuple[str, str] = HALF, N: int = 2, **settings: Any
) -> WeightGradientProblem:
    """A layer without stride that pads half of its taps, unless the settings say otherwise."""
    span = settings.setdefault("dilation", 1) * (K - 1)
    settings.setdefault("padding_left", span // 2)
    L_fine = settings.pop("L_fine", max(1, L + span - 2 * settings["padding_left"]))
    dtype, precision = mode
    return WeightGradientProblem(
        "conv1d", N, C_coarse, C_fine, L, L_fine, K, dtype=dtype, precision=precision, **settings
    )


# bpnet.fconv_k75_66to2
BPNET = problem(2, 66, 2114, 75, ("bfloat16", "float32"), N=64)


def _forget() -> None:
    for function in (mma._sides, dispatch.choose):
        function.cache_clear()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sides are exchanged wherever that is possible."""
    monkeypatch.setattr(mma, "_WORTH_EXCHANGING", math.inf)
    _forget()
    yield
    _forget()


def is_exchanged(p: WeightGradientProblem, layout: Layout | None = None, device: Device = DEVICE) -> bool:
    choice = dispatch.choose(p, layout or Layout.contiguous(p), device)
    assert choice is not None
    return bool(dict(choice.launch.params).get("is_exchanged", 0))


def run(p: WeightGradientProblem, *arrays: Array, **how: Any) -> Array:
    assert is_exchanged(p)
    return hostcuda.compute(p, *arrays, family=FAMILY.name, **how)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_values(mode: tuple[str, str]) -> None:
    """Integers exactly, of one slice and of several; normal data within the bound, infinities where they belong."""
    for i, p in enumerate(
        (
            problem(2, 18, 70, 9, mode),
            problem(9, 16, 150, 4, mode, padding_left=0),
            problem(3, 17, 66, 11, mode, padding_left=7, dilation=2),
            problem(20, 40, 90, 3, mode, padding_left=2, N=3),
            problem(8, 24, 401, 1, mode),
            problem(1, 33, 300, 15, mode, L_fine=260, N=4),
            problem(20, 8, 130, 2, mode, dilation=30, N=1),
            problem(6, 48, 133, 3, mode, dilation=2),  # of few channels and taps: neither fill an octet
            problem(4, 17, 90, 5, mode),
            problem(7, 33, 75, 6, mode, N=3),
            problem(3, 40, 70, 7, mode),
        )
    ):
        arrays = integers(p)
        assert_same_bits(run(p, *arrays, schedule=i), exact_result(p, *arrays), p)
        arrays = normal(p, nonfinite=i % 2 == 1)
        assert reference.weight_gradient(p, *arrays).within_bound(run(p, *arrays, placement="start")).all(), p


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("L", [48, 1500])
def test_layouts(L: int) -> None:
    """Views are read and written in place, with the bits of contiguous arrays, through partial sums and without."""
    p = problem(6, 16, L, 9)
    assert (len(plan_of(FAMILY, p, Layout.contiguous(p), DEVICE).steps) > 1) == (L > 48)
    check_layouts(run, p)


@pytest.mark.usefixtures("always")
def test_offsets_beyond_32_bits() -> None:
    p = problem(5, 16, 72, 9)
    coarse, fine = (ArrayLayout((2**31 + 8, *contiguous_strides(s)[1:])) for s in (p.coarse_shape, p.fine_shape))
    arrays = normal(p)
    expected = run(p, *arrays)
    for layout in (
        Layout.of(coarse=coarse, fine=fine, grad_weight=ArrayLayout(contiguous_strides(p.weight_shape))),
        Layout.contiguous(p).replaced(grad_weight=ArrayLayout((1, 5, 2**28))),
    ):
        config, launch = kernel_of(FAMILY, p, layout, DEVICE)
        assert launch.index_bits == 64
        assert config in set(FAMILY.configs(DEVICE))
        assert_same_bits(run(p, *arrays, layout=layout), expected, p)


@pytest.mark.usefixtures("always")
def test_samples_with_lengths() -> None:
    """Samples of full length give the bits of samples without a table of lengths."""
    for mode in (HALF, SINGLE):
        p = problem(5, 16, 90, 9, mode, padding_left=3)
        coarse, fine = normal(p, nonfinite=mode == SINGLE)
        table = np.array([(p.L_fine, p.L_coarse, 3)] * 2)
        q = replace(p, has_lengths=True)
        assert_same_bits(run(q, coarse, fine, samples=table), run(p, coarse, fine), p)
        coarse, fine = integers(p)
        short = p.L_fine - 41
        table[1] = short, short - p.L_fine + p.L_coarse, 3
        coarse[1, :, table[1, 1] :], fine[1, :, short:] = 0, 0
        expected = exact_result(p, coarse, fine)
        coarse[1, :, table[1, 1] :], fine[1, :, short:] = np.nan, np.inf
        assert_same_bits(run(q, coarse, fine, samples=table), expected, p)


def test_exchanging_twice_changes_nothing() -> None:
    p = problem(5, 16, 90, 9, padding_left=2, dilation=3)
    q = exchanged(p)
    assert q is not None
    assert exchanged(q) == p
    layout = Layout.contiguous(p)
    assert exchanged_layout(q, exchanged_layout(p, layout)) == layout


def test_what_is_exchanged() -> None:
    """Problems whose rows would be few, on every GPU, in every layout, with lengths and without."""
    last = Layout.contiguous(BPNET).replaced(
        fine=hostcuda.array_layout(channels_last(np.empty(BPNET.fine_shape, np.float16)))
    )
    assert is_exchanged(BPNET, last)
    for arch in ARCHITECTURES:
        for p in (replace(BPNET, dtype="float16"), BPNET, replace(BPNET, dtype="float32", precision="tf32")):
            device = Device.from_arch(arch)
            if device.arch >= ARITHMETICS[p.dtype, p.precision].min_arch:
                assert is_exchanged(p, device=device)
                assert is_exchanged(replace(p, has_lengths=True), device=device)
    # htdemucs.dconv_k3_d2_48to6
    assert all(is_exchanged(problem(6, 48, 85995, 3, mode, dilation=2, N=4)) for mode in MODES)
    assert is_exchanged(problem(1280, 128, 3000, 3, N=16))  # 384 columns would leave a third of the widest tile
    for change in (
        {"dtype": "float32"},  # three products
        {"padding_mode": "circular"},
        {"padding_left": 75, "L_fine": 2114},
        {"stride": 2, "L_coarse": 1057},
        {"groups": 2},
        {"dtype": "float64"},
        {"K": 7, "padding_left": 3},  # too few columns
    ):
        assert not is_exchanged(replace(BPNET, **change)), change


def test_a_mode_of_padding_without_padding_is_exchanged() -> None:
    p = replace(BPNET, padding_left=0, L_coarse=2040, padding_mode="circular")
    plan = plan_of(FAMILY, p, Layout.contiguous(p), DEVICE)
    zeros = replace(p, padding_mode="zeros")
    assert plan == plan_of(FAMILY, zeros, Layout.contiguous(p), DEVICE)
    assert plan.steps[0].arrays == ("fine", "coarse", "partial", None)
    assert FAMILY.work(p, plan.steps[0]) == FAMILY.work(zeros, plan.steps[0])
    of_lengths = [dispatch.choose(replace(q, has_lengths=True), Layout.contiguous(q), DEVICE) for q in (p, zeros)]
    assert of_lengths[0] == of_lengths[1]
    assert is_exchanged(replace(p, has_lengths=True))


def test_arrays_keep_their_names() -> None:
    """Rows of 2114 elements begin at multiples of two; octets of taps are loaded position by position."""
    choice = dispatch.choose(BPNET, Layout.contiguous(BPNET), DEVICE)
    assert choice is not None
    assert choice.staging == {
        "fine": "four positions of a channel, two at a time",
        "coarse": "one position of a channel",
    }
