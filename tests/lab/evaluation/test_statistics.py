"""Intervals, against scipy's own and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hashattn.lab.evaluation.statistics import mean_interval, share_interval


def test_the_mean_has_students_interval():
    values = [0.1, 0.5, 0.2, 0.9, 0.35]
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean, found.low, found.high, found.n) == (
        pytest.approx(0.41),
        pytest.approx(low),
        pytest.approx(high),
        5,
    )


@pytest.mark.parametrize("interval", [mean_interval, share_interval])
def test_fewer_than_three_values_have_no_interval(interval):
    assert interval([1.0]).as_dict() == {"mean": 1.0, "low": None, "high": None, "n": 1}
    assert interval([1.0, 0.0]).as_dict() == {"mean": 0.5, "low": None, "high": None, "n": 2}
    assert interval([1.0, 0.0, 1.0]).low is not None


def test_shares_end_at_zero_and_one():
    found = mean_interval([0.99, 1.0, 1.0000001], shares=True)
    assert (found.high, found.low < 0.99) == (1.0, True)
    assert mean_interval([0.0, 0.0, 0.02], shares=True).low == 0.0
    assert mean_interval([1.0000001] * 3, shares=True).mean == 1.0
    assert mean_interval([0.99, 1.0, 1.0000001]).high > 1.0  # ratios may be above


@pytest.mark.parametrize("successes", [0, 1, 7, 16])
def test_shares_have_wilsons_interval(successes):
    values = [1] * successes + [0] * (16 - successes)
    expected = stats.binomtest(successes, 16).proportion_ci(0.95, method="wilson")
    found = share_interval(values)
    assert found.mean == successes / 16
    assert (found.low, found.high) == (pytest.approx(expected.low, abs=1e-6), pytest.approx(expected.high, abs=1e-6))


def test_what_has_no_mean_is_refused():
    with pytest.raises(ValueError, match="values must hold at least one number"):
        mean_interval([])
    with pytest.raises(ValueError, match="values must be zeros and ones"):
        share_interval([0, 0.5])
