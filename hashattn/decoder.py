"""Decoder: decode steps that a CUDA graph can capture, because lengths live on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattn import fused
from hashattn.shapes import check_float, check_kv, check_q

if TYPE_CHECKING:
    from hashattn.attention import HashAttention
    from hashattn.cache import KVCache


class Decoder:
    """Appends and attends without asking the device or telling the host. Made by attn.decoder(cache).

    A step captured in a CUDA graph serves every later length up to the cache's capacity. Until :meth:`finish` the
    cache itself does not know of what was appended, and must not be changed. Beyond the capacity nothing is written
    and the output is NaN.

    Args:
        attn: a composition that engine="triton" serves.
        cache: made by it with a capacity, on the GPU, filled beyond the warm-up of its centring.

    Raises:
        ValueError: what does not fit, and what would.
    """

    def __init__(self, attn: HashAttention, cache: KVCache) -> None:
        attn.check_cache(cache)
        if cache.capacity is None:
            raise ValueError("cache must have a capacity, which a graph cannot change: new_cache(..., capacity=...)")
        if cache.shortest < max(1, cache.warmup):
            raise ValueError(
                f"every row must hold at least {max(1, cache.warmup)} keys, so that its centre is frozen; "
                f"the shortest holds {cache.shortest}"
            )
        if cache.with_norms:
            raise ValueError("a decoder appends no norms: take a composition with ExactAttend()")
        cache.encode()
        encoder = attn.encoder
        self.attn, self.cache = attn, cache
        self.planes = encoder.linear_planes(cache.head_dim, cache.keys.device) if encoder is not None else None
        self.centre = cache.centre.float().contiguous()
        self.length = torch.full((1,), len(cache), dtype=torch.int32, device=cache.keys.device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Append keys and values [B, Hkv, T, D] and attend with the queries [B, Hq, T, D] of the same positions.

        Returns:
            [B, Hq, T, D].
        """
        from hashattn.ops.decode.append import append  # Triton is optional
        from hashattn.ops.decode.encode import encode

        cache, encoder = self.cache, self.attn.encoder
        check_float(q=q, k=k, v=v, keys=cache.keys)
        check_kv(k, v, cache.batch, cache.kv_heads, cache.head_dim)
        check_q(q, cache.batch, cache.kv_heads, cache.head_dim, k.shape[2])
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"q and k must be of the same positions, got T = {q.shape[2]} and {k.shape[2]}")
        reason = fused.why_not(
            self.attn, device=q.device.type, dtype=q.dtype, q_heads=q.shape[1], kv_heads=cache.kv_heads,
            head_dim=cache.head_dim, tokens=q.shape[2],
        )  # fmt: skip
        if reason is not None:
            raise ValueError(f'engine="triton" cannot take this step: {reason}')
        held = cache.storage("keys"), cache.storage("values"), cache.storage("codes"), self.length
        assert encoder is not None
        encoder.check_model(q.shape[1], cache.kv_heads, cache.head_dim)
        query = None
        if self.planes is not None:
            query = encode(q, k, v, self.centre, self.planes, encoder.query_bits, *held)
        else:
            append(k, v, encoder.encode_key(k, cache._centre), *held)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return fused.step(self.attn, q, cache, scale, True, length=self.length, query=query)[0].out

    def finish(self) -> KVCache:
        """Wait for the device and let the cache know what was appended. Returns it.

        Raises:
            ValueError: the captured steps went beyond the capacity; the cache holds what fitted.
        """
        length = int(self.length)
        self.cache.adopt(min(length, self.cache.capacity or 0))
        if length > (self.cache.capacity or 0):
            self.length.fill_(len(self.cache))
            raise ValueError(
                f"capacity is {self.cache.capacity} columns, but {length} were appended: their outputs are NaN; "
                "make the cache larger"
            )
        return self.cache
