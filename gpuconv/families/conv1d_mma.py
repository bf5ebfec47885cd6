"""conv1d_mma: dense and grouped layers on tensor cores.

Contract: cuda_src/conv1d_mma.cu.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..device import Device
from ..problem import ConvProblem
from . import mma
from .base import MAX_GRID, Config, Family, Launch, Layout, Pack, SecondPass, index_bits, stride_params


class Conv1dMma(Family):
    """Tensor-core tiles over c_out by (n, l_out)."""

    name = "conv1d_mma"
    op = "conv1d"
    canonical_order = False

    def refuse(self, problem: ConvProblem, layout: Layout, device: Device) -> str | None:
        reason = mma.refuse_layer(problem, problem.C_out_g, device)
        if reason is not None:
            return reason
        if not mma.smallest_fits(_product(problem), mma.ARITHMETICS[problem.dtype, problem.precision], device):
            return "needs the window of 16 outputs in shared memory"
        if not self._tilings(problem, layout, device):
            return f"needs at most {MAX_GRID} blocks"
        return None

    def configure(self, problem: ConvProblem, layout: Layout, device: Device) -> tuple[Config, Launch]:
        p = problem
        tiling, product = self._tilings(p, layout, device)[0], _product(p)
        strides = stride_params(layout, ("out", "in"))
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
            **mma.tiling_params(product, tiling),
        }
        bits = self._index_bits(p, layout)
        mode = tiling.tile.segment_mode
        config = mma.kernel_config(
            self.name, p.dtype, p.precision, tiling.tile, bits, device, phases_in_rows=False, segment_mode=mode
        )
        return config, mma.launch(tiling, product, bits, params)

    def second_pass(self, problem: ConvProblem, layout: Layout, device: Device) -> SecondPass | None:
        tiling, product = self._tilings(problem, layout, device)[0], _product(problem)
        if tiling.tile.segment_mode < 2:
            return None
        return mma.second_pass(*self.configure(problem, layout, device), product, tiling, problem.itemsize)

    def pack(self, problem: ConvProblem, layout: Layout, device: Device) -> Pack:
        tile = self._tilings(problem, layout, device)[0].tile
        arithmetic = mma.ARITHMETICS[problem.dtype, problem.precision]
        return mma.make_pack(problem, layout, _product(problem), tile, arithmetic, phases_in_rows=False)

    def figures(self, problem: ConvProblem, layout: Layout, device: Device) -> tuple[tuple[str, float], ...]:
        return mma.tiling_figures(self._tilings(problem, layout, device))

    def configs(self, device: Device) -> Iterator[Config]:
        yield from mma.kernel_configs(self.name, device, (False,), transposed=False)

    def _tilings(self, problem: ConvProblem, layout: Layout, device: Device) -> tuple[mma.Tiling, ...]:
        bits = self._index_bits(problem, layout)
        return mma.compare_tilings(_product(problem), mma.ARITHMETICS[problem.dtype, problem.precision], bits, device)

    def _index_bits(self, problem: ConvProblem, layout: Layout) -> int:
        # Beyond the arrays the kernel forms positions and offsets of what hangs over the last position, sample and
        # channel.
        p = problem
        strides = stride_params(layout, ("out", "in"))
        arithmetic, product = mma.ARITHMETICS[p.dtype, p.precision], _product(p)
        hanging = p.L_out + mma.MAX_BLOCK_N
        span = hanging * p.stride + p.padding_left + p.dilation * p.K
        samples = p.N + mma.MAX_BLOCK_N // p.L_out  # a block takes several where they are short
        vectors = mma.most_weight_vectors(product)
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
            vectors * arithmetic.parts,
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
