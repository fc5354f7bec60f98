"""TopK: the k nearest keys."""

from __future__ import annotations

from dataclasses import dataclass

from hashattn.selectors.base import Selector
from hashattn.selectors.budget import check_k, check_share, count_keys, share_counts
from hashattn.selectors.grouping import check_grouping, take
from hashattn.types import Selection, Step
from hashattn.view import View


@dataclass(frozen=True)
class TopK(Selector):
    """The k nearest visible keys, ties to the most recent.

    Args:
        k: number of keys; or
        share: of the visible keys, rounded up. Exactly one of the two is given.
        per: "query_head" or "kv_head"; see :func:`hashattn.selectors.grouping.take`.
        combine: "sum", "union" or "vote", for per="kv_head".
    """

    k: int | None = None
    share: float | None = None
    per: str = "query_head"
    combine: str = "sum"

    def __post_init__(self) -> None:
        if (self.k is None) == (self.share is None):
            raise ValueError(f"TopK takes either k or share, got k={self.k!r} and share={self.share!r}")
        if self.k is not None:
            check_k(self.k)
        if self.share is not None:
            check_share("share", self.share)
        check_grouping(self.per, self.combine)

    @property
    def shared(self) -> bool:
        return self.per == "kv_head"

    def budget(self, visible: int) -> int:
        return min(visible, self.k) if self.k is not None else count_keys(visible, self.share or 0)

    def select(self, view: View, step: Step) -> Selection:
        counts = view.forced_counts.clamp(min=self.k) if self.share is None else share_counts(view, self.share)
        slots = max(self.budget(view.longest), min(view.longest, view.sinks + view.recents))
        return take(view, [counts], slots, self.per, self.combine)
