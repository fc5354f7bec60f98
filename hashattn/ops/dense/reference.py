"""Dense steps over a cache of fixed room whose length only the device knows, in plain PyTorch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
        [B, Hq, T, D]; zeros for queries that see nothing, NaN where length is beyond the room.
    """
    (batch, q_heads, tokens, dim), (kv_heads, room) = q.shape, keys.shape[1:3]
    group = q_heads // kv_heads
    columns = torch.arange(room, device=q.device)
    ends = length - tokens + 1 + torch.arange(tokens, device=q.device)
    seen = (columns >= starts[:, None, None]) & (columns < ends[:, None])  # [B, T, room]
    mask = seen.repeat(1, group, 1).unsqueeze(1)  # [B, 1, G * T, room]
    folded = q.reshape(batch, kv_heads, group * tokens, dim)
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    out = out.masked_fill(~mask.any(-1, keepdim=True), 0)
    return out.view(q.shape).masked_fill(length > room, torch.nan)
