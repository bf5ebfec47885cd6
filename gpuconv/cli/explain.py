"""`gpuconv explain`: show which kernel computes a problem, and why."""

from __future__ import annotations

import argparse
from typing import Any

from .. import runtime
from ..device import ARCHITECTURES
from ..explain import DIRECTIONS, SETTINGS, explain
from .errors import EXIT_CODES_WITH_GPU, CommandError
from .gpu import use_gpu
from .options import add_device, add_json, add_shapes, given_settings, specs
from .terminal import print_json, terminal_width


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="show which kernel computes a problem, and why",
        description="Show what a call would do, from the shapes of its arrays alone: the kernel\n"
        "family with its launch on a GPU, or the method on the CPU, with bytes,\n"
        "operations and copies. Nothing is computed.",
        epilog=f"{EXIT_CODES_WITH_GPU}\n\n"
        "example:\n  gpuconv explain conv1d --input 8,512,3000 --weight 512,512,3 --arch sm_90",
    )
    parser.add_argument("op", choices=tuple(SETTINGS), metavar="OP", help="conv1d or conv_transpose1d")
    add_shapes(parser, required=True)
    where = parser.add_mutually_exclusive_group()
    add_device(where)
    where.add_argument(
        "--arch",
        choices=tuple(ARCHITECTURES),
        metavar="ARCH",
        help=f"explain for this GPU, which need not be installed: {', '.join(ARCHITECTURES)}",
    )
    parser.add_argument(
        "--direction",
        choices=DIRECTIONS,
        default="forward",
        metavar="D",
        help=f"what to explain: {', '.join(DIRECTIONS)} (default: %(default)s)",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    device = args.arch
    if device is None:
        device = runtime.current_gpu() if use_gpu(args.device) else "cpu"
    try:
        arrays = specs(args, args.dtype)
        explanation = explain(args.op, *arrays, direction=args.direction, device=device, **given_settings(args))
    except (ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
    if args.json:
        print_json(explanation.to_dict())
    else:
        print(explanation.page(terminal_width()))
    return 0
