"""Streams give what one call on the whole signal gives, however the signal is cut."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import gpuconv
from gpuconv import nn, reference, runtime, stream
from gpuconv.problem import ConvProblem, Op
from tests.api.test_runtime_cupy import shifted
from tests.conftest import Launches

COUNT = 300  # random streams of each operation
OPS: tuple[Op, ...] = ("conv1d", "conv_transpose1d")
STREAMS: dict[Op, Any] = {"conv1d": stream.Conv1d, "conv_transpose1d": stream.ConvTranspose1d}


class Layer(NamedTuple):
    op: Op
    weight: Any
    bias: Any
    settings: dict[str, Any]

    def stream(self, slots: int = 1, put: Any = lambda array: array) -> Any:
        bias = None if self.bias is None else put(self.bias)
        return STREAMS[self.op](put(self.weight), bias, **self.settings, slots=slots)

    def whole(self, x: Any, put: Any = lambda array: array) -> Any:
        """One call; nothing where it is refused because there is no output."""
        bias = None if self.bias is None else put(self.bias)
        try:
            return getattr(gpuconv, self.op)(put(x), put(self.weight), bias, **self.settings)
        except ValueError:
            groups = self.settings["groups"]
            C_out = self.weight.shape[0] if self.op == "conv1d" else self.weight.shape[1] * groups
            return put(np.empty((*x.shape[:-2], C_out, 0), x.dtype))


def random_layer(rng: np.random.Generator, op: Op, dtype: str = "float64") -> Layer:
    K, stride, dilation, groups = (int(rng.integers(1, top)) for top in (8, 6, 5, 3))
    any_sides = [0, "valid", int(rng.integers(0, 8)), tuple(int(side) for side in rng.integers(0, 12, 2))]
    settings: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
    if op == "conv1d":
        words = ["causal", *(["same"] if stride == 1 else [])]
        settings["padding"] = rng.choice(np.array([*any_sides, *words], object))
    else:
        settings["padding"] = rng.choice(np.array([*any_sides, "same"], object))
        if settings["padding"] != "same":
            settings["output_padding"] = int(rng.integers(0, max(stride, dilation)))
    weight = rng.standard_normal((3 * groups, 2, K) if op == "conv1d" else (2 * groups, 3, K)).astype(dtype)
    bias = rng.standard_normal(3 * groups).astype(dtype) if rng.random() < 0.5 else None
    return Layer(op, weight, bias, settings)


def in_pieces(rng: np.random.Generator, s: Any, x: Any, put: Any = lambda array: array) -> tuple[list[Any], Any]:
    """The outputs of pushes of random lengths, some empty, through states and clones; and the stream."""
    parts, start = [], 0
    while start < x.shape[-1]:
        stop = start + int(rng.integers(0, 9))
        parts.append(s.push(put(x[..., start:stop])))
        start = stop
        if rng.random() < 0.2:
            state, s = s.state(), s.clone()
            s.reset()
            s.load_state(state)
    return parts, s


@pytest.mark.parametrize("op", OPS)
def test_random_streams(op: Op) -> None:
    rng = np.random.default_rng(OPS.index(op))
    for _ in range(COUNT):
        layer, slots = random_layer(rng, op), int(rng.integers(1, 4))
        x = rng.standard_normal((slots, layer.stream()._channels, int(rng.integers(1, 40))))
        expected = layer.whole(x)
        s = layer.stream(slots)
        for _ in range(2):  # the second time after a flush
            parts, s = in_pieces(rng, s, x)
            output = np.concatenate([*parts, s.flush()], axis=-1)
            assert output.shape == expected.shape, layer
            if expected.size:
                p = getattr(ConvProblem, op)(x, layer.weight, layer.bias, **layer.settings)
                assert reference.within_bound(p, output, x, layer.weight, layer.bias).all(), layer


def test_outputs_come_as_soon_as_they_are_complete() -> None:
    """Each push of one sample gives what the whole so far has for certain."""
    s = stream.Conv1d(np.ones((1, 1, 3)), padding=1, stride=2)
    assert [s.push(np.ones((1, 1))).shape[-1] for _ in range(6)] == [0, 1, 0, 1, 0, 1]
    assert s.flush().shape[-1] == 0
    t = stream.ConvTranspose1d(np.ones((1, 1, 5)), stride=2)
    assert [t.push(np.ones((1, 1))).shape[-1] for _ in range(4)] == [2, 2, 2, 2]
    assert t.flush().shape[-1] == 3


def test_memory_follows_from_the_layer() -> None:
    s, t = stream.Conv1d(np.ones((1, 1, 5)), dilation=3, stride=4), stream.ConvTranspose1d(np.ones((1, 1, 5)), stride=2)
    for n in range(1, 200):
        for each, limit in ((s, 13 + 4), (t, 3)):
            each.push(np.ones((1, n % 7)))
            assert each.state()["samples"].shape[-1] <= limit


def test_slots_are_independent() -> None:
    rng = np.random.default_rng(2)
    layer = random_layer(rng, "conv1d")._replace(
        settings={"stride": 2, "padding": "causal", "dilation": 1, "groups": 1}
    )
    layer = layer._replace(weight=rng.standard_normal((3, 2, 5)), bias=None)
    signals = rng.standard_normal((4, 2, 60))
    s, parts = layer.stream(4), [[] for _ in range(4)]  # type: ignore[var-annotated]
    places = [0] * 4
    for _ in range(60):
        groups: dict[Any, list[int]] = {}
        for slot in rng.permutation(4)[: rng.integers(1, 5)]:
            groups.setdefault(tuple(s.state()["positions"][slot]), []).append(int(slot))
        for chosen in groups.values():
            length = min(int(rng.integers(0, 5)), 60 - max(places[slot] for slot in chosen))
            x = np.stack([signals[slot, :, places[slot] : places[slot] + length] for slot in chosen])
            for slot, output in zip(chosen, s.push(x, chosen), strict=True):
                parts[slot].append(output)
                places[slot] += length
    for slot in range(4):
        if places[slot]:
            s_output = np.concatenate([*parts[slot], s.flush([slot])[0]], axis=-1)
            np.testing.assert_allclose(s_output, layer.whole(signals[slot, :, : places[slot]]), rtol=1e-12, atol=1e-12)
    s.push(signals[:2, :, :9], [3, 1])
    s.reset([3])
    with pytest.raises(ValueError, match=r"slots \[0, 1\] are at different positions; push them in separate calls"):
        s.push(signals[:2], [0, 1])
    np.testing.assert_allclose(s.push(signals[2:3], [3])[0], layer.whole(signals[2]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["Conv1d", "ConvTranspose1d"])
def test_a_stream_of_a_layer(name: str) -> None:
    layer = getattr(nn, name)(4, 6, 5, stride=2, padding=1, groups=2, rng=0)
    s = getattr(stream, name)(layer, slots=2)
    x = np.random.default_rng(3).standard_normal((2, 4, 30), dtype=np.float32)
    output = np.concatenate([s.push(x[..., :7]), s.push(x[..., 7:]), s.flush()], axis=-1)
    np.testing.assert_allclose(output, layer(x), rtol=1e-5, atol=1e-5)
    layer.weight[...] = 0  # the stream has a copy
    np.testing.assert_allclose(np.concatenate([s.push(x), s.flush()], axis=-1), output, rtol=1e-5, atol=1e-5)
    snake = getattr(nn, name)(4, 6, 5, groups=2, rng=0, activation=("snake", np.ones(6, "f4")), input_activation="relu")
    s = getattr(stream, name)(snake, slots=2)
    expected = snake(x)
    snake.activation_alpha[...] = 9
    found = np.concatenate([*(s.push(x[..., i : i + 3]) for i in range(0, 30, 3)), s.flush()], axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    other = "ConvTranspose1d" if name == "Conv1d" else "Conv1d"
    with pytest.raises(TypeError, match=f"layer must be an nn.{other}, got {name}"):
        getattr(stream, other)(layer)


def test_a_padding_mode_of_a_layer_is_refused() -> None:
    layer = nn.Conv1d(4, 6, 5, padding=2, padding_mode="reflect")
    says = "stream.Conv1d: layer must have padding_mode \"zeros\", got 'reflect'"
    with pytest.raises(ValueError, match=re.escape(says)):
        stream.Conv1d(layer)


def test_a_clone_goes_on_by_itself() -> None:
    s = stream.Conv1d(np.ones((1, 1, 3)), padding="causal")
    s.push(np.array([[1.0, 2.0]]))
    twin = s.clone()
    assert s.push(np.array([[3.0]])).tolist() == [[6.0]]
    assert twin.push(np.array([[30.0]])).tolist() == [[33.0]]
    assert repr(s) == "stream.Conv1d(weight (1, 1, 3) float64, stride=1, padding=(2, 0), dilation=1, groups=1, slots=1)"


def check_copies(put: Any) -> None:
    """Copies and pickles of a stream go on by themselves, also while pushes repeat."""
    x, w = put(np.arange(40.0).reshape(2, 20)), put(np.arange(1.0, 7.0).reshape(1, 2, 3))
    whole, xp = gpuconv.conv1d(x, w), runtime.array_module(x)
    for how in (copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))):
        for pushes in range(1, 5):
            s = stream.Conv1d(w)
            parts = [s.push(x[:, 2 * i : 2 * i + 2]) for i in range(pushes)]
            twin = how(s)
            s.push(xp.full((2, 2), np.nan))
            parts += [twin.push(x[:, 2 * i : 2 * i + 2]) for i in range(pushes, 10)]
            assert (xp.concatenate(parts, axis=-1) == whole).all()


def test_copies_and_pickles() -> None:
    check_copies(np.asarray)


def test_out_is_written() -> None:
    s = stream.Conv1d(np.ones((1, 1, 3)), padding="causal")
    out = np.zeros((1, 2))
    assert s.push(np.array([[1.0, 2.0]]), out=out) is out
    assert out.tolist() == [[1.0, 3.0]]
    for x, says in (
        (np.array([[1.0]]), "out must be float64 of shape (1, 1), got float64 of shape (1, 2)"),
        (np.empty((1, 0)), "out must be float64 of shape (1, 0), got float64 of shape (1, 2)"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            s.push(x, out=out)
    assert s.push(np.array([[3.0]])).tolist() == [[6.0]]  # what was refused has not been taken


def test_arrays_of_any_byte_order_stream() -> None:
    x, w = np.arange(24.0).reshape(2, 12), np.arange(1.0, 7.0).reshape(1, 2, 3)
    whole = gpuconv.conv1d(x, w)
    s = stream.Conv1d(w.astype(">f8"))
    assert s.push(x[:, :2]).dtype == np.dtype("float64")
    for start in range(2, 12, 2):  # the pushes repeat
        out = np.empty((1, 2), ">f8")
        if start == 6:
            other = stream.Conv1d(w)
            other.load_state({name: array.astype(array.dtype.newbyteorder(">")) for name, array in s.state().items()})
            s = other
        assert s.push(x[:, start : start + 2].astype(">f8"), out=out) is out
        np.testing.assert_array_equal(out, whole[:, start - 2 : start])


@pytest.mark.torch
def test_tensors_of_a_layer() -> None:
    import torch

    rng = np.random.default_rng(5)
    w, bias, alpha, before, x = (rng.uniform(1, 2, shape) for shape in ((3, 2, 4), (3,), (3,), (2,), (2, 9)))

    def push(put: Any) -> Any:
        activation, input_activation = ("snake", put(alpha)), ("snake", put(before), put(before))
        s = stream.Conv1d(put(w), put(bias), activation=activation, input_activation=input_activation)
        return s.push(put(x))

    np.testing.assert_array_equal(push(torch.from_numpy), push(np.asarray))


def test_integers_stream_to_sums() -> None:
    rng = np.random.default_rng(5)
    x, w = rng.integers(-100, 100, (2, 20), "int8"), rng.integers(-100, 100, (3, 2, 4), "int8")
    s = stream.Conv1d(w, padding=(3, 1))
    outputs = [s.push(x[:, :0]), s.push(x[:, :5]), s.push(x[:, 5:]), s.flush()[0]]
    assert {output.dtype for output in outputs} == {np.dtype("int64")}
    np.testing.assert_array_equal(np.concatenate(outputs, axis=-1), gpuconv.conv1d(x, w, padding=(3, 1)))


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        (
            {"padding": "same", "stride": 2},
            ValueError,
            'stream.Conv1d: padding "same" with a stride depends on the length',
        ),
        ({"slots": 0}, ValueError, "stream.Conv1d: slots must be at least 1, got 0"),
        ({"slots": 2**31}, ValueError, "stream.Conv1d: slots must be at most 2147483647, got 2147483648"),
        ({"groups": 2**62}, ValueError, "stream.Conv1d: groups must divide the output channels, got groups = "),
        ({"layer": np.ones((2, 3))}, ValueError, "stream.Conv1d: weight must have three axes"),
        ({"layer": [[[1.0]]]}, TypeError, "stream.Conv1d: weight must be a NumPy or CuPy array, got list"),
        ({"bias": [1.0]}, TypeError, "stream.Conv1d: bias must be a NumPy or CuPy array, got list"),
    ],
)
def test_bad_layers(arguments: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=re.escape(says)):
        stream.Conv1d(**{"layer": np.ones((2, 3, 4)), **arguments})


def test_bad_pushes_and_states() -> None:
    s = stream.Conv1d(np.ones((2, 3, 4)), slots=2)
    x = np.ones((2, 3, 5))
    for call, kind, says in (
        (lambda: s.push(x[0]), ValueError, "input must have shape (slots, C_in, L) = (2, 3, L), got (3, 5)"),
        (lambda: s.push(x[:, :2]), ValueError, "input must have shape (slots, C_in, L) = (2, 3, L), got (2, 2, 5)"),
        (lambda: s.push(x.astype("f4")), TypeError,
         "input must have the dtype of weight, float64, got float32; pass input.astype('float64')"),
        (lambda: s.push(x, [0, 2]), ValueError, "slots must be from 0 to 1, each once, got [0, 2]"),
        (lambda: s.push(x, 1), TypeError, "Conv1d.push: slots must be a sequence of ints, got 1"),
        (lambda: s.push(x, out=[1.0]), TypeError, "Conv1d.push: out must be a NumPy or CuPy array, got list"),
        (lambda: s.push(x, [1, 1]), ValueError, "slots must be from 0 to 1, each once, got [1, 1]"),
        (lambda: s.load_state(1), TypeError, "Conv1d.load_state: state must be a mapping, got int"),
        (lambda: s.load_state({}), ValueError, 'state must hold "samples" and "positions"'),
        (lambda: s.load_state({**s.state(), "positions": np.zeros((3, 4), int)}), ValueError, "positions must be"),
        (lambda: s.load_state({**s.state(), "samples": np.ones((2, 3, 1))}), ValueError, "samples must be"),
    ):  # fmt: skip
        with pytest.raises(kind, match=re.escape(says)):
            call()
    assert s.push(x).shape == (2, 2, 2)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "dtype"), [("conv1d", "bfloat16"), ("conv_transpose1d", "float32")])
def test_a_gpu_gives_the_bits_of_one_call(cupy: Any, op: Op, dtype: str) -> None:
    """One layer runs on CUDA cores, and one on tensor cores."""
    from gpuconv.problem import numpy_dtype

    rng = np.random.default_rng(4)
    for channels, K, stride in ((2, 4, 3), (32, 3, 1)):
        layer = random_layer(rng, op)
        settings = {"stride": stride, "padding": (2, 1), "dilation": 2, "groups": 1}
        weight = rng.standard_normal((channels, channels, K)).astype(numpy_dtype(dtype))
        layer = layer._replace(weight=weight, bias=weight[0, :, 0].copy(), settings=settings)
        x = rng.standard_normal((2, channels, 24)).astype(numpy_dtype(dtype))
        parts, s = in_pieces(rng, layer.stream(2, cupy.asarray), x, cupy.asarray)
        whole = layer.whole(x, cupy.asarray)
        np.testing.assert_array_equal(cupy.concatenate([*parts, s.flush()], axis=-1).get(), whole.get())


@pytest.mark.gpu
def test_copies_and_pickles_on_a_gpu(cupy: Any) -> None:
    check_copies(cupy.asarray)


@pytest.mark.gpu
def test_a_gpu_reads_arrays_at_any_address(cupy: Any) -> None:
    x, w, bias = (np.arange(1.0, 1 + math.prod(shape)).reshape(shape) for shape in ((2, 30), (2, 2, 3), (2,)))

    def push(put: Any) -> Any:
        alpha, beta, before = map(put, (bias, 2 * bias, bias))
        s = stream.Conv1d(put(w), put(bias), activation=("snake", alpha, beta), input_activation=("snake", before))
        parts = [s.push(put(x[:, start : start + 4])) for start in range(0, 20, 4)]
        state = s.state()
        s.load_state({**state, "samples": put(cupy.asnumpy(state["samples"]))})
        return cupy.concatenate([*parts, s.push(put(x[:, 20:]))], axis=-1).get()

    np.testing.assert_array_equal(push(lambda array: shifted(cupy, array)), push(cupy.asarray))
    lengths = np.array([5, 9, 1])
    found = gpuconv.output_lengths(shifted(cupy, lengths), 3)
    np.testing.assert_array_equal(found.get(), gpuconv.output_lengths(lengths, 3))


@pytest.mark.gpu
def test_random_pushes_that_repeat_give_the_bits_of_one_call(cupy: Any) -> None:
    """Pushes come in runs of one length, with states and clones in between. A third of the layers are depthwise."""
    rng, repeated = np.random.default_rng(11), 0
    for number in range(40):
        layer, slots = random_layer(rng, OPS[number % 2], "float32"), int(rng.integers(1, 4))
        if number % 3 == 0:
            weight = rng.standard_normal((rng.integers(1, 5), 1, rng.integers(2, 7))).astype("float32")
            bias = None if layer.bias is None else weight[:, 0, 0].copy()
            layer = Layer(layer.op, weight, bias, {**layer.settings, "groups": len(weight)})
        s, start, parts = layer.stream(slots, cupy.asarray), 0, []
        x = rng.standard_normal((slots, s._channels, int(rng.integers(20, 60)))).astype("float32")
        while start < x.shape[-1]:
            length = int(rng.integers(1, 5)) * (layer.settings["stride"] if rng.random() < 0.7 else 1)
            for _ in range(int(rng.integers(1, 7))):
                parts.append(s.push(cupy.asarray(x[..., start : start + length])))
                start += length
                repeated += s._in_window
            if rng.random() < 0.3:
                state, s = s.state(), s.clone()
                s.reset()
                s.load_state(state)
        found = cupy.concatenate([*parts, s.flush()], axis=-1).get()
        np.testing.assert_array_equal(found, layer.whole(x, cupy.asarray).get(), err_msg=str(layer))
    assert repeated > 80


# Layers of the kernel for depthwise steps, on CUDA cores, on tensor cores, transposed, and of many new samples.
BOTH = {"activation": "silu", "input_activation": "relu"}
REPEATED: tuple[tuple[Op, str, int, int, int, dict[str, Any], int, int], ...] = (
    ("conv1d", "bfloat16", 6, 6, 4, {"groups": 6, "padding": 3, **BOTH}, 1, 1),
    ("conv1d", "float64", 3, 5, 4, {"stride": 2, "padding": (3, 0), "activation": "relu"}, 2, 1),
    ("conv1d", "float32", 32, 32, 3, {"padding": "causal", "dilation": 2}, 1, 1),
    ("conv_transpose1d", "float32", 2, 3, 4, {"stride": 2, "padding": (2, 0)}, 2, 1),
    ("conv1d", "float32", 400, 2, 3, {"padding": (1, 1)}, 3, 2),
)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "dtype", "C_in", "C_out", "K", "settings", "length", "launches"), REPEATED)
def test_pushes_that_repeat_launch_once_and_allocate_nothing(
    cupy: Any,
    launched: Launches,
    op: Op,
    dtype: str,
    C_in: int,
    C_out: int,
    K: int,
    settings: dict[str, Any],
    length: int,
    launches: int,
) -> None:
    """The same holds in a CUDA graph, whose launches are pushes; other pushes come before and after them."""
    from gpuconv.problem import numpy_dtype

    class Allocations(cupy.cuda.MemoryHook):  # type: ignore[misc, name-defined]
        count = 0

        def alloc_preprocess(self, **_: Any) -> None:
            self.count += 1

    rng, groups = np.random.default_rng(6), settings.get("groups", 1)
    shape = (C_out, C_in // groups, K) if op == "conv1d" else (C_in, C_out // groups, K)
    weight, x = (
        rng.standard_normal(extents).astype(numpy_dtype(dtype)) for extents in (shape, (3, C_in, 9 + 12 * length))
    )
    layer = Layer(op, weight, weight[0, 0, :1].repeat(C_out), settings)
    s, start = layer.stream(3, cupy.asarray), 9
    outputs = [s.push(cupy.asarray(x[..., :start]))]
    taken = cupy.zeros((3, C_in, length), weight.dtype)
    out = cupy.empty_like(s.clone().push(taken))
    queue = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()

    def push(run: Callable[[], object]) -> None:
        """Have what pushes take the next samples; keep its outputs."""
        nonlocal start
        queue.synchronize()
        taken.set(x[..., start : start + length])
        start += length
        run()
        outputs.append(out.copy())

    def step() -> None:
        s.push(taken, out=out)

    def counted() -> None:
        del launched[:]
        allocations = Allocations()
        with allocations:
            step()
        assert len(launched) == launches, launched
        assert allocations.count == 0

    with queue:
        for run in (step, step, counted, counted):
            push(run)
        queue.begin_capture()
        step()
        graph = queue.end_capture()
        for run in (graph.launch, graph.launch, counted, graph.launch):
            push(run)
        state = s.state()
        for _ in range(2):
            push(graph.launch)  # reading the state ends nothing
        del outputs[-2:]
        start -= 2 * length
        s.load_state(state)
        for run in (step, step, counted, counted):
            push(run)
        found = cupy.concatenate([*outputs, s.flush()], axis=-1).get()
    assert start == x.shape[-1]
    np.testing.assert_array_equal(found, layer.whole(x, cupy.asarray).get())


@pytest.mark.gpu
def test_a_push_without_memory_for_its_outputs_can_be_repeated(cupy: Any) -> None:
    """Of a layer whose push is a launch that appends and one that computes; the state in between is that before."""
    rng = np.random.default_rng(12)
    weight, x = (rng.standard_normal(shape).astype("float32") for shape in ((2, 600, 3), (1, 600, 30)))
    layer = Layer("conv1d", weight, None, {"stride": 1, "padding": 1, "dilation": 1, "groups": 1})
    s, parts, pool = layer.stream(1, cupy.asarray), [], cupy.cuda.MemoryPool()
    pieces = [cupy.asarray(x[..., start : start + 3]) for start in range(0, 30, 3)]
    for number, piece in enumerate(pieces):
        if number in (5, 6):
            pool.set_limit(1)
            with cupy.cuda.using_allocator(pool.malloc), pytest.raises(cupy.cuda.memory.OutOfMemoryError):
                s.push(piece)
        if number == 6:
            state, s = s.state(), s.clone()
            s.load_state(state)
        if number == 8:  # what a capture that is given up would have run, has not run
            queue = cupy.cuda.Stream(non_blocking=True)
            cupy.cuda.Device().synchronize()
            with queue:
                queue.begin_capture()
                with cupy.cuda.using_allocator(pool.malloc), pytest.raises(cupy.cuda.memory.OutOfMemoryError):
                    s.push(piece)
                queue.end_capture()
        if number == 9:  # a graph would put its samples in the place of those of the launch before
            with cupy.cuda.using_allocator(pool.malloc), pytest.raises(cupy.cuda.memory.OutOfMemoryError):
                s.push(piece)
            cupy.cuda.Device().synchronize()
            with queue:
                queue.begin_capture()
                with pytest.raises(RuntimeError, match=r"^stream: a push that failed cannot be repeated while"):
                    s.push(piece)
                queue.end_capture()
        parts.append(s.push(piece))
    assert s._in_window
    found = cupy.concatenate([*parts, s.flush()], axis=-1).get()
    np.testing.assert_array_equal(found, layer.whole(x, cupy.asarray).get())


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
def test_a_stream_runs_on_the_gpu_of_its_weight(cupy: Any) -> None:
    """Whichever is the current one: every method."""
    rng = np.random.default_rng(7)
    for length, C_in in ((1, 2), (3, 600)):  # kept by the kernel, and appended
        weight, x = rng.standard_normal((2, C_in, 3)).astype("f4"), rng.standard_normal((2, C_in, 8 * length + 2))
        with cupy.cuda.Device(1):
            w, samples = cupy.asarray(weight), cupy.asarray(x.astype("f4"))
            bias = w[:, 0, 0]
            expected = gpuconv.conv1d(samples, w, bias, padding=(2, 1)).get()
            cupy.cuda.Device().synchronize()
        assert cupy.cuda.Device() == cupy.cuda.Device(0)
        s = stream.Conv1d(w, bias, padding=(2, 1), slots=2)
        parts, states = [s.push(samples[..., :2])], []
        for start in range(2, x.shape[-1], length):
            parts.append(s.push(samples[..., start : start + length]))
            if start == 2 + 4 * length:
                states.append(s.state()["samples"])
                s = s.clone()
        parts.append(s.flush())
        s.push(samples[:1, :, :2], [1])
        s.reset([1])
        s.load_state(s.state())
        s.push(samples[..., :2])
        states.append(s.state()["samples"])
        assert {array.data.device_id for array in (*parts, *states)} == {1}
        np.testing.assert_array_equal(np.concatenate([part.get() for part in parts], axis=-1), expected)


@pytest.mark.gpu
def test_a_stream_has_its_copies_before_other_cuda_streams_push(cupy: Any) -> None:
    rng = np.random.default_rng(8)
    weight, x = gpuconv.prepare(cupy.asarray(rng.standard_normal((2, 2, 3)))), cupy.asarray(rng.standard_normal((2, 9)))
    bias, alpha = cupy.asarray(rng.standard_normal(2)), cupy.asarray(rng.uniform(1, 2, 2))
    expected = gpuconv.conv1d(x, weight, bias, activation=("snake", alpha))
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True):
        s = stream.Conv1d(weight, bias, activation=("snake", alpha))
    with cupy.cuda.Stream(non_blocking=True) as other:
        y = s.push(x)
        other.synchronize()
    cupy.testing.assert_array_equal(y, expected)
    with cupy.cuda.Stream(non_blocking=True) as captured:
        captured.begin_capture()
        with pytest.raises(RuntimeError, match=r"^stream.Conv1d: a stream cannot be made while the current stream"):
            stream.Conv1d(weight)
        captured.end_capture()


@pytest.mark.gpu
def test_what_a_graph_would_not_do_again_is_refused_during_capture(cupy: Any) -> None:
    s = stream.Conv1d(cupy.asarray(np.ones((2, 2, 3))), padding="causal")
    x = cupy.asarray(np.ones((2, 2)))
    queue = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with queue:
        s.push(x)
        s.push(x)
        state, twin = s.state(), s.clone()
        queue.begin_capture()
        for call in (lambda: s.push(x), lambda: s.push(x[:, :1]), s.reset, s.flush, lambda: s.load_state(state)):
            with pytest.raises(RuntimeError, match=r"^stream.Conv1d: only a push that has repeated can be made while"):
                call()
        queue.end_capture()
        found, expected = s.push(2 * x), twin.push(2 * x)
        queue.synchronize()
    cupy.testing.assert_array_equal(found, expected)


@pytest.mark.gpu
def test_appending_moves_rows_longer_than_a_block(cupy: Any) -> None:
    for held, length in ((1000, 1), (300, 299), (5, 400), (1, 1)):
        window = cupy.arange(6 * (held + length), dtype="float32").reshape(2, 3, -1)
        samples = -cupy.arange(6 * length, dtype="float32").reshape(length, 2, 3).transpose(1, 2, 0)
        expected = cupy.concatenate((window[..., length:], samples), axis=-1)
        runtime.append(window, samples)
        cupy.testing.assert_array_equal(window, expected)
