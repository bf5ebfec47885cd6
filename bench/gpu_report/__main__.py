"""Everything that must be measured on a GPU, in the few minutes that one is available.

From the root of a checkout:

    python -m bench.gpu_report --first --out DIR      # at most 9 minutes
    python -m bench.gpu_report --second --out DIR     # what the first run left, then more: 4 minutes

Needs the checkout, CuPy, pytest and rich, but no network and no installation; uses PyTorch, ncu and compute-sanitizer
if they are installed. Every step consists of one or more processes with a time limit, and records each result at once;
a step that fails or exceeds its time does not stop the others. All results go to one file, DIR/first.tar.gz or
DIR/second.tar.gz, which is replaced every few seconds, so that it is nearly complete even if the run is killed. If the
checkout has no git history, give its commit by --commit.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

from ..speed.results import COMMIT_VARIABLE, ROOT, RunResult, environment, geometric_mean, write_json
from ..speed.tables import by_loss, rate
from . import important, records
from .run import REHEARSAL_FACTOR, Ended, Run, Status, Step, read_archive

DONE: tuple[Status, ...] = ("ok", "wrong", "absent")

FIRST_SECONDS = 540.0
SECOND_SECONDS = 240.0
MAX_SUMMARY_LINES = 60


def first_steps() -> list[Step]:
    """First correctness, then profiles, then speed. The last step takes all the remaining time."""
    tests = ("-m", "bench.gpu_report.gpu_tests")
    no_pytest = "" if find_spec("pytest") else "pytest is not installed"
    return [
        _step("build", 25, processes=14),
        Step("ptx", (*tests, "tests/kernels/test_ptx.py"), 15, absent=no_pytest),
        _step("micro", 35),
        _step("tiles", 30),
        _step("verify", 45, processes=8),
        # The GPU test of verify would repeat the step of that name, in one process.
        Step(
            "tests", (*tests, "--without", "test_ptx.py", "--without", "test_verify.py"), 60, processes=8,
            absent=no_pytest,
        ),
        _sanitizer_step("memcheck", 30, "dense_kernels"),
        _sanitizer_step("racecheck", 30, "dense_kernels"),
        _ncu_step("conv2", 17),
        _ncu_step("feat1", 17),
        _ncu_step("packing", 11),
        _step("cudnn", 15),
        _step("benchmark", FIRST_SECONDS),
    ]  # fmt: skip


def second_steps(ended: Sequence[Ended]) -> list[Step]:
    """What the first run did not finish, then steps that it does not have."""
    done = {e.step for e in ended if e.status in DONE}
    left = [replace(step, seconds=min(step.seconds, 90)) for step in first_steps() if step.name not in done]
    return [
        *left,
        _step("overhead", 15),
        _step("accuracy", 20),
        _sanitizer_step("initcheck", 20, "kernels"),
        _step("gradients", SECOND_SECONDS),
    ]


def _step(name: str, seconds: float, work: str = "", **settings: Any) -> Step:
    """A step of bench.gpu_report.step; `work` is its name there, where that is another."""
    return Step(name, ("-m", "bench.gpu_report.step", work or name), seconds, **settings)


def _sanitizer_step(tool: str, seconds: float, work: str) -> Step:
    found = _tool("compute-sanitizer")
    prefix = (found or "", "--tool", tool, "--error-exitcode", str(records.WRONG))
    return _step(tool, seconds, work, prefix=prefix, absent="" if found else "compute-sanitizer is not installed")


def _ncu_step(work: str, seconds: float) -> Step:
    """The counters are written as CSV, which needs no other program. The clocks are not changed."""
    found = _tool("ncu")
    options = ("--profile-from-start", "off", "--set", "full", "--clock-control", "none", "--csv", "--page", "raw")
    prefix = (found or "", *options, "--log-file", f"{{out}}/ncu_{work}.csv")
    return _step(f"ncu_{work}", seconds, work, prefix=prefix, absent="" if found else "ncu is not installed")


def _tool(name: str) -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = (Path(home) / "bin" / name for home in homes if home)
    return which(name) or next((str(path) for path in candidates if path.is_file()), None)


def summary(ended: Sequence[Ended], folder: Path, device: dict[str, Any], seconds: float) -> list[str]:
    """At most `MAX_SUMMARY_LINES` lines: each step, then the figures that matter most."""
    lines = [f"gpuconv report on {device.get('name', 'no GPU')}, {seconds:.0f} s"]
    lines += [f"  {e.status:8} {e.step:12} {e.seconds:6.1f} s  {e.note[:200]}" for e in ended]
    lines += _micro_lines(records.read(folder / "micro.jsonl"))
    for name in ("benchmark", "gradients"):
        result = important.result(records.read(folder / f"{name}.jsonl"))
        if result is not None:
            write_json(folder / f"{name}.json", result.to_json())
            lines += _run_lines(result)
    if len(lines) > MAX_SUMMARY_LINES:
        lines = [*lines[: MAX_SUMMARY_LINES - 1], f"... {len(lines) - MAX_SUMMARY_LINES + 1} more lines"]
    return lines


def _micro_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    figures = {record["key"]: record.get("figure", record.get("TFLOP/s")) for record in found}
    shown = [f"{name.replace('_', ' ')} {value:,.1f}" for name, value in figures.items() if value is not None]
    return ["Rates: " + ", ".join(shown[i : i + 4]) for i in range(0, len(shown), 4)]


def _run_lines(result: RunResult) -> list[str]:
    ratios = [r for m in result.measurements for r in (m.ratio(),) if r is not None]
    mean = geometric_mean(ratios)
    text = "no ratio" if mean is None else f"{mean:.2f} x the best peer, {sum(r >= 1 for r in ratios)} won"
    lines = [f"{len(result.measurements)} measured, geometric mean {text}; the worst first:"]
    for m in by_loss(result.measurements):
        if m.our_us is None:
            lines.append(f"  {m.ours.status:8} {m.layer} {m.mode} {m.direction}: {m.ours.note[:120]}")
            continue
        ratio, floor = m.ratio(), 100 * (m.floor_fraction or 0)
        compared = "no peer" if ratio is None else f"{ratio:.2f} x"
        figures = f"{m.our_us:,.0f} us, {rate(m)}, {floor:.0f} % of the floor"
        lines.append(f"  {compared:>8} {m.layer} {m.mode} {m.direction} {figures}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 no step failed or was wrong, 1 one did, 2 bad usage, 3 no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which_run = parser.add_mutually_exclusive_group(required=True)
    which_run.add_argument("--first", action="store_true", help=f"the first run, of {FIRST_SECONDS:.0f} s")
    which_run.add_argument("--second", action="store_true", help="what the first run did not finish, then more")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the archive")
    parser.add_argument("--after", type=Path, metavar="FILE", help="the first run's archive (default: in DIR)")
    parser.add_argument("--seconds", type=float, metavar="S", help=f"of the second run (default: {SECOND_SECONDS:.0f})")
    parser.add_argument("--commit", metavar="HASH", help="of the checkout (default: what git says)")
    parser.add_argument("--rehearse", action="store_true", help="try every command on as little work as possible")
    args = parser.parse_args(argv)
    started = time.monotonic()
    seconds = args.seconds or (FIRST_SECONDS if args.first else SECOND_SECONDS)
    seconds *= REHEARSAL_FACTOR if args.rehearse else 1
    if args.commit:
        os.environ[COMMIT_VARIABLE] = args.commit
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what is running is ended, too
    missing, device = look_for_gpu()
    if missing is not None:
        print(missing)
        return 3
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_report_") as scratch:
        folder, earlier = Path(scratch) / "results", Path(scratch) / "earlier"
        folder.mkdir()
        earlier.mkdir()
        ended_before: list[Ended] = []
        if args.second:
            ended_before = read_archive(args.after or out / "first.tar.gz", earlier)
            print(f"The first run: {len(ended_before)} steps ended")
        write_json(folder / "environment.json", environment(device))
        archive = out / ("first.tar.gz" if args.first else "second.tar.gz")
        run = Run(folder, archive, seconds - (time.monotonic() - started), rehearse=args.rehearse, earlier=earlier)
        ended = []
        for step in first_steps() if args.first else second_steps(ended_before):
            ended.append(run.step(step))
            e = ended[-1]
            print(f"{e.status:8} {e.step:12} {e.seconds:6.1f} s  {e.note[:200]}", flush=True)
        lines = summary(ended, folder, device, time.monotonic() - started)
        (folder / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        run.refresh()
    print("", *lines, f"All of it is in {archive}", sep="\n")
    return 1 if any(e.status in ("failed", "wrong") for e in ended) else 0


def look_for_gpu() -> tuple[str | None, dict[str, Any]]:
    """Why there is no GPU, or None; and what there is.

    A separate process looks, since CUDA must not be initialised in the process that starts all others.
    """
    code = (
        "import json, sys\n"
        "from gpuconv.gpus import missing_gpu\n"
        "missing = missing_gpu()\n"
        "device = {'kind': 'none'}\n"
        "if missing is None:\n"
        "    from bench.speed.gpu import describe\n"
        "    device = describe()\n"
        "print(json.dumps([missing, device]))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    try:
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False
        )
        missing, device = json.loads(result.stdout.splitlines()[-1])
        return missing, dict(device)
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return f"no GPU: asking for one failed ({type(error).__name__})", {"kind": "none"}


if __name__ == "__main__":
    sys.exit(main())
