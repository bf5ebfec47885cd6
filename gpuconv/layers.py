"""Files of layers: JSON as `gpuconv explain --json` writes it; one object, a list, or several one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .explain import SETTINGS
from .files import FileError, StrPath
from .fusion import Activation
from .problem import ArraySpec, Op


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
