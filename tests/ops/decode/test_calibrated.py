"""Steps with votes and a prior under Triton's interpreter, on the CPU, against their reference and the selectors."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn.ops.decode import Before, KernelRequest, Rule, why_not
from tests.ops.decode.cases import CALIBRATED_CASES, WORST, agrees, inputs, kept_before
from tests.structured import seeds

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled where there is a GPU: test_on_a_gpu.py", allow_module_level=True)

from hashattn.ops.decode.triton.decode import decode

HINTS = (None, None, WORST)  # of a miss, of the step before, and of everything


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")  # rows that keep no key
@pytest.mark.parametrize(("shape", "rule"), CALIBRATED_CASES[1::2])  # the others are emulated in CUDA C++
def test_it_keeps_what_the_reference_keeps(shape, rule):
    x = inputs(1, **shape)
    agrees(decode, replace(x, before=kept_before(x, shared=rule.shared)), rule, hints=HINTS)


def test_a_layer_without_one_before_it_has_no_prior():
    rule = Rule(k=40, prior_ratio=1.0, prior_discount=3)
    agrees(decode, inputs(3, group=2, filled=300, room=320), rule, hints=HINTS)


def test_what_the_layer_before_kept_may_be_anything():
    x = inputs(4, group=2, kv_heads=2, filled=300, room=320)
    rule = Rule(k=40, vote_share=0.5, vote_discount=2, prior_ratio=0.0, prior_discount=4)
    empty = Before(torch.full((1, 4, 1, 3), -1, dtype=torch.int32), torch.zeros(1, 4, 1, 3))
    agrees(decode, replace(x, before=empty), rule, hints=HINTS)
    tiny = kept_before(x, 5)
    agrees(decode, replace(x, before=tiny._replace(weights=tiny.weights * 1e-20)), rule, hints=HINTS)
    wide = kept_before(x, 300)  # more slots than the step has itself, of which every second is handed on
    every_second = Before(*(y.repeat_interleave(2, -1)[..., ::2] for y in wide))
    agrees(decode, replace(x, before=every_second), rule, hints=HINTS)


def test_queries_that_see_everything():
    x = inputs(2, tokens=3, group=2, filled=90, room=96)
    rule = Rule(k=20, vote_share=0.5, vote_discount=2, prior_ratio=1.0, prior_discount=2)
    agrees(decode, replace(x, before=kept_before(x, 7)), rule, causal=False, hints=HINTS)


@settings(max_examples=4, deadline=None)
@given(
    seeds,
    st.integers(1, 200),
    st.integers(1, 210),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.integers(0, 9),
    st.integers(-3, 6),
    st.integers(-3, 6),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.booleans(),
)
def test_any_length_budget_and_discount(seed, filled, k, words, shared, recents, votes, prior, ratio, tiers):
    x = inputs(seed % 1000, group=2, kv_heads=2, filled=filled, room=208, words=words, starts=(seed % filled,))
    amount = Rule(share=k / 210, critical=k / 420) if tiers else Rule(k=k)
    by = {"vote_share": 0.4, "vote_discount": votes, "prior_ratio": ratio, "prior_discount": prior}
    rule = replace(amount, shared=shared, recents=recents, **by)
    agrees(decode, replace(x, before=kept_before(x, 9, shared)), rule, hints=HINTS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"rule": Rule(share=0.1, critical=0.05, shared=True, prior_ratio=1.0, prior_discount=-9)}, None),
        ({"rule": Rule(k=64, chunks=4, vote_share=0.5)}, "not around LocalTopK"),
        ({"rule": Rule(share=1.0, radius=4, prior_ratio=1.0)}, "not around LocalTopK and Threshold"),
        ({"q_heads": 1024, "kv_heads": 64}, "up to 512 query heads, not of 1024"),
        (
            {"rule": Rule(k=3, vote_share=0.5, vote_discount=200, prior_ratio=1.0, prior_discount=-41)},
            "up to 240 together, not 200 and -41",
        ),
    ],
)
def test_what_is_not_served_is_named(change, reason):
    rule = Rule(k=3, vote_share=0.5, vote_discount=200, prior_ratio=1.0, prior_discount=-40)
    found = why_not(replace(KernelRequest(torch.device("cuda"), torch.bfloat16, 32, 8, 128, 2, 1, rule), **change))
    if reason is None:
        assert found == []
    else:
        assert len(found) == 1 and reason in found[0]
