"""FlatPQ: every key's product is looked up in a query's tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.index.base import Index, Store

UNIT = 1024  # of a product, in what distances are counted
_MOST = 1 << 17  # no estimate is larger, so that sums over a group fit an int32


@dataclass(frozen=True)
class FlatPQ(Index):
    """Exhaustive asymmetric distance computation over PQ codes (Jégou et al. 2011): one byte a sub-quantiser and key.

    Distances are estimates of the negated inner product in whole units of 1/1024, each table's entry rounded: int32,
    so that keys of equal codes tie, and the more recent are nearer.
    """

    scores = "pq"

    def accepts(self, code: str) -> bool:
        return code == "pq"

    def new_store(self, capacity: int | None = None) -> Store:
        return Store(capacity)

    def distances(self, store: Store, query: Tensor, *, biased: bool = False, host: bool = False) -> Tensor:
        """int32 [B, Hq, T, N] from tables [B, Hq, T, m, C]."""
        codes = store.codes  # uint8 [B, H, N, m]
        if query.ndim != 5 or query.shape[3] != codes.shape[-1]:
            raise ValueError(
                f"query must hold tables [B, Hq, T, m, C] for {codes.shape[-1]} sub-quantisers, got {[*query.shape]}"
            )
        batch, heads, keys, m = codes.shape
        units = (query.clamp(-_MOST / m, _MOST / m) * UNIT).round().to(torch.int32)
        tables = units.reshape(batch, heads, -1, *query.shape[3:])  # [B, H, G*T, m, C]
        total = torch.zeros(*tables.shape[:3], keys, dtype=torch.int32, device=query.device)
        for j in range(m):
            numbers = codes[:, :, None, :, j].long().expand(-1, -1, tables.shape[2], -1)
            total += tables[..., j, :].gather(-1, numbers)
        return total.view(*query.shape[:3], keys)
