"""The case table itself: its coverage, the exactness of its data, the problems derived from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from gpuconv import cases, reference
from gpuconv.cases import CASES, WIDE_CASES, Case
from gpuconv.fusion import ACTIVATIONS, Fusion
from gpuconv.problem import DTYPES, ArraySpec, ConvProblem, WeightGradientProblem

SIGNIFICAND_BITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53, "complex64": 24, "complex128": 53}

EDGES: dict[str, Callable[[ConvProblem], bool]] = {
    "K = 1": lambda p: p.K == 1,
    "even K": lambda p: p.K > 1 and p.K % 2 == 0,
    "long K": lambda p: p.K >= 64,
    "K longer than the input": lambda p: p.K > p.L_in > 0,
    "stride 1": lambda p: p.stride == 1,
    "1 < stride < K": lambda p: 1 < p.stride < p.K,
    "stride = K": lambda p: p.stride == p.K > 1,
    "stride > K": lambda p: p.stride > p.K,
    "dilation with stride": lambda p: p.dilation > 1 and p.stride > 1 and math.gcd(p.dilation, p.stride) == 1,
    "dilation and stride with a common factor": lambda p: math.gcd(p.dilation, p.stride) > 1,
    "no padding": lambda p: p.padding == (0, 0),
    "unequal padding": lambda p: p.padding_left != p.padding_right,
    "padding longer than the kernel": lambda p: min(p.padding) > p.dilation * (p.K - 1) + 1,
    "no bias": lambda p: not p.has_bias,
    "groups": lambda p: 1 < p.groups < p.C_in,
    "depthwise": lambda p: 1 < p.groups == p.C_in == p.C_out,
    "depthwise with a multiplier": lambda p: 1 < p.groups == p.C_in < p.C_out,
    "one input channel": lambda p: p.C_in == 1 < p.C_out,
    "one output channel": lambda p: p.C_in > 1 == p.C_out,
    "17 channels": lambda p: 17 in (p.C_in, p.C_out),
    "33 channels": lambda p: 33 in (p.C_in, p.C_out),
    "66 channels": lambda p: 66 in (p.C_in, p.C_out),
    "L_in = 1": lambda p: p.L_in == 1,
    "odd L_out": lambda p: p.L_out > 1 and p.L_out % 2 == 1,
    "L_out = 127": lambda p: p.L_out == 127,
    "L_out = 128": lambda p: p.L_out == 128,
    "L_out = 129": lambda p: p.L_out == 129,
    "N = 0": lambda p: p.N == 0,
    "N > 1": lambda p: p.N > 1,
    "C_in = 0": lambda p: p.C_in == 0 and p.has_bias,
    "C_out = 0": lambda p: p.C_out == 0,
    "L_in = 0": lambda p: p.L_in == 0,
    "unbatched": lambda p: not p.batched,
}
ONLY_CONV1D: dict[str, Callable[[ConvProblem], bool]] = {
    "one output position": lambda p: p.L_out == 1 < p.L_in,
    "input left over at the end": lambda p: (p.L_in + sum(p.padding) - p.dilation * (p.K - 1) - 1) % p.stride > 0,
    "windows without any input": lambda p: p.padding_left > p.dilation * (p.K - 1) and p.L_in > 0,
    "48 channels": lambda p: 48 in (p.C_in, p.C_out),
    "C_in = 0 without bias": lambda p: p.C_in == 0 and not p.has_bias,
}
ONLY_TRANSPOSED: dict[str, Callable[[ConvProblem], bool]] = {
    "output padding": lambda p: p.output_padding > 0,
    "output padding of a stride or more": lambda p: p.output_padding >= p.stride,
    "a common factor below both": lambda p: 1 < math.gcd(p.dilation, p.stride) < min(p.dilation, p.stride),
    "dilation = stride": lambda p: p.dilation == p.stride > 1,
}


def test_names_and_size() -> None:
    assert len({case.name for case in cases.select()}) == len(CASES) + len(WIDE_CASES)
    assert 100 <= len(CASES) <= 180
    assert all(case.tags for case in CASES)


def test_a_pass_over_the_table_is_cheap() -> None:
    flops = {case.name: case.problem.flops() for case in CASES}
    assert {name: count for name, count in flops.items() if count > 5e6} == {}
    assert sum(count > 2e6 for count in flops.values()) <= 5
    assert sum(flops.values()) < 22e6


@pytest.mark.parametrize("op", ["conv1d", "conv_transpose1d"])
def test_every_edge_is_covered(op: str) -> None:
    problems = [case.problem for case in CASES if case.problem.op == op]
    edges = {**EDGES, **(ONLY_CONV1D if op == "conv1d" else ONLY_TRANSPOSED)}
    assert [name for name, holds in edges.items() if not any(map(holds, problems))] == []


@pytest.mark.parametrize(
    ("op", "forms"),
    [
        ("conv1d", {"absent", "int", "sequence", "pair", "valid", "same", "causal"}),
        ("conv_transpose1d", {"absent", "int", "pair", "valid", "same"}),
    ],
)
def test_every_form_of_padding_is_covered(op: str, forms: set[str]) -> None:
    found = set()
    for case in CASES:
        padding = dict(case.settings).get("padding", "absent")
        if case.problem.op == op:
            is_sequence = isinstance(padding, list | tuple)
            kind = {1: "sequence", 2: "pair"}[len(padding)] if is_sequence else "int"
            found.add(padding if isinstance(padding, str) else kind)
    assert found == forms


@pytest.mark.parametrize("op", ["conv1d", "conv_transpose1d"])
def test_same_padding_is_covered_for_every_parity(op: str) -> None:
    same = [case.problem for case in CASES if case.problem.op == op and dict(case.settings).get("padding") == "same"]
    assert {(p.K % 2, p.stride > 1) for p in same} == {(0, False), (0, True), (1, False), (1, True)} - (
        {(0, False)} if op == "conv_transpose1d" else set()
    )
    assert any(p.padding_right > p.padding_left for p in same)
    assert any(p.stride > p.K for p in same)


def test_output_size_is_covered() -> None:
    assert any("output_size" in dict(case.settings) for case in CASES)


@pytest.mark.parametrize("case", cases.select(), ids=lambda case: case.name)
def test_settings_mean_the_problem(case: Case) -> None:
    """The settings as written and those that `call_settings` derives both lead to the case's problem."""
    p = case.problem
    arrays = [ArraySpec(p.input_shape, p.dtype), ArraySpec(p.weight_shape, p.dtype)]
    if p.bias_shape is not None:
        arrays.append(ArraySpec(p.bias_shape, p.dtype))
    assert ConvProblem.of(p.op, *arrays, **dict(case.settings)) == p
    assert ConvProblem.of(p.op, *arrays, **cases.call_settings(p)) == p


def test_select() -> None:
    assert cases.select() == (*CASES, *WIDE_CASES)
    assert cases.select("wide") == WIDE_CASES
    assert [case.name for case in cases.select("wav2vec2")] == ["wav2vec2_stem", "wav2vec2_pos_conv"]
    assert {case.problem.op for case in cases.select("conv_transpose1d")} == {"conv_transpose1d"}
    assert "mamba_dw" in {case.name for case in cases.select("depthwise")}
    with pytest.raises(ValueError, match="filter 'nothing' matches no case"):
        cases.select("nothing")


@pytest.mark.parametrize("formats", [cases.NUMBER_FORMATS, DTYPES, ("float32", "complex64"), ("bfloat16",)])
def test_the_quick_selection_leaves_out_no_kind(formats: tuple[str, ...]) -> None:
    pairs = cases.quick_pairs(formats)
    names = [(number_format, case.name) for number_format, case in pairs]
    assert len(set(names)) == len(names)
    assert {case.name for _, case in pairs} == {case.name for case in cases.select()}
    kinds = {(case.problem.op, tag) for case in cases.select() for tag in case.tags[:1]}
    assert {(f, case.problem.op, case.tags[0]) for f, case in pairs} == {(f, *kind) for f in formats for kind in kinds}
    assert len(pairs) <= 1.4 * len(cases.select())
    for number_format in formats:  # so every check has something to do in it
        problems = [case.problem for f, case in pairs if f == number_format]
        assert any(p.groups > 1 for p in problems)
        assert sum(p.L_in >= 1 and p.L_out >= 3 for p in problems) > 10


def terms_of(p: ConvProblem, n: int, c_out: int, l_out: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The (weight index, input index) of every product of one output element, by the definition."""
    C_in_g, C_out_g = p.C_in // p.groups, p.C_out // p.groups
    g = c_out // C_out_g
    found = []
    if p.padding_mode != "zeros":
        word = {"replicate": "edge", "circular": "wrap"}.get(p.padding_mode, p.padding_mode)
        samples = np.pad(np.arange(p.L_in), p.padding, word)  # type: ignore[call-overload]
        return [
            ((c_out, c, k), (n, g * C_in_g + c, int(samples[l_out * p.stride + k * p.dilation])))
            for c in range(C_in_g)
            for k in range(p.K)
        ]
    for c in range(g * C_in_g, (g + 1) * C_in_g):
        for k in range(p.K):
            for l_in in range(p.L_in):
                if p.op == "conv1d" and l_in == l_out * p.stride - p.padding_left + k * p.dilation:
                    found.append(((c_out, c - g * C_in_g, k), (n, c, l_in)))
                if p.op == "conv_transpose1d" and l_out == l_in * p.stride - p.padding_left + k * p.dilation:
                    found.append(((c, c_out - g * C_out_g, k), (n, c, l_in)))
    return found


def parts(value: complex) -> tuple[int, int]:
    """An integer-valued number as two Python integers."""
    number = complex(value)
    assert number.real.is_integer()
    assert number.imag.is_integer()
    return int(number.real), int(number.imag)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_data_is_exact(dtype: str) -> None:
    """Python integers give the reference for elements of every case; no sum of absolute values leaves the dtype."""
    rng = np.random.default_rng(20)
    limit = 2 ** SIGNIFICAND_BITS[dtype]
    checked = 0
    for case in cases.select():
        p = case.at(dtype)
        data = cases.exact_data(p, seed=1)
        y = reference.compute(p, *data).reshape(p.N, p.C_out, p.L_out)
        assert (y == y.astype(data.input.dtype).astype(y.dtype)).all(), case.name
        if y.size == 0 or p.C_in_g * p.K * p.L_in > 20_000:
            continue
        x = data.input.reshape(p.N, p.C_in, p.L_in)
        for i in {0, y.size - 1, int(rng.integers(y.size))}:
            n, c_out, l_out = (int(j) for j in np.unravel_index(i, y.shape))
            real, imag = parts(data.bias[c_out]) if data.bias is not None else (0, 0)
            most = max(abs(real), abs(imag))
            for at_weight, at_input in terms_of(p, n, c_out, l_out):
                (a, b), (c, d) = parts(data.weight[at_weight]), parts(x[at_input])
                real, imag = real + a * c - b * d, imag + a * d + b * c
                most += abs(a * c) + abs(b * d) + abs(a * d) + abs(b * c) if p.is_complex else abs(a * c)
            assert (real, imag) == parts(y[n, c_out, l_out]), (case.name, n, c_out, l_out)
            assert most <= limit, (case.name, n, c_out, l_out)
            checked += 1
    assert checked > 200


@pytest.mark.parametrize("adjoint_too", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_data_stays_below_the_limit_everywhere(dtype: str, adjoint_too: bool) -> None:
    """The sum of the absolute values of the terms, for every element (float64 holds these integers exactly)."""
    limit = 2 ** SIGNIFICAND_BITS[dtype]
    for case in cases.select():
        p = case.at(dtype)
        if adjoint_too and p.L_in == 0:
            continue
        data = cases.exact_data(p, seed=2, adjoint_too=adjoint_too)
        real = replace(p, dtype="float64")
        magnitudes = [None if a is None else parts_sum(a) for a in data]
        assert reference.compute(real, *magnitudes).max(initial=0) <= limit, case.name
        assert data.input.size == 0 or np.abs(parts_sum(data.input)).min() > 0
        if adjoint_too:
            q = real.adjoint()
            u = parts_sum(cases.exact_data(p.adjoint(), seed=2, adjoint_too=True).input)
            assert reference.compute(q, u, magnitudes[1]).max(initial=0) <= limit, case.name


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_gradients_stay_below_the_limit_everywhere(dtype: str) -> None:
    """The sum of the absolute values of the terms of weight and bias gradients; both depend on all of the output."""
    limit = 2 ** SIGNIFICAND_BITS[dtype]
    for case in cases.select():
        p = case.at(dtype)
        x = cases.exact_data(p, seed=2).input
        u = cases.exact_grad_output(p, 2, x)
        assert u.shape == p.output_shape
        assert u.dtype == x.dtype
        real = WeightGradientProblem.of(replace(p, dtype="float64"))
        assert reference.weight_gradient(real, *real.sides(parts_sum(x), parts_sum(u))).exact().max(initial=0) <= limit
        assert parts_sum(u).reshape(p.N, p.C_out, p.L_out).sum(axis=(0, 2)).max(initial=0) <= limit
        assert (u != 0).any(axis=-1).sum() > 0 or u.size == 0


def parts_sum(array: np.ndarray) -> np.ndarray:
    wide = array.astype(np.complex128)
    return np.abs(wide.real) + np.abs(wide.imag)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_data_reaches_every_output_channel_and_most_taps(dtype: str) -> None:
    """Sparse weights must not leave a kernel untested: over a few seeds every tap is used somewhere."""
    for case in cases.select():
        p = case.at(dtype)
        if 0 in p.weight_shape:
            continue
        used = sum((np.abs(cases.exact_data(p, seed).weight.astype(np.complex128)) > 0) for seed in range(3))
        assert used.any(axis=(1, 2)).all(), case.name
        assert used.any(axis=(0, 1)).mean() > 0.5, case.name


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_data_keeps_the_reference_finite(dtype: str) -> None:
    """Ill-scaled data spans many magnitudes, and still no sum of absolute values overflows."""
    largest = {"float16": 65504.0, "float64": np.finfo(np.float64).max, "complex128": np.finfo(np.float64).max}
    for case in cases.select():
        p = case.at(dtype)
        for kind in ("normal", "ill_scaled", "cancelling"):
            data = cases.random_data(p, 3, kind)
            magnitudes = [None if a is None else parts_sum(a) for a in data]
            total = reference.compute(replace(p, dtype="float64"), *magnitudes)
            assert total.max(initial=0) < largest.get(dtype, float(np.finfo(np.float32).max)), (case.name, kind)
            if kind == "ill_scaled" and data.input.size > 100:
                assert magnitudes[0].max() / magnitudes[0].min() > (2.0**6 if dtype == "float16" else 2.0**80)


def test_cancelling_data_cancels() -> None:
    """Sums are far below the sum of the magnitudes, except where the padding hides a tap."""
    for name in ("k5", "groups3_odd_channels", "up_stride2_k4", "resample"):
        (case,) = (case for case in CASES if case.name == name)
        data = cases.random_data(case.at("float64"), 0, "cancelling")._replace(bias=None)
        p = replace(case.at("float64"), has_bias=False)
        y, magnitude = reference.compute(p, *data), reference.compute(p, *(np.abs(a) for a in data[:2]))
        middle = slice(p.L_out // 4, p.L_out // 2)
        assert np.median(np.abs(y) / magnitude, axis=None) < 0.2, name
        assert (np.abs(y) / magnitude)[..., middle].max() < 0.2, name


@pytest.mark.parametrize("dtype", ["float16", "complex64"])
def test_nonfinite_data_has_infinities_at_the_ends(dtype: str) -> None:
    for case in CASES:
        p = case.at(dtype)
        if 0 < p.L_in < 3:
            continue
        data = cases.random_data(p, 0, "nonfinite")
        u = cases.random_grad_output(p, 0, "nonfinite")
        assert np.isnan(data.input).sum() == (data.input.size > 0)
        for array in (data.input, data.weight, u):
            if array.size:
                infinite = np.isinf(array)
                expected = 1 if array.shape[-1] > 1 else min(2, array[..., 0].size)
                assert infinite[..., 0].sum() == infinite[..., -1].sum() == expected, case.name
                assert not infinite[..., 1:-1].any()


def test_impulse_data_gives_weights() -> None:
    p = CASES[0].at("float32")
    data = cases.impulse_data(p, 0)
    y = reference.compute(p, *data)
    assert data.input.sum() == p.N
    assert np.isin(y[y != 0], data.weight).all()
    assert (y != 0).any()


@pytest.mark.parametrize(("precision", "bits"), [("float32", 22), ("tf32", 11)])
def test_impulses_give_what_tensor_cores_keep_of_weights(precision: str, bits: int) -> None:
    weight = cases.impulse_data(replace(CASES[0].at("float32"), precision=precision), 0).weight
    significand, _ = np.frexp(weight)
    scaled = np.ldexp(significand, bits)
    assert (scaled == np.round(scaled)).all()
    assert (np.ldexp(significand, bits - 1) % 1 != 0).any()


def test_data_is_a_function_of_problem_and_seed() -> None:
    (p,) = (case.problem for case in CASES if case.name == "up_groups2")
    for make in (cases.exact_data, cases.random_data, cases.impulse_data):
        first, again, other = make(p, 5), make(p, 5), make(p, 6)
        assert (first.input == again.input).all()
        assert (first.weight == again.weight).all()
        assert (first.weight != other.weight).any()
        assert first.input.flags.c_contiguous
        assert first.weight.flags.c_contiguous
        assert first.input.shape == p.input_shape
        assert first.weight.shape == p.weight_shape
        assert (first.bias is None) == (p.bias_shape is None)


@pytest.mark.parametrize("case", [case for case in cases.select() if case.problem.L_in], ids=lambda case: case.name)
def test_chunk(case: Case) -> None:
    p = case.at("float64")
    data = cases.exact_data(p, 0)
    whole = reference.compute(p, *data)
    inner = cases.inner_outputs(p)
    bounds = {(0, p.L_out), (0, 1), (p.L_out - 1, p.L_out), (p.L_out // 3, p.L_out // 2 + 1)}
    bounds |= {(start, start + 1) for start in range(0, p.L_out, 7)}
    for start, stop in bounds:
        if start not in inner or stop - 1 not in inner:
            continue
        piece, positions = cases.chunk(p, start, stop)
        part = data.input[..., positions]
        assert part.shape[-1] == piece.L_in
        assert (reference.compute(piece, part, *data[1:]) == whole[..., start:stop]).all(), (start, stop)


@pytest.mark.parametrize("case", [case for case in cases.select() if case.problem.L_in], ids=lambda case: case.name)
def test_adjoint(case: Case) -> None:
    p = replace(case.at("float64"), has_bias=False)
    q = p.adjoint()
    assert q.weight_shape == p.weight_shape
    assert q.input_shape == p.output_shape
    assert q.output_shape == p.input_shape
    x, w, _ = cases.exact_data(p, 0)
    u = cases.exact_data(q, 0).input
    assert np.sum(reference.compute(p, x, w) * u) == np.sum(x * reference.compute(q, u, w))


@pytest.mark.parametrize(
    "case", [case for case in cases.select() if case.problem.groups > 1], ids=lambda case: case.name
)
def test_one_group(case: Case) -> None:
    p = case.at("float64")
    data = cases.exact_data(p, 0)
    whole = reference.compute(p, *data)
    for g in range(p.groups):
        alone, channels_in, channels_out = cases.one_group(p, g)
        weight = data.weight[channels_in if p.transposed else channels_out]
        bias = None if data.bias is None else data.bias[channels_out]
        part = reference.compute(alone, data.input[..., channels_in, :], weight, bias)
        assert (part == whole[..., channels_out, :]).all()


def test_every_activation_is_fused_with_some_case() -> None:
    """Every form of activation is fused with a case of the table, in one dtype or another."""
    problems = [case.at(number_format) for case in cases.select() for number_format in ("float16", "float32")]
    fused = [cases.with_fusion(p, 0)[0].fuses for p in problems]
    for side in ("activation", "input_activation"):
        found = [getattr(fusion, side) for fusion in fused]
        assert {(a.name, a.arrays) for a in found} == {
            *((name, 0) for name in ("gelu_tanh", *ACTIVATIONS) if name != "snake"), ("snake", 1), ("snake", 2),
        }  # fmt: skip
    assert all(fusion.has_residual for fusion in fused)


def test_complex_problems_fuse_a_residual_alone() -> None:
    p, arrays = cases.with_fusion(CASES[0].at("complex64"), 0)
    assert list(arrays) == ["residual"]
    assert p.fusion == Fusion(has_residual=True)
