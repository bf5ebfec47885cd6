"""gpuconv.dask beside one call on the whole: random problems and chunks, what is lazy, and a worker that is killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest

import gpuconv
import gpuconv.dask
from gpuconv.problem import numpy_dtype

from .test_chunked import draw, is_within_bound, one_call_on_a_gpu, problem_of, random_call, random_lengths

COUNT = 100  # random problems
Array = np.ndarray[Any, Any]


def random_chunks(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Up to six cuts along each axis, some in the same place: chunks may be smaller than a window, or empty."""
    cuts = (sorted(rng.integers(0, extent + 1, rng.integers(7) if extent > 1 else 0)) for extent in shape)
    return tuple(tuple(np.diff([0, *places, extent]).tolist()) for places, extent in zip(cuts, shape, strict=True))


def in_chunks(rng: np.random.Generator, array: Any) -> Any:
    return da.from_array(array, chunks=random_chunks(rng, array.shape))


def as_promised(block: Any, block_info: Any = None) -> Any:
    """A chunk, which must have the shape and the dtype that the lazy array says."""
    assert block.shape == tuple(stop - start for start, stop in block_info[0]["array-location"])
    assert block.dtype == block_info[None]["dtype"]
    return block


def compare_random_calls(device: str, count: int, dtypes: tuple[str, ...]) -> None:
    """Random calls in random chunks: on a GPU with the bits of one call, on the CPU within the bound."""
    rng = np.random.default_rng(21)
    for number in range(count):
        op, arrays, settings = random_call(rng, dtypes)
        p, _, _ = problem_of(op, arrays, settings)
        x, *parameters = arrays.values()
        dtype = numpy_dtype(p.dtype) if p.out_dtype is None else np.dtype(p.out_dtype)
        dtype = x.dtype if x.dtype.kind == "c" else dtype
        if dtype.kind != "i" and rng.random() < 0.3:
            settings["residual"] = draw(rng, p.output_shape, dtype.name)
        if rng.random() < 0.4:
            settings["lengths"] = random_lengths(rng, p, x)

        def there(array: Any) -> Any:
            if device == "cpu" or array is None:
                return array
            import cupy

            return cupy.asarray(array)

        def given(array: Any, *, may_be_numpy: bool = True) -> Any:
            """A dask array, an array of the kind of the input's chunks, or a NumPy array, at random."""
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
        found = y.map_blocks(as_promised, dtype=dtype, meta=y._meta).compute(
            scheduler="threads" if number % 2 else "sync"
        )
        assert type(found) is type(y._meta)
        if device == "cpu":
            assert is_within_bound(op, arrays, settings, found), words
            continue
        expected = one_call_on_a_gpu(op, (x, *parameters), settings)
        np.testing.assert_array_equal(found.get().view(np.uint8), expected.view(np.uint8), words)


def test_random_problems_in_chunks() -> None:
    compare_random_calls("cpu", COUNT, ("float32", "float64", "bfloat16", "complex64", "int16"))


@pytest.mark.gpu
def test_random_problems_in_chunks_on_a_gpu(launched: list[str]) -> None:
    """Every chunk has the bits of one call, on tensor cores, too."""
    compare_random_calls("gpu", 5, ("float32", "float16", "complex64"))
    assert {"conv1d_mma", "conv_transpose1d_mma"} & set(launched)
    assert len(set(launched)) > 3


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    """In the end each input chunk is computed once, and a task gets only the samples that it needs of others."""
    computed: Counter[tuple[int, ...]] = Counter()

    def block(value: Any, block_info: Any = None) -> Any:
        computed[block_info[0]["chunk-location"]] += 1
        return value

    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((2, 4, 100)), rng.standard_normal((5, 4, 9))
    chunks = ((1, 1), (4,), (30, 30, 40))
    lazy = da.from_array(x, chunks=chunks).map_blocks(block, dtype=x.dtype, meta=np.empty((0, 0, 0)))
    lazy_w = da.from_array(w, chunks=2).map_blocks(block, dtype=w.dtype, meta=np.empty((0, 0, 0)))
    y = gpuconv.dask.conv1d(lazy, lazy_w, padding="same", residual=gpuconv.dask.conv1d(lazy, lazy_w, padding="same"))
    assert y.chunks == ((1, 1), (5,), (30, 30, 40))
    assert not computed
    found = y.compute(scheduler="sync")
    assert computed.pop((0, 0, 0)) == 2  # of the input and the weight
    assert set(computed.values()) <= {1, 2}
    expected = gpuconv.conv1d(x, w, padding="same", residual=gpuconv.conv1d(x, w, padding="same"))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)

    z = gpuconv.dask.conv1d(lazy, w, padding="same")
    slices = [key for key in z.dask if isinstance(key, tuple) and key[0].startswith("conv1d-slice-")]
    assert Counter(key[1] for key in slices) == {0: 4, 1: 4}
    assert {key[-1] - key[-2] for key in slices} == {4}
    again = gpuconv.dask.conv1d(lazy, w.copy(), padding="same")
    assert again.name == z.name
    assert len({z.name, *(gpuconv.dask.conv1d(lazy, w, **other).name for other in (
        {"padding": "causal"}, {"padding": "same", "activation": "relu"}, {"padding": "same", "algorithm": "base"},
        {"padding": "same", "bias": np.ones(5)}))}) == 5  # fmt: skip


def test_lengths_are_part_of_the_name() -> None:
    """A chunk may also have samples of several lengths, some of which have no outputs in it."""
    x = np.random.default_rng(4).standard_normal((5, 2, 40))
    lazy, w = da.from_array(x, chunks=(4, 2, 10)), np.ones((3, 2, 3))
    for lengths in ([40, 40, 7, 0, 3], [40, 40, 7, 0, 40]):
        y = gpuconv.dask.conv1d(lazy, w, stride=2, padding="same", lengths=np.array(lengths))
        expected = gpuconv.conv1d(x, w, stride=2, padding="same", lengths=lengths)
        np.testing.assert_allclose(y.compute(), expected, rtol=1e-12)
    assert y.name == gpuconv.dask.conv1d(lazy, w, stride=2, padding="same", lengths=lengths).name
    names = {gpuconv.dask.conv1d(lazy, w, stride=2, padding=(0, 1), lengths=n).name for n in (lengths, [40] * 5, None)}
    assert len({*names, y.name}) == 4
    with pytest.raises(ValueError, match=r"^conv1d: lengths must be from 0 to L_in = 40, got lengths\[4\] = 41"):
        gpuconv.dask.conv1d(lazy, w, lengths=[0, 0, 0, 0, 41])


def test_extents_of_zero() -> None:
    w = np.ones((3, 2, 2))
    for shape, chunks in (((0, 2, 10), (1, 1, 5)), ((0, 2, 10), ((0, 0), (2,), (0, 10)))):
        y = gpuconv.dask.conv1d(da.zeros(shape, chunks=chunks), w)
        assert y.compute(scheduler="sync").shape == y.shape == (0, 3, 9)
    of_no_channels = gpuconv.dask.conv1d(da.zeros((2, 0, 10), chunks=3), np.ones((3, 0, 2)), np.arange(3.0))
    np.testing.assert_array_equal(of_no_channels.compute(scheduler="sync")[1, :, 4], [0, 1, 2])
    assert gpuconv.dask.conv1d(da.zeros((2, 9), chunks=3), np.ones((0, 2, 2))).compute(scheduler="sync").shape == (0, 8)
    # Without samples there is still padding, and what output_padding adds.
    y = gpuconv.dask.conv1d(da.zeros((2, 0), chunks=3), w, np.arange(3.0), padding=2)
    np.testing.assert_array_equal(y.compute(scheduler="sync"), np.arange(3.0)[:, None] * np.ones(3))
    t = gpuconv.dask.conv_transpose1d(da.zeros((2, 0), chunks=1), np.ones((2, 3, 9)), np.arange(3.0), stride=2)
    np.testing.assert_array_equal(t.compute(scheduler="sync"), np.arange(3.0)[:, None] * np.ones(7))


def test_what_cannot_be_is_refused_by_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> Any:
        raise AssertionError("computed")

    x = da.zeros((2, 3, 100), chunks=40).map_blocks(fail, meta=np.empty((0, 0, 0)))
    w = np.ones((4, 3, 9))

    def refusal(kind: type[Exception], **changed: Any) -> str:
        with pytest.raises(kind) as refused:
            gpuconv.dask.conv1d(**{"input": x, "weight": w, **changed})
        return str(refused.value)

    assert refusal(TypeError, input=np.ones((2, 3, 100))) == (
        "conv1d: input must be a dask array, got ndarray; dask.array.from_array(input) makes one"
    )
    unknown = x[x[:, 0, 0] > 0]
    assert refusal(ValueError, input=unknown) == (
        "conv1d: input must have chunks of known sizes, got shape (nan, 3, 100); input.compute_chunk_sizes() finds them"
    )
    assert refusal(ValueError, residual=unknown).startswith("conv1d: residual must have chunks of known sizes, got")
    masked = x.map_blocks(fail, meta=np.ma.empty((0, 0, 0)))
    assert refusal(TypeError, input=masked) == "conv1d: input must be a NumPy or CuPy array, got MaskedArray"
    assert refusal(TypeError, weight=w.tolist()).startswith("conv1d: weight must be a NumPy or CuPy array, got list; p")
    assert refusal(TypeError, weight=None) == "conv1d: weight must be a NumPy or CuPy array, got NoneType"
    assert refusal(ValueError, algorithm="nothing").startswith("conv1d: algorithm must be None or one of base, ")
    assert refusal(ValueError, padding_mode="wrap").startswith('conv1d: padding_mode must be one of "zeros", ')
    # The words of one call, which sees shapes and dtypes alone.
    given: dict[str, Any]
    for given in (
        {"weight": w[:, :2]}, {"bias": np.ones(3)}, {"stride": 0}, {"padding": "full"}, {"groups": 2},
        {"weight": w.astype("f4")}, {"residual": np.ones((2, 4, 91))}, {"activation": "swish"}, {"padding": 1.5},
        {"padding": 100, "padding_mode": "reflect"}, {"activation": ("snake", np.ones(3))}, {"precision": "tf32"},
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)) as refused:
            gpuconv.conv1d(**{"input": np.ones((2, 3, 100)), "weight": w, **given})
        assert refusal(type(refused.value), **given) == str(refused.value)
    with pytest.raises(ValueError, match=r"^conv_transpose1d: output_size must be from 108 to 108 for L_in = 100"):
        gpuconv.dask.conv_transpose1d(x, np.ones((3, 1, 9)), output_size=200)
    monkeypatch.setitem(sys.modules, "dask.array", None)
    assert refusal(ImportError).startswith(
        "conv1d: gpuconv.dask needs dask; pip install -e '.[dask]' in a checkout of g"
    )


@pytest.mark.gpu
def test_data_on_a_gpu_need_chunks_there(cupy: Any) -> None:
    x, w = da.zeros((1, 2, 9), chunks=4), np.ones((3, 2, 3))
    with pytest.raises(TypeError, match=r"one kind and on one device, got input as a NumPy array and weight as a CuPy"):
        gpuconv.dask.conv1d(x, cupy.asarray(w))
    values = cupy.arange(18.0).reshape(1, 2, 9)
    on_gpu = da.from_array(values, chunks=4)
    with pytest.raises(TypeError, match=r"got input as a CuPy array on device 0 and residual as a NumPy array"):
        gpuconv.dask.conv1d(on_gpu, w, residual=np.zeros((1, 3, 7)))
    # Weights may be anywhere.
    residual = cupy.ones((1, 3, 7))
    expected = gpuconv.conv1d(values, cupy.asarray(w), residual=residual)
    for weight in (w, cupy.asarray(w), da.from_array(w, chunks=1)):
        y = gpuconv.dask.conv1d(on_gpu, weight, residual=residual)
        np.testing.assert_array_equal(y.compute(scheduler="sync").get(), expected.get())


BEFORE_THE_KILL = 10  # chunks of the input


def logged(block: Array, folder: str, block_info: Any = None) -> Array:
    """A chunk whose computation leaves a line in a log, and waits behind the first ones for a file."""
    log, go_on = Path(folder, "log"), Path(folder, "go on")
    with log.open("a", encoding="utf-8") as lines:
        lines.write(f"{os.getpid()} {block_info[0]['chunk-location']}\n")
    while not go_on.exists() and len(log.read_text().splitlines()) >= BEFORE_THE_KILL:
        time.sleep(0.02)
    return block


def test_a_worker_of_a_cluster_may_be_killed(tmp_path: Path) -> None:
    """Two processes, of which one is killed while it holds chunks that are needed: these are computed again."""
    import distributed

    rng = np.random.default_rng(4)
    x, w = rng.standard_normal((2, 4, 2000)), rng.standard_normal((6, 4, 201))
    log = tmp_path / "log"
    log.touch()
    lazy = da.from_array(x, chunks=(1, 2, 250)).map_blocks(
        logged, str(tmp_path), dtype=x.dtype, meta=np.empty((0, 0, 0))
    )
    y = gpuconv.dask.conv1d(lazy, w, padding="same", padding_mode="circular")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "silence_logs": 50}
    with distributed.LocalCluster(**options, local_directory=str(tmp_path)) as cluster, cluster.get_client() as client:
        pids = list(client.run(os.getpid).values())
        assert len({os.getpid(), *pids}) == 3
        result = client.compute(y, retries=3)
        deadline = time.monotonic() + 60
        while len(lines := log.read_text().splitlines()) < BEFORE_THE_KILL or len({s.split()[0] for s in lines}) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(pids[0], signal.SIGKILL)
        (tmp_path / "go on").touch()
        found = result.result(timeout=60)
    lines = log.read_text().splitlines()
    assert len({line.partition(" ")[2] for line in lines}) == 32
    assert len(lines) > 32  # what the killed worker held was computed again
    expected = gpuconv.conv1d(x, w, padding="same", padding_mode="circular")
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)
