"""Exact top-k on the CPU: no two keys rank the same, so that one partition settles the cut and its ties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hashattn.core.types import Table

Mask = npt.NDArray[np.bool_]
IntArray = npt.NDArray[Any]

_COLUMNS = np.arange(1 << 14, dtype=np.int32)
_SAMPLE = 4096  # of more columns than four times this, a sample says which are worth a look


def nearest_columns(distances: IntArray, k: int, top: int | None = None) -> IntArray:
    """Columns of the k smallest integers of each row, ties to the largest column.

    Args:
        distances: integers [R, n].
        top: no magnitude is larger; None to look.

    Returns:
        integers [R, min(k, n)], ascending.
    """
    rows, n = distances.shape
    if k >= n:
        return np.broadcast_to(np.arange(n), (rows, n))
    if k <= 0:
        return np.empty((rows, 0), np.int64)
    if n > 4 * _SAMPLE:
        return np.stack([_nearest_of_many(row, k, top) for row in distances])
    return _nearest_of_few(distances, k, top)


def _nearest_of_few(distances: IntArray, k: int, top: int | None) -> IntArray:
    """nearest_columns() by ranks: integers in the order of the rule, distances and then age, whose low bits tell the
    column. Reading it there is quicker than looking for what lies below the cut, which no processor predicts."""
    n = distances.shape[-1]
    if top is None:
        top = max(int(distances.max()), -int(distances.min()))
    unit = 1 << (n - 1).bit_length()
    kind = np.int32 if (top + 1) * unit < 2**31 else np.int64
    ranks: IntArray = np.multiply(distances, unit, dtype=kind)
    np.subtract(ranks, _COLUMNS[:n] if n <= len(_COLUMNS) else np.arange(n, dtype=kind), out=ranks)
    ranks.partition(k - 1, axis=-1)
    columns: IntArray = -ranks[:, :k] & (unit - 1)
    columns.sort(axis=-1)
    return columns


def _nearest_of_many(row: IntArray, k: int, top: int | None) -> IntArray:
    """nearest_columns() of one long row: a sample bounds the cut, what lies below the bound is ranked."""
    sample = row[:: len(row) // _SAMPLE]
    place = k / len(row) * len(sample)
    while (rank := int(place + 3 * place**0.5 + 3)) < len(sample):  # about three standard deviations more than needed
        columns = (row <= np.partition(sample, rank)[rank]).nonzero()[0]
        if len(columns) >= k:
            break
        place *= 2
    else:
        columns = np.arange(len(row))
    return columns[_nearest_of_few(row[None, columns], k, top)[0]] if k < len(columns) else columns


def select(
    distances: IntArray, counts: Sequence[int], kept: Mask | None = None, ordered: bool = False, top: int | None = None
) -> IntArray:
    """Columns of the counts[-1] smallest of integers [R, n], the counts[0] smallest of these before the others.

    Args:
        kept: bool [R, n], columns that may be selected; None for all.
        ordered: nearest first; otherwise ascending within each part, which is quicker to make and to gather.
        top: no magnitude of a distance is larger; None to look.

    Returns:
        integers [R, K]; -1 where a row has no further column.
    """
    if kept is not None:
        found = []
        for row, mask in zip(distances, kept, strict=True):
            allowed = np.flatnonzero(mask)
            found.append(allowed[select(row[None, allowed], counts, ordered=ordered, top=top)[0]])
        padded = np.full((len(found), max(map(len, found), default=0)), -1)
        for r, some in enumerate(found):
            padded[r, : len(some)] = some
        return padded
    columns = nearest_columns(distances, counts[-1], top)
    if not ordered and (len(counts) == 1 or counts[0] >= columns.shape[1]):
        return columns
    near = np.take_along_axis(distances, columns, axis=-1)
    if ordered:
        order = np.lexsort((-columns, near), axis=-1)
    else:
        later = np.ones(near.shape, bool)
        np.put_along_axis(later, nearest_columns(near, counts[0], top), False, axis=-1)
        order = np.argsort(later, axis=-1, kind="stable")
    return np.take_along_axis(columns, order, axis=-1)


def nearest_visible(
    distances: Tensor, counts: Table, spans: Table, sinks: int, recents: int, kept: Tensor | None, ordered: bool = False
) -> Tensor:
    """What :func:`reference.nearest` keeps, for integers and forced keys that are ranges.

    Args:
        distances: integers [B, H, T, N].
        counts: [B][T], ascending numbers: how many keys a query wants, first of all and in all.
        spans: [B][T], (first, end): the columns that it sees.
        sinks, recents: this many first and last visible keys are ranked before every distance.
        kept: bool, broadcasts to [B, H, T, N]; visible keys that may be selected, beside the forced ones.
        ordered: nearest first; see :func:`select`.

    Returns:
        int32 [B, H, T, K] with K the largest count, -1 where a row has no further key.
    """
    batch, heads, tokens, _ = distances.shape
    ids = empty_slots(batch, heads, tokens, counts)
    mask = None if kept is None else kept.expand_as(distances).numpy()
    for b, t in np.ndindex(batch, tokens):
        first, end = spans[b][t]
        if first < end:
            rows, allowed = distances.numpy()[b, :, t, first:end], None if mask is None else mask[b, :, t, first:end]
            if sinks or recents:
                rows = force(rows.astype(np.int64), sinks, recents, int(rows.min()) - 1)
                allowed = None if allowed is None else force(allowed.copy(), sinks, recents, True)
            columns = select(rows, counts[b][t], allowed, ordered=ordered)
            ids[b, :, t, : columns.shape[1]] = shift(columns, first)
    return torch.from_numpy(ids)


def empty_slots(batch: int, heads: int, tokens: int, counts: Table) -> IntArray:
    """int32 [B, H, T, K] of -1, K the largest count."""
    return np.full((batch, heads, tokens, max(1, max(c[-1] for row in counts for c in row))), -1, np.int32)


def shift(columns: IntArray, first: int) -> IntArray:
    """Columns of a span as columns of the cache, where it begins at `first`; -1 stays."""
    return columns if first == 0 else np.where(columns < 0, columns, columns + first)


def force(rows: IntArray, sinks: int, recents: int, value: int) -> IntArray:
    """Write a value to the first and the last columns of rows [R, n], in place."""
    rows[:, :sinks] = value
    rows[:, max(0, rows.shape[1] - recents) :] = value
    return rows
