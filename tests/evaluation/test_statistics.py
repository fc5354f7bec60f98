"""Intervals, against scipy's own and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hashattn.evaluation.statistics import mean_interval, share_interval


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


def test_one_value_has_no_interval():
    assert mean_interval([3.0]).as_dict() == {"mean": 3.0, "low": None, "high": None, "n": 1}


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
