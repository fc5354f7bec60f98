"""Scores become ranks, and the nearest keys of each row are chosen exactly: two kernels for every family.

A rank is an int32 in the order of the specification: least for forced keys, largest for keys that may not be chosen.
The first kernel counts the ranks of each chunk in bins about the last step's threshold, a quarter as wide as they are
far from it, so that the threshold of quite another query still shares its bin with few keys. The second lists the keys
up to the threshold's bin in column order, and a row's last program chooses among these by digits of their ranks. Where
bins lie changes no result.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hashattn.ops.decode.triton.codes import program_row, span
from hashattn.ops.decode.triton.topk import LOW, budget, cut_at, totals

MOST = tl.constexpr(3.4028234663852886e38)  # of a float32
FIRST, NEVER = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)
WIDEST = tl.constexpr(22)  # bits of a rank that the narrowest bin does not tell apart, at most
DIGIT, DIGITS = tl.constexpr(11), tl.constexpr(1 << 11)  # bits of a rank that are told apart at a time


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
    """(the rank about which bins lie, bits of the width of the narrowest); at first zero, and as wide as can be."""
    return tl.load(state + row), tl.minimum(tl.maximum(-tl.load(state + rows + row) + WIDEST, 0), WIDEST)


@triton.jit
def exponent(x):
    """floor(log2 x) of positive int32."""
    return (x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def bin_of(rank, centre, shift, BINS: tl.constexpr):
    """The bin of ranks, int32: on each side four of 2**shift, then four for every doubling of the distance."""
    farther = (rank - centre).to(tl.uint32, bitcast=True)  # wraps
    nearer = tl.where(rank < centre, -1, 0)
    away = (farther ^ nearer.to(tl.uint32, bitcast=True)) >> shift.to(tl.uint32)
    most: tl.constexpr = (4 << (BINS // 8)) - 5
    away = tl.minimum(away, most).to(tl.int32) + 4
    step = (away.to(tl.float32).to(tl.int32, bitcast=True) >> 21) - 516  # an exponent, and two bits of a fraction
    return BINS // 2 + (step ^ nearer)


@triton.jit
def within_bin(bin, centre, shift, BINS: tl.constexpr):
    """(the least rank of a bin, int64; bits of what its ranks differ in); the outermost ones hold all beyond."""
    nearer = bin < BINS // 2
    step = tl.where(nearer, BINS // 2 - 1 - bin, bin - BINS // 2)
    bits = step >> 2
    away = (((step & 3) + 4) << bits) - 4
    away = tl.where(nearer, -away - (1 << bits), away).to(tl.int64) << shift.to(tl.int64)
    low = tl.where(bin == 0, FIRST, centre.to(tl.int64) + away)
    return low, tl.where(step == BINS // 2 - 1, 32, bits + shift)


@triton.jit
def scan(
    query, codes, ranks, counts, state, starts, length, sinks, recents, radius, stride, of_query, limit, chunks, rows,
    kv_heads, T, LOAD: tl.constexpr, SCORE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    G: tl.constexpr, SUM: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
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
    low = tl.maximum(chunk * CHUNK, first // TILE * TILE)
    here = low + tl.arange(0, TILE)
    x = LOAD(queries, step, own, here, (here >= first) & (here < end), first, A, B, C, G)
    for t0 in range(low, tl.minimum(chunk * CHUNK + CHUNK, end), TILE):
        columns = t0 + tl.arange(0, TILE)
        seen = (columns >= first) & (columns < end)
        forced = (columns < first + sinks) | (columns >= end - recents)
        ahead = columns + TILE  # asked for while this tile is scored
        after = (ahead >= first) & (ahead < tl.minimum(end, chunk * CHUNK + CHUNK))
        x_ahead = LOAD(queries, step, own, ahead, after, first, A, B, C, G)
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
        x = x_ahead
    tl.debug_barrier()  # other threads stored the ranks
    columns, bins = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, BINS)
    for s in tl.static_range(HEADS):
        row = (kv * HEADS + s) * T + t
        seen = (columns >= first) & (columns < end)
        rank = tl.load(ranks + row.to(tl.int64) * limit + columns, mask=seen, other=NEVER)
        held = tl.histogram(bin_of(rank, *read_hint(state, row, rows), BINS), BINS, mask=rank != NEVER)
        to = counts + (row.to(tl.int64) * BINS + bins) * chunks + chunk
        tl.store(to, tl.cumsum(held, 0).to(tl.uint16))
    if PDL:
        gdc_launch_dependents()


@triton.jit
def next_digit(listed, n, low, high, stop, need, TILE: tl.constexpr):
    """One more digit of the need-th nearest of the ranks from `low` on that differ in `high` bits: down to bit `stop`.

    Returns the least rank that shares it, which key is wanted of those that do, and how many these are.
    """
    places, digits = tl.arange(0, TILE), tl.arange(0, DIGITS)
    held = tl.zeros([DIGITS], tl.int32)
    for i0 in range(0, n, TILE):
        there = i0 + places < n
        x = (tl.load(listed + i0 + places, mask=there, other=0) >> 32) - low
        alike = there & ((x >> high.to(tl.int64)) == 0)
        held += tl.histogram(((x >> stop.to(tl.int64)) & (DIGITS - 1)).to(tl.int32), DIGITS, mask=alike)
    upto = tl.cumsum(held, 0)
    digit = tl.minimum(tl.sum((upto < need).to(tl.int32), 0), DIGITS - 1)
    equal = tl.sum(tl.where(digits == digit, held, 0), 0)
    need -= tl.sum(tl.where(digits == digit, upto, 0), 0) - equal
    return low + (digit.to(tl.int64) << stop.to(tl.int64)), need, equal


@triton.jit
def threshold(listed, n, low, high, need, equal, TILE: tl.constexpr):
    """(least rank of those that end the choice, int64; the least that is not of them; how many of the oldest of them
    are too many), from the bin that they are in: of `equal` keys in it `need` are wanted."""
    while (high > 0) & (need < equal):
        stop = tl.maximum(high - DIGIT, 0)
        low, need, equal = next_digit(listed, n, low, high, stop, need, TILE)
        high = stop
    return low, low + (tl.full([], 1, tl.int64) << high.to(tl.int64)), equal - need


@triton.jit
def list_chosen(ids, listed, n, low, above, dropped, wanted, slots, TILE: tl.constexpr):
    """Write the columns of keys of ranks below `above`, but for the oldest from `low` on that are too many; then -1."""
    places = tl.arange(0, TILE)
    state = tl.zeros([1], tl.int64)
    for i0 in range(0, n, TILE):
        there = i0 + places < n
        entry = tl.load(listed + i0 + places, mask=there, other=0)
        x = entry >> 32
        near, tie = there & (x < low), there & (x >= low) & (x < above)
        hit = (tie.to(tl.int64) << 32) + near.to(tl.int64)
        order = tl.cumsum(hit, 0) + state
        ties = (order >> 32).to(tl.int32)
        to = (order & LOW).to(tl.int32) + tl.maximum(ties - dropped, 0) - 1
        column = (entry & LOW).to(tl.int32)
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
        listed: int64 [rows, limit], scratch: ranks << 32, plus columns.
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
    centre, shift = read_hint(state, row, rows)
    begin = part * segment
    at = 0
    for c0 in range(0, begin, 1024):
        c = c0 + tl.arange(0, 1024)
        at += tl.sum(tl.load(own + bin * chunks + c, mask=c < begin, other=0).to(tl.int32), 0)
    own_ranks, own_list = ranks + row.to(tl.int64) * limit, listed + row.to(tl.int64) * limit
    for c in range(tl.maximum(begin, first // CHUNK), tl.minimum(begin + segment, tl.cdiv(end, CHUNK))):
        columns = c * CHUNK + tl.arange(0, CHUNK)
        rank = tl.load(own_ranks + columns, mask=(columns >= first) & (columns < end), other=NEVER)
        hit = ((rank != NEVER) & (bin_of(rank, centre, shift, BINS) <= bin)).to(tl.int32)
        tl.store(own_list + at + tl.cumsum(hit, 0) - 1, (rank.to(tl.int64) << 32) + columns, mask=hit != 0)
        at += tl.sum(hit, 0)
    tl.debug_barrier()
    if PDL:
        gdc_launch_dependents()
    if tl.atomic_add(state + 2 * rows + row, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(state + 2 * rows + row, 0)
        tl.store(filled + row, wanted)
        low, high = within_bin(bin, centre, shift, BINS)
        tight = n - before  # keys of the threshold's bin
        least_rank, above, dropped = threshold(own_list, n, low, high, wanted - before, tight, TILE)
        own_ids = ids + row.to(tl.int64) * slots
        list_chosen(own_ids, own_list, n, least_rank, above, dropped, wanted, slots, TILE)
        if wanted > 0:
            next_shift = high + exponent(wanted) - exponent(tight) - 3  # an eighth of those wanted in a bin
            tl.store(state + row, tl.maximum(least_rank, FIRST).to(tl.int32))
            tl.store(state + rows + row, -tl.minimum(tl.maximum(next_shift, 0), WIDEST) + WIDEST)
