from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import (
    Consensus,
    ExactAttend,
    FlatHamming,
    HashAttention,
    MixedPrecision,
    Momentum,
    Recent,
    Selection,
    SimHash,
    Sink,
    Step,
    Threshold,
    Tiers,
    TopK,
)
from hashattn.ops.decode import Rule
from tests.structured import (
    generator,
    make_view,
    odd_lengths,
    qkv,
    raises_naming,
    seeds,
    selected,
    tied_distances,
    visible_mask,
)

inners = st.sampled_from(
    [TopK(k=5), TopK(share=0.3), Tiers(0.1, 0.4), TopK(k=5, per="kv_head", combine="union"), Threshold(2, limit=9)]
)


def with_distances(view, distances):
    """The same view, but the index itself reports these distances."""
    return make_view(distances, view.kv_heads, view.visible[:, 0, 0].tolist(), sinks=view.sinks, recents=view.recents)


def same_selection(a: Selection, b: Selection) -> bool:
    return torch.equal(a.ids, b.ids) and ((a.tier is None and b.tier is None) or torch.equal(a.tier, b.tier))


def previous(seed, batch, q_heads, tokens, keys, slots=9):
    """A selection of the layer before (some slots empty) and its softmax weights."""
    g = generator(seed)
    ids = torch.rand(batch, q_heads, tokens, keys, generator=g).argsort(-1)[..., :slots].to(torch.int32)
    ids = ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.2, -1)
    weights = torch.softmax(3 * torch.randn(ids.shape, generator=g).masked_fill(ids < 0, -1e9), -1)
    return Selection(ids), weights.masked_fill(ids < 0, 0)


def brute_prior(selection, weights, keys):
    prior = np.zeros((*weights.shape[:3], keys))
    for b, h, t, i in np.ndindex(*weights.shape):
        head = h * selection.ids.shape[1] // weights.shape[1]
        column = selection.ids[b, head, t, i].item()
        if column >= 0:
            prior[b, h, t, column] = weights[b, h, t, i].item()
    return prior.mean(1)


@settings(deadline=None, max_examples=40)
@given(
    seeds, inners, odd_lengths, st.sampled_from([0.25, 0.5, 0.7]), st.sampled_from([0.0, 1.0, 2.4, 40.0]), st.booleans()
)
def test_consensus_discounts_what_enough_heads_would_select(seed, inner, keys, vote_share, discount, forced):
    tokens, start = min(2, keys), [0, keys // 3]
    distances = tied_distances(seed, 2, 4, tokens, keys)
    options = {"sinks": 1, "recents": 2} if forced else {}
    view = make_view(distances, 2, start, **options)
    votes = selected(inner.select(view, Step()).ids, keys, 4).sum(1, keepdim=True)
    nearer = distances - round(discount) * (votes > vote_share * 4).to(torch.int32)
    consensus = Consensus(inner, vote_share=vote_share, discount=discount)
    assert same_selection(consensus.select(view, Step()), inner.select(with_distances(view, nearer), Step()))


@settings(deadline=None, max_examples=30)
@given(seeds, inners, odd_lengths, st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([0.0, 2.4, 40.0]), st.booleans())
def test_momentum_discounts_what_the_layer_before_attended_to(seed, inner, keys, ratio, discount, shared):
    tokens = min(2, keys)
    distances = tied_distances(seed, 2, 4, tokens, keys)
    view = make_view(distances, 2, [0, keys // 3])
    before, weights = previous(seed, 2, 4, tokens, keys)
    if shared:  # the layer before chose per KV head
        before = Selection(before.ids[:, ::2].contiguous())
        weights = weights.masked_fill(before.ids.repeat_interleave(2, 1) < 0, 0)
    counts = visible_mask(tokens, keys, [0, keys // 3]).sum(-1).squeeze(1).numpy()
    attended = brute_prior(before, weights, keys) * counts[..., None] > ratio
    nearer = distances - round(discount) * torch.from_numpy(attended).unsqueeze(1).to(torch.int32)
    momentum = Momentum(inner, ratio=ratio, discount=discount)
    found = momentum.select(view, Step(1, before, weights))
    assert same_selection(found, inner.select(with_distances(view, nearer), Step()))


@settings(deadline=None, max_examples=20)
@given(seeds, inners, odd_lengths)
def test_momentum_without_a_layer_before_is_its_inner_selector(seed, inner, keys):
    view = make_view(tied_distances(seed, 1, 4, 1, keys), 2)
    before, weights = previous(seed, 1, 4, 1, keys)
    for step in (Step(), Step(3), Step(3, previous=before), Step(3, previous_weights=weights)):
        assert same_selection(Momentum(inner).select(view, step), inner.select(view, step))


@settings(deadline=None, max_examples=15)
@given(seeds, inners)
def test_momentum_and_consensus_nest(seed, inner):
    distances = tied_distances(seed, 1, 4, 1, 65)
    view = make_view(distances, 2)
    before, weights = previous(seed, 1, 4, 1, 65)
    attended = torch.from_numpy(brute_prior(before, weights, 65) * 65 > 1).unsqueeze(1)
    votes = selected(inner.select(view, Step()).ids, 65, 4).sum(1, keepdim=True)
    nearer = distances - 2 * attended.to(torch.int32) - 3 * (votes > 2).to(torch.int32)
    nested = Momentum(Consensus(inner, discount=3.0))
    found = nested.select(view, Step(1, before, weights))
    assert same_selection(found, inner.select(with_distances(view, nearer), Step()))


@pytest.mark.parametrize("attend", [ExactAttend(), MixedPrecision()], ids=["exact", "mixed"])
@pytest.mark.parametrize("inner", [TopK(share=0.3), Tiers(0.1, 0.3), TopK(k=9, per="kv_head")], ids=repr)
def test_gradient_reaches_the_discounts_and_changes_no_value(attend, inner):
    q, k, v = qkv(0, tokens=2)
    momentum = Momentum(Consensus(inner, vote_share=0.25))
    attn = HashAttention(
        SimHash(64, centring=None), FlatHamming(), Sink(1) | Recent(2) | momentum, attend, engine="reference"
    )
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    before, weights = previous(0, 1, 4, 2, 65)
    step = Step(1, before, weights)
    output, _ = attn.run(q, cache, step=step, need_lse=True)
    with torch.no_grad():
        still, _ = attn.run(q, cache, step=step, need_lse=True)
    assert torch.equal(output.out, still.out)
    assert torch.equal(output.lse, still.lse)
    assert not still.out.requires_grad
    output.out.square().sum().backward()
    for discount in (momentum.discount, momentum.inner.discount):
        assert discount.grad.isfinite()
        assert discount.grad != 0


def test_the_gradient_is_the_slope_of_log_weights_on_discounted_slots():
    q, k, v = qkv(1, kv_heads=1, group=4)
    consensus = Consensus(TopK(k=9), vote_share=0.5)
    attn = HashAttention(SimHash(64, centring=None), FlatHamming(), consensus, engine="reference")
    cache = attn.new_cache(1, 1, 16)
    cache.append(k, v)
    output, selection = attn.run(q, cache)
    output.out.sum().backward()
    view = cache.view(attn.encoder.encode_query(q), 4, cache.spans(1))
    votes = selected(TopK(k=9).select(view, Step()).ids, 65, 4).sum(1, keepdim=True)
    marked = (votes > 2).expand(-1, 4, -1, -1).gather(-1, selection.ids.long())
    assert marked.any()
    assert not marked.all()

    def by_hand(shift: float) -> torch.Tensor:
        weights = Selection(selection.ids, log_weights=shift * marked.float())
        return attn.attend.attend(q, cache, weights, 0.25).out.double().sum()

    h = 1e-2
    slope = (by_hand(h) - by_hand(-h)) / (2 * h)
    # a central difference errs by h^2 times the third derivative (of order |v| sums), plus float32 rounding / h
    assert abs(consensus.discount.grad - slope) < 1e-3 * max(1.0, abs(slope))


def test_a_rule_says_how_distances_are_calibrated():
    tiers = Tiers(0.1, 0.4)
    both = Sink(2) | Momentum(Consensus(tiers, vote_share=0.3, discount=2.5), ratio=1.5, discount=3.0)
    rule = both.rule(2)
    assert rule.calibrated and (rule.vote_share, rule.prior_ratio) == (0.3, 1.5)
    assert (rule.vote_discount, rule.prior_discount) == (2, 3)  # halves go to the even number
    raw = replace(rule, vote_share=None, vote_discount=0, prior_ratio=None, prior_discount=0)
    assert raw == (Sink(2) | tiers).rule(2) and not raw.calibrated
    assert Consensus(tiers).rule(1).prior_ratio is None and Momentum(tiers).rule(1).vote_share is None
    for other in (Consensus(Momentum(tiers)), Consensus(Consensus(tiers)), Momentum(Momentum(tiers))):
        assert other.rule(1) is None
    assert Consensus(TopK(k=5, per="kv_head", combine="union")).rule(2) is None
    lost = Consensus(tiers)
    lost.discount.data.fill_(torch.nan)
    assert lost.rule(1) is None


@given(st.floats(0.01, 1.0), st.integers(1, 64))
def test_a_rule_counts_votes_as_the_selector_does(share, q_heads):
    votes = torch.arange(q_heads + 2)
    assert int((votes > share * q_heads).nonzero()[0]) == Rule(k=1, vote_share=share).votes(q_heads)


def test_calibrations_cost_what_their_inner_selector_costs():
    inner = Tiers(0.1, 0.3)
    for wrapped in (Consensus(inner), Momentum(inner), Momentum(Consensus(inner))):
        assert (wrapped.budget(100), wrapped.critical(100)) == (30, 10)
        assert wrapped.ranked
    assert Momentum(inner).needs_weights
    assert Consensus(Momentum(inner)).needs_weights
    assert not Consensus(inner).needs_weights
    assert (Sink(1) | Momentum(inner)).needs_weights


@pytest.mark.parametrize(
    ("error", "make", "words"),
    [
        (TypeError, lambda: Consensus(Sink(4)), ["inner", "Sink"]),
        (TypeError, lambda: Momentum(3), ["inner", "3"]),
        (ValueError, lambda: Consensus(TopK(k=3), vote_share=0), ["vote_share", "0"]),
        (ValueError, lambda: Consensus(TopK(k=3), discount=-1.0), ["discount", "-1.0"]),
        (ValueError, lambda: Momentum(TopK(k=3), discount=float("nan")), ["discount", "nan"]),
        (ValueError, lambda: Momentum(TopK(k=3), ratio=-0.5), ["ratio", "-0.5"]),
        (ValueError, lambda: Momentum(TopK(k=3), ratio=float("inf")), ["ratio", "inf"]),
    ],
)
def test_bad_calibrations_are_refused_by_name(error, make, words):
    raises_naming(error, *words)(make)
