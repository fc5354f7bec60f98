"""KeyBias: how much a key matters whatever the query, written into its code."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BITS = 8
NEUTRAL = 128


class KeyBias(nn.Module):
    """A scalar for each key, from a small MLP with one set of weights for each head, in units of one bit.

    Signs lose the norms of keys, and that some keys matter to every query. The rounded scalar is kept as a number in
    the last byte of a code, 0 for the nearest and 255 for the farthest key, and added to the Hamming distance of the
    other bits, so that distances stay integers.

    Args:
        heads: of the codes, Hkv as a rule.
        dim: head dimension.
        seed: of the initial weights; the bias starts at zero.
    """

    HIDDEN = 32
    REACH = 8.0  # a unit of the MLP in bits: Adam moves all weights alike, and a bias reaches tens of bits

    def __init__(self, heads: int, dim: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(1, dim, self.HIDDEN, generator=generator) * math.sqrt(2 / dim)
        self.weight = nn.Parameter(start.repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, 1, self.HIDDEN))
        self.out = nn.Parameter(torch.zeros(heads, self.HIDDEN, 1))
        self.shift = nn.Parameter(torch.zeros(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Centred keys [B, heads, N, D] -> their bias, in bits, float32 [B, heads, N]; larger is nearer."""
        batch, heads, keys = x.shape[:3]
        rows = x.transpose(0, 1).reshape(heads, batch * keys, -1)
        hidden = torch.relu(torch.baddbmm(self.bias, rows, self.weight))
        return self.REACH * torch.baddbmm(self.shift, hidden, self.out).view(heads, batch, keys).transpose(0, 1)

    def relaxed(self, x: Tensor, hard: bool) -> Tensor:
        """The bias within its range; rounded, with a straight-through gradient, if hard."""
        soft = self(x).clamp(NEUTRAL - 255, NEUTRAL)
        return soft + (soft.round() - soft).detach() if hard else soft

    def penalties(self, x: Tensor) -> Tensor:
        """What a key's byte holds: int64 [B, heads, N], 0 to 255."""
        return self(x).round_().neg_().add_(NEUTRAL).nan_to_num_(NEUTRAL).clamp_(0, 255).long()


def write_bias(codes: Tensor, penalties: Tensor | int) -> Tensor:
    """Write penalties [B, H, N] to the last byte of codes int64 [B, H, N, W], which is zero; returns the codes."""
    codes[..., -1].bitwise_or_(penalties << 56)
    return codes


def check_bias(bits: int, query_bits: int, bias_bits: int) -> None:
    """Raise ValueError unless the last byte of such codes can hold a bias."""
    if bias_bits not in (0, BITS):
        raise ValueError(f"bias_bits must be 0 or {BITS}, got {bias_bits!r}")
    if bias_bits and bits % 64:
        raise ValueError(
            f"bias_bits={bias_bits} takes the last byte of a word: bits must be a multiple of 64, got {bits}"
        )
    if bias_bits and query_bits > 1:
        raise ValueError(f"bias_bits={bias_bits} needs query_bits=1, got {query_bits}: planes have no common unit")
