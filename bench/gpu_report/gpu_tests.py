"""Runs the tests marked `gpu` and records how each one ended; a step of bench.gpu_report.

    python -m bench.gpu_report.gpu_tests [FILE ...] [--records FILE] [--worker I/N]

A test file that cannot be imported, because a package is not installed, is recorded, and the run goes on.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ..speed.results import ROOT
from . import records

# A file with tests marked `gpu` contains the mark, or the fixture of tests/conftest.py that sets it.
_HAS_GPU_TESTS = re.compile(r"\bmark\.gpu\b|\bbackend: Backend\b")


def files_with_gpu_tests(tests: Path = ROOT / "tests") -> list[Path]:
    return [file for file in sorted(tests.rglob("test_*.py")) if _HAS_GPU_TESTS.search(file.read_text("utf-8"))]


class Recorder:
    """A pytest plugin that selects the tests of this process that are not done yet, and records each when it ends."""

    def __init__(self, file: records.Records, most: int | None = None) -> None:
        self.file, self.most = file, most
        self.code, self.failed = 0, False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        place, workers = self.file.worker
        mine = [item for item in items if item.get_closest_marker("gpu")][: self.most][place::workers]
        items[:] = [item for item in mine if not self.file.has(item.nodeid)]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            why = str(report.longrepr).strip().splitlines()
            self.file.write(f"collect {report.nodeid}", ok=None, absent=why[-1] if why else "cannot be imported")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.failed
        if report.when == "call" or not report.passed:
            fields = {"ok": None if report.skipped else report.passed, "outcome": report.outcome}
            if not report.passed:
                fields["error"] = str(report.longrepr)[-3000:]
            self.file.write(report.nodeid, **fields, seconds=round(report.duration, 3))

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if self.file.seconds_left <= 0:
            self.code = records.OUT_OF_TIME
        elif self.failed and records.context_is_lost():
            self.code = records.CONTEXT_LOST
        if self.code:
            item.session.shouldstop = "out of time" if self.code == records.OUT_OF_TIME else "the GPU is lost"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: those of bench.gpu_report.records, and 1 where pytest itself fails."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_report.gpu_tests", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("files", nargs="*", help="default: all that have such tests")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="of a file to leave out")
    records.add_arguments(parser)
    args = parser.parse_args(argv)
    recorder = Recorder(records.open_records(args), 4 if args.rehearse else None)
    chosen = args.files or [str(file) for file in files_with_gpu_tests() if file.name not in args.without]
    chosen = chosen[:2] if args.rehearse else chosen
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--rootdir={ROOT}"]
    code = pytest.main([*options, *chosen], plugins=[recorder])
    if recorder.code:
        return recorder.code
    if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR):
        return 1
    return records.WRONG if recorder.failed else 0


if __name__ == "__main__":
    sys.exit(main())
