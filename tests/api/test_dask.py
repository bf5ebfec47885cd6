"""gpuconv.dask beside one call on the whole: random problems and chunks, what is lazy, and a worker that is killed."""

from __future__ import annotations

import doctest
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from dask.array.utils import assert_eq

import gpuconv
import gpuconv.dask
from gpuconv import reference
from gpuconv.problem import numpy_dtype

from .test_chunked import draw, one_call_on_a_gpu, problem_of, random_call

COUNT = 100  # random problems
Array = np.ndarray[Any, Any]


def random_chunks(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Up to nine cuts along each axis, some in the same place: chunks may be smaller than a window, or empty."""
    cuts = (sorted(rng.integers(0, extent + 1, rng.integers(10) if extent > 1 else 0)) for extent in shape)
    return tuple(
        tuple(np.diff([0, *places, extent]).tolist()) for places, extent in zip(cuts, shape, strict=True)
    )


def in_chunks(rng: np.random.Generator, array: Any) -> Any:
    return da.from_array(array, chunks=random_chunks(rng, array.shape))


def compare_random_calls(device: str, count: int, dtypes: tuple[str, ...]) -> None:
    """Random calls in random chunks: on a GPU with the bits of one call, on the CPU within the bound."""
    rng = np.random.default_rng(21)
    for number in range(count):
        op, arrays, settings = random_call(rng, dtypes)
        p, of_reference, fused = problem_of(op, arrays, settings)
        x, *parameters = arrays.values()
        dtype = numpy_dtype(p.dtype) if p.out_dtype is None else np.dtype(p.out_dtype)
        dtype = x.dtype if x.dtype.kind == "c" else dtype
        if dtype.kind != "i" and rng.random() < 0.3:
            settings["residual"] = draw(rng, p.output_shape, dtype.name)
            p, of_reference, fused = problem_of(op, arrays, settings)

        def there(array: Any) -> Any:
            if device == "cpu" or array is None:
                return array
            import cupy

            return cupy.asarray(array)

        def given(array: Any, *, may_be_numpy: bool = True) -> Any:
            """Of a dask array, of the kind of the input's chunks, or a NumPy array: one at random."""
            kinds = (lambda: there(array), lambda: in_chunks(rng, there(array)), lambda: array)
            return None if array is None else kinds[rng.integers(3 if may_be_numpy else 2)]()

        lazy = {
            name: (value[0], *map(given, value[1:])) if isinstance(value, tuple) and value[0] == "snake" else value
            for name, value in settings.items()
        }
        if "residual" in settings:
            lazy["residual"] = given(settings["residual"], may_be_numpy=False)
        given_x = in_chunks(rng, there(x))
        y = getattr(gpuconv.dask, op)(given_x, *map(given, parameters), **lazy)

        words = f"{number}: {op} {settings} {given_x.chunks}"
        assert y.shape == p.output_shape, words
        assert y.dtype == dtype, words
        assert type(y._meta) is type(given_x._meta)
        assert y.chunks[:-2] == given_x.chunks[:-2]
        assert y.numblocks[-2] == 1
        assert 0 not in y.chunks[-1]
        options: dict[str, Any] = {"scheduler": "threads" if number % 2 else "sync", "num_workers": 2}
        with dask.config.set(options):
            (parts,) = dask.compute(y.to_delayed().tolist())
            found = y.compute()
        assert type(found) is type(y._meta)
        for index in np.ndindex(y.numblocks):
            part = parts
            for i in index:
                part = part[i]
            assert part.shape == y.blocks[index].shape, words
            assert part.dtype == dtype, words
        if device == "cpu":
            assert reference.within_bound(p, found, *of_reference, fused).all(), words
            continue
        expected = one_call_on_a_gpu(op, (x, *parameters), settings)
        np.testing.assert_array_equal(found.get().view(np.uint8), expected.view(np.uint8), words)


def test_random_problems_in_chunks() -> None:
    compare_random_calls("cpu", COUNT, ("float32", "float64", "bfloat16", "complex64", "int16"))


@pytest.mark.gpu
def test_random_problems_in_chunks_on_a_gpu(launched: list[str]) -> None:
    """Every chunk has the bits of one call, on tensor cores, too."""
    compare_random_calls("gpu", 9, ("float32", "float16", "complex64"))
    assert {"conv1d_mma", "conv_transpose1d_mma"} & set(launched)
    assert len(set(launched)) > 3
