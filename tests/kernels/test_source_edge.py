"""A padding mode is known to edge.cuh alone, an activation changes finish.cuh alone.

Here positions outside the input mean its mirror image in every family, those whose plans leave the edges to a second
step among them, and results pass through max(0, x): every family gives the results of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gpuconv import cases, conv1d, source
from gpuconv.device import Device
from gpuconv.families import FAMILIES, Layout
from gpuconv.problem import ConvProblem, WeightGradientProblem
from tests import hostcuda

H200 = Device.from_arch("sm_90")

CHANGES = {
    "edge.cuh": (("#define PADDING_MODE zeros", "#define PADDING_MODE reflect"),),
    "finish.cuh": (
        ("#else\n    return value;\n#endif", "#else\n    return value < 0 ? scalar::zero() : value;\n#endif"),
        (
            "return scalar::round(multiply_add(scalar::zero(), value, value));",
            "return scalar::round(multiply_add(scalar::zero(), value, value < 0 ? scalar::zero() : value));",
        ),
        (
            "round_finished(acc_t value) { return scalar::round(value); }",
            "round_finished(acc_t value) { return scalar::round(value < 0 ? scalar::zero() : value); }",
        ),
    ),
}


@pytest.fixture(autouse=True)
def changed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    read = source.read

    def changed_text(file: str) -> str:
        text = read(file)
        for old, new in CHANGES.get(file, ()):
            assert text.count(old) == 1, (file, old)
            text = text.replace(old, new)
        return text

    monkeypatch.setattr(source, "read", changed_text)
    source.inlined.cache_clear()
    yield
    source.inlined.cache_clear()


def layer(family: str, *extents: int, stride: int = 1, dilation: int = 1, **settings: Any) -> tuple[str, ConvProblem]:
    *_, K = extents
    span = dilation * (K - 1)
    padding = {"padding_left": span // 2, "padding_right": span - span // 2}
    settings |= padding | {"stride": stride, "dilation": dilation, "has_bias": True}
    return family, ConvProblem("conv1d", *extents, **settings)


LAYERS = (
    layer("conv1d_direct", 2, 3, 4, 20, 5, stride=2),
    layer("conv1d_narrow", 2, 30, 4, 50, 5, dilation=2),
    layer("conv1d_narrow", 2, 30, 4, 50, 5, stride=3, dilation=2),
    layer("conv1d_skinny", 1, 40, 20, 24, 16, stride=8),
    layer("conv1d_stem", 2, 1, 20, 300, 7, stride=3),
    layer("conv1d_stem", 9, 4, 5, 40, 9, stride=4),
    layer("conv1d_tail", 2, 20, 1, 304, 9),
    layer("conv1d_tiled", 2, 30, 40, 77, 5),
    layer("conv1d_tiled", 1, 30, 40, 300, 5, stride=2),
    layer("conv1d_mma", 2, 32, 40, 77, 5, stride=2, dtype="float16"),
    layer("conv1d_im2col", 2, 3, 40, 77, 19, stride=2, dtype="float16"),
    layer("conv1d_im2col", 2, 4, 40, 177, 19, dilation=2),
    layer("conv1d_col2im", 2, 50, 5, 77, 19, dtype="float16"),
    layer("conv1d_col2im", 2, 50, 3, 301, 17, dilation=2, dtype="float16"),
    layer("conv1d_toeplitz", 3, 5, 10, 340, 81, groups=5, dtype="float16"),
    layer("conv1d_depthwise", 3, 5, 10, 340, 41, groups=5),  # sliding, many steps
    layer("conv1d_depthwise", 3, 5, 10, 340, 61, stride=2, groups=5, dtype="float16"),
    layer("conv1d_depthwise", 3, 5, 10, 340, 5, dilation=3, groups=5),  # skipping
    layer("conv1d_depthwise", 3, 5, 10, 340, 33, stride=16, groups=5, dtype="float16"),  # striding
    layer("conv1d_depthwise", 3, 5, 10, 340, 5, stride=3, dilation=2, groups=5),
)


@pytest.mark.parametrize(("family", "p"), LAYERS, ids=str)
def test_every_family_mirrors_its_input_and_activates_its_output(family: str, p: ConvProblem) -> None:
    data = cases.random_data(p, 3)
    output = hostcuda.compute(p, *data, layout=Layout.contiguous(p), family=family, device=H200)
    x, w, b = (array.astype(np.float64) for array in data)
    mirrored = np.pad(x, ((0, 0), (0, 0), (p.padding_left, p.padding_right)), mode="reflect")
    expected = np.maximum(conv1d(mirrored, w, b, stride=p.stride, dilation=p.dilation, groups=p.groups), 0)
    tolerance = 1e-3 if p.dtype == "float16" else 1e-6
    np.testing.assert_allclose(output, expected, rtol=tolerance, atol=tolerance * expected.max())


def test_every_forward_family_is_among_the_layers() -> None:
    assert {family for family, _ in LAYERS} == {family.name for family in FAMILIES if family.kind == "conv1d"}


@pytest.mark.parametrize(
    ("family", "p"),
    [
        ("weight_gradient_direct", WeightGradientProblem("conv1d", 3, 4, 6, 40, 40, 5, 1, 2)),
        ("weight_gradient_tiled", WeightGradientProblem("conv1d", 3, 20, 12, 200, 200, 5, 1, 2)),
        ("weight_gradient_pairs", WeightGradientProblem("conv1d", 3, 6, 6, 300, 300, 41, 1, 20, groups=6)),
        ("weight_gradient_pairs", WeightGradientProblem("conv1d", 3, 6, 6, 150, 299, 12, 2, 6, groups=6)),
    ],
    ids=str,
)
def test_gradients_of_the_weights_mirror_the_input_too(family: str, p: WeightGradientProblem) -> None:
    rng = np.random.default_rng(4)
    coarse, fine = (rng.standard_normal(shape).astype(np.float32) for shape in (p.coarse_shape, p.fine_shape))
    result = hostcuda.compute(p, coarse, fine, family=family, device=H200)
    padded = np.pad(fine.astype(np.float64), ((0, 0), (0, 0), (p.padding_left, p.padding_left)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, p.K, axis=2)[:, :, :: p.stride][:, :, : p.L_coarse]
    shape = p.N, p.groups, -1, p.L_coarse
    expected = np.einsum(
        "ngrl,ngclk->grck", coarse.astype(np.float64).reshape(shape), windows.reshape(*shape, p.K)
    ).reshape(p.weight_shape)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
