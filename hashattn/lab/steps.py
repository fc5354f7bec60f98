"""How long decode steps took: their median and their slow end."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def median_and_p99(times: Sequence[float]) -> tuple[float, float]:
    """(median, 99th percentile, between the two nearest times) of at least one time."""
    if len(times) == 1:
        return times[0], times[0]
    return statistics.median(times), statistics.quantiles(times, n=100, method="inclusive")[-1]
