"""The report of a GPU, on processes that fail, overrun, crash and are killed; its rehearsal; the tiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.gpu_report import __main__ as gpu_report
from bench.gpu_report import gpu_tests, important, records, run, tiles
from bench.gpu_report.run import Ended, Run, Step
from bench.speed import results
from tests.bench.test_bench import LAYERS, measurement


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of 60 s; steps are started however little time is left."""
    monkeypatch.setattr(run, "LEAST_SECONDS", 0.5)
    monkeypatch.setattr(run, "ENDING_SECONDS", 0.0)
    folder = tmp_path / "results"
    folder.mkdir()
    return Run(folder, tmp_path / "first.tar.gz", 60.0, earlier=tmp_path)


def script(name: str, body: str, seconds: float = 30.0, **settings: Any) -> Step:
    """A step that runs a few lines of Python; `file` are its records."""
    opening = (
        "import argparse, os, sys, time; from bench.gpu_report import records; parser = argparse.ArgumentParser()\n"
        "records.add_arguments(parser); file = records.open_records(parser.parse_args())\n"
    )
    return Step(name, ("-c", opening + body), seconds, **settings)


def archived(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as tar:
        return {entry.name: tar.extractfile(entry).read().decode() for entry in tar.getmembers()}  # type: ignore[union-attr]


def test_report_goes_on_whatever_a_step_does(report: Run) -> None:
    right, wrong = "lambda: {}", "lambda: {'ok': False}"
    steps = [
        script("right", f"sys.exit(file.run([('a', {right}), ('b', lambda: {{'absent': 'no tool'}})]))"),
        script("wrong", f"sys.exit(file.run([('a', {right}), ('b', {wrong}), ('c', lambda: 1 / 0)]))"),
        script("crashes", "file.write('a', ok=True); print('last words'); os.abort()"),
        script("overruns", "file.write('a', ok=True); time.sleep(60)", 3.0),
        script("stops in time", f"file._end = 0; sys.exit(file.run([('a', {right})]))"),
        script("missing", "", absent="not there"),
        Step("no such tool", (), 30.0, prefix=("/nowhere/tool",)),
        script("shared", f"sys.exit(file.run((str(i), {right}) for i in range(7)))", processes=3),
    ]
    found = [report.step(step) for step in steps]
    assert [(e.step, e.status) for e in found] == [
        ("right", "ok"), ("wrong", "wrong"), ("crashes", "failed"), ("overruns", "overran"),
        ("stops in time", "overran"), ("missing", "absent"), ("no such tool", "failed"), ("shared", "ok"),
    ]  # fmt: skip
    assert found[0].note == "2 records; 1 absent, first b: no tool"
    assert found[1].note.startswith("3 records; 2 not ok, first b")
    assert "last words" in found[2].note
    files = archived(report.archive)
    assert {json.loads(line)["key"] for line in files["shared.jsonl"].splitlines()} == set("0123456")
    assert [json.loads(line)["status"] for line in files["steps.jsonl"].splitlines()] == [e.status for e in found]
    assert "ZeroDivisionError" in files["wrong.jsonl"]


def test_report_stays_within_its_time(report: Run) -> None:
    start = time.monotonic()
    short = Run(report.folder, report.archive, run.CLOSING_SECONDS + 3.0)
    stubborn = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    assert [short.step(script(name, stubborn)).status for name in ("a", "b")] == ["overran", "no time"]
    assert time.monotonic() - start < run.CLOSING_SECONDS + 3.0


def test_report_ends_a_step_with_its_children(tmp_path: Path, report: Run) -> None:
    marker = tmp_path / "marker"
    child = f"import time, pathlib; time.sleep(5); pathlib.Path({str(marker)!r}).write_text('late')"
    report.step(script("parent", f"import subprocess; subprocess.run([sys.executable, '-c', {child!r}])", 2.0))
    time.sleep(4.5)
    assert not marker.exists()


def test_process_that_lost_the_gpu_is_started_again(report: Run) -> None:
    """The new process goes on behind the piece that broke the old one."""
    body = (
        "import types; fresh = not file.has('b')\n"
        "def lost(): raise RuntimeError('cudaErrorIllegalAddress')\n"
        "working = types.SimpleNamespace(deviceSynchronize=lost if fresh else lambda: None)\n"
        "sys.modules['cupy'] = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=working))\n"
        "sys.exit(file.run([('a', lambda: {}), ('b', lost), ('c', lambda: {})]))"
    )
    ended = report.step(script("loses", body))
    assert (ended.status, ended.exit_codes) == ("wrong", (records.WRONG,))
    found = records.read(report.folder / "loses.jsonl")
    assert [(r["key"], r["ok"]) for r in found] == [("a", True), ("b", False), ("c", True)]


def test_archive_is_written_while_a_step_runs_and_survives_the_kill_of_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    body = "for i in range(1000): file.write(str(i), ok=True); time.sleep(0.05)"
    code = (
        "from pathlib import Path; from bench.gpu_report import run; from tests.bench.test_gpu_report import script\n"
        "run.REFRESH_SECONDS = 0.2\n"
        f"run = run.Run(Path({str(folder)!r}), Path({str(tmp_path / 'first.tar.gz')!r}), 60.0)\n"
        f"run.step(script('slow', {body!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=results.ROOT)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.1)
        known = archived(tmp_path / "first.tar.gz") if (tmp_path / "first.tar.gz").exists() else {}
        if known.get("slow.jsonl", "").count("\n") > 3:
            break
    process.kill()
    process.wait()
    lines = archived(tmp_path / "first.tar.gz")["slow.jsonl"].splitlines()
    assert [json.loads(line)["key"] for line in lines] == [str(i) for i in range(len(lines))]
    time.sleep(1.0)
    known = (folder / "slow.jsonl").read_bytes()
    time.sleep(0.5)
    assert (folder / "slow.jsonl").read_bytes() == known  # the step has ended with the run


def test_second_run_does_what_the_first_left(report: Run, tmp_path: Path) -> None:
    work = "[(key, lambda: {'made by': os.getpid()}) for key in 'abc']"
    report.step(
        script("verify", "file.write('a', ok=True); os.write(file._file, b'{\"key\": \"b'); time.sleep(60)", 2.5)
    )
    report.step(script("build", f"sys.exit(file.run({work}))"))
    report.step(script("tests", "", absent="not there"))
    earlier, folder = tmp_path / "earlier", tmp_path / "second"
    earlier.mkdir()
    folder.mkdir()
    ended = run.read_archive(report.archive, earlier)
    assert [(e.step, e.status) for e in ended] == [("verify", "overran"), ("build", "ok"), ("tests", "absent")]
    names = [step.name for step in gpu_report.second_steps(ended)]
    assert names[0] == "ptx"
    assert "verify" in names
    assert not {"build", "tests"} & set(names)
    again = Run(folder, tmp_path / "second.tar.gz", 60.0, earlier=earlier)
    assert again.step(script("verify", f"sys.exit(file.run({work}))")).status == "ok"
    assert [r["key"] for r in records.read(folder / "verify.jsonl")] == ["b", "c"]  # the first lost the half line of b


def test_without_a_first_run_the_second_does_everything(tmp_path: Path) -> None:
    assert run.read_archive(tmp_path / "first.tar.gz", tmp_path) == []
    first = [step.name for step in gpu_report.first_steps()]
    assert [step.name for step in gpu_report.second_steps([])][: len(first)] == first


def test_long_file_is_cut_in_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MOST_FILE_BYTES", 100)
    log = tmp_path / "a.log"
    log.write_text("first" + 1000 * "x" + "last", encoding="utf-8")
    run.write_archive(tmp_path / "a.tar.gz", [log])
    text = archived(tmp_path / "a.tar.gz")["a.log"]
    assert len(text) < 150
    assert (text[:5], text[-4:]) == ("first", "last")


def test_summary_is_short_and_says_what_matters(tmp_path: Path) -> None:
    file = records.Records(tmp_path / "benchmark.jsonl")
    file.write(important.WHERE, ok=True, environment={"commit": "abc"}, settings={}, ceilings={"copy": 4000.0})
    for i, name in enumerate(LAYERS):
        file.write(name, ok=True, measurement=asdict(measurement(name, 10.0 + i, PyTorch=15.0)))
    records.Records(tmp_path / "micro.jsonl").write("copy_driver_GB/s", ok=True, figure=4300.0)
    ended = [Ended(f"step{i}", "ok", 1.0, "fine" * 100, (0,)) for i in range(13)]
    lines = gpu_report.summary(ended, tmp_path, {"name": "Fake GPU"}, 500.0)
    text = "\n".join(lines)
    assert len(lines) == gpu_report.MAX_SUMMARY_LINES
    assert "Fake GPU" in text
    assert "copy driver GB/s 4,300.0" in text
    assert "81 measured, geometric mean" in text
    assert list(LAYERS)[-1] in text  # the worst
    result = results.read(tmp_path / "benchmark.json")
    assert len(result.measurements) == 81
    assert result.environment == {"commit": "abc"}


def test_gpu_tests_are_recorded_and_those_that_cannot_be_imported_stop_none(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\ndef test_right(): pass\n"
        "@pytest.mark.gpu\ndef test_wrong(): assert 1 == 2\n"
        "@pytest.mark.gpu\ndef test_skipped(): pytest.skip('not here')\n"
        "@pytest.mark.gpu\ndef test_done(): assert False\n"
        "def test_other(): assert False\n",
        encoding="utf-8",
    )
    (tmp_path / "test_lost.py").write_text("import no_such_module  # mark.gpu\n", encoding="utf-8")
    (tmp_path / "test_none.py").write_text("import no_such_module\n", encoding="utf-8")
    chosen = gpu_tests.files_with_gpu_tests(tmp_path)
    assert [file.name for file in chosen] == ["test_lost.py", "test_some.py"]
    done, found = tmp_path / "done.jsonl", tmp_path / "found.jsonl"
    command = [sys.executable, "-m", "bench.gpu_report.gpu_tests", *map(str, chosen), "--records", str(found)]
    assert subprocess.run(command, cwd=results.ROOT, capture_output=True, check=False).returncode == records.WRONG
    outcomes = {r["key"].rpartition("::")[2]: r["ok"] for r in records.read(found)}
    collected = {key: ok for key, ok in outcomes.items() if key.startswith("test_")}
    assert collected == {"test_right": True, "test_wrong": False, "test_skipped": None, "test_done": False}
    assert any(r["key"].startswith("collect") and "no_such_module" in r["absent"] for r in records.read(found))
    lines = found.read_text(encoding="utf-8").splitlines()
    done.write_text("\n".join(line for line in lines if "test_right" not in line) + "\n", encoding="utf-8")
    found.unlink()
    again = subprocess.run([*command, "--done", str(done)], cwd=results.ROOT, capture_output=True, check=False)
    assert again.returncode == 0
    assert [r["key"].rpartition("::")[2] for r in records.read(found) if r["ok"]] == ["test_right"]


STAND_IN_TOOL = """#!/bin/sh
# Drops the tool's own options and runs the program.
while [ "${1#*python}" = "$1" ]; do shift; done
exec "$@"
"""


@pytest.mark.long
@pytest.mark.gpu
@pytest.mark.skipif(run.INSIDE_VARIABLE in os.environ, reason="the report need not rehearse itself")
def test_report_can_be_rehearsed(tmp_path: Path) -> None:
    """Every command of both runs, on a little work; the first run is killed half way."""
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    for name in ("ncu", "compute-sanitizer"):
        (tools / name).write_text(STAND_IN_TOOL, encoding="utf-8")
        (tools / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "bench.gpu_report", "--rehearse", "--out", str(out), "--commit", "abc"]
    first = subprocess.Popen([*command, "--first"], cwd=results.ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for line in first.stdout:
        assert line.split()[0] == "ok", line
        if line.split()[1] == "tiles":
            break
    first.kill()
    first.wait()
    files = archived(out / "first.tar.gz")
    assert {json.loads(line)["key"] for line in files["steps.jsonl"].splitlines()} >= {"build", "ptx", "micro"}
    assert "commit" in json.loads(files["environment.json"])
    second = subprocess.run(
        [*command, "--second"], cwd=results.ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert second.returncode == 0, second.stdout + second.stderr
    files = archived(out / "second.tar.gz")
    ended = {(step := json.loads(line))["key"]: step["status"] for line in files["steps.jsonl"].splitlines()}
    assert set(ended.values()) == {"ok"}
    assert {"verify", "tests", "racecheck", "ncu_feat1", "benchmark", "gradients"} <= set(ended)
    assert not {"build", "ptx", "micro"} & set(ended)


# Every layer and pass, in one of the two modes.
PIECES = [pytest.param(piece, id=key) for key, piece in tiles.work(rehearse=True)][::2]


@pytest.mark.gpu
@pytest.mark.parametrize("compare", PIECES)
def test_every_tile_gives_the_same_bits_on_a_gpu(compare: Callable[[], dict[str, Any]]) -> None:
    found = compare()
    assert found["ok"], found
    assert len(found["tiles"]) >= 4


@pytest.mark.gpu
def test_tile_with_other_bits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    every = tiles.executors

    def spoiled(*given: Any) -> Iterator[tuple[str, Any]]:
        (name, first), (_, second) = list(every(*given))[:2]
        yield name, first

        def spoil(*arrays: Any) -> None:
            second.run(*arrays)
            arrays[-1][0, 7, 3] = 0

        yield "spoiled", SimpleNamespace(run=spoil)

    monkeypatch.setattr(tiles, "executors", spoiled)
    found = next(piece for _, piece in tiles.work(rehearse=True))()
    assert not found["ok"]
    assert 1 <= found["differing_bytes"]["spoiled"] <= 2  # of a bfloat16
