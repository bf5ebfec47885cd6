"""Whatever dispatch chooses is among the specialisations that `gpuconv warmup` compiles, and a GPU can launch it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from gpuconv import cases
from gpuconv.compile import every_config
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.dispatch import AlgorithmError, choose, choose_push, families
from gpuconv.families import FAMILIES, ArrayLayout, Layout, Refusal, conv1d_depthwise_push
from gpuconv.families.base import MAX_GRID
from gpuconv.problem import DTYPES, BiasGradientProblem, ConvProblem, Problem, WeightGradientProblem
from gpuconv.source import pack_params, params_fields

DEVICES = tuple(map(Device.from_arch, ARCHITECTURES))
FORMATS = (*DTYPES, "tf32")
LEAST_CHOICES = 3  # of every family, for the test to say something of it


class Random:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def below(self, end: int) -> int:
        return int(self.rng.integers(end))

    def magnitude(self, bits: float) -> int:
        """A number from 1 to 2**bits: each order of magnitude is as likely as another."""
        return int(2 ** self.rng.uniform(0, bits))

    def layer(self) -> ConvProblem | None:
        """None where there is no such layer, or its result is empty."""
        unit = (1, 8)[self.below(2)]
        C_in, C_out = (-(-self.magnitude(9.3) // unit) * unit for _ in range(2))
        groups = (1, 1, 1, 2, 16)[self.below(5)]
        K, stride, dilation = self.magnitude(6), 1 + self.below(2) * self.below(5), 1 + self.below(2) * self.below(9)
        kind = self.below(7)
        if kind == 0:
            groups, C_in, C_out = 64, 1, 1 + self.below(2)
        elif kind < 3:  # long filters
            groups, C_in, K, stride, dilation = 1, 1 + self.below(2) * self.below(4), 8 + 2 * self.magnitude(7), 1, 1
            C_out = 1 + self.below(2) * C_out
        elif kind == 6 and self.below(3) == 0:  # few output channels
            groups, C_in, C_out, K, stride, dilation = 1, 48 + self.below(80), 1 + self.below(4), 48 + K, 1, 1
        padding = self.below(K + 2)
        try:
            layer = ConvProblem(
                ("conv1d", "conv_transpose1d")[self.below(2)],
                self.magnitude(12),
                C_in * groups,
                C_out * groups,
                self.magnitude(13),
                K,
                stride,
                padding,
                padding,
                groups=groups,
                dilation=dilation,
            )
        except ValueError:
            return None
        return cases.in_format(layer, FORMATS[self.below(len(FORMATS))])

    def array(self, shape: tuple[int, ...]) -> ArrayLayout:
        """Axes in any order, among them channels last, forwards or backwards, rows with gaps, at any alignment."""
        order = (self.rng.permutation(len(shape)), np.roll(np.arange(len(shape)), -1))[self.below(2)]
        strides, step = [0] * len(shape), 1
        for place, axis in enumerate(order):
            strides[axis] = step * (-1 if self.below(6) == 0 else 1)
            step = step * shape[axis] + (0, 8, 2, 1)[self.below(4)] * (place == 0)
        if self.below(40) == 0:
            strides[0] = 2**31 + 16
        return ArrayLayout(tuple(strides), (16, 16, 8, 4, 2)[self.below(5)])

    def layout(self, problem: Problem) -> Layout:
        layout = Layout.contiguous(problem)
        if self.below(4):
            moved = [name for name in problem.shapes if name != "weight" or self.below(3) == 0]
            layout = layout.replaced(**{name: self.array(problem.shapes[name]) for name in moved})
        return replace(layout, is_prepared=self.below(2) == 1)


def problems(random: Random, count: int) -> Iterator[Problem]:
    of_layer = (*(lambda p: p for _ in range(7)), *(WeightGradientProblem.of,) * 2, BiasGradientProblem.of)
    while count > 0:
        layer = random.layer()
        if layer is None or layer.is_empty:
            continue
        count -= 1
        yield of_layer[random.below(len(of_layer))](layer)


def test_every_choice_is_compiled_by_warmup_and_can_be_launched() -> None:
    """Chosen by preference or by name, for prepared weights and others: GPUCONV_CACHE_ONLY refuses none of them."""
    random, chosen = Random(0), Counter[str]()
    every = {device: set(every_config(device, DTYPES, streams=False)) for device in DEVICES}
    for problem in problems(random, 2500):
        layout, device = random.layout(problem), DEVICES[random.below(len(DEVICES))]
        names = [family.name for family in families(problem.kind)] if random.below(3) == 0 else [None]
        for name in names:
            try:
                choice = choose.__wrapped__(problem, layout, device, name)  # the cache would only fill up
            except AlgorithmError:
                continue
            chosen[choice.family] += 1
            for config, launch in ((step.config, step.launch) for step in choice.plan.steps):
                what = (config.kernel, str(problem), layout, device.name, name)
                assert config in every[device], what
                assert 0 < launch.grid <= MAX_GRID, what
                assert 0 < launch.block <= 1024, what
                assert launch.shared_bytes <= device.shared_per_block, what
                assert tuple(name for name, _ in launch.params) == params_fields(config.kernel), what
                pack_params(dict(launch.params), launch.index_bits)
    rare = {family.name for family in FAMILIES if chosen[family.name] < LEAST_CHOICES}
    assert not rare, chosen


def test_every_push_of_a_stream_is_compiled_by_warmup() -> None:
    random, chosen = Random(2), Counter[str]()
    every = {device: set(every_config(device, (*DTYPES, "int16"), streams=True)) for device in DEVICES}
    while sum(chosen.values()) < 900:
        layer, N, length = random.layer(), random.magnitude(4), random.magnitude(5)
        if random.below(12) == 0:  # depthwise filters of many taps, which are rare otherwise
            C, K, length = random.magnitude(4), 17 + random.below(48), 1 + random.below(4)
            layer = ConvProblem("conv1d", 1, C, C, K, K, groups=C, dtype=("float16", "bfloat16")[random.below(2)])
        elif random.below(10) == 0:  # few output channels and many taps, which are rare otherwise
            op, K, length = ("conv1d", "conv_transpose1d")[random.below(2)], 48 + random.below(48), 1 + random.below(4)
            dtype = ("float16", "bfloat16")[random.below(2)]
            layer = ConvProblem(op, 1, 48 + random.below(40), 1 + random.below(4), K, K, dtype=dtype)
        elif random.below(3) == 0:  # many slots with few samples each, on tensor cores
            N, length = 8 + random.below(25), 1 + random.below(2)
            op, C_out = ("conv1d", "conv_transpose1d")[random.below(2)], 16 * random.magnitude(5)
            layer = ConvProblem(op, 1, 16, C_out, 8, 1 + random.below(7), 1 + random.below(4))
            layer = cases.in_format(layer, FORMATS[random.below(len(FORMATS))])
        if layer is None:
            continue
        span = layer.dilation * (layer.K - 1)
        held = random.below(span + 1) if layer.transposed else span + random.below(layer.stride)
        padding = random.below(held * layer.stride + 1) if layer.transposed else 0
        own = {"dtype": "int16", "out_dtype": ("int32", "int64")[random.below(2)]} if random.below(20) == 0 else {}
        try:
            p = replace(layer, N=N, L_in=held + length, padding_left=padding, padding_right=0, **own)
        except ValueError:  # no result is left between the ends that are cut off
            continue
        layout, device = random.layout(p), DEVICES[random.below(len(DEVICES))]
        names = [family.name for family in families(p.kind)] if random.below(3) == 0 else [None]
        for name in names:
            try:
                push = choose_push.__wrapped__(p, length, layout, random.array((p.N, p.C_in, length)), device, name)
            except AlgorithmError:
                continue
            if isinstance(push, Refusal):
                continue
            for step in push.choice.plan.steps:
                assert step.config in every[device], (str(p), length, layout, device.name, name)
            chosen[push.choice.plan.steps[-1].config.kernel] += 1
    own = {family.name for family in FAMILIES if family.kind in ("conv1d", "conv_transpose1d")}
    rare = {name for name in (*own, conv1d_depthwise_push.KERNEL) if chosen[name] < LEAST_CHOICES}
    assert not rare, chosen
