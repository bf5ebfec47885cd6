"""Builds and launches kernels through CuPy: the only file that imports CuPy and that names `cupy.RawKernel`."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType
from typing import Any

from . import dispatch, source
from .device import Device
from .families import Config, Launch
from .problem import ConvProblem

# Dynamic shared memory that a kernel may use without asking, in bytes, on every architecture.
DEFAULT_SHARED_BYTES = 48 * 1024


def cupy_module() -> ModuleType:
    """CuPy, imported on first use.

    Raises:
        ImportError: CuPy is not installed.
    """
    return importlib.import_module("cupy")


def is_cupy_array(array: object) -> bool:
    """Whether an object is a CuPy array, without importing CuPy: no such array exists before somebody else did."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


def device_count() -> int:
    """The number of GPUs that CuPy reaches.

    Raises:
        ImportError: CuPy is not installed.
        RuntimeError: there is no driver, or it is too old.
    """
    return int(cupy_module().cuda.runtime.getDeviceCount())


@cache
def device(index: int) -> Device:
    """The GPU with CuPy's index."""
    properties = cupy_module().cuda.runtime.getDeviceProperties(index)
    name = properties["name"]
    return Device(
        name=name.decode() if isinstance(name, bytes) else str(name),
        arch=10 * int(properties["major"]) + int(properties["minor"]),
        num_sms=int(properties["multiProcessorCount"]),
        shared_per_block=int(properties["sharedMemPerBlockOptin"]),
        shared_per_sm=int(properties["sharedMemPerMultiprocessor"]),
        l2_bytes=int(properties["l2CacheSize"]),
    )


@cache
def build(config: Config) -> Any:
    """The kernel of a specialisation, which CuPy compiles for the current device when it is first needed there.

    The first build of a source on a machine compiles it; later processes find it in CuPy's disk cache.
    """
    text = source.assemble(config.kernel, dict(config.macros))
    return cupy_module().RawKernel(text, config.kernel)


class _Kernel:
    """A compiled kernel with its launch and its packed parameters."""

    __slots__ = ("_block", "_function", "_grid", "_params", "_params_pointer", "_shared_bytes")

    def __init__(self, config: Config, launch: Launch) -> None:
        kernel = build(config)
        if launch.shared_bytes > DEFAULT_SHARED_BYTES:  # more must be asked for, once per kernel and device
            kernel.max_dynamic_shared_size_bytes = launch.shared_bytes
        self._function = kernel.kernel
        self._grid = (launch.grid, 1, 1)
        self._block = (launch.block, 1, 1)
        self._shared_bytes = launch.shared_bytes
        # The struct is passed by value: the driver copies it out of this buffer at each launch.
        self._params = source.pack_params(dict(launch.params), launch.index_bits)
        self._params_pointer = cupy_module().cuda.function.CPointer(self._params.ctypes.data)

    def launch(self, *pointers: Any) -> None:
        """Launch on the current device and CuPy's current stream. The only place in gpuconv that launches a kernel."""
        self._function(self._grid, self._block, (*pointers, self._params_pointer), self._shared_bytes)


class Plan:
    """Everything that a repeated call needs: the kernels, their launches, their packed parameters.

    Call it with arrays of the very shapes, strides, dtype, device and pointer alignment that it was made for; it checks
    none of that.
    """

    __slots__ = ("_captured", "_kernel", "_pack", "choice", "copies", "output_shape")

    def __init__(self, problem: ConvProblem, choice: dispatch.Choice | None, copies: tuple[str, ...]) -> None:
        self.output_shape = problem.output_shape
        self.choice = choice
        self.copies = copies
        self._kernel = None if choice is None else _Kernel(choice.config, choice.launch)
        self._pack: tuple[_Kernel, int] | None = None
        if choice is not None and choice.pack is not None:
            self._pack = _Kernel(choice.pack.config, choice.pack.launch), choice.pack.num_bytes
        self._captured: list[Any] = []

    def __call__(self, input: Any, weight: Any, bias: Any | None, output: Any) -> None:
        """Launch on the current device and CuPy's current stream; writes all of `output`."""
        if self.copies:
            self._call_with_copies(input, weight, bias, output)
        else:
            self._run(input, weight, bias, output)

    def _run(self, input: Any, weight: Any, bias: Any | None, output: Any) -> None:
        if self._kernel is not None:
            weights = weight.data if self._pack is None else self._packed(*self._pack, weight)
            self._kernel.launch(input.data, weights, None if bias is None else bias.data, output.data)

    def _packed(self, pack: _Kernel, num_bytes: int, weight: Any) -> Any:
        cuda = cupy_module().cuda
        packed = cuda.alloc(num_bytes)
        pack.launch(weight.data, packed)
        # On return the buffer goes back to CuPy's pool, which hands it out again to the same stream only, behind the
        # kernels queued now. A captured graph runs again at any time, so its buffer lives as long as the plan.
        if cuda.get_current_stream().is_capturing():
            self._captured.append(packed)
        return packed

    def _call_with_copies(self, input: Any, weight: Any, bias: Any | None, output: Any) -> None:
        cupy = cupy_module()
        given = {"input": input, "weight": weight, "bias": bias}
        usable = {name: array.copy(order="C") if name in self.copies else array for name, array in given.items()}
        target = cupy.empty(output.shape, output.dtype) if "output" in self.copies else output
        self._run(usable["input"], usable["weight"], usable["bias"], target)
        if target is not output:
            output[...] = target


def make_plan(problem: ConvProblem, input: Any, weight: Any, bias: Any | None, output: Any | None) -> Plan:
    """Plan a validated problem for CuPy arrays on the current device; `output=None` means a fresh allocation."""
    arrays = {"input": input, "weight": weight, "bias": bias, "output": output}
    layout, copies = dispatch.lay_out(
        problem,
        {name: None if a is None else dispatch.Place(a.strides, a.data.ptr) for name, a in arrays.items()},
    )
    index = int(cupy_module().cuda.runtime.getDevice())
    return Plan(problem, dispatch.choose(problem, layout, device(index)), copies)
