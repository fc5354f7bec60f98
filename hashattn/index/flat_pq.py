"""FlatPQ: every key's product is looked up in a query's tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.index.base import Index, Store


@dataclass(frozen=True)
class FlatPQ(Index):
    """Exhaustive asymmetric distance computation over PQ codes (Jégou et al. 2011): one byte a sub-quantiser and key.

    Distances are float32 estimates of the negated inner product; equal ones come in no promised order.
    """

    def accepts(self, code: str) -> bool:
        return code == "pq"

    def new_store(self, capacity: int | None = None) -> Store:
        return Store(capacity)

    def distances(self, store: Store, query: Tensor, *, biased: bool = False, engine: str = "reference") -> Tensor:
        """float32 [B, Hq, T, N] from tables [B, Hq, T, m, C]."""
        codes = store.codes  # uint8 [B, H, N, m]
        if query.ndim != 5 or query.shape[3] != codes.shape[-1]:
            raise ValueError(
                f"query must hold tables [B, Hq, T, m, C] for {codes.shape[-1]} sub-quantisers, got {[*query.shape]}"
            )
        batch, heads, keys, m = codes.shape
        tables = query.reshape(batch, heads, -1, *query.shape[3:])  # [B, H, G*T, m, C]
        total = torch.zeros(*tables.shape[:3], keys, device=query.device)
        for j in range(m):
            numbers = codes[:, :, None, :, j].long().expand(-1, -1, tables.shape[2], -1)
            total += tables[..., j, :].gather(-1, numbers)
        return total.view(*query.shape[:3], keys)
