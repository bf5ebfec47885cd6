"""conv1d_skinny: few columns (n, l_out); the weights are streamed through shared memory.

Contract: cuda_src/conv1d_skinny.cu.

It is for streams and other layers of few output positions that tensor cores do not compute: float64, complex data, and
float32 before sm_80. By the cost model such layers (`mimi.enc_down_k16s8_stream`, `diffusion_policy.mid`) take 3 to 6
times as long with register tiles on an H200.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ..costs import FMA_LATENCY_CYCLES, Code, Work, blocks_by_shared, cuda_cores, predict_launch
from ..device import Device
from ..problem import DTYPES, FORMATS, ConvProblem
from ..text import count
from .base import MAX_GRID, Config, Family, Layout, Plan, Refusal, Step, conv_plan
from .offsets import Overhang, index_bits

WARP = 32
# Columns of a block and of each of its threads, which multiplies every weight that it reads by all its columns. Two
# chains of multiply-adds and the loads that feed them still fit in the four cycles that one step of a chain takes.
COLUMNS = {1: 1, 2: 2, 4: 2, 8: 2, 16: 4}
MAX_COLUMNS = max(COLUMNS)
# The number of buffers; each has a warp that fills it.
NUM_STAGES = 4
ROWS = (1, 2, 4, 8, 16, 32)
CHUNKS = (16, 32, 64, 128, 256, 512)  # terms of a buffer

# Of the cost model, in cycles: the latency of a load while memory is busy; the barrier and the first fetch of a chunk;
# the start and the end of a block.
_MEMORY_CYCLES = 1000.0
_CHUNK_CYCLES = 80.0
_LATENCY_CYCLES = 2000.0
# Threads that a multiprocessor holds at 128 registers each.
_RESIDENT_THREADS = 512
# Instructions of a lane to find a term, and to load one of its positions.
_TERM_SLOTS, _POSITION_SLOTS = 8.0, 7.0


@dataclass(frozen=True, slots=True)
class Tiling:
    """A problem cut into blocks of rows.

    Attributes:
        block_n: columns of a block, BLOCK_N.
        block_rows: rows of a block.
        chunk_terms: terms of a buffer.
        compute_warps: warps that multiply.
        blocks: those of all groups.
        shared_bytes: dynamic shared memory of a block.
        us: predicted microseconds of the launch.
    """

    block_n: int
    block_rows: int
    chunk_terms: int
    compute_warps: int
    blocks: int
    shared_bytes: int
    us: float

    @property
    def threads(self) -> int:
        return WARP * (self.compute_warps + NUM_STAGES)

    @classmethod
    def of(cls, p: ConvProblem, device: Device, block_n: int, block_rows: int, chunk_terms: int) -> Tiling | None:
        """None where the buffers do not fit in shared memory."""
        size = p.format.accumulator_bytes
        thread_n = COLUMNS[block_n]
        terms = p.C_in_g * p.K
        stage_bytes = block_rows * (chunk_terms * p.itemsize + 16) + block_n * (chunk_terms * size + 16)
        shared = NUM_STAGES * stage_bytes
        if shared > device.shared_per_block:
            return None

        warps = -(-block_rows * (block_n // thread_n) // WARP)
        blocks = -(-p.C_out_g // block_rows) * p.groups
        each = -(-blocks // device.num_sms)
        threads = WARP * (warps + NUM_STAGES)
        resident = max(1, min(each, _RESIDENT_THREADS // threads, blocks_by_shared(shared, device)))

        multiply_adds = thread_n * p.format.multiply_adds
        fetches = p.itemsize / 16 + thread_n * size / 16
        loads = _TERM_SLOTS + _POSITION_SLOTS * block_n + 2 * block_rows * p.itemsize / 16  # of a loading warp
        work = Work(
            multiply_adds=blocks * terms * WARP * warps * multiply_adds,
            l2_bytes=blocks * terms * (block_rows + block_n) * p.itemsize,
            dram_bytes=p.bytes(),
            waits=-(-terms // chunk_terms) * _CHUNK_CYCLES + _LATENCY_CYCLES,
        )
        code = Code(
            instructions=blocks * terms * (warps * (multiply_adds + fetches) + loads / WARP),
            wavefronts=blocks * terms * warps * 4 * fetches,  # a fetch of 16 bytes by a warp is four
            chain=terms
            * max(FMA_LATENCY_CYCLES * (2 if p.is_complex else 1), _MEMORY_CYCLES / ((NUM_STAGES - 1) * chunk_terms)),
        )
        unit = cuda_cores(device, size, is_complex=p.is_complex)
        time = predict_launch(work, code, blocks=blocks, resident=resident, unit=unit, device=device)
        return cls(block_n, block_rows, chunk_terms, warps, blocks, shared, time.us)


@lru_cache(maxsize=1024)
def _compare_tilings(problem: ConvProblem, device: Device, block_n: int) -> tuple[Tiling, ...]:
    """The possible tilings, best first."""
    p = problem
    largest = next((rows for rows in ROWS if rows >= p.C_out_g), ROWS[-1])
    longest = next((chunk for chunk in CHUNKS if chunk >= p.C_in_g * p.K), CHUNKS[-1])
    tilings = [
        Tiling.of(p, device, block_n, rows, chunk)
        for rows in ROWS
        for chunk in CHUNKS
        if rows <= largest and chunk <= longest
    ]
    return tuple(sorted((tiling for tiling in tilings if tiling is not None), key=lambda tiling: tiling.us))


class Conv1dSkinny(Family[ConvProblem]):
    """Few rows a block, so that every multiprocessor always has weights to read."""

    name = "conv1d_skinny"
    kind = "conv1d"

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        columns = p.N * p.L_out
        if columns > MAX_COLUMNS:
            return Refusal(f"needs N * L_out <= {MAX_COLUMNS}")
        # The last chunk may extend past the last term. Offsets of positions are formed before they are checked.
        overhang = Overhang(rows=ROWS[-1], channels=MAX_COLUMNS * WARP + 1, positions=0)
        if index_bits(p, layout, overhang, p.C_in_g * p.K + (NUM_STAGES + 1) * CHUNKS[-1]) == 64:
            return Refusal("needs offsets below 2**31")
        tilings = _compare_tilings(p, device, next(block_n for block_n in COLUMNS if block_n >= columns))
        if not tilings:
            return Refusal(f"needs buffers that fit in {device.shared_per_block} bytes of shared memory")
        tiling = tilings[0]
        if tiling.blocks > MAX_GRID:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        candidates = tuple(
            (
                f"{count(t.block_rows, 'row')} by {count(t.block_n, 'column')}, "
                f"{count(t.chunk_terms, 'term')} at a time",
                t.us,
            )
            for t in tilings
        )
        return conv_plan(
            self._config(tiling.block_n, p.dtype),
            p,
            layout,
            32,
            grid=tiling.blocks,
            block=tiling.threads,
            shared_bytes=tiling.shared_bytes,
            candidates=candidates,
            own={
                "columns": columns,
                "row_blocks": tiling.blocks // p.groups,
                "block_rows": tiling.block_rows,
                "compute_warps": tiling.compute_warps,
                "chunk_terms": tiling.chunk_terms,
                "vector_weights": int(self._has_vector_weights(p, layout)),
            },
        )

    def work(self, problem: ConvProblem, step: Step) -> Work:
        # Few warps multiply, some lanes may be idle, and a chain of multiply-adds hides the loads of its operands.
        p, launch, macros = problem, step.launch, dict(step.config.macros)
        terms, warps = p.C_in_g * p.K, launch.grid * dict(launch.params)["compute_warps"]
        lane_sums = int(macros["THREAD_N"]) * (4 if p.is_complex else 1)
        input_bytes = launch.grid * terms * int(macros["BLOCK_N"]) * p.itemsize
        return Work(WARP * warps * terms * lane_sums, p.bytes() + input_bytes, warps, load_share=0.0)

    def configs(self, device: Device) -> Iterator[Config]:
        for dtype in DTYPES:
            for block_n in COLUMNS:
                yield self._config(block_n, dtype)

    def _has_vector_weights(self, problem: ConvProblem, layout: Layout) -> bool:
        p, weight = problem, layout["weight"]
        vec = 16 // p.itemsize
        is_contiguous = weight.strides[1:] == (p.K, 1)
        return is_contiguous and weight.alignment == 16 and p.C_in_g * p.K % vec == 0 and weight.strides[0] % vec == 0

    def _config(self, block_n: int, dtype: str) -> Config:
        macros = {
            "BLOCK_N": block_n,
            "THREAD_N": COLUMNS[block_n],
            "NUM_STAGES": NUM_STAGES,
            "DTYPE_BYTES": FORMATS[dtype].itemsize,
            "MAX_THREADS": WARP * (block_n // COLUMNS[block_n] * ROWS[-1] // WARP + NUM_STAGES),
            # Caps the registers of a thread where they suffice.
            "MIN_BLOCKS": 1 if dtype == "complex128" or block_n == MAX_COLUMNS else 2,
        }
        return Config.for_dtype(self.name, dtype, 32, macros)
