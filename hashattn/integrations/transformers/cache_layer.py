"""HashedLayer: a cache layer of transformers that keeps codes beside keys and values."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.ops.decode import Scratch


class HashedLayer(DynamicLayer):
    """Takes the place of a DynamicLayer: the same keys and values, in a KVCache that appends in place.

    Every row operation of the Hugging Face cache reaches the codes as well: after any of them,
    codes == encode_key(keys) holds.

    Args:
        attn: the composition of this layer.
        scratch: what the layers of a cache share.
    """

    capacity: int | None = None

    def __init__(self, attn: HashAttention, scratch: Scratch) -> None:
        self.attn, self.scratch = attn, scratch
        self.kv: KVCache | None = None
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """[B, Hkv, N, D], a view; None before the first update."""
        self.sync()
        return self.kv.keys if self.kv is not None and len(self.kv) else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._refuse(value)

    @property
    def values(self) -> Tensor | None:
        """[B, Hkv, N, D], a view; None before the first update."""
        self.sync()
        return self.kv.values if self.kv is not None and len(self.kv) else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._refuse(value)

    def sync(self) -> None:
        """Adopt what steps appended that the host could not see; waits for the device."""

    def follow_change(self) -> None:
        """Bring what was made ready for such steps up to date with a change that the host made."""

    def _refuse(self, value: Tensor | None) -> None:
        if value is not None:  # None comes from the base class's __init__
            raise AttributeError("a HashedLayer's keys and values change by update, crop and the row operations only")

    @torch.compiler.disable  # lengths live on the host: traced, they would be compiled anew at every token
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, dim = key_states.shape
        self.kv = self.attn.new_cache(batch, heads, dim, capacity=self.capacity, scratch=self.scratch)
        self.is_initialized = True

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.kv is None:
            self.lazy_initialization(key_states, value_states)
        assert self.kv is not None
        self.kv.append(key_states, value_states)
        return self.kv.keys, self.kv.values

    @torch.compiler.disable
    def get_seq_length(self) -> int:
        return len(self.kv) if self.kv is not None else 0

    def reset(self) -> None:
        self.kv = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be at most 0 (minus the tokens to remove), got {tokens_to_remove}")
        self.sync()
        if self.kv is not None and tokens_to_remove:
            self.kv.crop(max(0, len(self.kv) + tokens_to_remove))
            self.follow_change()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.sync()
        if self.kv is not None:
            self.kv.repeat(repeats)
            self.follow_change()

    def batch_select_indices(self, indices: Tensor | Sequence[int] | Sequence[bool]) -> None:
        if self.kv is not None:
            chosen = indices if isinstance(indices, Tensor) else torch.as_tensor([*indices])
            self._select(torch.arange(self.kv.batch)[chosen.cpu()])  # numbers from either end, or a mask

    def _select(self, rows: Tensor) -> None:
        self.sync()
        if self.kv is not None:
            self.kv.select_rows(rows)
            self.follow_change()

    def __deepcopy__(self, memo: dict[int, Any]) -> HashedLayer:
        self.sync()
        twin = copy.copy(self)
        twin.scratch, twin.kv = copy.deepcopy((self.scratch, self.kv), memo)  # the composition is shared
        return twin

    def offload(self) -> None:
        raise NotImplementedError("a HashedLayer cannot be offloaded: use a cache without offloading")
