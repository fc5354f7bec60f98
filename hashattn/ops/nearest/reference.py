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


def nearest(distances: Tensor, k: int, keep: Tensor, forced: Tensor | None = None) -> Tensor:
    """The k nearest keys of each row, nearest first, equal distances in order of recency (the larger column first).

    Args:
        distances: integers [..., N]; or floats, for which equal distances come in no promised order.
        k: slots; at most N are returned.
        keep: bool, broadcasts to [..., N]; keys that may be selected.
        forced: bool, broadcasts to [..., N]; keys ranked before every distance (where `keep` allows them).

    Returns:
        int32 [..., min(k, N)], -1 where a row has no further key.
    """
    keys = distances.shape[-1]
    k = min(k, keys)
    if distances.is_floating_point():
        most = torch.finfo(torch.float32).max  # what is not finite is there all the same, before what is hidden
        score = distances.float().nan_to_num(nan=most, posinf=most, neginf=-most)
        if forced is not None:
            score = score.masked_fill(forced, -torch.inf)
        score = score.masked_fill(~keep, torch.inf)
        values, ids = score.topk(k, dim=-1, largest=False)
        return ids.masked_fill(values == torch.inf, -1).to(torch.int32)
    rank = distances.to(torch.int64)
    if forced is not None:
        rank = rank.masked_fill(forced, -_FAR)
    rank = rank.masked_fill(~keep, _FAR)
    age = torch.arange(keys - 1, -1, -1, device=distances.device)
    best = (rank * keys + age).topk(k, dim=-1, largest=False).values  # distinct integers: one order only
    ids = keys - 1 - torch.remainder(best, keys)
    return ids.masked_fill(best >= _FAR * keys, -1).to(torch.int32)
