"""Both operations on `dask.array` arrays with chunks of NumPy or CuPy arrays, cut along N, C_in and L_in in any way.

A call computes nothing but returns a dask array. Each of its chunks is one task. It reads only the slices of the input
on which its outputs depend, so of neighbouring chunks only the samples beyond a chunk's ends are sent between workers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, SupportsIndex, TypeAlias

from . import functional, memory, runtime
from .arguments import Op, Padding, Setting
from .fusion import FUSED_ARRAYS, RESIDUAL, ActivationLike, Fused
from .pieces import Lengths, Piece, compute, problem_of
from .problem import ConvProblem
from .text import install_hint

__all__ = ["conv1d", "conv_transpose1d"]

DaskArray: TypeAlias = Any  # a dask.array.Array; dask is imported by the first call
Key: TypeAlias = tuple[Any, ...]
Graph: TypeAlias = dict[Any, Any]


def conv1d(
    input: DaskArray,
    weight: Any,
    bias: Any | None = None,
    stride: Setting = 1,
    padding: Padding = 0,
    dilation: Setting = 1,
    groups: SupportsIndex = 1,
    *,
    padding_mode: str = "zeros",
    input_activation: ActivationLike | None = None,
    residual: Any | None = None,
    activation: ActivationLike | None = None,
    lengths: Any = None,
    precision: str = "float32",
    algorithm: str | None = None,
    out_dtype: Any = None,
) -> DaskArray:
    """`gpuconv.conv1d` on a dask array, lazily.

    On GPUs the result has the bits of one call on the whole array; on CPUs each element is within the same error bound.

    Args:
        input: (N, C_in, L_in), or (C_in, L_in) for a single sample: a dask array of NumPy or CuPy chunks in any number
            along every axis.
        weight: a NumPy, CuPy or dask array as in `gpuconv.conv1d`, as are bias and the arrays of activations. Each is
            sent as a whole to every worker, and to its GPU if the chunks of the input are CuPy arrays. NumPy and CuPy
            arrays must not change before the result is computed.
        bias: (C_out,), or None.
        residual: a dask, NumPy or CuPy array of the output's shape, of the kind of the input's chunks; or None.
        algorithm: as in `gpuconv.conv1d`. With "fft" the blocks of each chunk begin anew, so the bits are not those of
            one call.
        lengths: as in `gpuconv.conv1d`; they must be known when the function is called. A task that has some outputs of
            several samples makes a call for each run of samples of one length.
        stride, padding, dilation, groups, padding_mode, input_activation, activation, precision, out_dtype: as in
            `gpuconv.conv1d`.

    Returns:
        (N, C_out, L_out), or (C_out, L_out): a dask array of NumPy or CuPy chunks, like those of the input. It is cut
        along N like the input, not along C_out, and along L_out in proportion: a cut of the input at l becomes one at
        ``l*L_out // L_in``, so that with L_out = L_in both have the same chunks. A task needs memory for its chunk of
        the output and for the input of this chunk, in all channels, up to three times if that comes from several
        chunks.

    Raises:
        ValueError: as `gpuconv.conv1d`; an array has chunks of unknown size.
        TypeError: as `gpuconv.conv1d`; the input is not a dask array, or its chunks are neither NumPy nor CuPy arrays;
            or another array is on a GPU, and the chunks are not.
        ImportError: dask is not installed.

    Example:
        >>> import dask.array as da, numpy as np
        >>> import gpuconv.dask
        >>> x = da.arange(5.0, chunks=2).reshape(1, 1, 5)
        >>> y = gpuconv.dask.conv1d(x, np.ones((1, 1, 3)), padding="same")
        >>> y.chunks
        ((1,), (1,), (2, 2, 1))
        >>> y.compute()
        array([[[1., 3., 6., 9., 7.]]])
    """
    settings = (stride, padding, dilation, groups, precision, padding_mode, out_dtype)
    fused = Fused.check("conv1d", activation, input_activation, residual)
    return _convolve("conv1d", input, weight, bias, settings, fused, algorithm, lengths)


def conv_transpose1d(
    input: DaskArray,
    weight: Any,
    bias: Any | None = None,
    stride: Setting = 1,
    padding: Padding = 0,
    output_padding: Setting = 0,
    groups: SupportsIndex = 1,
    dilation: Setting = 1,
    *,
    output_size: Setting | None = None,
    input_activation: ActivationLike | None = None,
    residual: Any | None = None,
    activation: ActivationLike | None = None,
    lengths: Any = None,
    precision: str = "float32",
    algorithm: str | None = None,
    out_dtype: Any = None,
) -> DaskArray:
    """`gpuconv.conv_transpose1d` on a dask array, lazily.

    Args:
        input: (N, C_in, L_in), or (C_in, L_in) for a single sample: a dask array as in `conv1d` above.
        weight: a NumPy, CuPy or dask array as in `gpuconv.conv_transpose1d`, as are bias and the arrays of activations.
        bias: (C_out,), or None.
        residual, algorithm, lengths: as in `conv1d` above.
        stride, padding, output_padding, groups, dilation, output_size, input_activation, activation, precision,
            out_dtype: as in `gpuconv.conv_transpose1d`.

    Returns:
        (N, C_out, L_out), or (C_out, L_out): a dask array, chunked as that of `conv1d` above.

    Raises:
        ValueError, TypeError, ImportError: as `conv1d` raises them.

    Example:
        >>> import dask.array as da, numpy as np
        >>> import gpuconv.dask
        >>> x = da.from_array(np.array([[[1.0, 2.0]]]), chunks=1)
        >>> gpuconv.dask.conv_transpose1d(x, np.ones((1, 1, 3)), stride=2).compute()
        array([[[1., 1., 3., 2., 2.]]])
    """
    op: Op = "conv_transpose1d"
    settings = (stride, padding, output_padding, groups, dilation, output_size, precision, out_dtype)
    fused = Fused.check(op, activation, input_activation, residual)
    return _convolve(op, input, weight, bias, settings, fused, algorithm, lengths)


def _convolve(
    op: Op,
    input: DaskArray,
    weight: Any,
    bias: Any | None,
    settings: tuple[Any, ...],
    fused: Fused,
    algorithm: str | None,
    lengths: Any,
) -> DaskArray:
    try:
        import dask.array as da
        from dask.array.utils import meta_from_array
        from dask.base import tokenize
        from dask.highlevelgraph import HighLevelGraph
    except ImportError as error:
        raise ImportError(f"{op}: gpuconv.dask needs dask; {install_hint('dask')}: {error}") from error
    if algorithm is not None:
        from . import dispatch

        dispatch.check_algorithm(op, op, algorithm)
    residual, *of_channels = fused.arrays
    parameters = dict(zip(("weight", "bias", *FUSED_ARRAYS[1:]), (weight, bias, *of_channels), strict=True))
    _check_chunks(op, input, {**parameters, RESIDUAL: residual})
    p, _, dtype = problem_of(op, input, weight, bias, settings, fused)
    own = None if lengths is None else Lengths.of(p, settings[1], lengths)

    of_samples = None if own is None else (own.padding, own.samples.L_in.tolist())
    token = tokenize(input.name, repr(p), of_samples, algorithm, residual, *parameters.values())
    name, graph, dependencies = f"{op}-{token}", Graph(), [input]
    operands = []
    for parameter, array in parameters.items():
        found = array
        if isinstance(array, da.Array):
            whole = array.rechunk(-1)
            dependencies.append(whole)
            found = (whole.name, *(0 for _ in whole.shape))
        if array is not None and (found is array or runtime.is_cupy_array(input._meta)):
            node = f"{op}-{parameter}-{token}"
            graph[node] = found
            if runtime.is_cupy_array(input._meta):
                graph[node] = (_prepare_on_gpu if parameter == "weight" else _on_gpu, found)
            found = node
        operands.append(found)

    columns = _cuts_of_outputs(input.chunks[-1], p)
    samples = input.chunks[0] if p.batched else (1,)
    chunks = (*((samples,) if p.batched else ()), (p.C_out,), tuple(stop - start for start, stop in pairwise(columns)))
    if residual is not None:
        if not isinstance(residual, da.Array):
            residual = da.from_array(residual, chunks=chunks)
        residual = residual.rechunk(chunks)
        dependencies.append(residual)
    meta = meta_from_array(input._meta, len(p.output_shape), dtype=dtype)
    slices = _Slices(input, f"{op}-slice-{token}", graph)
    for n, (first, last) in enumerate(pairwise((0, *accumulate(samples)))):
        for l_out, (start, stop) in enumerate(pairwise(columns)):
            rows, outputs = slice(first, last), slice(start, stop)
            parts = [Piece.of(p, rows, outputs)] if own is None else own.parts(p, rows, outputs)
            blocks = [[slices.keys(n, read.start, read.stop) for read in part.reads] for part in parts]
            blank = None
            if not any((part.samples, part.outputs) == (rows, outputs) for part in parts):
                blank = meta, (*((last - first,) if p.batched else ()), p.C_out, stop - start)
            work = partial(_compute_chunk, rows, outputs, parts, blank, algorithm)
            index = (*((n,) if p.batched else ()), 0, l_out)
            key = (name, *index)
            graph[key] = (work, blocks, None if residual is None else (residual.name, *index), *operands)
    layers = HighLevelGraph.from_collections(name, graph, dependencies=dependencies)
    return da.Array(layers, name, chunks, meta=meta)


def _check_chunks(op: Op, input: Any, others: dict[str, Any]) -> None:
    """Refuse an input that is not a dask array of known chunks, and arrays of another kind than its chunks."""
    import dask.array as da

    if not isinstance(input, da.Array):
        raise TypeError(
            f"{op}: input must be a dask array, got {type(input).__name__}; dask.array.from_array(input) makes one"
        )
    memory.check_kinds(op, {"input": input._meta})
    for name, array in others.items():
        if array is None and name != "weight":
            continue
        one = array._meta if isinstance(array, da.Array) else array
        may_be_copied = name != RESIDUAL and runtime.is_cupy_array(input._meta)
        memory.check_kinds(op, {name: one} if may_be_copied else {"input": input._meta, name: one})
    for name, array in {"input": input, **others}.items():
        if isinstance(array, da.Array) and any(math.isnan(extent) for extent in array.shape):
            raise ValueError(
                f"{op}: {name} must have chunks of known sizes, got shape {array.shape}; "
                f"{name}.compute_chunk_sizes() finds them"
            )


def _cuts_of_outputs(chunks: Sequence[int], p: ConvProblem) -> list[int]:
    """Where the outputs are cut, with both ends, for chunks of the input along L_in."""
    if p.L_in == 0:
        return [0, p.L_out]
    return sorted({0, *(end * p.L_out // p.L_in for end in accumulate(chunks))})


class _Slices:
    """Slices of a dask array along its last axis, as tasks that are added to a graph, each once."""

    def __init__(self, array: DaskArray, name: str, graph: Graph) -> None:
        self._array, self._name, self._graph = array, name, graph
        self._bounds = (0, *accumulate(array.chunks[-1]))

    def keys(self, n: int, start: int, stop: int) -> list[list[Key]]:
        """The keys of samples start to stop - 1 of the n-th chunk along N: a row for each chunk of channels.

        A row has at least one key, possibly of an empty slice.
        """
        axes = self._array.chunks
        batch = (n,) if len(axes) == 3 else ()
        parts = list(self._parts(start, stop))
        return [[self._key((*batch, c, l_in), low, high) for l_in, low, high in parts] for c in range(len(axes[-2]))]

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The chunks with samples from start to stop - 1, as (chunk, low, high) with the range in the chunk."""
        first = min(bisect_right(self._bounds, start), len(self._bounds) - 1) - 1
        yield first, start - self._bounds[first], min(stop, self._bounds[first + 1]) - self._bounds[first]
        for l_in in range(first + 1, len(self._bounds) - 1):
            low, high = self._bounds[l_in : l_in + 2]
            if low >= stop:
                return
            if low < high:
                yield l_in, 0, min(stop, high) - low

    def _key(self, index: Key, low: int, high: int) -> Key:
        from dask.array.chunk import getitem

        whole = (self._array.name, *index)
        if (low, high) == (0, self._array.chunks[-1][index[-1]]):
            return whole
        key = (self._name, *index, low, high)
        self._graph[key] = (getitem, whole, (..., slice(low, high)))
        return key


def _compute_chunk(
    samples: slice,
    outputs: slice,
    parts: list[Piece],
    blank: tuple[Any, tuple[int, ...]] | None,
    algorithm: str | None,
    blocks: list[Any],
    residual: Any,
    *arrays: Any,
) -> Any:
    """A chunk of the output, with these samples and outputs.

    `parts` are its pieces. `blocks` has for each piece and each of its reads rows of slices of the input: a row for
    each chunk of channels, a slice for each chunk along L_in. `blank` is None where one piece is the whole chunk. Else
    it has an empty array of the chunk's library and dtype, and the chunk's shape: outputs in no piece are zero.
    """
    xp = runtime.array_module(blocks[0][0][0][0] if blank is None else blank[0])

    def joined(found: list[Any], axis: int) -> Any:
        return found[0] if len(found) == 1 else xp.concatenate(found, axis)

    result = None if blank is None else xp.zeros(blank[1], blank[0].dtype)
    for part, of_reads in zip(parts, blocks, strict=True):
        p, reads = part.problem, []
        for read, rows in zip(part.reads, of_reads, strict=True):
            found = joined([joined(row, -1) for row in rows], -2)
            reads.append(found if read.at is None else found[..., read.at])
        batch = (slice(part.samples.start - samples.start, part.samples.stop - samples.start),) if p.batched else ()
        place = (*batch, slice(None), slice(part.outputs.start - outputs.start, part.outputs.stop - outputs.start))
        added = None if residual is None else residual[place]
        y = compute(part, joined(reads, -1)[batch], added, *arrays, algorithm=algorithm)
        if result is None:
            return y
        result[place] = y
    return result


def _on_gpu(array: Any) -> Any:
    """The array on the current device, copied there if it is a NumPy array."""
    return runtime.cupy_module().asarray(array)


def _prepare_on_gpu(weight: Any) -> runtime.PreparedWeight:
    """The weight, packed once for the tasks of a worker."""
    return functional.prepare(_on_gpu(weight))
