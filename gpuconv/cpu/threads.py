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
from threading import RLock, Thread
from typing import Any
from weakref import WeakSet

import numpy as np

from . import limits
from .arrays import Scratch

# NumPy copies rows that are shorter than its buffer into the buffer, even where no dtype is converted. For rows of at
# least so many elements, a buffer of that size avoids these copies; others need the usual one.
_SHORT_BUFFER = 64
_USUAL_BUFFER = np.getbufsize()


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

    def finish(first: Callable[[], None], scratch: Scratch) -> None:
        first()
        while (block := _next(pending)) is not None:
            prepare(*block, scratch)()

    def work(first: Callable[[], None], scratch: Scratch) -> None:
        buffer_size = np.getbufsize() if length >= _SHORT_BUFFER else None
        try:
            with np.errstate(all="ignore"):
                if buffer_size is not None:
                    np.setbufsize(_SHORT_BUFFER)
                finish(first, scratch)
        finally:
            if buffer_size is not None:
                np.setbufsize(buffer_size)

    def assist(first: Callable[[], None], scratch: Scratch) -> None:
        # NumPy's settings are those of the helper alone, which need not be restored: this takes time with the
        # interpreter's lock held, just when the caller needs it.
        size = _SHORT_BUFFER if length >= _SHORT_BUFFER else _USUAL_BUFFER
        if np.getbufsize() != size:
            np.setbufsize(size)
        finish(first, scratch)

    if helpers:
        _work_together(work, assist, prepare, own, pending, helpers, scratches)
    else:
        work(prepare(*own[0], scratches[0]), scratches[0])
    for index, scratch in enumerate(scratches):
        scratch.give_back(f"blocks {index}")


def _work_together(
    work: Callable[[Callable[[], None], Scratch], None],
    assist: Callable[[Callable[[], None], Scratch], None],
    prepare: Callable[..., Callable[[], None]],
    own: Sequence[tuple[Any, ...]],
    pending: deque[tuple[Any, ...]],
    helpers: list[_Helper],
    scratches: Sequence[Scratch],
) -> None:
    """Compute a block of each thread's own and all that are pending: by `work` on this thread, `assist` on helpers."""
    ready: deque[tuple[Callable[[], None], Scratch]] = deque()
    begun: list[None] = []
    ended: list[None] = []
    errors: list[BaseException] = []
    signal: SimpleQueue[None] = SimpleQueue()

    def fail(error: BaseException) -> None:
        errors.append(error)
        pending.clear()
        ready.clear()

    def take_part() -> None:
        begun.append(None)
        try:
            if (prepared := _next(ready)) is not None:
                assist(*prepared)
        except BaseException as error:
            fail(error)
        ended.append(None)

    shares = _shares(1 + len(helpers))
    everywhere = {processor for share in shares for processor in share}
    try:
        for block, share, scratch in zip(own[1:], shares[1:], scratches[1:], strict=True):
            ready.append((prepare(*block, scratch), scratch))
            helpers.pop().begin(take_part, signal, share)
        first = prepare(*own[0], scratches[0])
        _keep_to(0, shares[0])
        work(first, scratches[0])
        while (prepared := _next(ready)) is not None:  # of a helper that has not begun, since its processor is busy
            work(*prepared)
    except BaseException as error:
        fail(error)
    waiting = True
    while waiting:
        try:
            # A helper that begins from now on finds nothing to do.
            while len(ended) < len(begun):
                signal.get()
            waiting = False
        except BaseException as error:  # an interrupt: helpers still write to the caller's arrays
            fail(error)
    if everywhere:
        try:  # noqa: SIM105 since `_keep_to` or `suppress` could be interrupted before it does anything
            os.sched_setaffinity(0, everywhere)
        except OSError:  # as in `_keep_to`
            pass
    _pool().free.extend(helpers)  # those that were not needed
    if errors:
        raise errors.pop(0)  # kept in `errors`, it would keep this frame and the caller's arrays alive


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
    """A thread that waits for work. It ends when nothing refers to the helper, as after an interrupted call."""

    def __init__(self, pool: _Pool) -> None:
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._processors: list[int] = []
        self._thread = Thread(target=_serve, args=(self._tasks, pool), name="gpuconv", daemon=True)
        self._thread.start()

    def __del__(self) -> None:
        self._tasks.put(None)

    def begin(self, work: Callable[[], None], signal: SimpleQueue[None], processors: list[int]) -> None:
        """Do this work on these processors, then give a signal."""
        if processors != self._processors and self._thread.native_id is not None:
            _keep_to(self._thread.native_id, processors)  # now, since it takes less time while the thread sleeps
            self._processors = processors
        self._tasks.put((self, work, signal))


_Task = tuple[_Helper, Callable[[], None], SimpleQueue[None]]


def _serve(tasks: SimpleQueue[_Task | None], pool: _Pool) -> None:
    """Do the tasks of a helper, which is free again after each."""
    np.seterr(all="ignore")  # of this thread alone
    while (task := tasks.get()) is not None:
        helper, work, signal = task
        work()
        pool.free.append(helper)
        signal.put(None)
        del task, helper, work, signal  # they may hold arrays, and keep the helper from being freed


class _Pool:
    """Helpers that start when they are first needed."""

    def __init__(self) -> None:
        self.free: list[_Helper] = []
        self._all: WeakSet[_Helper] = WeakSet()
        self._lock = RLock()  # the handler of a signal may call gpuconv, too

    def take(self, count: int) -> list[_Helper]:
        """At most so many helpers: only those that no other call uses."""
        taken: list[_Helper] = []
        while len(taken) < count:
            try:
                taken.append(self.free.pop())
            except IndexError:
                with self._lock:
                    if len(self._all) >= limits.MAX_WORKERS - 1:
                        break
                    self._all.add(helper := _Helper(self))
                taken.append(helper)
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
