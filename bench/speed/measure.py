"""Measures one layer: prepares every implementation, checks each result, then times all of them in turn.

Nothing here knows CUDA, NumPy or PyTorch; an `Engine` does (bench/speed/gpu.py, bench/cpu.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from gpuconv.measure import no_garbage_collection
from gpuconv.peers import Refused
from gpuconv.problem import ConvProblem, WeightGradientProblem

from ..layers import Ceilings, Layer, valid_flops
from ..modes import Direction, Mode, of_forward, prediction_key, without_bias
from .check import Verdict
from .results import Kind, Measurement, Outcome, Timing

# The fewest samples of a case that takes too long, unless the whole run is out of time; the JSON says how many.
MIN_REPEATS = 5

# A probe longer than this needs no second one to be warm.
LONG_PROBE_US = 50_000.0

# Launches in one CUDA graph: more only make the capture longer.
MAX_CALLS = 512

# Sets of buffers, of which the smallest problems would need very many.
MAX_SETS = 4096

# The warm-up goes through the whole rotation, but no longer than this.
WARM_UP_US = 500_000.0


class Absent(Exception):  # noqa: N818 - not an error: the reason is reported
    """The implementation is not installed."""


@dataclass(frozen=True, slots=True)
class Case:
    """One pass of one layer in one mode, with its own batch or a smaller one.

    Attributes:
        problem: the forward problem, whatever the pass.
    """

    layer: Layer
    mode: Mode
    batch: int
    direction: Direction = "forward"

    @property
    def problem(self) -> ConvProblem:
        return without_bias(self.mode.problem(self.layer, self.batch), self.direction)

    @property
    def name(self) -> str:
        reduced = "" if self.batch == self.layer.batch else f" (batch {self.batch} of {self.layer.batch})"
        return f"{self.layer.name}{reduced} {prediction_key(self.mode.name, self.direction)}"


class Deadlines(NamedTuple):
    """When a case must stop taking samples: the soft one leaves it `MIN_REPEATS`, the hard one a single one."""

    soft: float = math.inf
    hard: float = math.inf


class Runner(Protocol):
    """One implementation on the buffers of one case."""

    def call(self, index: int) -> None:
        """Compute buffer set `index`, allocating the output as a user's call would."""

    def capture(self, indices: Sequence[int]) -> Callable[[], None] | None:
        """Record the calls of these sets as one CUDA graph; return what replays it, None where there are no graphs."""

    def verdict(self) -> Verdict:
        """Compute set 0 and judge it."""

    def context(self) -> AbstractContextManager[object]:
        """The settings of this implementation, entered around calls, outside of what is timed."""

    def release(self) -> None:
        """Give back graphs and outputs."""


@dataclass(frozen=True, slots=True)
class Subject:
    """An implementation that can be measured; see `results.Outcome` for `comparable` and `note`.

    Attributes:
        prepare: gets it ready for the case at hand; raises Absent or Refused where that cannot be.
    """

    name: str
    prepare: Callable[[], Runner]
    comparable: bool = True
    note: str = ""


class Engine(Protocol):
    """A device to measure on."""

    @property
    def ceilings(self) -> Ceilings: ...

    def open(self, case: Case) -> AbstractContextManager[Buffers]:
        """Allocate and fill the buffers of a case."""

    def elapsed(self, work: Callable[[], None]) -> float:
        """Run the work on an idle device and return its microseconds."""

    def sample(self, work: Callable[[], None]) -> list[float]:
        """`elapsed`, once or several times, after undoing what the sample before may have left to the next one.

        That is work in the queue, warm caches, busy threads.
        """

    def family(self, problem: ConvProblem | WeightGradientProblem) -> str:
        """The kernel family or method that gpuconv takes."""


@dataclass(frozen=True, slots=True)
class Buffers:
    """The buffer sets of a case, and the implementations that use them, gpuconv first."""

    sets: int
    rotated_bytes: int
    subjects: Sequence[Subject]


@dataclass(frozen=True, slots=True)
class Method:
    """How long and how often.

    Attributes:
        repeats: samples of every implementation and kind of time.
        sample_us: the length of one sample; shorter calls are repeated within it.
        kinds: "replay" where the engine has graphs, "eager".
        least: the least time stands for the call, in place of the median.
    """

    repeats: int = 30
    sample_us: float = 1000.0
    kinds: tuple[Kind, ...] = ("replay", "eager")
    least: bool = False


def sets_for(problem: ConvProblem, cache_bytes: int) -> int:
    """How many buffer sets cover four times the cache; at least two, so that no call finds its own input warm."""
    return min(MAX_SETS, max(2, math.ceil(4 * cache_bytes / max(problem.bytes(), 1))))


@dataclass(slots=True)
class _Entrant:
    """An implementation on its way through a measurement."""

    subject: Subject
    runner: Runner
    outcome: Outcome


def measure(
    case: Case,
    engine: Engine,
    method: Method,
    clock: Callable[[], float],
    deadlines: Deadlines = Deadlines(),  # noqa: B008 - immutable
    predicted_us: float | None = None,
) -> Measurement:
    """Measure one case; an implementation that fails, is wrong or absent is reported and stops no other."""
    problem = of_forward(case.problem, case.direction)
    with engine.open(case) as buffers:
        outcomes: dict[str, Outcome] = {}
        entrants: list[_Entrant] = []
        for subject in buffers.subjects:
            outcome, runner = _admit(subject)
            outcomes[subject.name] = outcome
            if runner is not None:
                entrants.append(_Entrant(subject, runner, outcome))
        try:
            for kind in method.kinds:
                for entrant, timing in _time(entrants, kind, buffers.sets, engine, method, clock, deadlines):
                    entrant.outcome = entrant.outcome.with_timing(kind, timing)
        finally:
            for entrant in entrants:
                entrant.runner.release()
        for entrant in entrants:
            if entrant.outcome.status == "measured" and entrant.outcome.replay is entrant.outcome.eager is None:
                entrant.outcome = replace(entrant.outcome, status="failed", note="no time left")
            outcomes[entrant.subject.name] = entrant.outcome

    floor = case.layer.floor(case.mode.name, engine.ceilings, case.batch)
    memory = problem.bytes() / engine.ceilings.bytes_per_second
    return Measurement(
        layer=case.layer.name,
        kind=case.layer.kind,
        mode=case.mode.name,
        direction=case.direction,
        problem=str(problem),
        family=engine.family(problem),
        flops=valid_flops(case.problem),
        bytes=problem.bytes(),
        floor_us=1e6 * floor,
        floor_limit="memory" if memory >= floor else "arithmetic",
        predicted_us=predicted_us,
        rotated_bytes=buffers.rotated_bytes,
        outcomes=tuple(outcomes.values()),
        reduced_batch=None if case.batch == case.layer.batch else case.batch,
    )


def _admit(subject: Subject) -> tuple[Outcome, Runner | None]:
    """Prepare an implementation and check its result: only a right one gets a runner, hence a time."""
    outcome = Outcome(subject.name, "measured", subject.note, subject.comparable)
    try:
        runner = subject.prepare()
    except Absent as reason:
        return replace(outcome, status="absent", note=str(reason)), None
    except Refused as reason:
        return replace(outcome, status="refused", note=str(reason)), None
    except Exception as error:
        return replace(outcome, status="failed", note=_sentence(error)), None
    try:
        with runner.context():
            verdict = runner.verdict()
    except Exception as error:
        runner.release()
        return replace(outcome, status="failed", note=_sentence(error)), None
    if not verdict.ok:
        runner.release()
        return replace(outcome, status="wrong", note=verdict.note, error=_finite(verdict.error)), None
    return replace(outcome, error=_finite(verdict.error), note=verdict.note or outcome.note), runner


def _time(
    entrants: list[_Entrant],
    kind: Kind,
    sets: int,
    engine: Engine,
    method: Method,
    clock: Callable[[], float],
    deadlines: Deadlines,
) -> Iterator[tuple[_Entrant, Timing]]:
    """Time every entrant that was admitted; samples are taken in turn, so that drift affects all of them equally.

    Each goes on through the rotation where it last stopped.
    """
    work: list[tuple[_Entrant, list[Callable[[], None]], int]] = []
    for entrant in [e for e in entrants if e.outcome.status == "measured"]:
        if clock() > deadlines.hard:
            break
        try:
            with entrant.runner.context():
                calls, runs = _runs(entrant.runner, kind, sets, engine, method)
        except Exception as error:
            note = f"{kind}: {_sentence(error)}"
            entrant.outcome = replace(entrant.outcome, status="failed", note=note, replay=None, eager=None)
            continue
        if runs:
            work.append((entrant, runs, calls))

    samples: list[list[float]] = [[] for _ in work]
    with no_garbage_collection():
        for repeat in range(method.repeats):
            now = clock()
            if (repeat >= MIN_REPEATS and now > deadlines.soft) or (repeat >= 1 and now > deadlines.hard):
                break
            for turn in range(len(work)):
                place = (turn + repeat) % len(work)
                entrant, runs, calls = work[place]
                with entrant.runner.context():
                    samples[place] += [us / calls for us in engine.sample(runs[repeat % len(runs)])]
    for (entrant, _, _), taken in zip(work, samples, strict=True):
        yield entrant, Timing.of(taken, least=method.least)


def _runs(
    runner: Runner, kind: Kind, sets: int, engine: Engine, method: Method
) -> tuple[int, list[Callable[[], None]]]:
    """What one sample runs, for each chunk of the rotation, warmed up: (calls per sample, the chunks).

    No chunks where the engine has no graphs.
    """
    prepare = runner.capture if kind == "replay" else (lambda indices: _caller(runner, indices))
    few = range(min(sets, 8))
    probe = prepare(few)
    if probe is None:
        return 0, []
    probe_us = engine.elapsed(probe)
    if probe_us < LONG_PROBE_US:
        probe_us = engine.elapsed(probe)
    calls, chunks = _chunks(sets, method.sample_us / max(probe_us / len(few), 0.1))
    runs = [run for run in map(prepare, chunks) if run is not None]
    spent_us = probe_us
    for run in runs if probe_us < LONG_PROBE_US else ():
        spent_us += engine.elapsed(run)
        if spent_us > WARM_UP_US:
            break
    return calls, runs


def _chunks(sets: int, wanted: float) -> tuple[int, list[range | list[int]]]:
    """Cut the rotation into chunks of about `wanted` calls: (calls per chunk, the buffer sets of each).

    Where one chunk holds more calls than there are sets it goes round several times.
    """
    calls = max(1, min(MAX_CALLS, math.ceil(wanted)))
    if calls >= sets:
        rounds = math.ceil(calls / sets)
        return rounds * sets, [[index for _ in range(rounds) for index in range(sets)]]
    calls = sets // (sets // calls)
    return calls, [range(start, start + calls) for start in range(0, sets - calls + 1, calls)]


def _caller(runner: Runner, indices: Sequence[int]) -> Callable[[], None]:
    def run() -> None:
        for index in indices:
            runner.call(index)

    return run


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
