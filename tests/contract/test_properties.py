"""What holds for every family of indexes and selectors, on random data: budgets, orders of keys, padding."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import (
    Consensus,
    FlatHamming,
    HashAttention,
    HeavyHitters,
    LocalTopK,
    Momentum,
    ObservationWindow,
    Pages,
    RandomTail,
    Recent,
    Refine,
    Reuse,
    SampledAttend,
    SimHash,
    Sink,
    Threshold,
    Tiers,
    TopK,
    TopP,
)
from hashattn.testing.attention import close_codes, filled
from hashattn.testing.inputs import Inputs, Shape, inputs, logits64, visible
from hashattn.testing.selector import chosen, kept
from tests.contract.parts import INDEXES
from tests.structured import seeds

families = pytest.mark.parametrize("family", INDEXES)
SCANNING = [name for name, (index, _) in INDEXES.items() if index.scans]
EPS = torch.finfo(torch.float32).eps


def composed(family):
    index, encoder = INDEXES[family]
    return HashAttention(encoder(), index, TopK(k=8), engine="reference")


@families
@settings(deadline=None, max_examples=8)
@given(seed=seeds)
def test_a_larger_budget_finds_what_a_smaller_one_finds(family, seed):
    attn = composed(family)
    data = inputs(Shape(), attn, seed=seed)
    cache, query = filled(attn, data), attn.encoder.encode_query(data.q)
    found = [cache.search(query, k) for k in (1, 4, 9, 30)]
    for (ids, near), (more, further) in itertools.pairwise(found):
        slots = ids.shape[-1]
        assert torch.equal(near, further[..., :slots])
        if not family.startswith("FaissBinary,"):  # which promises no order of equal distances
            assert torch.equal(ids, more[..., :slots])


@pytest.mark.parametrize("family", SCANNING)
@settings(deadline=None, max_examples=8)
@given(seed=seeds)
def test_distances_belong_to_keys_wherever_they_stand(family, seed):
    attn = composed(family)
    if family == "Pages":  # keys share the bound of their page: of one key, it is its own
        attn = attn.replace(index=Pages(1))
    data = inputs(Shape(), attn, seed=seed)
    codes, query = attn.encoder.encode_key(data.k), attn.encoder.encode_query(data.q)
    order = torch.randperm(codes.shape[2], generator=torch.Generator().manual_seed(seed))
    found = []
    for columns in (torch.arange(len(order)), order):
        store = attn.index.new_store()
        store.add(codes[:, :, columns])
        found.append(attn.index.distances(store, query, biased=attn.encoder.biased))
    expected = found[0][..., order]
    off = (found[1] - expected).abs().max()
    if family == "Pages":
        assert off <= 1 + 1024 * 64 * EPS * float(data.q.norm(dim=-1).max() * data.k.norm(dim=-1).max())
    elif expected.dtype == torch.int32:
        assert off == 0
    else:  # sums of up to 32 products in another order
        assert off <= 64 * EPS * data.q.norm(dim=-1).max() * data.k.norm(dim=-1).max()


@families
@settings(deadline=None, max_examples=8)
@given(seed=seeds, start=st.sampled_from([1, 7, 16, 40]))
def test_padding_moves_what_is_found_and_changes_nothing_else(family, seed, start):
    attn = composed(family)
    data = inputs(Shape(start=start), attn, seed=seed)
    alone = Inputs(data.q[1:], data.k[1:, :, start:], data.v[1:, :, start:], torch.tensor([0]))
    padded, single = filled(attn, data), filled(attn, alone)
    per_key = attn.index.new_store().per_key
    if per_key:
        assert close_codes(padded.codes[1:, :, start:], single.codes, attn.encoder.code)
    ids, near = padded.search(attn.encoder.encode_query(data.q), 9)
    own, nearest = single.search(attn.encoder.encode_query(alone.q), 9)
    if per_key and not torch.equal(padded.codes[1:, :, start:], single.codes):
        return  # a bit within rounding of zero
    spread = 64 * EPS * float(data.q.norm(dim=-1).max() * data.k.norm(dim=-1).max())
    assert (near[1:] - nearest).abs().max() <= (spread if near.is_floating_point() else 0)
    if not near.is_floating_point() and not family.startswith("FaissBinary,"):
        assert torch.equal(ids[1:], own.where(own < 0, own + start))


BUDGETS = {
    "Consensus": lambda b: Consensus(TopK(k=10 * b), vote_share=1.0),  # nobody is of one mind more than fully
    "HeavyHitters": lambda b: HeavyHitters(k=9 * b),
    "LocalTopK": lambda b: LocalTopK(16 * b, 4 * b),
    "Momentum": lambda b: Momentum(TopK(k=9 * b)),
    "ObservationWindow": lambda b: ObservationWindow(k=9 * b, window=2, pool=3),
    "RandomTail": lambda b: RandomTail(TopK(k=8), k=5 * b),
    "Recent": lambda b: Recent(9 * b),
    "Refine": lambda b: Refine(TopK(k=5 * b)),
    "Reuse": lambda b: Reuse(TopK(k=9 * b), every=2),
    "Sink": lambda b: Sink(9 * b),
    "Threshold": lambda b: Threshold(50 + 4 * b),
    "Tiers": lambda b: Tiers(0.1 * b, 0.2 * b),
    "TopK": lambda b: TopK(k=9 * b),
    "TopK of a group": lambda b: TopK(share=0.1 * b, per="kv_head"),
    "TopK of any head": lambda b: TopK(k=9 * b, per="kv_head", combine="union"),
    "TopP": lambda b: TopP(TopK(k=40), p=0.2 * b),
}


@pytest.mark.parametrize("family", BUDGETS)
@settings(deadline=None, max_examples=8)
@given(seed=seeds)
def test_attention_mass_rises_with_the_budget(family, seed):
    data = inputs(Shape(), None, seed=seed)
    weights = logits64(data).masked_fill(~visible(data), -torch.inf).softmax(-1)
    before = torch.zeros(())
    for b in (1, 2, 3, 4):
        selector = BUDGETS[family](b)
        attn = HashAttention(SimHash(128, centring=None), FlatHamming(), selector, SampledAttend(), engine="reference")
        cache = filled(attn, data)
        if selector.accumulates:  # it chooses by what it has seen
            attn.accumulate(data.q, cache)
        mass = (weights * kept(chosen(attn, data.q, cache).ids, data.k.shape[2], 4)).sum(-1)
        assert (mass >= before - 1e-12).all()  # of sums of float64
        before = mass
