"""weight_gradient_mma: weight gradients of dense and grouped layers by tensor cores.

Contract: cuda_src/weight_gradient_mma.cu. Which problems it takes, and in which order their sums are formed, follows
from the problem and the architecture alone; the layout and the GPU decide only how the work is cut into tiles. Without
a stride the two sides of a problem can be exchanged (weight_gradient_sides.py), so that rows need not be few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from typing import NamedTuple

from ..costs import RESERVED_SHARED_BYTES, Work
from ..device import Device
from ..problem import WeightGradientProblem
from ..text import count
from .arithmetic import ARITHMETICS, MIN_SPLIT_TERMS, SPLIT_TERMS, UNIT_BYTES, Arithmetic
from .base import MAX_GRID, ArrayLayout, Config, Family, Launch, Layout, Plan, Refusal, Step, params_of
from .mma import ASYNC_COPY_ARCH, MIN_CHANNELS, MIN_SPLIT_ROWS, has_units
from .mma_tiles import BlockTile
from .offsets import index_bits
from .slices import Slices, predict_sum, sliced_plan, weight_fields
from .weight_gradient_costs import GradientLaunch
from .weight_gradient_sides import cores_us, exchanged, exchanged_layout, exchanged_plan, scattered_us
from .weight_gradient_window import OCTET, PRODUCT_ROWS, STEP, Columns, Fetch, Window

# With few channels of fine, an octet holds taps in their place; with fewer taps than this it would not be full.
MIN_TAPS = 8
# With fewer channels of coarse, weight_gradient_pairs reads each row of fine hardly more often than this family does.
# Where both sides have few channels, it is faster up to a larger number of channels of coarse, except for many taps.
MIN_ROWS = 5
MIN_ROWS_OF_MANY_COLUMNS, MANY_COLUMNS = 4, 64
# weight_gradient_tiled fills its tiles with so few columns; with many rows it is faster than three products here.
FEW_SPLIT_COLUMNS, MAX_ROWS_OF_FEW_COLUMNS = 16, 64

# Tiles of fewer threads are narrow: for small results, which few of them cover. Wide ones would be mostly empty there.
WIDE_THREADS, MOST_NARROW_TILES = 128, 3

# The predicted times on these GPUs decide how sums are cut; so many tilings are compared for this; and on each GPU a
# cut may take at most so much of the time of the cut by rule.
_REFERENCE_DEVICES = Device.from_arch("sm_90"), Device.from_arch("sm_80")
_REFERENCE_TILINGS = 4
_TOLERATED = 1.02
# The sides are exchanged where this takes at most so much of the time on each of these GPUs, as predicted.
_WORTH_EXCHANGING = 0.95

_LEAST = Fetch.POSITION, Fetch.POSITION  # for arrays that need 64-bit offsets


@dataclass(frozen=True, slots=True)
class Tile(BlockTile):
    """The tile of a weight gradient; a column is a pair of tap and channel.

    Attributes:
        chunk_rows: positions of a chunk.
        ahead_coarse, ahead_fine: the most vectors of the next chunk that a thread loads in advance.
    """

    chunk_rows: int
    ahead_coarse: int
    ahead_fine: int


# By the parts of an operand. Arrays that need 64-bit offsets use the last tile alone. A split product has three sets of
# sums, whose registers allow warps of 48x32. Tiles of 48 rows are for groups of 48 channels, narrow ones for small
# results. In a long chunk most of a window is loaded only once, even if its taps lie far apart.
TILES: dict[int, tuple[Tile, ...]] = {
    1: (
        Tile(128, 256, 2, 4, 1, 32, 4, 4),
        Tile(128, 192, 2, 4, 1, 32, 4, 4),
        Tile(64, 256, 1, 4, 2, 32, 4, 4),
        Tile(48, 256, 1, 4, 2, 32, 4, 4),
        Tile(32, 256, 1, 4, 3, 128, 4, 4),
        Tile(128, 128, 2, 2, 2, 32, 4, 4),
        Tile(32, 128, 1, 4, 4, 32, 4, 4),
        Tile(16, 128, 1, 4, 4, 32, 4, 4),
        Tile(64, 64, 2, 2, 4, 32, 4, 4),
    ),
    2: (
        Tile(64, 128, 2, 4, 1, 32, 4, 4),
        Tile(48, 128, 1, 4, 2, 32, 4, 4),
        Tile(32, 128, 1, 4, 2, 32, 4, 4),
        Tile(16, 128, 1, 4, 4, 32, 4, 4),
        Tile(48, 32, 3, 1, 4, 32, 4, 4),
        Tile(48, 16, 3, 1, 4, 32, 4, 4),
        Tile(32, 80, 2, 1, 4, 32, 4, 4),
        Tile(16, 64, 1, 2, 8, 32, 4, 4),
        Tile(64, 64, 2, 2, 2, 32, 4, 4),
    ),
}
_EVERY_TILE = tuple(tile for tiles in TILES.values() for tile in tiles)
_LARGEST = max(max(tile.block_m, tile.block_n) for tile in _EVERY_TILE)
_LARGEST_CHUNK = max(tile.chunk_rows for tile in _EVERY_TILE)


class WeightGradientMma(Family[WeightGradientProblem]):
    """Tensor cores over the channels of coarse by the channels of fine and the taps."""

    name = "weight_gradient_mma"
    kind = "weight_gradient"
    maps_edges = True
    keeps_lengths = True
    canonical_order = False

    def plan(self, problem: WeightGradientProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        arithmetic = ARITHMETICS.get((p.dtype, p.precision))
        if arithmetic is None or device.arch < arithmetic.min_arch:
            return Refusal("needs float16 (sm_75), bfloat16 or float32 (sm_80)")
        sides = _sides(problem)
        if isinstance(sides, Refusal):
            return sides
        p, is_exchanged = sides, sides != problem
        if is_exchanged:
            layout = exchanged_layout(p, layout)
        slices = _slices(p)
        bits = _index_bits(p, layout)
        fetches, tap_width = _fetches(p, layout, bits, device), _tap_width(p, layout, bits)
        tilings = _tilings(p, fetches, tap_width, device, bits)
        tiling, tile, window = tilings[0], tilings[0].tile, tilings[0].window
        if tiling.blocks > MAX_GRID:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        columns = tiling.columns
        half, pitch = _pitches(window.rows, arithmetic)
        params = params_of(
            self.name,
            weight_fields(p, layout, slices),
            {
                "row_tiles": tiling.row_tiles,
                "tap_tiles": tiling.tap_tiles,
                "octet_tiles": tiling.octet_tiles,
                "block_octets": tiling.octets,
                "block_taps": tiling.taps,
                "taps": columns.taps,
                "tap_step": columns.tap_step,
                "chunk_samples": window.samples,
                "sample_shift": window.positions.bit_length() - 1,
                "planes": window.planes,
                "plane_rows": window.plane_rows,
                "tap_rows_step": window.tap_rows_step,
                "window_rows": window.rows,
                "window_half": half,
                "window_pitch": pitch,
                "is_exchanged": int(is_exchanged),
            },
        )
        config = self._config(
            tile,
            p.dtype,
            p.precision,
            tiling.fetches,
            bits,
            is_strided=p.stride > 1,
            tap_width=tap_width if columns.in_taps else 0,
            few_rows=p.C_coarse_g < arithmetic.channels,
        )
        launch = Launch(tiling.blocks, tile.threads, tiling.shared_bytes, bits, params)
        candidates = tuple(
            (f"{t.tile.block_m}x{t.tile.block_n} of {count(t.taps * (OCTET if t.columns.in_taps else 1), 'tap')}", t.us)
            for t in tilings
        )
        plan = sliced_plan(p, layout, slices, config, launch, candidates)
        return exchanged_plan(plan) if is_exchanged else plan

    def work(self, problem: WeightGradientProblem, step: Step) -> Work:
        params, macros = dict(step.launch.params), dict(step.config.macros)
        # Padding modes in which no window reaches over an edge are planned as zeros.
        p = exchanged(replace(problem, padding_mode="zeros")) if params["is_exchanged"] else problem
        assert p is not None
        return GradientLaunch(
            arithmetic=ARITHMETICS[p.dtype, p.precision],
            slices=_slices(p),
            blocks=step.launch.grid,
            chunk_samples=params["chunk_samples"],
            chunk_positions=1 << params["sample_shift"],
            window_rows=params["window_rows"],
            columns=Columns.of(p, in_taps=macros["TAPS_IN_UNITS"] == "1"),
            octets=params["block_octets"],
            taps=params["block_taps"],
            fetches=_fetches_of(step.config),
            tap_width=int(macros.get("TAP_WIDTH", 1)),
            block_m=int(macros["BLOCK_M"]),
            block_n=int(macros["BLOCK_N"]),
            warps_m=int(macros["WARPS_M"]),
            warps_n=int(macros["WARPS_N"]),
            min_blocks=int(macros["MIN_BLOCKS"]),
        ).work(p)

    def staging(self, step: Step) -> dict[str, str]:
        fetches = zip(step.arrays, _fetches_of(step.config), strict=False)
        return {array: fetch.words for array, fetch in fetches if array is not None}

    def configs(self, device: Device) -> Iterator[Config]:
        for (dtype, precision), arithmetic in ARITHMETICS.items():
            if device.arch >= arithmetic.min_arch:
                for bits in (32, 64):
                    few = _tiles(arithmetic, bits, few_rows=True) if arithmetic.channels == OCTET else ()
                    for tile in _tiles(arithmetic, bits):
                        for fetches in _every_fetches(arithmetic, device) if bits == 32 else (_LEAST,):
                            of_fetches = partial(self._config, tile, dtype, precision, fetches, bits)
                            for is_strided in (False, True) if fetches[1].width > 1 else (False,):
                                yield of_fetches(is_strided=is_strided)
                                if tile in few and fetches[0] is not Fetch.UNIT:
                                    yield of_fetches(is_strided=is_strided, few_rows=True)
                            if fetches[1] is Fetch.POSITION:
                                for tap_width in (1, 2) if bits == 32 else (1,):
                                    yield of_fetches(tap_width=tap_width)
                                    if tile in few and fetches[0] is not Fetch.UNIT:
                                        yield of_fetches(tap_width=tap_width, few_rows=True)

    def _config(
        self,
        tile: Tile,
        dtype: str,
        precision: str,
        fetches: tuple[Fetch, Fetch],
        bits: int,
        *,
        is_strided: bool = False,
        tap_width: int = 0,
        few_rows: bool = False,
    ) -> Config:
        """`tap_width`: neighbouring taps that one access loads, 0 where octets are of channels."""
        arithmetic = ARITHMETICS[dtype, precision]
        macros: dict[str, str | int] = {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "WARPS_M": tile.warps_m,
            "WARPS_N": tile.warps_n,
            "CHUNK_ROWS": tile.chunk_rows,
            "AHEAD_COARSE": tile.ahead_coarse,
            "AHEAD_FINE": tile.ahead_fine,
            "COARSE_WIDTH": fetches[0].width,
            "FINE_WIDTH": fetches[1].width,
            "TAPS_IN_UNITS": int(tap_width > 0),
            "MIN_BLOCKS": tile.min_blocks if bits == 32 else 1,
            "IS_SPLIT": int(arithmetic.parts == 2),
            "SPLIT_TERMS": SPLIT_TERMS,
            "MULTIPLY_MATRICES": arithmetic.instruction,
        }
        for side, fetch in zip(("COARSE", "FINE"), fetches, strict=True):
            if fetch is Fetch.UNIT:
                macros[f"{side}_LAST"] = 1
            elif fetch.align < fetch.width:
                macros[f"{side}_ALIGN"] = fetch.align
        if is_strided and fetches[1].width > 1:
            macros["FINE_STRIDED"] = 1
        if tap_width > 1:
            macros["TAP_WIDTH"] = tap_width
        if few_rows:
            macros["FEW_ROWS"] = 1
        return Config.for_dtype(self.name, dtype, bits, macros)


class _Tiling(NamedTuple):
    """A tile, the columns, octets and taps of a block, the numbers of tiles and blocks, and the predicted time."""

    tile: Tile
    columns: Columns
    octets: int
    taps: int
    fetches: tuple[Fetch, Fetch]
    window: Window
    row_tiles: int
    octet_tiles: int
    tap_tiles: int
    blocks: int
    shared_bytes: int
    us: float


@lru_cache(maxsize=4096)
def _sides(problem: WeightGradientProblem) -> WeightGradientProblem | Refusal:
    """The problem, or with its sides exchanged where that is faster; or why it is left to other families."""
    refusal, other = _refusal(problem), exchanged(problem)
    if other is None or problem.C_coarse == problem.C_fine or _refusal(other, takes_few_taps=True) is not None:
        return refusal or problem
    own_us = tuple(cores_us(problem, device) for device in _REFERENCE_DEVICES) if refusal else _cut(problem)[1]
    is_faster = all(
        other_us + scattered_us(problem, device) <= _WORTH_EXCHANGING * us
        for device, us, other_us in zip(_REFERENCE_DEVICES, own_us, _cut(other)[1], strict=True)
    )
    return other if is_faster else refusal or problem


def _refusal(p: WeightGradientProblem, *, takes_few_taps: bool = False) -> Refusal | None:
    """Why a problem is left to other families, whatever the GPU."""
    arithmetic = ARITHMETICS[p.dtype, p.precision]
    is_split, columns_of_taps = arithmetic.parts == 2, p.C_fine_g * p.K if p.C_fine_g < MIN_CHANNELS else 0
    rows = _least_rows(p, is_split)
    if p.C_coarse_g < rows:
        return Refusal(f"needs at least {rows} channels a group on the coarse side")
    if columns_of_taps and p.K < MIN_TAPS and not takes_few_taps:
        return Refusal(f"needs at least {MIN_CHANNELS} channels a group on the fine side, or {MIN_TAPS} taps")
    if is_split and 0 < columns_of_taps <= FEW_SPLIT_COLUMNS and p.C_coarse_g > MAX_ROWS_OF_FEW_COLUMNS:
        return Refusal(
            f"needs at least {MIN_CHANNELS} channels a group on the fine side, C_fine/groups * K > "
            f"{FEW_SPLIT_COLUMNS}, or at most {MAX_ROWS_OF_FEW_COLUMNS} channels a group on the coarse side, for "
            "float32 by split TF32"
        )
    if is_split and p.terms < MIN_SPLIT_TERMS:
        return Refusal(f"needs sums of at least {MIN_SPLIT_TERMS} terms for float32 by split TF32")
    return None if _keeps_bound(p, _slices(p)) else Refusal("needs longer samples to keep the error bound")


def _least_rows(p: WeightGradientProblem, is_split: bool) -> int:
    """The fewest channels of coarse in a group for which the family is faster than the others."""
    if p.C_fine_g >= MIN_CHANNELS:
        return MIN_ROWS
    if is_split:
        return MIN_SPLIT_ROWS
    return MIN_ROWS_OF_MANY_COLUMNS if p.C_fine_g * p.K >= MANY_COLUMNS else MIN_CHANNELS


def _slices(problem: WeightGradientProblem) -> Slices:
    return _cut(problem)[0]


@lru_cache(maxsize=4096)
def _cut(problem: WeightGradientProblem) -> tuple[Slices, tuple[float, ...]]:
    """The cut that the cost model prefers on two GPUs together, whatever the GPU and the layout, and its times there.

    On neither GPU is it slower than the cut by rule, and it keeps the error bound if any cut does.
    """
    p = replace(problem, has_lengths=False)
    cuts = Slices.of_tensor_cores(p)
    cuts = tuple(cut for cut in cuts if _keeps_bound(p, cut)) or cuts[:1]
    layout = Layout.contiguous(p)
    tap_width = _tap_width(p, layout, 32)
    # The best tilings for the cut by rule are the best for other cuts, too. Narrow tiles count if one is the very best.
    first = _REFERENCE_DEVICES[0]
    compared = _compare(p, cuts[0], _fetches(p, layout, 32, first), tap_width, first, 32)
    best = [t for t in compared if t is compared[0] or t.tile.threads >= WIDE_THREADS][:_REFERENCE_TILINGS]

    def times(cut: Slices) -> list[float]:
        tilings = [
            [_tiling(p, cut, t.tile, t.columns, t.taps, t.fetches, tap_width, device, 32) for t in best]
            for device in _REFERENCE_DEVICES
        ]
        return [min((t.us for t in of_device if t is not None), default=math.inf) for of_device in tilings]

    by_cut = {cut: times(cut) for cut in cuts}
    limits = [_TOLERATED * us for us in by_cut[cuts[0]]]
    fast = (cut for cut in cuts if all(us <= limit for us, limit in zip(by_cut[cut], limits, strict=True)))
    best_cut = min(fast, key=lambda cut: math.prod(by_cut[cut]))
    return best_cut, tuple(by_cut[best_cut])


def _index_bits(p: WeightGradientProblem, layout: Layout) -> int:
    # Addresses are also formed of samples, positions and channels behind the last.
    slices = _slices(p)
    overhang = slices.overhang(
        samples=_chunk(slices, _LARGEST_CHUNK)[0],
        channels=_LARGEST,
        positions=2 * _LARGEST_CHUNK,
        taps=p.K + 2 * _LARGEST,
    )
    columns = (p.C_fine_g + _LARGEST) * (p.K + _LARGEST)
    return index_bits(p, layout, overhang, slices.count * math.prod(p.weight_shape), columns)


def _tiles(arithmetic: Arithmetic, bits: int, *, few_rows: bool = False) -> tuple[Tile, ...]:
    """The tiles to choose from; `few_rows`: for problems with fewer rows than a unit."""
    tiles = TILES[arithmetic.parts]
    if bits != 32:
        return tiles[-1:]
    return tuple(tile for tile in tiles if tile.block_m == PRODUCT_ROWS) if few_rows else tiles


def _fetches(p: WeightGradientProblem, layout: Layout, bits: int, device: Device) -> tuple[Fetch, Fetch]:
    """How coarse and fine are loaded, as the layout allows."""
    arrays = (layout["coarse"], (p.N, p.C_coarse, p.L_coarse)), (layout["fine"], (p.N, p.C_fine, p.L_fine))
    if bits != 32:
        return _LEAST
    unit = ARITHMETICS[p.dtype, p.precision].channels
    in_taps = p.C_fine_g < unit
    of_units = [
        device.arch >= ASYNC_COPY_ARCH and channels % unit == 0 and has_units(array, extents, unit)
        for (array, extents), channels in zip(arrays, (p.C_coarse_g, p.C_fine_g), strict=True)
    ]
    coarse, fine = (
        Fetch.POSITION if p.has_lengths else _fetch_of_rows(array, extents, p.itemsize) for array, extents in arrays
    )
    # Neighbouring positions outside of fine may stand for samples that are not neighbours.
    # The windows of neighbouring taps hold every position, whatever the stride.
    if p.stride > 1 < p.dilation or p.padding_mode != "zeros" or in_taps:
        fine = Fetch.POSITION
    if of_units[0]:
        coarse, fine = Fetch.UNIT, Fetch.POSITION
    return coarse, Fetch.UNIT if of_units[1] and not in_taps else fine


def _alternatives(
    p: WeightGradientProblem, widest: tuple[Fetch, Fetch], tap_width: int
) -> Iterator[tuple[Columns, tuple[Fetch, Fetch]]]:
    """Columns and ways of loading between which the cost model decides: see `_tilings`.

    With few taps and a large stride, most positions of a wide load would not be used.
    """
    coarse, fine = widest
    for columns in Columns.every(p, tap_width):
        if not columns.in_taps:
            yield columns, widest
        if columns.in_taps or fine.width > 1 < p.stride:
            yield columns, (coarse, Fetch.POSITION)


def _fetch_of_rows(array: ArrayLayout, extents: tuple[int, int, int], itemsize: int) -> Fetch:
    """How rows of positions are loaded."""
    (N, C, L), (stride_n, stride_c, stride_l) = extents, array.strides
    if stride_l != 1:
        return Fetch.POSITION
    for fetch in (Fetch.RUN, Fetch.PAIRS):
        starts = (stride for stride, extent in ((stride_n, N), (stride_c, C)) if extent > 1)
        if all(n % fetch.align == 0 for n in (L, *starts)) and array.alignment >= fetch.align * itemsize:
            return fetch
    # A word may belong to two rows, but none may lie before the first row.
    is_shifted = itemsize == 2 and array.alignment >= 4 and stride_c % 2 == 1 and stride_c > 0 <= stride_n
    return Fetch.SHIFTED if is_shifted else Fetch.POSITION


def _every_fetches(arithmetic: Arithmetic, device: Device) -> Iterator[tuple[Fetch, Fetch]]:
    """The ways of loading coarse and fine that any layout can need."""
    rows = [fetch for fetch in Fetch if fetch is not Fetch.UNIT]
    if arithmetic.itemsize == 4:
        rows.remove(Fetch.SHIFTED)
    yield from product(rows, rows)
    if device.arch >= ASYNC_COPY_ARCH:
        yield from product((*rows, Fetch.UNIT), (Fetch.UNIT,))
        yield Fetch.UNIT, Fetch.POSITION


def _fetches_of(config: Config) -> tuple[Fetch, Fetch]:
    macros = dict(config.macros)

    def of(side: str) -> Fetch:
        if f"{side}_LAST" in macros:
            return Fetch.UNIT
        width = int(macros[f"{side}_WIDTH"])
        align = int(macros.get(f"{side}_ALIGN", width))
        return next(fetch for fetch in Fetch if (fetch.width, fetch.align) == (width, align))

    return of("COARSE"), of("FINE")


def _tap_width(p: WeightGradientProblem, layout: Layout, bits: int) -> int:
    """How many neighbouring taps one access loads, as the layout allows."""
    array = layout["fine"]
    stride_n, stride_c, stride_l = array.strides
    begins_even = (stride_n % 2 == 0 or p.N == 1) and (stride_c % 2 == 0 or p.C_fine == 1)
    is_even = begins_even and p.stride % 2 == p.padding_left % 2 == 0 and array.alignment >= 2 * p.itemsize
    return 2 if is_even and stride_l == p.dilation == 1 and bits == 32 and not p.has_lengths else 1


def _pitches(rows: int, arithmetic: Arithmetic) -> tuple[int, int]:
    """The distances in shared memory from unit to unit of an octet, and from octet to octet, in rows.

    A fragment reads both units of an octet of 32-bit data at once, so these lie on different banks. So do eight
    neighbouring units, because one store goes to all of them.
    """
    if arithmetic.channels == OCTET:
        return rows, rows + (1 - rows) % 8
    half = rows + (4 - rows) % 8
    return half, 2 * half + 1


def _keeps_bound(p: WeightGradientProblem, slices: Slices) -> bool:
    """Whether the sums are within `reference.Sums.error_bound`, counted as there, in units of u times the magnitude.

    A block of products costs one unit in addition to those of its products, and the bound has room for one block for
    every three terms. There may be more blocks, since a step begins with every sample and few of its terms may exist.
    Slices that are shorter than the whole sum make up for this, unless samples are short and slices few. A block has
    at least 16 bytes.
    """
    arithmetic = ARITHMETICS[p.dtype, p.precision]
    run = min(p.terms // p.N, slices.positions)  # terms of one sample in a slice, at most

    def pieces(length: int) -> int:
        """How many pieces of this length, one after the other, the runs of all samples touch."""
        return slices.samples * min(-(-slices.positions // length), (run + length - 2) // length + 1)

    if arithmetic.parts == 1:
        units = slices.samples * run + pieces(arithmetic.channels) + slices.count - 1
        return 3 * units <= 4 * p.terms + 6
    # What is left out and cut off, the sum of a step and the small products; then the additions to the totals.
    return 4 + 4 + 8 + 20 + p.terms / 400 + pieces(STEP) + slices.count <= p.terms + 2


@lru_cache(maxsize=4096)
def _tilings(
    p: WeightGradientProblem, widest: tuple[Fetch, Fetch], tap_width: int, device: Device, bits: int
) -> tuple[_Tiling, ...]:
    """The tilings that fit the device, the fastest first: for each tile the one with the best octets and taps.

    The last tile of each arithmetic fits every device with blocks of one tap, however its arrays are loaded.

    `widest`, `tap_width`: what `_fetches` and `_tap_width` allow.
    """
    return _compare(p, _slices(p), widest, tap_width, device, bits)


def _compare(
    p: WeightGradientProblem,
    slices: Slices,
    widest: tuple[Fetch, Fetch],
    tap_width: int,
    device: Device,
    bits: int,
) -> tuple[_Tiling, ...]:
    arithmetic = ARITHMETICS[p.dtype, p.precision]
    found = []
    for tile in _tiles(arithmetic, bits, few_rows=p.C_coarse_g < arithmetic.channels):
        pairs = tile.block_n // OCTET
        tilings = [
            tiling
            for columns, fetches in _alternatives(p, widest, tap_width)
            for taps in {-(-columns.taps // -(-columns.taps // most)) for most in range(1, pairs + 1)}
            if (tiling := _tiling(p, slices, tile, columns, taps, fetches, tap_width, device, bits)) is not None
        ]
        if tilings:
            found.append(min(tilings, key=lambda tiling: (tiling.us, -tiling.taps)))
    return tuple(sorted(found, key=lambda tiling: tiling.us))


def _tiling(
    p: WeightGradientProblem,
    slices: Slices,
    tile: Tile,
    columns: Columns,
    taps: int,
    fetches: tuple[Fetch, Fetch],
    tap_width: int,
    device: Device,
    bits: int,
) -> _Tiling | None:
    """A tiling with its predicted time; None if it does not fit the device."""
    arithmetic = ARITHMETICS[p.dtype, p.precision]
    samples, rows = _chunk(slices, tile.chunk_rows)
    octets = min(tile.block_n // OCTET // taps, columns.octets)
    row_tiles = -(-p.C_coarse_g // tile.block_m)
    octet_tiles, tap_tiles = -(-columns.octets // octets), -(-columns.taps // taps)
    if tile.threads < WIDE_THREADS and row_tiles * octet_tiles * tap_tiles > MOST_NARROW_TILES:
        return None
    window = Window.of(p, columns, taps, samples, rows, fetches[1])
    shared = _shared_bytes(tile, window, octets, fetches[1], arithmetic, bits, p.stride)
    if shared > device.shared_per_block:
        return None
    blocks = row_tiles * octet_tiles * tap_tiles * p.groups * slices.count
    launch = GradientLaunch(
        arithmetic=arithmetic,
        slices=slices,
        blocks=blocks,
        chunk_samples=window.samples,
        chunk_positions=window.positions,
        window_rows=window.rows,
        columns=columns,
        octets=octets,
        taps=taps,
        fetches=fetches,
        tap_width=tap_width,
        block_m=tile.block_m,
        block_n=tile.block_n,
        warps_m=tile.warps_m,
        warps_n=tile.warps_n,
        min_blocks=tile.min_blocks,
    )
    resident = min(tile.min_blocks, max(1, device.shared_per_sm // (shared + RESERVED_SHARED_BYTES)))
    us = launch.us(p, resident, device)
    if slices.count > 1:
        us += predict_sum(p, slices.count, device).us
    return _Tiling(tile, columns, octets, taps, fetches, window, row_tiles, octet_tiles, tap_tiles, blocks, shared, us)


def _chunk(slices: Slices, rows: int) -> tuple[int, int]:
    """The samples of a chunk, and the positions of each. Short samples are filled up to whole steps."""
    length = STEP
    while length < slices.positions:
        length *= 2
    return (rows // length, length) if length < rows else (1, rows)


def _shared_bytes(
    tile: Tile,
    window: Window,
    octets: int,
    fetch: Fetch,
    arithmetic: Arithmetic,
    bits: int,
    stride: int,
) -> int:
    """The bytes of shared memory of a block; `fetch` is that of fine."""
    rows = octets * _pitches(window.rows, arithmetic)[1]
    rows += tile.block_m // OCTET * _pitches(tile.chunk_rows, arithmetic)[1]
    tasks = OCTET // arithmetic.channels * octets * window.rows // fetch.width
    tables = tasks * 16 if fetch is Fetch.UNIT else window.rows * 2 * bits // 8 + tasks * 8
    if fetch.width > 1 < stride:
        tables += window.rows * 4
    operands = 2 * arithmetic.parts * rows * UNIT_BYTES + tables
    return max(operands, tile.warps_m * PRODUCT_ROWS * (tile.block_n + 4) * 4)
