"""How the G query heads of a KV head choose keys: each for itself, or together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hashattn.core.budget import Budget
from hashattn.core.types import Selection
from hashattn.index.view import View
from hashattn.ops.nearest import group_total

PER = ("query_head", "kv_head")
COMBINE = ("sum", "union", "vote")
RANKED = (*COMBINE, "normalised")  # for selectors that only rank
UNIT = 256  # of a standard deviation, in what normalised distances are rounded to


def check_grouping(per: str, combine: str, known: tuple[str, ...] = COMBINE) -> None:
    """Raise unless both are known words."""
    if per not in PER:
        raise ValueError(f"per must be one of {PER}, got {per!r}")
    if combine not in known:
        raise ValueError(f"combine must be one of {known}, got {combine!r}")


def choices_of(per: str, combine: str, q_heads: int, kv_heads: int) -> tuple[int, int]:
    """See :meth:`Selector.choices`: a union keeps what any head of a group would."""
    if per != "kv_head":
        return q_heads, 1
    return kv_heads, q_heads // kv_heads if combine == "union" else 1


def take(view: View, budgets: Sequence[Budget], per: str, combine: str) -> Selection:
    """Keep the nearest keys of each query under budgets[-1]; those beyond budgets[0] are of medium tier.

    Args:
        view: what the queries see.
        budgets: one or two, ascending: how many keys are critical, how many are kept.
        per: "query_head" ranks for each head; "kv_head" makes one choice for the G heads of a KV head.
        combine: for "kv_head": "sum" ranks by the sum of the group's distances; "vote" by the number of heads that
            would keep the key, then by that sum; "normalised" by the sum of distances in standard deviations of
            each head's visible keys; "union" keeps what any head keeps (up to G times as many keys).

    Returns:
        Selection with heads Hq for "query_head", Hkv for "kv_head".
    """
    shared = per == "kv_head" and view.q_heads > view.kv_heads
    if not shared or combine == "sum":
        return _tiered(view.nearest(budgets, shared=shared), view, budgets)
    if combine == "normalised":
        return _tiered(normalised(view).nearest(budgets, shared=True), view, budgets)
    total = group_sum(view)
    group = view.q_heads // view.kv_heads
    chosen = [chosen_mask(view.nearest([b]), view.keys).unflatten(1, (view.kv_heads, group)) for b in budgets]
    if combine == "vote":
        return _tiered(voted(view, chosen[-1]).nearest(budgets), view, budgets)
    kept, critical = chosen[-1].any(2), chosen[0].any(2)
    ranked = torch.where(critical, total, total + _span(total))
    ids = view.calibrate(ranked, kept).search(min(group * view.slots(budgets[-1]), view.longest))
    if len(budgets) == 1:
        return Selection(ids)
    filled = torch.arange(ids.shape[-1], device=ids.device)
    tier = (filled >= critical.sum(-1).unsqueeze(-1)) & (ids >= 0)
    return Selection(ids, tier.to(torch.int8), critical_slots=min(group * view.slots(budgets[0]), ids.shape[-1]))


def group_sum(view: View) -> Tensor:
    """The distances of the query heads of each KV head, summed: [B, Hkv, T, N]."""
    total = group_total(view.distances(), view.kv_heads)
    return total.masked_fill(~view.seen, 0) if total.is_floating_point() else total  # padding may hold anything


def normalised(view: View) -> View:
    """The view whose distances are each head's, less their mean and over their standard deviation, in whole units."""
    distances = view.distances()
    own = distances.double().masked_fill(~view.seen, 0)
    count = view.counts[:, None, :, None].clamp(min=1)
    centred = (own - own.sum(-1, keepdim=True) / count).masked_fill(~view.seen, 0)
    spread = (centred.square().sum(-1, keepdim=True) / count).sqrt().clamp(min=1e-6)
    units = centred / spread * UNIT
    return view.calibrate(units if distances.is_floating_point() else units.round().long())


def voted(view: View, chosen: Tensor) -> View:
    """The view that ranks keys by the number of heads that chose them, then by the group's sum.

    Args:
        chosen: bool [B, Hkv, G, T, N].
    """
    total, group = group_sum(view), chosen.shape[2]
    kind = total.dtype if total.is_floating_point() else torch.int64
    any_head = None if view.kept is None else view.kept.unflatten(1, (-1, group)).any(2)
    return view.calibrate((group - chosen.sum(2)) * _span(total).to(kind) + total, any_head)


def _span(total: Tensor) -> Tensor:
    """More than any two distances of a row differ by."""
    return total.abs().amax((1, 2, 3), keepdim=True) * 2 + 1


def _tiered(ids: Tensor, view: View, budgets: Sequence[Budget]) -> Selection:
    if len(budgets) == 1:
        return Selection(ids)
    slot = torch.arange(ids.shape[-1], device=ids.device)
    tier = ((slot >= view.wanted(budgets[0])[:, None, :, None]) & (ids >= 0)).to(torch.int8)
    return Selection(ids, tier, critical_slots=min(view.slots(budgets[0]), ids.shape[-1]))


def chosen_mask(ids: Tensor, keys: int) -> Tensor:
    """bool [B, H, T, N] of the keys in ids."""
    mask = torch.zeros(*ids.shape[:3], keys + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter_(-1, torch.where(ids < 0, keys, ids).long(), True)[..., :keys]
