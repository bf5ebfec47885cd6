"""Prepared weights: packed once, the same bits, no stale buffers."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import calls, nn, runtime, stream
from gpuconv.families import Config, Launch, Step
from gpuconv.runtime import PreparedWeight

LAYERS = {
    # op, input, weight, settings; the first four are packed by a launch, the next two by the blocks that multiply.
    "mma": ("conv1d", (2, 25, 40), (20, 25, 3), {"padding": 1}),
    "mma phases": ("conv_transpose1d", (2, 40, 20), (40, 13, 3), {"stride": 2}),
    "tiled": ("conv1d", (2, 5, 40), (12, 5, 3), {"padding": 1}),
    "phases": ("conv_transpose1d", (2, 5, 20), (5, 12, 4), {"stride": 2}),
    "mma in blocks": ("conv1d", (2, 24, 40), (20, 24, 3), {"padding": 1}),
    "mma phases in blocks": ("conv_transpose1d", (2, 40, 20), (40, 12, 4), {"stride": 2}),
    "direct": ("conv1d", (2, 2, 9), (5, 2, 2), {}),
    "gather": ("conv_transpose1d", (2, 2, 9), (2, 5, 2), {}),
}


def arrays(name: str) -> tuple[str, np.ndarray, np.ndarray, dict[str, int]]:
    op, input_shape, weight_shape, settings = LAYERS[name]
    rng = np.random.default_rng(7)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in (input_shape, weight_shape))
    return op, x, w, settings


PACKS = ("pack_weight", "pack_mma_weight")


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_the_bits_are_those_of_the_plain_weight(cupy: Any, name: str) -> None:
    op, x, w, settings = arrays(name)
    function = getattr(gpuconv, op)
    x_gpu, w_gpu = cupy.asarray(x), cupy.asarray(w)
    expected = function(x_gpu, w_gpu, **settings).get()
    prepared = gpuconv.prepare(w_gpu)
    for _ in range(2):
        assert function(x_gpu, prepared, **settings).get().tobytes() == expected.tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mma", "mma phases", "tiled", "phases"])
def test_a_prepared_weight_is_packed_once(cupy: Any, launched: list[str], name: str) -> None:
    op, x, w, settings = arrays(name)
    function = getattr(gpuconv, op)
    x_gpu, w_gpu = cupy.asarray(x), cupy.asarray(w)
    function(x_gpu, w_gpu, **settings)
    function(x_gpu, w_gpu, **settings)
    assert sum(kernel in PACKS for kernel in launched) == 2
    prepared = gpuconv.prepare(w_gpu)
    launched.clear()
    for samples in (2, 1, 2):
        function(x_gpu[:samples], prepared, **settings)
    assert sum(kernel in PACKS for kernel in launched) == 1


@pytest.mark.gpu
def test_each_precision_has_a_packed_weight_of_its_own(cupy: Any) -> None:
    if int(cupy.cuda.Device().compute_capability) < 80:
        pytest.skip("no TF32 here")
    _, x, w, settings = arrays("mma")
    x_gpu, w_gpu = cupy.asarray(x), cupy.asarray(w)
    prepared = gpuconv.prepare(w_gpu)
    found = {}
    for precision in ("tf32", "float32", "tf32"):
        y = gpuconv.conv1d(x_gpu, prepared, precision=precision, **settings).get()
        assert y.tobytes() == gpuconv.conv1d(x_gpu, w_gpu, precision=precision, **settings).get().tobytes()
        found[precision] = y
    assert 2.0**-16 < np.abs(found["tf32"] - found["float32"]).max() < 2.0**-5


def test_keys_of_packed_weights_are_shared_and_bounded() -> None:
    def step(n: int) -> Step:
        launch = Launch(grid=1, block=32, shared_bytes=0, index_bits=32, params=(("N", n),))
        return Step(Config("pack_weight", ()), launch, ("weight", "packed"))

    most = runtime.prepared._shared.cache_info().maxsize
    assert most is not None
    first = runtime.prepared._shared(step(0))
    assert runtime.prepared._shared(step(0)) is first
    for n in range(most + 1):
        runtime.prepared._shared(step(n))
    assert runtime.prepared._shared.cache_info().currsize == most


@pytest.mark.gpu
def test_a_prepared_weight_keeps_its_keys(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds packed weights by the identity of a key, which nothing else may have as long as the weight lives."""

    class Key:
        """A key of a plan that is soon forgotten."""

    keys: list[weakref.ref[Key]] = []

    def forgotten(_: Step) -> Key:
        key = Key()
        keys.append(weakref.ref(key))
        return key

    _, x, w, settings = arrays("mma")
    x_gpu, prepared = cupy.asarray(x), gpuconv.prepare(cupy.asarray(w))
    expected = gpuconv.conv1d(x_gpu, prepared, **settings).get()
    monkeypatch.setattr(runtime.prepared, "_shared", forgotten)
    for _ in range(3):
        calls._EXECUTORS.clear()
        np.testing.assert_array_equal(gpuconv.conv1d(x_gpu, prepared, **settings).get(), expected)
    calls._EXECUTORS.clear()
    gc.collect()
    assert [key() is not None for key in keys] == [True] * 3


@pytest.mark.gpu
def test_later_changes_of_the_array_are_not_followed(cupy: Any) -> None:
    _, x, w, settings = arrays("tiled")
    x_gpu, w_gpu = cupy.asarray(x), cupy.asarray(w.copy())
    prepared = gpuconv.prepare(w_gpu)
    before = gpuconv.conv1d(x_gpu, prepared, **settings).get()
    w_gpu[...] = 0
    assert np.array_equal(gpuconv.conv1d(x_gpu, prepared, **settings).get(), before)
    assert not gpuconv.conv1d(x_gpu, w_gpu, **settings).get().any()


def test_numpy_weights() -> None:
    _, x, w, settings = arrays("tiled")
    prepared = gpuconv.prepare(w)
    assert (prepared.shape, prepared.dtype) == (w.shape, w.dtype)
    expected = gpuconv.conv1d(x, w, **settings)
    assert np.array_equal(gpuconv.conv1d(x, prepared, **settings), expected)
    w[...] = 0
    assert np.array_equal(gpuconv.conv1d(x, prepared, **settings), expected)
    assert repr(prepared) == "PreparedWeight(shape=(12, 5, 3), dtype=float32)"


def test_errors_are_those_of_the_weight() -> None:
    _, x, w, _ = arrays("tiled")
    with pytest.raises(TypeError, match="prepare: weight must be a NumPy or CuPy array, got list"):
        gpuconv.prepare([1.0])
    with pytest.raises(ValueError, match="weight must have shape"):
        gpuconv.conv1d(x, gpuconv.prepare(w[0]))
    prepared = gpuconv.prepare(np.ones((1, 1, 3)))
    with pytest.raises(ValueError, match="out must not overlap weight"):
        gpuconv.conv1d(np.ones((1, 1, 5)), prepared, out=prepared.array)


@pytest.mark.gpu
def test_an_input_elsewhere_is_refused(cupy: Any) -> None:
    _, x, w, _ = arrays("tiled")
    with pytest.raises(TypeError, match="one kind and on one device"):
        gpuconv.conv1d(x, gpuconv.prepare(cupy.asarray(w)))


def test_layers_take_plain_weights_only() -> None:
    layer = nn.Conv1d(2, 3, 1)
    assert not isinstance(layer.weight, PreparedWeight)


DUPLICATES = [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))]


@pytest.mark.gpu
@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_prepared_weights_are_copied_and_pickled(cupy: Any, duplicate: Callable[[Any], Any]) -> None:
    _, x, w, settings = arrays("mma")
    x_gpu = cupy.asarray(x)
    prepared = gpuconv.prepare(cupy.asarray(w))
    expected = gpuconv.conv1d(x_gpu, prepared, **settings).get()  # from here on it holds a packed form
    found = duplicate(prepared)
    assert isinstance(found, PreparedWeight)
    assert (found.shape, found.dtype) == (prepared.shape, prepared.dtype)
    assert np.array_equal(gpuconv.conv1d(x_gpu, found, **settings).get(), expected)


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_layers_that_hold_a_prepared_weight_are_copied_and_pickled(duplicate: Callable[[Any], Any]) -> None:
    _, x, w, _ = arrays("mma")
    layer = nn.Conv1d(24, 20, 3, padding=1, bias=False)
    layer.weight = gpuconv.prepare(w)
    found = duplicate(layer)
    assert isinstance(found.weight, PreparedWeight)
    assert np.array_equal(found(x), layer(x))


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_copies_stay_on_their_gpu_and_pickles_follow_cupy(cupy: Any, duplicate: Callable[[Any], Any]) -> None:
    """A pickle is loaded onto the current GPU, as those of CuPy's arrays are, so all of one pickle is on one GPU."""
    _, x, w, _ = arrays("mma in blocks")
    with cupy.cuda.Device(1):
        layer = nn.Conv1d(24, 20, 3, activation=("snake", cupy.ones(20, np.float32)), device="cuda", rng=0)
        layer.weight = gpuconv.prepare(cupy.asarray(w))
        streaming = stream.Conv1d(layer.weight, padding="causal", slots=2)
        data = cupy.asarray(x)
        expected = layer(data).get()
        streaming.push(data)
        wanted = streaming.clone().push(data).get()
    if duplicate is copy.copy:
        found, following, given = copy.copy(layer), copy.copy(streaming), data
    else:
        found, following, given = duplicate((layer, streaming, data))
    expected_gpu = 1 if duplicate in (copy.copy, copy.deepcopy) else 0
    assert {a.data.device_id for a in (*found.state_dict().values(), given)} == {expected_gpu}
    assert found(given).data.device_id == expected_gpu
    assert np.array_equal(found(given).get(), expected)
    assert np.array_equal(following.push(given).get(), wanted)


def test_a_layer_keeps_its_prepared_weight_up_to_date() -> None:
    _, x, w, _ = arrays("mma")
    layer = nn.Conv1d(24, 20, 3, bias=False)
    layer.weight = gpuconv.prepare(w)
    assert np.array_equal(layer.state_dict()["weight"], w)
    kept = layer.weight
    assert layer.to(dtype="float32").weight is kept
    layer.to(dtype="float64")
    assert isinstance(layer.weight, PreparedWeight)
    assert layer(x.astype(np.float64)).dtype == np.float64
    layer.load_state_dict({"weight": 2 * w})
    assert isinstance(layer.weight, PreparedWeight)
    wide = x.astype(np.float64)
    assert np.array_equal(layer(wide), gpuconv.conv1d(wide, 2 * w.astype(np.float64)))
