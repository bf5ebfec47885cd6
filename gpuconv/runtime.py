"""Builds and launches kernels through CuPy: the only file that imports CuPy and that names `cupy.RawKernel`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

# What only a GPU needs is imported where it is first used: `import gpuconv` imports this file and loads no families.
if TYPE_CHECKING:
    from . import dispatch
    from .device import Device
    from .families import Config, Launch, Pack
    from .problem import BiasGradientProblem, ConvProblem, WeightGradientProblem

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
    """Whether an object is a CuPy array, without importing CuPy: no such array exists before somebody else did."""
    # The module is there before its class is, while another thread imports CuPy.
    return isinstance(array, getattr(sys.modules.get("cupy"), "ndarray", ()))


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


@cache
def build(config: Config) -> Any:
    """The kernel of a specialisation, which CuPy compiles for the current device when it is first needed there.

    The first build of a source on a machine compiles it; later processes find it in CuPy's disk cache.
    """
    from . import source

    text = source.assemble(config.kernel, dict(config.macros))
    return cupy_module().RawKernel(text, config.kernel)


class _Kernel:
    """A compiled kernel with its launch and its packed parameters."""

    __slots__ = ("_block", "_function", "_grid", "_params", "_shared_bytes")

    def __init__(self, config: Config, launch: Launch) -> None:
        from . import source

        cupy, kernel = cupy_module(), build(config)
        # More than the default must be allowed first. All plans of a kernel share the limit, in all threads, so each
        # sets the same one: the most that a block can have. The driver wants a current context for that, which a new
        # thread does not have, and CuPy sees to that only where it loads and launches.
        if launch.shared_bytes > DEFAULT_SHARED_BYTES:
            gpu = cupy.cuda.Device()
            gpu.use()
            kernel.max_dynamic_shared_size_bytes = device(gpu.id).shared_per_block
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


class _Packer:
    """The kernel that packs the weights of a plan."""

    __slots__ = ("_kernel", "_num_bytes", "pack")

    def __init__(self, pack: Pack) -> None:
        self.pack = _interned(pack)
        self._kernel = _Kernel(pack.config, pack.launch)
        self._num_bytes = pack.num_bytes

    def __call__(self, weight: Any) -> Any:
        """The packed weights, once the work queued on the current stream has run."""
        packed = _temporary(self._num_bytes)
        self._kernel.launch(weight.data, packed)
        return packed


_PACKS: dict[Pack, Pack] = {}


def _interned(pack: Pack) -> Pack:
    """One object for all equal values, kept for good, so that a look-up compares identities."""
    return _PACKS.setdefault(pack, pack)


class PreparedWeight:
    """Weights that are packed once and kept; `gpuconv.prepare` makes them.

    Attributes:
        array: a private copy of the weights, complete on every stream.
    """

    __slots__ = ("_lock", "_packed", "array")

    def __init__(self, array: Any) -> None:
        """`array` belongs to the handle. Where it is on a GPU, this waits for the work queued on its current stream."""
        if is_cupy_array(array):
            cuda = cupy_module().cuda
            refuse_during_capture("weights cannot be prepared", array.data.device_id)
            with cuda.Device(array.data.device_id):
                cuda.get_current_stream().synchronize()
        self.array = array
        self._packed: dict[int, Any] = {}  # by the identity of the interned Pack
        self._lock = threading.RLock()  # a finalizer may call while its own thread packs

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def packed(self, packer: _Packer) -> Any:
        """The packed form for a plan; made on first use, and complete on every stream when it is kept."""
        found = self._packed.get(id(packer.pack))
        if found is None:
            stream = cupy_module().cuda.get_current_stream()
            if stream.is_capturing():  # nothing can be waited for here, so this one belongs to the graph
                return packer(self.array)
            with self._lock:
                found = self._packed.get(id(packer.pack))  # another thread may have been faster
                if found is None:
                    found = packer(self.array)
                    stream.synchronize()
                    self._packed[id(packer.pack)] = found
        return found

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
    with cupy.cuda.Device(weight.data.device_id):
        array = cupy.empty(weight.shape, weight.dtype)
        _assign(array, weight)
        return PreparedWeight(array)


class Plan:
    """Everything that a repeated call needs: the kernels, their launches, their packed parameters.

    Call it with arrays of the very shapes, strides, dtype, device and pointer alignment that it was made for; it checks
    none of that.
    """

    __slots__ = ("_conjugate_weight", "_kernel", "_pack", "_second", "choice", "copies", "output_shape")

    def __init__(
        self,
        output_shape: tuple[int, ...],
        choice: dispatch.Choice | None,
        copies: tuple[str, ...],
        *,
        conjugate_weight: bool = False,
    ) -> None:
        """`choice` is None where nothing is launched. Only a weight among `copies` can be conjugated."""
        self.output_shape = output_shape
        self.choice = choice
        self.copies = copies
        self._conjugate_weight = conjugate_weight
        self._kernel = None if choice is None else _Kernel(choice.config, choice.launch)
        self._pack = None if choice is None or choice.pack is None else _Packer(choice.pack)
        second = None if choice is None else choice.second_pass
        self._second = None if second is None else (_Kernel(second.config, second.launch), second.num_bytes)

    def __call__(
        self, input: Any, weight: Any, bias: Any | None, output: Any, prepared: PreparedWeight | None = None
    ) -> None:
        """Launch on the current device and CuPy's current stream; writes all of `output`.

        `prepared` holds the packed forms of `weight`, where the caller has one.
        """
        if self.copies:
            copies = [name in self.copies for name in ("input", "weight", "bias", "output")]
            _run_with_copies(partial(self._run, prepared=prepared), (input, weight, bias, output), copies)
        else:
            self._run(input, weight, bias, output, prepared)

    def _run(self, input: Any, weight: Any, bias: Any | None, output: Any, prepared: PreparedWeight | None) -> None:
        if self._kernel is None:
            return
        if self._conjugate_weight:
            cupy_module().conjugate(weight, weight)  # a copy of this call's own
        if self._pack is None:
            weights = weight.data
        elif prepared is None:
            weights = self._pack(weight)
        else:
            weights = prepared.packed(self._pack)
        pointers = (input.data, weights, None if bias is None else bias.data, output.data)
        if self._second is None:
            self._kernel.launch(*pointers)
            return
        second, num_bytes = self._second
        sums = _temporary(num_bytes)
        self._kernel.launch(*pointers, sums)
        second.launch(*pointers, sums)


class GradientPlan:
    """Everything that a repeated call for the gradient of weights or of a bias needs.

    Call it with arrays of the very shapes, strides, dtype, device and pointer alignment that it was made for; it checks
    none of that.

    Attributes:
        choice: what is launched; None where an array is empty.
        copies: which of the arrays of a call are copied, because kernels cannot read or write them where they lie.
    """

    __slots__ = ("_kernel", "_order", "_sum", "choice", "copies", "output_shape")

    def __init__(
        self,
        problem: dispatch.GradientProblem,
        choice: dispatch.GradientChoice | None,
        copies: tuple[bool, ...],
        order: tuple[int, ...],
    ) -> None:
        """`order` are the places of the kernel's inputs among the arrays of a call."""
        from .families.base import gradient_shapes

        self.output_shape = gradient_shapes(problem)[1]
        self.choice = choice
        self.copies = copies
        self._order = order
        self._kernel = None if choice is None else _Kernel(choice.config, choice.launch)
        self._sum = None if choice is None or choice.sum is None else _Kernel(*choice.sum)

    def __call__(self, *arrays: Any) -> None:
        """Launch on the current device and CuPy's current stream; writes all of the last array, the result."""
        if any(self.copies):
            _run_with_copies(self._run, arrays, self.copies)
        else:
            self._run(*arrays)

    def _run(self, *arrays: Any) -> None:
        *given, output = arrays
        inputs = [given[place].data for place in self._order]
        if self._kernel is None or self.choice is None:
            _as_bytes(output).fill(0)  # the sum of nothing
        elif self._sum is None:
            self._kernel.launch(*inputs, None, output.data)
        else:
            sums = _temporary(self.choice.partial_bytes)
            self._kernel.launch(*inputs, sums, None)
            self._sum.launch(sums, output.data)


def _run_with_copies(run: Callable[..., None], arrays: Sequence[Any], copies: Sequence[bool]) -> None:
    """`run` on the arrays, the last of which it writes, with contiguous copies in place of those marked."""
    *inputs, output = arrays
    usable = [_copy(array) if copy else array for array, copy in zip(inputs, copies[:-1], strict=True)]
    target = _contiguous(output) if copies[-1] else output
    run(*usable, target)
    if target is not output:
        _assign(output, target)


def _copy(array: Any) -> Any:
    copy = _contiguous(array)
    _assign(copy, array)
    return copy


def _contiguous(like: Any) -> Any:
    """A contiguous array of the shape and dtype of another, in a temporary buffer that nothing is written to."""
    return cupy_module().ndarray(like.shape, like.dtype, _temporary(like.nbytes))


def aligned(array: Any) -> Any:
    """A CuPy array that CuPy can read: itself, or a copy where its elements are not at multiples of their size."""
    if _is_aligned(array):
        return array
    cupy = cupy_module()
    with cupy.cuda.Device(array.data.device_id):
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


def _is_aligned(array: Any) -> bool:
    return not any(place % array.dtype.itemsize for place in (array.data.ptr, *array.strides))


def _as_bytes(array: Any) -> Any:
    """A view of the bytes of an array, with those of an element along one more axis."""
    itemsize = array.dtype.itemsize
    return cupy_module().ndarray((*array.shape, itemsize), np.uint8, array.data, (*array.strides, 1))


def make_plan(
    problem: ConvProblem,
    input: Any,
    weight: Any,
    bias: Any | None,
    output: Any | None,
    *,
    conjugate_weight: bool = False,
    algorithm: str | None = None,
) -> Plan:
    """Plan a validated problem for CuPy arrays on the current device; `output=None` means a fresh allocation.

    `algorithm` is that of `dispatch.choose`. Where `conjugate_weight`, the plan computes with the conjugates of the
    weights, of which it makes a copy.
    """
    from . import dispatch

    arrays = {"input": input, "weight": None if conjugate_weight else weight, "bias": bias, "output": output}
    layout, copies = dispatch.lay_out(
        problem,
        {name: None if a is None else dispatch.Place(a.strides, a.data.ptr) for name, a in arrays.items()},
    )
    if conjugate_weight:
        copies = (*copies, "weight")
    index = int(cupy_module().cuda.runtime.getDevice())
    choice = dispatch.choose(problem, layout, device(index), algorithm)
    return Plan(problem.output_shape, choice, copies, conjugate_weight=conjugate_weight)


def make_weight_gradient_plan(
    problem: WeightGradientProblem,
    input: Any,
    grad_output: Any,
    output: Any | None,
    *,
    algorithm: str | None = None,
) -> GradientPlan:
    """`make_plan` for the gradient of weights. The plan is called with input, grad_output and the result."""
    order = (0, 1) if problem.transposed else (1, 0)  # the input is coarse where the operation is transposed
    return _make_gradient_plan(problem, (input, grad_output), output, order, algorithm)


def make_bias_gradient_plan(
    problem: BiasGradientProblem, grad_output: Any, output: Any | None, *, algorithm: str | None = None
) -> GradientPlan:
    """`make_plan` for the gradient of a bias. The plan is called with grad_output and the result."""
    return _make_gradient_plan(problem, (grad_output,), output, (0,), algorithm)


def _make_gradient_plan(
    problem: dispatch.GradientProblem,
    inputs: Sequence[Any],
    output: Any | None,
    order: tuple[int, ...],
    algorithm: str | None,
) -> GradientPlan:
    from . import dispatch
    from .families.base import gradient_shapes

    def place(array: Any) -> dispatch.Place:
        return dispatch.Place(array.strides, array.data.ptr)

    input_shapes, shape = gradient_shapes(problem)
    if 0 in shape or any(0 in input_shape for input_shape in input_shapes):
        return GradientPlan(problem, None, (False,) * (len(inputs) + 1), order)
    layout, copies = dispatch.lay_out_gradient(
        problem, [place(inputs[i]) for i in order], None if output is None else place(output)
    )
    index = int(cupy_module().cuda.runtime.getDevice())
    copied = tuple(i in copies for i in (*(order.index(i) for i in range(len(inputs))), len(inputs)))
    choice = dispatch.choose_gradient(problem, layout, device(index), algorithm)
    return GradientPlan(problem, choice, copied, order)
