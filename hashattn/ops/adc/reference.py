"""Specification of distances that are sums of table entries: integers, the same in any order of summation."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 1024  # of a product, in what distances are counted
MOST = 1 << 17  # no estimate is larger, so that sums over a group fit an int32


def in_units(tables: Tensor) -> Tensor:
    """Tables float [B, Hq, T, m, C] in whole units of 1/1024, each entry rounded: int32."""
    most = MOST / tables.shape[3]
    return (tables.clamp(-most, most) * UNIT).round().to(torch.int32).contiguous()


def distances(tables: Tensor, codes: Tensor) -> Tensor:
    """Sums of the entries that codes uint8 [B, H, N, m] name in tables int32 [B, Hq, T, m, C]: int32 [B, Hq, T, N]."""
    batch, heads, keys, m = codes.shape
    grouped = tables.reshape(batch, heads, -1, *tables.shape[3:])  # [B, H, G*T, m, C]
    total = torch.zeros(*grouped.shape[:3], keys, dtype=torch.int32, device=tables.device)
    for j in range(m):
        numbers = codes[:, :, None, :, j].long().expand(-1, -1, grouped.shape[2], -1)
        total += grouped[..., j, :].gather(-1, numbers)
    return total.view(*tables.shape[:3], keys)
