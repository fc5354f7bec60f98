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
from hashattn.integrations.attached.counters import Counters
from hashattn.integrations.attached.layers import ServedLayer
from hashattn.integrations.transformers.device_steps import DeviceSteps
from hashattn.ops.decode import Scratch


class HashedLayer(DynamicLayer):
    """Takes the place of a DynamicLayer: the same keys and values, in a KVCache that appends in place.

    Every row operation of the Hugging Face cache reaches the codes as well: after any of them,
    codes == encode_key(keys) holds.

    Once ready, calls of few tokens that a graph holds append on the device. The host adopts that when it next changes
    the cache, looks at its keys or makes an eager call (:meth:`sync`).

    Args:
        attn: the composition of this layer.
        scratch: what the layers of a cache share.

    Attributes:
        recording: whether calls go into a graph just now.
    """

    capacity: int | None = None
    recurrent: bool = False  # whether it keeps states beside its columns

    def __init__(self, attn: HashAttention, scratch: Scratch) -> None:
        self.attn, self.scratch = attn, scratch
        self.kv: KVCache | None = None
        self.recording = False
        self.on_device = DeviceSteps(asks=self.capacity is not None)
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

    # ---- steps that a graph holds

    @property
    def ready(self) -> bool:
        """Whether such steps can be taken."""
        return self.on_device.ready

    @property
    def filled(self) -> int:
        """Columns, as the host counts them: what it has led is among them."""
        return len(self.kv) + self.on_device.led if self.kv is not None else 0

    def in_graph(self, tokens: int) -> bool:
        """Whether a call of so many tokens is such a step."""
        return not torch.compiler.is_compiling() and self.recording

    def graph_step(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See :meth:`DeviceSteps.step`."""
        return self.on_device.step(query, key, value, scale)

    def serve_graphs(
        self,
        served: ServedLayer,
        number: int,
        q_heads: int,
        counters: Counters[Any],
        tokens: int = 1,
        before: HashedLayer | None = None,
        check: bool = False,
    ) -> str | None:
        """Make such steps ready; returns why they cannot be. The layer before is one whose steps the graph holds."""
        assert self.kv is not None
        steps = before.on_device if before is not None else None
        return self.on_device.serve(self, self.kv, served, number, q_heads, tokens, counters, steps, check)

    def lead(self, tokens: int, why_dense: str | None = None) -> None:
        """See :meth:`DeviceSteps.lead`."""
        if self.kv is not None:
            self.on_device.lead(self.kv, tokens, why_dense)

    def sync(self) -> None:
        """Adopt what such steps appended; waits for the device where the host has not led them."""
        if self.kv is not None:
            self.on_device.sync(self.kv)

    def release(self) -> None:
        """Leave the cache as the model's own code expects it, and what follows to eager calls."""
        if self.kv is not None:
            self.on_device.release(self.kv)

    def take_back(self) -> None:
        """See :meth:`DeviceSteps.take_back`."""
        if self.kv is not None:
            self.on_device.take_back(self, self.kv)

    def follow_change(self) -> None:
        """Bring what was made ready for such steps up to date with a change that the host made."""
        if self.kv is not None:
            self.on_device.follow(self, self.kv)

    # ---- what a cache asks of its layers

    def _refuse(self, value: Tensor | None) -> None:
        if value is not None:  # None comes from the base class's __init__
            raise AttributeError("a HashedLayer's keys and values change by update, crop and the row operations only")

    @torch.compiler.disable  # lengths live on the host: traced, they would be compiled anew at every token
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, dim = key_states.shape
        self.kv = self.attn.new_cache(batch, heads, dim, capacity=self.capacity, scratch=self.scratch)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.in_graph(key_states.shape[2]):
            return key_states, value_states  # the attention function appends them
        return self._append(key_states, value_states)

    @torch.compiler.disable
    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        self.release()  # until what was appended is followed
        if self.kv is None:
            self.lazy_initialization(key_states, value_states)
        assert self.kv is not None
        if self.capacity is None and self.kv.kind is not None:
            room = self.kv.storage("keys").shape[2]
            if len(self.kv) + key_states.shape[2] > room:
                self.on_device.drop()
        self.kv.append(key_states, value_states)
        return self.kv.keys, self.kv.values

    @torch.compiler.disable
    def get_seq_length(self) -> int | Tensor:
        if self.recording and self.on_device.decoder is not None:
            return self.on_device.decoder.filled()  # what needs it on the host cannot be captured
        return self.filled

    def reset(self) -> None:
        self.release()
        self.on_device.drop()
        self.kv = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be at most 0 (minus the tokens to remove), got {tokens_to_remove}")
        self.sync()
        if self.kv is not None and tokens_to_remove:
            self.kv.crop(max(0, len(self.kv) + tokens_to_remove))
            self.follow_change()

    def move(self, sources: Tensor, targets: Tensor, starts: list[int]) -> None:
        """See :meth:`hashattn.cache.kv_cache.KVCache.move`; replays go on from there."""
        assert self.kv is not None
        if not self.on_device.has_codes:
            self.sync()
            if self.kv.encoded:
                self.kv.encode()
        self.kv.move(sources, targets, starts)

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
        twin.recording, twin.on_device = False, DeviceSteps(self.on_device.asks)
        return twin

    def offload(self) -> None:
        raise NotImplementedError("a HashedLayer cannot be offloaded: use a cache without offloading")
