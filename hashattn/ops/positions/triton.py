"""The columns that are kept for their position, in one small kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hashattn.ops.decode.triton.codes import program_row, span


@triton.jit
def list_forced(
    ids, filled, starts, length, sinks, recents, limit, slots, kv_heads, T, HEADS: tl.constexpr, TILE: tl.constexpr,
    CAUSAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (slots / TILE, Hkv * HEADS * T, B). The first `sinks` and the last `recents` columns that a query sees.

    Args:
        ids: int32 [rows, slots], written: columns in ascending order, then -1.
        filled: int32 [rows], written: how many columns there are.
        starts, length: int32 [B] and [1]; limit: columns that keys have room for.
    """
    row = program_row()
    t, kv = row % T, row // T // HEADS
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    first, end = span(starts, length, limit, kv // kv_heads, t, T, CAUSAL)
    n = tl.minimum(end - first, sinks + recents)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.where(at < sinks, first + at, end - n + at)
    tl.store(ids + row.to(tl.int64) * slots + at, tl.where(at < n, column, -1), mask=at < slots)
    tl.store(filled + row, n)
