"""small: all windows of a small problem side by side, for one product of each sample and group.

The time of a small problem is mostly the interpreter's. So this form takes few steps, each of which is one call of
NumPy on everything, and reads the arrays as they were given. A transposed problem is the convolution of its input, with
zeros between the samples, with its taps in reverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..problem import ConvProblem
from . import costs, limits
from .arrays import Array, Scratch, accumulator, is_finite
from .geometry import Call
from .taps import Taps


@dataclass(frozen=True, slots=True)
class Small:
    """One panel of all windows times the weight.

    The windows begin `step` positions from each other, the first at the first position of `length` ones. Of these,
    `places` hold the input from `inputs`, the others zeros.

    Attributes:
        safe: the form that computes the problem again.
        dtype: of the sums.
        offset: where the first window begins in an input that holds all positions, in elements; None where it does not.
        matrix, columns, sums: shapes of the factors and of the product, without the axes of a single sample and group.
    """

    name: ClassVar[str] = "small"
    reason: ClassVar[str] = "little work: all windows side by side at once, times the weight"
    concurrent: ClassVar[bool] = False

    problem: ConvProblem
    safe: Taps
    dtype: np.dtype[np.generic]
    step: int
    length: int
    offset: int | None
    inputs: slice
    places: slice
    matrix: tuple[int, ...]
    columns: tuple[int, ...]
    sums: tuple[int, ...]

    @classmethod
    def of(cls, p: ConvProblem) -> Small | None:
        """None where the work is worth that of the interpreter for smaller blocks."""
        dtype, depth = accumulator(p.dtype), p.C_in_g * p.K
        if p.C_out_g * depth * p.L_out > limits.small_product(p.is_complex):
            return None
        if p.N * p.groups * depth * p.L_out * dtype.itemsize > limits.SUMS:
            return None
        reach = (p.K - 1) * p.dilation
        # Position 0 is the first input, and the inputs lie `apart` from each other.
        step, apart, first = (1, p.stride, p.padding_left - reach) if p.transposed else (p.stride, 1, -p.padding_left)
        length = (p.L_out - 1) * step + reach + 1
        inputs = slice(max(0, -(-first // apart)), min(p.L_in, -(-(first + length) // apart)))
        if inputs.start >= inputs.stop or p.N * p.C_in * length * dtype.itemsize > limits.SUMS:
            return None
        at = inputs.start * apart - first
        places = slice(at, at + (inputs.stop - 1 - inputs.start) * apart + 1, apart)
        is_whole = apart == 1 and inputs.stop - inputs.start == length
        many = p.N > 1 or p.groups > 1
        groups, samples = (p.groups,) * many, (p.N,) * many
        matrix = (*groups, p.C_out_g, depth)
        columns, sums = (*samples, *groups, depth, p.L_out), (*samples, *groups, p.C_out_g, p.L_out)
        offset = first if is_whole else None
        form = cls(p, Taps.of(p), dtype, step, length, offset, inputs, places, matrix, columns, sums)
        return form if form.cost(p) < limits.SMALL_CALL else None

    def multiplies_zeros(self, p: ConvProblem) -> bool:
        return self.offset is None

    def cost(self, p: ConvProblem) -> float:
        size, products = costs.scale(p), p.N * p.groups
        depth, outputs = p.C_in_g * p.K, p.N * p.C_out * p.L_out
        cost = 5 * costs.CALL + costs.products(p, products, p.C_out_g, depth, p.L_out, True)
        copy = costs.COPY if self.step == 1 else costs.STRIDED_COPY
        cost += costs.copies(products * depth, p.L_out, copy * size)
        if self.offset is None or p.dtype in costs.CONVERT:
            rows = p.N * p.C_in
            cost += costs.CALL + costs.copies(rows, self.length, costs.COPY * size + costs.CONVERT.get(p.dtype, 0.0))
        if p.transposed or p.dtype in costs.CONVERT:
            cost += costs.CALL + costs.TRANSPOSING_COPY * size * p.C_out * depth
        if p.has_bias:
            cost += costs.CALL + costs.rows(products * p.C_out_g, p.L_out, costs.ELEMENTWISE * size)
        if p.dtype in costs.CONVERT:
            cost += costs.CALL + outputs * costs.CONVERT[p.dtype]
        return cost

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        """Bounds on the elements of the scratch buffers: what all threads share, and what each has by name."""
        buffers = {
            "panel": p.N * p.C_in * p.K * p.L_out,
            "input": p.N * p.C_in * self.length,
            "weight": p.C_out * p.C_in_g * p.K,
            "sums": p.N * p.C_out * p.L_out,
        }
        safe = self.safe.block_memory(p, p.N, p.groups, p.C_out_g, p.L_out)
        return 0, buffers | {name: max(buffers.get(name, 0), count) for name, count in safe.items()}

    def run(self, call: Call, workers: int) -> None:
        p, b = call.p, call.b
        w = call.w.swapaxes(1, 2) if p.transposed else call.w
        if b is not None and len(self.sums) == 2:
            b = b.reshape(-1)
        if not self.compute(call.x, w, b, call.y, call.finite):
            self.safe.run(call, 1)

    def compute(self, x: Array, w: Array, b: Array | None, y: Array, finite: bool = False) -> bool:
        """Compute the problem of arrays of any strides, with axes of channels or of groups and their channels.

        False where zeros would meet a NaN or an infinity, and `finite` does not say that there is none.
        """
        p, dtype, offset = self.problem, self.dtype, self.offset
        scratch = Scratch.borrow("blocks", dtype)
        flags = x.flags
        if offset is not None and flags.c_contiguous and flags.aligned and x.dtype == dtype:
            source, length = x, p.L_in
        else:
            source, length = scratch.take("input", p.N, p.groups, p.C_in_g, self.length), self.length
            if offset is None:
                source[...] = 0
            source[..., self.places] = x.reshape(p.N, p.groups, p.C_in_g, p.L_in)[..., self.inputs]
            offset = 0
        size = dtype.itemsize
        panel = scratch.take("panel", p.N, p.C_in, p.K, p.L_out)
        strides = (p.C_in * length * size, length * size, p.dilation * size, self.step * size)
        panel[...] = np.ndarray(panel.shape, dtype, source, offset * size, strides)
        flags = w.flags
        if flags.c_contiguous and flags.aligned and w.dtype == dtype and not p.transposed:
            packed = w
        else:
            packed = scratch.take("weight", p.groups, p.C_out_g, p.C_in_g, p.K)
            if p.transposed:
                packed[...] = w.reshape(p.groups, p.C_in_g, p.C_out_g, p.K).swapaxes(1, 2)[..., ::-1]
            else:
                packed[...] = w.reshape(packed.shape)
        flags = y.flags
        direct = flags.c_contiguous and flags.aligned and y.dtype == dtype
        sums = y.reshape(self.sums) if direct else scratch.take("sums", *self.sums)
        with np.errstate(all="ignore"):
            spoilt = self.offset is None and not finite and not is_finite(packed)
            if not spoilt:
                if len(self.sums) > 2:
                    np.matmul(packed.reshape(self.matrix), panel.reshape(self.columns), out=sums)
                elif p.C_out > 1:  # `dot` takes less time than `matmul`
                    np.dot(packed.reshape(self.matrix), panel.reshape(self.columns), out=sums)
                else:  # a row gives the bits of `matmul`, which sends it to another function of BLAS
                    np.dot(packed.reshape(-1), panel.reshape(self.columns), out=sums[0])
                if b is not None:
                    np.add(sums, b.astype(dtype, copy=False)[..., None], out=sums)
                if not direct:
                    y[...] = sums.reshape(y.shape)
        scratch.give_back("blocks")
        return not spoilt
