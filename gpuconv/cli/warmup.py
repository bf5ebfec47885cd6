"""`gpuconv warmup`: compile kernels in advance."""

from __future__ import annotations

import argparse
import time
from typing import Any

from .. import cubins, layers, runtime
from ..compile import compile_all, configs_of, directions_of, every_config
from ..cpu.threads import usable_cpus
from ..device import ARCHITECTURES, Device
from ..explain import DIRECTIONS, SETTINGS
from ..families import Config
from ..gpus import missing_gpu
from ..layers import Layer
from ..problem import DTYPES
from ..text import count
from .errors import EXIT_CODES_WITH_GPU, EXIT_NO_GPU, CommandError
from .gpu import kernel_cache
from .options import add_json, add_shapes, at_least, given_settings, some_of, specs
from .terminal import print_json, show_progress


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "warmup",
        help="compile kernels in advance",
        description="Compile kernels, so that later processes do not wait for the compiler: those of\n"
        "one problem and its gradients, of the layers in a file, or, without either, all\n"
        "kernels of the given dtypes with zero padding and without fused operations.\n"
        "With --arch they are for GPUs that need not be installed, and are stored in the\n"
        "folder that gpuconv cache shows. Otherwise they are for this machine's GPU, and are\n"
        "stored in CuPy's cache.",
        epilog=f"{EXIT_CODES_WITH_GPU}\n\nexample:\n  gpuconv warmup --arch sm_90 --dtype float16",
    )
    parser.add_argument("op", nargs="?", choices=tuple(SETTINGS), metavar="OP", help="conv1d or conv_transpose1d")
    parser.add_argument(
        "--arch",
        type=some_of(tuple(ARCHITECTURES)),
        metavar="A[,A]",
        help=f"compile for these GPUs: {', '.join(ARCHITECTURES)}",
    )
    parser.add_argument(
        "--layers", metavar="FILE", help="compile for the layers that gpuconv explain --json has written to FILE"
    )
    add_shapes(parser, required=False)
    parser.add_argument(
        "--direction",
        type=some_of(DIRECTIONS),
        metavar="D[,D]",
        help=f"for a problem or layers, only these: {', '.join(DIRECTIONS)}",
    )
    parser.add_argument(
        "--streams", action="store_true", help="without a problem or layers: also the kernels of streams"
    )
    parser.add_argument(
        "--jobs", type=at_least(1), metavar="N", help="with --arch: compile in N processes (default: one per core)"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if (args.input is None) != (args.weight is None):
        raise CommandError("warmup needs --input and --weight together, or neither")
    if args.input is not None and args.op is None:
        raise CommandError("warmup needs conv1d or conv_transpose1d before --input and --weight")
    if args.layers is not None and (args.op is not None or args.input is not None):
        raise CommandError("warmup takes --layers in place of a problem, got both")
    settings = given_settings(args)
    if args.input is None and (settings or args.bias or (args.direction and args.layers is None)):
        raise CommandError("warmup takes settings only together with --input and --weight")
    if args.streams and (args.input is not None or args.layers is not None):
        raise CommandError("warmup takes --streams only without a problem and layers")
    if args.jobs is not None and args.arch is None:
        raise CommandError("warmup takes --jobs only together with --arch")
    wanted = _layers(args, settings)
    start = time.perf_counter()
    if args.arch is not None:
        jobs = [(config, name) for name in args.arch for config in _configs(args, wanted, ARCHITECTURES[name])]
        try:
            with show_progress("compiling") as progress:
                done = compile_all(jobs, args.jobs or usable_cpus(), progress)
        except (ImportError, RuntimeError, cubins.CacheError) as error:
            raise CommandError(str(error)) from error
        _report(args, list(args.arch), "", done.kernels, done.compiled, str(cubins.folder()), start)
        return 0
    missing = missing_gpu()
    if missing is not None:
        raise CommandError(f"{missing}; --arch compiles for a GPU that is not installed", EXIT_NO_GPU)
    device = runtime.current_gpu()
    configs = _configs(args, wanted, device)
    with show_progress("compiling") as progress:
        for number, config in enumerate(configs):
            progress(number, len(configs), config.kernel)
            runtime.build(config, device.arch_name).compile()
        progress(len(configs), len(configs), "")
    _report(args, [device.arch_name], device.name, len(configs), None, kernel_cache(), start)
    return 0


def _report(
    args: argparse.Namespace, archs: list[str], gpu: str, kernels: int, compiled: int | None, folder: str, start: float
) -> None:
    """Print how many kernels are ready. How many of them were compiled now is unknown where CuPy keeps them: None."""
    elapsed_s = time.perf_counter() - start
    if args.json:
        facts = {"arch_names": archs, "kernels": kernels, "compiled": compiled, "folder": folder}
        print_json({**facts, "elapsed_s": elapsed_s})
        return
    names = ", ".join(archs)
    ready = f"{count(kernels, 'kernel')} for {f'{gpu} ({names})' if gpu else names} ready in {elapsed_s:.1f} s"
    print(f"{ready}{'' if compiled is None else f' ({compiled} compiled)'}: {folder}")


def _layers(args: argparse.Namespace, settings: dict[str, Any]) -> list[Layer] | None:
    """The layers that the command line describes, in each of the dtypes; None for all kernels."""
    if args.layers is not None:
        found = layers.read(args.layers)
        return [layer.with_dtype(dtype) for dtype in args.dtype for layer in found] if args.dtype else found
    if args.input is not None:
        return [Layer(args.op, specs(args, dtype), settings) for dtype in args.dtype or DTYPES]
    return None


def _configs(args: argparse.Namespace, wanted: list[Layer] | None, device: Device) -> list[Config]:
    """The specialisations to compile for a GPU, each once."""
    if wanted is None:
        return every_config(device, args.dtype or DTYPES, args.op, streams=args.streams)
    configs: dict[Config, None] = {}
    for layer in wanted:
        directions = directions_of(layer.arrays[0], layer.settings)
        if args.direction and args.layers is not None:
            directions = tuple(direction for direction in directions if direction in args.direction)
        elif args.direction:  # for a single problem, a direction that it does not have is an error
            directions = args.direction
        try:
            configs.update(dict.fromkeys(configs_of("warmup", *layer[:2], device, directions, layer.settings)))
        except (ValueError, TypeError) as error:
            raise CommandError(str(error)) from error
    return [*configs]
