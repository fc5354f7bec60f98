"""The fused decode step of a composition: what it serves, and one step of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattn.core.naming import short
from hashattn.core.types import Output, Selection
from hashattn.ops import decode
from hashattn.ops.hamming import words

if TYPE_CHECKING:
    from hashattn.attention import HashAttention
    from hashattn.cache.kv_cache import KVCache
    from hashattn.encoders import Encoder


def why_not(
    attn: HashAttention, *, device: str, dtype: torch.dtype, q_heads: int, kv_heads: int, head_dim: int,
    tokens: int = 1, batch: int = 1,
) -> str | None:  # fmt: skip
    """Why engine="triton" does not serve such a step, as the end of a sentence; None if it does."""
    encoder, index, selector = attn.encoder, attn.index, attn.selector
    if encoder is None or index is None or selector is None or not index.flat_codes:
        return "it serves binary codes in a FlatHamming index"
    if encoder.code_heads(kv_heads) != kv_heads:
        return "it serves one code a key, not one for each query head"
    if not attn.attend.fused:
        return f"it attends as ExactAttend does, or MixedPrecision without a residual, not as {short(attn.attend)}"
    rule = rule_of(attn, q_heads // kv_heads)
    if rule is None:
        return f'it serves TopK, LocalTopK, Threshold and Tiers (of a group, with combine="sum"), not {short(selector)}'
    return decode.why_not(
        device=device, dtype=dtype, head_dim=head_dim, group=q_heads // kv_heads, tokens=tokens,
        words=words(encoder.bits), planes=encoder.query_bits, rule=rule, batch=batch,
    )  # fmt: skip


def rule_of(attn: HashAttention, group: int) -> decode.Rule | None:
    """What the selector asks of a step over the encoder's codes, for so many query heads a KV head; None as there."""
    assert attn.selector is not None and attn.encoder is not None
    rule = attn.selector.rule(group)
    return None if rule is None else replace(rule, biased=attn.encoder.biased)


@dataclass(frozen=True)
class Prepared:
    """What steps like one another need of a cache: tensors that stay where they are, and the rule."""

    rule: decode.Rule
    keys: Tensor
    values: Tensor
    codes: Tensor
    norms: Tensor | None
    starts: Tensor
    bounds: Tensor
    workspace: Tensor
    estimate: decode.Estimate | None

    def step(self, q: Tensor, query: Tensor, length: Tensor, scale: float, causal: bool) -> tuple[Output, Selection]:
        """Search and attend with queries and their codes; see :func:`hashattn.ops.decode.reference`."""
        from hashattn.ops.decode import library  # registers operators

        given = q, query, self.keys, self.values, self.codes, self.starts, length, self.bounds
        if self.estimate is None:
            out, lse, ids = library.decode(*given, self.rule, self.workspace, scale=scale, causal=causal)
            return Output(out, lse), Selection(ids)
        out, lse, ids, tier = library.decode_tiers(
            *given, self.estimate, self.rule, self.workspace, scale=scale, causal=causal
        )
        return Output(out, lse), Selection(ids, tier)


def prepare(attn: HashAttention, cache: KVCache, q_heads: int, tokens: int) -> Prepared:
    """What steps of so many query heads and queries need, for a composition that is served."""
    assert attn.encoder is not None
    rule = rule_of(attn, q_heads // cache.kv_heads)
    assert rule is not None
    keys, values, codes = (cache.storage(what) for what in ("keys", "values", "codes"))
    sizes = decode.Sizes(
        cache.batch, q_heads, cache.kv_heads, tokens, cache.head_dim, keys.shape[2], codes.shape[2],
        attn.encoder.query_bits, codes.shape[3], rule, attn.encoder.widths() or ((), ()),
    )  # fmt: skip
    state, device = cache.on_device, keys.device
    return Prepared(
        sizes.rule, keys, values, codes, cache.storage("norms") if cache.with_norms else None,
        state.starts(cache._starts, device), state.bounds(sizes.state, device),
        state.scratch.workspace(sizes.workspace, device),
        attn.attend.fused_estimate(cache) if rule.critical is not None else None,
    )  # fmt: skip


def packed(encoder: Encoder, q: Tensor) -> Tensor:
    """Encoded queries as int64 [B, Hq, T, P, W]."""
    query = encoder.encode_query(q)
    return (query if query.ndim == 5 else query.unsqueeze(3)).contiguous()


def step(attn: HashAttention, q: Tensor, cache: KVCache, scale: float, causal: bool) -> tuple[Output, Selection]:
    """Encode the queries, search and attend, without waiting for the device, for a composition that is served."""
    assert attn.encoder is not None
    cache.encode()
    length = torch.full((1,), len(cache), dtype=torch.int32, device=q.device)
    return prepare(attn, cache, *q.shape[1:3]).step(q, packed(attn.encoder, q), length, scale, causal)
