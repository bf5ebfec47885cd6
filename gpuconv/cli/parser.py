"""The parser of the command line: error messages in gpuconv's style, and help in lines that fit the terminal."""

from __future__ import annotations

import argparse
import difflib
import itertools
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..text import wrap

# Messages of argparse and their replacements.
_WORDS = (
    (r"argument ([^:]+): expected one argument", r"\1 needs a value"),
    (r"argument ([^:]+): not allowed with argument (.+)", r"\1 cannot be given together with \2"),
    (r"argument ([^:]+): ignored explicit argument (.+)", r"\1 takes no value, got \2"),
    (r"argument ([^:]+): (must .*)", r"\1 \2"),
    (r"the following arguments are required: (.*, .*)", r"\1 are missing"),
    (r"the following arguments are required: (.*)", r"\1 is missing"),
    (r"unrecognized arguments: (.*)", r"unknown argument: \1"),
)


class UsageError(Exception):
    """The command line is invalid; the message says why on one line."""


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose errors are raised as `UsageError`.

    In descriptions and epilogs, lines with two leading spaces are commands; other lines are joined to paragraphs.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        for theirs, ours in _WORDS:
            if found := re.fullmatch(theirs, message, re.DOTALL):
                message = found.expand(ours)
                break
        name = message.removesuffix(" needs a value")
        if name != message and self._option_string_actions[name.split("/")[-1]].type is not None:
            message += f"; one that begins with - is given as {name}=-1"
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse. An unknown option is reported before a missing one, since it may be a misspelling of it."""
        words = [*(args or ()), "-"]
        for word, following in itertools.pairwise(words):
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break
            if re.match(r"--?[A-Za-z]", word) and word.partition("=")[0] not in self._option_string_actions:
                value = "" if following.startswith("-") else f" {following}"
                close = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, 1)
                meant = f"; did you mean {close[0]}?" if close else ""
                self.error(f"unrecognized arguments: {word}{value}{meant}")
        namespace, unknown = super().parse_known_args(args, namespace)
        for action in self._get_positional_actions():  # argparse takes none behind an option
            if unknown and action.nargs == "?" and getattr(namespace, action.dest) is None:
                setattr(namespace, action.dest, unknown.pop(0))
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file or sys.stderr)  # argparse's own method ignores write errors

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"must be one of {choices}, got {value!r}")


class _Help(argparse.HelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(text, width)  # argparse's own method breaks the names of options at their hyphens

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        paragraph: list[str] = []
        for line in [*text.splitlines(), ""]:
            if line and not line.startswith("  "):
                paragraph.append(line)
                continue
            if paragraph:
                lines += wrap(" ".join(paragraph), width, first=indent, rest=indent)
                paragraph = []
            if not line:
                lines.append("")
            else:  # its lines end with a backslash, so that they can be pasted as one command
                words = re.sub(r" (--\S+) (?!-)", " \\1\xa0", line.strip())  # an option stays with its value
                command = wrap(words, width - 2, first=indent + "  ", rest=indent + "    ")
                lines.append(" \\\n".join(command).replace("\xa0", " "))
        return "\n".join(lines).rstrip("\n")
