"""Channels: products over each query's largest channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.core.checks import keep_ints
from hashattn.index.base import Index, Store
from hashattn.ops.products import reference as products


@dataclass(frozen=True)
class Channels(Index):
    """Partial inner products over the channels where a query is largest: SparQ (Ribar et al. 2023, arXiv 2312.04985).

    Distances are float32 negated products, summed in float64. Takes vectors and keeps them a second
    time, as the paper does to lay channels side by side. Here PyTorch multiplies whole vectors with zeros: the choice
    of keys is SparQ's, the bytes it saves want a kernel.

    Args:
        channels: r, of head_dim; the paper takes 16 to 64 of 128.
        per: "kv_head" for the r channels of largest sum of |q| over the heads of a group, as in the paper;
            "query_head" for each head's own.
    """

    scores = "channels"

    channels: int = 32
    per: str = "kv_head"

    def __post_init__(self) -> None:
        keep_ints(self, channels=1)
        if self.per not in ("query_head", "kv_head"):
            raise ValueError(f'per must be "query_head" or "kv_head", got {self.per!r}')

    def accepts(self, code: str) -> bool:
        return code == "vector"

    def new_store(self, capacity: int | None = None) -> Store:
        return Store(capacity)

    def distances(self, store: Store, query: Tensor, *, biased: bool = False, host: bool = False) -> Tensor:
        """float32 [B, Hq, T, N] from queries [B, Hq, T, D].

        Raises:
            ValueError: more channels than D.
        """
        return products.distances(self._largest(query, store.codes.shape[1]), store.codes)

    def packed(self, query: Tensor, kv_heads: int) -> Tensor:
        """Queries as float32 [B, Hq, T, 1, D], zero in all but their largest channels."""
        return self._largest(query, kv_heads).unsqueeze(3).contiguous()

    def _largest(self, query: Tensor, kv_heads: int) -> Tensor:
        if self.channels > query.shape[-1]:
            raise ValueError(f"channels must be at most head_dim = {query.shape[-1]}, got {self.channels}")
        size = query.float().unflatten(1, (kv_heads, -1)).abs()  # [B, H, G, T, D]
        if self.per == "kv_head":
            size = size.sum(2, keepdim=True).expand_as(size)
        largest = size.topk(self.channels, dim=-1).indices
        kept = torch.zeros_like(size).scatter_(-1, largest, 1.0).flatten(1, 2)
        return query.float() * kept
