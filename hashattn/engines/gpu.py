"""The fused decode step of a composition: what it serves, and one step of it."""

from __future__ import annotations

from dataclasses import replace
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
    request = request_of(attn, torch.device(device), dtype, (q_heads, kv_heads, head_dim), rule)
    return "; ".join(decode.why_not(replace(request, tokens=tokens, batch=batch))) or None


def request_of(
    attn: HashAttention, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], rule: decode.Rule
) -> decode.Request:
    """What a composition of codes asks of the kernels, for so many query heads, KV heads and dimensions of a head."""
    encoder = attn.encoder
    assert encoder is not None
    return decode.Request(device, dtype, *heads, words(encoder.bits), encoder.query_bits, rule, encoder.code)


def rule_of(attn: HashAttention, group: int) -> decode.Rule | None:
    """What the selector asks of a step over the encoder's codes, for so many query heads a KV head; None as there.

    No keys are critical to a stage that attends to all of them alike.
    """
    assert attn.selector is not None and attn.encoder is not None
    rule = attn.selector.rule(group)
    if rule is None:
        return None
    critical = rule.critical if attn.attend.needs_norms else None
    return replace(rule, biased=attn.encoder.biased, critical=critical)


class Prepared:
    """A step that is made ready for a cache, whose tensors stay where they are."""

    def __init__(self, like: decode.Inputs) -> None:
        from hashattn.ops.decode.library import Decode  # registers operators

        self.like, self._step = like, Decode(like)

    def step(self, q: Tensor, query: Tensor, scale: float) -> tuple[Output, Selection]:
        """Search and attend with queries and their codes; see :class:`hashattn.ops.decode.Inputs`."""
        out, lse, ids, tier = self._step(q, query, scale)
        return Output(out, lse), Selection(ids, tier)


def prepare(
    attn: HashAttention, cache: KVCache, q_heads: int, tokens: int, length: Tensor, causal: bool = True,
    centre: Tensor | None = None,
) -> Prepared:  # fmt: skip
    """A step of so many query heads and queries, for a composition that is served.

    Args:
        length: int32 [1], filled columns.
        centre: where the keys' centre stays, if not with the cache.
    """
    encoder, state, device = attn.encoder, cache.on_device, cache.keys.device
    rule = rule_of(attn, q_heads // cache.kv_heads)
    assert rule is not None and encoder is not None
    keys, values, codes = (cache.storage(what).detach() for what in ("keys", "values", "codes"))
    stored = decode.Stored(keys, values, codes, length, cache.storage("norms") if cache.with_norms else None)
    estimate = attn.attend.fused_estimate(cache) if rule.critical is not None else None
    if estimate is not None and centre is not None:
        estimate = replace(estimate, centre=centre)
    shape = cache.batch, q_heads, tokens
    q = torch.empty((*shape, cache.head_dim), dtype=keys.dtype, device=device)
    query = torch.empty((*shape, encoder.query_bits, codes.shape[3]), dtype=torch.int64, device=device)
    like = decode.Inputs(q, query, stored, state.starts(cache._starts, device), rule, 1.0, causal, estimate)
    sizes = replace(decode.Sizes.of(like), widths=encoder.widths() or ((), ()))
    workspace = state.scratch.workspace(sizes.workspace, device)
    return Prepared(replace(like, bounds=state.bounds(sizes.state, device), workspace=workspace))


def packed(encoder: Encoder, q: Tensor) -> Tensor:
    """Encoded queries as int64 [B, Hq, T, P, W]."""
    query = encoder.encode_query(q)
    return (query if query.ndim == 5 else query.unsqueeze(3)).contiguous()


def step(attn: HashAttention, q: Tensor, cache: KVCache, scale: float, causal: bool) -> tuple[Output, Selection]:
    """Encode the queries, search and attend, without waiting for the device, for a composition that is served."""
    assert attn.encoder is not None
    cache.encode()
    length = torch.full((1,), len(cache), dtype=torch.int32, device=q.device)
    return prepare(attn, cache, q.shape[1], q.shape[2], length, causal).step(q, packed(attn.encoder, q), scale)
