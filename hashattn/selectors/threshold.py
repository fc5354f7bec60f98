"""Threshold: every key within a radius."""

from __future__ import annotations

from dataclasses import dataclass

from hashattn.selectors.base import Selector
from hashattn.selectors.budget import check_k
from hashattn.selectors.grouping import check_grouping
from hashattn.types import Selection, Step
from hashattn.view import View


@dataclass(frozen=True)
class Threshold(Selector):
    """All visible keys at a distance of at most `radius`, and the forced ones. How many is up to the data.

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
        if isinstance(self.radius, bool) or not isinstance(self.radius, int) or self.radius < 0:
            raise ValueError(f"radius must be an int of at least 0, got {self.radius!r}")
        if self.limit is not None:
            check_k(self.limit)
        check_grouping(self.per, self.combine)

    @property
    def shared(self) -> bool:
        return self.per == "kv_head"

    def budget(self, visible: int) -> int:
        return visible if self.limit is None else min(visible, self.limit)

    def select(self, view: View, step: Step) -> Selection:
        distances = view.distances()
        near = distances <= self.radius
        if self.per == "kv_head" and view.q_heads > view.kv_heads:
            near = near.unflatten(1, (view.kv_heads, -1))
            distances = distances.unflatten(1, (view.kv_heads, -1))
            group, distances = distances.shape[2], distances.sum(2)
            near = {
                "sum": distances <= group * self.radius,
                "union": near.any(2),
                "vote": near.sum(2) * 2 > group,
            }[self.combine]
        view = view.calibrate(distances, near if view.kept is None else near & view.kept)
        slots = max(self.budget(view.longest), min(view.longest, view.sinks + view.recents))
        if view.visible.device.type == "cpu":  # asking costs nothing there
            kept = near & view.seen if view.forced is None else (near | view.forced) & view.seen
            slots = min(slots, max(1, int(kept.sum(-1).max())))
        return Selection(view.search(slots))
