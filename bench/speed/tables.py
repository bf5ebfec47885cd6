"""The tables that a run and a comparison of two runs print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.table import Table

from .results import Kind, Measurement, RunResult, geometric_mean


def by_loss(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Losses first, the worst on top; then what was not measured; then wins, the smallest first."""

    def place(m: Measurement) -> tuple[int, float]:
        ratio = m.ratio()
        if ratio is None:
            return (1, 0.0)
        return (0, ratio) if ratio < 1 else (2, ratio)

    return sorted(measurements, key=place)


def results_table(measurements: Iterable[Measurement]) -> Table:
    """One row per layer and mode; columns that say nothing in this run are left out."""
    ordered = by_loss(measurements)
    peers = {id(m): m.best_peer() for m in ordered}
    columns: dict[str, list[str]] = {
        "layer": [m.label for m in ordered],
        "mode": [m.mode for m in ordered],
        "family": [m.family for m in ordered],
        "time us": [_number(m.our_us) if m.our_us is not None else m.ours.status for m in ordered],
        "+-": [spread(m) for m in ordered],
        "rate": [rate(m) for m in ordered],
        "floor": ["" if m.floor_fraction is None else f"{100 * m.floor_fraction:.0f} %" for m in ordered],
        "predicted us": [_number(m.predicted_us) for m in ordered],
        "x best peer": [times(m.ratio()) for m in ordered],
        "eager x": [times(_eager_ratio(m)) if m.measure == "replay" else "" for m in ordered],
        "x prepared": [times(m.prepared_ratio) for m in ordered],
        "best peer": [peer.subject if (peer := peers[id(m)]) else "" for m in ordered],
        "x NLC": [times(_other_layout_ratio(m)) for m in ordered],
        "remark": [m.ours.note if m.our_us is None else "" for m in ordered],
    }
    table = Table(title="gpuconv, losses first", caption=LEGEND, caption_justify="left")
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    for name in shown:
        words = name in ("layer", "mode", "family", "best peer", "remark")
        table.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for row, m in zip(zip(*shown.values(), strict=True), ordered, strict=True):
        ratio = m.ratio()
        lost = m.ours.status == "wrong" or (ratio is not None and ratio < 1)
        table.add_row(*row, style="red" if lost else "")
    return table


LEGEND = (
    "floor: least possible time over time. x best peer: time of the fastest peer at the same precision, from and to "
    "NCL arrays, over ours (above 1: gpuconv is faster). eager x: the same with the host's work. x prepared: "
    "with weights that gpuconv.prepare packed before. x NLC: against cuDNN "
    "on data that lies in channels_last already. predicted: a model, not a measurement."
)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def spread(m: Measurement) -> str:
    """Half the distance between the 10th and the 90th percentile, relative to the time."""
    timing = None if m.measure is None else m.ours.timing(m.measure)
    return "" if timing is None else f"{50 * (timing.high_us - timing.low_us) / timing.us:.0f} %"


def rate(m: Measurement) -> str:
    """The rate by which the floor is limited."""
    if m.gigabytes_per_second is None or m.teraflops is None:
        return ""
    return f"{m.gigabytes_per_second:,.0f} GB/s" if m.floor_limit == "memory" else flops_rate(m.teraflops)


def flops_rate(teraflops: float) -> str:
    return f"{teraflops:,.1f} TFLOP/s" if teraflops >= 1 else f"{1e3 * teraflops:,.1f} GFLOP/s"


def _eager_ratio(m: Measurement) -> float | None:
    ours, peer = m.ours.eager, m.best_peer(kind="eager")
    return None if ours is None or peer is None or peer.eager is None else peer.eager.us / ours.us


def _other_layout_ratio(m: Measurement) -> float | None:
    """Against the fastest peer that was given its data in channels_last."""
    kind: Kind | None = m.measure
    if kind is None or m.our_us is None:
        return None
    theirs = [t.us for o in m.outcomes[1:] if "channels_last data" in o.subject for t in (o.timing(kind),) if t]
    return min(theirs) / m.our_us if theirs else None


def groups(measurements: Sequence[Measurement]) -> Iterator[tuple[str, str, list[Measurement]]]:
    """(mode, kernel family, what was measured of it), and for several families of a mode also "all"."""
    for mode in dict.fromkeys(m.mode for m in measurements):
        mine = [m for m in measurements if m.mode == mode and m.our_us is not None]
        families = sorted({m.family for m in mine})
        for family in families:
            yield mode, family, [m for m in mine if m.family == family]
        if len(families) > 1:
            yield mode, "all", mine


def means_table(measurements: Sequence[Measurement]) -> Table:
    """Geometric means by kernel family and over all, for each mode."""
    table = Table(title="Geometric means")
    table.add_column("mode")
    table.add_column("family")
    for name in ("layers", "x best peer", "wins", "floor", "measured/predicted"):
        table.add_column(name, justify="right")
    for mode, family, group in groups(measurements):
        ratios = [r for m in group for r in (m.ratio(),) if r is not None]
        misses = [m.our_us / m.predicted_us for m in group if m.our_us and m.predicted_us]
        floor = geometric_mean(m.floor_fraction for m in group if m.floor_fraction)
        table.add_row(
            mode,
            family,
            str(len(group)),
            times(geometric_mean(ratios)),
            f"{sum(r >= 1 for r in ratios)} of {len(ratios)}",
            "" if floor is None else f"{100 * floor:.0f} %",
            times(geometric_mean(misses)),
            style="bold" if family == "all" else "",
        )
    return table


def comparison_table(before: RunResult, after: RunResult) -> Table:
    """What changed between two runs, the largest slow-down first. Changes within both spreads are marked as such."""
    table = Table(title="Comparison: time of B over time of A (below 1: B is faster)")
    table.add_column("layer", overflow="fold")
    table.add_column("mode")
    for name in ("A us", "B us", "B/A"):
        table.add_column(name, justify="right")
    table.add_column("remark")
    rows = compare(before, after)
    for layer, mode, a, b, remark in rows:
        ratio = "" if a is None or b is None else f"{b / a:.3f}"
        slower = a is not None and b is not None and b > a and not remark
        table.add_row(layer, mode, _number(a), _number(b), ratio, remark, style="red" if slower else "")
    mean = geometric_mean(b / a for _, _, a, b, _ in rows if a is not None and b is not None)
    table.add_row("geometric mean", "", "", "", "" if mean is None else f"{mean:.3f}", "", style="bold")
    return table


def compare(before: RunResult, after: RunResult) -> list[tuple[str, str, float | None, float | None, str]]:
    """(layer, mode, microseconds in A, in B, remark) of every case of either run, the largest slow-down first."""
    old = {m.key: m for m in before.measurements}
    new = {m.key: m for m in after.measurements}
    rows = []
    for key in dict.fromkeys([*new, *old]):
        a, b = old.get(key), new.get(key)
        us_a, us_b = a.our_us if a else None, b.our_us if b else None
        remark = ""
        if us_a is None or us_b is None:
            remark = "only in " + ("B" if us_a is None else "A")
        elif a is not None and b is not None and _overlap(a, b):
            remark = "within the spread"
        rows.append((key[0], key[1], us_a, us_b, remark))
    return sorted(rows, key=lambda row: -(row[3] / row[2]) if row[2] and row[3] else 0.0)


def _overlap(a: Measurement, b: Measurement) -> bool:
    kind = a.measure if a.measure == b.measure else None
    first, second = (None, None) if kind is None else (a.ours.timing(kind), b.ours.timing(kind))
    if first is None or second is None:
        return False
    return first.low_us <= second.high_us and second.low_us <= first.high_us


def peers_table(measurements: Sequence[Measurement]) -> Table:
    """How often each peer was measured, and why not where it was not."""
    table = Table(title="Peers")
    table.add_column("peer")
    for name in ("measured", "not"):
        table.add_column(name, justify="right")
    table.add_column("most frequent reason", overflow="fold")
    names = list(dict.fromkeys(o.subject for m in measurements for o in m.outcomes[1:]))
    for name in names:
        outcomes = [o for m in measurements for o in m.outcomes[1:] if o.subject == name]
        rest = [o for o in outcomes if o.status != "measured"]
        reasons = [f"{o.status}: {o.note}" for o in rest]
        common = max(reasons, key=reasons.count, default="")
        table.add_row(name, str(len(outcomes) - len(rest)), str(len(rest)), common)
    return table


def print_report(result: RunResult, console: Console) -> None:
    """Everything a reader needs of a run; a result file prints the same as the run that wrote it."""
    console.print(results_table(result.measurements))
    console.print(means_table(result.measurements))
    console.print(peers_table(result.measurements))
    ceilings = ", ".join(
        f"{name} {value:,.0f} GB/s" if name == "copy" else f"{name} {flops_rate(value)}"
        for name, value in result.ceilings.items()
    )
    console.print(f"Ceilings of this run: {ceilings}", soft_wrap=True)
    reasons: dict[str, list[str]] = {}
    for u in result.unmeasured:
        reasons.setdefault(u.reason.partition(":")[0], []).append(f"{u.layer} {u.mode}")
    for reason, names in reasons.items():
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        console.print(f"Not measured ({reason}): {shown}", soft_wrap=True)
