"""DeviceSteps: the steps of one layer of a cache whose length only the device knows, so that a graph may hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.engines.decoder import Decoder
from hashattn.integrations.attached.choice import GraphChoice, for_graphs
from hashattn.integrations.attached.counters import Counters, GraphCounter
from hashattn.integrations.attached.layers import ServedLayer

TOO_SHORT_FOR_STEPS = "a row holds too few keys for its centre"


@dataclass(frozen=True)
class GraphSteps:
    """How a layer's traced, captured or replayed steps are served, and where they are counted.

    Attributes:
        number: of the layer.
        tokens: queries of a step.
        before: the steps of the layer before, whose keys these look at; None if it is not served, or nobody looks.
        check: whether the step attends densely to what others search.
    """

    choice: GraphChoice
    number: int
    q_heads: int
    tokens: int
    counters: Counters[Any]
    before: DeviceSteps | None = None
    check: bool = False


class DeviceSteps:
    """Steps that are traced, captured or replayed append on the device; the host adopts that when it next looks.

    Args:
        asks: whether the device has to be asked how many there were, as others may replay them too; otherwise the host
            has led them all.

    Attributes:
        ready: whether they can be taken.
        decoder: what takes them. It is kept and changed in place, as a graph may point to it.
        made: how they are served.
        led: tokens that the host has appended by replays since it last looked.
        behind: of the columns that the device counts, those that the host has taken back meanwhile.
        checking: whether steps attend densely just now.
        overflow: the error of steps that did not fit, until someone is told.
    """

    def __init__(self, asks: bool) -> None:
        self.asks, self.ready, self.led, self.behind = asks, False, 0, 0
        self.checking = False
        self.decoder: Decoder | None = None
        self.made: GraphSteps | None = None
        self.overflow: ValueError | None = None
        self._decoders: dict[bool, Decoder] = {}  # by whether they search
        self._counter: GraphCounter | None = None
        self._known = 0  # columns of the cache, when it was last followed or let know

    @classmethod
    def like(cls, other: DeviceSteps) -> DeviceSteps:
        """Of a copy of the layer, which follows it with decoders of its own."""
        twin = cls(other.asks)
        twin.ready, twin.made = other.ready, other.made
        return twin

    def serve(
        self,
        layer: object,
        kv: KVCache,
        served: ServedLayer,
        number: int,
        q_heads: int,
        tokens: int,
        counters: Counters[Any],
        before: DeviceSteps | None = None,
        check: bool = False,
    ) -> str | None:
        """Make steps of so many queries ready for what the cache now holds; returns why that cannot be.

        Args:
            layer: of the framework's cache, whom the counters know.
            before: the steps of the layer before, in the same graph.
            check: whether they attend densely, beside others that search.
        """
        attn = served.attn
        assert attn is not None
        self.sync(kv)
        if served.accumulates:
            return "its selector has to see every query"
        searching = 1 if check else tokens
        query = kv.keys.new_empty((kv.batch, q_heads, searching, kv.head_dim))
        choice = for_graphs(attn, served.why_dense, query, kv, ahead=0 if self.asks else searching)
        if choice is None:
            engine = attn.choice(query, kv).engine.name
            return f'engine "{engine}" takes no steps that a graph can hold'
        follows = choice.searches and attn.selector is not None and attn.selector.follows
        if self.asks and follows:  # whose graph may hold this layer alone
            return "its selector asks what the layer before kept, which steps of a static cache do not know"
        if searching > 1 and choice.searches and _by_radius(attn, q_heads // kv.kv_heads):
            return "what several queries keep within a radius is not counted in graphs"
        made = GraphSteps(choice, number, q_heads, tokens, counters, before if follows else None, check)
        return self.prepare(layer, kv, made)

    @torch.compiler.disable
    def prepare(self, layer: object, kv: KVCache, made: GraphSteps) -> str | None:
        """The same, as was settled, of a cache that knows of all that was appended."""
        if self.made is not None and self.made.counters is not made.counters:
            self.made.counters.forget(layer)
        self.made, self.ready = made, False
        choice, heads = made.choice, made.q_heads
        if choice.searches:
            kv.encode()  # which may move the codes
        decoder = self._decoders.get(choice.searches)
        try:
            if decoder is None or not decoder.fits(kv):
                self._decoders.pop(choice.searches, None)
                decoder = Decoder(choice.parts, kv, searches=choice.searches, led=not self.asks)
                decoder.prepare(heads)
                if self.asks:  # others may capture it, who have not run it
                    decoder.warm_up(heads)
                self._decoders[choice.searches] = decoder
            else:
                if decoder.parts != choice.parts:  # of the same encoder
                    decoder.revise(choice.parts)
                decoder.follow()
            if made.check:
                decoder.prepare_check(heads, made.tokens)
            elif not decoder.serves(heads, made.tokens):
                decoder.prepare(heads, made.tokens)
        except ValueError as error:
            return TOO_SHORT_FOR_STEPS if kv.shortest < kv.warmup else str(error)
        self.ready, self.decoder, self._known, self.behind = True, decoder, len(kv), 0
        self._counter = GraphCounter.of(decoder, made.number, heads, choice.why)
        made.counters.follow(layer, self._counter)
        return None

    @property
    def limit(self) -> int:
        """Columns up to which such steps serve as they are."""
        assert self.decoder is not None and self.made is not None
        room, turns = self.decoder.room, self.made.choice.turns
        return room if turns is None else min(room, turns - 1 + min(self.decoder.cache._starts))

    @property
    def has_codes(self) -> bool:
        """Whether all columns are encoded, those that the host does not know of as well."""
        return self.ready and self.decoder is not None and not self.decoder.dense

    def untouched(self, kv: KVCache, filled: int) -> bool:
        """Whether nobody has changed the cache since, which holds so many columns with those that were led."""
        known = self.ready and self.decoder is not None and self._known == len(kv) == filled - self.led
        return known and self.decoder is not None and self.decoder.holds(kv)

    def step(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Append keys and values [B, Hkv, T, D] and attend with queries [B, Hq, T, D]: [B, Hq, T, D]."""
        assert self.decoder is not None and self.made is not None
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if self.checking:
            return self.decoder.check(query, key, value, scale)
        before, kept = self.made.before.decoder if self.made.before is not None else None, None
        if before is not None:
            kept, before.kept = before.kept, None  # nobody else asks
        return self.decoder.step(query, key, value, scale, kept)

    def lead(self, kv: KVCache, tokens: int, why_dense: str | None = None) -> None:
        """Note that a replay has appended so many tokens, and why it was dense where others search."""
        self.behind = 0
        if self.made is not None and self._counter is not None and (tokens > 1 or why_dense is not None):
            self.made.counters.count_call(self._counter, len(kv) + self.led, tokens, why_dense)
        self.led += tokens  # else counted as steps of one token

    def can_rewind(self, tokens: int) -> bool:
        """Whether so many tokens are the host's to take back before it looks."""
        return self.ready and self.decoder is not None and self.led >= tokens

    def rewind(self, kv: KVCache, tokens: int) -> None:
        """Take back the last tokens that were led; the device does so when the next replay begins."""
        assert self.made is not None and self._counter is not None
        self.made.counters.count_taken_back(self._counter, len(kv) + self.led, tokens)
        self.led, self.behind = self.led - tokens, self.behind + tokens

    def settle(self) -> None:
        """Let the device count as the host does."""
        if self.behind and self.decoder is not None:
            self.decoder.length.sub_(self.behind)
        self.behind = 0

    @torch.compiler.disable
    def sync(self, kv: KVCache) -> None:
        """Let the cache know what was appended."""
        if not self.ready or self.decoder is None or self.made is None or self._counter is None:
            return
        self.settle()
        length = None if self.asks else len(kv) + self.led
        self.made.counters.count(self._counter, length)
        try:
            self.decoder.finish(length)
        except ValueError as error:
            self.overflow = error
        self.led, self._known = 0, len(kv)

    def take_back(self, layer: object, kv: KVCache) -> None:
        """Leave out what a replay appended that was broken off, before it was led."""
        if self.ready and self.decoder is not None:
            self.decoder.length.fill_(len(kv) + self.led)
            self.behind = 0
            self.sync(kv)
            self.follow(layer, kv)

    def follow(self, layer: object, kv: KVCache) -> None:
        """Go on from a change that the host made to the cache."""
        if not self.ready or self.made is None:
            return
        if self.asks or (self.decoder is not None and self.decoder.fits(kv)):
            self.prepare(layer, kv, self.made)
        else:  # its memory has moved
            self.drop()

    def release(self, kv: KVCache) -> None:
        """Leave what follows to eager calls."""
        self.sync(kv)
        self.ready = False

    def drop(self) -> None:
        """Let go of the cache's memory, which is about to move; nothing may be left to adopt."""
        self.ready, self.decoder, self._counter, self.led, self.behind = False, None, None, 0, 0
        self._decoders.clear()


def _by_radius(attn: HashAttention, group: int) -> bool:
    """Whether distances alone say how many keys are kept."""
    rule = attn.selector.rule(group) if attn.selector is not None else None
    return rule is not None and rule.radius is not None
