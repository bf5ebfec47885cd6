"""Fusion on the CPU: some samples at a time are convolved, then residual and activation are applied to their outputs.

The number of samples is what the second-level cache holds, at least one. Their activated input is written to a buffer,
in the dtype of the arrays. If sums have a wider dtype than the output, they go to a buffer, too, so that they are
rounded once; otherwise they are computed and finished in the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..fusion import Activation
from ..problem import ConvProblem, numpy_dtype
from ..text import count
from . import costs, limits
from .activations import apply
from .arrays import Array, Scratch, accumulator, slices
from .choice import Method, choose
from .threads import run_blocks

# Rough nanoseconds per element: an exponential function and some arithmetic.
_COST = 5.0

# The buffers of a block's size that each thread uses.
_BUFFERS = 6


def method(problem: ConvProblem, method_of: Callable[[ConvProblem], Method]) -> Method:
    """The form of the convolution, with the memory and the description of what is fused."""
    p = problem
    samples = _samples(p)
    found = method_of(_part(p, samples)) if p.N else choose(p).method
    staged, summed = _buffers(p)
    words = ["finished in blocks"]
    if staged:
        words.insert(0, "activated input in a buffer")
    if summed:
        words.insert(-1, "sums in a buffer")
    if samples < p.N:
        words.append(f"{count(samples, 'sample')} at a time")
    workspace = found.workspace_bytes + samples * (staged + summed) + limits.MAX_WORKERS * _BUFFERS * limits.PLANE
    return Method(found.name, f"{found.reason}; {', '.join(words)}", workspace)


def convolve(
    problem: ConvProblem,
    input: Array,
    weight: Array,
    bias: Array | None,
    output: Array,
    fused: Sequence[Array | None],
    plain: Callable[[ConvProblem, Array, Array, Array | None, Array], None],
) -> None:
    """Compute a problem; `fused` has the arrays in the order of `FUSED_ARRAYS`, `plain` convolves without fusion."""
    p, dtype = problem, accumulator(problem.dtype)
    residual, *of_channels = (None if a is None else a if a.ndim != 2 else a[np.newaxis] for a in fused)
    x, y = (a if a.ndim == 3 else a[np.newaxis] for a in (input, output))
    alpha, beta, input_alpha, input_beta = (None if a is None else a.astype(dtype) for a in of_channels)
    staged, summed = _buffers(p)
    for samples in slices(0, p.N, _samples(p)):
        part = _part(p, samples.stop - samples.start)
        source, target = x[samples], y[samples]
        if staged:
            activated = np.empty(source.shape, source.dtype)
            _finish(p, source, None, p.fuses.input_activation, input_alpha, input_beta, activated)
            source = activated
        sums = np.empty(target.shape, dtype) if summed else target
        plain(part, source, weight, bias, sums)
        _finish(p, sums, None if residual is None else residual[samples], p.fuses.activation, alpha, beta, target)


def _samples(p: ConvProblem) -> int:
    """The number of samples that are computed at once."""
    size = accumulator(p.dtype).itemsize
    return max(1, min(p.N, limits.CONCURRENT_BUFFER // (max(p.C_out * p.L_out, p.C_in * p.L_in, 1) * size)))


def _part(p: ConvProblem, samples: int) -> ConvProblem:
    """The problem of some samples, without fusion."""
    return replace(p, N=samples, batched=True, fusion=None)


def _buffers(p: ConvProblem) -> tuple[int, int]:
    """The bytes of one sample's activated input, and of its sums; 0 where there is no buffer."""
    dtype = accumulator(p.dtype)
    staged = p.C_in * p.L_in * p.itemsize if p.fuses.input_activation is not None else 0
    return staged, p.C_out * p.L_out * dtype.itemsize if dtype != numpy_dtype(p.dtype) else 0


def _finish(
    p: ConvProblem,
    values: Array,
    residual: Array | None,
    activation: Activation | None,
    alpha: Array | None,
    beta: Array | None,
    output: Array,
) -> None:
    """Add the residual to values (N, C, L), activate them and write them to the output, which may be the same."""
    N, C, L = values.shape
    dtype = accumulator(p.dtype)
    beta = alpha if beta is None else beta

    def compute(n: slice, channels: slice, positions: slice, scratch: Scratch) -> None:
        at = n, channels, positions
        block = values[at]
        if values is not output:
            block = scratch.take("block", *block.shape)
            block[...] = values[at]
        if residual is not None:
            np.add(block, residual[at].astype(dtype, copy=False), out=block)
        if activation is not None:
            of_block = [None if a is None else a[channels, np.newaxis] for a in (alpha, beta)]
            apply(activation, block, of_block[0], of_block[1], scratch)
        if values is not output:
            output[at] = block

    length, rows, samples = limits.fit(limits.PLANE // dtype.itemsize, L, C, N)
    blocks = [
        (n, channels, positions)
        for n in slices(0, N, samples)
        for channels in slices(0, C, rows)
        for positions in slices(0, L, length)
    ]
    workers = limits.MAX_WORKERS if values.size * _COST * costs.scale(p) > limits.WORTH_THREADS else 1
    run_blocks(compute, blocks, workers, dtype, L)
