"""FlatPQ: every key's product is looked up in a query's tables."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hashattn.index.base import Index, Store
from hashattn.ops.adc import reference as adc


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
        return adc.distances(adc.in_units(query), codes)

    def packed(self, query: Tensor, kv_heads: int) -> Tensor:
        """Tables in whole units, int32 [B, Hq, T, m, C]."""
        return adc.in_units(query)
