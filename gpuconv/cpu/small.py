"""small: all windows of a small problem side by side, for one product for each sample and group.

The time of a small problem is mostly the interpreter's. So this form has few steps, each of which is one NumPy call on
the whole problem, and reads the arrays as they were given. A transposed problem is computed as a convolution of its
input, with zeros between the samples, and reversed taps.
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

    Windows read a row of positions. At `places` these hold the input, or its slice `inputs`; all others are zero.

    Attributes:
        transposed: the taps are reversed, and the first axes of the weight swapped.
        safe: the form that computes the problem again.
        dtype: of the sums.
        offset: if the input holds all positions, where the first window begins in it, in elements; otherwise None.
        staged, panel: the shapes (N, C_in, positions) and (N, C_in, K, L_out).
        input_windows, staged_windows: the strides in bytes of the panel as a view of either.
        given, packed: shapes of the weight with the groups split off, and (groups, C_out_g, C_in_g, K).
        matrix, columns, sums: shapes of the factors and of the product, without the axes of a single sample and group.
    """

    name: ClassVar[str] = "small"
    reason: ClassVar[str] = "little work: all windows side by side at once, times the weight"
    concurrent: ClassVar[bool] = False

    transposed: bool
    safe: Taps
    dtype: np.dtype[np.generic]
    offset: int | None
    inputs: slice | None
    places: slice
    staged: tuple[int, ...]
    panel: tuple[int, ...]
    input_windows: tuple[int, ...]
    staged_windows: tuple[int, ...]
    given: tuple[int, ...]
    packed: tuple[int, ...]
    matrix: tuple[int, ...]
    columns: tuple[int, ...]
    sums: tuple[int, ...]

    @classmethod
    def of(cls, p: ConvProblem) -> Small | None:
        """None where the problem is so large that smaller blocks pay."""
        N, G, C, M, K, Q = p.N, p.groups, p.C_in_g, p.C_out_g, p.K, p.L_out
        dtype, reach = accumulator(p.dtype), (K - 1) * p.dilation
        if limits.small_product(p.is_complex) < M * C * K * Q or N * p.C_in * K * Q * dtype.itemsize > limits.SUMS:
            return None
        # Position 0 is the first input, and the distance between inputs is `apart`.
        step, apart, first = (1, p.stride, p.padding_left - reach) if p.transposed else (p.stride, 1, -p.padding_left)
        length = (Q - 1) * step + reach + 1
        inputs = slice(max(0, -(-first // apart)), min(p.L_in, -(-(first + length) // apart)))
        if inputs.start >= inputs.stop or N * p.C_in * length * dtype.itemsize > limits.SUMS:
            return None
        at = inputs.start * apart - first
        places = slice(at, at + (inputs.stop - 1 - inputs.start) * apart + 1, apart)
        is_whole = apart == 1 and inputs.stop - inputs.start == length
        input_windows, staged_windows = (
            tuple(size * dtype.itemsize for size in (p.C_in * row, row, p.dilation, step)) for row in (p.L_in, length)
        )
        samples, groups = ((N,), (G,)) if N > 1 or G > 1 else ((), ())
        form = cls(
            p.transposed, Taps.of(p), dtype, first if is_whole else None,
            None if inputs == slice(0, p.L_in) else inputs, places, (N, p.C_in, length), (N, p.C_in, K, Q),
            input_windows, staged_windows,
            (G, C, M, K) if p.transposed else (G, M, C, K), (G, M, C, K),
            (*groups, M, C * K), (*samples, *groups, C * K, Q), (*samples, *groups, M, Q),
        )  # fmt: skip
        return form if form.cost(p) < limits.SMALL_CALL else None

    def multiplies_zeros(self, p: ConvProblem) -> bool:
        return self.offset is None

    def cost(self, p: ConvProblem) -> float:
        size, products, depth = costs.scale(p), p.N * p.groups, p.C_in_g * p.K
        convert = costs.CONVERT.get(p.dtype, 0.0)
        cost = 5 * costs.CALL + costs.products(p, products, p.C_out_g, depth, p.L_out, True)
        copy = costs.COPY if p.stride == 1 or p.transposed else costs.STRIDED_COPY
        cost += costs.copies(products * depth, p.L_out, copy * size)
        if self.offset is None or convert:
            cost += costs.CALL + costs.copies(p.N * p.C_in, self.staged[2], costs.COPY * size + convert)
        if p.transposed or convert:
            cost += costs.CALL + costs.TRANSPOSING_COPY * size * p.C_out * depth
        if p.has_bias:
            cost += costs.CALL + costs.rows(products * p.C_out_g, p.L_out, costs.ELEMENTWISE * size)
        return cost + (costs.CALL + p.N * p.C_out * p.L_out * convert if convert else 0.0)

    def memory(self, p: ConvProblem) -> tuple[int, dict[str, int]]:
        """Bounds on the elements of the scratch buffers: what all threads share, and what each has by name."""
        buffers = {
            "input": p.N * p.C_in * self.staged[2],
            "panel": p.N * p.C_in * p.K * p.L_out,
            "weight": p.C_out * p.C_in_g * p.K,
            "sums": p.N * p.C_out * p.L_out,
        }
        safe = self.safe.block_memory(p, p.N, p.groups, p.C_out_g, p.L_out)
        return 0, buffers | {name: max(buffers.get(name, 0), count) for name, count in safe.items()}

    def run(self, call: Call, workers: int) -> None:
        b = call.b
        w = call.w.swapaxes(1, 2) if self.transposed else call.w
        if b is not None and len(self.sums) == 2:
            b = b.reshape(-1)
        if not self.compute(call.x.reshape(*self.staged[:2], -1), w, b, call.y, call.finite):
            self.safe.run(call, 1)

    def compute(self, x: Array, w: Array, b: Array | None, y: Array, finite: bool = False) -> bool:
        """Compute the problem on arrays of any strides, with groups as an axis (those of `Call`) or without (a user's).

        Returns False, without a result, if a NaN or an infinity would be multiplied by zero. `finite` says that there
        are none.
        """
        dtype, offset, windows = self.dtype, self.offset, self.input_windows
        scratch = Scratch.borrow("blocks 0", dtype)
        flags, source = x.flags, x
        if offset is None or not (flags.c_contiguous and flags.aligned and x.dtype == dtype):
            source, windows = scratch.take("input", *self.staged), self.staged_windows
            if offset is None:
                source[...] = 0
            source[..., self.places] = x if self.inputs is None else x[..., self.inputs]
            offset = 0
        panel = scratch.take("panel", *self.panel)
        panel[...] = np.ndarray(self.panel, dtype, source, offset * dtype.itemsize, windows)
        flags, packed = w.flags, w
        if self.transposed or not (flags.c_contiguous and flags.aligned and w.dtype == dtype):
            packed, w = scratch.take("weight", *self.packed), w.reshape(self.given)
            packed[...] = w.swapaxes(1, 2)[..., ::-1] if self.transposed else w
        flags = y.flags
        direct = flags.c_contiguous and flags.aligned and y.dtype == dtype
        sums = y.reshape(self.sums) if direct else scratch.take("sums", *self.sums)
        with np.errstate(all="ignore"):
            spoilt = self.offset is None and not finite and not is_finite(packed)
            if not spoilt:
                matrix, columns = packed.reshape(self.matrix), panel.reshape(self.columns)
                if sums.ndim > 2:
                    np.matmul(matrix, columns, out=sums)
                elif len(matrix) > 1:  # `dot` takes less time than `matmul`
                    matrix.dot(columns, sums)
                else:  # for a single row `matmul` calls another function of BLAS; this gives the same bits
                    matrix[0].dot(columns, sums[0])
                if b is not None:
                    np.add(sums, b.astype(dtype, copy=False)[..., None], out=sums)
                if not direct:
                    y[...] = sums.reshape(y.shape)
        scratch.give_back("blocks 0")
        return not spoilt
