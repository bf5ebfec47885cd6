"""The tensor-core engine of cuda_src/mma.cuh: which layers it takes, how they are cut into tiles, the launches.

Which layers run on tensor cores, and in which order they are summed, follows from the layer and the architecture alone;
N and the lengths decide only how the work is cut into tiles, which changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product as combined

from ..costs import blocks_by_shared
from ..device import Device
from ..problem import ConvProblem
from ..source import params_fields
from . import mma_packing
from .arithmetic import (
    ARITHMETICS,
    MIN_SPLIT_TERMS,
    NO_ARITHMETIC,
    SPLIT_TERMS,
    STAGE_PAIRS,
    STAGE_STEPS,
    UNIT_BYTES,
    Access,
    Arithmetic,
    arithmetics,
)
from .base import (
    MAX_GRID,
    PACKED,
    PARTIAL,
    ArrayLayout,
    Config,
    Launch,
    Layout,
    Plan,
    Step,
    contiguous_strides,
    conv_arrays,
    conv_fields,
    params_of,
    with_padding_mode,
)
from .mma_costs import TilesLaunch, input_tasks, predict_plan
from .mma_tiles import NUM_STAGES, RAW_BOXES, Tile, tiles
from .mma_window import MAX_UNITS, Reduction, Window
from .product import Product, RowTiles

ASYNC_COPY_ARCH = 80  # from which on cp.async exists

# Layers with fewer channels than a unit of 16-bit elements are handled by the families for stems and tails.
MIN_CHANNELS = 8
MIN_ROWS = 8
# Half a fragment of 16 rows stays empty below this: three products for one then cost more than fused multiply-adds.
MIN_SPLIT_ROWS = 16
# Layers with so few output channels read more than they multiply, and the tail families serve them: unless so many
# weights meet each input, as in transposed ones, whose rows are many because the stride is.
MAX_TAIL_CHANNELS = 4
MIN_TAIL_WEIGHTS = 64
# Strides whose positions are channels are multiples of this, so that chunks of 16-bit and of 32-bit elements are whole.
FOLD_STEP = MAX_UNITS * 8
# The most bytes of partial sums. Segments get blocks of their own only in problems that are small otherwise.
MAX_PARTIAL_BYTES = 64 * 2**20


def refuse_layer(problem: ConvProblem, rows: int, device: Device) -> str | None:
    """Why tensor cores do not take a layer, by the layer and the architecture alone; `rows` of its product."""
    p = problem
    arithmetic = arithmetics(device).get((p.dtype, p.precision))
    if arithmetic is None:
        return NO_ARITHMETIC
    if p.C_in_g < MIN_CHANNELS:
        return f"needs C_in/groups >= {MIN_CHANNELS}"
    if p.C_out_g <= MAX_TAIL_CHANNELS and p.C_out_g * p.K < MIN_TAIL_WEIGHTS:
        return f"needs C_out/groups > {MAX_TAIL_CHANNELS} or C_out/groups * K >= {MIN_TAIL_WEIGHTS}"
    is_split = arithmetic.parts == 2
    if rows < (MIN_SPLIT_ROWS if is_split else MIN_ROWS):
        return f"needs C_out/groups (times stride for phases) >= {MIN_SPLIT_ROWS if is_split else MIN_ROWS}"
    if is_split and p.terms < MIN_SPLIT_TERMS:
        return f"needs C_in/groups * taps >= {MIN_SPLIT_TERMS} for float32 by split TF32"
    return None


def product_of(problem: ConvProblem) -> Product:
    """The product that a layer is, by the layer alone.

    Positions of large strides become channels where that is possible. Otherwise such layers, which are gradients of
    upsampling layers, spectrograms and patches, would need windows that leave room for few columns. Of fewer than 8
    channels of 16 bits, conv1d_im2col loads the input as often for more rows. Padding has no say in it: streams and
    pieces of a padded layer have none where they read nothing outside the input, and must give its bits.
    """
    p = problem
    is_foldable = not p.transposed and p.dilation == 1 and p.K % p.stride == 0
    if is_foldable and p.stride % FOLD_STEP == 0 and (p.itemsize == 4 or p.C_in_g >= MIN_CHANNELS):
        return Product.folded(p)
    return Product.of(p)


@dataclass(frozen=True, slots=True)
class Tiling:
    """A product cut into tiles, and the microseconds that all launches of its plan take by the cost model.

    Attributes:
        is_raw: blocks read the layer's own weights and pack them; else a launch before has packed them.
    """

    index_bits: int
    tile: Tile
    window: Window
    row_tiles: RowTiles
    column_tiles: int
    sample_tiles: int
    blocks: int
    shared_bytes: int
    us: float
    is_raw: bool = False


def shared_bytes(
    product: Product,
    tile: Tile,
    window: Window,
    reduction: Reduction,
    arithmetic: Arithmetic,
    bits: int,
    raw: RowTiles | None = None,
) -> int:
    """Of a block; `raw` are the tiles of rows where blocks read the layer's own weights."""
    itemsize = UNIT_BYTES // arithmetic.channels
    weights = NUM_STAGES * tile.stage_bytes(arithmetic.parts)
    if raw is not None:
        boxes = RAW_BOXES * _raw_box_vectors(product, raw, tile, reduction, arithmetic) * UNIT_BYTES
        weights = reduction.stages * tile.stage_bytes(arithmetic.parts) + boxes
    windows = min(reduction.chunks, 2) * arithmetic.parts * reduction.units * window.rows * UNIT_BYTES
    tables = window.rows * bits // 8 + reduction.pairs * 4
    return max(
        tile.total_bytes + weights + windows + tables,
        tile.slice_bytes(itemsize),
    )


def _raw_box_vectors(
    product: Product, row_tiles: RowTiles, tile: Tile, reduction: Reduction, arithmetic: Arithmetic
) -> int:
    """Of a box of the layer's own weights: see Box in raw_weights.cuh."""
    if not product.problem.transposed:
        return tile.block_m * (reduction.units * reduction.taps | 1)
    channels = 0  # that a block meets
    for phases in {row_tiles.full_phases, product.phases - row_tiles.full_phases} - {0}:
        whole, rest = divmod(tile.block_m, phases)
        channels = max(channels, whole + (2 if rest else 0))
    piece = channels * product.problem.K // arithmetic.channels + 2
    return reduction.units * arithmetic.channels * (piece | 1)


def _input_tasks(tile: Tile, window: Window, reduction: Reduction, arithmetic: Arithmetic) -> int:
    ahead = tile.units_ahead(window.access)
    return input_tasks(window.access, arithmetic, reduction.units, window.unit_tasks, ahead, tile.threads)


def has_units(array: ArrayLayout, extents: tuple[int, ...], unit: int) -> bool:
    """Whether the channels of an array are contiguous, and units of so many of them begin at multiples of 16 bytes."""
    (N, _, L), (stride_n, stride_c, stride_l) = extents, array.strides
    begins_unit = (stride_n % unit == 0 or N == 1) and (stride_l % unit == 0 or L == 1)
    return stride_c == 1 and begins_unit and array.alignment >= UNIT_BYTES


def stores_units(product: Product, layout: Layout, arithmetic: Arithmetic) -> bool:
    """Whether the output is stored by units of channels: where these are contiguous and rows of the product."""
    p, unit = product.problem, arithmetic.channels
    rows_are_channels = not (product.phases_in_rows and product.phases > 1)
    return rows_are_channels and p.C_out_g % unit == 0 and has_units(layout["output"], p.shapes["output"], unit)


def input_access(product: Product, layout: Layout, arithmetic: Arithmetic, bits: int, device: Device) -> Access:
    """How the layout lets the input be loaded.

    Units of channels, or of positions that are channels, where these are contiguous, every unit lies in 16 aligned
    bytes, and the architecture has asynchronous copies; else pairs of positions of 16 bits where these lie in one
    aligned word.
    """
    p, array, unit = product.problem, layout["input"], arithmetic.channels
    stride_n, stride_c, stride_l = array.strides
    begins_units = p.C_in_g % unit == 0
    if product.fold > 1:
        begins_units = (stride_c % unit == 0 or p.C_in == product.fold) and product.lead % unit == 0
        array = ArrayLayout((stride_n, stride_l, stride_l * product.fold), array.alignment)
    if device.arch >= ASYNC_COPY_ARCH and begins_units and has_units(array, p.shapes["input"], unit):
        return Access.UNIT
    if product.fold > 1:
        return Access.POSITION
    begins_even = (stride_n % 2 == 0 or p.N == 1) and (stride_c % 2 == 0 or p.C_in == 1) and array.alignment >= 4
    is_word = stride_l == 1 and begins_even and p.L_in % 2 == 0 and arithmetic.channels == 8 and bits == 32
    if p.padding_mode != "zeros" or p.has_lengths:  # positions outside mean other samples, or begin at any place
        return Access.POSITION
    return Access.PAIR if is_word and Window.pairs_positions(product) else Access.POSITION


def reads_raw_weights(product: Product, layout: Layout, arithmetic: Arithmetic, bits: int, access: Access) -> bool:
    """Whether blocks can read the layer's own weights: lines of whole vectors, which nothing has packed before.

    There are no such kernels for channels-last input, nor for positions that are channels.
    """
    if product.fold > 1:
        return False
    p, weight = product.problem, layout["weight"]
    is_contiguous = weight.strides == contiguous_strides(p.weight_shape) and weight.alignment == UNIT_BYTES
    has_whole_lines = p.weight_shape[1] * p.K % arithmetic.channels == 0
    has_rows = product.phases_in_rows or product.phases == 1
    can_read = is_contiguous and has_whole_lines and has_rows and bits == 32
    return can_read and access is not Access.UNIT and not layout.is_prepared


@lru_cache(maxsize=4096)
def compare_tilings(
    product: Product, arithmetic: Arithmetic, bits: int, access: Access, device: Device, *, raw: bool = False
) -> tuple[Tiling, ...]:
    """The tilings of a product that fit the device, the cheapest first.

    Args:
        product: of the problem.
        arithmetic: of its tensor cores.
        bits: of an index.
        access: as of `input_access`.
        device: the GPU.
        raw: as of `reads_raw_weights`.
    """
    reduction, samples = Reduction.of(product, arithmetic), product.problem.N
    found = []
    for tile, is_raw, apart in combined(
        tiles(arithmetic, bits, segments=reduction.segments > 1),
        (False, True) if raw else (False,),
        (False, True) if product.rows_differ else (False,),
    ):
        if is_raw and not tile.packs_weights:
            continue
        if product.rows_differ and tile.segment_mode == 2 and not apart:  # see run_block in mma.cuh
            continue
        row_tiles = product.row_tiles(tile.block_m, apart=apart)
        block_samples, block_positions = 1, tile.block_n
        if tile.has_samples:
            if product.problem.has_lengths:
                continue
            block_samples, block_positions = min(tile.block_n // product.positions, samples), product.positions
            if block_samples < 2:
                continue
        window = Window.of(product, block_samples, block_positions, access)
        needed = shared_bytes(product, tile, window, reduction, arithmetic, bits, row_tiles if is_raw else None)
        column_tiles = -(-product.positions // block_positions)
        sample_tiles = -(-samples // block_samples)
        blocks = row_tiles.total * column_tiles * sample_tiles * product.products
        if needed > device.shared_per_block or blocks * reduction.segments > MAX_GRID:
            continue
        if blocks * reduction.segments * tile.block_m * tile.block_n * 4 > MAX_PARTIAL_BYTES and tile.segment_mode == 2:
            continue
        us = _predict(product, tile, row_tiles, window, reduction, arithmetic, blocks, needed, device, is_raw=is_raw)
        found.append(Tiling(bits, tile, window, row_tiles, column_tiles, sample_tiles, blocks, needed, us, is_raw))
    return tuple(sorted(found, key=lambda tiling: tiling.us))


def _predict(
    product: Product,
    tile: Tile,
    row_tiles: RowTiles,
    window: Window,
    reduction: Reduction,
    arithmetic: Arithmetic,
    blocks: int,
    shared: int,
    device: Device,
    *,
    is_raw: bool,
) -> float:
    """Microseconds of a plan: the weights packed, the tiles multiplied, the sums of segments added."""
    p, is_cut = product.problem, tile.segment_mode == 2
    pairs = reduction.product_pairs(row_tiles)
    launch = TilesLaunch(
        arithmetic=arithmetic,
        blocks=blocks * (reduction.segments if is_cut else 1),
        weight_tiles=product.products * row_tiles.total * (reduction.segments if is_cut else 1),
        chunks=reduction.segment_chunks if is_cut else reduction.chunks,
        units=reduction.units,
        stages=pairs / (reduction.chunks * row_tiles.total * STAGE_PAIRS),
        samples=window.block_samples,
        used_rows=window.used_rows,
        window_rows=window.rows,
        tasks=_input_tasks(tile, window, reduction, arithmetic),
        block_m=tile.block_m,
        block_n=tile.block_n,
        warps_m=tile.warps_m,
        warps_n=tile.warps_n,
        has_samples=tile.has_samples,
        is_cut=is_cut,
        kept_segments=reduction.segments if tile.segment_mode == 1 else 0,
        access=window.access,
        raw_vectors=reduction.units * reduction.taps if is_raw else 0,
        is_scattered=product.fold > 1 and window.access is Access.POSITION,
        apart=product.phases if row_tiles.short else 1,
    )
    packed = product.products * pairs * tile.block_m
    resident = min(tile.min_blocks, max(1, blocks_by_shared(shared, device)))
    return predict_plan(
        launch,
        p,
        resident=resident,
        segments=reduction.segments,
        packed=packed,
        pack_blocks=-(-packed // mma_packing.BLOCK_SIZE),
        device=device,
    )


def _candidates(tilings: tuple[Tiling, ...]) -> tuple[tuple[str, float], ...]:
    """What `explain` shows of the comparison."""

    def name(t: Tiling) -> str:
        samples = t.window.block_samples
        cut = " by segments" if t.tile.segment_mode == 2 else ""
        raw = ", packing" if t.is_raw else ""
        apart = " of equal taps" if t.row_tiles.short else ""
        several = f" of {samples} samples" if samples > 1 else ""
        return f"{t.tile.block_m}x{t.tile.block_n}" + apart + several + cut + raw

    return tuple((name(t), t.us) for t in tilings)


def smallest_fits(product: Product, arithmetic: Arithmetic, device: Device) -> bool:
    """Whether the tile with the fewest columns fits the device, which does not depend on N or a length."""
    reduction = Reduction.of(product, arithmetic)
    tile = tiles(arithmetic, segments=reduction.segments > 1)[-1]
    window = Window.of(product, 1, tile.block_n)
    return shared_bytes(product, tile, window, reduction, arithmetic, 64) <= device.shared_per_block


def kernel_config(
    kernel: str,
    dtype: str,
    precision: str,
    tile: Tile,
    bits: int,
    device: Device,
    *,
    phases_in_rows: bool,
    segment_mode: int,
    access: Access = Access.POSITION,
    output_last: bool = False,
    is_raw: bool = False,
    folds: bool = False,
) -> Config:
    arithmetic = ARITHMETICS[dtype, precision]
    # The shared memory of Turing holds one block, seldom two; 64-bit offsets take twice the registers.
    caps_registers = bits == 32 and device.arch >= 80
    macros: dict[str, str | int] = {
        "DTYPE": dtype,
        "INDEX_BITS": bits,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "WARPS_M": tile.warps_m,
        "WARPS_N": tile.warps_n,
        "NUM_STAGES": NUM_STAGES,
        "STAGE_STEPS": STAGE_STEPS,
        "PREFETCH": tile.units_ahead(access),
        "INPUT_WIDTH": access.width,
        "HAS_SAMPLES": int(tile.has_samples),
        "MIN_BLOCKS": tile.min_blocks if caps_registers else 1,
        "IS_SPLIT": int(arithmetic.parts == 2),
        "SPLIT_TERMS": SPLIT_TERMS,
        "SEGMENT_MODE": segment_mode,
        "MULTIPLY_MATRICES": arithmetic.instruction,
        "PHASES_IN_ROWS": int(phases_in_rows),
        "PARAMS_BYTES": len(params_fields(kernel)) * bits // 8,
    }
    if access is Access.UNIT:
        macros["CHANNELS_LAST"] = 1
    if output_last:
        macros["OUTPUT_LAST"] = 1
    if is_raw:
        macros["RAW_WEIGHT"] = 1
    if folds:
        macros["FOLDS_STRIDE"] = 1
    return Config.of(kernel, macros)


def _accesses(
    arithmetic: Arithmetic, bits: int, device: Device, segment_mode: int, phases_in_rows: bool
) -> Iterator[tuple[Access, bool]]:
    """By which a kernel may load the input, and whether it then stores units."""
    loads_units = device.arch >= ASYNC_COPY_ARCH
    may_store_units = loads_units and bits == 32 and not phases_in_rows and segment_mode != 2
    yield Access.POSITION, False
    if segment_mode == 3:  # without an input
        if may_store_units:
            yield Access.POSITION, True
        return
    if arithmetic.channels == 8 and bits == 32:
        yield Access.PAIR, False
    if loads_units:
        yield Access.UNIT, False
    if may_store_units:
        yield Access.UNIT, True


def kernel_configs(kernel: str, device: Device, phases: tuple[bool, ...], *, transposed: bool) -> Iterator[Config]:
    """Every specialisation of a kernel and of its packing on a device."""
    for (dtype, precision), arithmetic in arithmetics(device).items():
        for phases_in_rows in phases:
            for bits in (32, 64):
                for tile in (*tiles(arithmetic, bits), *tiles(arithmetic, bits, segments=True)):
                    for mode in (2, 3) if tile.segment_mode == 2 else (tile.segment_mode,):
                        for access, output_last in _accesses(arithmetic, bits, device, mode, phases_in_rows):
                            may_fold = not transposed and access is not Access.PAIR
                            may_be_raw = tile.packs_weights and bits == 32 and access is not Access.UNIT
                            kinds = [(False, False)]
                            kinds += [(True, False)] if may_be_raw and not output_last else []
                            kinds += [(False, True)] if may_fold else []
                            for is_raw, folds in kinds:
                                yield kernel_config(
                                    kernel,
                                    dtype,
                                    precision,
                                    tile,
                                    bits,
                                    device,
                                    phases_in_rows=phases_in_rows,
                                    segment_mode=mode,
                                    access=access,
                                    output_last=output_last,
                                    is_raw=is_raw,
                                    folds=folds,
                                )
                yield mma_packing.units_config(
                    dtype, precision, bits, transposed=transposed, phases_in_rows=phases_in_rows
                )
                if not transposed:
                    yield mma_packing.config("pack_im2col_weight", dtype, precision, bits, IN_CHUNKS=1)


def round_stages(tasks: int, tile: Tile, reduction: Reduction) -> int:
    """Stages in which a batch of the next chunk's `tasks` arrives: as few rounds as leave one for every batch."""
    batches = -(-tasks // tile.threads)
    stages = max(1, -(-reduction.stages // batches))
    return stages if -(-reduction.stages // stages) >= batches else max(1, reduction.stages // batches)


def _tiling_params(reduction: Reduction, tiling: Tiling, arithmetic: Arithmetic) -> dict[str, int]:
    """The fields of Params that describe the order of summation and the tiles."""
    tasks = _input_tasks(tiling.tile, tiling.window, reduction, arithmetic)
    return {
        "column_tiles": tiling.column_tiles,
        "sample_tiles": tiling.sample_tiles,
        **reduction.params(),
        "num_tiles": tiling.blocks,
        "round_stages": round_stages(tasks, tiling.tile, reduction),
        **tiling.window.params(),
    }


def _own_params(product: Product, reduction: Reduction, row_tiles: RowTiles) -> dict[str, int]:
    """The tiles of rows, and the fields of Params of one kernel: of phases in rows, or positions as channels."""
    if product.problem.transposed:
        return mma_packing.row_params(reduction, row_tiles)
    fold_chunks = reduction.chunks * product.fold // product.problem.C_in_g
    folds = {"fold": product.fold, "fold_chunks": fold_chunks if product.fold > 1 else 0}
    return {"row_tiles": row_tiles.total, **folds}


def make_plan(
    problem: ConvProblem, layout: Layout, device: Device, product: Product, tilings: tuple[Tiling, ...], kernel: str
) -> Plan:
    """The weights packed, unless blocks do that, then a tensor-core kernel; where segments have blocks of their own,
    their sums added.
    """
    p, tiling = problem, tilings[0]
    tile, bits = tiling.tile, tiling.index_bits
    arithmetic = ARITHMETICS[p.dtype, p.precision]
    reduction = Reduction.of(product, arithmetic)
    params = params_of(
        kernel,
        conv_fields(p, layout),
        {
            **product.params(),
            **_tiling_params(reduction, tiling, arithmetic),
            **_own_params(product, reduction, tiling.row_tiles),
        },
    )

    # The rows of a single phase are channels, for which less code suffices.
    in_rows = product.phases_in_rows and product.phases > 1
    # With other input such output is rare, and would double the kernels.
    output_last = tiling.window.access is Access.UNIT and bits == 32 and stores_units(product, layout, arithmetic)

    def step(mode: int, grid: int, shared: int, *more: str) -> Step:
        config = kernel_config(
            kernel,
            p.dtype,
            p.precision,
            tile,
            bits,
            device,
            phases_in_rows=in_rows,
            segment_mode=mode,
            access=Access.POSITION if mode == 3 else tiling.window.access,  # the second launch reads no input
            output_last=output_last and mode != 2,
            is_raw=tiling.is_raw,
            folds=product.fold > 1,
        )
        config = with_padding_mode(config, p.padding_mode)
        arrays = conv_arrays(p, "weight" if tiling.is_raw else PACKED)
        return Step(config, Launch(grid, tile.threads, shared, bits, params), (*arrays, *more))

    steps: list[Step] = []
    scratch: list[tuple[str, int]] = []
    if not tiling.is_raw:
        if product.fold > 1:
            pack, packed_bytes = mma_packing.pack_taps(
                p,
                layout,
                row_tiles=tiling.row_tiles.total,
                block_rows=tile.block_m,
                pairs=reduction.chunks * reduction.pairs,
                units=reduction.units,
                fold_chunks=dict(params)["fold_chunks"],
            )
        else:
            pack, packed_bytes = mma_packing.pack_units(p, layout, product, reduction, tiling.row_tiles, tile.block_m)
        steps.append(pack)
        scratch.append((PACKED, packed_bytes))
    if tile.segment_mode < 2:
        steps.append(step(tile.segment_mode, tiling.blocks, tiling.shared_bytes))
    else:
        segment_blocks = tiling.blocks * reduction.segments
        steps.append(step(2, segment_blocks, tiling.shared_bytes, PARTIAL))
        steps.append(step(3, tiling.blocks, tile.slice_bytes(p.itemsize), PARTIAL))
        scratch.append((PARTIAL, segment_blocks * tile.block_m * tile.block_n * 4))
    return Plan(tuple(steps), tuple(scratch), _candidates(tilings))
