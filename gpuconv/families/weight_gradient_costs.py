"""How long the launches of weight_gradient_mma take: their part of the cost model."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..costs import (
    LINE_BYTES,
    MMA_LATENCY_CYCLES,
    SECTOR_BYTES,
    Code,
    Ending,
    Work,
    predict_launch,
    tensor_cores,
)
from ..device import Device
from ..problem import WeightGradientProblem
from .arithmetic import UNIT_BYTES, WARP, Arithmetic
from .base import round_up
from .mma_costs import LATENCY_CYCLES, LINES_PER_CYCLE
from .slices import Slices
from .weight_gradient_window import OCTET, PRODUCT_ROWS, STEP, Columns, Fetch

# From the machine code for sm_90 (bench.static): instructions of a lane for one load, with its address and its part in
# storing the vectors, by the positions that it loads; of a chunk besides its loads and steps; of a step besides its
# products and fetches; of a warp for one sum of each lane on its way out.
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


class GradientLaunch(NamedTuple):
    """A launch as far as its time depends on it: fields of the tile, the window and the tiling."""

    arithmetic: Arithmetic
    slices: Slices
    blocks: int
    chunk_samples: int
    chunk_positions: int
    window_rows: int
    columns: Columns
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
        """The chunks of a slice."""
        s = self.slices
        return -(-s.samples // self.chunk_samples) * -(-s.positions // self.chunk_positions)

    @property
    def terms(self) -> int:
        """Positions that a block multiplies, those of steps that reach beyond a slice included."""
        s = self.slices
        return s.samples * (self.chunk_positions if self.chunk_samples > 1 else round_up(s.positions, STEP))

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
        columns, itemsize, positions = self.columns, self.arithmetic.itemsize, self.slices.positions
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
        in_taps = self.columns.in_taps
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
        products = a.products * warp_m // PRODUCT_ROWS * warp_n // OCTET
        wavefronts = (warp_m + warp_n) * a.parts / 4  # 32 bytes of every row and column
        # ldmatrix fetches four wavefronts at a time; elements of 32 bits come one by one.
        fetches = wavefronts / 4 if a.itemsize == 2 else wavefronts
        passes = self.blocks * self.warps * steps
        code = Code(
            instructions=passes * (products + fetches + _STEP_INSTRUCTIONS) + work.staging_instructions,
            wavefronts=passes * wavefronts + work.staging_wavefronts,
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
