"""The records of a step of bench.gpu_report: lines of JSON, each written whole as soon as it is known.

A step is a list of pieces of work, each with a key. If it is killed, only the current piece is lost; started again with
the same file, it continues after the pieces in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Exit codes of a step, besides 0 (all done, all right), 2 (bad usage) and 3 (no GPU).
WRONG = 4  # all done, and a record says "ok": false
CONTEXT_LOST = 5  # the CUDA context of the process is dead: the rest needs a new process
OUT_OF_TIME = 6  # the rest was not started

Work = Callable[[], dict[str, Any]]


class Records:
    """Appends records to a file, or to standard output without one.

    Args:
        path: of the records; what it holds already counts as done.
        done: another file whose records count as done.
        seconds: no piece is started after this time.
        worker: (i, n): of every n pieces, the process does the one in place i.
    """

    def __init__(
        self,
        path: Path | None = None,
        done: Path | None = None,
        seconds: float = float("inf"),
        worker: tuple[int, int] = (0, 1),
    ) -> None:
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._done = {record["key"]: record for p in (done, path) if p is not None for record in read(p)}
        self._end = time.monotonic() + seconds
        self.worker = worker

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def has(self, key: str) -> bool:
        return key in self._done

    def write(self, key: str, **fields: Any) -> None:
        """Write one record; processes that share the file do not mix their lines."""
        record = {"key": key, **fields}
        self._done[key] = record
        line = json.dumps(record, default=str) + "\n"
        if self._file is None:
            sys.stdout.write(line)
            sys.stdout.flush()
        else:
            os.write(self._file, line.encode())

    def run(self, work: Iterable[tuple[str, Work]]) -> int:
        """Do this process's pieces that are not done yet; returns the exit code of the step.

        The record of a piece has what the piece returns, "ok" and its seconds; one that raises has the error.
        """
        place, workers = self.worker
        mine = [(key, piece) for i, (key, piece) in enumerate(work) if i % workers == place]
        for key, piece in mine:
            if self.has(key):
                continue
            if self.seconds_left <= 0:
                return OUT_OF_TIME
            start = time.monotonic()
            try:
                fields = {"ok": True, **piece()}
            except Exception as error:
                text = traceback.format_exc()[-2000:]
                fields = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000], "traceback": text}
            self.write(key, **fields, seconds=round(time.monotonic() - start, 3))
            if not fields["ok"] and context_is_lost():
                return CONTEXT_LOST
        return WRONG if any(not self._done[key].get("ok", True) for key, _ in mine) else 0


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file; none if there is no file. An incomplete last line is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "key" in record:
            found.append(record)
    return found


def context_is_lost() -> bool:
    """Whether CUDA has failed for good in this process, as after an access outside of an array."""
    cupy = sys.modules.get("cupy")
    if cupy is None:
        return False
    try:
        cupy.cuda.runtime.deviceSynchronize()
    except RuntimeError:
        return True
    return False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every step."""
    parser.add_argument("--records", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument("--done", type=Path, metavar="FILE", help="records that are not made again")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), metavar="S", help="start nothing after S seconds"
    )
    parser.add_argument("--worker", default="0/1", metavar="I/N", help="of every N pieces, only the one in place I")
    parser.add_argument("--rehearse", action="store_true", help="a few pieces of tiny size, to try the command itself")


def open_records(args: argparse.Namespace) -> Records:
    place, workers = map(int, args.worker.split("/"))
    return Records(args.records, args.done, args.seconds, (place, workers))
