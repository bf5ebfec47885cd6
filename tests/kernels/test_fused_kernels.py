"""What kernels fuse: every family gives the bits of the base family, within the bound, whatever is fused.

Arrays with gaps, single samples and cut rows give the bits of contiguous arrays, of batches and of whole rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from gpuconv import cases, dispatch, reference
from gpuconv.device import Device
from gpuconv.families import FAMILIES, Config, Refusal
from gpuconv.families.base import ACTIVATED
from gpuconv.fusion import Fused
from gpuconv.problem import ConvProblem, numpy_dtype
from tests import hostcuda
from tests.kernels.test_compile import resources
from tests.plans import BASE

DEVICE = Device.from_arch("sm_90")
REAL = ("float16", "bfloat16", "float32", "float64")
ACTIVATIONS = ("relu", "leaky_relu", "elu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "snake", "snake_beta")
CASES = {case.name: case for case in cases.CASES}
FAMILY = {family.name: family for family in FAMILIES}
CANONICAL = {name: family.canonical_order for name, family in FAMILY.items()}


def argument(name: str | None, channels: int, dtype: str, seed: int) -> Any:
    """An activation as a call gives it."""
    if name is not None and name.startswith("snake"):
        rng = np.random.default_rng(seed)
        count = 2 if name == "snake_beta" else 1
        return ("snake", *(rng.uniform(0.5, 1.5, channels).astype(numpy_dtype(dtype)) for _ in range(count)))
    given = {"leaky_relu": ("leaky_relu", -0.3), "elu": ("elu", 1.6), "gelu_tanh": ("gelu", "tanh")}
    return None if name is None else given.get(name, name)


@dataclass
class Subject:
    """A problem that fuses something, with its data."""

    problem: ConvProblem
    data: cases.Data
    fused: dict[str, Any]

    @classmethod
    def of(cls, case: str, dtype: str, activation: str | None, before: str | None, *, residual: bool) -> Subject:
        p = CASES[case].at(dtype)
        data = cases.random_data(p, 0)
        given = Fused.check(
            p.op,
            argument(activation, p.C_out, p.dtype, 1),
            argument(before, p.C_in, p.dtype, 2),
            cases.random_grad_output(p, 3) if residual else None,
        )
        return cls(p.fused(given), data, given.given)

    @property
    def families(self) -> list[str]:
        p = self.problem
        layout, _ = dispatch.lay_out(p, {})
        found = []
        for family in dispatch.families(p.op):
            if not isinstance(dispatch.plan_of(family, p, layout, DEVICE), Refusal):
                found.append(family.name)
        return found

    def run(self, family: str, **options: Any) -> Any:
        arrays = {**self.data._asdict(), **self.fused}
        given = [arrays[name] for name in list(self.problem.shapes)[:-1]]
        return hostcuda.compute(self.problem, *given, device=DEVICE, family=family, **options)

    def check(self, output: Any) -> None:
        found = reference.convolution(self.problem, *self.data, self.fused).compare(output)
        assert found.right.all(), f"{self.problem}: {found.worst}"


# A case for each family and each of its ways to load and to store.
FAMILY_CASES = (
    "k3", "docs_example", "groups3_odd_channels", "depthwise", "depthwise_strided_dilated", "depthwise_long_dilated",
    "depthwise_stride8", "wav2vec2_stem", "one_output_channel", "length1_output", "dense_long_sum", "up_stride2_k4",
    "up_dilation3_stride2", "up_depthwise", "up_depthwise_dilated", "up_depthwise_long_dilated",
    "up_one_output_channel", "up_dense_long_sum", "up_dense_dilation3", "up_unbatched", "channels_64_128",
    "enformer_stem", "attnsleep", "quartznet_dw",
)  # fmt: skip


# Every second dtype, but all of them where a family has no other case.
ONLY_CASES = ("one_output_channel", "up_one_output_channel", "quartznet_dw")
CHOSEN = [
    (case, dtype)
    for i, case in enumerate(FAMILY_CASES)
    for j, dtype in enumerate(REAL)
    if (i + j) % 2 == 0 or case in ONLY_CASES
]


def test_every_family_is_chosen_in_every_dtype() -> None:
    def taken(pairs: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
        subjects = ((Subject.of(case, dtype, None, None, residual=True), dtype) for case, dtype in pairs)
        return {(family, dtype) for subject, dtype in subjects for family in subject.families}

    assert taken(CHOSEN) == taken(product(FAMILY_CASES, REAL))


@pytest.mark.parametrize(("case", "dtype"), CHOSEN)
def test_families_agree_and_keep_the_bound(case: str, dtype: str) -> None:
    """Everything that can be fused is fused; the activations take turns."""
    place = FAMILY_CASES.index(case) + REAL.index(dtype)
    names = ACTIVATIONS[place % len(ACTIVATIONS)], ACTIVATIONS[(3 * place + 1) % len(ACTIVATIONS)]
    subject = Subject.of(case, dtype, *names, residual=True)
    base = subject.run(BASE[subject.problem.op])
    subject.check(base)
    for family in subject.families:
        output = subject.run(family)
        if CANONICAL[family]:
            assert output.tobytes() == base.tobytes(), family
        subject.check(output)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", ["k3", "up_depthwise"])
def test_a_fused_load_gives_the_bits_of_the_step(case: str, activation: str) -> None:
    """The base family activates samples as it loads them; of the others some have the step."""
    subject = Subject.of(case, "float16", None, activation, residual=False)
    layout, _ = dispatch.lay_out(subject.problem, {})
    base = subject.run(BASE[subject.problem.op])
    for family in subject.families:
        choice = dispatch.choose(subject.problem, layout, DEVICE, family)
        assert choice is not None
        has_step = any(ACTIVATED in step.arrays for step in choice.plan.steps)
        assert has_step == (family not in (*BASE.values(), "conv1d_depthwise", "conv_transpose1d_depthwise"))
        if CANONICAL[family]:
            assert subject.run(family).tobytes() == base.tobytes(), family


@pytest.mark.parametrize("case", ["dense_groups3", "up_dense_stride3", "depthwise_multiplier"])
@pytest.mark.parametrize("dtype", ["complex64", "complex128", "tf32"])
def test_a_residual_of_every_format(case: str, dtype: str) -> None:
    subject = Subject.of(case, dtype, None, None, residual=True)
    for family in subject.families:
        subject.check(subject.run(family))


@pytest.mark.parametrize(
    "case", ["dense_groups3", "up_dense_stride3", "wav2vec2_stem", "depthwise", "one_output_channel"]
)
def test_every_order_of_threads_gives_the_same_bits(case: str) -> None:
    subject = Subject.of(case, "float32", "gelu", "elu", residual=True)
    for family in subject.families:
        subject.check(subject.run(family, schedule="every"))


@pytest.mark.parametrize("case", ["dense_stride3", "depthwise", "k5", "up_dense_groups2", "up_depthwise"])
def test_bits_depend_neither_on_the_batch_nor_on_the_position(case: str) -> None:
    subject = Subject.of(case, "float16", "silu", "snake", residual=True)
    p, data = subject.problem, subject.data
    for family in subject.families:
        whole = subject.run(family)
        residual = subject.fused["residual"]
        alone = Subject(
            replace(p, N=1), data._replace(input=data.input[-1:]), {**subject.fused, "residual": residual[-1:]}
        )
        assert alone.run(family)[0].tobytes() == whole[-1].tobytes(), family
        start, stop = p.L_out // 3, p.L_out - 1
        piece, positions = cases.chunk(p, start, stop)
        cut = Subject(
            piece,
            data._replace(input=np.ascontiguousarray(data.input[..., positions])),
            {**subject.fused, "residual": np.ascontiguousarray(residual[..., start:stop])},
        )
        if family in cut.families:
            assert cut.run(family).tobytes() == whole[..., start:stop].tobytes(), family


@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_kernels_that_fuse_compile_without_spills(arch: str) -> None:
    """The cases take turns in the architecture."""
    pytest.importorskip("cupy_backends", reason="compiling needs CuPy")
    configs: set[Config] = set()
    for case in FAMILY_CASES[arch == "sm_75" :: 2]:
        subject = Subject.of(case, "float16", "snake_beta" if arch == "sm_75" else "gelu", "silu", residual=True)
        layout, _ = dispatch.lay_out(subject.problem, {})
        for family in subject.families:
            plan = dispatch.plan_of(FAMILY[family], subject.problem, layout, Device.from_arch(arch))
            if not isinstance(plan, Refusal):
                configs |= {step.config for step in plan.steps}
    assert len(configs) > 20
    for config in configs:
        assert resources(config, arch).local_bytes == 0, config


@pytest.mark.parametrize("mode", ["reflect", "circular"])
@pytest.mark.parametrize("case", ["k3", "dense_stride3", "depthwise", "depthwise_strided_dilated"])
def test_the_edges_of_a_padding_mode_fuse_the_same(case: str, mode: str) -> None:
    """Outputs at the edges come from a step of their own, which gives the bits of the base family."""
    subject = Subject.of(case, "float16", "gelu", "sigmoid", residual=True)
    padding = {"padding_left": 2, "padding_right": 2} if mode == "reflect" else {}
    p = replace(subject.problem, padding_mode=mode, **padding)
    subject.problem = p
    subject.fused["residual"] = np.resize(subject.fused["residual"], p.output_shape)
    base = subject.run(BASE[p.op])
    subject.check(base)
    for family in subject.families:
        output = subject.run(family)
        subject.check(output)
        assert output.tobytes() == base.tobytes() or not CANONICAL[family], family


@pytest.mark.parametrize("kind", ["nonfinite", "ill_scaled", "cancelling"])
@pytest.mark.parametrize("case", ["k3", "dense_stride3", "depthwise", "wav2vec2_stem", "up_dense_stride3"])
@pytest.mark.parametrize("activation", ["silu", "elu", "sigmoid"])
def test_other_data(case: str, activation: str, kind: cases.RandomKind) -> None:
    """Infinities and NaN, which kernels sum again. 0.5, the sigmoid of a zero, may not enter the padding."""
    subject = Subject.of(case, "float32", activation, activation, residual=True)
    subject.data = cases.random_data(replace(subject.problem), 0, kind)
    for family in subject.families:
        subject.check(subject.run(family))


@pytest.mark.parametrize("case", ["k3", "depthwise", "dense_stride3"])
def test_a_residual_and_an_output_with_gaps_are_copied_together(case: str) -> None:
    subject = Subject.of(case, "float32", "relu", None, residual=True)
    p = subject.problem
    strides = tuple(2 * stride for stride in subject.fused["residual"].strides)
    layout, copies = dispatch.lay_out(p, {"residual": dispatch.StridedPointer(strides, 4096)})
    assert copies == ("residual",)
    assert layout["residual"].strides == layout["output"].strides
    both = {name: dispatch.StridedPointer(strides, 4096) for name in ("residual", "output")}
    assert dispatch.lay_out(p, both)[1] == ()
