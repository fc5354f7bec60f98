"""One kernel for LocalTopK: each program scans its interleaved chunk, keeps its nearest keys and attends to them."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hashattn.ops.decode.codes import FAR, LANE, RUN, list_near, load_runs, offsets, span
from hashattn.ops.decode.rows import LOG2E, combine, store_part

SIDE = tl.constexpr(64)  # candidates that are ranked at a time
SLOTS = tl.constexpr(16)  # keys of a head that are attended to at a time


@triton.jit
def attend_local(
    q, keys, values, query, codes, bounds, candidates, starts, length, ids, parts, stats, arrived, out, lse, scale, k,
    radius, sinks, recents, margin, room, chunks, kv_heads, T, G: tl.constexpr, LANES: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr,
    TILE: tl.constexpr, ROOM: tl.constexpr, KEEP: tl.constexpr, CAUSAL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, B * Hkv * T * G / LANES). Column n belongs to chunk n // RUN % chunks.

    Args:
        bounds: int32 [rows, chunks], sixteenths: where too few keys are at most bounds // 16 away, the chunk is scanned
            again. Rewritten for the next step: the distance of the last key kept and a margin, falling slowly.
        candidates: int32 [rows, chunks, ROOM], scratch: (bound - distance) << 16 | place in the chunk.
        k: keys kept of each chunk, at most KEEP, a power of 2.
        ids: int32 [rows, chunks, KEEP], written: columns, nearest first, -1 where a chunk has no more.
        Others as in attend_topk; arrived int32 [B * Hkv * T * G / LANES].
    """
    if PDL:
        gdc_wait()
    chunk = tl.program_id(0)
    pid = tl.program_id(1)
    GROUPS: tl.constexpr = G // LANES
    group = pid % GROUPS
    t = pid // GROUPS % T
    kv = pid // GROUPS // T
    first, end = span(starts, length, kv // kv_heads, t, T, CAUSAL)
    row0 = (kv * G + group * LANES) * T + t
    words = query + row0.to(tl.int64) * PLANES * WORDS
    step = T * PLANES * WORDS
    lanes = tl.arange(0, 4)
    lists = candidates + (row0.to(tl.int64) * chunks + chunk) * ROOM
    list_stride = chunks.to(tl.int64) * T * ROOM
    stride = RUN * chunks
    own_codes = codes + kv.to(tl.int64) * room * WORDS
    # places of the chunk that hold seen columns; those of the run that `end` cuts are masked
    low = first // stride * RUN
    high = tl.cdiv(end, stride) * RUN
    seen_before = first // stride * RUN + tl.minimum(tl.maximum(first % stride - chunk * RUN, 0), RUN)
    wanted = end // stride * RUN + tl.minimum(tl.maximum(end % stride - chunk * RUN, 0), RUN) - seen_before
    wanted = tl.minimum(wanted, k)
    own_bounds = bounds + row0 * chunks + chunk
    before = tl.load(own_bounds + lanes * T * chunks, mask=lanes < LANES, other=0)
    bound = tl.minimum(tl.maximum(before >> 4, 0), FAR - 1)
    wider = margin
    counted = tl.zeros([4], tl.int32)
    short = 1
    while short > 0:
        total = tl.zeros([], tl.int64)
        for p0 in range(low, high, TILE):
            runs = p0 // RUN + tl.arange(0, TILE // RUN)
            run_columns = runs * stride + chunk * RUN
            columns = run_columns[:, None] + tl.arange(0, RUN)[None, :]
            x = load_runs(own_codes, columns, room, WORDS)
            shift = tl.zeros([TILE // RUN, RUN], tl.int32)
            if (p0 // RUN * stride < first + sinks) | ((p0 + TILE) // RUN * stride > end - recents):
                shift = offsets(columns, first, end, sinks, recents)
            places = (runs * RUN)[:, None] + tl.arange(0, RUN)[None, :]
            total = list_near(
                x, shift, places, total, lists, list_stride, words, step, own_bounds, T * chunks, LANES, 1, WORDS,
                PLANES,
            )  # fmt: skip
        counted = ((total >> (16 * lanes)) & LANE).to(tl.int32)
        lacking = (counted < wanted) & (bound < FAR - 1) & (lanes < LANES)
        short = tl.max(lacking.to(tl.int32), 0)
        bound = tl.where(lacking, tl.minimum(bound + wider, FAR - 1), bound)
        wider *= 2
        tl.debug_barrier()
        if short > 0:
            tl.store(own_bounds + lanes * T * chunks, bound * 16, mask=lacking)
            tl.debug_barrier()
    farthest = tl.zeros([4], tl.int32)
    for i in tl.static_range(LANES):
        n = tl.sum(tl.where(lanes == i, counted, 0), 0)
        listed = candidates + ((row0 + i * T).to(tl.int64) * chunks + chunk) * ROOM
        own_ids = ids + ((row0 + i * T) * chunks + chunk) * KEEP
        for a0 in range(0, n, SIDE):
            at = a0 + tl.arange(0, SIDE)
            entry = tl.load(listed + at, mask=at < n, other=-1)
            rank = tl.zeros([SIDE], tl.int32)  # entries are distinct, the larger the nearer, then the more recent
            for b0 in range(0, n, SIDE):
                other = tl.load(listed + b0 + tl.arange(0, SIDE), mask=b0 + tl.arange(0, SIDE) < n, other=-1)
                rank += tl.sum((other[None, :] > entry[:, None]).to(tl.int32), 1)
            spot = entry & LANE
            tl.store(own_ids + rank, spot // RUN * stride + chunk * RUN + spot % RUN, mask=(at < n) & (rank < k))
            last = tl.sum(tl.where((at < n) & (rank == k - 1), entry >> 16, 0), 0)
            farthest += tl.where(lanes == i, last, 0)
        slots = tl.arange(0, KEEP)
        tl.store(own_ids + slots, -1, mask=slots >= tl.minimum(n, k))
    after = tl.maximum((bound - farthest + margin) * 16, tl.minimum(before, FAR * 16) - 1)
    tl.store(own_bounds + lanes * T * chunks, tl.where(counted < k, before, after), mask=lanes < LANES)
    tl.debug_barrier()  # other threads stored the columns
    dims = tl.arange(0, WIDTH)
    head = lanes[:, None] * T * DIM + dims[None, :]
    own_q = tl.load(q + row0.to(tl.int64) * DIM + head, mask=(lanes < LANES)[:, None] & (dims < DIM)[None, :], other=0.0)
    own_q = own_q.to(tl.float32) * (scale * LOG2E)
    peak = tl.full([4], float("-inf"), tl.float32)
    weight = tl.zeros([4], tl.float32)
    acc = tl.zeros([4, WIDTH], tl.float32)
    base = kv.to(tl.int64) * room * DIM
    for s0 in tl.static_range(0, KEEP, SLOTS):
        slot = s0 + tl.arange(0, SLOTS)
        at = ((row0 + lanes[:, None] * T) * chunks + chunk) * KEEP + slot[None, :]
        column = tl.load(ids + at, mask=(lanes < LANES)[:, None], other=-1)
        filled = column >= 0
        where = base + column.to(tl.int64)[:, :, None] * DIM + dims[None, None, :]
        mask = filled[:, :, None] & (dims < DIM)[None, None, :]
        k_rows = tl.load(keys + where, mask=mask, other=0.0)
        v_rows = tl.load(values + where, mask=mask, other=0.0)
        x = tl.where(filled, tl.sum(k_rows.to(tl.float32) * own_q[:, None, :], 2), float("-inf"))
        higher = tl.maximum(peak, tl.max(x, 1))
        floor = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(x - floor[:, None])
        shrink = tl.exp2(peak - floor)
        weight = weight * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.sum(p[:, :, None] * v_rows.to(tl.float32), 1)
        peak = higher
    store_part(parts, stats, pid * chunks + chunk, peak, weight, acc, WIDTH, LANES, 4)
    tl.debug_barrier()
    if PDL:
        gdc_launch_dependents()
    if tl.atomic_add(arrived + pid, 1, sem="acq_rel") == chunks - 1:
        tl.store(arrived + pid, 0)
        combine(parts, stats, pid * chunks, chunks, out, lse, row0, T, DIM, WIDTH, LANES, 4, 16)
