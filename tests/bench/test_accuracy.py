"""The accuracy report: what it claims in the README, and that it can be run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import accuracy
from bench.accuracy import ARITHMETICS, Arithmetic, Figure
from gpuconv.cases import Data
from gpuconv.problem import ConvProblem

FMA, SPLIT, TF32 = ARITHMETICS[:3]


def figure(arithmetic: Arithmetic, channels: int, kind: str) -> Figure:
    run = accuracy.runners(on_gpu=False)(arithmetic)
    assert run is not None
    return accuracy.measure(arithmetic, channels, kind, run)


@pytest.mark.parametrize("kind", accuracy.DATA)
def test_split_tf32_errs_less_than_fused_multiply_adds(kind: str) -> None:
    split, fma, tf32 = (figure(arithmetic, 512, kind) for arithmetic in (SPLIT, FMA, TF32))
    assert split.rms_units < fma.rms_units / 2
    assert split.max_units < fma.max_units
    assert tf32.rms_units > 20 * fma.rms_units  # it is another precision
    assert tf32.max_of_bound < 1


def test_a_result_outside_the_bound_is_refused() -> None:
    def run(problem: ConvProblem, data: Data) -> np.ndarray:
        return np.zeros(problem.output_shape, data.input.dtype)

    with pytest.raises(AssertionError, match=r"float32, split TF32 exceeds its bound on conv1d .*, normal data"):
        accuracy.measure(SPLIT, 64, "normal", run)


@pytest.mark.torch  # it is among the arithmetics
def test_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(accuracy, "CHANNELS", (32,))
    monkeypatch.setattr(accuracy, "missing_gpu", lambda: "none here")
    file = tmp_path / "accuracy.json"
    assert accuracy.main(["--json", str(file)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(file.read_text())
    assert document["device"]["name"] == "CPU"
    assert len(document["figures"]) == len(ARITHMETICS) * len(accuracy.DATA)
    assert all(arithmetic.name in printed for arithmetic in ARITHMETICS)
