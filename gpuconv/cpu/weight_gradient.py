"""The NumPy path of the weight gradient: through BLAS, with bounded extra memory.

The two arrays are a and b of a `Correlation`: a is read as it is, b in windows, one for each tap. The positions are cut
into tiles, and each tile is added to the sums in one of three forms, which `weight_sums` describes. Where the stride is
one, the roles can be swapped, so that the array with fewer channels is b.

The tiles of a sum depend on the problem alone. So do the slices into which the positions are divided for several
threads; their sums are added in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..edge import source_indices
from ..problem import WeightGradientProblem
from . import limits
from .arrays import Array, accumulator
from .choice import Method
from .correlation import Correlation, Sizes
from .edges import Strip, strips
from .weight_sums import WeightSums

# Bytes of a panel with one thread and with several, of a block of sums, of the sums of all slices, and of the rows of
# dots: a and a window of b stay in the first- or second-level cache.
_PANEL = 4 * limits.MIB
_CONCURRENT_PANEL = 1 * limits.MIB
_SUMS = 1 * limits.MIB
_PARTIAL_SUMS = 4 * limits.MIB
_DOT_ROW = 16 * 1024

# The most rows of a for which dots pay off: each is read again for every tap.
_DOT_ROWS = 4

# The fewest positions for which dots pay off with several samples: each sample, channel and tap is a separate product.
_DOT_POSITIONS = 48

# Rows of a, windows of b and positions of a large product; the fewest positions of a small one.
_ROWS = 512
_WINDOWS = 512
_POSITIONS = 2048
_FEWEST_POSITIONS = 256

# The fewest channels and positions for which taps pay off; rows and channels of their small products, the most rows
# that are cut into small products, and the multiply-adds of a NumPy call of several products.
_TAPS_CHANNELS = 8
_TAPS_POSITIONS = 64
_SMALL_TILE = 64
_SMALL_ROWS = 256
_CALL = 4_000_000

# The fewest multiply-adds for which a second thread pays.
_WORTH_THREADS = 20_000_000


def method(problem: WeightGradientProblem) -> Method:
    """The form that `compute` uses for a problem: a pure function of the problem."""
    p = problem
    if p.padding_mode == "zeros" or p.is_empty:
        return _choose(p).method
    inside = _inside(p)
    found = Method("nothing", "all windows reach over an edge", 0) if inside is None else _choose(inside).method
    workspaces = [found.workspace_bytes]
    for q in {_strip_problem(p, strip) for strip in _strips(p)}:
        workspaces.append(_choose(q).method.workspace_bytes + math.prod(q.fine_shape) * p.itemsize)
    sums = 2 * math.prod(p.weight_shape) * accumulator(p.dtype).itemsize
    return replace(
        found, reason=f"{found.reason}; the edges apart, from strips", workspace_bytes=max(workspaces) + sums
    )


def compute(problem: WeightGradientProblem, coarse: Array, fine: Array, output: Array) -> None:
    """Compute a weight gradient into all elements of `output`.

    float16 and bfloat16 are summed in float32 and rounded once. A NaN or an infinity affects only the elements that
    have it in a term.

    Args:
        problem: extents and settings of the arrays.
        coarse: `problem.coarse_shape`, or that without the batch axis; native byte order, any strides.
        fine: `problem.fine_shape`, likewise.
        output: `problem.weight_shape`, any strides; it overlaps no other argument.
    """
    if problem.padding_mode != "zeros" and not problem.is_empty:
        _compute_with_edges(problem, coarse.reshape(problem.coarse_shape), fine.reshape(problem.fine_shape), output)
        return
    chosen = _choose(problem)
    if chosen.form is None:
        output[...] = 0
        return
    WeightSums(problem, chosen.form, coarse, fine, output).run(chosen.workers)


def _compute_with_edges(p: WeightGradientProblem, coarse: Array, fine: Array, output: Array) -> None:
    """Add the sums over windows inside of fine to those over windows that reach over an edge."""
    sums: Array = np.zeros(p.weight_shape, accumulator(p.dtype))
    inside, (first, last) = _inside(p), p.edge_windows
    if inside is not None:
        compute(inside, coarse[..., first : p.L_coarse - last], fine, sums)
    for strip in _strips(p):
        q = _strip_problem(p, strip)
        rows = slice(strip.groups.start * p.C_coarse_g, strip.groups.stop * p.C_coarse_g)
        channels = slice(strip.groups.start * p.C_fine_g, strip.groups.stop * p.C_fine_g)
        low = strip.start * p.stride - p.padding_left
        samples = source_indices(p.padding_mode, low, low + q.L_fine, p.L_fine)
        part: Array = np.empty(q.weight_shape, sums.dtype)
        compute(
            q, coarse[strip.samples, rows, strip.start : strip.stop], fine[strip.samples, channels][..., samples], part
        )
        with np.errstate(all="ignore"):
            np.add(sums[rows], part, out=sums[rows])
    with np.errstate(all="ignore"):
        output[...] = sums


def _inside(p: WeightGradientProblem) -> WeightGradientProblem | None:
    """The problem of the positions of coarse whose windows lie inside of fine; None where there are none."""
    first, last = p.edge_windows
    if first + last == p.L_coarse:
        return None
    left = p.padding_left - first * p.stride
    return replace(p, L_coarse=p.L_coarse - first - last, padding_left=left, padding_mode="zeros")


def _strips(p: WeightGradientProblem) -> Iterator[Strip]:
    first, last = p.edge_windows
    for windows in (range(first), range(p.L_coarse - last, p.L_coarse)):
        if windows:
            span = p.dilation * (p.K - 1) + 1
            yield from strips(p.N, p.groups, windows, p.stride, span, p.C_fine_g * p.itemsize)


def _strip_problem(p: WeightGradientProblem, strip: Strip) -> WeightGradientProblem:
    """The problem of a strip, whose copy takes the place of fine."""
    groups, count = strip.groups.stop - strip.groups.start, strip.stop - strip.start
    length = (count - 1) * p.stride + p.dilation * (p.K - 1) + 1
    return replace(
        p, N=strip.samples.stop - strip.samples.start, C_coarse=groups * p.C_coarse_g, C_fine=groups * p.C_fine_g,
        L_coarse=count, L_fine=length, padding_left=0, groups=groups, padding_mode="zeros",
    )  # fmt: skip


class _ChosenForm(NamedTuple):
    method: Method
    form: Sizes | None
    workers: int


_REASONS = {
    "dots": "one channel against few: vector products of windows in place",
    "taps": "several channels: a matrix product for each tap",
    "panels": "few channels or positions: windows side by side, for matrix products",
}


@lru_cache(maxsize=4096)
def _choose(p: WeightGradientProblem) -> _ChosenForm:
    if 0 in p.weight_shape or p.terms == 0:
        return _ChosenForm(Method("nothing", "every sum is empty, or there are none", 0), None, 1)
    roles, size = Correlation.of(p), accumulator(p.dtype).itemsize
    if roles.C == 1 and roles.R <= _DOT_ROWS and (roles.N == 1 or roles.L_a >= _DOT_POSITIONS):
        form = _dots(p, roles)
    elif roles.C >= _TAPS_CHANNELS and roles.L_a >= _TAPS_POSITIONS:
        form = _taps(p, roles)
    else:
        form = _panels(p, roles)
    concurrent = form.is_small(p) and p.terms * math.prod(p.weight_shape) > _WORTH_THREADS
    if concurrent:
        # Slices for several threads, as many as have small sums together.
        wanted = -(-limits.MAX_WORKERS // len(form.blocks()))
        number = min(wanted, form.num_tiles, _PARTIAL_SUMS // (math.prod(p.weight_shape) * size))
        form = replace(form, slices=max(1, number))
    buffers = form.memory()
    # The check of the sums for finite values takes one byte per element.
    each = sum(buffers.values()) * size + buffers["sums"]
    shared = form.slices * math.prod(p.weight_shape) * size if form.slices > 1 else 0
    allowed = max(limits.WORKSPACE, (math.prod(p.coarse_shape) + math.prod(p.fine_shape)) * p.itemsize // 4)
    workers = min(limits.MAX_WORKERS, len(form.blocks()) * form.slices, (allowed - shared) // each) if concurrent else 1
    workers = max(1, workers)
    return _ChosenForm(Method(form.name, _REASONS[form.name], shared + workers * each), form, workers)


def _dots(p: WeightGradientProblem, roles: Correlation) -> Sizes:
    size = accumulator(p.dtype).itemsize
    row, budget = _DOT_ROW // size, _CONCURRENT_PANEL // size
    # The window must stay within the budget, whatever the stride and the dilation are.
    positions = max(1, min(roles.L_a, row, budget // roles.stride))
    taps = min(roles.K, max(1, budget // roles.dilation))
    low, high = roles.window(0, positions, slice(0, taps))
    samples = min(roles.N, max(1, row // roles.L_a))
    groups = max(1, min(roles.G, budget // (samples * max(high - low, positions * roles.R, taps * roles.R))))
    return Sizes(roles, "dots", groups, roles.R, 1, taps, samples, positions, positions, roles.R)


def _taps(p: WeightGradientProblem, roles: Correlation) -> Sizes:
    size, small = accumulator(p.dtype).itemsize, limits.small_product(p.is_complex)
    rows = min(roles.R, _ROWS)
    large_work = p.terms * math.prod(p.weight_shape) > _WORTH_THREADS * 10
    if roles.R <= _SMALL_TILE or (large_work and roles.R <= _SMALL_ROWS):
        tile_rows, channels, budget = min(rows, _SMALL_TILE), min(roles.C, _SMALL_TILE), _CONCURRENT_PANEL // size
        depth = min(_POSITIONS, small // (tile_rows * channels))
    else:
        tile_rows, channels, budget = rows, min(roles.C, _ROWS), _PANEL // size
        depth = _POSITIONS
    depth = max(1, min(roles.L_a, depth, budget // (channels * roles.stride)))
    taps = max(1, min(roles.K, _SUMS // size // (rows * channels), budget // (channels * roles.dilation)))
    work = taps * rows * channels * depth
    products = min(-(-_CALL // work), roles.L_a // depth, budget // (channels * roles.stride * depth))
    products = max(1, min(products, 2 * _SUMS // size // (taps * rows * channels)))
    positions = depth * products
    low, high = roles.window(0, positions, slice(0, taps))
    groups = min(roles.G, budget // (max(channels * (high - low), rows * positions)), -(-_CALL // (work * products)))
    return Sizes(roles, "taps", max(1, groups), rows, channels, taps, 1, positions, depth, tile_rows)


def _panels(p: WeightGradientProblem, roles: Correlation) -> Sizes:
    size = accumulator(p.dtype).itemsize
    rows = min(roles.R, _ROWS)
    taps = min(roles.K, _WINDOWS)
    channels = min(roles.C, max(1, _WINDOWS // taps))
    small = limits.small_product(p.is_complex)
    largest, positions = _PANEL, _POSITIONS
    if rows * channels * taps * _FEWEST_POSITIONS <= small:
        largest, positions = _CONCURRENT_PANEL, min(_POSITIONS, small // (rows * channels * taps))
    panel = largest // size
    positions = max(1, min(positions, panel // max(channels * taps, rows)))
    samples = max(1, min(roles.N, positions // roles.L_a))
    positions = min(positions, roles.L_a)
    columns = samples * positions
    sums = _SUMS // size
    groups = max(1, min(roles.G, panel // (columns * max(channels * taps, rows)), sums // (rows * channels * taps)))
    return Sizes(roles, "panels", groups, rows, channels, taps, samples, positions, columns, rows)
