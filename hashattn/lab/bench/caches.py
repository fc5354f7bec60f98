"""Caches of random keys and values, as decoding finds them."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.cache.device_state import DeviceState
from hashattn.cache.kv_cache import KVCache
from hashattn.ops.decode import Scratch

CHUNK = 1 << 13  # keys that are encoded at a time, which takes several times their memory


@dataclass(frozen=True)
class Kind:
    """What the caches of a model have in common.

    Attributes:
        shape: batch, KV heads, head_dim.
        keys: encoded ones, of which room more may be appended.
        scratch: what they share.
    """

    shape: tuple[int, int, int]
    keys: int
    dtype: torch.dtype
    device: torch.device
    room: int = 0
    scratch: Scratch = field(default_factory=Scratch)


def random_cache(attn: HashAttention, kind: Kind, seed: int) -> KVCache:
    """A cache of random keys and values, which are encoded."""
    g = torch.Generator(kind.device).manual_seed(seed)
    keys, (batch, kv_heads, dim) = kind.keys, kind.shape
    cache = attn.new_cache(*kind.shape, capacity=keys + kind.room, scratch=kind.scratch)

    def normal(n: int) -> Tensor:
        return torch.randn(batch, kv_heads, n, dim, generator=g, device=kind.device, dtype=kind.dtype)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this .* is not fitted")  # cost is measured, not quality
        for at in range(0, keys, CHUNK):
            n = min(CHUNK, keys - at)
            cache.append(normal(n), normal(n))
            cache.encode()
    return cache


def twin(cache: KVCache) -> KVCache:
    """The same keys, values and codes in place, with hints of its own: for another decoder of the same encoder."""
    other = copy.copy(cache)
    other.on_device = DeviceState(cache.on_device.scratch)
    return other
