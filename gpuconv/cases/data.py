"""Deterministic data for a problem: the same (problem, seed) gives the same arrays."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ..fusion import RESIDUAL, Activation, Fused, Fusion
from ..problem import ConvProblem, numpy_dtype

Array: TypeAlias = npt.NDArray[Any]
RandomKind: TypeAlias = Literal["normal", "ill_scaled", "cancelling", "nonfinite"]
GradOutputKind: TypeAlias = Literal["normal", "nonfinite"]

RANDOM_KINDS: tuple[RandomKind, ...] = ("normal", "ill_scaled", "cancelling", "nonfinite")

# Integers up to this magnitude are exact in the dtype: 2**(bits of the significand). The limit of wide dtypes is well
# below that, so that algorithms that scale or add operands before they multiply remain exact too.
_EXACT_LIMIT = {"float16": 2**11, "bfloat16": 2**8}
_WIDE_EXACT_LIMIT = 2**20


class Data(NamedTuple):
    """The C-contiguous arrays of a problem: its `input_shape`, `weight_shape` and `bias_shape` (or None)."""

    input: Array
    weight: Array
    bias: Array | None


def exact_data(problem: ConvProblem, seed: int, *, adjoint_too: bool = False) -> Data:
    """Nonzero small integers for which every correct computation gives the same result, bit for bit.

    The absolute values of the terms of any output element sum to at most an integer that the dtype holds exactly, so
    every partial sum in any order is exact in the accumulator and the result is exact in the dtype. Where the terms are
    too many for that (float16, bfloat16), most weights are zero. No element of input or bias is zero.

    Args:
        problem: extents, settings and dtype.
        seed: any integer.
        adjoint_too: the same holds for `problem.adjoint()` with this weight.
    """
    p = problem
    rng = _generator(p, seed)
    limit = _EXACT_LIMIT.get(p.dtype, _WIDE_EXACT_LIMIT)
    bias_limit = limit // 8
    budget = limit - 2 * bias_limit
    parts = 2 if p.is_complex else 1  # products in the real part of one term
    problems = [p, p.adjoint()] if adjoint_too else [p]
    terms = parts * max(1, *(q.terms for q in problems))
    input_limit = max(1, min(16, math.isqrt(budget // terms)))
    weight_limit = max(1, min(16, budget // (terms * input_limit)))

    taps = _integers(rng, (p.C_out, p.C_in_g, p.K), weight_limit, p.dtype)
    weight = _as_weight(p, taps)
    for q in problems:
        kept = _sparse(q, rng, budget // (parts * input_limit * weight_limit))
        if kept is not None:
            weight = np.where(_as_weight(q, kept), weight, np.zeros((), weight.dtype))
    x = _integers(rng, p.input_shape, input_limit, p.dtype)
    bias = _integers(rng, (p.C_out,), bias_limit, p.dtype) if p.has_bias else None
    return _as_dtype(p, x, weight, bias)


def exact_grad_output(problem: ConvProblem, seed: int, input: Array) -> Array:
    """Small integers of the output's shape for which the gradients of weight and bias are exact, as for `exact_data`.

    Where `problem.dtype` is narrow, most of them are zero.

    Args:
        problem: extents, settings and dtype.
        seed: any integer.
        input: that of `exact_data`.
    """
    p = problem
    rng = _generator(p, seed + 1)
    limit = _EXACT_LIMIT.get(p.dtype, _WIDE_EXACT_LIMIT)
    wide = input.astype(np.complex128)
    largest = max(1, int(max(np.abs(wide.real).max(initial=0), np.abs(wide.imag).max(initial=0))))
    budget = limit // ((2 if p.is_complex else 1) * largest)
    values = _integers(rng, (p.N, p.C_out, p.L_out), max(1, min(4, budget // max(1, p.N * p.L_out))), p.dtype)
    if p.N * p.L_out > budget:  # each position of an output channel adds one term to each element of its weights
        order = rng.random((p.C_out, p.N * p.L_out)).argsort(axis=1).reshape(p.C_out, p.N, p.L_out)
        values = np.where(order.swapaxes(0, 1) < budget, values, 0)
    return np.asarray(values.reshape(p.output_shape).astype(numpy_dtype(p.dtype)))


def random_data(problem: ConvProblem, seed: int, kind: RandomKind = "normal") -> Data:
    """Data with rounding errors.

    Args:
        problem: extents, settings and dtype.
        seed: any integer.
        kind: "normal": standard normal. "ill_scaled": magnitudes from 2**-60 to 2**60, in float16 and for long sums a
            smaller range, so that no sum of absolute values overflows. "cancelling": the terms of an output element
            nearly cancel. "nonfinite": normal, except for a NaN in the input, infinities at the first and the last
            position of rows of the input, and infinities at the first and the last tap of rows of the weight. Outputs
            near the ends do not have these terms; code that multiplied them by zero instead would give NaN.
    """
    p = problem
    rng = _generator(p, seed)
    draw = _ill_scaled if kind == "ill_scaled" else _normal
    x, taps, bias = (draw(p, rng, shape) for shape in (p.input_shape, (p.C_out, p.C_in_g, p.K), (p.C_out,)))
    if kind == "cancelling":
        x = 1 + x * 2.0**-6
        for phase in _phases(p):
            part = taps[..., phase]
            if part.size:
                part -= part.mean(axis=(1, 2), keepdims=True)
        bias = bias * 2.0**-6
    if kind == "nonfinite":
        _set_ends(rng, x, np.inf)
        _set_ends(rng, taps, -np.inf)
        inner = x[..., 1:-1] if p.L_in > 2 else x
        if inner.size:
            inner[tuple(rng.integers(inner.shape))] = np.nan
    return _as_dtype(p, x, _as_weight(p, taps), bias if p.has_bias else None)


def random_grad_output(problem: ConvProblem, seed: int, kind: GradOutputKind = "normal") -> Array:
    """Standard normal data of the output's shape.

    "nonfinite" puts infinities at the first and the last position of rows, where windows reach into the padding: no
    product of an infinity and the padding may enter a sum.
    """
    p = problem
    rng = _generator(p, seed + 1)
    values = _normal(p, rng, (p.N, p.C_out, p.L_out))
    if kind == "nonfinite":
        _set_ends(rng, values, -np.inf)
    return np.asarray(values.reshape(p.output_shape).astype(numpy_dtype(p.dtype)))


def integer_data(problem: ConvProblem, seed: int) -> Data:
    """Integers from the whole range of their dtype, for a problem that `in_integers` made.

    Args:
        problem: extents, settings and dtypes.
        seed: any integer.
    """
    rng, shapes = _generator(problem, seed), (problem.input_shape, problem.weight_shape, problem.bias_shape)
    dtypes = (numpy_dtype(problem.dtype_of(name)) for name in ("input", "weight", "bias"))
    arrays = (
        None if shape is None else rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return Data(*arrays)  # type: ignore[arg-type]


# Activations as arguments, except that for snake a number stands for the number of its arrays.
_FUSIBLE: tuple[Any, ...] = (
    "relu", ("leaky_relu", 0.3), ("elu", 1.5), "silu", "gelu", ("gelu", "tanh"), "tanh", "sigmoid", ("snake", 1),
    ("snake", 2),
)  # fmt: skip


def with_fusion(problem: ConvProblem, seed: int, fusion: Fusion | None = None) -> tuple[ConvProblem, dict[str, Array]]:
    """The problem with something fused, and random arrays for it.

    Args:
        problem: extents, settings and dtype.
        seed: any integer.
        fusion: what to fuse; None for a residual and, where the data are real, two activations drawn at random.

    Returns:
        That problem, and the arrays that it fuses, by name.
    """
    p = problem
    rng = _generator(p, seed + 2)
    dtype = numpy_dtype(p.dtype)

    def of_channels(count: int, channels: int) -> tuple[Array, ...]:
        return tuple(rng.uniform(0.5, 1.5, channels).astype(dtype) for _ in range(count))

    def draw(channels: int) -> Any:
        chosen = _FUSIBLE[rng.integers(len(_FUSIBLE))]
        return ("snake", *of_channels(chosen[1], channels)) if chosen[0] == "snake" else chosen

    def given(activation: Activation | None, channels: int) -> Any:
        return None if activation is None else activation.as_argument(of_channels(activation.arrays, channels))

    residual: Array | None = _normal(p, rng, p.output_shape).astype(dtype)
    if fusion is not None:
        activation, input_activation = given(fusion.activation, p.C_out), given(fusion.input_activation, p.C_in)
        residual = residual if fusion.has_residual else None
    else:
        activation, input_activation = (None, None) if p.is_complex else (draw(p.C_out), draw(p.C_in))
    fused = Fused.check(p.op, activation, input_activation, residual)
    return p.fused(fused), fused.given


def fusion_settings(problem: ConvProblem, arrays: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments for what a problem of `with_fusion` fuses, with these arrays."""
    return {**problem.fuses.as_arguments(arrays), RESIDUAL: arrays.get(RESIDUAL)}


def impulse_data(problem: ConvProblem, seed: int) -> Data:
    """An input of one unit impulse per sample and group, at random positions: the output consists of exact weights.

    The weight is normal, the bias zero. float32 weights have 22 significant bits, TF32 weights 11: tensor cores take a
    float32 number as at most two TF32 numbers of 11 bits.
    """
    p = problem
    rng = _generator(p, seed)
    x = np.zeros((p.N, p.groups, p.C_in_g, p.L_in))
    if x.size:
        n, g = np.ogrid[: p.N, : p.groups]
        shape = (p.N, p.groups)
        x[n, g, rng.integers(p.C_in_g, size=shape), rng.integers(p.L_in, size=shape)] = 1
    weight = _normal(p, rng, p.weight_shape)
    if p.dtype == "float32":
        bits = 11 if p.precision == "tf32" else 22
        significand, exponent = np.frexp(weight)
        weight = np.ldexp(np.round(np.ldexp(significand, bits)), exponent - bits)
    return _as_dtype(p, x.reshape(p.input_shape), weight, np.zeros(p.C_out) if p.has_bias else None)


def _generator(problem: ConvProblem, seed: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(repr(problem).encode()), seed % 2**32])


def _integers(rng: np.random.Generator, shape: tuple[int, ...], limit: int, dtype: str) -> Array:
    """Integers of magnitude 1 to `limit`; complex ones have such real and imaginary parts."""

    def draw() -> Array:
        return np.asarray(rng.integers(1, limit, size=shape, endpoint=True) * rng.choice((-1.0, 1.0), size=shape))

    return np.asarray(draw() + 1j * draw()) if dtype.startswith("complex") else draw()


def _set_ends(rng: np.random.Generator, array: Array, value: float) -> None:
    """Write a value to the first element of one row along the last axis, and to the last one of another row if any."""
    rows = array.reshape(-1, array.shape[-1]) if array.size else array
    if rows.size:
        order = rng.permutation(len(rows))
        rows[order[0], 0] = rows[order[-1], -1] = value


def _normal(problem: ConvProblem, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    values = rng.standard_normal(shape)
    return np.asarray(values + 1j * rng.standard_normal(shape)) if problem.is_complex else values


def _ill_scaled(problem: ConvProblem, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    # Each product is below 4 * 2**(2*highest), a complex one below twice that; `room` bits keep their sum finite.
    low, top = (-8, 15) if problem.dtype == "float16" else (-60, 126)
    room = math.ceil(math.log2(max(problem.terms, 1) + 1)) + 3
    highest = min(-low, (top - room) // 2)

    def draw() -> Array:
        magnitudes = rng.uniform(1, 2, shape) * 2.0 ** rng.integers(low, highest, size=shape)
        return np.asarray(magnitudes * rng.choice((-1.0, 1.0), size=shape))

    return np.asarray(draw() + 1j * draw()) if problem.is_complex else draw()


def _phases(problem: ConvProblem) -> Iterator[slice]:
    """The sets of taps that contribute to one output element: all taps, or where transposed those of one phase."""
    p = problem
    step = p.stride // math.gcd(p.stride, p.dilation) if p.transposed else 1
    return (slice(first, None, step) for first in range(min(step, p.K)))


def _sparse(problem: ConvProblem, rng: np.random.Generator, count: int) -> Array | None:
    """A mask (C_out, C_in/groups, K) that keeps `count` of the taps of each output element; None keeps all."""
    p = problem
    if p.terms <= count:
        return None
    count //= p.most_positions if p.transposed else 1
    kept = np.zeros((p.C_out, p.C_in_g, p.K), bool)
    for phase in _phases(p):
        part = kept[..., phase]
        order = rng.random((p.C_out, part.shape[1] * part.shape[2])).argsort(axis=1)
        part[...] = (order < count).reshape(part.shape)
    return kept


def _as_weight(problem: ConvProblem, taps: Array) -> Array:
    """Taps (C_out, C_in/groups, K) in the axis order of the problem's weight."""
    p = problem
    if not p.transposed:
        return taps
    by_group = taps.reshape(p.groups, p.C_out_g, p.C_in_g, p.K).swapaxes(1, 2)
    return np.asarray(by_group.reshape(p.weight_shape))


def _as_dtype(problem: ConvProblem, input: Array, weight: Array, bias: Array | None) -> Data:
    dtype = numpy_dtype(problem.dtype)
    return Data(
        input.astype(dtype, order="C"),
        weight.astype(dtype, order="C"),
        None if bias is None else bias.astype(dtype),
    )
