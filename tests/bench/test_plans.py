"""bench.plans: the plans of random problems before and after a change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import plans


def plan(**changes: Any) -> dict[str, Any]:
    base = {"problem": "p", "family": "conv1d_mma", "segments": 1, "candidates": [["64x64", 10.0], ["32x64", 12.0]]}
    return {**base, **changes}


def test_random_problems_are_the_same_for_the_same_seed_and_of_every_kind() -> None:
    problems = list(plans.random_problems(300, 7))
    assert problems == list(plans.random_problems(300, 7))
    assert problems != list(plans.random_problems(300, 8))
    assert {p.kind for p in problems} == {"conv1d", "conv_transpose1d", "weight_gradient"}


def test_what_changed_is_told_with_its_reason() -> None:
    old = [plan(), plan(), plan(), plan(), plan()]
    new = [
        plan(),
        plan(candidates=[["32x64", 8.0], ["64x64", 9.0]]),
        plan(segments=4, candidates=[["64x64 by segments", 5.0]]),
        plan(family="conv1d_tiled"),
        plan(candidates=[["64x64", 99.0]]),  # times alone are no change of a plan
    ]
    assert list(plans.compare(old, new)) == [
        "p: conv1d_mma, 64x64 (9.0 us) -> 32x64 (8.0 us)",
        "p: conv1d_mma, 1 -> 4 segments, 64x64 (not a candidate any more) -> 64x64 by segments (5.0 us)",
        "p: conv1d_mma -> conv1d_tiled",
        "5 plans; changed: nothing 2, tile 2, segments 1, family 1",
    ]
    with pytest.raises(ValueError, match="different problems"):
        list(plans.compare([plan()], [plan(problem="q")]))


def test_a_written_file_differs_in_nothing_from_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "plans.jsonl")
    assert plans.main(["--write", file, "--count", "40"]) == 0
    assert plans.main(["--compare", file, file]) == 0
    assert capsys.readouterr().out == "40 plans; changed: nothing 40\n"
