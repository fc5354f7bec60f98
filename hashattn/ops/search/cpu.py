"""Search on the CPU: a few heads' distances are scanned, and searched while they are in the cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hashattn.ops.nearest.cpu import IntArray, Table, force, select, shift
from hashattn.ops.search.scan import Part, Scan
from hashattn.threads import thread_count

_WORTH_A_THREAD = 1 << 17  # keys from which a second thread pays: the interpreter changes hands at every call


def search(
    query: Tensor, codes: Tensor, counts: Table, spans: Table, *, shared: bool = False, sinks: int = 0,
    recents: int = 0, radius: int | None = None, threads: int | None = None,
) -> Tensor:  # fmt: skip
    """The keys that :func:`reference.search` finds, for tensors on the CPU.

    Heads of codes are independent. With several threads, and where there are many keys, the others scan ahead while
    this one selects: FAISS leaves the interpreter alone meanwhile, numpy's many short calls do not.

    Args:
        counts: [B][T], ascending numbers: how many keys a query wants, first of all and in all.
        spans: [B][T], (first, end): the columns that it sees.
        threads: at most this many; torch.get_num_threads() by default.

    Returns:
        int32 [B, heads, T, K], K the largest number of keys that a query keeps, at least 1.

    Raises:
        ValueError: threads below 1.
    """
    threads = thread_count(threads)
    scan, tokens = Scan.of(query, codes, spans, shared), query.shape[2]
    several = threads > 1 and codes.shape[2] >= _WORTH_A_THREAD and len(scan.parts) > 1
    found: list[tuple[Part, int, IntArray]] = []
    for part, distances in scan.ahead(threads) if several else scan.in_turn():
        for t, (first, end) in enumerate(spans[part.row]):
            if first >= end:
                continue
            rows: IntArray = distances[:, t::tokens, first - part.low : end - part.low].reshape(-1, end - first)
            if sinks or recents:
                rows = force(rows.copy() if tokens > 1 else rows, sinks, recents, -1)
            kept = None if radius is None else rows <= radius
            found.append((part, t, shift(select(rows, counts[part.row][t], kept, top=scan.top), first)))
    slots = max((columns.shape[1] for *_, columns in found), default=0)
    group = 1 if shared else query.shape[1] // codes.shape[1]
    ids = np.full((codes.shape[0], codes.shape[1], group, tokens, max(1, slots)), -1, np.int32)
    for part, t, columns in found:
        target = ids[part.row, part.heads, :, t, : columns.shape[1]]
        target[:] = columns.reshape(target.shape)
    return torch.from_numpy(ids.reshape(codes.shape[0], -1, tokens, ids.shape[-1]))
