"""Specification of the search over packed codes: distances, then the nearest keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hashattn.ops.hamming.reference import distances
from hashattn.ops.nearest.reference import nearest, within
from hashattn.ops.search.ranking import Ranking


def search(query: Tensor, codes: Tensor, counts: Sequence[Tensor], slots: int, visible: Tensor, by: Ranking) -> Tensor:
    """The nearest visible keys of packed queries.

    Args:
        query: int64 [B, Hq, T, W], one bit plane; or [B, Hq, T, b, W], b planes, the least significant first.
        codes: int64 [B, Hc, N, W] with Hq a multiple of Hc.
        counts: int64 [B, T] each, ascending: how many keys a query wants, first of all and in all; never fewer than
            its forced keys.
        slots: no count is larger.
        visible: int64 [B, T, 2], each query's [first, end) columns.
        by: how they are ranked.

    Returns:
        int32 [B, Hc if by.shared else Hq, T, slots]: each row's counts[0] nearest keys before the others, ties to the
        most recent, in any order within these parts; -1 where a row has no further key.
    """
    found = distances(query, codes, biased=by.biased)
    if by.shared:
        found = found.unflatten(1, (codes.shape[1], -1)).sum(2)
    return nearest_of(found, counts, slots, visible, by)


def nearest_of(found: Tensor, counts: Sequence[Tensor], slots: int, visible: Tensor, by: Ranking) -> Tensor:
    """The same of distances [B, H, T, N], one row a choice."""
    columns, first, end = torch.arange(found.shape[3], device=found.device), visible[..., :1], visible[..., 1:]
    keep = ((columns >= first) & (columns < end)).unsqueeze(1)
    forced = ((columns < first + by.sinks) | (columns >= end - by.recents)).unsqueeze(1) & keep
    if by.radius is not None:
        keep = keep & (within(found, by.radius) | forced)
    ids = nearest(found, slots, keep, forced)
    ids = torch.nn.functional.pad(ids, (0, slots - ids.shape[-1]), value=-1)
    slot = torch.arange(slots, device=ids.device)
    return ids.masked_fill(slot >= counts[-1][:, None, :, None], -1)
