"""Tally and Ledger: what traced or captured steps did, counted when the host next looks."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from hashattn.core.guard import Guard
from hashattn.engines.decoder import Decoder
from hashattn.integrations.attached.report import Cost, LayerRecord, Ranking
from hashattn.ops.decode import Rule

if TYPE_CHECKING:
    from hashattn.integrations.transformers.static_layer import HashedStaticLayer


@dataclass
class Tally:
    """Such steps take one token and tell the host nothing: what they read follows from the lengths they were made at.

    It keeps no keys alive, so that a report can still be made when the cache is gone.

    Attributes:
        length, found: the decoder's, on the device.
        counted, kept: what they were when the host last looked.
        room: columns that there are.
        starts: first column of each row.
        rule: which keys are kept; None for all.
        estimated: whether the logits of medium keys are, so that these are not read.
        engine, why: for the report; why is also the reason of dense steps.
    """

    length: Tensor
    found: Tensor
    counted: int
    kept: int
    room: int
    starts: list[int]
    cost: Cost
    rule: Rule | None
    estimated: bool
    engine: str
    why: str

    @classmethod
    def of(cls, decoder: Decoder, q_heads: int, why: str) -> Tally:
        """Of a decoder that has just taken up what its cache holds."""
        kv, selector = decoder.cache, decoder.parts.selector
        rule = selector.rule(q_heads // kv.kv_heads) if not decoder.dense and selector is not None else None
        return cls(
            decoder.length, decoder.found, len(kv), 0, kv.capacity or 0, list(kv._starts), Cost.of(kv, q_heads), rule,
            decoder.parts.attend.needs_norms, decoder.engine.name, why,
        )  # fmt: skip

    def book(self, record: LayerRecord) -> int:
        """Add the steps since the last look to a layer's record. Returns how many; waits for the device."""
        now = min(int(self.length), self.room)
        steps, lengths = max(0, now - self.counted), range(self.counted + 1, now + 1)
        self.counted = now
        if steps == 0:
            return 0
        seen = [max(0, length - first) for length in lengths for first in self.starts]
        record.engine, record.why = self.engine, self.why
        record.code_bytes, record.kv_bytes = self.cost.code_nbytes, self.cost.kv_nbytes
        if self.rule is None:
            record.dense[self.why] += steps
            record.add_dense(self.cost, sum(seen), steps)
            record.positions += len(seen)
            return steps
        record.sparse += steps
        heads = self.cost.kv_heads if self.rule.shared else self.cost.q_heads
        kept = heads * sum(map(self.rule.slots, seen))
        if self.rule.radius is not None:
            kept, self.kept = int(self.found) - self.kept, int(self.found)
        record.add_searched(self.cost, sum(seen), kept, heads, steps)
        forced = [min(n, self.rule.sinks + self.rule.recents) for n in seen]
        searched = sum(self.rule.slots(n) > own for n, own in zip(seen, forced, strict=True))
        record.add_ranked(self.cost, kept, heads, Ranking(len(seen), searched, sum(forced)))
        if self.estimated:
            record.add_medium(self.cost, heads * sum(map(self.rule.medium, seen)))
        return steps


@dataclass
class Ledger:
    """The records of a model's layers, and the tallies of the caches that were last used.

    Attributes:
        records: by layer.
        unserved: layers that keep the model's own cache, and why: they are counted with the first tally.
        layers: of all caches that were armed and are still there.
        guard: whoever changes or reads the records holds it, as threads share them.
    """

    records: dict[int, LayerRecord]
    unserved: dict[int, str]
    tallies: dict[int, Tally] = field(default_factory=dict)
    layers: weakref.WeakSet[HashedStaticLayer] = field(default_factory=weakref.WeakSet)
    guard: Guard = field(default_factory=Guard)

    def open(self, number: int, tally: Tally, layer: HashedStaticLayer) -> None:
        """Count the steps of a layer of a cache by this tally from here on."""
        with self.guard:
            before = self.tallies.get(number)
            if before is not None and before.length is not tally.length:  # of another cache, which may be gone
                self.book(number, before)
            self.tallies[number] = tally
            self.layers.add(layer)

    def armed(self) -> list[HashedStaticLayer]:
        """The layers that are ready for traced and captured steps."""
        with self.guard:
            return [layer for layer in self.layers if layer.armed]

    def book(self, number: int, tally: Tally) -> None:
        """Add a tally's steps to its layer's record."""
        with self.guard:
            steps = tally.book(self.records[number])
            if steps and number == min(self.tallies):
                for i, why in self.unserved.items():
                    record = self.records[i]
                    record.dense[why] += steps
                    record.engine, record.why = "dense", why

    def close(self) -> None:
        """Add all that was not yet counted, and count nothing more."""
        with self.guard:
            self.look()
            self.tallies.clear()
            self.layers.clear()

    def look(self) -> None:
        """Add all that was not yet counted."""
        with self.guard:
            for number, tally in self.tallies.items():
                self.book(number, tally)
            for layer in list(self.layers):  # of other caches than the last
                if layer.arming is not None and layer.arming.ledger is self and layer.tally is not None:
                    self.book(layer.arming.number, layer.tally)
