"""TopK: the k nearest keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hashattn.core.budget import Budget, check_min_k, check_one
from hashattn.core.types import Selection, Step
from hashattn.index.view import View
from hashattn.ops.decode.rule import Rule
from hashattn.selectors.base import Selector
from hashattn.selectors.grouping import RANKED, check_grouping, choices_of, take


@dataclass(frozen=True)
class TopK(Selector):
    """The k nearest visible keys, ties to the most recent.

    Args:
        k: number of keys; or
        share: of the visible keys, rounded up. Exactly one of the two is given.
        per: "query_head" or "kv_head"; see :func:`hashattn.selectors.grouping.take`.
        combine: "sum", "union", "vote" or "normalised", for per="kv_head".
        min_k: at least this many keys are ranked and kept beyond the forced ones, however small the share.
    """

    k: int | None = None
    share: float | None = None
    per: str = "query_head"
    combine: str = "sum"
    min_k: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", check_one("TopK", self.k, self.share))
        object.__setattr__(self, "min_k", check_min_k(self.min_k))
        check_grouping(self.per, self.combine, RANKED)

    @property
    def shared(self) -> bool:
        return self.per == "kv_head"

    @property
    def needs_distances(self) -> bool:  # type: ignore[override]
        return self.shared and self.combine != "sum"

    @property
    def wanted(self) -> Budget:
        """Its budget."""
        return Budget(self.k, self.share, self.min_k)

    def times(self, factor: int) -> TopK:
        """One that keeps so many times as many keys."""
        k = None if self.k is None else factor * self.k
        share = None if self.share is None else min(1.0, factor * self.share)
        return replace(self, k=k, share=share, min_k=factor * self.min_k)

    def budget(self, visible: int, forced: int = 0) -> int:
        return self.wanted.count(visible, forced)

    def choices(self, q_heads: int, kv_heads: int) -> tuple[int, int]:
        return choices_of(self.per, self.combine, q_heads, kv_heads)

    def rule(self, group: int) -> Rule | None:
        together = self.shared and group > 1
        if together and self.combine != "sum":
            return None
        return Rule(self.k, self.share, together, min_k=self.min_k)

    def select(self, view: View, step: Step) -> Selection:
        return take(view, [self.wanted], self.per, self.combine)

    def _budgeted(self, k: int | None = None, share: float | None = None) -> dict[str, Any]:
        return {"k": k, "share": share}
