"""The stand-in under CuPy, tests/gpu_on_cpu, held to CUDA's documentation, and faults planted in its use.

They need the stand-in itself: `python -m tests.gpu_on_cpu python -m pytest -m gpu tests/gpu_on_cpu/test_stand_in.py`.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import gpuconv
from gpuconv import runtime, source
from gpuconv.cli import main
from gpuconv.families import FAMILIES

compile_module = importlib.import_module("gpuconv.compile")  # `gpuconv.compile` is the function

pytestmark = [
    pytest.mark.gpu,
    # Arrays of a device that a test has lost cannot be freed, as CuPy says when it tries.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.skipif("GPU_ON_CPU" not in os.environ, reason="gpu_on_cpu: it does not run here"),
]


@pytest.fixture
def machine() -> Iterator[Any]:
    """The stand-in, whose devices forget their faults after the test, as no real device would."""
    from tests.gpu_on_cpu import machine, streams

    order = streams.QUEUE.random.getstate()
    yield machine
    streams.QUEUE.random.setstate(order)
    for device in machine.DEVICES:
        streams.QUEUE.run_all(device)
        device.error = None
    for capture in list(streams.Capture.active):
        for stream in capture.streams:
            stream.capture = None
        streams.Capture.active.remove(capture)


@pytest.fixture
def cupy(machine: Any) -> Any:  # noqa: ARG001 - devices forget their faults
    """CuPy on the stand-in."""
    return runtime.cupy_module()


@pytest.fixture
def lazy() -> Iterator[None]:
    """Work runs when it is waited for and not before."""
    from tests.gpu_on_cpu import streams

    with mock.patch.multiple(streams.QUEUE, eager=False, _runs_others=False):
        yield


def error_of(cupy: Any, call: Callable[[], Any]) -> str:
    """The message of the CUDA error that a call raises."""
    errors = (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError)
    with pytest.raises(errors) as raised:
        call()
    return str(raised.value)


def test_cupy_reads_the_device_properties_where_they_are(cupy: Any) -> None:
    """Every field that is named in our struct, by CuPy's own declaration of the struct."""
    from tests.gpu_on_cpu import cuda_devices

    fields = [name for name, kind in cuda_devices.DeviceProperties._fields_ if kind in (ctypes.c_int, ctypes.c_size_t)]
    numbers = {name: 1000 + i for i, name in enumerate(fields)}
    with mock.patch.object(cuda_devices, "_PROPERTIES", numbers):
        found = cupy.cuda.runtime.getDeviceProperties(0)
    shared = [name for name in fields if name in found]
    assert len(shared) > 40
    assert {name: found[name] for name in shared} == {name: numbers[name] for name in shared}


def test_devices_pose_as_the_architecture(cupy: Any) -> None:
    arch = os.environ["GPU_ON_CPU"].removeprefix("sm_")
    assert cupy.cuda.runtime.getDeviceCount() == 2
    assert [cupy.cuda.Device(i).compute_capability for i in range(2)] == [arch, arch]
    assert cupy.cuda.Device(1).pci_bus_id == "0000:02:00.0"


def test_a_function_that_is_not_there_fails_with_its_name(machine: Any, cupy: Any) -> None:
    message = error_of(cupy, lambda: cupy.cuda.runtime.deviceGetLimit(0))
    assert "gpu_on_cpu does not implement cudaDeviceGetLimit" in message
    assert machine.REFUSED.pop() == "cudaDeviceGetLimit"


@pytest.mark.usefixtures("cupy")
def test_another_cuda_runtime_in_cupy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from cupy_backends.cuda.api import runtime as extension

    from tests.gpu_on_cpu import hooks

    own = version("cupy-cuda13x")
    monkeypatch.setitem(hooks.NUM_FUNCTIONS, own, hooks.NUM_FUNCTIONS[own] - 1)
    with pytest.raises(RuntimeError, match=r"has \d+ functions cuda\*, expected \d+$"):
        hooks._hook(Path(extension.__file__))
    monkeypatch.setattr(hooks, "NUM_FUNCTIONS", {"14.1": 1, "14.2.1": 2})
    with pytest.raises(RuntimeError, match=rf"needs cupy-cuda13x 14\.1 or 14\.2\.1, found {re.escape(own)}$"):
        hooks._hook(Path(extension.__file__))


def python(code: str) -> subprocess.CompletedProcess[str]:
    """A Python process of its own on the stand-in."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


def test_a_process_ends_quietly_with_everything_alive() -> None:
    done = python("import cupy; x = cupy.ones(3); s = cupy.cuda.Stream(); e = s.record(); print(x.get(), flush=True)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1. 1. 1.]\n", "")


def test_a_process_that_called_what_is_not_there_fails() -> None:
    done = python(
        "import cupy\ntry:\n    cupy.cuda.runtime.deviceGetLimit(0)\nexcept cupy.cuda.runtime.CUDARuntimeError: pass"
    )
    assert done.returncode == 70
    assert "the process called what is not implemented: cudaDeviceGetLimit" in done.stderr


def test_a_forked_child_cannot_use_the_gpu() -> None:
    done = python(
        "import os, cupy\ncupy.ones(3)\nif os.fork() == 0:\n    try:\n        cupy.ones(3)\n"
        "    except Exception as error:\n        print(error, flush=True)\n    os._exit(0)\nos.wait()"
    )
    assert "cudaErrorInitializationError" in done.stdout


FILL = r"""
extern "C" __global__ void fill(float* out, int n, int first, float value) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[first + i] = value;
}
extern "C" __global__ void through_shared(float* out) {
    extern __shared__ float smem[];
    smem[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = smem[blockDim.x - 1 - threadIdx.x];
}
"""


def fill(cupy: Any, out: Any, first: int = 0, value: float = 1.0) -> None:
    kernel = cupy.RawModule(code=FILL).get_function("fill")
    kernel(((out.size + 31) // 32,), (32,), (out, np.int32(out.size), np.int32(first), np.float32(value)))


def exact(cupy: Any, size: int) -> Any:
    """An array of float32 in an allocation of its own."""
    memory = cupy.cuda.Memory(4 * size)
    return cupy.ndarray((size,), np.float32, cupy.cuda.MemoryPointer(memory, 0))


@pytest.mark.parametrize("first", [64, -(1 << 12)])
def test_a_write_out_of_bounds_is_a_fault_of_the_device(cupy: Any, first: int) -> None:
    array = exact(cupy, 64)  # 256 bytes, which end at the guard page

    def go() -> None:
        fill(cupy, array, first)
        cupy.cuda.Device().synchronize()

    message = error_of(cupy, go)
    assert "cudaErrorIllegalAddress" in message
    assert "fill, block" in message
    assert first < 0 or re.search(r"write to byte (\d+) of memory of device 0, allocated with 256 bytes", message)
    assert "cudaErrorIllegalAddress" in error_of(cupy, lambda: cupy.cuda.runtime.malloc(8))  # the device is lost


def test_a_write_past_the_end_shows_when_the_memory_is_freed(cupy: Any) -> None:
    memory = cupy.cuda.runtime.malloc(40)  # 216 bytes short of the guard page
    array = cupy.ndarray((10,), np.float32, cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(memory, 40, None), 0))
    fill(cupy, array, 1)
    assert "beside an allocation of 40 bytes, at its byte 40" in error_of(cupy, lambda: cupy.cuda.runtime.free(memory))


def test_freed_memory_is_gone(cupy: Any) -> None:
    memory = cupy.cuda.runtime.malloc(256)
    array = cupy.ndarray((64,), np.float32, cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(memory, 256, None), 0))
    cupy.cuda.runtime.free(memory)

    def go() -> None:
        fill(cupy, array)
        cupy.cuda.Device().synchronize()

    assert "of a freed memory of device 0" in error_of(cupy, go)


def test_a_pointer_of_the_host_is_no_pointer_of_the_device(cupy: Any) -> None:
    host = np.zeros(64, np.float32)
    memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, 0)
    array = cupy.ndarray((64,), np.float32, cupy.cuda.MemoryPointer(memory, 0))

    def go() -> None:
        fill(cupy, array)
        cupy.cuda.Device().synchronize()

    assert "is not of this device's memory" in error_of(cupy, go)


def test_memory_of_another_device_cannot_be_used(cupy: Any) -> None:
    with cupy.cuda.Device(1):
        array = cupy.zeros(64, np.float32)
        pointer = array.data.ptr
    kernel = cupy.RawModule(code=FILL).get_function("fill")

    def go() -> None:
        kernel((2,), (32,), (np.uint64(pointer), np.int32(64), np.int32(0), np.float32(1)))
        cupy.cuda.Device().synchronize()

    assert "is not of this device's memory" in error_of(cupy, go)


def test_fresh_memory_is_poisoned(cupy: Any) -> None:
    for dtype in (np.float16, np.float32, np.float64):
        pointer = cupy.cuda.MemoryPointer(cupy.cuda.Memory(800), 0)
        assert np.isnan(cupy.ndarray((100,), dtype, pointer).get()).all()


def test_too_little_shared_memory_is_a_fault(cupy: Any) -> None:
    kernel = cupy.RawModule(code=FILL).get_function("through_shared")
    out = cupy.zeros(64, np.float32)
    kernel((1,), (64,), (out,), shared_mem=256)
    assert np.array_equal(out.get(), np.arange(64)[::-1])

    def go() -> None:
        kernel((1,), (64,), (out,), shared_mem=240)
        cupy.cuda.Device().synchronize()

    assert "cudaErrorIllegalAddress" in error_of(cupy, go)


def test_shared_memory_must_be_asked_for_and_ends_at_the_architectures_limit(machine: Any, cupy: Any) -> None:
    kernel = cupy.RawModule(code=FILL).get_function("through_shared")
    out = cupy.zeros(64, np.float32)
    too_much = 48 * 1024 + 16
    assert "bytes of dynamic shared memory" in error_of(cupy, lambda: kernel((1,), (64,), (out,), shared_mem=too_much))
    limit = machine.MODEL.shared_per_block

    def ask(size: int) -> None:
        kernel.max_dynamic_shared_size_bytes = size

    assert "more than" in error_of(cupy, lambda: ask(limit + 1))
    ask(limit)
    kernel((1,), (64,), (out,), shared_mem=too_much)
    cupy.cuda.Device().synchronize()


@pytest.mark.usefixtures("machine")
def test_what_is_compiled_in_advance_is_what_cupy_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Byte for byte, and each GPU loads it by its path."""
    from tests.gpu_on_cpu import modules

    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(tmp_path))
    device = runtime.device(0)
    config = next(c for family in FAMILIES if family.name == "conv1d_tail" for c in family.configs(device))
    images: list[bytes] = []
    translated = modules._translated
    monkeypatch.setattr(modules, "_translated", lambda image: (images.append(image), translated(image))[1])
    for in_advance in (False, True):
        if in_advance:
            compile_module.compile_all([(config, device.arch_name)], 1, None)
        runtime.build.cache_clear()
        kernel = runtime.build(config, device.arch_name)
        assert (kernel.file_path is not None) == in_advance
        for index in range(2):
            with runtime.cupy_module().cuda.Device(index):
                kernel.compile()
    runtime.build.cache_clear()
    assert len(images) == 4
    assert set(images) == {images[0]}


def test_a_module_that_is_not_there_is_named(cupy: Any, tmp_path: Path) -> None:
    kernel = cupy.RawModule(path=str(tmp_path / "none.cubin")).get_function
    assert error_of(cupy, lambda: kernel("fill").kernel).startswith("cudaErrorFileNotFound: there is no file /")


def test_a_function_belongs_to_the_device_that_it_was_loaded_on(cupy: Any) -> None:
    function = cupy.RawModule(code=FILL).get_function("fill").kernel
    arguments = [np.array(value) for value in (np.uint64(0), np.int32(0), np.int32(0), np.float32(0))]
    table = (ctypes.c_void_p * 4)(*(argument.ctypes.data for argument in arguments))
    with cupy.cuda.Device(1):
        message = error_of(
            cupy,
            lambda: cupy.cuda.driver.launchKernel(function.ptr, 1, 1, 1, 32, 1, 1, 0, 0, ctypes.addressof(table), 0),
        )
    assert "fill was loaded on another device" in message


def test_a_null_parameter_is_refused(cupy: Any) -> None:
    function = cupy.RawModule(code=FILL).get_function("fill").kernel
    table = (ctypes.c_void_p * 4)()
    launch = cupy.cuda.driver.launchKernel
    message = error_of(cupy, lambda: launch(function.ptr, 1, 1, 1, 32, 1, 1, 0, 0, ctypes.addressof(table), 0))
    assert "kernelParams[0] is null" in message


@pytest.mark.usefixtures("lazy")
def test_nothing_runs_before_it_is_waited_for(cupy: Any) -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    event = cupy.cuda.Event()
    with stream:
        event.record()
    assert not event.done
    event.synchronize()
    assert event.done


@pytest.mark.usefixtures("lazy")
def test_a_missing_wait_between_streams_shows(cupy: Any) -> None:
    array, copy = exact(cupy, 64), exact(cupy, 64)
    writer, reader = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    for waits in (False, True):
        with writer:
            array.fill(waits + 1)
            written = writer.record()
        with reader:
            if waits:
                reader.wait_event(written)
            copy.data.copy_from_device_async(array.data, array.nbytes)
            result = cupy.asnumpy(copy)
        assert (result == waits + 1).all() == waits
    writer.synchronize()


@pytest.mark.usefixtures("lazy")
def test_the_default_stream_waits_for_blocking_streams_and_they_for_it(cupy: Any) -> None:
    array = exact(cupy, 64)
    for non_blocking in (False, True):
        stream = cupy.cuda.Stream(non_blocking=non_blocking)
        array.fill(0)
        cupy.cuda.Device().synchronize()
        with stream:
            array.fill(1)
        with cupy.cuda.Stream.null:
            seen = array.get()
        assert (seen == 1).all() != non_blocking
        stream.synchronize()


def test_a_seeded_order_runs_other_work_too(cupy: Any) -> None:
    from tests.gpu_on_cpu import streams

    stream, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with mock.patch.multiple(streams.QUEUE, eager=False, _runs_others=True):
        events = []
        for _ in range(20):
            with stream:
                events.append(stream.record())
            other.record()
        assert {event.work.done for event in _works(events)} == {True, False}
    stream.synchronize()


def _works(events: list[Any]) -> list[Any]:
    from tests.gpu_on_cpu import machine, streams

    return [machine.HANDLES.get(event.ptr, streams.Event) for event in events]


GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2


def test_a_graph_repeats_its_work(cupy: Any) -> None:
    array = exact(cupy, 64)
    fill(cupy, array, 0, 3.0)  # compiled and loaded
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture(GLOBAL)
        fill(cupy, array, 0, 5.0)
        graph = stream.end_capture()
    assert (array.get() == 3).all()
    graph.launch(stream)
    stream.synchronize()
    assert (array.get() == 5).all()


@pytest.mark.parametrize("mode", [GLOBAL, THREAD_LOCAL, RELAXED])
def test_an_allocation_during_a_capture_loses_it(cupy: Any, mode: int) -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    stream.begin_capture(mode)
    if mode == RELAXED:
        cupy.cuda.runtime.free(cupy.cuda.runtime.malloc(8))
        stream.end_capture()
        return
    assert "cudaErrorStreamCaptureUnsupported" in error_of(cupy, lambda: cupy.cuda.runtime.malloc(8))
    assert "cudaErrorStreamCaptureInvalidated" in error_of(cupy, stream.end_capture)


@pytest.mark.parametrize(("mode", "is_forbidden"), [(GLOBAL, True), (THREAD_LOCAL, False), (RELAXED, False)])
def test_another_threads_allocation_loses_a_capture_in_global_mode(cupy: Any, mode: int, is_forbidden: bool) -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    stream.begin_capture(mode)
    messages: list[str] = []

    def allocate() -> None:
        try:
            cupy.cuda.runtime.free(cupy.cuda.runtime.malloc(8))
        except cupy.cuda.runtime.CUDARuntimeError as error:
            messages.append(str(error))

    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    assert bool(messages) == is_forbidden


def test_what_a_capture_forbids(cupy: Any) -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    blocking = cupy.cuda.Stream()
    array = exact(cupy, 64)
    fill(cupy, array)
    for capturing, call, name in (
        (stream, stream.synchronize, "StreamCaptureUnsupported"),
        (stream, cupy.cuda.Device().synchronize, "StreamCaptureUnsupported"),
        (stream, lambda: cupy.RawModule(code=FILL + "//").get_function("fill").kernel, "StreamCaptureUnsupported"),
        (blocking, lambda: fill(cupy, array), "StreamCaptureImplicit"),
    ):
        capturing.begin_capture(GLOBAL)
        assert name in error_of(cupy, call)
        assert "Invalidated" in error_of(cupy, capturing.end_capture)


def test_a_stream_that_joined_a_capture_must_come_back(cupy: Any) -> None:
    origin, side = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    array = exact(cupy, 64)
    fill(cupy, array)
    cupy.cuda.Device().synchronize()
    for comes_back in (False, True):
        origin.begin_capture(GLOBAL)
        begun = cupy.cuda.Event(disable_timing=True)
        begun.record(origin)
        side.wait_event(begun)
        with side:
            fill(cupy, array, 0, 7.0)
        ended = cupy.cuda.Event(disable_timing=True)
        ended.record(side)
        if comes_back:
            origin.wait_event(ended)
            origin.end_capture().launch(origin)
        else:
            assert "StreamCaptureUnjoined" in error_of(cupy, origin.end_capture)
    origin.synchronize()
    assert (array.get() == 7).all()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["info"], "GPU 1          CPU posing as"),
        (["explain", "conv1d", "--input", "1,64,200", "--weight", "64,64,3"], "conv1d on CPU posing as"),
        (["verify", "--device", "gpu", "--filter", "hifigan_resblock", "--dtype", "float32"], "GPU 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_command_line_finds_the_gpus(
    machine: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert main(arguments) == 0
    assert expected in capsys.readouterr().out
    assert machine.DEVICES[0].error is None


ARRAYS = [(1, 4, 50), (6, 4, 3)]


def convolve(cupy: Any) -> tuple[Any, Any]:
    """A convolution on the device and the right result."""
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-8, 8, shape).astype(np.float32) for shape in ARRAYS)
    return gpuconv.conv1d(cupy.asarray(x), cupy.asarray(w)).get(), gpuconv.conv1d(x, w)


@pytest.fixture
def no_plans() -> Iterator[None]:
    """Plans are made afresh before and after the test."""
    from gpuconv import calls

    calls._EXECUTORS.clear()
    yield
    calls._EXECUTORS.clear()


def is_caught(cupy: Any) -> bool:
    """Whether a convolution fails or gives a wrong result."""
    try:
        found, expected = convolve(cupy)
    except (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError):
        return True
    return not np.array_equal(found, expected)


@pytest.mark.usefixtures("no_plans")
def test_nothing_is_caught_without_a_fault(cupy: Any) -> None:
    assert not is_caught(cupy)


@pytest.mark.usefixtures("no_plans")
def test_a_wrong_parameter_struct_is_caught(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = source.pack_params
    monkeypatch.setattr(source, "pack_params", lambda params, bits: np.roll(right(params, bits), 1))
    assert is_caught(cupy)


@pytest.mark.usefixtures("no_plans")
@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 3), (1, 3)])
def test_swapped_pointers_are_caught(cupy: Any, monkeypatch: pytest.MonkeyPatch, first: int, second: int) -> None:
    right = runtime.kernels.Kernel.launch

    def launch(kernel: Any, *pointers: Any) -> None:
        swapped = list(pointers)
        if len(swapped) > second:
            swapped[first], swapped[second] = swapped[second], swapped[first]
        right(kernel, *swapped)

    monkeypatch.setattr(runtime.kernels.Kernel, "launch", launch)
    assert is_caught(cupy)


@pytest.mark.usefixtures("no_plans")
def test_a_temporary_given_back_too_early_is_caught(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = np.ones((1, 66, 200), np.float16), np.ones((64, 66, 3), np.float16)
    expected = gpuconv.conv1d(x, w)
    arrays = cupy.asarray(x), cupy.asarray(w)
    assert np.array_equal(gpuconv.conv1d(*arrays).get(), expected)
    pack = runtime.prepared.Packing.pack
    packed_sizes = []

    def pack_and_let_go(packing: Any, weight: Any) -> Any:
        packed = pack(packing, weight)
        packed_sizes.append(packed.mem.size)
        return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(packed.ptr, packed.mem.size, None), 0)

    monkeypatch.setattr(runtime.prepared.Packing, "pack", pack_and_let_go)
    assert not np.array_equal(gpuconv.conv1d(*arrays).get(), expected)
    assert packed_sizes, "the problem packs no weights"


@pytest.mark.usefixtures("no_plans", "lazy")
def test_work_on_another_stream_without_a_wait_is_caught(cupy: Any) -> None:
    """The weights are written on one stream and used on another, with and without a wait in between."""
    x, w = np.ones((1, 4, 50), np.float32), np.full((6, 4, 3), 2, np.float32)
    expected = gpuconv.conv1d(x, w)
    given = cupy.asarray(x)
    cupy.cuda.Device().synchronize()
    for waits in (False, True):
        writer, reader = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        with writer:
            weight = cupy.full(w.shape, 2, np.float32)
            written = writer.record()
        with reader:
            if waits:
                reader.wait_event(written)
            result = gpuconv.conv1d(given, weight).get()
        assert np.array_equal(result, expected) == waits
        writer.synchronize()


def test_poison_of_the_pool_is_in_order_where_another_gpu_was_used_first() -> None:
    """A block that the pool hands out again is not poisoned after that."""
    done = python(
        "import cupy\n"
        "from tests.gpu_on_cpu import pool\n"
        "with cupy.cuda.Device(1): cupy.empty(3)\n"
        "with pool.poisoned_pool(), cupy.cuda.Stream(non_blocking=True) as queue:\n"
        "    x = cupy.arange(9.0)\n"
        "    kept = []\n"
        "    for i in range(20):\n"
        "        x.copy()\n"
        "        kept.append(x + i)\n"
        "    queue.synchronize()\n"
        "    cupy.cuda.Device().synchronize()\n"
        "    print([float(y.get().sum()) for y in kept] == [36.0 + 9 * i for i in range(20)])\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
