"""Specification of the fused decode step: search over packed codes, then attention to what was found."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.budget import Budget
from hashattn.ops.attend.reference import gather, logits, weigh
from hashattn.ops.decode.estimate import Estimate
from hashattn.ops.decode.rule import Rule
from hashattn.ops.hamming.reference import differing
from hashattn.ops.search.reference import search
from hashattn.types import CRITICAL, MEDIUM


def decode(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor, rule: Rule,
    *, scale: float, causal: bool = True, estimate: Estimate | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
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
        estimate: gives the logits of medium keys, which are not read; None for exact logits, whatever the rule's tiers.

    Returns:
        out [B, Hq, T, D], zero where a query keeps no key; lse float32 [B, Hq, T]; ids int32 [B, H, T, slots] with
        H = Hkv where the rule is shared: columns in ascending order, -1 in empty slots; tier int8, the shape of ids,
        1 for medium keys, None where all logits are exact.
    """
    filled, tokens = int(length), q.shape[2]
    ends = torch.arange(filled - tokens + 1, filled + 1, device=q.device)
    ends = ends if causal else torch.full_like(ends, filled)
    visible = torch.stack([starts.long()[:, None].expand(-1, tokens), ends.expand(len(starts), -1)], -1)
    visible[..., 1] = torch.maximum(visible[..., 0], visible[..., 1])
    seen = visible[..., 1] - visible[..., 0]
    forced = seen.clamp(max=rule.sinks + rule.recents)
    wanted = torch.maximum(Budget(rule.k, rule.share).counts(seen), forced)
    ids = search(
        query.squeeze(3) if query.shape[3] == 1 else query, codes[:, :, :filled], [wanted],
        max(1, rule.slots(keys.shape[2])), visible, shared=rule.shared, sinks=rule.sinks, recents=rule.recents,
        radius=rule.radius,
    )  # fmt: skip
    last = torch.iinfo(torch.int32).max
    ids, rank = ids.masked_fill(ids < 0, last).sort(-1)
    ids = ids.masked_fill(ids == last, -1)
    x, tier = logits(q, keys, ids, scale), None
    if estimate is not None and rule.critical is not None:
        critical = torch.maximum(Budget(share=rule.critical).counts(seen), forced)
        tier = torch.where((rank >= critical[:, None, :, None]) & (ids >= 0), MEDIUM, CRITICAL).to(torch.int8)
        x = torch.where((tier == MEDIUM).unsqueeze(3), estimated(q, query, codes, ids, estimate) * scale, x)
    out, lse, _ = weigh(x, values, ids, q.dtype, need_lse=True)
    assert lse is not None
    return out, lse, ids, tier


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
