"""Builds and launches kernels through CuPy: the only file that imports CuPy and that names `cupy.RawKernel`."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType
from typing import Any

from . import dispatch, source
from .device import Device
from .families import ArrayLayout, Config, Layout
from .problem import ConvProblem


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


class Plan:
    """Everything that a repeated call needs: the kernel, its launch, its packed parameters.

    Call it with arrays of the very shapes, strides, dtype, device and pointer alignment that it was made for; it checks
    none of that.
    """

    __slots__ = (
        "_block",
        "_function",
        "_grid",
        "_params",
        "_params_pointer",
        "_shared_bytes",
        "choice",
        "copies",
        "output_shape",
    )

    def __init__(self, problem: ConvProblem, choice: dispatch.Choice | None, copies: tuple[str, ...]) -> None:
        self.output_shape = problem.output_shape
        self.choice = choice
        self.copies = copies
        if choice is None:
            return
        cupy = cupy_module()
        kernel = build(choice.config)
        launch = choice.launch
        if launch.shared_bytes > 48 * 1024:  # more than the default limit must be asked for, once per kernel
            kernel.max_dynamic_shared_size_bytes = launch.shared_bytes
        self._function = kernel.kernel
        self._grid = (launch.grid, 1, 1)
        self._block = (launch.block, 1, 1)
        self._shared_bytes = launch.shared_bytes
        # The struct is passed by value: the driver copies it out of this buffer at each launch.
        self._params = source.pack_params(dict(launch.params), launch.index_bits)
        self._params_pointer = cupy.cuda.function.CPointer(self._params.ctypes.data)

    def __call__(self, input: Any, weight: Any, bias: Any | None, output: Any) -> None:
        """Launch on the current device and CuPy's current stream; writes all of `output`."""
        if self.choice is None:
            return
        if self.copies:
            self._launch_with_copies(input, weight, bias, output)
        else:
            self._launch(input, weight, bias, output)

    def _launch(self, input: Any, weight: Any, bias: Any | None, output: Any) -> None:
        bias_data = None if bias is None else bias.data
        arguments = (input.data, weight.data, bias_data, output.data, self._params_pointer)
        self._function(self._grid, self._block, arguments, self._shared_bytes)

    def _launch_with_copies(self, input: Any, weight: Any, bias: Any | None, output: Any) -> None:
        cupy = cupy_module()
        given = {"input": input, "weight": weight, "bias": bias}
        usable = {name: array.copy(order="C") if name in self.copies else array for name, array in given.items()}
        target = cupy.empty(output.shape, output.dtype) if "output" in self.copies else output
        self._launch(usable["input"], usable["weight"], usable["bias"], target)
        if target is not output:
            output[...] = target


def make_plan(problem: ConvProblem, input: Any, weight: Any, bias: Any | None, output: Any | None) -> Plan:
    """Plan a validated problem for CuPy arrays on the current device; `output=None` means a fresh allocation."""
    copies: list[str] = []
    p = problem

    def layout_of(name: str, array: Any, shape: tuple[int, ...]) -> ArrayLayout:
        strides = array.strides if len(array.shape) == len(shape) else (0, *array.strides)
        layout = ArrayLayout.of(shape, strides, array.data.ptr, p.itemsize)
        if layout is None:
            copies.append(name)
            return getattr(Layout.contiguous(p), name)  # type: ignore[no-any-return]
        return layout

    layout = Layout(
        input=layout_of("input", input, (p.N, p.C_in, p.L_in)),
        weight=layout_of("weight", weight, p.weight_shape),
        bias=None if bias is None else layout_of("bias", bias, (p.C_out,)),
        output=(
            Layout.contiguous(p).output if output is None else layout_of("output", output, (p.N, p.C_out, p.L_out))
        ),
    )
    index = int(cupy_module().cuda.runtime.getDevice())
    return Plan(p, dispatch.choose(p, layout, device(index)), tuple(copies))
