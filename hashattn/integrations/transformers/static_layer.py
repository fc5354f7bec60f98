"""HashedStaticLayer: the same for a static cache, whose one-token calls may be traced or captured."""

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
from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.ops.decode import Scratch


@dataclass(frozen=True)
class GraphSteps:
    """How a layer's traced or captured steps are served, and where they are counted."""

    choice: GraphChoice
    number: int
    q_heads: int
    counters: Counters[HashedStaticLayer]


class HashedStaticLayer(HashedLayer):
    """Takes the place of a StaticLayer: `max_cache_len` columns, allocated at once.

    The model sees all of them, as its masks expect; a search looks at the filled part.

    Once ready, calls of one token that are traced or captured go through a Decoder, whose length is on the device. The
    host adopts it when it next changes the cache or makes an eager call (:meth:`sync`).

    Args:
        attn: the composition of this layer.
        scratch: what the layers of a cache share.
        max_cache_len: columns.

    Attributes:
        decoder: of the steps that are traced or captured. It is kept and changed in place, as a graph may point to it.
        ready: whether it is ready.
        steps: how these are served, and where they are counted.
        overflow: the error of such steps, until someone is told.
    """

    is_compileable = True  # transformers makes masks of full length for such caches

    def __init__(self, attn: HashAttention, scratch: Scratch, max_cache_len: int) -> None:
        super().__init__(attn, scratch)
        self.capacity = self.max_cache_len = max_cache_len
        self.decoder: Decoder | None = None
        self._decoders: dict[bool, Decoder] = {}  # by whether they search
        self.ready = False
        self.steps: GraphSteps | None = None
        self.counter: GraphCounter | None = None
        self.overflow: ValueError | None = None

    @property
    def keys(self) -> Tensor | None:
        """[B, Hkv, max_cache_len, D], as a StaticLayer's: all columns, of which get_seq_length() are filled."""
        self.sync()
        return self.kv.allocated[0] if self.kv is not None and self.kv.kind is not None else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._refuse(value)

    @property
    def values(self) -> Tensor | None:
        """[B, Hkv, max_cache_len, D], likewise."""
        self.sync()
        return self.kv.allocated[1] if self.kv is not None and self.kv.kind is not None else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._refuse(value)

    def in_graph(self, tokens: int) -> bool:
        """Whether a call of so many tokens goes through the decoder."""
        return self.ready and tokens == 1 and hidden_from_host()

    def graph_step(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Append keys and values [B, Hkv, 1, D] and attend with queries [B, Hq, 1, D]: [B, Hq, 1, D]."""
        assert self.decoder is not None
        return self.decoder.step(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)

    def serve_graphs(
        self, served: ServedLayer, number: int, q_heads: int, counters: Counters[HashedStaticLayer]
    ) -> None:
        """Make the decoder ready, where what serves the layer can do without the host."""
        kv, attn = self.kv, served.attn
        assert attn is not None and kv is not None
        if served.accumulates:
            return  # it has to see every query
        query = kv.keys.new_empty((kv.batch, q_heads, 1, kv.head_dim))
        choice = for_graphs(attn, served.why_dense, query, kv)
        if choice is not None:
            self._prepare(GraphSteps(choice, number, q_heads, counters))

    @torch.compiler.disable
    def _prepare(self, steps: GraphSteps) -> None:
        """Make the decoder ready for what the cache now holds; leave it unready where that cannot be searched yet."""
        assert self.kv is not None
        if self.steps is not None and self.steps.counters is not steps.counters:
            self.steps.counters.forget(self)
        self.steps, self.ready = steps, False
        choice = steps.choice
        decoder = self._decoders.get(choice.searches)
        try:
            if decoder is None or not decoder.fits(self.kv):
                decoder = self._decoders[choice.searches] = Decoder(choice.parts, self.kv, searches=choice.searches)
                decoder.prepare(steps.q_heads)
                decoder.warm_up(steps.q_heads)
            else:
                if decoder.parts != choice.parts:  # of the same encoder
                    decoder.parts = choice.parts
                    decoder.prepare(steps.q_heads)
                decoder.follow()
        except ValueError:  # rows that are too short
            return
        self.ready, self.decoder = True, decoder
        self.counter = GraphCounter.of(decoder, steps.number, steps.q_heads, choice.why)
        steps.counters.follow(self, self.counter)

    @torch.compiler.disable
    def sync(self) -> None:
        if self.ready and self.decoder is not None and self.steps is not None and self.counter is not None:
            self.steps.counters.count(self.counter)
            try:
                self.decoder.finish()
            except ValueError as error:
                self.overflow = error

    def release(self) -> None:
        """Leave the cache as the model's own code expects it, and what follows to eager calls."""
        self.sync()
        self.ready = False

    def follow_change(self) -> None:
        if self.ready and self.steps is not None:
            self._prepare(self.steps)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.in_graph(key_states.shape[2]):
            return key_states, value_states  # the attention function appends them
        return self._append(key_states, value_states)

    @torch.compiler.disable
    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        self.sync()
        if self.kv is not None and len(self.kv) == 0 and not holds_kind_of(self.kv, key_states):
            self.kv = None
        filled, tokens = len(self.kv) if self.kv is not None else 0, key_states.shape[2]
        if filled + tokens > self.max_cache_len:
            raise IndexError(  # as a StaticLayer does
                f"the static layer holds {filled} of max_cache_len={self.max_cache_len} tokens, no room for {tokens}"
            )
        self.ready = False  # until the attention function has seen what was appended
        super().update(key_states, value_states)
        assert self.kv is not None
        return self.kv.allocated

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]
        if self.ready and self.decoder is not None:
            return self.decoder.filled()  # as a StaticLayer's: nobody waits for it
        return super().get_seq_length()

    def reset(self) -> None:
        self.sync()
        self.ready, self.overflow = False, None
        if self.kv is not None:
            self.kv.reset()  # the memory stays, to which a graph may point

    def __deepcopy__(self, memo: dict[int, Any]) -> HashedStaticLayer:
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, HashedStaticLayer)
        twin.decoder, twin._decoders = None, {}
        twin.follow_change()
        return twin

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len


def hidden_from_host() -> bool:
    """Whether the host cannot look at values, because the call is traced or captured."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def holds_kind_of(kv: KVCache, k: Tensor) -> bool:
    """Whether an empty cache has memory for such keys."""
    if kv.kind is None:
        return kv.batch == k.shape[0]
    held = kv.storage("keys")
    return (held.shape[0], held.dtype, held.device) == (k.shape[0], k.dtype, k.device)
