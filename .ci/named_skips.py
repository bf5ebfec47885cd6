"""A pytest plugin that allows tests to be skipped only for named reasons. It works with pytest-xdist, too.

`-p named_skips --may-skip gpu` allows the skips named gpu and fails the run on all others. The end of the output says
how many tests were skipped for each reason. `--list-skips torch FILE` writes the ids of the tests that were skipped
because PyTorch is not installed, one a line, so that another run can take them as `pytest @FILE`.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

# How the reasons begin; their texts are in tests/__init__.py and gpuconv.
REASONS = {
    "gpu": "no GPU: ",
    "gpu_on_cpu": "gpu_on_cpu: ",
    "torch": "PyTorch is not installed: ",
    "models": "the models are not installed: ",
    "sigpy": "sigpy is not installed: ",
}


class NamedSkips:
    """The ids of skipped tests, and of files skipped as a whole, by the name of the reason."""

    def __init__(self, allowed: list[str]) -> None:
        self.allowed = allowed
        self.skipped: defaultdict[str, set[str]] = defaultdict(set)
        self.refused: set[str] = set()

    def _add(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        assert isinstance(report.longrepr, tuple)
        reason = report.longrepr[2].removeprefix("Skipped: ")
        for name in self.allowed:
            if reason.startswith(REASONS[name]):
                self.skipped[name].add(report.nodeid)
                return
        self.refused.add(f"{report.nodeid}: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._add(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._add(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        lists = session.config.getoption("list_skips")
        for name, path in lists:
            Path(path).write_text("".join(f"{test}\n" for test in sorted(self.skipped[name])), encoding="utf-8")
        if self.refused and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("skips by reason")
        for name in self.allowed:
            files = sum("::" not in test for test in self.skipped[name])
            tests = len(self.skipped[name]) - files
            terminalreporter.line(f"{name}: {tests} tests and {files} whole files ({REASONS[name]}...)")
        if self.refused:
            terminalreporter.section("skipped for a reason that is not allowed: this fails the run", red=True)
            for line in sorted(self.refused):
                terminalreporter.line(line)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--may-skip", action="append", default=[], choices=REASONS, help="a reason that is allowed")
    parser.addoption("--list-skips", action="append", nargs=2, default=[], metavar=("REASON", "FILE"))


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the reports of all workers arrive in the process that started them
        config.pluginmanager.register(NamedSkips(config.getoption("may_skip")))
