"""FlatDot: exact inner products with every key."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hashattn.index.base import Index, Store
from hashattn.ops.products import reference as products


@dataclass(frozen=True)
class FlatDot(Index):
    """Exhaustive inner products over float vectors, the oracle's index: it reads as much as dense attention does.

    Distances are float32 negated products, summed in float64.
    """

    scores = "dot"

    def accepts(self, code: str) -> bool:
        return code == "vector"

    def new_store(self, capacity: int | None = None) -> Store:
        return Store(capacity)

    def distances(self, store: Store, query: Tensor, *, biased: bool = False, host: bool = False) -> Tensor:
        """float32 [B, Hq, T, N] from queries [B, Hq, T, D]."""
        return products.distances(query, store.codes)

    def packed(self, query: Tensor, kv_heads: int) -> Tensor:
        """Queries as float32 [B, Hq, T, 1, r]."""
        return query.float().unsqueeze(3).contiguous()
