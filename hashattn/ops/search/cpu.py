"""Search on the CPU: a few heads' distances are scanned, and searched while they are in the cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hashattn.core.types import Table
from hashattn.ops.nearest.cpu import IntArray, force, select, shift
from hashattn.ops.search.ranking import Ranking
from hashattn.ops.search.scan import scanned


def search(query: Tensor, codes: Tensor, counts: Table, spans: Table, by: Ranking) -> Tensor:
    """The keys that :func:`reference.search` finds, for tensors on the CPU.

    Args:
        counts: [B][T], ascending numbers: how many keys a query wants, first of all and in all.
        spans: [B][T], (first, end): the columns that it sees.

    Returns:
        int32 [B, heads, T, K], K the largest number of keys that a query keeps, at least 1.
    """
    (batch, heads, _, words), (_, q_heads, tokens) = codes.shape, query.shape[:3]
    group, planes = q_heads // heads, query.shape[3] if query.ndim == 5 else 1
    top = (64 * words * ((1 << planes) - 1) + 255 * by.biased) * (group if by.shared else 1)  # no distance is larger
    found: list[tuple[int, slice, int, IntArray]] = []
    for b, part, low, distances in scanned(query, codes, spans, by.shared, by.biased):
        for t, (first, end) in enumerate(spans[b]):
            if first >= end:
                continue
            rows: IntArray = distances[:, t::tokens, first - low : end - low].reshape(-1, end - first)
            if by.sinks or by.recents:
                rows = force(rows.copy() if tokens > 1 else rows, by.sinks, by.recents, -1)
            kept = None if by.radius is None else rows <= min(by.radius, top)
            found.append((b, part, t, shift(select(rows, counts[b][t], kept, top=top), first)))
    slots = max((columns.shape[1] for *_, columns in found), default=1)
    ids = np.full((batch, heads, 1 if by.shared else group, tokens, max(1, slots)), -1, np.int32)
    for b, part, t, columns in found:
        target = ids[b, part, :, t, : columns.shape[1]]
        target[:] = columns.reshape(target.shape)
    return torch.from_numpy(ids.reshape(batch, -1, tokens, ids.shape[-1]))
