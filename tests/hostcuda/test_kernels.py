"""A first look at the base families under hostcuda."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from gpuconv import reference
from gpuconv.device import Device
from gpuconv.families import ArrayLayout, Family, Layout
from gpuconv.problem import DTYPES, ConvProblem
from tests import hostcuda
from tests.plans import FORWARD_FAMILIES, kernel_of

Array = npt.NDArray[Any]

BASE_FAMILIES = tuple(f for f in FORWARD_FAMILIES if f.name in ("conv1d_direct", "conv_transpose1d_gather"))
EXTENTS = {"N": 2, "C_in": 4, "C_out": 6, "L_in": 19, "K": 3, "stride": 2, "padding_left": 2, "padding_right": 1}
SETTINGS = {"dilation": 2, "groups": 2, "has_bias": True}


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    hostcuda.prebuild(config for family in BASE_FAMILIES for config in family.configs(Device.from_arch("sm_90")))


def random(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    if dtype.startswith("complex"):
        return (values + 1j * rng.standard_normal(shape)).astype(dtype)
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def arrays(p: ConvProblem) -> tuple[Array, Array, Array]:
    assert p.bias_shape is not None
    shapes = (p.input_shape, p.weight_shape, p.bias_shape)
    x, w, b = (random(shape, p.dtype, seed) for seed, shape in enumerate(shapes))
    return x, w, b


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", BASE_FAMILIES, ids=lambda family: family.name)
def test_base_family_is_within_the_bound(family: Family[Any], dtype: str) -> None:
    p = ConvProblem(family.kind, **EXTENTS, **SETTINGS, dtype=dtype)
    x, w, b = arrays(p)
    y = hostcuda.compute(p, x, w, b, family=family.name, schedule="every")
    assert y.dtype == x.dtype
    assert reference.within_bound(p, y, x, w, b).all()


@pytest.mark.parametrize("family", BASE_FAMILIES, ids=lambda family: family.name)
def test_strided_arrays_are_read_and_written_in_place(family: Family[Any]) -> None:
    p = ConvProblem(family.kind, **EXTENTS, **SETTINGS)
    x, w, b = arrays(p)
    expected = hostcuda.compute(p, x, w, b, family=family.name)
    reversed_x = np.ascontiguousarray(x[:, :, ::-1].transpose(2, 0, 1)).transpose(1, 2, 0)[:, :, ::-1]
    broadcast_b = np.broadcast_to(b[:1], b.shape)
    layout = Layout.of(
        input=hostcuda.array_layout(reversed_x),
        weight=ArrayLayout((-40, 9, 2), 4),
        bias=hostcuda.array_layout(broadcast_b),
        output=ArrayLayout((1, 2 * p.N * p.L_out, -2 * p.N), 8),
    )
    assert min(layout["input"].strides) < 0
    y = hostcuda.compute(p, reversed_x, w, b, layout=None, family=family.name, schedule="every")
    np.testing.assert_array_equal(y, expected)
    y = hostcuda.compute(p, x, w, broadcast_b, layout=layout, family=family.name, schedule="every")
    assert reference.within_bound(p, y, x, w, broadcast_b).all()


@pytest.mark.parametrize("family", BASE_FAMILIES, ids=lambda family: family.name)
def test_arrays_beyond_32_bits_get_64_bit_indices(family: Family[Any]) -> None:
    """Samples 2**31 elements apart: dispatch chooses 64-bit indices, and the memory between is never touched."""
    p = ConvProblem(family.kind, **EXTENTS, **SETTINGS, dtype="float16")
    x, w, b = arrays(p)
    contiguous = Layout.contiguous(p)
    layout = contiguous.replaced(
        input=ArrayLayout((2**31, *contiguous["input"].strides[1:])),
        output=ArrayLayout((-(2**31), *contiguous["output"].strides[1:])),
    )
    _, launch = kernel_of(family, p, layout, Device.from_arch("sm_90"))
    assert launch.index_bits == 64
    y = hostcuda.compute(p, x, w, b, layout=layout, family=family.name, schedule="every")
    np.testing.assert_array_equal(y, hostcuda.compute(p, x, w, b, family=family.name))


def test_empty_outputs_are_not_launched_and_empty_sums_are_the_bias() -> None:
    empty = ConvProblem("conv1d", N=0, C_in=2, C_out=3, L_in=5, K=2)
    x, w = random(empty.input_shape, "float32", 0), random(empty.weight_shape, "float32", 1)
    assert hostcuda.compute(empty, x, w).shape == (0, 3, 4)
    p = ConvProblem("conv1d", N=2, C_in=0, C_out=3, L_in=5, K=2, has_bias=True)
    x, w, b = arrays(p)
    y = hostcuda.compute(p, x, w, b, schedule="every")
    np.testing.assert_array_equal(y, np.broadcast_to(b[:, None], p.output_shape))
