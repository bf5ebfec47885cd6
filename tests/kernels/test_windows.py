"""Pushes of streams in one launch: the kernels give the bits of one call and keep the new samples, time after time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from gpuconv import dispatch
from gpuconv.device import Device
from gpuconv.families import FAMILIES, ArrayLayout, Layout, Refusal, conv1d_depthwise_push, windows
from gpuconv.families.base import contiguous_strides
from gpuconv.families.windows import NEW_SAMPLES, WINDOW_STARTS
from gpuconv.problem import ConvProblem, numpy_dtype
from tests import hostcuda
from tests.kernels.test_compile import ARCHS, resources

DEVICE = Device.from_arch("sm_90")


def layer(op: Any, C_in: int, C_out: int, K: int, held: int, length: int, **settings: Any) -> tuple[ConvProblem, int]:
    """A problem on `held` samples and `length` new ones."""
    fields: dict[str, Any] = {"N": 2, "dtype": "float32", "has_bias": True, **settings}
    return ConvProblem(op, C_in=C_in, C_out=C_out, L_in=held + length, K=K, **fields), length


# A push for each family, with the name of the family; the last ones for the kernel of depthwise layers.
PUSHES = {
    "conv1d_col2im": layer("conv1d", 50, 5, 13, 12, 3, dtype="float16"),
    "conv_transpose1d_col2im": layer("conv_transpose1d", 50, 5, 13, 12, 3, dtype="bfloat16", padding_left=12),
    "conv1d_mma": layer("conv1d", 16, 24, 3, 2, 1, dtype="float16"),
    "conv_transpose1d_mma": layer("conv_transpose1d", 16, 8, 4, 1, 2, dtype="bfloat16", stride=2, padding_left=2),
    "conv1d_im2col": layer("conv1d", 2, 16, 20, 19, 3, dtype="bfloat16"),
    "conv_transpose1d_im2col": layer("conv_transpose1d", 2, 16, 20, 19, 3, dtype="bfloat16", padding_left=19),
    "conv1d_toeplitz": layer("conv1d", 3, 3, 64, 63, 2, dtype="float16", groups=3),
    "conv1d_depthwise": layer("conv1d", 3, 6, 5, 4, 3, groups=3),
    "conv1d_skinny": layer("conv1d", 5, 7, 3, 4, 1, dilation=2, dtype="float64"),
    "conv1d_stem": layer("conv1d", 2, 9, 4, 3, 12),
    "conv1d_tail": layer("conv1d", 6, 2, 3, 2, 9),
    "conv1d_narrow": layer("conv1d", 6, 7, 3, 2, 15),
    "conv1d_tiled": layer("conv1d", 6, 40, 3, 2, 24, dtype="complex64"),
    "conv_transpose1d_depthwise": layer("conv_transpose1d", 3, 3, 5, 3, 2, groups=3, padding_left=2),
    "conv_transpose1d_tail": layer("conv_transpose1d", 4, 2, 4, 1, 20, stride=2, padding_left=2),
    "conv_transpose1d_phases": layer("conv_transpose1d", 4, 24, 4, 1, 9, stride=2, padding_left=2, dtype="float64"),
    "conv1d_direct": layer("conv1d", 3, 4, 3, 4, 2, dtype="int16", out_dtype="int32", stride=2),
    "conv_transpose1d_gather": layer("conv_transpose1d", 3, 4, 5, 2, 3, padding_left=4, dtype="complex128"),
    "depthwise, a step": layer("conv1d", 300, 300, 4, 3, 1, groups=300),
    "depthwise, dilated": layer("conv1d", 70, 70, 3, 6, 1, groups=70, dilation=3, dtype="bfloat16"),
    "depthwise, several samples": layer("conv1d", 5, 5, 6, 5, 4, groups=5, stride=2, dtype="complex64"),
}


def push_of(p: ConvProblem, length: int, name: str) -> dispatch.Push:
    family = name if name in {family.name for family in FAMILIES} else None
    new_samples = ArrayLayout(contiguous_strides((length, p.C_in, p.N))[::-1])  # as `pushes` makes them
    found = dispatch.choose_push(p, length, Layout.contiguous(p), new_samples, DEVICE, family)
    assert not isinstance(found, Refusal), f"{name}: {found.reason}"
    return found


def random_array(rng: Any, shape: tuple[int, ...], dtype: str) -> Any:
    real, imaginary = 8 * rng.standard_normal((2, *shape))
    if dtype.startswith("int"):
        real = abs(real)  # some negative 16-bit integers are what hostcuda takes for poison
    return (real + 1j * imaginary if dtype.startswith("complex") else real).astype(numpy_dtype(dtype))


def pushes(p: ConvProblem, length: int, push: dispatch.Push, count: int) -> Iterator[tuple[Any, Any, Any, Any]]:
    """All samples, weight, bias and output of pushes one after the other."""
    rng = np.random.default_rng(0)
    held, plan = p.L_in - length, push.choice.plan
    weight, bias = (random_array(rng, p.shapes[name], p.dtype_of(name)) for name in ("weight", "bias"))
    samples = random_array(rng, (p.N, p.C_in, held), p.dtype)
    window = random_array(rng, push.window, p.dtype)
    (window.transpose(0, 2, 1) if push.channels_last else window)[..., :held] = samples
    given = {"input": window, "weight": weight, "bias": bias, WINDOW_STARTS: np.zeros(push.blocks, np.int32)}
    given |= {name: np.empty(num_bytes // 4, np.uint32) for name, num_bytes in plan.scratch}
    given["output"] = np.empty(p.shapes["output"], numpy_dtype(p.dtype_of("output")))
    for _ in range(count):
        new = random_array(rng, (length, p.C_in, p.N), p.dtype).T
        samples = np.concatenate((samples[..., samples.shape[-1] - held :], new), axis=-1)
        given[NEW_SAMPLES] = new
        for step in plan.steps:
            written = (
                ["output", "input", WINDOW_STARTS] if "output" in step.arrays else [name for name, _ in plan.scratch]
            )
            arrays = {name or "null": given[name] if name else None for name in step.arrays}
            hostcuda.run(
                step.config, step.launch, arrays, outputs=written, keeps=written[1:], device=DEVICE, schedule="every"
            )
        yield samples, weight, bias, given["output"]


def test_pushes_give_the_bits_of_one_call() -> None:
    """Fails if a block writes where another reads an older sample, or a window does not come round."""
    chosen = {name: push_of(*push, name) for name, push in PUSHES.items()}
    plain = [family.name for family in FAMILIES if family.kind in ("conv1d", "conv_transpose1d")]
    assert list(PUSHES)[: len(plain)] == plain
    hostcuda.prebuild([step.config for push in chosen.values() for step in push.choice.plan.steps])
    rings = set()
    for name, (p, length) in PUSHES.items():
        rings.add(chosen[name].channels_last)
        for samples, weight, bias, output in pushes(p, length, chosen[name], 2 * (p.L_in // length) + 2):
            expected = hostcuda.compute(p, samples, weight, bias, family=chosen[name].choice.family, device=DEVICE)
            np.testing.assert_array_equal(output, expected, err_msg=name)
    assert rings == {True, False}


def test_what_is_not_pushed_in_one_launch() -> None:
    samples = ArrayLayout((0, 0, 1))
    for p, length, reason in (
        (layer("conv1d", 600, 4, 3, 2, 4)[0], 4, "needs at most 8 new samples for each thread of a block"),
        (layer("conv1d", 4, 4, 3, 2, 1, N=0)[0], 1, "needs a result"),
        (layer("conv1d", 4, 4, 3, 2**31, 1, dilation=2**30)[0], 1, "needs windows that begin at a place below 2**31"),
        (layer("conv1d", 512, 1024, 16, 8, 16, N=1, stride=8)[0], 16, "needs one kernel that reads the input and"),
    ):
        found = dispatch.choose_push(p, length, Layout.contiguous(p), samples, DEVICE)
        assert isinstance(found, Refusal)
        assert found.reason.startswith(reason)
    p, _ = PUSHES["depthwise, a step"]
    for change, reason in (
        ({"C_out": 600}, "needs a depthwise layer of floating-point numbers"),
        ({"dtype": "int8"}, "needs a depthwise layer of floating-point numbers"),
        ({"padding_left": 1}, "needs a convolution without padding"),
        ({"L_in": 20}, "needs from 1 to 3 new samples"),
    ):
        other = replace(p, **change)
        length = other.L_in - 3
        layout = Layout((*Layout.contiguous(other).arrays, (NEW_SAMPLES, samples)))
        assert conv1d_depthwise_push.plan(other, layout, length) == Refusal(reason)


def test_they_compile_without_local_memory() -> None:
    """One specialisation of each family, and those of the kernel of depthwise layers, each for another architecture."""
    found = [
        next(windows.configs(family, DEVICE)) for family in FAMILIES if family.kind in ("conv1d", "conv_transpose1d")
    ]
    for i, config in enumerate((*found, *conv1d_depthwise_push.configs())):
        found_there = resources(config, "sm_90" if i < len(found) else ARCHS[i % len(ARCHS)])
        assert found_there.local_bytes == 0, (config, found_there)
