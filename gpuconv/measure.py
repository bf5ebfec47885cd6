"""Layers measured against PyTorch: results are compared first, then calls are timed in turns.

A call is timed as a program makes it: it allocates its output, and on a GPU the time includes Python's part of the
launch. Calls use the same arrays again, so caches may hold them. Both libraries take turns of some thirty milliseconds,
so that a busy machine slows both. The time of a library is the median of its turns, its spread half the distance of
their quartiles.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from . import functional, peers, runtime
from .arguments import ArraySpec
from .dtypes import INTEGERS, numpy_dtype
from .explain import explain
from .fusion import Fused
from .layers import Layer
from .problem import ConvProblem

TURN = 0.03  # seconds of a turn of one library
PAUSE = 0.15  # seconds before a turn on the CPU, after which the other library's threads no longer spin
MOST_CALLS = 1000  # the most calls of a turn


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a call: the median of the turns and half the distance of their quartiles."""

    median: float
    spread: float

    @classmethod
    def of(cls, turns: list[float]) -> Timing:
        low, median, high = np.quantile(turns, (0.25, 0.5, 0.75))
        return cls(float(median), float(high - low) / 2)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A layer on one device.

    Attributes:
        layer: what was computed.
        method: the kernel family, or on the CPU the method; "fft" on both.
        ours: gpuconv's time; None where the results differ.
        theirs: PyTorch's time; None where the results differ, and where PyTorch has no result.
        difference: the norm of the difference of both results over that of PyTorch's; None where PyTorch has no result.
        tolerance: the largest permitted `difference`.
        note: why PyTorch has no result.
    """

    layer: Layer
    method: str
    ours: Timing | None = None
    theirs: Timing | None = None
    difference: float | None = None
    tolerance: float = 0.0
    note: str = ""

    @property
    def is_right(self) -> bool:
        """Whether both results agree, or PyTorch has no result."""
        return self.difference is None or self.difference <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, times in seconds."""
        x, weight, bias = self.layer.arrays
        times = {
            name: None if timing is None else {"median_s": timing.median, "spread_s": timing.spread}
            for name, timing in (("gpuconv", self.ours), ("pytorch", self.theirs))
        }
        return {
            "op": self.layer.op, "input": list(x.shape), "weight": list(weight.shape), "bias": bias is not None,
            "dtype": str(x.dtype), "settings": settings_text(self.layer), "method": self.method, **times,
            "difference": self.difference, "tolerance": self.tolerance, "note": self.note,
        }  # fmt: skip


_DEFAULTS = {
    "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0, "padding_mode": "zeros",
    "precision": "float32",
}  # fmt: skip


def settings_text(layer: Layer) -> str:
    """The settings of a layer that differ from the defaults, as arguments; arrays by their shapes."""

    def text(value: Any) -> str:
        if isinstance(value, ArraySpec):
            return str(value.shape)
        return f"({', '.join(map(text, value))})" if isinstance(value, tuple) else repr(value)

    given = {name: 0 if value == (0, 0) else value for name, value in layer.settings.items() if value is not None}
    return ", ".join(f"{name}={text(value)}" for name, value in given.items() if value != _DEFAULTS.get(name))


def compare(layer: Layer, *, on_gpu: bool, repeats: int) -> Comparison:
    """Measure a layer on CuPy's current GPU or on the CPU, and the same layer in PyTorch on the same device.

    Args:
        layer: what to compute, on normal data.
        on_gpu: whether to measure on the GPU.
        repeats: turns of each library.

    Raises:
        ValueError: the call itself would raise it.
        TypeError: likewise.
        ImportError: likewise.
        MemoryError: the arrays do not fit.
    """
    arrays, settings = _draw(layer, on_gpu)
    function: Callable[..., Any] = getattr(functional, layer.op)
    ours = partial(function, *arrays, **settings)
    device = runtime.current_gpu() if on_gpu else "cpu"
    plan = explain(layer.op, *layer.arrays, device=device, **layer.settings)
    chosen = plan.choice.family if plan.choice else plan.method.name if plan.method else "nothing to compute"
    method = "fft" if plan.by_fft else chosen
    result = ours()
    found = Comparison(layer, method)
    with ExitStack() as opened:
        calls: list[Callable[[], Any]] = [ours]
        try:
            theirs, tolerance = _peer(layer, arrays, settings, on_gpu, opened)
            difference = _difference(result, theirs(), on_gpu)
            calls.append(theirs)
            found = replace(found, difference=difference, tolerance=tolerance)
        except peers.Refused as reason:
            found = replace(found, note=str(reason))
        except (RuntimeError, NotImplementedError) as error:  # PyTorch raises these for unsupported dtypes
            found = replace(found, note=f"PyTorch: {' '.join(str(error).split())[:120]}")
        del result
        if not found.is_right:
            return found
        first, *others = _time(calls, on_gpu, repeats)
        return replace(found, ours=first, theirs=others[0] if others else None)


def _draw(layer: Layer, on_gpu: bool) -> tuple[list[Any], dict[str, Any]]:
    """Normal data, scaled so that results have variance 1, and the settings with arrays in place of specifications."""
    rng = np.random.default_rng(0)
    x, weight, bias = layer.arrays
    terms = weight.shape[2] * (weight.shape[1] if layer.op == "conv1d" else max(1, weight.shape[0]))

    def draw(value: Any, scale: float = 1.0) -> Any:
        if not isinstance(value, ArraySpec):
            return tuple(map(draw, value)) if isinstance(value, tuple) else value
        name = str(value.dtype)
        if name in INTEGERS:
            array = rng.integers(0 if name.startswith("u") else -8, 9, value.shape).astype(name)
        else:
            parts = [rng.standard_normal(value.shape, np.float32) * np.float32(scale) for _ in range(2)]
            array = (parts[0] + 1j * parts[1] if name.startswith("complex") else parts[0]).astype(numpy_dtype(name))
        return runtime.cupy_module().asarray(array) if on_gpu else array

    arrays = [draw(x), draw(weight, max(terms, 1) ** -0.5), draw(bias)]
    return arrays, {name: draw(value) for name, value in layer.settings.items() if value is not None}


def _peer(
    layer: Layer, arrays: list[Any], settings: dict[str, Any], on_gpu: bool, opened: ExitStack
) -> tuple[Callable[[], Any], float]:
    """PyTorch's call on the same numbers, and the tolerance; `opened` gets the contexts that the call needs.

    Raises:
        peers.Refused: PyTorch is not installed, or has no such call.
    """
    x, weight, bias = layer.arrays
    given = {name: value for name, value in settings.items() if name not in ("algorithm", "lengths")}
    fused = Fused.take(layer.op, given)
    if settings.get("lengths") is not None:
        raise peers.Refused("PyTorch has no lengths of samples")
    dtype = str(x.dtype)
    if dtype in INTEGERS:
        raise peers.Refused("PyTorch sums integers in their own dtype")
    # PyTorch needs complex taps in place of real ones; `peers.prepare` converts them.
    problem = ConvProblem.of(layer.op, x, ArraySpec(weight.shape, dtype), bias, **given).fused(fused)
    call = peers.prepare(problem, arrays, fused.arrays, on_gpu, opened)
    return call, peers.PEER_TOLERANCE["tf32" if problem.precision == "tf32" and on_gpu else dtype]


def _difference(ours: Any, theirs: Any, on_gpu: bool) -> float:
    """norm(ours - theirs)/norm(theirs) in float64."""
    mine = runtime.cupy_module().asnumpy(ours) if on_gpu else ours
    other = (theirs.cdouble() if theirs.is_complex() else theirs.double()).cpu().numpy()
    wide = np.asarray(mine).astype(other.dtype)
    norm = float(np.linalg.norm(other.ravel()))
    distance = float(np.linalg.norm((wide - other).ravel()))
    return distance / norm if norm else distance


def _time(calls: list[Callable[[], Any]], on_gpu: bool, repeats: int) -> list[Timing]:
    """The time of each call; the calls take turns, and a different one begins each round."""

    def finish() -> None:
        if on_gpu:
            runtime.cupy_module().cuda.get_current_stream().synchronize()

    turns: list[list[float]] = [[] for _ in calls]
    with no_garbage_collection():
        for repeat in range(repeats):
            for index in range(len(calls)):
                place = (index + repeat) % len(calls)
                if not on_gpu and len(calls) > 1:
                    time.sleep(PAUSE)
                turns[place].append(_turn(calls[place], finish))
    return [Timing.of(taken) for taken in turns]


def _turn(call: Callable[[], Any], finish: Callable[[], None]) -> float:
    """Seconds of a call: the mean of the calls of a turn, after one warm-up call."""
    start = time.perf_counter()
    call()
    finish()
    count = max(1, min(MOST_CALLS, int(TURN / max(time.perf_counter() - start, 1e-9))))
    start = time.perf_counter()
    for _ in range(count):
        call()
    finish()
    return (time.perf_counter() - start) / count


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep pauses of Python's collector out of the times."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
