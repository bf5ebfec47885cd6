"""`gpuconv.testing`: results of any library against their error bounds, and the pytest fixture."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import grad
from gpuconv.testing import assert_within_bound

ROOT = Path(__file__).parents[2]


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    return (values + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else values).astype(dtype)


def calls() -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    x, w, b = normal(2, 4, 30), normal(6, 2, 3, seed=1), normal(6, seed=2)
    transposed = normal(4, 3, 5, seed=3)
    y, up = normal(2, 6, 15, seed=4), normal(2, 6, 61, seed=5)
    layer = {"stride": 2, "padding": 1, "groups": 2}
    upward = {"stride": 2, "padding": 1, "output_padding": 0, "groups": 2, "dilation": 1}
    z, h = normal(2, 4, 30, dtype=np.complex64), normal(6, 2, 3, dtype=np.complex64, seed=1)
    dz = normal(2, 6, 15, dtype=np.complex64, seed=7)
    fused = {"residual": normal(2, 6, 15, seed=6), "activation": ("snake", abs(b) + 1), "input_activation": "silu"}
    return [
        (gpuconv.conv1d, (x, w, b), layer),
        (gpuconv.conv1d, (x, w, b, 2, 1, 1, 2), {"padding_mode": "reflect"}),
        (gpuconv.conv1d, (x.astype(np.float16), w.astype(np.float16)), {"groups": 2, "padding": "same"}),
        (gpuconv.conv1d, (x[0], w, b), {**layer, "algorithm": "base"}),
        (gpuconv.conv1d, (x, w, b), {**layer, **fused}),
        (gpuconv.conv1d, (x, gpuconv.prepare(w)), layer),
        (gpuconv.conv1d, (z, h), layer),
        (gpuconv.conv1d, (z, w), layer),
        (gpuconv.conv1d, ((8 * x).astype(np.int8), (8 * w).astype(np.int8)), {**layer, "out_dtype": "int32"}),
        (gpuconv.conv_transpose1d, (x, transposed, b), upward),
        (grad.conv1d_input, (x.shape, w, y), layer),
        (grad.conv1d_input, (x.shape, w, dz), layer),
        (grad.conv1d_weight, (x, w.shape, y), layer),
        (grad.conv1d_weight, (x.astype(">f4"), w.shape, y), {**layer, "weight_dtype": "float32"}),
        (grad.conv1d_weight, (z, w.shape, dz), {**layer, "weight_dtype": np.float32}),
        (grad.conv1d_bias, (y,), {}),
        (grad.conv_transpose1d_input, (x.shape, transposed, up), upward),
        (grad.conv_transpose1d_weight, (x, transposed.shape, up), upward),
        (grad.conv_transpose1d_bias, (up,), {}),
    ]


def test_right_results_pass_and_one_wrong_element_is_named() -> None:
    for function, arrays, settings in calls():
        for op in (function, function.__name__):
            result = function(*arrays, **settings)
            assert_within_bound(result, op, *arrays, **settings)
            index = tuple(extent // 2 for extent in result.shape)
            wrong = result.copy()
            wrong[index] += np.asarray(1, result.dtype)
            with pytest.raises(AssertionError) as caught:
                assert_within_bound(wrong, op, *arrays, **settings)
            first, second = str(caught.value).split("\n")
            assert re.match(rf"{function.__name__}:? ", first)
            assert first.endswith(f": 1 of {result.size} elements are outside of their error bound")
            assert second.startswith(f"  worst element {index}")
            assert " times its bound of " in second


def test_the_message_has_both_values_and_the_fraction_of_the_bound() -> None:
    x, w = np.ones((1, 1, 5), np.float64), np.full((1, 1, 3), 2.0)
    y = gpuconv.conv1d(x, w)
    bound = gpuconv.reference.error_bound(gpuconv.problem.ConvProblem.conv1d(x, w), x, w)[0, 0, 1]
    assert_within_bound(y + 0.9 * bound, "conv1d", x, w)
    y[0, 0, 0] += 2 * bound
    y[0, 0, 1] += 32 * bound
    with pytest.raises(AssertionError, match=r"2 of 3 elements are outside") as caught:
        assert_within_bound(y, "conv1d", x, w)
    values = f"got {float(y[0, 0, 1])!r}, expected 6.0"
    words = f"worst element (0, 0, 1): {values}; the error is 32 times its bound of {bound:.3g}"
    assert str(caught.value).endswith(words)
    y[0, 0, 2] = np.nan
    with pytest.raises(
        AssertionError, match=r"worst element \(0, 0, 2\): got nan, expected 6.0; the error is inf times"
    ):
        assert_within_bound(y, "conv1d", x, w)


def test_the_part_of_a_complex_result_that_is_wrong_is_named() -> None:
    x, w = normal(1, 2, 9, dtype=np.complex128), normal(3, 2, 3, dtype=np.float64)
    y = gpuconv.conv1d(x, w)
    y[0, 1, 2] += 1j
    with pytest.raises(AssertionError, match=r"worst element \(0, 1, 2\), imaginary part: got "):
        assert_within_bound(y, "conv1d", x, w)


def test_shape_dtype_and_arguments_are_checked() -> None:
    x, w = normal(1, 2, 9), normal(3, 2, 3)
    y = gpuconv.conv1d(x, w)
    with pytest.raises(AssertionError, match=r"must have shape \(1, 3, 7\), got \(3, 7\)$"):
        assert_within_bound(y[0], "conv1d", x, w)
    with pytest.raises(AssertionError, match=r"must have the dtype float32, got float64$"):
        assert_within_bound(y.astype(np.float64), "conv1d", x, w)
    with pytest.raises(TypeError, match=r"actual must be an array, got list$"):
        assert_within_bound(y.tolist(), "conv1d", x, w)
    with pytest.raises(ValueError, match=r"op must be one of conv1d, .*, got 'conv2d'$"):
        assert_within_bound(y, "conv2d", x, w)
    with pytest.raises(TypeError, match=r"^conv1d: got an unexpected keyword argument 'strides'$"):
        assert_within_bound(y, "conv1d", x, w, strides=2)
    with pytest.raises(ValueError, match=r"conv1d with lengths is checked sample by sample"):
        assert_within_bound(y, "conv1d", x, w, lengths=[9])
    with pytest.raises(ValueError, match=r"^conv1d: stride must be at least 1, got 0$"):
        assert_within_bound(y, "conv1d", x, w, stride=0)
    with pytest.raises(TypeError, match=r"^conv1d: input must be a NumPy or CuPy array, got list"):
        assert_within_bound(y, "conv1d", x.tolist(), w)


@pytest.mark.torch
@pytest.mark.usefixtures("one_torch_thread")
def test_results_of_pytorch() -> None:
    import torch
    from torch.nn import functional

    x, w = torch.from_numpy(normal(2, 4, 30)), torch.nn.Parameter(torch.from_numpy(normal(6, 4, 3)))
    y = functional.conv1d(x, w, padding=1)
    assert_within_bound(y, functional.conv1d, x, w, padding=1)
    weight_gradient = torch.autograd.grad(y.sum(), w)[0]
    assert_within_bound(weight_gradient, "conv1d_weight", x, tuple(w.shape), torch.ones_like(y), padding=1)
    half = x.bfloat16(), w.bfloat16()
    assert_within_bound(functional.conv1d(*half), "conv1d", *half)
    with pytest.raises(AssertionError, match=r"outside of their error bound"):
        assert_within_bound(functional.conv1d(*half).bfloat16() * 1.1, "conv1d", *half)


@pytest.mark.gpu
def test_results_on_a_gpu(cupy: Any) -> None:
    x, w = normal(2, 4, 30), normal(6, 4, 3)
    on_gpu = cupy.asarray(x), cupy.asarray(w)
    y = gpuconv.conv1d(*on_gpu)
    assert_within_bound(y, gpuconv.conv1d, *on_gpu)
    assert_within_bound(cupy.asnumpy(y), gpuconv.conv1d, x, w)
    y[1, 2, 3] += 1
    with pytest.raises(AssertionError, match=r"worst element \(1, 2, 3\)"):
        assert_within_bound(y, gpuconv.conv1d, *on_gpu)


TEST = """
import sys

def test_little_is_loaded():
    assert not {"cupy", "torch", "gpuconv.testing"} & set(sys.modules)

def test_right(assert_within_bound):
    import numpy as np
    x, w = np.ones((1, 1, 5)), np.ones((1, 1, 3))
    assert_within_bound(np.full((1, 1, 3), 3.0), "conv1d", x, w)

def test_wrong(assert_within_bound):
    import numpy as np
    x, w = np.ones((1, 1, 5)), np.ones((1, 1, 3))
    assert_within_bound(np.full((1, 1, 3), 3.5), "conv1d", x, w)
"""


def test_the_plugin_loads_little_until_its_fixture_is_used(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    options = ["-p", "gpuconv.pytest_plugin", "-p", "no:cacheprovider", "-q"]
    command = [sys.executable, "-m", "pytest", *options, "test_it.py"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "1 failed, 2 passed" in done.stdout, done.stdout
    assert re.search("^E +AssertionError: conv1d N1 ", done.stdout, re.MULTILINE)
    assert "testing.py" not in done.stdout.partition("AssertionError")[0]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_activated_input_that_rounds_to_zero_meets_an_infinity(dtype: str) -> None:
    """silu(-21) is -2e-8, which float16 rounds to zero, and silu(-200) is too small for float32."""
    x = np.full((1, 1, 1), -21 if dtype == "float16" else -200, dtype)
    w = np.full((1, 1, 1), np.inf, dtype)
    for activation in (None, "elu"):
        settings: dict[str, Any] = {"input_activation": "silu", "activation": activation}
        y = gpuconv.conv1d(x, w, **settings)
        assert np.isnan(y).all()
        gpuconv.testing.assert_within_bound(y, gpuconv.conv1d, x, w, **settings)
        with pytest.raises(AssertionError):
            gpuconv.testing.assert_within_bound(np.zeros_like(y), gpuconv.conv1d, x, w, **settings)
