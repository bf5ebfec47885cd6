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
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from . import __version__, cases, dispatch, files, functional, runtime
from .arguments import Parser, UsageError
from .cases import FORMATS
from .device import ARCHITECTURES
from .explain import DIRECTIONS, SETTINGS, explain
from .families import FAMILIES, Config
from .gpus import GpuUnavailableError, missing_gpu
from .problem import DTYPES, PRECISIONS, ArraySpec, ConvProblem
from .text import WIDTH, count, install_hint, shorten, wrap, wrap_rows
from .verify import verify

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


class _Terminated(BaseException):
    """A signal asked the process to end. Raised where it arrived, so that what was begun is cleaned up."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Nothing is raised: what goes wrong is one line on stderr. An error that nobody foresaw is told with its place; with
    GPUCONV_TRACEBACK=1 in the environment its traceback comes before that line.

    Args:
        argv: the arguments after the program's name; None for those of the process.

    Returns:
        The exit code: 0 success; 1 `verify` found a mismatch, and nothing else; 2 bad usage, a file that cannot be read
        or written, not enough memory, or an error that nobody foresaw; 3 no GPU where one is needed; 130 interrupted;
        141 stdout was closed by its reader; 143 terminated.
    """
    if sys.stderr is None:  # closed; whatever is told is told to nobody
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        return _fail("standard output is closed", EXIT_ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be printable in the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _termination_raised():
            code = _run(sys.argv[1:] if argv is None else list(argv))
            sys.stdout.flush()
            return code
    except (CommandError, UsageError, files.FileError) as error:
        return _fail(str(error), error.code if isinstance(error, CommandError) else EXIT_ERROR)
    except MemoryError as error:
        return _fail(f"not enough memory: {error}" if str(error) else "not enough memory", EXIT_ERROR)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except _Terminated as stop:
        return _fail("terminated", 128 + stop.signum)
    except BrokenPipeError:
        _discard(sys.stdout)
        return EXIT_BROKEN_PIPE
    except OSError as error:  # files have FileErrors, so that this is stdout, or a file of a library
        _discard(sys.stdout)
        what = "standard output: cannot be written" if error.filename is None else error.filename
        return _fail(f"{what}: {error.strerror or error}", EXIT_ERROR)
    except Exception as error:
        if os.environ.get("GPUCONV_TRACEBACK"):
            traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        text = f"unexpected {type(error).__name__} in {where}: {error}"
        return _fail(f"{text} (GPUCONV_TRACEBACK=1 shows how it came about)", EXIT_ERROR)


@contextmanager
def _termination_raised() -> Iterator[None]:
    """Raise `_Terminated` on the signals that ask a process to end, unless somebody else has a use for them."""

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


def _discard(stream: Any) -> None:
    """Send what a broken stream still holds nowhere: Python flushes it once more when it exits."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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


def _fail(message: str, code: int) -> int:
    _tell("error", message)
    return code


def _tell(kind: str, message: str) -> None:
    """One line on stderr; on a terminal as many as it takes, broken between words."""
    text = f"gpuconv: {kind}: {shorten(message)}"
    try:
        lines = wrap(text, _width(), rest="  ") if sys.stderr.isatty() else [text]
        print("\n".join(lines), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _discard(sys.stderr)


def _width() -> int:
    """The columns of the terminal, or $COLUMNS; 80 where stdout is no terminal."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


# -- arguments -------------------------------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(
        prog="gpuconv",
        description="1-D convolution and transposed convolution for CuPy and NumPy arrays.",
        epilog="exit codes: 0 success, 1 verify found a mismatch, 2 bad usage or bad input,\n"
        "3 a GPU is needed and none answers",
    )
    parser.add_argument("--version", action="version", version=f"gpuconv {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_info(commands)
    _add_verify(commands)
    _add_explain(commands)
    _add_convolve(commands, "conv1d")
    _add_convolve(commands, "conv_transpose1d")
    _add_warmup(commands)
    commands.add_parser("help", help="show this, or with a command's name its help")
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
    parser.add_argument("--all", action="store_true", help="every case in every dtype, not a selection")
    parser.add_argument("--family", metavar="NAME", help="only this kernel family, by the cases that it takes (GPU)")
    parser.add_argument("--list", action="store_true", help="print the names that --filter takes, and run nothing")
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
        "samples) as float32. The output is written as a whole or not at all. The name -\n"
        "stands for standard input or output, which is a .wav file if the input is one or\n"
        "--rate is given, else a .npy file.",
        epilog=f"example:\n  gpuconv {op} speech.wav filter.npy out.wav"
        + (" --stride 2" if transposed else " --padding same"),
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
        help="sample rate of a .wav output (default: that of a .wav input "
        + ("times the stride)" if transposed else "over the stride)"),
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument(
        "--allow-truncated", action="store_true", help="read what is there of a .wav file that is cut or damaged"
    )
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
    parser.add_argument("--stride", type=_whole_number, metavar="N", help="step of the window (default: 1)")
    parser.add_argument("--padding", type=_padding, metavar="P", help=f"N, LEFT,RIGHT, {words} (default: 0)")
    parser.add_argument("--dilation", type=_whole_number, metavar="N", help="distance between taps (default: 1)")
    parser.add_argument("--groups", type=_whole_number, metavar="N", help="groups of channels (default: 1)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, metavar="P", help=f"of float32 data: {_one_of(PRECISIONS, 'float32')}"
    )
    names = dict.fromkeys(name for op in SETTINGS if op in ops for name in dispatch.algorithms(op))
    parser.add_argument(
        "--algorithm",
        choices=tuple(names),
        metavar="A",
        help="base, or the kernel family that a GPU runs (default: the fastest)",
    )
    if "conv_transpose1d" in ops:
        parser.add_argument(
            "--output-padding", type=_whole_number, metavar="N", help=f"{note}more output on the right (default: 0)"
        )
        parser.add_argument("--output-size", type=_whole_number, metavar="N", help=f"{note}the wanted L_out, instead")


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
        raise argparse.ArgumentTypeError(f"must be extents such as 8,512,3000, got {text!r}")
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
                raise argparse.ArgumentTypeError(f"must be some of {', '.join(choices)}, got {name!r}")
        return names

    return parse


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def _at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = _whole_number(text)
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
    return os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")


# -- info ------------------------------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> int:
    facts = _facts()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    rows = [(name, value or "not available") for name, value in facts["versions"].items()]
    width = _width()
    for gpu in facts["devices"]:
        text = f"{gpu['name']} (sm_{gpu['arch']}), {gpu['num_sms']} multiprocessors, {gpu['l2_bytes'] >> 20} MiB L2"
        rows.append((f"GPU {gpu['index']}", text))
    rows.append(("kernel cache", facts["kernel_cache"]))
    lines = wrap_rows(rows, width)
    if facts["missing"]:
        lines += ["", "Missing:"]
        for gap in facts["missing"]:
            lines += wrap(shorten(gap["what"]), width, first="- ", rest="  ")
            lines += wrap(gap["meaning"], width, first="  ", rest="  ")
    print("\n".join(lines))
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
            missing.append({"what": f"{module}: {_trouble(module) or install_hint(extra)}", "meaning": meaning})
    return {"versions": versions, "devices": devices, "kernel_cache": _kernel_cache(), "missing": missing}


def _trouble(module: str) -> str | None:
    """Why an optional package cannot be imported though it is there, or None."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return None
    except Exception as error:  # broken installations fail in many ways, and a report on what is there survives them
        return f"cannot be loaded: {type(error).__name__}: {error}"
    return None


def _version(module: str) -> str | None:
    """The version of an optional package, or None where it cannot be imported."""
    try:
        imported = runtime.cupy_module() if module == "cupy" else importlib.import_module(module)
    except Exception:  # as above
        return None
    version = getattr(imported, "__version__", None)
    return str(version or importlib.metadata.version(module))


# -- verify ----------------------------------------------------------------------------------------------------------


def _verify(args: argparse.Namespace) -> int:
    if args.list:
        return _list_cases(args.filter)
    if args.junit is not None:
        files.check_output(args.junit, {}, force=True, suffixes=None)
    try:
        with _progress("verifying") as progress:
            report = verify(
                args.device,
                filter=args.filter,
                seed=args.seed,
                dtypes=args.dtype,
                quick=not args.all,
                family=args.family,
                progress=progress,
            )
    except GpuUnavailableError as error:
        raise CommandError(str(error), EXIT_NO_GPU) from error
    except (ValueError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from error
    if args.junit is not None:
        files.write_text(args.junit, report.to_junit())
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0 if report.ok else EXIT_MISMATCH


def _list_cases(filter: str | None) -> int:
    """Operations and tags with the number of their cases, then the cases with their tags."""
    try:
        selected = cases.select(filter)
    except ValueError as error:
        raise CommandError(str(error)) from error
    width = max(len(case.name) for case in selected)
    for title, names in (
        ("operations", [case.problem.op for case in selected]),
        ("tags", [tag for case in selected for tag in case.tags]),
    ):
        print(f"{title}:")
        for name, number in Counter(names).items():
            print(f"  {name:<{width}}  {count(number, 'case')}")
    print("cases:")
    for case in selected:
        print(f"  {case.name:<{width}}  {', '.join(case.tags)}")
    return 0


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
    print(json.dumps(explanation.to_dict(), indent=2) if args.json else explanation.page(_width()))
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
    if list(sources.values()).count(files.STANDARD) > 1:
        raise CommandError("standard input, -, can be only one of IN, WEIGHT and --bias")
    files.check_output(args.output, sources, force=args.force)
    on_gpu = _use_gpu(args.device)
    x, rate, notes = files.read(args.input, args.dtype, allow_truncated=args.allow_truncated)
    weight = files.read(args.weight, args.dtype, suffixes=(".npy",)).array
    bias = files.read(args.bias, args.dtype, suffixes=(".npy",)).array if args.bias else None
    settings = _given_settings(args)
    algorithm = settings.pop("algorithm", None)
    construct = ConvProblem.conv1d if args.op == "conv1d" else ConvProblem.conv_transpose1d
    try:
        problem = construct(x, weight, bias, **settings)
    except (ValueError, TypeError) as error:
        dtypes = {array.dtype for array in (x, weight, bias) if array is not None}
        hint = "; give --dtype to convert" if isinstance(error, TypeError) and len(dtypes) > 1 else ""
        raise CommandError(f"{error}{hint}") from error
    to_stdout = args.output == files.STANDARD
    is_wav = args.output.lower().endswith(".wav") or (to_stdout and (rate or args.rate) is not None)
    if is_wav:
        rate, note = (args.rate, None) if args.rate else _rate_behind(problem, rate)
        notes += () if note is None else (f"{args.output}: {note}",)
        files.check_wav(args.output, problem.output_shape, problem.dtype, rate)
    elif args.rate:
        raise CommandError(f"{args.output}: --rate is for a .wav output; a .npy file holds no sample rate")
    else:
        rate = None
    for note in notes:
        _tell("warning", note)

    function: Callable[..., Any] = functional.conv1d if args.op == "conv1d" else functional.conv_transpose1d
    if on_gpu:
        cupy = runtime.cupy_module()
        try:
            runtime.check_dtype(x.dtype)
            on_device = [None if array is None else cupy.asarray(array) for array in (x, weight, bias)]
        except (TypeError, ValueError) as error:
            raise CommandError(f"CuPy {cupy.__version__} has no {problem.dtype} arrays: {error}") from error
        try:
            output = cupy.asnumpy(function(*on_device, **settings, algorithm=algorithm))
        except dispatch.AlgorithmError as error:
            raise CommandError(str(error)) from error
        where = f"on {runtime.device(_current_device()).name}"
    else:
        output = function(x, weight, bias, **settings)
        where = "on the CPU"
    files.write(args.output, output, rate, force=args.force)
    form = f"{tuple(output.shape)} {problem.dtype}" + (f", {rate} Hz" if is_wav else "")
    if not to_stdout:
        print(f"{args.output}: {form}, computed {where}")
    return 0


def _rate_behind(problem: ConvProblem, rate: int | None) -> tuple[int | None, str | None]:
    """The sample rate of the output for that of the input, and a warning where it is not whole."""
    if rate is None or problem.transposed:
        return (None if rate is None else rate * problem.stride), None
    nearest = max(1, round(rate / problem.stride))
    if nearest * problem.stride == rate:
        return nearest, None
    exact = f"{rate} Hz over the stride {problem.stride} is no whole number"
    return nearest, f"{exact}: written as {nearest} Hz; --rate gives another"


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
    ready = f"{count(len(configs), 'kernel')} for {device.name} ({device.arch_name}) ready in {seconds:.1f} s"
    print(f"{ready}: {_kernel_cache()}")
    return 0


# -- progress --------------------------------------------------------------------------------------------------------


PROGRESS_SECONDS = 10.0  # between two lines where stderr is no terminal


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Progress on stderr, driven by calls with (done, total, label).

    A terminal shows a bar, or a counter without the package rich, which is gone at the end. A pipe or a file gets a
    line every `PROGRESS_SECONDS`.
    """
    if not sys.stderr.isatty():
        last = time.monotonic()

        def tell(done: int, total: int, label: str) -> None:
            nonlocal last
            if time.monotonic() - last >= PROGRESS_SECONDS:
                last = time.monotonic()
                print(f"{title} {done}/{total} {label}", file=sys.stderr, flush=True)

        yield tell
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        width = 0

        def show(done: int, total: int, label: str) -> None:
            nonlocal width
            line = f"{title} {done}/{total} {label}"[: shutil.get_terminal_size().columns - 1]
            print(f"\r{line:<{width}}", end="", file=sys.stderr, flush=True)
            width = len(line)

        try:
            yield show
        finally:
            print(f"\r{'':<{width}}\r", end="", file=sys.stderr, flush=True)
        return
    columns = (
        TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[label]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, label="")

        def update(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, label=label)

        yield update
