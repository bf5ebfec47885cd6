"""The command line: `gpuconv info | verify | explain | conv1d | conv_transpose1d | warmup`.

Errors of the user end in one line on stderr and an exit code, never in a traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from . import __version__, files, functional, runtime
from .cases import FORMATS
from .device import ARCHITECTURES
from .explain import DIRECTIONS, SETTINGS, explain
from .families import FAMILIES, Config
from .problem import DTYPES, PRECISIONS, ArraySpec, ConvProblem
from .verify import GpuUnavailableError, missing_gpu, verify

EXIT_MISMATCH = 1
EXIT_ERROR = 2
EXIT_NO_GPU = 3
EXIT_INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended, and below for SIGPIPE
EXIT_BROKEN_PIPE = 141


class CommandError(Exception):
    """Ends a command with one line on stderr and an exit code."""

    def __init__(self, message: str, code: int = EXIT_ERROR) -> None:
        super().__init__(message)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None for those of the process.

    Returns:
        The exit code: 0 success; 1 `verify` found a mismatch; 2 bad usage, a file that cannot be read or written, or
        not enough memory; 3 no GPU where one is needed; 130 interrupted; 141 stdout was closed by its reader.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be printable in the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except (CommandError, files.FileError) as error:
        return _fail(str(error), error.code if isinstance(error, CommandError) else EXIT_ERROR)
    except MemoryError as error:
        return _fail(f"not enough memory: {error}" if str(error) else "not enough memory", EXIT_ERROR)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # Python flushes stdout once more when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    command: Callable[[argparse.Namespace], int] = args.run
    return command(args)


def _fail(message: str, code: int) -> int:
    print("gpuconv: error:", " ".join(message.split()), file=sys.stderr)
    return code


# -- arguments -------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gpuconv",
        description="1-D convolution and transposed convolution for CuPy and NumPy arrays.",
        epilog="exit codes: 0 success, 1 verify found a mismatch, 2 bad usage or bad input,\n"
        "            3 a GPU is needed and none answers",
    )
    parser.add_argument("--version", action="version", version=f"gpuconv {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_info(commands)
    _add_verify(commands)
    _add_explain(commands)
    _add_convolve(commands, "conv1d")
    _add_convolve(commands, "conv_transpose1d")
    _add_warmup(commands)
    return parser


def _add_info(commands: Any) -> None:
    text = "Print versions, GPUs, the kernel cache, and what is missing for what."
    parser = commands.add_parser("info", help="versions, GPUs and what is missing", description=text)
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of text")
    parser.set_defaults(run=_info)


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="check the results of this machine against the reference",
        description="Run the table of test problems on the chosen device and check every result:\n"
        "exact where the data is small integers, inside the computed error bound\n"
        "elsewhere. The bound follows from the problem; there is no tolerance to set.",
        epilog="exit codes: 0 all good, 1 a mismatch, 2 bad usage, 3 no GPU for --device gpu",
    )
    _add_device(parser)
    parser.add_argument("--dtype", type=_some_of(FORMATS), metavar="D[,D]", help=f"only these, of {', '.join(FORMATS)}")
    parser.add_argument(
        "--filter", metavar="TEXT", help="only the cases with TEXT in their name, or this tag or operation"
    )
    parser.add_argument(
        "--seed", type=_at_least(0), default=0, metavar="N", help="seed of the random data (default: 0)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as a JSON object")
    parser.add_argument("--junit", metavar="FILE", help="also write the report to FILE as JUnit XML, for CI")
    parser.set_defaults(run=_verify)


def _add_explain(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="show which kernel a problem gets, and why",
        description="Show what a call would do, from the shapes of its arrays alone: the kernel\n"
        "family with its launch on a GPU, or the method on the CPU, with bytes,\n"
        "operations and copies. Nothing is computed.",
        epilog="example:\n  gpuconv explain conv1d --input 8,512,3000 --weight 512,512,3 --arch sm_90",
    )
    parser.add_argument("op", choices=tuple(SETTINGS), metavar="OP", help="conv1d or conv_transpose1d")
    _add_shapes(parser, required=True)
    where = parser.add_mutually_exclusive_group()
    _add_device(where)
    where.add_argument(
        "--arch",
        choices=tuple(ARCHITECTURES),
        metavar="ARCH",
        help=f"for a GPU that need not be there: {', '.join(ARCHITECTURES)}",
    )
    parser.add_argument(
        "--direction",
        choices=DIRECTIONS,
        default="forward",
        metavar="D",
        help=f"what to explain: {', '.join(DIRECTIONS)} (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of text")
    parser.set_defaults(run=_explain)


def _add_convolve(commands: Any, op: str) -> None:
    transposed = op == "conv_transpose1d"
    shape = "(C_in, C_out/groups, K)" if transposed else "(C_out, C_in/groups, K)"
    name = "transposed convolution" if transposed else "convolution"
    parser = commands.add_parser(
        op,
        help=f"apply a 1-D {name} to a .npy or .wav file",
        description=f"Apply a 1-D {name} to a file"
        + (".\n" if transposed else "; the kernel is not flipped.\n")
        + "A .npy file holds (N, C_in, L_in) or (C_in, L_in), a .wav file (channels,\n"
        "samples) as float32. The output is written as a whole or not at all.",
        epilog=f"example:\n  gpuconv {op} speech.wav filter.npy out.wav"
        + (" --stride 2 --rate 32000" if transposed else " --padding same"),
    )
    parser.add_argument("input", metavar="IN", help="input, .npy or .wav")
    parser.add_argument("weight", metavar="WEIGHT", help=f"weight {shape}, .npy")
    parser.add_argument("output", metavar="OUT", help="output, .npy or .wav (32-bit float, so nothing is clipped)")
    parser.add_argument("--bias", metavar="B", help="bias (C_out,), .npy")
    _add_settings(parser, (op,))
    _add_device(parser)
    parser.add_argument("--dtype", choices=DTYPES, metavar="D", help=f"convert the files first, to {', '.join(DTYPES)}")
    parser.add_argument(
        "--rate",
        type=_at_least(1),
        metavar="HZ",
        help="sample rate of a .wav output (default: that of a .wav input, whatever the stride)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=_convolve, op=op)


def _add_warmup(commands: Any) -> None:
    parser = commands.add_parser(
        "warmup",
        help="compile kernels into the disk cache",
        description="Compile kernels on the present GPU into CuPy's disk cache, so that no later\n"
        "process waits for the compiler: those of one problem, or, without shapes,\n"
        "every kernel of the given dtypes.",
        epilog="example:\n  gpuconv warmup conv1d --input 8,512,3000 --weight 512,512,3 --dtype float16",
    )
    parser.add_argument("op", nargs="?", choices=tuple(SETTINGS), metavar="OP", help="conv1d or conv_transpose1d")
    _add_shapes(parser, required=False)
    parser.set_defaults(run=_warmup)


def _add_shapes(parser: Any, *, required: bool) -> None:
    """The options that describe a problem without its arrays."""
    parser.add_argument("--input", type=_shape, required=required, metavar="SHAPE", help="N,C_in,L_in or C_in,L_in")
    parser.add_argument(
        "--weight",
        type=_shape,
        required=required,
        metavar="SHAPE",
        help="C_out,C_in/groups,K; for conv_transpose1d C_in,C_out/groups,K",
    )
    parser.add_argument("--bias", action="store_true", help="with a bias")
    if required:
        parser.add_argument("--dtype", choices=DTYPES, default="float32", metavar="D", help=_one_of(DTYPES, "float32"))
    else:
        parser.add_argument(
            "--dtype", type=_some_of(DTYPES), metavar="D[,D]", help=f"{', '.join(DTYPES)} (default: all)"
        )
    _add_settings(parser, tuple(SETTINGS))


def _add_settings(parser: Any, ops: tuple[str, ...]) -> None:
    note = "conv_transpose1d: " if len(ops) > 1 else ""
    words = "valid, same or causal" if "conv1d" in ops else "valid or same"
    parser.add_argument("--stride", type=int, metavar="N", help="step of the window (default: 1)")
    parser.add_argument("--padding", type=_padding, metavar="P", help=f"N, LEFT,RIGHT, {words} (default: 0)")
    parser.add_argument("--dilation", type=int, metavar="N", help="distance between taps (default: 1)")
    parser.add_argument("--groups", type=int, metavar="N", help="groups of channels (default: 1)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, metavar="P", help=f"of float32 data: {_one_of(PRECISIONS, 'float32')}"
    )
    if "conv_transpose1d" in ops:
        parser.add_argument(
            "--output-padding", type=int, metavar="N", help=f"{note}more output on the right (default: 0)"
        )
        parser.add_argument("--output-size", type=int, metavar="N", help=f"{note}the wanted L_out, instead")


def _add_device(parser: Any) -> None:
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        metavar="WHERE",
        help="auto, cpu or gpu (default: auto, the GPU if one answers)",
    )


def _one_of(words: Sequence[str], default: str) -> str:
    return f"{', '.join(words)} (default: {default})"


def _shape(text: str) -> tuple[int, ...]:
    try:
        extents = tuple(int(part) for part in text.split(","))
    except ValueError:
        extents = (-1,)
    if min(extents) < 0:
        raise argparse.ArgumentTypeError(f"expected extents such as 8,512,3000, got {text!r}")
    return extents


def _padding(text: str) -> int | tuple[int, ...] | str:
    try:
        sides = tuple(int(part) for part in text.split(","))
    except ValueError:
        return text  # a word; the problem knows which there are
    return sides[0] if len(sides) == 1 else sides


def _some_of(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(choices)}, got {name!r}")
        return names

    return parse


def _at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return parse


def _given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings on the command line; the others keep the defaults of the operation."""
    names = dict.fromkeys(name for settings in SETTINGS.values() for name in settings)
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


# -- the GPU ---------------------------------------------------------------------------------------------------------


def _use_gpu(choice: str) -> bool:
    """Whether `--device auto|cpu|gpu` means the GPU.

    Raises:
        CommandError: "gpu" and none answers.
    """
    if choice == "cpu":
        return False
    missing = missing_gpu()
    if missing is not None and choice == "gpu":
        raise CommandError(missing, EXIT_NO_GPU)
    return missing is None


def _current_device() -> int:
    return int(runtime.cupy_module().cuda.runtime.getDevice())


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _kernel_cache() -> str:
    return os.environ.get("CUPY_CACHE_DIR") or str(Path.home() / ".cupy" / "kernel_cache")


# -- info ------------------------------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> int:
    facts = _facts()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    rows = [(name, value or "not there") for name, value in facts["versions"].items()]
    for gpu in facts["devices"]:
        text = f"{gpu['name']} (sm_{gpu['arch']}), {gpu['num_sms']} multiprocessors, {gpu['l2_bytes'] >> 20} MiB L2"
        rows.append((f"GPU {gpu['index']}", text))
    rows.append(("kernel cache", facts["kernel_cache"]))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")
    if facts["missing"]:
        print("\nMissing:")
        for gap in facts["missing"]:
            print(f"- {gap['what']}\n  {gap['meaning']}")
    return 0


def _facts() -> dict[str, Any]:
    versions: dict[str, str | None] = {
        "gpuconv": __version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "NumPy": np.__version__,
        "CuPy": _version("cupy"),
        "CUDA runtime": None,
        "NVRTC": None,
        "NVIDIA driver": None,
        "ml_dtypes": _version("ml_dtypes"),
        "soundfile": _version("soundfile"),
        "rich": _version("rich"),
    }
    missing: list[dict[str, str]] = []
    devices: list[dict[str, Any]] = []
    try:
        cuda: Any = None if versions["CuPy"] is None else runtime.cupy_module().cuda
    except ImportError:  # too old, which `missing_gpu` reports below
        cuda = None
    if cuda is not None:
        versions["CUDA runtime"] = _cuda_version(cuda.runtime.runtimeGetVersion())
        if driver := cuda.runtime.driverGetVersion():
            versions["NVIDIA driver"] = f"supports CUDA {_cuda_version(driver)}"
        try:
            versions["NVRTC"] = ".".join(map(str, cuda.nvrtc.getVersion()))
        except Exception:  # CuPy loads the library at the first call and reports its absence in many ways
            what = "NVRTC, CUDA's run-time compiler: install the CUDA toolkit, or CuPy with its extra [ctk]"
            missing.append({"what": what, "meaning": "Kernels that are not in the kernel cache cannot be compiled."})
    gap = missing_gpu()
    if gap is None:
        for index in range(runtime.device_count()):
            devices.append({"index": index, **dataclasses.asdict(runtime.device(index))})
    else:
        meaning = "NumPy arrays are convolved on the CPU; CuPy arrays cannot be."
        missing.append({"what": gap, "meaning": meaning})
    for module, extra, meaning in (
        ("ml_dtypes", "bf16", "There is no bfloat16; the other dtypes work."),
        ("soundfile", "audio", "The command line reads and writes .npy files, but no .wav files."),
        ("rich", "cli", "Progress is a plain counter instead of a bar."),
    ):
        if versions[module] is None:
            missing.append({"what": f"{module}: pip install 'gpuconv[{extra}]'", "meaning": meaning})
    return {"versions": versions, "devices": devices, "kernel_cache": _kernel_cache(), "missing": missing}


def _version(module: str) -> str | None:
    """The version of an optional package, or None where it cannot be imported."""
    try:
        imported = importlib.import_module(module)
    except Exception:  # broken installations fail in many ways, and a report on what is there must survive them
        return None
    version = getattr(imported, "__version__", None)
    return str(version or importlib.metadata.version(module))


# -- verify ----------------------------------------------------------------------------------------------------------


def _verify(args: argparse.Namespace) -> int:
    if args.junit is not None:
        files.check_output(args.junit, {}, force=True, suffixes=None)
    try:
        with _progress("verifying") as progress:
            report = verify(args.device, filter=args.filter, seed=args.seed, dtypes=args.dtype, progress=progress)
    except GpuUnavailableError as error:
        raise CommandError(str(error), EXIT_NO_GPU) from error
    except (ValueError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from error
    if args.junit is not None:
        files.write_text(args.junit, report.to_junit())
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0 if report.ok else EXIT_MISMATCH


# -- explain ---------------------------------------------------------------------------------------------------------


def _explain(args: argparse.Namespace) -> int:
    device = args.arch
    if device is None:
        device = runtime.device(_current_device()) if _use_gpu(args.device) else "cpu"
    try:
        specs = _specs(args, args.dtype)
        explanation = explain(args.op, *specs, direction=args.direction, device=device, **_given_settings(args))
    except (ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
    print(json.dumps(explanation.to_dict(), indent=2) if args.json else explanation)
    return 0


def _specs(args: argparse.Namespace, dtype: str) -> tuple[ArraySpec, ArraySpec, ArraySpec | None]:
    """The arrays that `--input`, `--weight` and `--bias` describe."""
    bias = None
    if args.bias and len(args.weight) == 3:
        per_group = args.weight[1] * (args.groups or 1)
        bias = ArraySpec((args.weight[0] if args.op == "conv1d" else per_group,), dtype)
    return ArraySpec(args.input, dtype), ArraySpec(args.weight, dtype), bias


# -- conv1d and conv_transpose1d -------------------------------------------------------------------------------------


def _convolve(args: argparse.Namespace) -> int:
    sources = {"input": args.input, "weight": args.weight, **({"bias": args.bias} if args.bias else {})}
    files.check_output(args.output, sources, force=args.force)
    on_gpu = _use_gpu(args.device)
    x, rate = files.read(args.input, args.dtype)
    weight = files.read(args.weight, args.dtype, suffixes=(".npy",)).array
    bias = files.read(args.bias, args.dtype, suffixes=(".npy",)).array if args.bias else None
    settings = _given_settings(args)
    construct = ConvProblem.conv1d if args.op == "conv1d" else ConvProblem.conv_transpose1d
    try:
        problem = construct(x, weight, bias, **settings)
    except (ValueError, TypeError) as error:
        dtypes = {array.dtype for array in (x, weight, bias) if array is not None}
        hint = "; give --dtype to convert" if isinstance(error, TypeError) and len(dtypes) > 1 else ""
        raise CommandError(f"{error}{hint}") from error
    is_wav = args.output.lower().endswith(".wav")
    if is_wav:
        rate = args.rate or rate
        files.check_wav(args.output, problem.output_shape, problem.dtype, rate)
    elif args.rate:
        raise CommandError(f"{args.output}: --rate is for a .wav output; a .npy file holds no sample rate")

    function: Callable[..., Any] = functional.conv1d if args.op == "conv1d" else functional.conv_transpose1d
    if on_gpu:
        cupy = runtime.cupy_module()
        try:
            runtime.check_dtype(x.dtype)
            on_device = [None if array is None else cupy.asarray(array) for array in (x, weight, bias)]
        except (TypeError, ValueError) as error:
            raise CommandError(f"CuPy {cupy.__version__} has no {problem.dtype} arrays: {error}") from error
        output = cupy.asnumpy(function(*on_device, **settings))
        where = f"on {runtime.device(_current_device()).name}"
    else:
        output = function(x, weight, bias, **settings)
        where = "on the CPU"
    files.write(args.output, output, rate, force=args.force)
    form = f"{tuple(output.shape)} {problem.dtype}" + (f", {rate} Hz" if is_wav else "")
    print(f"{args.output}: {form}, computed {where}")
    return 0


# -- warmup ----------------------------------------------------------------------------------------------------------


def _warmup(args: argparse.Namespace) -> int:
    if (args.input is None) != (args.weight is None):
        raise CommandError("warmup needs --input and --weight together, or neither")
    if args.input is not None and args.op is None:
        raise CommandError("warmup needs conv1d or conv_transpose1d in front of the shapes")
    settings = _given_settings(args)
    if args.input is None and (settings or args.bias):
        raise CommandError("warmup takes settings only together with --input and --weight")
    missing = missing_gpu()
    if missing is not None:
        raise CommandError(missing, EXIT_NO_GPU)

    device = runtime.device(_current_device())
    dtypes = args.dtype or DTYPES
    configs: dict[Config, None] = {}  # in order, each once
    if args.input is None:
        for family in FAMILIES:
            if args.op in (None, family.op):
                configs.update((c, None) for c in family.configs(device) if dict(c.macros).get("DTYPE") in dtypes)
    else:
        for dtype in dtypes:
            try:
                explanation = explain(args.op, *_specs(args, dtype), device=device, **settings)
            except (ValueError, TypeError) as error:
                raise CommandError(str(error)) from error
            if explanation.choice is not None:
                configs.update((config, None) for config, _ in explanation.choice.kernels)
    start = time.perf_counter()
    with _progress("compiling") as progress:
        for done, config in enumerate(configs):
            progress(done, len(configs), config.kernel)
            runtime.build(config).compile()
        progress(len(configs), len(configs), "")
    seconds = time.perf_counter() - start
    print(f"{len(configs)} kernels for {device.name} ({device.arch_name}) ready in {seconds:.1f} s: {_kernel_cache()}")
    return 0


# -- progress --------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress display on stderr, driven by calls with (done, total, label); silent where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:

        def count(done: int, total: int, label: str) -> None:
            print(f"\r{title} {done}/{total} {label[:40]:<40}", end="", file=sys.stderr, flush=True)

        try:
            yield count
        finally:
            print(file=sys.stderr)
        return
    columns = (
        TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[label]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, label="")

        def update(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, label=label)

        yield update
