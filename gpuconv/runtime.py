"""Builds and launches kernels through CuPy: the only file that imports CuPy and that names `cupy.RawKernel`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

# What only a GPU needs is imported where it is first used: `import gpuconv` imports this file and loads no families.
if TYPE_CHECKING:
    from . import dispatch
    from .device import Device
    from .families import Config, Launch, Step
    from .problem import Problem

# Dynamic shared memory that a kernel may use without asking, in bytes, on every architecture.
DEFAULT_SHARED_BYTES = 48 * 1024

# The oldest major version of CuPy that is supported. Before it, a kernel argument that is None arrives as garbage.
OLDEST_CUPY = 14


def cupy_module() -> ModuleType:
    """CuPy, imported on first use.

    Raises:
        ImportError: CuPy is not installed (a ModuleNotFoundError), cannot be loaded, or is older than version 14.
    """
    try:
        import cupy  # waits for a thread that is importing CuPy, whose entry in sys.modules is half made until then
    except Exception as error:  # it also makes its cache folder and loads libraries, which fail in many ways
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            raise
        cause = error.__cause__ or error  # CuPy wraps some in a page of advice
        raise ImportError(f"CuPy cannot be loaded: {type(cause).__name__}: {cause}") from error
    return _supported(cupy)


@cache
def _supported(cupy: ModuleType) -> ModuleType:
    from .text import install_hint

    if int(cupy.__version__.partition(".")[0]) < OLDEST_CUPY:
        raise ImportError(
            f"gpuconv needs CuPy {OLDEST_CUPY}.0 or newer and found CuPy {cupy.__version__}; "
            f"{install_hint('cuda13', 'cuda12')}"
        )
    return cupy


def check_dtype(dtype: np.dtype[Any]) -> None:
    """Refuse a dtype of which CuPy has no arrays here.

    Raises:
        TypeError: bfloat16 with a NumPy before 2.1.2, whose promotion of types crashes on it; CuPy leaves it out then.
    """
    if dtype.name == "bfloat16" and np.lib.NumpyVersion(np.__version__) < "2.1.2":
        raise TypeError(f"bfloat16 on a GPU needs NumPy 2.1.2 or newer, found NumPy {np.__version__}")


def is_cupy_array(array: object) -> bool:
    """Whether an object is a CuPy array, without importing CuPy: whoever has one has imported it."""
    # The module is there before its class is, while another thread imports CuPy.
    return isinstance(array, getattr(sys.modules.get("cupy"), "ndarray", ()))


def array_module(array: object) -> ModuleType:
    """CuPy for its arrays, else NumPy."""
    return cupy_module() if is_cupy_array(array) else np


def empty_beside(array: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A fresh array where another one is, in native byte order."""
    if not is_cupy_array(array):
        return np.empty(shape, dtype.newbyteorder("="))
    with current_device_of(array):
        return cupy_module().empty(shape, dtype)


def current_device_of(array: Any) -> AbstractContextManager[Any]:
    """A context in which the GPU of an array is CuPy's current one; of no effect for NumPy arrays."""
    return cupy_module().cuda.Device(array.data.device_id) if is_cupy_array(array) else _NO_DEVICE


_NO_DEVICE = nullcontext()


def device_count() -> int:
    """The number of GPUs that CuPy reaches.

    Raises:
        ImportError: CuPy is not installed, or it is older than version 14.
        RuntimeError: there is no driver, or it is too old.
    """
    return int(cupy_module().cuda.runtime.getDeviceCount())


def cuda_versions() -> tuple[int, int]:
    """The CUDA versions that the driver supports (0 without a driver) and that CuPy was built for, as 13020 for 13.2.

    Raises:
        ImportError: CuPy is not installed, or it is older than version 14.
    """
    runtime = cupy_module().cuda.runtime
    return int(runtime.driverGetVersion()), int(runtime.runtimeGetVersion())


@cache
def device(index: int) -> Device:
    """The GPU with CuPy's index."""
    from .device import Device

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


def nvrtc_version() -> tuple[int, int] | None:
    """The version of NVRTC, CUDA's compiler at run time; None where it cannot be loaded.

    Raises:
        ImportError: CuPy is not installed, or it is older than version 14.
    """
    nvrtc = cupy_module().cuda.nvrtc
    try:
        major, minor = nvrtc.getVersion()
    except Exception:  # CuPy loads the library at the first call and reports its absence in many ways
        return None
    return int(major), int(minor)


@cache
def build(config: Config, arch: str) -> Any:
    """The kernel of a specialisation for GPUs of an architecture, "sm_90" and so on.

    Where it was compiled in advance, CuPy loads the machine code (gpuconv.cubins). Else CuPy compiles it for the
    current device when it is first needed there; later processes find it in CuPy's disk cache.

    Raises:
        RuntimeError: it was not compiled in advance, and $GPUCONV_CACHE_ONLY forbids to compile it now.
    """
    from . import cubins, source

    cupy = cupy_module()
    path = cubins.path_of(config, arch, nvrtc_version, cuda_versions()[1] // 1000)
    if path is not None:
        return cupy.RawModule(path=str(path)).get_function(config.kernel)
    return cupy.RawKernel(source.assemble(config.kernel, dict(config.macros)), config.kernel)


class _Kernel:
    """A compiled kernel with its launch and its packed parameters."""

    __slots__ = ("_block", "_function", "_grid", "_params", "_shared_bytes")

    def __init__(self, config: Config, launch: Launch) -> None:
        from . import source

        cupy = cupy_module()
        gpu = device(int(cupy.cuda.runtime.getDevice()))
        kernel = build(config, gpu.arch_name)
        # More than the default must be allowed first. All plans of a kernel share the limit, in all threads, so each
        # sets the same one: the most that a block can have. The driver wants a current context for that, which a new
        # thread does not have, and CuPy sees to that only where it loads and launches.
        if launch.shared_bytes > DEFAULT_SHARED_BYTES:
            cupy.cuda.Device().use()
            kernel.max_dynamic_shared_size_bytes = gpu.shared_per_block
        self._function = kernel.kernel
        self._grid = (launch.grid, 1, 1)
        self._block = (launch.block, 1, 1)
        self._shared_bytes = launch.shared_bytes
        # The struct is passed by value: the driver copies it out of this buffer at each launch.
        self._params = cupy.cuda.function.CNumpyArray(source.pack_params(dict(launch.params), launch.index_bits))

    def launch(self, *pointers: Any) -> None:
        """Launch on the current device and CuPy's current stream. The only place in gpuconv that launches a kernel."""
        self._function(self._grid, self._block, (*pointers, self._params), self._shared_bytes)


def _temporary(num_bytes: int) -> Any:
    """A buffer for the kernels that are launched next on the current stream.

    When the caller lets go of it, it goes back to CuPy's pool, which hands it out again to the same stream only, behind
    the kernels queued until then. While the stream is being captured, it is part of the CUDA graph instead: allocating
    and freeing it become nodes of the graph, which have the memory ready whenever the graph runs, on any stream, and
    nothing of it is left when the graph is gone.

    Raises:
        RuntimeError: the stream is being captured, and the GPU or its driver has no stream-ordered allocator.
    """
    cuda = cupy_module().cuda
    return cuda.malloc_async(num_bytes) if cuda.get_current_stream().is_capturing() else cuda.alloc(num_bytes)


def refuse_during_capture(what: str, device_index: int) -> None:
    """Refuse what waits for a GPU, which would end the capture of its current stream.

    Raises:
        RuntimeError: `what` cannot be done while that stream is being captured.
    """
    cuda = cupy_module().cuda
    with cuda.Device(device_index):
        if cuda.get_current_stream().is_capturing():
            raise RuntimeError(f"{what} while the current stream of GPU {device_index} is being captured")


def complete(what: str, array: Any) -> None:
    """Wait for the work queued on the current stream of an array's GPU, after which any stream may read what it wrote.

    Of no effect for NumPy arrays.

    Raises:
        RuntimeError: `what` cannot be done while that stream is being captured.
    """
    if is_cupy_array(array):
        refuse_during_capture(what, array.data.device_id)
        with current_device_of(array):
            cupy_module().cuda.get_current_stream().synchronize()


def append(window: Any, samples: Any) -> None:
    """Move the samples of a contiguous window (N, C, held + L) forward by L, and write `samples` (N, C, L) behind them.

    One launch on the current device and CuPy's current stream, which allocates nothing where `samples` can be read.
    """
    from .families.append import append_launch
    from .families.base import ArrayLayout

    samples = aligned(samples)
    if samples.size == 0:
        return
    itemsize = samples.dtype.itemsize
    layout = ArrayLayout.of(samples.shape, samples.strides, 0, itemsize)
    assert layout is not None  # aligned
    step = append_launch(samples.dtype.name, window.shape, samples.shape, layout)
    _append_kernel(int(samples.data.device_id), *step).launch(samples.data, window.data)


@lru_cache(maxsize=256)
def _append_kernel(device_index: int, config: Config, launch: Launch) -> _Kernel:  # noqa: ARG001 (one for each GPU)
    return _Kernel(config, launch)


class _Packing:
    """The step of a plan that lays out the weights anew, which prepared weights keep.

    Attributes:
        key: the same object for the plans whose packed weights are the same.
    """

    __slots__ = ("_kernel", "_num_bytes", "key")

    def __init__(self, step: Step, num_bytes: int) -> None:
        self.key = _shared(step)
        self._kernel = _Kernel(step.config, step.launch)
        self._num_bytes = num_bytes

    def pack(self, weight: Any) -> Any:
        """The packed weights, once the work queued on the current stream has run."""
        packed = _temporary(self._num_bytes)
        self._kernel.launch(weight.data, packed)
        return packed


@lru_cache(maxsize=4096)
def _shared(step: Step) -> Step:
    """One object for equal steps, so that a repeated call need not compare them; two if they are asked for at once."""
    return step


class PreparedWeight:
    """Weights that are packed once and kept; `gpuconv.prepare` makes them.

    Attributes:
        array: a private copy of the weights, complete on every stream.
    """

    __slots__ = ("_lock", "_packed", "array")

    def __init__(self, array: Any) -> None:
        """`array` belongs to the handle. Where it is on a GPU, this waits for the work queued on its current stream."""
        complete("weights cannot be prepared", array)
        self.array = array
        # By the identity of a key of _Packing; the key is kept, so that no other object gets its identity.
        self._packed: dict[int, tuple[Step, Any]] = {}
        self._lock = threading.RLock()  # a finalizer may call while its own thread packs

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def packed(self, packing: _Packing) -> Any:
        """The packed form for a plan; made on first use, and complete on every stream when it is kept."""
        found = self._packed.get(id(packing.key))
        if found is None:
            stream = cupy_module().cuda.get_current_stream()
            if stream.is_capturing():  # nothing can be waited for here, so this one belongs to the graph
                return packing.pack(self.array)
            with self._lock:
                found = self._packed.get(id(packing.key))  # another thread may have been faster
                if found is None:
                    found = packing.key, packing.pack(self.array)
                    stream.synchronize()
                    self._packed[id(packing.key)] = found
        return found[1]

    def __reduce__(self) -> tuple[type[PreparedWeight], tuple[Any]]:
        """Pickles and copies hold the weights alone; packed forms are made again where calls need them."""
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
    cupy = cupy_module()
    refuse_during_capture("prepare: weights cannot be prepared", weight.data.device_id)
    with current_device_of(weight):
        array = cupy.empty(weight.shape, weight.dtype)
        _assign(array, weight)
        return PreparedWeight(array)


class Executor:
    """A plan with everything that a repeated call needs: loaded kernels and packed parameters.

    Run it on arrays of the very shapes, strides, dtype, device and pointer alignment that it was made for; it checks
    none of that.

    Attributes:
        choice: what is launched; None where the result is empty or zero.
        copies: the arrays that are copied, because kernels cannot read or write them where they lie.
    """

    __slots__ = (
        "_conjugate_weight",
        "_copied",
        "_has_samples",
        "_packing",
        "_scratch",
        "_steps",
        "_weight",
        "choice",
        "copies",
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

        Only a weight among `copies` can be conjugated.
        """
        from .families.base import PACKED, SAMPLES

        self.choice = choice
        self.copies = copies
        self._conjugate_weight = conjugate_weight
        self._copied = [name in copies for name in operands] if copies else None
        self._weight = operands.index("weight") if "weight" in operands else -1
        self._packing: _Packing | None = None
        self._has_samples = False
        self._scratch: list[int] = []  # bytes of the buffers of a call
        self._steps: list[tuple[_Kernel, tuple[int, ...]]] = []  # with the places of the pointers, the null one last
        if choice is None:
            return
        names, steps = [*operands], choice.plan.steps
        if steps[0].arrays == ("weight", PACKED):
            self._packing = _Packing(steps[0], choice.plan.scratch_bytes(PACKED))
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
            self._steps.append((_Kernel(step.config, step.launch), places))

    def run(self, *arrays: Any, prepared: PreparedWeight | None = None, samples: Any = None) -> None:
        """Launch on the current device and CuPy's current stream; writes all of the last array, the result.

        `prepared` holds the packed forms of the weight, where the caller has one; `samples` are the rows of
        `Samples.table`, where the problem has lengths.
        """
        if self.choice is None:
            clear(arrays[-1])  # sums of nothing
            return
        usable = arrays if self._copied is None else _with_copies(arrays, self._copied)
        if self._conjugate_weight:
            weight = usable[self._weight]
            cupy_module().conjugate(weight, weight)  # a copy of this call's own
        pointers = [None if array is None else array.data for array in usable]
        if self._packing is not None:
            packing = self._packing
            pointers.append(packing.pack(usable[self._weight]) if prepared is None else prepared.packed(packing))
        if self._has_samples:
            pointers.append(_write_samples(samples))
        pointers += map(_temporary, self._scratch)
        pointers.append(None)
        for kernel, places in self._steps:
            kernel.launch(*(pointers[place] for place in places))
        if usable[-1] is not arrays[-1]:
            _assign(arrays[-1], usable[-1])


def _write_samples(table: np.ndarray[Any, Any]) -> Any:
    """A temporary buffer that holds a table of int64, which launches write from their parameters."""
    from .families.lengths import write_launches

    buffer = _temporary(table.nbytes)
    for config, launch in write_launches(table.reshape(-1).tolist()):
        _Kernel(config, launch).launch(buffer)
    return buffer


def _with_copies(arrays: Sequence[Any], copies: Sequence[bool]) -> Sequence[Any]:
    """The arrays with contiguous ones in place of those marked: copies of inputs, and of the result an empty buffer."""
    *inputs, output = arrays
    usable = [_copy(array) if copy else array for array, copy in zip(inputs, copies[:-1], strict=True)]
    return [*usable, _contiguous(output) if copies[-1] else output]


def _copy(array: Any) -> Any:
    copy = _contiguous(array)
    _assign(copy, array)
    return copy


def _contiguous(like: Any) -> Any:
    """A contiguous array of the shape and dtype of another, in a temporary buffer that nothing is written to."""
    return cupy_module().ndarray(like.shape, like.dtype, _temporary(like.nbytes))


def aligned(array: Any) -> Any:
    """An array that CuPy can read: itself, or a copy where its elements are not at multiples of their size."""
    if not is_cupy_array(array) or _is_aligned(array):
        return array
    cupy = cupy_module()
    with current_device_of(array):
        copy = cupy.empty(array.shape, array.dtype)
        _assign(copy, array)
        return copy


def _assign(target: Any, values: Any) -> None:
    """`target[...] = values` for arrays of one shape and dtype, at any addresses.

    CuPy's own kernels read and write whole elements, and a GPU faults on those that are not at multiples of their size.
    """
    if not (_is_aligned(target) and _is_aligned(values)):
        target, values = _as_bytes(target), _as_bytes(values)
    target[...] = values


def add(target: Any, values: Any) -> None:
    """`target += values` for arrays of one shape and dtype, of which `target` may lie at any address."""
    total = aligned(target)
    total += values
    if total is not target:
        _assign(target, total)


def _is_aligned(array: Any) -> bool:
    return not any(place % array.dtype.itemsize for place in (array.data.ptr, *array.strides))


def clear(array: Any) -> None:
    """Make an array zero that may lie at any address."""
    if array.size:
        _as_bytes(array).fill(0)


def _as_bytes(array: Any) -> Any:
    """A view of the bytes of an array, with those of an element along one more axis."""
    itemsize = array.dtype.itemsize
    return cupy_module().ndarray((*array.shape, itemsize), np.uint8, array.data, (*array.strides, 1))


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
        arrays: of a call, in its order; None for a bias that is not there.
        output: the result; None stands for a fresh array.
        conjugate_weight: whether to compute with the conjugates of the weights, of which each call makes a copy.
        algorithm: that of `dispatch.choose`.
        is_prepared: whether calls give a prepared weight.
    """
    if problem is None or problem.is_empty:
        return Executor(None, (*operands, "output"))
    from . import dispatch

    names = (*operands, problem.result)
    given = dict(zip(names, (*arrays, output), strict=True))
    if conjugate_weight:
        given["weight"] = None
    pointers = {n: None if a is None else dispatch.StridedPointer(a.strides, a.data.ptr) for n, a in given.items()}
    layout, copies = dispatch.lay_out(problem, pointers)
    if conjugate_weight:
        copies = (*copies, "weight")
    index = int(cupy_module().cuda.runtime.getDevice())
    choice = dispatch.choose(problem, replace(layout, is_prepared=is_prepared), device(index), algorithm)
    return Executor(choice, names, copies, conjugate_weight=conjugate_weight)
