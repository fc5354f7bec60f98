"""Caches of random keys and values, as decoding finds them."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor

from hashattn.attention import HashAttention
from hashattn.cache.device_state import DeviceState
from hashattn.cache.kv_cache import KVCache
from hashattn.ops.decode import Scratch

CHUNK = 1 << 13  # keys that are encoded at a time, which takes several times their memory


def random_cache(
    attn: HashAttention, shape: tuple[int, int, int], keys: int, *, capacity: int, scratch: Scratch, dtype: torch.dtype,
    seed: int, device: torch.device,
) -> KVCache:  # fmt: skip
    """A cache of so many encoded keys.

    Args:
        shape: batch, KV heads, head_dim.
        capacity: columns allocated.
        scratch: what the caches of a model share.
    """
    g = torch.Generator(device).manual_seed(seed)
    batch, kv_heads, dim = shape
    cache = attn.new_cache(*shape, capacity=capacity, scratch=scratch)

    def normal(n: int) -> Tensor:
        return torch.randn(batch, kv_heads, n, dim, generator=g, device=device, dtype=dtype)

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
