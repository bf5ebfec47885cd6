"""`gpuconv bench`: measure how long layers take, with PyTorch for comparison."""

from __future__ import annotations

import argparse
import os
import platform
from typing import Any

import numpy as np

from .. import __version__, layers, runtime
from ..cpu.threads import usable_cpus
from ..explain import SETTINGS
from ..layers import Layer
from ..measure import Comparison, Timing, compare, settings_text
from ..text import count, installed_version, wrap
from .errors import EXIT_MISMATCH, CommandError
from .gpu import use_gpu
from .options import add_device, add_json, add_shapes, at_least, given_settings, specs
from .terminal import print_json, show_progress, tell, terminal_width


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure your own layers, and PyTorch's if it is installed",
        description="Measure one layer, or those in a file, on random data, with gpuconv and with\n"
        "PyTorch on the same device. First their results are compared. They take turns, so\n"
        "that a busy machine slows both; the median of the turns is shown, and half the\n"
        "interquartile range. Each call allocates its output, and its arrays may be in the\n"
        "caches.",
        epilog="exit codes: 0 success, 1 a result differs from PyTorch's, 2 bad usage or bad input,\n"
        "3 no GPU where one is needed\n\n"
        "example:\n  gpuconv bench conv1d --input 8,64,3000 --weight 64,64,7 --padding same\n"
        "  gpuconv bench --layers layers.json --dtype float16 --json",
    )
    parser.add_argument("op", nargs="?", choices=tuple(SETTINGS), metavar="OP", help="conv1d or conv_transpose1d")
    parser.add_argument("--layers", metavar="FILE", help="the layers in FILE, which gpuconv explain --json has written")
    add_shapes(parser, required=False, dtypes="those of the layers, or float32")
    add_device(parser)
    parser.add_argument(
        "--repeats", type=at_least(1), default=9, metavar="N", help="turns of each library (default: %(default)s)"
    )
    add_json(parser, "a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    wanted = _layers(args)
    on_gpu = use_gpu(args.device)
    if not on_gpu:
        _note_if_busy()
    found: list[Comparison] = []
    with show_progress("measuring") as progress:
        for number, layer in enumerate(wanted):
            progress(number, len(wanted), layer.op)
            try:
                found.append(compare(layer, on_gpu=on_gpu, repeats=args.repeats))
            except (ValueError, TypeError, ImportError) as error:  # cuFFT may be missing
                raise CommandError(f"layer {number + 1}: {error}" if args.layers else str(error)) from error
        progress(len(wanted), len(wanted), "")
    facts = {
        "device": {"name": runtime.current_gpu().name if on_gpu else "CPU"},
        "processors": usable_cpus(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pytorch": installed_version("torch"),
        },
        "turns": args.repeats,
    }
    if args.json:
        print_json({**facts, "layers": [comparison.to_dict() for comparison in found]})
    else:
        print(_page(facts, found))
    return 0 if all(comparison.is_right for comparison in found) else EXIT_MISMATCH


def _note_if_busy() -> None:
    """Say so if other programs use the processors: then a library with many threads loses the most."""
    load, processors = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load > processors + 1:
        words = f"{load:.0f} threads want to run on {count(processors, 'processor')}"
        tell("note", f"this machine is busy: {words}, so times and their ratios say little")


def _layers(args: argparse.Namespace) -> list[Layer]:
    """The layers that the command line describes, in each of the dtypes."""
    settings = given_settings(args)
    if args.layers is not None:
        if args.op is not None or args.input is not None or args.weight is not None or args.bias or settings:
            raise CommandError("bench takes --layers in place of a problem, got both")
        found = layers.read(args.layers)
        return [layer.with_dtype(dtype) for dtype in args.dtype for layer in found] if args.dtype else found
    if args.op is None or args.input is None or args.weight is None:
        raise CommandError("bench needs conv1d or conv_transpose1d with --input and --weight, or --layers")
    return [Layer(args.op, specs(args, dtype), settings) for dtype in args.dtype or ("float32",)]


def _page(facts: dict[str, Any], found: list[Comparison]) -> str:
    width = terminal_width()
    name, pytorch = facts["device"]["name"], facts["versions"]["pytorch"]
    where = name if name != "CPU" else f"the CPU, {count(facts['processors'], 'processor')}"
    versions = f"gpuconv {__version__}" + (f", PyTorch {pytorch}" if pytorch else "")
    lines = wrap(f"On {where}; {versions}; medians of {count(facts['turns'], 'turn')}.", width)
    for comparison in found:
        x, weight, bias = comparison.layer.arrays
        settings = settings_text(comparison.layer)
        words = f"{comparison.layer.op} {x.shape} with {weight.shape}{'' if bias is None else ' and a bias'}, {x.dtype}"
        lines += ["", *wrap(words + (f", {settings}" if settings else ""), width, rest="  ")]
        ours, theirs = comparison.ours, comparison.theirs
        if ours is None:
            text = f"the results differ by {comparison.difference:.1e} of their norm, expected at most "
            lines += wrap(f"{text}{comparison.tolerance:.0e}; not measured", width, first="  ", rest="  ")
            continue
        lines += wrap(f"gpuconv  {_time(ours)}  {comparison.method}", width, first="  ", rest="  ")
        if theirs is None:
            lines += wrap(f"PyTorch  {comparison.note}", width, first="  ", rest="  ")
        else:
            ratio = theirs.median / ours.median
            digits = 2 if ratio < 10 else 1 if ratio < 100 else 0
            text = f"PyTorch  {_time(theirs)}  {ratio:.{digits}f} times as long"
            lines += wrap(text, width, first="  ", rest="  ")
    return "\n".join(lines)


def _time(timing: Timing) -> str:
    spread = round(100 * timing.spread / timing.median) if timing.median else 0
    unit, scale = ("s ", 1.0) if timing.median >= 1 else ("ms", 1e3) if timing.median >= 1e-3 else ("us", 1e6)
    return f"{timing.median * scale:7.2f} {unit} ±{spread:2} %"
