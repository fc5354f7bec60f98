"""Specification of exact top-k with its tie rule."""

from __future__ import annotations

import torch
from torch import Tensor

_FAR = 1 << 40  # beyond every distance; times 2^22 keys it still fits an int64


def within(distances: Tensor, radius: int) -> Tensor:
    """bool, the shape of distances: which are at most `radius`, however large that is."""
    if distances.is_floating_point():
        return distances <= float(min(radius, 1 << 126))
    return distances <= min(radius, torch.iinfo(distances.dtype).max)  # a larger scalar would wrap


def in_order(distances: Tensor) -> Tensor:
    """Integers in the order of the distances, of the same shape: int32 of floats, as float32, else what they are.

    What is not finite is as far, or for -inf as near, as a float32 can be, and NaN the farthest: it is there all the
    same, before what is hidden. Zeros are equal.
    """
    if not distances.is_floating_point():
        return distances
    most = torch.finfo(torch.float32).max
    score = distances.float().nan_to_num(nan=most, posinf=most, neginf=-most)
    bits = torch.where(score == 0, 0.0, score).contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def group_total(distances: Tensor, kv_heads: int) -> Tensor:
    """Distances [B, Hq, T, N] summed over the heads of each KV head, one after the other: [B, Hkv, T, N]."""
    first, *others = distances.unflatten(1, (kv_heads, -1)).unbind(2)
    total = first
    for one in others:
        total = total + one
    return total


def nearest(distances: Tensor, k: int, keep: Tensor, forced: Tensor | None = None) -> Tensor:
    """The k nearest keys of each row, nearest first, equal distances in order of recency (the larger column first).

    Args:
        distances: integers or floats [..., N]; see :func:`in_order`.
        k: slots; at most N are returned.
        keep: bool, broadcasts to [..., N]; keys that may be selected.
        forced: bool, broadcasts to [..., N]; keys ranked before every distance (where `keep` allows them).

    Returns:
        int32 [..., min(k, N)], -1 where a row has no further key.
    """
    keys = distances.shape[-1]
    k = min(k, keys)
    rank = in_order(distances).to(torch.int64)
    if forced is not None:
        rank = rank.masked_fill(forced, -_FAR)
    rank = rank.masked_fill(~keep, _FAR)
    age = torch.arange(keys - 1, -1, -1, device=distances.device)
    best = (rank * keys + age).topk(k, dim=-1, largest=False).values  # distinct integers: one order only
    ids = keys - 1 - torch.remainder(best, keys)
    return ids.masked_fill(best >= _FAR * keys, -1).to(torch.int32)
