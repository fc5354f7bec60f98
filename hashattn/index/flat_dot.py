"""FlatDot: exact inner products with every key."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hashattn.index.base import Index, Store


@dataclass(frozen=True)
class FlatDot(Index):
    """Exhaustive inner products over float vectors, the oracle's index: it reads as much as dense attention does.

    Distances are float32 negated products; equal ones come in no promised order.
    """

    scores = "dot"

    def accepts(self, code: str) -> bool:
        return code == "vector"

    def new_store(self, capacity: int | None = None) -> Store:
        return Store(capacity)

    def distances(self, store: Store, query: Tensor, *, biased: bool = False, host: bool = False) -> Tensor:
        """float32 [B, Hq, T, N] from queries [B, Hq, T, D]."""
        codes = store.codes
        batch, q_heads, tokens, dim = query.shape
        grouped = query.reshape(batch, codes.shape[1], -1, dim).float()  # [B, H, G*T, D]
        return -(grouped @ codes.float().transpose(-1, -2)).view(batch, q_heads, tokens, codes.shape[2])
