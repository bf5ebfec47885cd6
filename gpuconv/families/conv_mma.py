"""conv1d_mma and conv_transpose1d_mma: dense and grouped layers on tensor cores.

Contracts: cuda_src/conv1d_mma.cu, cuda_src/conv_transpose1d_mma.cu.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..costs import Work
from ..device import Device
from ..problem import ConvProblem
from . import mma, mma_costs
from .arithmetic import ARITHMETICS, Access, Arithmetic
from .base import MAX_GRID, Config, Family, Layout, Plan, Refusal, Step
from .mma_tiles import MAX_BLOCK_M, MAX_BLOCK_N
from .mma_window import MAX_UNITS, Reduction
from .offsets import Overhang, index_bits
from .product import Product

# Taps that a phase lacks are packed as zeros and multiplied, so there may not be too many; see also conv_tiled.py.
MAX_PACKING = 4


class _ConvMma(Family[ConvProblem]):
    canonical_order = False
    keeps_lengths = True

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p, product = problem, mma.product_of(problem)
        reason = mma.refuse_layer(product.problem, product.rows, device)
        if reason is not None:
            return Refusal(reason)
        if product.phases * product.taps > MAX_PACKING * p.K:
            return Refusal(f"needs stride * taps of a phase <= {MAX_PACKING} * K")
        arithmetic = ARITHMETICS[p.dtype, p.precision]
        if not mma.smallest_fits(product, arithmetic, device):
            return Refusal("needs the window of 16 positions in shared memory")
        bits = _index_bits(p, product, layout, arithmetic)
        access = mma.input_access(product, layout, arithmetic, bits, device)
        raw = mma.reads_raw_weights(product, layout, arithmetic, bits, access)
        # The rows that pairs and units need besides may be too many.
        tilings = mma.compare_tilings(product, arithmetic, bits, access, device, raw=raw) or mma.compare_tilings(
            product, arithmetic, bits, Access.POSITION, device, raw=raw
        )
        if not tilings:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        return mma.make_plan(p, layout, device, product, tilings, self.name)

    def staging(self, step: Step) -> dict[str, str]:
        macros = dict(step.config.macros)
        access = mma_costs.access_of(step)
        is_folded = dict(step.launch.params).get("fold", 1) > 1
        words = "16 bytes of contiguous positions" if is_folded and access is Access.UNIT else access.words
        found = {} if macros["SEGMENT_MODE"] == "3" else {"input": words}
        return found | ({"output": Access.UNIT.words} if "OUTPUT_LAST" in macros else {})

    def work(self, problem: ConvProblem, step: Step) -> Work:
        return mma_costs.work(problem, step)


class Conv1dMma(_ConvMma):
    """Tensor-core tiles over c_out by (n, l_out)."""

    name = "conv1d_mma"
    kind = "conv1d"
    maps_edges = True

    def configs(self, device: Device) -> Iterator[Config]:
        yield from mma.kernel_configs(self.name, device, (False,), transposed=False)


class ConvTranspose1dMma(_ConvMma):
    """Tensor-core tiles over (c_out, phase) by (n, q)."""

    name = "conv_transpose1d_mma"
    kind = "conv_transpose1d"

    def configs(self, device: Device) -> Iterator[Config]:
        yield from mma.kernel_configs(self.name, device, (False, True), transposed=True)


def _index_bits(problem: ConvProblem, product: Product, layout: Layout, arithmetic: Arithmetic) -> int:
    p, reduction = problem, Reduction.of(product, arithmetic)
    # What hangs over the last position, sample and channel; a block takes several samples where they are short.
    samples = MAX_BLOCK_N // product.positions
    overhang = Overhang(samples + 1, rows=MAX_BLOCK_M, channels=MAX_UNITS * arithmetic.channels, positions=MAX_BLOCK_N)
    columns = (product.positions + MAX_BLOCK_N) * (p.N + samples)
    vectors = product.products * reduction.chunks * reduction.pairs * (product.rows + 2 * MAX_BLOCK_M)
    return index_bits(p, layout, overhang, columns, vectors * arithmetic.parts, (p.C_out + MAX_BLOCK_M) * p.stride)
