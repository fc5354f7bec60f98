import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import Recent, Sink, Step, Tiers, TopK
from hashattn.core.types import CRITICAL, MEDIUM
from tests.structured import make_view, odd_lengths, raises_naming, seeds, tied_distances


@settings(deadline=None, max_examples=40)
@given(seeds, odd_lengths, st.sampled_from([(0.05, 0.1), (0.3, 0.31), (0.5, 1.0)]), st.sampled_from([(0, 0), (4, 5)]))
def test_the_nearest_are_critical_and_the_next_medium(seed, keys, shares, forced):
    tokens = min(3, keys)
    view = make_view(tied_distances(seed, 2, 2, tokens, keys), 2, [0, keys // 2], sinks=forced[0], recents=forced[1])
    both = Tiers(*shares).select(view, Step())
    critical, everything = (TopK(share=s).select(view, Step()) for s in shares)
    assert torch.equal(both.ids, everything.ids)
    is_critical = (both.tier == CRITICAL) & (both.ids >= 0)
    assert torch.equal(both.ids.masked_fill(~is_critical, -1)[..., : critical.ids.shape[-1]], critical.ids)
    assert torch.equal(is_critical.sum(-1), critical.count)
    assert torch.equal((both.tier == MEDIUM).sum(-1), both.count - critical.count)


def test_budgets_are_the_two_counts():
    tiers = Tiers(0.05, 0.1)
    assert (tiers.critical(130), tiers.budget(130)) == (7, 13)


@given(odd_lengths, st.integers(1, 9), st.sampled_from([(0.05, 0.1), (0.3, 0.31), (0.5, 1.0)]))
def test_a_rule_knows_both_counts(keys, forced, shares):
    selector = Sink(forced) | Recent(3) | Tiers(*shares)
    rule = selector.rule(2)
    assert (rule.slots(keys), rule.medium(keys)) == (budget := selector.budget(keys), budget - selector.critical(keys))


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (ValueError, {"t1": 0.2, "t2": 0.1}, ["t1=0.2", "t2=0.1"]),
        (ValueError, {"t1": 0.1, "t2": 0.1}, ["t1=0.1", "t2=0.1"]),
        (ValueError, {"t1": 0}, ["t1", "0"]),
        (ValueError, {"t2": 1.5}, ["t2", "1.5"]),
        (TypeError, {"t1": "a"}, ["t1", "a"]),
        (ValueError, {"per": "x"}, ["per", "x"]),
    ],
)
def test_bad_thresholds_are_refused_by_name(error, options, words):
    raises_naming(error, *words)(lambda: Tiers(**options))
