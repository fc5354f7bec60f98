"""Estimate: logits of keys that are not read, from their codes and norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NORMS = torch.bfloat16  # two bytes that overflow where float32 does; it rounds far less than codes err by


@dataclass(frozen=True, eq=False)
class Residual:
    """What is added to the agreement of two codes: out . relu(query @ h_q + bias + key @ h_k) + out_bias.

    Attributes:
        query, key: float32 [hidden, bits], contiguous, for sign vectors in +-1; bias: [hidden].
        out: [hidden]; out_bias: [1].
    """

    query: Tensor
    bias: Tensor
    key: Tensor
    out: Tensor
    out_bias: Tensor

    def __call__(self, h_q: Tensor, h_k: Tensor) -> Tensor:
        """[..., bits] and [..., bits], which broadcast, to [...]."""
        hidden = torch.relu(h_q @ self.query.T + self.bias + h_k @ self.key.T)
        return hidden @ self.out + self.out_bias


@dataclass(frozen=True, eq=False)
class Estimate:
    """What a fused step estimates the q.k of medium keys from: q.c + a |q| |k - c| (1 - 2 differing / bits).

    The differing bits are those of the query's signs, its last plane (arXiv 2604.19351).

    Attributes:
        norms: bfloat16 [B, Hkv, room, 1], |k - c|; the room may be another than the keys'.
        centre: float32 [B, Hkv, D], c, contiguous.
        a: [1], scale of the estimate.
        bits: length of a code.
        residual: of the two codes, added to 1 - 2 differing / bits; None for none. No kernels on a GPU serve one.
    """

    norms: Tensor
    centre: Tensor
    a: Tensor
    bits: int
    residual: Residual | None = None


def key_norms(k: Tensor, centre: Tensor | None) -> Tensor:
    """|k - c| of keys [B, Hkv, N, D] and a centre [B, Hkv, D], None for zero, as kept: bfloat16 [B, Hkv, N, 1]."""
    centred = k.float() if centre is None else k.float() - centre.unsqueeze(2)
    return centred.norm(dim=-1, keepdim=True).to(NORMS)
