"""Every tile of the tensor-core kernels on layers of real models: all must give the same bits, and what does each cost?

Dispatch chooses one tile for a layer; this takes each in turn. Parts of the first result are compared with the
reference, and all other results with the first, bit for bit. Times are taken with warm caches, so they only compare
tiles with each other: the families' cost model predicts their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from gpuconv import dispatch, runtime
from gpuconv.families import Layout, mma, weight_gradient_mma
from gpuconv.problem import ConvProblem, Problem, WeightGradientProblem
from gpuconv.tasks import SIGNATURES

from ..layers import load
from ..modes import MODES, Direction, Mode, without_bias
from ..speed.gpu import Data
from . import records


class Taken(NamedTuple):
    """A layer at a batch and a length of our own, and the passes that are computed of it."""

    layer: str
    batch: int
    length: int
    directions: tuple[Direction, ...]


# Rows of even and of odd length; many taps with a large stride; a transposed layer; sums so long that they are cut into
# segments, of samples so short that several share a tile, and such samples without segments.
TAKEN = (
    Taken("whisper_large_v3.conv2_b16", 2, 3000, ("forward", "grad_weight")),
    Taken("wav2vec2_base.feat1_k3s2", 1, 15999, ("forward", "grad_weight")),
    Taken("encodec24.enc_down_k16s8", 8, 600, ("forward", "grad_weight")),
    Taken("hifigan_v1.up1_k16s8_b1", 1, 3440, ("forward",)),
    Taken("diffusion_policy.mid_k5_c2048_b1", 40, 4, ("forward",)),
    Taken("tcn_wordlm.conv_k3_d8", 16, 40, ("forward",)),
)
ON_TENSOR_CORES = ("bfloat16", "float32", "tf32", "float16")
REPEATS = 5


def work(*, rehearse: bool = False) -> Iterator[tuple[str, records.Work]]:
    """One piece for each layer, pass and mode, the mode outermost; small for a rehearsal."""
    layers = {layer.name: layer for layer in load()}
    modes = sorted((m for m in MODES if m.name in ON_TENSOR_CORES), key=lambda m: ON_TENSOR_CORES.index(m.name))
    for mode in modes[:2] if rehearse else modes:
        for name, batch, length, directions in TAKEN:
            problem = replace(mode.problem(layers[name], batch), L_in=length)
            if rehearse:  # as small as tensor cores take, split products too
                problem = replace(problem, N=4, C_in=72, C_out=24, L_in=min(length, 140), K=min(problem.K, 8))
            for direction in directions:
                key = f"{name} N={problem.N} L={problem.L_in} {mode.name} {direction}"
                repeats = 1 if rehearse else REPEATS
                yield key, partial(compare, without_bias(problem, direction), mode, direction, repeats)


def compare(problem: ConvProblem, mode: Mode, direction: Direction, repeats: int) -> dict[str, Any]:
    """Compute a pass with every tile: {tile: microseconds}, and by how many bytes each differs from the first."""
    cupy = runtime.cupy_module()
    data = Data(cupy, problem, 1, direction)
    x, w, third = data.sets[0]
    fused = len(SIGNATURES[problem.op].operands) - 3  # arrays that none of these layers has
    arrays = (x, w, third, *[None] * fused) if direction == "forward" else (x, third)
    first: Any = None
    times, differing = {}, {}
    for name, executor in executors(problem, direction):
        output = data.poisoned()
        executor.run(*arrays, output)
        bits = output.reshape(-1).view(np.uint8)
        if first is None:
            first, verdict = bits, data.judge(output, mode)
        different = int(cupy.asnumpy(bits != first).sum())
        if different:
            differing[name] = different
        times[name] = round(min(_microseconds(cupy, executor, (*arrays, output)) for _ in range(repeats)), 1)
    return {"ok": verdict.ok and not differing, "note": verdict.note, "tiles": times, "differing_bytes": differing}


def _microseconds(cupy: Any, executor: runtime.Executor, arrays: Sequence[Any]) -> float:
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    executor.run(*arrays)
    stop.record()
    stop.synchronize()
    return float(1e3 * cupy.cuda.get_elapsed_time(start, stop))


def executors(problem: ConvProblem, direction: Direction) -> Iterator[tuple[str, runtime.Executor]]:
    """(name, executor for contiguous arrays) of every tile of the family on tensor cores that takes a pass.

    Raises:
        ValueError: dispatch does not choose such a family.
    """
    device = runtime.current_gpu()
    module: ModuleType = mma
    function, signature = "compare_tilings", SIGNATURES[problem.op]
    chosen: Problem = problem
    if direction != "forward":
        module, function, signature = weight_gradient_mma, "_tilings", SIGNATURES[f"{problem.op}_weight"]
        chosen = WeightGradientProblem.of(problem)
    layout = Layout.contiguous(chosen)
    choice = dispatch.choose(chosen, layout, device)
    if choice is None or not choice.family.endswith("_mma"):
        raise ValueError(f"{problem} does not run on tensor cores")
    every = getattr(module, function)
    for place in range(len(choice.plan.candidates)):
        with mock.patch.object(
            module, function, lambda *given, place=place, **how: every(*given, **how)[place : place + 1]
        ):
            one = dispatch.choose.__wrapped__(chosen, layout, device)
        assert one is not None
        yield one.plan.candidates[0][0], runtime.Executor(one, (*signature.operands, chosen.result))
