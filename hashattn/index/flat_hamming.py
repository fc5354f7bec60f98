"""FlatHamming: every packed code is compared with every query."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hashattn.index.base import Index, Store
from hashattn.ops import hamming


@dataclass(frozen=True)
class FlatHamming(Index):
    """Exhaustive Hamming scan over packed int64 words: 8 * ceil(bits / 64) bytes a key, 8 to 4096 bits.

    Distances are integers: the Hamming distance for a query of one bit plane, the 2^j-weighted sum of the planes'
    Hamming distances for a query of several. The scan is linear in the number of keys at every token.
    """

    scores = "hamming"

    flat_codes = True

    def accepts(self, code: str) -> bool:
        return code == "binary"

    def new_store(self, capacity: int | None = None) -> Store:
        return Store(capacity)

    def distances(self, store: Store, query: Tensor, *, biased: bool = False, host: bool = False) -> Tensor:
        """int32 [B, Hq, T, N] from query codes int64 [B, Hq, T, W] or planes [B, Hq, T, b, W]."""
        if query.is_floating_point() or query.shape[-1] != store.codes.shape[-1]:
            raise ValueError(
                f"query must hold int64 codes of {store.codes.shape[-1]} words, as the keys do, got {query.dtype} of "
                f"{query.shape[-1]} words"
            )
        return hamming.distances(query, store.codes, biased=biased, host=host)
