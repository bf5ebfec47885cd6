"""`gpuconv cache`: show and prune the kernels that were compiled in advance."""

from __future__ import annotations

import argparse
from typing import Any

from .. import cubins
from ..text import count, quantity, wrap_rows
from .errors import EXIT_CODES, CommandError
from .options import add_json, size
from .terminal import print_json, terminal_width

ACTIONS = ("show", "prune", "clear")


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "cache",
        help="show and prune the kernels compiled in advance",
        description="Show the folder of the kernels that gpuconv warmup --arch and gpuconv.compile\n"
        "have compiled, or remove kernels from it: prune removes damaged ones and, with\n"
        "--max-size, the least recently used ones; clear removes all. GPUCONV_CACHE_DIR\n"
        "names the folder.",
        epilog=f"{EXIT_CODES}\n\nexample:\n  gpuconv cache prune --max-size 200MB",
    )
    parser.add_argument(
        "action",
        nargs="?",
        choices=ACTIONS,
        default="show",
        metavar="ACTION",
        help=f"{', '.join(ACTIONS)} (default: show)",
    )
    parser.add_argument("--max-size", type=size, metavar="SIZE", help="prune: how much to keep, such as 200MB or 1GB")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.max_size is not None and args.action != "prune":
        raise CommandError("cache takes --max-size only together with prune")
    removed, removed_bytes = 0, 0
    try:
        if args.action != "show":
            removed, removed_bytes = cubins.prune(0 if args.action == "clear" else args.max_size)
        groups: dict[tuple[str, cubins.NvrtcVersion], list[cubins.Entry]] = {}
        for entry in cubins.entries():
            groups.setdefault((entry.arch, entry.nvrtc), []).append(entry)
        damaged = sum(entry.is_damaged for group in groups.values() for entry in group)
    except cubins.CacheError as error:
        raise CommandError(str(error)) from error
    kernels = [
        {
            "arch_name": arch,
            "nvrtc": ".".join(map(str, version)),
            "count": len(group),
            "bytes": sum(entry.num_bytes for entry in group),
        }
        for (arch, version), group in sorted(groups.items())
    ]
    facts = {
        "folder": str(cubins.folder()),
        "removed": removed,
        "removed_bytes": removed_bytes,
        "kernels": kernels,
        "damaged": damaged,
    }
    if args.json:
        print_json(facts)
    else:
        print(_page(facts, has_removed=args.action != "show"))
    return 0


def _page(facts: dict[str, Any], *, has_removed: bool) -> str:
    rows = [("folder", facts["folder"])]
    if has_removed:
        rows.append(("removed", _amount(facts["removed"], facts["removed_bytes"])))
    for group in facts["kernels"]:
        rows.append((group["arch_name"], f"{_amount(group['count'], group['bytes'])}, by NVRTC {group['nvrtc']}"))
    total = (sum(group[what] for group in facts["kernels"]) for what in ("count", "bytes"))
    rows.append(("all", _amount(*total)))
    if facts["damaged"]:
        rows.append(("damaged", f"{count(facts['damaged'], 'kernel')}: warmup replaces, prune removes what is damaged"))
    return "\n".join(wrap_rows(rows, terminal_width()))


def _amount(number: int, num_bytes: int) -> str:
    return f"{count(number, 'kernel')}, {quantity(num_bytes, 'B')}"
