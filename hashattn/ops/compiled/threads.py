"""Heads of a step, shared out to threads: the loops let go of Python's lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

_WORTH = 400.0  # microseconds of work: handing a part to another thread takes some tens


class _Pool:
    """Threads that wait for work, made at the first call of a process: a fork takes none of them along."""

    def __init__(self) -> None:
        self._process, self._threads = -1, 0
        self._executor: ThreadPoolExecutor | None = None

    def of(self, threads: int) -> ThreadPoolExecutor:
        """As many as that, at least."""
        if self._executor is None or self._process != os.getpid() or self._threads < threads:
            self._process, self._threads = os.getpid(), threads
            self._executor = ThreadPoolExecutor(threads, thread_name_prefix="hashattn")
        return self._executor


_POOL = _Pool()


def share_out(run: Callable[[int, int], object], units: int, threads: int, microseconds: float) -> None:
    """Run all units, run(first, last) of them at a time, on several threads where they take long enough.

    Args:
        microseconds: that all of them take on one thread, about.
    """
    parts = min(threads, units, int(microseconds // _WORTH) + 1)
    if parts <= 1:
        run(0, units)
        return
    ends = [units * i // parts for i in range(parts + 1)]
    others = [_POOL.of(parts - 1).submit(run, *part) for part in pairwise(ends[1:])]
    try:
        run(ends[0], ends[1])
    finally:
        for other in others:
            other.result()
