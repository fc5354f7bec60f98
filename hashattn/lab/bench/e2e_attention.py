"""Attention of a model that decodes: dense or hashed, over the same keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.cache.kv_cache import KVCache
from hashattn.lab.bench.caches import Kind, random_cache, twin
from hashattn.lab.bench.cuda_contenders import Dense
from hashattn.lab.bench.e2e_model import Attend, Llama


def make_caches(
    attn: HashAttention, size: Llama, batch: int, keys: int, *, room: int, device: torch.device
) -> list[KVCache]:
    """A cache for each layer, of so many random keys and `room` free columns: no prompt is read."""
    kind = Kind((batch, size.kv_heads, size.head_dim), keys, size.dtype, device, room)
    return [random_cache(attn.layer(i), kind, i) for i in range(size.layers)]


class DenseLayers:
    """Attends to the first `keys` columns, the last of which it writes anew at every step.

    Args:
        attend: see bench.cuda_contenders.
        caches: one a layer.
    """

    def __init__(self, attend: Dense, caches: Sequence[KVCache], keys: int) -> None:
        self.attend = attend
        self.held = [[cache.storage(what)[:, :, :keys] for what in ("keys", "values")] for cache in caches]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.held[layer]
        keys[:, :, -1:] = k
        values[:, :, -1:] = v
        return self.attend(q, keys, values)

    def restart(self) -> None:
        """Nothing to do: every step is alike."""


class HashedLayers:
    """Appends and attends as a composition does, from `keys` keys on; its dense layers as DenseLayers do.

    Args:
        attn: what engine="gpu" serves.
        caches: one a layer, of one key less.
        dense: of the layers that attn.dense_layers names.
    """

    def __init__(self, attn: HashAttention, caches: Sequence[KVCache], keys: int, dense: Attend) -> None:
        self.dense, self.keys = dense, keys
        self.skipped = {i % len(caches) for i in attn.dense_layers}
        self.decoders = [attn.layer(i).decoder(twin(cache)) for i, cache in enumerate(caches)]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.dense(layer, q, k, v) if layer in self.skipped else self.decoders[layer](q, k, v)

    def restart(self) -> None:
        """Forget what was appended."""
        for decoder in self.decoders:
            decoder.length.fill_(self.keys - 1)
