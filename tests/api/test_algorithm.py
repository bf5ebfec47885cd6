"""`algorithm=` with the real CuPy: the kernel family of that name is launched, or says why it refuses the problem.

The tests need a GPU, or `python -m tests.gpu_on_cpu python -m pytest -m gpu` in front of this file's name.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import cases, dispatch, runtime
from gpuconv.device import Device
from gpuconv.families import Family, Layout
from tests.plans import BASE, FORWARD_FAMILIES, refusal_of

pytestmark = pytest.mark.gpu

OPS = ("conv1d", "conv_transpose1d")

# A small case that each family takes.
TAKEN = {
    "conv1d_mma": "mimi_stream",
    "conv_transpose1d_mma": "up_stride2_k4",
    "conv1d_im2col": "enformer_stem",
    "conv_transpose1d_im2col": "up_long_kernel",
    "conv1d_col2im": "bpnet_head_49_5",
    "conv_transpose1d_col2im": "up_channels_52_4",
    "conv1d_toeplitz": "quartznet_dw",
    "conv1d_depthwise": "depthwise_strided_dilated",
    "conv1d_skinny": "length1_padded",
    "conv1d_stem": "padding_exceeds_input",
    "conv1d_tail": "one_channel",
    "conv1d_narrow": "dilation_spans_input",
    "conv1d_tiled": "padding_same_strided_even",
    "conv_transpose1d_depthwise": "up_depthwise_dilated",
    "conv_transpose1d_tail": "up_length127",
    "conv_transpose1d_phases": "up_dilation4_stride6",
    "conv1d_direct": "dilation_spans_input",
    "conv_transpose1d_gather": "up_dilation4_stride6",
}

# One that it refuses. The base families refuse nothing.
REFUSED = {
    "conv1d_mma": "one_channel",
    "conv_transpose1d_mma": "up_length127",
    "conv1d_im2col": "mimi_stream",
    "conv_transpose1d_im2col": "up_stride2_k4",
    "conv1d_col2im": "mimi_stream",
    "conv_transpose1d_col2im": "up_stride2_k4",
    "conv1d_toeplitz": "mimi_stream",
    "conv1d_depthwise": "mimi_stream",
    "conv1d_skinny": "one_channel",
    "conv1d_stem": "mimi_stream",
    "conv1d_tail": "mimi_stream",
    "conv1d_narrow": "mimi_stream",
    "conv1d_tiled": "one_channel",
    "conv_transpose1d_depthwise": "up_stride2_k4",
    "conv_transpose1d_tail": "up_stride2_k4",
    "conv_transpose1d_phases": "styletts2_pool",
}


ON_TENSOR_CORES = {family.name for family in FORWARD_FAMILIES if not family.canonical_order}


class Call:
    """A case on the current GPU in the number format of a family's test."""

    def __init__(self, name: str, number_format: str) -> None:
        (case,) = cases.select(name)
        self.problem = case.at(number_format)
        self.settings = dict(case.settings)
        cupy = runtime.cupy_module()
        data = cases.exact_data(self.problem, 0)
        self.arrays = [None if array is None else cupy.asarray(array) for array in data]

    def explain(self, algorithm: str | None) -> Any:
        return gpuconv.explain(self.problem.op, *self.arrays, **self.settings, algorithm=algorithm)

    def run(self, algorithm: str | None) -> np.ndarray:
        return getattr(gpuconv, self.problem.op)(*self.arrays, **self.settings, algorithm=algorithm).get()


def number_format(family: str) -> str:
    """float16 for tensor cores, which multiply it on every architecture."""
    return "float16" if family in ON_TENSOR_CORES else "float32"


def this_gpu() -> Device:
    return runtime.current_gpu()


@pytest.mark.parametrize("family", FORWARD_FAMILIES, ids=lambda family: family.name)
def test_a_familys_name_launches_it(family: Family[Any], launched: list[str]) -> None:
    """Fails if a name is ignored, or stands for another family than `explain` says."""
    call = Call(TAKEN[family.name], number_format(family.name))
    choice = dispatch.choose(call.problem, Layout.contiguous(call.problem), this_gpu(), family.name)
    assert choice is not None
    assert choice.config.kernel == family.name
    expected = [step.config.kernel for step in choice.plan.steps]
    assert call.explain(family.name).choice.family == family.name
    result = call.run(family.name)
    assert launched == expected
    base = call.run("base")
    assert launched[-1] == BASE[family.kind]
    assert result.tobytes() == base.tobytes()


@pytest.mark.parametrize(
    "family", [f for f in FORWARD_FAMILIES if f.name != BASE[f.kind]], ids=lambda family: family.name
)
def test_a_refusal_carries_the_familys_reason(family: Family[Any], launched: list[str]) -> None:
    """Fails if a name that is refused computes by another family, or if the reason is lost."""
    call = Call(REFUSED[family.name], number_format(family.name))
    reason = refusal_of(family, call.problem, Layout.contiguous(call.problem), this_gpu())
    assert reason is not None
    told = re.escape(f"{family.kind}: algorithm {family.name!r} does not take {call.problem}: {reason}")
    for ask in (call.run, call.explain):
        with pytest.raises(dispatch.AlgorithmError, match=f"^{told}$"):
            ask(family.name)
    assert launched == []


@pytest.mark.parametrize("op", OPS)
def test_a_plan_that_is_kept_for_one_algorithm_serves_no_other(op: str, launched: list[str]) -> None:
    """Fails if the cache of plans forgets the name: then the first call's family would run them all."""
    call = Call({"conv1d": "mimi_stream", "conv_transpose1d": "up_stride2_k4"}[op], "float16")
    preferred = call.explain(None).choice.family
    assert preferred != BASE[op]
    for _ in range(2):
        for algorithm, family in ((None, preferred), ("base", BASE[op]), (BASE[op], BASE[op]), (f"{op}_mma",) * 2):
            call.run(algorithm)
            assert launched[-1] == family
    with pytest.raises(dispatch.AlgorithmError, match=f"^{op}: algorithm must be None or one of base, {op}_col2im, "):
        call.run("fast")
