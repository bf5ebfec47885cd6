"""The activations on the CPU: applied in place to float32 or float64 blocks, by NumPy's elementary functions.

NumPy has no error function. For gelu, half of ``erfc(a/sqrt(2))`` is ``exp(-a*a/2) * P(t)/(a + k)`` with
``t = (a - k)/(a + k)``, where P is a polynomial fitted at Chebyshev points (after M. M. Shepherd and J. G. Laframboise,
Chebyshev approximation of (1 + 2x) exp(x**2) erfc x, Mathematics of Computation 36, 1981). cuda_src/activation.cuh has
the same polynomials.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..fusion import Activation
from .arrays import Array, Scratch

# k, and the coefficients of P from the highest power down, by itemsize; accurate wherever exp(-a*a/2) is not zero.
_TAILS: dict[int, tuple[float, tuple[float, ...]]] = {
    4: (
        4.0,
        (
            -0.000117137752, 0.000208466168, 0.00157600967, -0.00352875562, -0.00753153441, 0.0604068227, -0.18652235,
            0.387136698, -0.607896626, 0.755285144,
        ),
    ),
    8: (
        5.0,
        (
            -3.817059749433349e-10, -1.1613988117963691e-09, 2.2201175016558965e-09, 1.0798061850653808e-08,
            -8.553364558046826e-09, -7.014184378551324e-08, 4.017523150089386e-08, 4.362911487401573e-07,
            -3.345721937861036e-07, -2.770719146152548e-06, 3.97980433807949e-06, 1.6681639003552632e-05,
            -4.976245606842442e-05, -5.937580719746401e-05, 0.0005448989927521901, -0.0007978693893219596,
            -0.00299337676186944, 0.020795066799262733, -0.06911863870687801, 0.16502036617040702,
            -0.31353315667128745, 0.4953056159699761, -0.6653825028900568, 0.769193049750063,
        ),
    ),
}  # fmt: skip
# Below this, silu and gelu are zero. Arguments are clamped to it, since at minus infinity the formulas give NaN.
_LOWEST = -1000.0


def apply(activation: Activation, x: Array, alpha: Any, beta: Any, scratch: Scratch) -> None:
    """Replace x by its activation; alpha and beta are snake's, of shapes that broadcast to that of x."""
    name, parameter = activation.name, activation.parameter
    t = scratch.take("activation", *x.shape)
    if name == "relu":
        np.maximum(x, 0, out=x)
    elif name == "leaky_relu":
        np.multiply(x, parameter, out=t)
        np.copyto(x, t, where=x < 0)
    elif name == "elu":
        np.minimum(x, 0, out=t)
        np.expm1(t, out=t)
        np.multiply(t, parameter, out=t)
        np.copyto(x, t, where=x < 0)
    elif name == "tanh":
        np.tanh(x, out=x)
    elif name == "sigmoid":
        _add_one_exp(x, t)
        np.divide(1, t, out=x)
    elif name == "silu":
        _add_one_exp(x, t)
        np.maximum(x, _LOWEST, out=x)
        np.divide(x, t, out=x)
    elif name == "gelu_tanh":
        slope = 2 * math.sqrt(2 / math.pi)
        np.multiply(x, x, out=t)
        np.multiply(t, 0.044715 * slope, out=t)
        np.add(t, slope, out=t)
        np.multiply(t, x, out=t)
        _add_one_exp(t, t)
        np.maximum(x, _LOWEST, out=x)
        np.divide(x, t, out=x)
    elif name == "gelu":
        np.abs(x, out=t)
        np.minimum(t, -_LOWEST, out=t)
        _multiply_tail(t, scratch)
        np.maximum(x, 0, out=x)
        np.subtract(x, t, out=x)
    else:
        np.multiply(x, alpha, out=t)
        np.copyto(t, 0, where=np.isinf(t))
        np.sin(t, out=t)
        np.multiply(t, t, out=t)
        np.divide(t, beta, out=t)
        np.add(x, t, out=x)


def _add_one_exp(x: Array, out: Array) -> None:
    """``out = 1 + exp(-x)``."""
    np.negative(x, out=out)
    np.exp(out, out=out)
    np.add(out, 1, out=out)


def _multiply_tail(a: Array, scratch: Scratch) -> None:
    """Multiply a >= 0 by the tail of the normal distribution, erfc(a/sqrt(2))/2."""
    k, coefficients = _TAILS[a.itemsize]
    inverse, t, p = (scratch.take(name, *a.shape) for name in ("inverse", "tail", "polynomial"))
    np.add(a, k, out=inverse)
    np.divide(1, inverse, out=inverse)
    np.subtract(a, k, out=t)
    np.multiply(t, inverse, out=t)
    p[...] = coefficients[0]
    for coefficient in coefficients[1:]:
        np.multiply(p, t, out=p)
        np.add(p, coefficient, out=p)
    np.multiply(p, inverse, out=p)
    np.multiply(a, a, out=t)
    np.multiply(t, -0.5, out=t)
    np.exp(t, out=t)
    np.multiply(p, t, out=p)
    np.multiply(a, p, out=a)
