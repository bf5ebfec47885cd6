"""`gpuconv completion`: a script that completes commands, options and their values in a shell."""

from __future__ import annotations

import argparse
from typing import Any

from ..text import install_hint
from .errors import EXIT_CODES, CommandError

SHELLS = ("bash", "zsh")

# The names, in the help, of arguments that are files.
_FILES = ("IN", "AFTER", "OUT", "WEIGHT", "B", "FILE")


def add_to(commands: Any, parser: argparse.ArgumentParser) -> None:
    """Add the command; `parser` is the parser of the whole command line, from which the script is made."""
    command = commands.add_parser(
        "completion",
        help="print a script that completes commands in bash or zsh",
        description="Print a script with which the shell completes the commands of gpuconv, their\n"
        "options and values, and file names.",
        epilog=f"{EXIT_CODES}\n\nexample:\n  gpuconv completion bash >> ~/.bashrc\n"
        "  gpuconv completion zsh > ~/.zfunc/_gpuconv",
    )
    command.add_argument("shell", choices=SHELLS, metavar="SHELL", help=" or ".join(SHELLS))
    command.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError as error:
        raise CommandError(f"completion needs the package shtab: {install_hint('cli')}") from error
    _prepare(args.parser, shtab.FILE)
    print(shtab.complete(args.parser, shell=args.shell))
    return 0


def _prepare(parser: argparse.ArgumentParser, complete: Any) -> None:
    """Mark the arguments that are files, and reduce the description of each command to one line.

    Args:
        parser: the parser of the command line or of a command.
        complete: shtab's value for files.
    """
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action._choices_actions:
                action.choices[command.dest].description = command.help
                _prepare(action.choices[command.dest], complete)
        elif action.metavar in _FILES:
            action.complete = complete  # type: ignore[attr-defined] # shtab reads this attribute
