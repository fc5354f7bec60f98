"""Tiers: critical, medium and skipped keys by percentile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hashattn.core.budget import Budget, check_min_k, check_share
from hashattn.core.types import Selection, Step
from hashattn.index.view import View
from hashattn.ops.decode.rule import Rule
from hashattn.selectors.base import Selector
from hashattn.selectors.grouping import RANKED, check_grouping, choices_of, take


@dataclass(frozen=True)
class Tiers(Selector):
    """DASH-KV's three tiers (arXiv 2604.19351): percentile thresholds t1 < t2 on the distances of each query.

    The nearest ceil(t1 * visible) keys are critical, those up to ceil(t2 * visible) medium, the rest is skipped in
    this step. Thresholds are ranks, with TopK's tie rule: integer distances tie so often that a threshold taken as a
    distance would keep an erratic number of keys.

    Args:
        t1: share of critical keys.
        t2: share of critical and medium keys together.
        per, combine: as in TopK.
        min_k: at least this many keys are ranked and critical beyond the forced ones, however small the shares.
    """

    t1: float = 0.05
    t2: float = 0.10
    per: str = "query_head"
    combine: str = "sum"
    min_k: int = 0

    def __post_init__(self) -> None:
        check_share("t1", self.t1)
        check_share("t2", self.t2)
        if self.t1 >= self.t2:
            raise ValueError(f"t1 must be below t2, got t1={self.t1} and t2={self.t2}")
        check_min_k(self.min_k)
        check_grouping(self.per, self.combine, RANKED)

    @property
    def shared(self) -> bool:
        return self.per == "kv_head"

    @property
    def needs_distances(self) -> bool:  # type: ignore[override]
        return self.shared and self.combine != "sum"

    @property
    def wanted(self) -> list[Budget]:
        """Budgets of critical keys, and of these and medium ones."""
        return [Budget(share=share, min_k=self.min_k) for share in (self.t1, self.t2)]

    def budget(self, visible: int, forced: int = 0) -> int:
        return self.wanted[1].count(visible, forced)

    def critical(self, visible: int, forced: int = 0) -> int:
        return self.wanted[0].count(visible, forced)

    def choices(self, q_heads: int, kv_heads: int) -> tuple[int, int]:
        return choices_of(self.per, self.combine, q_heads, kv_heads)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "share": self.t2}

    def rule(self, group: int) -> Rule | None:
        together = self.shared and group > 1
        if together and self.combine != "sum":
            return None
        return Rule(share=self.t2, shared=together, critical=self.t1, min_k=self.min_k)

    def select(self, view: View, step: Step) -> Selection:
        return take(view, self.wanted, self.per, self.combine)

    def _budgeted(self, k: int | None = None, share: float | None = None) -> dict[str, Any]:
        """t2 is the whole share, and t1 the part of it that it is now."""
        if share is None:
            raise ValueError(f"k={k} cannot be given to Tiers, which are shares: share=, or t1= and t2= would work")
        check_share("share", share)
        return {"t1": share * (self.t1 / self.t2), "t2": share}
