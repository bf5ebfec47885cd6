"""A first look at the base families under hostcuda, directly and through gpuconv's GPU path on a stand-in for CuPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import gpuconv
from gpuconv import reference
from gpuconv.device import Device
from gpuconv.families import ArrayLayout, Family, Layout
from gpuconv.problem import DTYPES, ConvProblem
from tests.plans import FORWARD_FAMILIES, kernel_of

from . import hostcuda
from .hostcuda import fake_cupy

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


# -- through gpuconv.functional and gpuconv.runtime --------------------------------------------------------------------


@pytest.fixture
def cupy() -> Iterator[Any]:
    with fake_cupy.installed():
        yield fake_cupy


def on_gpu(p: ConvProblem, x: Any, w: Any, b: Any, out: Any = None) -> Any:
    shared = {"stride": p.stride, "padding": p.padding, "dilation": p.dilation, "groups": p.groups, "out": out}
    if p.transposed:
        return gpuconv.conv_transpose1d(x, w, b, output_padding=p.output_padding, **shared)
    return gpuconv.conv1d(x, w, b, **shared)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["conv1d", "conv_transpose1d"])
def test_public_functions_launch_what_dispatch_chooses(cupy: Any, op: str, dtype: str) -> None:
    p = ConvProblem(op, **EXTENTS, **SETTINGS, dtype=dtype)
    x, w, b = arrays(p)
    on_device = [cupy.asarray(a) for a in (x, w, b)]
    first, second = on_gpu(p, *on_device), on_gpu(p, *on_device)
    assert isinstance(first, cupy.ndarray)
    assert first.dtype == x.dtype
    y = first.get()
    assert reference.within_bound(p, y, x, w, b).all()
    np.testing.assert_array_equal(y.view(np.uint8), second.get().view(np.uint8))
    np.testing.assert_array_equal(y.view(np.uint8), hostcuda.compute(p, x, w, b, device=cupy.GPU).view(np.uint8))
    half = len(cupy.launches) // 2
    assert half > 0
    assert cupy.launches[:half] == cupy.launches[half:]


def test_strided_views_and_out_are_used_in_place(cupy: Any) -> None:
    p = ConvProblem("conv1d", **EXTENTS, **SETTINGS)
    x, w, b = arrays(p)
    view = cupy.asarray(np.ascontiguousarray(x.transpose(2, 0, 1)[::-1])).transpose(1, 2, 0)[:, :, ::-1]
    out = cupy.empty((p.N, p.C_out, 2 * p.L_out), np.float32)[:, :, ::-2]
    result = on_gpu(p, view, cupy.asarray(w), cupy.asarray(b), out)
    assert result is out
    np.testing.assert_array_equal(out.get(), on_gpu(p, *map(cupy.asarray, (x, w, b))).get())


def test_arrays_of_another_device_run_there(cupy: Any) -> None:
    p = ConvProblem("conv_transpose1d", **EXTENTS, **SETTINGS)
    with cupy.cuda.Device(1):
        on_device = [cupy.asarray(a) for a in arrays(p)]
    y = on_gpu(p, *on_device)
    assert y.device.id == 1
    assert cupy.cuda.Device().id == 0
    assert reference.within_bound(p, y.get(), *arrays(p)).all()
