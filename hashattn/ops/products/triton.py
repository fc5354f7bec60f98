"""Negated inner products in Triton: vectors are read once for all queries of a group, and summed in float64."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(query, step, codes, columns, seen, first, DIM: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, G):
    """Vectors of these columns, [TILE, WIDTH]."""
    dims = tl.arange(0, WIDTH)
    at = columns.to(tl.int64)[:, None] * DIM + dims[None, :]
    return tl.load(codes + at, mask=seen[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def score(x, query, g, columns, first, DIM: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr):
    """Negated products with a float32 query: float32."""
    dims = tl.arange(0, WIDTH)
    row = tl.load(query + dims, mask=dims < DIM, other=0.0).to(tl.float64)
    return (-tl.sum(x.to(tl.float32).to(tl.float64) * row[None, :], 1)).to(tl.float32)
