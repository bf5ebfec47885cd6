"""The benchmark layers: 1-D convolutions of published models, with their work and their roofline floors.

`layers.csv` holds one layer a line. Its columns are the fields of `ConvProblem`, `L_out` to check them, and those of
`Layer`.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from gpuconv.costs import DRAM_EFFICIENCY, rates_of
from gpuconv.device import Device
from gpuconv.problem import ConvProblem, Op

FILE = Path(__file__).with_name("layers.csv")

_EXTENTS = (
    "N", "C_in", "C_out", "L_in", "K", "stride", "padding_left", "padding_right", "dilation", "groups",
    "output_padding",
)  # fmt: skip
_TEXTS = ("kind", "regime", "phase", "model", "source", "note")
COLUMNS = ("name", "op", *_EXTENTS, "has_bias", "L_out", "padding", "verified", *_TEXTS)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The highest rates of one device.

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


def published_ceilings(device: Device) -> Ceilings:
    """The ceilings of a device from gpuconv.costs, for floors where nothing was measured."""
    rates = rates_of(device)
    per_fma = 2e9 * device.num_sms * device.clock_ghz  # operations per second of one fused multiply-add per cycle
    flops = {"float32": rates.fp32, "float64": rates.fp64}
    if device.arch >= 80:
        flops |= {"float16": rates.tensor16, "bfloat16": rates.tensor16, "tf32": rates.tensor16 // 2}
    else:
        flops |= {"float16": rates.tensor16, "bfloat16": rates.fp32}
    return Ceilings(
        f"{device.name}, data sheet",
        rates.dram_gbps * DRAM_EFFICIENCY * 1e9,
        {precision: rate * per_fma for precision, rate in flops.items()},
    )


@dataclass(frozen=True, slots=True)
class Layer:
    """One convolution of a model, at the batch and length with which the model runs.

    Attributes:
        name: the model, the layer and its essential settings.
        forward: the problem, in float32.
        padding: the model's own wording: a number, "causal" or "same".
        kind: for grouping results.
        regime: "latency" or "throughput".
        phase: "infer" or "train".
        model, source, note: where the layer comes from.
        verified: whether the settings were read in the model's source.
    """

    name: str
    forward: ConvProblem
    padding: str = ""
    kind: str = ""
    regime: str = ""
    phase: str = ""
    model: str = ""
    source: str = ""
    note: str = ""
    verified: bool = False

    @property
    def batch(self) -> int:
        return self.forward.N

    def problem(self, dtype: str = "float32", batch: int | None = None) -> ConvProblem:
        """The layer as a problem, with its own batch unless another is given."""
        return replace(self.forward, dtype=dtype, N=self.batch if batch is None else batch)

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
        ValueError: naming the line and what is missing, unknown, of the wrong type or inconsistent.
    """
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        if set(reader.fieldnames or ()) != set(COLUMNS):
            raise ValueError(f"{file.name}: expected the columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
        layers = tuple(_layer(row, f"{file.name}, line {reader.line_num} ({row['name']})") for row in reader)
    names = [layer.name for layer in layers]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{file.name}: these names occur more than once: {', '.join(doubled)}")
    return layers


def _layer(row: Mapping[str, str], where: str) -> Layer:
    if row["op"] not in get_args(Op):
        raise ValueError(f"{where}: op must be one of {', '.join(get_args(Op))}, got {row['op']!r}")
    try:
        extents = {name: int(row[name]) for name in _EXTENTS}
        has_bias, verified = ({"true": True, "false": False}[row[name]] for name in ("has_bias", "verified"))
        problem = ConvProblem(row["op"], **extents, has_bias=has_bias)  # type: ignore[arg-type]
        L_out = int(row["L_out"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: not a layer: {error}") from error
    if L_out != problem.L_out:
        raise ValueError(f"{where}: L_out is {L_out}, but the settings give {problem.L_out}")
    padding = row["padding"]
    if padding.isdecimal() and problem.padding != (int(padding), int(padding)):
        raise ValueError(f"{where}: padding {padding}, but padding_left and padding_right are {problem.padding}")
    return Layer(row["name"], problem, padding, verified=verified, **{name: row[name] for name in _TEXTS})
