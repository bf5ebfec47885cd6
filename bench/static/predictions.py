"""The predicted times of the benchmark layers as a table, which predictions.csv holds for one GPU."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.table import Table

from gpuconv import dispatch
from gpuconv.costs import Prediction
from gpuconv.device import Device
from gpuconv.families import ArrayLayout, Config, Layout
from gpuconv.problem import ConvProblem, Problem, WeightGradientProblem
from gpuconv.text import count

from ..layers import Layer
from ..modes import Direction, Mode, of_forward, prediction_key
from .cudnn import predict_cudnn
from .predict import predict
from .sass import KernelReport, report

FILE = Path(__file__).with_name("predictions.csv")
# Behind them a column of microseconds for each mode and pass, and one of cuDNN's by its model.
COLUMNS = ("gpu", "layer", "family", "limit", "blocks_per_sm", "waves", "base_us", "base_limit")
PEER = "cudnn "


@dataclass(frozen=True, slots=True)
class Planned:
    """What dispatch chooses for one layer in one mode."""

    layer: Layer
    mode: Mode
    direction: Direction
    choice: dispatch.Choice

    @property
    def key(self) -> str:
        return prediction_key(self.mode.name, self.direction)

    @property
    def problem(self) -> ConvProblem | WeightGradientProblem:
        return of_forward(self.mode.problem(self.layer), self.direction)


def channels_last(problem: Problem) -> Layout:
    """Arrays whose channels are contiguous, but for the weights; they start at 16-byte boundaries."""
    data = {n: s for n, s in problem.shapes.items() if n in ("input", "output", "coarse", "fine")}
    last = {name: ArrayLayout((C * L, 1, C)) for name, (_, C, L) in data.items()}
    return Layout.contiguous(problem).replaced(**last)


# How the arrays of a layer lie.
LAYOUTS: dict[str, Callable[[Problem], Layout]] = {"contiguous": Layout.contiguous, "channels_last": channels_last}
# The kernels that this layer chooses for channels_last arrays belong to the baseline, too.
LAYER_CHANNELS_LAST = "whisper_large_v3.conv2_b16"


def plan(
    layers: Iterable[Layer],
    modes: Iterable[Mode],
    device: Device,
    directions: Iterable[Direction] = ("forward",),
    layout: str = "contiguous",
) -> list[Planned]:
    """Every pass of every layer in every mode that the device has, as dispatch places it for one of `LAYOUTS`."""
    planned = []
    for mode in modes:
        if not mode.runs_on(device):
            continue
        for layer, direction in product(filter(mode.includes, layers), directions):
            problem = of_forward(mode.problem(layer), direction)
            choice = dispatch.choose(problem, LAYOUTS[layout](problem), device)
            if choice is not None:
                planned.append(Planned(layer, mode, direction, choice))
    return planned


def predicted(planned: Sequence[Planned], reports: Mapping[Config, KernelReport], device: Device) -> list[Prediction]:
    """One prediction for each, by the machine code of the chosen kernel."""
    return [predict(p.problem, p.choice, reports[p.choice.config], device) for p in planned]


def by_base_family(problem: ConvProblem, device: Device) -> Prediction:
    """The predicted time of the base family, whatever dispatch chooses."""
    choice = dispatch.choose(problem, Layout.contiguous(problem), device, "base")
    assert choice is not None
    return predict(problem, choice, report(choice.config, device.arch_name), device)


def by_layer(
    planned: Sequence[Planned], predictions: Sequence[Prediction]
) -> dict[str, dict[str, tuple[Planned, Prediction]]]:
    """{layer: {mode and pass: what is planned and predicted}}."""
    nested: dict[str, dict[str, tuple[Planned, Prediction]]] = {}
    for one, prediction in zip(planned, predictions, strict=True):
        nested.setdefault(one.layer.name, {})[one.key] = (one, prediction)
    return nested


@dataclass(frozen=True, slots=True)
class Forecast:
    """A layer's predicted time and that of cuDNN, in microseconds; `cudnn_us` is None where there is no model."""

    planned: Planned
    prediction: Prediction
    cudnn_us: float | None

    @property
    def ratio(self) -> float | None:
        """The predicted time of cuDNN over ours. Below 1 our kernel is likely to be slower."""
        return None if self.cudnn_us is None else self.cudnn_us / self.prediction.us


def forecasts(planned: Sequence[Planned], predictions: Sequence[Prediction], device: Device) -> list[Forecast]:
    """The likeliest losses first, in each mode and pass; what cannot be compared last."""
    found = [Forecast(p, time, predict_cudnn(p.problem, device)) for p, time in zip(planned, predictions, strict=True)]
    return sorted(found, key=lambda f: f.ratio or math.inf)


def table(key: str, found: Sequence[Forecast], device: Device) -> Table:
    """What is printed of one mode and pass, a row for each layer."""
    ratios = [f.ratio for f in found if f.ratio is not None]
    losses = sum(ratio < 1 for ratio in ratios)
    caption = f"x: cuDNN on NCL over gpuconv, both modelled. {count(losses, 'layer')} below 1"
    if ratios:
        caption += f", geometric mean {statistics.geometric_mean(ratios):.2f} of {len(ratios)}"
    printed = Table(title=f"Forecast, {key}, {device.name} (models, not measurements)", caption=f"{caption}.")
    printed.add_column("layer")
    printed.add_column("family")
    for name in ("us", "cuDNN us", "x"):
        printed.add_column(name, justify="right")
    printed.add_column("limit")
    for f in found:
        cudnn, ratio = ("-", "-") if f.ratio is None else (f"{f.cudnn_us:,.1f}", f"{f.ratio:.2f}")
        own = f.planned.choice.family
        printed.add_row(f.planned.layer.name, own, f"{f.prediction.us:,.1f}", cudnn, ratio, f.prediction.limit)
    return printed


def write(file: Path, planned: Sequence[Planned], predictions: Sequence[Prediction], device: Device) -> None:
    """Write one line a layer. Family, limit, blocks and waves are those of the first mode and pass."""
    keys = list(dict.fromkeys(one.key for one in planned))
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow([*COLUMNS, *keys, *(f"{PEER}{key}" for key in keys)])
        for layer, mine in by_layer(planned, predictions).items():
            first, p = next(iter(mine.values()))
            base = by_base_family(first.mode.problem(first.layer), device)
            settings = (first.choice.family, p.limit, p.blocks_per_sm, p.waves, f"{base.us:.2f}", base.limit)
            times = [f"{mine[key][1].us:.2f}" if key in mine else "" for key in keys]
            peer = [predict_cudnn(mine[key][0].problem, device) if key in mine else None for key in keys]
            peers = ["" if us is None else f"{us:.2f}" for us in peer]
            writer.writerow([device.name, layer, *settings, *times, *peers])


def read(gpu: str, file: Path = FILE) -> dict[str, dict[str, float]]:
    """Predicted microseconds by mode and pass, and by layer, for a GPU of this name; empty where none were made."""
    nested: dict[str, dict[str, float]] = {}
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["gpu"] in gpu:
                for key in (key for key in row if row[key] and key not in COLUMNS and not key.startswith(PEER)):
                    nested.setdefault(key, {})[row["layer"]] = float(row[key])
    return nested
