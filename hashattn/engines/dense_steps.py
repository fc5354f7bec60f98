"""Dense decode steps over a cache of fixed room whose length only the device knows, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.attend.dense import masked


def append(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> None:
    """Append n columns [B, Hkv, n, D] to keys and values [B, Hkv, room, D], and add n to length, int32 [1].

    What does not fit is dropped. No index is beyond the room, which on a GPU would end the process.
    """
    room = keys.shape[2]
    columns = length.long() + torch.arange(k.shape[2], device=k.device)
    to, fits = columns % room, (columns < room)[:, None]
    for new, held in ((k, keys), (v, values)):
        held.index_copy_(2, to, torch.where(fits, new, held.index_select(2, to)))
    length.add_(k.shape[2])


def attend(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor, length: Tensor, scale: float) -> Tensor:
    """Attention of the last T positions' queries [B, Hq, T, D] to all columns from starts, int32 [B], to their own.

    Columns that no query sees must be finite: KVCache.clear_unseen().

    Returns:
        [B, Hq, T, D], NaN where length is beyond the room.
    """
    tokens, room = q.shape[2], keys.shape[2]
    columns = torch.arange(room, device=q.device)
    ends = length - tokens + 1 + torch.arange(tokens, device=q.device)
    seen = (columns >= starts[:, None, None]) & (columns < ends[:, None])
    out = masked(q, keys, values, seen.unsqueeze(1), scale).out
    return out.masked_fill(length > room, torch.nan)
