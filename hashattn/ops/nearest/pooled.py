"""The nearest keys of a group of heads, among those that any of them found."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.ops.hamming.reference import popcount


def nearest_of_pool(ids: Tensor, query: Tensor, codes: Tensor, kv_heads: int, k: int) -> Tensor:
    """Of the keys that the heads of a group found, the k of least summed distance, ties to the most recent.

    Args:
        ids: int32 [B, Hq, T, K], columns, -1 in empty slots.
        query: int64 [B, Hq, T, W] or planes [B, Hq, T, b, W].
        codes: int64 [B, H, N, W], H the KV heads or the query heads.
        kv_heads: Hkv; Hq / Hkv query heads are a group.
        k: slots.

    Returns:
        int32 [B, Hkv, T, min(k, G * K)], nearest first, -1 where a group found no more.
    """
    keys = codes.shape[2]
    pool = ids.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(3).long().sort(-1, descending=True).values
    twice = torch.zeros_like(pool, dtype=torch.bool)  # [B, Hkv, T, G * K]
    twice[..., 1:] = pool[..., 1:] == pool[..., :-1]
    empty = (pool < 0) | twice
    columns = pool.clamp(min=0).flatten(2).unsqueeze(-1).expand(-1, -1, -1, codes.shape[-1])
    own = codes.unflatten(1, (kv_heads, -1))  # [B, Hkv, 1 or G, N, W]
    planes = (query.unsqueeze(3) if query.ndim == 4 else query).unflatten(1, (kv_heads, -1))  # [B, Hkv, G, T, b, W]
    total = torch.zeros_like(pool)
    for g in range(planes.shape[2]):
        if g < own.shape[2]:
            held = own[:, :, g].gather(2, columns).view(*pool.shape, -1)  # [B, Hkv, T, G * K, W]
        for j in range(planes.shape[4]):
            total += popcount(held ^ planes[:, :, g, :, j].unsqueeze(3)).sum(-1) << j
    rank = (total * keys + keys - 1 - pool).masked_fill(empty, torch.iinfo(torch.int64).max)
    best = rank.sort(-1)
    near = pool.gather(-1, best.indices[..., :k])
    return near.masked_fill(empty.gather(-1, best.indices[..., :k]), -1).to(torch.int32)
