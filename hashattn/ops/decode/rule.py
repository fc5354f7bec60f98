"""Rule: which keys a fused decode step keeps, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """What a selector asks of a fused step.

    Attributes:
        k, share: keys wanted of the visible ones: a number, or a share rounded up in float64. One of the two is given.
        shared: the heads of a KV head make one choice, by the sum of their distances.
        sinks, recents: this many first and last visible keys are ranked before every distance and count in the budget.
        radius: the largest distance (or sum) of a key that is not forced; None for any.
        critical: share of the visible keys, rounded up in float64, that are critical, and all forced ones; the other
            keys that are kept are medium. None if all are critical.
    """

    k: int | None = None
    share: float | None = None
    shared: bool = False
    sinks: int = 0
    recents: int = 0
    radius: int | None = None
    critical: float | None = None

    def slots(self, visible: int) -> int:
        """Keys kept by a query that sees so many."""
        wanted = min(self.k, visible) if self.k is not None else math.ceil((self.share or 0) * visible)
        return max(wanted, min(visible, self.sinks + self.recents))
