"""The weights of tensor-core kernels packed by a launch of their own, before: one vector of 16 bytes a thread."""

from __future__ import annotations

from collections.abc import Mapping

from ..problem import ConvProblem
from ..source import params_fields
from .arithmetic import ARITHMETICS, UNIT_BYTES
from .base import MAX_GRID, PACKED, Config, Launch, Layout, Step, conv_fields, params_of
from .mma_window import Reduction
from .offsets import Overhang, index_bits
from .product import Product, RowTiles
from .weight_boxes import WeightBoxes

BLOCK_SIZE = 128


def config(kernel: str, dtype: str, precision: str, bits: int, **macros: int) -> Config:
    """The specialisation of a kernel that packs weights; `macros` are its own."""
    shared: dict[str, str | int] = {
        "DTYPE": dtype,
        "INDEX_BITS": bits,
        "BLOCK_SIZE": BLOCK_SIZE,
        "IS_SPLIT": int(ARITHMETICS[dtype, precision].parts == 2),
    }
    return Config.of(kernel, {**shared, **macros, "PARAMS_BYTES": len(params_fields(kernel)) * bits // 8})


def units_config(dtype: str, precision: str, bits: int, *, transposed: bool, phases_in_rows: bool) -> Config:
    macros = {"IS_TRANSPOSED": int(transposed), "PHASES_IN_ROWS": int(phases_in_rows)}
    return config("pack_mma_weight", dtype, precision, bits, **macros)


def row_params(reduction: Reduction, row_tiles: RowTiles) -> dict[str, int]:
    """The fields of Params that say where rows of phases and their packed weights lie."""
    return {
        "row_tiles": row_tiles.total,
        "full_phases": row_tiles.full_phases,
        "full_row_tiles": row_tiles.full,
        "short_pairs": reduction.short_pairs,
        "product_pairs": reduction.product_pairs(row_tiles),
    }


def _rows_covered(product: Product, row_tiles: RowTiles, block_rows: int) -> int:
    """Rows of the product, with all phases of each channel, that fill tiles of some of the phases."""
    phases = (row_tiles.full_phases, product.phases - row_tiles.full_phases)
    tiles = zip((row_tiles.full, row_tiles.short), phases, strict=True)
    return max(-(-count * block_rows * product.phases // held) for count, held in tiles if count)


def pack_units(
    problem: ConvProblem, layout: Layout, product: Product, reduction: Reduction, row_tiles: RowTiles, block_rows: int
) -> tuple[Step, int]:
    """The launch of pack_mma_weight, and the bytes that it writes."""
    p, arithmetic = problem, ARITHMETICS[problem.dtype, problem.precision]
    rows = row_params(reduction, row_tiles)
    num_vectors = product.products * rows["product_pairs"] * block_rows  # of one part
    # Neighbours in memory are the channels and taps of a row: those of a whole chunk if they fit.
    taps, channels = -(-reduction.pairs // reduction.units), arithmetic.channels
    fitting = WeightBoxes.max_terms(product) // (channels * taps)
    units = max(
        units for units in range(1, reduction.units + 1) if reduction.units % units == 0 and units <= max(1, fitting)
    )
    boxes = WeightBoxes.of(
        product,
        rows=_rows_covered(product, row_tiles, block_rows),
        channels=reduction.chunks * reduction.units * channels,
        taps=taps,
        box_channels=units * channels,
    )
    params = params_of(
        "pack_mma_weight",
        conv_fields(p, layout),
        {
            "block_rows": block_rows,
            "chunks": reduction.chunks,
            "units": reduction.units,
            "pairs": reduction.pairs,
            **rows,
            **boxes.params(layout),
        },
    )
    values = (abs(value) for _, value in params)
    bits = index_bits(p, layout, boxes.overhang, num_vectors * arithmetic.parts + block_rows, *values)
    own = units_config(p.dtype, p.precision, bits, transposed=p.transposed, phases_in_rows=product.phases_in_rows)
    launch = Launch(boxes.grid, BLOCK_SIZE, boxes.shared_bytes, bits, params)
    return Step(own, launch, ("weight", PACKED)), num_vectors * arithmetic.parts * UNIT_BYTES


def pack_taps(
    problem: ConvProblem,
    layout: Layout,
    *,
    row_tiles: int,
    block_rows: int,
    pairs: int,
    units: int = 0,
    fold_chunks: int = 0,
) -> tuple[Step, int]:
    """The launch of pack_im2col_weight, and the bytes that it writes.

    Args:
        problem: whose weights are packed.
        layout: of its arrays.
        row_tiles: blocks of rows of a group.
        block_rows: rows of each.
        pairs: of a row.
        units: of a chunk, where positions are channels.
        fold_chunks: chunks of a channel there, else 0.
    """
    tiles = {"row_tiles": row_tiles, "block_rows": block_rows}
    own = {**tiles, "pairs": pairs, "units": units, "fold_chunks": fold_chunks}
    num_vectors = problem.groups * row_tiles * pairs * block_rows
    return pack_in_order("pack_im2col_weight", problem, layout, num_vectors, own, IN_CHUNKS=int(fold_chunks > 0))


def pack_in_order(
    kernel: str, problem: ConvProblem, layout: Layout, num_vectors: int, own: Mapping[str, int], **macros: int
) -> tuple[Step, int]:
    """The launch of a kernel that packs the taps in the direction of the input, and the bytes that it writes.

    Args:
        kernel: its name.
        problem: whose weights are packed.
        layout: of its arrays.
        num_vectors: that it writes of each part.
        own: fields of Params besides, or in place of, those that say where the taps lie.
        macros: of the kernel alone.
    """
    p, parts, fields = problem, ARITHMETICS[problem.dtype, problem.precision].parts, conv_fields(problem, layout)
    grid = min(-(-num_vectors // BLOCK_SIZE), MAX_GRID)
    stride_k = fields["weight_stride_k"]
    of_group = p.C_in_g * fields["weight_stride_in"] if p.transposed else p.C_out_g * fields["weight_stride_out"]
    taps = {
        "num_vectors": num_vectors,
        "weight_first": (p.K - 1) * stride_k if p.transposed else 0,
        "weight_stride_g": of_group,
        "weight_stride_k": -stride_k if p.transposed else stride_k,
    }
    bits = index_bits(p, layout, Overhang(), num_vectors * parts + grid * BLOCK_SIZE, abs(of_group))
    launch = Launch(grid, BLOCK_SIZE, 0, bits, params_of(kernel, fields, {**taps, **own}))
    step = Step(config(kernel, p.dtype, p.precision, bits, **macros), launch, ("weight", PACKED))
    return step, num_vectors * parts * UNIT_BYTES
