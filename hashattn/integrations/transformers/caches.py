"""Which caches can be served, and their layers, swapped for hashed ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, StaticCache
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
        layer.sync()
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


def same_codes(held: HashAttention, wanted: HashAttention) -> bool:
    """Whether caches of one composition serve the other."""
    if held is wanted:
        return True
    norms = held.attend.needs_norms or not wanted.attend.needs_norms
    return held.encoder == wanted.encoder and held.index == wanted.index and norms


def layers_of(cache: Any) -> list[Any]:
    """A cache's layers; none where it has caches instead, or is none."""
    return getattr(cache, "layers", [])


def scratch_of(cache: Any) -> Scratch | None:
    """The memory that its hashed layers share; None without such layers."""
    return next((layer.scratch for layer in layers_of(cache) if isinstance(layer, HashedLayer)), None)


def filled_columns(layer: Any) -> int:
    """Columns that a layer of a cache holds."""
    if layer is None:
        return 0
    if isinstance(layer, HashedLayer):
        return len(layer.kv) if layer.kv is not None else 0
    return int(layer.get_seq_length())


def why_not_cache(cache: object, number: int) -> str | None:
    """What keeps this layer of a cache from being served; None if it can be."""
    use = "dynamic and static caches are served"
    if not isinstance(cache, DynamicCache | StaticCache):
        return f"the cache is a {type(cache).__name__}; {use}"
    if cache.offloading:
        return f"the cache is offloaded; {use} without offloading"
    if number >= len(cache.layers):
        replicated = getattr(cache, "layer_class_to_replicate", None)
        return None if replicated is DynamicLayer else f"the cache has no layer {number}"
    reason = why_not_layer(cache.layers[number])
    return None if reason is None else f"layer {number} of the {type(cache).__name__} {reason}; {use}"


def check_room(layer: object, tokens: int) -> None:
    """Raise ValueError if a layer of a cache is a static one without the room for so many tokens."""
    if isinstance(layer, StaticLayer | HashedStaticLayer):
        filled, room = int(layer.get_seq_length()), layer.max_cache_len
        if filled + tokens > room:
            raise ValueError(
                f"the static cache holds {filled} of max_cache_len={room} tokens, but the input has {tokens}: make it "
                "longer, or use a dynamic cache"
            )


def check_append(layer: object, hidden: Tensor, one_device: bool) -> None:
    """Raise unless a layer of a cache can take what attention makes of hidden states [B, T, hidden size].

    Args:
        one_device: whether the whole model is on one device.

    Raises:
        TypeError: the model has another dtype or device than what the layer holds.
        ValueError: another number of rows, or a static layer without the room.
    """
    check_room(layer, hidden.shape[1])
    kv = layer.kv if isinstance(layer, HashedLayer) else None
    if kv is None or len(kv) == 0:
        return
    assert isinstance(layer, HashedLayer)
    if layer.dtype != hidden.dtype or (one_device and layer.device != hidden.device):
        raise TypeError(
            f"the cache holds {layer.dtype} on {layer.device}, but the model now computes in {hidden.dtype} on "
            f"{hidden.device}: start with a new cache after moving a model"
        )
    if kv.batch != hidden.shape[0]:
        raise ValueError(f"the cache holds {kv.batch} rows, but the input has {hidden.shape[0]}")
