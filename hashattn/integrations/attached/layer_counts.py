"""LayerCounts: what the calls of one layer did."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hashattn.cache.kv_cache import KVCache
from hashattn.core.types import MEDIUM, Selection
from hashattn.engines.choose import DENSE
from hashattn.integrations.attached.simulate import QueryBlock
from hashattn.selectors import Selector

MOST_WAITING = 32  # steps
TOO_SHORT = "rows too short to be indexed"


@dataclass
class LayerCounts:
    """Counts of one layer: numbers, on a GPU kept there until they are read.

    Attributes:
        sparse: calls that searched.
        dense: calls that attended densely, by reason.
        steps: one-token calls among both, and the queries of simulated calls.
        simulated: these queries.
    """

    sparse: int = 0
    dense: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    simulated: int = 0
    visible: int = 0  # (query head, key) pairs that one-token calls could have read
    kept: Tensor | int = 0  # pairs that they kept, of either tier
    scanned: int = 0  # bytes of codes that they scanned
    read: Tensor | int = 0  # bytes of keys, values, norms and codes that they attended to
    dense_bytes: int = 0  # bytes that full attention would have read
    code_bytes: int = 0  # memory of the last cache's codes
    kv_bytes: int = 0  # and of its keys and values
    positions: int = 0  # queries of one-token calls and simulated ones, over rows
    searched: int = 0  # of these, for which keys were ranked beyond the forced ones
    heads: int = 0  # query heads
    ranked: Tensor | int = 0  # (query head, key) pairs that they kept beyond the forced ones
    engine: str = ""  # of the last one-token call
    why: str = ""
    reads: Tensor | None = None  # int64 [positions], how often a query head read each (when traced)
    waiting: Waiting | None = None  # steps that are counted together, when somebody asks

    def add_reads(self, ids: Tensor, weight: int, columns: int) -> None:
        """Count the columns in ids (-1 empty), `weight` query heads each."""
        counts = torch.bincount(ids[ids >= 0].long(), minlength=columns) * weight
        if self.reads is None:
            self.reads = counts
        else:
            longer, shorter = sorted((self.reads, counts), key=len, reverse=True)
            self.reads = longer.clone()
            self.reads[: len(shorter)] += shorter

    def served_by(self, engine: str, why: str) -> None:
        """Note the engine of the last one-token call, and why it was this one."""
        self.engine, self.why = engine, why

    def settle(self) -> None:
        """Count the steps that wait."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            cost, heads = waiting.settled_cost(), waiting.heads
            self.code_bytes, self.kv_bytes = cost.code_nbytes, cost.kv_nbytes
            lengths = [columns - start for columns in waiting.columns for start in waiting.starts]
            self.add_searched(cost, sum(lengths), waiting.kept, heads, len(waiting.columns))
            if waiting.selector is not None:
                self.add_ranked(cost, waiting.kept, heads, Ranked.of(waiting.selector, waiting.warmup, lengths))

    def add_step(
        self, selection: Selection | None, query: Tensor, kv: KVCache, selector: Selector | None = None
    ) -> None:
        """Count a one-token call; selection is None if it ran dense, else `selector` made it."""
        if selection is not None and selection.filled is not None and selection.tier is None:
            self._let_wait(selection.filled, selection.ids.shape[1], query.shape[1], kv, selector)
            return
        self.settle()
        cost = StepCost.of(kv, query.shape[1])
        keys = len(kv) * kv.batch - sum(kv._starts) if any(kv._starts) else len(kv) * kv.batch
        self.code_bytes, self.kv_bytes = cost.code_nbytes, cost.kv_nbytes
        if selection is None:
            self.add_dense(cost, keys, 1)
            self.positions += kv.batch
            return
        kept, heads = count(selection.ids >= 0), selection.ids.shape[1]
        self.add_searched(cost, keys, kept, heads, 1)
        if selector is not None:
            self.add_ranked(cost, kept, heads, Ranked.of(selector, kv.warmup, [len(kv) - s for s in kv._starts]))
        if selection.tier is not None:
            self.add_medium(cost, count((selection.tier == MEDIUM) & (selection.ids >= 0)))

    def _let_wait(self, kept: int, heads: int, q_heads: int, kv: KVCache, selector: Selector | None) -> None:
        waiting = self.waiting
        if waiting is None or not waiting.takes(kv, heads, q_heads, selector):
            self.settle()
            cost = StepCost.of(kv, q_heads)
            waiting = self.waiting = Waiting(weakref.ref(kv), cost, heads, selector, kv.warmup, tuple(kv._starts))
        waiting.add(kv, kept)

    def add_simulated(self, blocks: Sequence[QueryBlock], q_heads: int, selector: Selector | None = None) -> None:
        """Count a simulated call, in which `selector` chose: each of its queries as a step."""
        last, searched = blocks[-1], [block for block in blocks if block.selection is not None]
        for block in blocks:
            cost, chosen = StepCost.of(block.cache, q_heads), block.selection
            if chosen is None:
                self.add_dense(cost, block.keys, block.tokens)
                self.positions += len(block.lengths)
                continue
            kept, heads = count(chosen.ids >= 0), chosen.ids.shape[1]
            self.add_searched(cost, block.keys, kept, heads, block.tokens)
            if selector is not None:
                self.add_ranked(cost, kept, heads, Ranked.of(selector, block.cache.warmup, block.lengths))
            if chosen.tier is not None:
                self.add_medium(cost, count((chosen.tier == MEDIUM) & (chosen.ids >= 0)))
        self.simulated += sum(block.tokens for block in blocks)
        self.code_bytes, self.kv_bytes = last.cache.code_nbytes, last.cache.nbytes - last.cache.code_nbytes
        if searched:
            self.sparse += 1
            self.served_by("simulated", "each query chooses as if it were decoded")
        else:
            self.dense[TOO_SHORT] += 1

    def add_simulated_dense(self, query: Tensor, key: Tensor, keys: int, reason: str) -> None:
        """Count a call that attends densely beside simulated ones: each of its queries as a step."""
        cost = StepCost(query.shape[1], key.shape[1], key.shape[3] * key.element_size(), 0, 0, 0)
        self.add_dense(cost, keys, query.shape[2])
        self.simulated += query.shape[2]
        self.served_by(DENSE.name, reason)

    def add_dense(self, cost: StepCost, keys: int, steps: int) -> None:
        """Count so many one-token calls that read all of `keys` keys, over rows and calls."""
        everything = 2 * keys * cost.kv_heads * cost.key_bytes
        self.steps += steps
        self.visible += keys * cost.q_heads
        self.dense_bytes += everything
        self.kept = self.kept + keys * cost.q_heads
        self.read = self.read + everything

    def add_searched(self, cost: StepCost, keys: int, kept: Tensor | int, heads: int, steps: int) -> None:
        """Count so many one-token calls that scanned `keys` keys and in which `heads` heads kept `kept` of them."""
        self.steps += steps
        self.visible += keys * cost.q_heads
        self.dense_bytes += 2 * keys * cost.kv_heads * cost.key_bytes
        self.scanned += keys * cost.kv_heads * cost.code_bytes
        self.kept = self.kept + kept * (cost.q_heads // heads)
        self.read = self.read + kept * 2 * cost.key_bytes

    def add_ranked(self, cost: StepCost, kept: Tensor | int, heads: int, ranking: Ranked) -> None:
        """Count queries of which `heads` heads kept `kept` keys: what they ranked of them."""
        self.positions += ranking.positions
        self.searched += ranking.searched
        self.heads = cost.q_heads
        self.ranked = self.ranked + (kept - heads * ranking.unranked) * (cost.q_heads // heads)

    def add_medium(self, cost: StepCost, kept: Tensor | int) -> None:
        """Count so many of the kept keys as medium: they cost a norm and a code instead of the key."""
        self.read = self.read - kept * (cost.key_bytes - 2 - cost.code_bytes)


@dataclass
class Waiting:
    """Steps of a cache, counted together: a token's step waits for no report.

    Attributes:
        columns: of the cache, at each step.
        kept: keys that were kept, in all.
    """

    of: weakref.ref[KVCache]
    cost: StepCost
    heads: int
    selector: Selector | None
    warmup: int
    starts: tuple[int, ...]
    columns: list[int] = field(default_factory=list)
    kept: int = 0
    room: int = 0

    def takes(self, kv: KVCache, heads: int, q_heads: int, selector: Selector | None) -> bool:
        """Whether a step of this kind is one of them."""
        same = self.of() is kv and self.heads == heads and self.cost.q_heads == q_heads and self.selector is selector
        return same and len(self.columns) < MOST_WAITING and self.starts == tuple(kv._starts)

    def add(self, kv: KVCache, kept: int) -> None:
        """Let a step wait that kept so many keys."""
        self.columns.append(len(kv))
        self.kept += kept
        if len(kv) > self.room:  # it has grown
            self.room, self.cost = kv.storage("keys").shape[2], StepCost.of(kv, self.cost.q_heads)

    def settled_cost(self) -> StepCost:
        """As the cache is now, or was when last looked at."""
        kv = self.of()
        return self.cost if kv is None or kv.kind is None else StepCost.of(kv, self.cost.q_heads)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy has counted nothing yet


@dataclass(frozen=True)
class StepCost:
    """What a step of a cache reads, in bytes a key and KV head, and the bytes that the cache takes."""

    q_heads: int
    kv_heads: int
    key_bytes: int
    code_bytes: int
    code_nbytes: int
    kv_nbytes: int

    @classmethod
    def of(cls, kv: KVCache, q_heads: int) -> StepCost:
        """For queries of so many heads."""
        itemsize = kv.storage("keys").element_size()
        key_bytes, code_bytes = kv.head_dim * itemsize, 0
        if kv.encoder is not None:
            row = kv.encoder.code_bytes(kv.head_dim, itemsize)
            code_bytes = row * kv.encoder.code_heads(kv.kv_heads) // kv.kv_heads
        codes = kv.code_nbytes
        return cls(q_heads, kv.kv_heads, key_bytes, code_bytes, codes, kv.nbytes - codes)


@dataclass(frozen=True)
class Ranked:
    """What of some queries' keys is ranked.

    Attributes:
        positions: queries, over rows.
        searched: of these, for which keys may be ranked beyond those that are kept for their position.
        unranked: keys that they keep without ranking any, summed: forced ones, and all in rows too short for an index.
    """

    positions: int
    searched: int
    unranked: int

    @classmethod
    def of(cls, selector: Selector, warmup: int, lengths: Sequence[int]) -> Ranked:
        """For queries that see so many keys each."""
        forced, long = selector.sinks + selector.recents, [n for n in lengths if n >= warmup]
        short = sum(lengths) - sum(long)
        searched = sum(map(selector.chooses_at, long))
        return cls(len(lengths), searched, max(0, short) + sum(min(n, forced) for n in long))


def count(mask: Tensor) -> Tensor | int:
    """How many are True; on a CPU by numpy, which takes a fraction of the time."""
    return mask.sum() if mask.is_cuda else int(np.count_nonzero(mask.numpy()))
