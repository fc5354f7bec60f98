"""RaBitQ's estimate in Triton: the signs of a tile of keys times all queries of a group, in one product of matrices.

A query's whole numbers are two columns, their high and low bytes, which float16 holds; float32 sums of these are exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

LESS = tl.constexpr(0xBC00 - (1 << 16))  # -1 in float16, as an int16
SIGN = tl.constexpr(-(1 << 15))  # its sign
ONE_32 = tl.constexpr(0x3F800000)  # in float32


@triton.jit
def load(query, step, codes, columns, seen, first, WORDS: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, G):
    """(products float32 [TILE, PARTS] of signs and the bytes of a group's queries, norms, alignments).

    Args:
        codes: int32, 2 * WORDS of signs a key, then two float32.
    """
    HALVES: tl.constexpr = triton.next_power_of_2(2 * WORDS)
    at = codes + columns.to(tl.int64) * (2 * WORDS + 2)
    half = tl.arange(0, HALVES)
    x = tl.load(at[:, None] + half[None, :], mask=seen[:, None] & (half < 2 * WORDS)[None, :], other=0)
    sign = ((x[:, :, None] << (31 - tl.arange(0, 32))[None, None, :]) >> 16).to(tl.int16) & SIGN
    sign = tl.reshape((sign ^ LESS).to(tl.float16, bitcast=True), [columns.shape[0], HALVES * 32])
    dims, part = tl.arange(0, HALVES * 32), tl.arange(0, PARTS)
    inside = (dims < BITS)[:, None] & (part < 2 * G)[None, :]
    whole = tl.load(query + (part // 2)[None, :] * step + dims[:, None], mask=inside, other=0.0)
    high = tl.floor(whole * (1 / 256))
    byte = tl.where((part % 2 == 0)[None, :], high, whole - 256 * high).to(tl.float16)
    norm = tl.load(at + 2 * WORDS, mask=seen, other=0).to(tl.float32, bitcast=True)
    alignment = tl.load(at + 2 * WORDS + 1, mask=seen, other=ONE_32).to(tl.float32, bitcast=True)
    return tl.dot(sign, byte), norm, alignment


@triton.jit
def score(x, query, g, columns, first, WORDS: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr):
    """Negated estimates: float32."""
    products, norm, alignment = x
    part = tl.arange(0, PARTS)
    weight = tl.where(part == 2 * g, 256.0, tl.where(part == 2 * g + 1, 1.0, 0.0))
    total = tl.sum(products * weight[None, :], 1)
    unit, root = tl.load(query + BITS), tl.load(query + BITS + 1)
    return -(tl.math.div_rn(norm, alignment * root) * total) * unit
