"""The samples that a stream holds between repeated pushes, in the form that is fastest for these.

For any other push the stream takes them back in the plain form (slots, C_in, held).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .. import caches, runtime
from ..memory import check_overlap
from ..problem import ConvProblem, numpy_dtype

if TYPE_CHECKING:
    from .. import dispatch

# Computes outputs from (samples, out); `out` is the array to write to, or None.
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
        problem: that of the held samples, followed by those of a push.
        input: that of a push.
        weight: that of the layer.
        others: the arrays of the problem between its weight and its output.
        out: that of a push, or None.
        algorithm: as in `gpuconv.conv1d`.
        compute: computes the outputs if the kernel does not also store the new samples.
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
        input: that of a push.
        out: that of a push, or None.
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
        """The samples that are held now; later pushes do not change this array."""


def kind_of(input: Any, out: Any | None) -> tuple[Any, ...] | None:
    """What repeated pushes have in common, besides the position; None for other objects than arrays."""
    if type(input) is np.ndarray and (out is None or type(out) is np.ndarray):
        return (input.shape, input.dtype, None if out is None else (out.shape, out.dtype))
    return (caches.identity(input), caches.identity(out)) if runtime.is_cupy_array(input) else None


class _Computed(Window):
    """A window whose outputs `compute` computes from all samples."""

    def __init__(self, input: Any, out: Any | None, compute: Compute) -> None:
        super().__init__(input, out)
        self._compute = compute
        self._length = input.shape[-1]

    def _outputs(self, samples: Any, out: Any | None) -> Any:
        result = self._compute(samples, out if out is None or not self._is_single else out[None])
        return out if out is not None else result[0] if self._is_single else result


class Joined(_Computed):
    """For NumPy arrays: the held and the new samples are concatenated."""

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
    """For CuPy arrays: one launch appends the new samples to the held ones in place, then other launches compute."""

    def __init__(self, input: Any, out: Any | None, compute: Compute, shape: tuple[int, ...]) -> None:
        super().__init__(input, out, compute)
        self._array = runtime.empty_beside(input, shape, input.dtype)
        self._held = shape[-1] - self._length
        self._has_failed = False  # the last samples were appended, but their outputs could not be computed

    def fill(self, samples: Any) -> None:
        self._array[..., self._length :] = samples
        self._has_failed = False

    def push(self, input: Any, out: Any | None) -> Any:
        if self._has_failed:
            what = "stream: a push that failed cannot be repeated"
            runtime.refuse_during_capture(what, int(self._array.data.device_id))
            self.fill(self.samples())
        runtime.append(self._array, input[None] if self._is_single else input)
        try:
            return self._outputs(self._array, out)
        except BaseException:
            self._has_failed = not runtime.is_capturing()  # into a graph, where the launch waits for that of the graph
            raise

    def samples(self) -> Any:
        start = 0 if self._has_failed else self._length
        return self._array[..., start : start + self._held].copy()


class Moving(Window):
    """For CuPy arrays: the kernel that computes also stores the new samples. See cuda_src/window.cuh."""

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
