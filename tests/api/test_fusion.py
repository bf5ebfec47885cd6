"""What a call may fuse: the arguments, their errors, and that NumPy and CuPy arrays get the same."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import cases, grad, nn, reference
from gpuconv.problem import ArraySpec, ConvProblem

OPS = ("conv1d", "conv_transpose1d")
X, W = np.ones((2, 4, 9), np.float32), np.ones((4, 4, 2), np.float32)


def call(op: str, x: Any = X, w: Any = W, **fused: Any) -> Any:
    return getattr(gpuconv, op)(x, w, **fused)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("argument", ["activation", "input_activation"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("mish", ValueError, "must be one of relu, leaky_relu, elu, silu, gelu, tanh, sigmoid, snake, got 'mish'"),
        (3, TypeError, "must be None, a name or a tuple that begins with one, got int 3"),
        ((), TypeError, "must be None, a name or a tuple that begins with one, got tuple ()"),
        (("relu", 1), ValueError, "relu takes no parameter, got 1 parameters"),
        (("leaky_relu", np.nan), ValueError, "leaky_relu takes a slope, a finite number, got nan"),
        (("leaky_relu", 10**400), ValueError, "leaky_relu takes a slope, a finite number, got an int of 1329 bits"),
        (("leaky_relu", "0.1"), TypeError, "leaky_relu takes a slope, a finite number, got str"),
        (("leaky_relu", True), TypeError, "leaky_relu takes a slope, a finite number, got bool"),
        (("elu", np.inf), ValueError, "elu takes an alpha, a finite number, got inf"),
        (("gelu", "erf"), ValueError, 'gelu takes "none" or "tanh", got \'erf\''),
        ("snake", ValueError, "snake takes arrays alpha and perhaps beta, got 0 parameters"),
        (("snake", 1.0), TypeError, "snake takes arrays with one value a channel, got float 1.0"),
    ],
)
def test_what_is_no_activation_is_refused(op: str, argument: str, value: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=rf"^{op}: {argument} {re.escape(message)}$"):
        call(op, **{argument: value})


@pytest.mark.parametrize("op", OPS)
def test_arrays_that_do_not_fit_are_refused(op: str) -> None:
    def refuses(error: type[Exception], message: str, **fused: Any) -> None:
        with pytest.raises(error, match=rf"^{op}: {message}"):
            call(op, **fused)

    shape = call(op).shape
    alpha = np.ones(4, np.float32)
    refuses(ValueError, r"residual must have shape \(2, 4, \d+\), got \(2, 4, 1\)", residual=np.ones((2, 4, 1), "f4"))
    refuses(TypeError, "residual must have the dtype of input, float32, got float64", residual=np.ones(shape))
    refuses(TypeError, "residual must be a NumPy or CuPy array, got float", residual=1.0)
    refuses(ValueError, r"activation_beta must have shape \(4,\), got \(3,\)", activation=("snake", alpha, alpha[1:]))
    refuses(
        TypeError, "input_activation_alpha must have the dtype of input", input_activation=("snake", np.ones(4, "f8"))
    )
    out = np.empty(shape, np.float32)
    with pytest.raises(ValueError, match=f"^{op}: out must not overlap residual"):
        call(op, residual=out, out=out)


@pytest.mark.parametrize("op", OPS)
def test_complex_data_and_integers_have_no_activation(op: str) -> None:
    for dtype in ("complex64", "int16"):
        with pytest.raises(TypeError, match=f"^{op}: activation relu needs real floating-point data, got {dtype}"):
            call(op, X.astype(dtype), W.astype(dtype), activation="relu")
    with pytest.raises(TypeError, match=f"^{op}: activation relu needs real floating-point data, got complex64"):
        call(op, X.astype("complex64"), W, activation="relu")  # real taps
    shape = call(op).shape
    with pytest.raises(TypeError, match=f"^{op}: a residual needs floating-point data, got int8"):
        call(op, X.astype("i1"), W.astype("i1"), residual=np.ones(shape, "i1"))
    residual = np.full(shape, 1j, np.complex64)
    for w in (W, W.astype("complex64")):
        y = call(op, X.astype("complex64"), w, residual=residual)
        assert (y == call(op) + residual).all()


@pytest.mark.parametrize("op", OPS)
def test_gradients_refuse_it_by_name(op: str) -> None:
    for function, arguments in (("input", (X.shape, W, call(op))), ("weight", (X, W.shape, call(op)))):
        with pytest.raises(TypeError, match="'activation'"):
            getattr(grad, f"{op}_{function}")(*arguments, activation="relu")
    for direction in ("grad_input", "grad_weight", "grad_bias"):
        with pytest.raises(ValueError, match=rf"^{op}: there is no gradient of what is fused \(relu\)"):
            gpuconv.explain(op, X, W, direction=direction, activation="relu", device="cpu")  # type: ignore[arg-type]


def test_names_alone_have_pytorchs_parameters() -> None:
    for name, parameter in (("leaky_relu", 0.01), ("elu", 1.0), ("gelu", "none")):
        x = np.linspace(-3, 3, 9).reshape(1, 1, 9)
        w = np.ones((1, 1, 1))
        assert (gpuconv.conv1d(x, w, activation=name) == gpuconv.conv1d(x, w, activation=(name, parameter))).all()


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "symmetric"])
def test_padding_means_activated_samples(mode: str) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 4, 30)), rng.standard_normal((4, 4, 5))
    residual = rng.standard_normal((2, 4, 30))
    more = {"input_activation": "sigmoid", "residual": residual, "activation": "tanh"}
    y = gpuconv.conv1d(x, w, padding=2, padding_mode=mode, **more)
    sums = gpuconv.conv1d(1 / (1 + np.exp(-x)), w, padding=2, padding_mode=mode) + residual
    np.testing.assert_allclose(y, np.tanh(sums), rtol=1e-12, atol=1e-14)


def test_large_samples_are_taken_one_at_a_time() -> None:
    """More than the cache holds, in a dtype whose sums need a buffer; explain tells what that takes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 200_000)).astype(np.float16)
    w = rng.standard_normal((8, 4, 3)).astype(np.float16)
    residual = rng.standard_normal((3, 8, 199_998)).astype(np.float16)
    y = gpuconv.conv1d(x, w, input_activation="tanh", residual=residual, activation="relu")
    one = gpuconv.conv1d(x[1], w, input_activation="tanh", residual=residual[1], activation="relu")
    assert np.allclose(y[1], one, rtol=2e-3, atol=2e-3)
    plain = gpuconv.conv1d(np.tanh(x.astype("f4")).astype("f2"), w).astype("f4") + residual
    assert np.allclose(y, np.maximum(plain, 0), rtol=1e-2, atol=1e-2)
    found = gpuconv.explain("conv1d", x, w, input_activation="tanh", residual=residual, activation="relu")
    assert found.method is not None
    words = "activated input in a buffer, sums in a buffer, finished in blocks, 1 sample at a time"
    assert found.method.reason.endswith(words)
    assert found.method.workspace_bytes > 200_000 * (4 * 2 + 8 * 4)
    assert list(found.fused) == ["tanh of the input", "residual", "relu"]


def test_explain_tells_the_bytes_that_need_not_move() -> None:
    x, w = ArraySpec((2, 64, 100), "float16"), ArraySpec((64, 64, 3), "float16")
    fused = {"input_activation": "silu", "residual": ArraySpec((2, 64, 98), "float16"), "activation": "gelu"}
    found = gpuconv.explain("conv1d", x, w, device="sm_90", **fused)
    output = 2 * 2 * 64 * 98 * 2
    assert found.fused == {"silu of the input": 0, "residual": output, "gelu": output}
    kernels = found.to_dict()
    assert [step["kernel"] for step in kernels["kernel"]["steps"]] == ["activate", "conv1d_mma"]
    prepared = kernels["kernel_of_prepared_weight"]["steps"]
    assert [step["kernel"] for step in prepared] == ["pack_mma_weight", "activate", "conv1d_mma"]
    assert found.to_dict()["kernel"]["scratch"]["activated"] == 2 * 64 * 100 * 2
    depthwise = ArraySpec((64, 1, 3), "float16")
    found = gpuconv.explain("conv1d", x, depthwise, groups=64, device="sm_90", **fused)
    assert found.fused["silu of the input"] == 2 * 2 * 64 * 100 * 2
    assert "silu of the input (51.2 kB saved), residual (50.2 kB saved)" in " ".join(found.page(200).split())


def test_layers_keep_and_convert_the_arrays_of_snake() -> None:
    alpha = np.linspace(0.5, 1.5, 6)
    m = nn.Conv1d(4, 6, 2, activation=("snake", alpha), input_activation=("leaky_relu", 0.1), rng=0)
    assert list(m.state_dict()) == ["weight", "bias", "activation_alpha"]
    assert m.activation_alpha.dtype == np.float32
    assert "input_activation=leaky_relu (0.1), activation=snake" in repr(m)
    residual = np.ones((2, 6, 8), np.float32)
    expected = gpuconv.conv1d(
        X, m.weight, m.bias, input_activation=("leaky_relu", 0.1), residual=residual,
        activation=("snake", alpha.astype("f4")),
    )  # fmt: skip
    assert (m(X, residual=residual) == expected).all()
    other = nn.Conv1d(4, 6, 2, activation=("snake", np.ones(6)))
    other.load_state_dict(m.to(dtype="float64").state_dict())
    assert (other.activation_alpha == m.activation_alpha.astype("f4")).all()
    with pytest.raises(ValueError, match=r"^Conv1d: activation_alpha must have shape \(6,\), got \(5,\)"):
        nn.Conv1d(4, 6, 2, activation=("snake", alpha[1:]))
    with pytest.raises(ValueError, match=r"^ConvTranspose1d: activation must be one of"):
        nn.ConvTranspose1d(4, 6, 2, activation="swish")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("k3", "float64"),
        ("k3", "complex64"),
        ("dense_stride3", "float16"),
        ("dense_stride3", "float32"),
        ("depthwise", "float16"),
        ("depthwise", "complex64"),
        ("unbatched", "float32"),
        ("up_dense_stride3", "float16"),
        ("up_dense_stride3", "float64"),
        ("up_depthwise", "float32"),
        ("up_depthwise", "float64"),
    ],
)
def test_a_gpu_fuses_within_the_bound(cupy: Any, name: str, dtype: str) -> None:
    (case,) = (case for case in cases.CASES if case.name == name)
    p, fused = cases.with_fusion(case.at(dtype), 5)
    data = cases.random_data(case.at(dtype), 5)
    arrays = {key: cupy.asarray(array) for key, array in fused.items()}
    given = [None if array is None else cupy.asarray(array) for array in data]
    settings = {**cases.call_settings(case.at(dtype)), **cases.fusion_settings(p, arrays)}
    y = getattr(gpuconv, p.op)(*given, **settings)
    assert reference.convolution(p, *data, fused).within_bound(y.get()).all()
    again = getattr(gpuconv, p.op)(given[0], gpuconv.prepare(given[1]), given[2], **settings)
    assert again.get().tobytes() == y.get().tobytes()
    out = cupy.zeros((*p.output_shape, 2), p.dtype)[..., 0]  # with gaps, so that it is copied
    getattr(gpuconv, p.op)(*given, **settings, out=out)
    assert out.get().tobytes() == y.get().tobytes()


def test_problems_that_fuse_are_other_problems() -> None:
    p = ConvProblem.conv1d(X, W)
    q, _ = cases.with_fusion(p, 0)
    assert p != q
    assert hash(p) != hash(q)
    assert str(q).startswith(f"{p} with input ")
    assert q.bytes() > p.bytes()
