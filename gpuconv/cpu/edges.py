"""The edges of a convolution in a padding mode other than zeros, and of its adjoint.

First, all outputs are computed as if the padding were zeros. Outputs near an edge are then computed again from strips:
copies of the windows of some outputs at an edge. `weight_gradient` has the edges of weight gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..edge import padded_samples, source_indices
from ..problem import ConvProblem
from . import limits
from .arrays import Array, accumulator, slices
from .choice import Method, choose


class Strip(NamedTuple):
    """Neighbouring windows in one copy: samples, groups, and the windows start to stop."""

    samples: slice
    groups: slice
    start: int
    stop: int


def strips(N: int, groups: int, windows: range, stride: int, span: int, row_bytes: int) -> Iterator[Strip]:
    """The strips of some windows of `span` positions; `row_bytes` is the size of one position of one group.

    No strip is larger than `limits.BUFFER`, unless a single window of one sample and group is.
    """
    room = limits.BUFFER // row_bytes
    for at in slices(windows.start, windows.stop, max(1, (room - span) // stride + 1)):
        length = (at.stop - at.start - 1) * stride + span
        some_groups, some_samples = limits.fit(room // length, groups, N)
        for g in slices(0, groups, some_groups):
            for n in slices(0, N, some_samples):
                yield Strip(n, g, at.start, at.stop)


def method(p: ConvProblem) -> Method:
    """How `convolve` computes a problem."""
    inside = choose(replace(p, padding_mode="zeros")).method
    pieces = [_strip_problem(p, s) for s in _strips(p)] if not p.transposed else _folded_pieces(p)
    if not pieces:
        return inside
    extra = max(_copied_bytes(p, q) + choose(q).method.workspace_bytes for q in set(pieces))
    workspace = max(inside.workspace_bytes, extra)
    return replace(inside, reason=f"{inside.reason}; the edges apart, from strips", workspace_bytes=workspace)


def convolve(p: ConvProblem, input: Array, weight: Array, bias: Array | None, output: Array) -> None:
    """`gpuconv.cpu.convolve` of a problem whose padding mode is not "zeros"."""
    if 0 in p.output_shape:
        return
    if p.transposed or sum(p.edge_windows) < p.L_out:
        inside = replace(p, padding_mode="zeros")
        choose(inside).compute(input, weight, bias, output)
    x, y = input.reshape(p.N, p.C_in, p.L_in), output.reshape(p.N, p.C_out, p.L_out)
    if p.transposed:
        with np.errstate(all="ignore"):
            _fold(p, x, weight, bias, y)
        return
    for strip in _strips(p):
        q = _strip_problem(p, strip)
        c_in, c_out = _channels(strip.groups, p.C_in_g), _channels(strip.groups, p.C_out_g)
        first = strip.start * p.stride - p.padding_left
        copy = x[strip.samples, c_in][..., source_indices(p.padding_mode, first, first + q.L_in, p.L_in)]
        b = None if bias is None else bias[c_out]
        choose(q).compute(copy, weight[c_out], b, y[strip.samples, c_out, strip.start : strip.stop])


def _strips(p: ConvProblem) -> list[Strip]:
    first, last = p.edge_windows
    span, row_bytes = p.dilation * (p.K - 1) + 1, max(1, p.C_in_g) * p.itemsize
    return [
        strip
        for windows in (range(first), range(p.L_out - last, p.L_out))
        if windows
        for strip in strips(p.N, p.groups, windows, p.stride, span, row_bytes)
    ]


def _strip_problem(p: ConvProblem, strip: Strip) -> ConvProblem:
    """The outputs of a strip as a problem whose input is that strip."""
    groups = strip.groups.stop - strip.groups.start
    length = (strip.stop - strip.start - 1) * p.stride + p.dilation * (p.K - 1) + 1
    return replace(
        p, N=strip.samples.stop - strip.samples.start, C_in=groups * p.C_in_g, C_out=groups * p.C_out_g, L_in=length,
        padding_left=0, padding_right=0, groups=groups, batched=True, padding_mode="zeros",
    )  # fmt: skip


def _channels(groups: slice, channels: int) -> slice:
    return slice(groups.start * channels, groups.stop * channels)


def _copied_bytes(p: ConvProblem, q: ConvProblem) -> int:
    """The memory of a strip: of the input, or of sums and of what is added to them."""
    if not p.transposed:
        return q.N * q.C_in * q.L_in * q.itemsize
    return 4 * q.N * q.C_out * q.L_out * accumulator(p.dtype).itemsize


# The adjoint: outputs in the padding are added to the samples that the padding repeats, before these are rounded.


def _fold(p: ConvProblem, x: Array, weight: Array, bias: Array | None, y: Array) -> None:
    for samples, groups in _folded_blocks(p):
        c_in, c_out = _channels(groups, p.C_in_g), _channels(groups, p.C_out_g)
        blocks = x[samples, c_in], weight[c_in]
        b = None if bias is None else bias[c_out]
        targets = [(at, _piece(p, samples, groups, at, *blocks, b)) for at in _targets(p) if at]
        for padding in _paddings(p):
            if not padding:
                continue
            values = _piece(p, samples, groups, padding, *blocks, None)
            meant = source_indices(p.padding_mode, padding.start, padding.stop, p.L_out)
            for at, sums in targets:
                here = (meant >= at.start) & (meant < at.stop)
                if len(at) > 1:  # a padding that repeats a sample ("replicate") has only one sample
                    sums[..., meant[here] - at.start] += values[..., here]
                elif here.any():
                    sums[..., 0] += values[..., here].sum(axis=-1)
        for at, sums in targets:
            y[samples, c_out, at.start : at.stop] = sums


def _targets(p: ConvProblem) -> tuple[range, range]:
    return padded_samples(p.padding_mode, p.padding_left, p.padding_right, p.L_out)


def _paddings(p: ConvProblem) -> tuple[range, range]:
    """The positions of the output in its padding."""
    return range(-max(p.padding_left, 0), 0), range(p.L_out, p.L_out + max(p.padding_right, 0))


def _folded_blocks(p: ConvProblem) -> Iterator[tuple[slice, slice]]:
    """The samples and groups whose padding is added to the samples at a time."""
    longest = max(map(len, (*_targets(p), *_paddings(p))))
    if longest:
        room = limits.BUFFER // (longest * max(1, p.C_out_g) * accumulator(p.dtype).itemsize)
        some_groups, some_samples = limits.fit(room, p.groups, p.N)
        for g in slices(0, p.groups, some_groups):
            for n in slices(0, p.N, some_samples):
                yield n, g


def _folded_pieces(p: ConvProblem) -> list[ConvProblem]:
    pieces = (
        _piece_problem(p, samples, groups, at)[0]
        for samples, groups in _folded_blocks(p)
        for at in (*_targets(p), *_paddings(p))
        if at
    )
    return [q for q in pieces if q is not None]


def _piece_problem(p: ConvProblem, samples: slice, groups: slice, at: range) -> tuple[ConvProblem | None, slice]:
    """The problem of the outputs at some positions, padded with zeros, and its inputs; None if there are no inputs."""
    span = p.dilation * (p.K - 1) + 1
    low, high = at.start + p.padding_left, at.stop + p.padding_left  # from the first output of the first input on
    first = max(0, min(-(-(low - span + 1) // p.stride), low // p.stride))
    stop = min((high - 1) // p.stride + 1, p.L_in)
    if first >= stop:
        return None, slice(0)
    count = groups.stop - groups.start
    left = low - first * p.stride
    surplus = (stop - first - 1) * p.stride + span - left - len(at)
    q = replace(
        p, N=samples.stop - samples.start, C_in=count * p.C_in_g, C_out=count * p.C_out_g, L_in=stop - first,
        padding_left=left, padding_right=max(surplus, 0), output_padding=max(-surplus, 0), groups=count,
        has_bias=False, batched=True, padding_mode="zeros",
    )  # fmt: skip
    return q, slice(first, stop)


def _piece(
    p: ConvProblem, samples: slice, groups: slice, at: range, x: Array, weight: Array, bias: Array | None
) -> Array:
    """The outputs at some positions, padded with zeros, of some samples and groups, in the accumulator's dtype."""
    q, inputs = _piece_problem(p, samples, groups, at)
    C_out = (groups.stop - groups.start) * p.C_out_g
    sums: Array = np.zeros((samples.stop - samples.start, C_out, len(at)), accumulator(p.dtype))
    if q is not None:
        choose(q).compute(x[..., inputs], weight, None, sums)
    return sums if bias is None else sums + bias[:, np.newaxis].astype(sums.dtype)
