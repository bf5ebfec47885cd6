"""Everything that only a GPU can tell, in the few minutes that one is there.

From the root of a checkout:

    python -m bench.gpu_report --first --out DIR      # at most 9 minutes
    python -m bench.gpu_report --second --out DIR     # what the first run left, then more: 4 minutes

Needs the checkout, CuPy, pytest and rich, and uses what is there of PyTorch, ncu and compute-sanitizer; no network, no
installation. Every step is one process or several with a limit of their own, and records each result as it comes; one
that fails or overruns stops no other. All results go to one file, DIR/first.tar.gz or DIR/second.tar.gz, which is
replaced every few seconds: whatever ends the run, that file holds what was known. Where the checkout travels without
its history, --commit says what it is.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any, Literal

from . import important, records
from .results import COMMIT_VARIABLE, ROOT, RunResult, environment, geometric_mean, write_json
from .tables import by_loss, rate

Status = Literal["ok", "wrong", "failed", "overran", "absent", "no time"]
DONE: tuple[Status, ...] = ("ok", "wrong", "absent")

FIRST_SECONDS = 540.0
SECOND_SECONDS = 240.0
# Of a run: for what comes after the last step, and of a step: for its processes to end by themselves before its limit.
CLOSING_SECONDS = 8.0
ENDING_SECONDS = 2.0
LEAST_SECONDS = 5.0  # no step is started with less
REFRESH_SECONDS = 4.0
REHEARSAL_FACTOR = 8  # on all limits: machines that emulate a GPU are slow
MOST_RESTARTS = 20  # of a process that has lost the GPU
MOST_FILE_BYTES = 4 << 20  # of a file in the archive: of a longer one the beginning and the end
MAX_SUMMARY_LINES = 60

# Set for everything that a run starts.
INSIDE_VARIABLE = "GPUCONV_GPU_REPORT"


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run.

    Attributes:
        name: also of its files.
        arguments: of the interpreter, without those that records.add_arguments adds; "{out}" stands for the folder of
            the results.
        seconds: its limit.
        processes: how many share its work.
        prefix: a tool that runs the interpreter.
        absent: why it cannot run here, or empty.
        has_records: whether it takes those arguments.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    processes: int = 1
    prefix: tuple[str, ...] = ()
    absent: str = ""
    has_records: bool = True


@dataclass(frozen=True, slots=True)
class Ended:
    """How a step ended; `note` says what its records say, or why it did not run."""

    step: str
    status: Status
    seconds: float
    note: str
    exit_codes: tuple[int | None, ...] = ()


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"bench.{name}", *arguments)


def first_steps() -> list[Step]:
    """Is it right, then why is it fast or slow, then how fast is it. The last takes all the time that is left."""
    no_pytest = "" if find_spec("pytest") else "pytest is not installed"
    dense = ("--families", "mma|tail|skinny")
    return [
        Step("build", _module("gpu_steps", "build"), 25, processes=14),
        Step("ptx", _module("gpu_tests", "tests/test_ptx.py"), 15, absent=no_pytest),
        Step("micro", _module("micro"), 35),
        Step("tiles", _module("tiles"), 30),
        Step("verify", _module("gpu_steps", "verify"), 45, processes=8),
        # The GPU test of verify is the step of that name once more, in one process.
        Step(
            "tests",
            _module("gpu_tests", "--without", "test_ptx.py", "--without", "test_verify.py"),
            60,
            processes=8,
            absent=no_pytest,
        ),
        _sanitizer_step("memcheck", 30, *dense),
        _sanitizer_step("racecheck", 30, *dense),
        _ncu_step("conv2", 17),
        _ncu_step("feat1", 17),
        _ncu_step("packing", 11),
        Step("cudnn", _module("profile", "--peers"), 15),
        Step("benchmark", _module("important"), FIRST_SECONDS),
    ]


def second_steps(ended: Sequence[Ended]) -> list[Step]:
    """What the first run did not finish, then what it had no time for at all."""
    done = {e.step for e in ended if e.status in DONE}
    left = [replace(step, seconds=min(step.seconds, 90)) for step in first_steps() if step.name not in done]
    return [
        *left,
        Step("overhead", _module("overhead", "--json", "{out}/overhead.json"), 15, has_records=False),
        Step("accuracy", _module("accuracy", "--json", "{out}/accuracy.json"), 20, has_records=False),
        _sanitizer_step("initcheck", 20),
        Step("gradients", _module("important", "--directions", "grad_weight,grad_input"), SECOND_SECONDS),
    ]


def _sanitizer_step(tool: str, seconds: float, *arguments: str) -> Step:
    found = _tool("compute-sanitizer")
    prefix = (found or "", "--tool", tool, "--error-exitcode", str(records.WRONG))
    absent = "" if found else "compute-sanitizer is not installed"
    return Step(tool, _module("sanitize", *arguments), seconds, prefix=prefix, absent=absent)


def _ncu_step(work: str, seconds: float) -> Step:
    """The figures come as CSV, which needs no other program to be read. The clocks stay as they are."""
    found = _tool("ncu")
    options = ("--profile-from-start", "off", "--set", "full", "--clock-control", "none", "--csv", "--page", "raw")
    prefix = (found or "", *options, "--log-file", f"{{out}}/ncu_{work}.csv")
    absent = "" if found else "ncu is not installed"
    return Step(f"ncu_{work}", _module("profile", "--work", work), seconds, prefix=prefix, absent=absent)


def _tool(name: str) -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = (Path(home) / "bin" / name for home in homes if home)
    return which(name) or next((str(path) for path in candidates if path.is_file()), None)


# -- one step ---------------------------------------------------------------------------------------------------------


class Run:
    """A run of steps within a time, whose results lie in a folder and travel in an archive.

    Args:
        folder: of the results.
        archive: the file that holds them all, and is always whole.
        seconds: of the whole.
        rehearse: try every command on as little as possible.
        earlier: the folder with the results of the first run.
    """

    def __init__(
        self, folder: Path, archive: Path, seconds: float, *, rehearse: bool = False, earlier: Path | None = None
    ) -> None:
        self.folder, self.archive, self.rehearse, self.earlier = folder, archive, rehearse, earlier
        self.end = time.monotonic() + seconds
        self.steps = records.Records(folder / "steps.jsonl")
        self._archived: dict[str, tuple[int, int]] = {}
        self._refreshed = 0.0

    def step(self, step: Step) -> Ended:
        """Run one step, and record how it ended."""
        start = time.monotonic()
        limit = step.seconds * (REHEARSAL_FACTOR if self.rehearse else 1)
        seconds = min(limit, self.end - start - CLOSING_SECONDS)
        codes: list[int | None] = []
        if step.absent:
            status, note = "absent", step.absent
        elif seconds < LEAST_SECONDS:
            status, note = "no time", f"{max(seconds, 0):.0f} s were left"
        else:
            try:
                codes = self._processes(step, start + seconds - ENDING_SECONDS)
                status, note = self._judge(step, codes)
            except OSError as error:
                status, note = "failed", str(error)
        ended = Ended(step.name, status, round(time.monotonic() - start, 1), note, tuple(codes))  # type: ignore[arg-type]
        self.steps.write(step.name, status=status, seconds=ended.seconds, note=note, exit_codes=codes)
        self.refresh()
        return ended

    def _processes(self, step: Step, end: float) -> list[int | None]:
        """The exit codes of a step's processes; None where the limit ended one."""
        count = min(step.processes, 2) if self.rehearse else step.processes
        with contextlib.ExitStack() as stack:
            launch = [functools.partial(self._launch, stack, step, i, count, end) for i in range(count)]
            running = {i: launch[i]() for i in range(count)}
            codes: list[int | None] = [None] * count
            restarts = 0
            while running and time.monotonic() < end:
                for i, process in list(running.items()):
                    codes[i] = process.poll()
                    if codes[i] is None:
                        continue
                    del running[i]
                    if codes[i] == records.CONTEXT_LOST and restarts < MOST_RESTARTS:
                        restarts += 1
                        running[i] = launch[i]()
                time.sleep(0.05)
                self.refresh(every=REFRESH_SECONDS)
            for signum, grace in ((signal.SIGINT, 1.0), (signal.SIGKILL, 3.0)):
                _end(running.values(), signum, grace)
            return [None if i in running else code for i, code in enumerate(codes)]

    def _launch(
        self, stack: contextlib.ExitStack, step: Step, place: int, count: int, end: float
    ) -> subprocess.Popen[bytes]:
        command = [word.replace("{out}", str(self.folder)) for word in (*step.prefix, sys.executable, *step.arguments)]
        if step.has_records:
            # Started pieces take their time: the last one may begin when a tenth of the limit is left.
            left = end - time.monotonic()
            command += ["--records", str(self.folder / f"{step.name}.jsonl"), "--worker", f"{place}/{count}"]
            command += ["--seconds", f"{left - max(3.0, 0.1 * left):.1f}"]
            if self.earlier is not None:
                command += ["--done", str(self.earlier / f"{step.name}.jsonl")]
            command += ["--rehearse"] * self.rehearse
        search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": search, "PYTHONUNBUFFERED": "1", "COLUMNS": "160", INSIDE_VARIABLE: "1"}
        if count > 1:  # or each process would start a thread for every processor
            threads = str(max(1, (os.cpu_count() or 1) // count))
            env |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        log = stack.enter_context((self.folder / f"{step.name}.log").open("ab"))
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            preexec_fn=_own_group,  # noqa: PLW1509 - this process has one thread
        )  # fmt: skip

    def _judge(self, step: Step, codes: Sequence[int | None]) -> tuple[Status, str]:
        found = {record["key"]: record for record in records.read(self.folder / f"{step.name}.jsonl")}
        bad = [key for key, record in found.items() if record.get("ok") is False]
        absent = [f"{key}: {record['absent']}" for key, record in found.items() if "absent" in record]
        if any(code is None or code == records.OUT_OF_TIME for code in codes):
            status: Status = "overran"
        elif any(code not in (0, records.WRONG) for code in codes):
            status = "failed"
        else:
            status = "wrong" if bad or records.WRONG in codes else "ok"
        said = [f"{len(found)} records"] if step.has_records else []
        said += [f"{len(bad)} not ok, first {bad[0]}"] if bad else []
        said += [f"{len(absent)} absent, first {absent[0]}"] if absent else []
        if status == "failed" or not step.has_records or (status == "wrong" and not bad):
            said.append(last_line(self.folder / f"{step.name}.log"))
        return status, "; ".join(said)

    def refresh(self, every: float = 0.0) -> None:
        """Write the archive anew, unless nothing has changed or the last time was less than `every` seconds ago."""
        now = time.monotonic()
        if now - self._refreshed < every:
            return
        self._refreshed = now
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        present = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
        if present != self._archived:
            write_archive(self.archive, files)
            self._archived = present


def write_archive(archive: Path, files: Sequence[Path]) -> None:
    """Replace an archive: a reader finds the old one or the new one, never half of it."""
    draft = archive.with_name(f".{archive.name}.tmp")
    with tarfile.open(draft, "w:gz", compresslevel=3) as tar:
        for path in files:
            content = path.read_bytes()  # first, for its length: somebody may be writing
            if len(content) > MOST_FILE_BYTES:
                half = MOST_FILE_BYTES // 2
                content = content[:half] + b"\n... left out ...\n" + content[-half:]
            entry = tarfile.TarInfo(path.name)
            entry.size, entry.mtime = len(content), int(path.stat().st_mtime)
            tar.addfile(entry, io.BytesIO(content))
    draft.replace(archive)


def _own_group() -> None:
    """Of a new process: it can be ended with its children, and ends when its parent is killed."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _end(processes: Sequence[subprocess.Popen[bytes]] | Any, signum: int, grace: float) -> None:
    """Signal the groups of processes, and wait a while for those that still run."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
    end = time.monotonic() + grace
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.0, end - time.monotonic()))


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    said = (line.strip() for line in reversed(lines) if line.strip() and not line.strip().startswith(_TABLE_LINES))
    return next((line[:200] for line in said), "")


_TABLE_LINES = ("\u2500", "\u2502", "\u2503", "\u250f", "\u2514", "\u2517", "\u251c", "\u2521")


# -- the summary ------------------------------------------------------------------------------------------------------


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


# -- command line -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 no step failed or was wrong, 1 one did, 2 bad usage, 3 no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which_run = parser.add_mutually_exclusive_group(required=True)
    which_run.add_argument("--first", action="store_true", help=f"the first run, of {FIRST_SECONDS:.0f} s")
    which_run.add_argument("--second", action="store_true", help="what the first run left, then more")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the archive")
    parser.add_argument("--after", type=Path, metavar="FILE", help="the first run's archive (default: in DIR)")
    parser.add_argument("--seconds", type=float, metavar="S", help=f"of the second run (default: {SECOND_SECONDS:.0f})")
    parser.add_argument("--commit", metavar="HASH", help="of the checkout (default: what git says)")
    parser.add_argument("--rehearse", action="store_true", help="every command on as little as possible")
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


def read_archive(archive: Path, folder: Path) -> list[Ended]:
    """Unpack the results of a run into a folder, and return how its steps ended; none where there is no archive."""
    try:
        with tarfile.open(archive) as tar:
            for entry in tar.getmembers():
                if entry.isfile() and Path(entry.name).name == entry.name:
                    content = tar.extractfile(entry)
                    assert content is not None
                    (folder / entry.name).write_bytes(content.read())
    except FileNotFoundError:
        return []
    found = records.read(folder / "steps.jsonl")
    return [Ended(r["key"], r["status"], r["seconds"], r["note"], tuple(r["exit_codes"])) for r in found]


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
        "    from bench.engine_gpu import describe\n"
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
