"""TopK: the k nearest keys."""

from __future__ import annotations

from dataclasses import dataclass

from hashattn.budget import Budget, check_k, check_share
from hashattn.ops.decode.rule import Rule
from hashattn.selectors.base import Selector
from hashattn.selectors.grouping import RANKED, check_grouping, take
from hashattn.types import Selection, Step
from hashattn.view import View


@dataclass(frozen=True)
class TopK(Selector):
    """The k nearest visible keys, ties to the most recent.

    Args:
        k: number of keys; or
        share: of the visible keys, rounded up. Exactly one of the two is given.
        per: "query_head" or "kv_head"; see :func:`hashattn.selectors.grouping.take`.
        combine: "sum", "union", "vote" or "normalised", for per="kv_head".
    """

    k: int | None = None
    share: float | None = None
    per: str = "query_head"
    combine: str = "sum"

    def __post_init__(self) -> None:
        if (self.k is None) == (self.share is None):
            raise ValueError(f"TopK takes either k or share, got k={self.k!r} and share={self.share!r}")
        if self.k is not None:
            object.__setattr__(self, "k", check_k(self.k))
        if self.share is not None:
            check_share("share", self.share)
        check_grouping(self.per, self.combine, RANKED)

    @property
    def shared(self) -> bool:
        return self.per == "kv_head"

    @property
    def needs_distances(self) -> bool:  # type: ignore[override]
        return self.shared and self.combine != "sum"

    def budget(self, visible: int) -> int:
        return Budget(self.k, self.share).count(visible)

    def rule(self, group: int) -> Rule | None:
        together = self.shared and group > 1
        return Rule(self.k, self.share, together) if not together or self.combine == "sum" else None

    def select(self, view: View, step: Step) -> Selection:
        return take(view, [Budget(self.k, self.share)], self.per, self.combine)
