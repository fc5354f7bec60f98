"""One decode step of a few heads: queries and the newest keys encoded, distances, the exact choice, and attention."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from hashattn.ops.compiled import places as p
from hashattn.ops.compiled.attend import AHEAD, fetch, products, softmax, weighted
from hashattn.ops.compiled.calibrate import add_votes, calibrate, gather_prior, mark_prior, vote
from hashattn.ops.compiled.choose import choose, look, seen, spread, wanted
from hashattn.ops.compiled.encode import multiplied, pack, project, rectify, to_unit
from hashattn.ops.compiled.estimate import estimate, tabulate
from hashattn.ops.compiled.jit import compiled, inlined, lying_at, number, sources, stored
from hashattn.ops.compiled.places import Layer, Work
from hashattn.ops.compiled.scan import limits


@inlined
def encode_key(at: Any, key: Any, centre: Any, linear: Any, work: Work, code: Any, norm: Any) -> None:
    """The code of a key, and where norms are kept its own."""
    size = np.float32(0)
    for x in range(at[p.DIM]):
        z = number(key[x]) - centre[x]
        work.out[x] = z
        size += z * z
    project(work.out[: at[p.DIM]], linear, at[p.BITS], work.projected[0])
    pack(work.projected[0], at[p.BITS], 1, at[p.WORDS], code)
    if at[p.WITH_NORMS]:
        norm[0] = stored(np.sqrt(size), p.HALF)


@inlined
def encode_queries(at: Any, like: Any, work: Work) -> None:
    """All queries, packed: by a linear map, to which an MLP is added where there is one."""
    rows, dim, bits = at[p.BATCH] * at[p.Q_HEADS] * at[p.TOKENS], at[p.DIM], at[p.BITS]
    size = at[p.PLANES] * at[p.WORDS]
    q, query = carray(lying_at(at[p.Q], like), rows * dim), carray(lying_at(at[p.QUERY], p.WORD), rows * size)
    linear = carray(lying_at(at[p.QUERY_MAP], p.FLOAT), dim * bits)
    for first in range(0, rows, p.AT_ONCE):
        count, x, y = min(p.AT_ONCE, rows - first), work.hidden[0], work.hidden[1]
        for r in range(count):
            for d in range(dim):
                x[r, d] = number(q[(first + r) * dim + d])
            if at[p.UNIT]:
                to_unit(x[r], dim)
            work.projected[r, :bits] = np.float32(0)
            work.projected[r, bits:] = np.float32(-1)
        multiplied(x, count, dim, linear, bits, work.projected)
        width = dim
        for layer in range(at[p.LAYERS]):
            own = p.LAYER + 3 * layer
            wide = at[own + 2]
            weights = carray(lying_at(at[own], p.FLOAT), width * wide)
            biases = carray(lying_at(at[own + 1], p.FLOAT), wide)
            for r in range(count):
                if layer > 0:
                    rectify(x[r], width)
                for j in range(wide):
                    y[r, j] = biases[j]
            multiplied(x, count, width, weights, wide, y)
            x, y, width = y, x, wide
        for r in range(count):
            if at[p.LAYERS]:
                for j in range(bits):
                    work.projected[r, j] += x[r, j]
            pack(work.projected[r], bits, at[p.PLANES], at[p.WORDS], query[(first + r) * size :])


@inlined
def own_query(query: Any, lead: int, at_once: int, tokens: int, size: int, work: Work) -> None:
    """The packed queries of a choice, one behind the other: to work.query."""
    for g in range(at_once):
        for x in range(size):
            work.query[g * size + x] = query[(lead + g * tokens) * size + x]


@inlined
def rank(at: Any, shares: Any, work: Work, layer: Layer, first: int, last: int) -> None:
    """Raw distances of units of one query to layer.near, and of each choice where the keys that it would keep end.

    To layer.limits: the base of its distances, and what limits() says.
    """
    tokens, kv_heads, size, words = at[p.TOKENS], at[p.KV_HEADS], at[p.PLANES] * at[p.WORDS], at[p.WORDS]
    rows, group, code_room = at[p.BATCH] * kv_heads, at[p.Q_HEADS] // kv_heads, at[p.CODE_ROOM] * words
    all_codes = carray(lying_at(at[p.CODES], p.WORD), (rows, code_room))
    query = carray(lying_at(at[p.QUERY], p.WORD), rows * group * tokens * size)
    starts = carray(lying_at(at[p.STARTS], p.INT), at[p.BATCH])
    bases = carray(lying_at(at[p.BASES], p.INT), rows * group * tokens)
    at_once = group if at[p.SHARED] else 1
    for unit in range(first, last):
        row, token, head = unit // (tokens * kv_heads), unit // kv_heads % tokens, unit % kv_heads
        own, codes = seen(at, np.int64(starts[row]), token), all_codes[row * kv_heads + head]
        count, padded = wanted(at, at[p.K], shares[p.SHARE], own), (own.high - own.low + 63) // 64 * 64
        for part in range(group // at_once):
            lead = (row * at[p.Q_HEADS] + head * group + part * at_once) * tokens + token
            own_query(query, lead, at_once, tokens, size, work)
            which = (row * kv_heads + head) * tokens + token if at[p.SHARED] else lead
            choice = head * (group // at_once) + part
            base, most, cut, near = np.int64(-1), np.int64(-1), np.int64(0), layer.near[choice]
            if count > 0:
                guess, planes = np.int64(bases[which]), at_once * at[p.PLANES]
                base, top, within = look(
                    at, codes, work.query, planes, own.low, own.high, count, base, guess, layer.more, 0, work.sums, near
                )
                most, cut = limits(near, padded, min(count, within), top)
            layer.limits[choice, 0], layer.limits[choice, 1], layer.limits[choice, 2] = base, most, cut


@inlined
def tally_up(at: Any, shares: Any, layer: Layer, row: int, token: int) -> None:
    """What the distances of each key that a query sees are raised by: to layer.more."""
    starts, choices = carray(lying_at(at[p.STARTS], p.INT), at[p.BATCH]), at[p.KV_HEADS if at[p.SHARED] else p.Q_HEADS]
    own = seen(at, np.int64(starts[row]), token)
    count, more = own.high - own.low, layer.more
    padded = (count + 63) // 64 * 64
    more[:padded] = np.uint8(0)
    if at[p.PRIOR] != 0:
        prior, slots, heads, group = layer.prior[:count], at[p.BEFORE_SLOTS], at[p.BEFORE_HEADS], at[p.BEFORE_GROUP]
        prior[:] = np.float32(0)
        ids = carray(lying_at(at[p.BEFORE], p.INT), (at[p.BATCH], heads, at[p.TOKENS], slots))
        weights = carray(lying_at(at[p.BEFORE_WEIGHTS], p.FLOAT), (at[p.BATCH], heads, group, at[p.TOKENS], slots))
        for head in range(heads):
            gather_prior(ids[row, head, token], weights[row, head, :, token], group, own.low, prior)
        mark_prior(prior, heads, own.visible, shares[p.RATIO], max(0, -at[p.PRIOR]), max(0, at[p.PRIOR]), more)
    if at[p.VOTE] != 0:
        layer.votes[:padded] = np.uint8(0)
        for choice in range(choices):
            vote(layer.near[choice], count, layer.limits[choice, 1], layer.limits[choice, 2], layer.votes)
        add_votes(layer.votes, count, at[p.VOTES], max(0, -at[p.VOTE]), max(0, at[p.VOTE]), more)


@inlined
def encode_keys(at: Any, like: Any, work: Work, first: int, last: int) -> None:
    """Codes, and norms, of the newest keys of units of one query."""
    dim, words, tokens, kv_heads = at[p.DIM], at[p.WORDS], at[p.TOKENS], at[p.KV_HEADS]
    rows, linear = at[p.BATCH] * kv_heads, carray(lying_at(at[p.KEY_MAP], p.FLOAT), dim * at[p.BITS])
    all_keys = carray(lying_at(at[p.KEYS], like), (rows, at[p.ROOM] * dim))
    all_codes = carray(lying_at(at[p.CODES], p.WORD), (rows, at[p.CODE_ROOM] * words))
    all_norms, centres = (
        carray(lying_at(at[p.NORMS], p.HALF), (rows, at[p.NORM_ROOM])),
        carray(lying_at(at[p.CENTRE], p.FLOAT), (rows, dim)),
    )
    for unit in range(first, last):
        if unit // kv_heads % tokens == 0:
            held = unit // (tokens * kv_heads) * kv_heads + unit % kv_heads
            keys, codes, norms = all_keys[held], all_codes[held], all_norms[held]
            for n in range(at[p.ENCODED], at[p.LENGTH]):
                encode_key(at, keys[n * dim :], centres[held], linear, work, codes[n * words :], norms[n:])


@inlined
def heads(at: Any, shares: Any, like: Any, work: Work, layer: Layer, first: int, last: int) -> None:
    """The choice and the attention of units: KV heads, numbered over rows, queries and heads."""
    batch, tokens, kv_heads, dim = at[p.BATCH], at[p.TOKENS], at[p.KV_HEADS], at[p.DIM]
    group, planes, words = at[p.Q_HEADS] // kv_heads, at[p.PLANES], at[p.WORDS]
    rows, size, room = batch * kv_heads, planes * words, at[p.ROOM] * dim
    q_rows, code_room, slots = batch * at[p.Q_HEADS] * tokens, at[p.CODE_ROOM] * words, at[p.SLOTS]
    q, out = carray(lying_at(at[p.Q], like), q_rows * dim), carray(lying_at(at[p.OUT], like), q_rows * dim)
    all_keys = carray(lying_at(at[p.KEYS], like), (rows, room))
    all_values = carray(lying_at(at[p.VALUES], like), (rows, room))
    all_codes, query = (
        carray(lying_at(at[p.CODES], p.WORD), (rows, code_room)),
        carray(lying_at(at[p.QUERY], p.WORD), q_rows * size),
    )
    all_norms, centres = (
        carray(lying_at(at[p.NORMS], p.HALF), (rows, at[p.NORM_ROOM])),
        carray(lying_at(at[p.CENTRE], p.FLOAT), (rows, dim)),
    )
    starts, lse = carray(lying_at(at[p.STARTS], p.INT), batch), carray(lying_at(at[p.LSE], p.FLOAT), q_rows)
    weights, ids = (
        carray(lying_at(at[p.WEIGHTS], p.FLOAT), q_rows * slots),
        carray(lying_at(at[p.IDS], p.INT), q_rows * slots),
    )
    tiers, bases = carray(lying_at(at[p.TIERS], p.BYTE), q_rows * slots), carray(lying_at(at[p.BASES], p.INT), q_rows)
    at_once, most = group if at[p.SHARED] else 1, spread(at)
    for unit in range(first, last):
        row, token, head = unit // (tokens * kv_heads), unit // kv_heads % tokens, unit % kv_heads
        held, own = row * kv_heads + head, seen(at, np.int64(starts[row]), token)
        keys, values, codes = all_keys[held], all_values[held], all_codes[held]
        norms, centre = all_norms[held], centres[held]
        for part in range(group // at_once):
            lead = (row * at[p.Q_HEADS] + head * group + part * at_once) * tokens + token
            own_query(query, lead, at_once, tokens, size, work)
            for g in range(at_once):
                for x in range(dim):
                    work.q[g * dim + x] = number(q[(lead + g * tokens) * dim + x]) * np.float32(shares[p.SCALE])
            which, began = held * tokens + token if at[p.SHARED] else lead, np.int64(-1)
            guess = np.int64(bases[which])
            if most > 0 and at[p.VOTE] != 0:  # distances are there, raw
                choice = head * (group // at_once) + part
                began = layer.limits[choice, 0]
                padded = (own.high - own.low + 63) // 64 * 64
                if began >= 0:
                    calibrate(layer.near[choice], padded, layer.more, most if began > 0 else 0, work.near)
            kept, critical, base = choose(
                at, shares, codes, work.query, at_once * planes, own, began, guess, layer.more, work
            )
            bases[which] = np.int32(max(base, 0))
            exact = critical if at[p.ESTIMATED] else kept
            products(work.q, at_once, dim, keys, work.ids, exact, work.logits)
            if exact < kept:
                for g in range(at_once):
                    signs, medium = work.query[g * size + size - words :], work.ids[critical:kept]
                    logits = work.logits[g, critical:kept]
                    estimate(at, shares[p.A], work.q[g * dim :], signs, centre, codes, norms, medium, logits, work)
            for n in range(min(kept, AHEAD)):
                fetch(values, np.uint64(work.ids[n]) * np.uint64(dim), dim, 64 // values.itemsize)
            for g in range(at_once):
                lse[lead + g * tokens] = softmax(work.logits[g], kept)
            weighted(work.logits, at_once, dim, values, work.ids, kept, work.out)
            for g in range(at_once):
                for x in range(dim):
                    out[(lead + g * tokens) * dim + x] = stored(work.out[g * dim + x], like)
                if at[p.WEIGHTS]:
                    place = (lead + g * tokens) * slots
                    for n in range(kept):
                        weights[place + n] = work.logits[g, n]
                    weights[place + kept : place + slots] = np.float32(0)
            for n in range(kept):
                ids[which * slots + n] = work.ids[n]
            ids[which * slots + kept : which * slots + slots] = np.int32(-1)
            if at[p.TIERS]:
                tiers[which * slots : which * slots + slots] = np.uint8(0)
                tiers[which * slots + critical : which * slots + kept] = np.uint8(1)


@inlined
def phases(at: Any, shares: Any, like: Any, work: Work, layer: Layer, what: int, first: int, last: int) -> None:
    """What is asked for, of units from `first` to `last`, one query of a row after the other.

    Args:
        at: int64 [COUNT], shares: float64: see above.
        like: a number of the keys' type.
    """
    tokens, kv_heads = at[p.TOKENS], at[p.KV_HEADS]
    if what & p.ATTEND and at[p.HIDDEN]:
        tabulate(at, work)
    if what & p.QUERIES and at[p.QUERY_MAP]:
        encode_queries(at, like, work)
    while first < last:
        one = first // kv_heads
        end = min(last, (one + 1) * kv_heads)
        if what & p.NEWEST and at[p.KEY_MAP]:
            encode_keys(at, like, work, first, end)
        if what & p.RANK:
            rank(at, shares, work, layer, first, end)
        if what & p.TALLY:
            tally_up(at, shares, layer, one // tokens, one % tokens)
        if what & p.ATTEND:
            heads(at, shares, like, work, layer, first, end)
        first = end


def _kept(digest: int) -> Any:
    """phases(), compiled: Numba keeps it by its own source and what it closes over, here a digest of all sources."""

    @compiled
    def step(at: Any, shares: Any, like: Any, work: Work, layer: Layer, what: int, first: int, last: int) -> None:
        if digest >= 0:  # always
            phases(at, shares, like, work, layer, what, first, last)

    return step


step = _kept(sources())
