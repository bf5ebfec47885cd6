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


def measure(layer: Layer, batch: int, repeats: int, pause: float) -> Row:
    problem = layer.problem("float32", batch)
    x, w, b = arrays(problem, seed=0)
    y = np.full(problem.output_shape, np.nan, np.float32)
    cpu.convolve(problem, x, w, b, y)
    name = cpu.method(problem).name
    if not is_right(problem, x, w, b, y, seed=1):
        return Row(layer.name, batch, layer.batch, name, None, None)
    del y
    ours_ms, torch_ms = interleave([ours(problem, x, w, b), pytorch(problem, x, w, b)], repeats, pause)
    return Row(layer.name, batch, layer.batch, name, ours_ms, torch_ms)


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
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="for each library (default: %(default)s)")
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
    if min(repeats, args.threads) < 1:
        parser.error("--repeats and --threads must be at least 1")

    import torch
    from threadpoolctl import threadpool_info, threadpool_limits

    limits = (QUICK_BYTES, QUICK_FLOPS) if args.quick else (MAX_BYTES, MAX_FLOPS)
    chosen = [layer for layer in load() if re.search(args.filter, layer.name)]
    sized = [(layer, layer.batch_within(*limits)) for layer in chosen]
    fitting = [(layer, batch) for layer, batch in sized if batch is not None]
    if not fitting:
        parser.error(f"no layer of this size matches {args.filter!r}")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    torch.set_num_threads(args.threads)
    rows = []
    with threadpool_limits(args.threads, user_api="blas"):
        blas = [f"{lib['internal_api']} {lib['version']} ({lib.get('architecture')})" for lib in threadpool_info()]
        blas = [name for name in blas if not name.startswith("openmp")]
        machine = f"{args.threads} threads; NumPy {np.__version__}, {', '.join(blas)}; PyTorch {torch.__version__}"
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=len(fitting))
            for layer, batch in fitting:
                progress.update(task, description=layer.name)
                rows.append(measure(layer, batch, repeats, args.pause))
                progress.advance(task)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(machine)
    report(rows, [layer.name for layer, batch in sized if batch is None], console)
    if args.json:
        result = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": f"{platform.processor() or platform.machine()}, {machine}",
            "repeats": repeats,
            "rows": [asdict(row) for row in rows],
            "geometric_mean": geometric_mean([row.ratio for row in rows if row.ours_ms is not None]),
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if any(row.ours_ms is None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
