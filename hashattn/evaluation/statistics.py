"""Means with 95% confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from hashattn.extras import require

LEVEL, Z = 0.95, 1.959964


@dataclass(frozen=True)
class Interval:
    """A mean, the ends of its 95% confidence interval (None from a single value), and how many values it is of."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Plain values."""
        return asdict(self)


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean; values are taken to be independent."""
    n = len(values)
    if n == 0:
        raise ValueError("values must hold at least one number, got none")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None, 1)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    reach = float(require("scipy.stats", "fit", "a confidence interval").t.ppf((1 + LEVEL) / 2, n - 1)) * spread
    return Interval(mean, mean - reach, mean + reach, n)


def share_interval(values: Sequence[float]) -> Interval:
    """Wilson's score interval of a share of successes; values are 0 or 1. It has a width even where all agree."""
    n = len(values)
    if n == 0 or any(v not in (0, 1) for v in values):
        raise ValueError(f"values must be zeros and ones, at least one, got {[*values]}")
    share = math.fsum(values) / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    reach = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return Interval(share, max(0.0, min(share, centre - reach)), min(1.0, max(share, centre + reach)), n)
