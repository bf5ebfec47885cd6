"""`bench.scaling`: halos are those of the graph, the slower of work and scheduler decides, and a small measured run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import dask.array as da
import pytest
from distributed import Client, LocalCluster
from rich.console import Console

from bench import scaling
from bench.scaling import Links, Signal

SMALL = Signal(C=4, K=10, chunk=64, chunks=2)


def test_halos_are_those_of_the_graph() -> None:
    """What tasks get of the chunks of other workers: windows of 10 taps reach 4 samples to the left, 5 to the right."""
    x = da.zeros(SMALL.problem(3).input_shape, dtype="float32", chunks=(1, -1, SMALL.chunk))
    y = SMALL.lazy(x)
    tasks = y.dask.layers[y.name]
    received = [[0, 0] for _ in range(3)]
    for l_out in range(y.numblocks[-1]):
        ((((*parts,),),),) = tasks[(y.name, 0, 0, l_out)][1]
        worker = l_out // SMALL.chunks
        for name, _, _, chunk, *ends in parts:
            other = chunk // SMALL.chunks
            if other != worker:
                assert name.startswith("conv1d-slice-")
                received[worker][other > worker] += (ends[1] - ends[0]) * SMALL.C * 4
    assert [SMALL.halo_bytes(3, worker) for worker in range(3)] == [*map(tuple, received)]
    assert SMALL.halo_bytes(3, 1) == (4 * 16, 5 * 16)
    assert SMALL.tasks(3) == len(tasks) == 6 + 2 * 5 + 1


def test_predictions() -> None:
    links = Links(node=2, inside=2.0, between=0.5, latency_us=10.0)
    one, two, four = (scaling.predict(SMALL, n, 1000.0, links, 1.0) for n in (1, 2, 4))
    assert (one.halo_bytes, one.halo_ms, one.work_ms, one.predicted_ms) == (0, 0.0, 2.0, 2.0)
    assert two.halo_ms == pytest.approx((10 + 80 / 2000) / 1e3)
    assert four.halo_ms == pytest.approx((2 * 10 + 64 / 2000 + 80 / 500) / 1e3)  # of the second one in its node
    assert four.predicted_ms == four.work_ms == pytest.approx(2 + four.halo_ms)
    by_scheduler = scaling.predict(SMALL, 4, 1.0, links, 500.0)
    assert by_scheduler.predicted_ms == by_scheduler.scheduler_ms == SMALL.tasks(4) * 0.5


def test_a_run_on_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scaling.json"
    assert scaling.main(["--task-us", "300", "--json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "H200, nodes of 8: predicted, not measured" in lines[0]
    assert not any("measured" in line for line in lines[1:])
    found = json.loads(path.read_text())
    assert found["measured"] == []
    assert [row["workers"] for row in found["predicted"]] == [1, 2, 4, 8, 16, 32, 64]
    with pytest.raises(SystemExit):
        scaling.main(["--processes", "0"])


def test_a_measured_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers are threads of this process, which start at once."""
    monkeypatch.setattr(scaling, "EMPTY_TASKS", 50)
    options: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        assert 0 < scaling.measure_task_us(client) < 1e5
        measured = scaling.measure(client, SMALL, (1, 2), turns=1)
    rows = [scaling.predict(SMALL, n, 10.0, scaling.LOOPBACK, 100.0, measured[n]) for n in (1, 2)]
    table = scaling.table_of("Measured", SMALL, rows, "workers")
    text = io.StringIO()
    Console(file=text, width=80).print(table)
    assert "predicted eff. measured eff." in text.getvalue()
    assert "\u2026" not in text.getvalue()
    assert f" {measured[2].all_ms:.1f} " in text.getvalue()
    assert measured[2].cpu_ms > 0
    assert 0 < scaling.chunk_us(SMALL, None) < 1e5
