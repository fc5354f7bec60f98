"""Specification of RaBitQ's estimate: sums of whole numbers, the same in any order, then two float32 products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BLOCK = 4096  # keys whose signs are unpacked at a time, D floats each: they stay in a cache


def on_grid(query: Tensor) -> Tensor:
    """Rotated queries [B, Hq, T, bits] as whole numbers, their unit, a power of two, and the root of their bits.

    A query's largest coordinate takes 15 bits (fewer from 1,024 bits on), so that no sum leaves float32's 24.

    Returns:
        float32 [B, Hq, T, bits + 2].
    """
    bits = query.shape[-1]
    digits = min(15, 24 - (bits - 1).bit_length())
    _, exponent = torch.frexp(query.float().abs().amax(-1, keepdim=True))
    unit = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - digits)
    root = torch.full_like(unit, math.sqrt(bits))
    return torch.cat([(query.float() / unit).round(), unit, root], -1)


def distances(query: Tensor, codes: Tensor) -> Tensor:
    """Negated estimates of the product with the centred key, float32 [B, Hq, T, N].

    -(norm / (alignment * root) * total) * unit, where total is the sum of a query's whole numbers under a key's signs.

    Args:
        query: from :func:`on_grid`.
        codes: int64 [B, H, N, W + 1].
    """
    batch, q_heads, tokens, dim = *query.shape[:3], query.shape[3] - 2
    whole, unit, root = query.split([dim, 1, 1], -1)
    grouped = whole.reshape(batch, codes.shape[1], -1, dim)  # [B, H, G*T, D]
    norm, alignment = codes[..., -1:].contiguous().view(torch.float32).unbind(-1)  # [B, H, N]
    factor = norm / (alignment * root[0, 0, 0])
    blocks = [grouped @ signs(block, dim).transpose(-1, -2) for block in codes[..., :-1].split(_BLOCK, 2)]
    total = torch.cat(blocks, -1)
    return (-(factor.unsqueeze(2) * total)).view(batch, q_heads, tokens, codes.shape[2]) * unit


def signs(codes: Tensor, dim: int) -> Tensor:
    """Packed signs int64 [..., W] as float32 -1 and 1, [..., dim]."""
    shifts = torch.arange(8, device=codes.device)
    table = ((torch.arange(256, device=codes.device).unsqueeze(1) >> shifts) & 1).float() * 2 - 1  # a byte's signs
    octets = codes.contiguous().view(torch.uint8)
    return table.index_select(0, octets.flatten().int()).view(*octets.shape[:-1], -1)[..., :dim]
