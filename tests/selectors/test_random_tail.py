import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import (
    ExactAttend,
    FlatHamming,
    HashAttention,
    Momentum,
    RandomTail,
    Recent,
    SampledAttend,
    SimHash,
    Sink,
    Step,
    Tiers,
    TopK,
    TopP,
)
from hashattn.core.types import SAMPLED
from hashattn.selectors.draws import draws
from tests.structured import (
    heads,
    make_view,
    odd_lengths,
    qkv,
    raises_naming,
    sdpa,
    seeds,
    selected,
    tied_distances,
    tolerance,
    visible_mask,
)

PLAIN = SimHash(64, centring=None)
inners = st.sampled_from([TopK(k=5), TopK(share=0.2), TopK(share=0.2, per="kv_head"), Tiers(0.1, 0.3)])


@pytest.mark.parametrize("host", [False, True])
@settings(deadline=None, max_examples=10)
@given(
    seed=seeds, inner=inners, shape=heads, keys=odd_lengths, k=st.sampled_from([1, 7, 200]),
    causal=st.booleans(), forced=st.booleans(),
)  # fmt: skip
def test_the_sample_is_of_the_visible_keys_that_inner_leaves(host, seed, inner, shape, keys, k, causal, forced):
    kv_heads, group = shape
    tokens, start = min(3, keys), [0, keys // 3]
    distances = tied_distances(seed, 2, kv_heads * group, tokens, keys)
    view = make_view(distances, kv_heads, start, causal, host=host, **({"sinks": 1, "recents": 2} if forced else {}))
    found, alone = RandomTail(inner, k=k).select(view, Step()), inner.select(view, Step())
    slots = alone.ids.shape[-1]
    assert torch.equal(found.ids[..., :slots], alone.ids)
    assert torch.equal(found.tier == SAMPLED, (torch.arange(found.ids.shape[-1]) >= slots).expand(found.ids.shape))
    seen = visible_mask(tokens, keys, start, causal)
    assert (selected(found.ids, keys, kv_heads * group) <= seen).all()  # which also finds keys that are there twice
    rest = (seen & ~selected(alone.ids, keys, kv_heads * group)).sum(-1)
    drawn = (found.ids[..., slots:] >= 0).sum(-1).repeat_interleave(kv_heads * group // found.ids.shape[1], 1)
    assert torch.equal(drawn, rest.clamp(max=k))
    weight = found.log_weights.exp() * (found.ids >= 0)
    assert (found.log_weights[..., :slots] == 0).all()
    stood_for = weight[..., slots:].sum(-1).repeat_interleave(kv_heads * group // found.ids.shape[1], 1)
    assert torch.allclose(stood_for, rest.float(), rtol=1e-5)


@settings(deadline=None, max_examples=8)
@given(seed=seeds, shape=heads, keys=odd_lengths, attend=st.sampled_from([ExactAttend(), SampledAttend()]))
def test_a_sample_of_all_is_dense_attention(seed, shape, keys, attend):
    q, k, v = qkv(seed, 2, *shape, min(2, keys), keys)
    start = torch.tensor([0, keys // 2])
    selector = Sink(1) | RandomTail(TopK(share=0.1), share=1.0)
    out = HashAttention(PLAIN, FlatHamming(), selector, attend, engine="reference")(q, k, v, start=start)
    keep = visible_mask(q.shape[2], keys, start.tolist())
    assert (out - sdpa(q, k, v, keep)).abs().max() <= 2 * tolerance(q, k, v, keep)


@settings(deadline=None, max_examples=8)
@given(seed=seeds, keys=odd_lengths)
def test_a_step_draws_the_same_again_and_a_larger_sample_holds_a_smaller_one(seed, keys):
    view = make_view(tied_distances(seed, 1, 4, 1, keys), 2)
    masks = []
    for share in (0.1, 0.3, 0.6):
        found = [RandomTail(TopK(k=3), share=share, seed=seed).select(view, Step(2)) for _ in range(2)]
        assert torch.equal(found[0].ids, found[1].ids)
        masks.append(selected(found[0].ids, keys, 4))
    for small, large in itertools.pairwise(masks):
        assert (small <= large).all()


def test_other_seeds_layers_heads_and_lengths_draw_others():
    view = make_view(torch.zeros(1, 2, 1, 1000, dtype=torch.int32), 1)
    tail = RandomTail(TopK(k=1), k=100)
    one = selected(tail.select(view, Step()).ids, 1000, 2)
    longer = make_view(torch.zeros(1, 2, 1, 1001, dtype=torch.int32), 1)
    others = [
        selected(RandomTail(TopK(k=1), k=100, seed=1).select(view, Step()).ids, 1000, 2),
        selected(tail.select(view, Step(1)).ids, 1000, 2),
        one.flip(1),
        selected(tail.select(longer, Step()).ids, 1001, 2)[..., :1000],
    ]
    for other in others:  # two independent samples of a tenth share a tenth: 10 of 100, deviation below 3
        assert ((one & other).sum(-1) < 25).all()


def test_padding_and_batch_mates_change_no_draw():
    distances = tied_distances(0, 1, 2, 1, 65)
    tail = RandomTail(TopK(k=5), k=9)
    alone = tail.select(make_view(distances, 1), Step()).ids
    padded = torch.cat([torch.zeros(1, 2, 1, 35, dtype=torch.int32), distances], -1)
    both = torch.cat([tied_distances(1, 1, 2, 1, 100), padded])
    assert torch.equal(tail.select(make_view(both, 1, [3, 35]), Step()).ids[1:] - 35, alone)


def test_every_key_is_drawn_as_often():
    view = make_view(torch.zeros(1, 2000, 1, 50, dtype=torch.int32), 1)
    found = RandomTail(TopK(k=10), k=10).select(view, Step())
    often = selected(found.ids, 50, 2000).sum((0, 1, 2))
    assert (often[40:] == 2000).all()  # ties: the most recent
    # 2000 draws at 1/4: a mean of 500, a deviation of 19.4
    assert ((often[:40] - 500).abs() < 4.5 * 19.4).all()
    chi = ((often[:40] - 500.0).square() / 375).sum()
    assert 15 < chi < 75  # 39 degrees of freedom; without replacement it is 40 / 39 of a chi squared variable


def test_draws_are_uniform_and_differ_in_every_place():
    one = draws(7, torch.arange(100)[:, None], torch.arange(1000))
    assert one.min() >= 0
    assert one.max() < 2**31
    counts = torch.bincount((one.flatten() >> 24), minlength=128)  # a mean of 781, a deviation of 27.8
    assert ((counts - 781.25).abs() < 5 * 27.8).all()
    assert one.unique().numel() > 99_990  # birthdays: 2.3 pairs are expected among 2^31
    assert not torch.equal(one, draws(8, torch.arange(100)[:, None], torch.arange(1000)))


def test_it_costs_inner_and_sample():
    tail = RandomTail(TopK(share=0.1, per="kv_head"), share=0.05)
    assert (tail.budget(100), tail.critical(100), tail.shared, tail.samples) == (15, 15, True, True)
    assert RandomTail(TopK(k=80), k=80).budget(100) == 100
    assert eval(repr(tail)) == tail
    assert tail.rule(1) is None


@pytest.mark.parametrize(
    ("error", "make", "words"),
    [
        (TypeError, lambda: RandomTail(Recent(4), k=3), ["inner", "Recent"]),
        (TypeError, lambda: RandomTail(Momentum(TopK(k=3)), k=3), ["inner", "Momentum(RandomTail("]),
        (TypeError, lambda: RandomTail(RandomTail(TopK(k=3), k=3), k=3), ["inner", "samples"]),
        (TypeError, lambda: TopP(RandomTail(TopK(k=3), k=3)), ["inner", "samples"]),
        (ValueError, lambda: RandomTail(TopK(k=3)), ["k", "share"]),
        (ValueError, lambda: RandomTail(TopK(k=3), k=3, share=0.1), ["k=3", "share=0.1"]),
        (ValueError, lambda: RandomTail(TopK(k=3), k=0), ["k", "0"]),
        (ValueError, lambda: RandomTail(TopK(k=3), share=2.0), ["share", "2.0"]),
        (TypeError, lambda: RandomTail(TopK(k=3), k=3, seed=0.5), ["seed", "0.5"]),
    ],
)
def test_bad_input_is_refused_by_name(error, make, words):
    raises_naming(error, *words)(make)
