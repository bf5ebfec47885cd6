"""Measures gpuconv and its peers on the layers of real models, on a GPU.

From the root of a checkout:

    python -m bench.speed                 # every layer, every mode
    python -m bench.speed --minutes 5     # what fits, the most informative cases first
    python -m bench.speed --quick         # under two minutes
    python -m bench.speed --compare A.json B.json
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gpuconv.gpus import missing_gpu

from ..arguments import count, listed, positive
from ..layers import load
from ..modes import DIRECTIONS, MODES
from ..static import predictions
from .measure import Case, Method
from .results import ROOT, RunResult, ceilings_of, environment, read, write_json
from .schedule import Budget, quick, run_cases, select
from .tables import comparison_table, print_report

QUICK_MINUTES = 1.7


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--direction", choices=DIRECTIONS, default="forward", help="the pass (default: %(default)s)")
    parser.add_argument("--modes", default="all", help="comma-separated, or all (default: %(default)s)")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only layers whose name matches")
    parser.add_argument("--quick", action="store_true", help="a few layers of every kind, in under two minutes")
    parser.add_argument("--minutes", type=positive, metavar="N", help="fit the run into N minutes")
    parser.add_argument("--repeats", type=count, default=30, metavar="N", help="samples (default: %(default)s)")
    parser.add_argument("--per-case", type=positive, default=30.0, metavar="S", help="most seconds for one layer")
    parser.add_argument(
        "--max-gib", type=positive, default=16.0, metavar="G", help="reduce batches above G GiB of data"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/<device>-<date>.json")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="compare two result files and stop")
    return parser


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
        console.print(comparison_table(before, after))
        return 0

    if missing := missing_gpu():
        console.print(f"[red]{missing}[/red]\npython -m bench.cpu measures the NumPy path.", highlight=False)
        return 3
    modes = listed(args.modes, {mode.name: mode for mode in MODES}, "mode", parser)
    cases, left_out = select(load(), modes, args.filter, int(args.max_gib * 2**30), sys.maxsize, args.direction)
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
    from .gpu import GpuEngine

    engine = GpuEngine()
    method = Method(repeats=args.repeats)
    device = engine.describe()
    result = RunResult(
        environment=environment(device),
        settings={
            "direction": args.direction, "modes": [mode.name for mode in modes], "filter": args.filter,
            "quick": args.quick, "minutes": args.minutes, "repeats": args.repeats, "max_gib": args.max_gib,
        },
        ceilings=ceilings_of(engine.ceilings),
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

        result = run_cases(cases, engine, method, budget, result, predictions.read(device["name"]), on_progress)
    print_report(result, console)
    console.print(f"Written to {path}", soft_wrap=True, highlight=False)
    return 1 if any(m.ours.status == "wrong" for m in result.measurements) else 0


def _file_name(device: str, created: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{device} {created[:16]}".lower()).strip("-")


if __name__ == "__main__":
    # Rich wraps tables to 80 columns where there is no terminal, which makes logs hard to read.
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "200")
    sys.exit(main())
