"""The predicted times of the benchmark layers as a table, which predictions.csv holds for one GPU."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.table import Table

from gpuconv import dispatch
from gpuconv.device import Device
from gpuconv.families import Config, Layout
from gpuconv.problem import ConvProblem

from ..layers import Layer
from ..modes import Direction, Mode, of_forward, prediction_key
from .predict import Prediction, predict
from .sass import KernelReport, report

FILE = Path(__file__).with_name("predictions.csv")
# Behind them a column of microseconds for each mode and pass.
COLUMNS = ("gpu", "layer", "family", "limit", "blocks_per_sm", "waves", "base_us", "base_limit")


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


def plan(
    layers: Iterable[Layer], modes: Iterable[Mode], device: Device, directions: Iterable[Direction] = ("forward",)
) -> list[Planned]:
    """Every pass of every layer in every mode that the device has, as dispatch places it for contiguous arrays."""
    planned = []
    for mode in modes:
        if not mode.runs_on(device):
            continue
        for layer, direction in product(filter(mode.includes, layers), directions):
            problem = of_forward(mode.problem(layer), direction)
            choice = dispatch.choose(problem, Layout.contiguous(problem), device)
            if choice is not None:
                planned.append(Planned(layer, mode, direction, choice))
    return planned


def predicted(planned: Sequence[Planned], reports: Mapping[Config, KernelReport], device: Device) -> list[Prediction]:
    """One prediction for each, by the machine code of the chosen kernel."""
    return [
        predict(of_forward(p.mode.problem(p.layer), p.direction), p.choice, reports[p.choice.config], device)
        for p in planned
    ]


def by_base_family(problem: ConvProblem, device: Device) -> Prediction:
    """What the family of last resort would take, whatever dispatch prefers."""
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


def table(planned: Sequence[Planned], predictions: Sequence[Prediction], device: Device) -> Table:
    """What is printed: one row for each layer, one column of times for each mode and pass."""
    found = Table(title=f"Predicted times on {device.name} (a model, not a measurement)")
    found.add_column("layer")
    found.add_column("family")
    keys = list(dict.fromkeys(one.key for one in planned))
    for key in keys:
        found.add_column(f"{key} us", justify="right")
    found.add_column("limit")
    for layer, mine in by_layer(planned, predictions).items():
        first, prediction = next(iter(mine.values()))
        times = [f"{mine[key][1].us:,.0f}" if key in mine else "" for key in keys]
        found.add_row(layer, first.choice.family, *times, prediction.limit)
    return found


def write(file: Path, planned: Sequence[Planned], predictions: Sequence[Prediction], device: Device) -> None:
    """Write one line a layer. Family, limit, blocks and waves are those of the first mode and pass."""
    keys = list(dict.fromkeys(one.key for one in planned))
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow([*COLUMNS, *keys])
        for layer, mine in by_layer(planned, predictions).items():
            first, p = next(iter(mine.values()))
            base = by_base_family(first.mode.problem(first.layer), device)
            settings = (first.choice.family, p.limit, p.blocks_per_sm, p.waves, f"{base.us:.2f}", base.limit)
            times = [f"{mine[key][1].us:.2f}" if key in mine else "" for key in keys]
            writer.writerow([device.name, layer, *settings, *times])


def read(gpu: str, file: Path = FILE) -> dict[str, dict[str, float]]:
    """Predicted microseconds by mode and pass, and by layer, for a GPU of this name; empty where none were made."""
    nested: dict[str, dict[str, float]] = {}
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["gpu"] in gpu:
                for key in (key for key in row if key not in COLUMNS and row[key]):
                    nested.setdefault(key, {})[row["layer"]] = float(row[key])
    return nested
