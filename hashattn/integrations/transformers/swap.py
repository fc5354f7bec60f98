"""Swapping a layer of a cache for a hashed one."""

from __future__ import annotations

from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from hashattn.attention import HashAttention
from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.hybrid_layer import HYBRID, HashedHybridLayer, HashedStaticHybridLayer, hybrid
from hashattn.integrations.transformers.static_layer import HashedStaticLayer
from hashattn.ops.decode import Scratch

HASHED = (HashedLayer, HashedStaticLayer, HashedHybridLayer, HashedStaticHybridLayer)
WINDOWS = (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)  # of layers whose window holds all positions
SERVED = (DynamicLayer, StaticLayer, *WINDOWS, *HYBRID, *HASHED)


def why_not_layer(layer: object) -> str | None:
    """What keeps a layer of a cache from being swapped; None if it can be."""
    if type(layer) not in SERVED:
        return f"is a {type(layer).__name__}"
    if isinstance(layer, WINDOWS) and layer.is_initialized and layer.keys is not None:
        filled, held = int(layer.get_seq_length()), layer.keys.shape[2]
        if filled > held:
            return f"is a {type(layer).__name__} that has let go of all but {held} of {filled} tokens"
    return None


def hashed_layer(layer: CacheLayerMixin, attn: HashAttention, scratch: Scratch) -> HashedLayer:
    """A hashed layer with the contents of a layer that can be swapped, or of one of another composition."""
    if isinstance(layer, HashedLayer):
        layer.settle()
    filled = int(layer.get_seq_length())
    new: HashedLayer
    if isinstance(layer, LinearAttentionLayer):
        new = hybrid(layer, attn, scratch)
    elif isinstance(layer, StaticLayer | HashedStaticLayer):
        new = HashedStaticLayer(attn, scratch, layer.max_cache_len)
    else:
        new = HashedLayer(attn, scratch)
    if filled and layer.keys is not None and layer.values is not None:
        new.update(layer.keys[:, :, :filled], layer.values[:, :, :filled])
    return new
