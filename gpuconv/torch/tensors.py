"""Tensors as arrays that share their memory, and the properties of tensors that gpuconv needs."""

# Much of PyTorch has no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

from .. import runtime
from ..problem import ArraySpec, numpy_dtype
from ..text import install_hint

Tensor: TypeAlias = torch.Tensor


def specs(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else ArraySpec(tuple(t.shape), dtype_name(t.dtype)) for t in tensors)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write(empty: Callable[[], Tensor], function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Tensor:
    """Call a function of arrays; tensors among its arguments become arrays that share their memory.

    Returns its result as a tensor; on a GPU it is written to the tensor that `empty` makes.

    As for PyTorch's own operators, work on a GPU is queued on PyTorch's current stream, and temporary memory comes from
    PyTorch's allocator. So PyTorch's rules for tensors from other streams apply: see `torch.Tensor.record_stream`.
    """
    if not on_gpu(arguments[0] if isinstance(arguments[0], torch.Tensor) else arguments[1]):
        try:
            arrays = [numpy_array(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            return tensor_of(function(*arrays, **keywords))
        except TypeError:  # `empty` raises an error that names the argument and gives no hint that is for arrays alone
            empty()
            raise
    try:
        cupy = runtime.cupy_module()
    except ImportError as error:
        raise ImportError(f"CUDA tensors need CuPy: {install_hint('cuda13', 'cuda12')} ({error})") from error
    result = empty()
    index = result.get_device()

    def allocate(num_bytes: int) -> Any:
        return _pointer(cupy, result.new_empty(num_bytes, dtype=torch.uint8))

    # The device must be set in both libraries, as each has its own CUDA runtime.
    with (
        torch.cuda.device(index),
        cupy.cuda.Device(index),
        cupy.cuda.Stream.from_external(torch.cuda.current_stream()),
        cupy.cuda.using_allocator(allocate),
    ):
        arrays = [cupy_array(cupy, a) if isinstance(a, torch.Tensor) else a for a in arguments]
        function(*arrays, **keywords, out=cupy_array(cupy, result))
    return result


def on_gpu(tensor: Tensor) -> bool:
    if tensor.is_cpu or tensor.is_cuda:
        return tensor.is_cuda
    raise TypeError(f"gpuconv: tensors must be on the CPU or a CUDA device, got one on {tensor.device}")


# Tensors have no pending conjugation or negation here: PyTorch resolves these before it calls an operator.


def numpy_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    plain = tensor.detach() if tensor.requires_grad else tensor
    if plain.dtype != torch.bfloat16:
        return plain.numpy()
    return plain.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))


def tensor_of(array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype.kind in "fciu":  # NumPy's own
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def cupy_array(cupy: Any, tensor: Tensor) -> Any:
    # Not through DLPack: PyTorch would make another stream wait if it does not recognise its own current one, and
    # refuses CuPy's per-thread default stream.
    strides = tuple(stride * tensor.itemsize for stride in tensor.stride())
    return cupy.ndarray(tensor.shape, numpy_dtype(dtype_name(tensor.dtype)), _pointer(cupy, tensor), strides)


def _pointer(cupy: Any, tensor: Tensor) -> Any:
    """A CuPy pointer to the first element of a tensor; it keeps the tensor alive."""
    behind = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), max(behind, 0), tensor, tensor.get_device())
    return cupy.cuda.MemoryPointer(memory, 0)
