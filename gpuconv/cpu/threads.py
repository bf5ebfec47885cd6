"""Blocks of one call on several threads.

The helpers are started once and kept: waking one takes some 30 us, starting and ending one 70 us, and a call of 0.7 ms
can gain from a second thread.

Each thread is bound to processors of its own while it computes. Threads that pass the interpreter's lock to each other
wake each other often, and Linux as a guest of KVM then tends to put them on the same processor, because it takes an
idle processor for one that the host has preempted. Without the binding, many calls take as long on two threads as on
one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np

from . import limits
from .arrays import Scratch


def run_blocks(
    compute: Callable[..., None], blocks: Sequence[tuple[Any, ...]], workers: int, dtype: np.dtype[Any], length: int
) -> None:
    """Call ``compute(*block, scratch)`` for each block, on at most `workers` threads.

    The blocks write to disjoint places, so neither their order nor the number of threads changes a bit. After an
    exception, KeyboardInterrupt included, each thread ends with its current block. `dtype` is that of the scratch
    buffers, `length` the length of the rows that the blocks compute.
    """
    workers = min(workers, len(blocks), usable_cpus()) if workers > 1 else 1
    pending = deque(blocks)
    shares = _shares(workers)

    def work(share: list[int]) -> None:
        _keep_to(share)
        scratch = Scratch.borrow("blocks", dtype)
        # NumPy copies rows that are shorter than its buffer into the buffer, even where no dtype is converted; a buffer
        # shorter than the rows avoids these copies.
        buffer_size = np.setbufsize(64 if length >= 64 else 8192)
        try:
            with np.errstate(all="ignore"):
                while pending:
                    try:
                        block = pending.popleft()
                    except IndexError:  # another thread took the last one
                        return
                    compute(*block, scratch)
        except BaseException:
            pending.clear()
            raise
        finally:
            np.setbufsize(buffer_size)
            scratch.give_back("blocks")

    helping: list[Future[None]] = []
    try:
        if workers > 1:
            helping = [_helpers().submit(work, share) for share in shares[1:]]
        work(shares[0])
        # A helper that is still busy with another call has not begun; all blocks are taken, so it need not begin.
        helping = [helper for helper in helping if not helper.cancel()]
        for helper in helping:
            helper.result()
    except BaseException:
        pending.clear()
        wait([helper for helper in helping if not helper.cancel()])
        raise
    finally:
        _keep_to([processor for share in shares for processor in share])


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


def _keep_to(processors: list[int]) -> None:
    """Bind the calling thread to these processors; an empty list has no effect."""
    if processors:
        with suppress(OSError):  # the process may have lost some of them in the meantime
            os.sched_setaffinity(0, processors)


@lru_cache(maxsize=1)
def _sched_getcpu() -> Callable[[], int] | None:
    import ctypes

    return getattr(ctypes.CDLL(None), "sched_getcpu", None)


def _current_processor() -> int | None:
    """The processor on which the calling thread runs; None where the system does not provide it."""
    get = _sched_getcpu()
    return None if get is None or (processor := get()) < 0 else processor


@lru_cache(maxsize=1)
def _helpers() -> ThreadPoolExecutor:
    """Threads that start when they are first needed."""
    return ThreadPoolExecutor(limits.MAX_WORKERS - 1, thread_name_prefix="gpuconv")


def _renew_helpers() -> None:
    _helpers.cache_clear()
    _helpers()


# Called now, since several threads that called it first at the same time would each create a pool.
_helpers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_helpers)  # a forked process inherits none of the threads
