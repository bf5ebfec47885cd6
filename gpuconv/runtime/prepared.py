"""Weights that are packed once for many calls."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from .arrays import copied
from .gpu import complete, cupy_module, current_device_of, is_cupy_array, refuse_during_capture, temporary
from .kernels import Kernel

if TYPE_CHECKING:
    from ..families import Step


class Packs(Protocol):
    """Makes packed forms of weights, which calls read and prepared weights keep."""

    @property
    def key(self) -> Any:
        """The same object for all objects that make the same packed form."""

    def pack(self, weight: Any) -> Any:
        """Make the packed form, in the order of the current stream."""


class HasPacked(Protocol):
    """Holds packed forms of a weight."""

    def packed(self, packing: Packs) -> Any:
        """The packed form that `packing` makes, complete on the current stream."""


class Packing:
    """The step of a plan that packs the weights.

    Attributes:
        key: the same object for all plans with the same packed weights.
    """

    __slots__ = ("_kernel", "_num_bytes", "key")

    def __init__(self, step: Step, num_bytes: int) -> None:
        self.key = _shared(step)
        self._kernel = Kernel(step.config, step.launch)
        self._num_bytes = num_bytes

    def pack(self, weight: Any) -> Any:
        """The packed weights, valid after the work queued on the current stream."""
        packed = temporary(self._num_bytes)
        self._kernel.launch(weight.data, packed)
        return packed


@lru_cache(maxsize=4096)
def _shared(step: Step) -> Step:
    """One object for equal steps, so that they are compared by identity; two threads at once may get two objects."""
    return step


class PreparedWeight:
    """Weights that are packed once and kept; `gpuconv.prepare` makes them.

    Attributes:
        array: a private copy of the weights, complete on every stream.
    """

    __slots__ = ("_lock", "_packed", "array")

    def __init__(self, array: Any) -> None:
        """Take over `array`. If it is on a GPU, this waits for the work queued on its current stream."""
        complete("weights cannot be prepared", array)
        self.array = array
        # By the id of a key of Packs; the key is kept, so that no other object gets the same id.
        self._packed: dict[int, tuple[Any, Any]] = {}
        self._lock = threading.RLock()  # re-entrant: a finalizer may make a call while its own thread packs

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def packed(self, packing: Packs) -> Any:
        """The packed form for a plan; made on first use, and complete on every stream when it is kept."""
        found = self._packed.get(id(packing.key))
        if found is None:
            stream = cupy_module().cuda.get_current_stream() if is_cupy_array(self.array) else None
            if stream is not None and stream.is_capturing():
                return packing.pack(self.array)  # waiting would end the capture, so this one is part of the graph
            with self._lock:
                found = self._packed.get(id(packing.key))  # another thread may have packed it in the meantime
                if found is None:
                    found = packing.key, packing.pack(self.array)
                    if stream is not None:
                        stream.synchronize()
                    self._packed[id(packing.key)] = found
        return found[1]

    def __reduce__(self) -> tuple[type[PreparedWeight], tuple[Any]]:
        """Pickles and copies hold only the weights; packed forms are made again when calls need them."""
        if is_cupy_array(self.array):
            refuse_during_capture("a prepared weight cannot be copied", self.array.data.device_id)
        return PreparedWeight, (self.array,)

    def __repr__(self) -> str:
        return f"PreparedWeight(shape={self.shape}, dtype={self.dtype})"


def prepare(weight: Any) -> PreparedWeight:
    """`gpuconv.prepare` for a CuPy array.

    Raises:
        RuntimeError: the current stream is being captured.
    """
    refuse_during_capture("prepare: weights cannot be prepared", weight.data.device_id)
    with current_device_of(weight):
        return PreparedWeight(copied(weight))
