import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import FlatHamming, HashAttention, Recent, SimHash, Sink, Step, TopK
from hashattn.core.budget import Budget
from tests.structured import (
    brute_nearest,
    hamming_numpy,
    heads,
    make_view,
    odd_bits,
    odd_lengths,
    qkv,
    raises_naming,
    seeds,
    selected,
    tied_distances,
    visible_mask,
)

budgets = st.one_of(
    st.builds(TopK, k=st.sampled_from([1, 2, 7, 64, 500])),
    st.builds(TopK, share=st.sampled_from([0.01, 0.1, 0.5, 1.0])),
)


def limit(selector: TopK, visible: int) -> int:
    return min(visible, selector.k) if selector.share is None else int(np.ceil(selector.share * visible))


def brute_topk(distances, selector, seen, sinks=0, recents=0):
    """{(b, h, t): the list of kept columns} by sorting."""
    kept = {}
    for b, h, t in np.ndindex(distances.shape[:3]):
        see = seen[b, 0, t].numpy()
        columns = np.flatnonzero(see)
        forced = np.isin(np.arange(len(see)), [*columns[:sinks], *columns[max(0, len(columns) - recents) :]])
        k = max(limit(selector, len(columns)), forced.sum())
        kept[b, h, t] = brute_nearest(distances[b, h, t].numpy(), k, see, forced)
    return kept


def rows(ids):
    return {place: [c for c in ids[place].tolist() if c >= 0] for place in np.ndindex(*ids.shape[:3])}


@settings(deadline=None, max_examples=60)
@given(seeds, budgets, heads, odd_lengths, st.data())
def test_topk_keeps_the_k_nearest_forced_first_ties_to_the_most_recent(seed, topk, shape, keys, data):
    kv_heads, group = shape
    tokens = data.draw(st.integers(1, min(3, keys)))
    start = [0, data.draw(st.integers(0, keys))]
    sinks, recents = data.draw(st.sampled_from([(0, 0), (1, 0), (0, 3), (4, 64)]))
    distances = tied_distances(seed, 2, kv_heads * group, tokens, keys)
    view = make_view(distances, kv_heads, start, sinks=sinks, recents=recents)
    selection = topk.select(view, Step())
    assert selection.ids.dtype == torch.int32
    assert selection.tier is None
    assert rows(selection.ids) == brute_topk(distances, topk, visible_mask(tokens, keys, start), sinks, recents)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("query_bits", [1, 4, 8])
@settings(deadline=None, max_examples=10)
@given(seed=seeds, bits=odd_bits, shape=heads, keys=odd_lengths, share=st.sampled_from([0.05, 0.3, 1.0]))
def test_a_call_selects_the_nearest_codes(engine, query_bits, seed, bits, shape, keys, share):
    q, k, v = qkv(seed, 2, *shape, keys=keys)
    attn = HashAttention(
        SimHash(bits, query_bits, centring=None), FlatHamming(), Sink(1) | Recent(2) | TopK(share=share), engine=engine
    )
    cache = attn.new_cache(2, shape[0], 16)
    start = torch.tensor([0, keys // 3])
    cache.append(k, v, start=start)
    _, selection = attn.run(q, cache)
    distances = torch.from_numpy(hamming_numpy(attn.encoder.encode_query(q), cache.codes))
    nearest = brute_topk(distances, TopK(share=share), visible_mask(1, keys, start.tolist()), sinks=1, recents=2)
    assert {p: sorted(c) for p, c in rows(selection.ids).items()} == {p: sorted(c) for p, c in nearest.items()}


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@settings(deadline=None, max_examples=15)
@given(seed=seeds, bits=odd_bits, keys=odd_lengths, k=st.sampled_from([1, 7, 64, 200]))
def test_distances_found_are_those_of_faiss(engine, seed, bits, keys, k):
    faiss = pytest.importorskip("faiss")
    q, key, v = qkv(seed, kv_heads=1, group=3, keys=keys)
    attn = HashAttention(SimHash(bits, centring=None), FlatHamming(), TopK(k=k), engine=engine)
    cache = attn.new_cache(1, 1, 16)
    cache.append(key, v)
    codes = cache.codes[0, 0].contiguous().numpy().view(np.uint8)
    query = attn.encoder.encode_query(q)
    index = faiss.IndexBinaryFlat(codes.shape[1] * 8)
    index.add(codes)
    found, _ = index.search(query[0, :, 0].contiguous().numpy().view(np.uint8), min(k, keys))
    _, selection = attn.run(q, cache)
    own = hamming_numpy(query, cache.codes)[0, :, 0]
    own = np.take_along_axis(own, selection.ids[0, :, 0].long().numpy(), 1)
    assert np.array_equal(np.sort(own, -1), found)
    ids, distances = cache.search(query, k)
    assert np.array_equal(distances[0, :, 0].numpy(), found)  # both nearest first
    assert torch.equal(ids.sort().values, selection.ids.sort().values)


@settings(deadline=None, max_examples=20)
@given(seeds, odd_lengths, st.sampled_from([1, 7, 64]))
def test_permuting_the_keys_permutes_the_selection_up_to_ties(seed, keys, k):
    q, key, v = qkv(seed, keys=keys, dim=8)
    attn = HashAttention(SimHash(8, centring=None), FlatHamming(), TopK(k=k), engine="reference")
    order = torch.randperm(keys, generator=torch.Generator().manual_seed(seed))
    ids, codes = [], []
    for columns in (torch.arange(keys), order):
        cache = attn.new_cache(1, 2, 8)
        cache.append(key[:, :, columns], v[:, :, columns])
        ids.append(columns[attn.run(q, cache)[1].ids.long()])
        codes.append(cache.codes)
    assert torch.equal(codes[0][:, :, order], codes[1])
    distances = torch.from_numpy(hamming_numpy(attn.encoder.encode_query(q), codes[0]))
    near, moved = distances.gather(-1, ids[0]), distances.gather(-1, ids[1])
    assert torch.equal(near, moved)
    inside = near < near.amax(-1, keepdim=True)
    for a, b, i in zip(ids[0].flatten(0, 2), ids[1].flatten(0, 2), inside.flatten(0, 2), strict=True):
        assert {*a[i].tolist()} == {*b[i].tolist()}


@settings(deadline=None, max_examples=30)
@given(seeds, odd_lengths)
def test_a_larger_budget_keeps_what_a_smaller_one_keeps(seed, keys):
    distances = tied_distances(seed, 1, 2, 1, keys)
    view = make_view(distances, 2)
    masks = [selected(TopK(share=s).select(view, Step()).ids, keys, 2) for s in (0.05, 0.1, 0.4, 0.9, 1.0)]
    for small, large in itertools.pairwise(masks):
        assert (small <= large).all()
    assert masks[-1].all()


@pytest.mark.parametrize(("visible", "share", "kept"), [(20, 0.05, 1), (21, 0.05, 2), (1, 0.01, 1), (100, 0.07, 8)])
def test_a_share_is_rounded_up_in_float64(visible, share, kept):
    # 0.07 * 100 is 7.000000000000001 in float64
    assert Budget(share=share).count(visible) == Budget(share=share).counts(torch.tensor([[visible]])).item() == kept
    selection = TopK(share=share).select(make_view(tied_distances(0, 1, 1, 1, visible), 1), Step())
    assert selection.count.item() == kept == TopK(share=share).budget(visible)


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (ValueError, {}, ["k", "share"]),
        (ValueError, {"k": 3, "share": 0.5}, ["k=3", "share=0.5"]),
        (ValueError, {"k": 0}, ["k", "0"]),
        (TypeError, {"k": 0.05}, ["k", "share=", "0.05"]),
        (TypeError, {"k": True}, ["k", "True"]),
        (ValueError, {"share": 0.0}, ["share", "0.0"]),
        (ValueError, {"share": 1.1}, ["share", "1.1"]),
        (ValueError, {"share": float("nan")}, ["share", "nan"]),
        (TypeError, {"share": "5%"}, ["share", "5%"]),
        (TypeError, {"share": True}, ["share", "True"]),
        (ValueError, {"k": 3, "per": "head"}, ["per", "head", "kv_head"]),
        (ValueError, {"k": 3, "combine": "max"}, ["combine", "max", "union"]),
    ],
)
def test_bad_budgets_are_refused_by_name(error, options, words):
    raises_naming(error, *words)(lambda: TopK(**options))
