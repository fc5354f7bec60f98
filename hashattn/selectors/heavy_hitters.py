"""HeavyHitters: keys that past queries attended to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hashattn.core.attention_sums import DROPPED, UNDO, Attended, dense_sums, selected_sums
from hashattn.core.budget import Budget, check_min_k, check_one, check_share
from hashattn.core.types import Selection, Step
from hashattn.index.view import View
from hashattn.selectors.base import Selector
from hashattn.selectors.grouping import chosen_mask

_FAR = 1e37  # no sum of sums comes near


@dataclass(frozen=True)
class HeavyHitters(Selector):
    """The most recent keys, and those with the most accumulated attention (H2O, arXiv 2306.14048).

    What counts are the softmax weights of all queries so far, summed over a KV head's queries: full attention's where
    the composition ran dense (prefill), later those over the kept keys. A key that is once left out never comes back:
    outputs are those of a cache that evicts it. The keys stay in memory all the same: nothing is saved but what a
    step reads. Queries choose one after the other, also those of one call. A cache without any keeps all.

    A crop takes back what the cropped queries did, sums and evictions: the cache is what it was at that length. It
    remembers the last 256 queries for that, and the sums at the beginnings of the last 16 calls of several queries; a
    crop to anywhere else is refused.

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
    accumulates = True
    one_by_one = True
    shared = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", check_one("HeavyHitters", self.k, self.share))
        object.__setattr__(self, "min_k", check_min_k(self.min_k))
        check_share("recent", self.recent)

    @property
    def wanted(self) -> Budget:
        """Its budget."""
        return Budget(self.k, self.share, self.min_k)

    def budget(self, visible: int, forced: int = 0) -> int:
        return self.wanted.count(visible, forced)

    def select(self, view: View, step: Step) -> Selection:
        sums, budget = view.attention_so_far, self.wanted
        if sums is None:
            return Selection(view.calibrate(view.nothing).search(view.longest))
        columns = torch.arange(view.keys, device=view.device)
        last = torch.ceil(self.recent * budget.counts(view.counts).double()).long().unsqueeze(-1)  # [B, T, 1]
        recent = (columns >= view.visible[..., 1:] - last).unsqueeze(1)  # [B, 1, T, N]
        nearest = -_FAR * (1 + columns / view.keys)  # behind forced keys, of which the budget may leave no more
        rank = torch.where(recent, nearest, -sums.unsqueeze(2))
        ids = view.calibrate(rank, (sums > DROPPED).unsqueeze(2)).search(view.slots(budget))
        slot = torch.arange(ids.shape[-1], device=ids.device)
        return Selection(ids.masked_fill(slot >= view.wanted(budget)[:, None, :, None], -1))

    def accumulate(self, shown: Attended, selection: Selection | None = None, weights: Tensor | None = None) -> None:
        keys, tokens = shown.keys.shape[2], shown.q.shape[2]
        if selection is not None and weights is not None:
            kept = chosen_mask(selection.ids, keys).squeeze(2)
            shown.attention_sums.add(shown, selected_sums(selection.ids, weights, keys), kept)
            return
        deep = max(0, tokens - UNDO)  # the sums of later queries can be taken back
        for part in ([shown.part(0, deep)] if deep else []) + [shown.part(deep, tokens)]:
            shown.attention_sums.add(part, dense_sums(part.q, part.keys, part.seen, part.scale), None)

    def _budgeted(self, k: int | None = None, share: float | None = None) -> dict[str, Any]:
        return {"k": k, "share": share}
