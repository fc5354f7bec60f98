"""How many threads a step may use, and work that is done ahead in them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")


def thread_count(threads: int | None = None) -> int:
    """This many threads; torch.get_num_threads() if None.

    Raises:
        ValueError: not a number of threads.
    """
    if threads is None:
        return torch.get_num_threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be an int of at least 1, got {threads!r}")
    return threads


def ahead(call: Callable[[int], T], pieces: int, threads: int) -> Iterator[T]:
    """call(0), call(1), ... in order, computed by threads - 1 others while the caller works on earlier ones.

    At most `threads` results wait, beside the one that the caller has.
    """
    waiting: deque[Future[T]] = deque()
    try:
        for i in range(pieces):
            waiting.append(_pool(threads - 1, os.getpid()).submit(call, i))
            if len(waiting) > threads - 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for job in waiting:  # after an error nothing may write to buffers any more
            job.cancel()
        for job in waiting:
            if not job.cancelled():
                job.exception()


@lru_cache(maxsize=1)
def _pool(workers: int, process: int) -> ThreadPoolExecutor:  # threads do not outlive a fork
    return ThreadPoolExecutor(workers, thread_name_prefix="hashattn")
