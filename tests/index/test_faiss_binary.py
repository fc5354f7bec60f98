import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import FaissBinary, FlatHamming, HashAttention, MultiProbe, Recent, SimHash, Sink, Threshold, Tiers, TopK
from hashattn.index.faiss_binary import load_faiss
from tests.structured import (
    cones,
    generator,
    heads,
    odd_lengths,
    qkv,
    raises_naming,
    seeds,
    selected,
    tolerance,
    visible_mask,
)

PLAIN = SimHash(128, centring=None)
SEARCHING = ["BIVF4", "BIVF4_HNSW8", "BHNSW16", "BHash8", "BHash4x8"]


def compose(factory, selector=None, encoder=PLAIN, **options):
    return HashAttention(encoder, FaissBinary(factory, **options), selector or TopK(k=9), engine="reference")


def filled(attn, seed=0, batch=2, keys=200, start=None, chunk=None, **options):
    q, k, v = qkv(seed, batch, keys=keys, **options)
    cache = attn.new_cache(batch, k.shape[1], k.shape[3])
    for first in range(0, keys, chunk or keys):
        end = first + (chunk or keys)
        cache.append(k[:, :, first:end], v[:, :, first:end], start=torch.tensor(start) if start and not first else None)
        cache.encode()
        if chunk:
            cache.search(attn.encoder.encode_query(q), 3)
    return q, cache


@settings(deadline=None, max_examples=15)
@given(seed=seeds, shape=heads, keys=odd_lengths, planes=st.sampled_from([None, 1, 4]))
def test_bflat_gives_flat_hammings_distances_at_every_step(seed, shape, keys, planes):
    g = generator(seed)
    codes = torch.randint(-(2**63), 2**63 - 1, (2, shape[0], keys, 2), generator=g)
    tail = () if planes is None else (planes,)
    query = torch.randint(-(2**63), 2**63 - 1, (2, shape[0] * shape[1], 3, *tail, 2), generator=g)
    ours, flat = FaissBinary().new_store(), FlatHamming().new_store()
    for part in codes.split(9, 2):
        for store in (ours, flat):
            store.add(part)
        found = FaissBinary().distances(ours, query)
        assert found.dtype == torch.int32
        assert torch.equal(found, FlatHamming().distances(flat, query))


@pytest.mark.parametrize("query_bits", [1, 4])
def test_bflat_serves_every_selector_as_flat_hamming_does(query_bits):
    encoder = SimHash(128, query_bits=query_bits, centring=None)
    q, k, v = qkv(3, 2, tokens=4, keys=120)
    start = torch.tensor([0, 17])
    for selector in (TopK(k=20), Sink(2) | Recent(5) | Tiers(0.1, 0.3, per="kv_head"), Threshold(60, per="kv_head")):
        one = compose("BFlat", selector, encoder)
        other = one.replace(index=FlatHamming())
        assert torch.equal(one(q, k, v, start=start), other(q, k, v, start=start))


@pytest.mark.parametrize("factory", SEARCHING)
def test_what_is_found_is_visible_and_has_its_hamming_distance(factory):
    attn = compose(factory)
    q, cache = filled(attn, 1, keys=400, start=[0, 30], tokens=5)
    query = attn.encoder.encode_query(q)
    view = cache.view(query, q.shape[1], cache.spans(5))
    ids, distances = view.find(40)
    exact = FlatHamming().distances(cache.indexed.store, query)
    keep = ids >= 0
    assert keep.any(-1).float().mean() > 0.5
    assert torch.equal(distances[keep], exact.gather(-1, ids.clamp(min=0).long())[keep])
    assert not (selected(ids, 400, q.shape[1]) & ~view.seen).any()
    assert (distances.diff(dim=-1) >= 0)[keep[..., 1:]].all(), "nearest first"
    assert (keep.int().diff(dim=-1) <= 0).all(), "empty slots come last"


def test_ivf_that_probes_every_cell_and_an_unfitted_one_find_the_nearest():
    for keys in (100, 400):  # 4 cells are fitted to 156 keys
        attn = compose("BIVF4", nprobe=4)
        q, cache = filled(attn, 2, keys=keys, start=[0, 3], tokens=3)
        query = attn.encoder.encode_query(q)
        view = cache.view(query, q.shape[1], cache.spans(3))
        ids, distances = view.find(25)
        exact = FlatHamming().distances(cache.indexed.store, query).masked_fill(~view.seen, 10_000)
        assert torch.equal(distances, exact.sort(-1).values[..., :25])
        assert (selected(ids, keys, q.shape[1]).sum(-1) == 25).all()


@pytest.mark.parametrize("factory", ["BFlat", "BIVF4", "BHash8", "BHash4x8"])
@pytest.mark.parametrize("chunk", [7, 40])
def test_appends_crops_and_reorders_end_where_a_fresh_cache_does(factory, chunk):
    attn = compose(factory)
    q, cache = filled(attn, 4, keys=330, start=[0, 7], chunk=chunk)
    rows = torch.tensor([1, 0, 1])
    cache.crop(240)
    cache.search(attn.encoder.encode_query(q), 3)
    cache.select_rows(rows)
    _, more, v = qkv(5, 3, keys=20)
    cache.append(more, v)
    fresh = attn.new_cache(3, 2, 16)
    fresh.append(cache.keys, cache.values, start=cache.start)
    query = attn.encoder.encode_query(q)[rows]
    for found, expected in zip(cache.search(query, 30), fresh.search(query, 30), strict=True):
        assert torch.equal(found, expected)
    cache.crop(100)  # too few to stay fitted
    fresh.crop(100)
    for found, expected in zip(cache.search(query, 30), fresh.search(query, 30), strict=True):
        assert torch.equal(found, expected)


def test_a_graph_is_rebuilt_after_a_crop_and_still_finds_its_keys():
    attn = compose("BHNSW16", ef_search=64)
    q, cache = filled(attn, 6, keys=300, chunk=50)
    cache.crop(111)
    ids, distances = cache.search(attn.encoder.encode_query(q), 10)
    exact = FlatHamming().distances(cache.indexed.store, attn.encoder.encode_query(q)).sort(-1).values[..., :10]
    assert int(ids.max()) < 111
    assert (distances == exact).float().mean() > 0.9  # observed 1.0


def test_copies_and_states_answer_as_the_original():
    attn = compose("BIVF4")
    q, cache = filled(attn, 7, keys=300)
    query = attn.encoder.encode_query(q)
    expected = cache.search(query, 12)
    twin, loaded = copy.deepcopy(cache), attn.new_cache(2, 2, 16)
    loaded.load_state_dict(cache.state_dict())
    cache.crop(10)
    for other in (twin, loaded):
        assert all(torch.equal(a, b) for a, b in zip(other.search(query, 12), expected, strict=True))


@pytest.mark.parametrize("factory", ["BFlat", "BIVF4", "BIVF4_HNSW", "BHNSW16", "BHash4x8"])
def test_a_cache_that_was_searched_can_be_pickled_and_copied(factory):
    attn = compose(factory)
    q, cache = filled(attn, 7, keys=300, start=[0, 30])
    query = attn.encoder.encode_query(q)
    expected = cache.search(query, 12)
    loaded = attn.new_cache(2, 2, 16)
    loaded.load_state_dict(cache.state_dict())
    loaded.search(query, 12)
    for searched in (cache, loaded):
        for twin in (copy.deepcopy(searched), pickle.loads(pickle.dumps(searched))):
            assert all(torch.equal(a, b) for a, b in zip(twin.search(query, 12), expected, strict=True))
            twin.crop(200)
            assert int(twin.search(query, 12)[0].max()) < 200
    assert all(torch.equal(a, b) for a, b in zip(cache.search(query, 12), expected, strict=True))


def test_forced_keys_come_first_and_count_in_the_budget():
    attn = compose("BHNSW16", Sink(3) | Recent(4) | TopK(k=12))
    q, cache = filled(attn, 8, keys=200, start=[0, 20], tokens=2)
    selection = attn.run(q, cache)[1]
    assert selection.ids.shape[-1] == 12
    chosen = selected(selection.ids, 200, q.shape[1])
    view = cache.view(attn.encoder.encode_query(q), q.shape[1], cache.spans(2))
    forced = replace(view, sinks=3, recents=4).forced
    assert chosen[forced.expand_as(chosen)].all()
    assert (chosen.sum(-1) == 12).all()


def test_a_budget_of_everything_is_dense_attention():
    q, k, v = qkv(9, 2, tokens=3, keys=150)
    start = torch.tensor([0, 20])
    attn = compose("BIVF2", TopK(k=150), nprobe=2)  # every cell
    close = (attn(q, k, v, start=start) - attn.replace(engine="dense")(q, k, v, start=start)).abs().max()
    assert close <= tolerance(q, k, v, visible_mask(3, 150, [0, 20]))


@pytest.mark.parametrize(
    ("factory", "options", "floor"),
    [
        ("BFlat", {}, 1.0),  # observed 1.0
        ("BIVF16", {"nprobe": 4}, 0.65),  # observed 0.702
        ("BHNSW32", {"ef_search": 64}, 0.98),  # observed 0.997
        ("BHash12x10", {"nflip": 2}, 0.8),  # observed 0.872
    ],
)
def test_recall_of_hamming_neighbours_on_offset_cones(factory, options, floor):
    data, encoder = cones(0, keys=1280), SimHash(128, centring=None)
    attn = compose(factory, encoder=encoder, **options)
    cache = attn.new_cache(1, 2, 32)
    cache.append(data.k, data.v)
    query = encoder.encode_query(data.q)
    distances = cache.search(query, 32)
    exact = FlatHamming().distances(cache.indexed.store, query).sort(-1).values[..., 31:32]
    found = ((distances[1] <= exact) & (distances[0] >= 0)).float().mean().item()
    assert found >= floor


def test_bad_parts_are_refused_when_they_are_built():
    for served_by_faiss in ("IDMap2,BHNSW32", "BFlat,IDMap", "BIVF0", "BHNSW32x"):
        message = raises_naming(ValueError, served_by_faiss, "BHNSW32")(lambda w=served_by_faiss: FaissBinary(w))
        assert "FAISS makes" not in str(message)
    for wrong in ("Flat", "BFlatt", "BIVF0", "BHNSW0", "BHNSW1", "BIVF4_HNSW1", "BHash", "", "PQ8", 7):
        raises_naming(ValueError, repr(wrong), "BHNSW32")(lambda w=wrong: FaissBinary(w))
    raises_naming(ValueError, "nprobe", "BHNSW16")(lambda: FaissBinary("BHNSW16", nprobe=3))
    raises_naming(ValueError, "ef_search", "0")(lambda: FaissBinary("BHNSW16", ef_search=0))
    raises_naming(ValueError, "device", "tpu")(lambda: FaissBinary(device="tpu"))
    raises_naming(ValueError, "BHash2x65", "130", "128")(lambda: compose("BHash2x65"))
    raises_naming(ValueError, "query_bits=1", "BHNSW16")(lambda: compose("BHNSW16", encoder=SimHash(query_bits=4)))
    raises_naming(ValueError, "TopK", "BHNSW16", "FlatHamming()")(
        lambda: compose("BHNSW16", TopK(k=3, per="kv_head", combine="vote"))
    )
    raises_naming(ValueError, "Threshold", "only searches")(lambda: compose("BIVF4", Threshold(5)))
    raises_naming(ValueError, "BIVF64", "2496", "1000", "BIVF25")(
        lambda: compose("BIVF64").new_cache(1, 1, 16, capacity=1000)
    )


def test_a_gpu_that_faiss_does_not_see_is_refused():
    if load_faiss().get_num_gpus():
        assert not FaissBinary("BFlat", device="cuda").scans
    else:
        raises_naming(ValueError, "cuda", "GPU", 'device="cpu"')(lambda: FaissBinary("BFlat", device="cuda"))


def test_what_faiss_cannot_do_on_a_gpu_is_refused_first():
    raises_naming(ValueError, "BHNSW32", "GPU")(lambda: FaissBinary("BHNSW32", device="cuda"))


def test_an_error_leaves_the_cache_as_it_was():
    attn = compose("BHNSW16")
    q, cache = filled(attn, 9)
    before = cache.search(attn.encoder.encode_query(q), 5)
    raises_naming(ValueError, "words")(lambda: cache.search(SimHash(64).encode_query(q), 5))
    raises_naming(ValueError, "length")(lambda: cache.crop(-1))
    raises_naming(TypeError, "only searches")(lambda: attn.index.distances(cache.indexed.store, q))
    assert all(torch.equal(a, b) for a, b in zip(cache.search(attn.encoder.encode_query(q), 5), before, strict=True))


def test_plans_say_what_is_native():
    shape = {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "keys": 1000}
    assert "crop native" in str(compose("BIVF16").explain(**shape))
    assert "crop rebuilt" in str(compose("BHNSW16").explain(**shape))
    assert "fitted to the first 624 keys" in str(compose("BIVF16").explain(**shape))


@pytest.mark.parametrize("index", [FaissBinary(), FaissBinary("BIVF64", nprobe=8), FaissBinary("BHash4x16", nflip=1)])
def test_the_text_of_an_index_makes_it_again(index):
    assert eval(repr(index)) == index
    assert np.isscalar(index.needed)


@pytest.mark.parametrize("query_bits", [1, 4])
@pytest.mark.parametrize("selector", [TopK(k=20, per="kv_head"), Sink(2) | Recent(5) | Tiers(0.1, 0.3, per="kv_head")])
def test_a_group_shares_the_nearest_of_what_its_heads_find(selector, query_bits):
    encoder = SimHash(96, query_bits=query_bits, centring=None)
    everything = MultiProbe(2, 3, 8)  # all buckets: every key is found
    attn = HashAttention(encoder, everything, selector, engine="reference")
    q, k, v = qkv(11, 2, 2, 3, tokens=3, keys=90)
    start = torch.tensor([0, 13])
    wide = attn.replace(selector=TopK(k=90, per="kv_head"))
    flat = wide.replace(index=FlatHamming())
    assert (wide(q, k, v, start=start) - flat(q, k, v, start=start)).abs().max() <= tolerance(
        q, k, v, visible_mask(3, 90, [0, 13])
    )
    cache = attn.new_cache(2, 2, 16)
    cache.append(k, v, start=start)
    chosen = attn.run(q, cache)[1]
    query = encoder.encode_query(q)
    view = cache.view(query, 6, cache.spans(3))
    pool = selected(view.find(chosen.ids.shape[-1])[0], 90, 6).unflatten(1, (2, 3)).any(2)
    total = FlatHamming().distances(cache.indexed.store, query).unflatten(1, (2, 3)).sum(2)
    own = selected(chosen.ids, 90, 2)
    if isinstance(selector, TopK):
        rank = (total.long() * 90 + 89 - torch.arange(90)).masked_fill(~pool, 10**9)
        wanted = torch.zeros_like(own).scatter_(-1, rank.argsort(-1)[..., :20], True)
        assert torch.equal(own, wanted)
    else:
        assert torch.equal(chosen.tier.bool() & (chosen.ids < 0), torch.zeros_like(chosen.ids, dtype=torch.bool))
        forced = replace(view, sinks=2, recents=5).forced
        assert own[forced.expand_as(own)].all()
        assert not (own & ~pool & ~forced).any()
