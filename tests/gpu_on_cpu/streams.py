"""Streams, events and graphs: work is queued, and runs as late and in as odd an order as the rules of streams allow.

Whatever is queued becomes a `Work` that names the works it must follow: the one before it in its stream, what its
stream was told to wait for, and the legacy default stream's barriers. Nothing else orders it. It runs when somebody
waits for it, together with what it follows and, by chance, with what it does not. So work that should have waited runs
too early, or too late, and shows itself.

`GPU_ON_CPU_ORDER` chooses: "lazy" (the default) runs only what is waited for, a number seeds an order in which other
work runs as well, "eager" runs everything when it is queued.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .errors import Code, CudaError

Run = Callable[[], None]


def _nothing() -> None:
    """What a mark in a stream does when its turn comes."""


class Work:
    """Something queued.

    Attributes:
        owner: whose error it becomes if it fails.
        after: what must run before, as far as it has not run.
    """

    __slots__ = ("after", "done", "owner", "run")

    def __init__(self, owner: Owner, run: Run, after: Iterable[Work | None]) -> None:
        self.owner = owner
        self.run = run
        self.after = {work for work in after if work is not None and not work.done}
        self.done = False


class Owner:
    """A device, as far as its queues are concerned.

    Attributes:
        error: what ended it: every later call gives it back.
        legacy: its default stream.
        streams: all others that exist.
    """

    def __init__(self) -> None:
        self.error: CudaError | None = None
        self.legacy = Stream(self, blocking=True)
        self.streams: set[Stream] = set()

    def blocking_streams(self) -> list[Stream]:
        """Those that wait for the legacy default stream and that it waits for."""
        return [stream for stream in self.streams if stream.blocking]


class Queue:
    """All work that has not run."""

    def __init__(self) -> None:
        order = os.environ.get("GPU_ON_CPU_ORDER", "lazy")
        self.eager = order == "eager"
        self._runs_others = order.isdecimal()
        self.random = random.Random(int(order) if order.isdecimal() else 0)
        self._pending: dict[Work, None] = {}

    def submit(self, work: Work) -> None:
        self._pending[work] = None
        if self.eager:
            self.run_until([work])
        elif self._runs_others and self.random.random() < 0.3:
            self.step()

    def run_until(self, targets: Iterable[Work | None]) -> None:
        """Run until all of these have run."""
        wanted = [work for work in targets if work is not None and not work.done]
        followers: dict[Work, list[Work]] = {}
        ready: list[Work] = []
        while wanted:
            work = wanted.pop()
            if work not in followers:
                followers[work] = []
                wanted.extend(other for other in work.after if not other.done)
        for work in followers:
            if self._is_ready(work):
                ready.append(work)
            for other in work.after:
                followers[other].append(work)
        while ready:
            work = ready.pop(self.random.randrange(len(ready)))
            if not work.done:
                self._run(work)
                if self._runs_others and self.random.random() < 0.3:
                    self.step()
            ready.extend(follower for follower in followers.pop(work, []) if self._is_ready(follower))

    def step(self) -> None:
        """Run one work that may run, if there is one."""
        ready = [work for work in self._pending if self._is_ready(work)]
        if ready:
            self._run(self.random.choice(ready))

    def run_all(self, owner: Owner) -> None:
        """Run all work of a device."""
        self.run_until([work for work in self._pending if work.owner is owner])

    def _is_ready(self, work: Work) -> bool:
        work.after = {other for other in work.after if not other.done}
        return not work.after

    def _run(self, work: Work) -> None:
        self._pending.pop(work, None)
        try:
            if work.owner.error is None:
                work.run()
        except CudaError as error:
            work.owner.error = error
        finally:
            work.done = True
            work.run = _nothing  # whatever it held may go


QUEUE = Queue()


class Stream:
    """A queue of a device.

    Attributes:
        blocking: whether the legacy default stream and this one wait for each other.
        tail: the last work queued.
        capture: what it records, if it records.
        captured: the last nodes that it recorded.
    """

    def __init__(self, owner: Owner, *, blocking: bool, priority: int = 0) -> None:
        self.owner = owner
        self.blocking = blocking
        self.priority = priority
        self.tail: Work | None = None
        self.capture: Capture | None = None
        self.captured: list[Node] = []

    def queue(self, run: Run, *others: Work | None) -> Work | None:
        """Queue something behind all that is queued here, and behind other works; None where it is recorded.

        Raises:
            CudaError: as CUDA's rules of capturing want it.
        """
        if self.capture is not None:
            self.capture.check()
            node = Node(self.owner, run, list(self.captured))
            self.capture.graph.append(node)
            self.captured = [node]
            return None
        after = [self.tail, *others]
        if self is self.owner.legacy:
            for stream in self.owner.blocking_streams():
                if stream.capture is not None:
                    stream.capture.invalidate(
                        Code.StreamCaptureImplicit, "the legacy default stream is used while a stream captures"
                    )
                after.append(stream.tail)
        elif self.blocking:
            after.append(self.owner.legacy.tail)
        self.tail = Work(self.owner, run, after)
        QUEUE.submit(self.tail)
        return self.tail

    def wait(self) -> None:
        """Run all that is queued here.

        Raises:
            CudaError: the stream captures.
        """
        self.forbid_capture("a stream that captures is waited for or asked")
        if self is self.owner.legacy:
            self.queue(_nothing)  # behind the blocking streams
        QUEUE.run_until([self.tail])

    def forbid_capture(self, what: str) -> None:
        """Raise where the stream captures; the capture is lost.

        Raises:
            CudaError: it does.
        """
        if self.capture is not None:
            self.capture.invalidate(Code.StreamCaptureUnsupported, what)


@dataclass(eq=False)
class Event:
    """A point in a stream.

    Attributes:
        work: reached when this has run; None before it is recorded.
        timed: whether its time may be asked.
        seconds: when it was reached.
        capture, nodes: where it was recorded in a stream that captures, behind these nodes.
    """

    timed: bool = True
    work: Work | None = None
    seconds: float = 0.0
    capture: Capture | None = None
    nodes: list[Node] = field(default_factory=list)

    def record(self, stream: Stream) -> None:
        if stream.capture is not None:
            stream.capture.check()
            self.capture, self.nodes, self.work = stream.capture, list(stream.captured), None
            return
        self.capture = None
        self.work = stream.queue(self._reach)

    def _reach(self) -> None:
        self.seconds = time.perf_counter()

    def forbid_capture(self) -> None:
        """Raise where the event was recorded in a capture; the capture is lost.

        Raises:
            CudaError: it was.
        """
        if self.capture is not None:
            self.capture.invalidate(Code.CapturedEvent, "an event of a capture is waited for or asked")

    def make_wait(self, stream: Stream) -> None:
        """CudaStreamWaitEvent. A stream that waits for an event of a capture joins the capture."""
        if self.capture is not None:
            if stream.capture is None:
                self.capture.join(stream)
            elif stream.capture is not self.capture:
                self.capture.invalidate(Code.StreamCaptureMerge, "one capture waits for another")
            stream.captured = list(dict.fromkeys([*stream.captured, *self.nodes]))
        elif stream.capture is not None:
            stream.capture.invalidate(
                Code.StreamCaptureIsolation, "a stream that captures waits for an event from outside"
            )
        else:
            stream.queue(_nothing, self.work)


@dataclass(eq=False, slots=True)
class Node:
    """Work that a graph repeats."""

    owner: Owner
    run: Run
    after: list[Node]


Graph = list[Node]
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2


class Capture:
    """A recording into a graph.

    Attributes:
        origin: the stream that began it.
        thread: the thread that began it.
        streams: all that record into it.
    """

    active: list[Capture] = []  # noqa: RUF012 - one list for all of them

    def __init__(self, origin: Stream, mode: int) -> None:
        self.origin = origin
        self.mode = mode
        self.thread = threading.get_ident()
        self.graph: Graph = []
        self.streams: list[Stream] = []
        self.is_valid = True
        self.join(origin)
        Capture.active.append(self)

    def join(self, stream: Stream) -> None:
        if stream is stream.owner.legacy:
            raise CudaError(Code.StreamCaptureImplicit, "the legacy default stream cannot capture")
        stream.capture = self
        stream.captured = []
        self.streams.append(stream)

    def check(self) -> None:
        """Raise where the capture is lost.

        Raises:
            CudaError: it is.
        """
        if not self.is_valid:
            raise CudaError(Code.StreamCaptureInvalidated, "the capture was invalidated by an earlier error")

    def invalidate(self, code: Code, message: str) -> None:
        """Lose the capture.

        Raises:
            CudaError: always.
        """
        self.is_valid = False
        raise CudaError(code, f"{message}; the capture is lost")

    def end(self) -> Graph:
        """Leave capture mode.

        Raises:
            CudaError: the capture was lost, or a stream that joined it did not come back.
        """
        reached: set[int] = set()
        waiting = list(self.origin.captured)
        while waiting:
            node = waiting.pop()
            if id(node) not in reached:
                reached.add(id(node))
                waiting.extend(node.after)
        Capture.active.remove(self)
        for stream in self.streams:
            stream.capture = None
        self.check()
        if any(id(node) not in reached for node in self.graph):
            raise CudaError(Code.StreamCaptureUnjoined, "a stream that joined the capture was not waited for")
        return self.graph


def forbid_during_capture(what: str, mode: int) -> None:
    """Raise where a call that might touch the whole device is made during a capture; `mode` is this thread's.

    Raises:
        CudaError: a capture in global mode goes on, or one of this thread's in thread-local mode.
    """
    for capture in Capture.active:
        own = capture.thread == threading.get_ident()
        forbidding = capture.mode != RELAXED if own else capture.mode == GLOBAL and mode == GLOBAL
        if forbidding and mode != RELAXED:
            capture.invalidate(Code.StreamCaptureUnsupported, f"{what} during a capture")


def launch_graph(graph: Graph, stream: Stream) -> None:
    """Queue a graph: its nodes keep their own order, between what is queued before and after."""
    if stream.capture is not None:
        raise CudaError(Code.NotSupported, "gpu_on_cpu: a graph inside a graph")
    begin = stream.queue(_nothing)
    works: dict[int, Work] = {}
    for node in graph:
        work = Work(node.owner, node.run, [begin, *(works[id(before)] for before in node.after)])
        works[id(node)] = work
        QUEUE.submit(work)
    stream.queue(_nothing, *works.values())
