"""Tiers: critical, medium and skipped keys by percentile."""

from __future__ import annotations

from dataclasses import dataclass

from hashattn.budget import Budget, check_share
from hashattn.ops.decode.rule import Rule
from hashattn.selectors.base import Selector
from hashattn.selectors.grouping import RANKED, check_grouping, take
from hashattn.types import Selection, Step
from hashattn.view import View


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
    """

    t1: float = 0.05
    t2: float = 0.10
    per: str = "query_head"
    combine: str = "sum"

    def __post_init__(self) -> None:
        check_share("t1", self.t1)
        check_share("t2", self.t2)
        if self.t1 >= self.t2:
            raise ValueError(f"t1 must be below t2, got t1={self.t1} and t2={self.t2}")
        check_grouping(self.per, self.combine, RANKED)

    @property
    def shared(self) -> bool:
        return self.per == "kv_head"

    @property
    def needs_distances(self) -> bool:  # type: ignore[override]
        return self.shared and self.combine != "sum"

    def budget(self, visible: int) -> int:
        return Budget(share=self.t2).count(visible)

    def critical(self, visible: int) -> int:
        return Budget(share=self.t1).count(visible)

    def rule(self, group: int) -> Rule | None:
        together = self.shared and group > 1
        if together and self.combine != "sum":
            return None
        return Rule(share=self.t2, shared=together, critical=self.t1)

    def select(self, view: View, step: Step) -> Selection:
        return take(view, [Budget(share=self.t1), Budget(share=self.t2)], self.per, self.combine)
