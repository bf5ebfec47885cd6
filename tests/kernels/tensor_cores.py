"""What the tests of the operations on tensor cores share: checks, each of one family, and data that are hard to sum.

A check computes by a `Run`: hostcuda's result of a problem by the family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from gpuconv import cases, dispatch, reference
from gpuconv.cases import Data
from gpuconv.device import Device
from gpuconv.families import ArrayLayout, Family, Layout
from gpuconv.families.base import contiguous_strides
from gpuconv.families.mma_tiles import Tile
from gpuconv.problem import ConvProblem, numpy_dtype
from tests import hostcuda
from tests.hostcuda import Counts
from tests.kernels.arrays import assert_same_bits, unaligned
from tests.plans import BASE, H200, plan_of, refusal_of

Array = npt.NDArray[Any]
Run: TypeAlias = Callable[..., Array]  # (problem, data, **settings of hostcuda.compute)


def takes(families: Mapping[str, Family[Any]], problem: ConvProblem, device: Device = H200) -> bool:
    """Whether the family of the problem's operation takes it, in contiguous arrays."""
    return refusal_of(families[problem.op], problem, Layout.contiguous(problem), device) is None


def run_by(families: Mapping[str, Family[Any]], problem: ConvProblem, data: Data, **settings: Any) -> Array:
    """The result of hostcuda by the family of the problem's operation."""
    return hostcuda.compute(problem, *data, family=families[problem.op].name, **settings)


def assert_right(problem: ConvProblem, output: Array, data: Data, what: object = None) -> None:
    good = reference.within_bound(problem, output, *data)
    assert good.all(), (what, str(problem), np.argwhere(~good)[0], output[~good][0])


def assert_like_base(run: Run, problem: ConvProblem, data: Data) -> Array:
    """The result, once it has NaNs and infinities where the base family has them, and is right elsewhere."""
    y, expected = run(problem, data), hostcuda.compute(problem, *data, family=BASE[problem.op])
    for test in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(test(y.astype(np.float64)), test(expected.astype(np.float64)), str(problem))
    assert_right(problem, y, data)
    return y


def channels_last(problem: ConvProblem) -> Layout:
    p = problem
    return Layout.contiguous(p).replaced(
        input=ArrayLayout((p.C_in * p.L_in, 1, p.C_in), p.itemsize),
        output=ArrayLayout((-p.C_out * p.L_out, 1, p.C_out), p.itemsize),
    )


def check_the_layer_alone_decides(
    family: Family[Any],
    layer: ConvProblem,
    device: Device,
    order: Callable[[ConvProblem, Device], object] | None = None,
) -> str | None:
    """Why the family refuses a layer, whatever batch, length and strides are; `order` gives that of its sums."""
    reason = refusal_of(family, layer, Layout.contiguous(layer), device)
    summed = order(layer, device) if order and reason is None else None
    for N, L_in in ((1, layer.L_in + 1), (7, layer.L_in), (3, 100_000), (200, layer.L_in + 17)):
        p = replace(layer, N=N, L_in=L_in)
        for layout in (Layout.contiguous(p), channels_last(p)):
            assert refusal_of(family, p, layout, device) == reason
        if reason is None:
            assert order is None or order(p, device) == summed
            choice = dispatch.choose(p, channels_last(p), device)
            assert choice is not None
            assert choice.family == family.name
            assert choice.launch.shared_bytes <= device.shared_per_block
            assert choice.config in set(family.configs(device))
    return reason


def leave_one_tile(patch: pytest.MonkeyPatch, family: ModuleType, tile: Tile) -> None:
    """Leave the cost model of a family one tile to choose."""
    compare = family.compare_tilings
    patch.setattr(family, "compare_tilings", lambda *args: tuple(t for t in compare(*args) if t.tile == tile))


@cache
def chosen_result(run: Run, p: ConvProblem) -> Array:
    """What the tile that the cost model chooses gives, for random data of the seed 4."""
    data = cases.random_data(p, 4)
    output = run(p, data)
    assert_right(p, output, data)
    return output


def check_views(run: Run, p: ConvProblem) -> None:
    """Views of the arrays, and results at every alignment, apart and backwards, change no bit."""
    x, w, b = cases.random_data(p, 5)
    assert b is not None
    expected = run(p, Data(x, w, b))
    views = (
        (unaligned(x), w, b),
        (np.asfortranarray(x), np.asfortranarray(w), np.ascontiguousarray(b[::-1])[::-1]),
        (np.ascontiguousarray(x[::-1, ::-1, ::-1])[::-1, ::-1, ::-1], np.ascontiguousarray(w[..., ::-1])[..., ::-1], b),
    )
    C, L = p.C_out, p.L_out
    padded = -(-L // 8) * 8  # rows that start at multiples of 16 bytes, and those that do not
    strides = ((C * padded, padded, 1), (C * (padded + 1), padded + 1, 1), (-C * L, -L, -1), (C * L, 1, C))
    for i, output in enumerate(strides):
        view = Data(*views[i % len(views)])
        layout = Layout.of(
            input=hostcuda.array_layout(view.input),
            weight=hostcuda.array_layout(view.weight),
            bias=hostcuda.array_layout(b if view.bias is None else view.bias),
            output=ArrayLayout(output, p.itemsize if i == 2 else 16),
        )
        assert_same_bits(run(p, view, layout=layout, schedule="every"), expected, (str(p), output))


def check_offsets_beyond_32_bits(run: Run, family: Family[Any], p: ConvProblem) -> None:
    """Samples of input and output, and rows of weights, more than 2**31 elements apart in all, change no bit."""
    data = cases.random_data(p, 6)
    far, fresh = 2**31 + 7, Layout.contiguous(p)
    weight_strides = (2**31 // (p.weight_shape[0] - 1) + 1, *contiguous_strides(p.weight_shape)[1:])
    layout = fresh.replaced(
        input=ArrayLayout((far, *contiguous_strides(p.input_shape)[1:]), p.itemsize),
        weight=ArrayLayout(weight_strides, p.itemsize),
        output=ArrayLayout((-far, *contiguous_strides(p.output_shape)[1:]), p.itemsize),
    )
    assert {step.launch.index_bits for step in plan_of(family, p, layout, H200).steps} == {64}
    assert_same_bits(run(p, data, layout=layout), run(p, data), str(p))


def check_special_samples_and_biases(run: Run, p: ConvProblem) -> None:
    """NaN and infinities in the input, at its ends too, and in the bias spoil what they feed."""
    for l_in in (0, p.L_in // 2, p.L_in - 1):
        x, w, b = cases.random_data(p, l_in)
        x[0, 0, l_in], x[-1, min(1, p.C_in - 1), l_in], x[-1, -1, l_in] = np.nan, np.inf, -np.inf
        assert not np.isfinite(assert_like_base(run, p, Data(x, w, b)).astype(np.float64)).all()
    x, w, b = cases.random_data(p, 7)
    assert b is not None
    special = (np.nan, np.inf, -np.inf)[: p.C_out - 1]
    b[: len(special)] = special
    y = assert_like_base(run, p, Data(x, w, b)).astype(np.float64)
    assert np.isnan(y[:, 0]).all()
    assert np.isfinite(y[:, len(special) :]).all()


def check_padding_mode(run: Run, p: ConvProblem, padding_mode: str) -> None:
    """Padding that means samples gives the bits of padded input."""
    p = replace(p, padding_mode=padding_mode)
    x, w, b = cases.random_data(p, 13)
    how: Any = {"replicate": "edge", "circular": "wrap"}.get(padding_mode, padding_mode)
    padded = np.pad(x, [(0, 0), (0, 0), p.padding], how)
    inside = replace(p, L_in=padded.shape[-1], padding_left=0, padding_right=0, padding_mode="zeros")
    assert_same_bits(run(p, Data(x, w, b)), run(inside, Data(padded, w, b)), padding_mode)


def check_bank_conflicts(run: Run, p: ConvProblem) -> None:
    """Operands are read from shared memory without any."""
    counts = Counts()
    run(p, cases.random_data(p, 3), counts=counts)
    assert counts.products > 0
    assert counts.wavefronts == counts.loads, str(p)


def powers(rng: np.random.Generator, shape: tuple[int, ...], low: int, end: int) -> Array:
    """Numbers of either sign with exponents from `low` to below `end`."""
    values = rng.uniform(1, 2, shape) * rng.choice((-1.0, 1.0), shape) * 2.0 ** rng.integers(low, end, shape)
    return values.astype(np.float32)


Exponents: TypeAlias = tuple[tuple[int, int], tuple[int, int]]  # of the input and of the weight, for `powers`

HARD: dict[str, Exponents] = {
    "mixed magnitudes": ((-60, 60), (-60, 60)),
    "the largest numbers": ((120, 128), (-110, -12)),
    "the largest weights": ((-110, -12), (120, 128)),
    "products that underflow": ((-75, -55), (-75, -55)),
    "subnormal data": ((-149, -120), (0, 80)),
    "subnormal weights": ((0, 80), (-149, -120)),
    "sums that overflow": ((60, 68), (55, 62)),
}
HARD_TO_SPLIT: dict[str, Exponents] = {
    "around the smallest that are split": ((-106, -98), (-4, 40)),
    "weights around the smallest that are split": ((-4, 40), (-106, -98)),
    "parts that would be subnormal": ((-122, -114), (-4, 40)),
    "parts of weights that would be subnormal": ((-4, 40), (-122, -114)),
}


def _cancel(p: ConvProblem, x: Array, w: Array) -> None:
    """Let each other channel undo the one before, but for a millionth."""
    x = x.reshape(p.N, p.groups, p.C_in_g, p.L_in)
    odd, even = slice(1, p.C_in_g // 2 * 2, 2), slice(0, p.C_in_g // 2 * 2, 2)
    x[:, :, odd] = x[:, :, even]
    if p.transposed:
        w = np.swapaxes(w.reshape(p.groups, p.C_in_g, p.C_out_g, p.K), 1, 2)
    else:
        w = w.reshape(p.groups, p.C_out_g, p.C_in_g, p.K)
    w[:, :, odd] = -w[:, :, even] * np.float32(1 + 2.0**-20)


def hard_data(p: ConvProblem, exponents: Exponents, seed: int, *, cancels: bool = False) -> Data:
    """Data with such exponents."""
    rng = np.random.default_rng(seed)
    x, w = (powers(rng, s, *r) for s, r in zip((p.input_shape, p.weight_shape), exponents, strict=True))
    if cancels:
        _cancel(p, x, w)
    # In every other channel alone: it hides the errors of small sums.
    bias = powers(rng, (p.C_out,), -60, 60) * (np.arange(p.C_out) % 2)
    return Data(*(a.astype(numpy_dtype(p.dtype)) for a in (x, w, bias)))


def data_of_one_sign(p: ConvProblem) -> Iterator[Data]:
    """Sums in which nothing cancels, so that what is cut off adds up."""
    rng = np.random.default_rng(p.K)
    for low in (0, -12):
        x = np.abs(powers(rng, p.input_shape, low, 1))
        w = (2 - 2.0**-7) * 2.0 ** rng.integers(low, 1, p.weight_shape)
        yield Data(*(a.astype(numpy_dtype(p.dtype)) for a in (x, w)), None)
