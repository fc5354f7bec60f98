"""SampledAttend: keys that were drawn stand for those that were not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.attend.base import Attend, Keys, on_host
from hashattn.core.types import SAMPLED, Output, Selection
from hashattn.index.view import View
from hashattn.ops import attend as ops


@dataclass(frozen=True)
class SampledAttend(Attend):
    """Importance sampling: each key is weighed by one over the probability that it was drawn.

    The sums of exp(logit) and of exp(logit) value over all visible keys, the softmax's denominator and numerator, are
    estimated without bias; their quotient, the output, has a bias that vanishes as the sample grows. exp(lse) is the
    estimated denominator. RandomTail hands over its weights (vAttention, arXiv 2510.05688); for CollisionSample they
    are made here, of the angle between a query and a key less its centre (MagicPIG, arXiv 2410.16179).

    Args:
        errors: also estimate the standard error of the output and the sampled keys' share of the attention
            (Output.error and Output.tail). A query with a single drawn key has an error of NaN.
    """

    errors: bool = False

    weighs_samples = True

    @property
    def fused(self) -> bool:
        return False

    def attend(
        self,
        q: Tensor,
        cache: Keys,
        selection: Selection | None,
        scale: float,
        *,
        view: View | None = None,
        need_lse: bool = False,
        need_weights: bool = False,
    ) -> Output:
        if selection is None:
            raise ValueError("SampledAttend needs a selection; DenseAttend does without")
        ids, log_weights = selection.ids, selection.log_weights
        keys, values, at = cache.selected(ids)
        host = on_host(view, selection, q, keys, values)
        logits = ops.logits(q, keys, at, scale, host=host)  # [B, H, T, G, K]
        if selection.collisions is not None:
            if ids.shape[1] != q.shape[1] or selection.tier is None:
                raise ValueError("a selection by collisions must be of query heads and say which slots are sampled")
            found = selection.collisions.probability(cosines(q, cache, ids))
            sampled = selection.tier == SAMPLED
            own = -found.clamp(min=torch.finfo(torch.float32).tiny).log().float().masked_fill(~sampled, 0)
            log_weights = own if log_weights is None else log_weights + own
        out, lse, weights = ops.weigh(
            logits,
            values,
            at,
            q.dtype,
            log_weights=log_weights,
            need_lse=need_lse,
            need_weights=need_weights or self.errors,
            host=host,
        )
        if not self.errors:
            return Output(out, lse, weights)
        assert weights is not None
        tail, error = _spread(selection, log_weights, weights, out, cache)
        return Output(out, lse, weights if need_weights else None, tail, error)


def cosines(q: Tensor, cache: Keys, ids: Tensor) -> Tensor:
    """Of the angles between queries [B, Hq, T, D] and keys less their centre, at ids [B, Hq, T, K]: [B, Hq, T, K]."""
    centre = cache.centre.float().repeat_interleave(ids.shape[1] // cache.centre.shape[1], dim=1)[:, :, None, None]
    away = cache.gather("keys", ids).float() - centre
    size = q.float().norm(dim=-1, keepdim=True) * away.norm(dim=-1)
    return (away @ q.float().unsqueeze(-1)).squeeze(-1) / size.clamp(min=torch.finfo(torch.float32).tiny)


def _spread(
    selection: Selection, log_weights: Tensor | None, weights: Tensor, out: Tensor, cache: Keys
) -> tuple[Tensor, Tensor]:
    """(share of the sampled slots, standard error of out), both [B, Hq, T].

    By linearisation of the quotient: a key adds r = weight (value - out), weights being those of the softmax. Keys
    that collide are drawn independently with chance c: the variance is sum (1 - c) r^2. A sample of m from n keys
    without replacement has c = m / n, and its variance is m / (m - 1) sum (1 - c) (r - mean r)^2.
    """
    ids = selection.ids
    if selection.tier is None or log_weights is None:
        nothing = torch.zeros(weights.shape[:3], device=weights.device)
        return nothing, nothing
    group = weights.shape[1] // ids.shape[1]
    sampled = ((selection.tier == SAMPLED) & (ids >= 0)).repeat_interleave(group, 1)  # [B, Hq, T, K]
    w = weights.masked_fill(~sampled, 0)
    spared = -torch.expm1(-log_weights).repeat_interleave(group, 1).masked_fill(~sampled, 0)  # 1 - c
    values = cache.gather("values", ids).float().repeat_interleave(group, 1)  # [B, Hq, T, K, D]
    r = w.unsqueeze(-1) * (values - out.float().unsqueeze(-2))
    if selection.collisions is not None:
        return w.sum(-1), (spared * r.square().sum(-1)).sum(-1).sqrt()
    count = sampled.sum(-1)  # [B, Hq, T]
    r = r - (r.sum(-2) / count.clamp(min=1).unsqueeze(-1)).unsqueeze(-2)
    variance = (spared * r.square().sum(-1)).sum(-1) * count / (count - 1).clamp(min=1)
    unknown = (count == 1) & (spared.sum(-1) > 0)
    return w.sum(-1), variance.sqrt().masked_fill(unknown, torch.nan)
