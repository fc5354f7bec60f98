"""Page bounds in Triton: a page's bound is summed once, in float64, and given to its columns."""

from __future__ import annotations

import triton
import triton.language as tl

UNIT = tl.constexpr(1024.0)
MOST = tl.constexpr(131072.0)
DIMS = tl.constexpr(16)  # channels that are read at a time


@triton.jit
def load(query, step, codes, columns, seen, first, PAGE: tl.constexpr, DIM: tl.constexpr, PAGES: tl.constexpr, G):
    """Where the pages are, the number of each column's page, and the last one that is seen."""
    page = tl.maximum(columns - first, 0) // PAGE
    return codes, page, tl.max(tl.where(seen, page, 0), 0)


@triton.jit
def score(x, query, g, columns, first, PAGE: tl.constexpr, DIM: tl.constexpr, PAGES: tl.constexpr):
    """Negated bounds of the columns' pages, in whole units, rounded down: int32."""
    codes, page, last = x
    low = tl.min(page, 0)
    pages = low + tl.arange(0, PAGES)
    total = tl.zeros([PAGES], tl.float64)
    for d0 in tl.static_range(0, DIM, DIMS):
        dims = d0 + tl.arange(0, DIMS)
        inside = dims < DIM
        row = tl.load(query + dims, mask=inside, other=0.0)
        side = dims + tl.where(row >= 0, DIM, 0)
        at = pages.to(tl.int64)[:, None] * (2 * DIM) + side[None, :]
        bound = tl.load(codes + at, mask=(pages <= last)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(bound.to(tl.float32).to(tl.float64) * tl.abs(row).to(tl.float64)[None, :], 1)
    total = tl.where(total != total, -MOST, tl.minimum(tl.maximum(total, -MOST), MOST))
    return tl.gather(tl.floor(total * UNIT).to(tl.int32), page - low, 0)
