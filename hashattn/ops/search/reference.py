"""Specification of the search over packed codes: distances, then the nearest keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hashattn.ops.hamming.reference import distances
from hashattn.ops.nearest.reference import nearest, within


def search(
    query: Tensor, codes: Tensor, counts: Sequence[Tensor], slots: int, visible: Tensor, *, shared: bool = False,
    sinks: int = 0, recents: int = 0, radius: int | None = None, biased: bool = False,
) -> Tensor:  # fmt: skip
    """The nearest visible keys of packed queries.

    Args:
        query: int64 [B, Hq, T, W], one bit plane; or [B, Hq, T, b, W], b planes, the least significant first.
        codes: int64 [B, Hc, N, W] with Hq a multiple of Hc.
        counts: int64 [B, T] each, ascending: how many keys a query wants, first of all and in all; never fewer than
            its forced keys.
        slots: no count is larger.
        visible: int64 [B, T, 2], each query's [first, end) columns.
        shared: the query heads of each head of codes make one choice, by the sum of their distances.
        sinks, recents: this many first and last visible keys are ranked before every distance.
        radius: the largest distance (or sum) of a key that is not forced; None for any.
        biased: whether the last byte of a code is a number to add; see :func:`hashattn.ops.hamming.distances`.

    Returns:
        int32 [B, Hc if shared else Hq, T, slots]: each row's counts[0] nearest keys before the others, ties to the
        most recent, in any order within these parts; -1 where a row has no further key.
    """
    found = distances(query, codes, biased=biased)
    if shared:
        found = found.unflatten(1, (codes.shape[1], -1)).sum(2)
    columns, first, end = torch.arange(codes.shape[2], device=codes.device), visible[..., :1], visible[..., 1:]
    keep = ((columns >= first) & (columns < end)).unsqueeze(1)
    forced = ((columns < first + sinks) | (columns >= end - recents)).unsqueeze(1) & keep
    if radius is not None:
        keep = keep & (within(found, radius) | forced)
    ids = nearest(found, slots, keep, forced)
    ids = torch.nn.functional.pad(ids, (0, slots - ids.shape[-1]), value=-1)
    slot = torch.arange(slots, device=ids.device)
    return ids.masked_fill(slot >= counts[-1][:, None, :, None], -1)
