"""CUDA tensors as CuPy arrays on PyTorch's current stream, with the real CuPy.

On a GPU the tests use PyTorch's CUDA build. Under `python -m tests.gpu_on_cpu`, where PyTorch has no CUDA, CPU tensors
in the memory of the stand-in's devices pose as CUDA tensors, and streams of CuPy's own as PyTorch's.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests import NO_TORCH

pytest.importorskip("torch", reason=NO_TORCH)

import torch

from gpuconv import runtime
from gpuconv import torch as bridge
from gpuconv.problem import DTYPES, Op, numpy_dtype
from gpuconv.torch import tensors
from tests.api.test_functional import draw
from tests.torch.test_torch_bridge import OPS, compiler, drawn, tensor, up_and_down, values

__all__ = ["compiler"]  # a fixture

pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.usefixtures("one_torch_thread")]


class Gpu:
    """PyTorch on a GPU, as far as the tests need it."""

    def put(self, t: torch.Tensor, device: int = 0) -> torch.Tensor:
        """A copy of a tensor, dense but with its order of axes, on a device."""
        return t.to(f"cuda:{device}")

    def get(self, t: torch.Tensor) -> torch.Tensor:
        """A copy on the CPU, once all devices have done their work."""
        for device in range(self.num_devices()):
            torch.cuda.synchronize(device)
        return t.detach().cpu()

    def num_devices(self) -> int:
        return torch.cuda.device_count()

    @contextlib.contextmanager
    def side_stream(self, device: int = 0) -> Iterator[None]:
        """Another stream is PyTorch's current one on a device, which itself need not be the current one."""
        current = torch.cuda.current_device()
        with torch.cuda.stream(torch.cuda.Stream(device)):
            torch.cuda.set_device(current)
            yield

    def fill(self, t: torch.Tensor, value: float) -> None:
        """Queue on PyTorch's current stream that a tensor gets a value, after a while."""
        with torch.cuda.device(t.device):
            torch.cuda._sleep(20_000_000)
        t.fill_(value)

    @contextlib.contextmanager
    def captured(self) -> Iterator[Callable[[], None]]:
        """What is queued becomes a CUDA graph; gives what runs it, behind the context."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            yield graph.replay

    def handed_out(self) -> int:
        """The bytes that PyTorch's allocator has handed out until now, whether they are free again or not."""
        return int(torch.cuda.memory_stats()["allocated_bytes.all.allocated"])


class PretendedGpu(Gpu):
    """What `tensors` asks of PyTorch on CUDA, with the real CuPy on the stand-in."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.cupy = runtime.cupy_module()
        self.pool = self.cupy.cuda.MemoryPool()  # like PyTorch's it hands memory out again to the same stream only
        self.num_bytes = 0  # handed out
        self.current_device = 0
        self.streams = [self.cupy.cuda.Stream.null] * self.num_devices()
        patch.setattr(tensors, "on_gpu", lambda _: True)

        def new_empty(t: torch.Tensor, shape: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
            shape = (shape,) if isinstance(shape, int) else shape
            return self._empty(shape, dtype or t.dtype, self._device_of(t))

        def get_device(t: torch.Tensor) -> int:
            return self._device_of(t)

        patch.setattr(torch.Tensor, "new_empty", new_empty, raising=False)
        patch.setattr(torch.Tensor, "get_device", get_device, raising=False)
        patch.setattr(torch.cuda, "device", self._device)
        patch.setattr(torch.cuda, "current_stream", self._stream)

    def put(self, t: torch.Tensor, device: int = 0) -> torch.Tensor:
        order = sorted(range(t.dim()), key=t.stride, reverse=True)
        dense = self._empty([t.shape[i] for i in order], t.dtype, device).permute(
            [order.index(i) for i in range(t.dim())]
        )
        with self.cupy.cuda.Device(device) as used:
            used.synchronize()  # nothing is queued that would write there
        return dense.copy_(t.detach())

    def get(self, t: torch.Tensor) -> torch.Tensor:
        for device in range(self.num_devices()):
            self.cupy.cuda.Device(device).synchronize()
        return t.detach().clone()

    def num_devices(self) -> int:
        return int(self.cupy.cuda.runtime.getDeviceCount())

    @contextlib.contextmanager
    def side_stream(self, device: int = 0) -> Iterator[None]:
        before = self.streams[device]
        with self.cupy.cuda.Device(device):
            self.streams[device] = self.cupy.cuda.Stream(non_blocking=True)
        yield
        self.streams[device] = before

    def fill(self, t: torch.Tensor, value: float) -> None:
        device = self._device_of(t)
        with self.cupy.cuda.Device(device), self.streams[device]:
            tensors.cupy_array(self.cupy, t).fill(value)

    @contextlib.contextmanager
    def captured(self) -> Iterator[Callable[[], None]]:
        graphs: list[Any] = []
        with self.side_stream():
            stream = self.streams[0]
            stream.begin_capture()
            yield lambda: graphs[0].launch(stream)
            graphs.append(stream.end_capture())

    def handed_out(self) -> int:
        return self.num_bytes

    def _empty(self, shape: Any, dtype: torch.dtype, device: int) -> torch.Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        with self.cupy.cuda.Device(device), self.streams[device]:
            memory = self.pool.malloc(num_bytes)
        self.num_bytes += num_bytes
        buffer = (ctypes.c_char * num_bytes).from_address(memory.ptr)
        buffer.memory = memory  # which lives as long as the tensor
        return torch.from_numpy(np.frombuffer(buffer, np.uint8)).view(dtype).view(tuple(shape))

    def _device_of(self, t: torch.Tensor) -> int:
        from tests.gpu_on_cpu import machine

        return next((d.index for d in machine.DEVICES if t.data_ptr() in d.arena), self.current_device)

    @contextlib.contextmanager
    def _device(self, index: int) -> Iterator[None]:
        """CuPy's device stays what it is: the two libraries have a CUDA runtime each."""
        before, self.current_device = self.current_device, index
        yield
        self.current_device = before

    def _stream(self) -> Any:
        handle = self.streams[self.current_device].ptr
        return SimpleNamespace(__cuda_stream__=lambda: (0, handle))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return PretendedGpu(monkeypatch) if "GPU_ON_CPU" in os.environ else Gpu()


@pytest.mark.parametrize("dtype", DTYPES)
def test_cupy_arrays_share_the_memory_of_cuda_tensors(gpu: Gpu, dtype: str) -> None:
    cupy, t = runtime.cupy_module(), gpu.put(tensor(draw((4, 6), dtype)))
    for view in (t, t.T[1::2].requires_grad_(), t[1:, 3:], t[:, :1].expand(4, 5), t[2], t.view(-1)[23]):
        array = tensors.cupy_array(cupy, view)
        assert array.dtype == numpy_dtype(dtype)
        assert array.shape == view.shape
        assert array.data.ptr == view.data_ptr()
        assert array.data.device_id == 0
        assert array.data.mem.size == t.nbytes - view.storage_offset() * t.itemsize
        assert tuple(s // array.itemsize for s in array.strides) == view.stride()
        assert np.array_equal(array.get(), values(gpu.get(view)))
    for empty in (t[:0], gpu.put(tensor(draw((0, 3), dtype)))):
        assert tensors.cupy_array(cupy, empty).shape == empty.shape


def test_cupy_arrays_keep_the_memory_of_cuda_tensors(gpu: Gpu) -> None:
    t = gpu.put(torch.arange(6.0))
    array = tensors.cupy_array(runtime.cupy_module(), t)
    del t
    other = gpu.put(torch.ones(6))
    assert array.get().tolist() == [0, 1, 2, 3, 4, 5]
    assert gpu.get(other).tolist() == [1] * 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_cuda_tensors_give_the_same_as_cpu_tensors(op: Op, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data are integers, so a result, its gradients and their gradients agree bit for bit."""
    arrays = (draw((2, 4, 9), dtype), draw((4, 2, 3), dtype, 1), draw((4,), dtype, 2))
    u = draw((2, 4, 4) if op == "conv1d" else (2, 4, 18), dtype, 3)

    def run(gpu: Gpu | None) -> list[Any]:
        put = (lambda t: t) if gpu is None else gpu.put
        leaves = [put(tensor(a)).requires_grad_() for a in (*arrays, u)]
        y = getattr(bridge, op)(*leaves[:3], groups=2, stride=2, padding=(1, 0))
        first = torch.autograd.grad(y, leaves[:3], leaves[3], create_graph=True)
        directions = [put(tensor(draw(tuple(g.shape), dtype, 4))) for g in first]
        # Each by itself: sums of gradients are PyTorch's own work, which knows nothing of pretended GPUs.
        second = [
            gradient
            for g, direction in zip(first, directions, strict=True)
            for gradient in torch.autograd.grad(g, leaves, direction, retain_graph=True, allow_unused=True)
            if gradient is not None
        ]
        assert len(second) == 5
        return [values(t if gpu is None else gpu.get(t)) for t in (y, *first, *second)]

    on_cpu = run(None)
    gpu = PretendedGpu(monkeypatch) if "GPU_ON_CPU" in os.environ else Gpu()
    for ours, expected in zip(run(gpu), on_cpu, strict=True):
        np.testing.assert_array_equal(ours, expected)
    empty = getattr(bridge, op)(gpu.put(tensor(arrays[0]))[:0], gpu.put(tensor(arrays[1])), groups=2)
    assert empty.shape[0] == 0


@pytest.mark.parametrize("op", OPS)
def test_cuda_tensors_may_lie_in_memory_in_any_way(op: Op, gpu: Gpu) -> None:
    x, w = tensor(draw((2, 4, 9), "complex64", 0)), tensor(draw((4, 4, 3), "complex64", 1))
    for make in (
        lambda t: gpu.put(t.transpose(1, 2)).transpose(1, 2),
        lambda t: gpu.put(t.repeat_interleave(2, -1))[..., ::2],
        lambda t: gpu.put(t[:1]).expand(4, -1, -1),
    ):
        given = (make(x), make(w))
        result = getattr(bridge, op)(*given)
        expected = getattr(torch.nn.functional, op)(*(gpu.get(t) for t in given))
        assert torch.equal(gpu.get(result), expected)


@pytest.mark.parametrize("device", [0, 1])
def test_work_is_queued_on_pytorchs_current_stream(gpu: Gpu, device: int) -> None:
    """Behind what is queued there and before what comes next, on whichever device is current."""
    if device >= gpu.num_devices():
        pytest.skip("gpu: there is one GPU only")
    w, x = gpu.put(torch.ones(1, 1, 3), device), gpu.put(torch.zeros(1, 1, 1000), device)
    gpu.get(bridge.conv1d(x, w))  # compiled
    for _ in range(3):
        with gpu.side_stream(device):
            gpu.fill(x, 1)
            y = bridge.conv1d(x, w)
            gpu.fill(x, 5)
            doubled = bridge.conv1d(y, w)
        assert torch.equal(gpu.get(doubled), torch.full((1, 1, 996), 9.0))


def test_work_of_other_threads(gpu: Gpu) -> None:
    """Backward passes run in threads of their own."""
    x, w = gpu.put(torch.ones(1, 8, 200)), gpu.put(torch.ones(8, 8, 3))
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(bridge.conv1d(x, w))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [bool((gpu.get(y) == 24).all()) for y in results] == [True] * 3


def test_temporary_memory_is_pytorchs(gpu: Gpu) -> None:
    """CuPy's pool would keep it from PyTorch."""
    pool = runtime.cupy_module().get_default_memory_pool()
    x, w = gpu.put(torch.ones(1, 33, 40)), gpu.put(torch.ones(64, 33, 7))  # of weights that are packed
    before = pool.total_bytes(), gpu.handed_out()
    y = bridge.conv1d(x, w)
    assert pool.total_bytes() == before[0]
    assert gpu.handed_out() >= before[1] + y.nbytes + w.nbytes
    assert bool((gpu.get(y) == 33 * 7).all())


def test_calls_in_cuda_graphs(gpu: Gpu) -> None:
    """The weights are packed anew in each call."""
    x, w = gpu.put(torch.ones(1, 33, 40)), gpu.put(torch.ones(64, 33, 7))
    gpu.get(bridge.conv1d(x, w))  # compiled
    with gpu.captured() as replay:
        y = bridge.conv1d(x, w)
    for changed, value, factor in ((x, 2, 2), (w, 3, 6)):
        gpu.fill(changed, value)
        gpu.get(changed)  # the graph runs behind it
        replay()
        assert bool((gpu.get(y) == factor * 33 * 7).all())


def test_cupys_per_thread_default_stream_has_no_effect() -> None:
    """PyTorch's default stream is another."""
    environment = {**os.environ, "CUPY_CUDA_PER_THREAD_DEFAULT_STREAM": "1"}
    names = (
        "test_cuda_tensors_give_the_same_as_cpu_tensors[conv1d-float32]",
        "test_work_is_queued_on_pytorchs_current_stream",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += [f"{__file__}::{name}" for name in names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout


def test_mixed_devices_are_refused(gpu: Gpu) -> None:
    x, w = torch.ones(2, 4, 9), torch.ones(4, 4, 3)
    message = r"^conv1d: all tensors must be on one device, got input on cuda:0 and weight on cpu$"
    with pytest.raises(TypeError, match=message):
        bridge.conv1d(gpu.put(x), w)


def test_pending_conjugations_and_negations_on_a_gpu(gpu: Gpu) -> None:
    x, w = (gpu.put(torch.randn(shape, dtype=torch.complex64)) for shape in ((2, 4, 9), (4, 4, 3)))
    for given in ((x.conj(), w.conj()), (x.conj().imag, w.conj().imag)):
        expected = torch.nn.functional.conv1d(*(gpu.get(t) for t in given))
        torch.testing.assert_close(gpu.get(bridge.conv1d(*given)), expected, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_runs_on_the_gpu(gpu: Gpu, compiler: Callable[..., Any]) -> None:
    leaves = [t.detach() for t in drawn(((2, 4, 20), (4,), *[(4, 2, 3)] * 3), torch.float64)]
    result = compiler(up_and_down, backend="aot_eager")(*map(gpu.put, leaves))
    torch.testing.assert_close(gpu.get(result), up_and_down(*leaves), rtol=1e-12, atol=1e-12)
