"""What ran, layer by layer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.core.types import MEDIUM, Selection
from hashattn.integrations.transformers.simulate import Block
from hashattn.selectors import Selector


@dataclass
class LayerRecord:
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

    def add_reads(self, ids: Tensor, weight: int, columns: int) -> None:
        """Count the columns in ids (-1 empty), `weight` query heads each."""
        counts = torch.bincount(ids[ids >= 0].long(), minlength=columns) * weight
        if self.reads is None:
            self.reads = counts
        else:
            longer, shorter = sorted((self.reads, counts), key=len, reverse=True)
            self.reads = longer.clone()
            self.reads[: len(shorter)] += shorter

    def add_step(
        self, selection: Selection | None, query: Tensor, kv: KVCache, selector: Selector | None = None
    ) -> None:  # fmt: skip
        """Count a one-token call; selection is None if it ran dense, else `selector` made it."""
        cost = Cost.of(kv, query.shape[1])
        keys = len(kv) * kv.batch - sum(kv._starts) if any(kv._starts) else len(kv) * kv.batch
        self.code_bytes, self.kv_bytes = cost.code_nbytes, cost.kv_nbytes
        if selection is None:
            self.add_dense(cost, keys, 1)
            self.positions += kv.batch
            return
        kept, heads = count(selection.ids >= 0), selection.ids.shape[1]
        self.add_searched(cost, keys, kept, heads, 1)
        if selector is not None:
            self.add_ranked(cost, kept, heads, Ranking.of(selector, kv.warmup, [len(kv) - s for s in kv._starts]))
        if selection.tier is not None:
            self.add_medium(cost, count((selection.tier == MEDIUM) & (selection.ids >= 0)))

    def add_simulated(self, blocks: Sequence[Block], q_heads: int, selector: Selector | None = None) -> None:
        """Count a simulated call, in which `selector` chose: each of its queries as a step."""
        last, searched = blocks[-1], [block for block in blocks if block.selection is not None]
        for block in blocks:
            cost, chosen = Cost.of(block.cache, q_heads), block.selection
            if chosen is None:
                self.add_dense(cost, block.keys, block.tokens)
                self.positions += len(block.lengths)
                continue
            kept, heads = count(chosen.ids >= 0), chosen.ids.shape[1]
            self.add_searched(cost, block.keys, kept, heads, block.tokens)
            if selector is not None:
                self.add_ranked(cost, kept, heads, Ranking.of(selector, block.cache.warmup, block.lengths))
            if chosen.tier is not None:
                self.add_medium(cost, count((chosen.tier == MEDIUM) & (chosen.ids >= 0)))
        self.simulated += sum(block.tokens for block in blocks)
        self.code_bytes, self.kv_bytes = last.cache.code_nbytes, last.cache.nbytes - last.cache.code_nbytes
        if searched:
            self.sparse += 1
            self.engine, self.why = "simulated", "each query chooses as if it were decoded"
        else:
            self.dense["rows too short to be indexed"] += 1

    def add_simulated_dense(self, query: Tensor, key: Tensor, keys: int, reason: str) -> None:
        """Count a call that attends densely beside simulated ones: each of its queries as a step."""
        cost = Cost(query.shape[1], key.shape[1], key.shape[3] * key.element_size(), 0, 0, 0)
        self.add_dense(cost, keys, query.shape[2])
        self.simulated += query.shape[2]
        self.engine, self.why = "dense", reason

    def add_dense(self, cost: Cost, keys: int, steps: int) -> None:
        """Count so many one-token calls that read all of `keys` keys, over rows and calls."""
        everything = 2 * keys * cost.kv_heads * cost.key_bytes
        self.steps += steps
        self.visible += keys * cost.q_heads
        self.dense_bytes += everything
        self.kept = self.kept + keys * cost.q_heads
        self.read = self.read + everything

    def add_searched(self, cost: Cost, keys: int, kept: Tensor | int, heads: int, steps: int) -> None:
        """Count so many one-token calls that scanned `keys` keys and in which `heads` heads kept `kept` of them."""
        self.steps += steps
        self.visible += keys * cost.q_heads
        self.dense_bytes += 2 * keys * cost.kv_heads * cost.key_bytes
        self.scanned += keys * cost.kv_heads * cost.code_bytes
        self.kept = self.kept + kept * (cost.q_heads // heads)
        self.read = self.read + kept * 2 * cost.key_bytes

    def add_ranked(self, cost: Cost, kept: Tensor | int, heads: int, ranking: Ranking) -> None:
        """Count queries of which `heads` heads kept `kept` keys: what they ranked of them."""
        self.positions += ranking.positions
        self.searched += ranking.searched
        self.heads = cost.q_heads
        self.ranked = self.ranked + (kept - heads * ranking.unranked) * (cost.q_heads // heads)

    def add_medium(self, cost: Cost, kept: Tensor | int) -> None:
        """Count so many of the kept keys as medium: they cost a norm and a code instead of the key."""
        self.read = self.read - kept * (cost.key_bytes - 2 - cost.code_bytes)

    def set_engine(self, attn: HashAttention, query: Tensor, kv: KVCache) -> None:
        """Note what serves a search of these queries, and why."""
        self.engine, self.why = attn.choice(query, kv).why(attn.parts)


@dataclass(frozen=True)
class Cost:
    """What a step of a cache reads, in bytes a key and KV head, and the bytes that the cache takes."""

    q_heads: int
    kv_heads: int
    key_bytes: int
    code_bytes: int
    code_nbytes: int
    kv_nbytes: int

    @classmethod
    def of(cls, kv: KVCache, q_heads: int) -> Cost:
        """For queries of so many heads."""
        itemsize = kv.storage("keys").element_size()
        key_bytes, code_bytes = kv.head_dim * itemsize, 0
        if kv.encoder is not None:
            row = kv.encoder.code_bytes(kv.head_dim, itemsize)
            code_bytes = row * kv.encoder.code_heads(kv.kv_heads) // kv.kv_heads
        codes = kv.code_nbytes
        return cls(q_heads, kv.kv_heads, key_bytes, code_bytes, codes, kv.nbytes - codes)


@dataclass(frozen=True)
class Ranking:
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
    def of(cls, selector: Selector, warmup: int, lengths: Sequence[int]) -> Ranking:
        """For queries that see so many keys each."""
        forced, long = selector.sinks + selector.recents, [n for n in lengths if n >= warmup]
        short = sum(lengths) - sum(long)
        searched = sum(map(selector.chooses_at, long))
        return cls(len(lengths), searched, max(0, short) + sum(min(n, forced) for n in long))


def count(mask: Tensor) -> Tensor | int:
    """How many are True; on a CPU by numpy, which takes a fraction of the time."""
    return mask.sum() if mask.is_cuda else int(np.count_nonzero(mask.numpy()))


@dataclass(frozen=True)
class LayerRow:
    """One line of a report.

    Attributes:
        layer: its number.
        sparse: calls that searched.
        dense: calls that attended densely, by reason.
        keys_read: share of the visible keys that query heads read in one-token calls; None without any, or where the
            layer keeps the model's own cache (a sliding window, a cache that is not served).
        bytes_per_step: read of keys, values, codes and norms by a one-token call, mean; None likewise.
        engine: of the last one-token call: "dense", "reference" or "cpu"; "" before the first.
        why: this engine.
        positions: queries of one-token calls and simulated ones, over rows.
        searched: of these, for which keys were ranked beyond the forced ones.
        keys_ranked: keys that a query head kept beyond the forced ones there, mean.
    """

    layer: int
    sparse: int
    dense: dict[str, int]
    keys_read: float | None
    bytes_per_step: float | None
    engine: str
    why: str
    positions: int = 0
    searched: int = 0
    keys_ranked: float = 0.0


@dataclass(frozen=True)
class Report:
    """What an attached composition did. str(report) is a table.

    Attributes:
        layers: per layer, the calls that searched and those that attended densely, what they read, and the engine.
        steps: one-token steps (decoded tokens, counted at the first layer that was called).
        keys_read: share of the visible keys that query heads read in one-token calls, dense layers included.
        sparse_keys_read: the same over the layers that searched; 0 where none did.
        bytes_per_step: read of keys, values, codes and norms by one step over all layers, mean.
        dense_bytes_per_step: what full attention would have read.
        code_bytes: memory of codes, norms and centres of the last cache.
        kv_bytes: memory of its keys and values.
        refused: why the model was left as it is (only without strict).
        simulated: how many of the steps were queries of simulated calls.
        positions: queries of one-token calls and simulated ones, over rows, of the layer that searched most.
        searched: of these, for which keys were ranked beyond the forced ones: not where those take the whole budget,
            nor in rows that are too short to be indexed.
        keys_ranked: keys that a query head kept beyond the forced ones there, mean over the layers that searched.
    """

    layers: tuple[LayerRow, ...]
    steps: int
    keys_read: float
    sparse_keys_read: float
    bytes_per_step: float
    dense_bytes_per_step: float
    code_bytes: int
    kv_bytes: int
    refused: tuple[str, ...] = ()
    simulated: int = 0
    positions: int = 0
    searched: int = 0
    keys_ranked: float = 0.0

    @property
    def searching_layers(self) -> tuple[int, ...]:
        """Those that searched, at least once."""
        return tuple(row.layer for row in self.layers if row.sparse)

    @property
    def why_none(self) -> str:
        """Why no layer searched: the reasons of all dense calls but prefill."""
        reasons = dict.fromkeys(why for row in self.layers for why in row.dense)
        if not reasons:
            return "the model was not called"
        return ", ".join(why for why in reasons if why != "prefill") or "there was no call but prefill"

    def as_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts only."""
        return json.loads(self.as_json())

    def as_json(self, indent: int | None = 2) -> str:
        """The same as JSON text."""
        return json.dumps(asdict(self), indent=indent)

    def __str__(self) -> str:
        if self.refused:
            return "nothing is served, the model runs as it is: " + "; ".join(self.refused)
        head = ("layers", "sparse calls", "dense calls", "keys read", "a step", "engine")
        rows = [head, *_merged([(row.layer, _cells(row)) for row in self.layers])]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.steps:
            kind = f"steps, {self.simulated} of them simulated" if self.simulated else "one-token steps"
            inside = f" ({self.sparse_keys_read:.1%} in the layers that searched)" if self.searching_layers else ""
            lines += [
                f"{self.steps} {kind}: {self.keys_read:.1%} of visible keys read{inside}",
                *self._ranked(),
                f"{self.bytes_per_step / 1e6:.1f} MB read a step, full attention "
                f"{self.dense_bytes_per_step / 1e6:.1f} MB",
                f"codes take {self.code_bytes / 1e6:.1f} MB beside {self.kv_bytes / 1e6:.1f} MB of keys and values",
            ]
        if not self.searching_layers:
            lines.append(f"no layer searched: {self.why_none}")
        return "\n".join(lines)

    def _ranked(self) -> list[str]:
        if not any(row.sparse for row in self.layers):
            return []
        line = f"keys were ranked at {self.searched:,} of {self.positions:,} positions"
        if self.searched:
            return [f"{line}, {self.keys_ranked:.1f} a head and position beyond the forced ones"]
        return [
            f"{line}: NOTHING WAS SEARCHED, forced keys take the whole budget or rows are too short to be indexed; a "
            "larger share or k, or min_k=, ranks some beside the forced ones"
        ]


def _cells(row: LayerRow) -> tuple[str, ...]:
    dense = ", ".join(f"{n} ({why})" for why, n in row.dense.items()) or "0"
    keys = "-" if row.keys_read is None else f"{row.keys_read:.1%}"
    size = "-" if row.bytes_per_step is None else f"{row.bytes_per_step / 1e3:.1f} kB"
    engine = row.engine if row.why in ("", *row.dense) else f"{row.engine}: {row.why}"
    return str(row.sparse), dense, keys, size, engine or "-"


def _merged(rows: list[tuple[int, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """Neighbouring layers whose cells are the same, as one row each."""
    runs: list[tuple[int, int, tuple[str, ...]]] = []
    for layer, cells in rows:
        if runs and runs[-1][2] == cells and runs[-1][1] == layer - 1:
            runs[-1] = (runs[-1][0], layer, cells)
        else:
            runs.append((layer, layer, cells))
    return [(f"{a}" if a == b else f"{a}-{b}", *cells) for a, b, cells in runs]


def summarise(records: dict[int, LayerRecord], refused: tuple[str, ...]) -> Report:
    """Read the counters and make a report."""
    searched = [r for r in records.values() if r.sparse]
    steps = max((r.steps for r in records.values()), default=0)
    per = max(1, steps)
    return Report(
        tuple(_row(i, r) for i, r in records.items()),
        steps,
        _share(list(records.values())),
        _share(searched),
        sum(r.scanned + int(r.read) for r in records.values()) / per,
        sum(r.dense_bytes for r in records.values()) / per,
        sum(r.code_bytes for r in records.values()),
        sum(r.kv_bytes for r in records.values()),
        refused,
        max((r.simulated for r in records.values()), default=0),
        max((r.positions for r in searched), default=0),
        max((r.searched for r in searched), default=0),
        _ranked(searched),
    )


def _row(number: int, r: LayerRecord) -> LayerRow:
    keys = _share([r]) if r.steps else None
    size = (r.scanned + int(r.read)) / r.steps if r.steps else None
    return LayerRow(
        number, r.sparse, dict(r.dense), keys, size, r.engine, r.why, r.positions, r.searched, _ranked([r])
    )  # fmt: skip


def _ranked(records: list[LayerRecord]) -> float:
    """Keys a query head and searched position, mean."""
    heads = sum(r.searched * r.heads for r in records)
    return max(0.0, sum(int(r.ranked) for r in records if r.searched) / max(1, heads))


def _share(records: list[LayerRecord]) -> float:
    return sum(int(r.kept) for r in records) / max(1, sum(r.visible for r in records))
