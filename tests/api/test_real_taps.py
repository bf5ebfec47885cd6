"""Real taps on complex data: real and imaginary part are computed as real problems, without a complex weight."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import gpuconv
from gpuconv import grad, nn, reference, runtime
from gpuconv.problem import ArraySpec, WeightGradientProblem
from tests import strategies
from tests.strategies import random_array

OPS = ("conv1d", "conv_transpose1d")
REAL = {"complex64": "float32", "complex128": "float64"}


@pytest.mark.parametrize("op", OPS)
@settings(derandomize=True, deadline=None, database=None)
@given(data=strategies.st.data())
def test_random_calls_are_within_the_bound_of_complex_taps(op: Any, data: Any) -> None:
    call = data.draw(strategies.calls(op, tuple(REAL)))
    x, w, b = call.arrays()
    assert x is not None
    assert w is not None
    w, p = w.real.copy(), call.problem()
    output = getattr(gpuconv, op)(x, w, b, **call.settings)
    assert output.dtype == x.dtype
    assert reference.within_bound(p, output, x, w, b).all()

    rng = np.random.default_rng(call.seed)
    grad_output = random_array(rng, p.output_shape, call.dtype)
    settings = {name: value for name, value in call.settings.items() if name != "algorithm"}
    grad_input = getattr(grad, f"{op}_input")(p.input_shape, w, grad_output, **settings)
    assert reference.input_gradient(p, w, grad_output).within_bound(grad_input).all()

    g = WeightGradientProblem.of(p)
    grad_weight = getattr(grad, f"{op}_weight")(x, w.shape, grad_output, **settings, weight_dtype=w.dtype)
    assert grad_weight.dtype == w.dtype
    compared = reference.weight_gradient(g, *g.sides(x, grad_output)).compare(grad_weight.astype(call.dtype))
    assert (np.abs(grad_weight - compared.exact.real) <= compared.bound).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", REAL)
def test_the_gradients_are_adjoints_to_the_bit_on_integers(op: str, dtype: str) -> None:
    rng = np.random.default_rng(1)

    def integers(*shape: int) -> Any:
        return (rng.integers(-4, 5, shape) + 1j * rng.integers(-4, 5, shape)).astype(dtype)

    settings: dict[str, Any] = {"stride": 3, "padding": (1, 2), "dilation": 2, "groups": 2}
    x = integers(2, 4, 20)
    w = rng.integers(-4, 5, (4, 2, 3) if op == "conv_transpose1d" else (6, 2, 3)).astype(REAL[dtype])
    y = getattr(gpuconv, op)(x, w, **settings)
    u = integers(*y.shape)
    v = getattr(grad, f"{op}_input")(x.shape, w, u, **settings)
    assert np.vdot(u, y) == np.vdot(v, x)
    grad_w = getattr(grad, f"{op}_weight")(x, w.shape, u, **settings, weight_dtype=REAL[dtype])
    assert (grad_w * w).sum() == np.vdot(u, y).real


def arrays(dtype: str = "complex64", seed: int = 0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    x, b = random_array(rng, (2, 6, 30), dtype), random_array(rng, (4,), dtype)
    return x, random_array(rng, (4, 3, 5), REAL[dtype]), b


def test_outputs_of_any_layout_are_written() -> None:
    x, w, b = arrays()
    expected = gpuconv.conv1d(x, w, b, groups=2)
    for out in (
        np.empty_like(expected),
        np.empty((2, 4, 52), "complex64")[..., ::2],
        np.empty((26, 4, 2), "complex64").T,
        np.empty(expected.shape, ">c8"),
        np.empty(expected.shape, "complex64")[..., ::-1],
    ):
        assert gpuconv.conv1d(x, w, b, groups=2, out=out) is out
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    real_out = np.empty(w.shape[::-1], "float32").T
    assert grad.conv1d_weight(x, w.shape, expected, groups=2, out=real_out, weight_dtype="float32") is real_out
    np.testing.assert_array_equal(real_out, grad.conv1d_weight(x, w.shape, expected, groups=2, weight_dtype="float32"))
    np.testing.assert_array_equal(gpuconv.conv1d(x.astype(">c8"), w.astype(">f4"), b, groups=2), expected)


def test_an_output_between_the_parts_of_an_array_or_of_itself_is_refused() -> None:
    numbers, w = np.arange(42, dtype=np.float32), np.ones((1, 1, 3), np.float32)
    x, out = (part.view(np.complex64).reshape(1, 1, 20) for part in (numbers[:40], numbers[1:41]))
    with pytest.raises(ValueError, match=r"^conv1d: out must not overlap input, but they share memory$"):
        gpuconv.conv1d(x, w, padding="same", out=out)
    interleaved = np.lib.stride_tricks.as_strided(out, strides=(4, 4, 4))
    for lengths in (None, [20]):
        with pytest.raises(ValueError, match=r"^conv1d: out must not overlap itself, got strides "):
            gpuconv.conv1d(x.copy(), w, padding="same", out=interleaved, lengths=lengths)
    np.testing.assert_array_equal(numbers, np.arange(42))


def test_infinite_parts_that_cancel_give_nan_without_a_warning() -> None:
    x, grad_output = np.array([[[complex(np.inf, -np.inf), complex(2, -np.inf)]]]), np.array([[[1 + 1j]]])
    found = grad.conv1d_weight(x, (1, 1, 2), grad_output, weight_dtype="float64")
    np.testing.assert_array_equal(found, [[[np.nan, -np.inf]]])


def test_prepared_weights_and_layers_take_complex_data() -> None:
    x, w, _ = arrays()
    expected = gpuconv.conv1d(x, w, groups=2)
    np.testing.assert_array_equal(gpuconv.conv1d(x, gpuconv.prepare(w), groups=2), expected)
    layer = nn.Conv1d(6, 4, 5, groups=2, bias=False)
    layer.load_state_dict({"weight": w})
    np.testing.assert_array_equal(layer(x), expected)


def test_empty_results_have_their_shape() -> None:
    _, w, b = arrays()
    assert gpuconv.conv1d(np.empty((0, 6, 30), "complex64"), w, b, groups=2).shape == (0, 4, 26)
    x = np.empty((2, 0, 30), "complex64")
    np.testing.assert_array_equal(
        gpuconv.conv1d(x, np.empty((4, 0, 5), "float32"), b), np.broadcast_to(b[:, None], (2, 4, 26))
    )


def test_what_does_not_fit_is_named() -> None:
    x, w, b = arrays()
    y = gpuconv.conv1d(x, w, b, groups=2)
    for call, says in (
        (lambda: gpuconv.conv1d(x, w.astype("f8"), groups=2),
         "conv1d: weight must have the dtype of input, complex64 or, for real taps, float32; got float64"),
        (lambda: gpuconv.conv1d(x, w, b.real, groups=2),
         "conv1d: bias must have the dtype of input, complex64; got float32"),
        (lambda: gpuconv.conv1d(x, w, b, groups=2, out=y.real),
         "conv1d: out must have the dtype of input, complex64; got float32"),
        (lambda: grad.conv1d_input(x.shape, w.astype("f2"), y, groups=2),
         "conv1d_input: weight must have the dtype of grad_output, complex64 or, for real taps, float32; got float16"),
        (lambda: grad.conv1d_weight(x, w.shape, y, groups=2, weight_dtype="float64"),
         "conv1d_weight: weight_dtype must be complex64 or float32 for complex64 data, got 'float64'"),
        (lambda: grad.conv1d_weight(x.real, w.shape, y.real, groups=2, weight_dtype="nonsense"),
         "conv1d_weight: weight_dtype must be float32 for float32 data, got 'nonsense'"),
        (lambda: grad.conv1d_weight(x, w.shape, y.astype("c16"), groups=2, weight_dtype="float32"),
         "conv1d_weight: input and grad_output must share one dtype, got input complex64, grad_output complex128; "
         "pass grad_output.astype(input.dtype)"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"^{re.escape(says)}$"):
            call()
    with pytest.raises(ValueError, match="out must not overlap input"):
        gpuconv.conv1d(x, np.ones((6, 1, 1), "float32"), groups=6, out=x)
    with pytest.raises(ValueError, match="out must not overlap input"):
        grad.conv1d_weight(x, w.shape, y, groups=2, weight_dtype="float32", out=x.imag[0, :4, :15].reshape(4, 3, 5))
    with pytest.raises(ValueError, match="out must have shape"):
        gpuconv.conv1d(x, w, groups=2, out=np.empty(3, "complex64"))


@pytest.mark.parametrize("direction", ["forward", "grad_input", "grad_weight"])
def test_explain_shows_both_parts(direction: Any) -> None:
    x, w = ArraySpec((8, 64, 300), "complex64"), ArraySpec((64, 64, 5), "float32")
    found = gpuconv.explain("conv1d", x, w, device="sm_90", direction=direction)
    real = gpuconv.explain("conv1d", ArraySpec(x.shape, "float32"), w, device="sm_90", direction=direction)
    assert (found.parts, found.problem, found.flops) == (2, real.problem, 2 * real.flops)
    assert "the real and the imaginary part" in str(found)
    assert found.choice is not None
    params = dict(found.choice.step.launch.params)
    steps = [
        value for name, value in params.items() if name.endswith(("stride_l", "stride_k")) and "weight" not in name
    ]
    assert 2 in steps  # every second float of complex numbers


def test_explain_refuses_what_the_call_refuses() -> None:
    x, w, b = arrays()
    for weight, bias in ((w.astype("f8"), b), (w.astype("f2"), None), (w, b.real)):
        with pytest.raises(TypeError) as of_call:
            gpuconv.conv1d(x, weight, bias, groups=2)
        with pytest.raises(TypeError, match=f"^{re.escape(str(of_call.value))}$"):
            gpuconv.explain("conv1d", x, weight, bias, groups=2)


def test_explain_leaves_a_bias_complex() -> None:
    x, w = ArraySpec((8, 64, 300), "complex64"), ArraySpec((64, 64, 5), "float32")
    found = gpuconv.explain("conv1d", x, w, device="sm_90", direction="grad_bias")
    assert (found.parts, found.problem.dtype) == (1, "complex64")


@pytest.mark.gpu
def test_the_gpu_reads_and_writes_the_parts_in_place(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = (cupy.asarray(a) for a in arrays())
    y = gpuconv.conv1d(x, w, b, groups=2)
    expected = [gpuconv.conv1d(x.real.copy(), w, b.real.copy(), groups=2),
                gpuconv.conv1d(x.imag.copy(), w, b.imag.copy(), groups=2)]  # fmt: skip
    cupy.testing.assert_array_equal(y.real, expected[0])
    cupy.testing.assert_array_equal(y.imag, expected[1])
    dw = grad.conv1d_weight(x, w.shape, y, groups=2, weight_dtype="float32")
    halves = [grad.conv1d_weight(getattr(x, part).copy(), w.shape, getattr(y, part).copy(), groups=2)
              for part in ("real", "imag")]  # fmt: skip
    cupy.testing.assert_array_equal(dw, halves[0] + halves[1])
    prepared = gpuconv.prepare(w)
    cupy.testing.assert_array_equal(gpuconv.conv1d(x, prepared, b, groups=2), y)

    def refuse(_: Any) -> Any:
        raise AssertionError("a copy of an aligned array")

    monkeypatch.setattr(runtime.executor, "_copy", refuse)
    gpuconv.conv1d(x, w, b, groups=2, out=cupy.empty((2, 4, 52), "complex64")[..., ::2])


@pytest.mark.gpu
def test_gradients_of_real_taps_are_written_to_any_address(cupy: Any) -> None:
    x, w, b = (cupy.asarray(a) for a in arrays())
    y = gpuconv.conv1d(x, w, b, groups=2)
    out = cupy.zeros(4 * w.size + 1, "uint8")[1:].view("float32").reshape(w.shape)
    assert out.data.ptr % 4 == 1
    expected = grad.conv1d_weight(x, w.shape, y, groups=2, weight_dtype="float32")
    assert grad.conv1d_weight(x, w.shape, y, groups=2, weight_dtype="float32", out=out) is out
    np.testing.assert_array_equal(runtime.aligned(out).get(), expected.get())
