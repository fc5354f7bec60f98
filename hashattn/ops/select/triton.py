"""Scores become ranks, and the nearest keys of each row are chosen exactly: two kernels for every family.

A rank is an int32 in the order of the specification: least for forced keys, largest for keys that may not be chosen.
The first kernel counts the ranks of each chunk in bins that lie about the last step's threshold. The second lists the
keys up to the threshold's bin in column order, and a row's last program chooses among these by three digits of their
ranks. Where bins lie changes no result: the last one holds all that the others do not.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hashattn.ops.decode.triton.codes import program_row, span
from hashattn.ops.decode.triton.topk import LOW, budget, cut_at, totals

MOST = tl.constexpr(3.4028234663852886e38)  # of a float32
FIRST, NEVER = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)
WIDEST = tl.constexpr(26)  # bits of a rank that a bin does not tell apart, at most: then the bins hold all ranks
CENTRE = tl.constexpr(40)  # the bin in which the next threshold is expected


@triton.jit
def in_order(score):
    """Ranks of distances, int32 in their order; what is not finite is the farthest, or the nearest, of the finite."""
    if score.dtype.is_floating():
        x = tl.where(score != score, MOST, tl.minimum(tl.maximum(score, -MOST), MOST))
        bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
        rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    else:
        rank = tl.minimum(tl.maximum(score, FIRST + 1), NEVER - 1)
    return rank


@triton.jit
def read_hint(state, row, rows):
    """(the rank at which the first bin ends, shift of a bin's width); zeros at first, and then all ranks are held."""
    base = tl.load(state + row) ^ FIRST
    return base, tl.minimum(tl.maximum(-tl.load(state + rows + row) + WIDEST, 0), WIDEST)


@triton.jit
def bin_of(rank, base, shift, BINS: tl.constexpr):
    """The bin of ranks, int32."""
    beyond = (rank - base).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
    return tl.where(rank < base, 0, tl.minimum(beyond, BINS - 1).to(tl.int32))


@triton.jit
def scan(
    query, codes, ranks, counts, state, starts, length, sinks, recents, radius, stride, of_query, limit, chunks, rows,
    kv_heads, T, LOAD: tl.constexpr, SCORE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    G: tl.constexpr, SUM: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BINS: tl.constexpr, RADIUS: tl.constexpr, CAUSAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, Hkv * T, B). A row is one choice: a head's, or a KV head's (SUM = G).

    Args:
        query: [B, Hq, T, ...], `of_query` elements a query.
        codes: `stride` elements a KV head.
        ranks: int32 [rows, limit], written for columns that are seen.
        counts: uint16 [rows, BINS, chunks], written: keys of a chunk that may be chosen, up to each bin.
        state: int32 [2, rows], hints.
        starts, length: int32 [B] and [1]; limit: columns that keys and codes have room for.
        LOAD, SCORE, A, B, C: of a family; see :class:`hashattn.ops.select.family.Scores`.
        PADDED: G / SUM up to a power of two.
    """
    if PDL:
        gdc_wait()
    chunk, at = tl.program_id(0), program_row()
    t, kv = at % T, at // T
    first, end = span(starts, length, limit, kv // kv_heads, t, T, CAUSAL)
    HEADS: tl.constexpr = G // SUM
    own = codes + kv.to(tl.int64) * stride
    step = T * of_query
    queries = query + (kv.to(tl.int64) * G * T + t) * of_query
    lane, bins = tl.arange(0, PADDED), tl.arange(0, BINS)
    sums = tl.zeros([PADDED, BINS], tl.int32)
    low = tl.maximum(chunk * CHUNK, first // TILE * TILE)
    for t0 in range(low, tl.minimum(chunk * CHUNK + CHUNK, end), TILE):
        columns = t0 + tl.arange(0, TILE)
        seen = (columns >= first) & (columns < end)
        forced = (columns < first + sinks) | (columns >= end - recents)
        x = LOAD(queries, step, own, columns, seen, first, A, B, C, G)
        for s in tl.static_range(HEADS):
            score = SCORE(x, queries + s * SUM * step, s * SUM, columns, first, A, B, C)
            for g in tl.static_range(1, SUM):  # in the order of the heads
                score += SCORE(x, queries + (s * SUM + g) * step, s * SUM + g, columns, first, A, B, C)
            rank = in_order(score)
            if RADIUS:
                rank = tl.where(score <= radius, rank, NEVER)
            rank = tl.where(forced, FIRST, rank)
            row = (kv * HEADS + s) * T + t
            tl.store(ranks + row.to(tl.int64) * limit + columns, rank, mask=seen)
            base, shift = read_hint(state, row, rows)
            held = tl.histogram(bin_of(rank, base, shift, BINS), BINS, mask=seen & (rank != NEVER))
            sums += tl.where((lane == s)[:, None], held[None, :], 0)
    upto = tl.cumsum(sums, 1)
    row = (kv * HEADS + lane) * T + t
    to = counts + (row.to(tl.int64)[:, None] * BINS + bins[None, :]) * chunks + chunk
    tl.store(to, upto.to(tl.uint16), mask=(lane < HEADS)[:, None])
    if PDL:
        gdc_launch_dependents()


@triton.jit
def next_digit(ranks, listed, n, rank, need, TILE: tl.constexpr, HIGH: tl.constexpr, STOP: tl.constexpr):
    """One more digit of the need-th nearest rank that begins as `rank` does: bits HIGH to STOP.

    Returns the rank with it, which key is wanted of those that begin like this, and how many these are.
    """
    DIGITS: tl.constexpr = 1 << (HIGH - STOP)
    places, digits = tl.arange(0, TILE), tl.arange(0, DIGITS)
    held = tl.zeros([DIGITS], tl.int32)
    for i0 in range(0, n, TILE):
        there = i0 + places < n
        column = tl.load(listed + i0 + places, mask=there, other=0)
        x = tl.load(ranks + column, mask=there, other=0).to(tl.int64) - FIRST
        alike = there & ((x >> HIGH) == (rank >> HIGH))
        held += tl.histogram(((x >> STOP) & (DIGITS - 1)).to(tl.int32), DIGITS, mask=alike)
    upto = tl.cumsum(held, 0)
    digit = tl.minimum(tl.sum((upto < need).to(tl.int32), 0), DIGITS - 1)
    equal = tl.sum(tl.where(digits == digit, held, 0), 0)
    need -= tl.sum(tl.where(digits == digit, upto, 0), 0) - equal
    return rank + (digit.to(tl.int64) << STOP), need, equal


@triton.jit
def threshold(ranks, listed, n, wanted, TILE: tl.constexpr):
    """(rank of the wanted-th nearest of n listed keys, int64 from 0 on; how many of the oldest at it are too many)."""
    rank, need, _ = next_digit(ranks, listed, n, tl.zeros([], tl.int64), wanted, TILE, 32, 21)
    rank, need, _ = next_digit(ranks, listed, n, rank, need, TILE, 21, 10)
    rank, need, equal = next_digit(ranks, listed, n, rank, need, TILE, 10, 0)
    return rank, equal - need


@triton.jit
def list_chosen(ids, ranks, listed, n, rank, dropped, wanted, slots, TILE: tl.constexpr):
    """Write the columns of the keys up to a rank, but for the oldest that are too many, in order; then -1."""
    places = tl.arange(0, TILE)
    state = tl.zeros([1], tl.int64)
    for i0 in range(0, n, TILE):
        there = i0 + places < n
        column = tl.load(listed + i0 + places, mask=there, other=0)
        x = tl.load(ranks + column, mask=there, other=0).to(tl.int64) - FIRST
        near, tie = there & (x < rank), there & (x == rank)
        hit = (tie.to(tl.int64) << 32) + near.to(tl.int64)
        order = tl.cumsum(hit, 0) + state
        ties = (order >> 32).to(tl.int32)
        to = (order & LOW).to(tl.int32) + tl.maximum(ties - dropped, 0) - 1
        tl.store(ids + to, column, mask=(near | (tie & (ties > dropped))) & (to < wanted))
        state += tl.sum(hit, 0)
    for i0 in range(0, slots, TILE):
        free = (i0 + places >= wanted) & (i0 + places < slots)
        tl.store(ids + i0 + places, tl.full([TILE], -1, tl.int32), mask=free)


@triton.jit
def choose(
    ranks, counts, state, listed, ids, filled, starts, length, share, k, least, limit, chunks, segment, slots, rows,
    kv_heads, T, HEADS: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, SHARE: tl.constexpr,
    CAUSAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (segments, Hkv * HEADS * T, B).

    Args:
        ranks, counts, starts, length, limit: see scan.
        state: int32 [3, rows]: hints, rewritten for the next step, and zeros before and after.
        listed: int32 [rows, limit], scratch.
        ids: int32 [rows, slots], written: columns in ascending order, then -1.
        filled: int32 [rows], written: how many columns there are.
        share: of the visible keys, the bits of a float64, with SHARE; else k keys are wanted; `least` at least.
        segment: chunks of a program.
    """
    TILE: tl.constexpr = 2048
    part, row = tl.program_id(0), program_row()
    t, kv = row % T, row // T // HEADS
    first, end = span(starts, length, limit, kv // kv_heads, t, T, CAUSAL)
    wanted = budget(end - first, k, share, least, SHARE)
    if PDL:
        gdc_wait()
    own = counts + row.to(tl.int64) * BINS * chunks
    running = totals(own, chunks, BINS, 2048 // BINS)
    wanted = tl.minimum(wanted, tl.max(running, 0))
    bin, n = cut_at(running, wanted, BINS)
    before = tl.sum(tl.where(tl.arange(0, BINS) == bin - 1, running, 0), 0)
    base, shift = read_hint(state, row, rows)
    begin = part * segment
    at = 0
    for c0 in range(0, begin, 1024):
        c = c0 + tl.arange(0, 1024)
        at += tl.sum(tl.load(own + bin * chunks + c, mask=c < begin, other=0).to(tl.int32), 0)
    own_ranks, own_list = ranks + row.to(tl.int64) * limit, listed + row.to(tl.int64) * limit
    for c in range(tl.maximum(begin, first // CHUNK), tl.minimum(begin + segment, tl.cdiv(end, CHUNK))):
        columns = c * CHUNK + tl.arange(0, CHUNK)
        rank = tl.load(own_ranks + columns, mask=(columns >= first) & (columns < end), other=NEVER)
        hit = ((rank != NEVER) & (bin_of(rank, base, shift, BINS) <= bin)).to(tl.int32)
        tl.store(own_list + at + tl.cumsum(hit, 0) - 1, columns, mask=hit != 0)
        at += tl.sum(hit, 0)
    tl.debug_barrier()
    if PDL:
        gdc_launch_dependents()
    if tl.atomic_add(state + 2 * rows + row, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(state + 2 * rows + row, 0)
        tl.store(filled + row, wanted)
        rank, dropped = threshold(own_ranks, own_list, n, wanted, TILE)
        own_ids = ids + row.to(tl.int64) * slots
        list_chosen(own_ids, own_ranks, own_list, n, rank, dropped, wanted, slots, TILE)
        if wanted > 0:
            tight = n - before  # keys of the threshold's bin: so many are looked at that need not be
            wide = tl.where(tight * 8 > wanted, -1, tl.where(tight * 64 < wanted, 1, 0))
            wide = tl.where(bin == BINS - 1, 2, wide)
            next_shift = tl.minimum(tl.maximum(shift + wide, 0), WIDEST)
            next_base = tl.maximum(rank + FIRST - (tl.full([], CENTRE, tl.int64) << next_shift.to(tl.int64)), FIRST)
            tl.store(state + row, next_base.to(tl.int32) ^ FIRST)
            tl.store(state + rows + row, -next_shift + WIDEST)
