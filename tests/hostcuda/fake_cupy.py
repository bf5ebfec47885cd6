"""A stand-in for the module `cupy` whose kernels run through hostcuda: gpuconv's GPU path, end to end, without a GPU.

It has what gpuconv uses of CuPy and no more. `installed()` puts it in CuPy's place.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from gpuconv import calls, runtime
from gpuconv.device import Device as GpuModel
from gpuconv.families import Launch

from .build import Program
from .launch import Schedule, run
from .memory import Array

__version__ = "14.0 (hostcuda)"

GPU = GpuModel.from_arch("sm_90")
NUM_DEVICES = 2
_ALIGNMENT = 512  # of fresh allocations, as in CuPy's memory pool
_DEFAULT_SHARED = 48 * 1024  # bytes of shared memory that a kernel gets without asking

schedule: Schedule = "forward"
"""How kernels run: see `hostcuda.run`."""

launches: list[tuple[str, Launch]] = []
"""(kernel, launch) of every launch, the latest last."""

_current_device = 0


@contextmanager
def installed() -> Iterator[None]:
    """In the context, `import cupy` gives this module; what gpuconv remembers of CuPy is forgotten at both ends."""

    def forget() -> None:
        for cached in (runtime.device, runtime.build):
            cached.cache_clear()
        calls._EXECUTORS.clear()
        launches.clear()

    forget()
    try:
        with mock.patch.dict(sys.modules, {"cupy": sys.modules[__name__]}):
            yield
    finally:
        forget()


class MemoryPointer:
    """The address of an array. It remembers the array, which hostcuda guards at a launch."""

    def __init__(self, array: Array, device_id: int) -> None:
        self.array = array
        self.device_id = device_id
        self.ptr = int(array.__array_interface__["data"][0])


class ndarray:  # noqa: N801
    """An array that NumPy cannot read by accident, like one in a GPU's memory.

    Made as CuPy's, of a shape, a dtype, a `MemoryPointer` and strides; or of a NumPy array and the device that it poses
    to be on.
    """

    def __init__(self, shape: Any, dtype: Any, memptr: Any = None, strides: tuple[int, ...] | None = None) -> None:
        if isinstance(shape, np.ndarray):
            self._array: Array = shape
            self.data = MemoryPointer(shape, dtype)
            return
        self._array = _array_at(memptr.ptr, tuple(shape), np.dtype(dtype), strides)
        self._keeps_alive = memptr
        self.data = MemoryPointer(self._array, memptr.device_id)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def strides(self) -> tuple[int, ...]:
        return self._array.strides

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._array.dtype

    @property
    def ndim(self) -> int:
        return self._array.ndim

    @property
    def size(self) -> int:
        return self._array.size

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    @property
    def flags(self) -> Any:
        return self._array.flags

    @property
    def device(self) -> Device:
        return Device(self.data.device_id)

    @property
    def T(self) -> ndarray:
        return ndarray(self._array.T, self.data.device_id)

    def transpose(self, *axes: int) -> ndarray:
        return ndarray(self._array.transpose(*axes), self.data.device_id)

    def swapaxes(self, first: int, second: int) -> ndarray:
        return ndarray(self._array.swapaxes(first, second), self.data.device_id)

    def reshape(self, *shape: int) -> ndarray:
        return ndarray(self._array.reshape(*shape), self.data.device_id)

    def view(self, dtype: Any) -> ndarray:
        return ndarray(self._array.view(dtype), self.data.device_id)

    def astype(self, dtype: Any, order: str = "C", copy: bool = True) -> ndarray:
        if order != "C":
            raise NotImplementedError(order)
        if not copy and self.dtype == dtype and self.flags.c_contiguous:
            return self
        return asarray(self._array.astype(dtype))

    def copy(self, order: str = "C") -> ndarray:
        if order != "C":
            raise NotImplementedError(order)
        return asarray(self._array)

    def get(self) -> Array:
        values: Array = self._array.copy()
        return values

    def fill(self, value: float) -> None:
        self._array[...] = value

    def __getitem__(self, key: Any) -> ndarray:
        return ndarray(self._array[key], self.data.device_id)

    def __setitem__(self, key: Any, value: ndarray) -> None:
        self._array[key] = value._array

    def __array__(self, *_args: Any, **_kwargs: Any) -> Array:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")


def empty(shape: int | tuple[int, ...], dtype: Any = np.float64) -> ndarray:
    wanted = np.dtype(dtype)
    return ndarray(_allocate(int(np.prod(shape)) * wanted.itemsize).view(wanted).reshape(shape), _current_device)


def _array_at(address: int, shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...] | None) -> Array:
    if strides is None:
        strides = np.empty(shape, dtype).strides
    spans = [(extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)] if 0 not in shape else []
    below = -sum(min(span, 0) for span in spans)
    num_bytes = below + sum(max(span, 0) for span in spans) + dtype.itemsize
    return np.ndarray(shape, dtype, (ctypes.c_char * num_bytes).from_address(address - below), below, strides)


def _allocate(num_bytes: int) -> Array:
    memory = np.full(num_bytes + _ALIGNMENT, 0xFF, np.uint8)  # whoever reads it finds NaN
    begin = -memory.__array_interface__["data"][0] % _ALIGNMENT
    return memory[begin : begin + num_bytes]


def asarray(array: Any, dtype: Any = None) -> ndarray:
    if isinstance(array, ndarray):
        if array.data.device_id == _current_device and dtype in (None, array.dtype):
            return array
        array = array._array
    values = np.asarray(array, dtype)
    result = empty(values.shape, values.dtype.newbyteorder("="))
    result._array[...] = values
    return result


def conjugate(array: ndarray, out: ndarray) -> None:
    np.conjugate(array._array, out=out._array)


def asnumpy(array: ndarray) -> Array:
    return array.get()


class RawKernel:
    """A kernel text. Its arguments are `MemoryPointer`s or None, then Params by value."""

    def __init__(self, code: str, name: str, options: tuple[str, ...] = ()) -> None:
        assert options == (), "the text is self-contained: see gpuconv/source.py"
        self.max_dynamic_shared_size_bytes = _DEFAULT_SHARED
        self._program = Program.from_text(name, code)
        self._index_bits = int(_macro(code, "INDEX_BITS"))
        self._params_bytes = int(_macro(code, "PARAMS_BYTES"))
        # Of the kernels of mma.cuh, whose text has one parameter more where there are two launches.
        self._segment_mode = int(_macro(code, "SEGMENT_MODE")) if "#define SEGMENT_MODE " in code else 0
        kept = r"\1" if self._segment_mode >= 2 else ""
        code = re.sub(r"^#if SEGMENT_MODE >= 2\n(.*?)^#endif", kept, code, flags=re.MULTILINE | re.DOTALL)
        self._parameters = _pointer_parameters(code, name)

    @property
    def kernel(self) -> RawKernel:
        return self

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_mem: int = 0
    ) -> None:
        assert set(grid[1:]) | set(block[1:]) <= {1}, (grid, block)
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise RuntimeError(f"{self._program.kernel}: {shared_mem} bytes of shared memory were not asked for")
        *pointers, params = args
        assert len(pointers) == len(self._parameters), (pointers, self._parameters)
        values = np.frombuffer(ctypes.string_at(params.ctypes.data, self._params_bytes), f"i{self._index_bits // 8}")
        fields = tuple((str(i), int(value)) for i, value in enumerate(values))
        launch = Launch(grid[0], block[0], shared_mem, self._index_bits, fields)
        arrays = {
            name: None if pointer is None else pointer.array
            for (name, _), pointer in zip(self._parameters, pointers, strict=True)
        }
        outputs = [name for name, is_output in self._parameters if is_output and arrays[name] is not None]
        if self._segment_mode >= 2:
            outputs = ["partial" if self._segment_mode == 2 else "output"]
        launches.append((self._program.kernel, launch))
        run(self._program, launch, arrays, outputs=outputs, device=GPU, schedule=schedule)


def _macro(text: str, name: str) -> str:
    match = re.search(rf"^#define {name} (.+)$", text, re.MULTILINE)
    assert match is not None, f"the kernel text defines no {name}"
    return match.group(1)


def _pointer_parameters(text: str, kernel: str) -> list[tuple[str, bool]]:
    """(name, whether the kernel writes it) of the kernel's pointer parameters."""
    code = re.sub(r"//[^\n]*", "", text)
    match = re.search(rf"\b{kernel}\(([^)]*)\)", code)
    assert match is not None, f"the kernel text declares no {kernel}"
    parameters = [parameter.strip() for parameter in match.group(1).split(",")]
    return [(p.split()[-1], not p.startswith("const ")) for p in parameters if "*" in p]


class Device:
    """`cupy.cuda.Device`."""

    def __init__(self, id: int | None = None) -> None:
        self.id = _current_device if id is None else id
        self._previous: list[int] = []

    def __enter__(self) -> Device:
        self._previous.append(_current_device)
        self.use()
        return self

    def __exit__(self, *_error: object) -> None:
        Device(self._previous.pop()).use()

    def use(self) -> None:
        global _current_device  # noqa: PLW0603
        _current_device = self.id

    def synchronize(self) -> None:
        """Kernels have ended when their launch returns."""


def _device_properties(index: int) -> dict[str, Any]:
    assert 0 <= index < NUM_DEVICES
    return {
        "name": GPU.name.encode(),
        "major": GPU.arch // 10,
        "minor": GPU.arch % 10,
        "multiProcessorCount": GPU.num_sms,
        "sharedMemPerBlockOptin": GPU.shared_per_block,
        "sharedMemPerMultiprocessor": GPU.shared_per_sm,
        "l2CacheSize": GPU.l2_bytes,
        "totalGlobalMem": 1 << 30,
    }


def _alloc(num_bytes: int) -> MemoryPointer:
    return empty(-(-num_bytes // 4), np.uint32).data


cuda = SimpleNamespace(
    Device=Device,
    alloc=_alloc,
    function=SimpleNamespace(CNumpyArray=lambda array: array),
    get_current_stream=lambda: SimpleNamespace(ptr=0, is_capturing=lambda: False, synchronize=lambda: None),
    is_available=lambda: True,
    runtime=SimpleNamespace(
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13000,
        getDevice=lambda: _current_device,
        getDeviceCount=lambda: NUM_DEVICES,
        getDeviceProperties=_device_properties,
    ),
)
