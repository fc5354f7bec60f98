"""The fused decode step of a composition: what it serves, and one step of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattn.ops import decode
from hashattn.ops.hamming import words
from hashattn.types import Output, Selection

if TYPE_CHECKING:
    from hashattn.attention import HashAttention
    from hashattn.cache import KVCache


def why_not(
    attn: HashAttention, *, device: str, dtype: torch.dtype, q_heads: int, kv_heads: int, head_dim: int, tokens: int = 1
) -> str | None:  # fmt: skip
    """Why engine="triton" does not serve such a step, as the end of a sentence; None if it does."""
    encoder, index, selector = attn.encoder, attn.index, attn.selector
    if encoder is None or index is None or selector is None or not index.flat_codes:
        return "it serves binary codes in a FlatHamming index"
    if encoder.code_heads(kv_heads) != kv_heads:
        return "it serves one code a key, not one for each query head"
    if not attn.attend.fused:
        return f"it attends as ExactAttend does, or MixedPrecision without a residual, not as {attn.attend!r}"
    rule = selector.rule(q_heads // kv_heads)
    if rule is None:
        return f'it serves TopK, Threshold and Tiers (of a group, with combine="sum"), not {selector!r}'
    return decode.why_not(
        device=device, dtype=dtype, head_dim=head_dim, group=q_heads // kv_heads, tokens=tokens,
        words=words(encoder.bits), planes=encoder.query_bits, rule=rule,
    )  # fmt: skip


def step(
    attn: HashAttention, q: Tensor, cache: KVCache, scale: float, causal: bool, *, length: Tensor | None = None,
    query: Tensor | None = None,
) -> tuple[Output, Selection]:  # fmt: skip
    """Encode the queries, search and attend, without waiting for the device, for a composition that is served.

    Args:
        length: int32 [1], columns with their codes, where only the device knows; None for what the cache knows.
        query: packed, int64 [B, Hq, T, P, W]; None if they are yet to be encoded.
    """
    from hashattn.ops.decode.triton import decode as fused  # Triton is optional

    assert attn.encoder is not None and attn.selector is not None
    if length is None:
        cache.encode()
        length = torch.full((1,), len(cache), dtype=torch.int32, device=q.device)
    if query is None:
        query = attn.encoder.encode_query(q)
        query = (query if query.ndim == 5 else query.unsqueeze(3)).contiguous()
    rule = attn.selector.rule(q.shape[1] // cache.kv_heads)
    assert rule is not None
    rows = q.shape[0] * q.shape[2] * (cache.kv_heads if rule.shared else q.shape[1])
    estimate = attn.attend.fused_estimate(cache) if rule.critical is not None else None
    out, lse, ids, tier = fused(
        q.contiguous(), query, cache.storage("keys"),
        cache.storage("values"), cache.storage("codes"), cache.on_device.starts(cache._starts, q.device), length,
        cache.on_device.bounds(rows, q.device), rule, cache.on_device.scratch, scale=scale, causal=causal,
        estimate=estimate,
    )  # fmt: skip
    return Output(out, lse), Selection(ids, tier)
