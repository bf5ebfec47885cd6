"""Executors of plans: what a repeated call on a GPU needs, and the order of its launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import assign, clear
from .gpu import cupy_module, current_gpu, current_index, temporary
from .kernels import Kernel
from .prepared import HasPacked, Packing

if TYPE_CHECKING:
    from .. import dispatch
    from ..problem import Problem


class Executor:
    """A plan with everything that a repeated call needs: loaded kernels and packed parameters.

    The arrays must have exactly the shapes, strides, dtype, device and pointer alignment for which it was made; this is
    not checked.

    Attributes:
        choice: what is launched; None where the result is empty or zero.
        copies: the arrays that are copied because kernels cannot read or write them in place.
        packing: packs the weight; None where the kernels read it as it is.
    """

    __slots__ = (
        "_conjugate_weight",
        "_copied",
        "_has_samples",
        "_scratch",
        "_steps",
        "_weight",
        "choice",
        "copies",
        "packing",
    )

    def __init__(
        self,
        choice: dispatch.Choice | None,
        operands: tuple[str, ...],
        copies: tuple[str, ...] = (),
        *,
        conjugate_weight: bool = False,
    ) -> None:
        """`operands` are the problem's names of the arrays of a call, in order, the result last.

        With `conjugate_weight` the weight must be among `copies`.
        """
        from ..families.base import PACKED, SAMPLES

        self.choice = choice
        self.copies = copies
        self._conjugate_weight = conjugate_weight
        self._copied = [name in copies for name in operands] if copies else None
        self._weight = operands.index("weight") if "weight" in operands else -1
        self.packing: Packing | None = None
        self._has_samples = False
        self._scratch: list[int] = []  # bytes of the buffers of a call
        self._steps: list[tuple[Kernel, tuple[int, ...]]] = []  # kernels with indices of their pointers; -1 is null
        if choice is None:
            return
        names, steps = [*operands], choice.plan.steps
        if steps[0].arrays == ("weight", PACKED):
            self.packing = Packing(steps[0], choice.plan.scratch_bytes(PACKED))
            names.append(PACKED)
            steps = steps[1:]
        self._has_samples = any(SAMPLES in step.arrays for step in steps)
        if self._has_samples:
            names.append(SAMPLES)
        for name, num_bytes in choice.plan.scratch:
            if name != PACKED:
                names.append(name)
                self._scratch.append(num_bytes)
        for step in steps:
            places = tuple(-1 if name is None else names.index(name) for name in step.arrays)
            self._steps.append((Kernel(step.config, step.launch), places))

    def run(self, *arrays: Any, prepared: HasPacked | None = None, samples: Any = None) -> None:
        """Launch on the current device and CuPy's current stream; writes all of the last array, the result.

        `prepared` holds the packed forms of the weight, if the caller has them; where it is used, the weight may be
        None. If the problem has lengths, `samples` is the table that cuda_src/samples.cuh describes.
        """
        if self.choice is None:
            clear(arrays[-1])  # every sum is empty
            return
        usable = arrays if self._copied is None else _with_copies(arrays, self._copied)
        if self._conjugate_weight:
            weight = usable[self._weight]
            cupy_module().conjugate(weight, weight)  # in place: it is a copy for this call
        pointers = [None if array is None else array.data for array in usable]
        if self.packing is not None:
            packing = self.packing
            pointers.append(packing.pack(usable[self._weight]) if prepared is None else prepared.packed(packing))
        if self._has_samples:
            pointers.append(_write_samples(samples))
        pointers += map(temporary, self._scratch)
        pointers.append(None)
        for kernel, places in self._steps:
            kernel.launch(*[pointers[place] for place in places])  # a list is built faster than a generator runs
        if usable[-1] is not arrays[-1]:
            assign(arrays[-1], usable[-1])


def _write_samples(table: np.ndarray[Any, Any]) -> Any:
    """A temporary buffer with a table of int64, which kernels write from their parameters."""
    from ..families.lengths import writes

    buffer = temporary(table.nbytes)
    index = current_index()
    for count, params in writes(table.reshape(-1)):
        _writer(index, count).with_params(params).launch(buffer)
    return buffer


@lru_cache(maxsize=64)
def _writer(device_index: int, count: int) -> Kernel:  # noqa: ARG001 (one for each GPU)
    from ..families.lengths import write_launch

    return Kernel(*write_launch(count))


def _with_copies(arrays: Sequence[Any], copies: Sequence[bool]) -> Sequence[Any]:
    """The arrays with contiguous ones in place of those marked: copies of inputs, an empty buffer for the result."""
    *inputs, output = arrays
    usable = [_copy(array) if copy else array for array, copy in zip(inputs, copies[:-1], strict=True)]
    return [*usable, _contiguous(output) if copies[-1] else output]


def _copy(array: Any) -> Any:
    copy = _contiguous(array)
    assign(copy, array)
    return copy


def _contiguous(like: Any) -> Any:
    """A contiguous, uninitialised array of the shape and dtype of another, in a temporary buffer."""
    return cupy_module().ndarray(like.shape, like.dtype, temporary(like.nbytes))


def make_executor(
    problem: Problem | None,
    operands: Sequence[str],
    arrays: Sequence[Any],
    output: Any | None,
    *,
    conjugate_weight: bool = False,
    algorithm: str | None = None,
    is_prepared: bool = False,
) -> Executor:
    """Plan a validated problem for CuPy arrays on the current device.

    Args:
        problem: of any kind; None where the result has no elements.
        operands: the problem's names of the arrays.
        arrays: those of a call, in its order; None for an absent bias.
        output: the result; None stands for a new array.
        conjugate_weight: whether to compute with the conjugate of the weight, which each call copies.
        algorithm: that of `dispatch.choose`.
        is_prepared: whether calls give a prepared weight.
    """
    if problem is None or problem.is_empty:
        return Executor(None, (*operands, "output"))
    from .. import dispatch

    names = (*operands, problem.result)
    given = dict(zip(names, (*arrays, output), strict=True))
    if conjugate_weight:
        given["weight"] = None
    pointers = {n: None if a is None else dispatch.StridedPointer(a.strides, a.data.ptr) for n, a in given.items()}
    layout, copies = dispatch.lay_out(problem, pointers)
    if conjugate_weight:
        copies = (*copies, "weight")
    choice = dispatch.choose(problem, replace(layout, is_prepared=is_prepared), current_gpu(), algorithm)
    return Executor(choice, names, copies, conjugate_weight=conjugate_weight)
