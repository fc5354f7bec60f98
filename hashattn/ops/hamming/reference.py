"""Specification of bit packing and Hamming distance, in plain PyTorch; runs on any device.

Bit i of a code is bit i % 64 of int64 word i // 64 (little-endian, so that the bytes of a code are what FAISS and
numpy.packbits(bitorder="little") expect). Bits beyond the code's length are zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def words(bits: int) -> int:
    """int64 words that hold `bits` bits."""
    return -(-bits // 64)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack bool [..., L] into int64 [..., ceil(L / 64)]."""
    length = bits.shape[-1]
    padded = F.pad(bits.to(torch.uint8), (0, 64 * words(length) - length))
    weights = (1 << torch.arange(8, device=bits.device)).to(torch.uint8)  # made there: a graph may capture it
    octets = (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int64)


def query_planes(projection: Tensor, query_bits: int) -> Tensor:
    """Pack projected queries [..., bits] into one plane [..., W] or several [..., b, W].

    With b > 1 every value is rounded to one of 2^b levels, symmetric about zero, whose scale is the largest
    magnitude of that query; plane j holds bit j of the level, so the last plane holds the signs.
    """
    positive = projection >= 0
    if query_bits == 1:
        return pack_bits(positive)
    half = 1 << (query_bits - 1)
    size = projection.float().abs()
    scale = size.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    steps = (size / scale * half).nan_to_num(0.0).to(torch.uint8).clamp(max=half - 1)  # whole steps from zero
    levels = torch.where(positive, half + steps, (half - 1) - steps)
    shifts = torch.arange(query_bits, dtype=torch.uint8, device=projection.device).unsqueeze(-1)  # [b, 1]
    return pack_bits(((levels.unsqueeze(-2) >> shifts) & 1).bool())


def unpack_bits(codes: Tensor, length: int) -> Tensor:
    """Unpack int64 [..., W] into bool [..., length]; the inverse of :func:`pack_bits`."""
    shifts = torch.arange(64, device=codes.device)
    return ((codes.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :length].bool()


def popcount(x: Tensor) -> Tensor:
    """Set bits of each int64 word, int64 of the same shape. PyTorch has no popcount: SWAR, 12 operations."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101) >> 56


def differing(a: Tensor, b: Tensor) -> Tensor:
    """Differing bits of int64 codes [..., W], broadcast against each other: int64 [...]."""
    return popcount(a ^ b).sum(-1)


def distances(query: Tensor, codes: Tensor, *, biased: bool = False) -> Tensor:
    """Distance of every query to every key of its head.

    Args:
        query: int64 [B, Hq, T, W], one bit plane; or [B, Hq, T, b, W], b planes, the least significant first.
        codes: int64 [B, H, N, W] with Hq a multiple of H; query head i is scored against head i // (Hq / H).

        biased: the last byte of a key's code is a number to add to the Hamming distance of the other bits; the
            query's is zero.

    Returns:
        int32 [B, Hq, T, N]: the Hamming distance, or the 2^j-weighted sum of the planes' Hamming distances.
    """
    if biased:
        signs = codes.clone()
        signs[..., -1] &= (1 << 56) - 1
        bias = ((codes[..., -1] >> 56) & 0xFF).to(torch.int32)  # [B, H, N]
        group = query.shape[1] // codes.shape[1]
        return distances(query, signs) + bias.repeat_interleave(group, dim=1).unsqueeze(2)
    planes = query.unsqueeze(-2) if query.ndim == 4 else query
    batch, q_heads, tokens, n_planes, n_words = planes.shape
    grouped = planes.reshape(batch, codes.shape[1], -1, 1, n_planes, n_words)  # [B, H, G*T, 1, b, W]
    total = torch.zeros((), dtype=torch.int64, device=codes.device)
    for j in range(n_planes):
        for w in range(n_words):
            total = total + (popcount(grouped[..., j, w] ^ codes[:, :, None, :, w]) << j)
    return total.to(torch.int32).view(batch, q_heads, tokens, codes.shape[2])
