"""ObservationWindow: keys that the end of the prompt attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from hashattn.budget import Budget, check_k, check_share
from hashattn.selectors.base import Selector
from hashattn.types import Selection, Step
from hashattn.view import View
from hashattn.votes import DROPPED, Votes


@dataclass(frozen=True)
class ObservationWindow(Selector):
    """The keys that the prompt's last queries voted for, and all that came later (SnapKV, arXiv 2404.14469).

    Each call of at least `window` queries, in practice a prefill, chooses for the steps after it: its last `window`
    queries' attention weights are summed over a KV head's queries and averaged over neighbouring keys; the keys of the
    window and those of most votes before it are kept, within the budget. Later keys are all kept. So are all keys until
    such a call, and the calls choose among what the one before kept: outputs are those of a cache that evicts the
    others, but they stay in memory.

    Args:
        k: keys of the prompt that are kept, the window's among them; or
        share: of the prompt's keys, rounded up; or
        shares: such a share for each layer of the model, as pyramid() makes them. Exactly one of the three is given.
        window: queries that vote.
        pool: keys that votes are averaged over, odd.
    """

    k: int | None = None
    share: float | None = None
    shares: tuple[float, ...] | None = None
    window: int = 64
    pool: int = 5

    ranked = False
    needs_distances = False
    observes = True
    shared = True

    def __post_init__(self) -> None:
        given = {"k": self.k, "share": self.share, "shares": self.shares}
        if sum(x is not None for x in given.values()) != 1:
            raise ValueError(f"ObservationWindow takes one of k, share and shares, got {given}")
        if self.k is not None:
            check_k(self.k)
        if self.shares is not None and not (isinstance(self.shares, tuple) and self.shares):
            raise TypeError(f"shares must be a tuple of one share a layer, got {self.shares!r}")
        for share in self.shares or ((self.share,) if self.share is not None else ()):
            check_share("shares" if self.shares else "share", share)
        for name, value in (("window", self.window), ("pool", self.pool)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if self.pool % 2 == 0:
            raise ValueError(f"pool must be odd, so that it has a middle, got {self.pool}")

    def budget(self, visible: int, forced: int = 0) -> int:
        share = self.share if self.shares is None else max(self.shares)
        return Budget(self.k, share).count(visible, forced)

    def select(self, view: View, step: Step) -> Selection:
        votes, forced = view.voted, view.sinks + view.recents
        if votes is None or view.votes is None:
            return Selection(view.calibrate(view.nothing).search(view.longest))
        most = view.longest if view.votes.most is None else view.votes.most + view.keys - len(view.votes) + forced
        kept = (votes > DROPPED).unsqueeze(2)
        return Selection(view.calibrate(view.nothing, kept).search(max(1, min(view.longest, most))))

    def watched(self, tokens: int) -> int:
        return self.window if tokens >= self.window else 0

    def observe(self, votes: Votes, sums: Tensor, selection: Selection | None, view: View, step: Step) -> None:
        keys, budget = sums.shape[-1], self._budget(step.layer)
        first = view.visible[:, -1, :1]  # [B, 1]
        columns = torch.arange(keys, device=sums.device)
        before = (columns >= first) & (columns < keys - self.window)  # [B, N]
        pooled = F.avg_pool1d(F.pad(sums[..., : keys - self.window], (0, 1)), self.pool, 1, self.pool // 2)[..., :-1]
        open_to = before.unsqueeze(1) & (votes.of(keys, sums) > DROPPED)
        score = F.pad(pooled, (0, self.window)).masked_fill(~open_to, -torch.inf)
        wanted = (budget.counts(view.counts[:, -1]) - self.window).clamp(min=0)[:, None, None]
        place = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        kept = ((place < wanted) & open_to) | (columns >= keys - self.window)
        most = max(budget.count(end - start) for start, end in (row[-1] for row in view.spans))
        votes.set(torch.zeros_like(sums).masked_fill(~kept, DROPPED), max(most, self.window))

    def _made(self, **settings: Any) -> Self:
        if len({"k", "share", "shares"} & {*settings}) == 1:  # one takes the others' place
            settings = {"k": None, "share": None, "shares": None} | settings
        return super()._made(**settings)

    def _budgeted(self, k: int | None = None, share: float | None = None) -> dict[str, Any]:
        """A share of layers that differ is their mean."""
        if share is None or self.shares is None:
            return {"k": k, "share": share, "shares": None}
        check_share("share", share)
        return {"shares": rescaled(self.shares, share)}

    def _budget(self, layer: int) -> Budget:
        if self.shares is None:
            return Budget(self.k, self.share)
        if layer >= len(self.shares):
            raise ValueError(f"shares must hold one for each layer, but there is none for layer {layer}: {self.shares}")
        return Budget(share=self.shares[layer])


def rescaled(shares: tuple[float, ...], mean: float) -> tuple[float, ...]:
    """Shares of this mean in the proportions that they have, drawn nearer to it where one would be above 1."""
    factor = mean * len(shares) / sum(shares)
    scaled = [x * factor for x in shares]
    most = max(scaled)
    nearer = (1 - mean) / (most - mean) if most > 1 else 1.0
    return tuple(min(1.0, mean + (x - mean) * nearer) for x in scaled)


def pyramid(layers: int, share: float, *, beta: float = 20.0) -> tuple[float, ...]:
    """Shares for the layers of a model that fall evenly, with this mean (PyramidKV, arXiv 2406.02069).

    The last layer gets share / beta and the first one 2 share less that, or 1 if that is less and the last one what
    keeps the mean.

    Args:
        layers: of the model.
        share: their mean, above 0 and at most 1.
        beta: at least 1; 20 in the paper's code.
    """
    check_share("share", share)
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise ValueError(f"layers must be an int of at least 1, got {layers!r}")
    if not beta >= 1:
        raise ValueError(f"beta must be at least 1, got {beta!r}")
    if layers == 1:
        return (share,)
    most = min(1.0, 2 * share - share / beta)
    least = 2 * share - most
    return tuple(most + (least - most) * i / (layers - 1) for i in range(layers))
