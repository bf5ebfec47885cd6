"""conv1d_mma: dense and grouped layers on tensor cores.

Contract: cuda_src/conv1d_mma.cu.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..device import Device
from ..problem import ConvProblem
from . import mma
from .base import MAX_GRID, Config, Family, Layout, Plan, Refusal, index_bits, stride_params


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
        strides = stride_params(layout, ("out", "in"))
        bits = _index_bits(p, layout, strides, product, arithmetic)
        tilings = mma.compare_tilings(product, arithmetic, bits, device)
        if not tilings:
            return Refusal(f"needs at most {MAX_GRID} blocks")
        tiling = tilings[0]
        params = {
            "N": p.N,
            "L_in": p.L_in,
            "L_out": p.L_out,
            "K": p.K,
            "C_in_g": p.C_in_g,
            "C_out_g": p.C_out_g,
            "row_tiles": tiling.row_tiles,
            "column_tiles": tiling.column_tiles,
            "sample_tiles": tiling.sample_tiles,
            "stride": p.stride,
            "padding_left": p.padding_left,
            "dilation": p.dilation,
            **{name: stride for name, stride in strides.items() if not name.startswith("weight")},
        }
        return mma.make_plan(p, layout, device, product, tilings, self.name, bits, params, phases_in_rows=False)

    def configs(self, device: Device) -> Iterator[Config]:
        yield from mma.kernel_configs(self.name, device, (False,), transposed=False)


def _index_bits(
    p: ConvProblem, layout: Layout, strides: dict[str, int], product: mma.Product, arithmetic: mma.Arithmetic
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
        samples * abs(strides["output_stride_n"])
        + (p.C_out + mma.MAX_BLOCK_M) * abs(strides["output_stride_c"])
        + hanging * abs(strides["output_stride_l"]),
        samples * abs(strides["input_stride_n"])
        + (p.C_in + mma.MAX_UNITS * arithmetic.channels) * abs(strides["input_stride_c"])
        + span * abs(strides["input_stride_l"]),
        (p.C_out + mma.MAX_BLOCK_M) * abs(strides["bias_stride"]),
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
