"""Padding that means samples, in the kernels: executed on the CPU, compiled, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gpuconv
from gpuconv import cases, dispatch, grad, reference
from gpuconv.cases import CASES, Case
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.edge import PADDING_MODES
from gpuconv.families import FAMILIES, ArrayLayout, Config, Family, Layout, Refusal, edges
from gpuconv.families.base import contiguous_strides, with_padding_mode
from gpuconv.problem import DTYPES, ConvProblem, Problem, WeightGradientProblem
from tests import hostcuda
from tests.api.test_padding_modes import problems
from tests.kernels.arrays import assert_same_bits
from tests.kernels.test_compile import resources

Array = npt.NDArray[Any]

DEVICE = Device.from_arch("sm_90")
MODES = PADDING_MODES[1:]
MODE_CASES = [case for case in CASES if case.tags[0] == "mode"]

by_name = {"ids": lambda value: getattr(value, "name", value)}


def takers(problem: Problem) -> list[Family[Any]]:
    """The families that compute a problem, the base family last."""
    layout = Layout.contiguous(problem)
    plans = ((family, edges.plan(family, problem, layout, DEVICE)) for family in dispatch.families(problem.kind))
    return [family for family, plan in plans if not isinstance(plan, Refusal)]


def check(problem: Any, sums: reference.Sums, *arrays: Array | None) -> None:
    """Every family within the bound, and those on CUDA cores with the bits of the base family."""
    families = takers(problem)
    base = hostcuda.compute(problem, *arrays, family=families[-1].name)
    for family in families:
        output = hostcuda.compute(problem, *arrays, family=family.name)
        found = sums.compare(output)
        assert found.right.all(), (family.name, str(problem), found.worst)
        if family.canonical_order:
            assert_same_bits(output, base, (family.name, str(problem)))


def configs_of(problem: Problem) -> Iterator[Config]:
    for family in takers(problem):
        plan = edges.plan(family, problem, Layout.contiguous(problem), DEVICE)
        assert not isinstance(plan, Refusal)
        yield from (step.config for step in plan.steps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_table(dtype: str) -> None:
    """The gradient in the input folds at the edges behind every transposed family, in every dtype."""
    found = [case.at(dtype) for case in MODE_CASES]
    hostcuda.prebuild({config for p in found for config in configs_of(p.adjoint())})
    for p in found:
        q = p.adjoint()
        _, weight, _ = cases.random_data(p, 1)
        u = cases.random_grad_output(p, 2)
        check(q, reference.convolution(q, u, weight), u, weight)


def test_random_problems_in_every_family() -> None:
    """Forward and both gradients of random problems, through each family that takes them."""
    found = list(problems(60, 11, ("float32", "float16")))
    every: list[Problem] = [q for p in found for q in (p, p.adjoint(), WeightGradientProblem.of(p))]
    hostcuda.prebuild({config for q in every for config in configs_of(q)})
    for p in found:
        x, w, b = cases.random_data(p, 12)
        u = cases.random_grad_output(p, 13)
        check(p, reference.convolution(p, x, w, b), x, w, b)
        check(p.adjoint(), reference.convolution(p.adjoint(), u, w), u, w)
        q = WeightGradientProblem.of(p)
        sides = [a if a.ndim == 3 else a[np.newaxis] for a in q.sides(x, u)]
        check(q, reference.weight_gradient(q, *sides), *sides)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bits_at_an_edge_are_those_inside(mode: str, dtype: str) -> None:
    """An output at an edge has the bits of the same window inside of the padded input, also on tensor cores."""
    p = ConvProblem("conv1d", 2, 24, 24, 40, 5, 2, 7, 9, 2, dtype=dtype, padding_mode=mode, has_bias=True)
    x, w, b = cases.random_data(p, 3)
    padded = np.pad(x, [(0, 0), (0, 0), p.padding], {"replicate": "edge", "circular": "wrap"}.get(mode, mode))  # type: ignore[call-overload]
    inside = replace(p, L_in=padded.shape[-1], padding_left=0, padding_right=0, padding_mode="zeros")
    assert takers(p)[0].name == takers(inside)[0].name == "conv1d_mma"
    assert_same_bits(hostcuda.compute(p, x, w, b), hostcuda.compute(inside, padded, w, b), mode)


@pytest.mark.parametrize("mode", MODES)
def test_layouts(mode: str) -> None:
    """Arrays of any strides; and offsets beyond 32 bits, with the same bits."""
    p = ConvProblem("conv1d", 2, 6, 4, 21, 5, 2, 5, 4, dtype="float32", padding_mode=mode, has_bias=True, groups=2)
    x, w, b = cases.random_data(p, 4)
    u = cases.random_grad_output(p, 5)
    for problem, arrays in ((p, (x, w, b)), (p.adjoint(), (u, w)), (WeightGradientProblem.of(p), (u, x))):
        shapes = list(problem.shapes.items())
        far = {name: ArrayLayout((2**31 + 8, *contiguous_strides(s)[1:])) for name, s in shapes if len(s) > 1}
        bias = {"bias": ArrayLayout((1,))} if "bias" in problem.shapes else {}
        names = [name for name, _ in shapes]
        layout = Layout(tuple((name, {**far, **bias}[name]) for name in names))
        strided = [
            a if a is None or a.ndim < 2 else np.ascontiguousarray(a.swapaxes(-1, -2)).swapaxes(-1, -2) for a in arrays
        ]
        for family in takers(problem):
            expected = hostcuda.compute(problem, *arrays, family=family.name)
            for given, where in ((arrays, layout), (strided, None)):
                if where is not None and isinstance(edges.plan(family, problem, where, DEVICE), Refusal):
                    continue
                output = hostcuda.compute(problem, *given, family=family.name, layout=where, schedule="every")
                assert_same_bits(output, expected, (family.name, where is None))


@pytest.mark.parametrize("case", [c for c in MODE_CASES if any(c.problem.edge_windows)], **by_name)
def test_plans_do_not_copy(case: Case) -> None:
    """What a mode adds is a step that reads the input where it lies, or nothing."""
    for dtype in DTYPES:
        p = case.at(dtype)
        for family in takers(p):
            plan = edges.plan(family, p, Layout.contiguous(p), DEVICE)
            zeros = edges.plan(family, replace(p, padding_mode="zeros"), Layout.contiguous(p), DEVICE)
            assert not isinstance(plan, Refusal)
            assert not isinstance(zeros, Refusal)
            assert plan.scratch == zeros.scratch
            more = [step.config.kernel for step in plan.steps[len(zeros.steps) :]]
            assert more == ([] if family.maps_edges else ["conv1d_edges"])


def test_without_windows_at_an_edge_nothing_is_added() -> None:
    p = ConvProblem("conv1d", 2, 4, 4, 40, 3, dtype="float32", padding_mode="reflect")
    for problem in (p, p.adjoint(), WeightGradientProblem.of(p)):
        layout = Layout.contiguous(problem)
        for family in takers(problem):
            assert edges.plan(family, problem, layout, DEVICE) == family.plan(
                replace(problem, padding_mode="zeros"), layout, DEVICE
            )


@pytest.mark.skipif(find_spec("cupy_backends") is None, reason="compiling needs CuPy")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_local_memory(arch: str) -> None:
    """On one architecture, compile each specialisation of both kernels, and each mode of families that map edges."""
    place = list(ARCHITECTURES).index(arch)
    chosen = [config for i, config in enumerate(edges.configs()) if i % len(ARCHITECTURES) == place]
    for number, family in enumerate(f for f in FAMILIES if f.maps_edges):
        own = [
            config
            for config in family.configs(Device.from_arch(arch))
            if config.kernel == family.name
            and not any(dict(config.macros).get(name, "1") > "1" for name in ("FINE_WIDTH", "INPUT_WIDTH"))
        ]
        for i, mode in enumerate(MODES):
            if (number + 2 * i) % len(ARCHITECTURES) == place:
                chosen.append(with_padding_mode(own[7 * (number + 8 * i) % len(own)], mode))
    for config in chosen:
        assert resources(config, arch).local_bytes == 0, config


@pytest.mark.gpu
@pytest.mark.parametrize("case", MODE_CASES, **by_name)
def test_on_a_gpu(case: Case, cupy: Any) -> None:
    """The public functions, forward and gradients, within the bound; the cases take turns in the dtype."""
    p = case.at(("float32", "float16")[MODE_CASES.index(case) % 2])
    x, w, b = cases.random_data(p, 6)
    u = cases.random_grad_output(p, 7)
    settings = cases.call_settings(p)
    gpu_x, gpu_w, gpu_b, gpu_u = (None if a is None else cupy.asarray(a) for a in (x, w, b, u))
    y = cupy.asnumpy(gpuconv.conv1d(gpu_x, gpu_w, gpu_b, **settings))
    assert reference.within_bound(p, y, x, w, b).all()
    if dispatch.families("conv1d")[-1] in takers(p):
        base = cupy.asnumpy(gpuconv.conv1d(gpu_x, gpu_w, gpu_b, **settings, algorithm="base"))
        assert reference.within_bound(p, base, x, w, b).all()
    grad_x = cupy.asnumpy(grad.conv1d_input(x.shape, gpu_w, gpu_u, **settings))
    assert reference.input_gradient(p, w, u).within_bound(grad_x).all()
    q = WeightGradientProblem.of(p)
    grad_w = cupy.asnumpy(grad.conv1d_weight(gpu_x, w.shape, gpu_u, **settings))
    assert reference.weight_gradient(q, *q.sides(x, u)).within_bound(grad_w).all()


@pytest.mark.parametrize("mode", MODES)
def test_integers(mode: str) -> None:
    """Integers are exact on the CPU and in the base family, which map the edges alike."""
    rng = np.random.default_rng(15)
    x, w = rng.integers(-128, 128, (2, 4, 9), np.int8), rng.integers(-128, 128, (6, 2, 4), np.int8)
    p = ConvProblem.conv1d(x, w, None, 2, (5, 4), 2, 2, padding_mode=mode)
    word = {"replicate": "edge", "circular": "wrap"}.get(mode, mode)
    padded = np.pad(x, [(0, 0), (0, 0), (5, 4)], word)  # type: ignore[call-overload]
    expected = gpuconv.conv1d(padded, w, stride=2, dilation=2, groups=2)
    assert np.array_equal(gpuconv.conv1d(x, w, **cases.call_settings(p)), expected)
    assert np.array_equal(hostcuda.compute(p, x, w, None), expected)
