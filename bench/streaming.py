"""The time of a push of a stream, compared with one call over the same window.

From the root of a checkout:

    python -m bench.streaming [--device cpu] [--layers NAMES] [--slots 1,64] [--json FILE]

Both compute the same outputs from the same samples with prepared weights; the stream also stores the new samples, and
the call is given the whole window. They are timed in turns, and the shortest of many times is reported. On a GPU they
are timed eagerly, with the host's work, and as launches of a CUDA graph.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import gpuconv
from gpuconv import runtime, stream
from gpuconv.gpus import missing_gpu
from gpuconv.problem import numpy_dtype

from .arguments import count, counts, listed
from .layers import Layer, load
from .speed.results import environment, write_json

# Layers of causal or streamable models, and the samples of a push: one, or what completes one output or a frame.
PUSHES = {
    "mamba_2p8b.conv_k4_b1": 1,
    "qwen3next_80b.gdn_conv_k4_b1": 1,
    "conformer_l.dw_k31": 1,
    "tcn_wordlm.conv_k3_d8": 1,
    "encodec_musicgen32.dec_final_k7_b1": 1,
    "encodec24.enc_down_k16s8": 8,
    "mimi.enc_down_k16s8_stream_b1": 16,
    "hifigan_v1.up1_k16s8_b1": 1,
}
TURNS = 15
TURN_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Row:
    """A layer's times, in microseconds.

    Attributes:
        layer, dtype, slots, samples: what was measured; new samples of a push in each slot.
        how: "NumPy", or "eager" or "graph" on a GPU.
        push_us: of a push.
        call_us: of a call over its window.
    """

    layer: str
    dtype: str
    slots: int
    samples: int
    how: str
    push_us: float
    call_us: float


@dataclass(frozen=True, slots=True)
class Pair:
    """A push that repeats, and the call over its window; both write to arrays of their own."""

    push: Callable[[], object]
    call: Callable[[], object]

    @classmethod
    def of(cls, layer: Layer, dtype: str, slots: int, samples: int, xp: Any) -> Pair:
        """Measure on NumPy's or CuPy's arrays.

        Raises:
            RuntimeError: the two differ, bit for bit on a GPU, or by more than rounding.
        """
        p, rng = layer.problem(dtype, slots), np.random.default_rng(0)

        def array(*shape: int) -> Any:
            return xp.asarray(rng.standard_normal(shape).astype(numpy_dtype(dtype)))

        weight, bias = gpuconv.prepare(array(*p.weight_shape)), array(p.C_out) if p.has_bias else None
        x = array(slots, p.C_in, samples)
        if p.transposed:
            s: Any = stream.ConvTranspose1d(weight, bias, p.stride, groups=p.groups, dilation=p.dilation, slots=slots)
        else:
            s = stream.Conv1d(weight, bias, p.stride, 0, p.dilation, p.groups, slots=slots)
        s.push(array(slots, p.C_in, p.dilation * (p.K - 1) // (p.stride if p.transposed else 1)))
        while (outputs := s.clone().push(x).shape[-1]) == 0:
            s.push(x)
        s.push(x)
        state = s.state()
        window = xp.concatenate((state["samples"], x), axis=-1)
        out = xp.empty_like(s.push(x))
        again = xp.empty_like(out)
        if p.transposed:
            first = int(state["positions"][0][1])
            rest = (window.shape[-1] - 1) * p.stride + p.dilation * (p.K - 1) + 1 - first - outputs
            settings: tuple[Any, ...] = (p.stride, (first, max(0, rest)), max(0, -rest), p.groups, p.dilation)
            function: Any = gpuconv.conv_transpose1d
        else:
            settings, function = (p.stride, 0, p.dilation, p.groups), gpuconv.conv1d
        pair = cls(lambda: s.push(x, out=out), lambda: function(window, weight, bias, *settings, out=again))
        s.load_state(state)
        pair.push()
        pair.call()
        if not (xp.allclose(out, again, 1e-2, 1e-2) if xp is np else (out == again).all()):
            raise RuntimeError(f"{layer.name}: a push and a call give different outputs")
        for _ in range(3):
            pair.push()
        return pair


def least_us(works: Sequence[Callable[[], object]], settle: Callable[[], object], turns: int) -> list[float]:
    """The least time of each of several works, which take turns."""
    times = [float("inf")] * len(works)
    counts = [1] * len(works)
    for _ in range(turns):
        for i, work in enumerate(works):
            settle()
            start = time.perf_counter()
            for _ in range(counts[i]):
                work()
            settle()
            seconds = time.perf_counter() - start
            times[i] = min(times[i], seconds / counts[i])
            counts[i] = max(counts[i], min(1000, int(TURN_SECONDS / times[i])))
    return [1e6 * seconds for seconds in times]


def on_cpu(layer: Layer, dtype: str, slots: int, samples: int, turns: int) -> list[Row]:
    pair = Pair.of(layer, dtype, slots, samples, np)
    push_us, call_us = least_us((pair.push, pair.call), lambda: None, turns)
    return [Row(layer.name, dtype, slots, samples, "NumPy", push_us, call_us)]


def on_gpu(layer: Layer, dtype: str, slots: int, samples: int, turns: int) -> list[Row]:
    """Measure on CuPy's current device."""
    cupy = runtime.cupy_module()
    rows, queue = [], cupy.cuda.Stream(non_blocking=True)
    with queue:
        pair = Pair.of(layer, dtype, slots, samples, cupy)
        graphs = []
        for work in (pair.push, pair.call):
            queue.begin_capture()
            work()
            graphs.append(queue.end_capture().launch)
        for how, works in (("eager", (pair.push, pair.call)), ("graph", tuple(graphs))):
            push_us, call_us = least_us(works, queue.synchronize, turns)
            rows.append(Row(layer.name, dtype, slots, samples, how, push_us, call_us))
    return rows


def table_of(rows: Sequence[Row]) -> Table:
    """One line a row, at most 80 columns."""
    title = f"Steps of streams, {rows[0].dtype}: new samples, time of a push and of one call, us"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True)
    for name in ("slots", "new", "how", "push", "call", "ratio"):
        table.add_column(name, justify="left" if name == "how" else "right")
    for row in rows:
        table.add_row(
            row.layer, str(row.slots), str(row.samples), row.how,
            *(f"{us:.1f}" if us < 1000 else f"{us:.0f}" for us in (row.push_us, row.call_us)),
            f"{row.push_us / row.call_us:.2f}",
        )  # fmt: skip
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python -m bench.streaming", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: a GPU where there is one")
    parser.add_argument("--layers", default="all", metavar="NAMES", help="comma-separated, of " + ", ".join(PUSHES))
    parser.add_argument(
        "--slots", type=counts, default="1", metavar="COUNTS", help="comma-separated numbers of streams"
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--turns", type=count, default=TURNS, help="of each work (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
    names = listed(args.layers, {name: name for name in PUSHES}, "layer", parser)
    missing = missing_gpu()
    device = args.device or ("cpu" if missing else "gpu")
    if device == "gpu" and missing:
        parser.error(f"--device gpu: {missing}")
    layers = {layer.name: layer for layer in load()}
    measure = on_gpu if device == "gpu" else on_cpu
    rows = [
        row
        for name in names
        for n in args.slots
        for row in measure(layers[name], args.dtype, n, PUSHES[name], args.turns)
    ]
    Console().print(table_of(rows))
    if args.json:
        name = runtime.device(0).name if device == "gpu" else "CPU"
        write_json(
            args.json, {"environment": environment({"kind": device, "name": name}), "rows": list(map(asdict, rows))}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
