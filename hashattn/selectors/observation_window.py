"""ObservationWindow: keys that the end of the prompt attended to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from hashattn.core.attention_sums import DROPPED, Attended, AttentionSums, dense_sums
from hashattn.core.budget import Budget, check_k, check_share
from hashattn.core.checks import check_number, keep_ints
from hashattn.core.types import Selection, Step
from hashattn.index.view import View
from hashattn.selectors.base import Selector


@dataclass(frozen=True)
class ObservationWindow(Selector):
    """The keys that the prompt's last queries voted for, and all that came later (SnapKV, arXiv 2404.14469).

    What comes in dense calls of several queries, one after the other, is a prompt. The last `window` queries of one
    choose for the steps after it: their attention weights are summed over a KV head's queries and averaged over
    neighbouring keys; the keys of the window and those of most attention before it are kept, within the budget. Later
    keys are all kept. So are all keys of a prompt shorter than that, and a second prompt chooses among what
    the one before kept: outputs are those of a cache that evicts the others, but they stay in memory.

    A crop into a prompt makes it a shorter one, whose last queries choose: the last 256 before the window are
    remembered for that, and a crop that asks for others is refused. A crop behind its end changes no choice.

    Args:
        k: keys of the prompt that are kept, the window's among them; or
        share: of the prompt's keys, rounded up; or
        shares: such a share for each layer of the model. Exactly one of the three is given.
        window: queries that vote.
        pool: keys that sums are averaged over, odd.
        layers: of the model. With it k or share is what a layer keeps on average: each keeps the window, and what is
            left falls evenly from the first layer to the last (PyramidKV, arXiv 2406.02069). None: all layers alike.
        beta: that the last layer gets 1 / beta of the average beside the window; at least 1.
        min_k: at least this many keys of the prompt are kept beyond the window, however small the share.
    """

    k: int | None = None
    share: float | None = None
    shares: tuple[float, ...] | None = None
    window: int = 64
    pool: int = 5
    layers: int | None = None
    beta: float = 20.0
    min_k: int = 0

    ranked = False
    needs_distances = False
    accumulates = True
    shared = True

    def __post_init__(self) -> None:
        given = {"k": self.k, "share": self.share, "shares": self.shares}
        if sum(x is not None for x in given.values()) != 1:
            raise ValueError(f"ObservationWindow takes one of k, share and shares, got {given}")
        if self.k is not None:
            object.__setattr__(self, "k", check_k(self.k))
        if self.shares is not None and not (isinstance(self.shares, tuple) and self.shares):
            raise TypeError(f"shares must be a tuple of one share a layer, got {self.shares!r}")
        for share in self.shares or ((self.share,) if self.share is not None else ()):
            check_share("shares" if self.shares else "share", share)
        keep_ints(self, window=1, pool=1, min_k=0)
        if self.pool % 2 == 0 or self.pool > 1 << 16:
            raise ValueError(f"pool must be odd, so that it has a middle, and below 65,536, got {self.pool}")
        _check_pyramid(1 if self.layers is None else self.layers, self.beta)
        if self.layers is not None and self.shares is not None:
            raise ValueError(f"layers={self.layers} shares out k or share, but was given shares={self.shares}")

    def budget(self, visible: int, forced: int = 0) -> int:
        most = max(self._kept(i, visible) for i in range(len(self.shares or (0,))))
        return max(most, min(visible, forced))

    def select(self, view: View, step: Step) -> Selection:
        sums, forced = view.attention_so_far, view.sinks + view.recents
        if sums is None or view.attention_sums is None:
            return Selection(view.calibrate(view.nothing).search(view.longest))
        counted = view.attention_sums.most(view.keys)
        most = view.longest if counted is None else counted + forced
        kept = (sums > DROPPED).unsqueeze(2)
        return Selection(view.calibrate(view.nothing, kept).search(max(1, min(view.longest, most))))

    def accumulate(self, shown: Attended, selection: Selection | None = None, weights: Tensor | None = None) -> None:
        if shown.q.shape[2] > 1:  # a single token is one that was decoded
            shown.attention_sums.extend(shown, self.window)
            self.refresh(shown.attention_sums, shown.keys, [row[0][0] for row in shown.spans], shown.layer)

    def refresh(self, past: AttentionSums, keys: Tensor, starts: Sequence[int], layer: int) -> None:
        if not past.prompts or past.prompts[-1].most is not None:
            return
        end = past.prompts[-1].end
        budgets = [self._kept(layer, max(0, end - start)) for start in starts]
        if end - past.prompts[-1].begin < self.window:
            return
        q, ends = past.window(self.window)
        spans = [[(start, end) for end in ends] for start in starts]
        shown = Attended(past, q, keys[:, :, :end], spans, past.scale, layer)
        sums = dense_sums(q, shown.keys, shown.seen, shown.scale)
        first = torch.tensor(starts, device=sums.device).unsqueeze(1)  # [B, 1]
        columns = torch.arange(end, device=sums.device)
        before = (columns >= first) & (columns < end - self.window)  # [B, N]
        pooled = F.avg_pool1d(F.pad(sums[..., : end - self.window], (0, 1)), self.pool, 1, self.pool // 2)[..., :-1]
        open_to = before.unsqueeze(1) & (past.of(end, sums) > DROPPED)
        score = F.pad(pooled, (0, self.window)).masked_fill(~open_to, -torch.inf)
        wanted = (torch.tensor(budgets, device=sums.device) - self.window).clamp(min=0)[:, None, None]
        place = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        kept = ((place < wanted) & open_to) | (columns >= end - self.window)
        past.choose(kept, max(*budgets, self.window))

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

    def _kept(self, layer: int, visible: int) -> int:
        """Keys that a layer keeps of a prompt of so many, the window's among them."""
        floor = min(visible, self.window + self.min_k) if self.min_k else 0
        return max(self._share_of(layer, visible), floor)

    def _share_of(self, layer: int, visible: int) -> int:
        """The same without the floor."""
        if self.shares is not None:
            if layer >= len(self.shares):
                raise ValueError(
                    f"shares must hold one for each layer, but there is none for layer {layer}: {self.shares}"
                )
            return Budget(share=self.shares[layer]).count(visible)
        mean = Budget(self.k, self.share).count(visible)
        if self.layers is None or mean <= self.window:
            return mean
        if layer >= self.layers:
            raise ValueError(f"layers={self.layers} must be the model's number, but there is a layer {layer}")
        beside = mean - self.window
        if self.layers == 1 or visible < 2 * beside:  # too few to share out
            return mean
        first = min(2 * beside - int(beside // self.beta), visible - self.window)
        return self.window + first - layer * (2 * (first - beside) // (self.layers - 1))  # whole keys, rounded as there


def rescaled(shares: tuple[float, ...], mean: float) -> tuple[float, ...]:
    """Shares of this mean in the proportions that they have, drawn nearer to it where one would be above 1."""
    factor = mean * len(shares) / sum(shares)
    scaled = [x * factor for x in shares]
    most = max(scaled)
    nearer = (1 - mean) / (most - mean) if most > 1 else 1.0
    return tuple(min(1.0, mean + (x - mean) * nearer) for x in scaled)


def pyramid(layers: int, share: float, *, beta: float = 20.0) -> tuple[float, ...]:
    """Shares for the layers of a model that fall evenly, with this mean, as PyramidKV's do (arXiv 2406.02069).

    The last layer gets share / beta and the first one 2 share less that, or 1 if that is less and the last one what
    keeps the mean. PyramidKV so shares out what is beside the windows: that is ObservationWindow(share=, layers=).

    Args:
        layers: of the model.
        share: their mean, above 0 and at most 1.
        beta: at least 1; 20 in the paper's code.
    """
    check_share("share", share)
    _check_pyramid(layers, beta)
    if layers == 1:
        return (share,)
    most = min(1.0, 2 * share - share / beta)
    least = 2 * share - most
    return tuple(most + (least - most) * i / (layers - 1) for i in range(layers))


def _check_pyramid(layers: int, beta: float) -> None:
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise ValueError(f"layers must be an int of at least 1, got {layers!r}")
    if check_number("beta", beta) < 1:
        raise ValueError(f"beta must be at least 1, got {beta!r}")
