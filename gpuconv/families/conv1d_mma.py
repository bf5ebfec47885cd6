"""conv1d_mma: dense and grouped layers on tensor cores.

Contract: cuda_src/conv1d_mma.cu.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..costs import Work
from ..device import Device
from ..problem import ConvProblem
from . import mma
from .base import MAX_GRID, Config, Family, Layout, Plan, Refusal, Step, conv_fields, index_bits


class Conv1dMma(Family[ConvProblem]):
    """Tensor-core tiles over c_out by (n, l_out)."""

    name = "conv1d_mma"
    kind = "conv1d"
    canonical_order = False

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        reason = mma.refuse_layer(p, p.C_out_g, device)
        if reason is not None:
            return Refusal(reason)
        arithmetic, product = mma.ARITHMETICS[p.dtype, p.precision], _product(p)
        if not mma.smallest_fits(product, arithmetic, device):
            return Refusal("needs the window of 16 outputs in shared memory")
        fields = conv_fields(p, layout)
        bits = _index_bits(p, layout, fields, product, arithmetic)
        tilings = mma.compare_tilings(product, arithmetic, bits, device)
        if not tilings:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        return mma.make_plan(p, layout, device, product, tilings, self.name, bits, phases_in_rows=False)

    def work(self, problem: ConvProblem, step: Step) -> Work:
        return mma.work(problem, step)

    def configs(self, device: Device) -> Iterator[Config]:
        yield from mma.kernel_configs(self.name, device, (False,), transposed=False)


def _index_bits(
    p: ConvProblem, layout: Layout, fields: dict[str, int], product: mma.Product, arithmetic: mma.Arithmetic
) -> int:
    # Beyond the arrays the kernel forms positions and offsets of what hangs over the last position, sample and channel.
    hanging = p.L_out + mma.MAX_BLOCK_N
    span = hanging * p.stride + p.padding_left + p.dilation * p.K
    samples = p.N + mma.MAX_BLOCK_N // p.L_out  # a block takes several where they are short
    return index_bits(
        p,
        layout,
        span + p.L_in,
        hanging * samples,
        samples * abs(fields["output_stride_n"])
        + (p.C_out + mma.MAX_BLOCK_M) * abs(fields["output_stride_c"])
        + hanging * abs(fields["output_stride_l"]),
        samples * abs(fields["input_stride_n"])
        + (p.C_in + mma.MAX_UNITS * arithmetic.channels) * abs(fields["input_stride_c"])
        + span * abs(fields["input_stride_l"]),
        (p.C_out + mma.MAX_BLOCK_M) * abs(fields["bias_stride"]),
        mma.most_weight_vectors(product) * arithmetic.parts,
    )


def _product(problem: ConvProblem) -> mma.Product:
    p = problem
    return mma.Product(
        products=p.groups,
        rows=p.C_out_g,
        samples=p.N,
        positions=p.L_out,
        column_step=p.stride,
        tap_step=p.dilation,
        reduction=mma.Reduction.of(p.C_in_g, p.K, mma.ARITHMETICS[p.dtype, p.precision]),
    )
