"""Tensor cores at their edges: values outside of windows, views with negative strides, batches of short samples."""

from __future__ import annotations

import numpy as np
import pytest

from gpuconv import cases
from gpuconv.checks import same_bits
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import Layout
from gpuconv.problem import ConvProblem, Op
from tests.plans import FORWARD_FAMILIES, kernel_of

from . import hostcuda

FAMILY = {family.kind: family for family in FORWARD_FAMILIES if not family.canonical_order}

# Stages that are not full; planes; phases with fewer taps than others, whose missing taps read a row that they do have.
PADDED = ConvProblem("conv1d", 1, 24, 16, 20, 3, 1, 2, 3)
STRIDED = ConvProblem("conv1d", 1, 36, 16, 33, 5, 3, 4, 4, 2)
PHASES = ConvProblem("conv_transpose1d", 1, 24, 16, 20, 5, 2, 0, 0, 3)


def positions(p: ConvProblem, l_in: int) -> set[int]:
    """The output positions whose window contains an input position."""
    if p.transposed:
        return {l_in * p.stride - p.padding_left + k * p.dilation for k in range(p.K)}
    starts = (l_in + p.padding_left - k * p.dilation for k in range(p.K))
    return {start // p.stride for start in starts if start % p.stride == 0}


@pytest.mark.parametrize("value", [np.inf, 2.0**-110])  # neither can be split
@pytest.mark.parametrize("problem", [PADDED, STRIDED, PHASES], ids=["padded", "strided", "phases"])
def test_values_outside_the_window_change_no_bit(problem: ConvProblem, value: float) -> None:
    p = problem
    family = FAMILY[p.op].name
    x, w, b = cases.random_data(p, 3)
    expected = hostcuda.compute(p, x, w, b, family=family)
    x[0, 3, 10] = value
    output = hostcuda.compute(p, x, w, b, family=family)
    outside = [l_out for l_out in range(p.L_out) if l_out not in positions(p, 10)]
    assert same_bits(output[..., outside], expected[..., outside]).all()
    assert not same_bits(output, expected).all()


@pytest.mark.parametrize("op", ["conv1d", "conv_transpose1d"])
def test_padding_beside_channels_in_reverse(op: Op) -> None:
    """Offsets of channels are negative, and are added to none where a position does not exist."""
    p = ConvProblem(op, 2, 40, 9, 13, 4, 1, 2, 3, dtype="float16")
    x, w, b = cases.exact_data(p, 5)
    expected = hostcuda.compute(p, x, w, b, family=FAMILY[op].name)
    output = hostcuda.compute(p, np.ascontiguousarray(x[:, ::-1])[:, ::-1], w, b, family=FAMILY[op].name)
    assert same_bits(output, expected).all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_many_short_samples_share_blocks(arch: str) -> None:
    """Also where offsets need 64 bits: a block for each sample would be more than a grid holds."""
    p = ConvProblem("conv1d", 2**29, 32, 32, 1, 1, groups=4, dtype="float16")
    _, launch = kernel_of(FAMILY["conv1d"], p, Layout.contiguous(p), Device.from_arch(arch))
    assert launch.index_bits == 64
    assert launch.grid < p.N * p.groups // 32
    assert dict(launch.params)["block_samples"] == 64
