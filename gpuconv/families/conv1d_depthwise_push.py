"""conv1d_depthwise_push: a few new samples of the streams of a depthwise layer.

It is not a family, since its input is in two arrays.

Contract: cuda_src/conv1d_depthwise_push.cu.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..problem import DTYPES, ConvProblem
from .base import (
    MAX_GRID,
    Config,
    Launch,
    Layout,
    Plan,
    Refusal,
    Step,
    base_config,
    contiguous_strides,
    conv_fields,
    params_of,
)
from .depthwise import Divisor
from .fused import finishing
from .offsets import width
from .windows import NEW_SAMPLES, WINDOW_STARTS

KERNEL = "conv1d_depthwise_push"
BLOCK_SIZE = 128
TAPS = (2, 3, 4)  # as in state-space models; pushes of one sample have their own kernels for these
MOST_NEW_SAMPLES = 8  # one thread reads the new samples of a row one after the other


def ring_shape(problem: ConvProblem, length: int) -> tuple[int, int, int]:
    """(N, held, C_in): the samples that streams hold between pushes of `length` samples, channels fastest."""
    return problem.N, problem.L_in - length, problem.C_in


def plan(problem: ConvProblem, layout: Layout, length: int) -> Plan | Refusal:
    """How the kernel computes a problem whose input ends with `length` new samples, or why it does not.

    `layout` has the layouts of the weight, the output and `NEW_SAMPLES`.
    """
    p, held = problem, problem.L_in - length
    if p.C_in_g != 1 or p.C_out_g != 1 or p.dtype not in DTYPES:
        return Refusal("needs a depthwise layer of floating-point numbers")
    if any(p.padding) or p.transposed:
        return Refusal("needs a convolution without padding")
    if not 0 < length <= min(held, MOST_NEW_SAMPLES):
        return Refusal(f"needs from 1 to {min(held, MOST_NEW_SAMPLES)} new samples")
    weight = layout["weight"]
    if weight.strides != contiguous_strides(p.weight_shape) or weight.alignment < 16:
        return Refusal("needs contiguous weights from a 16-byte boundary on")
    rows = p.N * p.C_out
    grid = -(-rows // BLOCK_SIZE)
    ring = ring_shape(p, length)
    arrays = layout.replaced(input=layout[NEW_SAMPLES])
    extents = {**p.shapes, "input": (p.N, p.C_in, length)}
    # The address of a held sample is also formed for a new one, up to `length` places behind the ring.
    values = ((ring[0] * ring[1] + length) * ring[2], grid * BLOCK_SIZE, p.L_in * p.stride, p.dilation * p.K)
    if grid > MAX_GRID or width(arrays, extents, *values) > 32:
        return Refusal("needs offsets below 2**31")
    fields = conv_fields(p, arrays)
    own = {"rows": rows, "held": held, "length": length, **Divisor.params(C_out=p.C_out)}
    params = params_of(KERNEL, fields, own)
    step = Step(
        _config(p.dtype, p.K if p.K in TAPS and length == p.L_out == 1 and held == p.dilation * (p.K - 1) else 0),
        Launch(grid, BLOCK_SIZE, 0, 32, params),
        ("input", "weight", "bias" if p.has_bias else None, NEW_SAMPLES, WINDOW_STARTS, "output"),
    )
    return Plan((finishing(step, p, layout, p.fuses.input_activation),))


def configs() -> Iterator[Config]:
    """Every specialisation, with nothing fused."""
    for dtype in DTYPES:
        for taps in (0, *TAPS):
            yield _config(dtype, taps)


def _config(dtype: str, taps: int) -> Config:
    base = base_config(KERNEL, dtype, 32, BLOCK_SIZE)
    return Config(base.kernel, (*base.macros, ("TAPS", str(taps))))
