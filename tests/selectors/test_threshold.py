import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import FlatDot, FlatHamming, HashAttention, Identity, SimHash, Step, Threshold, TopK
from tests.structured import (
    brute_nearest,
    hamming_numpy,
    make_view,
    odd_lengths,
    qkv,
    raises_naming,
    seeds,
    tied_distances,
    visible_mask,
)


@settings(deadline=None, max_examples=80)
@given(
    seeds, odd_lengths, st.integers(0, 6), st.sampled_from([None, 1, 5, 70]), st.sampled_from([(0, 0), (2, 3)]),
    st.sampled_from([None, "sum", "union", "vote"]), st.data(),
)  # fmt: skip
def test_threshold_keeps_what_lies_within_the_radius(seed, keys, radius, limit, forced, combine, data):
    tokens = data.draw(st.integers(1, min(2, keys)))
    start = [0, data.draw(st.integers(0, keys))]
    sinks, recents = forced
    group = 3
    distances = tied_distances(seed, 2, 2 * group, tokens, keys)
    per = {} if combine is None else {"per": "kv_head", "combine": combine}
    view = make_view(distances, 2, start, sinks=sinks, recents=recents)
    selection = Threshold(radius, limit, **per).select(view, Step())
    seen = visible_mask(tokens, keys, start)
    for b, h, t in np.ndindex(*selection.ids.shape[:3]):
        own = distances[b, h : h + 1, t] if combine is None else distances[b, h * group : (h + 1) * group, t]
        own = own.numpy()
        near = {
            None: own[0] <= radius,
            "sum": own.sum(0) <= group * radius,
            "union": (own <= radius).any(0),
            "vote": (own <= radius).sum(0) * 2 > group,
        }[combine]
        see = seen[b, 0, t].numpy()
        columns = np.flatnonzero(see)
        ahead = np.isin(np.arange(keys), [*columns[:sinks], *columns[max(0, len(columns) - max(1, recents)) :]])
        room = keys if limit is None else max(limit, ahead.sum())
        expected = brute_nearest(own.sum(0), room, (near | ahead) & see, ahead)
        assert [c for c in selection.ids[b, h, t].tolist() if c >= 0] == expected


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_a_call_keeps_the_codes_within_the_radius(engine):
    q, k, v = qkv(0)
    attn = HashAttention(SimHash(64, centring=None), FlatHamming(), Threshold(30), engine=engine)
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    _, selection = attn.run(q, cache)
    near = hamming_numpy(attn.encoder.encode_query(q), cache.codes) <= 30
    near[..., -1] = True  # the query's own key
    assert np.array_equal(selection.count.numpy(), near.sum(-1))
    assert 0 < near.sum() < near.size


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("per", ["query_head", "kv_head"])
def test_the_last_key_is_kept_where_nothing_lies_within_the_radius(engine, per):
    q, k, v = qkv(1, tokens=1)
    attn = HashAttention(SimHash(64, centring=None), FlatHamming(), Threshold(0, per=per), engine=engine)
    own = v[:, :, -1:].repeat_interleave(q.shape[1] // v.shape[1], 1)
    assert torch.allclose(attn(q, k, v), own)


@pytest.mark.parametrize("radius", [2**31 - 1, 2**31, 2**32 + 3, 2**63, 2**80])
@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("options", [{}, {"per": "kv_head"}, {"per": "kv_head", "combine": "union"}], ids=str)
def test_radii_beyond_every_distance_keep_every_key(radius, engine, options):
    q, k, v = qkv(2, keys=40)
    attn = HashAttention(SimHash(64, centring=None), FlatHamming(), Threshold(radius, **options), engine=engine)
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    assert (attn.run(q, cache)[1].count == torch.arange(40 - q.shape[2] + 1, 41)).all()
    floats = attn.replace(encoder=Identity(), index=FlatDot())
    assert (floats(q, k, v) - floats.replace(selector=TopK(share=1.0))(q, k, v)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (ValueError, {"radius": -1}, ["radius", "-1"]),
        (ValueError, {"radius": 1.5}, ["radius", "1.5"]),
        (ValueError, {"radius": True}, ["radius", "True"]),
        (ValueError, {"radius": 3, "limit": 0}, ["0"]),
        (ValueError, {"radius": 3, "per": "x"}, ["per", "x"]),
    ],
)
def test_bad_radii_are_refused_by_name(error, options, words):
    raises_naming(error, *words)(lambda: Threshold(**options))
