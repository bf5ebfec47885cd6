"""Measures gpuconv and its peers on the layers of real models.

From the root of a checkout:

    python -m bench.run                          # every layer, every mode, on the GPU
    python -m bench.run --minutes 5              # what fits, largest information first
    python -m bench.run --quick                  # under two minutes
    python -m bench.run --device cpu --quick     # the NumPy path beside PyTorch's CPU build
    python -m bench.run --compare A.json B.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gpuconv.gpus import missing_gpu

from . import tables
from .directions import DIRECTIONS, Direction, prediction_key
from .layers import Layer, load
from .measure import Case, Engine, Method, measure
from .modes import Mode, modes_of
from .results import ROOT, RunResult, Unmeasured, environment, read, write_json
from .schedule import Budget, by_information, quick

PREDICTIONS = Path(__file__).with_name("predictions.json")
QUICK_MINUTES = 1.7

# A case that fails as a whole points at a dead device, not at the case.
MAX_FAILURES_IN_A_ROW = 4


class MeasuringEngine(Engine, Protocol):
    """An engine that can also guess how long a case will take and say what it is."""

    def estimate_seconds(self, case: Case, repeats: int) -> float: ...

    def describe(self) -> dict[str, Any]: ...


def select(
    layers: Sequence[Layer],
    modes: Sequence[Mode],
    pattern: str,
    max_bytes: int,
    max_flops: int,
    direction: Direction = "forward",
) -> tuple[list[Case], list[Unmeasured]]:
    """The cases of a run, by information, with batches reduced to the limits; and what no batch fits."""
    cases, left_out = [], []
    for mode in modes:
        for layer in layers:
            if not mode.includes(layer) or not re.search(pattern, layer.name):
                continue
            batch = layer.batch_within(max_bytes, max_flops, mode.dtype)
            if batch is None:
                left_out.append(Unmeasured(layer.name, mode.name, "too large for this device, even one sample"))
            else:
                cases.append(Case(layer, mode, batch, direction))
    return by_information(cases, modes), left_out


def run_cases(
    cases: Sequence[Case],
    engine: MeasuringEngine,
    method: Method,
    budget: Budget,
    result: RunResult,
    predictions: dict[str, dict[str, float]],
    on_progress: Callable[[RunResult, Case], None],
) -> RunResult:
    """Measure cases until they are done or the time is: what does not fit is listed as unmeasured."""
    failures = 0
    for case in cases:
        guess = engine.estimate_seconds(case, method.repeats)
        if failures >= MAX_FAILURES_IN_A_ROW:
            reason = "given up: the cases before it failed as a whole"
        elif not budget.admits(guess):
            needed = f"about {budget.expect(guess):.0f} s needed"
            reason = f"no time left: {max(budget.left, 0):.0f} s of the run, {needed}"
        else:
            reason = ""
        if not reason:
            start = budget.clock()
            # Predictions are made for the layer's own batch.
            whole = case.batch == case.layer.batch
            key = prediction_key(case.mode.name, case.direction)
            predicted = predictions.get(key, {}).get(case.layer.name) if whole else None
            try:
                measured = measure(case, engine, method, budget.clock, budget.deadlines(), predicted)
                result = result.with_measurement(measured)
                failures = 0
            except Exception as error:
                reason = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                failures += 1
            budget.learn(guess, budget.clock() - start)
        if reason:
            left_out = Unmeasured(case.layer.name, case.mode.name, reason)
            result = replace(result, unmeasured=(*result.unmeasured, left_out))
        on_progress(result, case)
    return result


def load_predictions(arch: str | None, name: str) -> dict[str, dict[str, float]]:
    """Predicted microseconds by mode and layer for a GPU of this name; none where none were made."""
    if arch is None or not PREDICTIONS.exists():
        return {}
    document = json.loads(PREDICTIONS.read_text(encoding="utf-8"))
    return next((dict(us) for product, us in document.get(arch, {}).items() if product in name), {})


# -- command line -----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--direction", choices=DIRECTIONS, default="forward", help="the pass (default: %(default)s)")
    parser.add_argument("--modes", help="comma-separated, or all (default: all on the GPU, float32 on the CPU)")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only layers whose name matches")
    parser.add_argument("--quick", action="store_true", help="a few layers of every kind, in under two minutes")
    parser.add_argument("--minutes", type=_positive, metavar="N", help="fit the run into N minutes")
    parser.add_argument("--repeats", type=_count, default=30, metavar="N", help="samples (default: %(default)s)")
    parser.add_argument("--per-case", type=_positive, default=30.0, metavar="S", help="most seconds for one layer")
    parser.add_argument("--max-gib", type=_positive, metavar="G", help="reduce batches above G GiB of data")
    parser.add_argument("--max-gflop", type=_positive, metavar="G", help="reduce batches above G GFLOP")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/<device>-<date>.json")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="compare two result files and stop")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a wrong result was found, 2 bad usage, 3 no GPU and --device gpu."""
    parser = build_parser()
    args = parser.parse_args(argv)
    console = Console()
    if args.compare:
        try:
            before, after = map(read, args.compare)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        console.print(tables.comparison_table(before, after))
        return 0

    on_gpu = args.device == "gpu"
    if on_gpu and (missing := missing_gpu()):
        console.print(f"[red]{missing}[/red]\nThe NumPy path can be measured with --device cpu.", highlight=False)
        return 3
    modes = modes_of(args.modes or ("all" if on_gpu else "float32"), parser)
    # A CPU needs minutes for what a GPU does in a millisecond.
    max_gib = args.max_gib or (16.0 if on_gpu else 2.0)
    max_gflop = args.max_gflop or (1e9 if on_gpu else (1.0 if args.quick else 20.0))
    limits = int(max_gib * 2**30), int(max_gflop * 1e9)
    cases, left_out = select(load(), modes, args.filter, *limits, args.direction)
    if args.quick:
        cases = quick(cases)
    if not cases and not left_out:
        parser.error(f"no layer matches {args.filter!r}")

    minutes = args.minutes or (QUICK_MINUTES if args.quick else None)
    per_case = args.per_case
    if args.quick and minutes:  # breadth before precision
        per_case = min(per_case, max(3.0, 2 * 60 * minutes / max(len(cases), 1)))
    budget = Budget(None if minutes is None else 60 * minutes, time.monotonic, per_case)
    console.print("Measuring what the device can do at best ...")
    engine = _open_engine(args.device)
    method = Method(repeats=args.repeats, kinds=("replay", "eager") if on_gpu else ("eager",))
    device = engine.describe()
    result = RunResult(
        environment=environment(device),
        settings={
            "direction": args.direction, "modes": [mode.name for mode in modes], "filter": args.filter,
            "quick": args.quick, "minutes": args.minutes, "repeats": args.repeats, "max_gib": max_gib,
            "max_gflop": max_gflop,
        },
        ceilings={
            "copy": engine.ceilings.bytes_per_second / 1e9,
            **{name: flops / 1e12 for name, flops in engine.ceilings.flops_per_second.items()},
        },
        unmeasured=tuple(left_out),
    )  # fmt: skip
    path = args.out or ROOT / "bench" / "results" / f"{_file_name(device['name'], result.environment['created'])}.json"
    start = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=len(cases))

        def on_progress(so_far: RunResult, case: Case) -> None:
            progress.update(task, description=case.name, advance=1)
            write_json(path, replace(so_far, seconds=round(time.monotonic() - start, 1)).to_json())

        predictions = load_predictions(device.get("arch"), device["name"])
        result = run_cases(cases, engine, method, budget, result, predictions, on_progress)
    print_report(result, console)
    console.print(f"Written to {path}", soft_wrap=True, highlight=False)
    return 1 if any(m.ours.status == "wrong" for m in result.measurements) else 0


def print_report(result: RunResult, console: Console) -> None:
    """Everything a reader needs of a run; a result file prints the same as the run that wrote it."""
    console.print(tables.results_table(result.measurements))
    console.print(tables.means_table(result.measurements))
    console.print(tables.peers_table(result.measurements))
    ceilings = ", ".join(
        f"{name} {value:,.0f} GB/s" if name == "copy" else f"{name} {tables.flops_rate(value)}"
        for name, value in result.ceilings.items()
    )
    console.print(f"Ceilings of this run: {ceilings}", soft_wrap=True)
    reasons: dict[str, list[str]] = {}
    for u in result.unmeasured:
        reasons.setdefault(u.reason.partition(":")[0], []).append(f"{u.layer} {u.mode}")
    for reason, names in reasons.items():
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        console.print(f"Not measured ({reason}): {shown}", soft_wrap=True)


def _open_engine(device: str) -> MeasuringEngine:
    if device == "cpu":
        from .engine_cpu import CpuEngine

        return CpuEngine()
    from .engine_gpu import GpuEngine

    return GpuEngine()


def _file_name(device: str, created: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{device} {created[:16]}".lower()).strip("-")


if __name__ == "__main__":
    # Rich wraps tables to 80 columns where there is no terminal, which makes logs hard to read.
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "200")
    sys.exit(main())
