"""Look-ups of byte codes in Triton: codes are read once for all queries of a group, in the widest words they fill.

A group's tables stay in the L1: their entries are loaded one by one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(query, step, codes, columns, seen, first, BYTES: tl.constexpr, M: tl.constexpr, C: tl.constexpr, G):
    """Words of the codes of these columns: a tuple of M / BYTES tensors of as many bytes."""
    x = ()
    for w in tl.static_range(M // BYTES):
        x += (tl.load(codes + columns.to(tl.int64) * (M // BYTES) + w, mask=seen, other=0),)
    return x


@triton.jit
def score(x, query, g, columns, first, BYTES: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    """Sums of the entries that the codes name in the tables [M, C] of a query: int32."""
    total = tl.zeros(columns.shape, tl.int32)
    for j in tl.static_range(M):
        number = (x[j // BYTES] >> (8 * (j % BYTES))).to(tl.int32) & (C - 1)
        total += tl.load(query + j * C + number)
    return total
