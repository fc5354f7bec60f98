"""Estimate: logits of keys that are not read, from their codes and norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NORMS = torch.bfloat16  # two bytes that overflow where float32 does; it rounds far less than codes err by


@dataclass(frozen=True, eq=False)
class Estimate:
    """What a fused step estimates the q.k of medium keys from: q.c + a |q| |k - c| (1 - 2 differing / bits).

    The differing bits are those of the query's signs, its last plane (arXiv 2604.19351).

    Attributes:
        norms: bfloat16 [B, Hkv, room, 1], |k - c|; the room may be another than the keys'.
        centre: float32 [B, Hkv, D], c, contiguous.
        a: [1], scale of the estimate.
        bits: length of a code.
    """

    norms: Tensor
    centre: Tensor
    a: Tensor
    bits: int


def key_norms(k: Tensor, centre: Tensor | None) -> Tensor:
    """|k - c| of keys [B, Hkv, N, D] and a centre [B, Hkv, D], None for zero, as kept: bfloat16 [B, Hkv, N, 1]."""
    centred = k.float() if centre is None else k.float() - centre.unsqueeze(2)
    return centred.norm(dim=-1, keepdim=True).to(NORMS)
