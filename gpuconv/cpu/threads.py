"""Blocks of one call on several threads.

The helpers are started once and kept, each of them waiting at a queue of its own. Such a handover takes some 40 us, one
through `concurrent.futures` 60 us, and a call of 0.5 ms can gain from a second thread.

Each thread is bound to processors of its own while it computes. Threads that pass the interpreter's lock to each other
wake each other often, and Linux as a guest of KVM then tends to put them on the same processor, because it takes an
idle processor for one that the host has preempted. Without the binding, many calls take as long on two threads as on
one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import numpy as np

from . import limits
from .arrays import Scratch


def run_blocks(
    compute: Callable[..., Any],
    blocks: Sequence[tuple[Any, ...]],
    workers: int,
    dtype: np.dtype[Any],
    length: int,
    prepares: bool = False,
) -> None:
    """Call ``compute(*block, scratch)`` for each block, on at most `workers` threads.

    The blocks write to disjoint places, so neither their order nor the number of threads changes a bit. After an
    exception, KeyboardInterrupt included, each thread ends with its current block. `dtype` is that of the scratch
    buffers, `length` the length of the rows that the blocks compute.

    With `prepares`, `compute` only prepares a block and returns the function that computes it. The caller prepares the
    first block of each helper, too: one that has just woken would take long for it, with the interpreter's lock held.
    """
    if not blocks:
        return
    prepare: Callable[..., Callable[[], None]] = compute if prepares else partial(partial, compute)
    helpers = _pool().take(min(workers, len(blocks), usable_cpus()) - 1) if workers > 1 else []
    scratches = [Scratch.borrow(f"blocks {index}", dtype) for index in range(1 + len(helpers))]
    own, pending = blocks[: len(scratches)], deque(blocks[len(scratches) :])

    def work(first: Callable[[], None], scratch: Scratch) -> None:
        # NumPy copies rows that are shorter than its buffer into the buffer, even where no dtype is converted; a buffer
        # shorter than the rows avoids these copies.
        buffer_size = np.setbufsize(64) if length >= 64 else None
        try:
            with np.errstate(all="ignore"):
                first()
                while (block := _next(pending)) is not None:
                    prepare(*block, scratch)()
        finally:
            if buffer_size is not None:
                np.setbufsize(buffer_size)

    if helpers:
        _work_together(work, prepare, own, pending, helpers, scratches)
    else:
        work(prepare(*own[0], scratches[0]), scratches[0])
    for index, scratch in enumerate(scratches):
        scratch.give_back(f"blocks {index}")


def _work_together(
    work: Callable[[Callable[[], None], Scratch], None],
    prepare: Callable[..., Callable[[], None]],
    own: Sequence[tuple[Any, ...]],
    pending: deque[tuple[Any, ...]],
    helpers: Sequence[_Helper],
    scratches: Sequence[Scratch],
) -> None:
    """Compute by `work`, on the calling thread and on the helpers, a block of each's own and all that are pending."""
    ready: deque[tuple[Callable[[], None], Scratch]] = deque()
    begun: list[None] = []
    ended: list[BaseException | None] = []
    signal: SimpleQueue[None] = SimpleQueue()

    def leave_the_rest() -> None:
        pending.clear()
        ready.clear()

    def assist() -> None:
        begun.append(None)
        error = None
        try:
            if (prepared := _next(ready)) is not None:
                work(*prepared)
        except BaseException as caught:
            leave_the_rest()
            error = caught
        ended.append(error)

    def wait() -> None:
        # A helper that begins from now on finds nothing to do.
        while len(ended) < len(begun):
            signal.get()

    shares = _shares(1 + len(helpers))
    try:
        for helper, block, share, scratch in zip(helpers, own[1:], shares[1:], scratches[1:], strict=True):
            ready.append((prepare(*block, scratch), scratch))
            helper.begin(assist, signal, share)
        first = prepare(*own[0], scratches[0])
        _keep_to(0, shares[0])
        work(first, scratches[0])
        while (prepared := _next(ready)) is not None:  # of a helper that has not begun, since its processor is busy
            work(*prepared)
        wait()
    except BaseException:
        leave_the_rest()
        wait()
        raise
    finally:
        _keep_to(0, [processor for share in shares for processor in share])
    for error in ended:
        if error is not None:
            raise error


def _next(queue: deque[Any]) -> Any:
    """The first item, or None where another thread took the last one."""
    try:
        return queue.popleft()
    except IndexError:
        return None


def usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _shares(workers: int) -> list[list[int]]:
    """The processors of each thread, the caller's first; empty lists where threads are not bound to processors."""
    current = _current_processor() if workers > 1 and hasattr(os, "sched_getaffinity") else None
    if current is None:
        return [[]] * workers
    usable = sorted(os.sched_getaffinity(0), key=lambda processor: (processor < current, processor))
    return [usable[index::workers] for index in range(workers)]


def _keep_to(thread: int, processors: list[int]) -> None:
    """Bind a thread, 0 for the calling one, to these processors; an empty list has no effect."""
    if processors:
        with suppress(OSError):  # the process may have lost some of them in the meantime
            os.sched_setaffinity(thread, processors)


@lru_cache(maxsize=1)
def _sched_getcpu() -> Callable[[], int] | None:
    import ctypes

    return getattr(ctypes.CDLL(None), "sched_getcpu", None)


def _current_processor() -> int | None:
    """The processor on which the calling thread runs; None where the system does not provide it."""
    get = _sched_getcpu()
    return None if get is None or (processor := get()) < 0 else processor


class _Helper:
    """A thread that waits for work and is free again after it."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool
        self._tasks: SimpleQueue[tuple[Callable[[], None], SimpleQueue[None]]] = SimpleQueue()
        self._processors: list[int] = []
        self._thread = Thread(target=self._run, name="gpuconv", daemon=True)
        self._thread.start()

    def begin(self, work: Callable[[], None], signal: SimpleQueue[None], processors: list[int]) -> None:
        """Do this work on these processors, then give a signal."""
        if processors != self._processors and self._thread.native_id is not None:
            _keep_to(self._thread.native_id, processors)  # now, since it takes less time while the thread sleeps
            self._processors = processors
        self._tasks.put((work, signal))

    def _run(self) -> None:
        while True:
            work, signal = self._tasks.get()
            work()
            self._pool.free.append(self)
            signal.put(None)
            del work, signal  # they may hold arrays


class _Pool:
    """Helpers that start when they are first needed."""

    def __init__(self) -> None:
        self.free: list[_Helper] = []
        self._started = 0
        self._lock = Lock()

    def take(self, count: int) -> list[_Helper]:
        """At most so many helpers: only those that no other call uses."""
        taken: list[_Helper] = []
        while len(taken) < count:
            try:
                taken.append(self.free.pop())
            except IndexError:
                with self._lock:
                    if self._started == limits.MAX_WORKERS - 1:
                        break
                    self._started += 1
                taken.append(_Helper(self))
        return taken


@lru_cache(maxsize=1)
def _pool() -> _Pool:
    return _Pool()


def _renew_pool() -> None:
    _pool.cache_clear()
    _pool()


# Called now, since several threads that called it first at the same time would each create a pool.
_pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_pool)  # a forked process inherits none of the threads
