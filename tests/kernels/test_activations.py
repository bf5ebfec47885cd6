"""The elementary functions of the activations, on the CPU and as kernels compute them: no further off than is said.

The convolution has one tap, a one, so that its output is the activation of its input. float16 and bfloat16 have all
their values; float32 and float64 have neighbours of every power of two, and values in between.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mpmath
import numpy as np
import pytest

import gpuconv
from gpuconv.fusion import ACTIVATION_ARRAYS, TINY, ULPS, Fused
from gpuconv.problem import FORMATS, ConvProblem, numpy_dtype
from gpuconv.reference.activations import Function
from tests import hostcuda

NAMES = ("relu", "leaky_relu", "elu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "snake")
DTYPES = ("float16", "bfloat16", "float32", "float64")
ALPHA, BETA = 1.375, 0.59375  # of snake, exact in every dtype


def argument(name: str, dtype: str) -> Any:
    if name == "snake":
        return ("snake", *(np.array([value], numpy_dtype(dtype)) for value in (ALPHA, BETA)))
    return {"leaky_relu": (name, 0.2), "elu": (name, 1.6), "gelu_tanh": ("gelu", "tanh")}.get(name, name)


@lru_cache
def values(dtype: str) -> np.ndarray[Any, Any]:
    """Finite values, and infinities and a NaN."""
    target = numpy_dtype(dtype)
    if target.itemsize == 2:
        every = np.arange(2**16, dtype=np.uint16).view(target)
        is_nan = np.isnan(every.astype(np.float32))
        return np.where(is_nan, target.type(np.nan), every)  # one NaN, for others mean unwritten memory
    rng = np.random.default_rng(0)
    powers = np.ldexp(1.0, np.arange(-1022, 1023)) if dtype == "float64" else np.ldexp(1.0, np.arange(-126, 127))
    powers = powers.astype(target)
    count = 100_000 if dtype == "float32" else 1500
    near = np.concatenate([powers, np.nextafter(powers, target.type(0)), np.nextafter(powers, target.type(np.inf))])
    parts = [near if dtype == "float32" else near[::7], rng.uniform(0, 4, count), rng.uniform(0, 120, count)]
    parts += [np.exp2(rng.uniform(-30, 30, count)), np.array([0.0, 708.0, 709.5, 745.0, 1e3, np.inf])]
    magnitudes = np.concatenate(parts).astype(target)
    return np.concatenate([magnitudes, -magnitudes, np.array([np.nan], target)])


def problem_of(name: str, dtype: str) -> tuple[ConvProblem, dict[str, Any], tuple[Any, Any]]:
    """The problem, its arrays of snake, and its input and weight."""
    x = values(dtype).reshape(1, 1, -1)
    weight = np.ones((1, 1, 1), x.dtype)
    fused = Fused.check("conv1d", argument(name, dtype), None)
    arrays = dict(zip(ACTIVATION_ARRAYS, (a for a in fused.arrays if a is not None), strict=False))
    return ConvProblem.conv1d(x, weight).fused(fused), arrays, (x, weight)


def exactly(name: str, dtype: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The function in float64."""
    p, arrays, _ = problem_of(name, dtype)
    function = Function.of(p.fusion.activation, ACTIVATION_ARRAYS, arrays)
    assert function is not None
    found: np.ndarray[Any, Any] = function(x.astype(np.float64).reshape(1, -1))[0]
    return found


def with_digits(name: str, x: float) -> Any:
    z = mpmath.mpf(x)
    if name == "tanh":
        return mpmath.tanh(z)
    if name == "sigmoid":
        return 1 / (1 + mpmath.exp(-z))
    if name == "silu":
        return z / (1 + mpmath.exp(-z))
    if name == "gelu":
        return z * mpmath.erfc(-z / mpmath.sqrt(2)) / 2
    if name == "gelu_tanh":
        return z / (1 + mpmath.exp(-2 * mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf(0.044715) * z**3)))
    if name == "snake":
        return z + mpmath.sin(ALPHA * z) ** 2 / BETA
    return mpmath.mpf(1.6) * mpmath.expm1(z) if name == "elu" and z < 0 else z


def permitted(name: str, dtype: str, x: Any, exact: Any) -> Any:
    """How far a result may lie from the exact one, its rounding to the dtype included."""
    real, accumulator = FORMATS[dtype], FORMATS[FORMATS[dtype].accumulator]
    scale = np.abs(exact)
    if name in ("gelu", "gelu_tanh"):
        scale = scale + np.abs(x) / ULPS
    if name == "snake":
        scale = np.abs(x) * (1 + ALPHA / BETA)
    error = 2 * ULPS * accumulator.roundoff * scale + TINY * accumulator.smallest_normal
    if accumulator is real:
        return error
    return error + real.roundoff * (np.abs(exact) + error) + real.smallest_normal * real.roundoff


def compute(name: str, dtype: str, backend: str) -> np.ndarray[Any, Any]:
    p, arrays, (x, weight) = problem_of(name, dtype)
    if backend == "cpu":
        with np.errstate(all="ignore"):
            return np.asarray(gpuconv.conv1d(x, weight, activation=argument(name, dtype)))[0, 0]
    return hostcuda.compute(p, x, weight, *arrays.values(), family="conv1d_direct")[0, 0]


@pytest.mark.parametrize("backend", ["cpu", "kernel"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_each_function_misses_by_no_more_than_is_said(name: str, dtype: str, backend: str) -> None:
    x = values(dtype)
    output = compute(name, dtype, backend).astype(np.float64)
    wide = x.astype(np.float64)
    exact = exactly(name, dtype, x)
    with np.errstate(all="ignore"):
        limit = permitted(name, dtype, wide, exact)
        good = (np.abs(output - exact) <= limit) | (output == exact) | (np.isnan(output) & np.isnan(exact))
        overflow = np.abs(exact) + limit > FORMATS[dtype].largest
        good |= overflow & np.isfinite(exact) & (output == np.copysign(np.inf, exact))
    bad = np.flatnonzero(~good)
    assert [(wide[i], output[i], exact[i]) for i in bad[:5]] == []


@pytest.mark.parametrize("backend", ["cpu", "kernel"])
@pytest.mark.parametrize("name", NAMES)
def test_float64_keeps_the_error_against_sixty_digits(name: str, backend: str) -> None:
    """float64 cannot judge itself."""
    x = values("float64")
    output = compute(name, "float64", backend)
    if name in ("relu", "leaky_relu"):
        return
    worst = 0.0
    with mpmath.workdps(60):
        for i in np.flatnonzero(np.isfinite(x) & (np.abs(x) < 1e15)):
            exact = with_digits(name, float(x[i]))
            limit = permitted(name, "float64", float(x[i]), abs(float(exact)))
            worst = max(worst, float(abs(mpmath.mpf(float(output[i])) - exact)) / limit)
    assert worst <= 1
