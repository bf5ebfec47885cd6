"""conv1d_narrow: few output channels a group, any stride and dilation; reads the input through the cache.

Contract: cuda_src/conv1d_narrow.cu.

It is for 5 to 8 output channels a group, with which most rows of a register tile would be empty: by the cost model
`htdemucs.dconv_k3_d2_48to6` takes 3.7 times as long with `conv1d_tiled` in float32 on an H200, and twice as long in
complex64. It also takes up to 4 output channels with a stride or a dilation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ..costs import Code, Work, cuda_cores, predict_launch
from ..device import Device
from ..problem import DTYPES, FORMATS, ConvProblem
from ..text import count
from .base import MAX_GRID, Config, Family, Layout, Plan, Refusal, Step, conv_fields, conv_plan
from .offsets import Overhang, index_bits

WARP = 32
BLOCK_SIZE = 128
# Output channels that a kernel computes; a layer with another number takes the next larger one.
ROWS = (2, 4, 6, 8)
# Columns of a thread by the size of the accumulator: as many as leave registers for pending loads, or one, where more
# would leave multiprocessors idle.
THREAD_L = {4: (4, 1), 8: (2, 1), 16: (1,)}
# Shared memory that a chunk of weights may take.
_CHUNK_BYTES = 16 * 1024
# Of the cost model: instructions of a term besides its multiply-adds, and of each of its columns (bench.static on
# sm_90); latency of loads from the cache divided by the terms that are loaded together; other cycles of a block.
_TERM_SLOTS, _COLUMN_SLOTS = 7.0, 1.0
_TERM_LATENCY = {1: 12.0, 2: 20.0, 4: 30.0}
_BLOCK_CYCLES = 2000.0


@dataclass(frozen=True, slots=True)
class Tiling:
    """A problem cut into blocks of threads with so many columns each, and the predicted microseconds of the launch."""

    thread_l: int
    blocks: int
    us: float


@lru_cache(maxsize=1024)
def _compare_tilings(problem: ConvProblem, device: Device, *, has_several: bool) -> tuple[Tiling, ...]:
    """The possible tilings, best first; `has_several`: whether threads may have several columns."""
    p = problem
    rows = _rows(p)
    size = p.format.accumulator_bytes
    tilings = []
    for thread_l in THREAD_L[size] if has_several else (1,):
        samples, columns = (p.N, p.L_out) if thread_l > 1 else (1, p.N * p.L_out)
        blocks = -(-columns // (BLOCK_SIZE * thread_l)) * samples * p.groups
        threads = blocks * BLOCK_SIZE
        fetches = rows * size / 16
        slots = rows * thread_l * p.format.multiply_adds + fetches + _COLUMN_SLOTS * thread_l + _TERM_SLOTS
        warp_terms = threads / WARP * p.C_in_g * p.K
        work = Work(
            multiply_adds=threads * rows * thread_l * p.C_in_g * p.K * p.format.multiply_adds,
            l2_bytes=p.bytes() + blocks * rows * p.C_in_g * p.K * p.itemsize,
            dram_bytes=p.bytes(),
            waits=_BLOCK_CYCLES,
        )
        code = Code(warp_terms * slots, warp_terms * (fetches + thread_l), p.C_in_g * p.K * _TERM_LATENCY[thread_l])
        time = predict_launch(
            work,
            code,
            blocks=blocks,
            resident=_min_blocks(p.dtype, rows, 32),
            unit=cuda_cores(device, size, is_complex=p.is_complex),
            device=device,
        )
        tilings.append(Tiling(thread_l, blocks, time.us))
    return tuple(sorted(tilings, key=lambda tiling: tiling.us))


def _rows(problem: ConvProblem) -> int:
    return next(rows for rows in ROWS if rows >= problem.C_out_g)


def _min_blocks(dtype: str, rows: int, bits: int) -> int:
    """Blocks that a multiprocessor must be able to hold, which caps the registers of a thread where these suffice."""
    return 4 if rows > 4 or bits == 64 or dtype == "complex128" else 6


class Conv1dNarrow(Family[ConvProblem]):
    """All output channels of a group in one thread, each position read once for all of them."""

    name = "conv1d_narrow"
    kind = "conv1d"

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        if p.C_out_g > ROWS[-1]:
            return Refusal(f"needs C_out/groups <= {ROWS[-1]}")
        # Offsets are formed for columns behind the last, and at the end for the term behind the last.
        overhang = Overhang(rows=ROWS[-1], channels=1, positions=4 * BLOCK_SIZE, taps=p.K)
        columns = (p.N * p.L_out + 4 * BLOCK_SIZE) * p.groups
        bits = index_bits(p, layout, overhang, columns, p.C_in_g * p.K + 2 * _CHUNK_BYTES)
        tilings = _compare_tilings(
            p, device, has_several=p.stride == 1 and layout["input"].strides[2] == 1 and bits == 32
        )
        tiling = tilings[0]
        if tiling.blocks > MAX_GRID:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        rows = _rows(p) if bits == 32 else ROWS[-1]
        row_bytes = rows * p.format.accumulator_bytes
        chunk_terms = max(1, min(p.C_in_g * p.K, _CHUNK_BYTES // row_bytes))
        fields = conv_fields(p, layout)
        tap_step = p.dilation * fields["input_stride_l"]
        candidates = tuple(
            (f"{count(_rows(p), 'channel')} by {count(t.thread_l, 'column')} a thread", t.us) for t in tilings
        )
        config = self._config(rows, tiling.thread_l, p.dtype, bits)
        return conv_plan(
            config,
            p,
            layout,
            bits,
            grid=tiling.blocks,
            block=BLOCK_SIZE,
            shared_bytes=chunk_terms * row_bytes,
            candidates=candidates,
            own={
                "column_blocks": tiling.blocks // (p.groups * (p.N if tiling.thread_l > 1 else 1)),
                "chunk_terms": chunk_terms,
                "tap_step": tap_step,
                "channel_step": fields["input_stride_c"] - (p.K - 1) * tap_step,
            },
        )

    def work(self, problem: ConvProblem, step: Step) -> Work:
        rows = int(dict(step.config.macros)["THREAD_C"])
        return Work(problem.flops() / 2 * rows / problem.C_out_g, problem.bytes())

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for rows in ROWS:
                for thread_l in THREAD_L[FORMATS[dtype].accumulator_bytes]:
                    yield self._config(rows, thread_l, dtype, 32)
            yield self._config(ROWS[-1], 1, dtype, 64)

    def _config(self, rows: int, thread_l: int, dtype: str, bits: int) -> Config:
        macros = {
            "BLOCK_SIZE": BLOCK_SIZE,
            "THREAD_C": rows,
            "THREAD_L": thread_l,
            "MIN_BLOCKS": _min_blocks(dtype, rows, bits),
        }
        return Config.for_dtype(self.name, dtype, bits, macros)
