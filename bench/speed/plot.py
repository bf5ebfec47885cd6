"""Draws a result file: the roofline with every layer on it, and the ratio to the best peer of each layer.

From the root of a checkout:

    python -m bench.speed.plot bench/results/FILE.json [--mode float32] [--out DIR] [--update-readme]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .results import ROOT, Measurement, RunResult, geometric_mean, read
from .tables import groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = ROOT / "bench" / "pictures"

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
_SOURCE = "gpuconv bench"


def roofline(result: RunResult, mode: str) -> Figure:
    """Operations per second over operations per byte: one point per layer under the ceilings of the run."""
    from matplotlib import pyplot

    measured = _measured(result, mode)
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    copy = result.ceilings["copy"] * 1e9
    peak = _peak(result, mode)
    intensities = [m.flops / m.bytes for m in measured] or [1.0]
    low, high = min(intensities) / 2, max(max(intensities) * 2, 4 * peak / copy)
    x = np.geomspace(low, high, 200)
    axes.loglog(x, np.minimum(x * copy, peak), color="black", linewidth=1.5)
    axes.annotate(
        f"{_rate(peak)} {mode} arithmetic", (high, peak), xytext=(-4, 5), textcoords="offset points", ha="right"
    )
    for index, family in enumerate(sorted({m.family for m in measured})):
        mine = [m for m in measured if m.family == family]
        axes.scatter(
            [m.flops / m.bytes for m in mine],
            [1e6 * m.flops / m.our_us for m in mine if m.our_us],
            s=42,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            edgecolors="white",
            linewidths=0.6,
            label=f"{family} ({len(mine)})",
            zorder=3,
        )
    bottom = min([1e6 * m.flops / m.our_us for m in measured if m.our_us] or [peak / 100])
    axes.set(
        xlim=(low, high),
        ylim=(bottom / 2, peak * 2),
        xlabel="operations per byte of input, weight, bias and output",
        ylabel="operations per second",
        title=f"{_device(result)}, {mode}: {len(measured)} layers under the measured ceilings",
    )
    axes.yaxis.set_major_formatter(lambda value, _: _rate(value))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(visible=True, which="major", color="0.9")
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    _sign(figure, result)
    figure.draw_without_rendering()  # settles the layout, on which the slope on the page depends
    _label_slope(axes, low, copy)
    return figure


def ratios(result: RunResult, mode: str) -> Figure:
    """One bar per layer: the time of the best comparable peer over ours, on a logarithmic axis around 1."""
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import NullLocator

    pairs = sorted(((m, r) for m in _measured(result, mode) for r in (m.ratio(),) if r is not None), key=lambda p: p[1])
    height = max(2.5, 1.4 + 0.19 * len(pairs))
    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    families = sorted({m.family for m, _ in pairs})
    colours = {family: _COLOURS[i % len(_COLOURS)] for i, family in enumerate(families)}
    positions = np.arange(len(pairs))
    values = np.array([r for _, r in pairs])
    axes.barh(positions, values - 1, left=1, color=[colours[m.family] for m, _ in pairs], height=0.75)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    low, high = (min(values.min(), 1.0), max(values.max(), 1.0)) if len(values) else (0.5, 2.0)
    axes.set_xlim(low / 1.6, high * 1.6)
    for position, (_, r) in zip(positions, pairs, strict=True):
        axes.annotate(
            f"{r:.2f}",
            (r, position),
            xytext=(3 if r >= 1 else -3, 0),
            textcoords="offset points",
            va="center",
            ha="left" if r >= 1 else "right",
            fontsize=7,
        )
    axes.set_yticks(positions, [m.label for m, _ in pairs], fontsize=7)
    axes.set_ylim(len(pairs) - 0.3, -0.7)  # losses on top
    ticks = [factor * 10.0**power for power in range(-4, 5) for factor in (1, 2, 5)]
    axes.set_xticks([tick for tick in ticks if low / 1.6 <= tick <= high * 1.6])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    mean = geometric_mean(r for _, r in pairs)
    axes.set_title(
        f"{_device(result)}, {mode}: time of the fastest peer over gpuconv's"
        + ("" if mean is None else f"\ngeometric mean {mean:.2f}; right of 1 gpuconv is faster")
    )
    handles = [Rectangle((0, 0), 1, 1, color=colours[family]) for family in families]
    figure.legend(handles, families, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    axes.grid(visible=True, axis="x", which="major", color="0.9")
    axes.set_axisbelow(True)
    _sign(figure, result)
    return figure


def readme_section(result: RunResult, modes: Sequence[str], pictures: Sequence[str]) -> str:
    """The README's part between the marks: where it was measured, geometric means per family, the pictures."""
    environment = result.environment
    versions = environment["versions"]
    lines = [
        f"Measured on {_device(result)} on {environment['created'][:10]} at commit "
        f"`{(environment.get('commit') or 'unknown')[:12]}`, PyTorch {versions.get('torch', 'absent')}. "
        "Ratio: time of the fastest peer at the same precision over gpuconv's (above 1: gpuconv is faster); floor: "
        "least possible time on the measured ceilings over gpuconv's. Method and all figures: "
        "[bench/README.md](bench/README.md).",
        "",
        "| mode | kernel family | layers | ratio, geometric mean | worst | best | of the floor |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for mode, family, group in groups([m for m in result.measurements if m.mode in modes]):
        values = [r for m in group for r in (m.ratio(),) if r is not None]
        mean = geometric_mean(values)
        floor = geometric_mean(m.floor_fraction for m in group if m.floor_fraction)
        cells = ["", "", ""] if mean is None else [f"{mean:.2f}", f"{min(values):.2f}", f"{max(values):.2f}"]
        floor_cell = "" if floor is None else f"{100 * floor:.0f} %"
        lines.append(f"| {mode} | {family} | {len(group)} | {' | '.join(cells)} | {floor_cell} |")
    for picture in pictures:
        lines += ["", f"![{Path(picture).stem.replace('-', ' ')}]({picture})"]
    return "\n".join(lines)


def replace_between(page: str, name: str, text: str) -> str:
    """The page with everything between the marks `<!-- name:begin -->` and `<!-- name:end -->` replaced.

    Raises:
        ValueError: the page does not have each mark exactly once, in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page must have {begin} and {end} once each, in this order")
    head, _, rest = page.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{text.strip()}\n{end}{tail}"


def _measured(result: RunResult, mode: str) -> list[Measurement]:
    return [m for m in result.measurements if m.mode == mode and m.our_us is not None]


def _peak(result: RunResult, mode: str) -> float:
    """Operations per second of a mode; complex data runs at the real rates."""
    name = {"complex64": "float32", "complex128": "float64"}.get(mode, mode)
    return result.ceilings[name] * 1e12


def _device(result: RunResult) -> str:
    device = result.environment["device"]
    return str(result.environment["host"]["cpu"] if device["kind"] == "cpu" else device["name"])


def _rate(value: float) -> str:
    for size, unit in ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} FLOP/s"


def _label_slope(axes: Axes, low: float, copy: float) -> None:
    """Write the bandwidth along the sloping part of the roof."""
    at = low * 1.5
    start, stop = axes.transData.transform([(at, at * copy), (at * 2, at * 2 * copy)])
    angle = np.degrees(np.arctan2(stop[1] - start[1], stop[0] - start[0]))
    axes.annotate(
        f"{copy / 1e9:,.0f} GB/s", (at, at * copy), xytext=(0, 4), textcoords="offset points", rotation=angle,
        rotation_mode="anchor", ha="left", va="bottom",
    )  # fmt: skip


def _sign(figure: Figure, result: RunResult) -> None:
    commit = (result.environment.get("commit") or "unknown commit")[:12]
    text = f"{_SOURCE} {result.environment['created'][:10]} {commit}"
    figure.supxlabel(text, x=0.995, ha="right", fontsize=6, color="0.5")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed.plot", description=__doc__.partition("\n")[0])
    parser.add_argument("result", type=Path, help="a result file of bench.speed")
    parser.add_argument("--mode", help="only this number format (default: every one in the file)")
    parser.add_argument("--out", type=Path, default=PICTURES, metavar="DIR", help="default: bench/pictures")
    parser.add_argument("--update-readme", action="store_true", help="rewrite the README's table and pictures")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        result = read(args.result)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    modes = [mode for mode in dict.fromkeys(m.mode for m in result.measurements) if args.mode in (None, mode)]
    modes = [mode for mode in modes if _measured(result, mode)]
    if not modes:
        parser.error(f"{args.result} has no measured layer" + (f" in {args.mode}" if args.mode else ""))
    pictures = draw(result, modes, args.out)
    for picture in pictures:
        print(picture)
    if args.update_readme:
        # The first mode stands for all: two pictures are enough for a front page.
        shown = [os.path.relpath(picture, args.readme.parent) for picture in pictures[:2]]
        page = args.readme.read_text(encoding="utf-8")
        try:
            page = replace_between(page, "bench", readme_section(result, modes, shown))
        except ValueError as error:
            parser.error(f"{args.readme}: {error}")
        args.readme.write_text(page, encoding="utf-8")
        print(args.readme)
    return 0


def draw(result: RunResult, modes: Sequence[str], out: Path) -> list[Path]:
    """Write the two pictures of every mode."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    out.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    kinds: dict[str, Any] = {"roofline": roofline, "ratios": ratios}
    for mode in modes:
        for kind, make in kinds.items():
            figure = make(result, mode)
            path = out / f"{result.environment['device']['kind']}-{mode}-{kind}.png"
            figure.savefig(path, dpi=140)
            pyplot.close(figure)
            paths.append(path)
    return paths


if __name__ == "__main__":
    sys.exit(main())
