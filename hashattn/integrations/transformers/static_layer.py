"""HashedStaticLayer: the same for a static cache, whose one-token calls may be traced or captured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.engines.decoder import Decoder
from hashattn.engines.parts import Parts
from hashattn.integrations.attached.tally import Ledger, Tally
from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.ops.decode import Scratch


@dataclass(frozen=True)
class Arming:
    """How a layer's traced or captured steps are served, and where they are counted.

    Attributes:
        parts: of a composition that engine="gpu" serves, if its steps search.
        searches: whether they do.
        number: of the layer.
        why: for the report.
    """

    parts: Parts
    searches: bool
    number: int
    q_heads: int
    why: str
    ledger: Ledger


class HashedStaticLayer(HashedLayer):
    """Takes the place of a StaticLayer: `max_cache_len` columns, allocated at once.

    The model sees all of them, as its masks expect; a search looks at the filled part.

    Once armed, calls of one token that are traced or captured go through a Decoder, whose length is on the device. The
    host adopts it when it next changes the cache or makes an eager call (:meth:`settle`).

    Args:
        attn: the composition of this layer.
        scratch: what the layers of a cache share.
        max_cache_len: columns.

    Attributes:
        decoder: of the steps that are traced or captured. It is kept and changed in place, as a graph may point to it.
        armed: whether it is ready.
        arming: how, and where its steps are counted.
        outgrown: the error of such steps, until someone is told.
    """

    is_compileable = True  # transformers makes masks of full length for such caches

    def __init__(self, attn: HashAttention, scratch: Scratch, max_cache_len: int) -> None:
        super().__init__(attn, scratch)
        self.capacity = self.max_cache_len = max_cache_len
        self.decoder: Decoder | None = None
        self._decoders: dict[bool, Decoder] = {}  # by whether they search
        self.armed = False
        self.arming: Arming | None = None
        self.tally: Tally | None = None
        self.outgrown: ValueError | None = None

    @property
    def keys(self) -> Tensor | None:
        """[B, Hkv, max_cache_len, D], as a StaticLayer's: all columns, of which get_seq_length() are filled."""
        self.settle()
        return self.kv.allocated[0] if self.kv is not None and self.kv.kind is not None else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._refuse(value)

    @property
    def values(self) -> Tensor | None:
        """[B, Hkv, max_cache_len, D], likewise."""
        self.settle()
        return self.kv.allocated[1] if self.kv is not None and self.kv.kind is not None else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._refuse(value)

    def steps(self, tokens: int) -> bool:
        """Whether a call of so many tokens goes through the decoder."""
        return self.armed and tokens == 1 and unseen()

    @torch.compiler.disable
    def arm(self, arming: Arming) -> None:
        """Make the decoder ready for what the cache now holds; leave it unready where that cannot be searched yet."""
        assert self.kv is not None
        self.arming, self.armed = arming, False
        decoder = self._decoders.get(arming.searches)
        try:
            if decoder is None or not decoder.fits(self.kv):
                decoder = self._decoders[arming.searches] = Decoder(arming.parts, self.kv, searches=arming.searches)
                decoder.prepare(arming.q_heads)
                decoder.warm_up(arming.q_heads)
            else:
                if decoder.parts != arming.parts:  # of the same encoder
                    decoder.parts = arming.parts
                    decoder.prepare(arming.q_heads)
                decoder.follow()
        except ValueError:  # rows that are too short
            return
        self.armed, self.decoder, self.tally = True, decoder, Tally.of(decoder, arming.q_heads, arming.why)
        arming.ledger.open(arming.number, self.tally, self)

    @torch.compiler.disable
    def settle(self) -> None:
        if self.armed and self.decoder is not None and self.arming is not None and self.tally is not None:
            self.arming.ledger.book(self.arming.number, self.tally)
            try:
                self.decoder.finish()
            except ValueError as error:
                self.outgrown = error

    def changed(self) -> None:
        if self.armed and self.arming is not None:
            self.arm(self.arming)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.steps(key_states.shape[2]):
            return key_states, value_states  # the attention function appends them
        return self._append(key_states, value_states)

    @torch.compiler.disable
    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        self.settle()
        if self.kv is not None and len(self.kv) == 0 and not same_kind(self.kv, key_states):
            self.kv = None
        filled, tokens = len(self.kv) if self.kv is not None else 0, key_states.shape[2]
        if filled + tokens > self.max_cache_len:
            raise IndexError(  # as a StaticLayer does
                f"the static layer holds {filled} of max_cache_len={self.max_cache_len} tokens, no room for {tokens}"
            )
        self.armed = False  # until the attention function has seen what was appended
        super().update(key_states, value_states)
        assert self.kv is not None
        return self.kv.allocated

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]
        if self.armed and self.decoder is not None:
            return self.decoder.filled()  # as a StaticLayer's: nobody waits for it
        return super().get_seq_length()

    def reset(self) -> None:
        self.settle()
        self.armed, self.outgrown = False, None
        if self.kv is not None:
            self.kv.reset()  # the memory stays, to which a graph may point

    def __deepcopy__(self, memo: dict[int, Any]) -> HashedStaticLayer:
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, HashedStaticLayer)
        twin.decoder, twin._decoders = None, {}
        twin.changed()
        return twin

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len


def unseen() -> bool:
    """Whether the host cannot look at values, because the call is traced or captured."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def same_kind(kv: KVCache, k: Tensor) -> bool:
    """Whether an empty cache has memory for such keys."""
    if kv.kind is None:
        return kv.batch == k.shape[0]
    held = kv.storage("keys")
    return (held.shape[0], held.dtype, held.device) == (k.shape[0], k.dtype, k.device)
