"""`gpuconv warmup`: compile kernels into the disk cache."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from .. import runtime
from ..explain import DIRECTIONS, SETTINGS, Direction, explain
from ..families import FAMILIES, Config
from ..gpus import missing_gpu
from ..problem import DTYPES
from ..text import count
from .errors import EXIT_NO_GPU, CommandError
from .gpu import current_device, kernel_cache
from .options import add_shapes, given_settings, specs
from .terminal import show_progress


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "warmup",
        help="compile kernels into the disk cache",
        description="Compile kernels on the present GPU into CuPy's disk cache, so that no later\n"
        "process waits for the compiler: those of one problem and its gradients, or,\n"
        "without shapes, every kernel of the given dtypes that pads with zeros.",
        epilog="example:\n  gpuconv warmup conv1d --input 8,512,3000 --weight 512,512,3 --dtype float16",
    )
    parser.add_argument("op", nargs="?", choices=tuple(SETTINGS), metavar="OP", help="conv1d or conv_transpose1d")
    add_shapes(parser, required=False)
    parser.add_argument(
        "--direction",
        choices=DIRECTIONS,
        metavar="D",
        help=f"of the problem only this one of {', '.join(DIRECTIONS)}",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if (args.input is None) != (args.weight is None):
        raise CommandError("warmup needs --input and --weight together, or neither")
    if args.input is not None and args.op is None:
        raise CommandError("warmup needs conv1d or conv_transpose1d in front of the shapes")
    settings = given_settings(args)
    if args.input is None and (settings or args.bias or args.direction):
        raise CommandError("warmup takes settings only together with --input and --weight")
    missing = missing_gpu()
    if missing is not None:
        raise CommandError(missing, EXIT_NO_GPU)

    device = runtime.device(current_device())
    dtypes = args.dtype or DTYPES
    directions: Sequence[Direction] = DIRECTIONS
    if args.direction or args.algorithm:  # an algorithm is of one direction
        directions = (args.direction or "forward",)
    configs: dict[Config, None] = {}  # in order, each once
    if args.input is None:
        for family in FAMILIES:
            if args.op is None or family.kind not in SETTINGS or family.kind == args.op:
                configs.update((c, None) for c in family.configs(device) if _dtype_of(c) in dtypes)
    for dtype in dtypes if args.input is not None else ():
        shapes = specs(args, dtype)
        for direction in directions if dtype in DTYPES or args.direction else ("forward",):
            if direction == "grad_input" and shapes[0].shape[-1] == 0 and not args.direction:
                continue  # there is no such gradient
            try:
                explanation = explain(args.op, *shapes, direction=direction, device=device, **settings)
            except (ValueError, TypeError) as error:
                raise CommandError(str(error)) from error
            if explanation.choice is not None:
                configs.update((step.config, None) for step in explanation.choice.plan.steps)
    start = time.perf_counter()
    with show_progress("compiling") as progress:
        for done, config in enumerate(configs):
            progress(done, len(configs), config.kernel)
            runtime.build(config).compile()
        progress(len(configs), len(configs), "")
    seconds = time.perf_counter() - start
    ready = f"{count(len(configs), 'kernel')} for {device.name} ({device.arch_name}) ready in {seconds:.1f} s"
    print(f"{ready}: {kernel_cache()}")
    return 0


def _dtype_of(config: Config) -> str:
    """The dtype of the data that a kernel takes."""
    return dict(config.macros).get("DTYPE", "").partition("_to_")[0]
