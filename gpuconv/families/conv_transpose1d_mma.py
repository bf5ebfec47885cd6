"""conv_transpose1d_mma: dense and grouped transposed layers on tensor cores, each phase a stride-1 convolution.

Contract: cuda_src/conv_transpose1d_mma.cu.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..costs import Work
from ..device import Device
from ..problem import ConvProblem
from . import mma
from .base import MAX_GRID, Config, Family, Layout, Plan, Refusal, Step, conv_fields, index_bits
from .phases import Phases

# Taps that a phase lacks are packed as zeros, and multiplied; see also conv_transpose1d_phases.
MAX_PACKING = 4


class ConvTranspose1dMma(Family[ConvProblem]):
    """Tensor-core tiles over (c_out, phase) by (n, q)."""

    name = "conv_transpose1d_mma"
    kind = "conv_transpose1d"
    canonical_order = False

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p, phases = problem, Phases.of(problem)
        reason = mma.refuse_layer(p, phases.rows, device)
        if reason is not None:
            return Refusal(reason)
        if p.stride * phases.taps > MAX_PACKING * p.K:
            return Refusal(f"needs stride * taps of a phase <= {MAX_PACKING} * K")
        arithmetic = mma.ARITHMETICS[p.dtype, p.precision]
        product = _product(phases, arithmetic)
        if not mma.smallest_fits(product, arithmetic, device):
            return Refusal("needs the window of 16 positions in shared memory")
        fields = conv_fields(p, layout)
        bits = _index_bits(phases, layout, fields, product, arithmetic)
        tilings = mma.compare_tilings(product, arithmetic, bits, device)
        if not tilings:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        return mma.make_plan(
            p,
            layout,
            device,
            product,
            tilings,
            self.name,
            bits,
            phases_in_rows=phases.in_rows,
            positions=phases.positions,
            q_begin=phases.q_begin,
            taps=phases.taps,
        )

    def work(self, problem: ConvProblem, step: Step) -> Work:
        return mma.work(problem, step)

    def configs(self, device: Device) -> Iterator[Config]:
        yield from mma.kernel_configs(self.name, device, (False, True), transposed=True)


def _index_bits(
    phases: Phases, layout: Layout, fields: dict[str, int], product: mma.Product, arithmetic: mma.Arithmetic
) -> int:
    # As in conv1d_mma; and the products of residues of tap_step.
    p = phases.problem
    hanging = phases.q_begin + phases.positions + mma.MAX_BLOCK_N + 1
    span = hanging + p.dilation * p.K
    samples = p.N + mma.MAX_BLOCK_N // phases.positions  # a block takes several where they are short
    channels = p.C_out + mma.MAX_BLOCK_M
    return index_bits(
        p,
        layout,
        hanging * p.stride + p.padding_left + p.L_out,
        span + p.L_in,
        phases.positions * samples,
        phases.tap_step * phases.tap_step,
        phases.tap_step * p.dilation,
        (phases.taps + 1) * p.stride,
        channels * p.stride,
        samples * abs(fields["output_stride_n"])
        + channels * abs(fields["output_stride_c"])
        + hanging * p.stride * abs(fields["output_stride_l"]),
        samples * abs(fields["input_stride_n"])
        + (p.C_in + mma.MAX_UNITS * arithmetic.channels) * abs(fields["input_stride_c"])
        + span * abs(fields["input_stride_l"]),
        channels * abs(fields["bias_stride"]),
        mma.most_weight_vectors(product) * arithmetic.parts,
    )


def _product(phases: Phases, arithmetic: mma.Arithmetic) -> mma.Product:
    return mma.Product(
        products=phases.products,
        rows=phases.rows,
        samples=phases.problem.N,
        positions=phases.positions,
        column_step=1,
        tap_step=-phases.position_step,
        reduction=mma.Reduction.of(phases.problem.C_in_g, phases.taps, arithmetic),
    )
