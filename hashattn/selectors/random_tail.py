"""RandomTail: the nearest keys, and a random sample of all the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from hashattn.core.budget import Budget, check_one
from hashattn.core.checks import check_seed
from hashattn.core.types import SAMPLED, Selection, Step
from hashattn.index.view import View
from hashattn.selectors.base import BUDGET, Selector
from hashattn.selectors.candidates import check_inner
from hashattn.selectors.draws import draws
from hashattn.selectors.grouping import chosen_mask
from hashattn.selectors.wrapper import Wrapper


@dataclass(frozen=True)
class RandomTail(Wrapper):
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
        object.__setattr__(self, "k", check_one("RandomTail", self.k, self.share))
        object.__setattr__(self, "seed", check_seed(self.seed))

    @property
    def matrices(self) -> int:  # type: ignore[override]
        return 2 + self.inner.matrices

    def budget(self, visible: int, forced: int = 0) -> int:
        return min(visible, self.inner.budget(visible, forced) + Budget(self.k, self.share).count(visible))

    def critical(self, visible: int, forced: int = 0) -> int:
        return min(visible, self.inner.critical(visible, forced) + Budget(self.k, self.share).count(visible))

    def own_settings(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def settings(self) -> dict[str, Any]:
        """k and share are those of both, where they are of one kind."""
        inner = self.inner.settings()
        both: dict[str, Any] = {}
        for name, own in (("k", self.k), ("share", self.share)):
            of_inner = inner.get(name)
            both[name] = None if own is None or of_inner is None else own + of_inner
        return {**inner, **both, **self.own_settings()}

    def revised(self, **changes: Any) -> Self:
        asked = {name: changes.pop(name) for name in BUDGET if name in changes}
        found = super().revised(**changes)
        if not asked:
            return found
        check_one("RandomTail", **{"k": None, "share": None, **asked})
        return found._split(**asked)

    def _split(self, k: int | None = None, share: float | None = None) -> Self:
        """The sample keeps its part of the whole, or gets half where the two were not counted alike."""
        whole = self.settings()
        if whole["share"] is not None and self.share is not None:
            part = self.share / whole["share"]
        else:
            part = self.k / whole["k"] if whole["k"] is not None and self.k is not None else 0.5
        if share is not None:
            drawn = share * part
            return replace(self, inner=self.inner.with_budget(share=share - drawn), k=None, share=drawn)
        assert k is not None
        if k < 2:
            raise ValueError(f"k must be at least 2 for RandomTail, one for inner and one for the sample, got {k}")
        count = min(k - 1, max(1, round(k * part)))
        return replace(self, inner=self.inner.with_budget(k=k - count), k=count, share=None)

    def select(self, view: View, step: Step) -> Selection:
        found = self.inner.select(view, step)
        rest = view.seen & ~chosen_mask(found.ids, view.keys)  # [B, H, T, N]
        heads = torch.arange(rest.shape[1], device=view.device)[:, None, None]
        place = torch.arange(view.keys, device=view.device) - view.visible[..., :1]  # [B, T, N]
        drawn = draws(self.seed, step.layer, heads, view.counts[:, None, :, None], place.unsqueeze(1))
        budget = Budget(self.k, self.share)
        plain = replace(view, sinks=0, recents=0, host=False).calibrate(drawn, rest)
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
