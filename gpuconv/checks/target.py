"""Where the checks run the public functions: on the CPU or on a GPU."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from .. import __version__, cases, functional, grad, runtime
from ..cases import Data
from ..device import Device
from ..problem import INTEGERS, ConvProblem, numpy_dtype
from ..text import cuda_version

Array: TypeAlias = npt.NDArray[Any]

Argument: TypeAlias = Literal["input", "weight", "bias"]


class Target:
    """The CPU or CuPy's current GPU."""

    def __init__(self, *, on_gpu: bool) -> None:
        self.on_gpu = on_gpu

    def put(self, array: Array) -> Any:
        if not self.on_gpu:
            return array
        runtime.check_dtype(array.dtype)
        return runtime.cupy_module().asarray(array)

    def get(self, array: Any) -> Array:
        return np.asarray(runtime.cupy_module().asnumpy(array) if self.on_gpu else array)

    def lacks(self, number_format: str) -> str | None:
        """Why this machine cannot have arrays in the number format; None where it can."""
        try:
            self.put(np.zeros(1, numpy_dtype(cases.dtype_of(number_format))))
        except (ImportError, TypeError, ValueError) as error:
            return str(error)
        return None

    def lacks_fft(self) -> str | None:
        """Why the FFT cannot run here: cuFFT is not installed. None if it is, whether it works or not."""
        if self.on_gpu:
            try:
                runtime.fft_module()
            except ImportError as error:
                return str(error)
        return None

    def convolve(self, problem: ConvProblem, data: Data, settings: dict[str, Any] | None = None) -> Array:
        """Run the public function on arrays of this device, with an output that was filled with NaN."""
        out = self.put(unset(problem.output_shape, problem.dtype_of("output")))
        return self.get(self.convolve_into(out, problem, *map(self._put_if_given, data), settings=settings))

    def convolve_into(
        self,
        out: Any,
        problem: ConvProblem,
        input: Any,
        weight: Any,
        bias: Any,
        *,
        settings: dict[str, Any] | None = None,
    ) -> Any:
        """Run the public function on arrays of this device; `out` is None for a new array."""
        function = functional.conv_transpose1d if problem.transposed else functional.conv1d
        keywords = cases.call_settings(problem) if settings is None else settings
        return function(input, weight, bias, **keywords, out=out)

    def gradient(
        self, argument: Argument, problem: ConvProblem, arrays: Sequence[Array], settings: dict[str, Any]
    ) -> Array:
        """Run the public gradient function of an argument, with an output that was filled with NaN."""
        shapes = {"input": problem.input_shape, "weight": problem.weight_shape, "bias": (problem.C_out,)}
        out = self.put(np.full(shapes[argument], np.nan, numpy_dtype(problem.dtype)))
        given: list[Any] = [self.put(array) for array in arrays]
        if argument != "bias":
            given.insert(0 if argument == "input" else 1, shapes[argument])
        function = getattr(grad, f"{problem.op}_{argument}")
        return self.get(function(*given, **({} if argument == "bias" else settings), out=out))

    def device(self) -> Device | None:
        """The GPU; None for the CPU."""
        return runtime.current_gpu() if self.on_gpu else None

    def _put_if_given(self, array: Array | None) -> Any:
        return None if array is None else self.put(array)

    def description(self) -> str:
        gpu = self.device()
        if gpu is None:
            return f"CPU ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)"
        return f"GPU {runtime.current_index()}: {gpu.name} ({gpu.arch_name}, {gpu.num_sms} multiprocessors)"

    def versions(self) -> dict[str, str]:
        found = {
            "gpuconv": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        }
        if self.on_gpu:
            cupy = runtime.cupy_module()
            found["cupy"] = str(cupy.__version__)
            found["cuda_runtime"] = cuda_version(cupy.cuda.runtime.runtimeGetVersion())
            found["cuda_driver"] = cuda_version(cupy.cuda.runtime.driverGetVersion())
        return found


def unset(shape: tuple[int, ...], dtype: str) -> Array:
    """An array for a result, filled with NaN, or with ones for a dtype of integers."""
    return np.full(shape, 1 if dtype in INTEGERS else np.nan, numpy_dtype(dtype))
