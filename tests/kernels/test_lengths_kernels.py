"""Samples with lengths of their own, in the kernels: executed on the CPU, and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gpuconv import cases, dispatch, reference
from gpuconv.arguments import ArraySpec
from gpuconv.checks import same_bits
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import FAMILIES, Layout, Refusal, lengths
from gpuconv.families.base import SAMPLES, with_lengths
from gpuconv.lengths import Samples
from gpuconv.problem import BiasGradientProblem, ConvProblem, Problem, WeightGradientProblem
from gpuconv.source import pack_params
from tests import hostcuda
from tests.kernels.test_compile import alike, resources

Array = npt.NDArray[Any]

DEVICE = Device.from_arch("sm_90")


def with_table(problem: Any, samples: Samples, *, swapped: bool = False) -> tuple[Any, Array]:
    """The problem for samples with lengths of their own, and the table that its kernels read."""
    L_in, L_out, left, _ = samples
    columns = (L_out, L_in, left) if swapped else (L_in, L_out, left)
    return replace(problem, has_lengths=True), np.stack(columns, axis=1)


def random_problem(rng: np.random.Generator, layer: ConvProblem) -> tuple[ConvProblem, list[int]]:
    """The layer with other numbers of samples, lengths, strides and paddings, and lengths of the samples."""
    transposed, mode = layer.transposed, layer.padding_mode
    while True:
        stride, dilation = int(rng.integers(1, 4)), int(rng.integers(1, 3))
        try:
            p = replace(
                layer, N=int(rng.integers(1, 5)), L_in=int(rng.integers(1, 41)), stride=stride, dilation=dilation,
                padding_left=int(rng.integers(0, 5)), padding_right=int(rng.integers(0, 5)),
                output_padding=int(rng.integers(0, max(stride, dilation))) if transposed else 0,
            )  # fmt: skip
        except ValueError:
            continue
        least = 0 if mode == "zeros" else max(p.padding) + 1
        if least <= p.L_in:
            return p, [p.L_in, *rng.integers(least, p.L_in + 1, p.N - 1).tolist()]


# Layer, the number of random batches, the family that computes them, and the one that computes samples alone.
LAYERS = (
    (ConvProblem("conv1d", 1, 4, 6, 9, 3, groups=2, has_bias=True), 60, "conv1d_direct", "conv1d_direct"),
    (ConvProblem("conv1d", 1, 6, 6, 9, 3, groups=6, has_bias=True), 30, "conv1d_depthwise", "conv1d_direct"),
    (
        ConvProblem("conv1d", 1, 2, 3, 9, 4, has_bias=True, padding_mode="circular"),
        20,
        "conv1d_direct",
        "conv1d_direct",
    ),
    (
        ConvProblem("conv1d", 1, 2, 3, 9, 4, has_bias=True, padding_mode="circular"),
        10,
        "conv1d_narrow",
        "conv1d_direct",
    ),
    (
        ConvProblem("conv_transpose1d", 1, 4, 6, 9, 4, groups=2),
        60,
        "conv_transpose1d_gather",
        "conv_transpose1d_gather",
    ),
    (ConvProblem("conv_transpose1d", 1, 3, 2, 9, 4), 20, "conv_transpose1d_tail", "conv_transpose1d_gather"),
    (ConvProblem("conv1d", 1, 16, 24, 9, 5, dtype="float16", has_bias=True), 20, "conv1d_mma", "conv1d_mma"),
)


@pytest.mark.parametrize(("layer", "count", "family", "base"), LAYERS, ids=str)
def test_each_sample_has_the_bits_of_a_call_on_it_alone(layer: ConvProblem, count: int, family: str, base: str) -> None:
    """Random batches, with NaNs behind the samples and an infinite weight, which would spread from zeros there."""
    rng = np.random.default_rng(1)
    found = 0
    while found < count:
        p, L = random_problem(rng, layer)
        samples = Samples.of("test", p, p.padding, L)
        q, table = with_table(p, samples)
        plan = lengths.plan(_family(family), q, Layout.contiguous(q), DEVICE)
        if isinstance(plan, Refusal):
            continue
        found += 1
        x, w, b = cases.random_data(p, found)
        if found % 5 == 0:
            w[0, 0, -1] = np.inf
        for n, length in enumerate(L):
            x[n, :, length:] = np.nan
        y = hostcuda.compute(q, x, w, b, family=family, samples=table)
        for n, (length, L_out, _) in enumerate(table.tolist()):
            assert np.array_equal(y[n, :, L_out:], np.zeros_like(y[n, :, L_out:])), (str(p), L, n)
            if L_out:
                alone = hostcuda.compute(replace(p, N=1, L_in=length), x[n : n + 1, :, :length], w, b, family=base)[0]
                good = same_bits(y[n, :, :L_out], alone) | (np.isnan(alone) & np.isnan(y[n, :, :L_out]))
                assert good.all(), (str(p), L, n, np.argwhere(~good)[0])


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_gradients(mode: str) -> None:
    """Every family that takes them, with infinities behind the samples: in the input also where padding folds."""
    rng = np.random.default_rng(2)
    for number in range(12):
        layer = ConvProblem("conv1d", 1, 2, 3, 9, 4, padding_mode=mode)
        if mode == "zeros" and number % 2:
            layer = ConvProblem("conv_transpose1d", 1, 2, 3, 9, 4)
        p, L = random_problem(rng, layer)
        samples = Samples.of("test", p, p.padding, L)
        x, w, _ = cases.random_data(p, number)
        u = cases.random_grad_output(p, number)
        for n in range(p.N):
            x[n, :, samples.L_in[n] :] = np.nan
            u[n, :, samples.L_out[n] :] = np.inf
        there = [n for n in range(p.N) if samples.L_out[n]]

        q, table = with_table(p.adjoint(), samples, swapped=True)
        alone = {n: replace(p, N=1, L_in=L[n]) for n in there}
        grad_x = hostcuda.compute(q, u, w, samples=table, family="base")
        for n, (L_out, L_in, _) in enumerate(table.tolist()):
            expected = np.zeros_like(grad_x[n : n + 1])
            if n in there:
                v = u[n : n + 1, :, :L_out]
                expected[..., :L_in] = hostcuda.compute(alone[n].adjoint(), v, w, family="base")
            assert same_bits(grad_x[n : n + 1] + 0, expected + 0).all(), (str(p), L, n)

        weight = WeightGradientProblem.of(p)
        q, table = with_table(weight, samples, swapped=p.transposed)
        grad_w = hostcuda.compute(q, *q.sides(x, u), samples=table)
        exact = np.zeros(w.shape)
        magnitude = np.zeros(w.shape)
        for n in there:
            sides = WeightGradientProblem.of(alone[n]).sides(
                x[n : n + 1, :, : L[n]], u[n : n + 1, :, : samples.L_out[n]]
            )
            exact += reference.weight_gradient(WeightGradientProblem.of(alone[n]), *sides).exact()
            magnitude += reference.weight_gradient(WeightGradientProblem.of(alone[n]), *map(np.abs, sides)).exact()
        assert (np.abs(grad_w - exact) <= (weight.terms + 4) * 2.0**-24 * magnitude).all(), (str(p), L)

        q, table = with_table(BiasGradientProblem.of(p), samples)
        grad_b = hostcuda.compute(q, u, samples=table)
        values = [u[n, :, : samples.L_out[n]].astype(np.float64) for n in there] or [np.zeros((p.C_out, 0))]
        joined = np.concatenate(values, axis=1)
        assert (np.abs(grad_b - joined.sum(1)) <= (joined.shape[1] + 2) * 2.0**-24 * np.abs(joined).sum(1)).all()


def test_tensor_cores_leave_out_what_does_not_exist() -> None:
    """The families of tensor cores in which a block meets an end in the middle of what it stages."""
    for p, L in (
        (ConvProblem("conv1d", 3, 2, 16, 80, 20, 3, 2, 2, dtype="float16"), [80, 33, 17]),
        (ConvProblem("conv1d", 2, 1, 2, 300, 70, 1, 40, 39, dtype="float16"), [300, 133]),
        (ConvProblem("conv_transpose1d", 3, 16, 24, 20, 5, 2, 1, dtype="float16"), [20, 1, 13]),
    ):
        samples = Samples.of("test", p, p.padding, L)
        q, table = with_table(p, samples)
        x, w, b = cases.random_data(p, 3)
        for n, length in enumerate(L):
            x[n, :, length:] = np.inf
        choice = dispatch.choose(q, Layout.contiguous(q), DEVICE)
        assert choice is not None
        assert not _family(choice.family).canonical_order
        y = hostcuda.compute(q, x, w, b, samples=table)
        for n, (length, L_out, _) in enumerate(table.tolist()):
            alone = hostcuda.compute(replace(p, N=1, L_in=length), x[n : n + 1, :, :length], w, b, family=choice.family)
            assert same_bits(y[n : n + 1, :, :L_out], alone).all(), (str(p), n)
            assert not y[n, :, L_out:].any()


@pytest.mark.parametrize(
    ("shape", "L", "settings"),
    [
        ((16, 16, 3), [70, 0, 33], {"stride": 2, "padding": 1}),
        ((16, 2, 11), [70, 0, 33], {"stride": 2, "padding": 5}),
        ((16, 2, 11), [70, 33, 1, 17], {"stride": 3, "padding": "same", "dilation": 2}),
    ],
    ids=["channels", "taps", "paddings that differ"],
)
def test_the_weight_gradient_on_tensor_cores(shape: tuple[int, int, int], L: list[int], settings: Any) -> None:
    """Padding "same" with a stride begins each sample elsewhere, for columns of eight taps, too."""
    w = ArraySpec(shape, "float16")
    p = ConvProblem.conv1d(ArraySpec((len(L), shape[1], max(L)), "float16"), w, **settings)
    samples = Samples.of("test", p, settings["padding"], L)
    assert settings["padding"] != "same" or len({*samples.padding_left}) > 1
    q, table = with_table(WeightGradientProblem.of(p), samples)
    x, _, _ = cases.exact_data(p, 4)
    u = cases.exact_grad_output(p, 4, x)
    expected = np.zeros(shape)
    for n, (L_in, L_out, _) in enumerate(table.tolist()):
        x[n, :, L_in:], u[n, :, L_out:] = np.nan, np.inf
        if L_out:
            alone = ConvProblem.conv1d(ArraySpec((1, shape[1], L_in), "float16"), w, **settings)
            gradient = WeightGradientProblem.of(alone)
            sides = gradient.sides(x[n : n + 1, :, :L_in], u[n : n + 1, :, :L_out])
            expected += reference.weight_gradient(gradient, *sides).exact()
    assert np.array_equal(hostcuda.compute(q, u, x, family="weight_gradient_mma", samples=table), expected)


def test_the_table_is_written_from_parameters() -> None:
    values = np.arange(3 * 333).reshape(-1, 3)
    written: Array = np.full(values.size, -1)
    for count, params in lengths.writes(values.reshape(-1)):
        before = written.copy()
        config, launch = lengths.write_launch(count)
        names = (name for name, _ in launch.params)
        launch = replace(launch, params=tuple(zip(names, params.tolist(), strict=True)))
        assert pack_params(dict(launch.params), 64).tobytes() == params.tobytes()
        hostcuda.run(config, launch, {"samples": written}, outputs=("samples",), keeps=("samples",), completes=False)
        assert (written != before).sum() == dict(launch.params)["count"]
        assert params.nbytes <= 4096
    assert np.array_equal(written, values.reshape(-1))


def test_short_rows_of_transposed_operations_keep_their_families() -> None:
    """Their padding is folded in a step of its own, however short the rows are."""
    p = ConvProblem("conv1d", 2, 4, 2, 3, 5, 1, 2, 2, padding_mode="circular").adjoint()
    for family in dispatch.families(p.kind):
        refused = {
            isinstance(lengths.plan(family, replace(p, has_lengths=given), Layout.contiguous(p), DEVICE), Refusal)
            for given in (False, True)
        }
        assert len(refused) == 1, family.name


def test_plans_read_the_table_where_kernels_need_it() -> None:
    p = ConvProblem("conv1d", 4, 16, 24, 40, 5, dtype="float16", has_lengths=True)
    for problem in (p, p.adjoint(), WeightGradientProblem.of(p), BiasGradientProblem.of(p)):
        kernels = list(_kernels(problem))
        assert kernels, problem
        for name, has_lengths, reads in kernels:
            assert has_lengths == reads, (name, has_lengths)


def _kernels(problem: Problem) -> Iterator[tuple[str, bool, bool]]:
    layout = Layout.contiguous(problem)
    for family in dispatch.families(problem.kind):
        plan = lengths.plan(family, problem, layout, DEVICE)
        if not isinstance(plan, Refusal):
            for step in plan.steps:
                yield step.config.kernel, "LENGTHS" in dict(step.config.macros), SAMPLES in step.arrays


def _family(name: str) -> Any:
    return next(family for family in FAMILIES if family.name == name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_local_memory(arch: str) -> None:
    """Some specialisations of the kernels of their own, and one of every second or third family."""
    place = list(ARCHITECTURES).index(arch)
    chosen = [config for i, config in enumerate(lengths.configs()) if i % (3 * len(ARCHITECTURES)) == place]
    for number, family in enumerate(family for family in FAMILIES if family.keeps_lengths):
        one = ("INPUT_WIDTH", "COARSE_WIDTH", "FINE_WIDTH")
        own = [
            config
            for config in dict.fromkeys(map(alike, family.configs(Device.from_arch(arch))))
            if config.kernel == family.name
            and dict(config.macros).get("HAS_SAMPLES", "0") == "0"
            and all(dict(config.macros).get(name, "1") == "1" for name in one)
        ]
        if own and (place + number) % 3 == 0:
            chosen.append(with_lengths(own[(11 * place + number) % len(own)]))
    for config in chosen:
        assert resources(config, arch).local_bytes == 0, config
