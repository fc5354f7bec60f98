"""FlatBuckets: in how many rounds of hashing do a query and a key fall into different buckets?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.index.base import Index, Store


@dataclass(frozen=True)
class FlatBuckets(Index):
    """Exhaustive comparison of bucket numbers, a byte a round, in packed int64 words.

    Distances are integers, 0 (the same bucket in every round) to the number of rounds, so that ties are many: they go
    to the most recent key.
    """

    scores = "buckets"

    def accepts(self, code: str) -> bool:
        return code == "buckets"

    def new_store(self, capacity: int | None = None) -> Store:
        return Store(capacity)

    def distances(self, store: Store, query: Tensor, *, biased: bool = False, host: bool = False) -> Tensor:
        """int32 [B, Hq, T, N] from buckets of queries, int64 [B, Hq, T, W]."""
        codes = store.codes
        if query.dtype != torch.int64 or query.ndim != 4 or query.shape[-1] != codes.shape[-1]:
            raise ValueError(
                f"query must hold int64 codes of {codes.shape[-1]} words, as the keys do, got {query.dtype} of "
                f"{query.shape[-1]} words"
            )
        batch, q_heads, tokens, _ = query.shape
        grouped = query.reshape(batch, codes.shape[1], -1, query.shape[-1]).view(torch.uint8)  # [B, H, G*T, 8 * W]
        held = codes.contiguous().view(torch.uint8)
        total = torch.zeros(*grouped.shape[:3], codes.shape[2], dtype=torch.int32, device=codes.device)
        for i in range(held.shape[-1]):  # bytes beyond the last round are zero in both
            total += grouped[..., i, None] != held[:, :, None, :, i]
        return total.view(batch, q_heads, tokens, codes.shape[2])
