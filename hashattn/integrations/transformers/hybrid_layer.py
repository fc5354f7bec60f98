"""Hashed layers of models whose layers have a recurrent part beside full attention."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from hashattn.attention import HashAttention
from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.static_layer import HashedStaticLayer
from hashattn.ops.decode import Scratch

# transformers' own, as far as the installed version has them
HYBRID = tuple(
    getattr(cache_utils, name)
    for name in ("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndStaticFullAttentionLayer")
    if hasattr(cache_utils, name)
)
STATES = tuple(vars(LinearAttentionLayer()))  # what the recurrent part keeps


class HashedHybridLayer(LinearAttentionLayer, HashedLayer):  # type: ignore[misc, override]
    """A HashedLayer with the recurrent states of the layer whose place it takes."""

    is_compileable = False
    recurrent = True

    def __init__(self, attn: HashAttention, scratch: Scratch, before: CacheLayerMixin) -> None:
        HashedLayer.__init__(self, attn, scratch)
        take_states(self, before)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:  # keys and values by place, states by name
        if len(args) == 2:
            HashedLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        HashedLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]
        HashedLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)  # raises where the past was not recorded
        HashedLayer.crop(self, tokens_to_remove)

    def offload(self) -> None:
        HashedLayer.offload(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> HashedLayer:
        return copy_states(HashedLayer.__deepcopy__(self, memo), memo)


class HashedStaticHybridLayer(LinearAttentionLayer, HashedStaticLayer):  # type: ignore[misc, override]
    """The same for a static cache."""

    recurrent = True

    def __init__(self, attn: HashAttention, scratch: Scratch, max_cache_len: int, before: CacheLayerMixin) -> None:
        HashedStaticLayer.__init__(self, attn, scratch, max_cache_len)
        take_states(self, before)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        if len(args) == 2:
            HashedStaticLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        HashedStaticLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]
        HashedStaticLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        HashedStaticLayer.crop(self, tokens_to_remove)

    def offload(self) -> None:
        HashedStaticLayer.offload(self)

    def get_max_length(self) -> int:
        return HashedStaticLayer.get_max_length(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> HashedStaticLayer:
        twin = copy_states(HashedStaticLayer.__deepcopy__(self, memo), memo)
        assert isinstance(twin, HashedStaticLayer)
        return twin


def take_states(layer: HashedLayer, before: CacheLayerMixin) -> None:
    """Let a layer go on with the recurrent states of the one whose place it takes."""
    for name in STATES:
        vars(layer)[name] = vars(before)[name]


def copy_states(layer: HashedLayer, memo: dict[int, Any]) -> HashedLayer:
    """Give a copied layer states of its own."""
    for name in STATES:
        vars(layer)[name] = copy.deepcopy(vars(layer)[name], memo)
    return layer


def hybrid(layer: CacheLayerMixin, attn: HashAttention, scratch: Scratch) -> HashedLayer:
    """An empty hashed layer beside the recurrent states of a layer."""
    length = vars(layer).get("max_cache_len")
    if length is None:
        return HashedHybridLayer(attn, scratch, layer)
    return HashedStaticHybridLayer(attn, scratch, length, layer)
