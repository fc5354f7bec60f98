"""How the G query heads of a KV head choose keys: each for itself, or together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hashattn.types import Selection
from hashattn.view import View

PER = ("query_head", "kv_head")
COMBINE = ("sum", "union", "vote")


def check_grouping(per: str, combine: str) -> None:
    """Raise unless both are known words."""
    if per not in PER:
        raise ValueError(f"per must be one of {PER}, got {per!r}")
    if combine not in COMBINE:
        raise ValueError(f"combine must be one of {COMBINE}, got {combine!r}")


def take(
    view: View, counts: Sequence[Tensor], slots: int, per: str, combine: str, critical_slots: int = 0
) -> Selection:
    """Keep the nearest counts[-1] keys of each query; those beyond counts[0] are of medium tier.

    Args:
        view: what the queries see.
        counts: one or two int64 [B, T], ascending: how many keys are critical, how many are kept.
        slots: at least the largest count, known to the host.
        critical_slots: likewise for the first of two counts.
        per: "query_head" ranks for each head; "kv_head" makes one choice for the G heads of a KV head.
        combine: for "kv_head": "sum" ranks by the sum of the group's distances; "vote" by the number of heads that
            would keep the key, then by that sum; "union" keeps what any head keeps (up to G times as many keys).

    Returns:
        Selection with heads Hq for "query_head", Hkv for "kv_head".
    """
    if per == "query_head" or view.q_heads == view.kv_heads:
        return _cut(view.search(slots), counts, critical_slots)
    distances = view.distances().unflatten(1, (view.kv_heads, -1))  # [B, Hkv, G, T, N]
    group = distances.shape[2]
    total = distances.sum(2, dtype=distances.dtype)
    if total.is_floating_point():  # padding may hold anything
        total = total.masked_fill(~view.seen, 0)
    if combine == "sum":
        return _cut(view.calibrate(total, _any(view, group)).search(slots), counts, critical_slots)
    ids = view.search(slots)
    chosen = [_mask(_cut(ids, [c]).ids, view.keys).unflatten(1, (view.kv_heads, group)) for c in counts]
    if combine == "vote":
        votes = chosen[-1].sum(2)
        span = total.abs().amax((1, 2, 3), keepdim=True) * 2 + 1
        ranked = (group - votes) * span.to(torch.int64 if not total.is_floating_point() else total.dtype) + total
        return _cut(view.calibrate(ranked, _any(view, group)).search(slots), counts, critical_slots)
    kept, critical = chosen[-1].any(2), chosen[0].any(2)
    span = total.abs().amax((1, 2, 3), keepdim=True) * 2 + 1
    ids = view.calibrate(torch.where(critical, total, total + span), kept).search(min(group * slots, view.longest))
    filled = torch.arange(ids.shape[-1], device=ids.device)
    tier = (filled >= critical.sum(-1).unsqueeze(-1)) & (ids >= 0)
    if len(counts) == 1:
        return Selection(ids)
    return Selection(ids, tier.to(torch.int8), critical_slots=min(group * critical_slots, ids.shape[-1]))


def _cut(ids: Tensor, counts: Sequence[Tensor], critical_slots: int | None = None) -> Selection:
    slot = torch.arange(ids.shape[-1], device=ids.device)
    ids = ids.masked_fill(slot >= counts[-1][:, None, :, None], -1)
    if len(counts) == 1:
        return Selection(ids)
    tier = ((slot >= counts[0][:, None, :, None]) & (ids >= 0)).to(torch.int8)
    return Selection(ids, tier, critical_slots=critical_slots)


def _mask(ids: Tensor, keys: int) -> Tensor:
    """bool [B, H, T, N] of the keys in ids."""
    mask = torch.zeros(*ids.shape[:3], keys + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter_(-1, torch.where(ids < 0, keys, ids).long(), True)[..., :keys]


def _any(view: View, group: int) -> Tensor | None:
    return None if view.kept is None else view.kept.unflatten(1, (-1, group)).any(2)
