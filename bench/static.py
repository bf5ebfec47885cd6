"""Static kernel reports: what the compiler made of every configuration that the benchmark layers choose. No GPU needed.

From the root of a checkout:

    python -m bench.static --arch sm_90            # table of kernels, table of predicted times
    python -m bench.static --arch sm_90 --check    # compare with static_baseline.json; exit code 1 on a regression
    python -m bench.static --arch sm_90 --update   # rewrite static_baseline.json, predictions.json, PREDICTIONS.md
    python -m bench.static --directions grad_weight  # the gradients of the weights
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gpuconv import dispatch
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import Config, Layout
from gpuconv.problem import ConvProblem, WeightGradientProblem

from .directions import DIRECTIONS, Direction, directions_of, of_forward, prediction_key
from .layers import Layer, load
from .marks import replace_between
from .modes import MODES, Mode, modes_of
from .predict import Prediction, predict, predict_gradient
from .rates import products
from .results import versions, write_json
from .sass import KernelReport, ToolMissingError, blocks_per_sm, report

HERE = Path(__file__).resolve().parent
BASELINE = HERE / "static_baseline.json"
PREDICTIONS = HERE / "predictions.json"
PREDICTIONS_PAGE = HERE / "PREDICTIONS.md"

# What the page shows: the architectures, and the number formats beside float32.
PAGE_ARCHITECTURES = ("sm_90", "sm_80")
OTHER_MODES = ("bfloat16", "tf32", "float32 grad_input", "float32 grad_weight")

# The share of useful instructions in the main loop may fall by this many percentage points before it is a regression.
SHARE_TOLERANCE = 3.0


@dataclass(frozen=True, slots=True)
class Planned:
    """What dispatch chooses for one layer in one mode."""

    layer: Layer
    mode: Mode
    direction: Direction
    choice: dispatch.Choice


def plan(
    layers: Iterable[Layer], modes: Iterable[Mode], device: Device, directions: Iterable[Direction] = ("forward",)
) -> list[Planned]:
    """Every pass of every layer in every mode that the device has, as dispatch places it for contiguous arrays."""
    planned = []
    for mode in modes:
        if not (mode.supported and mode.runs_on(device)):
            continue
        for layer, direction in product(filter(mode.includes, layers), directions):
            choice = choose(of_forward(mode.problem(layer), direction), device)
            if choice is not None:
                planned.append(Planned(layer, mode, direction, choice))
    return planned


def choose(problem: ConvProblem | WeightGradientProblem, device: Device) -> dispatch.Choice | None:
    """What dispatch chooses for contiguous arrays."""
    return dispatch.choose(problem, Layout.contiguous(problem), device)


def base_choice(problem: ConvProblem, device: Device) -> dispatch.Choice:
    """What the family of last resort would run, whatever dispatch prefers."""
    choice = dispatch.choose(problem, Layout.contiguous(problem), device, "base")
    assert choice is not None
    return choice


def compile_all(configs: Iterable[Config], arch: str, console: Console) -> dict[Config, KernelReport]:
    """Compile each distinct configuration once, with a progress bar."""
    distinct = list(dict.fromkeys(configs))
    reports = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"Compiling for {arch}", total=len(distinct))
        for config in distinct:
            progress.update(task, description=f"Compiling {config.kernel} for {arch}")
            reports[config] = report(config, arch)
            progress.advance(task)
    return reports


# -- the baseline -----------------------------------------------------------------------------------------------------


def config_key(config: Config) -> str:
    """A configuration as one line of text: the kernel and its macros."""
    return " ".join([config.kernel, *(f"{name}={value}" for name, value in config.macros)])


def record(kernel: KernelReport, block: int, shared_bytes: int, device: Device) -> dict[str, Any]:
    """A report as it is written to JSON."""
    r = kernel.resources
    per_sm = blocks_per_sm(r.registers, block, shared_bytes + r.static_shared_bytes, device)
    return {
        "kernel": kernel.config.kernel,
        "macros": dict(kernel.config.macros),
        "registers": r.registers,
        "shared_bytes": shared_bytes + r.static_shared_bytes,
        "spill_bytes": r.spill_store_bytes + r.spill_load_bytes,
        "stack_bytes": r.stack_bytes,
        "local_instructions": kernel.local_instructions,
        "threads": block,
        "blocks_per_sm": per_sm,
        "warps_per_sm": per_sm * -(-block // 32),
        "compile_ms": round(kernel.compile_ms, 1),
        "instructions": kernel.instructions,
        "loop": {
            "instructions": kernel.loop.instructions,
            "useful_share": round(kernel.loop.useful_share, 4),
            "mix": kernel.loop.mix,
            "accesses": kernel.loop.accesses,
        },
    }


def regressions(baseline: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What got worse, one sentence each; both arguments map `config_key` to `record`.

    Local memory is refused where the baseline has none, in configurations that the baseline does not know too; a fall
    of the useful share can only be judged where the baseline knows the configuration.
    """
    found = []
    for key, now in current.items():
        before = baseline.get(key)
        for field, what in (
            ("spill_bytes", "bytes of register spills"),
            ("stack_bytes", "bytes of stack frame (local memory)"),
            ("local_instructions", "local-memory instructions"),
        ):
            allowed = before[field] if before else 0
            if now[field] > allowed:
                found.append(f"{key}: {now[field]} {what}, {allowed} in the baseline")
        if before:
            share, share_before = (100 * r["loop"]["useful_share"] for r in (now, before))
            if share < share_before - SHARE_TOLERANCE:
                found.append(
                    f"{key}: {share:.1f} % of the instructions of the main loop are useful, "
                    f"{share_before:.1f} % in the baseline"
                )
    return found


# -- tables -----------------------------------------------------------------------------------------------------------


def kernel_table(records: Mapping[str, Any], arch: str) -> Table:
    table = Table(title=f"Kernels for {arch}", caption=LEGEND, caption_justify="left")
    table.add_column("kernel")
    table.add_column("specialisation", overflow="fold")
    for name in ("regs", "shared B", "spill B", "warps/SM", "loop", "useful", "address", "ms"):
        table.add_column(name, justify="right")
    table.add_column("accesses", overflow="fold")
    for kernel in dict.fromkeys(r["kernel"] for r in records.values()):
        mine = [r for r in records.values() if r["kernel"] == kernel]
        # Macros that are the same everywhere would only widen the table.
        varying = [name for name in mine[0]["macros"] if len({r["macros"].get(name) for r in mine}) > 1]
        for r in mine:
            loop = r["loop"]
            local = r["spill_bytes"] + r["stack_bytes"] + r["local_instructions"]
            table.add_row(
                kernel if r is mine[0] else "",
                " ".join(f"{name}={r['macros'].get(name, '')}" for name in varying),
                str(r["registers"]),
                str(r["shared_bytes"]),
                str(r["spill_bytes"]),
                str(r["warps_per_sm"]),
                str(loop["instructions"]),
                f"{100 * loop['useful_share']:.1f} %",
                f"{100 * loop['mix'].get('address', 0) / max(loop['instructions'], 1):.1f} %",
                f"{r['compile_ms']:.0f}",
                ", ".join(f"{n} {_short(kind)}" for kind, n in loop["accesses"].items()),
                style="red" if local else "",
            )
        table.add_section()
    return table


LEGEND = (
    "loop: instructions of one pass of the main loop; useful: share of multiply-adds and tensor instructions; address: "
    "integer and move instructions; accesses: its loads and stores with their bytes per thread. Red: local memory."
)


def _short(access: str) -> str:
    """An entry of `Loop.accesses` in short: "LDG.16" for "global load 16 B"."""
    kind, _, rest = access.rpartition(" B")[0].rpartition(" ")
    names = {
        "global load": "LDG", "global store": "STG", "shared load": "LDS", "shared store": "STS",
        "shared matrix load": "LDSM", "shared matrix store": "STSM", "asynchronous copy": "LDGSTS",
    }  # fmt: skip
    return f"{names.get(kind, kind)}.{rest}"


def prediction_rows(planned: Sequence[Planned], reports: Mapping[Config, KernelReport], device: Device) -> list[Row]:
    """The predicted time of every planned layer."""
    rows = []
    for p in planned:
        problem, kernel = of_forward(p.mode.problem(p.layer), p.direction), reports[p.choice.config]
        if isinstance(problem, WeightGradientProblem):
            prediction = predict_gradient(problem, p.choice, kernel, device)
        else:
            prediction = predict(problem, p.choice, kernel, device)
        rows.append(Row(p.layer.name, prediction_key(p.mode.name, p.direction), p.choice.family, prediction))
    return rows


@dataclass(frozen=True, slots=True)
class Row:
    """A predicted time; `mode` is that of `prediction_key`."""

    layer: str
    mode: str
    family: str
    prediction: Prediction


def prediction_table(rows: Sequence[Row], device: Device) -> Table:
    table = Table(title=f"Predicted times on {device.name} (a model, not a measurement)")
    table.add_column("layer")
    table.add_column("family")
    modes = list(dict.fromkeys(row.mode for row in rows))
    for mode in modes:
        table.add_column(f"{mode} us", justify="right")
    table.add_column("limit")
    for name in dict.fromkeys(row.layer for row in rows):
        mine = {row.mode: row for row in rows if row.layer == name}
        first = next(iter(mine.values()))
        times = [f"{mine[mode].prediction.us:,.0f}" if mode in mine else "" for mode in modes]
        table.add_row(name, first.family, *times, first.prediction.limit)
    return table


def predictions_markdown(rows: Sequence[Row], device: Device) -> str:
    """A table of bench/PREDICTIONS.md: the kernels that dispatch chooses beside those of last resort, in float32.

    `OTHER_MODES` are shown by their times alone.
    """
    lines = [
        f"Predicted for {device.name} ({device.arch_name}), CUDA graph replay, cold caches; float32 where a column "
        "does not say otherwise. Base: the same layer by the family of last resort, `conv1d_direct` or "
        "`conv_transpose1d_gather`.",
        "",
        f"| layer | family | us | limit | blocks per SM | waves | base, us | limit | {' us | '.join(OTHER_MODES)} us |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | --- |" + " ---: |" * len(OTHER_MODES),
    ]
    problems = {layer.name: layer.problem("float32") for layer in load()}
    times = {(row.layer, row.mode): f"{row.prediction.us:,.1f}" for row in rows}
    for row in (row for row in rows if row.mode == "float32"):
        p, problem = row.prediction, problems[row.layer]
        others = " | ".join(times.get((row.layer, mode), "") for mode in OTHER_MODES)
        choice = base_choice(problem, device)
        base = predict(problem, choice, report(choice.config, device.arch_name), device)
        lines.append(
            f"| {row.layer} | {row.family} | {p.us:,.1f} | {p.limit} | {p.blocks_per_sm} | {p.waves} "
            f"| {base.us:,.1f} | {base.limit} | {others} |"
        )
    return "\n".join(lines)


# -- command line -----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="sm_90", choices=sorted(ARCHITECTURES, key=lambda a: int(a[3:])))
    parser.add_argument("--modes", default="float32,bfloat16", help="comma-separated, or all (default: %(default)s)")
    parser.add_argument(
        "--directions",
        default="forward",
        metavar="LIST",
        help=f"comma-separated passes: {', '.join(DIRECTIONS)}, or all (default: %(default)s)",
    )
    parser.add_argument("--filter", default="", metavar="REGEX", help="only layers whose name matches")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    parser.add_argument("--check", action="store_true", help="compare with the baseline; exit code 1 on a regression")
    parser.add_argument("--update", action="store_true", help="rewrite the baseline and the predictions")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a regression against the baseline, 2 bad usage, 3 a tool is missing."""
    parser = build_parser()
    args = parser.parse_args(argv)
    console = Console()
    device = Device.from_arch(args.arch)
    modes = MODES if args.update or args.modes == "all" else modes_of(args.modes, parser)
    layers = [layer for layer in load() if re.search(args.filter, layer.name)]
    directions = DIRECTIONS if args.update else directions_of(args.directions, parser)
    planned = plan(layers, modes, device, directions)
    if not planned:
        parser.error(f"no layer matches {args.filter!r} in these modes")
    try:
        launches = {step.config: step.launch for p in planned for step in p.choice.plan.steps}
        reports = compile_all(launches, args.arch, console)
    except ToolMissingError as error:
        console.print(f"[red]{error}[/red]")
        return 3

    records = {
        config_key(config): record(reports[config], launch.block, launch.shared_bytes, device)
        for config, launch in launches.items()
    }
    rows = prediction_rows(planned, reports, device)
    document = {
        "schema": 1,
        "arch": args.arch,
        "device": device.name,
        "versions": versions("gpuconv", "cupy", "nvrtc"),
        "kernels": records,
        "predictions_us": nested_predictions(rows),
    }
    if args.json:
        write_json(args.json, document)
    console.print(kernel_table(records, args.arch))
    if not args.check:
        console.print(prediction_table(rows, device))
    if args.update:
        by_product = {
            one.name: nested_predictions(prediction_rows(planned, reports, one)) for one in products(args.arch)
        }
        update(document, rows, by_product, device)
        console.print(f"Wrote {BASELINE.name}, {PREDICTIONS.name} and {PREDICTIONS_PAGE.name}.")
    return check(document, console) if args.check else 0


def nested_predictions(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Microseconds by mode and layer."""
    nested: dict[str, dict[str, float]] = {}
    for row in rows:
        nested.setdefault(row.mode, {})[row.layer] = round(row.prediction.us, 2)
    return nested


def check(document: Mapping[str, Any], console: Console) -> int:
    """Compare a report with the committed baseline of its architecture and say what got worse."""
    baselines = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
    baseline = baselines.get(document["arch"])
    if baseline is None:
        console.print(f"[red]{BASELINE.name} has no entry for {document['arch']}; write it with --update.[/red]")
        return 1
    found = regressions(baseline["kernels"], document["kernels"])
    unknown = [key for key in document["kernels"] if key not in baseline["kernels"]]
    if unknown:
        console.print(f"{len(unknown)} configurations are not in the baseline; add them with --update.")
    for sentence in found:
        console.print(f"[red]REGRESSION[/red] {sentence}", soft_wrap=True)
    if found and baseline["versions"].get("nvrtc") != document["versions"].get("nvrtc"):
        console.print(
            f"The baseline was compiled by NVRTC {baseline['versions'].get('nvrtc')}, this by "
            f"{document['versions'].get('nvrtc')}: the compiler may be the cause."
        )
    console.print(f"{len(document['kernels'])} configurations compared, {len(found)} regressions.")
    return 1 if found else 0


def update(document: Mapping[str, Any], rows: Sequence[Row], by_product: Mapping[str, Any], device: Device) -> None:
    """Write the baseline and the predictions of one architecture; those of others stay."""
    arch = document["arch"]
    baselines = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
    kernels = {
        # Compile times differ between machines and would make every update a change.
        key: {name: value for name, value in kernel.items() if name != "compile_ms"}
        for key, kernel in document["kernels"].items()
    }
    baselines[arch] = {"versions": document["versions"], "kernels": kernels}
    write_json(BASELINE, baselines)
    predictions = json.loads(PREDICTIONS.read_text(encoding="utf-8")) if PREDICTIONS.exists() else {}
    predictions[arch] = by_product
    write_json(PREDICTIONS, predictions)
    if arch in PAGE_ARCHITECTURES:
        page = PREDICTIONS_PAGE.read_text(encoding="utf-8")
        table = predictions_markdown(rows, device)
        PREDICTIONS_PAGE.write_text(replace_between(page, f"predictions {arch}", table), encoding="utf-8")


if __name__ == "__main__":
    # Rich wraps tables to 80 columns where there is no terminal, which makes logs hard to read.
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "160")
    sys.exit(main())
