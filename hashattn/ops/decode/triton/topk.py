"""Second kernel of exact top-k: the threshold, one program's share of the chosen keys, attention to them."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hashattn.ops.decode.triton.codes import (
    FAR,
    RUN,
    discount,
    distance,
    load_runs,
    offsets,
    program_row,
    read_bound,
    span,
)
from hashattn.ops.decode.triton.rows import combine, estimate, group_of_heads, one_head, store_part, to_weights

LOW = tl.constexpr(0xFFFFFFFF)


@triton.jit
def budget(visible, k, share, least, SHARE: tl.constexpr):
    """Keys wanted of so many: k, or with SHARE a share, the bits of a float64; `least` whatever these say."""
    wanted = tl.minimum(k, visible)
    if SHARE:
        wanted = tl.ceil(visible.to(tl.float64) * share.to(tl.float64, bitcast=True)).to(tl.int32)
    return tl.maximum(wanted, tl.minimum(visible, least))


@triton.jit
def totals(counts, chunks, BINS: tl.constexpr, TILE: tl.constexpr):
    """Candidates of a row up to each bin, over all chunks: int32 [BINS]."""
    bins = tl.arange(0, BINS)
    sums = tl.zeros([BINS], tl.int32)
    for c0 in range(0, chunks, TILE):
        c = c0 + tl.arange(0, TILE)
        own = tl.load(counts + bins[:, None] * chunks + c[None, :], mask=(c < chunks)[None, :], other=0)
        sums += tl.sum(own.to(tl.int32), 1)
    return sums


@triton.jit
def cut_at(running, wanted, BINS: tl.constexpr):
    """(bin of the threshold of so many keys, candidates up to it), from totals."""
    bins = tl.arange(0, BINS)
    bin = tl.sum((running < wanted).to(tl.int32), 0)
    return bin, tl.sum(tl.where(bins == bin, running, 0), 0)


@triton.jit
def by_chunk(counts, chunks, bin, CHUNKS: tl.constexpr):
    """Each chunk's candidates: int64 [CHUNKS], those in a bin << 32, plus those nearer."""
    c = tl.arange(0, CHUNKS)
    upto = tl.load(counts + bin * chunks + c, mask=c < chunks, other=0).to(tl.int32)
    before = tl.load(counts + (bin - 1) * chunks + c, mask=(c < chunks) & (bin > 0), other=0).to(tl.int32)
    return ((upto - before).to(tl.int64) << 32) + before


@triton.jit
def from_candidates(
    ids, tier, candidates, counts, chunks, bin, dropped, bin_1, dropped_1, rank0, rank1, CHUNK: tl.constexpr,
    BINS: tl.constexpr, CHUNKS: tl.constexpr, ACROSS: tl.constexpr, TIERS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the chosen columns of ranks rank0 to rank1, in column order, from the lists of the chunks that hold them.

    Args:
        bin: of the threshold, whose `dropped` oldest candidates are not chosen.
        bin_1, dropped_1: the same of critical keys, with TIERS: then tiers are written too.
    """
    nearer = BINS - 1 - bin  # what the threshold is in an entry: bound - distance, more than which is nearer
    c = tl.arange(0, CHUNKS)
    inside = c < chunks
    listed = tl.load(counts + (BINS - 1) * chunks + c, mask=inside, other=0).to(tl.int32)
    packed = by_chunk(counts, chunks, bin, CHUNKS)
    running = tl.cumsum(packed, 0)
    through = (running & LOW).to(tl.int32) + tl.maximum((running >> 32).to(tl.int32) - dropped, 0)
    running -= packed
    already = (running & LOW).to(tl.int32) + tl.maximum((running >> 32).to(tl.int32) - dropped, 0)
    if TIERS:
        ties_1 = (by_chunk(counts, chunks, bin_1, CHUNKS) >> 32).to(tl.int32)
        ties_1 = tl.cumsum(ties_1, 0) - ties_1
    c0 = tl.sum((through <= rank0).to(tl.int32), 0)
    c1 = tl.sum(((already < rank1) & inside).to(tl.int32), 0)
    for start in range(c0, c1, ACROSS):
        mine = start + tl.arange(0, ACROSS)
        here = (c[None, :] == mine[:, None]) & (mine < c1)[:, None]
        state = tl.sum(tl.where(here, running[None, :], 0), 1)
        n = tl.sum(tl.where(here, listed[None, :], 0), 1)
        if TIERS:
            state_1 = tl.sum(tl.where(here, ties_1[None, :], 0), 1)
        for t0 in range(0, tl.max(n, 0), TILE):
            at = t0 + tl.arange(0, TILE)
            entry = tl.load(
                candidates + mine.to(tl.int64)[:, None] * CHUNK + at[None, :], mask=at[None, :] < n[:, None], other=-1
            )
            level = entry >> 16
            equal = level == nearer
            if bin == 0:  # holds everything nearer as well: then all of it is chosen
                equal = level >= nearer
            hit = (equal.to(tl.int64) << 32) + ((level > nearer) & (bin > 0)).to(tl.int64)
            order = tl.cumsum(hit, 1) + state[:, None]
            ties = (order >> 32).to(tl.int32)
            rank = (order & LOW).to(tl.int32) + tl.maximum(ties - dropped, 0) - 1
            chosen = ((hit & LOW) != 0) | ((hit != 0) & (ties > dropped))
            column = mine[:, None] * CHUNK + (entry & 0xFFFF)
            chosen &= (rank >= rank0) & (rank < rank1)
            tl.store(ids + rank, column, mask=chosen)
            state += tl.sum(hit, 1)
            if TIERS:
                tie = level == BINS - 1 - bin_1
                old = tl.cumsum(tie.to(tl.int32), 1) + state_1[:, None] <= dropped_1
                tl.store(tier + rank, (level < BINS - 1 - bin_1) | (tie & old), mask=chosen)
                state_1 += tl.sum(tie.to(tl.int32), 1)


@triton.jit
def level_of(
    t0, query, step, codes, first, end, sinks, recents, radius, room, SUM: tl.constexpr, WORDS: tl.constexpr,
    PLANES: tl.constexpr, BIASED: tl.constexpr, LEVELS: tl.constexpr, RADIUS: tl.constexpr, TILE: tl.constexpr,
    calibration=None,
):  # fmt: skip
    """Distance + 1 of columns t0 to t0 + TILE, 0 for forced keys, LEVELS - 1 for those that may not be chosen.

    calibration: (the largest discount, what discount() takes of a row); distances are then that much farther.
    """
    columns = t0 + (tl.arange(0, TILE // RUN) * RUN)[:, None] + tl.arange(0, RUN)[None, :]
    d = distance(load_runs(codes, columns, room, WORDS), query, step, WORDS, PLANES, SUM, BIASED)
    if calibration is not None:
        d += calibration[0] - discount(columns, columns < room, *calibration[1:])
    if RADIUS:
        d = tl.where(d > radius, LEVELS, d)
    d += offsets(columns, first, end, sinks, recents)
    return tl.reshape(tl.minimum(tl.maximum(d, -1), LEVELS - 2) + 1, [TILE])


@triton.jit
def count_codes(
    query, step, codes, first, end, sinks, recents, radius, room, SUM: tl.constexpr, WORDS: tl.constexpr,
    PLANES: tl.constexpr, BIASED: tl.constexpr, LEVELS: tl.constexpr, RADIUS: tl.constexpr, TILE: tl.constexpr,
    calibration=None,
):  # fmt: skip
    """Keys of a row up to each level, from all its codes: int32 [LEVELS]."""
    row = (query, step, codes, first, end, sinks, recents, radius, room)
    seen_at = tl.zeros([LEVELS], tl.int32)
    for t0 in range(first // TILE * TILE, end, TILE):
        level = level_of(t0, *row, SUM, WORDS, PLANES, BIASED, LEVELS, RADIUS, TILE, calibration)
        seen_at += tl.histogram(level, LEVELS)
    return tl.cumsum(seen_at, 0)


@triton.jit
def cut_of_codes(running, wanted, LEVELS: tl.constexpr):
    """(level of the threshold of so many keys, how many of the oldest at it are too many), from count_codes."""
    levels = tl.arange(0, LEVELS)
    cut = tl.minimum(tl.sum((running < wanted).to(tl.int32), 0), LEVELS - 1)
    return cut, tl.maximum(tl.sum(tl.where(levels == cut, running, 0), 0) - wanted, 0)


@triton.jit
def from_codes(
    ids, tier, query, step, codes, first, end, sinks, recents, radius, wanted, wanted_1, room, rank0, rank1,
    SUM: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr, BIASED: tl.constexpr, LEVELS: tl.constexpr,
    RADIUS: tl.constexpr, TIERS: tl.constexpr, TILE: tl.constexpr, calibration=None,
):  # fmt: skip
    """The same from all codes of the row, for a bound that missed the threshold. Returns the threshold's level - 1."""
    row = (query, step, codes, first, end, sinks, recents, radius, room)
    running = count_codes(*row, SUM, WORDS, PLANES, BIASED, LEVELS, RADIUS, TILE, calibration)
    cut, dropped = cut_of_codes(running, wanted, LEVELS)
    if TIERS:
        cut_1, dropped_1 = cut_of_codes(running, wanted_1, LEVELS)
        state_1 = tl.zeros([1], tl.int32)
    state = tl.zeros([1], tl.int64)
    for t0 in range(first // TILE * TILE, end, TILE):
        columns = t0 + tl.arange(0, TILE)
        near = level_of(t0, *row, SUM, WORDS, PLANES, BIASED, LEVELS, RADIUS, TILE, calibration)
        hit = ((near == cut).to(tl.int64) << 32) + (near < cut).to(tl.int64)
        order = tl.cumsum(hit, 0) + state
        ties = (order >> 32).to(tl.int32)
        rank = (order & LOW).to(tl.int32) + tl.maximum(ties - dropped, 0) - 1
        chosen = ((near < cut) | ((near == cut) & (ties > dropped))) & (rank >= rank0) & (rank < rank1)
        tl.store(ids + rank, columns, mask=chosen)
        state += tl.sum(hit, 0)
        if TIERS:
            tie = near == cut_1
            old = tl.cumsum(tie.to(tl.int32), 0) + state_1 <= dropped_1
            tl.store(tier + rank, (near > cut_1) | (tie & old), mask=chosen)
            state_1 += tl.sum(tie.to(tl.int32), 0)
    return cut - 1


@triton.jit
def attend_topk(
    q, keys, values, query, codes, bounds, candidates, counts, starts, length, share, ids, parts, stats, arrived, out,
    lse, critical, norms, centre, a, tier, per_bit, marks, weights, votes, agreement, ratio, prior, reach, scale, k,
    least, radius, sinks, recents, margin, room, code_room, norm_room, chunks, slots, kv_heads, T, G: tl.constexpr,
    SUM: tl.constexpr, PADDED: tl.constexpr, PADDED_OUT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    WORDS: tl.constexpr, PLANES: tl.constexpr, BIASED: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    BINS: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, SHARE: tl.constexpr, RADIUS: tl.constexpr,
    TIERS: tl.constexpr, CAUSAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (slots / ROWS, Hkv * T * G / SUM, B). Ranks follow column order: bounds change no result.

    Args:
        q, keys, values: [B, Hq, T, DIM], [B, Hkv, room, DIM]; see scan for query, codes, candidates and counts.
        bounds: int32 [rows], sixteenths, rewritten for the next step: the threshold and a margin, falling slowly.
        share: of the visible keys, the bits of a float64, with SHARE; else k keys are wanted.
        least: keys wanted whatever k, share and critical say.
        ids: int32 [rows, slots], written: columns in ascending order, then -1.
        parts, stats, arrived: scratch; arrived int32 [rows] is zero before and after.
        out, lse: [B, Hq, T, DIM] and float32 [B, Hq, T], written.
        critical: share of the visible keys that are read, likewise, with TIERS; logits of the others are estimated.
        norms, centre, a: see Estimate; tier: int8 [rows, slots], written, 1 for medium keys. None without TIERS.
        per_bit: 2 / bits.
        marks, votes, agreement, prior: see discount; None without a calibration, whose lists are from calibrate.py.
        ratio: of the uniform share, times the layer's query heads; reach: the largest discount.
        weights: float32 [B, Hq, T, slots], written, softmax weights; None if nobody wants them.
    """
    s = tl.program_id(0)
    row = program_row()
    HEADS: tl.constexpr = G // SUM  # rows of a KV head
    TILE: tl.constexpr = 512 if LEVELS <= 1024 else 256  # a histogram's counts are in registers
    t = row % T
    head = row // T  # of [B, Hkv * HEADS]
    kv = head // HEADS
    limit = tl.minimum(room, code_room)
    first, end = span(starts, length, limit, kv // kv_heads, t, T, CAUSAL)
    visible = end - first
    wanted = budget(visible, k, share, least, SHARE)
    wanted_1 = wanted
    if TIERS:
        wanted_1 = budget(visible, 0, critical, least, True)
    if PDL:
        gdc_wait()
    own = counts + row.to(tl.int64) * BINS * chunks
    running = totals(own, chunks, BINS, 2048 // BINS)
    found = tl.max(running, 0)
    if RADIUS:
        wanted = tl.minimum(wanted, found)
    bin, upto = cut_at(running, wanted, BINS)
    missed = (found < wanted) | ((bin == 0) & (upto > wanted))  # the first bin holds more than one distance
    bin_1, upto_1 = bin, upto
    if TIERS:
        wanted_1 = tl.minimum(wanted_1, wanted)
        bin_1, upto_1 = cut_at(running, wanted_1, BINS)
        missed |= (bin_1 == 0) & (upto_1 > wanted_1)
    rank0 = s * ROWS
    rank1 = tl.minimum(rank0 + ROWS, wanted)
    programs = tl.maximum(tl.cdiv(wanted, ROWS), 1)
    own_ids = ids + row.to(tl.int64) * slots
    own_tier = tier
    ranks = rank0 + tl.arange(0, ROWS)
    filled = ranks < rank1
    tl.store(own_ids + ranks, -1, mask=~filled)
    if TIERS:
        own_tier = tier + row.to(tl.int64) * slots
        tl.store(own_tier + ranks, 0, mask=~filled)
    own_weights, apart = None, tl.full([], 1, tl.int64) * T * slots
    if weights is not None:
        own_weights = weights + (head.to(tl.int64) * SUM * T + t) * slots
        if s >= programs:
            for g in tl.static_range(SUM):
                tl.store(own_weights + g * apart + ranks, tl.zeros([ROWS], tl.float32))
    if s < programs:
        query_at = query + (head.to(tl.int64) * SUM * T + t) * PLANES * WORDS
        words_step = T * PLANES * WORDS  # from a head's query to the next head's
        own_codes = codes + kv.to(tl.int64) * code_room * WORDS
        bound = read_bound(bounds + row)
        calibration = None
        if marks is not None:
            bound -= reach
            own_marks = marks + (kv // kv_heads * T + t).to(tl.int64) * code_room
            calibration = (reach, own_marks, visible, votes, agreement, ratio, prior)
        if missed:
            seen = (query_at, words_step, own_codes, first, end, sinks, recents, radius)
            seen += (wanted, wanted_1, code_room, rank0, rank1)
            threshold = from_codes(
                own_ids, own_tier, *seen, SUM, WORDS, PLANES, BIASED, LEVELS, RADIUS, TIERS, TILE, calibration
            )
            if marks is not None:
                threshold -= reach
        else:
            threshold = bound - (BINS - 1 - bin)
            if rank0 < rank1:
                listed = (candidates + row.to(tl.int64) * chunks * CHUNK, own, chunks)
                cuts = (bin, upto - wanted, bin_1, upto_1 - wanted_1, rank0, rank1)
                from_candidates(own_ids, own_tier, *listed, *cuts, CHUNK, BINS, CHUNKS, 4, TIERS, 128)
        if (not RADIUS) & (s == 0):
            fallen = tl.minimum(tl.load(bounds + row), FAR * 16) - 1  # a bin in 16 steps
            tl.store(bounds + row, tl.maximum((threshold + margin) * 16, fallen))
        tl.debug_barrier()  # other threads stored the columns
        columns = tl.load(own_ids + ranks, mask=filled, other=0)
        k_at, v_at = keys + kv.to(tl.int64) * room * DIM, values + kv.to(tl.int64) * room * DIM
        q_at = q + (head.to(tl.int64) * SUM * T + t) * DIM
        exact, estimated, logits = None, None, None
        if weights is not None:
            logits = own_weights + rank0
        if TIERS:
            exact = filled & (tl.load(own_tier + ranks, mask=filled, other=0) == 0)
            about = (centre + kv.to(tl.int64) * DIM, a, norms + kv.to(tl.int64) * norm_room, own_codes)
            signs = (query_at + (PLANES - 1) * WORDS, words_step)
            medium = filled & ~exact
            estimated = estimate(
                q_at, T * DIM, *about, *signs, columns, medium, per_bit, SUM, PADDED, WORDS, DIM, WIDTH
            )
        if SUM == 1:
            if TIERS:
                estimated = tl.reshape(estimated, [ROWS])
            peak, total, acc = one_head(q_at, k_at, v_at, columns, filled, scale, DIM, WIDTH, exact, estimated, logits)
        else:
            given = (q_at, T * DIM, k_at, v_at, columns, filled, scale)
            peak, total, acc = group_of_heads(*given, SUM, PADDED, DIM, WIDTH, exact, estimated, logits, apart)
        part = row.to(tl.int64) * tl.cdiv(slots, ROWS)
        store_part(parts, stats, part + s, peak, total, acc, WIDTH, SUM, PADDED)
        tl.debug_barrier()
        if PDL:
            gdc_launch_dependents()
        if tl.atomic_add(arrived + row, 1, sem="acq_rel") == programs - 1:
            tl.store(arrived + row, 0)
            spoilt = tl.load(length) > limit
            to = (out, lse, head * SUM * T + t, T)
            highest, weight = combine(
                parts, stats, part, programs, wanted > 0, spoilt, *to, DIM, WIDTH, SUM, PADDED_OUT, 16
            )
            if weights is not None:
                to_weights(own_weights, apart, programs * ROWS, highest, weight, wanted > 0, SUM, PADDED_OUT, 512)
