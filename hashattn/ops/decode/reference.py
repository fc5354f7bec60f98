"""Specification of the fused decode step: search over packed codes, then attention to what was found."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.core.budget import Budget
from hashattn.core.types import CRITICAL, MEDIUM
from hashattn.ops.attend.reference import gather, logits, weigh
from hashattn.ops.decode.estimate import Estimate
from hashattn.ops.decode.rule import Rule
from hashattn.ops.hamming.reference import differing, distances
from hashattn.ops.nearest import nearest_of_chunks
from hashattn.ops.search.reference import search


def decode(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor, rule: Rule,
    *, scale: float, causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention of a few queries to the keys that their codes find nearest.

    Args:
        q: [B, Hq, T, D], the last T of the cache's positions.
        query: int64 [B, Hq, T, P, W], P bit planes of the packed queries, the least significant first.
        keys, values: [B, Hkv, room, D], of which `length` columns are filled.
        codes: int64 [B, Hkv, room, W]; the room may be another.
        starts: int32 [B], each row's first column.
        length: int32 [1], filled columns.
        rule: which keys are kept.
        scale: of the logits.
        causal: each query sees the keys up to its own position; otherwise all of them.

    Returns:
        out [B, Hq, T, D], zero where a query keeps no key; lse float32 [B, Hq, T]; ids int32 [B, H, T, slots] with
        H = Hkv where the rule is shared: columns in ascending order, -1 in empty slots. A rule with chunks gives
        each chunk its slots, one chunk after the other.
    """
    ids, _ = choose(query, codes, starts, length, rule, keys.shape[2], causal)
    out, lse, _ = weigh(logits(q, keys, ids, scale), values, ids, q.dtype, need_lse=True)
    assert lse is not None
    return out, lse, ids


def decode_tiers(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    estimate: Estimate, rule: Rule, *, scale: float, causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same where only critical keys are read: the logits of medium ones are estimated.

    Args:
        estimate: what they are estimated from.
        rule: with a share of critical keys.

    Returns:
        out, lse, ids as above; tier int8, the shape of ids: 1 for medium keys, 0 for critical ones and empty slots.
    """
    ids, critical = choose(query, codes, starts, length, rule, keys.shape[2], causal)
    medium = ~critical & (ids >= 0)
    x = logits(q, keys, ids, scale)
    x = torch.where(medium.unsqueeze(3), estimated(q, query, codes, ids, estimate) * scale, x)
    out, lse, _ = weigh(x, values, ids, q.dtype, need_lse=True)
    assert lse is not None
    return out, lse, ids, torch.where(medium, MEDIUM, CRITICAL).to(torch.int8)


def choose(
    query: Tensor, codes: Tensor, starts: Tensor, length: Tensor, rule: Rule, room: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """The ids of a step, and which of them are critical, bool, anything in empty slots. Arguments as above."""
    filled, tokens, device = int(length), query.shape[2], query.device
    ends = torch.arange(filled - tokens + 1, filled + 1, device=device)
    ends = ends if causal else torch.full_like(ends, filled)
    visible = torch.stack([starts.long()[:, None].expand(-1, tokens), ends.expand(len(starts), -1)], -1)
    visible[..., 1] = torch.maximum(visible[..., 0], visible[..., 1])
    seen = visible[..., 1] - visible[..., 0]
    query = query.squeeze(3) if query.shape[3] == 1 else query
    if rule.chunks is not None:
        ids = search_chunks(query, codes[:, :, :filled], visible, rule)
        return ids, ids >= 0
    forced = rule.sinks + rule.recents
    wanted = Budget(rule.k, rule.share, rule.min_k).counts(seen, forced)
    ids = search(
        query, codes[:, :, :filled], [wanted], max(1, rule.slots(room)), visible, shared=rule.shared,
        sinks=rule.sinks, recents=rule.recents, radius=rule.radius, biased=rule.biased,
    )  # fmt: skip
    last = torch.iinfo(torch.int32).max
    ids, rank = ids.masked_fill(ids < 0, last).sort(-1)
    ids = ids.masked_fill(ids == last, -1)
    if rule.critical is None:
        return ids, ids >= 0
    critical = Budget(share=rule.critical, min_k=rule.min_k).counts(seen, forced)
    return ids, rank < critical[:, None, :, None]


def search_chunks(query: Tensor, codes: Tensor, visible: Tensor, rule: Rule) -> Tensor:
    """The nearest keys of each chunk of a rule with chunks: int32 [B, H, T, slots]. Arguments as in search."""
    assert rule.chunks is not None
    found = distances(query, codes, biased=rule.biased)
    if rule.shared:
        found = found.unflatten(1, (codes.shape[1], -1)).sum(2)
    columns, first, end = torch.arange(codes.shape[2], device=codes.device), visible[..., :1], visible[..., 1:]
    keep = ((columns >= first) & (columns < end)).unsqueeze(1)
    forced = ((columns < first + rule.sinks) | (columns >= end - rule.recents)).unsqueeze(1)
    return nearest_of_chunks(found, rule.chunks, rule.per_chunk, keep, forced, most_forced=rule.most_forced).flatten(-2)


def estimated(q: Tensor, query: Tensor, codes: Tensor, ids: Tensor, by: Estimate) -> Tensor:
    """q.k of the keys at ids [B, H, T, K], from their codes and norms alone: float32 [B, H, T, G, K]."""
    heads = ids.shape[1]
    grouped = q.float().unflatten(1, (heads, -1)).transpose(2, 3)  # [B, H, T, G, D]
    signs = query[..., -1, :].unflatten(1, (heads, -1)).transpose(2, 3)  # [B, H, T, G, W]
    differ = differing(signs.unsqueeze(-2), gather(codes, ids).unsqueeze(3))
    norms = gather(by.norms, ids).float().squeeze(-1).unsqueeze(3)  # [B, H, T, 1, K]
    centre = by.centre.repeat_interleave(heads // by.centre.shape[1], dim=1)
    offset = grouped @ centre[:, :, None, :, None]  # [B, H, T, G, 1]
    return offset + by.a * grouped.norm(dim=-1, keepdim=True) * norms * (1 - 2 * differ.float() / by.bits)
