"""What gpuconv.families says of adding a kernel family: two files and one line, and everything else finds it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.layers import load
from bench.modes import MODES
from bench.static import predictions
from bench.static.__main__ import compile_all
from gpuconv import cases, dispatch, source
from gpuconv.checks import families as family_checks
from gpuconv.device import Device
from gpuconv.explain import explain
from gpuconv.families import FAMILIES, Config, Family, Layout, Plan, Refusal
from gpuconv.families.base import base_config, conv_plan
from gpuconv.families.offsets import Overhang, index_bits
from gpuconv.problem import ArraySpec, ConvProblem
from tests import hostcuda
from tests.hostcuda import Program

H200 = Device.from_arch("sm_90")
BLOCK_SIZE = 128

# Pointwise layers of one group, one thread per output element.
KERNEL = """// conv1d_pointwise: a toy.

#include "common.cuh"
#include "finish.cuh"

struct Params {
    index_t num_outputs;
    index_t C_out, L_out, C_in_g;
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t weight_stride_out, weight_stride_in;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
    FUSED_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from the family");

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE) conv1d_pointwise(
    const storage_t* __restrict__ input, const storage_t* __restrict__ weight, const storage_t* __restrict__ bias,
    storage_t* __restrict__ output, FUSED_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    const index_t i = index_t(blockIdx.x) * BLOCK_SIZE + threadIdx.x;
    if (i >= p.num_outputs) return;
    const index_t l = i % p.L_out, c_out = i / p.L_out % p.C_out, n = i / p.L_out / p.C_out;
    acc_t acc = scalar::zero();
    for (index_t c = 0; c < p.C_in_g; ++c) {
        acc = multiply_add(
            scalar::load(weight[c_out * p.weight_stride_out + c * p.weight_stride_in]),
            scalar::load(input[n * p.input_stride_n + c * p.input_stride_c + l * p.input_stride_l]), acc);
    }
    const index_t place = n * p.output_stride_n + c_out * p.output_stride_c + l * p.output_stride_l;
    output[place] = finish(acc, epilogue.channel(c_out), output + place);
}
"""


class Conv1dPointwise(Family[ConvProblem]):
    """A toy."""

    name = "conv1d_pointwise"
    kind = "conv1d"

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Plan | Refusal:
        p = problem
        if p.K != 1 or p.groups != 1 or p.stride != 1 or p.padding != (0, 0):
            return Refusal("needs K == 1, groups == 1, stride 1 and no padding")
        num_outputs = p.N * p.C_out * p.L_out
        grid = -(-num_outputs // BLOCK_SIZE)
        bits = index_bits(p, layout, Overhang(), grid * BLOCK_SIZE)
        config = base_config(self.name, p.dtype, bits, BLOCK_SIZE)
        return conv_plan(config, p, layout, bits, grid=grid, block=BLOCK_SIZE, own={"num_outputs": num_outputs})

    def configs(self, device: Device) -> Iterator[Config]:
        yield base_config(self.name, "float32", 32, BLOCK_SIZE)


@pytest.fixture(autouse=True)
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Family[Any]]:
    """The toy in front of the other families, with its kernel beside theirs."""
    folder = tmp_path / "cuda_src"
    shutil.copytree(source.directory(), folder)
    (folder / "conv1d_pointwise.cu").write_text(KERNEL)
    toy = Conv1dPointwise()
    monkeypatch.setattr(source, "directory", lambda: folder)
    for module in (dispatch, family_checks):
        monkeypatch.setattr(module, "FAMILIES", (toy, *FAMILIES))

    def forget() -> None:
        for cached in (source.read, source.inlined, source.params_fields, dispatch.choose):
            cached.cache_clear()

    forget()
    yield toy
    forget()


def test_dispatch_and_explain_know_it() -> None:
    x, w = ArraySpec((2, 8, 50), "float32"), ArraySpec((4, 8, 1), "float32")
    assert dispatch.algorithms("conv1d")[1] == "conv1d_pointwise"
    assert "kernel    conv1d_pointwise with DTYPE=float32" in str(explain("conv1d", x, w, device="sm_90"))
    refused = explain("conv1d", x, w, padding=1, device="sm_90").choice
    assert refused is not None
    assert refused.refusals[0] == ("conv1d_pointwise", "needs K == 1, groups == 1, stride 1 and no padding")


def test_verify_runs_it() -> None:
    assert "conv1d_pointwise" in family_checks.families_of(H200)[0]
    taken = [c.name for c in cases.CASES if "conv1d_pointwise" in family_checks.families_that_take(c.problem, H200)]
    assert len(taken) >= 2


def test_it_computes_the_bits_of_the_base_family() -> None:
    p = ConvProblem("conv1d", 3, 7, 5, 40, 1, has_bias=True)
    data = cases.random_data(p, 0)
    assert Program.of(next(Conv1dPointwise().configs(H200))).kernel == "conv1d_pointwise"
    output = hostcuda.compute(p, *data, schedule="every")
    assert output.tobytes() == hostcuda.compute(p, *data, family="base").tobytes()


def test_the_benchmarks_predict_it() -> None:
    layers = [layer for layer in load() if layer.forward.K == layer.forward.groups == 1]
    planned = predictions.plan(layers, [mode for mode in MODES if mode.name == "float32"], H200)
    mine = [one for one in planned if one.choice.family == "conv1d_pointwise"]
    reports = compile_all((one.choice.config for one in mine), "sm_90", Console(quiet=True))
    assert len(mine) >= 2
    assert all(0 < time.us < 1e6 for time in predictions.predicted(mine, reports, H200))
