"""A pytest plugin: no test may be skipped unless it carries the marker `gpu`. It works under pytest-xdist too."""

from __future__ import annotations

from collections.abc import Generator

import pytest

_skipped: list[str] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    # The report, not the item, travels from an xdist worker to the process that decides.
    report = yield
    report.may_skip = item.get_closest_marker("gpu") is not None
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail") and not getattr(report, "may_skip", False):
        _skipped.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _skipped.append(f"{report.nodeid} (the whole file)")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _skipped:
        terminalreporter.section("skipped, but not marked gpu: this fails the run", red=True)
        for nodeid in sorted(set(_skipped)):
            terminalreporter.line(nodeid)
