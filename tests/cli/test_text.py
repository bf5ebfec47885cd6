"""Texts for people: wrapping, plurals, and long values."""

from __future__ import annotations

import pytest

from gpuconv.text import count, duration, install_hint, shorten, wrap, wrap_rows


def test_lines_break_between_words() -> None:
    text = "alpha beta gamma delta epsilon zeta eta theta"
    assert wrap(text, 30, first="- ", rest="  ") == ["- alpha beta gamma delta", "  epsilon zeta eta theta"]
    assert wrap("x" * 50, 30) == ["x" * 50]
    assert wrap("well-known", 24, first="  ") == ["  well-known"]
    assert wrap("", 30, first="- ") == ["-"]


@pytest.mark.parametrize("width", [20, 40, 60, 80])
def test_an_install_command_stays_on_one_line(width: int) -> None:
    text = f"no GPU: CuPy is missing: {install_hint('cuda13', 'cuda12')}"
    lines = wrap(text, width, first="- ", rest="  ")
    for extra in ("cuda13", "cuda12"):
        assert any(f"pip install -e '.[{extra}]'" in line for line in lines)
    assert all(len(line) <= max(width, len("  pip install -e '.[cuda13]'")) for line in lines)
    assert " ".join(" ".join(lines).split()) == f"- {text}"


def test_a_number_stays_with_its_unit() -> None:
    assert wrap("512 blocks, 6656 B of memory", 16) == ["512 blocks,", "6656 B of memory"]
    assert wrap("start it with --gpus all", 20) == ["start it with", "--gpus all"]
    assert wrap("moved at least 76.9 MB", 20) == ["moved at least", "76.9 MB"]


def test_times_have_three_digits_and_a_unit() -> None:
    times = {0.0: "0 us", 9.912: "9.91 us", 999.4: "999 us", 999.6: "1 ms", 163052.3: "163 ms", 1.634e6: "1.63 s"}
    assert {us: duration(us) for us in times} == times


def test_rows_hang() -> None:
    rows = [("a", "alpha beta gamma delta epsilon"), ("long", "first\n  1 \tone two three four five six")]
    assert wrap_rows(rows, 31, indent=" ") == [
        " a     alpha beta gamma delta",
        "       epsilon",
        " long  first",
        "         1 one two three four",
        "           five six",
    ]


def test_plurals() -> None:
    assert [count(n, "kernel") for n in (0, 1, 2)] == ["0 kernels", "1 kernel", "2 kernels"]


def test_long_values_lose_their_middle() -> None:
    assert shorten("stride must be\nat most 3,  got 4") == "stride must be at most 3, got 4"
    assert shorten("x" * 200) == "x" * 200
    assert shorten(f"got {'1' * 5000}.") == f"got {'1' * 40}...{'1' * 39}. (5001 characters)"
    assert len(shorten("word " * 5000)) < 2100


def test_hints_say_what_is_installable() -> None:
    assert install_hint("audio") == "pip install -e '.[audio]' in a checkout of gpuconv"
    assert install_hint("cuda13", "cuda12") == (
        "pip install -e '.[cuda13]' or pip install -e '.[cuda12]' in a checkout of gpuconv"
    )
