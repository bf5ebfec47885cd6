"""Output of the commands: the width of lines, messages and progress."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from .. import __version__
from ..text import WIDTH, shorten, wrap

PROGRESS_SECONDS = 10.0  # between two lines if stderr is not a terminal


def terminal_width() -> int:
    """The columns of the terminal, or $COLUMNS; 80 if stdout is not a terminal."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def tell(kind: str, message: str) -> None:
    """Write a message to stderr on one line; on a terminal, wrapped between words."""
    text = f"gpuconv: {kind}: {shorten(message)}"
    try:
        lines = wrap(text, terminal_width(), rest="  ") if sys.stderr.isatty() else [text]
        print("\n".join(lines), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        discard(sys.stderr)


def print_json(facts: Mapping[str, Any]) -> None:
    """Print a JSON object that begins with the version of gpuconv."""
    print(json.dumps({"gpuconv": __version__, **_finite(facts)}, indent=2))


def _finite(value: Any) -> Any:
    """The value with strings in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def discard(stream: Any) -> None:
    """Discard what a broken stream has buffered. Python flushes it again at exit, which would fail again."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def show_progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Progress on stderr, driven by calls with (done, total, label).

    A terminal shows a bar, or a counter where the package rich is not installed, and both are erased at the end. A pipe
    or a file gets a line every `PROGRESS_SECONDS`.
    """
    if not sys.stderr.isatty():
        last = time.monotonic()

        def write_line(done: int, total: int, label: str) -> None:
            nonlocal last
            if time.monotonic() - last >= PROGRESS_SECONDS:
                last = time.monotonic()
                print(f"{title} {done}/{total} {label}", file=sys.stderr, flush=True)

        yield write_line
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column
    except ImportError:
        width = 0

        def show(done: int, total: int, label: str) -> None:
            nonlocal width
            line = f"{title} {done}/{total} {label}"[: shutil.get_terminal_size().columns - 1]
            print(f"\r{line:<{width}}", end="", file=sys.stderr, flush=True)
            width = len(line)

        try:
            yield show
        finally:
            print(f"\r{'':<{width}}\r", end="", file=sys.stderr, flush=True)
        return
    # In a narrow terminal the label is cut, not the numbers.
    label_column = TextColumn("{task.fields[label]}", table_column=Column(no_wrap=True, ratio=1))
    columns = (TextColumn(title), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), label_column)
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task(title, total=None, label="")

        def update(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, label=label)

        yield update
