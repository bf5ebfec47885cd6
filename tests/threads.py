"""Sixteen threads that share layers, weights and plans: `python -m tests.threads` prints what differed, as JSON.

In a fresh interpreter all threads meet every module, cache and plan for the first time at once. Each computes all jobs,
beginning with another one, and the interpreter changes threads as often as it can.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np

import gpuconv
from gpuconv.arguments import ArraySpec

THREADS = 16

Job = Callable[[], Any]


def draw(*shape: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(list(shape))
    values = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if dtype.startswith("complex") else 0)
    return (8 * values if dtype.startswith("int") else values).astype(dtype)


def first_jobs() -> dict[str, Job]:
    """What needs no object made before: whatever gpuconv loads late is loaded by the first thread that uses it."""
    spec = ArraySpec

    def explained(op: Any, x: tuple[int, ...], w: tuple[int, ...], arch: str, **settings: Any) -> Job:
        return lambda: str(gpuconv.explain(op, spec(x, "float32"), spec(w, "float32"), device=arch, **settings))

    def gradient(name: str, *arguments: Any, **settings: Any) -> Job:
        return lambda: getattr(gpuconv.grad, name)(*arguments, **settings)

    x, w, dy = draw(3, 4, 60), draw(6, 4, 5), draw(3, 6, 60)
    wide, square = draw(4, 16, 3000), draw(16, 16, 9)
    return {
        "conv1d": lambda: gpuconv.conv1d(x, w, draw(6), padding="same"),
        "long kernel": lambda: gpuconv.conv1d(draw(2, 1, 4000), draw(8, 1, 300)),
        "several threads": lambda: gpuconv.conv1d(wide, square, padding=4),
        "depthwise": lambda: gpuconv.conv1d(wide, draw(16, 1, 7), groups=16),
        "strided": lambda: gpuconv.conv1d(x, w, stride=2, dilation=2, padding=(3, 1)),
        "reflect": lambda: gpuconv.conv1d(x, w, padding=4, padding_mode="reflect"),
        "transposed": lambda: gpuconv.conv_transpose1d(x, draw(4, 3, 5), stride=3, groups=2),
        "fused": lambda: gpuconv.conv1d(x, w, padding=2, activation="gelu", residual=dy, input_activation="silu"),
        "lengths": lambda: gpuconv.conv1d(x, w, padding="same", lengths=[60, 7, 31]),
        "float16": lambda: gpuconv.conv1d(x.astype(np.float16), w.astype(np.float16)),
        "integers": lambda: gpuconv.conv1d(draw(2, 3, 40, dtype="int8"), draw(4, 3, 3, dtype="int8")),
        "real taps": lambda: gpuconv.conv1d(draw(3, 4, 60, dtype="complex64"), w),
        "grad input": gradient("conv1d_input", x.shape, w, dy, padding=2),
        "grad weight": gradient("conv1d_weight", x, w.shape, dy, padding=2),
        "grad bias": gradient("conv1d_bias", dy),
        "signal": lambda: gpuconv.signal.resample_poly(draw(2, 900), 2, 3, axis=1),
        "reference": lambda: gpuconv.reference.error_bound(
            gpuconv.explain("conv1d", x, w, device="cpu").problem, x, w, None
        ),
        "dense on sm_90": explained("conv1d", (8, 64, 900), (64, 64, 3), "sm_90"),
        "tail on sm_80": explained("conv_transpose1d", (2, 64, 90), (64, 1, 16), "sm_80", stride=8),
        "weight on sm_90": explained("conv1d", (8, 64, 900), (64, 64, 3), "sm_90", direction="grad_weight"),
        "filter bank on sm_120": explained("conv1d", (8, 1, 9000), (128, 1, 256), "sm_120", stride=64),
    }


def shared_jobs() -> dict[str, Job]:
    """What all threads do with the same layers and prepared weights, each with streams of its own."""
    from gpuconv import nn, stream

    layer = nn.Conv1d(4, 6, 5, padding="same", padding_mode="replicate", activation="silu", rng=0)
    up = nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1, rng=1)
    prepared = gpuconv.prepare(draw(6, 4, 5))
    x = draw(3, 4, 60)

    def pushed(layer: Any, **settings: Any) -> Any:
        own = getattr(stream, "ConvTranspose1d" if layer is up else "Conv1d")(layer, slots=3, **settings)
        pieces = [own.push(x[..., start : start + 7]) for start in range(0, 60, 7)]
        return np.concatenate([*pieces, own.flush()], axis=-1)

    return {
        "layer": lambda: layer(x),
        "transposed layer": lambda: up(x),
        "prepared": lambda: gpuconv.conv1d(x, prepared, stride=2),
        "state": lambda: [value.copy() for value in layer.state_dict().values()],
        "stream of a layer": lambda: pushed(up),
        "stream of a prepared weight": lambda: pushed(prepared, padding="causal"),
    }


def at_once(jobs: dict[str, Job]) -> list[dict[str, bytes]]:
    """The results of all jobs in each of the threads."""
    names, start = [*jobs], Barrier(THREADS)

    def work(thread: int) -> dict[str, bytes]:
        first = thread * len(names) // THREADS
        start.wait(60)
        return {name: digest(jobs[name]()) for name in (*names[first:], *names[:first])}

    with ThreadPoolExecutor(THREADS) as pool:
        return [*pool.map(work, range(THREADS))]


def digest(result: Any) -> bytes:
    if isinstance(result, str):
        return result.encode()
    return b"".join(
        np.ascontiguousarray(array).tobytes() for array in (result if isinstance(result, list) else [result])
    )


def main() -> dict[str, Any]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    jobs = first_jobs()
    found = [at_once(jobs)]
    shared = shared_jobs()
    found.append(at_once(shared))
    sys.setswitchinterval(interval)
    differing = [
        name
        for results, made in zip(found, (jobs, shared), strict=True)
        for name, job in made.items()
        if {digest(job())} != {result[name] for result in results}
    ]
    is_locked = getattr(sys, "_is_gil_enabled", lambda: True)
    return {"jobs": len(jobs) + len(shared), "differing": differing, "has_lock": is_locked()}


if __name__ == "__main__":
    print(json.dumps(main()))
