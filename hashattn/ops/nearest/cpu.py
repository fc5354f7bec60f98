"""Exact top-k on the CPU: one integer a key, numpy's vectorised partition."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def nearest_visible(
    distances: Tensor, k: int, visible: Tensor, *, sinks: int = 0, recents: int = 0, kept: Tensor | None = None
) -> Tensor:
    """What :func:`reference.nearest` returns, for integers and forced keys that are ranges.

    Args:
        distances: integers [B, H, T, N].
        k: slots.
        visible: int64 [B, T, 2], each query's [first, end) columns.
        sinks, recents: this many first and last visible keys are ranked before every distance.
        kept: bool, broadcasts to [B, H, T, N]; visible keys that may be selected, beside the forced ones.

    Returns:
        int32 [B, H, T, min(k, N)], nearest first, ties to the most recent, -1 where a row has no further key.
    """
    batch, _, tokens, keys = distances.shape
    d, k = distances.numpy(), min(k, keys)
    low, high = int(d.min()), int(d.max())
    hidden = high - low + 2
    kind: type[np.int32] | type[np.int64] = np.int32 if (hidden + 1) * keys < 2**31 else np.int64
    age = np.arange(keys - 1, -1, -1, dtype=kind)
    rank: npt.NDArray[Any] = (d - (low - 1)).astype(kind, copy=False)
    np.multiply(rank, keys, out=rank)
    np.add(rank, age, out=rank)
    if kept is not None:
        np.copyto(rank, hidden * keys + age, where=np.logical_not(kept.numpy()))
    for b in range(batch):
        for t in range(tokens):
            first, end = visible[b, t].tolist()
            first, end = max(0, min(first, keys)), max(0, end)
            row = rank[b, :, t]
            row[:, first : min(end, first + sinks)] = age[first : min(end, first + sinks)]
            last = max(first, end - recents)
            row[:, last:end] = age[last:end]
            row[:, :first] = hidden * keys
            row[:, max(first, end) :] = hidden * keys
    best = np.partition(rank, k - 1, axis=-1)[..., :k] if k < keys else rank
    best = np.sort(best, axis=-1)
    ids = keys - 1 - best % keys
    return torch.from_numpy(np.where(best >= hidden * keys, -1, ids).astype(np.int32))
