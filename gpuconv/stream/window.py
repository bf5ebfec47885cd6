"""What a stream holds between pushes of one kind, in the form in which such a push costs least.

A push of another kind takes the samples back, as they are in memory: (slots, C_in, held).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .. import calls, runtime
from ..memory import check_overlap
from ..problem import ConvProblem, numpy_dtype

if TYPE_CHECKING:
    from .. import dispatch

# Computes the outputs of all samples, given those and where to write the outputs, or None.
Compute: TypeAlias = Callable[[Any, Any], Any]


def window_for(
    problem: ConvProblem,
    input: Any,
    weight: runtime.PreparedWeight,
    others: tuple[Any, ...],
    out: Any | None,
    algorithm: str | None,
    compute: Compute,
) -> Window:
    """The window of pushes that repeat, on the current device.

    Args:
        problem: of the samples that are held, followed by those of a push.
        input: of a push.
        weight: of the layer.
        others: the arrays of the problem between its weight and its output.
        out: of a push, or None.
        algorithm: as in `gpuconv.conv1d`.
        compute: gives the outputs where no kernel keeps the new samples.
    """
    if not runtime.is_cupy_array(input):
        return Joined(input, out, compute)
    from .. import dispatch, families

    names = [name for name in problem.shapes if name != "input"]
    given = dict(zip(names, (weight.array, *others, out), strict=True))
    pointers = {n: None if a is None else dispatch.StridedPointer(a.strides, a.data.ptr) for n, a in given.items()}
    layout, copies = dispatch.lay_out(problem, pointers)
    x = input if input.ndim == 3 else input[None]
    new_samples = families.ArrayLayout.of(x.shape, x.strides, x.data.ptr, x.dtype.itemsize)
    if new_samples is not None and not copies:
        device = runtime.device(int(x.data.device_id))
        push = dispatch.choose_push(problem, x.shape[-1], layout, new_samples, device, algorithm)
        if isinstance(push, dispatch.Push):
            return Moving(input, out, problem, push, weight, others)
    return Appended(input, out, compute, problem.shapes["input"])


class Window(ABC):
    """The samples of a stream's slots while pushes of one kind repeat: of one length, for all slots.

    Args:
        input: of a push.
        out: of a push, or None.
    """

    def __init__(self, input: Any, out: Any | None) -> None:
        self._key = kind_of(input, out)
        self._is_single = input.ndim == 2

    def takes(self, input: Any, out: Any | None) -> bool:
        """Whether this is a push of the same kind; then `push` needs no other check."""
        return self._key == kind_of(input, out)

    @abstractmethod
    def fill(self, samples: Any) -> None:
        """Hold these samples, (slots, C_in, held)."""

    @abstractmethod
    def push(self, input: Any, out: Any | None) -> Any:
        """Take the next samples, and return the outputs that they complete."""

    @abstractmethod
    def samples(self) -> Any:
        """What is held now; an array that later pushes leave as it is."""


def kind_of(input: Any, out: Any | None) -> tuple[Any, ...] | None:
    """What pushes of one kind share besides the place in the stream; None for what is no array."""
    if type(input) is np.ndarray and (out is None or type(out) is np.ndarray):
        return (input.shape, input.dtype, None if out is None else (out.shape, out.dtype))
    return (calls.identity(input), calls.identity(out)) if runtime.is_cupy_array(input) else None


class _Computed(Window):
    """One whose outputs a call of `compute` gives from all samples."""

    def __init__(self, input: Any, out: Any | None, compute: Compute) -> None:
        super().__init__(input, out)
        self._compute = compute
        self._length = input.shape[-1]

    def _outputs(self, samples: Any, out: Any | None) -> Any:
        result = self._compute(samples, out if out is None or not self._is_single else out[None])
        return out if out is not None else result[0] if self._is_single else result


class Joined(_Computed):
    """NumPy arrays: the new samples are joined to those that are held."""

    _samples: Any

    def fill(self, samples: Any) -> None:
        self._samples = samples

    def push(self, input: Any, out: Any | None) -> Any:
        new = input[None] if self._is_single else input
        samples = np.concatenate((self._samples, new), axis=-1)
        result = self._outputs(samples, out)
        self._samples = samples[..., self._length :]
        return result

    def samples(self) -> Any:
        return self._samples


class Appended(_Computed):
    """CuPy arrays: one launch appends the new samples to those that are held, in place, and the next ones compute."""

    def __init__(self, input: Any, out: Any | None, compute: Compute, shape: tuple[int, ...]) -> None:
        super().__init__(input, out, compute)
        self._array = runtime.empty_beside(input, shape, input.dtype)
        self._held = shape[-1] - self._length
        self._has_failed = False  # the last samples were appended, but their outputs could not be computed

    def fill(self, samples: Any) -> None:
        self._array[..., self._length :] = samples
        self._has_failed = False

    def push(self, input: Any, out: Any | None) -> Any:
        new = input[None] if self._is_single else input
        if self._has_failed:
            self._array[..., self._held :] = new
        else:
            runtime.append(self._array, new)
        self._has_failed = True
        result = self._outputs(self._array, out)
        self._has_failed = False
        return result

    def samples(self) -> Any:
        start = 0 if self._has_failed else self._length
        return self._array[..., start : start + self._held].copy()


class Moving(Window):
    """CuPy arrays: the kernel that computes keeps the new samples, too. See cuda_src/window.cuh."""

    def __init__(
        self,
        input: Any,
        out: Any | None,
        problem: ConvProblem,
        push: dispatch.Push,
        weight: runtime.PreparedWeight,
        others: tuple[Any, ...],
    ) -> None:
        super().__init__(input, out)
        from ..families.windows import NEW_SAMPLES, WINDOW_STARTS

        cupy = runtime.cupy_module()
        names = [name for name in problem.shapes if name not in ("input", "weight", problem.result)]
        self._array = cupy.empty(push.window, input.dtype)
        self._starts = cupy.zeros(push.blocks, np.int32)
        self._rows = self._array.transpose(0, 2, 1) if push.channels_last else self._array  # (N, C_in, places)
        self._held, self._period = problem.L_in - input.shape[-1], push.period
        self._weight, self._others = weight, others
        self._caller = "ConvTranspose1d.push" if problem.transposed else "Conv1d.push"
        self._output_shape = problem.shapes[problem.result][1 if self._is_single else 0 :]
        self._output_dtype = numpy_dtype(problem.dtype_of(problem.result))
        self._executor = runtime.Executor(
            push.choice, ("input", "weight", *names, NEW_SAMPLES, WINDOW_STARTS, problem.result)
        )

    def fill(self, samples: Any) -> None:
        self._rows[..., : self._held] = samples
        self._starts.fill(0)

    def push(self, input: Any, out: Any | None) -> Any:
        if out is None:
            out = runtime.cupy_module().empty(self._output_shape, self._output_dtype)
        else:
            check_overlap(self._caller, out, {"input": input})
        self._executor.run(
            self._array, self._weight.array, *self._others, input, self._starts, out, prepared=self._weight
        )
        return out

    def samples(self) -> Any:
        cupy = runtime.cupy_module()
        places = (self._starts[0] + cupy.arange(self._held)) % self._period
        return cupy.take(self._rows, places, axis=2)
