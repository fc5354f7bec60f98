"""RandomTail: the nearest keys, and a random sample of all the others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hashattn.budget import Budget, check_k, check_share
from hashattn.selectors.base import Selector
from hashattn.selectors.candidates import check_inner
from hashattn.selectors.draws import draws
from hashattn.selectors.grouping import chosen_mask
from hashattn.shapes import check_seed
from hashattn.types import SAMPLED, Selection, Step
from hashattn.view import View


@dataclass(frozen=True)
class RandomTail(Selector):
    """What `inner` keeps, and of the other visible keys a uniform sample that stands for all of them.

    Each of m keys that are drawn without replacement from n has weight n / m, in the selection's log-weights, so that
    sums of exp(logit) and of exp(logit) value over all keys are estimated without bias (vAttention, arXiv 2510.05688).
    The size of the sample is given here; the original sizes it by a pilot sample for an error (epsilon, delta).

    Draws are a function of the seed, the layer, the head, the number of keys that the query sees and the key's place
    in its row: the same step draws the same sample, whatever else is in the batch, and a larger sample holds a
    smaller one.

    Args:
        inner: a selector without weights that keeps the keys that matter most.
        k: keys drawn; or
        share: of the visible keys, rounded up. Exactly one of the two is given.
        seed: of the draws.
    """

    inner: Selector
    k: int | None = None
    share: float | None = None
    seed: int = 0

    samples = True

    def __post_init__(self) -> None:
        check_inner("RandomTail", self.inner)
        if (self.k is None) == (self.share is None):
            raise ValueError(f"RandomTail takes either k or share, got k={self.k!r} and share={self.share!r}")
        if self.k is not None:
            object.__setattr__(self, "k", check_k(self.k))
        if self.share is not None:
            check_share("share", self.share)
        object.__setattr__(self, "seed", check_seed(self.seed))

    @property
    def matrices(self) -> int:  # type: ignore[override]
        return 2 + self.inner.matrices

    @property
    def needs_distances(self) -> bool:  # type: ignore[override]
        return self.inner.needs_distances

    @property
    def shared(self) -> bool:
        return self.inner.shared

    def budget(self, visible: int) -> int:
        return min(visible, self.inner.budget(visible) + Budget(self.k, self.share).count(visible))

    def select(self, view: View, step: Step) -> Selection:
        found = self.inner.select(view, step)
        rest = view.seen & ~chosen_mask(found.ids, view.keys)  # [B, H, T, N]
        heads = torch.arange(rest.shape[1], device=view.device)[:, None, None]
        place = torch.arange(view.keys, device=view.device) - view.visible[..., :1]  # [B, T, N]
        drawn = draws(self.seed, step.layer, heads, view.counts[:, None, :, None], place.unsqueeze(1))
        budget = Budget(self.k, self.share)
        plain = replace(view, sinks=0, recents=0, engine="reference").calibrate(drawn, rest)
        ids = plain.search(plain.slots(budget))
        wanted = budget.counts(view.counts)[:, None, :, None]
        ids = ids.masked_fill(torch.arange(ids.shape[-1], device=ids.device) >= wanted, -1)
        count = (ids >= 0).sum(-1, keepdim=True).clamp(min=1)
        weight = (rest.sum(-1, keepdim=True).clamp(min=1) / count).log().float()
        none, sampled = torch.zeros_like(found.ids), torch.full_like(ids, SAMPLED)
        tier = found.tier if found.tier is not None else none
        log_weights = found.log_weights if found.log_weights is not None else none.float()
        return Selection(
            torch.cat([found.ids, ids], -1),
            torch.cat([tier.to(torch.int8), sampled.to(torch.int8)], -1),
            torch.cat([log_weights, weight.expand(ids.shape)], -1),
        )
