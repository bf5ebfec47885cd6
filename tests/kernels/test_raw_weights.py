"""Tensor cores on weights that blocks pack themselves: the bits of packed weights, and who gets which."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import cases, dispatch
from gpuconv.cases import Data
from gpuconv.families import Layout, mma
from gpuconv.problem import ConvProblem
from tests import hostcuda
from tests.kernels.arrays import assert_same_bits
from tests.kernels.tensor_cores import H200

# By tiles: with few rows, with taps and channels that fill no stage, of groups, in segments whose last is shorter.
PROBLEMS = {
    "64x128": [
        ConvProblem("conv1d", 2, 40, 20, 26, 3, 1, 1, 1, has_bias=True),
        ConvProblem("conv1d", 1, 72, 70, 40, 1),
        # Phases that share output channels with the next block, and lack taps; one phase.
        ConvProblem("conv_transpose1d", 1, 40, 24, 30, 7, 3, 2, 1, has_bias=True),
        ConvProblem("conv_transpose1d", 2, 40, 72, 30, 3, 1, 1, 1, dilation=2),
        ConvProblem("conv1d", 2, 40, 36, 132, 4, 1, groups=2, dilation=3),
    ],
    "64x128 of split TF32": [
        ConvProblem("conv1d", 2, 40, 20, 26, 3, 1, 1, 1, has_bias=True),
        ConvProblem("conv_transpose1d", 1, 40, 24, 30, 7, 3, 2, 1, has_bias=True),
    ],
    "64x64 of samples": [ConvProblem("conv1d", 13, 72, 20, 10, 3, 1, 1, 1, has_bias=True)],
    "64x16 by segments": [
        ConvProblem("conv1d", 2, 530, 20, 26, 16, 2, 3, 2, has_bias=True),
        ConvProblem("conv_transpose1d", 2, 530, 10, 7, 32, 2, 13, 12, groups=1),
    ],
    "64x64 in segments": [ConvProblem("conv1d", 9, 536, 20, 12, 9, has_bias=True)],
    # Three warps, and rows that are no power of two.
    "48x144": [
        ConvProblem("conv1d", 1, 40, 72, 150, 3, 1, 1, 1),
        ConvProblem("conv_transpose1d", 1, 40, 24, 30, 7, 3, 2, 1, has_bias=True),
    ],
    # Five warps, of which one has no part in packing.
    "32x160 of samples, by segments": [ConvProblem("conv1d", 3, 530, 20, 26, 16, 2, 3, 2, has_bias=True)],
}
TILES = {
    "64x128 of split TF32": lambda t: (t.block_m, t.block_n) == (64, 128),
    "64x128": lambda t: (t.block_m, t.block_n) == (64, 128),
    "64x64 of samples": lambda t: (t.block_m, t.block_n, t.has_samples) == (64, 64, True),
    "64x16 by segments": lambda t: (t.block_n, t.segment_mode) == (16, 2),
    "64x64 in segments": lambda t: (t.has_samples, t.segment_mode) == (True, 1),
    "48x144": lambda t: (t.block_m, t.block_n) == (48, 144),
    "32x160 of samples, by segments": lambda t: (t.block_m, t.block_n, t.segment_mode) == (32, 160, 2),
}


@pytest.fixture
def leave(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, bool], None]]:
    """Leaves the cost model tiles of one kind, with packed or with raw weights."""
    compare = mma.compare_tilings

    def leave(tiles: str, is_raw: bool) -> None:
        is_left = TILES[tiles]
        monkeypatch.setattr(
            mma,
            "compare_tilings",
            lambda *args, raw: tuple(t for t in compare(*args, raw=raw) if is_left(t.tile) and t.is_raw == is_raw),
        )
        dispatch.choose.cache_clear()

    yield leave
    dispatch.choose.cache_clear()


def _with_odd_weights(p: ConvProblem, seed: int) -> Data:
    data = cases.random_data(p, seed)
    w = data.weight.copy()
    # The second and the third are finite in float32 alone.
    for place, value in enumerate((np.inf, 3e38, 1e-38, np.nan)):
        with np.errstate(over="ignore"):
            w.reshape(-1)[11 + place * (w.size // 5)] = w.dtype.type(value)
    return data._replace(weight=w)


@pytest.mark.parametrize(
    ("mode", "tiles"),
    [
        ("bfloat16", "64x128"),
        ("float32", "64x128 of split TF32"),
        ("tf32", "64x64 of samples"),
        ("float16", "64x16 by segments"),
        ("bfloat16", "64x64 in segments"),
        ("float16", "48x144"),
        ("float32", "32x160 of samples, by segments"),
    ],
)
def test_bits_are_those_of_packed_weights(mode: str, tiles: str, leave: Callable[[str, bool], None]) -> None:
    """Weights may be such that two TF32 parts cannot hold them, infinite or NaN."""
    for i, problem in enumerate(PROBLEMS[tiles]):
        p = cases.in_format(problem, mode)
        for data in (cases.random_data(p, i), _with_odd_weights(p, i)):
            outputs = []
            for is_raw in (False, True):
                leave(tiles, is_raw)
                choice = dispatch.choose(p, Layout.contiguous(p), H200, f"{p.op}_mma")
                assert choice is not None
                assert ("RAW_WEIGHT" in dict(choice.config.macros)) == is_raw
                outputs.append(
                    hostcuda.compute(p, *data, family=f"{p.op}_mma", schedule="every" if is_raw else "forward")
                )
            assert_same_bits(*outputs, str(p))


@pytest.mark.gpu
def test_blocks_pack_what_no_handle_keeps(cupy: Any, launched: list[str]) -> None:
    """A small layer by one launch; with a prepared weight, whose packed form is kept, the cost of packing is none."""
    for op, settings in (("conv1d", {"padding": 1}), ("conv_transpose1d", {"stride": 2})):
        data = cases.random_data(ConvProblem(op, 2, 64, 64, 40, 3, dtype="float16"), 1)
        x, w = cupy.asarray(data.input), cupy.asarray(data.weight)
        outputs = [getattr(gpuconv, op)(x, weight, **settings).get() for weight in (w, gpuconv.prepare(w), w)]
        assert launched == [f"{op}_mma", "pack_mma_weight", f"{op}_mma", f"{op}_mma"]
        launched.clear()
        assert_same_bits(outputs[1], outputs[0], op)
        assert_same_bits(outputs[2], outputs[0], op)
