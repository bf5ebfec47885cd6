"""The NaN fallback, which sums results again without absent taps: kernels need it for special values alone.

Shared memory that is read too early holds NaNs under hostcuda, and the fallback, which reads global memory, would
repair what a GPU leaves wrong. So here kernels are compiled without it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gpuconv import cases
from gpuconv.device import Device
from gpuconv.families import Family, Layout
from gpuconv.problem import ConvProblem, numpy_dtype
from tests import hostcuda
from tests.hostcuda import Program
from tests.plans import BASE, FORWARD_FAMILIES, kernel_of

ONE_SM = replace(Device.from_arch("sm_90"), num_sms=1)  # which small problems fill, so that blocks take several tiles
FAMILY = {family.name: family for family in FORWARD_FAMILIES}


def layer(family: str, N: int, C_in: int, C_out: int, L_in: int, K: int, **settings: Any) -> tuple[Family, ConvProblem]:
    return FAMILY[family], ConvProblem(FAMILY[family].kind, N, C_in, C_out, L_in, K, has_bias=True, **settings)


DEPTHWISE = tuple(
    layer(f"{op}_depthwise", 3, 5, 10, L_in, K, groups=5, padding_left=2, **settings)
    for op, L_in, K, settings in (
        ("conv1d", 333, 9, {}),
        ("conv1d", 4500, 40, {"padding_right": 20}),  # several tiles of a row, many steps
        ("conv1d", 340, 9, {"dtype": "float16"}),
        ("conv1d", 333, 9, {"stride": 2}),
        ("conv1d", 333, 5, {"stride": 3, "dilation": 2}),
        ("conv1d", 300, 5, {"stride": 9}),
        ("conv1d", 300, 11, {"stride": 8}),
        ("conv1d", 300, 33, {"stride": 16, "dtype": "float16"}),
        ("conv1d", 4500, 5, {"dilation": 33}),
        ("conv_transpose1d", 4500, 3, {"dilation": 7, "dtype": "float16"}),
        ("conv_transpose1d", 333, 9, {}),
        ("conv_transpose1d", 340, 9, {"dtype": "float16"}),
        ("conv_transpose1d", 333, 17, {"stride": 2}),
    )
)
STEMS = (
    layer("conv1d_stem", 2, 1, 20, 300, 7, stride=3, padding_left=2),
    layer("conv1d_stem", 3, 16, 64, 300, 40, padding_left=20, groups=8),  # several chunks of weights
    layer("conv1d_stem", 3, 1, 300, 700, 3, padding_left=1),
    layer("conv1d_stem", 9, 4, 5, 40, 9, stride=4, padding_left=3),  # short samples
    layer("conv1d_stem", 2, 1, 20, 300, 7, stride=3, padding_left=2, dtype="bfloat16"),
    layer("conv1d_stem", 3, 4, 24, 300, 2, stride=5, dtype="float64"),  # no taps share a row
)
TAILS = (
    layer("conv1d_tail", 2, 20, 1, 300, 5, padding_left=2),  # several chunks of channels
    layer("conv1d_tail", 2, 9, 2, 303, 5, padding_left=1),
    layer("conv1d_tail", 2, 17, 4, 300, 9, padding_left=3),
    layer("conv1d_tail", 2, 20, 1, 304, 9, padding_left=3, dtype="float16"),
    layer("conv1d_tail", 2, 9, 3, 303, 5, padding_left=1, dtype="bfloat16"),
    layer("conv1d_tail", 2, 9, 2, 300, 9, padding_left=3, dtype="float64"),
    layer("conv_transpose1d_tail", 2, 20, 1, 130, 16, stride=8),
    layer("conv_transpose1d_tail", 2, 17, 1, 70, 5, stride=3, padding_left=2),
    layer("conv_transpose1d_tail", 5, 9, 2, 133, 7, stride=5),  # several blocks of rows
    layer("conv_transpose1d_tail", 2, 17, 1, 70, 5, stride=3, padding_left=2, dtype="bfloat16"),
    layer("conv_transpose1d_tail", 5, 9, 2, 133, 7, stride=5, dtype="float64"),
)
SKINNY = (
    layer("conv1d_skinny", 1, 40, 20, 24, 16, stride=8),  # two results a thread
    layer("conv1d_skinny", 2, 150, 70, 21, 17, padding_left=1, dtype="float16"),  # more chunks than buffers
)
LAYERS = (*DEPTHWISE, *STEMS, *TAILS, *SKINNY)


OTHERS = (
    layer("conv1d_tiled", 2, 3, 9, 20, 5, padding_left=4),
    layer("conv_transpose1d_phases", 2, 4, 9, 5, 7, stride=3, padding_left=2),
    layer("conv1d_mma", 2, 16, 16, 20, 5, padding_left=4, dtype="float16"),
    layer("conv_transpose1d_mma", 2, 16, 16, 5, 7, stride=3, padding_left=2, dtype="float16"),
    layer("conv1d_im2col", 2, 3, 16, 40, 13, padding_left=4, dtype="float16"),
    layer("conv_transpose1d_im2col", 2, 3, 16, 40, 13, padding_left=4, dtype="float16"),
    layer("conv1d_col2im", 2, 50, 5, 40, 13, padding_left=4, dtype="float16"),
    layer("conv_transpose1d_col2im", 2, 50, 5, 40, 13, padding_left=4, dtype="float16"),
    layer("conv1d_toeplitz", 2, 3, 6, 150, 70, padding_left=4, groups=3, dtype="float16"),
)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    configs = {kernel_of(family, p, Layout.contiguous(p), ONE_SM)[0] for family, p in LAYERS}
    hostcuda.prebuild(map(Program.without_nan_fallback, configs))


@pytest.mark.parametrize(("family", "problem"), LAYERS, ids=lambda value: getattr(value, "name", str(value)))
def test_no_result_needs_the_fallback(family: Family[Any], problem: ConvProblem) -> None:
    config, launch = kernel_of(family, problem, Layout.contiguous(problem), ONE_SM)
    data = cases.random_data(problem, 35)
    output = np.empty(problem.output_shape, numpy_dtype(problem.dtype))
    arrays = {"input": data.input, "weight": data.weight, "bias": data.bias, "output": output}
    hostcuda.run(Program.without_nan_fallback(config), launch, arrays, schedule="every", device=ONE_SM)
    assert output.tobytes() == hostcuda.compute(problem, *data, family=BASE[problem.op]).tobytes()


@pytest.mark.parametrize(
    ("family", "problem"),
    [(f, p) for f, p in (*LAYERS, *OTHERS) if p.padding_left > 0],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_results_that_meet_an_infinite_weight_need_the_fallback(
    family: Family[Any], problem: ConvProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the macro that the other tests define does nothing."""
    data = cases.random_data(problem, 36)
    np.maximum(np.abs(data.input), 1, out=data.input)
    data.weight[0, 0, [0, -1]] = np.inf
    assert not np.isnan(hostcuda.compute(problem, *data, family=family.name)).any()
    monkeypatch.setattr(Program, "of", Program.without_nan_fallback)
    assert np.isnan(hostcuda.compute(problem, *data, family=family.name)).any()


def test_the_layers_go_every_way_through_the_kernels() -> None:
    def launches(name: str) -> list[tuple[dict[str, str], dict[str, int]]]:
        chosen = [kernel_of(f, p, Layout.contiguous(p), ONE_SM) for f, p in LAYERS if f.name == name]
        return [(dict(config.macros), dict(launch.params)) for config, launch in chosen]

    forward, stems = launches("conv1d_depthwise"), launches("conv1d_stem")
    assert {(m["SLIDE_STRIDE"], m["THREAD_L"]) for m, _ in forward} >= {("1", "8"), ("2", "8"), ("0", "4"), ("0", "1")}
    assert {m["SLIDE_STRIDE"] for m, _ in launches("conv_transpose1d_depthwise")} == {"0", "1", "2"}
    assert {m["IS_STRIDING"] for m, _ in forward} == {"0", "1"}
    for ways in (forward, launches("conv_transpose1d_depthwise")):
        assert any(m["IS_SKIPPING"] == "1" and p["repeats"] > 1 for m, p in ways)
        assert any(p["repeats"] > 1 for _, p in ways)
        assert any(p["block_rows"] > 1 for _, p in ways)
    assert any(p["repeats"] > 1 and p["C_in_g"] * p["K"] <= p["chunk_terms"] for _, p in stems)
    assert any(p["repeats"] > 1 and p["C_in_g"] * p["K"] > p["chunk_terms"] for _, p in stems)
    assert any(p["C_in_g"] * p["K"] > 4 * p["chunk_terms"] for _, p in launches("conv1d_skinny"))
    for name in ("conv1d_tail", "conv_transpose1d_tail"):
        assert all(p["C_in_g"] > p["chunk_channels"] for _, p in launches(name))
    assert {m["THREAD_C"] for m, _ in launches("conv1d_tail")} == {"1", "2", "4"}
    assert {m["THREAD_C"] for m, _ in launches("conv_transpose1d_tail")} == {"4", "8"}
