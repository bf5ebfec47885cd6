"""Samples of different lengths in a batch: the argument `lengths`, and the lengths of the outputs.

Sample n has `lengths[n]` of the L_in positions of the batch. Values beyond its length have no effect, and results
beyond its output length are zeros. Its padding begins where the sample ends; "same" and the padding modes refer to that
position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt

from . import runtime
from .arguments import Op, Padding, Setting, Settings, check_int, check_padding_limits, check_setting
from .extents import output_length, resolve_padding
from .problem import ConvProblem
from .text import shown

Integers: TypeAlias = npt.NDArray[np.int64]


class Samples(NamedTuple):
    """What follows from the length of each sample of a batch, on the host; each array is (N,).

    Attributes:
        L_in: the length of the operation's input, as the caller gives it.
        L_out: that of its output; 0 where the sample is too short to have one.
        padding_left: of the sample; for "same" with a stride it depends on the length.
        padding_right: likewise.
    """

    L_in: Integers
    L_out: Integers
    padding_left: Integers
    padding_right: Integers

    @classmethod
    def of(cls, caller: str, problem: ConvProblem, padding: Padding, lengths: Any) -> Samples:
        """Check the lengths of the inputs of an operation; `padding` is its argument, which may be "same".

        Raises:
            ValueError: there is not one length for each sample, one is negative or longer than the input, or a padding
                mode does not allow the padding of a sample.
            TypeError: they are not integers.
        """
        p = problem
        L_in = check_lengths(caller, lengths, p.N, "L_in", p.L_in)
        span = p.dilation * (p.K - 1) + 1
        sides: tuple[Any, Any] = p.padding
        if follows_length(p, padding):
            sides = resolve_padding(False, "same", L_in, p.stride, span)[:2]
        L_out = output_length(p.transposed, L_in, *sides, p.stride, span, p.output_padding)
        left, right = (np.full(L_in.shape, side, np.int64) for side in sides)
        found = cls(L_in, np.maximum(L_out, 0), left, right)
        if p.padding_mode != "zeros":
            for n in np.flatnonzero(L_out > 0).tolist():
                try:
                    check_padding_limits(caller, p.padding_mode, int(left[n]), int(right[n]), int(L_in[n]))
                except ValueError as error:
                    raise ValueError(f"{error}, of which lengths[{n}] is {L_in[n]}") from None
        return found

    @classmethod
    def of_outputs(cls, caller: str, N: int, L_out: int, lengths: Any) -> Samples:
        """Check the lengths of outputs, for a bias gradient."""
        found = check_lengths(caller, lengths, N, "L_out", L_out)
        none = np.zeros_like(found)
        return cls(found, found, none, none)

    def runs(self) -> Iterator[tuple[int, int]]:
        """The ranges (start, stop) of neighbouring samples of one length."""
        bounds = np.flatnonzero(np.diff(self.L_in)) + 1
        places = [0, *bounds.tolist(), len(self.L_in)]
        return ((start, stop) for start, stop in pairwise(places) if start < stop)


def follows_length(problem: ConvProblem, padding: Padding) -> bool:
    """Whether the padding of a sample depends on its length."""
    return not problem.transposed and isinstance(padding, str) and padding == "same" and problem.stride > 1


def check_lengths(caller: str, lengths: Any, N: int, extent: str, L: int) -> Integers:
    """The argument `lengths`, checked, as an array on the host; lengths on a GPU are copied.

    Raises:
        ValueError: its shape is not (N,), or a length is negative or above L, whose name is `extent`.
        TypeError: it is not of integers.
        RuntimeError: it is on a GPU whose current stream is being captured.
    """
    if isinstance(lengths, list | tuple):
        given = [check_int(caller, f"lengths[{n}]", length, "an int") for n, length in enumerate(lengths)]
        lengths = np.array(given, object)  # ints of any size
    else:
        if runtime.is_cupy_array(lengths):
            runtime.refuse_during_capture(f"{caller}: lengths on a GPU cannot be read", lengths.data.device_id)
            lengths = runtime.aligned(lengths).get()
        elif not isinstance(lengths, np.ndarray):
            raise TypeError(
                f"{caller}: lengths must be a NumPy or CuPy array or a sequence of ints, got {type(lengths).__name__}"
            )
        if lengths.dtype.kind not in "iu":
            raise TypeError(f"{caller}: lengths must be integers, got dtype {lengths.dtype}")
    if lengths.shape != (N,):
        raise ValueError(f"{caller}: lengths must have shape (N,) = ({N},), got {lengths.shape}")
    bad = np.flatnonzero((lengths < 0) | (lengths > L))
    if bad.size:
        n = int(bad[0])
        raise ValueError(f"{caller}: lengths must be from 0 to {extent} = {L}, got lengths[{n}] = {lengths[n]}")
    found: Integers = lengths.astype(np.int64)
    return found


def conv1d_output_length(
    length: SupportsIndex, kernel_size: Setting, stride: Setting = 1, padding: Padding = 0, dilation: Setting = 1
) -> int:
    """L_out of `gpuconv.conv1d`.

    Args:
        length: L_in, in samples, at least 0.
        kernel_size: K, at least 1.
        stride, padding, dilation: of the call; padding in every form.

    Returns:
        L_out, at least 1.

    Raises:
        ValueError: a value is out of range, or the kernel is longer than the padded input.
        TypeError: a value is of the wrong kind.

    Example:
        >>> import gpuconv
        >>> gpuconv.conv1d_output_length(16000, 10, stride=5)
        3199
    """
    return _length_of("conv1d", "conv1d_output_length", length, kernel_size, stride, padding, dilation, 0)


def conv_transpose1d_output_length(
    length: SupportsIndex,
    kernel_size: Setting,
    stride: Setting = 1,
    padding: Padding = 0,
    output_padding: Setting = 0,
    dilation: Setting = 1,
) -> int:
    """L_out of `gpuconv.conv_transpose1d`.

    Args:
        length: L_in, in samples, at least 0.
        kernel_size: K, at least 1.
        stride, padding, output_padding, dilation: of the call; padding in every form.

    Returns:
        L_out, at least 1.

    Raises:
        ValueError: a value is out of range, or there would be no output.
        TypeError: a value is of the wrong kind.

    Example:
        >>> import gpuconv
        >>> gpuconv.conv_transpose1d_output_length(100, 16, stride=8, padding=4)
        800
    """
    caller = "conv_transpose1d_output_length"
    return _length_of("conv_transpose1d", caller, length, kernel_size, stride, padding, dilation, output_padding)


def output_lengths(
    lengths: Any,
    kernel_size: Setting,
    stride: Setting = 1,
    padding: Padding = 0,
    dilation: Setting = 1,
    *,
    transposed: bool = False,
    output_padding: Setting = 0,
) -> Any:
    """The output lengths of samples: the argument `lengths` for the next layer.

    Args:
        lengths: (N,) integers, at least 0: a NumPy or CuPy array, or a sequence of ints.
        kernel_size: K, at least 1.
        stride, padding, dilation: of the call; padding in every form.
        transposed: whether the call is of `gpuconv.conv_transpose1d`.
        output_padding: of such a call.

    Returns:
        (N,) int64, on the device of `lengths`. The values of a CuPy array are not checked, since that would wait for
        the GPU. A sample that is too short to have an output gets 0.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value is of the wrong kind.

    Example:
        >>> import gpuconv
        >>> gpuconv.output_lengths([16000, 11200, 3], 10, stride=5)
        array([3199, 2239,    0])
    """
    caller = "output_lengths"
    op: Op = "conv_transpose1d" if transposed else "conv1d"
    K = check_setting(caller, "kernel_size", kernel_size, 1)
    settings = Settings.check(caller, op, stride, padding, dilation, 1, output_padding)
    sides = settings.padding if isinstance(settings.padding, tuple) else ()
    reach = settings.dilation * (K - 1) + 1 + sum(sides)
    if reach > 2**61:  # beside lengths of up to 2**62, this fits 64 bits
        raise ValueError(f"{caller}: dilation*(kernel_size - 1) + 1 + padding must be at most 2**61, got {reach}")
    if runtime.is_cupy_array(lengths):
        if lengths.dtype.kind not in "iu" or lengths.ndim != 1:
            raise TypeError(f"{caller}: lengths must be (N,) integers, got {lengths.dtype} of shape {lengths.shape}")
        lengths = runtime.aligned(lengths).astype(np.int64)
    else:
        if not isinstance(lengths, np.ndarray) and not isinstance(lengths, Sequence):
            raise TypeError(f"{caller}: lengths must be an array or a sequence of ints, got {type(lengths).__name__}")
        N = lengths.size if isinstance(lengths, np.ndarray) else len(lengths)
        # With these limits no output length exceeds 64 bits; transposed, a length is multiplied by the stride.
        limit, most = ("2**62 // stride", 2**62 // settings.stride) if transposed else ("2**62", 2**62)
        lengths = check_lengths(caller, lengths, N, limit, most)
    return np.maximum(_lengths(op, settings, K, lengths), 0)


def _length_of(
    op: Op,
    caller: str,
    length: SupportsIndex,
    kernel_size: Setting,
    stride: Setting,
    padding: Padding,
    dilation: Setting,
    output_padding: Setting,
) -> int:
    L_in = check_int(caller, "length", length, "an int", 0)
    K = check_setting(caller, "kernel_size", kernel_size, 1)
    settings = Settings.check(caller, op, stride, padding, dilation, 1, output_padding)
    L_out = int(_lengths(op, settings, K, L_in))
    if L_out < 1:
        raise ValueError(
            f"{caller}: the output length must be at least 1, got {L_out} for length = {L_in}, kernel_size = {K}, "
            f"stride = {settings.stride}, padding = {shown(padding)} and dilation = {settings.dilation}"
        )
    return L_out


def _lengths(op: Op, settings: Settings, K: int, L_in: Any) -> Any:
    """The lengths of the outputs of an int or of an array of lengths; below 1 where there is none."""
    s, sides, d, _, given = settings
    span, transposed = d * (K - 1) + 1, op == "conv_transpose1d"
    left, right, extra = resolve_padding(transposed, sides, L_in, s, span, given)
    return output_length(transposed, L_in, left, right, s, span, extra)
