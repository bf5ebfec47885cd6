"""The benchmark layers: 1-D convolutions of published models, with their work and their roofline floors.

`layers.json` holds one object per layer. Its `pad_left` and `pad_right` are the padding that is used; `padding` is how
the model's own code words it. Every derived number in the file is computed again and compared when it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from gpuconv.problem import ConvProblem, Op

FILE = Path(__file__).with_name("layers.json")


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The rates that nothing exceeds on one device.

    Attributes:
        name: the device and where the rates come from, measured or published.
        bytes_per_second: of device memory, reads and writes together.
        flops_per_second: by precision (a dtype or "tf32"), a multiply-add counted as two. Complex data need no entry:
            they run at the rates of float32 and float64.
    """

    name: str
    bytes_per_second: float
    flops_per_second: Mapping[str, float]


# A complex multiply-add is counted as the four real ones that it consists of.
_RATE_OF = {"complex64": "float32", "complex128": "float64"}


@dataclass(frozen=True, slots=True)
class Layer:
    """One convolution of a model, at the batch and the length it really runs with.

    Attributes:
        name: the model, the layer and its essential settings.
        op: "conv1d" or "conv_transpose1d".
        batch, in_channels, out_channels, length, kernel_size, stride, dilation, groups, output_padding, bias: settings.
        padding: the model's own wording: a number, "causal" or "same".
        pad_left, pad_right: what it comes to.
        length_out: the output length.
        family: the kind of layer, for grouping results.
        regime: "latency" or "throughput".
        phase: "infer" or "train".
        model, source, note: where the layer comes from.
        verified: whether the settings were read in the model's source.
        flops: operations, padding included.
        flops_valid: operations on positions that exist.
        bytes_fp16, bytes_fp32: input, weight and output once, without the bias.
    """

    name: str
    op: Op
    batch: int
    in_channels: int
    out_channels: int
    length: int
    kernel_size: int
    stride: int
    padding: int | str
    pad_left: int
    pad_right: int
    dilation: int
    groups: int
    output_padding: int
    bias: bool
    length_out: int
    family: str
    regime: str
    phase: str
    model: str
    source: str
    note: str
    verified: bool
    flops: int
    flops_valid: int
    bytes_fp16: int
    bytes_fp32: int

    def problem(self, dtype: str = "float32", batch: int | None = None) -> ConvProblem:
        """The layer as a problem, with its own batch unless another is given."""
        return ConvProblem(
            self.op,
            self.batch if batch is None else batch,
            self.in_channels,
            self.out_channels,
            self.length,
            self.kernel_size,
            self.stride,
            self.pad_left,
            self.pad_right,
            self.dilation,
            self.groups,
            self.output_padding,
            dtype,
            self.bias,
        )

    def floor(self, precision: str, ceilings: Ceilings, batch: int | None = None) -> float:
        """The least time in seconds: the larger of bytes/bandwidth and operations/rate.

        Bytes are those of input, weight, bias and output, each moved once. Operations are those on positions that
        exist, since products with the zero padding can be left out.

        Args:
            precision: one of the dtypes, or "tf32" (float32 data).
            ceilings: the device.
            batch: instead of the layer's own.

        Raises:
            ValueError: the device has no rate for this precision.
        """
        rates = ceilings.flops_per_second
        rate = rates.get(precision, rates.get(_RATE_OF.get(precision, precision)))
        if rate is None:
            raise ValueError(f"{ceilings.name}: no rate for {precision}, only for {', '.join(rates)}")
        problem = self.problem("float32" if precision == "tf32" else precision, batch)
        return max(problem.bytes() / ceilings.bytes_per_second, valid_flops(problem) / rate)

    def batch_within(self, max_bytes: int, max_flops: int, dtype: str = "float32") -> int | None:
        """The largest batch up to the layer's own that keeps to both limits; None where one sample does not."""
        for batch in range(self.batch, 0, -1):
            problem = self.problem(dtype, batch)
            if problem.bytes() <= max_bytes and problem.flops() <= max_flops:
                return batch
        return None


def valid_flops(problem: ConvProblem) -> int:
    """The operations of `problem.flops()` less those on the zero padding."""
    p = problem
    coarse, fine = (p.L_in, p.L_out) if p.transposed else (p.L_out, p.L_in)
    pairs = 0
    for k in range(p.K):
        # Pairs (q, q*stride + offset) with the first on the coarse side and the second on the fine side.
        offset = k * p.dilation - p.padding_left
        first = max(0, -(offset // p.stride))
        last = min(coarse - 1, (fine - 1 - offset) // p.stride)
        pairs += max(0, last - first + 1)
    return (8 if p.is_complex else 2) * p.N * p.C_out * p.C_in_g * pairs


def load(file: Path = FILE) -> tuple[Layer, ...]:
    """All layers, in the order of the file.

    Raises:
        ValueError: naming the layer and the field that is missing, unknown, of the wrong type or inconsistent.
    """
    rows = json.loads(file.read_text(encoding="utf-8"))
    layers = tuple(_layer(row, f"{file.name}, entry {index}") for index, row in enumerate(rows))
    names = [layer.name for layer in layers]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"{file.name}: these names occur more than once: {', '.join(doubled)}")
    return layers


def _layer(row: Mapping[str, Any], where: str) -> Layer:
    where = f"{where} ({row.get('name', 'without a name')})"
    expected = [field.name for field in fields(Layer)]
    missing = [name for name in expected if name not in row]
    unknown = [name for name in row if name not in expected]
    if missing or unknown:
        raise ValueError(f"{where}: missing fields {missing}, unknown fields {unknown}")
    for name, kind in get_type_hints(Layer).items():
        kinds = {int: (int,), str: (str,), bool: (bool,)}.get(kind, (int, str) if name == "padding" else (str,))
        if type(row[name]) not in kinds:
            raise ValueError(f"{where}: {name} must be {' or '.join(k.__name__ for k in kinds)}, got {row[name]!r}")
    if row["op"] not in get_args(Op):
        raise ValueError(f"{where}: op must be one of {', '.join(get_args(Op))}, got {row['op']!r}")
    layer = Layer(**row)
    if isinstance(layer.padding, int) and (layer.pad_left, layer.pad_right) != (layer.padding, layer.padding):
        raise ValueError(f"{where}: padding {layer.padding}, but pad_left {layer.pad_left} and {layer.pad_right}")
    problem = layer.problem()
    bias_bytes = 4 * problem.C_out if layer.bias else 0
    for name, computed in (
        ("length_out", problem.L_out),
        ("flops", problem.flops()),
        ("flops_valid", valid_flops(problem)),
        ("bytes_fp32", problem.bytes() - bias_bytes),
        ("bytes_fp16", (problem.bytes() - bias_bytes) // 2),
    ):
        if getattr(layer, name) != computed:
            raise ValueError(f"{where}: {name} is {getattr(layer, name)}, but the settings give {computed}")
    return layer
