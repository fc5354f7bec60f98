"""One decode step of a few heads: the newest keys encoded, distances, the exact choice, and attention to it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray

from hashattn.ops.compiled.attend import AHEAD, fetch, products, softmax, weighted
from hashattn.ops.compiled.encode import pack, project
from hashattn.ops.compiled.jit import compiled, inlined, lying_at, number, popcount, sources, stored
from hashattn.ops.compiled.scan import LEVELS, count_near, nearest, scan

# What a step is given, by its place in an int64 array. Addresses first, all of memory in one piece:
Q, QUERY = 0, 1  # [B, Hq, T, D] like keys; uint64 [B, Hq, T, P, W], where there is no map
KEYS, VALUES = 2, 3  # [B, Hkv, room, D], float32, or uint16 for bfloat16
CODES, NORMS = 4, 5  # uint64 [B, Hkv, code_room, W]; uint16 for bfloat16 [B, Hkv, norm_room], |k - centre|
CENTRE, STARTS = 6, 7  # float32 [B, Hkv, D]; int32 [B], each row's first column
QUERY_MAP, KEY_MAP = 8, 9  # float32 [D, bits] of linear maps; 0 where queries, keys are encoded already
OUT, LSE = 10, 11  # [B, Hq, T, D] like keys; float32 [B, Hq, T]
IDS, CRITICAL = 12, 13  # int32 [B, H, T, slots], critical keys before medium ones; int32 [B, H, T], how many those are
BASES = 14  # int32 [B, H, T], zeros at first: where distances began, for the next step
# then sizes:
BATCH, Q_HEADS, KV_HEADS, TOKENS, DIM, ROOM, CODE_ROOM, NORM_ROOM = range(15, 23)
WORDS, PLANES, BITS, SLOTS, LENGTH, ENCODED = range(23, 29)  # filled columns, and how many of them have codes
# and the rule: k of -1 where the share says how many, radius of -1 for any; flags are 0 or 1.
K, MIN_K, SINKS, RECENTS, RADIUS, SHARED, BIASED, CAUSAL, TIERED, ESTIMATED, WITH_NORMS = range(29, 40)
COUNT = 40
# In a float64 array: share of visible keys, share of critical ones, scale of the logits, a of the estimate.
SHARE, CRITICAL_SHARE, SCALE, A = 0, 1, 2, 3

FLOAT, HALF, WORD, INT = np.float32(0), np.uint16(0), np.uint64(0), np.int32(0)  # what lies at an address is like them


class Work(NamedTuple):
    """What a thread writes on the way.

    Attributes:
        near: uint8 [room + 144]; sums: uint16 [BLOCK]; query: uint64 [G * P * W].
        projected: float32 [bits, to a multiple of 64]; q, out: float32 [G * D]; logits: float32 [G, slots + 4].
        ids, nearer: int32 [slots + 8].
    """

    near: Any
    sums: Any
    projected: Any
    query: Any
    q: Any
    out: Any
    logits: Any
    ids: Any
    nearer: Any


@inlined
def choose(
    at: Any, shares: Any, codes: Any, query: Any, rows: int, first: int, end: int, guess: int, work: Work
) -> tuple[int, int, int]:
    """The keys that a query, or a group's queries, keep of those from first to end: to work.ids, critical ones first.

    Returns:
        how many, how many of them are critical, and the base of their distances, a good guess for the next step.
    """
    visible, least = max(0, end - first), at[MIN_K]
    sinks = min(at[SINKS], visible)
    recents = min(at[RECENTS], visible - sinks)
    forced, low, high = sinks + recents, first + sinks, first + visible - recents
    count = max(forced, budget(at[K], shares[SHARE], visible, forced + least)) - forced
    for i in range(sinks):
        work.ids[i] = np.int32(first + i)
    few = count
    if at[TIERED]:
        few = max(0, min(count, budget(-1, shares[CRITICAL_SHARE], visible, forced + least) - forced))
    place, padded, base = np.int64(sinks), (high - low + 63) // 64 * 64, np.int64(-1)
    if few > 0:
        base, top, within = look(at, codes, query, rows, low, high, few, base, guess, work)
        few = min(few, within)
        if few > 0:
            place = nearest(work.near, padded, few, top, low, work.ids, place)
    for i in range(recents):
        work.ids[place + i] = np.int32(high + i)
    place += recents
    critical = place
    found = base
    if few < count and at[TIERED]:
        base, top, within = look(at, codes, query, rows, low, high, count, base, guess, work)
        count = min(count, within)
    if few < count and at[TIERED]:
        nearest(work.near, padded, count, top, low, work.nearer, 0)
        n = np.int64(sinks)
        for i in range(count):  # both ascend
            one = work.nearer[i]
            if n < sinks + few and work.ids[n] == one:
                n += 1
            else:
                work.ids[place] = one
                place += 1
    return place, critical, found


@inlined
def look(
    at: Any, codes: Any, query: Any, rows: int, low: int, high: int, count: int, base: int, guess: int, work: Work
) -> tuple[int, int, int]:
    """Distances above `base`, as bytes, in a range where the `count` nearest keys end: from what work.near holds on.

    Args:
        base: of what it holds; -1 for nothing, and then a guess where to begin.

    Returns:
        the base, the farthest byte that may be chosen, and how many keys are no farther: fewer only within a radius.
    """
    radius, padded, held = at[RADIUS], (high - low + 63) // 64 * 64, base >= 0
    base = max(base, guess if radius < 0 else 0)
    while True:
        if not held:
            scan(codes, at[WORDS], low, high, query, rows, at[PLANES], at[BIASED] > 0, base, work.sums, work.near)
            if base > 0 and count_near(work.near, padded, 0, 64) >= count:  # they end at or before the base
                base = max(0, base - LEVELS)
                continue
        top = LEVELS if radius < 0 else min(LEVELS, radius - base)
        within = count_near(work.near, padded, top, 64)
        if within >= count or top < LEVELS:
            return base, top, within
        base += LEVELS
        held = False


@inlined
def budget(k: int, share: float, visible: int, least: int) -> int:
    """As Budget.count."""
    count = k if k >= 0 else np.int64(np.ceil(share * np.float64(visible)))
    return min(visible, max(count, least))


@inlined
def estimate(at: Any, a: float, q: Any, query: Any, centre: Any, codes: Any, norms: Any, ids: Any, logits: Any) -> None:
    """A query's logits of the keys at ids, from their codes and norms, as Estimate says."""
    offset, size, words = np.float32(0), np.float32(0), at[WORDS]
    for x in range(at[DIM]):
        offset += q[x] * centre[x]
        size += q[x] * q[x]
    size = np.float32(a) * np.sqrt(size)
    for n in range(len(ids)):
        one, differ = np.int64(ids[n]), np.uint64(0)
        for w in range(words):
            differ += popcount(query[w] ^ codes[one * words + w])
        agree = np.float32(1) - np.float32(2) * np.float32(differ) / np.float32(at[BITS])
        logits[n] = offset + size * number(norms[one]) * agree


@inlined
def encode_key(at: Any, key: Any, centre: Any, linear: Any, work: Work, code: Any, norm: Any) -> None:
    """The code of a key, and where norms are kept its own."""
    size = np.float32(0)
    for x in range(at[DIM]):
        z = number(key[x]) - centre[x]
        work.out[x] = z
        size += z * z
    project(work.out[: at[DIM]], linear, at[BITS], work.projected)
    pack(work.projected, at[BITS], 1, at[WORDS], code)
    if at[WITH_NORMS]:
        norm[0] = stored(np.sqrt(size), HALF)


@inlined
def heads(at: Any, shares: Any, like: Any, work: Work, first: int, last: int) -> None:
    """The decode step of KV heads, numbered over rows, queries and heads, from `first` to `last`.

    Args:
        at: int64 [COUNT], shares: float64: see above.
        like: a number of the keys' type.
    """
    batch, tokens, kv_heads, dim = at[BATCH], at[TOKENS], at[KV_HEADS], at[DIM]
    group, planes, words, bits = at[Q_HEADS] // kv_heads, at[PLANES], at[WORDS], at[BITS]
    rows, size, room = batch * kv_heads, planes * words, at[ROOM] * dim
    q_rows, code_room, slots = batch * at[Q_HEADS] * tokens, at[CODE_ROOM] * words, at[SLOTS]
    q, out = carray(lying_at(at[Q], like), q_rows * dim), carray(lying_at(at[OUT], like), q_rows * dim)
    all_keys = carray(lying_at(at[KEYS], like), (rows, room))
    all_values = carray(lying_at(at[VALUES], like), (rows, room))
    all_codes, query = (
        carray(lying_at(at[CODES], WORD), (rows, code_room)),
        carray(lying_at(at[QUERY], WORD), q_rows * size),
    )
    all_norms, centres = (
        carray(lying_at(at[NORMS], HALF), (rows, at[NORM_ROOM])),
        carray(lying_at(at[CENTRE], FLOAT), (rows, dim)),
    )
    query_map, key_map = (
        carray(lying_at(at[QUERY_MAP], FLOAT), dim * bits),
        carray(lying_at(at[KEY_MAP], FLOAT), dim * bits),
    )
    starts, lse = carray(lying_at(at[STARTS], INT), batch), carray(lying_at(at[LSE], FLOAT), q_rows)
    ids = carray(lying_at(at[IDS], INT), q_rows * slots)
    critical_of, bases = carray(lying_at(at[CRITICAL], INT), q_rows), carray(lying_at(at[BASES], INT), q_rows)
    at_once = group if at[SHARED] else 1
    for unit in range(first, last):
        row, token, head = unit // (tokens * kv_heads), unit // kv_heads % tokens, unit % kv_heads
        held = row * kv_heads + head
        keys, values, codes = all_keys[held], all_values[held], all_codes[held]
        norms, centre = all_norms[held], centres[held]
        end = at[LENGTH] - (tokens - 1 - token if at[CAUSAL] else 0)
        if at[KEY_MAP] and token == 0:
            for n in range(at[ENCODED], at[LENGTH]):
                encode_key(at, keys[n * dim :], centre, key_map, work, codes[n * words :], norms[n:])
        for own in range(group // at_once):
            lead = (row * at[Q_HEADS] + head * group + own * at_once) * tokens + token
            for g in range(at_once):
                one = lead + g * tokens
                for x in range(dim):
                    work.q[g * dim + x] = number(q[one * dim + x])
                if at[QUERY_MAP]:
                    project(work.q[g * dim : (g + 1) * dim], query_map, bits, work.projected)
                    pack(work.projected, bits, planes, words, work.query[g * size :])
                else:
                    for x in range(size):
                        work.query[g * size + x] = query[one * size + x]
                for x in range(dim):
                    work.q[g * dim + x] *= np.float32(shares[SCALE])
            which = (row * kv_heads + head) * tokens + token if at[SHARED] else lead
            start, guess = np.int64(starts[row]), np.int64(bases[which])
            kept, critical, base = choose(at, shares, codes, work.query, at_once * planes, start, end, guess, work)
            bases[which] = np.int32(max(base, 0))
            exact = critical if at[ESTIMATED] else kept
            products(work.q, at_once, dim, keys, work.ids, exact, work.logits)
            if exact < kept:
                for g in range(at_once):
                    signs, medium = work.query[g * size + size - words :], work.ids[critical:kept]
                    logits = work.logits[g, critical:kept]
                    estimate(at, shares[A], work.q[g * dim :], signs, centre, codes, norms, medium, logits)
            for n in range(min(kept, AHEAD)):
                fetch(values, np.uint64(work.ids[n]) * np.uint64(dim), dim, 64 // values.itemsize)
            for g in range(at_once):
                lse[lead + g * tokens] = softmax(work.logits[g], kept)
            weighted(work.logits, at_once, dim, values, work.ids, kept, work.out)
            for g in range(at_once):
                for x in range(dim):
                    out[(lead + g * tokens) * dim + x] = stored(work.out[g * dim + x], like)
            for n in range(kept):
                ids[which * slots + n] = work.ids[n]
            for n in range(kept, slots):
                ids[which * slots + n] = np.int32(-1)
            critical_of[which] = np.int32(critical)


def _kept(digest: int) -> Any:
    """heads(), compiled: Numba keeps it by its own source and what it closes over, here a digest of all sources."""

    @compiled
    def step(at: Any, shares: Any, like: Any, work: Work, first: int, last: int) -> None:
        if digest >= 0:  # always
            heads(at, shares, like, work, first, last)

    return step


step = _kept(sources())
