"""`gpuconv conv1d` and `gpuconv conv_transpose1d`: convolve a file."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from .. import chunked, dispatch, files, functional, npy, runtime
from ..fusion import Fused
from ..journal import JournalError
from ..problem import DTYPES, ArraySpec, ConvProblem, Op, numpy_dtype
from .errors import EXIT_CODES_WITH_GPU, CommandError
from .gpu import use_gpu
from .options import add_device, add_json, add_settings, at_least, given_settings, size
from .terminal import print_json, show_progress, tell


def add_to(commands: Any, op: Op) -> None:
    transposed = op == "conv_transpose1d"
    shape = "(C_in, C_out/groups, K)" if transposed else "(C_out, C_in/groups, K)"
    name = "transposed convolution" if transposed else "convolution"
    parser = commands.add_parser(
        op,
        help=f"apply a 1-D {name} to a .npy or .wav file",
        description=f"Apply a 1-D {name} to a file"
        + (".\n" if transposed else "; the kernel is not flipped.\n")
        + "A .npy file holds (N, C_in, L_in), (C_in, L_in), or (L_in,) for one channel, a\n"
        ".wav file (channels, samples) as float32. Taps (K,) filter each channel by itself.\n"
        "The output is written completely or not at all. The name - stands for standard\n"
        "input or output, which is a .wav file if the input is one or --rate is given, else\n"
        "a .npy file. A large .npy file is computed in pieces, in constant memory; if that\n"
        "is interrupted, run the same command again to continue.",
        epilog=f"{EXIT_CODES_WITH_GPU}\n\nexample:\n  gpuconv {op} speech.wav taps.npy out.wav"
        + (" --stride 2" if transposed else " --padding same")
        + f" --dtype float32\n\nTaps that smooth, and add up to {'the stride' if transposed else 1}:\n"
        f"  python -c \"import numpy as np; np.save('taps.npy', np.hanning(9) / {2 if transposed else 4})\"",
    )
    parser.add_argument("input", metavar="IN", help="input, .npy or .wav")
    parser.add_argument("weight", metavar="WEIGHT", help=f"weight {shape}, or taps (K,), .npy")
    parser.add_argument("output", metavar="OUT", help="output, .npy or .wav (32-bit float, so nothing is clipped)")
    parser.add_argument("--bias", metavar="B", help="bias (C_out,), .npy")
    add_settings(parser, (op,))
    add_device(parser)
    parser.add_argument("--dtype", choices=DTYPES, metavar="D", help=f"convert the files to {', '.join(DTYPES)} first")
    parser.add_argument(
        "--rate",
        type=at_least(1),
        metavar="HZ",
        help="sample rate of a .wav output (default: that of a .wav input "
        + ("times the stride)" if transposed else "over the stride)"),
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument(
        "--allow-truncated", action="store_true", help="read the intact part of a truncated or damaged .wav file"
    )
    parser.add_argument(
        "--max-bytes",
        type=size,
        metavar="SIZE",
        help="compute a .npy file in pieces of this size, such as 200MB (default: 256MiB for larger files)",
    )
    add_json(parser)
    parser.set_defaults(run=run, op=op)


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    if args.json and args.output == files.STANDARD:
        raise CommandError("--json prints to standard output, so OUT, -, cannot be there, too")
    with ExitStack() as opened:
        result = _convolve(args, opened)
    if args.json:
        facts = {"output": args.output, **result._asdict(), "elapsed_s": time.perf_counter() - start}
        print_json({**facts, "device": {"name": result.device}})
    elif args.output != files.STANDARD:
        rate = "" if result.rate is None else f", {result.rate} Hz"
        where = "the CPU" if result.device == "CPU" else result.device
        print(f"{args.output}: {result.shape} {result.dtype}{rate}, computed on {where}")
    return 0


class _Result(NamedTuple):
    """What was written, with the sample rate of a .wav file in Hz, and the device that computed it."""

    shape: tuple[int, ...]
    dtype: str
    rate: int | None
    device: str


def _convolve(args: argparse.Namespace, opened: ExitStack) -> _Result:
    sources = {"input": args.input, "weight": args.weight, **({"bias": args.bias} if args.bias else {})}
    if list(sources.values()).count(files.STANDARD) > 1:
        raise CommandError("standard input, -, can be only one of IN, WEIGHT and --bias")
    files.check_output(args.output, sources, force=args.force)
    on_gpu = use_gpu(args.device)
    large = opened.enter_context(npy.open_npy(args.input, args.dtype)) if _is_large(args) else None
    x: Any = large
    rate: int | None = None
    notes: tuple[str, ...] = ()
    if large is None:
        x, rate, notes = files.read(args.input, args.dtype, allow_truncated=args.allow_truncated)
        x = x[np.newaxis] if x.ndim == 1 else x
    weight = files.read(args.weight, args.dtype, suffixes=(".npy",)).array
    bias = files.read(args.bias, args.dtype, suffixes=(".npy",)).array if args.bias else None
    settings = given_settings(args)
    if weight.ndim == 1 and len(x.shape) in (2, 3) and "groups" not in settings:
        settings["groups"] = C = x.shape[-2]
        weight = np.broadcast_to(weight, (C, 1, len(weight)))
    algorithm = settings.pop("algorithm", None)
    fused = {name: settings.pop(name, None) for name in ("activation", "input_activation")}
    try:
        specs = [None if array is None else ArraySpec(array.shape, array.dtype) for array in (x, weight, bias)]
        problem = ConvProblem.of(args.op, *specs, **settings).fused(Fused.check(args.op, **fused))
    except (ValueError, TypeError) as error:
        dtypes = {array.dtype for array in (x, weight, bias) if array is not None}
        hint = "; give --dtype to convert" if isinstance(error, TypeError) and len(dtypes) > 1 else ""
        if isinstance(error, ValueError) and "weight" in str(error) and weight.shape[-1:] == (weight.size,):
            hint = "; a WEIGHT (K,) without --groups filters each channel"
        raise CommandError(f"{error}{hint}") from error
    dtype = problem.dtype_of(problem.result)
    to_stdout = args.output == files.STANDARD
    name = "standard output" if to_stdout else args.output
    is_wav = args.output.lower().endswith(".wav") or (to_stdout and (rate or args.rate) is not None)
    if is_wav:
        rate, note = (args.rate, None) if args.rate else _rate_behind(problem, rate)
        notes += () if note is None else (f"{name}: {note}",)
        files.check_wav(name, problem.output_shape, dtype, rate)
    elif args.rate:
        raise CommandError(f"{name}: --rate is for a .wav output; a .npy file holds no sample rate")
    else:
        rate = None
    for note in notes:
        tell("warning", note)

    settings |= {**fused, "algorithm": algorithm}
    if large is not None:
        _convolve_pieces(args, problem, large, weight, bias, settings, on_gpu)
    else:
        _convolve_whole(args, problem, [x, weight, bias], settings, on_gpu, rate)
    device = runtime.current_gpu().name if on_gpu else "CPU"
    return _Result(problem.output_shape, "float32" if is_wav else dtype, rate, device)


def _convolve_whole(
    args: argparse.Namespace,
    problem: ConvProblem,
    arrays: list[Any],
    settings: dict[str, Any],
    on_gpu: bool,
    rate: int | None,
) -> None:
    function: Callable[..., Any] = functional.conv1d if args.op == "conv1d" else functional.conv_transpose1d
    if on_gpu:
        cupy = runtime.cupy_module()
        try:
            runtime.check_dtype(arrays[0].dtype)
            arrays = [None if array is None else cupy.asarray(array) for array in arrays]
        except (TypeError, ValueError) as error:
            raise CommandError(f"CuPy {cupy.__version__} has no {problem.dtype} arrays: {error}") from error
    try:
        output = function(*arrays, **settings)
    except (dispatch.AlgorithmError, ImportError) as error:  # cuFFT may be missing
        raise CommandError(str(error)) from error
    files.write(args.output, cupy.asnumpy(output) if on_gpu else output, rate, force=args.force)


def _is_large(args: argparse.Namespace) -> bool:
    """Whether a `.npy` file is convolved to another in pieces."""
    if not all(name.lower().endswith(".npy") for name in (args.input, args.output)):
        if args.max_bytes is not None:
            raise CommandError("--max-bytes is for a .npy file as IN and as OUT")
        return False
    return args.max_bytes is not None or (
        os.path.isfile(args.input) and os.path.getsize(args.input) > chunked.MAX_BYTES
    )


def _convolve_pieces(
    args: argparse.Namespace,
    problem: ConvProblem,
    source: npy.NpyFile,
    weight: files.Array,
    bias: files.Array | None,
    settings: dict[str, Any],
    on_gpu: bool,
) -> None:
    function: Callable[..., Any] = chunked.conv1d if args.op == "conv1d" else chunked.conv_transpose1d
    dtype = problem.dtype_of(problem.result)
    target = npy.resumable_npy(args.output, problem.output_shape, numpy_dtype(dtype), force=args.force)
    try:
        with target as (out, journal), show_progress(args.op) as progress:
            if journal.exists():
                tell("note", f"{args.output}: continues the work of an earlier call")
            try:
                function(
                    source, weight, bias, **settings, out=out, journal=journal, version=source.version,
                    progress=progress, max_bytes=chunked.MAX_BYTES if args.max_bytes is None else args.max_bytes,
                    device="gpu" if on_gpu else "cpu",
                )  # fmt: skip
            except BaseException as error:
                if journal.exists() and not isinstance(error, JournalError):
                    tell("note", f"{args.output}: the finished pieces are kept; the same command continues with them")
                raise
    except (TypeError, ValueError) as error:  # about max_bytes, the algorithm, the journal, CuPy's dtypes
        raise CommandError(f"{args.output}: {error}") from error


def _rate_behind(problem: ConvProblem, rate: int | None) -> tuple[int | None, str | None]:
    """The sample rate of the output for that of the input, and a warning where it is not whole."""
    if rate is None or problem.transposed:
        return (None if rate is None else rate * problem.stride), None
    nearest = max(1, round(rate / problem.stride))
    if nearest * problem.stride == rate:
        return nearest, None
    exact = f"{rate} Hz over the stride {problem.stride} is not a whole number"
    return nearest, f"{exact}: written as {nearest} Hz; --rate sets another"
