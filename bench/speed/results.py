"""Results of a benchmark run: what was measured, where, and how it is written to and read from JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..layers import Ceilings

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = 1

# The name of the commit, for a checkout without its history.
COMMIT_VARIABLE = "GPUCONV_COMMIT"

Status = Literal["measured", "wrong", "absent", "refused", "failed"]
Kind = Literal["replay", "eager"]


@dataclass(frozen=True, slots=True)
class Timing:
    """The time of one call, in microseconds, over `repeats` samples.

    Attributes:
        us: the median; for the CPU path the shortest time, since other processes can only make it longer.
        low_us, high_us: the 10th and 90th percentile.
    """

    us: float
    low_us: float
    high_us: float
    repeats: int

    @classmethod
    def of(cls, samples_us: Sequence[float], *, least: bool = False) -> Timing:
        low, us, high = np.percentile(np.asarray(samples_us), (10, 0 if least else 50, 90))
        return cls(float(us), float(low), float(high), len(samples_us))


# gpuconv with weights that `gpuconv.prepare` has packed before, where the layer's kernel reads packed ones.
PREPARED = "gpuconv, prepared weight"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one implementation on one layer.

    Attributes:
        subject: "gpuconv" or the peer's name.
        status: "measured"; "wrong" (the result failed its check, so there are no times); "absent" (not installed);
            "refused" (does not offer this problem); "failed" (an error, or no time left).
        note: why it was not measured, or a remark about the figure.
        comparable: whether it computes the same thing, from and to NCL arrays, at the same precision: such peers
            count for the ratio.
        replay: time within a CUDA graph, or None.
        eager: time of a plain call, the host's work included, or None.
        error: the relative error of the checked part, ``norm(y - y*)/norm(y*)``, or None.
    """

    subject: str
    status: Status
    note: str = ""
    comparable: bool = True
    replay: Timing | None = None
    eager: Timing | None = None
    error: float | None = None

    def with_timing(self, kind: Kind, timing: Timing) -> Outcome:
        return replace(self, replay=timing) if kind == "replay" else replace(self, eager=timing)

    def timing(self, kind: Kind) -> Timing | None:
        return self.replay if kind == "replay" else self.eager


@dataclass(frozen=True, slots=True)
class Measurement:
    """One layer in one mode.

    Attributes:
        layer, kind: the layer and its kind in layers.csv.
        mode, direction: the number format; "forward", "grad_input" or "grad_weight".
        problem: the problem in words.
        family: gpuconv's kernel family (its method on the CPU).
        flops, bytes: work, the padding left out, and the least traffic.
        floor_us, floor_limit: the least possible time on the ceilings of the run, and "memory" or "arithmetic".
        predicted_us: what bench.static predicted for this architecture, or None.
        rotated_bytes: memory that the buffers of one implementation cover before a buffer is used again.
        outcomes: gpuconv's first.
        reduced_batch: the batch, where the layer's own does not fit the device.
    """

    layer: str
    kind: str
    mode: str
    direction: str
    problem: str
    family: str
    flops: int
    bytes: int
    floor_us: float
    floor_limit: str
    predicted_us: float | None
    rotated_bytes: int
    outcomes: tuple[Outcome, ...]
    reduced_batch: int | None = None

    @property
    def label(self) -> str:
        """The layer, with its batch where that is not its own."""
        return self.layer if self.reduced_batch is None else f"{self.layer} N={self.reduced_batch}"

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.layer, self.mode, self.direction)

    @property
    def ours(self) -> Outcome:
        return self.outcomes[0]

    @property
    def measure(self) -> Kind | None:
        """The kind of time that stands for the layer: graph replay where gpuconv has one, else eager, else None."""
        if self.ours.replay is not None:
            return "replay"
        return "eager" if self.ours.eager is not None else None

    @property
    def our_us(self) -> float | None:
        kind = self.measure
        timing = None if kind is None else self.ours.timing(kind)
        return None if timing is None else timing.us

    def best_peer(self, kind: Kind | None = None) -> Outcome | None:
        """The fastest measured comparable peer, by the same kind of time as ours; None where there is none."""
        kind = kind or self.measure or "replay"
        timed = [
            (timing.us, outcome)
            for outcome in self.outcomes[1:]
            for timing in (outcome.timing(kind),)
            if timing is not None and outcome.comparable and outcome.subject != PREPARED
        ]
        return min(timed, key=lambda pair: pair[0], default=(0.0, None))[1]

    def ratio(self) -> float | None:
        """The best peer's time over ours: above 1 gpuconv is faster."""
        kind, ours, peer = self.measure, self.our_us, self.best_peer()
        timing = None if peer is None or kind is None else peer.timing(kind)
        return None if timing is None or ours is None else timing.us / ours

    @property
    def prepared_ratio(self) -> float | None:
        """`ratio` with the weight prepared before; None where that was not measured."""
        kind, peer = self.measure, self.best_peer()
        ours = next((outcome for outcome in self.outcomes if outcome.subject == PREPARED), None)
        if kind is None or peer is None or ours is None:
            return None
        mine, theirs = ours.timing(kind), peer.timing(kind)
        return None if mine is None or theirs is None else theirs.us / mine.us

    @property
    def floor_fraction(self) -> float | None:
        return None if self.our_us is None else self.floor_us / self.our_us

    @property
    def gigabytes_per_second(self) -> float | None:
        return None if self.our_us is None else self.bytes / self.our_us * 1e-3

    @property
    def teraflops(self) -> float | None:
        return None if self.our_us is None else self.flops / self.our_us * 1e-6


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """A layer that the run did not reach, and why."""

    layer: str
    mode: str
    reason: str


@dataclass(frozen=True, slots=True)
class RunResult:
    """A whole run. `ceilings`: measured limits, "copy" in GB/s and the others in TFLOP/s."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    ceilings: dict[str, float]
    measurements: tuple[Measurement, ...] = ()
    unmeasured: tuple[Unmeasured, ...] = ()
    seconds: float = 0.0
    schema: int = field(default=SCHEMA)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> RunResult:
        """The run in a document of `to_json`.

        Raises:
            ValueError: it is not such a document, or one of another schema.
        """
        if document.get("schema") != SCHEMA:
            raise ValueError(f"expected a benchmark result of schema {SCHEMA}, got schema {document.get('schema')!r}")
        try:
            measurements = tuple(_measurement(row) for row in document["measurements"])
            unmeasured = tuple(Unmeasured(**row) for row in document["unmeasured"])
            return cls(**{**document, "measurements": measurements, "unmeasured": unmeasured})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a benchmark result: {error}") from error

    def with_measurement(self, measurement: Measurement) -> RunResult:
        return replace(self, measurements=(*self.measurements, measurement))


def _measurement(row: dict[str, Any]) -> Measurement:
    outcomes = tuple(
        Outcome(**{**o, "replay": _timing(o["replay"]), "eager": _timing(o["eager"])}) for o in row["outcomes"]
    )
    return Measurement(**{**row, "outcomes": outcomes})


def _timing(row: dict[str, Any] | None) -> Timing | None:
    return None if row is None else Timing(**row)


def read(path: Path) -> RunResult:
    """The run that a file holds.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return RunResult.from_json(document)


def write_json(path: Path, document: Any) -> None:
    """Write a document so that a reader finds the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)


def ceilings_of(ceilings: Ceilings) -> dict[str, float]:
    """`RunResult.ceilings`."""
    flops = {name: rate / 1e12 for name, rate in ceilings.flops_per_second.items()}
    return {"copy": ceilings.bytes_per_second / 1e9, **flops}


def geometric_mean(values: Iterable[float]) -> float | None:
    """The geometric mean of positive numbers; None of none."""
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def versions(*names: str) -> dict[str, str]:
    """The versions of packages and of NVRTC ("nvrtc"); "absent" for what is not installed."""
    return {name: _nvrtc_version() if name == "nvrtc" else _package_version(name) for name in names}


def _package_version(name: str) -> str:
    if name == "gpuconv":
        import gpuconv

        return gpuconv.__version__
    # CuPy's wheels carry the CUDA version in their names.
    for candidate in (name, *(f"{name}-cuda{major}x" for major in (13, 12) if name == "cupy")):
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return "absent"


def _nvrtc_version() -> str:
    try:
        from cupy_backends.cuda.libs import nvrtc

        return ".".join(map(str, nvrtc.getVersion()))
    except (ImportError, RuntimeError):
        return "absent"


def environment(device: dict[str, Any]) -> dict[str, Any]:
    """The machine, the versions and the commit of a run; `device` describes what was measured on."""
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "host": {
            "cpu": _cpu_name(),
            "usable_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "versions": versions("gpuconv", "numpy", "cupy", "nvrtc", "torch", "nvidia-cudnn-cu13", "causal-conv1d"),
        **_commit(),
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    match = re.search(r"model name\s*:\s*(.+)", text)
    return match.group(1).strip() if match else platform.processor()


def _commit() -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    commit = git("rev-parse", "HEAD") or os.environ.get(COMMIT_VARIABLE)
    return {"commit": commit, "commit_modified": None if changed is None else bool(changed)}
