"""`bench.long`: both ways agree, memory stays below what `explain` says, and crossovers are found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import long
from gpuconv import fft
from gpuconv.device import Device


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(long, "SECONDS", 0)
    monkeypatch.setitem(long.LAYERS, "dense", replace(long.LAYERS["dense"], L=2048))
    path = tmp_path / "long.json"
    assert long.main(["--layers", "dense", "--taps", "4,200,900", "--max-gflop", "0.5", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [row["direct_ms"] is None for row in found["rows"]] == [False, False, True]
    for row in found["rows"]:
        assert 0 < row["fft_bytes"] <= row["bound_bytes"]
    assert found["rows"][1]["difference"] < 1e-5
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert lines[-1].startswith("dense: direct up to ")
    monkeypatch.setattr(long, "MAX_DIFFERENCE", 0.0)
    assert long.main(["--layers", "dense", "--taps", "4"]) == 1
    with pytest.raises(SystemExit):
        long.main(["--taps", "4,0"])


def test_crossovers() -> None:
    row = long.Row("one", 16, 64, 1.0, 2.0, 0.5, 0, 0, 0, 0.0)
    rows = [row, replace(row, taps=64), replace(row, taps=256, direct_ms=3.0), replace(row, taps=512, direct_ms=None)]
    assert long.measured_crossover(rows) == (64, 256)
    assert long.measured_crossover(rows[2:]) == (None, 256)
    assert long.measured_crossover(rows[:2]) == (64, None)
    layer = long.LAYERS["one"]
    for device in (None, Device.from_arch("sm_90")):
        taps = long.predicted_crossover(layer, "float32", device)
        assert taps is not None
        before, at = (fft.costs(layer.problem(K, "float32"), device) for K in (taps * 9 // 10, taps))
        assert at.fft_us < at.direct_us
        assert before.fft_us > 0.9 * before.direct_us
