"""FlatRaBitQ: an unbiased estimate of the inner product with every key, from signs and two scalars."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hashattn.index.base import Index, Store
from hashattn.ops.hamming import words
from hashattn.ops.rabitq import reference as rabitq


@dataclass(frozen=True)
class FlatRaBitQ(Index):
    """Exhaustive scan of RaBitQ's codes (arXiv 2405.12497, equation 12) with queries of 15 bits and a sign a
    coordinate, where the paper rounds them to 4 bits.

    Distances are float32, the negated estimates of the inner product with the centred key: sums of whole numbers, the
    same in any order.
    """

    scores = "rabitq"

    def accepts(self, code: str) -> bool:
        return code == "rabitq"

    def new_store(self, capacity: int | None = None) -> Store:
        return Store(capacity)

    def distances(self, store: Store, query: Tensor, *, biased: bool = False, host: bool = False) -> Tensor:
        """float32 [B, Hq, T, N] from rotated queries [B, Hq, T, bits]."""
        codes = store.codes
        dim = query.shape[3]
        if not query.is_floating_point() or words(dim) + 1 != codes.shape[-1]:
            raise ValueError(
                f"query must hold rotated floats whose signs take {codes.shape[-1] - 1} words, as the keys' do, got "
                f"{query.dtype} of {dim} dimensions"
            )
        return rabitq.distances(rabitq.on_grid(query), codes)

    def packed(self, query: Tensor, kv_heads: int) -> Tensor:
        """Queries in whole numbers, float32 [B, Hq, T, 1, bits + 2]."""
        return rabitq.on_grid(query).unsqueeze(3).contiguous()
