"""One command for an hour, or ten minutes, on a machine with a GPU: everything that only a GPU can tell.

From the root of a checkout:

    python -m bench.gpu_report --minutes 9 --out report

Needs the checkout, CuPy, and what is there of PyTorch, pytest and compute-sanitizer; no network, no installation. Every
part is a process of its own with its own time limit and its own log; its result is written as it ends, and a part that
fails or overruns stops no other. The summary comes last.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .results import ROOT, environment, geometric_mean, read, write_json
from .tables import by_loss, rate

Status = Literal["ok", "failed", "overran", "absent", "no time"]

MAX_SUMMARY_LINES = 60

# A part is not started with less than this, and the benchmark is asked to end this much before its limit.
LEAST_SECONDS = 5.0
RESERVE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Part:
    """One step of the report.

    Attributes:
        name: also of its log and its result file.
        command: the arguments after the interpreter or the tool; "{json}" stands for the result file, "{minutes}"
            for the minutes that it may take.
        share: the fraction of the whole time that it may use; what it leaves goes to later parts.
        absent: why it cannot run here, or empty.
        ok_codes: exit codes that are no failure.
    """

    name: str
    command: tuple[str, ...]
    share: float
    absent: str = ""
    ok_codes: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class PartResult:
    """How a part ended; `note` is its last line of output or the reason why it did not run."""

    name: str
    status: Status
    seconds: float
    note: str
    exit_code: int | None = None


def parts_for(gpu_missing: str | None) -> list[Part]:
    """The parts in the order in which they run: is it right, then what does it cost, then how fast is it."""
    gpu = gpu_missing or ""
    no_pytest = gpu or ("" if find_spec("pytest") else "pytest is not installed")
    sanitizer = which("compute-sanitizer") or _in_cuda_home("compute-sanitizer")
    no_sanitizer = gpu or ("" if sanitizer else "compute-sanitizer is not installed")
    python = sys.executable
    parts = [
        Part(
            "tests",
            # What a test module cannot import here (a linter, say) must not keep the others from running.
            (
                python,
                "-m",
                "pytest",
                "-q",
                "-m",
                "gpu",
                "-p",
                "no:cacheprovider",
                "--continue-on-collection-errors",
                "tests",
            ),
            0.20,
            no_pytest,
        ),
        Part("verify", (python, "-m", "gpuconv", "verify", "--device", "gpu", "--json"), 0.12, gpu),
    ]
    for tool in ("memcheck", "racecheck", "initcheck"):
        command = (
            sanitizer or "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            python,
            "-m",
            "bench.sanitize",
        )
        parts.append(Part(tool, (*command, "--seconds", "15"), 0.06, no_sanitizer))
    parts += [
        Part("overhead", (python, "-m", "bench.overhead", "--json", "{json}"), 0.05),
        Part("micro", (python, "-m", "bench.micro", "--json", "{json}"), 0.08, gpu),
        Part("accuracy", (python, "-m", "bench.accuracy", "--json", "{json}"), 0.04, gpu),
        Part("run", (python, "-m", "bench.run", "--minutes", "{minutes}", "--out", "{json}"), 1.0, gpu),
    ]
    return parts


def _in_cuda_home(tool: str) -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = (Path(home) / "bin" / tool for home in homes if home)
    return next((str(path) for path in candidates if path.is_file()), None)


def run_parts(
    parts: Sequence[Part],
    out: Path,
    seconds: float,
    clock: Callable[[], float],
    execute: Callable[[Sequence[str], Path, float], int | None],
    on_progress: Callable[[str, PartResult | None], None],
) -> list[PartResult]:
    """Run parts one after the other within the time.

    Args:
        parts: in order.
        out: the folder of the logs and the results; `<part>.status.json` is written as each part ends.
        seconds: of the whole.
        clock: the present in seconds.
        execute: (command, log file, limit in seconds) -> exit code, or None where the limit ended it.
        on_progress: called with a part's name as it starts and with its result as it ends.
    """
    end = clock() + seconds
    results = []
    for part in parts:
        start = clock()
        limit = min(part.share * seconds, end - start)
        log = out / f"{part.name}.log"
        code: int | None = None
        on_progress(part.name, None)
        if part.absent:
            status, note = "absent", part.absent
        elif limit < LEAST_SECONDS:
            status, note = "no time", f"{max(limit, 0):.0f} s were left"
        else:
            minutes = max(limit - RESERVE_SECONDS, LEAST_SECONDS) / 60
            values = {"{json}": str(out / f"{part.name}.json"), "{minutes}": f"{minutes:.2f}"}
            try:
                code = execute([values.get(word, word) for word in part.command], log, limit)
                note = verify_note(log) if part.name == "verify" else last_line(log)
                status = "overran" if code is None else "ok" if code in part.ok_codes else "failed"
            except OSError as error:
                status, note = "failed", str(error)
        result = PartResult(part.name, status, round(clock() - start, 1), note, code)  # type: ignore[arg-type]
        write_json(out / f"{part.name}.status.json", asdict(result))
        results.append(result)
        on_progress(part.name, result)
    return results


def execute(command: Sequence[str], log: Path, limit: float) -> int | None:
    """Run a command in the checkout with the package importable; at the limit it and its children are ended."""
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": search, "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            for signum, grace in ((signal.SIGINT, 3.0), (signal.SIGKILL, 10.0)):
                try:
                    os.killpg(process.pid, signum)
                    process.wait(timeout=grace)
                    break
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue
            return None


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    said = (line.strip() for line in reversed(lines) if line.strip() and not line.strip().startswith(_TABLE_LINES))
    return next((line[:200] for line in said), "")


_TABLE_LINES = ("\u2500", "\u2502", "\u2503", "\u250f", "\u2514", "\u2517", "\u251c", "\u2521")


def verify_note(log: Path) -> str:
    """What `gpuconv verify --json` found, in one line; the last line of the log where that cannot be read."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
        report = json.loads(text[text.index("{") : text.rindex("}") + 1])
        return f"{report['checks']} checks of {report['cases']} cases, {len(report['failures'])} failed"
    except (OSError, ValueError, KeyError, TypeError):
        return last_line(log)


# -- the summary ------------------------------------------------------------------------------------------------------


def summary(results: Sequence[PartResult], out: Path, device: dict[str, Any], seconds: float) -> list[str]:
    """At most `MAX_SUMMARY_LINES` lines: each part, then the figures that matter most."""
    lines = [f"gpuconv report on {device.get('name', 'no GPU')}, {seconds:.0f} s, results in {out}"]
    lines += [f"  {r.status:8} {r.name:10} {r.seconds:6.1f} s  {r.note[:120]}" for r in results]
    for title, add in (("overhead", _overhead_lines), ("micro", _micro_lines), ("run", _run_lines)):
        path = out / f"{title}.json"
        if path.exists():
            try:
                lines += ["", *add(path)]
            except (ValueError, KeyError, TypeError) as error:
                lines.append(f"{path.name} cannot be read: {error}")
    if len(lines) > MAX_SUMMARY_LINES:
        lines = [*lines[: MAX_SUMMARY_LINES - 1], f"... {len(lines) - MAX_SUMMARY_LINES + 1} more lines in {out}"]
    return lines


def _overhead_lines(path: Path) -> list[str]:
    figures = json.loads(path.read_text(encoding="utf-8"))["figures_us"]
    return ["Host time, us: " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items())]


def _micro_lines(path: Path) -> list[str]:
    figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
    shown = [
        f"{name.replace('_', ' ')} {value:,.1f}" for name, value in figures.items() if isinstance(value, int | float)
    ]
    return ["Rates: " + ", ".join(shown[i : i + 4]) for i in range(0, len(shown), 4)]


def _run_lines(path: Path) -> list[str]:
    result = read(path)
    lines = []
    for mode in dict.fromkeys(m.mode for m in result.measurements):
        mine = [m for m in result.measurements if m.mode == mode]
        ratios = [r for m in mine for r in (m.ratio(),) if r is not None]
        mean = geometric_mean(ratios)
        wins = sum(r >= 1 for r in ratios)
        text = "no ratio" if mean is None else f"{mean:.2f} x the best peer, {wins} of {len(ratios)} won"
        lines.append(f"{mode}: {len(mine)} layers, geometric mean {text}")
    wrong = [f"{m.layer} {m.mode}: {m.ours.note}" for m in result.measurements if m.ours.status == "wrong"]
    lines += [f"WRONG {text[:150]}" for text in wrong[:5]]
    lines.append(f"not measured: {len(result.unmeasured)}; the worst ratios:")
    for m in by_loss(result.measurements)[:15]:
        ratio, peer = m.ratio(), m.best_peer()
        if ratio is None or m.our_us is None or peer is None:
            continue
        floor = 100 * (m.floor_fraction or 0)
        lines.append(f"  {ratio:6.2f} x {m.layer} {m.mode} {m.our_us:,.0f} us, {rate(m)}, {floor:.0f} % of the floor")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 every part that could run did, 1 a part failed, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, metavar="N", help="of the whole (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "report", metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes must be above 0, got {args.minutes}")
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for stale in [*out.glob("*.json"), *out.glob("*.log")]:
        stale.unlink()
    console = Console()
    start = time.monotonic()
    missing, device = look_for_gpu()
    write_json(out / "environment.json", environment(device))
    parts = parts_for(missing)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=len(parts))

        def on_progress(name: str, result: PartResult | None) -> None:
            if result is None:
                progress.update(task, description=name)
            else:
                console.print(f"{result.status:8} {result.name:10} {result.seconds:6.1f} s", highlight=False)
                progress.advance(task)

        results = run_parts(
            parts, out, 60 * args.minutes - (time.monotonic() - start), time.monotonic, execute, on_progress
        )
    lines = summary(results, out, device, time.monotonic() - start)
    (out / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 1 if any(r.status == "failed" for r in results) else 0


def look_for_gpu() -> tuple[str | None, dict[str, Any]]:
    """Why there is no GPU, or None; and what there is.

    A process of its own asks: CUDA must not be up in the process that starts all others.
    """
    code = (
        "import json, sys\n"
        "from gpuconv.gpus import missing_gpu\n"
        "missing = missing_gpu()\n"
        "device = {'kind': 'none'}\n"
        "if missing is None:\n"
        "    from gpuconv import runtime\n"
        "    d = runtime.device(0)\n"
        "    device = {'kind': 'gpu', 'name': d.name, 'arch': d.arch_name, 'sms': d.num_sms}\n"
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
