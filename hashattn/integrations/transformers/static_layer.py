"""HashedStaticLayer: the same for a static cache, whose one-token calls may be traced or captured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.engines.decoder import Decoder
from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.device_steps import DeviceSteps
from hashattn.ops.decode import Scratch


class HashedStaticLayer(HashedLayer):
    """Takes the place of a StaticLayer: `max_cache_len` columns, allocated at once.

    The model sees all of them, as its masks expect; a search looks at the filled part.

    Once ready, calls of one token are steps that a graph holds where they are traced or captured by whomever.

    Args:
        attn: the composition of this layer.
        scratch: what the layers of a cache share.
        max_cache_len: columns.
    """

    is_compileable = True  # transformers makes masks of full length for such caches

    def __init__(self, attn: HashAttention, scratch: Scratch, max_cache_len: int) -> None:
        self.capacity = self.max_cache_len = max_cache_len
        super().__init__(attn, scratch)

    @property
    def decoder(self) -> Decoder | None:
        """What takes steps that a graph holds."""
        return self.on_device.decoder

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
        return self.on_device.ready and (self.recording or (tokens == 1 and hidden_from_host()))

    @torch.compiler.disable
    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        self.release()  # until the attention function has seen what was appended
        if self.kv is not None and len(self.kv) == 0 and not holds_kind_of(self.kv, key_states):
            self.kv = None
        filled, tokens = len(self.kv) if self.kv is not None else 0, key_states.shape[2]
        if filled + tokens > self.max_cache_len:
            raise IndexError(  # as a StaticLayer does
                f"the static layer holds {filled} of max_cache_len={self.max_cache_len} tokens, no room for {tokens}"
            )
        super()._append(key_states, value_states)
        assert self.kv is not None
        return self.kv.allocated

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]
        decoder = self.on_device.decoder
        if self.on_device.ready and decoder is not None:
            return decoder.filled() - self.on_device.behind  # as a StaticLayer's: nobody waits for it
        return super().get_seq_length()

    def reset(self) -> None:
        self.release()
        self.on_device.overflow = None
        if self.kv is not None:
            self.kv.reset()  # the memory stays, to which a graph may point

    def __deepcopy__(self, memo: dict[int, Any]) -> HashedStaticLayer:
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, HashedStaticLayer)
        twin.on_device = DeviceSteps.like(self.on_device)
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
