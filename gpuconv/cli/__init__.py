"""The command line, whose commands `gpuconv --help` lists.

Errors of the user end in one line on stderr and an exit code, never in a traceback.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__, files
from . import bench, cache, completion, convolve, explain, info, plot, verify, warmup
from .errors import EXIT_BROKEN_PIPE, EXIT_ERROR, EXIT_INTERRUPTED, CommandError
from .parser import Parser, UsageError
from .terminal import discard, print_json, tell


class _Terminated(BaseException):
    """A signal asked the process to end. It is raised as an exception so that unfinished files are removed."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    No exception leaves this function: an error becomes one line on stderr, and with `--json` also a JSON object on
    stdout. For an unexpected error this line names the file and the line where it was raised; with GPUCONV_TRACEBACK=1
    in the environment, the traceback is printed first.

    Args:
        argv: the arguments after the program's name; None for those of the process.

    Returns:
        The exit code: 0 success; 1 `verify` or `bench` found a wrong result, and nothing else; 2 bad usage, a file that
        cannot be read or written, not enough memory, or an unexpected error; 3 no GPU where one is needed; 130
        interrupted; 141 stdout was closed by its reader; 143 terminated.
    """
    if sys.stderr is None:  # it is closed, so messages are dropped
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        return _fail("standard output is closed", EXIT_ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be printable in the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if argv is None else list(argv)
    fail = partial(_fail, as_json="--json" in words)
    try:
        with _termination_raised():
            code = _run(words)
            sys.stdout.flush()
            return code
    except (CommandError, UsageError, files.FileError) as error:
        return fail(str(error), error.code if isinstance(error, CommandError) else EXIT_ERROR)
    except MemoryError as error:
        return fail(f"not enough memory: {error}" if str(error) else "not enough memory", EXIT_ERROR)
    except KeyboardInterrupt:
        return fail("interrupted", EXIT_INTERRUPTED)
    except _Terminated as stop:
        return fail("terminated", 128 + stop.signum)
    except BrokenPipeError:
        discard(sys.stdout)
        return EXIT_BROKEN_PIPE
    except OSError as error:  # gpuconv raises FileError for files, so this is a file that a library opened, or stdout
        if error.filename is not None:
            return fail(f"{error.filename}: {error.strerror or error}", EXIT_ERROR)
        discard(sys.stdout)
        return _fail(f"standard output: cannot be written: {error.strerror or error}", EXIT_ERROR)
    except Exception as error:
        if os.environ.get("GPUCONV_TRACEBACK"):
            traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        text = f"unexpected {type(error).__name__} in {where}: {error}"
        return fail(f"{text} (GPUCONV_TRACEBACK=1 shows the traceback)", EXIT_ERROR)


@contextmanager
def _termination_raised() -> Iterator[None]:
    """Raise `_Terminated` on the signals that ask a process to end, unless another handler is installed for them."""

    def terminate(signum: int, _: Any) -> NoReturn:
        raise _Terminated(signum)

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
    taken = [signum for signum in signals if signal.getsignal(signum) is signal.SIG_DFL]
    for signum in taken:
        signal.signal(signum, terminate)
    try:
        yield
    finally:
        for signum in taken:
            signal.signal(signum, signal.SIG_DFL)


def _run(argv: list[str]) -> int:
    if not argv:
        argv = ["--help"]
    elif argv[0] == "help":
        argv = [*argv[1:], "--help"]
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    command: Callable[[argparse.Namespace], int] = args.run
    return command(args)


def _fail(message: str, code: int, *, as_json: bool = False) -> int:
    try:
        if sys.stdout is not None:
            if as_json:
                print_json({"error": message, "exit_code": code})
            sys.stdout.flush()
    except (OSError, ValueError):
        discard(sys.stdout)
    tell("error", message)
    return code


def _parser() -> Parser:
    parser = Parser(
        prog="gpuconv",
        description="1-D convolution and transposed convolution for CuPy and NumPy arrays.",
        epilog="exit codes: 0 success, 1 verify or bench found a wrong result, 2 bad usage, bad\n"
        "input or an unexpected error, 3 a GPU is needed and none is available, 130 interrupted,\n"
        "141 the output was closed by its reader, 143 terminated\n\n"
        "example:\n  gpuconv verify\n  gpuconv conv1d speech.wav taps.npy out.wav --padding same --dtype float32\n\n"
        "NO_COLOR=1 removes the colours of the progress bar, COLUMNS=N sets the width of lines.",
    )
    parser.add_argument("--version", action="version", version=f"gpuconv {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    info.add_to(commands)
    verify.add_to(commands)
    explain.add_to(commands)
    convolve.add_to(commands, "conv1d")
    convolve.add_to(commands, "conv_transpose1d")
    warmup.add_to(commands)
    cache.add_to(commands)
    bench.add_to(commands)
    plot.add_to(commands)
    completion.add_to(commands, parser)
    commands.add_parser("help", help="show this help, or that of a command")
    return parser
