"""How the public functions run: arguments are checked, places in memory looked at, plans of GPU calls kept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np

from . import runtime
from .problem import dtype_name

P = TypeVar("P")

# Plans of GPU calls and checked problems of CPU calls, by everything that they depend on; the oldest goes when a cache
# is full, which bounds what a stream of ever new lengths can hold.
_PLANS: dict[tuple[Any, ...], Plan] = {}
_PROBLEMS: dict[tuple[Any, ...], Any] = {}
_MAX_PLANS = 4096
_PLANS_LOCK = Lock()  # for changes; look-ups need none


class Plan(Protocol):
    """Everything that a repeated GPU call needs; called with the arrays of the call and the output."""

    @property
    def output_shape(self) -> tuple[int, ...]: ...

    def __call__(self, *arrays: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Function(Generic[P]):
    """A public function.

    Attributes:
        name: it opens the messages.
        arrays: the names of the arrays, as all of the following take them; "bias" may be None.
        problem: (arrays, settings) -> the validated problem.
        shape: problem -> the shape of the result.
        compute: (problem, *arrays, output): the result on the CPU, of arrays in native byte order.
        plan: (problem, *arrays, output or None for a fresh array, algorithm=None) -> the plan on the current GPU.
    """

    name: str
    arrays: tuple[str, ...]
    problem: Callable[[tuple[Any, ...], tuple[Any, ...]], P]
    shape: Callable[[P], tuple[int, ...]]
    compute: Callable[..., None]
    plan: Callable[..., Plan]

    def __call__(
        self,
        arrays: tuple[Any, ...],
        settings: tuple[Any, ...],
        out: Any | None,
        *extra: Any,
        algorithm: str | None = None,
    ) -> Any:
        """Compute on the device of the arrays; returns `out`, or a fresh array.

        `extra` is what plans take besides. `algorithm` names the kernel family on a GPU; None leaves the choice open.
        """
        if runtime.is_cupy_array(arrays[0]):
            return self._run_on_gpu(arrays, settings, out, extra, algorithm)
        return self._run_on_cpu(arrays, settings, out)

    def _run_on_cpu(self, arrays: tuple[Any, ...], settings: tuple[Any, ...], out: Any | None) -> Any:
        key = _cpu_key(self.name, arrays, settings) if out is None else None
        problem = None if key is None else cast("P | None", _PROBLEMS.get(key))
        if problem is None:
            problem = self._check(arrays, settings, out)
            if key is not None:
                _keep(_PROBLEMS, key, problem)
        plain = [None if array is None else _native(array) for array in arrays]
        dtype = cast(Any, plain[0]).dtype
        if out is None:
            out = np.empty(self.shape(problem), dtype)
        if out.dtype.isnative:
            self.compute(problem, *plain, np.asarray(out))
        else:
            result = np.empty(out.shape, dtype)
            self.compute(problem, *plain, result)
            out[...] = result
        return out

    def _run_on_gpu(
        self,
        arrays: tuple[Any, ...],
        settings: tuple[Any, ...],
        out: Any | None,
        extra: tuple[Any, ...],
        algorithm: str | None,
    ) -> Any:
        cupy = runtime.cupy_module()
        device_index = arrays[0].data.device_id
        try:
            current = cupy.cuda.runtime.getDevice()
        except RuntimeError as error:
            raise RuntimeError(f"{self.name}: {self.arrays[0]} is a CuPy array, but no GPU answers: {error}") from error
        if current != device_index:
            with cupy.cuda.Device(device_index):
                return self._run_on_gpu(arrays, settings, out, extra, algorithm)

        plan, key = None, None
        names = _as_key(settings)
        if names is not None:
            key = (self.name, algorithm, names, *map(_identity, arrays), _identity(out))
            plan = _PLANS.get(key)
        if plan is None:
            problem = self._check(arrays, settings, out)
            plan = self.plan(problem, *arrays, out, algorithm=algorithm)
            if key is not None:
                _keep(_PLANS, key, plan)
        elif out is not None:
            check_overlap(self.name, out, dict(zip(self.arrays, arrays, strict=True)))
        if out is None:
            out = cupy.empty(plan.output_shape, arrays[0].dtype)
        plan(*arrays, out, *extra)
        return out

    def _check(self, arrays: tuple[Any, ...], settings: tuple[Any, ...], out: Any | None) -> P:
        given = {n: a for n, a in zip(self.arrays, arrays, strict=True) if a is not None or n != "bias"}
        check_kinds(self.name, given if out is None else {**given, "out": out})
        problem = self.problem(arrays, settings)
        if out is not None:
            shape, first = self.shape(problem), self.arrays[0]
            if tuple(out.shape) != shape:
                raise ValueError(f"{self.name}: out must have shape {shape}, got {tuple(out.shape)}")
            dtype = dtype_name(given[first].dtype)
            if dtype_name(out.dtype) != dtype:
                raise TypeError(f"{self.name}: out must have the dtype of {first}, {dtype}, got {out.dtype}")
            if _may_overlap_itself(out):
                raise ValueError(
                    f"{self.name}: out must not overlap itself, got strides {out.strides} for shape {out.shape}"
                )
            if isinstance(out, np.ndarray) and not out.flags.writeable:
                raise ValueError(f"{self.name}: out must be writeable, got a read-only array")
            check_overlap(self.name, out, given)
        return problem


def _keep(cache: dict[tuple[Any, ...], Any], key: tuple[Any, ...], value: Any) -> None:
    """Keep a value for the next call, unless somebody is at it: then the next call makes it again.

    Nobody waits for the lock: a finalizer may call while its own thread holds it, and a forked process inherits it as
    it is.
    """
    if _PLANS_LOCK.acquire(blocking=False):
        try:
            while len(cache) >= _MAX_PLANS:
                del cache[next(iter(cache))]
            cache[key] = value
        finally:
            _PLANS_LOCK.release()


def _cpu_key(name: str, arrays: tuple[Any, ...], settings: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What the problem of a CPU call depends on, or None where it must be checked anew."""
    names = _as_key(settings)
    if names is None:
        return None
    key: list[Any] = [name, names]
    for array in arrays:
        if type(array) is np.ndarray:
            key += (array.shape, array.dtype)
        elif array is None:
            key.append(None)
        else:
            return None
    return tuple(key)


_PLAIN_TYPES = frozenset((int, str, type(None)))


def _as_key(settings: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The settings with lists as tuples and NumPy integers as ints, or None where they do not name one problem.

    They do where nothing but ints, strings and None remains: True equals 1 and would find its cache entry, but must be
    refused.
    """
    for value in settings:
        if type(value) not in _PLAIN_TYPES and not (type(value) is tuple and all(type(v) is int for v in value)):
            break
    else:
        return settings

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(map(plain, value))
        return int(value) if isinstance(value, np.integer) else value

    def unambiguous(value: Any) -> bool:
        return all(map(unambiguous, value)) if isinstance(value, tuple) else type(value) in _PLAIN_TYPES

    names = cast(tuple[Any, ...], plain(settings))
    return names if unambiguous(names) else None


def _identity(array: Any) -> tuple[Any, ...] | None:
    """What a plan depends on of a CuPy array: two arrays with one identity can use one plan.

    Other arrays get an identity that no plan is ever stored under, since the checks refuse them.
    """
    if array is None:
        return None
    if not runtime.is_cupy_array(array):
        return ("foreign",)
    data = array.data
    return (array.shape, array.strides, array.dtype, data.device_id, data.ptr & 15)


# -- checks that need the arrays themselves; everything about shapes, dtypes and settings is in arguments.py ----------


def check_kinds(op: str, arrays: dict[str, Any]) -> None:
    """Refuse what is no array, arrays of different kinds or devices, and a foreign byte order on a GPU.

    Raises:
        TypeError: naming the argument.
    """
    kinds: dict[str, str] = {}
    for name, array in arrays.items():
        if runtime.is_cupy_array(array):
            if not array.dtype.isnative:  # CuPy makes views of such, and computes with none
                raise TypeError(f"{op}: {name} must have native byte order on a GPU, got {array.dtype.str}")
            kinds[name] = f"CuPy array on device {array.data.device_id}"
        elif isinstance(array, np.ndarray) and not isinstance(array, np.ma.MaskedArray):
            kinds[name] = "NumPy array"
        else:
            raise TypeError(f"{op}: {name} must be a NumPy or CuPy array, got {type(array).__name__}{_hint(op, array)}")
    first, kind_of_first = next(iter(kinds.items()))
    for name, kind in kinds.items():
        if kind != kind_of_first:
            raise TypeError(
                f"{op}: all arrays must be of one kind and on one device, got {first} as a {kind_of_first} "
                f"and {name} as a {kind}"
            )


def _hint(op: str, array: object) -> str:
    """Where to go with a PyTorch tensor. PyTorch is not imported: no tensor exists before somebody else did."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(array, torch.Tensor):
        return ""
    if op in ("conv1d", "conv_transpose1d"):
        return f"; for PyTorch tensors there is gpuconv.torch.{op}"
    return "; the functions of gpuconv.torch take PyTorch tensors"


def check_overlap(op: str, out: Any, inputs: dict[str, Any]) -> None:
    low, high = _byte_range(out)
    for name, array in inputs.items():
        if array is None:
            continue
        array_low, array_high = _byte_range(array)
        if array_low < high and low < array_high and _share_memory(out, array):
            raise ValueError(f"{op}: out must not overlap {name}, but they share memory")


def _share_memory(a: Any, b: Any) -> bool:
    """Whether two arrays whose byte ranges overlap have a byte in common."""
    try:
        return bool(np.shares_memory(_Ghost.of(a), _Ghost.of(b), max_work=cast(Any, 100_000)))
    except np.exceptions.TooHardError:  # interleaved in a way too intricate to decide: treated as overlapping
        return True


def _may_overlap_itself(array: Any) -> bool:
    """Whether some axis, from the shortest stride to the longest, steps by less than what the axes before it span.

    Every view that slicing, transposing and reshaping can make of an ordinary array passes; hand-made strides that
    interleave without touching do not.
    """
    if 0 in array.shape:
        return False
    reach = array.dtype.itemsize
    for stride, extent in sorted((abs(s), e) for s, e in zip(array.strides, array.shape, strict=True)):
        if extent > 1:
            if stride < reach:
                return True
            reach += (extent - 1) * stride
    return False


def _address(array: Any) -> int:
    return int(array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr)


def _byte_range(array: Any) -> tuple[int, int]:
    """The addresses from the first byte of an array to behind its last; empty for an empty array."""
    low = high = _address(array)
    if getattr(array, "_c_contiguous", False):  # CuPy's, without building a flags object: this is on the hot path
        return low, low + array.nbytes
    if 0 in array.shape:
        return low, low
    for extent, stride in zip(array.shape, array.strides, strict=True):
        span = (extent - 1) * stride
        low, high = (low + span, high) if span < 0 else (low, high + span)
    return low, high + array.dtype.itemsize


class _Ghost:
    """The place of an array in memory as NumPy sees it, for address arithmetic alone: GPU memory is never read."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface

    @classmethod
    def of(cls, array: Any) -> np.ndarray[Any, Any]:
        interface = {
            "shape": tuple(array.shape),
            "strides": tuple(array.strides),
            "typestr": f"|V{array.dtype.itemsize}",
            "data": (_address(array), True),
            "version": 3,
        }
        return np.asarray(cls(interface))


def _native(array: Any) -> np.ndarray[Any, Any]:
    """The array as a plain ndarray in native byte order, copied only where the order differs."""
    plain = np.asarray(array)
    return plain if plain.dtype.isnative else plain.astype(plain.dtype.newbyteorder("="))
