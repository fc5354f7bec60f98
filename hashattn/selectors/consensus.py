"""Consensus: keys that many heads would select come nearer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from hashattn.core.budget import check_finite_number, check_share
from hashattn.core.lasting import lasting
from hashattn.core.naming import short
from hashattn.core.types import Selection, Step
from hashattn.index.view import View
from hashattn.ops.decode.rule import Rule
from hashattn.selectors.base import Selector
from hashattn.selectors.wrapper import Wrapper


class Consensus(nn.Module, Wrapper):
    """Cross-head consensus of DASH-KV (arXiv 2604.19351): D + delta_spatial, smaller is nearer.

    Every query head votes for the keys that `inner` would select on the raw distances. A key with more than
    `vote_share` of the layer's query heads behind it gets a discount, the same in every head; then `inner` selects.

    Args:
        inner: the selector that ranks.
        vote_share: share of the query heads that a key needs more than.
        discount: start of the learnable discount, in the index's units of distance. It is rounded to an integer,
            so that distances stay integers. While gradients are on, the log-weights of discounted slots carry a
            straight-through gradient to it: zero in value, one in slope.
    """

    @lasting
    def __init__(self, inner: Selector, *, vote_share: float = 0.5, discount: float = 2.0) -> None:
        super().__init__()
        if not isinstance(inner, Selector) or not inner.ranked:
            raise TypeError(f"inner must be a ranked selector such as TopK or Tiers, got {short(inner)}")
        check_share("vote_share", vote_share)
        check_finite_number("discount", discount)
        self.inner, self.vote_share = inner, vote_share
        self.discount = nn.Parameter(torch.tensor(float(discount)))

    inner: Selector
    needs_distances = True

    @property
    def matrices(self) -> int:  # type: ignore[override]
        return 1 + self.inner.matrices

    def around(self, inner: Selector, **own: Any) -> Self:
        discount = own.pop("consensus", None)
        twin = type(self)(
            inner, **({"vote_share": self.vote_share} | own), discount=discount if discount is not None else 0.0
        )
        twin.training = self.training
        if discount is None:
            twin.discount = self.discount  # the Parameter itself, not a copy
        return twin

    def own_settings(self) -> dict[str, Any]:
        return {"vote_share": self.vote_share, "consensus": self.discount.item()}  # consensus is its discount

    def rule(self, group: int) -> Rule | None:
        inner, amount = self.inner.rule(group), whole(self.discount)
        if inner is None or inner.calibrated or amount is None:  # votes are for raw distances
            return None
        return replace(inner, vote_share=self.vote_share, vote_discount=amount)

    def learned(self) -> tuple[float, ...]:
        return self.discount.item(), *self.inner.learned()

    def select(self, view: View, step: Step) -> Selection:
        votes = key_votes(self.inner.select(view.calibrate(view.raw), step).ids, view)
        agreed = (votes > self.vote_share * view.q_heads).unsqueeze(1)  # [B, 1, T, N]
        return discounted(self.inner, view, step, agreed, self.discount)

    def extra_repr(self) -> str:
        return f"inner={self.inner!r}, vote_share={self.vote_share}, discount={self.discount.item():g}"


def key_votes(ids: Tensor, view: View) -> Tensor:
    """How many query heads selected each key: int64 [B, T, N]."""
    weight = view.q_heads // ids.shape[1]  # a KV head's choice stands for its G query heads
    columns = torch.where(ids < 0, view.keys, ids).long().transpose(1, 2).flatten(2)  # [B, T, H*K]
    counts = torch.zeros(*columns.shape[:2], view.keys + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(-1, columns, torch.full_like(columns, weight))[..., :-1]


def whole(discount: Tensor) -> int | None:
    """A learned discount as it is subtracted; None if it is no number."""
    amount = discount.detach().round().item()
    return int(amount) if math.isfinite(amount) else None


def discounted(inner: Selector, view: View, step: Step, mask: Tensor, discount: Tensor) -> Selection:
    """What `inner` selects when the keys of mask [B, 1, T, N] are nearer by the rounded discount."""
    distances = view.distances()
    amount = discount.detach().round().to(distances.dtype)
    selection = inner.select(view.calibrate(distances - amount * mask), step)
    if not (torch.is_grad_enabled() and discount.requires_grad):
        return selection
    marked = mask.expand(-1, selection.ids.shape[1], -1, -1).gather(-1, selection.ids.clamp(min=0).long())
    carried = (discount - discount.detach()) * (marked & (selection.ids >= 0))
    before = selection.log_weights if selection.log_weights is not None else 0.0
    return replace(selection, log_weights=before + carried)
