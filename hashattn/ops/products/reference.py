"""Specification of negated inner products: summed in float64, where the order of summation does not show."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 8192  # vectors that are held in float64 at a time


def distances(query: Tensor, vectors: Tensor) -> Tensor:
    """Of queries [B, Hq, T, r] and vectors [B, H, N, r]: float32 [B, Hq, T, N].

    Products of 16-bit numbers are exact in float64, and so is their sum unless it spans more than 30 powers of two.
    """
    batch, q_heads, tokens, dim = query.shape
    grouped = query.reshape(batch, vectors.shape[1], -1, dim).double()  # [B, H, G*T, r]
    blocks = [-(grouped @ part.double().transpose(-1, -2)).float() for part in vectors.split(_BLOCK, 2)]
    return torch.cat(blocks, -1).view(batch, q_heads, tokens, vectors.shape[2])
