"""Counters: what a model's layers did; the steps of a graph, which tells nobody, are counted when someone looks."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from hashattn.core.guard import Guard
from hashattn.engines.choose import DENSE
from hashattn.engines.decoder import Decoder
from hashattn.integrations.attached.layer_counts import LayerCounts, Ranked, StepCost
from hashattn.integrations.attached.layers import ServedLayer
from hashattn.integrations.attached.report import Report, summarise
from hashattn.ops.decode import Rule

Layer = TypeVar("Layer")  # what a framework calls a layer of a cache


@dataclass(eq=False)
class GraphCounter:
    """Such steps take one token and tell the host nothing: what they read follows from the lengths they were made at.

    It keeps no keys alive, so that a report can still be made when the cache is gone.

    Attributes:
        number: of the layer.
        length, found: the decoder's, on the device.
        counted, kept: what they were when the host last looked.
        capacity: columns that there are.
        starts: first column of each row.
        rule: which keys are kept; None for all.
        estimated: whether the logits of medium keys are, so that these are not read.
        engine, why: for the report; why is also the reason of dense steps.
    """

    number: int
    length: Tensor
    found: Tensor
    counted: int
    capacity: int
    starts: list[int]
    cost: StepCost
    rule: Rule | None
    estimated: bool
    engine: str
    why: str
    kept: int = 0

    @classmethod
    def of(cls, decoder: Decoder, number: int, q_heads: int, why: str) -> GraphCounter:
        """Of a decoder that has just taken up what its cache holds."""
        kv, selector = decoder.cache, decoder.parts.selector
        return cls(
            number=number,
            length=decoder.length,
            found=decoder.found,
            counted=len(kv),
            capacity=decoder.room,
            starts=list(kv._starts),
            cost=StepCost.of(kv, q_heads),
            rule=None if decoder.dense or selector is None else selector.rule(q_heads // kv.kv_heads),
            estimated=decoder.parts.attend.needs_norms,
            engine=decoder.engine.name,
            why=why,
        )

    def count(self, counts: LayerCounts, length: int | None = None) -> int:
        """Add the steps since the last look to a layer's counts. Returns how many.

        Args:
            length: the decoder's, where the host knows it; None to wait for the device.
        """
        now = min(int(self.length) if length is None else length, self.capacity)
        steps, lengths = max(0, now - self.counted), range(self.counted + 1, now + 1)
        self.counted = now
        if steps == 0:
            return 0
        seen = [max(0, length - first) for length in lengths for first in self.starts]
        counts.served_by(self.engine, self.why)
        counts.code_bytes, counts.kv_bytes = self.cost.code_nbytes, self.cost.kv_nbytes
        if self.rule is None:
            counts.dense[self.why] += steps
            counts.add_dense(self.cost, sum(seen), steps)
            counts.positions += len(seen)
            return steps
        counts.sparse += steps
        heads = self.cost.kv_heads if self.rule.shared else self.cost.q_heads
        kept = heads * sum(map(self.rule.slots, seen))
        if self.rule.radius is not None:
            kept, self.kept = int(self.found) - self.kept, int(self.found)
        counts.add_searched(self.cost, sum(seen), kept, heads, steps)
        forced = [min(n, self.rule.sinks + self.rule.recents) for n in seen]
        searched = sum(self.rule.slots(n) > own for n, own in zip(seen, forced, strict=True))
        counts.add_ranked(self.cost, kept, heads, Ranked(len(seen), searched, sum(forced)))
        if self.estimated:
            counts.add_medium(self.cost, heads * sum(map(self.rule.medium, seen)))
        return steps


class Counters(Generic[Layer]):
    """The counts of a model's layers, and the counters of the caches that graphs use.

    Args:
        served: the model's layers. Those that keep the model's own cache are counted with the first of the others.

    Attributes:
        layers: by number.
        guard: whoever changes or reads the counts holds it, as threads share them.
    """

    def __init__(self, served: Mapping[int, ServedLayer]) -> None:
        self.layers = {number: LayerCounts() for number in served}
        self.guard = Guard()
        self._unserved = {number: str(one.why_dense) for number, one in served.items() if one.attn is None}
        self._latest: dict[int, GraphCounter] = {}  # by layer, of the caches that were last used, which may be gone
        self._graphs: weakref.WeakKeyDictionary[Layer, GraphCounter] = (
            weakref.WeakKeyDictionary()
        )  # of all that are not

    def follow(self, layer: Layer, counter: GraphCounter) -> None:
        """Count the steps of a layer of a cache by this counter from here on."""
        with self.guard:
            before = self._latest.get(counter.number)
            if before is not None and before.length is not counter.length:  # of another cache
                self.count(before)
            self._latest[counter.number] = counter
            self._graphs[layer] = counter

    def forget(self, layer: Layer) -> None:
        """Others count the steps of this layer of a cache from here on."""
        with self.guard:
            counter = self._graphs.pop(layer, None)
            if counter is not None and self._latest.get(counter.number) is counter:
                del self._latest[counter.number]

    def followed(self) -> list[Layer]:
        """The layers of caches whose steps are counted so."""
        with self.guard:
            return list(self._graphs)

    def count(self, counter: GraphCounter, length: int | None = None) -> None:
        """Add a counter's steps to its layer's counts; see :meth:`GraphCounter.count`."""
        with self.guard:
            steps = counter.count(self.layers[counter.number], length)
            if steps and counter.number == min(self._latest, default=None):
                for number, why in self._unserved.items():
                    self.layers[number].dense[why] += steps
                    self.layers[number].served_by(DENSE.name, why)

    def count_call(self, counter: GraphCounter, length: int, tokens: int, why_dense: str | None = None) -> None:
        """Count a call that appends tokens to so many columns, which is no step of one token like the others.

        Args:
            why_dense: why it attends densely where steps of one token search.
        """
        with self.guard:
            self.count(counter, length)
            counter.counted += tokens
            counts = self.layers[counter.number]
            reason = why_dense or (counter.why if counter.rule is None else None)
            if reason is None:
                counts.sparse += 1
                return
            counts.dense[reason] += 1
            if tokens == 1:
                seen = sum(max(0, counter.counted - first) for first in counter.starts)
                counts.add_dense(counter.cost, seen, 1)
                counts.positions += len(counter.starts)

    def count_taken_back(self, counter: GraphCounter, length: int, tokens: int) -> None:
        """Count the steps up to so many columns, the last of which are taken back."""
        with self.guard:
            self.count(counter, length)
            counter.counted -= tokens

    def count_all(self) -> None:
        """Add all that was not yet counted."""
        with self.guard:
            for counts in self.layers.values():
                counts.settle()
            for counter in dict.fromkeys((*self._latest.values(), *self._graphs.values())):
                self.count(counter)

    def close(self) -> None:
        """Add all that was not yet counted, and count nothing more."""
        with self.guard:
            self.count_all()
            self._latest.clear()
            self._graphs.clear()

    def reset(self) -> None:
        """Start counting anew."""
        with self.guard:
            self.count_all()
            self.layers.update({number: LayerCounts() for number in self.layers})

    def report(self) -> Report:
        """What was counted; waits for the device."""
        with self.guard:
            self.count_all()
            return summarise(self.layers, ())

    def reads(self) -> Tensor:
        """How often each position was read: int64 [layers, positions]."""
        rows = [counts.reads for counts in self.layers.values()]
        width = max((len(row) for row in rows if row is not None), default=0)
        table = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            if row is not None:
                table[i, : len(row)] = row.cpu()
        return table
