"""Runs the cases of a run: which, in which order, and what still fits into its time."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ..layers import Layer
from ..modes import Direction, Mode, prediction_key
from .measure import Case, Deadlines, Engine, Method, measure
from .results import RunResult, Unmeasured

# A guess is corrected by what earlier cases took, but no further than this factor either way.
_LARGEST_CORRECTION = 10.0

# So many cases in a row that fail completely mean that the device does not work any more.
MAX_FAILURES_IN_A_ROW = 4


def by_information(cases: Iterable[Case], modes: Sequence[Mode]) -> list[Case]:
    """Order cases by information: all kinds of layer evenly, important modes first.

    Cases of one kind and mode form a queue, throughput layers before latency layers, otherwise in the order of
    layers.csv. The queues are served in turn: after the first round every kind has been seen once in the first
    mode, then once in the second, and so on.
    """
    queues: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in cases:
        queues[case.mode.name, case.layer.kind].append(case)
    for queue in queues.values():
        queue.sort(key=lambda case: case.layer.regime != "throughput")  # stable
    order = [mode.name for mode in modes]
    keys = sorted(queues, key=lambda key: order.index(key[0]))  # stable: kinds in the order they first appear
    ordered: list[Case] = []
    depth = 0
    while len(ordered) < sum(map(len, queues.values())):
        ordered += [queues[key][depth] for key in keys if depth < len(queues[key])]
        depth += 1
    return ordered


def quick(cases: Sequence[Case], per_kind: int = 2) -> list[Case]:
    """The first few cases of every kind and mode."""
    seen: dict[tuple[str, str], int] = defaultdict(int)
    chosen = []
    for case in cases:
        key = (case.mode.name, case.layer.kind)
        seen[key] += 1
        if seen[key] <= per_kind:
            chosen.append(case)
    return chosen


@dataclass(slots=True)
class Budget:
    """The remaining time of a run, and whether a case still fits.

    Args:
        seconds: of the whole run, or None for no limit.
        clock: the present in seconds.
        per_case: no case takes longer.
    """

    seconds: float | None
    clock: Callable[[], float]
    per_case: float
    _start: float = field(init=False)
    _guessed: float = 0.0
    _taken: float = 0.0

    def __post_init__(self) -> None:
        self._start = self.clock()

    @property
    def left(self) -> float:
        return float("inf") if self.seconds is None else self._start + self.seconds - self.clock()

    def expect(self, guess: float) -> float:
        """What a case of the guessed length will take, by the experience so far."""
        correction = self._taken / self._guessed if self._guessed else 1.0
        return min(guess * min(max(correction, 1 / _LARGEST_CORRECTION), _LARGEST_CORRECTION), self.per_case)

    def admits(self, guess: float) -> bool:
        return self.expect(guess) <= self.left

    def deadlines(self) -> Deadlines:
        """When the case that starts now must stop taking samples."""
        now = self.clock()
        return Deadlines(now + min(self.left, self.per_case), now + self.left)

    def learn(self, guess: float, taken: float) -> None:
        self._guessed += min(guess, self.per_case)
        self._taken += taken


class MeasuringEngine(Engine, Protocol):
    """An engine that can also guess how long a case will take and say what it is."""

    def estimate_seconds(self, case: Case, repeats: int) -> float: ...

    def describe(self) -> dict[str, Any]: ...


def select(
    layers: Sequence[Layer],
    modes: Sequence[Mode],
    pattern: str,
    max_bytes: int,
    max_flops: int,
    direction: Direction = "forward",
) -> tuple[list[Case], list[Unmeasured]]:
    """The cases of a run, by information, with batches reduced to the limits; and what no batch fits."""
    cases, left_out = [], []
    for mode in modes:
        for layer in layers:
            if not mode.includes(layer) or not re.search(pattern, layer.name):
                continue
            batch = layer.batch_within(max_bytes, max_flops, mode.dtype)
            if batch is None:
                left_out.append(Unmeasured(layer.name, mode.name, "too large for this device, even one sample"))
            else:
                cases.append(Case(layer, mode, batch, direction))
    return by_information(cases, modes), left_out


def run_cases(
    cases: Sequence[Case],
    engine: MeasuringEngine,
    method: Method,
    budget: Budget,
    result: RunResult,
    predictions: dict[str, dict[str, float]],
    on_progress: Callable[[RunResult, Case], None],
) -> RunResult:
    """Measure cases until they are done or the time is: what does not fit is listed as unmeasured."""
    failures = 0
    for case in cases:
        guess = engine.estimate_seconds(case, method.repeats)
        if failures >= MAX_FAILURES_IN_A_ROW:
            reason = "given up: the cases before it failed as a whole"
        elif not budget.admits(guess):
            needed = f"about {budget.expect(guess):.0f} s needed"
            reason = f"no time left: {max(budget.left, 0):.0f} s of the run, {needed}"
        else:
            reason = ""
        if not reason:
            start = budget.clock()
            # Predictions are made for the layer's own batch.
            whole = case.batch == case.layer.batch
            key = prediction_key(case.mode.name, case.direction)
            predicted = predictions.get(key, {}).get(case.layer.name) if whole else None
            try:
                measured = measure(case, engine, method, budget.clock, budget.deadlines(), predicted)
                result = result.with_measurement(measured)
                failures = 0
            except Exception as error:
                reason = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                failures += 1
            budget.learn(guess, budget.clock() - start)
        if reason:
            left_out = Unmeasured(case.layer.name, case.mode.name, reason)
            result = replace(result, unmeasured=(*result.unmeasured, left_out))
        on_progress(result, case)
    return result
