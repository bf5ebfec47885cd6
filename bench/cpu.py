"""The NumPy path of gpuconv against PyTorch's CPU build, on the benchmark layers.

Run `python bench/cpu.py` in a checkout. Each layer runs in float32 at its own batch, or at the largest batch that keeps
it within 2 GiB and 20 GFLOP; a layer of which not even one sample does is left out. Both libraries get the same arrays
and the same number of threads, allocate their output in each call, and are timed in turns in one process, so that a
busy machine slows both. Every time is the least of many, since other processes can only add to it. Before a
layer is timed, random channels of random samples are compared with `gpuconv.reference`; a wrong result gets no figure
and fails the run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # A script's own folder comes first in the path; the checkout must come instead, also where nothing is installed.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.layers import Layer, load
from gpuconv import cpu, reference
from gpuconv.problem import ConvProblem

Array = npt.NDArray[Any]

MAX_BYTES = 2 * 1024**3
MAX_FLOPS = 20 * 10**9

# The limits of --quick.
QUICK_BYTES = 64 * 1024**2
QUICK_FLOPS = 10**9

# Seconds that a library's turn lasts at least.
TURN = 0.03

# Operations of the reference in one comparison: it takes about a second for them.
CHECK_FLOPS = 3 * 10**8


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one layer; times in milliseconds, None where the result was wrong."""

    layer: str
    batch: int
    full_batch: int
    method: str
    ours_ms: float | None
    torch_ms: float | None

    @property
    def ratio(self) -> float:
        """PyTorch's time / our time; not a number where there is no figure."""
        return math.nan if self.ours_ms is None or self.torch_ms is None else self.torch_ms / self.ours_ms


def arrays(problem: ConvProblem, seed: int) -> tuple[Array, Array, Array | None]:
    """Random input, weight and bias."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(problem.input_shape, dtype=np.float32)
    w = rng.standard_normal(problem.weight_shape, dtype=np.float32)
    b = rng.standard_normal(problem.C_out, dtype=np.float32) if problem.has_bias else None
    return x, w, b


def is_right(problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array, seed: int) -> bool:
    """Whether some channels of some samples are within the error bound, and no element at all is not finite."""
    p = problem
    if not np.isfinite(y).all():
        return False
    rng = np.random.default_rng(seed)
    rows = max(1, min(2, p.C_out_g, CHECK_FLOPS * p.N * p.C_out // max(1, p.flops())))
    for n, g in {(0, 0), (p.N - 1, p.groups - 1), (int(rng.integers(p.N)), int(rng.integers(p.groups)))}:
        m = np.sort(rng.choice(p.C_out_g, rows, replace=False))
        of_group = slice(g * p.C_in_g, (g + 1) * p.C_in_g)
        outputs = g * p.C_out_g + m
        part = ConvProblem(
            p.op, 1, p.C_in_g, rows, p.L_in, p.K, p.stride, p.padding_left, p.padding_right, p.dilation, 1,
            p.output_padding, p.dtype, p.has_bias,
        )  # fmt: skip
        within = reference.within_bound(
            part,
            y[n : n + 1, outputs],
            x[n : n + 1, of_group],
            w[of_group][:, m] if p.transposed else w[outputs],
            None if b is None else b[outputs],
        )
        if not within.all():
            return False
    return True


def ours(problem: ConvProblem, x: Array, w: Array, b: Array | None) -> Callable[[], Array]:
    def call() -> Array:
        y = np.empty(problem.output_shape, np.float32)
        cpu.convolve(problem, x, w, b, y)
        return y

    return call


def pytorch(problem: ConvProblem, x: Array, w: Array, b: Array | None) -> Callable[[], Any]:
    import torch
    import torch.nn.functional as F  # noqa: N812

    p = problem
    data, weight = torch.from_numpy(x), torch.from_numpy(w)
    bias = None if b is None else torch.from_numpy(b)

    def call() -> Any:
        with torch.inference_mode():
            if p.transposed:
                return F.conv_transpose1d(
                    data, weight, bias, p.stride, p.padding_left, p.output_padding, p.groups, p.dilation
                )
            if p.padding_left == p.padding_right:
                return F.conv1d(data, weight, bias, p.stride, p.padding_left, p.dilation, p.groups)
            return F.conv1d(F.pad(data, p.padding), weight, bias, p.stride, 0, p.dilation, p.groups)

    return call


def interleave(calls: Sequence[Callable[[], Any]], repeats: int, pause: float) -> list[float]:
    """The least time of each call in milliseconds, the calls taking turns.

    A turn begins with a pause, in which the other library's idle threads stop spinning, and an uncounted call; it
    lasts as long as `TURN`, at least one more call.
    """
    least = [math.inf for _ in calls]
    for _ in range(repeats):
        for index, call in enumerate(calls):
            time.sleep(pause)
            call()
            end = time.perf_counter() + TURN
            while True:
                start = time.perf_counter()
                call()
                now = time.perf_counter()
                least[index] = min(least[index], (now - start) * 1e3)
                if now > end:
                    break
    return least


# Classes of shapes that no layer has: short rows, many groups, strides with dilation, many taps, small calls.
SHAPES: dict[str, ConvProblem] = {
    "short rows 4096x16x8": ConvProblem("conv1d", 4096, 16, 16, 8, 3, 1, 1, 1),
    "short rows 10000x8x16": ConvProblem("conv1d", 10_000, 8, 8, 16, 5, 1, 2, 2),
    "short rows 1024x64x4": ConvProblem("conv1d", 1024, 64, 64, 4, 3, 1, 1, 1),
    "short rows 20000x16x6 to 1": ConvProblem("conv1d", 20_000, 16, 1, 6, 2),
    "transposed short rows": ConvProblem("conv_transpose1d", 4096, 16, 16, 8, 3, 1, 1, 1),
    "groups of 2": ConvProblem("conv1d", 4, 2048, 2048, 100, 3, 1, 1, 1, 1, 1024),
    "groups of 4": ConvProblem("conv1d", 8, 128, 128, 200, 3, 1, 1, 1, 1, 32),
    "groups of 8": ConvProblem("conv1d", 8, 64, 64, 1000, 3, 1, 1, 1, 1, 8),
    "groups of 128": ConvProblem("conv1d", 8, 256, 256, 500, 3, 1, 1, 1, 1, 2),
    "transposed groups of 3 to 2": ConvProblem("conv_transpose1d", 300, 1536, 1024, 5, 3, 1, 0, 0, 1, 512),
    "transposed stride 3 dilation 2": ConvProblem("conv_transpose1d", 8, 64, 32, 200, 4, 3, 0, 0, 2),
    "transposed stride 2": ConvProblem("conv_transpose1d", 8, 128, 64, 512, 3, 2, 1, 1, 1, 1, 1),
    "depthwise stride 4": ConvProblem("conv1d", 8, 256, 256, 4000, 5, 4, 2, 2, 1, 256),
    "one channel K 65536": ConvProblem("conv1d", 1, 1, 1, 131_072, 65_536),
    "one dot product": ConvProblem("conv1d", 1, 1, 1, 2**20 + 1, 2**20 + 1),
    "five channels K 400000": ConvProblem("conv1d", 1, 5, 1, 400_500, 400_000, 10),
    "transposed K 20001 dilation 17": ConvProblem("conv_transpose1d", 1, 1, 1, 10, 20_001, 1, 0, 0, 17),
    "transposed K 96000": ConvProblem("conv_transpose1d", 1, 1, 1, 200, 96_000),
    "small call 1x16x100": ConvProblem("conv1d", 1, 16, 16, 100, 3),
}


def measure(layer: Layer, batch: int, repeats: int, pause: float) -> Row:
    return measure_problem(layer.name, layer.problem("float32", batch), layer.batch, repeats, pause)


def measure_problem(name: str, problem: ConvProblem, full_batch: int, repeats: int, pause: float) -> Row:
    x, w, b = arrays(problem, seed=0)
    y = np.full(problem.output_shape, np.nan, np.float32)
    cpu.convolve(problem, x, w, b, y)
    method = cpu.method(problem).name
    if not is_right(problem, x, w, b, y, seed=1):
        return Row(name, problem.N, full_batch, method, None, None)
    del y
    ours_ms, torch_ms = interleave([ours(problem, x, w, b), pytorch(problem, x, w, b)], repeats, pause)
    return Row(name, problem.N, full_batch, method, ours_ms, torch_ms)


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


def report(rows: Sequence[Row], left_out: Sequence[str], console: Console) -> None:
    table = Table(title="float32, least milliseconds; ratio = torch / ours", title_justify="left")
    for heading in ("layer", "batch", "method"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ours", "torch", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        batch = f"{row.batch} of {row.full_batch}" if row.batch < row.full_batch else str(row.batch)
        if row.ours_ms is None or row.torch_ms is None:
            table.add_row(row.layer, batch, row.method, "WRONG", "", "")
        else:
            figures = (f"{row.ours_ms:.3f}", f"{row.torch_ms:.3f}", f"{row.ratio:.2f}")
            table.add_row(row.layer, batch, row.method, *figures)
    console.print(table)
    timed = [row for row in rows if row.ours_ms is not None]
    if left_out:
        console.print(f"Too large even with one sample: {', '.join(left_out)}.")
    if timed:
        console.print(
            f"Geometric mean of the ratios over {len(timed)} layers: {geometric_mean([r.ratio for r in timed]):.2f}"
        )
        worst = sorted(timed, key=lambda row: row.ratio)[:5]
        console.print("Worst: " + ", ".join(f"{row.layer} {row.ratio:.2f}" for row in worst))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="", metavar="REGEX", help="only layers whose name matches")
    parser.add_argument("--quick", action="store_true", help="only layers of up to 64 MiB and 1 GFLOP, 3 repeats")
    parser.add_argument("--repeats", type=int, metavar="N", help="turns of each library per layer (default: 7, or 3)")
    parser.add_argument(
        "--shapes", action="store_true", help="classes of shapes that no layer has, in place of the layers"
    )
    parser.add_argument("--threads", default="2", metavar="N[,N...]", help="of each library (default: %(default)s)")
    parser.add_argument(
        "--pause",
        type=float,
        default=0.15,
        metavar="SECONDS",
        help="before each turn, for the other library's idle threads to stop spinning (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    args = parser.parse_args(argv)
    repeats = args.repeats or (3 if args.quick else 7)
    try:
        numbers = [int(number) for number in args.threads.split(",")]
    except ValueError:
        parser.error(f"--threads must be numbers, got {args.threads!r}")
    if min(repeats, *numbers) < 1:
        parser.error("--repeats and --threads must be at least 1")

    limits = (QUICK_BYTES, QUICK_FLOPS) if args.quick else (MAX_BYTES, MAX_FLOPS)
    chosen = [] if args.shapes else [layer for layer in load() if re.search(args.filter, layer.name)]
    sized = [(layer, layer.batch_within(*limits)) for layer in chosen]
    work = [partial(measure, layer, batch, repeats, args.pause) for layer, batch in sized if batch is not None]
    if args.shapes:
        shapes = [(name, p) for name, p in SHAPES.items() if re.search(args.filter, name)]
        work = [partial(measure_problem, name, p, p.N, repeats, args.pause) for name, p in shapes]
    if not work:
        parser.error(f"nothing of this size matches {args.filter!r}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    left_out = [layer.name for layer, batch in sized if batch is None]
    results = []
    for threads in numbers:
        rows, machine = run(work, threads)
        console.print(machine)
        report(rows, left_out, console)
        right = [row.ratio for row in rows if row.ours_ms is not None]
        results.append(
            {
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "machine": f"{platform.processor() or platform.machine()}, {machine}",
                "repeats": repeats,
                "rows": [asdict(row) for row in rows],
                "geometric_mean": geometric_mean(right) if right else None,
            }
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 1 if any(row["ours_ms"] is None for result in results for row in result["rows"]) else 0


def run(work: Sequence[Callable[[], Row]], threads: int) -> tuple[list[Row], str]:
    """The rows with so many threads of each library, and what ran."""
    import torch
    from threadpoolctl import threadpool_info, threadpool_limits

    torch.set_num_threads(threads)
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if usable is not None:
        os.sched_setaffinity(0, sorted(usable)[:threads])
    try:
        with threadpool_limits(threads, user_api="blas"), Progress(console=Console(stderr=True)) as progress:
            blas = [f"{lib['internal_api']} {lib['version']} ({lib.get('architecture')})" for lib in threadpool_info()]
            blas = [name for name in blas if not name.startswith("openmp")]
            machine = f"{threads} threads; NumPy {np.__version__}, {', '.join(blas)}; PyTorch {torch.__version__}"
            return [measure() for measure in progress.track(work)], machine
    finally:
        if usable is not None:
            os.sched_setaffinity(0, usable)


if __name__ == "__main__":
    sys.exit(main())
