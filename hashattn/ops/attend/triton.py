"""Attention to given columns on a GPU: their slots are shared out, and the last program of a row joins the parts."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from hashattn.ops.decode.triton.codes import program_row
from hashattn.ops.decode.triton.rows import combine, group_of_heads, one_head, store_part, to_weights


@triton.jit
def any_column(ids, n):
    """Whether any of n slots is filled."""
    most = tl.full([], -1, tl.int32)
    for i0 in range(0, n, 1024):
        i = i0 + tl.arange(0, 1024)
        most = tl.maximum(most, tl.max(tl.load(ids + i, mask=i < n, other=-1), 0))
    return most >= 0


@triton.jit
def attend_ids(
    q, keys, values, ids, filled, length, parts, stats, arrived, out, lse, weights, scale, room, limit, slots, T,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SUM: tl.constexpr, PADDED: tl.constexpr, PADDED_OUT: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (slots / ROWS, HEADS * T, B). SUM query heads share each of HEADS choices of a sequence.

    Args:
        q, keys, values: [B, HEADS * SUM, T, DIM], [B, KV_HEADS, room, DIM].
        ids: int32 [B, HEADS, T, slots], columns, -1 in empty slots; slots up to a multiple of ROWS.
        filled: int32 [B, HEADS, T]: slots from this one on are empty; None if that is not known.
        length: int32 [1]: beyond `limit` the output is NaN; None for no limit.
        parts, stats, arrived: scratch; arrived int32 [B, HEADS, T] is zero before and after.
        out, lse: [B, HEADS * SUM, T, DIM] and float32 [B, HEADS * SUM, T], written.
        weights: float32 [B, HEADS * SUM, T, slots], written, softmax weights; None if nobody wants them.
    """
    s, row = tl.program_id(0), program_row()
    t, head = row % T, row // T  # of [B, HEADS]
    kv = head // HEADS * KV_HEADS + head % HEADS // (HEADS // KV_HEADS)
    if PDL:
        gdc_wait()
    n = slots
    if filled is not None:
        n = tl.load(filled + row)
    programs = tl.maximum(tl.cdiv(n, ROWS), 1)
    own, place = ids + row.to(tl.int64) * slots, s * ROWS + tl.arange(0, ROWS)
    logits, own_weights, apart = None, None, tl.full([], 1, tl.int64) * T * slots
    if weights is not None:
        own_weights = weights + (head.to(tl.int64) * SUM * T + t) * slots
        logits = own_weights + s * ROWS
        if s >= programs:
            for g in tl.static_range(SUM):
                tl.store(own_weights + g * apart + place, tl.zeros([ROWS], tl.float32))
    if s < programs:
        columns = tl.load(own + place, mask=place < n, other=-1)
        there = columns >= 0
        columns = tl.where(there, columns, 0)
        k_at, v_at = keys + kv.to(tl.int64) * room * DIM, values + kv.to(tl.int64) * room * DIM
        q_at = q + (head.to(tl.int64) * SUM * T + t) * DIM
        if SUM == 1:
            given = (q_at, k_at, v_at, columns, there, scale)
            peak, total, acc = one_head(*given, DIM, WIDTH, None, None, logits)
        else:
            given = (q_at, T * DIM, k_at, v_at, columns, there, scale)
            peak, total, acc = group_of_heads(*given, SUM, PADDED, DIM, WIDTH, None, None, logits, apart)
        part = row.to(tl.int64) * tl.cdiv(slots, ROWS)
        store_part(parts, stats, part + s, peak, total, acc, WIDTH, SUM, PADDED)
        tl.debug_barrier()
        if tl.atomic_add(arrived + row, 1, sem="acq_rel") == programs - 1:
            tl.store(arrived + row, 0)
            spoilt = False
            if length is not None:
                spoilt = tl.load(length) > limit
            kept = any_column(own, n)
            to = (out, lse, head * SUM * T + t, T)
            highest, whole = combine(parts, stats, part, programs, kept, spoilt, *to, DIM, WIDTH, SUM, PADDED_OUT, 16)
            if weights is not None:
                to_weights(own_weights, apart, programs * ROWS, highest, whole, kept, SUM, PADDED_OUT, 512)
