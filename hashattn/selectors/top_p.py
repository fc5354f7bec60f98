"""TopP: as many keys as it takes to hold a share of the attention."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hashattn.core.budget import check_share
from hashattn.core.types import Selection, Step
from hashattn.index.view import View
from hashattn.selectors.base import Selector, forced_slots
from hashattn.selectors.candidates import check_inner, exact_logits, only, own_distances
from hashattn.selectors.logit_map import LogitMap
from hashattn.selectors.topk import TopK
from hashattn.selectors.wrapper import Wrapper


@dataclass(frozen=True)
class TopP(Wrapper):
    """Of what `inner` keeps, the fewest keys whose softmax reaches p (Twilight, arXiv 2502.02770).

    The softmax is over the keys that `inner` keeps: p of it is less than p of all attention by what they miss. Forced
    keys are kept, and count. Where the heads of a KV head share their candidates, a key stays that any head keeps.
    Slots are as many as inner's; how many are filled is up to the data.

    Args:
        inner: a selector without weights that finds the candidates, a generous TopK; Momentum and Consensus go around
            TopP.
        p: share of the candidates' attention, above 0 and at most 1.
        logits: estimates the candidates' logits from their distances, as LogitMap.fit() makes it; None computes them
            exactly, which reads the candidates' keys. The original reads a 4-bit copy of them.
    """

    inner: Selector = field(default_factory=lambda: TopK(share=0.25))
    p: float = 0.85
    logits: LogitMap | None = None

    def __post_init__(self) -> None:
        check_inner("TopP", self.inner)
        check_share("p", self.p)
        if not (self.logits is None or isinstance(self.logits, LogitMap)):
            raise TypeError(f"logits must be a LogitMap, from LogitMap.fit(...), or None, got {self.logits!r}")

    @property
    def matrices(self) -> int:  # type: ignore[override]
        return self.inner.matrices + (self.logits is not None)

    @property
    def needs_distances(self) -> bool:  # type: ignore[override]
        return self.inner.needs_distances or self.logits is not None

    def keys_read(self, visible: int, forced: int = 0) -> int:
        own = self.inner.budget(visible, forced) if self.logits is None and self.p < 1 else 0
        return own + self.inner.keys_read(visible, forced)

    def select(self, view: View, step: Step) -> Selection:
        found = self.inner.select(view, step)
        if self.p == 1:
            return found
        logits = exact_logits(view, found.ids) if self.logits is None else self.logits(own_distances(view, found.ids))
        keep = smallest_set(logits.masked_fill(found.ids.unsqueeze(3) < 0, -torch.inf), self.p, found.ids).any(3)
        return only(found, (keep | forced_slots(view, found.ids)) & (found.ids >= 0))


def smallest_set(logits: Tensor, p: float, ids: Tensor) -> Tensor:
    """bool as logits [B, H, T, G, K] at ids [B, H, T, K]: the fewest of each row whose softmax reaches p, at least one.

    Of equal logits, which a map of distances makes, the most recent key comes first.
    """
    latest = ids.argsort(dim=-1, descending=True).unsqueeze(3).expand_as(logits)
    weights, order = torch.softmax(logits, -1).gather(-1, latest).sort(dim=-1, descending=True, stable=True)
    near = ~(weights.cumsum(-1) - weights >= p)  # all of them where logits are not finite
    return torch.zeros_like(near).scatter_(-1, latest.gather(-1, order), near)
