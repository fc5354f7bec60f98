"""A cache, a search and an attention of its own, in NumPy and float64, after the documented definitions alone.

Nothing of hashattn is used: codes of keys and queries are handed in as bytes or floats (encoding is the one inexact
step), and everything that is made of them is made here, a query at a time and as plainly as can be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rule:
    """What a query keeps.

    Attributes:
        kind: "nearest", "tiers", "threshold", "chunks" or "forced".
        k, share: budget; of "tiers" share is t2.
        critical: t1 of "tiers".
        radius: of "threshold"; its k is the limit, None for none.
        per_chunk: of "chunks".
        sinks, recents: forced keys.
        per, combine: how a group chooses.
        vote_share, discount: of a Consensus around it; None for none.
    """

    kind: str
    k: int | None = None
    share: float | None = None
    critical: float = 0.0
    radius: int = 0
    per_chunk: int = 1
    sinks: int = 0
    recents: int = 0
    per: str = "query_head"
    combine: str = "sum"
    vote_share: float | None = None
    discount: int = 0

    def count(self, visible: int) -> int:
        if self.k is not None:
            return min(visible, self.k)
        return visible if self.share is None else math.ceil(self.share * visible)


class Contents:
    """What a cache holds: keys and values [B, Hkv, N, D] and each row's first column."""

    def __init__(self, batch: int, heads: int, dim: int) -> None:
        self.keys = self.values = np.zeros((batch, heads, 0, dim), np.float32)
        self.starts = [0] * batch

    def __len__(self) -> int:
        return int(self.keys.shape[2])

    @property
    def batch(self) -> int:
        return len(self.starts)

    def append(self, k: Array, v: Array, starts: list[int] | None) -> None:
        if starts is not None:
            k, v, self.starts = k.copy(), v.copy(), list(starts)
            for row, first in enumerate(starts):  # padding is kept as zeros
                k[row, :, :first] = v[row, :, :first] = 0
        self.keys, self.values = np.concatenate([self.keys, k], 2), np.concatenate([self.values, v], 2)

    def crop(self, length: int) -> None:
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]

    def select(self, rows: list[int]) -> None:
        self.keys, self.values, self.starts = self.keys[rows], self.values[rows], [self.starts[r] for r in rows]

    def reset(self) -> None:
        self.crop(0)
        self.starts = [0] * self.batch

    def visible(self, row: int, query: int, tokens: int, causal: bool) -> tuple[int, int]:
        """[first, end) of a query that is one of the last `tokens` columns."""
        return self.starts[row], len(self) - tokens + query + 1 if causal else len(self)

    def centres(self, strength: float, keys: int, skip: int) -> Array:
        """A share of the mean of each row's first keys after the sinks, [B, Hkv, D]; zero for rows too short."""
        centres = np.zeros((self.batch, *self.keys.shape[1::2]))
        for row, first in enumerate(self.starts):
            if len(self) - first >= keys + skip:
                part = self.keys[row, :, first + skip : first + skip + keys].astype(np.float64)
                centres[row] = strength * part.mean(1)
        return centres


# ---- distances of queries to every key of a row


def differing(query: Array, codes: Array) -> Array:
    """Differing bits of uint8 codes [bytes] and [N, bytes]."""
    return np.unpackbits(query ^ codes, axis=-1).sum(-1, dtype=np.int64)


def hamming(planes: Array, codes: Array) -> Array:
    """Hamming distances to codes [N, bytes] of a query's planes [b, bytes], weighed by 2^j and summed."""
    return np.stack([differing(plane, codes) << j for j, plane in enumerate(planes)]).sum(0)


def buckets(query: Array, codes: Array) -> Array:
    """Bytes in which a query [bytes] and keys [N, bytes] differ."""
    return (query != codes).sum(-1, dtype=np.int64)


def products(query: Array, keys: Array) -> Array:
    """Negated inner products of a query [D] with keys [N, D]."""
    return -(keys.astype(np.float64) @ query.astype(np.float64))


def biased(query: Array, codes: Array) -> Array:
    """Differing bits of all bytes but the last, and what that byte of the codes [N, bytes] says."""
    return differing(query[:-1], codes[:, :-1]) + codes[:, -1].astype(np.int64)


def looked_up(tables: Array, codes: Array) -> Array:
    """Sums of a query's tables [m, C] at codes [N, m], each entry in whole units of 1/1024."""
    units = np.rint(tables.astype(np.float64) * 1024).astype(np.int64)
    return np.stack([units[j, codes[:, j]] for j in range(len(units))]).sum(0)


def rabitq(query: Array, codes: Array) -> Array:
    """Negated estimates of the products of a rotated query [D] with the keys of codes [N, bytes] (RaBitQ, eq. 12)."""
    signs = np.unpackbits(codes[:, :-8], axis=-1, bitorder="little")[:, : len(query)] * 2.0 - 1
    norm, alignment = np.ascontiguousarray(codes[:, -8:]).view(np.float32).astype(np.float64).T
    return -norm / (alignment * math.sqrt(len(query))) * (signs @ query)


def page_bounds(query: Array, keys: Array, first: int, page: int) -> Array:
    """What no product with a key of the same page is above, negated, in whole units of 1/1024 rounded down."""
    bounds = np.zeros(len(keys), np.int64)
    for begin in range(first, len(keys), page):
        part = keys[begin : begin + page]
        most = np.maximum(query * part.min(0), query * part.max(0)).sum()
        bounds[begin : begin + page] = math.floor(-most * 1024)
    return bounds


def probed(planes: Array, codes: Array, tables: int, bits: int, probes: int) -> set[int]:
    """Keys of codes [N, bytes] that share a bucket with a probe of a query's planes [b, bytes], in any table."""
    unpacked = np.unpackbits(codes, axis=-1, bitorder="little")
    levels = sum(np.unpackbits(plane, bitorder="little").astype(int) << j for j, plane in enumerate(planes))
    half, found = 1 << (len(planes) - 1), set()
    for table in range(tables):
        part = range(table * bits, (table + 1) * bits)
        own = [int(levels[i] >= half) for i in part]
        margins = [2 * (levels[i] - half if levels[i] >= half else half - 1 - levels[i]) + 1 for i in part]
        unsure = sorted(range(bits), key=lambda i: (margins[i], i))[:12]
        flips = [[i for m, i in enumerate(unsure) if n >> m & 1] for n in range(1 << len(unsure))]
        flips.sort(key=lambda flipped: sum(margins[i] ** 2 for i in flipped))  # equal costs stay in order
        for flipped in flips[:probes]:
            bucket = [bit ^ (i in flipped) for i, bit in enumerate(own)]
            found |= set(np.flatnonzero((unpacked[:, part.start : part.stop] == bucket).all(-1)).tolist())
    return found


# ---- which keys a query keeps


@dataclass
class Kept:
    """Columns by tier, and how near the cut came to another choice (of floats, which rounding may swap)."""

    critical: set[int]
    medium: set[int]
    margin: float = math.inf

    @property
    def all(self) -> set[int]:
        return self.critical | self.medium


class Choice:
    """The keys that the G heads of a KV head keep for one query each.

    Args:
        distances: of each head to all columns, [G, N].
        first, end: the columns that they see.
        found: the columns that an index finds for each of them; None where it finds all.
    """

    def __init__(
        self, rule: Rule, distances: Array, first: int, end: int, found: list[set[int]] | None = None
    ) -> None:  # fmt: skip
        self.found = found
        self.rule, self.own, self.first, self.end = rule, distances, first, end
        self.columns = range(first, max(first, end))
        self.visible = len(self.columns)
        # a threshold keeps the last key anyway
        self.recents = max(rule.recents, 1) if rule.kind == "threshold" else rule.recents
        self.forced = {n for n in self.columns if n < first + rule.sinks or n >= end - self.recents}

    def choose(self) -> list[Kept]:
        """One for each head; the same for all where they choose together."""
        rule, group = self.rule, len(self.own)
        if rule.kind == "forced":
            return [Kept(self.forced, set())] * group
        if self.found is not None:  # each head by itself; the last key where there is none
            allowed = [{n for n in found if n in self.columns} for found in self.found]
            last = set(self.columns[-1:])
            return [
                self._nearest(own, some or self.forced or last) for own, some in zip(self.own, allowed, strict=True)
            ]
        if rule.per == "query_head" or group == 1:
            return [self._keep(own, rule.radius) for own in self.own]
        total = self.own.sum(0)
        if rule.combine == "sum":
            return [self._keep(total, group * rule.radius)] * group
        if rule.kind == "threshold":
            near = (self.own <= rule.radius).sum(0)
            allowed = near > 0 if rule.combine == "union" else near * 2 > group
            return [self._nearest(total, {n for n in self.columns if allowed[n]})] * group
        heads = [self._keep(own, rule.radius) for own in self.own]
        margin = min(head.margin for head in heads)
        if rule.combine == "union":
            critical = set().union(*(head.critical for head in heads))
            return [Kept(critical, set().union(*(head.all for head in heads)) - critical, margin)] * group
        votes = np.zeros(len(total), np.int64)
        for head in heads:
            votes[sorted(head.all)] += 1
        span = 2 * np.abs(total).max(initial=0) + 1
        kept = self._keep((group - votes) * span + total, 0)
        return [Kept(kept.critical, kept.medium, min(margin, kept.margin))] * group

    def _keep(self, distances: Array, radius: int) -> Kept:
        if self.rule.kind == "threshold":
            return self._nearest(distances, {n for n in self.columns if distances[n] <= radius})
        if self.rule.kind == "chunks":
            return self._of_chunks(distances)
        return self._nearest(distances, set(self.columns))

    def _ranked(self, distances: Array, allowed: set[int]) -> list[int]:
        """Forced keys, then the others by distance, ties to the most recent."""
        return sorted(
            allowed | self.forced, key=lambda n: (n not in self.forced, n not in self.forced and distances[n], -n)
        )

    def _wanted(self, count: int) -> int:
        return max(count, min(self.visible, self.rule.sinks + self.recents))

    def _nearest(self, distances: Array, allowed: set[int]) -> Kept:
        order, rule = self._ranked(distances, allowed), self.rule
        wanted = self._wanted(rule.count(self.visible))
        few = self._wanted(math.ceil(rule.critical * self.visible)) if rule.kind == "tiers" else wanted
        edges = [distances[order[n]] - distances[order[n - 1]] for n in {few, wanted} if 0 < n < len(order)]
        return Kept(set(order[:few]), set(order[few:wanted]), min(map(float, edges), default=math.inf))

    def _of_chunks(self, distances: Array) -> Kept:
        rule, kept, margin = self.rule, set(), math.inf
        assert rule.k is not None
        chunks = rule.k // rule.per_chunk
        for chunk in range(chunks):
            own = {n for n in self.columns if n // 8 % chunks == chunk}
            order = [n for n in self._ranked(distances, own) if n in own]
            wanted = max(rule.per_chunk, len(own & self.forced))
            kept |= set(order[:wanted])
            if 0 < wanted < len(order):
                margin = min(margin, float(distances[order[wanted]] - distances[order[wanted - 1]]))
        return Kept(kept, set(), margin)


def choose(
    rule: Rule, distances: Array, kv_heads: int, first: int, end: int, found: list[set[int]] | None = None
) -> list[Kept]:
    """What each of the Hq heads keeps for one query, of its distances to all columns, [Hq, N]; see Choice."""
    group = len(distances) // kv_heads
    if rule.vote_share is not None:
        plain = [kept for h in range(kv_heads) for kept in _of_head(rule, distances, group, h, first, end)]
        votes = np.zeros(distances.shape[1], np.int64)
        for kept in plain:
            votes[sorted(kept.all)] += 1
        distances = distances - rule.discount * (votes > rule.vote_share * len(distances))
    if found is not None:
        return Choice(rule, distances, first, end, found).choose()
    return [kept for h in range(kv_heads) for kept in _of_head(rule, distances, group, h, first, end)]


def _of_head(rule: Rule, distances: Array, group: int, head: int, first: int, end: int) -> list[Kept]:
    return Choice(rule, distances[head * group : (head + 1) * group], first, end).choose()


# ---- attention to them


def attend(logits: dict[int, float], values: Array) -> tuple[Array, float]:
    """Softmax over the columns of logits, and the sum of values [N, D] by it: (out [D], lse); zero of nothing."""
    if not logits:
        return np.zeros(values.shape[1]), -math.inf
    columns = sorted(logits)
    x = np.array([logits[n] for n in columns])
    weights = np.exp(x - x.max())
    total = weights.sum()
    return weights / total @ values[columns].astype(np.float64), float(x.max() + math.log(total))


def estimate(q: Array, centre: Array, a: float, norm: float, differing_bits: int, bits: int) -> float:
    """DASH-KV's q.k of a medium key, of its code and norm: q.c + a |q| |k - c| (1 - 2 differing / bits)."""
    q = q.astype(np.float64)
    return float(q @ centre + a * math.sqrt(float(q @ q)) * norm * (1 - 2 * differing_bits / bits))
