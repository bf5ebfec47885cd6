"""Random convolution problems for hypothesis, with their data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from gpuconv.problem import DTYPES, ArraySpec, ConvProblem, Op, numpy_dtype


@dataclass(frozen=True)
class Call:
    """One call of `conv1d` or `conv_transpose1d`.

    Attributes:
        op: which of the two.
        input_shape: (N, C_in, L_in) or (C_in, L_in).
        weight_shape: as the operation wants it.
        has_bias: whether a bias is passed.
        dtype: of all arrays.
        settings: the keyword arguments, as a user writes them.
        resolved: what they mean, worked out beside the library: padding_left, padding_right and output_padding.
        seed: of the data.
    """

    op: Op
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, int, int]
    has_bias: bool
    dtype: str
    settings: dict[str, Any]
    resolved: dict[str, int]
    seed: int = field(compare=False)

    @property
    def C_out(self) -> int:
        return self.weight_shape[0] if self.op == "conv1d" else self.weight_shape[1] * self.settings["groups"]

    def arrays(self, kind: str = "normal") -> list[npt.NDArray[Any] | None]:
        """Input, weight and bias: "normal" deviates, or "eighths", whose sums of products are exact in float64."""
        rng = np.random.default_rng(self.seed)
        shapes = (self.input_shape, self.weight_shape, (self.C_out,) if self.has_bias else None)
        return [None if shape is None else random_array(rng, shape, self.dtype, kind) for shape in shapes]

    def problem(self) -> ConvProblem:
        bias = ArraySpec((self.C_out,), self.dtype) if self.has_bias else None
        x, w = ArraySpec(self.input_shape, self.dtype), ArraySpec(self.weight_shape, self.dtype)
        return ConvProblem.of(self.op, x, w, bias, **self.settings)


def random_array(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str, kind: str = "normal"
) -> npt.NDArray[Any]:
    def part() -> npt.NDArray[np.float64]:
        return rng.standard_normal(shape) if kind == "normal" else rng.integers(-32, 33, shape) / 8

    values = part() + 1j * part() if dtype.startswith("complex") else part()
    return values.astype(numpy_dtype(dtype))


@st.composite
def calls(
    draw: st.DrawFn, op: Op, dtypes: tuple[str, ...] = DTYPES, max_length: int = 20, min_channels: int = 1
) -> Call:
    """Valid problems of one operation: every kind of setting, `max_length` input samples more than are needed."""
    groups = draw(st.integers(1, 3))
    C_in_g, C_out_g = draw(st.integers(min_channels, 4)), draw(st.integers(min_channels, 4))
    stride, dilation, K = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 7))
    span = dilation * (K - 1) + 1
    words = ["valid", "same"] + (["causal"] if op == "conv1d" else [])
    padding = draw(
        st.one_of(st.integers(0, 8), st.tuples(st.integers(0, 8), st.integers(0, 8)), st.sampled_from(words))
    )
    settings: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    left, right = padding if isinstance(padding, tuple) else (padding, padding)
    if padding in ("valid", "same", "causal"):
        left = right = 0
    extra = 0
    shortest = 1
    if op == "conv1d":
        if padding == "causal":
            left = span - 1
        elif padding != "same":
            shortest = max(1, span - left - right)
    elif padding == "same":
        left, right, extra = (span - stride) // 2, (span - stride + 1) // 2, 0
        if span < stride:
            left, right, extra = 0, 0, stride - span
    else:
        extra = draw(st.integers(0, max(stride, dilation) - 1))
        # L_out = (L_in - 1)*stride + span - left - right + extra must be 1 or more.
        shortest = max(1, 1 - (span + extra - left - right - 1) // stride)
    L_in = shortest + draw(st.integers(0, max_length))
    if op == "conv1d" and padding == "same":
        total = max(0, (-(-L_in // stride) - 1) * stride + span - L_in)
        left, right = total // 2, total - total // 2
    if op == "conv_transpose1d" and padding != "same":
        if draw(st.booleans()):
            settings["output_padding"] = extra
        else:
            settings["output_size"] = (L_in - 1) * stride + span - left - right + extra
    batch = draw(st.sampled_from((None, 1, 2, 3)))
    C_in, C_out = C_in_g * groups, C_out_g * groups
    return Call(
        op=op,
        input_shape=(C_in, L_in) if batch is None else (batch, C_in, L_in),
        weight_shape=(C_out, C_in_g, K) if op == "conv1d" else (C_in, C_out_g, K),
        has_bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        settings=settings,
        resolved={"padding_left": left, "padding_right": right, "output_padding": extra},
        seed=draw(st.integers(0, 2**32 - 1)),
    )
