"""weight_gradient_mma: weight gradients of dense and grouped layers by tensor cores.

Contract: cuda_src/weight_gradient_mma.cu. Which problems it takes, and in which order their sums are formed, follows
from the problem and the architecture alone; the layout and the GPU decide only how the work is cut into tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache, partial
from itertools import product
from typing import NamedTuple

from ..costs import (
    LINE_BYTES,
    MMA_LATENCY_CYCLES,
    RESERVED_SHARED_BYTES,
    SECTOR_BYTES,
    Code,
    Ending,
    Work,
    predict_launch,
    tensor_cores,
)
from ..device import Device
from ..problem import WeightGradientProblem
from ..text import count
from .arithmetic import ARITHMETICS, MIN_SPLIT_TERMS, SPLIT_TERMS, UNIT_BYTES, WARP, Access, Arithmetic
from .base import MAX_GRID, ArrayLayout, Config, Family, Launch, Layout, Plan, Refusal, Step, params_of, round_up
from .mma import ASYNC_COPY_ARCH, MIN_CHANNELS, MIN_SPLIT_ROWS, has_units
from .mma_costs import LATENCY_CYCLES, LINES_PER_CYCLE
from .mma_tiles import BlockTile
from .offsets import index_bits
from .slices import Slices, predict_sum, sliced_plan, weight_fields

STEP = SPLIT_TERMS  # positions of a step: one product of 16-bit matrices along the reduction, or two
OCTET = 8  # columns of one product
# With fewer channels of fine its octets are of taps; with fewer of those they are half empty. The three products of
# split TF32 take longer than CUDA cores with few columns.
MIN_TAPS = 8
# With fewer channels of coarse, weight_gradient_pairs reads each row of fine hardly more often.
MIN_ROWS = 5
MIN_SPLIT_COLUMNS = 32
_PRODUCT_ROWS = 16  # rows of one product


class Fetch(Enum):
    """What a lane loads of each channel of a unit, of coarse or of fine.

    Attributes:
        width: its positions, which are neighbours in the array.
        align: the multiple of positions at which rows begin and end.
        words: what `explain` says of it.
    """

    POSITION = 1, 1, "one position of a channel"
    RUN = 4, 4, "four positions of a channel"
    PAIRS = 4, 2, "four positions of a channel, two at a time"
    SHIFTED = 4, 1, "four positions of a channel, in words that rows of odd length share"
    UNIT = 1, 1, Access.UNIT.words

    def __init__(self, width: int, align: int, words: str) -> None:
        self.width, self.align, self.words = width, align, words


_LEAST = Fetch.POSITION, Fetch.POSITION  # of arrays that need wide offsets


@dataclass(frozen=True, slots=True)
class Tile(BlockTile):
    """The tile of a weight gradient; a column is a pair of tap and channel.

    Attributes:
        chunk_rows: positions of a chunk.
        ahead_coarse, ahead_fine: the vectors of the next chunk that a thread loads ahead at most.
    """

    chunk_rows: int
    ahead_coarse: int
    ahead_fine: int


# By the parts of an operand; the last one is for arrays that need wide offsets, too. Three sets of sums leave a split
# product registers for warps of 48x32. Tiles of 48 rows are for groups of 48 channels.
TILES: dict[int, tuple[Tile, ...]] = {
    1: (
        Tile(128, 256, 2, 4, 1, 32, 4, 4),
        Tile(64, 256, 1, 4, 2, 32, 4, 4),
        Tile(48, 256, 1, 4, 2, 32, 4, 4),
        Tile(32, 256, 1, 4, 3, 32, 4, 4),
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
        Tile(64, 64, 2, 2, 2, 32, 4, 4),
    ),
}
_EVERY_TILE = tuple(tile for tiles in TILES.values() for tile in tiles)
_LARGEST = max(max(tile.block_m, tile.block_n) for tile in _EVERY_TILE)
_LARGEST_CHUNK = max(tile.chunk_rows for tile in _EVERY_TILE)

# Of the cost model, from the machine code for sm_90 (bench.static): instructions of a lane for one load, with its
# address and its part in storing the vectors, by the positions that it loads; of a chunk besides its loads and steps;
# of a step besides its products and fetches; of a warp for one sum of each lane on its way out.
_LOAD_INSTRUCTIONS = {
    Fetch.POSITION: 8.0,
    Fetch.RUN: 11.0,
    Fetch.PAIRS: 13.0,
    Fetch.SHIFTED: 15.0,
    Fetch.UNIT: 30.0,
}
_TAPS_INSTRUCTIONS = 10.0  # of a load of two taps
_STRIDED_INSTRUCTIONS = {2: 1.5, 4: 4.0}  # more where a run's positions have rows of their own, by bytes of an element
_CHUNK_INSTRUCTIONS = 50.0
_STEP_INSTRUCTIONS = 16
_STORE_INSTRUCTIONS = 8.0
# An assumption: cycles of the barrier of a chunk, and of what its loads leave uncovered, of a block alone.
_CHUNK_CYCLES = 150.0
# An assumption: what L1 has room for beside the shared memory of the resident blocks, from sm_80 on with tiles of half
# of the largest shared memory.
_L1_BYTES = 96 * 1024


class Columns(NamedTuple):
    """How the columns of the result, (channel of fine, tap), are grouped by eights.

    Attributes:
        octets: of a group: of eight channels, or of one channel with few of these, whose taps are taken by eights.
        taps: of an octet, or blocks of eight taps.
        tap_step: positions from one of them to the next.
        in_taps: whether an octet has eight taps.
    """

    octets: int
    taps: int
    tap_step: int
    in_taps: bool

    @classmethod
    def of(cls, p: WeightGradientProblem) -> Columns:
        if p.C_fine_g >= MIN_CHANNELS:
            return cls(-(-p.C_fine_g // OCTET), p.K, p.dilation, False)
        return cls(p.C_fine_g, -(-p.K // OCTET), OCTET * p.dilation, True)


class Window(NamedTuple):
    """How the fine side of a chunk lies in shared memory: `positions` of each of some samples, shifted by the taps.

    A plane holds every stride-th position. Taps whose distance is a multiple of the stride share a plane, shifted:
    there are stride / gcd(stride, dilation) planes, or one per tap where that takes fewer rows (taps far apart).
    """

    samples: int
    positions: int
    planes: int
    plane_rows: int
    tap_rows_step: int

    @classmethod
    def of(cls, p: WeightGradientProblem, taps: int, samples: int, positions: int, fetch: Fetch) -> Window:
        """`taps`: as in `Columns`; `fetch`: of fine. Planes are of whole runs and begin where rows may."""
        columns = Columns.of(p)
        tap_step = columns.tap_step
        gcd = math.gcd(p.stride, tap_step)
        planes = min(p.stride // gcd, taps)

        def skew(step: int) -> int:
            """The most rows in front of those that planes need which begin at every step-th tap."""
            begins = range(0, min(columns.taps, step * fetch.align), step)
            return max((tap * tap_step - p.padding_left) % fetch.align for tap in begins)

        if fetch.width > 1 < p.stride:  # a run has positions of several planes
            plane_rows = positions + (taps - 1 + skew(taps)) // p.stride
            whole = fetch.width // math.gcd(fetch.width, p.stride)
            return cls(samples, positions, p.stride, round_up(plane_rows, whole), 1)
        plane_rows = round_up(positions + (taps - 1) // planes * (tap_step // gcd) + skew(taps), fetch.width)
        tap_rows = round_up(positions + skew(1), fetch.width)
        if planes * plane_rows >= taps * tap_rows:
            return cls(samples, positions, taps, tap_rows, 0)
        return cls(samples, positions, planes, plane_rows, tap_step // gcd)

    @property
    def rows(self) -> int:
        return self.samples * self.planes * self.plane_rows


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
        if p.C_coarse_g < (MIN_CHANNELS if p.C_fine_g < MIN_CHANNELS else MIN_ROWS):
            return Refusal(
                f"needs at least {MIN_CHANNELS} channels a group on the coarse side, or {MIN_ROWS} with "
                f"{MIN_CHANNELS} on the fine side"
            )
        if p.C_fine_g < MIN_CHANNELS and p.K < MIN_TAPS:
            return Refusal(f"needs at least {MIN_CHANNELS} channels a group on the fine side, or {MIN_TAPS} taps")
        if arithmetic.parts == 2 and p.C_coarse_g < MIN_SPLIT_ROWS:
            return Refusal(
                f"needs at least {MIN_SPLIT_ROWS} channels a group on the coarse side for float32 by split TF32"
            )
        if arithmetic.parts == 2 and Columns.of(p).in_taps and p.C_fine_g * p.K < MIN_SPLIT_COLUMNS:
            return Refusal(
                f"needs at least {MIN_CHANNELS} channels a group on the fine side, or C_fine/groups * K >= "
                f"{MIN_SPLIT_COLUMNS}, for float32 by split TF32"
            )
        if arithmetic.parts == 2 and p.terms < MIN_SPLIT_TERMS:
            return Refusal(f"needs sums of at least {MIN_SPLIT_TERMS} terms for float32 by split TF32")
        if not _keeps_bound(p, arithmetic):
            return Refusal("needs longer samples to keep the error bound")
        bits = _index_bits(p, layout)
        fetches, tap_width = _fetches(p, layout, bits, device), _tap_width(p, layout, bits)
        tilings = _tilings(p, fetches, tap_width, device, bits)
        tiling, tile, window = tilings[0], tilings[0].tile, tilings[0].window
        if tiling.blocks > MAX_GRID:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        slices, columns = _slices(p), Columns.of(p)
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
            },
        )
        config = self._config(
            tile,
            p.dtype,
            p.precision,
            tiling.fetches,
            bits,
            is_strided=p.stride > 1,
            tap_width=tap_width,
            few_rows=p.C_coarse_g < arithmetic.channels,
        )
        launch = Launch(tiling.blocks, tile.threads, tiling.shared_bytes, bits, params)
        each = OCTET if columns.in_taps else 1
        candidates = tuple(
            (f"{t.tile.block_m}x{t.tile.block_n} of {count(each * t.taps, 'tap')}", t.us) for t in tilings
        )
        return sliced_plan(p, layout, slices, config, launch, candidates)

    def work(self, problem: WeightGradientProblem, step: Step) -> Work:
        params, macros = dict(step.launch.params), dict(step.config.macros)
        return _Launch(
            arithmetic=ARITHMETICS[problem.dtype, problem.precision],
            slices=_slices(problem),
            blocks=step.launch.grid,
            chunk_samples=params["chunk_samples"],
            chunk_positions=1 << params["sample_shift"],
            window_rows=params["window_rows"],
            octets=params["block_octets"],
            taps=params["block_taps"],
            fetches=_fetches_of(step.config),
            tap_width=int(macros.get("TAP_WIDTH", 1)),
            block_m=int(macros["BLOCK_M"]),
            block_n=int(macros["BLOCK_N"]),
            warps_m=int(macros["WARPS_M"]),
            warps_n=int(macros["WARPS_N"]),
            min_blocks=int(macros["MIN_BLOCKS"]),
        ).work(problem)

    def staging(self, step: Step) -> dict[str, str]:
        return {s: fetch.words for s, fetch in zip(("coarse", "fine"), _fetches_of(step.config), strict=True)}

    def configs(self, device: Device) -> Iterator[Config]:
        for (dtype, precision), arithmetic in ARITHMETICS.items():
            if device.arch >= arithmetic.min_arch:
                for bits in (32, 64):
                    for tile in _tiles(arithmetic, bits):
                        for fetches in _every_fetches(arithmetic, device) if bits == 32 else (_LEAST,):
                            of_fetches = partial(self._config, tile, dtype, precision, fetches, bits)
                            for is_strided in (False, True) if fetches[1].width > 1 else (False,):
                                yield of_fetches(is_strided=is_strided)
                                has_few = arithmetic.channels > MIN_ROWS and tile in _tiles_of_few_rows(bits)
                                if has_few and fetches[0] is not Fetch.UNIT:
                                    yield of_fetches(is_strided=is_strided, few_rows=True)
                            if fetches[1] is Fetch.POSITION:
                                for tap_width in (1, 2) if bits == 32 else (1,):
                                    yield of_fetches(tap_width=tap_width)

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
    """A tile with the octets and taps of its columns, the numbers of tiles and blocks, and the predicted time."""

    tile: Tile
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


def _slices(p: WeightGradientProblem) -> Slices:
    return Slices.of(p, on_tensor_cores=True)


def _index_bits(p: WeightGradientProblem, layout: Layout) -> int:
    # Samples, positions and channels behind the last, of which addresses are formed.
    slices = _slices(p)
    overhang = slices.overhang(
        samples=_chunk(slices, _LARGEST_CHUNK)[0],
        channels=_LARGEST,
        positions=2 * _LARGEST_CHUNK,
        taps=p.K + 2 * _LARGEST,
    )
    columns = (p.C_fine_g + _LARGEST) * (p.K + _LARGEST)
    return index_bits(p, layout, overhang, slices.count * math.prod(p.weight_shape), columns)


def _tiles(arithmetic: Arithmetic, bits: int) -> tuple[Tile, ...]:
    tiles = TILES[arithmetic.parts]
    return tiles if bits == 32 else tiles[-1:]


def _tiles_of_few_rows(bits: int) -> tuple[Tile, ...]:
    """Of problems whose rows are fewer than a unit has."""
    tiles = TILES[1]
    return tuple(tile for tile in tiles if tile.block_m == _PRODUCT_ROWS) if bits == 32 else tiles[-1:]


def _fetches(p: WeightGradientProblem, layout: Layout, bits: int, device: Device) -> tuple[Fetch, Fetch]:
    """How coarse and fine are loaded, as the layout allows."""
    arrays = (layout["coarse"], (p.N, p.C_coarse, p.L_coarse)), (layout["fine"], (p.N, p.C_fine, p.L_fine))
    if bits != 32:
        return _LEAST
    unit, in_taps = ARITHMETICS[p.dtype, p.precision].channels, Columns.of(p).in_taps
    of_units = [
        device.arch >= ASYNC_COPY_ARCH and channels % unit == 0 and has_units(array, extents, unit)
        for (array, extents), channels in zip(arrays, (p.C_coarse_g, p.C_fine_g), strict=True)
    ]
    coarse, fine = (
        Fetch.POSITION if p.has_lengths else _fetch_of_rows(array, extents, p.itemsize) for array, extents in arrays
    )
    # Neighbours outside of fine may mean samples that are no neighbours.
    # Windows of neighbouring taps have all positions, whatever the stride.
    if p.stride > 1 < p.dilation or p.padding_mode != "zeros" or in_taps:
        fine = Fetch.POSITION
    if of_units[0]:
        coarse, fine = Fetch.UNIT, Fetch.POSITION
    return coarse, Fetch.UNIT if of_units[1] and not in_taps else fine


def _alternatives(p: WeightGradientProblem, widest: tuple[Fetch, Fetch]) -> tuple[tuple[Fetch, Fetch], ...]:
    """Ways of loading between which the cost model decides: few taps of a large stride leave out most positions."""
    coarse, fine = widest
    return (widest,) if fine.width == 1 or p.stride == 1 else (widest, (coarse, Fetch.POSITION))


def _fetch_of_rows(array: ArrayLayout, extents: tuple[int, int, int], itemsize: int) -> Fetch:
    """How rows of positions are loaded."""
    (N, C, L), (stride_n, stride_c, stride_l) = extents, array.strides
    if stride_l != 1:
        return Fetch.POSITION
    for fetch in (Fetch.RUN, Fetch.PAIRS):
        starts = (stride for stride, extent in ((stride_n, N), (stride_c, C)) if extent > 1)
        if all(n % fetch.align == 0 for n in (L, *starts)) and array.alignment >= fetch.align * itemsize:
            return fetch
    # Of words that two rows share, none may lie before the first row.
    is_shifted = itemsize == 2 and array.alignment >= 4 and stride_c % 2 == 1 and stride_c > 0 <= stride_n
    return Fetch.SHIFTED if is_shifted else Fetch.POSITION


def _every_fetches(arithmetic: Arithmetic, device: Device) -> Iterator[tuple[Fetch, Fetch]]:
    """Of all layouts."""
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
    """Neighbouring taps that one access loads, as the layout allows; 0 where octets are of channels."""
    if not Columns.of(p).in_taps:
        return 0
    array = layout["fine"]
    stride_n, stride_c, stride_l = array.strides
    begins_even = (stride_n % 2 == 0 or p.N == 1) and (stride_c % 2 == 0 or p.C_fine == 1)
    is_even = begins_even and p.stride % 2 == p.padding_left % 2 == 0 and array.alignment >= 2 * p.itemsize
    return 2 if is_even and stride_l == p.dilation == 1 and bits == 32 and not p.has_lengths else 1


def _pitches(rows: int, arithmetic: Arithmetic) -> tuple[int, int]:
    """Rows of shared memory from unit to unit of an octet, and from octet to octet.

    The two units of an octet of 32-bit data, which a fragment reads at once, lie on different banks; so do eight
    neighbouring units, to which a store goes.
    """
    if arithmetic.channels == OCTET:
        return rows, rows + (1 - rows) % 8
    half = rows + (4 - rows) % 8
    return half, 2 * half + 1


def _keeps_bound(p: WeightGradientProblem, arithmetic: Arithmetic) -> bool:
    """Whether the sums are within `reference.Sums.error_bound`, counted as there, in units of u times the magnitude.

    Steps begin anew with every sample, and few terms of a step may exist. So there may be more blocks of products, of
    which each costs one unit besides those of its products, than a third of the terms, for which the bound has room.
    That a slice is shorter than the whole sum pays for it, except where samples are short and slices few. Blocks are
    of 16 bytes at least.
    """
    slices = _slices(p)
    run = min(p.terms // p.N, slices.positions)  # terms of one sample in a slice, at most

    def pieces(length: int) -> int:
        """How many neighbouring pieces of a length the run meets, in all samples."""
        return slices.samples * min(-(-slices.positions // length), (run + length - 2) // length + 1)

    if arithmetic.parts == 1:
        units = slices.samples * run + pieces(arithmetic.channels) + slices.count - 1
        return 3 * units <= 4 * p.terms + 6
    # The parts left out and cut off, the sum of a step, the small products; then the totals.
    return 4 + 4 + 8 + 20 + p.terms / 400 + pieces(STEP) + slices.count <= p.terms + 2


@lru_cache(maxsize=4096)
def _tilings(
    p: WeightGradientProblem, widest: tuple[Fetch, Fetch], tap_width: int, device: Device, bits: int
) -> tuple[_Tiling, ...]:
    """The tilings that fit the device, the cheapest first; of each tile the one with the best octets and taps.

    The last tile of each arithmetic fits every device with blocks of one tap, however its arrays are loaded.

    `widest`: what `_fetches` allows.
    """
    arithmetic = ARITHMETICS[p.dtype, p.precision]
    slices = _slices(p)
    columns = Columns.of(p)
    adding = predict_sum(p, slices.count, device).us if slices.count > 1 else 0.0
    found = []
    for tile in _tiles(arithmetic, bits) if p.C_coarse_g >= arithmetic.channels else _tiles_of_few_rows(bits):
        pairs = tile.block_n // OCTET
        samples, rows = _chunk(slices, tile.chunk_rows)
        row_tiles = -(-p.C_coarse_g // tile.block_m)
        best: _Tiling | None = None
        every_taps = {-(-columns.taps // -(-columns.taps // most)) for most in range(1, pairs + 1)}
        for taps, fetches in product(every_taps, _alternatives(p, widest)):
            octets = min(pairs // taps, columns.octets)
            octet_tiles, tap_tiles = -(-columns.octets // octets), -(-columns.taps // taps)
            window = Window.of(p, taps, samples, rows, fetches[1])
            shared = _shared_bytes(tile, window, octets, fetches[1], arithmetic, bits, p.stride)
            if shared > device.shared_per_block:
                continue
            blocks = row_tiles * octet_tiles * tap_tiles * p.groups * slices.count
            launch = _Launch(
                arithmetic=arithmetic,
                slices=slices,
                blocks=blocks,
                chunk_samples=window.samples,
                chunk_positions=window.positions,
                window_rows=window.rows,
                octets=octets,
                taps=taps,
                fetches=fetches,
                tap_width=max(tap_width, 1),
                block_m=tile.block_m,
                block_n=tile.block_n,
                warps_m=tile.warps_m,
                warps_n=tile.warps_n,
                min_blocks=tile.min_blocks,
            )
            resident = min(tile.min_blocks, max(1, device.shared_per_sm // (shared + RESERVED_SHARED_BYTES)))
            us = adding + launch.us(p, resident, device)
            if best is None or (us, -taps) < (best.us, -best.taps):
                tiles = row_tiles, octet_tiles, tap_tiles
                best = _Tiling(tile, octets, taps, fetches, window, *tiles, blocks, shared, us)
        if best is not None:
            found.append(best)
    return tuple(sorted(found, key=lambda tiling: tiling.us))


def _chunk(slices: Slices, rows: int) -> tuple[int, int]:
    """Samples of a chunk, and the positions of each of them: short samples are filled up to whole steps."""
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
    """Of a block; `fetch`: of fine."""
    rows = octets * _pitches(window.rows, arithmetic)[1]
    rows += tile.block_m // OCTET * _pitches(tile.chunk_rows, arithmetic)[1]
    tasks = OCTET // arithmetic.channels * octets * window.rows // fetch.width
    tables = tasks * 16 if fetch is Fetch.UNIT else window.rows * 2 * bits // 8 + tasks * 8
    if fetch.width > 1 < stride:
        tables += window.rows * 4
    operands = 2 * arithmetic.parts * rows * UNIT_BYTES + tables
    return max(operands, tile.warps_m * _PRODUCT_ROWS * (tile.block_n + 4) * 4)


class _Launch(NamedTuple):
    """A launch as far as its time depends on it: fields of `Tile`, `Window` and `_Tiling`."""

    arithmetic: Arithmetic
    slices: Slices
    blocks: int
    chunk_samples: int
    chunk_positions: int
    window_rows: int
    octets: int
    taps: int
    fetches: tuple[Fetch, Fetch]
    tap_width: int
    block_m: int
    block_n: int
    warps_m: int
    warps_n: int
    min_blocks: int

    @property
    def warps(self) -> int:
        return self.warps_m * self.warps_n

    @property
    def chunks(self) -> int:
        """Of a slice."""
        s = self.slices
        return -(-s.samples // self.chunk_samples) * -(-s.positions // self.chunk_positions)

    @property
    def terms(self) -> int:
        """Positions that a block multiplies, those of steps that reach beyond a slice included."""
        of_sample = min(self.chunk_positions, -(-self.slices.positions // STEP) * STEP)
        return self.chunks * self.chunk_samples * of_sample

    def work(self, p: WeightGradientProblem) -> Work:
        a = self.arithmetic
        # Only 32-bit steps are loops of several products. What stages is counted by tasks, of which a chunk may have
        # more or fewer than its code has in a row.
        instructions, wavefronts = self._staging(p)
        held = self.blocks * self.block_m * self.block_n
        partial = self.slices.partial_bytes(p)
        stored = partial or math.prod(p.weight_shape) * p.itemsize
        return Work(
            multiply_adds=a.products * held * self.terms,
            l2_bytes=self.blocks * self._staged_bytes(p) + stored,
            staging_instructions=instructions,
            staging_wavefronts=wavefronts,
            visits=self.blocks * self.warps * self.terms / STEP if a.itemsize == 4 else 0.0,
            dram_bytes=p.bytes() - math.prod(p.weight_shape) * p.itemsize + stored,
            waits=LATENCY_CYCLES + self.chunks * _CHUNK_CYCLES,
            load_share=0.0,  # what a chunk waits for is in `waits`
            ending=Ending(held / WARP * _STORE_INSTRUCTIONS, 2 * held / WARP, stored),
        )

    def _staged_bytes(self, p: WeightGradientProblem) -> float:
        """Bytes that come through L2 for a block.

        Of rows of positions these are whole sectors. Chunks follow each other along the rows. So what a chunk shares
        with the one before, the sector in which it begins and most of its window, comes from L1 if the lines of a
        chunk have room there.
        """
        columns, itemsize, positions = Columns.of(p), self.arithmetic.itemsize, self.slices.positions
        chunks = -(-positions // self.chunk_positions)
        last = (OCTET - 1) * p.dilation if columns.in_taps else 0  # positions from an octet's first tap to its last
        is_apart = columns.tap_step > self.chunk_positions * p.stride  # taps meet no positions in common
        halo = itemsize * (last if is_apart else last + (self.taps - 1) * columns.tap_step)
        of_position = p.stride * itemsize
        if of_position > SECTOR_BYTES and not is_apart:  # sectors between the taps of two positions are not needed
            step = min(columns.tap_step * itemsize, SECTOR_BYTES)
            of_position = min(of_position, (self.taps - 1) * step + last * itemsize + SECTOR_BYTES)
        channels = self.octets * (1 if columns.in_taps else OCTET)
        rows = channels * (self.taps if is_apart else 1)  # of fine, or stretches of them
        lines = self.block_m * (self.chunk_positions * itemsize + LINE_BYTES)
        lines += rows * (self.chunk_positions * of_position + halo + LINE_BYTES)
        times = 1 if self.min_blocks * self.chunk_samples * lines <= _L1_BYTES else chunks
        cut = SECTOR_BYTES - itemsize  # what the sectors at both ends of a stretch have besides it, in the mean
        coarse = positions * self.block_m * itemsize
        if self.fetches[0] is not Fetch.UNIT:
            coarse += self.block_m * times * cut
        if self.fetches[1] is Fetch.UNIT:
            fine = channels * chunks * self.window_rows / self.chunk_samples * itemsize
        else:
            fine = rows * (positions * of_position + times * (halo + cut))
        return self.slices.samples * (coarse + fine)

    def _load(self, fetch: Fetch, step: int) -> tuple[int, float, float]:
        """Of a lane's load: elements, and with its part in storing them instructions and wavefronts of its warp.

        `step`: from a position of the row to the next.
        """
        a, instructions = self.arithmetic, _LOAD_INSTRUCTIONS[fetch]
        if fetch is Fetch.UNIT:
            return a.channels, instructions, 4.0
        if fetch is Fetch.SHIFTED:
            return fetch.width, instructions, 2.5  # five words of two channels, each from four lines
        # Of 128 bytes by a warp, of one load that has fewer, or of four lines.
        wavefronts = max(1.0, fetch.width * a.itemsize / 4, min(WARP, step * a.itemsize / 4) / LINES_PER_CYCLE)
        return fetch.width, instructions, wavefronts

    def _staging(self, p: WeightGradientProblem) -> tuple[float, float]:
        """Instructions and wavefronts of all warps that stage the chunks."""
        a, chunk_terms = self.arithmetic, self.chunk_samples * self.chunk_positions
        elements = self.block_m * chunk_terms, self.octets * OCTET * self.window_rows
        in_taps = Columns.of(p).in_taps
        is_wide = self.fetches[1].width > 1
        loads = [self._load(self.fetches[0], 1), self._load(self.fetches[1], 1 if in_taps or is_wide else p.stride)]
        if in_taps and self.tap_width == 2:  # lanes that take neighbouring taps load from one line
            loads[1] = 2, _TAPS_INSTRUCTIONS, a.itemsize / 2
        if is_wide and p.stride > 1:  # each unit's task reads four rows of a table
            width, of_lane, of_warp = loads[1]
            loads[1] = width, of_lane + _STRIDED_INSTRUCTIONS[a.itemsize], of_warp + 4 / a.channels
        instructions = sum(n / width * of_load for n, (width, of_load, _) in zip(elements, loads, strict=True))
        wavefronts = sum(n / width * of_load for n, (width, _, of_load) in zip(elements, loads, strict=True))
        # A unit of each part is stored at once.
        wavefronts += 4 * sum(elements) / a.channels * a.parts
        instructions += WARP * self.warps * _CHUNK_INSTRUCTIONS
        return self.blocks * self.chunks / WARP * instructions, self.blocks * self.chunks / WARP * wavefronts

    def us(self, p: WeightGradientProblem, resident: int, device: Device) -> float:
        """Microseconds by the family's estimate of the machine code; bench.static reads this itself."""
        a, work = self.arithmetic, self.work(p)
        warp_m, warp_n = self.block_m // self.warps_m, self.block_n // self.warps_n
        steps = self.terms * a.itemsize // (UNIT_BYTES * 2)  # products along the reduction
        products = a.products * warp_m // _PRODUCT_ROWS * warp_n // OCTET
        wavefronts = (warp_m + warp_n) * a.parts / 4  # 32 bytes of every row and column
        # ldmatrix fetches four wavefronts at a time; elements of 32 bits come one by one.
        fetches = wavefronts / 4 if a.itemsize == 2 else wavefronts
        passes = self.blocks * self.warps * steps
        staging = self._staging(p)
        code = Code(
            instructions=passes * (products + fetches + _STEP_INSTRUCTIONS) + staging[0],
            wavefronts=passes * wavefronts + staging[1],
            chain=steps * MMA_LATENCY_CYCLES,
        )
        return predict_launch(
            work,
            code,
            blocks=self.blocks,
            resident=resident,
            unit=tensor_cores(device, a.itemsize),
            device=device,
        ).us
