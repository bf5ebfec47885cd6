"""What all forward families on tensor cores keep: bits in every layout, what a NaN may spoil, and the error bound.

The problems of a family, and what is true of it alone, are in the file of its tests. Where the bytes of a number matter
and not its bits, float16 stands for both 16-bit formats.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import cases
from gpuconv.cases import Data, in_format
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.edge import PADDING_MODES
from gpuconv.problem import ConvProblem
from tests.hostcuda import TensorCores
from tests.kernels import test_col2im, test_im2col, test_mma, test_toeplitz
from tests.kernels.arrays import assert_same_bits
from tests.kernels.tensor_cores import (
    HARD,
    HARD_TO_SPLIT,
    Run,
    assert_like_base,
    assert_right,
    check_padding_mode,
    check_special_samples_and_biases,
    check_views,
    hard_data,
)

FILES: dict[str, Any] = {"mma": test_mma, "im2col": test_im2col, "col2im": test_col2im, "toeplitz": test_toeplitz}
PADDED = {"im2col": "planes", "col2im": "head", "toeplitz": "odd"}  # conv1d_mma is in test_edges.py

EVERY = {
    f"{name}-{what}-{mode}": (file.run, in_format(problem, mode))
    for name, file in FILES.items()
    for what, problem in file.PROBLEMS.items()
    for mode in file.MODES
    if mode != "bfloat16"
}
every_problem = pytest.mark.parametrize(("run", "problem"), EVERY.values(), ids=EVERY)

EXPONENTS = {**HARD, "mixed magnitudes that cancel": HARD["mixed magnitudes"], **HARD_TO_SPLIT}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", ["mma", "im2col", "col2im"])
def test_architectures(name: str, arch: str) -> None:
    file, device = FILES[name], Device.from_arch(arch)
    for problem in file.PROBLEMS.values():
        taken = {mode for mode in file.MODES if file.takes(in_format(problem, mode), device)}
        assert taken == (set(file.MODES) if arch != "sm_75" else {"float16"})
        assert not file.takes(replace(problem, dtype="float64"), device)
        assert not file.takes(replace(problem, dtype="complex64"), device)


@every_problem
def test_views_change_no_bit(run: Run, problem: ConvProblem) -> None:
    check_views(run, problem)


@every_problem
def test_values_that_are_no_numbers_spoil_only_what_they_feed(run: Run, problem: ConvProblem) -> None:
    """Also where other taps of an output fall into the padding: there a weight that is no number counts for nothing."""
    p = problem
    for k in (0, p.K // 2, p.K - 1):
        x, w, b = cases.random_data(p, k)
        rows = np.moveaxis(w, 1, 0) if p.transposed else w
        rows[0, :, k], rows[1 % len(rows), 0, k], rows[-1, -1, k] = np.nan, np.inf, -np.inf
        y = assert_like_base(run, p, Data(np.abs(x), w, b)).astype(np.float64)
        assert not np.isfinite(y).all() or k != p.K // 2  # the outer taps may meet no sample
    check_special_samples_and_biases(run, p)


@pytest.mark.parametrize("padding_mode", PADDING_MODES[1:])
@pytest.mark.parametrize("name", PADDED)
def test_padding_that_means_samples_gives_the_bits_of_padded_input(name: str, padding_mode: str) -> None:
    file = FILES[name]
    for mode in file.MODES:
        check_padding_mode(file.run, in_format(file.PROBLEMS[PADDED[name]], mode), padding_mode)


HARD_ITEMS = [
    (name, mode, kind)
    for name, file in FILES.items()
    for mode in ("float32", "tf32", "bfloat16")
    if mode in file.MODES
    for kind in EXPONENTS
    if mode == "float32" or kind not in HARD_TO_SPLIT
]


@pytest.mark.parametrize(("name", "mode", "kind"), HARD_ITEMS)
def test_hard_data(name: str, mode: str, kind: str, rule: TensorCores) -> None:
    file = FILES[name]
    for seed, problem in enumerate(file.PROBLEMS.values()):
        p = in_format(problem, mode)
        data = hard_data(p, EXPONENTS[kind], seed, cancels=kind.endswith("cancel"))
        assert_right(p, file.run(p, data), data, (kind, rule))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["im2col", "col2im"])
def test_the_launches_of_the_public_function(name: str, cupy: Any, launched: list[str]) -> None:
    """The weight is packed at each call, or once where it is prepared."""
    p = in_format(FILES[name].PROBLEMS[PADDED[name]], "float16")
    data = cases.random_data(p, 10)
    x, w, b = (cupy.asarray(array) for array in data)
    outputs = [gpuconv.conv1d(x, weight, b, **cases.call_settings(p)).get() for weight in (w, gpuconv.prepare(w))]
    assert launched == [f"pack_{name}_weight", f"conv1d_{name}"] * 2
    assert_right(p, outputs[0], data)
    assert_same_bits(outputs[1], outputs[0], str(p))
