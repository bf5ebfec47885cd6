"""`gpuconv verify`: check the results of this machine against the reference."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import Any

from .. import cases, files, layers
from ..cases import NUMBER_FORMATS
from ..gpus import GpuUnavailableError
from ..text import count, wrap
from ..verify import verify
from .errors import EXIT_MISMATCH, EXIT_NO_GPU, CommandError
from .options import add_device, at_least, some_of
from .terminal import print_json, show_progress, terminal_width


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="check the results of this machine against the reference",
        description="Compute the table of test problems on the chosen device and check every result.\n"
        "Results on small integers must be exact; others must be within the computed error\n"
        "bound. The bound follows from the problem; there is no tolerance to set.",
        epilog="exit codes: 0 all results are right, 1 a result is wrong, 2 bad usage, 3 no GPU for --device gpu\n\n"
        "example:\n  gpuconv verify --device gpu --layers layers.json --junit gpuconv.xml",
    )
    add_device(parser)
    parser.add_argument(
        "--dtype", type=some_of(NUMBER_FORMATS), metavar="D[,D]", help=f"only these, of {', '.join(NUMBER_FORMATS)}"
    )
    parser.add_argument(
        "--filter", metavar="TEXT", help="only the cases with TEXT in their name, or with TEXT as tag or operation"
    )
    parser.add_argument(
        "--layers", metavar="FILE", help="check your own layers, which gpuconv explain --json has written to FILE"
    )
    parser.add_argument("--all", action="store_true", help="check every case in every dtype, not a selection")
    parser.add_argument("--family", metavar="NAME", help="only this kernel family, on the cases that it takes (GPU)")
    parser.add_argument("--list", action="store_true", help="print the names that --filter takes, and compute nothing")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="seed of the random data (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the report, or the list, as a JSON object")
    parser.add_argument("--junit", metavar="FILE", help="also write the report to FILE as JUnit XML, for CI")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.layers is not None and (args.filter is not None or args.all or args.list):
        raise CommandError("verify takes --layers in place of --filter, --all and --list")
    if args.list:
        return _list_cases(args.filter, as_json=args.json)
    if args.junit is not None:
        files.check_output(args.junit, {}, force=True, suffixes=None)
    try:
        with show_progress("verifying") as progress:
            report = verify(
                args.device,
                filter=args.filter,
                seed=args.seed,
                dtypes=args.dtype,
                quick=not args.all,
                family=args.family,
                layers=None if args.layers is None else layers.read(args.layers),
                progress=progress,
            )
    except GpuUnavailableError as error:
        raise CommandError(str(error), EXIT_NO_GPU) from error
    except (ValueError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from error
    if args.junit is not None:
        files.write_text(args.junit, report.to_junit())
    if args.json:
        print_json(report.to_dict())
    else:
        print(_page(str(report)))
    return 0 if report.ok else EXIT_MISMATCH


def _page(report: str) -> str:
    """The report; on a terminal, with long lines wrapped between words."""
    if not sys.stdout.isatty():
        return report
    width = terminal_width()
    lines: list[str] = []
    for line in report.split("\n"):
        indent = line[: len(line) - len(line.lstrip())]
        lines += [line] if len(line) <= width else wrap(line.strip(), width, first=indent, rest=indent + "  ")
    return "\n".join(lines)


def _list_cases(filter: str | None, *, as_json: bool) -> int:
    """Print operations and tags with the number of their cases, then the cases with their tags."""
    try:
        selected = cases.select(filter)
    except ValueError as error:
        raise CommandError(str(error)) from error
    numbers: dict[str, Counter[str]] = {
        "operations": Counter(case.problem.op for case in selected),
        "tags": Counter(tag for case in selected for tag in case.tags),
    }
    if as_json:
        print_json({**numbers, "cases": {case.name: case.tags for case in selected}})
        return 0
    width = max(len(case.name) for case in selected)
    for title, found in numbers.items():
        print(f"{title}:")
        for name, number in found.items():
            print(f"  {name:<{width}}  {count(number, 'case')}")
    print("cases:")
    for case in selected:
        print(f"  {case.name:<{width}}  {', '.join(case.tags)}")
    return 0
