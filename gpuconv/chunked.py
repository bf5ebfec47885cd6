"""Both operations on arrays that are larger than memory, in pieces from a source to a target.

A source is anything with a shape, a dtype and slicing like NumPy's; a target also takes assignments to slices: memory
maps, h5py datasets, zarr arrays. A piece has all channels of some samples of the batch or, where one sample is too
large, of some of its output positions, with the input on which these depend.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from typing import Any, Protocol, SupportsIndex, TypeAlias, TypeVar

import numpy as np

from . import __version__, functional, memory, runtime
from .arguments import Op, Padding, Setting, check_int, is_one_of
from .fusion import FUSED_ARRAYS, ActivationLike, Fused
from .journal import Journal
from .pieces import Lengths, Piece, Pieces, compute, problem_of
from .problem import ConvProblem
from .text import shown

__all__ = ["Source", "Target", "conv1d", "conv_transpose1d"]

MAX_BYTES = 256 * 2**20  # the default limit for the pieces that are in memory at once
DEVICES = ("cpu", "gpu")


class Source(Protocol):
    """What is read from a source: its shape, its dtype, and slices along all of its axes.

    Example:
        >>> import numpy as np
        >>> from gpuconv import chunked
        >>> class Ramp:
        ...     shape, dtype = (1, 1, 10**6), np.dtype("float64")
        ...     def __getitem__(self, key):
        ...         return np.arange(*key[2].indices(10**6), dtype="float64")[None, None]
        >>> y = chunked.conv1d(Ramp(), np.ones((1, 1, 2)), out=np.empty((1, 1, 999999)))
        >>> float(y[0, 0, -1])
        1999997.0
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, L) or (C, L)."""
        ...

    @property
    def dtype(self) -> Any:
        """A dtype, or anything that `numpy.dtype` accepts."""
        ...

    def __getitem__(self, key: Any, /) -> Any: ...


class Target(Source, Protocol):
    """What the result is written to; if it has a method `flush`, this is called after each piece.

    Example:
        >>> import numpy as np
        >>> from gpuconv import chunked
        >>> class Peak:
        ...     shape, dtype, peak = (1, 1, 998), np.dtype("float64"), 0.0
        ...     def __getitem__(self, key):
        ...         raise NotImplementedError("only a journal reads what was written")
        ...     def __setitem__(self, key, value):
        ...         self.peak = max(self.peak, float(value.max()))
        >>> chunked.conv1d(np.ones((1, 1, 1000)), np.ones((1, 1, 3)), out=Peak(), max_bytes=4096).peak
        3.0
    """

    def __setitem__(self, key: Any, value: Any, /) -> None: ...


Array: TypeAlias = np.ndarray[Any, Any]
TargetT = TypeVar("TargetT", bound=Target)
Progress: TypeAlias = Callable[[int, int, str], None]
Path: TypeAlias = str | os.PathLike[str]


def conv1d(
    source: Source,
    weight: Any,
    bias: Any | None = None,
    stride: Setting = 1,
    padding: Padding = 0,
    dilation: Setting = 1,
    groups: SupportsIndex = 1,
    *,
    out: TargetT,
    max_bytes: int = MAX_BYTES,
    device: str = "cpu",
    journal: Path | None = None,
    version: str = "",
    progress: Progress | None = None,
    padding_mode: str = "zeros",
    input_activation: ActivationLike | None = None,
    residual: Source | None = None,
    activation: ActivationLike | None = None,
    lengths: Any = None,
    precision: str = "float32",
    algorithm: str | None = None,
    out_dtype: Any = None,
) -> TargetT:
    """`gpuconv.conv1d` from a source to a target, in pieces that fit in memory.

    On a GPU the target gets the bits of one call on the whole source; on the CPU each element is within the same error
    bound.

    Args:
        source: (N, C_in, L_in), or (C_in, L_in) for a single sample; it must not change during the call.
        weight: a NumPy array as in `gpuconv.conv1d`, as are bias and the arrays of activations.
        bias: (C_out,), or None.
        stride, padding, dilation, groups, padding_mode: as in `gpuconv.conv1d`.
        out: a target of the output's shape and dtype. It must not share storage with the arguments.
        max_bytes: limit for the pieces of input and output that are in host memory at once; on a GPU these are two
            pieces, which need as much of the GPU's memory. The input counts twice, because a source may return copies.
            The CPU path's buffers are not included: 28 MiB, or a quarter of a piece where that is more.
        device: "cpu", or "gpu" for CuPy's current device. There two streams take turns: while a piece is computed, the
            previous one is written and the next one is read. Copies go through pinned memory.
        journal: a file, best beside the target, that lists the finished pieces, so that the same call can continue
            after it was interrupted or killed. Checksums of the listed pieces are compared with the target; pieces that
            differ are computed again. The file is removed at the end. None: no journal.
        version: any text that identifies the contents of source and residual, such as a time of modification; a journal
            with another version is refused.
        progress: called with the number of finished pieces, the number of all pieces, and the word "pieces".
        residual: a source of the output's shape, or None.
        algorithm: as in `gpuconv.conv1d`. With "fft" the blocks of each piece begin anew, so the bits are not those of
            one call.
        lengths: as in `gpuconv.conv1d`. A piece has some samples with all of their outputs, or some outputs of one
            sample.
        input_activation, activation, precision, out_dtype: as in `gpuconv.conv1d`.

    Returns:
        `out`.

    Raises:
        ValueError, TypeError, RuntimeError, ImportError: as `gpuconv.conv1d`; `out` has another shape or dtype; the
            shape of the source changes; `max_bytes` is too small for one output position.
        gpuconv.journal.JournalError: a ValueError; the journal is damaged, in use or of another call.
        OSError: the target cannot be written. With a journal, the same call can be repeated once there is room.

    Example:
        >>> import numpy as np
        >>> from gpuconv import chunked
        >>> x, y = np.arange(5.0).reshape(1, 1, 5), np.empty((1, 1, 5))
        >>> chunked.conv1d(x, np.ones((1, 1, 3)), padding="same", out=y, max_bytes=64)
        array([[[1., 3., 6., 9., 7.]]])
    """
    settings = (stride, padding, dilation, groups, precision, padding_mode, out_dtype)
    fused = Fused.check("conv1d", activation, input_activation, residual)
    return _convolve(
        "conv1d", source, weight, bias, settings, fused, out, max_bytes, device, journal, version, progress, algorithm,
        lengths,
    )  # fmt: skip


def conv_transpose1d(
    source: Source,
    weight: Any,
    bias: Any | None = None,
    stride: Setting = 1,
    padding: Padding = 0,
    output_padding: Setting = 0,
    groups: SupportsIndex = 1,
    dilation: Setting = 1,
    *,
    out: TargetT,
    max_bytes: int = MAX_BYTES,
    device: str = "cpu",
    journal: Path | None = None,
    version: str = "",
    progress: Progress | None = None,
    output_size: Setting | None = None,
    input_activation: ActivationLike | None = None,
    residual: Source | None = None,
    activation: ActivationLike | None = None,
    lengths: Any = None,
    precision: str = "float32",
    algorithm: str | None = None,
    out_dtype: Any = None,
) -> TargetT:
    """`gpuconv.conv_transpose1d` from a source to a target, in pieces that fit in memory.

    Args:
        source: (N, C_in, L_in), or (C_in, L_in) for a single sample.
        weight: a NumPy array as in `gpuconv.conv_transpose1d`, as are bias and the arrays of activations.
        bias: (C_out,), or None.
        out, max_bytes, device, journal, version, progress, residual, algorithm, lengths: as in `conv1d` above.
        stride, padding, output_padding, groups, dilation, output_size, input_activation, activation, precision,
            out_dtype: as in `gpuconv.conv_transpose1d`.

    Returns:
        `out`.

    Raises:
        ValueError, TypeError, RuntimeError, ImportError, OSError: as `conv1d` raises them.

    Example:
        >>> import numpy as np
        >>> from gpuconv import chunked
        >>> x, y = np.array([[[1.0, 2.0]]]), np.empty((1, 1, 5))
        >>> chunked.conv_transpose1d(x, np.ones((1, 1, 3)), stride=2, out=y, max_bytes=80)
        array([[[1., 1., 3., 2., 2.]]])
    """
    op: Op = "conv_transpose1d"
    settings = (stride, padding, output_padding, groups, dilation, output_size, precision, out_dtype)
    fused = Fused.check(op, activation, input_activation, residual)
    return _convolve(
        op, source, weight, bias, settings, fused, out, max_bytes, device, journal, version, progress, algorithm,
        lengths,
    )  # fmt: skip


def _read(op: Op, name: str, source: Source, key: tuple[slice, ...]) -> Array:
    """Read a slice of a source and check its shape."""
    block = np.asarray(source[key])
    expected = tuple(part.stop - part.start for part in key)
    if block.shape != expected:
        raise ValueError(f"{op}: {name} has changed: a slice of it should have shape {expected}, got {block.shape}")
    return block


def _read_input(piece: Piece, source: Source) -> Array:
    """The samples at the positions of a piece."""
    parts = []
    for start, stop, at in piece.reads:
        part = _read(piece.whole.op, "source", source, piece.of_input(start, stop))
        parts.append(part if at is None else part[..., at])
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


class _OnCpu:
    """Computes pieces one after the other."""

    sets = 1  # of the arrays of a piece that are in memory at once

    def __init__(self, _: np.dtype[Any], __: np.dtype[Any], arrays: tuple[Any, ...]) -> None:
        self.arrays = arrays

    def start(
        self,
        piece: Piece,
        read: Callable[[], Array],
        residual: Array | None,
        compute: Callable[..., Any],
    ) -> Callable[[], Array]:
        """Start to compute a piece; returns a function that waits for the result."""
        result: Array = compute(piece, read(), residual, *self.arrays)
        return lambda: result

    def close(self) -> None:
        """Wait for all pieces that have been started."""


class _OnGpu:
    """Computes pieces on two streams in turn, with pinned memory for each.

    The result of a piece must be read before the next piece but one is started, which overwrites it.
    """

    sets = 2

    def __init__(self, dtype: np.dtype[Any], out_dtype: np.dtype[Any], arrays: tuple[Any, ...]) -> None:
        cupy = self._cupy = runtime.cupy_module()
        runtime.check_dtype(dtype)
        self.dtype, self.out_dtype = dtype, out_dtype
        weight, *others = (None if array is None else cupy.asarray(array) for array in arrays)
        # `prepare` waits for the current stream, and so for all these copies.
        self.arrays = (functional.prepare(weight), *others)
        self._streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(self.sets)]
        self._pinned: list[dict[str, Any]] = [{} for _ in self._streams]
        self._slots = cycle(range(self.sets))

    def start(
        self,
        piece: Piece,
        read: Callable[[], Array],
        residual: Array | None,
        compute: Callable[..., Any],
    ) -> Callable[[], Array]:
        slot, cupy, p = next(self._slots), self._cupy, piece.problem
        stream = self._streams[slot]
        x = self._buffer(slot, "input", p.input_shape, self.dtype)
        x[...] = read()
        added = None
        if residual is not None:
            added = self._buffer(slot, "residual", p.output_shape, self.out_dtype)
            added[...] = residual
        result = self._buffer(slot, "output", p.output_shape, self.out_dtype)
        with stream:
            on_gpu = [None if a is None else cupy.empty(a.shape, a.dtype) for a in (x, added)]
            for array, pinned in zip(on_gpu, (x, added), strict=True):
                if array is not None:
                    array.set(pinned, stream=stream)
            compute(piece, *on_gpu, *self.arrays).get(stream=stream, out=result, blocking=False)

        def wait() -> Array:
            stream.synchronize()
            return result

        return wait

    def _buffer(self, slot: int, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array in pinned memory, which each slot keeps for its next piece."""
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        pinned = self._pinned[slot].get(name)
        if pinned is None or pinned.nbytes < num_bytes:
            memory = self._cupy.cuda.alloc_pinned_memory(max(num_bytes, 1))
            pinned = self._pinned[slot][name] = np.frombuffer(memory, np.uint8)
        return pinned[:num_bytes].view(dtype).reshape(shape)

    def close(self) -> None:
        for stream in self._streams:
            stream.synchronize()


def _convolve(
    op: Op,
    source: Source,
    weight: Any,
    bias: Any | None,
    settings: tuple[Any, ...],
    fused: Fused,
    out: TargetT,
    max_bytes: int,
    device: str,
    journal: Path | None,
    version: str,
    progress: Progress | None,
    algorithm: str | None,
    lengths: Any,
) -> TargetT:
    max_bytes = check_int(op, "max_bytes", max_bytes, "a number of bytes", 1)
    for name, storage in (("source", source), ("out", out)):
        if not (hasattr(storage, "shape") and hasattr(storage, "dtype")):
            raise TypeError(f"{op}: {name} must have a shape, a dtype and slices, got {type(storage).__name__}")
    if journal is not None and not isinstance(journal, str | os.PathLike):
        raise TypeError(f"{op}: journal must be a path or None, got {type(journal).__name__}")
    if not is_one_of(device, DEVICES):
        raise ValueError(f"{op}: device must be one of {', '.join(DEVICES)}, got {shown(device)}")
    if algorithm is not None:
        from . import dispatch

        dispatch.check_algorithm(op, op, algorithm)
    residual, *of_channels = fused.arrays
    arrays = (weight, bias, *of_channels)
    names = ("weight", "bias", *FUSED_ARRAYS[1:])
    given = {n: a for n, a in zip(names, arrays, strict=True) if a is not None or n == "weight"}
    memory.check_kinds(op, given)
    p, dtype, out_dtype = problem_of(op, source, weight, bias, settings, fused)
    _check_target(op, p, out, out_dtype, {"source": source, "residual": residual, **given})
    own = None if lengths is None else Lengths.of(p, settings[1], lengths)
    engine = (_OnGpu if device == "gpu" else _OnCpu)(dtype, out_dtype, arrays)
    pieces = Pieces.cut(p, dtype.itemsize, out_dtype.itemsize, max_bytes, engine.sets, has_lengths=own is not None)
    work = partial(compute, algorithm=algorithm)

    def start(piece: Piece) -> Callable[[], Array]:
        """Start to compute a piece; returns a function that waits for the result."""
        parts = [piece] if own is None else own.parts(p, piece.samples, piece.outputs)
        whole = (*((len(range(p.N)[piece.samples]),) if p.batched else ()), p.C_out, len(range(p.L_out)[piece.outputs]))
        if not parts:
            return lambda: np.zeros(whole, out_dtype)
        (part,) = parts
        added = None if residual is None else _read(op, "residual", residual, part.of_output)
        wait = engine.start(part, partial(_read_input, part, source), added, work)
        if part.outputs == piece.outputs:
            return wait

        def wait_and_fill_up() -> Array:
            filled = np.zeros(whole, out_dtype)
            filled[..., : part.problem.L_out] = wait()
            return filled

        return wait_and_fill_up

    def finish(number: int, piece: Piece, wait: Callable[[], Array]) -> None:
        result = wait()
        out[piece.of_output] = result
        flush = getattr(out, "flush", None)
        if flush is not None:
            flush()
        if entries is not None:
            entries.add(number, _checksum(result, out_dtype))

    shape = tuple(source.shape)
    of_samples = None if own is None else (own.padding, own.samples.L_in.tolist())
    what = (p, pieces.samples, pieces.outputs, of_samples, dtype.name, device, algorithm, version, __version__)
    started: deque[tuple[int, Piece, Callable[[], Array]]] = deque()
    with nullcontext() if journal is None else Journal(journal, _fingerprint(what, arrays)) as entries:
        try:
            for number in range(len(pieces)):
                if progress is not None:
                    progress(number, len(pieces), "pieces")
                piece = pieces.piece(number)
                known = None if entries is None else entries.done.get(number)
                if known is not None and known == _checksum(_read(op, "out", out, piece.of_output), out_dtype):
                    continue
                if tuple(source.shape) != shape:
                    raise ValueError(f"{op}: source has changed: it had shape {shape}, and now {tuple(source.shape)}")
                started.append((number, piece, start(piece)))
                if len(started) == engine.sets:
                    finish(*started.popleft())
            while started:
                finish(*started.popleft())
            if progress is not None:
                progress(len(pieces), len(pieces), "pieces")
        finally:
            engine.close()
    return out


def _check_target(op: Op, p: ConvProblem, out: Target, dtype: np.dtype[Any], inputs: dict[str, Any]) -> None:
    if tuple(out.shape) != p.output_shape:
        raise ValueError(f"{op}: out must have shape {p.output_shape}, got {tuple(out.shape)}")
    if np.dtype(out.dtype).newbyteorder("=") != dtype:
        raise TypeError(f"{op}: out must have dtype {dtype}, got {out.dtype}")
    if isinstance(out, np.ndarray):
        memory.check_out(op, out, {n: a for n, a in inputs.items() if isinstance(a, np.ndarray)})


def _checksum(block: Any, dtype: np.dtype[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(block, dtype).view(np.uint8).data)


def _fingerprint(what: object, arrays: tuple[Any, ...]) -> str:
    digest = hashlib.sha256(repr(what).encode())
    for array in arrays:
        if array is not None:
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
