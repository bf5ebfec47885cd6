"""Runs steps within a time limit, each as one or more processes, and collects their results in one archive."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..speed.results import ROOT
from . import records

Status = Literal["ok", "wrong", "failed", "overran", "absent", "no time"]

# Of a run: for what comes after the last step, and of a step: for its processes to end by themselves before its limit.
CLOSING_SECONDS = 8.0
ENDING_SECONDS = 2.0
LEAST_SECONDS = 5.0  # no step is started with less
REFRESH_SECONDS = 4.0
REHEARSAL_FACTOR = 8  # on all limits: machines that emulate a GPU are slow
MOST_RESTARTS = 20  # of a process that has lost the GPU
MOST_FILE_BYTES = 4 << 20  # of a file in the archive: of a longer one the beginning and the end

# Set for everything that a run starts.
INSIDE_VARIABLE = "GPUCONV_GPU_REPORT"


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run.

    Attributes:
        name: also of its files.
        arguments: of the interpreter, without those that records.add_arguments adds.
        seconds: its limit.
        processes: how many share its work.
        prefix: a tool that runs the interpreter; "{out}" stands for the folder of the results.
        absent: why it cannot run here, or empty.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    processes: int = 1
    prefix: tuple[str, ...] = ()
    absent: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a step ended; `note` says what its records say, or why it did not run."""

    step: str
    status: Status
    seconds: float
    note: str
    exit_codes: tuple[int | None, ...] = ()


class Run:
    """A run of steps within a time limit, whose results are written to a folder and to an archive.

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
        prefix = [word.replace("{out}", str(self.folder)) for word in step.prefix]
        # Pieces are not interrupted, so none starts in the last tenth of the limit.
        left = end - time.monotonic()
        command = [*prefix, sys.executable, *step.arguments, "--records", str(self.folder / f"{step.name}.jsonl")]
        command += ["--worker", f"{place}/{count}", "--seconds", f"{left - max(3.0, 0.1 * left):.1f}"]
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
        said = [f"{len(found)} records"]
        said += [f"{len(bad)} not ok, first {bad[0]}"] if bad else []
        said += [f"{len(absent)} absent, first {absent[0]}"] if absent else []
        if status == "failed" or (status == "wrong" and not bad):
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


def _own_group() -> None:
    """Let a new process be ended together with its children, and end when its parent is killed."""
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
