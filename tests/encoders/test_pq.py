import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import (
    ITQ,
    PQ,
    FlatDot,
    FlatHamming,
    FlatPQ,
    HashAttention,
    ModelFacts,
    PerLayer,
    SimHash,
    TopK,
    from_pretrained,
    save_pretrained,
)
from hashattn.ops.adc.reference import UNIT
from tests.structured import cones, heads, odd_lengths, qkv, raises_naming, seeds

EPS = torch.finfo(torch.float32).eps


def fitted(seed=0, dim=16, kv_heads=2, **options):
    options = {"subquantisers": 4, "sub_bits": 4, "iterations": 3} | options
    return PQ(**options).fit(None, qkv(seed, kv_heads=kv_heads, keys=100, dim=dim)[1])


@pytest.mark.parametrize("shared", [False, True])
@settings(deadline=None, max_examples=8)
@given(seed=seeds, shape=heads, keys=odd_lengths, m=st.sampled_from([1, 2, 8]))
def test_the_error_of_a_distance_is_bounded_by_the_quantisation_error(shared, seed, shape, keys, m):
    pq = fitted(seed % 7, kv_heads=shape[0], subquantisers=m, shared=shared)
    q, k, _ = qkv(seed, 2, *shape, tokens=2, keys=keys)
    codes = pq.encode_key(k)
    assert codes.dtype == torch.uint8
    assert codes.shape == (2, shape[0], keys, m)
    store = FlatPQ().new_store()
    store.add(codes)
    found = FlatPQ().distances(store, pq.encode_query(q)).double() / UNIT
    wide = k.double().repeat_interleave(shape[1], 1)
    lost = (k.double() - pq.decode(codes)).norm(dim=-1).repeat_interleave(shape[1], 1).unsqueeze(2)
    size = q.double().norm(dim=-1, keepdim=True)
    rounding = 16 * EPS * size * (wide.norm(dim=-1).unsqueeze(2) + lost)  # of float32 sums of D = 16 products
    rounding = rounding + m / 2 / UNIT  # and of a table's entry to whole units
    assert ((found + q.double() @ wide.transpose(-1, -2)).abs() <= size * lost + rounding).all()


def test_keys_are_given_the_nearest_centroids_of_their_head():
    pq, (_, k, _) = fitted(), qkv(1, batch=2, keys=70)
    for h in range(2):
        for j in range(4):
            part, book = k[:, h, :, 4 * j : 4 * j + 4].double(), pq.codebooks[h, j].double()
            far = torch.cdist(part, book)
            own = far.gather(-1, pq.encode_key(k)[:, h, :, j].long().unsqueeze(-1)).squeeze(-1)
            assert (own - far.min(-1).values <= 1e-3).all()


def test_more_subquantisers_lose_less_and_seeds_repeat():
    data = cones(1)
    lost = [
        (data.k - pq.decode(pq.encode_key(data.k))).square().mean().item()
        for pq in (PQ(m, sub_bits=6, iterations=5).fit(None, data.k) for m in (2, 8, 16))
    ]
    assert lost[0] > lost[1] > lost[2]
    twin = [PQ(4, sub_bits=4, iterations=3, seed=s).fit(None, data.k).codebooks for s in (0, 0, 1)]
    assert torch.equal(twin[0], twin[1])
    assert not torch.equal(twin[0], twin[2])


def test_chunks_crops_copies_and_states_change_nothing():
    pq, (q, k, v) = fitted(), qkv(3, batch=2, keys=65, tokens=3)
    attn = HashAttention(pq, FlatPQ(), TopK(k=9, per="kv_head"), engine="reference")
    start = torch.tensor([0, 5])
    expected = attn(q, k, v, start=start)
    cache = attn.new_cache(2, 2, 16)
    for first in range(0, 65, 13):
        cache.append(k[:, :, first : first + 13], v[:, :, first : first + 13], start=None if first else start)
        attn(q, cache)
    loaded, twin = attn.new_cache(2, 2, 16), copy.deepcopy(cache)
    loaded.load_state_dict(cache.state_dict())
    for each in (cache, loaded, twin):
        assert torch.equal(attn(q, each), expected)
    cache.crop(40)
    cache.append(k[:, :, 40:], v[:, :, 40:])
    cache.reorder(torch.tensor([1, 0]))
    assert torch.equal(attn(q.flip(0), cache), expected.flip(0))


def test_codes_of_another_fit_are_refused():
    attn, other = (HashAttention(fitted(s), FlatPQ(), TopK(k=9), engine="reference") for s in (0, 1))
    q, k, v = qkv(4)
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    attn(q, cache)
    raises_naming(ValueError, "codes", "encoder")(lambda: other.new_cache(1, 2, 16).load_state_dict(cache.state_dict()))


@pytest.mark.parametrize("shared", [False, True])
def test_saved_encoders_make_the_same_codes(tmp_path, shared):
    facts = ModelFacts("test", "llama", 3, (0, 1, 2), 4, 2, 16)
    layers = {i: fitted(i, shared=shared) for i in (1, 2)}
    save_pretrained(PerLayer(layers, facts), tmp_path / "pq", dtype="float32")
    loaded = from_pretrained(tmp_path / "pq").encoder
    assert loaded.code == "pq"
    q, k, _ = qkv(5)
    for i, pq in layers.items():
        assert torch.equal(loaded.layer(i).encode_key(k), pq.encode_key(k))
        assert torch.equal(loaded.layer(i).encode_query(q), pq.encode_query(q))
    HashAttention(loaded, FlatPQ(), TopK(k=3))


def test_bad_input_is_refused():
    _, k, _ = qkv(6, keys=200)
    attn = HashAttention(PQ(4), FlatPQ(), TopK(k=3), engine="reference")
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, k)
    raises_naming(RuntimeError, "PQ", "fit")(lambda: attn(qkv(6)[0], cache))
    assert (len(cache), cache.encoded) == (200, 0)
    raises_naming(ValueError, "256", "200", "sub_bits")(lambda: PQ(4).fit(None, k))
    raises_naming(ValueError, "5", "16", "4 would")(lambda: PQ(5).fit(None, k))
    raises_naming(ValueError, "subquantisers", "0")(lambda: PQ(0))
    raises_naming(ValueError, "sub_bits", "9")(lambda: PQ(4, sub_bits=9))
    raises_naming(ValueError, "FlatHamming", "PQ", "FlatPQ()")(lambda: attn.replace(index=FlatHamming()))
    raises_naming(ValueError, "FlatDot", "FlatPQ()")(lambda: attn.replace(index=FlatDot()))
    raises_naming(ValueError, "SimHash", "PQ(16)")(lambda: attn.replace(encoder=SimHash()))
    raises_naming(ValueError, "3 KV heads", "[3, 4, 16, 4]")(lambda: fitted().check_model(3, 3, 16))
    raises_naming(ValueError, "one kind")(lambda: PerLayer([PQ(16, sub_bits=8), ITQ(128)]))
