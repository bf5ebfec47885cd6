"""gpuconv.chunked beside one call on the whole: random problems, kills, journals, and what is refused."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import calls, chunked, reference
from gpuconv.edge import PADDING_MODES
from gpuconv.fusion import Fused
from gpuconv.journal import Journal, JournalError
from gpuconv.problem import ConvProblem, Op, numpy_dtype

COUNT = 150  # random problems
Array = np.ndarray[Any, Any]


class Slices:
    """An array that gives and takes slices alone, as zarr's and h5py's do, and nothing else of NumPy's."""

    def __init__(self, array: Array) -> None:
        self._array = array
        self.most = 0  # elements in one slice

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> Any:
        return self._array.dtype

    def _check(self, key: Any) -> None:
        assert len(key) == self._array.ndim
        for part, extent in zip(key, self.shape, strict=True):
            assert type(part) is slice
            assert part.step is None
            assert 0 <= part.start <= part.stop <= extent

    def __getitem__(self, key: Any) -> Array:
        self._check(key)
        block = self._array[key].copy()
        self.most = max(self.most, block.size)
        return block

    def __setitem__(self, key: Any, value: Array) -> None:
        self._check(key)
        self._array[key] = value


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    if dtype == "int16":
        return rng.integers(-99, 100, shape).astype(dtype)
    values = rng.standard_normal(shape)
    return np.asarray(values + 1j * rng.standard_normal(shape) if dtype[0] == "c" else values, numpy_dtype(dtype))


def random_call(
    rng: np.random.Generator, dtypes: tuple[str, ...]
) -> tuple[Op, dict[str, Array | None], dict[str, Any]]:
    """An operation, its arrays by name, and its settings; often in several channels, for tensor cores."""
    op: Op = "conv1d" if rng.random() < 0.6 else "conv_transpose1d"
    dtype = str(rng.choice(dtypes))
    stride, dilation, K = (int(rng.integers(1, n)) for n in (5, 4, 8))
    groups, C_in_g, C_out_g = (int(n) for n in ((1, 16, 16) if rng.random() < 0.2 else rng.integers(1, 4, 3)))
    span, L = dilation * (K - 1) + 1, int(rng.integers(1, 80))
    settings: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
    settings["padding"] = [int(rng.integers(0, 9)), (int(rng.integers(9)), int(rng.integers(9))), "same", "valid"][
        rng.integers(4)
    ]
    if op == "conv1d":
        settings["padding"] = "causal" if rng.random() < 0.2 else settings["padding"]
        settings["padding_mode"] = str(rng.choice(PADDING_MODES))
        L += span
    elif settings["padding"] != "same":
        settings["output_padding"] = int(rng.integers(max(stride, dilation)))
        L += 17
    shape = (int(rng.integers(1, 4)), groups * C_in_g, L)[int(rng.random() < 0.3) :]
    weight = (groups * C_out_g, C_in_g, K) if op == "conv1d" else (groups * C_in_g, C_out_g, K)
    is_integer = dtype == "int16"
    arrays: dict[str, Array | None] = {"input": draw(rng, shape, dtype), "weight": draw(rng, weight, dtype)}
    if dtype == "complex64" and rng.random() < 0.5:
        arrays["weight"] = draw(rng, weight, "float32")
    has_bias = rng.random() < 0.5
    arrays["bias"] = (
        draw(rng, (groups * C_out_g,), dtype).astype("int64" if is_integer else dtype) if has_bias else None
    )
    if dtype.startswith(("float", "bfloat")) and rng.random() < 0.4:
        alpha = draw(rng, (groups * C_out_g,), dtype)
        settings["activation"] = ["relu", ("leaky_relu", 0.1), ("snake", alpha)][rng.integers(3)]
        settings["input_activation"] = [None, "silu", ("snake", draw(rng, (groups * C_in_g,), dtype))][rng.integers(3)]
    return op, arrays, settings


def smallest(call: Any, limits: Any) -> int:
    """The smallest max_bytes that a call takes, as its error says."""
    with pytest.raises(
        ValueError, match=r"max_bytes must be at least \d+ for the input and the output of one position"
    ):
        call(1)
    try:
        call(1)
    except ValueError as error:
        return int(str(error).split("at least ")[1].split()[0])
    raise AssertionError


def compare_random_calls(device: str, count: int, dtypes: tuple[str, ...]) -> None:
    """Random calls in random pieces: on a GPU with the bits of one call, on the CPU as exact as that."""
    rng = np.random.default_rng(17)
    for number in range(count):
        op, arrays, settings = random_call(rng, dtypes)
        x, weight, bias = arrays.values()
        assert x is not None
        on = (lambda a: a) if device == "cpu" else __import__("cupy").asarray

        def place(value: Any, on: Any = on) -> Any:
            return (value[0], *map(on, value[1:])) if isinstance(value, tuple) and value[0] == "snake" else value

        function = getattr(gpuconv, op)
        moved = [None if a is None else on(a) for a in (x, weight, bias)]
        there = {name: place(value) for name, value in settings.items()}
        expected = function(*moved, **there)
        if expected.dtype.kind in "fc" and rng.random() < 0.3:
            settings["residual"] = Slices(draw(rng, expected.shape, expected.dtype.name))
            expected = function(*moved, **there, residual=on(settings["residual"]._array))
        if device == "gpu":
            expected = expected.get()
        source, target = Slices(x), Slices(np.full(expected.shape, 7, expected.dtype))

        def call(max_bytes: int, op: str = op, source: Any = source, weight: Any = weight, bias: Any = bias,
                 settings: Any = settings, target: Any = target) -> Any:  # fmt: skip
            return getattr(chunked, op)(
                source, weight, bias, **settings, out=target, max_bytes=max_bytes, device=device
            )

        least = smallest(call, None)
        assert call(int(least * rng.choice((1, 1.3, 3, 20)))) is target
        if device == "gpu" or expected.dtype.kind == "i":
            np.testing.assert_array_equal(target._array.view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))
            continue
        scale = 2.0 * np.finfo(expected.dtype).eps if expected.dtype.kind in "fc" else 2.0**-7
        wide = np.float64 if expected.dtype.kind != "c" else np.complex128
        np.testing.assert_allclose(
            target._array.astype(wide), expected.astype(wide), rtol=0,
            atol=scale * 40 * (1 + np.abs(expected.astype(wide)).max(initial=0)), err_msg=f"{number} {op} {settings}",
        )  # fmt: skip


def test_random_problems_in_pieces() -> None:
    compare_random_calls("cpu", COUNT, ("float32", "float64", "bfloat16", "complex64", "int16"))
