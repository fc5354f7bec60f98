"""FlatRaBitQ: an unbiased estimate of the inner product with every key, from signs and two scalars."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.index.base import Index, Store
from hashattn.ops.hamming import words

_BLOCK = 4096  # keys whose signs are unpacked at a time, D floats each: they stay in a cache


@dataclass(frozen=True)
class FlatRaBitQ(Index):
    """Exhaustive scan of RaBitQ's codes with queries in float (arXiv 2405.12497, equation 12; the paper rounds queries
    to 4 bits).

    Distances are float32, the negated estimates of the inner product with the centred key; equal ones come in no
    promised order.
    """

    scores = "rabitq"

    def accepts(self, code: str) -> bool:
        return code == "rabitq"

    def new_store(self, capacity: int | None = None) -> Store:
        return Store(capacity)

    def distances(self, store: Store, query: Tensor, *, biased: bool = False, host: bool = False) -> Tensor:
        """float32 [B, Hq, T, N] from rotated queries [B, Hq, T, bits]."""
        codes = store.codes
        batch, q_heads, tokens, dim = query.shape
        if not query.is_floating_point() or words(dim) + 1 != codes.shape[-1]:
            raise ValueError(
                f"query must hold rotated floats whose signs take {codes.shape[-1] - 1} words, as the keys' do, got "
                f"{query.dtype} of {dim} dimensions"
            )
        grouped = query.reshape(batch, codes.shape[1], -1, dim).float()  # [B, H, G*T, D]
        norm, alignment = codes[..., -1:].contiguous().view(torch.float32).unbind(-1)  # [B, H, N]
        factor = (norm / (alignment * math.sqrt(dim))).unsqueeze(2)
        blocks = [grouped @ signs(block, dim).transpose(-1, -2) for block in codes[..., :-1].split(_BLOCK, 2)]
        return (-factor * torch.cat(blocks, -1)).view(batch, q_heads, tokens, codes.shape[2])


def signs(codes: Tensor, dim: int) -> Tensor:
    """Packed signs int64 [..., W] as float32 -1 and 1, [..., dim]."""
    shifts = torch.arange(8, device=codes.device)
    table = ((torch.arange(256, device=codes.device).unsqueeze(1) >> shifts) & 1).float() * 2 - 1  # a byte's signs
    octets = codes.contiguous().view(torch.uint8)
    return table.index_select(0, octets.flatten().int()).view(*octets.shape[:-1], -1)[..., :dim]
