"""Encodes the newest queries and keys of linear encoders and appends what belongs to the keys, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = tl.constexpr(32)  # dimensions that are multiplied at a time


@triton.jit
def project(x, centre, planes, BITS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CENTRED: tl.constexpr):
    """A vector [DIM], with CENTRED minus its centre, times planes [DIM, BITS]: [WIDTH], zero beyond BITS."""
    bits = tl.arange(0, WIDTH)
    sums = tl.zeros([TILE, WIDTH], tl.float32)
    for d0 in tl.static_range(0, DIM, TILE):
        dims = d0 + tl.arange(0, TILE)
        own = tl.load(x + dims, mask=dims < DIM, other=0.0).to(tl.float32)
        if CENTRED:
            own -= tl.load(centre + dims, mask=dims < DIM, other=0.0)
        at = dims[:, None] * BITS + bits[None, :]
        plane = tl.load(planes + at, mask=(dims < DIM)[:, None] & (bits < BITS)[None, :], other=0.0)
        sums += own[:, None] * plane
    return tl.sum(sums, 0)


@triton.jit
def pack(flags, to, WORDS: tl.constexpr):
    """Store flags [64 * WORDS] as int64 [WORDS]."""
    words = tl.reshape(flags.to(tl.int64), [WORDS, 64]) << tl.arange(0, 64).to(tl.int64)[None, :]
    tl.store(to + tl.arange(0, WORDS), tl.sum(words, 1))


@triton.jit
def encode_rows(
    q, k, v, centre, query_planes, key_planes, query, keys, values, codes, length, queries, T, room, code_room,
    DIM: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hq * T + B * Hkv * T): a program encodes a query, or a key that it appends.

    Args:
        q: [queries, DIM]; k, v: [B * Hkv, T, DIM]; centre: float32 [B * Hkv, DIM].
        query_planes, key_planes: float32 [DIM, BITS].
        query: int64 [queries, PLANES, WORDS], written.
        keys, values, codes: [B * Hkv, room, DIM], int64 [B * Hkv, code_room, WORDS]; the last T of `length` columns
            are written, those beyond the room are not.
    """
    row = tl.program_id(0)
    WIDTH: tl.constexpr = 64 * WORDS
    bits = tl.arange(0, WIDTH)
    if row < queries:
        p = project(q + row.to(tl.int64) * DIM, centre, query_planes, BITS, DIM, WIDTH, False)
        to = query + row.to(tl.int64) * PLANES * WORDS
        if PLANES == 1:
            pack((p >= 0) & (bits < BITS), to, WORDS)
        else:
            HALF: tl.constexpr = 1 << (PLANES - 1)
            size = tl.abs(p)
            steps = (tl.div_rn(size, tl.maximum(tl.max(size, 0), 1e-30)) * HALF).to(tl.int32)
            steps = tl.minimum(steps, HALF - 1)
            level = tl.where(p >= 0, HALF + steps, HALF - 1 - steps)
            for j in tl.static_range(PLANES):
                pack((((level >> j) & 1) != 0) & (bits < BITS), to + j * WORDS, WORDS)
    else:
        head = (row - queries) // T
        column = tl.load(length) - T + (row - queries) % T
        source = (row - queries).to(tl.int64) * DIM
        if (column < room) & (column < code_room):
            dims = tl.arange(0, PADDED)
            to = (head.to(tl.int64) * room + column) * DIM + dims
            tl.store(keys + to, tl.load(k + source + dims, mask=dims < DIM, other=0.0), mask=dims < DIM)
            tl.store(values + to, tl.load(v + source + dims, mask=dims < DIM, other=0.0), mask=dims < DIM)
            p = project(k + source, centre + head * DIM, key_planes, BITS, DIM, WIDTH, True)
            at = codes + (head.to(tl.int64) * code_room + column) * WORDS
            pack((p >= 0) & (bits < BITS), at, WORDS)


def encode(
    q: Tensor, k: Tensor, v: Tensor, centre: Tensor, planes: tuple[Tensor, Tensor], query_bits: int,
    keys: Tensor, values: Tensor, codes: Tensor, length: Tensor,
) -> Tensor:  # fmt: skip
    """Encode queries and new keys, append keys, values and codes, and add T to length.

    Args:
        q: [B, Hq, T, D]; k, v: [B, Hkv, T, D].
        centre: float32 [B, Hkv, D], contiguous, subtracted from the keys first.
        planes: float32 [D, bits], contiguous, of queries and of keys.
        query_bits: planes of a query.
        keys, values, codes: what is appended to, [B, Hkv, room, X]. Columns beyond the room are dropped.
        length: int32 [1], filled columns.

    Returns:
        int64 [B, Hq, T, query_bits, W], the packed queries.
    """
    batch, q_heads, tokens, dim = q.shape
    words, queries = codes.shape[3], batch * q_heads * tokens
    query = torch.empty((batch, q_heads, tokens, query_bits, words), dtype=torch.int64, device=q.device)
    length.add_(tokens)
    encode_rows[(queries + batch * k.shape[1] * tokens,)](
        q.contiguous(), k.contiguous(), v.contiguous(), centre, *planes, query, keys, values, codes, length, queries,
        tokens, keys.shape[2], codes.shape[2], DIM=dim, PADDED=triton.next_power_of_2(dim), BITS=planes[0].shape[1],
        WORDS=words, PLANES=query_bits, num_warps=4,
    )  # fmt: skip
    return query
