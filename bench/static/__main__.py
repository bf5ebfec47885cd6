"""Static kernel reports: what the compiler made of every configuration that the benchmark layers choose. No GPU needed.

From the root of a checkout:

    python -m bench.static --arch sm_90            # table of kernels, table of predicted times
    python -m bench.static --arch sm_90 --check    # compare with baseline.jsonl; exit code 1 on a regression
    python -m bench.static --arch sm_90 --update   # rewrite this architecture's lines of it, and predictions.csv
    python -m bench.static --arch sm_80 --modes all --directions all --predictions FILE   # the latter for another GPU
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gpuconv.costs import blocks_per_sm
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import Config, Launch

from ..arguments import listed
from ..layers import load
from ..modes import DIRECTIONS, MODES
from ..speed.results import versions, write_json
from . import predictions
from .sass import KernelReport, ToolMissingError, compiled, report

BASELINE = Path(__file__).with_name("baseline.jsonl")

# Of this architecture predictions.csv holds the times.
PREDICTED_ARCH = "sm_90"

# The share of useful instructions in the main loop may fall by this many percentage points before it is a regression.
SHARE_TOLERANCE = 3.0


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


def config_key(config: Config) -> str:
    """A configuration as one line of text: the kernel and its macros."""
    return " ".join([config.kernel, *(f"{name}={value}" for name, value in config.macros)])


def record(kernel: KernelReport, launch: Launch, device: Device) -> dict[str, Any]:
    """A report as it is written to JSON."""
    r = kernel.resources
    shared_bytes = launch.shared_bytes + r.static_shared_bytes
    per_sm = blocks_per_sm(r.registers, launch.block, shared_bytes, device)
    return {
        "code": kernel.digest,
        "registers": r.registers,
        "shared_bytes": shared_bytes,
        "spill_bytes": r.spill_store_bytes + r.spill_load_bytes,
        "stack_bytes": r.stack_bytes,
        "local_instructions": kernel.local_instructions,
        "threads": launch.block,
        "blocks_per_sm": per_sm,
        "warps_per_sm": per_sm * -(-launch.block // 32),
        "compile_ms": round(kernel.compile_ms, 1),
        "instructions": kernel.instructions,
        "loop_instructions": kernel.loop.instructions,
        "useful_share": round(kernel.loop.useful_share, 4),
        "mix": kernel.loop.mix,
        "accesses": kernel.loop.accesses,
    }


def read_baseline(arch: str) -> dict[str, dict[str, Any]]:
    """The records of an architecture in the baseline, by `config_key`."""
    lines = map(json.loads, BASELINE.read_text(encoding="utf-8").splitlines())
    return {line["kernel"]: line for line in lines if line["arch"] == arch}


def write_baseline(arch: str, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the records of an architecture in place of its old ones: one line a specialisation, in order."""
    mine = f'{{"arch": "{arch}"'
    lines = [line for line in BASELINE.read_text(encoding="utf-8").splitlines() if not line.startswith(mine)]
    for key, fields in records.items():
        # Compile times differ between machines and would make every update a change.
        kept = {name: value for name, value in fields.items() if name != "compile_ms"}
        lines.append(json.dumps({"arch": arch, "kernel": key, "nvrtc": versions("nvrtc")["nvrtc"], **kept}))
    BASELINE.write_text("".join(f"{line}\n" for line in sorted(lines)), encoding="utf-8")


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
            share, share_before = (100 * r["useful_share"] for r in (now, before))
            if share < share_before - SHARE_TOLERANCE:
                found.append(
                    f"{key}: {share:.1f} % of the instructions of the main loop are useful, "
                    f"{share_before:.1f} % in the baseline"
                )
    return found


def kernel_table(records: Mapping[str, Mapping[str, Any]], arch: str) -> Table:
    table = Table(title=f"Kernels for {arch}", caption=LEGEND, caption_justify="left")
    table.add_column("kernel")
    table.add_column("specialisation", overflow="fold")
    for name in ("regs", "shared B", "spill B", "warps/SM", "loop", "useful", "address", "ms"):
        table.add_column(name, justify="right")
    table.add_column("accesses", overflow="fold")
    keys = {key: key.split(" ") for key in records}
    for kernel in dict.fromkeys(words[0] for words in keys.values()):
        mine = [key for key in records if keys[key][0] == kernel]
        # Macros that are the same everywhere would only widen the table.
        everywhere = set.intersection(*(set(keys[key]) for key in mine)) if len(mine) > 1 else set(keys[mine[0]])
        for key in mine:
            r = records[key]
            table.add_row(
                kernel if key == mine[0] else "",
                " ".join(word for word in keys[key][1:] if word not in everywhere),
                str(r["registers"]),
                str(r["shared_bytes"]),
                str(r["spill_bytes"]),
                str(r["warps_per_sm"]),
                str(r["loop_instructions"]),
                f"{100 * r['useful_share']:.1f} %",
                f"{100 * r['mix'].get('address', 0) / max(r['loop_instructions'], 1):.1f} %",
                f"{r['compile_ms']:.0f}",
                ", ".join(f"{n} {_short(kind)}" for kind, n in r["accesses"].items()),
                style="red" if r["spill_bytes"] + r["stack_bytes"] + r["local_instructions"] else "",
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
    parser.add_argument("--gpu", metavar="NAME", help="a product of the architecture with other memory, such as H100")
    parser.add_argument(
        "--layout",
        default="contiguous",
        choices=sorted(predictions.LAYOUTS),
        help="of the arrays (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="write the predicted times here, as CSV")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--check", action="store_true", help="only compare with the baseline; exit code 1 on a regression"
    )
    what.add_argument("--update", action="store_true", help="rewrite the baseline and the predictions")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a regression against the baseline, 2 bad usage, 3 a tool is missing."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.update and args.layout != "contiguous":
        parser.error("the baseline and the predictions are of contiguous arrays")
    console = Console()
    device = Device.from_arch(args.arch)
    if args.gpu:
        device = replace(device, name=args.gpu)
    modes = MODES if args.update else listed(args.modes, {mode.name: mode for mode in MODES}, "mode", parser)
    directions = DIRECTIONS
    if not args.update:
        directions = listed(args.directions, {name: name for name in DIRECTIONS}, "pass", parser)
    layers = [layer for layer in load() if re.search(args.filter, layer.name)]
    planned = predictions.plan(layers, modes, device, directions, args.layout)
    if not planned:
        parser.error(f"no layer matches {args.filter!r} in these modes")
    some = [layer for layer in layers if layer.name == predictions.LAYER_CHANNELS_LAST]
    more = predictions.plan(some, modes, device, directions, "channels_last")
    launches = {step.config: step.launch for p in (*planned, *more) for step in p.choice.plan.steps}
    try:
        if args.check:
            return check(launches, device, console)
        reports = compile_all(launches, args.arch, console)
        times = predictions.predicted(planned, reports, device)
        if args.predictions:
            predictions.write(args.predictions, planned, times, device)
    except ToolMissingError as error:
        console.print(f"[red]{error}[/red]")
        return 3

    records = {config_key(config): record(reports[config], launch, device) for config, launch in launches.items()}
    if args.json:
        document = {"arch": args.arch, "device": device.name, "versions": versions("gpuconv", "cupy", "nvrtc")}
        predicted_us: dict[str, dict[str, float]] = {}
        for one, time in zip(planned, times, strict=True):
            predicted_us.setdefault(one.key, {})[one.layer.name] = round(time.us, 2)
        write_json(args.json, {**document, "kernels": records, "predictions_us": predicted_us})
    console.print(kernel_table(records, args.arch))
    forecasts = predictions.forecasts(planned, times, device)
    for key in dict.fromkeys(one.key for one in planned):
        console.print(predictions.table(key, [f for f in forecasts if f.planned.key == key], device))
    if args.update:
        write_baseline(args.arch, records)
        if args.arch == PREDICTED_ARCH:
            predictions.write(predictions.FILE, planned, times, device)
    return 0


def check(launches: Mapping[Config, Launch], device: Device, console: Console) -> int:
    """Compare what the compiler makes of the kernels with the committed baseline, and say what got worse.

    Machine code that equals the baseline's is not disassembled again, which saves most of the time.
    """
    arch = device.arch_name
    baseline = read_baseline(arch)
    if not baseline:
        console.print(f"[red]{BASELINE.name} has no line for {arch}; write them with --update.[/red]")
        return 1
    records = {}
    for config, launch in launches.items():
        known = baseline.get(config_key(config))
        same = known is not None and known["code"] == compiled(config, arch).digest
        records[config_key(config)] = known if same else record(report(config, arch), launch, device)
    unknown = [key for key in records if key not in baseline]
    if unknown:
        console.print(f"{len(unknown)} configurations are not in the baseline; add them with --update.")
    found = regressions(baseline, records)
    for sentence in found:
        console.print(f"[red]REGRESSION[/red] {sentence}", soft_wrap=True)
    before, now = {line["nvrtc"] for line in baseline.values()}, versions("nvrtc")["nvrtc"]
    if found and before != {now}:
        console.print(
            f"The baseline was compiled by NVRTC {', '.join(sorted(before))}, this by {now}: the compiler may be the "
            "cause."
        )
    console.print(f"{len(records)} configurations compared, {len(found)} regressions.")
    return 1 if found else 0


if __name__ == "__main__":
    # Rich wraps tables to 80 columns where there is no terminal, which makes logs hard to read.
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "160")
    sys.exit(main())
