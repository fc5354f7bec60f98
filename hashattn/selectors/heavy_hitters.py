"""HeavyHitters: keys that past queries attended to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hashattn.budget import Budget, check_min_k, check_one, check_share
from hashattn.selectors.base import Selector
from hashattn.selectors.grouping import chosen_mask
from hashattn.types import Selection, Step
from hashattn.view import View
from hashattn.votes import DROPPED, Votes


@dataclass(frozen=True)
class HeavyHitters(Selector):
    """The most recent keys, and those with the most accumulated attention (H2O, arXiv 2306.14048).

    Votes are the softmax weights of all queries so far, summed over a KV head's queries: full attention's where the
    composition ran dense (prefill), later those over the kept keys. A key that is once left out never comes back, so
    that outputs are those of a cache that evicts it. The keys stay in memory all the same: nothing is saved but what a
    step reads. The queries of one call go by the votes of the calls before; keys that arrived with them are dropped by
    a later one at the earliest. What nobody has voted on is kept. Cropped keys take their own votes along, but those
    of cropped queries stay, as they would after an eviction.

    Args:
        k: number of keys; or
        share: of the visible keys, rounded up. Exactly one of the two is given.
        recent: share of these that are the most recent keys, rounded up; the original halves the budget.
        min_k: at least this many keys are kept beyond the forced ones, however small the share.
    """

    k: int | None = None
    share: float | None = None
    recent: float = 0.5
    min_k: int = 0

    ranked = False
    needs_distances = False
    observes = True
    shared = True

    def __post_init__(self) -> None:
        check_one("HeavyHitters", self.k, self.share)
        check_min_k(self.min_k)
        check_share("recent", self.recent)

    @property
    def wanted(self) -> Budget:
        """Its budget."""
        return Budget(self.k, self.share, self.min_k)

    def budget(self, visible: int, forced: int = 0) -> int:
        return self.wanted.count(visible, forced)

    def select(self, view: View, step: Step) -> Selection:
        votes, budget = view.voted, self.wanted
        if votes is None:
            return Selection(view.calibrate(view.nothing).search(view.longest))
        columns = torch.arange(view.keys, device=view.device)
        last = torch.ceil(self.recent * budget.counts(view.counts).double()).long().unsqueeze(-1)  # [B, T, 1]
        recent = (columns >= view.visible[..., 1:] - last).unsqueeze(1)  # [B, 1, T, N]
        rank = torch.where(recent, -torch.inf, -votes.unsqueeze(2))
        ids = view.calibrate(rank, (votes > DROPPED).unsqueeze(2)).search(view.slots(budget))
        slot = torch.arange(ids.shape[-1], device=ids.device)
        return Selection(ids.masked_fill(slot >= view.wanted(budget)[:, None, :, None], -1))

    def watched(self, tokens: int) -> int:
        return tokens

    def observe(self, votes: Votes, sums: Tensor, selection: Selection | None, view: View, step: Step) -> None:
        total = votes.of(sums.shape[-1], sums) + sums
        if selection is not None:
            kept = chosen_mask(selection.ids[:, :, -1:], sums.shape[-1]).squeeze(2)  # by the last query
            kept[..., len(votes) :] = True
            total = total.masked_fill(~kept, DROPPED)
        votes.set(total)

    def _budgeted(self, k: int | None = None, share: float | None = None) -> dict[str, Any]:
        return {"k": k, "share": share}
