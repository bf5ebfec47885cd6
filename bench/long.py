"""From how many taps on the FFT is faster than direct sums, measured on the CPU and predicted.

From the root of a checkout:

    python -m bench.long [--layers one,depthwise,dense] [--taps 16,...,96000] [--threads 1] [--json FILE]

Each layer is computed with padding "same" over a signal of a fixed length, by both methods in turns, and the shortest
time of each is reported. Memory is what NumPy allocates besides the arrays of the call, next to the bound that
`explain` shows. Below the table are the crossovers of each layer: the numbers of taps between which it was measured,
and from how many taps on `algorithm="auto"` chooses the FFT on this CPU and on an H200, by the cost model.
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import gpuconv
from gpuconv import fft
from gpuconv.device import Device
from gpuconv.problem import ArraySpec, ConvProblem, numpy_dtype

from .arguments import count, counts, listed, positive
from .cpu import limited
from .speed.results import environment, write_json

TAPS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 48000, 96000)
SECONDS = 1.0  # the least total time of the turns of a row
MAX_DIFFERENCE = 1e-3  # of the two results in float32, relative to the largest value


@dataclass(frozen=True, slots=True)
class LongLayer:
    """Channels, and the length of the signal."""

    name: str
    C_in: int
    C_out: int
    groups: int
    L: int

    def arrays(self, K: int, dtype: str) -> tuple[ArraySpec, ArraySpec]:
        return ArraySpec((1, self.C_in, self.L), dtype), ArraySpec((self.C_out, self.C_in // self.groups, K), dtype)

    def problem(self, K: int, dtype: str) -> ConvProblem:
        return ConvProblem.conv1d(*self.arrays(K, dtype), padding="same", groups=self.groups)


LAYERS = {
    layer.name: layer
    for layer in (
        LongLayer("one", 1, 1, 1, 480_000),  # ten seconds of sound and the impulse response of a room
        LongLayer("depthwise", 64, 64, 64, 16_384),  # long convolutions in the place of attention
        LongLayer("dense", 16, 16, 1, 16_384),
    )
}


@dataclass(frozen=True, slots=True)
class Row:
    """One layer and number of taps.

    Attributes:
        layer, taps, block: of the problem, and the length of the FFT's blocks.
        direct_ms, fft_ms: the least times; of direct sums None where they would take too long.
        predicted: the time of direct sums over that of the FFT, by the cost model of the CPU.
        direct_bytes, fft_bytes: the most memory that a call allocated, its result not counted.
        bound_bytes: what `explain` says of the FFT's.
        difference: of the two results, relative to the largest value.
    """

    layer: str
    taps: int
    block: int
    direct_ms: float | None
    fft_ms: float
    predicted: float
    direct_bytes: int | None
    fft_bytes: int
    bound_bytes: int
    difference: float | None


def measure(layer: LongLayer, K: int, dtype: str, max_flops: float) -> Row:
    p, rng = layer.problem(K, dtype), np.random.default_rng(0)
    x, w = (rng.standard_normal(spec.shape).astype(numpy_dtype(dtype)) for spec in layer.arrays(K, dtype))
    outputs = {name: np.empty(p.output_shape, numpy_dtype(dtype)) for name in ("direct", "fft")}

    def work(name: str) -> Callable[[], Any]:
        algorithm = "fft" if name == "fft" else None
        return lambda: gpuconv.conv1d(x, w, padding="same", groups=layer.groups, algorithm=algorithm, out=outputs[name])

    works = {name: work(name) for name in outputs if name == "fft" or p.flops() <= max_flops}
    peaks = {name: peak_bytes(call) for name, call in works.items()}
    least = dict.fromkeys(works, float("inf"))
    end = time.perf_counter() + SECONDS
    while True:
        for name, call in works.items():
            start = time.perf_counter()
            call()
            least[name] = min(least[name], 1e3 * (time.perf_counter() - start))
        if time.perf_counter() > end:
            break
    difference = None
    if "direct" in works:
        wide = [output.astype(np.complex128) for output in outputs.values()]
        difference = float(np.abs(wide[0] - wide[1]).max() / np.abs(wide[0]).max())
    plan, costs = fft.Plan.of(p, on_gpu=False), fft.costs(p, None)
    return Row(
        layer.name, K, plan.overlap.block, least.get("direct"), least["fft"], costs.direct_us / costs.fft_us,
        peaks.get("direct"), peaks["fft"], plan.workspace_bytes, difference,
    )  # fmt: skip


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that NumPy and Python allocate during a call that is not the first."""
    call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def measured_crossover(rows: Sequence[Row]) -> tuple[int | None, int | None]:
    """The most taps with which direct sums were faster, and the next number, with which the FFT was; None if absent."""
    compared = sorted((row.taps, row.direct_ms > row.fft_ms) for row in rows if row.direct_ms is not None)
    direct = max((taps for taps, is_fft in compared if not is_fft), default=None)
    return direct, min((taps for taps, is_fft in compared if is_fft and taps > (direct or 0)), default=None)


def predicted_crossover(layer: LongLayer, dtype: str, device: Device | None) -> int | None:
    """The fewest taps, up to 3 %, from which on the cost model prefers the FFT; None where it does not for 96,000."""
    taps, crossover = float(TAPS[-1]), None
    while taps >= 1:
        costs = fft.costs(layer.problem(round(taps), dtype), device)
        if costs.direct_us <= costs.fft_us:
            break
        crossover = round(taps)
        taps /= 1.03
    return crossover


def table_of(rows: Sequence[Row], dtype: str) -> Table:
    """One line a row, at most 80 columns."""
    table = Table(title=f"Direct sums and the FFT, {dtype}: ms, and MB beside the arrays", box=box.SIMPLE, padding=0)
    for name in ("layer", "taps", "block", "direct", "FFT", "ratio", "model", "MB", "MB FFT", "bound"):
        table.add_column(f" {name}", justify="left" if name == "layer" else "right")
    for row in rows:
        direct, ratio = (
            ("-", "-") if row.direct_ms is None else (f"{row.direct_ms:.4g}", f"{row.direct_ms / row.fft_ms:.3g}")
        )
        table.add_row(
            row.layer, *map(str, (row.taps, row.block)), direct, f"{row.fft_ms:.4g}", ratio, f"{row.predicted:.3g}",
            "-" if row.direct_bytes is None else f"{row.direct_bytes / 1e6:.3g}",
            f"{row.fft_bytes / 1e6:.3g}", f"{row.bound_bytes / 1e6:.3g}",
        )  # fmt: skip
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the two results differ, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python -m bench.long", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", default="one", metavar="NAMES", help="comma-separated, of " + ", ".join(LAYERS))
    parser.add_argument(
        "--taps", type=counts, default=",".join(map(str, TAPS)), metavar="COUNTS", help="comma-separated"
    )
    parser.add_argument("--dtype", choices=("float32", "float64", "complex64"), default="float32")
    parser.add_argument(
        "--threads", type=count, default=1, help="of BLAS, on as many processors (default: %(default)s)"
    )
    parser.add_argument(
        "--max-gflop",
        type=positive,
        default=100,
        help="above which direct sums are not computed (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
    layers = listed(args.layers, LAYERS, "layer", parser)
    console = Console(width=None if sys.stdout.isatty() else 80)
    cases = [(layer, K) for layer in layers for K in args.taps]
    with limited(args.threads):
        rows = [
            measure(layer, K, args.dtype, 1e9 * args.max_gflop)
            for layer, K in track(cases, console=Console(stderr=True))
        ]
    console.print(table_of(rows, args.dtype))
    crossovers = {}
    for layer in layers:
        measured = measured_crossover([row for row in rows if row.layer == layer.name])
        predicted = {
            name: predicted_crossover(layer, args.dtype, device)
            for name, device in (("cpu", None), ("sm_90", Device.from_arch("sm_90")))
        }
        crossovers[layer.name] = {"measured": measured, **predicted}
        low, high = ("none" if taps is None else f"{taps:,}" for taps in measured)
        words = ", ".join(f"{name} {'none' if taps is None else f'{taps:,}'}" for name, taps in predicted.items())
        console.print(f"{layer.name}: direct up to {low} taps, FFT from {high}; predicted: {words}", soft_wrap=True)
    if args.json:
        write_json(
            args.json,
            {
                "environment": environment({"kind": "cpu", "name": "CPU", "threads": args.threads}),
                "rows": list(map(asdict, rows)),
                "crossovers": crossovers,
            },
        )
    return int(any(row.difference is not None and row.difference > MAX_DIFFERENCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
