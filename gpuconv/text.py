"""Text for users: lines that fit a terminal, plurals, long values, versions, and how to install missing packages."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

WIDTH = 80  # columns of output that does not go to a terminal
_NARROWEST = 16  # the fewest columns of text besides an indent, however narrow the terminal is
_LONGEST_WORD, _LONGEST_MESSAGE = 200, 2000  # characters
_TOGETHER = re.compile(r"pip install -e '[^']*'|--gpus all|\d (?:[kMGT]?(?:B|FLOP|Hz)|us|ms|s)\b")
_UNBREAKABLE = "\xa0"  # a space at which textwrap breaks no line


def wrap(text: str, width: int, *, first: str = "", rest: str = "") -> list[str]:
    """The lines of one paragraph, broken between words only.

    A command that users copy, and a number with its unit, are never broken.

    Args:
        text: the paragraph; its line breaks count as spaces.
        width: the most columns of a line, with its indent. A longer word gets a line of its own, unbroken.
        first: the beginning of the first line.
        rest: the beginning of the other lines.
    """
    width = max(width, len(rest) + _NARROWEST)
    text = _TOGETHER.sub(lambda found: found[0].replace(" ", _UNBREAKABLE), text)
    lines = textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(_UNBREAKABLE, " ") for line in lines] or [first.rstrip()]


def wrap_rows(rows: Iterable[tuple[str, str]], width: int, *, indent: str = "") -> list[str]:
    """The lines of rows (name, text) in two columns. A row whose text has several lines keeps them.

    A line that is too long continues below its beginning, or below the column of a tab in it.
    """
    rows = list(rows)
    column = max(len(name) for name, _ in rows)
    rest = " " * (len(indent) + column + 2)
    lines = []
    for name, text in rows:
        first = f"{indent}{name:<{column}}  "
        for line in text.split("\n"):
            head, _, tail = line.rpartition("\t")
            lines += wrap(tail, width, first=first + head, rest=rest + " " * len(head))
            first = rest
    return lines


def cuda_version(number: int) -> str:
    """A version of CUDA as people write it: 13.2 for CUDA's own 13020."""
    return f"{number // 1000}.{number % 1000 // 10}"


def count(number: int, noun: str) -> str:
    """A number of things: 1, "kernel" gives "1 kernel"; 2, "kernel" gives "2 kernels"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def quantity(value: float, unit: str) -> str:
    """A value with three digits and a decimal prefix: 19300000000, "FLOP" gives "19.3 GFLOP"."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or prefix == "P":
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}"


def duration(us: float) -> str:
    """A time, given in microseconds, with three digits: 10200 gives "10.2 ms"."""
    for unit, scale in (("us", 1.0), ("ms", 1e3)):
        if us < 999.5 * scale:
            return f"{us / scale:.3g} {unit}"
    return f"{us / 1e6:.3g} s"


def shorten(message: str) -> str:
    """A message on one line, without the middle of overlong words (a number of 5,000 digits) and of overlong texts."""
    line = re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda word: _without_middle(word[0], 40), " ".join(message.split()))
    return _without_middle(line, _LONGEST_MESSAGE // 2 - 50) if len(line) > _LONGEST_MESSAGE else line


def shown(value: object) -> str:
    """The value of an argument in an error message: on one line, and without the middle if that is long."""
    line = repr(value)
    if "\n" in line:  # of an array
        line = " ".join(line.split())
    return _without_middle(line, 40) if len(line) > _LONGEST_WORD else line


def _without_middle(text: str, ends: int) -> str:
    return f"{text[:ends]}...{text[-ends:]} ({len(text)} characters)"


def install_hint(*extras: str) -> str:
    """How to install an extra of gpuconv, or any one of several.

    gpuconv is on no package index, so it can be installed only from a checkout.
    """
    return " or ".join(f"pip install -e '.[{extra}]'" for extra in extras) + " in a checkout of gpuconv"


def installed_version(package: str) -> str | None:
    """The version of an installed package, which is not imported; None if it is not installed."""
    import importlib.metadata  # here, since it is slow and `import gpuconv` does not need it

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
