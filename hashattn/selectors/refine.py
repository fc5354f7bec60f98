"""Refine: the candidates that codes find, ranked again by exact products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.core.checks import keep_ints
from hashattn.core.naming import short
from hashattn.core.types import Selection, Step
from hashattn.index.view import View
from hashattn.selectors.base import forced_slots
from hashattn.selectors.candidates import exact_logits
from hashattn.selectors.grouping import group_sum
from hashattn.selectors.topk import TopK
from hashattn.selectors.wrapper import Wrapper


@dataclass(frozen=True)
class Refine(Wrapper):
    """Of the `factor` times as many keys that `inner` would keep, those of the largest exact logits.

    What ANN libraries call re-ranking: it reads the candidates' keys once more than attending does. Where the heads of
    a KV head choose together, candidates are ranked by the sum of the heads' softmax over them. Forced keys stay. Equal
    logits come in no promised order.

    Args:
        inner: a TopK, for one head or a group (not combine="union", which has no budget of its own).
        factor: candidates, as a multiple of inner's budget, at least 1.
        ties: rank only the keys again that tie at inner's cut, by distance: nearer ones are kept as they are. Of the
            tied keys those among the candidates are looked at, the most recent; needs combine="sum".
    """

    inner: TopK
    factor: int = 4
    ties: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.inner, TopK):
            raise TypeError(f"inner must be a TopK, got {short(self.inner)}")
        keep_ints(self, factor=1)
        if not isinstance(self.ties, bool):
            raise TypeError(f"ties must be True or False, got {self.ties!r}")
        if self.shared and self.inner.combine == "union":
            raise ValueError(f'inner must have one budget for a group: combine="sum" would do, got {short(self.inner)}')
        if self.ties and self.shared and self.inner.combine != "sum":
            raise ValueError(
                f'inner must rank by distance for ties=True: combine="sum" would do, got {short(self.inner)}'
            )

    @property
    def matrices(self) -> int:  # type: ignore[override]
        return self.inner.matrices + self.ties

    @property
    def needs_distances(self) -> bool:  # type: ignore[override]
        return self.inner.needs_distances or self.ties

    def keys_read(self, visible: int, forced: int = 0) -> int:
        return self.inner.times(self.factor).budget(visible, forced)

    def select(self, view: View, step: Step) -> Selection:
        ids, budget = self.inner.times(self.factor).select(view, step).ids, self.inner.wanted
        wanted = view.wanted(budget)[:, None, :, None]
        logits = exact_logits(view, ids).masked_fill(ids.unsqueeze(3) < 0, -torch.inf)
        score = torch.log_softmax(logits, -1).logsumexp(3)
        forced = forced_slots(view, ids)
        if self.ties:
            distances = _at(view, ids).masked_fill(ids < 0, torch.inf).masked_fill(forced, -torch.inf)
            last = (torch.minimum(wanted, (ids >= 0).sum(-1, keepdim=True)) - 1).clamp(min=0)
            cut = distances.sort(-1).values.gather(-1, last.expand(*ids.shape[:3], 1))
            score = score.masked_fill(distances > cut, -torch.inf).masked_fill(distances < cut, torch.inf)
        score = score.masked_fill(forced, torch.inf).masked_fill(ids < 0, -torch.inf)
        least = torch.finfo(score.dtype).min  # of what is not finite: it is kept as any other key
        score = score.nan_to_num(nan=least, posinf=torch.inf, neginf=-torch.inf)
        best, slots = score.topk(min(view.slots(budget), ids.shape[-1]), dim=-1)
        slot = torch.arange(slots.shape[-1], device=ids.device)
        return Selection(ids.gather(-1, slots).masked_fill((slot >= wanted) | (best == -torch.inf), -1))


def _at(view: View, ids: Tensor) -> Tensor:
    """Distances (of a group, their sum) of the keys at ids [B, H, T, K], float64: integers are exact there."""
    shared = ids.shape[1] < view.distances().shape[1]
    return (group_sum(view) if shared else view.distances()).gather(-1, ids.clamp(min=0).long()).double()
