"""Threshold: every key within a radius."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hashattn.core.budget import Budget, check_k
from hashattn.core.checks import keep_ints
from hashattn.core.types import Selection, Step
from hashattn.index.view import View
from hashattn.ops.decode.rule import Rule
from hashattn.ops.nearest import within
from hashattn.selectors.base import Selector
from hashattn.selectors.grouping import check_grouping


@dataclass(frozen=True)
class Threshold(Selector):
    """All visible keys at a distance of at most `radius`, and the forced ones. How many is up to the data.

    The last visible key, the query's own in self-attention, is one of the forced ones: no query is left without any.

    Args:
        radius: largest distance kept, in the index's units (bits; weighted bits for a multi-bit query).
        limit: at most this many, the nearest with TopK's tie rule; None for no limit. On a GPU a limit also bounds
            the slots, which are as many as visible keys otherwise.
        per: "query_head", or "kv_head" for one choice for a group of G heads.
        combine: for "kv_head": "sum" compares the group's summed distance with G * radius, "union" asks for any head
            within the radius, "vote" for more than half of them.
    """

    radius: int
    limit: int | None = None
    per: str = "query_head"
    combine: str = "sum"

    def __post_init__(self) -> None:
        keep_ints(self, radius=0)
        if self.limit is not None:
            object.__setattr__(self, "limit", check_k(self.limit))
        check_grouping(self.per, self.combine)

    @property
    def shared(self) -> bool:
        return self.per == "kv_head"

    @property
    def recents(self) -> int:
        return 1

    def budget(self, visible: int, forced: int = 0) -> int:
        return visible if self.limit is None else min(visible, max(self.limit, forced))

    def choices(self, q_heads: int, kv_heads: int) -> tuple[int, int]:
        return (kv_heads if self.shared else q_heads), 1

    def rule(self, group: int) -> Rule | None:
        together = self.shared and group > 1
        if together and self.combine != "sum":
            return None
        radius = self.radius * group if together else self.radius
        return Rule(self.limit, None if self.limit else 1.0, together, recents=self.recents, radius=radius)

    def select(self, view: View, step: Step) -> Selection:
        budget, shared = Budget(self.limit, None if self.limit else 1.0), False
        view = view if view.recents else replace(view, recents=self.recents)
        if self.per == "kv_head" and view.q_heads > view.kv_heads:
            group = view.q_heads // view.kv_heads
            shared = self.combine == "sum"
            if shared:
                return Selection(_filled(view.nearest([budget], shared=True, radius=group * self.radius)))
            near = within(view.distances(), self.radius).unflatten(1, (view.kv_heads, -1))
            near = near.any(2) if self.combine == "union" else near.sum(2) * 2 > group
            total = view.distances().unflatten(1, (view.kv_heads, -1)).sum(2)
            view = view.calibrate(total, near if view.kept is None else near & view.kept)
            return Selection(_filled(view.nearest([budget])))
        return Selection(_filled(view.nearest([budget], radius=self.radius)))

    def _budgeted(self, k: int | None = None, share: float | None = None) -> dict[str, Any]:
        given = f"k={k}" if share is None else f"share={share}"
        raise ValueError(f"{given} cannot be given to Threshold, which counts no keys: radius= or limit= would work")


def _filled(ids: Tensor) -> Tensor:
    """Without the slots that no query fills; asking costs nothing on the CPU."""
    if ids.device.type != "cpu":
        return ids
    return ids[..., : max(1, int((ids >= 0).sum(-1).max()))]
