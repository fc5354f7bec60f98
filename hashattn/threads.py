"""How many threads a step may use."""

from __future__ import annotations

import torch


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
