"""No access of a thread races with another's in the kernels as they are, and where a barrier is gone, it is seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gpuconv import cases, dispatch
from gpuconv.device import Device
from gpuconv.families import Config, Launch, Layout
from gpuconv.problem import ConvProblem, WeightGradientProblem, numpy_dtype
from tests import hostcuda
from tests.hostcuda import build, races
from tests.hostcuda.errors import RaceError
from tests.hostcuda.test_faults import toy

BODIES = {
    "barrier": ("smem[t] = input[i]; __syncthreads(); output[i] = smem[63 - t];", ""),
    "no_barrier": ("smem[t] = input[i]; output[i] = smem[63 - t];", "shared memory"),
    "too_early": (
        "smem[t] = input[i]; __syncthreads(); float v = smem[63 - t]; smem[t] = v; __syncthreads(); output[i] = v;",
        "shared memory",
    ),
    "warp": ("smem[t] = input[i]; __syncwarp(); output[i] = smem[t ^ 1];", ""),
    "no_warp": ("smem[t] = input[i]; output[i] = smem[t ^ 1];", "shared memory"),
    "shuffle": (
        "smem[t] = input[i]; float v = __shfl_sync(~0u, smem[t], 0); output[i] = smem[t ^ 1] + v;",
        "shared memory",
    ),
    "beyond_the_warp": ("smem[t] = input[i]; __syncwarp(); output[i] = smem[63 - t];", "shared memory"),
    "blocks": ("output[i] = input[i]; if (t == 0) output[0] = input[0];", "output"),
}


def test_accesses_that_nothing_orders_are_named() -> None:
    x = np.arange(128, dtype=np.float32)
    launch = Launch(grid=2, block=64, shared_bytes=256, index_bits=32, params=(("n", 128),))
    for name, (body, racing) in BODIES.items():
        arrays = {"input": x, "output": np.zeros_like(x)}
        with races.watched():
            if not racing:
                hostcuda.run(toy(f"races_{name}", body), launch, arrays)
                continue
            # Whichever thread comes first.
            for schedule in ("forward", "reverse"):
                with pytest.raises(RaceError, match=rf"races_{name}: nothing orders the .* of {racing} "):
                    hostcuda.run(toy(f"races_{name}", body), launch, arrays, schedule=schedule)


def problem(case: str, dtype: str) -> ConvProblem:
    (found,) = (each.problem for each in cases.select(None) if each.name == case)
    return replace(found, dtype=dtype)


def compute(family: str, case: str, dtype: str) -> None:
    p = problem(case, dtype)
    q = WeightGradientProblem.of(replace(p, has_bias=False)) if family.startswith("weight") else p
    rng = np.random.default_rng(0)
    shapes = [shape for name, shape in q.shapes.items() if name != q.result]
    hostcuda.compute(q, *(rng.integers(-3, 4, shape).astype(numpy_dtype(dtype)) for shape in shapes), family=family)


@pytest.mark.parametrize(
    ("family", "case", "dtype"),
    [
        ("conv1d_mma", "docs_example", "float16"),
        ("conv1d_im2col", "groups3_long_kernel", "float16"),
        ("conv1d_col2im", "bpnet_head_49_5", "float16"),
        ("conv1d_toeplitz", "k_depthwise_longer_than_input", "float16"),
        ("conv1d_depthwise", "k_depthwise_longer_than_input", "float32"),
        ("conv1d_skinny", "k_equals_input", "float32"),
        ("conv1d_stem", "stride7_pair", "float32"),
        ("conv1d_tiled", "docs_example", "float32"),
        ("conv_transpose1d_phases", "up_k1", "float32"),
        ("weight_gradient_mma", "k3", "float16"),
        ("weight_gradient_tiled", "k1", "float32"),
    ],
)
def test_kernels_have_no_races(family: str, case: str, dtype: str) -> None:
    with races.watched():
        compute(family, case, dtype)


def test_a_block_that_computes_again_has_no_races() -> None:
    """Some of its rows lack a tap, and an infinity lies where that would be: see run_block in mma.cuh."""
    p = ConvProblem("conv_transpose1d", 2, 40, 8, 20, 7, 3, 2, 1, dtype="float16")
    choice = dispatch.choose(p, Layout.contiguous(p), Device.from_arch("sm_90"), "conv_transpose1d_mma")
    assert choice is not None
    assert dict(choice.launch.params)["full_phases"] == p.stride
    x, w, _ = cases.random_data(p, 1)
    x[0, 3, 10] = np.inf
    with races.watched():
        output = hostcuda.compute(p, x, w, family="conv_transpose1d_mma")
    assert np.isfinite(output[1]).all()


@pytest.mark.parametrize(
    ("family", "case", "dtype", "barrier"),
    [
        ("conv1d_tiled", "docs_example", "float32", "__syncthreads();"),
        ("conv1d_toeplitz", "k_depthwise_longer_than_input", "float16", "__syncwarp();"),
        ("weight_gradient_mma", "k3", "float16", "__syncthreads();"),
    ],
)
def test_a_kernel_without_its_barriers_races(
    family: str, case: str, dtype: str, barrier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build.Program.of

    def without(config: Config) -> build.Program:
        program = whole(config)
        if config.kernel != family:
            return program
        assert barrier in program.text
        return replace(program, text=program.text.replace(barrier, ";"))

    monkeypatch.setattr(build.Program, "of", without)
    with races.watched(), pytest.raises(RaceError, match=f"{family}: nothing orders .* of shared memory"):
        compute(family, case, dtype)
