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
from gpuconv import chunked, reference
from gpuconv.edge import PADDING_MODES
from gpuconv.fusion import FUSED_ARRAYS, Fused
from gpuconv.journal import Journal, JournalError
from gpuconv.problem import ConvProblem, Op, numpy_dtype

COUNT = 150  # random problems
Array = np.ndarray[Any, Any]


class Slices:
    """An array that gives and takes slices alone, as zarr's and h5py's do, and nothing else of NumPy's."""

    def __init__(self, array: Any) -> None:
        self.array: Array = array
        self.most = 0  # elements in one slice

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def _check(self, key: Any) -> None:
        assert len(key) == self.array.ndim
        for part, extent in zip(key, self.shape, strict=True):
            assert type(part) is slice
            assert part.step is None
            assert 0 <= part.start <= part.stop <= extent

    def __getitem__(self, key: Any) -> Array:
        self._check(key)
        block = self.array[key].copy()
        self.most = max(self.most, block.size)
        return block

    def __setitem__(self, key: Any, value: Array) -> None:
        self._check(key)
        self.array[key] = value


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
        L += span + 9
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


def problem_of(op: Op, arrays: dict[str, Array | None], settings: dict[str, Any]) -> tuple[ConvProblem, Any, Any]:
    """The problem of a call, its arrays for `gpuconv.reference`, and those of what is fused."""
    x, weight, bias = arrays.values()
    assert x is not None
    assert weight is not None
    plain = {
        name: value for name, value in settings.items() if name not in ("activation", "input_activation", "residual")
    }
    fused = Fused.check(op, *(settings.get(name) for name in ("activation", "input_activation", "residual")))
    weight = weight if weight.dtype == "float32" and x.dtype != "complex64" else weight.astype(x.dtype)
    p = ConvProblem.of(op, x, weight, bias, **plain).fused(fused)
    named = {name: a for name, a in zip(FUSED_ARRAYS, fused.arrays, strict=True) if a is not None}
    return p, (x, weight, bias), named


def compare_random_calls(device: str, count: int, dtypes: tuple[str, ...]) -> None:
    """Random calls in random pieces: on a GPU with the bits of one call, on the CPU within the bound."""
    rng = np.random.default_rng(17)
    for number in range(count):
        op, arrays, settings = random_call(rng, dtypes)
        x, weight, bias = arrays.values()
        p, of_reference, fused = problem_of(op, arrays, settings)
        out_dtype = numpy_dtype(p.dtype) if p.out_dtype is None else np.dtype(p.out_dtype)
        if out_dtype.kind != "i" and rng.random() < 0.3:
            settings["residual"] = draw(rng, p.output_shape, out_dtype.name)
            p, of_reference, fused = problem_of(op, arrays, settings)
        source, target = Slices(x), Slices(np.full(p.output_shape, 7, out_dtype))
        sources = {**settings, "residual": Slices(settings["residual"])} if "residual" in settings else settings

        def call(max_bytes: int) -> Any:
            return getattr(chunked, op)(  # noqa: B023 (called in this turn of the loop)
                source,
                weight,
                bias,
                **sources,
                out=target,
                max_bytes=max_bytes,
                device=device,  # noqa: B023
            )

        with pytest.raises(ValueError, match="for the input and the output of one position, got 1$") as refused:
            call(1)
        least = int(str(refused.value).split("at least ")[1].split()[0])
        assert call(int(least * rng.choice((1, 1.3, 3, 20)))) is target
        if device == "cpu":
            assert reference.within_bound(p, target.array, *of_reference, fused).all(), f"{number}: {op} {settings}"
            continue
        expected = one_call_on_a_gpu(op, (x, weight, bias), settings)
        np.testing.assert_array_equal(target.array.view(np.uint8), expected.view(np.uint8), f"{op} {settings}")


def one_call_on_a_gpu(op: Op, arrays: tuple[Any, ...], settings: dict[str, Any]) -> Array:
    import cupy

    def there(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(there, value))
        return cupy.asarray(value) if isinstance(value, np.ndarray) else value

    settings = {name: there(value) for name, value in settings.items()}
    return np.ascontiguousarray(getattr(gpuconv, op)(*map(there, arrays), **settings).get())


def test_random_problems_in_pieces() -> None:
    compare_random_calls("cpu", COUNT, ("float32", "float64", "bfloat16", "complex64", "int16"))


@pytest.mark.gpu
@pytest.mark.usefixtures("cupy")
def test_random_problems_in_pieces_on_a_gpu() -> None:
    """Every piece has the bits of one call, on tensor cores, too."""
    compare_random_calls("gpu", 16, ("float32", "float16", "complex64", "int16"))
