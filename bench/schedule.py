"""Which cases a run measures, in which order, and what still fits into its time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from .measure import Case, Deadlines
from .modes import Mode

# A guess is corrected by what earlier cases took, but no further than this factor either way.
_LARGEST_CORRECTION = 10.0


def by_information(cases: Iterable[Case], modes: Sequence[Mode]) -> list[Case]:
    """Order cases so that any beginning of the list tells the most: all kinds of layer evenly, important modes first.

    Cases of one kind and mode form a queue, throughput layers before latency layers, otherwise in the order of
    layers.json. The queues are served in turn: after the first round every kind has been seen once in the first
    mode, then once in the second, and so on.
    """
    queues: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in cases:
        queues[case.mode.name, case.layer.family].append(case)
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
        key = (case.mode.name, case.layer.family)
        seen[key] += 1
        if seen[key] <= per_kind:
            chosen.append(case)
    return chosen


@dataclass(slots=True)
class Budget:
    """The time of a run: what is left of it, and whether a case still fits.

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
