"""Specification of the fused decode step: search over packed codes, then attention to what was found."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.core.budget import Budget
from hashattn.core.types import CRITICAL, MEDIUM
from hashattn.ops.attend.reference import gather, logits, weigh
from hashattn.ops.decode.families import FAMILIES
from hashattn.ops.decode.inputs import Inputs, Outputs
from hashattn.ops.decode.rule import Rule
from hashattn.ops.hamming.reference import differing, distances, unpack_bits
from hashattn.ops.nearest import nearest_of_chunks
from hashattn.ops.nearest.reference import group_total
from hashattn.ops.search.ranking import Ranking
from hashattn.ops.search.reference import nearest_of, search


def decode(x: Inputs) -> Outputs:
    """Search over packed codes, then attention to what was found; only critical keys are read.

    The logits of medium keys are estimated where there is an estimate.
    """
    ids, critical = choose(x)
    found = logits(x.q, x.stored.keys, ids, x.scale)
    tier = None
    if x.estimate is not None:
        medium = ~critical & (ids >= 0)
        found = torch.where(medium.unsqueeze(3), estimated(x, ids) * x.scale, found)
        tier = torch.where(medium, MEDIUM, CRITICAL).to(torch.int8)
    wanted = x.rule.prior_ratio is not None
    out, lse, weights = weigh(found, x.stored.values, ids, x.q.dtype, need_lse=True, need_weights=wanted)
    assert lse is not None
    return Outputs(out, lse, ids, tier, weights)


def choose(x: Inputs) -> tuple[Tensor, Tensor]:
    """The ids of a step, and which of them are critical, bool, anything in empty slots."""
    rule, query, filled = x.rule, x.query, int(x.stored.length)
    tokens, device = query.shape[2], query.device
    ends = torch.arange(filled - tokens + 1, filled + 1, device=device)
    ends = ends if x.causal else torch.full_like(ends, filled)
    visible = torch.stack([x.starts.long()[:, None].expand(-1, tokens), ends.expand(len(x.starts), -1)], -1)
    visible[..., 1] = torch.maximum(visible[..., 0], visible[..., 1])
    seen = visible[..., 1] - visible[..., 0]
    if x.scores in FAMILIES:
        found = FAMILIES[x.scores].distances(x, filled)
        return _in_columns(x, found, seen, visible)
    query, codes = query.squeeze(3) if query.shape[3] == 1 else query, x.stored.codes[:, :, :filled]
    if rule.chunks is not None:
        ids = search_chunks(query, codes, visible, rule)
        return ids, ids >= 0
    forced = rule.sinks + rule.recents
    wanted = Budget(rule.k, rule.share, rule.min_k).counts(seen, forced)
    ranking = Ranking(rule.shared, rule.sinks, rule.recents, rule.radius, rule.biased)
    slots = max(1, rule.slots(x.stored.keys.shape[2]))
    if rule.calibrated:
        near = discounts(x, search(query, codes, [wanted], slots, visible, ranking), seen)
        found = distances(query, codes, biased=rule.biased) - near.unsqueeze(1)
        found = found.unflatten(1, (codes.shape[1], -1)).sum(2) if rule.shared else found
        ids = nearest_of(found, [wanted], slots, visible, ranking)
    else:
        ids = search(query, codes, [wanted], slots, visible, ranking)
    last = torch.iinfo(torch.int32).max
    ids, rank = ids.masked_fill(ids < 0, last).sort(-1)
    ids = ids.masked_fill(ids == last, -1)
    if rule.critical is None:
        return ids, ids >= 0
    critical = Budget(share=rule.critical, min_k=rule.min_k).counts(seen, forced)
    return ids, rank < critical[:, None, :, None]


def _in_columns(x: Inputs, found: Tensor, seen: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest keys on distances [B, Hq, T, N], in column order."""
    rule = x.rule
    ranking = Ranking(rule.shared, rule.sinks, rule.recents, rule.radius)
    found = group_total(found, x.stored.keys.shape[1]) if rule.shared else found
    wanted = Budget(rule.k, rule.share, rule.min_k).counts(seen, rule.sinks + rule.recents)
    ids = nearest_of(found, [wanted], max(1, rule.slots(x.stored.keys.shape[2])), visible, ranking)
    last = torch.iinfo(torch.int32).max
    ids = ids.masked_fill(ids < 0, last).sort(-1).values
    ids = ids.masked_fill(ids == last, -1)
    return ids, ids >= 0


def discounts(x: Inputs, voted: Tensor, seen: Tensor) -> Tensor:
    """How much nearer a rule's calibration brings each key, in every head: int32 [B, T, N].

    Args:
        voted: int32 [B, H, T, slots], the keys that are nearest on raw distances.
        seen: int64 [B, T], keys that each query sees.
    """
    rule, (batch, q_heads, tokens), keys = x.rule, x.q.shape[:3], int(x.stored.length)
    near = torch.zeros(batch, tokens, keys + 1, dtype=torch.int32, device=x.q.device)

    def summed(ids: Tensor, amounts: Tensor) -> Tensor:
        """Amounts [B, H, T, K] of keys, added up over heads: [B, T, N + 1]."""
        columns = torch.where(ids < 0, keys, ids).long().transpose(1, 2).flatten(2)
        return torch.zeros_like(near, dtype=amounts.dtype).scatter_add_(2, columns, amounts.transpose(1, 2).flatten(2))

    if rule.vote_share is not None:
        ballots = torch.full_like(voted, q_heads // voted.shape[1])
        near += rule.vote_discount * (summed(voted, ballots) >= rule.votes(q_heads))
    if rule.prior_ratio is not None and x.before is not None:
        heads = x.before.ids.shape[1]
        weights = x.before.weights.float().unflatten(1, (heads, -1)).mean(2)
        prior = summed(x.before.ids, weights) / heads
        near += rule.prior_discount * (prior * seen.unsqueeze(-1) > rule.prior_ratio)
    return near[..., :-1]


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


def estimated(x: Inputs, ids: Tensor) -> Tensor:
    """q.k of the keys at ids [B, H, T, K], from their codes and norms alone: float32 [B, H, T, G, K]."""
    by, heads = x.estimate, ids.shape[1]
    assert by is not None
    grouped = x.q.float().unflatten(1, (heads, -1)).transpose(2, 3)  # [B, H, T, G, D]
    signs = x.query[..., -1, :].unflatten(1, (heads, -1)).transpose(2, 3)  # [B, H, T, G, W]
    codes = gather(x.stored.codes, ids).unsqueeze(3)
    agree = 1 - 2 * differing(signs.unsqueeze(-2), codes).float() / by.bits
    if by.residual is not None:
        agree = agree + by.residual(*(unpack_bits(y, by.bits).float() * 2 - 1 for y in (signs.unsqueeze(-2), codes)))
    norms = gather(by.norms, ids).float().squeeze(-1).unsqueeze(3)  # [B, H, T, 1, K]
    centre = by.centre.repeat_interleave(heads // by.centre.shape[1], dim=1)
    offset = grouped @ centre[:, :, None, :, None]  # [B, H, T, G, 1]
    return offset + by.a * grouped.norm(dim=-1, keepdim=True) * norms * agree
