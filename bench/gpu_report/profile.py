"""One pass of one layer under a profiler, and the names of the kernels that PyTorch runs for some layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from ..layers import load
from ..modes import MODES, Direction, Mode, our_function, without_bias
from ..speed.gpu import Data
from ..speed.peers import CudnnSettings, conv_by_trimming, conv_channels_last, optional_module, to_channels_last
from . import records

# (layer, mode, pass) under a short name. Forward passes on tensor cores pack the weights first, or their blocks do; the
# last has the most weights to pack.
WORK: dict[str, tuple[str, str, Direction]] = {
    "conv2": ("whisper_large_v3.conv2_b16", "bfloat16", "forward"),
    "feat1": ("wav2vec2_base.feat1_k3s2", "bfloat16", "grad_weight"),
    "packing": ("diffusion_policy.mid_k5_c2048_b1", "bfloat16", "forward"),
}
SMALL = "vits.flow_wn_in_k5_b1"

PEER_LAYERS = (
    "whisper_large_v3.conv2_b16",
    "wav2vec2_base.feat1_k3s2",
    "hifigan_v1.resblock_k11_d5_c32",
    "encodec24.enc_down_k16s8",
    "mamba2_2p7b.conv_k4",
    "hifigan_v1.up1_k16s8_b1",
)


def work(name: str, *, rehearse: bool, **_: object) -> Iterator[tuple[str, records.Work]]:
    yield name, partial(run, name, rehearse=rehearse)


def run(name: str, *, rehearse: bool = False) -> dict[str, Any]:
    """Make everything ready, then run one pass between the marks at which a profiler starts and stops."""
    import cupy

    layer_name, mode_name, direction = WORK[name]
    layer = next(layer for layer in load() if layer.name == (SMALL if rehearse else layer_name))
    mode = next(mode for mode in MODES if mode.name == mode_name)
    problem = without_bias(mode.problem(layer), direction)
    data = Data(cupy, problem, 1, direction)
    function, output = our_function(problem, direction, mode.precision), data.poisoned()
    function(*data.sets[0], out=output)
    cupy.cuda.runtime.deviceSynchronize()
    if not rehearse:
        cupy.cuda.runtime.profilerStart()
    function(*data.sets[0], out=output)
    cupy.cuda.runtime.deviceSynchronize()
    if not rehearse:
        cupy.cuda.runtime.profilerStop()
    verdict = data.judge(output, mode)
    return {"ok": verdict.ok, "note": verdict.note, "problem": str(problem)}


def peer_work() -> Iterator[tuple[str, records.Work]]:
    """One piece for each of PEER_LAYERS, format and order of the data."""
    torch = optional_module("torch")
    if torch is None or not torch.cuda.is_available():
        yield "PyTorch", lambda: {"absent": "PyTorch with CUDA is not installed"}
        return
    layers = {layer.name: layer for layer in load()}
    for name in PEER_LAYERS:
        for mode in MODES[:2]:
            for channels_last in (False, True):
                key = f"{name} {mode.name}{' channels_last' if channels_last else ''}"
                yield key, partial(_kernels, torch, layers[name], mode, channels_last)


def _kernels(torch: Any, layer: Any, mode: Mode, channels_last: bool) -> dict[str, Any]:
    """{"kernels": [(name, microseconds), ...]} of one call, in order."""
    problem = mode.problem(layer)
    shapes = (problem.input_shape, problem.weight_shape, problem.bias_shape)
    dtype = getattr(torch, mode.dtype)
    x, w, b = (None if shape is None else torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes)
    if channels_last and not problem.transposed:
        x, w = to_channels_last(x), to_channels_last(w)
        function = conv_channels_last(problem, convert=False)
    elif channels_last:
        return {"absent": "measured for convolutions alone"}
    else:
        function = conv_by_trimming(problem)
    with torch.inference_mode(), CudnnSettings(allow_tf32=False).context():
        for _ in range(2):
            function(x, w, b)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function(x, w, b)
            torch.cuda.synchronize()
    events = sorted((e for e in profile.events() if e.device_type.name == "CUDA"), key=lambda e: e.time_range.start)
    return {"kernels": [(event.name, event.time_range.elapsed_us()) for event in events]}
