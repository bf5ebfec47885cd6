"""Files of layers: JSON as `gpuconv explain --json` writes it; one object, a list, or several one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from .cases import Case, call_settings
from .explain import SETTINGS
from .files import FileError, StrPath
from .fusion import Activation, Fused
from .problem import ArraySpec, ConvProblem, Op, dtype_name

# The most FLOP of one call when a layer is verified: the checks compute the slow reference some hundred times.
MAX_FLOPS = 10**8
_LEAST_OUTPUTS = 8


class Layer(NamedTuple):
    """A call of `gpuconv.conv1d` or `gpuconv.conv_transpose1d`.

    Attributes:
        op: "conv1d" or "conv_transpose1d".
        arrays: input, weight, and bias or None.
        settings: the other arguments by name, as for `explain`.
    """

    op: Op
    arrays: tuple[ArraySpec, ArraySpec, ArraySpec | None]
    settings: dict[str, Any]

    def with_dtype(self, dtype: str) -> Layer:
        """The same layer with data and weights of another dtype."""
        x, weight, bias = (None if spec is None else ArraySpec(spec.shape, dtype) for spec in self.arrays)
        assert x is not None
        assert weight is not None
        settings = {name: _in_dtype(value, dtype) for name, value in self.settings.items()}
        return Layer(self.op, (x, weight, bias), settings)

    def case(self, name: str) -> tuple[str, Case]:
        """The number format of the layer (for integers the dtype) and the layer as a case of `gpuconv.verify`.

        Complex data with real taps become the real part of the data. N and L are reduced until a call has at most
        `MAX_FLOPS`, but a few outputs remain: the kernel family does not depend on N and L.

        Raises:
            ValueError: the call itself would raise it.
            TypeError: likewise.
        """
        x, weight, bias = self.arrays
        if x.dtype != weight.dtype and str(x.dtype).startswith("complex"):
            return self.with_dtype(str(dtype_name(weight.dtype))).case(name)
        settings = {n: v for n, v in self.settings.items() if v is not None and n != "algorithm"}
        fused = Fused.take(self.op, settings)
        problem = _cut(ConvProblem.of(self.op, x, weight, bias, **settings))
        problem.fused(Fused(replace(fused.fusion, has_residual=False), (None, *fused.arrays[1:])))
        number_format = "tf32" if problem.precision == "tf32" else problem.dtype
        fusion = fused.fusion if fused.fusion else None
        return number_format, Case(name, problem, tuple(call_settings(problem).items()), ("layer",), fusion)


def _cut(problem: ConvProblem) -> ConvProblem:
    """The layer with N and L reduced as far as `MAX_FLOPS` requires."""
    p = problem
    if p.flops() <= MAX_FLOPS:
        return p
    p = replace(p, N=min(p.N, 2))
    positions = p.L_in if p.transposed else p.L_out
    wanted = max(_LEAST_OUTPUTS, positions * MAX_FLOPS // p.flops())
    if p.transposed:
        # Enough inputs for an output to remain after the padding is trimmed.
        least = -(-(p.padding_left + p.padding_right) // p.stride) + 1
        return replace(p, L_in=min(p.L_in, max(wanted, least)))
    span = p.dilation * (p.K - 1) + 1
    # A padding mode may need more samples than the padding has.
    least = max(p.padding_left, p.padding_right, span) + 1
    return replace(p, L_in=min(p.L_in, max((wanted - 1) * p.stride + span, least)))


def _in_dtype(value: Any, dtype: str) -> Any:
    if isinstance(value, ArraySpec):
        return ArraySpec(value.shape, dtype)
    return tuple(_in_dtype(part, dtype) for part in value) if isinstance(value, tuple) else value


def read(path: StrPath) -> list[Layer]:
    """The layers of a file.

    Raises:
        FileError: it cannot be read, is not JSON, or an object in it is not a layer; the message says which one.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError(f"{path}: does not exist") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise FileError(f"{path}: is not a text file") from None
    layers: list[Layer] = []
    try:
        for value in _values(text):
            layers.append(_layer(value))
    except json.JSONDecodeError as error:
        raise FileError(f"{path}: is not JSON: line {error.lineno}: {error.msg}") from None
    except (ValueError, TypeError) as error:
        raise FileError(f"{path}: layer {len(layers) + 1}: {error}") from None
    if not layers:
        raise FileError(f"{path}: has no layers")
    return layers


def _values(text: str) -> Iterator[Any]:
    """The JSON values of a text, and in place of a list its elements."""
    decoder, place = json.JSONDecoder(), 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        value, place = decoder.raw_decode(text, place)
        yield from value if isinstance(value, list) else (value,)


def _layer(value: Any) -> Layer:
    """The layer of a JSON object.

    Raises:
        ValueError: the object is not a layer, or a field is missing.
        TypeError: a field has another type.
    """
    if isinstance(value, dict) and "error" in value:
        raise ValueError(f"is an error that gpuconv explain --json has written: {value['error']}")
    fields = value.get("problem") if isinstance(value, dict) else None
    if not isinstance(fields, dict):
        raise ValueError("must be an object with a field problem, as gpuconv explain --json writes it")
    if "C_in" not in fields or value.get("direction", "forward") != "forward":
        raise ValueError("is the problem of a gradient, expected that of --direction forward")
    try:
        op, real = fields["op"], fields["dtype"]
        if op not in SETTINGS:
            raise ValueError(f"op must be one of {', '.join(SETTINGS)}, got {op!r}")
        # Complex data and real taps are two problems of real numbers.
        data = {"float32": "complex64", "float64": "complex128"}[real] if value.get("parts") == 2 else real
        settings = {name: fields[name] for name in ("stride", "dilation", "groups", "precision", "out_dtype")}
        settings["padding"] = fields["padding_left"], fields["padding_right"]
        settings["algorithm"] = value.get("algorithm")
        of_op = "output_padding" if op == "conv_transpose1d" else "padding_mode"
        settings[of_op] = fields[of_op]
        fusion = fields["fusion"] or {}
        for name, channels in (("activation", "C_out"), ("input_activation", "C_in")):
            if fusion.get(name) is not None:
                activation = Activation(**fusion[name])
                of_channels = ArraySpec((fields[channels],), data)
                settings[name] = activation.as_argument((of_channels,) * activation.arrays)
        if fusion.get("has_residual"):
            settings["residual"] = ArraySpec(_shape(fields["output_shape"]), data)
        bias = ArraySpec((fields["C_out"],), fields["out_dtype"] or data) if fields["has_bias"] else None
        arrays = ArraySpec(_shape(fields["input_shape"]), data), ArraySpec(_shape(fields["weight_shape"]), real), bias
    except KeyError as error:
        raise ValueError(f"has no field {error.args[0]}") from None
    return Layer(op, arrays, settings)


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(extent, int) for extent in value):
        raise TypeError(f"a shape must be a list of numbers, got {value!r}")
    return tuple(value)
