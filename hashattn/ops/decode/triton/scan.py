"""First kernel of exact top-k: distances of one chunk of keys, its candidates in column order, and their counts."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hashattn.ops.decode.triton.codes import LANE, RUN, list_near, load_runs, offsets, program_row, span


@triton.jit
def count_levels(lists, stride, lengths, t0, BINS: tl.constexpr, TILE: tl.constexpr):
    """Entries t0 to t0 + TILE of each lane's list, by bin: int32 [4 * BINS]."""
    i = tl.arange(0, 4 * TILE)
    lane, at = i // TILE, t0 + i % TILE
    has = at < ((lengths >> (16 * lane).to(tl.int64)) & LANE)
    entry = tl.load(lists + lane.to(tl.int64) * stride + at, mask=has, other=0)
    level = tl.maximum(BINS - 1 - (entry >> 16), 0)
    return tl.histogram(lane * BINS + level, 4 * BINS, mask=has)


@triton.jit
def scan(
    query, codes, bounds, candidates, counts, marks, starts, length, sinks, recents, limit, room, chunks, kv_heads, T,
    G: tl.constexpr, LANES: tl.constexpr, SUM: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr,
    CHUNK: tl.constexpr, BINS: tl.constexpr, BIASED: tl.constexpr, CAUSAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, Hkv * T * G / SUM / LANES, B). A row is one choice: a head's, or a KV head's (SUM = G).

    Args:
        query: int64 [B, Hq, T, PLANES, WORDS].
        codes: int64 [B, Hkv, room, WORDS].
        bounds: int32 [rows], sixteenths: no key farther than bounds // 16 is a candidate.
        candidates: int32 [rows, chunks, CHUNK], written: (bound - distance) << 16 | place in the chunk.
        counts: uint16 [rows, BINS, chunks], written: candidates with bound - distance >= BINS - 1 - bin.
        marks: int64 [B, T, room], zeros are written; None if there are none.
        starts, length: int32 [B] and [1]; limit: columns that keys and codes have room for.
    """
    if PDL:
        gdc_wait()
    chunk = tl.program_id(0)
    GROUPS: tl.constexpr = G // SUM // LANES
    at = program_row()
    group = at % GROUPS
    t = at // GROUPS % T
    kv = at // GROUPS // T  # b * Hkv + KV head
    first, end = span(starts, length, limit, kv // kv_heads, t, T, CAUSAL)
    row0 = (kv * (G // SUM) + group * LANES) * T + t  # of the first lane; the next lane's is T further
    low = chunk * CHUNK
    if marks is not None:
        column = low + tl.arange(0, CHUNK)
        own_marks = marks + (kv // kv_heads * T + t).to(tl.int64) * room
        first_head = (kv % kv_heads == 0) & (group == 0)
        tl.store(own_marks + column, tl.zeros([CHUNK], tl.int64), mask=(column < room) & first_head)
    lengths = tl.zeros([], tl.int64)
    sums = tl.zeros([4 * BINS], tl.int32)
    lists = candidates + (row0.to(tl.int64) * chunks + chunk) * CHUNK
    stride = tl.full([], CHUNK, tl.int64) * chunks * T
    if (low < end) & (low + CHUNK > first):
        words = query + ((kv * G + group * LANES * SUM) * T + t).to(tl.int64) * PLANES * WORDS
        step = T * PLANES * WORDS  # words from a head's query to the next head's
        own = codes + kv.to(tl.int64) * room * WORDS
        runs = tl.arange(0, CHUNK // RUN) * RUN
        columns = (low + runs)[:, None] + tl.arange(0, RUN)[None, :]
        x = load_runs(own, columns, room, WORDS)
        shift = tl.zeros([CHUNK // RUN, RUN], tl.int32)
        if (low < first + sinks) | (low + CHUNK > end - recents):
            shift = offsets(columns, first, end, sinks, recents)
        places = runs[:, None] + tl.arange(0, RUN)[None, :]
        lengths = list_near(
            x, shift, places, lengths, lists, stride, words, step, bounds + row0, T, LANES, SUM, WORDS, PLANES, BIASED
        )
        tl.debug_barrier()  # what other threads have just stored is read
        most = 0
        for i in tl.static_range(LANES):
            most = tl.maximum(most, ((lengths >> (16 * i)) & LANE).to(tl.int32))
        for t0 in range(0, most, 64):
            sums += count_levels(lists, stride, lengths, t0, BINS, 64)
    upto = tl.cumsum(tl.reshape(sums, [4, BINS]), 1)
    lane = tl.arange(0, 4)[:, None]
    to = counts + ((row0 + lane * T).to(tl.int64) * BINS + tl.arange(0, BINS)[None, :]) * chunks + chunk
    tl.store(to, upto.to(tl.uint16), mask=lane < LANES)
    if PDL:
        gdc_launch_dependents()
