"""The options that several commands share: their declarations, and how their values are read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

from .. import dispatch
from ..edge import PADDING_MODES
from ..explain import SETTINGS
from ..fusion import ACTIVATIONS, ActivationLike, Fused
from ..problem import DTYPES, INTEGER_SUMS, INTEGERS, PRECISIONS, ArraySpec, Kind, Op

# Activations without parameter arrays.
_ACTIVATIONS = tuple(name for name in ACTIVATIONS if name != "snake")


def add_device(parser: Any) -> None:
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        metavar="WHERE",
        help="auto, cpu or gpu (default: auto, the GPU if one is available)",
    )


def add_json(parser: Any, instead_of: str = "text") -> None:
    parser.add_argument("--json", action="store_true", help=f"print a JSON object instead of {instead_of}")


NUMBERS = (*DTYPES, *INTEGERS)


def add_shapes(parser: Any, *, required: bool, dtypes: str = ", ".join(DTYPES)) -> None:
    """The options that describe a problem without its arrays; `dtypes`: the default where several can be given."""
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
        parser.add_argument(
            "--dtype", choices=NUMBERS, default="float32", metavar="D", help=_one_of(NUMBERS, "float32")
        )
    else:
        parser.add_argument(
            "--dtype",
            type=some_of(NUMBERS),
            metavar="D[,D]",
            help=f"{', '.join(NUMBERS)} (default: {dtypes})",
        )
    add_settings(parser, tuple(SETTINGS))


def add_settings(parser: Any, ops: tuple[Op, ...]) -> None:
    parser = parser.add_argument_group("settings of the layer")
    note = "conv_transpose1d: " if len(ops) > 1 else ""
    words = "valid, same or causal" if "conv1d" in ops else "valid or same"
    parser.add_argument("--stride", type=_whole_number, metavar="N", help="step of the window (default: 1)")
    parser.add_argument("--padding", type=_padding, metavar="P", help=f"N, LEFT,RIGHT, {words} (default: 0)")
    parser.add_argument("--dilation", type=_whole_number, metavar="N", help="distance between taps (default: 1)")
    parser.add_argument("--groups", type=_whole_number, metavar="N", help="groups of channels (default: 1)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, metavar="P", help=f"for float32 data: {_one_of(PRECISIONS, 'float32')}"
    )
    parser.add_argument(
        "--out-dtype",
        choices=INTEGER_SUMS,
        metavar="D",
        help=f"of the sums of integers: {_one_of(INTEGER_SUMS, INTEGER_SUMS[0])}",
    )
    parser.add_argument(
        "--input-activation",
        type=_activation,
        metavar="A",
        help=f"applied to the input: {', '.join(_ACTIVATIONS)}; also with a parameter, such as leaky_relu,0.1 elu,0.5 "
        "gelu,tanh",
    )
    parser.add_argument("--activation", type=_activation, metavar="A", help="applied to the output, likewise")
    # The commands for both operations also have the algorithms of their gradients.
    kinds: tuple[Kind, ...] = (*ops, *(("weight_gradient", "bias_gradient") if len(ops) > 1 else ()))
    names = dict.fromkeys(name for kind in kinds for name in dispatch.algorithms(kind))
    parser.add_argument(
        "--algorithm",
        choices=tuple(names),
        metavar="A",
        help="base, fft, auto (fft where it is faster), or a kernel family for the GPU (default: the fastest family)",
    )
    if "conv1d" in ops:
        note_of_mode = "conv1d: " if len(ops) > 1 else ""
        parser.add_argument(
            "--padding-mode",
            choices=PADDING_MODES,
            metavar="M",
            help=f"{note_of_mode}{_one_of(PADDING_MODES, 'zeros')}",
        )
    if "conv_transpose1d" in ops:
        parser.add_argument(
            "--output-padding", type=_whole_number, metavar="N", help=f"{note}more output on the right (default: 0)"
        )
        parser.add_argument(
            "--output-size",
            type=_whole_number,
            metavar="N",
            help=f"{note}L_out, in place of --output-padding",
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
        return text  # a word, which ConvProblem checks
    return sides[0] if len(sides) == 1 else sides


def _activation(text: str) -> ActivationLike:
    name, *parameters = text.split(",")
    if name not in _ACTIVATIONS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    try:
        value: ActivationLike = (name, *(parameters if name == "gelu" else map(float, parameters)))
        Fused.check("", value, None)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be such as relu, leaky_relu,0.1 or gelu,tanh, got {text!r}") from None
    return value


def some_of(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
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


def at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = _whole_number(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return parse


def size(text: str) -> int:
    """A number of bytes, such as 4096, 200MB (of 10**6 bytes) or 256MiB (of 2**20)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kKMGT])(i?))?B?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a size such as 200MB or 1GiB, got {text!r}")
    number, prefix, is_binary = match.groups("")
    power = ("", "k", "m", "g", "t").index(prefix.lower())
    return int(float(number) * (1024 if is_binary else 1000) ** power)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line; the operation has defaults for the others."""
    names = dict.fromkeys(name for settings in SETTINGS.values() for name in settings)
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def specs(args: argparse.Namespace, dtype: str) -> tuple[ArraySpec, ArraySpec, ArraySpec | None]:
    """The arrays that `--input`, `--weight` and `--bias` describe."""
    bias = None
    if args.bias and len(args.weight) == 3:
        per_group = args.weight[1] * (args.groups or 1)
        of_bias = (args.out_dtype or INTEGER_SUMS[0]) if dtype in INTEGERS else dtype
        bias = ArraySpec((args.weight[0] if args.op == "conv1d" else per_group,), of_bias)
    return ArraySpec(args.input, dtype), ArraySpec(args.weight, dtype), bias
