"""Every kernel family over the case table, executed on the CPU (tests/hostcuda) and, where there is one, on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from ctypes.util import find_library
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest

from bench.layers import load
from gpuconv import calls, cases, dispatch, reference, source
from gpuconv.cases import CASES, NUMBER_FORMATS, Case, Data, RandomKind
from gpuconv.checks import chunk_bounds
from gpuconv.families import Config, Family, Launch, Layout, Refusal, edges
from gpuconv.problem import DTYPES, ConvProblem
from tests import hostcuda
from tests.conftest import BACKENDS
from tests.kernels.arrays import assert_same_bits
from tests.kernels.cuda_cores import check_layouts, check_offsets_beyond_32_bits
from tests.plans import BASE, FORWARD_FAMILIES, H200, kernel_of

Array = npt.NDArray[Any]
T = TypeVar("T")

BASE_FAMILIES = tuple(family for family in FORWARD_FAMILIES if family.name in BASE.values())
FAST_FAMILIES = tuple(family for family in FORWARD_FAMILIES if family not in BASE_FAMILIES)
TAGS = tuple(dict.fromkeys(case.tags[0] for case in CASES))
TENSOR_MODES = ("float16", "bfloat16", "float32", "tf32")

by_name = {"ids": lambda value: getattr(value, "name", value)}


@cache  # planning what the table needs takes seconds
def config_of(family: Family[Any], problem: ConvProblem) -> Config | None:
    """The kernel with which a family runs a problem; None where it refuses, or where the output is empty."""
    if family.kind != problem.op or problem.is_empty:
        return None
    plan = edges.plan(family, problem, Layout.contiguous(problem), H200)
    return None if isinstance(plan, Refusal) else dispatch.Choice(family.name, plan).config


def takes(family: Family[Any], problem: ConvProblem) -> bool:
    return config_of(family, problem) is not None


def modes(family: Family[Any]) -> tuple[str, ...]:
    """The modes in which a family's kernels differ: CUDA cores have no TF32 and compute as in float32."""
    return DTYPES if family.canonical_order else NUMBER_FORMATS


@cache
def taken_cases(family: Family[Any], mode: str, tag: str | None = None) -> list[Case]:
    """The cases that a family takes; those alone of which the first tag is `tag`, where it is given."""
    if tag is not None:
        return [case for case in taken_cases(family, mode) if case.tags[0] == tag]
    return [case for case in CASES if takes(family, case.at(mode))]


def items(families: tuple[Family, ...]) -> list[tuple[Family, str]]:
    """The (family, mode) of which the family takes at least one case."""
    return [
        (family, mode)
        for family in families
        for mode in modes(family)
        if any(takes(family, case.at(mode)) for case in CASES)
    ]


def run(family: Family[Any], problem: ConvProblem, data: Data, schedule: hostcuda.Schedule = "forward") -> Array:
    """The family's result; the base family's where it refuses, as some chunks of a problem may be refused."""
    name = family.name if takes(family, problem) else BASE[problem.op]
    return hostcuda.compute(problem, *data, family=name, device=H200, schedule=schedule)


def exact_result(problem: ConvProblem, data: Data) -> Array:
    return reference.compute(problem, *data).astype(data.input.dtype)


def assert_within_bound(problem: ConvProblem, output: Array, data: Data) -> None:
    good = reference.within_bound(problem, output, *data)
    if not good.all():
        index = tuple(int(i) for i in np.argwhere(~good)[0])
        exact = reference.compute(problem, *data)[index]
        pytest.fail(f"{problem}: {(~good).sum()} elements wrong, first {index}: {output[index]}, exact {exact}")


def variants(problem: ConvProblem) -> Iterator[ConvProblem]:
    """The problem, and what the tests of promise 3 make of it."""
    yield problem
    yield from (cases.with_batch(problem, N) for N in (1, 5))
    inner = cases.inner_outputs(problem)
    if problem.L_in > 0 and len(inner) >= 3:
        bounds = chunk_bounds(len(inner))
        yield from (cases.chunk(problem, inner[start], inner[stop - 1] + 1)[0] for start, stop in bounds)


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    """What the table needs, compiled together, which takes less than one by one."""
    chosen = {
        config
        for family in FORWARD_FAMILIES
        for mode in modes(family)
        for case in taken_cases(family, mode)
        for problem in variants(case.at(mode))
        if (config := config_of(family, problem)) is not None
    }
    hostcuda.prebuild([*chosen, *(with_64_bits(config) for config in chosen if config.kernel in BASE.values())])


@pytest.mark.parametrize("family", FORWARD_FAMILIES, **by_name)
def test_the_table_reaches_the_family(family: Family[Any]) -> None:
    assert len({case.name for mode in modes(family) for case in taken_cases(family, mode)}) >= 5


@pytest.mark.parametrize(("family", "mode"), items(FORWARD_FAMILIES), **by_name)
def test_exact(family: Family[Any], mode: str) -> None:
    """Small integers: the reference bit for bit."""
    for case in taken_cases(family, mode):
        p = case.at(mode)
        data = cases.exact_data(p, seed=11)
        assert_same_bits(run(family, p, data), exact_result(p, data), case.name)


@cache
def base_result(problem: ConvProblem, seed: int, kind: RandomKind = "normal") -> Array:
    """What the base family makes of random data, for all the families that must give the same bits."""
    data = cases.random_data(problem, seed, kind)
    return hostcuda.compute(problem, *data, family=BASE[problem.op], device=H200)


@pytest.mark.parametrize(("family", "mode"), items(FORWARD_FAMILIES), **by_name)
def test_rounding(family: Family[Any], mode: str) -> None:
    """The same bits whatever the order of the threads, those of the base family or within the error bound.

    What has the bits of the base family on one kind of data sums in its order, so that its errors are those of the base
    family on every kind.
    """
    has_bits_of_base = family in FAST_FAMILIES and family.canonical_order
    for case in taken_cases(family, mode):
        p = case.at(mode)
        for kind in ("normal", "nonfinite") if has_bits_of_base else cases.RANDOM_KINDS:
            data = cases.random_data(p, 12, kind)
            output = run(family, p, data, "every" if kind == "normal" else "forward")
            if has_bits_of_base and kind != "nonfinite":  # NaNs have more than one encoding
                assert_same_bits(output, base_result(p, 12, kind), (case.name, kind))
            else:
                assert_within_bound(p, output, data)


@pytest.mark.parametrize(("family", "mode"), items(FORWARD_FAMILIES), **by_name)
def test_bits_do_not_depend_on_the_batch(family: Family[Any], mode: str) -> None:
    for case in taken_cases(family, mode):
        p = cases.with_batch(case.at(mode), 5)
        one = cases.with_batch(p, 1)
        data = cases.random_data(p, 13)
        whole = run(family, p, data)
        for n in (0, 4):
            alone = run(family, one, data._replace(input=data.input[n : n + 1]))
            assert_same_bits(alone, whole[n : n + 1], (case.name, n))


@pytest.mark.parametrize(("family", "mode"), items(FORWARD_FAMILIES), **by_name)
def test_bits_do_not_depend_on_the_chunk(family: Family[Any], mode: str) -> None:
    for case in taken_cases(family, mode):
        p = case.at(mode)
        inner = cases.inner_outputs(p)
        if p.L_in == 0 or len(inner) < 3:  # nothing to cut
            continue
        data = cases.random_data(p, 14)
        whole = run(family, p, data)
        for first, last in chunk_bounds(len(inner)):
            start, stop = inner[first], inner[last - 1] + 1
            piece, positions = cases.chunk(p, start, stop)
            output = run(family, piece, data._replace(input=data.input[..., positions]))
            assert_same_bits(output, whole[..., start:stop], (case.name, start, stop))


def with_output_length(problem: ConvProblem, L_out: int) -> ConvProblem:
    """The layer on the shortest input that gives at least L_out outputs, with padding that gives exactly L_out."""
    p = problem
    span = p.dilation * (p.K - 1) + 1
    if not p.transposed:
        return replace(p, L_in=max(0, (L_out - 1) * p.stride + span - sum(p.padding)))
    untrimmed = L_out + sum(p.padding) - p.output_padding
    L_in = max(1, -(-(untrimmed - span) // p.stride) + 1)
    surplus = (L_in - 1) * p.stride + span - untrimmed
    return replace(p, L_in=L_in, padding_right=p.padding_right + surplus)


def edge_lengths(config: Config) -> list[int]:
    """One below, at and one above the sizes of the configuration's tiles along the output, and twice them."""
    tiles = {int(value) for name, value in config.macros if name in ("BLOCK_N", "BLOCK_L", "BLOCK_SIZE")}
    return sorted({factor * tile + step for tile in tiles for factor in (1, 2) for step in (-1, 0, 1)} - {0})


def edge_templates(family: Family[Any], mode: str) -> list[ConvProblem]:
    """One sample of the first cases of some tags that the family takes, and a layer with one output channel.

    The first case of all where it takes none of these.
    """
    found = [taken_cases(family, mode, tag)[:1] for tag in ("kernel", "stride", "dilation", "groups")]
    narrow = [case for case in taken_cases(family, mode, "channels") if case.problem.C_out == 1][:1]
    dense = [] if family.canonical_order else taken_cases(family, mode, "dense")
    chosen = [case for few in (*found, narrow, dense) for case in few] or taken_cases(family, mode)[:1]
    return [cases.with_batch(case.at(mode), 1) for case in chosen]


@pytest.mark.parametrize(("family", "mode"), items(FORWARD_FAMILIES), **by_name)
def test_edge_lengths(family: Family[Any], mode: str) -> None:
    """Lengths around every tile size: each position written once, none beyond the end."""
    checked = 0
    for template in edge_templates(family, mode):
        config = config_of(family, template)
        assert config is not None
        for length in edge_lengths(config):
            p = with_output_length(template, length)
            assert p.L_out == length
            if takes(family, p):
                data = cases.exact_data(p, seed=15)
                output = hostcuda.compute(p, *data, family=family.name, device=H200, schedule="every")
                assert_same_bits(output, exact_result(p, data), p)
                checked += 1
    assert checked >= 6


def in_canonical_order(problem: ConvProblem, data: Data) -> Array:
    """Every element by the C library's fma in the accumulator's precision: c_in outer, k inner, then the bias."""
    p = problem
    libm = ctypes.CDLL(find_library("m"))
    fma, real, accumulator = (
        (libm.fma, ctypes.c_double, np.float64) if p.dtype == "float64" else (libm.fmaf, ctypes.c_float, np.float32)
    )
    fma.argtypes, fma.restype = [real] * 3, real
    output = np.empty(p.output_shape, data.input.dtype)
    for n, c_out, l_out in np.ndindex(*p.output_shape):
        acc = 0.0
        for term in cases.terms_of(p, c_out, l_out):
            acc = fma(float(data.weight[term.weight_index]), float(data.input[n, term.channel, term.l_in]), acc)
        total = accumulator(acc)
        if data.bias is not None:
            total += accumulator(data.bias[c_out])
        output[n, c_out, l_out] = total
    return output


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    "name", ["k3", "dilation4_stride6", "groups4_strided", "up_stride2_k4", "up_dilation6_stride4", "up_groups2"]
)
def test_base_families_sum_in_the_canonical_order(name: str, dtype: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    p = case.at(dtype)
    data = cases.random_data(p, 21)
    output = hostcuda.compute(p, *data, family=BASE[p.op], device=H200)
    assert_same_bits(output, in_canonical_order(p, data), case.name)


@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("family", BASE_FAMILIES, **by_name)
def test_layouts(family: Family[Any], mode: str) -> None:
    for tag in TAGS:
        for case in taken_cases(family, mode, tag)[:2]:
            if case.problem.batched:
                check_layouts(family, case.at(mode))


def with_64_bits(config: Config) -> Config:
    """The same specialisation with 64-bit indices."""
    macros = dict(config.macros)
    fields = len(source.params_fields(config.kernel))
    return Config.of(config.kernel, {**macros, "INDEX_BITS": 64, "PARAMS_BYTES": 8 * fields})


@pytest.mark.parametrize(("family", "mode"), items(BASE_FAMILIES), **by_name)
def test_64_bit_indices(family: Family[Any], mode: str) -> None:
    """The 64-bit specialisation, which only huge arrays get, gives the bits of the 32-bit one."""
    for case in taken_cases(family, mode):
        p = case.at(mode)
        data = cases.random_data(p, 17)
        config, launch = kernel_of(family, p, Layout.contiguous(p), H200)
        assert launch.index_bits == 32
        wide = Launch(launch.grid, launch.block, launch.shared_bytes, 64, launch.params)
        output = np.empty(p.output_shape, data.input.dtype)
        arrays = {"input": data.input, "weight": data.weight, "bias": data.bias, "output": output}
        hostcuda.run(with_64_bits(config), wide, arrays, device=H200)
        assert_same_bits(output, run(family, p, data), case.name)


@pytest.mark.parametrize("family", BASE_FAMILIES, **by_name)
def test_offsets_beyond_32_bits(family: Family[Any]) -> None:
    (case,) = (case for case in CASES if case.name == {"conv1d": "k3", "conv_transpose1d": "up_k3"}[family.kind])
    check_offsets_beyond_32_bits(family, case.at("float16"))


LAYER_FLOPS = 2e6


def shrunk(layer: ConvProblem, mode: str, channels: int = 4) -> ConvProblem:
    """A benchmark layer on an input just long enough for every tap to meet data, as far as `LAYER_FLOPS` allows.

    N and L shrink first, then output channels of each group down to `channels`, then the number of groups; K, stride,
    dilation, padding and the input channels of a group stay.
    """
    span = layer.dilation * (layer.K - 1) + 1
    longest = -(-span // layer.stride) + 3 if layer.transposed else span + 3 * layer.stride

    def problem(L_in: int, C_out_g: int, groups: int) -> ConvProblem:
        channels = {"C_in": layer.C_in_g * groups, "C_out": C_out_g * groups}
        return cases.in_format(replace(layer, N=min(2, layer.N), L_in=L_in, groups=groups, **channels), mode)

    trimmed = layer.padding_left + layer.padding_right
    shortest = max(1, -(-(trimmed + 1 - span) // layer.stride) + 1 if layer.transposed else span - trimmed)
    L_in = min(layer.L_in, max(longest, shortest, 8))
    C_out_g, groups = layer.C_out_g, layer.groups
    real = 4 if mode.startswith("complex") else 1
    while problem(L_in, C_out_g, groups).flops() > LAYER_FLOPS * real:
        if C_out_g > channels:
            C_out_g //= 2
        elif groups > 2:
            groups //= 2
        elif L_in > max(shortest, 1):
            L_in = max(shortest, L_in // 2)
        else:
            break
    return problem(L_in, C_out_g, groups)


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        (family, mode)
        for family in FORWARD_FAMILIES
        for mode in (("float32", "bfloat16", "complex64") if family.canonical_order else TENSOR_MODES)
        if any(takes(family, case.at(mode)) for case in CASES)
    ],
    **by_name,
)
def test_benchmark_layers(family: Family[Any], mode: str) -> None:
    """The layers that we measure on: the bits of the base families, and within the bound what has other bits.

    Of families that no layer has, the input gradients of the layers.
    """
    assert len(load()) == 81
    channels = 4 if family.canonical_order else 31  # of these at least 16 are left
    layers = [(layer, shrunk(layer.forward, mode, channels)) for layer in load()]
    if not any(takes(family, p) for _, p in layers):
        layers = [(layer, shrunk(layer.forward.adjoint(), mode, channels)) for layer in load()]
    checked = 0
    for layer, p in layers:
        if not takes(family, p):
            continue
        data = cases.random_data(p, 19)
        output = run(family, p, data)
        if family in BASE_FAMILIES or not family.canonical_order:
            assert_within_bound(p, output, data)
        else:
            assert_same_bits(output, base_result(p, 19), layer.name)
        checked += 1
    assert checked > 0


def every_third(values: Sequence[T], first: int) -> Sequence[T]:
    """A third of the values, at least one."""
    return values[first % min(3, len(values)) :: 3]


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Family], None]]:
    """Makes dispatch know one family alone."""

    def forget() -> None:
        dispatch.choose.cache_clear()
        calls._EXECUTORS.clear()

    def restrict(family: Family[Any]) -> None:
        monkeypatch.setattr(dispatch, "FAMILIES", (family,))
        forget()

    yield restrict
    monkeypatch.undo()
    forget()


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "mode"), items(FORWARD_FAMILIES), **by_name)
def test_gpu_gives_the_bits_of_hostcuda(family: Family[Any], mode: str, only: Callable[[Family], None]) -> None:
    """The public function on CuPy arrays against the same kernel text on the CPU.

    Each mode takes every third case, others than the mode before it; `verify` runs them all. The bits of sums on tensor
    cores are those of the GPU at hand.
    """
    only(family)
    for case in every_third(taken_cases(family, mode), modes(family).index(mode)):
        p = case.at(mode)
        for kind in ("normal", "nonfinite") if family.canonical_order else cases.RANDOM_KINDS:
            data = cases.random_data(p, 20, kind)
            output = BACKENDS["gpu"].convolve(p, *data)
            assert output.dtype == data.input.dtype
            if kind == "nonfinite" or not family.canonical_order:  # NaNs have more than one encoding
                assert_within_bound(p, output, data)
            else:
                assert_same_bits(output, run(family, p, data), (case.name, kind))
