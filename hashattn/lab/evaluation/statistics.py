"""Means with 95% confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from hashattn.core.extras import require

LEVEL, Z = 0.95, 1.959964
FEWEST = 3  # values of an interval: two say next to nothing about their spread


@dataclass(frozen=True)
class Interval:
    """A mean, the ends of its 95% confidence interval (None from fewer than FEWEST values), and how many it is of."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Plain values."""
        return asdict(self)


def mean_interval(values: Sequence[float], *, shares: bool = False) -> Interval:
    """Student's t interval of the mean; values are taken to be independent. It ends at 0 and 1 for shares."""
    n = len(values)
    if n == 0:
        raise ValueError("values must hold at least one number, got none")
    low, high = (0.0, 1.0) if shares else (-math.inf, math.inf)
    mean = min(high, max(low, math.fsum(values) / n))
    if n < FEWEST:
        return Interval(mean, None, None, n)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    reach = float(require("scipy.stats", "fit", "a confidence interval").t.ppf((1 + LEVEL) / 2, n - 1)) * spread
    return Interval(mean, max(low, mean - reach), min(high, mean + reach), n)


def share_interval(values: Sequence[float]) -> Interval:
    """Wilson's score interval of a share of successes; values are 0 or 1. It has a width even where all agree."""
    n = len(values)
    if n == 0 or any(v not in (0, 1) for v in values):
        raise ValueError(f"values must be zeros and ones, at least one, got {[*values]}")
    share = math.fsum(values) / n
    if n < FEWEST:
        return Interval(share, None, None, n)
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    reach = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return Interval(share, max(0.0, min(share, centre - reach)), min(1.0, max(share, centre + reach)), n)
