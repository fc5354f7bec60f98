"""How many threads a step may use."""

from __future__ import annotations

import torch

from hashattn.core.checks import check_int


def thread_count(threads: int | None = None) -> int:
    """This many threads; torch.get_num_threads() if None.

    Raises:
        ValueError: not a number of threads.
    """
    if threads is None:
        return torch.get_num_threads()
    return check_int("threads", threads, 1)
