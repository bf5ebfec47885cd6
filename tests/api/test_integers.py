"""Integers: exact sums that wrap around, on the CPU and in the base families."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuconv
from gpuconv import cpu, dispatch, grad, nn, reference
from gpuconv.cpu import integers
from gpuconv.device import Device
from gpuconv.families import Layout
from gpuconv.problem import INTEGER_SUMS, INTEGERS, ArraySpec, ConvProblem, Op
from tests import hostcuda, strategies

OPS: tuple[Op, ...] = ("conv1d", "conv_transpose1d")


def draw(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Any:
    limits = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(limits.min, limits.max, shape, dtype, endpoint=True)


def by_python(problem: ConvProblem, x: Any, w: Any, b: Any) -> Any:
    """The definition with Python's integers, which never wrap, then the low bits."""
    p = problem
    x, w = x.reshape(p.N, p.C_in, p.L_in).tolist(), w.tolist()
    modulus = 2 ** (64 if p.out_dtype == "int64" else 32)
    y = np.zeros((p.N, p.C_out, p.L_out), p.out_dtype)
    for n, c, l_out in np.ndindex(y.shape):
        total = 0 if b is None else int(b[c])
        for c_in in range(p.C_in_g):
            channel = c // p.C_out_g * p.C_in_g + c_in
            for k in range(p.K):
                at = (
                    l_out + p.padding_left - k * p.dilation
                    if p.transposed
                    else l_out * p.stride - p.padding_left + k * p.dilation
                )
                if p.transposed and at % p.stride:
                    continue
                l_in = at // p.stride if p.transposed else at
                if 0 <= l_in < p.L_in:
                    total += (w[channel][c % p.C_out_g][k] if p.transposed else w[c][c_in][k]) * x[n][channel][l_in]
        total %= modulus
        y[n, c, l_out] = total - modulus if total >= modulus // 2 else total
    return y.reshape(p.output_shape)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", INTEGERS)
@settings(derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_random_calls_equal_the_definition(op: Op, dtype: str, data: Any) -> None:
    call = data.draw(strategies.calls(op, ("float32",), max_length=8))
    out_dtype = data.draw(st.sampled_from(INTEGER_SUMS))
    x, w = draw(call.input_shape, dtype, call.seed), draw(call.weight_shape, dtype, call.seed + 1)
    b = draw((call.C_out,), out_dtype) if call.has_bias else None
    settings = {name: value for name, value in call.settings.items() if name != "precision"}
    output = getattr(gpuconv, op)(x, w, b, **settings, out_dtype=out_dtype)
    p = getattr(ConvProblem, op)(x, w, b, **settings, out_dtype=out_dtype)
    assert output.dtype == out_dtype
    np.testing.assert_array_equal(output, by_python(p, x, w, b))
    np.testing.assert_array_equal(reference.compute(p, x, w, b), output)
    assert reference.within_bound(p, output, x, w, b).all()
    assert not reference.error_bound(p, x, w, b).any()
    assert not reference.within_bound(p, output + 1, x, w, b).any()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_long_sums_are_exact(dtype: str) -> None:
    """Sums of many extreme products: neither float64 nor a limb that is a bit too wide would hold them."""
    for value in (np.iinfo(dtype).min, np.iinfo(dtype).max):
        x, w = np.full((1, 64, 600), value, dtype), np.full((1, 64, 513), value, dtype)
        total = 64 * 513 * int(value) ** 2 % 2**64
        expected = total - 2**64 if total >= 2**63 else total
        np.testing.assert_array_equal(gpuconv.conv1d(x, w), np.full((1, 1, 88), expected))


def test_small_values_of_wide_dtypes_need_no_limbs(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []

    def count(problem: Any, *arrays: Any) -> None:
        products.append(problem)
        cpu.convolve(problem, *arrays)

    p = ConvProblem("conv1d", 3, 4, 5, 40, 3, dtype="int64", out_dtype="int64")
    x, w, y = (
        draw(p.input_shape, "int8").astype("int64"),
        draw(p.weight_shape, "int8").astype("int64"),
        np.empty(p.output_shape, "int64"),
    )
    integers.run(count, p, x, w, None, y)
    assert len(products) == 1
    x[0, 0, 0] = 2**62
    integers.run(count, p, x, w, None, y)
    assert len(products) > 5
    monkeypatch.setattr(integers, "_BLOCK", 300)  # a sample at a time
    blocked = np.empty_like(y)
    integers.run(cpu.convolve, p, x, w, None, blocked)
    np.testing.assert_array_equal(blocked, y)
    np.testing.assert_array_equal(reference.compute(p, x, w), y)


def test_arrays_of_any_layout_and_byte_order() -> None:
    x, w, b = draw((2, 6, 30), "int16"), draw((4, 3, 5), "int16"), draw((4,), "int64")
    expected = gpuconv.conv1d(x, w, b, groups=2)
    assert expected.dtype == np.int64
    np.testing.assert_array_equal(gpuconv.conv1d(x[..., ::-1].copy()[..., ::-1], w, b, groups=2), expected)
    np.testing.assert_array_equal(gpuconv.conv1d(x.astype(">i2"), w.astype(">i2"), b.astype(">i8"), groups=2), expected)
    for out in (np.empty((26, 4, 2), "int64").T, np.empty((2, 4, 52), "int64")[..., ::-2], np.empty((2, 4, 26), ">i8")):
        assert gpuconv.conv1d(x, w, b, groups=2, out=out) is out
        np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(gpuconv.conv1d(x[0], gpuconv.prepare(w), b, groups=2), expected[0])
    narrow = gpuconv.conv1d(x, w, groups=2, out_dtype=np.int32)
    np.testing.assert_array_equal(narrow, gpuconv.conv1d(x, w, groups=2).astype(np.int32))
    assert gpuconv.conv1d(np.empty((0, 6, 30), "int8"), np.empty((4, 6, 5), "int8")).dtype == np.int64


def test_what_makes_no_sense_for_integers_is_refused() -> None:
    x, w = draw((2, 6, 30), "int8"), draw((4, 3, 5), "int8")
    y = gpuconv.conv1d(x, w, groups=2)
    calls: tuple[tuple[type[Exception], str, Any], ...] = (
        (TypeError, "conv1d: input and weight must share one dtype, got input int8, weight int16; pass "
         "input.astype(weight.dtype)",
         lambda: gpuconv.conv1d(x, w.astype("i2"))),
        (TypeError, "conv1d: bias must have the dtype of the output, int64, got int8",
         lambda: gpuconv.conv1d(x, w, w[:, 0, 0], groups=2)),
        (ValueError, 'conv1d: out_dtype must be one of "int64" and "int32" for int8, got \'int16\'',
         lambda: gpuconv.conv1d(x, w, groups=2, out_dtype="int16")),
        (ValueError, "conv1d: out_dtype is for integers; expected None for float32, got 'int64'",
         lambda: gpuconv.conv1d(x.astype("f4"), w.astype("f4"), groups=2, out_dtype="int64")),
        (TypeError, "conv1d: out must have the dtype int64, got int32",
         lambda: gpuconv.conv1d(x, w, groups=2, out=y.astype("i4"))),
        (ValueError, 'conv1d: precision "tf32" rounds float32 data; expected "float32" for int8, got "tf32"',
         lambda: gpuconv.conv1d(x, w, groups=2, precision="tf32")),
        (TypeError, "explain: int8 data have no gradients, expected direction \"forward\"",
         lambda: gpuconv.explain("conv1d", x, w, groups=2, direction="grad_weight", device="sm_90")),
    )  # fmt: skip
    for kind, says, call in calls:
        with pytest.raises(kind, match=f"^{re.escape(says)}$"):
            call()
    for function, arguments in (
        (grad.conv1d_input, (x.shape, w, y)), (grad.conv1d_weight, (x, w.shape, y)), (grad.conv1d_bias, (y,)),
        (gpuconv.conv1d, (x.astype("u8"), w.astype("u8"))),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="must have one of the dtypes"):
            function(*arguments)
    with pytest.raises(TypeError, match="dtype must be one of"):
        nn.Conv1d(2, 2, 2, dtype="int8")


@pytest.mark.parametrize("op", OPS)
def test_only_the_base_family_takes_integers(op: Op) -> None:
    p = ConvProblem(op, 4, 64, 64, 500, 3, dtype="int8", out_dtype="int32")
    choice = dispatch.choose(p, Layout.contiguous(p), Device.from_arch("sm_90"))
    assert choice is not None
    *others, base = (family.name for family in dispatch.families(op))
    assert choice.family == base
    assert choice.refusals == tuple((name, "takes no int8") for name in others)
    with pytest.raises(ValueError, match="takes no int8"):
        dispatch.choose(p, Layout.contiguous(p), Device.from_arch("sm_90"), others[0])


def test_explain_shows_the_dtype_of_the_output() -> None:
    x, w = ArraySpec((8, 64, 300), "int8"), ArraySpec((64, 64, 5), "int8")
    for device in ("sm_90", "cpu"):
        found = gpuconv.explain("conv1d", x, w, device=device, out_dtype="int32")
        assert "output    (8, 64, 296) int32" in str(found).replace("output     ", "output    ")
        assert found.bytes == 8 * 64 * 300 + 64 * 64 * 5 + 4 * 8 * 64 * 296


@pytest.mark.parametrize("sums", INTEGER_SUMS)
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("op", OPS)
def test_the_kernels_are_exact(op: Op, dtype: str, sums: str) -> None:
    p = ConvProblem(op, 2, 6, 4, 20, 5, 3, 2, 4, 2, 2, dtype=dtype, out_dtype=sums, has_bias=True)
    x, w, b = draw(p.input_shape, dtype), draw(p.weight_shape, dtype), draw((4,), sums)
    np.testing.assert_array_equal(hostcuda.compute(p, x, w, b, family="base"), by_python(p, x, w, b))


@pytest.mark.gpu
@pytest.mark.parametrize("sums", INTEGER_SUMS)
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("op", OPS)
def test_a_gpu_is_exact(cupy: Any, op: Op, dtype: str, sums: str) -> None:
    p = ConvProblem(op, 2, 6, 4, 20, 5, 3, 2, 4, 2, 2, dtype=dtype, out_dtype=sums, has_bias=True)
    x, w, b = draw(p.input_shape, dtype), draw(p.weight_shape, dtype), draw((4,), sums)
    settings: dict[str, Any] = {"stride": 3, "padding": (2, 4), "dilation": 2, "groups": 2, "out_dtype": sums}
    expected = by_python(p, x, w, b)
    out = cupy.zeros((*p.output_shape[:-1], 2 * p.L_out), sums)[..., ::-2]
    for into in ({}, {"out": out}):
        found = getattr(gpuconv, op)(
            cupy.asarray(x)[..., ::-1][..., ::-1], *map(cupy.asarray, (w, b)), **settings, **into
        )
        assert found.dtype == sums
        np.testing.assert_array_equal(found.get(), expected)
    for _ in range(2):  # the second call finds the first one's plan
        np.testing.assert_array_equal(getattr(gpuconv, op)(*map(cupy.asarray, (x, w, b)), **settings).get(), expected)
