"""What comes between the two kernels of exact top-k where distances are calibrated.

vote() marks the keys that the choices on raw distances would keep, and those that the layer before gave weight;
discount_lists() brings the candidates that are marked nearer. The scan has listed all that may come near enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hashattn.ops.decode.device import capability, registers
from hashattn.ops.decode.inputs import Before, Inputs
from hashattn.ops.decode.sizes import Sizes, grid
from hashattn.ops.decode.triton.codes import UNITS, VOTE, discount, program_row, read_bound, span
from hashattn.ops.decode.triton.topk import budget, by_chunk, count_codes, cut_at, cut_of_codes, level_of, totals

ACROSS = tl.constexpr(4)  # chunks of a program


@triton.jit
def mark_weights(
    marks, ids, weights, head0, t, T, heads, kept_heads, slots, room, SUM: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Add this program's share of what the layer before gave its keys: of query heads head0 to head0 + SUM.

    Args:
        marks: of the row and query, int64 [room].
        ids, weights: int32 [B, kept_heads, T, slots] and float32 [B, heads, T, slots].
        head0: of [B, heads].
    """
    for g in tl.static_range(SUM):
        head = head0 + g
        of_ids = (head // (heads // kept_heads) * T + t).to(tl.int64) * slots
        of_weights = (head * T + t).to(tl.int64) * slots
        for i in range(tl.program_id(0) * TILE, slots, tl.num_programs(0) * TILE):
            at = i + tl.arange(0, TILE)
            column = tl.load(ids + of_ids + at, mask=at < slots, other=-1)
            weight = tl.load(weights + of_weights + at, mask=at < slots, other=0.0)
            given = (column >= 0) & (column < room) & (weight > 0)
            amount = tl.maximum((tl.where(given, weight, 0.0) * UNITS).to(tl.int64), 1)
            tl.atomic_add(marks + column, amount, mask=given, sem="relaxed")


@triton.jit(do_not_specialize=["kept_heads", "kept_slots"])
def vote(
    query, codes, candidates, counts, starts, length, marks, ids, weights, share, k, least, sinks, recents, limit,
    room, chunks, kept_heads, kept_slots, kv_heads, T, G: tl.constexpr, SUM: tl.constexpr, WORDS: tl.constexpr,
    PLANES: tl.constexpr, BIASED: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BINS: tl.constexpr,
    LEVELS: tl.constexpr, SHARE: tl.constexpr, VOTES: tl.constexpr, CAUSAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(chunks / 4), Hkv * T * G / SUM, B). See scan and attend_topk for what is not named.

    Args:
        marks: int64 [B, T, room], zeros; added to: see discount.
        ids, weights: what the layer before kept, int32 [B, kept_heads, T, kept_slots], and its softmax weights,
            float32 [B, Hq, T, kept_slots]; None if it ran dense, or nobody asks.
        VOTES: whether votes are counted.
    """
    TILE: tl.constexpr = 512 if LEVELS <= 1024 else 256
    row = program_row()
    HEADS: tl.constexpr = G // SUM
    t = row % T
    head = row // T  # of [B, Hkv * HEADS]
    kv = head // HEADS
    first, end = span(starts, length, limit, kv // kv_heads, t, T, CAUSAL)
    wanted = budget(end - first, k, share, least, SHARE)
    own_marks = marks + (kv // kv_heads * T + t).to(tl.int64) * room
    if PDL:
        gdc_wait()
    if ids is not None:
        mark_weights(own_marks, ids, weights, head * SUM, t, T, kv_heads * G, kept_heads, kept_slots, room, SUM, 256)
    if VOTES:
        ballot = tl.full([], SUM, tl.int64) << VOTE
        own = counts + row.to(tl.int64) * BINS * chunks
        running = totals(own, chunks, BINS, 2048 // BINS)
        bin, upto = cut_at(running, wanted, BINS)
        missed = (tl.max(running, 0) < wanted) | ((bin == 0) & (upto > wanted))
        if missed:
            if tl.program_id(0) == 0:
                query_at = query + (head.to(tl.int64) * SUM * T + t) * PLANES * WORDS
                own_codes = codes + kv.to(tl.int64) * room * WORDS
                seen = (query_at, T * PLANES * WORDS, own_codes, first, end, sinks, recents, 0, room)
                cut, dropped = cut_of_codes(
                    count_codes(*seen, SUM, WORDS, PLANES, BIASED, LEVELS, False, TILE), wanted, LEVELS
                )
                state = tl.zeros([1], tl.int32)
                for t0 in range(first // TILE * TILE, end, TILE):
                    near = level_of(t0, *seen, SUM, WORDS, PLANES, BIASED, LEVELS, False, TILE)
                    tie = (near == cut).to(tl.int32)
                    chosen = (near < cut) | ((near == cut) & (tl.cumsum(tie, 0) + state > dropped))
                    voted = tl.zeros([TILE], tl.int64) + ballot
                    tl.atomic_add(own_marks + t0 + tl.arange(0, TILE), voted, mask=chosen, sem="relaxed")
                    state += tl.sum(tie, 0)
        else:
            nearer = BINS - 1 - bin
            c = tl.arange(0, CHUNKS)
            ties = (by_chunk(own, chunks, bin, CHUNKS) >> 32).to(tl.int32)
            ties = tl.cumsum(ties, 0) - ties
            mine = tl.program_id(0) * ACROSS + tl.arange(0, ACROSS)
            state = tl.sum(tl.where(c[None, :] == mine[:, None], ties[None, :], 0), 1)
            n = tl.load(own + (BINS - 1) * chunks + mine, mask=mine < chunks, other=0).to(tl.int32)
            lists = candidates + (row.to(tl.int64) * chunks + mine) * CHUNK
            for t0 in range(0, tl.max(n, 0), 128):
                at = t0 + tl.arange(0, 128)
                entry = tl.load(lists[:, None] + at[None, :], mask=at[None, :] < n[:, None], other=-1)
                level = entry >> 16
                equal = level == nearer
                if bin == 0:  # holds everything nearer as well: then all of it is chosen
                    equal = level >= nearer
                order = tl.cumsum(equal.to(tl.int32), 1) + state[:, None]
                chosen = ((level > nearer) & (bin > 0)) | (equal & (order > upto - wanted))
                voted = tl.zeros([ACROSS, 128], tl.int64) + ballot
                column = mine[:, None] * CHUNK + (entry & 0xFFFF)
                tl.atomic_add(own_marks + column, voted, mask=chosen, sem="relaxed")
                state += tl.sum(equal.to(tl.int32), 1)
    if PDL:
        gdc_launch_dependents()


@triton.jit
def discount_lists(
    bounds, candidates, counts, starts, length, marks, votes, agreement, ratio, prior, reach, limit, room, chunks,
    kv_heads, T, HEADS: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, CAUSAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(chunks / 4), Hkv * T * HEADS, B). Rewrites a row's candidates and their counts, in place.

    Entries and counts are then of the bound less `reach`, within which no key is missing: what was not listed was
    farther than the bound, and comes nearer by `reach` at most. Keys farther than that are left out.

    Args:
        HEADS: choices of a KV head. See attend_topk for the others.
    """
    TILE: tl.constexpr = 128
    row = program_row()
    t = row % T
    b = row // T // HEADS // kv_heads
    first, end = span(starts, length, limit, b, t, T, CAUSAL)
    if PDL:
        gdc_wait()
    own_marks = marks + (b * T + t).to(tl.int64) * room
    bound = read_bound(bounds + row)
    lane = tl.arange(0, ACROSS)
    mine = tl.program_id(0) * ACROSS + lane
    inside = mine < chunks
    own = counts + row.to(tl.int64) * BINS * chunks
    n = tl.load(own + (BINS - 1) * chunks + mine, mask=inside, other=0).to(tl.int32)
    lists = candidates + (row.to(tl.int64) * chunks + mine) * CHUNK
    taken = tl.zeros([ACROSS], tl.int32)
    sums = tl.zeros([ACROSS * BINS], tl.int32)
    for t0 in range(0, tl.max(n, 0), TILE):
        at = t0 + tl.arange(0, TILE)
        listed = at[None, :] < n[:, None]
        entry = tl.load(lists[:, None] + at[None, :], mask=listed, other=-1)
        place, level = entry & 0xFFFF, entry >> 16
        near = discount(mine[:, None] * CHUNK + place, listed, own_marks, end - first, votes, agreement, ratio, prior)
        level = tl.where(level > bound, level, level + near - reach)  # above it are forced keys
        kept = listed & (level >= 0)
        rank = tl.cumsum(kept.to(tl.int32), 1) + taken[:, None] - 1
        tl.debug_barrier()  # other threads have read what is written over
        tl.store(lists[:, None] + rank, level << 16 | place, mask=kept)
        tl.debug_barrier()
        taken += tl.sum(kept.to(tl.int32), 1)
        bins = lane[:, None] * BINS + tl.minimum(tl.maximum(BINS - 1 - level, 0), BINS - 1)
        sums += tl.histogram(tl.reshape(bins, [ACROSS * TILE]), ACROSS * BINS, mask=tl.reshape(kept, [ACROSS * TILE]))
    upto = tl.cumsum(tl.reshape(sums, [ACROSS, BINS]), 1)
    to = own + tl.arange(0, BINS)[None, :] * chunks + mine[:, None]
    tl.store(to, upto.to(tl.uint16), mask=inside[:, None])
    if PDL:
        gdc_launch_dependents()


class Calibration(NamedTuple):
    """What kernels take of a calibration: see discount of codes.py, and attend_topk for the reach."""

    votes: int
    agreement: int
    ratio: float
    prior: int
    reach: int

    @classmethod
    def of(cls, sizes: Sizes) -> Calibration:
        """Of a step; nothing comes nearer without one."""
        rule, heads = sizes.rule, sizes.q_heads
        agreement, prior = (sizes.summed * discount for discount in rule.discounts)
        return cls(rule.votes(heads), agreement, (rule.prior_ratio or 0.0) * heads, prior, sizes.reach)


def prepare(
    like: Inputs, sizes: Sizes, buffers: dict[str, Tensor], constants: dict[str, Any], share: int
) -> Callable[[Tensor, Before | None], None]:
    """The two launches of a step like this one, of its packed queries and what the layer before kept.

    Args:
        buffers: its workspace.
        constants: what the kernels are compiled with.
        share: of the visible keys, the bits of a float64.
    """
    rule, stored, bounds = sizes.rule, like.stored, like.bounds
    assert bounds is not None
    programs = grid(triton.cdiv(sizes.chunks, ACROSS.value), sizes.rows, sizes.batch)
    found, ends = (buffers["candidates"], buffers["counts"]), (like.starts, stored.length, buffers["marks"])
    budget = share, rule.k or 0, rule.least, rule.sinks, rule.recents
    rooms, last = (sizes.limit, sizes.code_room, sizes.chunks), (sizes.kv_heads, sizes.tokens)
    by, votes = Calibration.of(sizes), rule.vote_share is not None
    voting = constants | vote_options(constants["LEVELS"], capability(like.q.device)) | {"VOTES": votes}
    shared = ("CHUNK", "BINS", "CAUSAL", "PDL", "launch_pdl")
    listing = {name: constants[name] for name in shared if name in constants}
    listing |= {"HEADS": sizes.group // sizes.summed, "num_warps": 4}

    def calibrate(query: Tensor, before: Before | None) -> None:
        before = before if rule.prior_ratio is not None else None
        if votes or before is not None:
            kept: tuple[Tensor | None, ...] = (None, None)
            shape = 1, 1
            if before is not None:
                kept = before.ids.contiguous(), before.weights.float().contiguous()
                shape = before.ids.shape[1], before.ids.shape[3]
            vote[programs](query, stored.codes, *found, *ends, *kept, *budget, *rooms, *shape, *last, **voting)
        discount_lists[programs](bounds[0], *found, *ends, *by, *rooms, *last, **listing)

    return calibrate


def vote_options(levels: int, capability: tuple[int, int]) -> dict[str, int]:
    """How the kernel that counts votes is compiled."""
    return {"num_warps": 4 if levels <= 1024 else 8, **registers(capability)}
