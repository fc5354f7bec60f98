"""Page bounds in Triton: pages are read once for all queries of a group, and a bound is given to its page's columns.

Sums are in float64, as the specification's: the order of summation does not show there.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNIT = tl.constexpr(1024.0)
MOST = tl.constexpr(131072.0)


@triton.jit
def load(query, step, codes, columns, seen, first, PAGE: tl.constexpr, DIM: tl.constexpr, PAGES: tl.constexpr, G):
    """(least of k, of -k, [PAGES, WIDTH]; which of these pages each column is of)."""
    page = tl.maximum(columns - first, 0) // PAGE
    low, last = tl.min(page, 0), tl.max(tl.where(seen, page, 0), 0)
    pages, dims = low + tl.arange(0, PAGES), tl.arange(0, triton.next_power_of_2(DIM))
    at = codes + pages.to(tl.int64)[:, None] * (2 * DIM) + dims[None, :]
    inside = (pages <= last)[:, None] & (dims < DIM)[None, :]
    return tl.load(at, mask=inside, other=0.0), tl.load(at + DIM, mask=inside, other=0.0), page - low


@triton.jit
def score(x, query, g, columns, first, PAGE: tl.constexpr, DIM: tl.constexpr, PAGES: tl.constexpr):
    """Negated bounds of the columns' pages, in whole units, rounded down: int32."""
    of_k, of_less, page = x
    of_k, of_less = of_k.to(tl.float32).to(tl.float64), of_less.to(tl.float32).to(tl.float64)
    dims = tl.arange(0, triton.next_power_of_2(DIM))
    row = tl.load(query + dims, mask=dims < DIM, other=0.0)[None, :]
    total = tl.sum(tl.where(row >= 0, of_less, of_k) * tl.abs(row).to(tl.float64), 1)
    total = tl.where(total != total, -MOST, tl.minimum(tl.maximum(total, -MOST), MOST))
    return tl.gather(tl.floor(total * UNIT).to(tl.int32), page, 0)
