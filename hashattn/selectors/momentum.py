"""Momentum: keys that the layer before attended to come nearer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from hashattn.core.budget import check_finite_number
from hashattn.core.lasting import lasting
from hashattn.core.naming import short
from hashattn.core.types import Selection, Step
from hashattn.index.view import View
from hashattn.ops.decode.rule import Rule
from hashattn.selectors.base import Selector
from hashattn.selectors.consensus import discounted, whole
from hashattn.selectors.wrapper import Wrapper


class Momentum(nn.Module, Wrapper):
    """Cross-layer momentum of DASH-KV (arXiv 2604.19351): D + delta_temporal, smaller is nearer.

    A sparse layer knows its attention distribution only on the keys it selected, so the prior is the previous
    layer's softmax weights there, averaged over query heads, and zero elsewhere. A key whose prior is above `ratio`
    times the uniform share (1 / visible keys) gets a discount, the same in every head; then `inner` selects. After a
    dense layer, and in a stateless call, there is no prior and nothing changes.

    Args:
        inner: the selector that ranks, often a Consensus.
        ratio: of the uniform share.
        discount: start of the learnable discount; see :class:`Consensus`.
    """

    inner: Selector
    needs_distances = True
    needs_weights = True

    @lasting
    def __init__(self, inner: Selector, *, ratio: float = 1.0, discount: float = 2.0) -> None:
        super().__init__()
        if not isinstance(inner, Selector) or not inner.ranked:
            raise TypeError(f"inner must be a ranked selector such as TopK, Tiers or Consensus, got {short(inner)}")
        check_finite_number("ratio", ratio)
        check_finite_number("discount", discount)
        self.inner, self.ratio = inner, ratio
        self.discount = nn.Parameter(torch.tensor(float(discount)))

    @property
    def matrices(self) -> int:  # type: ignore[override]
        return 1 + self.inner.matrices

    def around(self, inner: Selector, **own: Any) -> Self:
        discount = own.pop("momentum", None)
        twin = type(self)(inner, **({"ratio": self.ratio} | own), discount=discount if discount is not None else 0.0)
        twin.training = self.training
        if discount is None:
            twin.discount = self.discount  # the Parameter itself, not a copy
        return twin

    def own_settings(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "momentum": self.discount.item()}  # momentum is its discount

    def rule(self, group: int) -> Rule | None:
        inner, amount = self.inner.rule(group), whole(self.discount)
        if inner is None or inner.prior_ratio is not None or amount is None:
            return None
        return replace(inner, prior_ratio=self.ratio, prior_discount=amount)

    def learned(self) -> tuple[float, ...]:
        return self.discount.item(), *self.inner.learned()

    def select(self, view: View, step: Step) -> Selection:
        if step.previous is None or step.previous_weights is None:
            return self.inner.select(view, step)
        prior = key_prior(step.previous, step.previous_weights, view)
        attended = prior * view.counts.unsqueeze(-1) > self.ratio  # [B, T, N]
        return discounted(self.inner, view, step, attended.unsqueeze(1), self.discount)

    def extra_repr(self) -> str:
        return f"inner={self.inner!r}, ratio={self.ratio}, discount={self.discount.item():g}"


def key_prior(selection: Selection, weights: Tensor, view: View) -> Tensor:
    """The mean attention weight of each key over the query heads of the layer before: float32 [B, T, N]."""
    weights = weights.detach().float().unflatten(1, (selection.ids.shape[1], -1)).mean(2)  # [B, H, T, K]
    columns = torch.where(selection.ids < 0, view.keys, selection.ids).long().transpose(1, 2).flatten(2)
    prior = torch.zeros(*columns.shape[:2], view.keys + 1, device=columns.device)
    prior.scatter_add_(-1, columns, weights.transpose(1, 2).flatten(2))
    return prior[..., :-1] / selection.ids.shape[1]
