"""The runtime with the real CuPy: addresses, streams, graphs, threads, allocators and devices as CuPy really has them.

Marked `gpu`, these tests run on any CuPy that reaches a GPU. Those without the mark need none.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import calls, cli, dispatch, grad, nn, runtime
from gpuconv.checks import Target
from gpuconv.cli.errors import EXIT_NO_GPU
from gpuconv.families import Layout
from gpuconv.gpus import missing_gpu
from gpuconv.parameters import home_of
from gpuconv.problem import ArraySpec, ConvProblem
from tests.conftest import Launches

ROOT = Path(__file__).parents[2]

Make = Callable[[Any, np.ndarray], Any]


def integers(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Small integers, whose sums are exact in any order."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-4, 5, shape).astype(dtype)
    return values + 1j * rng.integers(-4, 5, shape).astype(dtype) if np.dtype(dtype).kind == "c" else values


@pytest.fixture
def version(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes CuPy say that it has another version."""

    def pose(name: str) -> None:
        monkeypatch.setattr(cupy, "__version__", name)
        runtime.gpu._supported.cache_clear()
        runtime.device.cache_clear()  # what is known of a GPU is not asked again

    yield pose
    runtime.gpu._supported.cache_clear()


@pytest.mark.gpu
def test_an_older_cupy_is_refused_in_one_line(
    cupy: Any, version: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    x, w = (cupy.ones(shape, np.float32) for shape in ((1, 1, 9), (1, 1, 3)))
    version("13.6.0")
    needs = "gpuconv needs CuPy 14.0 or newer and found CuPy 13.6.0; pip install"
    for call in (
        lambda: gpuconv.conv1d(x, w),
        lambda: grad.conv1d_bias(x),
        lambda: gpuconv.prepare(w),
        lambda: gpuconv.explain("conv1d", x, w),
        lambda: nn.Conv1d(1, 1, 3, device="cuda"),
    ):
        with pytest.raises(ImportError, match=f"^{needs}"):
            call()
    assert str(missing_gpu()).startswith(f"no GPU: {needs}")
    for command in (["verify", "--device", "gpu"], ["warmup"]):
        with pytest.raises(SystemExit) as exit_:
            raise SystemExit(cli.main(command))
        assert exit_.value.code == EXIT_NO_GPU
        assert capsys.readouterr().err.startswith(f"gpuconv: error: no GPU: {needs}")
    assert cli.main(["info"]) == 0
    assert needs in " ".join(capsys.readouterr().out.split())
    version("14.0.0rc1")
    assert gpuconv.conv1d(x, w).get().tolist() == [[[3.0] * 7]]


@pytest.mark.gpu
def test_bfloat16_needs_a_newer_numpy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ml_dtypes")
    monkeypatch.setattr(np, "__version__", "2.1.1")
    needs = "bfloat16 on a GPU needs NumPy 2.1.2 or newer, found NumPy 2.1.1"
    with pytest.raises(TypeError, match=f"^{needs}$"):
        nn.Conv1d(1, 1, 3, dtype="bfloat16", device="cuda")
    assert Target(on_gpu=True).lacks("bfloat16") == needs
    np.save(tmp_path / "x.npy", np.ones((1, 9), np.float32))
    np.save(tmp_path / "w.npy", np.ones((1, 1, 3), np.float32))
    files = [str(tmp_path / name) for name in ("x.npy", "w.npy", "y.npy")]
    assert cli.main(["conv1d", *files, "--dtype", "bfloat16", "--device", "gpu"]) == 2
    assert capsys.readouterr().err.endswith(f"has no bfloat16 arrays: {needs}\n")
    assert nn.Conv1d(1, 1, 3, dtype="float16", device="cuda").weight.dtype == np.float16
    assert nn.Conv1d(1, 1, 3, dtype="bfloat16").weight.dtype.name == "bfloat16"


def test_numpy_arrays_do_not_meet_a_half_made_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    x, w = np.ones((1, 1, 9)), np.ones((1, 1, 3))
    assert gpuconv.conv1d(x, gpuconv.prepare(w)).tolist() == [[[3.0] * 7]]
    assert nn.Conv1d(1, 1, 3)(x.astype(np.float32)).shape == (1, 1, 7)
    with pytest.raises(TypeError, match="weight must be a NumPy or CuPy array, got list"):
        gpuconv.conv1d(x, [1.0])


@pytest.mark.gpu
def test_the_import_of_another_thread_is_waited_for() -> None:
    code = """
import sys, threading, numpy, gpuconv
from gpuconv import runtime
other = threading.Thread(target=lambda: __import__("cupy"))
other.start()
while "cupy" not in sys.modules:
    assert other.is_alive()
    gpuconv.conv1d(numpy.ones((1, 1, 9)), numpy.ones((1, 1, 3)))
assert runtime.cupy_module().ndarray
other.join()
"""
    run_python(code)


def run_python(code: str, **environment: str) -> None:
    """Run a program that must succeed and say nothing."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def bytes_at(cupy: Any, values: np.ndarray, strides: tuple[int, ...], start: int, size: int) -> Any:
    """A CuPy array of these values at byte `start` of fresh memory of `size` bytes, with these strides."""
    memory = cupy.full(max(size, 16), 0xAA, np.uint8)
    view = cupy.ndarray(values.shape, values.dtype, memory.data + start, strides)
    host = np.ascontiguousarray(values).view(np.uint8).reshape(*values.shape, values.itemsize)
    cupy.ndarray(host.shape, np.uint8, view.data, (*strides, 1))[...] = cupy.asarray(host)
    return view


def shifted(cupy: Any, values: np.ndarray) -> Any:
    """Contiguous, and half an element off: what `f[1:].view(complex64)` gives."""
    values = np.ascontiguousarray(values)
    half = values.itemsize // 2
    return bytes_at(cupy, values, values.strides, half, values.nbytes + half)


def spaced(cupy: Any, values: np.ndarray) -> Any:
    """The field of a packed record, behind one byte."""
    strides = tuple(s // values.itemsize * (values.itemsize + 1) for s in np.ascontiguousarray(values).strides)
    return bytes_at(cupy, values, strides, 1, values.size * (values.itemsize + 1))


def reversed_(cupy: Any, values: np.ndarray) -> Any:
    """All axes backwards, and one byte off."""
    strides = tuple(-s for s in np.ascontiguousarray(values).strides)
    return bytes_at(cupy, values, strides, values.nbytes - values.itemsize + 1, values.nbytes + 1)


def read_bytes(cupy: Any, array: Any) -> np.ndarray:
    raw = cupy.ndarray((*array.shape, array.itemsize), np.uint8, array.data, (*array.strides, 1))
    return np.ascontiguousarray(cupy.asnumpy(raw)).view(array.dtype)[..., 0]


@pytest.mark.gpu
@pytest.mark.parametrize("make", [shifted, spaced, reversed_])
@pytest.mark.parametrize("dtype", ["float32", "complex64", "complex128"])
@pytest.mark.parametrize("op", ["conv1d", "conv_transpose1d"])
def test_arrays_at_any_address_are_read_and_written(cupy: Any, op: str, dtype: str, make: Make) -> None:
    function = getattr(gpuconv, op)
    given = [integers(shape, dtype, seed) for seed, shape in enumerate([(2, 2, 9), (2, 2, 3), (2,)])]
    expected = function(*given)
    odd = [make(cupy, values) for values in given]
    plain = [cupy.asarray(values) for values in given]
    for arguments in (odd, *([*plain[:i], odd[i], *plain[i + 1 :]] for i in range(3))):
        np.testing.assert_array_equal(cupy.asnumpy(function(*arguments)), expected)
    for _ in range(2):  # the second call finds the plan of the first
        out = make(cupy, np.zeros_like(expected))
        assert function(*plain, out=out) is out
        np.testing.assert_array_equal(read_bytes(cupy, out), expected)
    for array, values in zip(odd, given, strict=True):
        np.testing.assert_array_equal(read_bytes(cupy, array), values)
    prepared = gpuconv.prepare(odd[1])
    np.testing.assert_array_equal(cupy.asnumpy(function(plain[0], prepared, plain[2])), expected)


@pytest.mark.gpu
def test_what_lies_between_the_elements_of_out_is_kept(cupy: Any) -> None:
    x, w = integers((1, 2, 9)), integers((2, 2, 3))
    expected = gpuconv.conv1d(x, w)
    out = spaced(cupy, expected)
    gpuconv.conv1d(cupy.asarray(x), cupy.asarray(w), out=out)
    between = cupy.ndarray(out.size, np.uint8, out.data - 1, (5,))
    assert np.unique(cupy.asnumpy(between)).tolist() == [0xAA]


@pytest.mark.gpu
def test_a_broadcast_array_at_any_address(cupy: Any) -> None:
    row, w = integers((9,), "complex64"), integers((2, 3, 3), "complex64")
    x = cupy.broadcast_to(shifted(cupy, row), (2, 3, 9))
    assert x.strides == (0, 0, 8)
    assert x.data.ptr % 8 == 4
    expected = gpuconv.conv1d(np.broadcast_to(row, (2, 3, 9)), w)
    np.testing.assert_array_equal(cupy.asnumpy(gpuconv.conv1d(x, cupy.asarray(w))), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [shifted, spaced])
def test_empty_arrays_at_any_address(cupy: Any, make: Make) -> None:
    w, bias = integers((2, 0, 3), "complex64"), integers((2,), "complex64")
    x = integers((2, 0, 9), "complex64")
    out = make(cupy, np.ones((2, 2, 7), np.complex64))
    gpuconv.conv1d(cupy.asarray(x), make(cupy, w), cupy.asarray(bias), out=out)
    np.testing.assert_array_equal(read_bytes(cupy, out), gpuconv.conv1d(x, w, bias))
    out = make(cupy, np.ones((2, 2, 3), np.complex64))  # the sum over no samples
    grad.conv1d_weight(cupy.empty((0, 2, 9), out.dtype), out.shape, cupy.empty((0, 2, 7), out.dtype), out=out)
    assert not read_bytes(cupy, out).any()


@pytest.mark.gpu
@pytest.mark.parametrize("make", [shifted, spaced, reversed_])
def test_gradients_of_arrays_at_any_address(cupy: Any, make: Make) -> None:
    x, w, dy = (integers(shape, "complex64") for shape in ((2, 2, 9), (3, 2, 3), (2, 3, 7)))
    odd = {name: make(cupy, values) for name, values in (("x", x), ("w", w), ("dy", dy))}
    for function, arguments in (
        (grad.conv1d_input, (x.shape, w, dy)),
        (grad.conv1d_weight, (x, w.shape, dy)),
        (grad.conv1d_bias, (dy,)),
    ):
        expected = function(*arguments)
        by_id = {id(x): "x", id(w): "w", id(dy): "dy"}
        on_gpu = [odd[by_id[id(a)]] if isinstance(a, np.ndarray) else a for a in arguments]
        out = make(cupy, np.zeros_like(expected))
        function(*on_gpu, out=out)
        np.testing.assert_array_equal(read_bytes(cupy, out), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_layer_loads_arrays_at_any_address(cupy: Any, device: str) -> None:
    layer = nn.Conv1d(2, 3, 3, dtype="complex64", device=device)
    w, b = integers((3, 2, 3), "complex64"), integers((3,), "complex64")
    layer.load_state_dict({"weight": spaced(cupy, w), "bias": shifted(cupy, b)})
    np.testing.assert_array_equal(cupy.asnumpy(layer.weight), w)
    np.testing.assert_array_equal(cupy.asnumpy(layer.bias), b)


@pytest.mark.gpu
def test_arrays_in_memory_that_cupy_does_not_own(cupy: Any) -> None:
    x, w = integers((2, 2, 9)), integers((2, 2, 3))
    expected = gpuconv.conv1d(x, w)

    def unowned(values: np.ndarray) -> Any:
        owner = cupy.asarray(values)
        memory = cupy.cuda.UnownedMemory(owner.data.ptr, owner.nbytes, owner)
        return cupy.ndarray(values.shape, values.dtype, cupy.cuda.MemoryPointer(memory, 0))

    out = unowned(np.zeros_like(expected))
    assert gpuconv.conv1d(unowned(x), unowned(w), out=out) is out
    np.testing.assert_array_equal(cupy.asnumpy(out), expected)


@pytest.mark.gpu
def test_subclasses_of_the_array(cupy: Any) -> None:
    class Signal(cupy.ndarray):  # type: ignore[misc, name-defined]
        pass

    x, w = integers((2, 2, 9), "complex64"), integers((2, 2, 3), "complex64")
    expected = gpuconv.conv1d(x, w)
    for make in (cupy.asarray, lambda values: shifted(cupy, values)):
        signal, taps, out = (make(values).view(type=Signal) for values in (x, w, np.zeros_like(expected)))
        assert type(gpuconv.conv1d(signal, taps)) is cupy.ndarray
        assert gpuconv.conv1d(signal, taps, out=out) is out
        np.testing.assert_array_equal(read_bytes(cupy, out), expected)


@pytest.mark.gpu
def test_an_array_on_several_gpus_is_refused(cupy: Any) -> None:
    """It poses as an array, but has no address; CuPy says so."""
    distributed = pytest.importorskip("cupyx.distributed.array").DistributedArray
    x, w = distributed((2, 2, 9), np.float32, {}, comms={}), cupy.ones((2, 2, 3), np.float32)
    assert runtime.is_cupy_array(x)
    with pytest.raises(NotImplementedError, match="does not support data"):
        gpuconv.conv1d(x, w)


@pytest.mark.gpu
def test_arrays_of_no_axes_are_refused(cupy: Any) -> None:
    with pytest.raises(ValueError, match=r"^conv1d: input must"):
        gpuconv.conv1d(cupy.ones((), np.float32), cupy.ones((1, 1, 3), np.float32))


@pytest.mark.gpu
def test_a_foreign_byte_order_is_refused(cupy: Any) -> None:
    """CuPy makes such views, and its own functions refuse them. The kernels would take the bytes as they lie."""
    x, w = cupy.ones((2, 2, 9), np.float32), cupy.ones((2, 2, 3), np.float32)
    try:
        x.view(">f4")
    except ValueError:  # CuPy 14.0 makes none
        return
    y = gpuconv.conv1d(x, w)
    layer = nn.Conv1d(2, 2, 3, device="cuda")
    for name, call in (
        ("conv1d: input", lambda: gpuconv.conv1d(x.view(">f4"), w, out=y)),
        ("conv1d: weight", lambda: gpuconv.conv1d(x, w.view(">f4"))),
        ("conv1d: out", lambda: gpuconv.conv1d(x, w, out=y.view(">f4"))),
        ("conv1d_bias: grad_output", lambda: grad.conv1d_bias(y.view(">f4"), out=cupy.ones(2, np.float32))),
        ("prepare: weight", lambda: gpuconv.prepare(w.view(">f4"))),
        ("conv1d: input", lambda: gpuconv.explain("conv1d", x.view(">f4"), w)),
    ):
        with pytest.raises(TypeError, match=f"^{name} must have native byte order on a GPU, got >f4$"):
            call()
    with pytest.raises(ValueError, match=r'"weight" must have native byte order on a GPU, got >f4$'):
        layer.load_state_dict({"weight": w.view(">f4")}, strict=False)
    assert cupy.asnumpy(y).tolist() == [[[6.0] * 7] * 2] * 2


PACKED = ("conv1d", integers((2, 5, 40)), integers((12, 5, 3)))  # by a kernel family that packs the weights
PACKS = ("pack_weight", "pack_mma_weight")


def large_launches() -> list[tuple[Any, Any]]:
    """The kernels and launches of two problems with one kernel, which need different sizes above 48 KiB."""
    device = runtime.device(0)
    by_config: dict[Any, dict[int, Any]] = {}
    for dtype in ("float16", "float32", "float64"):
        for channels in (16, 64, 256):
            for taps in (3, 9, 31):
                for stride in (1, 2):
                    x, w = ArraySpec((1, channels, 400), dtype), ArraySpec((64, channels, taps), dtype)
                    p = ConvProblem.conv1d(x, w, None, stride)
                    choice = dispatch.choose(p, Layout.contiguous(p), device)
                    assert choice is not None
                    sizes = by_config.setdefault(choice.config, {})
                    if choice.launch.shared_bytes > runtime.DEFAULT_SHARED_BYTES:
                        sizes[choice.launch.shared_bytes] = choice.launch
                    if len(sizes) == 2:
                        return [(choice.config, sizes[size]) for size in sorted(sizes)]
    pytest.skip("no kernel needs two sizes above 48 KiB here")


@pytest.mark.gpu
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_plans_of_one_kernel_set_one_limit_of_shared_memory(order: tuple[int, int]) -> None:
    """Whatever the order in which threads set it: a limit that followed the plan could end below another's need."""
    launches = large_launches()
    kernel = runtime.build(launches[0][0], runtime.device(0).arch_name)
    for config, launch in (launches[i] for i in order):
        kernel.max_dynamic_shared_size_bytes = runtime.DEFAULT_SHARED_BYTES
        runtime.kernels.Kernel(config, launch)
        assert kernel.max_dynamic_shared_size_bytes == runtime.device(0).shared_per_block


@pytest.mark.gpu
def test_a_new_thread_plans_a_kernel_with_much_shared_memory() -> None:
    (config, launch), _ = large_launches()
    runtime.kernels.Kernel(config, launch)  # loads the kernel here, so that the thread has no reason to
    with ThreadPoolExecutor(1) as pool:
        pool.submit(runtime.kernels.Kernel, config, launch).result()


@pytest.mark.gpu
def test_many_threads_and_streams(cupy: Any) -> None:
    _, x, w = PACKED
    expected = gpuconv.conv1d(x, w)
    prepared = gpuconv.prepare(cupy.asarray(w))

    def work(_: int) -> None:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for taps in (cupy.asarray(w), prepared):
                y = gpuconv.conv1d(cupy.asarray(x), taps)
                np.testing.assert_array_equal(cupy.asnumpy(y), expected)
            stream.synchronize()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))


@pytest.mark.gpu
def test_two_threads_pack_a_prepared_weight_once(cupy: Any, launched: Launches) -> None:
    _, x, w = PACKED
    x, prepared = cupy.asarray(x), gpuconv.prepare(cupy.asarray(w))
    started, go = threading.Event(), threading.Event()

    def wait(name: str) -> None:
        if name in PACKS:
            started.set()
            assert go.wait(30)

    launched.before = wait
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(gpuconv.conv1d, x, prepared)
        assert started.wait(30)
        second = pool.submit(gpuconv.conv1d, x, prepared)
        threading.Timer(0.2, go.set).start()  # by then the second waits for the first
        np.testing.assert_array_equal(first.result().get(), second.result().get())
    assert sum(name in PACKS for name in launched) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["the weights", "the plans"])
def test_a_finalizer_may_call_while_its_thread_changes_what_is_kept(
    cupy: Any, launched: Launches, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Garbage is collected at any allocation, and whatever dies then may call gpuconv."""
    _, x, w = PACKED
    expected = gpuconv.conv1d(x, w)
    x, prepared = cupy.asarray(x), gpuconv.prepare(cupy.asarray(w))
    found = []

    def call(samples: int) -> None:
        found.append(gpuconv.conv1d(x[:samples], prepared).get())

    if what == "the weights":

        def pack_again(name: str) -> None:
            if name in PACKS and len(launched) == 0:
                launched.before = lambda _: None
                call(2)

        launched.before = pack_again
    else:

        class Plans(dict[Any, Any]):
            def __setitem__(self, key: Any, plan: Any) -> None:
                if not self:
                    super().__setitem__(key, plan)
                    call(1)
                super().__setitem__(key, plan)

        monkeypatch.setattr(calls, "_EXECUTORS", Plans())
    thread = threading.Thread(target=call, args=(2,), daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert len(found) == 2
    for result in found:
        np.testing.assert_array_equal(result, expected[: len(result)])


def test_a_forked_process_computes_whatever_another_thread_was_at() -> None:
    """It inherits the lock, and no thread that would release it."""
    run_python("""
import os, signal, threading, warnings, numpy, gpuconv
from gpuconv import caches
warnings.simplefilter("ignore", DeprecationWarning)
x, w = numpy.ones((1, 1, 9)), numpy.ones((1, 1, 3))
held, forked = threading.Event(), threading.Event()

def hold():
    with caches.LOCK:
        held.set()
        forked.wait()

other = threading.Thread(target=hold)
other.start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if gpuconv.conv1d(x, w).tolist() == [[[3.0] * 7]] else 1)
forked.set()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""")


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["prepare", "load_state_dict", "deepcopy"])
def test_prepared_weights_are_complete_on_every_stream(cupy: Any, how: str) -> None:
    """What fills them runs on the current stream. Nothing says on which they are used next."""
    _, x, w = PACKED
    expected = gpuconv.conv1d(x, w)
    layer = nn.Conv1d(5, 12, 3, bias=False, device="cuda")
    layer.weight = gpuconv.prepare(layer.weight)
    x, w = cupy.asarray(x), cupy.asarray(w)
    prepared = gpuconv.prepare(w)
    first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    cupy.cuda.Device().synchronize()
    with first:
        if how == "load_state_dict":
            layer.load_state_dict({"weight": w})
            prepared = layer.weight
        elif how == "prepare":
            prepared = gpuconv.prepare(w)
        else:
            prepared = copy.deepcopy(prepared)
    with second:
        np.testing.assert_array_equal(cupy.asnumpy(gpuconv.conv1d(x, prepared)), expected)


@pytest.mark.gpu
def test_work_goes_to_the_current_stream_whoever_made_it(cupy: Any) -> None:
    _, x, w = PACKED
    expected = gpuconv.conv1d(x, w)
    own = cupy.cuda.Stream(non_blocking=True)
    for stream in (cupy.cuda.Stream.from_external(own), cupy.cuda.Stream.null, cupy.cuda.Stream.ptds, own):
        with stream:
            y = gpuconv.conv1d(cupy.asarray(x), cupy.asarray(w))
            stream.synchronize()
            np.testing.assert_array_equal(cupy.asnumpy(y), expected)


def call_with_buffers(cupy: Any, name: str) -> tuple[Callable[..., Any], list[Any], np.ndarray]:
    """A call that needs buffers of its own: (function, its arrays, the result)."""
    _, x, w = PACKED
    z, v = integers((2, 2, 9), "complex64"), integers((2, 2, 3), "complex64")
    if name == "packed weights":
        return gpuconv.conv1d, [cupy.asarray(x), cupy.asarray(w)], gpuconv.conv1d(x, w)
    if name == "prepared weights":
        prepared = gpuconv.prepare(cupy.asarray(w))
        return (lambda a, out: gpuconv.conv1d(a, prepared, out=out)), [cupy.asarray(x)], gpuconv.conv1d(x, w)
    if name == "copies":
        return gpuconv.conv1d, [shifted(cupy, z), shifted(cupy, v)], gpuconv.conv1d(z, v)
    if name == "conjugates":
        dz = gpuconv.conv1d(z, v)
        of_input = grad.conv1d_input
        return (
            lambda a, b, out: of_input(z.shape, a, b, out=out),
            [cupy.asarray(v), cupy.asarray(dz)],
            of_input(z.shape, v, dz),
        )
    x, dy = integers((4, 2, 3000)), integers((4, 2, 2998))
    if name == "sums of slices":
        of_weight = grad.conv1d_weight
        return (
            lambda a, b, out: of_weight(a, (2, 2, 3), b, out=out),
            [cupy.asarray(x), cupy.asarray(dy)],
            of_weight(x, (2, 2, 3), dy),
        )
    return grad.conv1d_bias, [cupy.asarray(dy)], grad.conv1d_bias(dy)


WITH_BUFFERS = ["packed weights", "prepared weights", "copies", "conjugates", "sums of slices", "bias"]


def capture(stream: Any, mode: int | None, work: Callable[[], object]) -> Any:
    stream.begin_capture(mode)
    try:
        work()
    finally:
        graph = stream.end_capture()
    return graph


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["Relaxed", "ThreadLocal", "Global"])
@pytest.mark.parametrize("name", WITH_BUFFERS)
def test_a_captured_graph_owns_its_buffers(cupy: Any, name: str, mode: str) -> None:
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc), cupy.cuda.Stream(non_blocking=True) as stream:
        function, arrays, expected = call_with_buffers(cupy, name)
        out = cupy.zeros(expected.shape, expected.dtype)
        function(*arrays, out=out)  # makes the plan and loads the kernels
        stream.synchronize()
        before = pool.used_bytes()

        def three_calls() -> None:
            for _ in range(3):
                function(*arrays, out=out)

        graph = capture(stream, getattr(cupy.cuda.runtime, f"streamCaptureMode{mode}"), three_calls)
        assert pool.used_bytes() == before
        for _ in range(2):
            out.fill(0)
            churn = [cupy.full(num_bytes, 0xFF, np.uint8) for num_bytes in (512, 4096, 65536) for _ in range(8)]
            graph.launch(stream)
            stream.synchronize()
            np.testing.assert_array_equal(cupy.asnumpy(out), expected)
            del churn
        for array in arrays:  # the graph computes anew, from what its arrays hold
            runtime.arrays._as_bytes(array).fill(0)
        graph.launch(stream)
        stream.synchronize()
        assert not cupy.asnumpy(out).any()
        del graph
        assert pool.used_bytes() == before


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.gpu
@pytest.mark.usefixtures("no_garbage_collector")
def test_nothing_is_left_of_graphs_that_are_gone(cupy: Any) -> None:
    x, w = (cupy.zeros(shape, np.float16) for shape in ((1, 1024, 16384), (1024, 1024, 3)))
    p = ConvProblem.conv1d(x, w, None)
    choice = dispatch.choose(p, Layout.contiguous(p), runtime.device(0))
    assert choice is not None
    assert choice.plan.scratch_bytes("packed") >= 6 << 20
    out = cupy.empty((1, 1024, 16382), np.float16)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        free = []
        for _ in range(12):
            capture(stream, None, lambda: gpuconv.conv1d(x, w, out=out)).upload(stream)
            stream.synchronize()
            free.append(cupy.cuda.Device().mem_info[0])
    assert free[1] - free[-1] < 6 << 20  # what one graph may keep for the next is there after the first


@pytest.mark.gpu
def test_weights_are_not_prepared_during_a_capture(cupy: Any) -> None:
    w = cupy.ones((2, 2, 3), np.float32)
    with cupy.cuda.Stream(non_blocking=True) as stream:

        def prepare() -> None:
            with pytest.raises(RuntimeError, match=r"^prepare: weights cannot be prepared while"):
                gpuconv.prepare(w)

        capture(stream, None, prepare)
    assert gpuconv.prepare(w).shape == (2, 2, 3)


WAITING: dict[str, Callable[[Any], object]] = {
    "copy": lambda layer: copy.copy(layer.weight),
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.dumps(layer.weight),
    "load_state_dict": lambda layer: layer.load_state_dict({"weight": np.zeros((6, 4, 3)), "bias": np.zeros(6)}),
    "load_state_dict of its own": lambda layer: layer.load_state_dict(layer.state_dict()),
    "to the CPU": lambda layer: layer.to("cpu"),
    "to a dtype": lambda layer: layer.to(dtype="float64"),
    "a new layer": lambda layer: nn.Conv1d(layer.in_channels, 6, 3, device="cuda"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["Relaxed", "Global"])
@pytest.mark.parametrize("name", WAITING)
def test_what_waits_for_the_gpu_is_refused_during_a_capture(cupy: Any, name: str, mode: str) -> None:
    """Before the capture is lost: the graph computes what was captured before and after."""
    layer = nn.Conv1d(4, 6, 3, device="cuda", rng=0)
    layer.weight = gpuconv.prepare(layer.weight)
    x = cupy.ones((2, 4, 30), np.float32)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        first, second = layer(x), layer(x)
        expected = first.get()

        def work() -> None:
            keywords = {"padding": layer.padding, "out": first}
            gpuconv.conv1d(x, layer.weight, layer.bias, **keywords)
            with pytest.raises(RuntimeError, match=r"while the current stream of GPU 0 is being captured$"):
                WAITING[name](layer)
            assert layer.to("cuda", "float32") is layer  # nothing to do
            gpuconv.conv1d(x, layer.weight, layer.bias, **{**keywords, "out": second})

        graph = capture(stream, getattr(cupy.cuda.runtime, f"streamCaptureMode{mode}"), work)
        for out in (first, second):
            out.fill(0)
        graph.launch(stream)
        stream.synchronize()
        assert first.get().tobytes() == second.get().tobytes() == expected.tobytes()
    assert copy.deepcopy(layer).weight.shape == (6, 4, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("allocator", ["none", "malloc_managed", "malloc_async", "MemoryPool"])
@pytest.mark.parametrize("name", WITH_BUFFERS)
def test_buffers_come_from_any_allocator(cupy: Any, name: str, allocator: str) -> None:
    if allocator == "none":
        malloc = cupy.cuda.memory._malloc
    elif allocator == "MemoryPool":
        malloc = cupy.cuda.MemoryPool(cupy.cuda.malloc_managed).malloc
    else:
        malloc = getattr(cupy.cuda, allocator)
    with cupy.cuda.using_allocator(malloc):
        function, arrays, expected = call_with_buffers(cupy, name)
        out = cupy.zeros(expected.shape, expected.dtype)
        function(*arrays, out=out)
        np.testing.assert_array_equal(cupy.asnumpy(out), expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", WITH_BUFFERS)
def test_arrays_on_another_device_than_the_current_one(cupy: Any, name: str) -> None:
    for current, home in ((0, 1), (1, 0)):
        with cupy.cuda.Device(home):
            function, arrays, expected = call_with_buffers(cupy, name)
            out = cupy.zeros(expected.shape, expected.dtype)
        with cupy.cuda.Device(current):
            function(*arrays, out=out)
            assert cupy.cuda.runtime.getDevice() == current
        with cupy.cuda.Device(home):
            np.testing.assert_array_equal(cupy.asnumpy(out), expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("target", ["cpu", "cuda:0"])
def test_layers_move_behind_the_work_queued_on_the_other_gpu(cupy: Any, target: str) -> None:
    layer = nn.Conv1d(512, 512, 3, device="cuda:1")
    with cupy.cuda.Device(1), cupy.cuda.Stream(non_blocking=True):
        cupy.cuda.Device(1).synchronize()
        layer.weight[...] = 7
        with cupy.cuda.Device(0), cupy.cuda.Stream(non_blocking=True):  # which is no stream of the other GPU
            moved = layer.to(target).weight
            assert cupy.cuda.runtime.getDevice() == 0
            assert (cupy.asnumpy(moved) == 7).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("target", ["cpu", "cuda:0", "cuda:1"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_layers_load_arrays_of_any_strides_from_another_gpu(cupy: Any, dtype: str, target: str) -> None:
    weight, bias = integers((4, 2, 6))[::-1, :, ::2], integers((8,))[::2]
    with cupy.cuda.Device(1):
        state = {"weight": cupy.asarray(integers((4, 2, 6)))[::-1, :, ::2], "bias": cupy.asarray(integers((8,)))[::2]}
    foreign = {key: SimpleNamespace(__cuda_array_interface__=a.__cuda_array_interface__) for key, a in state.items()}
    for given in (state, foreign):
        layer = nn.Conv1d(2, 4, 3, dtype=dtype, device=target)
        layer.load_state_dict(given)
        for loaded, expected in ((layer.weight, weight), (layer.bias, bias)):
            assert loaded.dtype == dtype
            assert home_of(loaded) == {"cpu": None, "cuda:0": 0, "cuda:1": 1}[target]
            np.testing.assert_array_equal(cupy.asnumpy(loaded), expected)


@pytest.mark.gpu
def test_cupys_profiler(cupy: Any) -> None:
    profiler = pytest.importorskip("cupyx.profiler")
    _, x, w = PACKED
    x, w = cupy.asarray(x), cupy.asarray(w)
    with profiler.time_range("a call"):
        gpuconv.conv1d(x, w)
    assert profiler.benchmark(gpuconv.conv1d, (x, w), n_repeat=2, n_warmup=1).gpu_times.shape == (1, 2)


PROGRAM = """
import os, cupy, numpy, gpuconv
x, w = numpy.ones((2, 5, 40), numpy.float32), numpy.ones((12, 5, 3), numpy.float32)
expected = gpuconv.conv1d(x, w)
prepared = gpuconv.prepare(cupy.asarray(w))
stream = cupy.cuda.Stream(non_blocking=True)
with stream:
    a, b, out = cupy.asarray(x), cupy.asarray(w), cupy.empty(expected.shape, x.dtype)
    for taps in (b, prepared):
        assert (gpuconv.conv1d(a, taps).get() == expected).all()
    stream.synchronize()
    stream.begin_capture()
    gpuconv.conv1d(a, b, out=out)
    graph = stream.end_capture()
    graph.launch()
    assert (out.get() == expected).all()
assert (gpuconv.conv1d(cupy.asarray(x), cupy.asarray(w)).get() == expected).all()
child = os.fork()
if child == 0:  # NumPy arrays need nothing of CUDA, which does not survive a fork
    os._exit(0 if (gpuconv.conv1d(x, w) == expected).all() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""  # ends with a graph, a prepared weight, plans and arrays alive


@pytest.mark.gpu
@pytest.mark.parametrize(
    "environment",
    [{"CUPY_ACCELERATORS": ""}, {"CUPY_ACCELERATORS": "cub"}, {"CUPY_CUDA_PER_THREAD_DEFAULT_STREAM": "1"}],
    ids=lambda environment: " ".join(f"{name}={value}" for name, value in environment.items()),
)
def test_a_process_ends_in_silence_whatever_cupy_is_told(environment: dict[str, str]) -> None:
    run_python(PROGRAM, **environment)
