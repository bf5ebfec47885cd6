"""What all tests share: the GPU tests' condition, and the backends that run convolutions."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gpuconv
from gpuconv import calls, cases, runtime
from gpuconv.gpus import missing_gpu
from gpuconv.problem import ConvProblem
from tests import NO_TORCH, hostcuda
from tests.gpu_on_cpu.limits import skip_what_cannot_run
from tests.plans import forget_kernels

Array = npt.NDArray[Any]


def pytest_configure(config: pytest.Config) -> None:
    """Make Hypothesis repeatable however slow the machine is, and give BLAS one thread in each worker.

    A worker reads this variable of its parent as it imports NumPy. There are as many workers as processors: threads of
    BLAS would spend most of their time waiting for each other.
    """
    if config.getoption("numprocesses", default=None):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if importlib.util.find_spec("hypothesis") is not None:  # the tests on a GPU run where it is not installed
        from hypothesis import settings

        settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
        settings.load_profile("repeatable")


@dataclass(frozen=True)
class Backend:
    """A way to compute both operations on NumPy arrays.

    Attributes:
        name: "numpy" (the CPU path), "hostcuda" (the CUDA kernels on the CPU) or "gpu".
        convolve: (problem, input, weight, bias or None) -> output, all of the problem's shapes and dtype.
    """

    name: str
    convolve: Callable[[ConvProblem, Array, Array, Array | None], Array]

    def conv1d(self, input: Array, weight: Array, bias: Array | None = None, **settings: Any) -> Array:
        """`gpuconv.conv1d` on this backend."""
        return self.convolve(ConvProblem.conv1d(input, weight, bias, **settings), input, weight, bias)

    def conv_transpose1d(self, input: Array, weight: Array, bias: Array | None = None, **settings: Any) -> Array:
        """`gpuconv.conv_transpose1d` on this backend."""
        return self.convolve(ConvProblem.conv_transpose1d(input, weight, bias, **settings), input, weight, bias)


def _public(problem: ConvProblem, input: Any, weight: Any, bias: Any | None) -> Any:
    function = gpuconv.conv_transpose1d if problem.transposed else gpuconv.conv1d
    return function(input, weight, bias, **cases.call_settings(problem))


def _on_gpu(problem: ConvProblem, input: Array, weight: Array, bias: Array | None) -> Array:
    cupy = runtime.cupy_module()
    arrays = [None if array is None else cupy.asarray(array) for array in (input, weight, bias)]
    return cupy.asnumpy(_public(problem, *arrays))


BACKENDS = {
    "numpy": Backend("numpy", _public),
    "hostcuda": Backend("hostcuda", lambda p, x, w, b: hostcuda.compute(p, x, w, b, schedule="every")),
    "gpu": Backend("gpu", _on_gpu),
}


@pytest.fixture(params=["numpy", "hostcuda", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each way to compute a convolution in turn."""
    return BACKENDS[request.param]


@pytest.fixture(autouse=True, scope="session")
def no_kernels_compiled_in_advance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whoever runs the tests, kernels are made as CuPy makes them, until a test compiles some in advance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPUCONV_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.delenv("GPUCONV_CACHE_ONLY", raising=False)
        yield


@pytest.fixture(autouse=True)
def gpu_on_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Under gpu_on_cpu: CuPy's pool poisons what it takes back, and no test calls what is not there."""
    if "GPU_ON_CPU" not in os.environ or not request.node.get_closest_marker("gpu"):
        yield
        return
    from tests.gpu_on_cpu import machine, pool

    with pool.poisoned_pool():
        yield
    assert machine.REFUSED == []


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """CuPy, for tests marked `gpu`; no plans are left from other tests."""
    monkeypatch.setattr(calls, "_EXECUTORS", {})
    return runtime.cupy_module()


@pytest.fixture
def two_gpus() -> None:
    """For tests that need a second GPU."""
    if runtime.device_count() < 2:
        pytest.skip("needs two GPUs")


class Launches(list[str]):
    """The names of gpuconv's kernels that were launched, in order.

    Attributes:
        before: is called with the name of a kernel before it is launched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[str], object] = lambda _: None


@pytest.fixture
def launched(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """What is launched during the test, as CuPy sees it."""
    names = Launches()

    class Function:
        """The function of a kernel, which lists its launches."""

        def __init__(self, name: str, function: Any) -> None:
            self._name, self._function = name, function

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self._function, attribute)

        def __call__(self, *arguments: Any, **keywords: Any) -> None:
            names.before(self._name)
            names.append(self._name)
            self._function(*arguments, **keywords)

    class RawKernel(cupy.RawKernel):  # type: ignore[misc, name-defined]
        @property
        def kernel(self) -> Function:
            return Function(self.name, super().kernel)

    monkeypatch.setattr(cupy, "RawKernel", RawKernel)
    forget_kernels()  # those whose launches are not listed
    yield names
    forget_kernels()


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """PyTorch on one thread: in small problems several spend most of their time waiting for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(tryfirst=True)  # before tests are deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `gpu` where no GPU answers, what gpu_on_cpu or an old NumPy cannot run, and `torch` without PyTorch.

    What is marked `long` comes first.
    """
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if "GPU_ON_CPU" in os.environ:
        skip_what_cannot_run(items, everything=config.args == config.getini("testpaths"))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = missing_gpu() if gpu_items else None
    if reason is not None:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))
    if np.lib.NumpyVersion(np.__version__) < "2.1.2":
        for item in gpu_items:
            if "bfloat16" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="bfloat16 on a GPU needs NumPy 2.1.2 or newer"))
    if importlib.util.find_spec("torch") is None:
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(pytest.mark.skip(reason=NO_TORCH))
