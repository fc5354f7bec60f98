"""ObservationWindow: keys that the end of the prompt attended to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hashattn.budget import Budget, check_k, check_share
from hashattn.selectors.base import Selector
from hashattn.types import Selection, Step
from hashattn.view import View
from hashattn.votes import DROPPED, Shown, Votes, dense_votes


@dataclass(frozen=True)
class ObservationWindow(Selector):
    """The keys that the prompt's last queries voted for, and all that came later (SnapKV, arXiv 2404.14469).

    What comes in dense calls of several queries, one after the other, is a prompt. The last `window` queries of one
    choose for the steps after it: their attention weights are summed over a KV head's queries and averaged over
    neighbouring keys; the keys of the window and those of most votes before it are kept, within the budget. Later keys
    are all kept. So are all keys of a prompt shorter than that, and a second prompt chooses among what the one before
    kept: outputs are those of a cache that evicts the others, but they stay in memory.

    A crop into a prompt makes it a shorter one, whose last queries choose: the last 256 before the window are
    remembered for that, and a crop that asks for others is refused. A crop behind its end changes no choice.

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

    def budget(self, visible: int) -> int:
        return max(self._budget(i).count(visible) for i in range(len(self.shares or (0,))))

    def select(self, view: View, step: Step) -> Selection:
        votes, forced = view.voted, view.sinks + view.recents
        if votes is None or view.votes is None:
            return Selection(view.calibrate(view.nothing).search(view.longest))
        counted = view.votes.most(view.keys)
        most = view.longest if counted is None else counted + forced
        kept = (votes > DROPPED).unsqueeze(2)
        return Selection(view.calibrate(view.nothing, kept).search(max(1, min(view.longest, most))))

    def observe(self, shown: Shown, selection: Selection | None = None, weights: Tensor | None = None) -> None:
        if shown.q.shape[2] > 1:  # a single token is one that was decoded
            shown.votes.extend(shown, self.window)
            self.settle(shown.votes, shown.keys, [row[0][0] for row in shown.spans], shown.layer)

    def settle(self, votes: Votes, keys: Tensor, starts: Sequence[int], layer: int) -> None:
        if not votes.prompts or votes.prompts[-1].most is not None:
            return
        end, budget = votes.prompts[-1].end, self._budget(layer)
        if end - votes.prompts[-1].begin < self.window:
            return
        q, ends = votes.window(self.window)
        spans = [[(start, end) for end in ends] for start in starts]
        shown = Shown(votes, q, keys[:, :, :end], spans, votes.scale, layer)
        sums = dense_votes(q, shown.keys, shown.seen, shown.scale)
        first = torch.tensor(starts, device=sums.device).unsqueeze(1)  # [B, 1]
        columns = torch.arange(end, device=sums.device)
        before = (columns >= first) & (columns < end - self.window)  # [B, N]
        pooled = F.avg_pool1d(F.pad(sums[..., : end - self.window], (0, 1)), self.pool, 1, self.pool // 2)[..., :-1]
        open_to = before.unsqueeze(1) & (votes.of(end, sums) > DROPPED)
        score = F.pad(pooled, (0, self.window)).masked_fill(~open_to, -torch.inf)
        wanted = (budget.counts((end - first[:, 0]).clamp(min=0)) - self.window).clamp(min=0)[:, None, None]
        place = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        kept = ((place < wanted) & open_to) | (columns >= end - self.window)
        most = max(budget.count(max(0, end - start)) for start in starts)
        votes.choose(kept, max(most, self.window))

    def _budget(self, layer: int) -> Budget:
        if self.shares is None:
            return Budget(self.k, self.share)
        if layer >= len(self.shares):
            raise ValueError(f"shares must hold one for each layer, but there is none for layer {layer}: {self.shares}")
        return Budget(share=self.shares[layer])


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
