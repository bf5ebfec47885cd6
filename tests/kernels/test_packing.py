"""The kernels that pack weights: what they write, element by element, and how much they read for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gpuconv.device import Device
from gpuconv.families import ArrayLayout, Layout, Step
from gpuconv.families.base import PACKED
from gpuconv.problem import ConvProblem, numpy_dtype
from tests import hostcuda
from tests.hostcuda import Counts
from tests.plans import FORWARD_FAMILIES, plan_of

Array = npt.NDArray[Any]

H200 = Device.from_arch("sm_90")
FAMILY = {family.name: family for family in FORWARD_FAMILIES}
MMA = {"conv1d": "conv1d_mma", "conv_transpose1d": "conv_transpose1d_mma"}
TILED = {"conv1d": "conv1d_tiled", "conv_transpose1d": "conv_transpose1d_phases"}

# Channels that fill no unit, chunk or box, rows that fill no tile, several boxes along every axis.
PROBLEMS = {
    "forward": ConvProblem("conv1d", 2, 84, 74, 60, 5, groups=2),
    "one tap": ConvProblem("conv1d", 2, 150, 70, 60, 1),
    "many taps": ConvProblem("conv1d", 2, 36, 40, 300, 131),
    "input gradient": ConvProblem("conv_transpose1d", 2, 84, 74, 60, 5, groups=2),
    "phases": ConvProblem("conv_transpose1d", 2, 76, 26, 60, 7, 3, groups=2),
    "more phases than rows of a box": ConvProblem("conv_transpose1d", 2, 34, 5, 20, 60, 41),
    "many taps of phases": ConvProblem("conv_transpose1d", 2, 17, 9, 20, 141, 2),
    "phase by phase": ConvProblem("conv_transpose1d", 2, 44, 40, 30, 7, 4, dilation=6),
}
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


def weights_of(p: ConvProblem) -> Array:
    """Different numbers, which every dtype holds as they are."""
    count = np.prod(p.weight_shape)
    values = np.random.default_rng(0).integers(1, 128, count) * 2.0 ** (np.arange(count) % 5)
    return values.reshape(p.weight_shape).astype(numpy_dtype(p.dtype))


def product_weights(p: ConvProblem, w: Array) -> Array:
    """The weights as matrices, [product, row, c_in, tap], with zeros for taps that a phase lacks."""
    if not p.transposed:
        return w.reshape(p.groups, p.C_out_g, p.C_in_g, p.K)
    w = w.reshape(p.groups, p.C_in_g, p.C_out_g, p.K)
    of_phase = [[k for k in range(p.K) if (k * p.dilation - phase) % p.stride == 0] for phase in range(p.stride)]
    found = np.zeros((p.groups, p.stride, p.C_out_g, p.C_in_g, max(map(len, of_phase))), w.dtype)
    for phase, taps in enumerate(of_phase):
        found[:, phase, :, :, : len(taps)] = np.swapaxes(w[..., taps], 1, 2)
    if p.dilation == 1:  # rows are (c_out, phase)
        found = np.swapaxes(found, 1, 2)
        return found.reshape(p.groups, p.C_out_g * p.stride, p.C_in_g, -1)
    return found.reshape(p.groups * p.stride, p.C_out_g, p.C_in_g, -1)


def padded(a: Array, *shape: int) -> Array:
    return np.pad(a, [(0, to - extent) for to, extent in zip(shape, a.shape, strict=True)])


def pack_step(p: ConvProblem, family: str, layout: Layout | None = None) -> tuple[Step, dict[str, int], int]:
    """The packing of a plan, the fields of its Params, and the bytes that it writes."""
    plan = plan_of(FAMILY[family], p, replace(layout or Layout.contiguous(p), is_prepared=True), H200)
    return plan.steps[0], dict(plan.steps[0].launch.params), plan.scratch_bytes(PACKED)


def packed(p: ConvProblem, family: str, w: Array, layout: Layout | None = None, **settings: Any) -> Array:
    step, _, num_bytes = pack_step(p, family, layout)
    arrays = {"weight": w, PACKED: np.empty(num_bytes // 4, np.uint32)}
    assert step.arrays == tuple(arrays)
    layouts = {"weight": layout["weight"]} if layout else {}
    return hostcuda.run(step.config, step.launch, arrays, outputs=[PACKED], layouts=layouts, device=H200, **settings)


def packed_for_mma(p: ConvProblem, w: Array) -> Array:
    _, params, _ = pack_step(p, MMA[p.op])
    units, chunks, unit = params["units"], params["chunks"], 16 // p.itemsize
    matrices = product_weights(p, w)
    taps = -(-params["pairs"] // units)
    # Of rows with all taps, or all rows, then of those that lack the last.
    phases = p.stride if p.transposed and p.dilation == 1 else 1
    tiles = params["full_row_tiles"], params["row_tiles"] - params["full_row_tiles"]
    is_full = np.arange(matrices.shape[1]) % phases < params["full_phases"]
    parts = []
    for of_part, count, pairs in zip((is_full, ~is_full), tiles, (params["pairs"], params["short_pairs"]), strict=True):
        rows = params["block_rows"]
        whole = padded(matrices[:, of_part], len(matrices), count * rows, chunks * units * unit, taps)
        split = whole.reshape(len(matrices), count, rows, chunks, units, unit, taps)
        found = split.transpose(0, 1, 3, 6, 4, 2, 5).reshape(len(matrices), count, chunks, taps * units, rows, unit)
        found = found[:, :, :, :pairs]
        if p.dtype == "float32" and p.precision == "float32":  # w_hi and w_lo, which is zero for these numbers
            found = np.stack((found, np.zeros_like(found)), axis=4)
        parts.append(found.reshape(len(matrices), -1))
    return np.concatenate(parts, axis=1)


def packed_for_tiles(p: ConvProblem, w: Array) -> Array:
    _, params, _ = pack_step(p, TILED[p.op])
    terms, row_tiles, rows = params["padded_terms"], params["row_tiles"], params["block_rows"]
    matrices = product_weights(p, w)
    matrices = matrices.reshape(*matrices.shape[:2], -1)
    whole = padded(matrices, len(matrices), row_tiles * rows, terms)
    found = whole.reshape(len(matrices), row_tiles, rows, terms).swapaxes(2, 3)
    return np.ascontiguousarray(found.astype(np.float32) if p.itemsize == 2 else found)


@every_problem
@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "float32"), ("float32", "tf32"), ("float32", "float32")])
def test_what_tensor_cores_read(problem: ConvProblem, dtype: str, precision: str) -> None:
    p = replace(problem, dtype=dtype, precision=precision)
    w = weights_of(p)
    expected = packed_for_mma(p, w).view(np.uint32).ravel()
    np.testing.assert_array_equal(packed(p, MMA[p.op], w, schedule="every"), expected)


@every_problem
@pytest.mark.parametrize("dtype", ["float16", "float32", "complex128"])
def test_what_register_tiles_read(problem: ConvProblem, dtype: str) -> None:
    p = replace(problem, dtype=dtype)
    w = weights_of(p)
    expected = packed_for_tiles(p, w).view(np.uint32).ravel()
    np.testing.assert_array_equal(packed(p, TILED[p.op], w, schedule="every"), expected)


@every_problem
@pytest.mark.parametrize("family", [MMA, TILED], ids=["mma", "tiled"])
def test_strides_of_the_weight_change_nothing(problem: ConvProblem, family: dict[str, str]) -> None:
    p = replace(problem, dtype="float16")
    w = weights_of(p)
    expected = packed(p, family[p.op], w)
    for view in (np.asfortranarray(w), np.ascontiguousarray(w[::-1, :, ::-1])[::-1, :, ::-1]):
        layout = Layout.contiguous(p).replaced(weight=hostcuda.array_layout(view))
        np.testing.assert_array_equal(packed(p, family[p.op], view, layout), expected)
    odd = Layout.contiguous(p).replaced(weight=replace(hostcuda.array_layout(w), alignment=p.itemsize))
    np.testing.assert_array_equal(packed(p, family[p.op], w, odd), expected)


def reads_per_weight(p: ConvProblem, family: str) -> float:
    """Bytes of the sectors that a packing reads, for each byte of the weights."""
    w, counts = weights_of(p), Counts()
    packed(p, family, w, counts=counts)
    return 32 * counts.sectors / w.nbytes


@pytest.mark.parametrize("K", [1, 3, 7, 16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", [MMA, TILED], ids=["mma", "tiled"])
def test_packing_reads_little_more_than_the_weights(family: dict[str, str], dtype: str, K: int) -> None:
    """Lanes that read neighbours: a sector of 32 bytes is read once, but where an array begins in the middle of one."""
    problems = [
        ConvProblem("conv1d", 1, 128, 64, 40, K),
        ConvProblem("conv_transpose1d", 1, 64, 128, 40, K),  # an input gradient
        ConvProblem("conv_transpose1d", 1, 64, 64, 40, 2 * K, K),
    ]
    for problem in problems:
        p = replace(problem, dtype=dtype)
        assert reads_per_weight(p, family[p.op]) <= 1.1, str(p)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", [MMA, TILED], ids=["mma", "tiled"])
def test_packing_reads_no_sector_often(family: dict[str, str], dtype: str) -> None:
    """Rows that begin anywhere in a sector, boxes of some of the taps or phases: two loads may meet in a sector."""
    problems = [
        ConvProblem("conv1d", 1, 49, 40, 140, 7),
        ConvProblem("conv1d", 1, 48, 48, 300, 131),
        ConvProblem("conv_transpose1d", 1, 40, 33, 40, 5),
        ConvProblem("conv_transpose1d", 1, 70, 8, 40, 60, 41),
    ]
    for problem in problems:
        p = replace(problem, dtype=dtype)
        assert reads_per_weight(p, family[p.op]) <= 2, str(p)


def test_a_box_of_few_phases_forms_no_offset_beyond_its_taps() -> None:
    """The last box has one phase, the others 64: hostcuda would report a signed overflow of taps behind its own."""
    p = ConvProblem("conv_transpose1d", 1, 8, 1, 4, 8322, 4161, dtype="float16")
    layout = Layout.contiguous(p).replaced(weight=ArrayLayout((1, 8, 32768), 2))
    plan = plan_of(FAMILY["conv_transpose1d_phases"], p, layout, H200)
    step = plan.steps[0]
    assert step.launch.index_bits == 32
    packed = np.empty(plan.scratch_bytes(PACKED) // 4, np.uint32)
    arrays = {"weight": np.ones(p.weight_shape, np.float16), PACKED: packed}
    hostcuda.run(step.config, step.launch, arrays, outputs=[PACKED], layouts={"weight": layout["weight"]}, device=H200)
    assert packed.view(np.float32).sum() == p.C_in * p.K
