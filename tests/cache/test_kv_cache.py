import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import (
    AsymmetricHash,
    Centring,
    ExactAttend,
    FlatDot,
    FlatHamming,
    HashAttention,
    Identity,
    KVCache,
    MixedPrecision,
    SimHash,
    SymmetricHash,
    Tiers,
    TopK,
)
from hashattn.core.attention_sums import NEVER
from hashattn.encoders.simhash import orthogonal_planes
from hashattn.ops import hamming
from tests.structured import generator, poison, qkv, raises_naming, seeds

WARM = SimHash(65, centring=Centring(1.0, 6, 2))  # a row is short below 8 keys
PLAIN = SimHash(65, centring=None)


def make(encoder=WARM, capacity=None, batch=2, norms=True):
    return KVCache(batch, 2, 16, encoder=encoder, index=FlatHamming(), norms=norms, capacity=capacity)


def filled(cache, seed=0, keys=20, start=None):
    _, k, v = qkv(seed, cache.batch, keys=keys)
    cache.append(k + 2, v, start=start)
    return cache


def clear_bits(cache):
    """bool [B, H, N, bits]: bits whose projection is not within rounding of zero."""
    centred = cache.keys.double() - cache.centre.double().unsqueeze(2)
    projection = centred @ orthogonal_planes(16, 65, 0, torch.device("cpu")).double()
    return projection.abs() > 1e-5 * cache.keys.double().norm(dim=-1, keepdim=True)


def snapshot(cache):
    """Everything that can be seen of a cache."""
    held = {"n": len(cache), "batch": cache.batch, "start": cache.start.tolist(), "encoded": cache.encoded}
    held |= {"ready": cache.ready, "capacity": cache.capacity}
    if len(cache):
        held |= {"keys": cache.keys.clone(), "values": cache.values.clone()}
        held |= {"codes": cache.indexed.store.codes.clone()} if cache.encoded else {}
        held |= {"norms": cache.indexed.norms.view.clone()} if cache.encoded and cache.with_norms else {}
        held |= {"centre": cache.centres.frozen.clone()} if cache.centres.frozen is not None else {}
    return held


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[n], b[n]) if isinstance(a[n], torch.Tensor) else a[n] == b[n] for n in a
    )


def check_against_fresh(cache, keys, values, starts):
    """The cache holds these rows (lists of [H, N, D]), and is what a fresh cache of them would be."""
    assert cache.batch == len(keys)
    assert cache.start.tolist() == starts
    if len(cache) == 0:
        assert keys[0].shape[1] == 0
        return
    assert torch.equal(cache.keys, torch.stack(keys))
    assert torch.equal(cache.values, torch.stack(values))
    fresh = make(cache.encoder, batch=len(keys))
    fresh.append(torch.stack(keys), torch.stack(values))
    fresh._starts = list(starts)  # a crop may leave a row that begins beyond the columns there are
    cache.encode()
    fresh.encode()
    assert cache.ready == fresh.ready
    assert cache.encoded == fresh.encoded == (len(cache) if any(cache.ready) else 0)
    assert torch.allclose(cache.centre, fresh.centre, rtol=0, atol=1e-5)
    if cache.encoded:
        expected = cache.encoder.encode_key(cache.keys[:, :, : cache.encoded], cache.centre)
        clear = clear_bits(cache)
        for codes in (expected, fresh.codes):
            assert torch.equal(hamming.unpack_bits(cache.codes, 65) & clear, hamming.unpack_bits(codes, 65) & clear)
        norms = (cache.keys.double() - cache.centre.double().unsqueeze(2)).norm(dim=-1, keepdim=True)
        assert (cache.norms - norms).abs().max() <= norms.max() * torch.finfo(torch.bfloat16).eps


OPS = ("append", "crop", "reorder", "repeat", "select", "reset", "copy", "state", "encode", "start")


@settings(deadline=None, max_examples=60)
@given(seeds, st.sampled_from([WARM, PLAIN]), st.sampled_from([None, 400]), st.data())
def test_codes_follow_the_keys_through_any_list_of_operations(seed, encoder, capacity, data):
    g = generator(seed)
    cache = make(encoder, capacity)
    keys, values, starts = [torch.zeros(2, 0, 16)] * 2, [torch.zeros(2, 0, 16)] * 2, [0, 0]
    for op in data.draw(st.lists(st.sampled_from(OPS), min_size=1, max_size=10)):
        n, batch = len(cache), cache.batch
        if op == "append" or (n == 0 and op in ("copy", "state", "start")):
            more = data.draw(st.integers(1, 12))
            k, v = torch.randn(2, batch, 2, more, 16, generator=g).unbind(0)
            if n == 0 and data.draw(st.booleans()):
                starts = [data.draw(st.integers(0, more)) for _ in range(batch)]
                cache.append(k + 2, v, start=torch.tensor(starts))
                hidden = torch.arange(more) < torch.tensor(starts)[:, None]  # padding is kept as zeros
                k = k.masked_fill(hidden[:, None, :, None], -2)
                v = v.masked_fill(hidden[:, None, :, None], 0)
            else:
                cache.append(k + 2, v)
            keys = [torch.cat(x, 1) for x in zip(keys, k + 2, strict=True)]
            values = [torch.cat(x, 1) for x in zip(values, v, strict=True)]
        elif op == "crop":
            length = data.draw(st.integers(min(n, max(starts)), n))
            cache.crop(length)
            keys, values = [x[:, :length] for x in keys], [x[:, :length] for x in values]
        elif op in ("reorder", "select", "repeat"):
            size = batch if op == "reorder" else data.draw(st.integers(1, 3))
            rows = [data.draw(st.integers(0, batch - 1)) for _ in range(size)]
            if op == "repeat":
                if batch > 3:
                    continue
                cache.repeat(2)
                rows = [b for b in range(batch) for _ in range(2)]
            else:
                (cache.reorder if op == "reorder" else cache.select_rows)(torch.tensor(rows))
            keys, values, starts = ([x[r] for r in rows] for x in (keys, values, starts))
        elif op == "reset":
            cache.reset()
            keys, values = [x[:, :0] for x in keys], [x[:, :0] for x in values]
            starts = [0] * batch
        elif op == "copy":
            original, cache = cache, copy.deepcopy(cache)
            original.keys.fill_(torch.nan)
            original.values.fill_(torch.nan)
            original.reset()
        elif op == "state":
            held = io.BytesIO()
            torch.save(cache.state_dict(), held)
            held.seek(0)
            cache = make(encoder, capacity, batch)
            cache.load_state_dict(torch.load(held, weights_only=True))
        elif op == "start":
            starts = [data.draw(st.integers(0, n)) for _ in range(batch)]
            cache.set_start(torch.tensor(starts))
        elif op == "encode":
            cache.encode()
    check_against_fresh(cache, keys, values, starts)


@settings(deadline=None, max_examples=25)
@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=8), st.booleans(), st.sampled_from([WARM, PLAIN]))
def test_appending_in_chunks_equals_appending_at_once(seed, chunks, encode_between, encoder):
    _, k, v = qkv(seed, 2, keys=sum(chunks))
    start = torch.tensor([0, min(3, chunks[0])])
    whole, parts = make(encoder), make(encoder)
    whole.append(k, v, start=start)
    for i, (a, b) in enumerate(zip(k.split(chunks, 2), v.split(chunks, 2), strict=True)):
        parts.append(a, b, start=start if i == 0 else None)
        if encode_between:
            parts.encode()
    check_against_fresh(parts, [*whole.keys], [*whole.values], start.tolist())


def test_a_crop_below_the_warm_up_discards_the_centre():
    cache = filled(make(), 0)
    old = cache.centre.clone()
    cache.crop(7)
    assert cache.ready == [False, False]
    assert cache.encoded == 0
    assert (cache.centre == 0).all()
    raises_naming(ValueError, "rows [0, 1]", "8")(lambda: cache.search(WARM.encode_query(torch.ones(2, 2, 1, 16)), 1))
    filled(cache, 1)
    fresh = make()
    fresh.append(cache.keys, cache.values)
    assert torch.equal(cache.codes, fresh.codes)
    assert torch.equal(cache.centre, fresh.centre)
    assert not torch.equal(cache.centre, old)


def test_a_crop_above_the_warm_up_keeps_the_centre():
    cache = filled(make(), 0)
    old, codes = cache.centre.clone(), cache.codes.clone()
    cache.crop(8)
    filled(cache, 1)
    assert torch.equal(cache.centre, old)
    assert torch.equal(cache.codes[:, :, :8], codes[:, :, :8])


def test_the_centre_is_the_mean_of_the_first_visible_keys_after_the_skipped_ones():
    cache = filled(make(), 0, start=torch.tensor([0, 5]))
    assert torch.allclose(cache.centre[0], cache.keys[0, :, 2:8].mean(1), atol=1e-6)
    assert torch.allclose(cache.centre[1], cache.keys[1, :, 7:13].mean(1), atol=1e-6)
    before = cache.centre.clone()
    filled(cache, 1, 200)
    assert torch.equal(cache.centre, before)


def test_a_row_that_becomes_long_enough_gets_its_centre_then():
    cache = filled(make(), 0, keys=9, start=torch.tensor([0, 4]))
    assert cache.ready == [True, False]
    cache.encode()
    assert (cache.centre[1] == 0).all()
    first = cache.centre[0].clone()
    filled(cache, 1, 4)
    assert cache.ready == [True, True]
    assert torch.equal(cache.centre[0], first)
    check_against_fresh(cache, [*cache.keys], [*cache.values], [0, 4])


@pytest.mark.parametrize("capacity", [None, 300])
def test_spare_capacity_is_never_read(capacity):
    q, k, v = qkv(0, 2, keys=30)
    for selector in (TopK(share=0.5), Tiers(0.2, 0.9), TopK(share=0.5, per="kv_head", combine="union")):
        attn = HashAttention(WARM, FlatHamming(), selector, MixedPrecision(), engine="reference")
        cache = attn.new_cache(2, 2, 16, capacity=capacity)
        start = torch.tensor([0, 15])
        cache.append(poison(k, start), poison(v, start), start=start)
        clean = attn(q, cache)
        assert clean.isfinite().all()
        for buffer in (cache.kv.keys, cache.kv.values, cache.indexed.norms):
            assert buffer.storage.shape[2] > 30
            buffer.storage[:, :, 30:] = torch.nan
        cache.indexed.store._codes.storage[:, :, 30:] = -1
        assert torch.equal(attn(q, cache), clean)


def test_a_fixed_capacity_is_allocated_once_and_never_exceeded():
    cache = filled(make(capacity=30))
    pointer, before = cache.keys.data_ptr(), snapshot(cache)
    raises_naming(ValueError, "11 columns", "10 of capacity 30")(lambda: filled(cache, 1, 11))
    assert equal(snapshot(cache), before)
    filled(cache, 1, 10)
    assert cache.keys.data_ptr() == pointer


def test_deepcopies_share_nothing_that_changes():
    cache = filled(make(), 0)
    cache.encode()
    before = snapshot(cache)
    twin = copy.deepcopy(cache)
    filled(twin, 1)
    twin.keys.zero_()
    twin.crop(3)
    assert equal(snapshot(cache), before)
    assert twin.encoder is cache.encoder


def test_a_crop_below_the_start_can_be_saved_and_loaded():
    cache = filled(make(PLAIN), 0, start=torch.tensor([0, 9]))
    cache.encode()
    cache.crop(5)
    twin = make(PLAIN)
    twin.load_state_dict(cache.state_dict())
    assert twin.start.tolist() == [0, 9]
    assert (twin.longest, twin.shortest) == (5, 0)


def test_a_state_whose_bits_lie_within_rounding_of_zero_can_be_loaded():
    plane = orthogonal_planes(16, 65, 0, torch.device("cpu"))[:, :64]
    g = generator(0)
    k = torch.randn(1, 2, 300, 16, generator=g)
    for i in range(300):  # every key lies on a plane, up to rounding
        own = plane[:, i % 64]
        k[:, :, i] -= (k[:, :, i] @ own)[..., None] * own / own.square().sum()
    for first in range(60):
        cache = make(PLAIN, batch=1)
        cache.append(k[:, :, first:], k[:, :, first:])
        cache.encode()
        make(PLAIN, batch=1).load_state_dict(cache.state_dict())


def test_an_encoder_fitted_after_the_cache_was_made_serves_it():
    q, k, v = qkv(0, tokens=4, keys=40)
    encoder = AsymmetricHash(64, query_hidden=(8,), centring=Centring(1.0, 6))
    attn = HashAttention(encoder, FlatHamming(), Tiers(0.2, 0.9), MixedPrecision(), engine="reference")
    cache = attn.new_cache(1, 2, 16)
    encoder.fit(q, k, steps=2, queries=2)
    cache.append(k, v)
    assert torch.equal(attn(q, cache), attn(q, k, v))


def test_codes_of_an_encoder_fitted_meanwhile_are_not_stale():
    q, k, v = qkv(1, tokens=4, keys=40)
    encoder = SymmetricHash(64).fit(q, k, steps=2, queries=2)
    attn = HashAttention(encoder, FlatHamming(), TopK(k=5), engine="reference")
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    cache.encode()
    encoder.fit(q, k, steps=8, queries=4)
    assert torch.equal(cache.codes, encoder.encode_key(k))


# ---- search


@pytest.mark.parametrize("start", [[0, 0], [0, 7], [7, 7]])
def test_search_returns_the_documented_shape_and_empty_slots(start):
    cache = filled(make(PLAIN), 0, start=torch.tensor(start))
    query = PLAIN.encode_query(qkv(1, 2, tokens=3)[0])
    for k in (1, 15, 20, 99):
        ids, distances = cache.search(query, k)
        assert ids.shape == distances.shape == (2, 4, 3, min(k, 20))
        assert (ids.dtype, distances.dtype) == (torch.int32, torch.int32)
        assert ((ids >= 0).sum(-1) == (20 - torch.tensor(start)).clamp(max=k)[:, None, None]).all()
        assert (distances[ids >= 0] >= 0).all()


def test_search_by_inner_product_finds_the_largest():
    cache = KVCache(1, 2, 16, encoder=Identity(), index=FlatDot())
    q, k, v = qkv(0, keys=40)
    cache.append(k, v)
    ids, distances = cache.search(q, 5)
    best = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).topk(5, -1)
    assert torch.equal(ids.long(), best.indices)
    assert torch.allclose(distances, -best.values, atol=1e-5)


def test_bad_searches_are_refused():
    query = PLAIN.encode_query(torch.ones(2, 2, 1, 16))
    raises_naming(ValueError, "empty")(lambda: make(PLAIN).search(query, 1))
    cache = filled(make(PLAIN))
    raises_naming(ValueError, "k", "0")(lambda: cache.search(query, 0))
    plain = KVCache(2, 2, 16)
    filled(plain)
    raises_naming(TypeError, "no index")(lambda: plain.search(query, 1))


def test_a_query_of_another_code_length_is_refused():
    cache = filled(make(PLAIN))
    query = SimHash(128, centring=None).encode_query(torch.ones(2, 2, 1, 16))
    for length in (query[..., :1], torch.cat([query, query], -1)):  # W is 2 here
        raises_naming((ValueError, TypeError), "words")(lambda q=length: cache.search(q, 1))


# ---- what is refused leaves everything as it was


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("error", "call", "words"),
    [
        (ValueError, lambda c: c.append(ones(2, 2, 1, 8), ones(2, 2, 1, 8)), ["k", "[2, 2, 1, 8]", "16"]),
        (ValueError, lambda c: c.append(ones(1, 2, 1, 16), ones(1, 2, 1, 16)), ["k", "[1, 2, 1, 16]"]),
        (ValueError, lambda c: c.append(ones(2, 4, 1, 16), ones(2, 4, 1, 16)), ["k", "[2, 4, 1, 16]"]),
        (ValueError, lambda c: c.append(ones(2, 2, 1, 16), ones(2, 2, 2, 16)), ["k and v", "[2, 2, 2, 16]"]),
        (ValueError, lambda c: c.append(ones(2, 2, 1, 16), ones(2, 2, 16)), ["v", "[2, 2, 16]"]),
        (ValueError, lambda c: c.append(ones(2, 2, 0, 16), ones(2, 2, 0, 16)), ["k and v", "0"]),
        (TypeError, lambda c: c.append([1.0], ones(2, 2, 1, 16)), ["k", "list"]),
        (TypeError, lambda c: c.append(ones(2, 2, 1, 16), ones(2, 2, 1, 16).half()), ["k and v", "float16"]),
        (TypeError, lambda c: c.append(ones(2, 2, 1, 16).long(), ones(2, 2, 1, 16).long()), ["k", "int64"]),
        (TypeError, lambda c: c.append(ones(2, 2, 1, 16).half(), ones(2, 2, 1, 16).half()), ["k", "float16"]),
        (
            ValueError,
            lambda c: c.append(ones(2, 2, 1, 16), ones(2, 2, 1, 16), start=torch.tensor([0, 0])),
            ["start", "first append"],
        ),
        (ValueError, lambda c: c.crop(21), ["length", "21", "20"]),
        (ValueError, lambda c: c.crop(-1), ["length", "-1"]),
        (ValueError, lambda c: c.select_rows(torch.tensor([2])), ["rows", "[2]"]),
        (ValueError, lambda c: c.select_rows(torch.tensor([-1])), ["rows", "[-1]"]),
        (ValueError, lambda c: c.select_rows(torch.tensor([], dtype=torch.int64)), ["rows", "[]"]),
        (ValueError, lambda c: c.reorder(torch.tensor([0])), ["rows", "(1,)"]),
        (ValueError, lambda c: c.repeat(0), ["times", "0"]),
        (ValueError, lambda c: c.set_start(torch.tensor([0, 21])), ["start", "21"]),
        (ValueError, lambda c: c.set_start(torch.tensor([0, -1])), ["start", "-1"]),
        (ValueError, lambda c: c.set_start(torch.tensor([0])), ["start", "(2,)"]),
        (ValueError, lambda c: c.set_start(torch.tensor([0.0, 1.0])), ["start", "1."]),
        (ValueError, lambda c: c.set_start([0, 1]), ["start", "[0, 1]"]),
    ],
)
def test_a_refused_change_leaves_the_cache_as_it_was(error, call, words):
    cache = filled(make())
    cache.encode()
    before = snapshot(cache)
    raises_naming(error, *words)(lambda: call(cache))
    assert equal(snapshot(cache), before)


def test_a_bad_first_append_leaves_the_cache_empty():
    cache = make()
    k = ones(2, 2, 5, 16)
    raises_naming(ValueError, "start", "6")(lambda: cache.append(k, k, start=torch.tensor([0, 6])))
    assert len(cache) == 0
    assert cache.start.tolist() == [0, 0]


LOOKS = {
    "keys": lambda cache: cache.keys,
    "values": lambda cache: cache.values,
    "allocated": lambda cache: cache.allocated,
    "codes": lambda cache: cache.codes,
    "gather": lambda cache: cache.gather("values", torch.full((2, 2, 1, 1), 21, dtype=torch.int32)),
    "append": lambda cache: filled(cache, 1),
    "expect": lambda cache: cache.expect(ones(2, 2, 1, 16), ones(2, 2, 1, 16)),
    "crop": lambda cache: cache.crop(len(cache) - 1),
    "reorder": lambda cache: cache.reorder([1, 0]),
    "repeat": lambda cache: cache.repeat(2),
    "adopt": lambda cache: cache.adopt(len(cache), codes=False),
    "clear_unseen": lambda cache: cache.clear_unseen(),
    "set_start": lambda cache: cache.set_start(torch.tensor([1, 0])),
    "state_dict": lambda cache: cache.load_state_dict(cache.state_dict()),
    "settle": lambda cache: cache.settle(),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_at_keys_that_are_expected_finds_them(look):
    found, expected = (filled(make(), 8) for _ in range(2))
    k, v = 3 * ones(2, 2, 2, 16), 4 * ones(2, 2, 2, 16)
    found.expect(k, v)
    expected.append(k, v)
    assert len(found) == len(expected) and found.kv.coming is not None
    for cache in (found, expected):
        LOOKS[look](cache)
    assert equal(snapshot(found), snapshot(expected))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_have_keys_that_are_expected(twin):
    found, expected = (filled(make(), 8) for _ in range(2))
    found.expect(3 * ones(2, 2, 2, 16), ones(2, 2, 2, 16))
    expected.append(3 * ones(2, 2, 2, 16), ones(2, 2, 2, 16))
    assert equal(snapshot(twin(found)), snapshot(expected)) and equal(snapshot(found), snapshot(expected))


def test_running_out_of_memory_for_the_values_forgets_the_keys(monkeypatch):
    cache = filled(make())
    before = snapshot(cache)
    monkeypatch.setattr(cache.kv.values, "append", lambda rows: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        filled(cache, 1)
    assert equal(snapshot(cache), before)


@pytest.mark.parametrize("name", ["batch", "kv_heads", "head_dim", "capacity"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2"])
def test_bad_sizes_are_refused_by_name(name, value):
    sizes = {"batch": 1, "kv_heads": 1, "head_dim": 8, "capacity": 10} | {name: value}
    raises_naming(ValueError, name, repr(value))(lambda: KVCache(**sizes))


def test_an_empty_cache_says_so():
    cache = make()
    for read in (lambda: cache.keys, lambda: cache.values, cache.state_dict):
        raises_naming(ValueError, "empty")(read)
    attn = HashAttention(WARM, FlatHamming(), TopK(k=3), engine="reference")
    raises_naming(ValueError, "empty")(lambda: attn(ones(2, 4, 1, 16), attn.new_cache(2, 2, 16)))
    assert len(cache) == cache.longest == cache.shortest == cache.nbytes == 0


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (SimHash(65, centring=None, seed=1), ["encoder"]),
        (SimHash(130, centring=None), ["codes"]),
        (None, ["no index"]),
    ],
)
def test_a_state_of_another_composition_is_refused(other, words):
    state = filled(make(PLAIN, norms=False))
    state.encode()
    state = state.state_dict()
    index = None if other is None else FlatHamming()
    cache = KVCache(2, 2, 16, encoder=other, index=index)
    filled(cache, 5)
    before = snapshot(cache)
    raises_naming(ValueError, *words)(lambda: cache.load_state_dict(state))
    assert equal(snapshot(cache), before)


def test_a_state_without_the_norms_that_are_needed_is_refused():
    state = filled(make(PLAIN, norms=False))
    state.encode()
    raises_naming(ValueError, "norms")(lambda: make(PLAIN).load_state_dict(state.state_dict()))
    raises_naming(ValueError, "start", "[3]")(
        lambda: make(PLAIN, batch=3).load_state_dict(filled(make(PLAIN)).state_dict())
    )


def test_nbytes_counts_every_allocation():
    cache = filled(make(capacity=50))
    cache.encode()
    row, codes, norms, centre = 2 * 2 * 50 * 16 * 4, 2 * 2 * 50 * 2 * 8, 2 * 2 * 50 * 2, 2 * 2 * 16 * 4
    assert cache.code_nbytes == codes + norms + centre
    assert cache.nbytes == 2 * row + codes + norms + centre
    assert "keys=20" in repr(cache)


def test_without_norms_none_are_kept():
    cache = filled(make(norms=False))
    cache.encode()
    assert cache.indexed.norms.empty
    assert HashAttention(WARM, FlatHamming(), TopK(k=1), ExactAttend()).new_cache(1, 1, 8).with_norms is False


def test_a_state_with_keys_that_are_not_yet_encoded_loads():
    cache = filled(make())
    cache.encode()
    filled(cache, seed=1, keys=1)
    assert cache.encoded == 20
    fresh = make()
    fresh.load_state_dict(cache.state_dict())
    assert fresh.encoded == 20
    assert torch.equal(fresh.codes, cache.codes)


def test_the_room_of_a_fixed_capacity_is_zeros_also_after_rows_were_picked():
    cache = filled(make(capacity=30))
    cache.reorder(torch.tensor([1, 0]))
    for storage in cache.allocated:
        assert storage.shape[2] == 30
        assert not storage[:, :, 20:].any()


def test_a_forgotten_code_is_made_again():
    attn = HashAttention(SimHash(64, centring=None), FlatHamming(), TopK(k=3), engine="reference")
    _, k, v = qkv(0, keys=65)
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    codes = cache.codes.clone()
    cache.forget_code()
    assert cache.encoded == 64
    assert torch.equal(cache.codes, codes)


# ---- arguments that count, masks and lists of rows


@pytest.mark.parametrize("wrong", [3.5, 3.0, True, torch.tensor(True), "3", None, [3]])
def test_only_integers_crop_and_repeat(wrong):
    cache = filled(make())
    before = snapshot(cache)
    for change in (cache.crop, cache.repeat):
        raises_naming(TypeError, repr(wrong))(lambda c=change: c(wrong))
    raises_naming(TypeError, "k", repr(wrong))(lambda: cache.search(WARM.encode_query(ones(2, 2, 1, 16)), wrong))
    assert equal(snapshot(cache), before)
    cache.crop(torch.tensor(12))
    assert len(cache) == 12


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([1, 1, 0], [1, 1, 0]),
        ((1,), [1]),
        (torch.tensor([True, False]), [0]),
        ([False, True], [1]),
        (torch.tensor([1], dtype=torch.uint8), [1]),
        (range(2), [0, 1]),
    ],
)
def test_rows_are_numbers_or_a_mask_as_in_indexing(rows, expected):
    cache = filled(make())
    keys = cache.keys.clone()
    cache.select_rows(rows)
    assert torch.equal(cache.keys, keys[expected])


@pytest.mark.parametrize(
    ("error", "rows"),
    [
        (ValueError, torch.tensor([True])),
        (ValueError, [True, False, True]),
        (ValueError, torch.tensor([False, False])),
        (ValueError, []),
        (ValueError, [[0, 1]]),
        (ValueError, torch.tensor(0)),
        (TypeError, [0.0, 1.0]),
        (TypeError, torch.tensor([1.0])),
    ],
)
def test_other_rows_are_refused(error, rows):
    cache = filled(make())
    before = snapshot(cache)
    raises_naming(error, "rows")(lambda: cache.select_rows(rows))
    raises_naming((TypeError, ValueError), "rows")(lambda: cache.reorder(rows))
    raises_naming(TypeError, "mask")(lambda: cache.reorder(torch.tensor([True, False])))
    assert equal(snapshot(cache), before)


# ---- states


def never(*shape):
    return torch.full(shape, NEVER, dtype=torch.int32)


def votes(*shape):
    return {"votes": torch.ones(shape), "votes_left_out": never(*shape)}


def queries(at=(3, 4), **changes):
    columns = torch.tensor([[*at], [20] * len(at), [0] * len(at)])
    found = {"votes_queries": torch.ones(2, 2, len(at), 16), "votes_columns": columns}
    return found | {"votes_known": 0, "votes_wanted": 2, "votes_scale": 0.25} | changes


def damaged(**fields):
    return lambda state: state | {name: make(state) if callable(make) else make for name, make in fields.items()}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: [*s.items()], ["state", "list"]),
        (lambda s: {n: x for n, x in s.items() if n != "values"}, ["values"]),
        (lambda s: {n: x for n, x in s.items() if n != "start"}, ["start"]),
        (lambda s: {n: x for n, x in s.items() if n != "ready"}, ["ready"]),
        (lambda s: {n: x for n, x in s.items() if n != "norms"}, ["norms"]),
        (lambda s: {n: x for n, x in s.items() if n != "centre"}, ["centre"]),
        (lambda s: {n: x for n, x in s.items() if n != "codes"}, ["norms", "codes"]),
        (damaged(other=1), ["other"]),
        (damaged(keys=lambda s: s["keys"][:, :1]), ["k", "[2, 1, 20, 16]"]),
        (damaged(keys=lambda s: s["keys"][0]), ["keys", "[2, 20, 16]"]),
        (damaged(keys=lambda s: s["keys"].long()), ["k", "int64"]),
        (damaged(keys=lambda s: s["keys"].tolist()), ["keys", "list"]),
        (damaged(values=lambda s: s["values"].half()), ["v", "float16"]),
        (damaged(values=lambda s: s["values"][:, :, :5]), ["[2, 2, 5, 16]"]),
        (damaged(start=lambda s: s["start"][:1]), ["start", "[1]"]),
        (damaged(start=lambda s: s["start"].float()), ["start", "float32"]),
        (damaged(start=torch.tensor([0, -1])), ["start", "-1"]),
        (damaged(start=torch.tensor([0, 2**40])), ["start", str(2**40)]),
        (damaged(start=torch.tensor([0, 15])), ["ready", "row 1", "8"]),
        (damaged(ready=lambda s: s["ready"].long()), ["ready", "int64"]),
        (damaged(ready=lambda s: s["ready"][:1]), ["ready", "[1]"]),
        (damaged(centre=lambda s: s["centre"][:1]), ["centre", "[1, 2, 16]"]),
        (damaged(centre=lambda s: s["centre"].double()), ["centre", "float64"]),
        (damaged(codes=lambda s: torch.cat([s["codes"]] * 2, 2)), ["codes", "[2, 2, 40, 2]"]),
        (damaged(codes=lambda s: s["codes"][:, :, :0]), ["codes", "[2, 2, 0, 2]"]),
        (damaged(codes=lambda s: s["codes"][0]), ["codes", "[2, 20, 2]"]),
        (damaged(codes=lambda s: ~s["codes"]), ["codes"]),
        (damaged(codes=lambda s: s["codes"].int()), ["codes", "int32"]),
        (damaged(norms=lambda s: s["norms"][:, :, :5]), ["norms", "[2, 2, 5, 1]", "[2, 2, 20, 1]"]),
        (damaged(norms=lambda s: s["norms"].double()), ["norms", "float64"]),
        (damaged(**votes(2, 2, 30)), ["votes", "[2, 2, 30]"]),
        (damaged(**votes(2, 1, 20)), ["votes", "[2, 1, 20]"]),
        (damaged(votes=ones(2, 2, 20) * torch.nan, votes_left_out=never(2, 2, 20)), ["votes", "NaN"]),
        (damaged(votes=ones(2, 2, 20)), ["votes_left_out"]),
        (damaged(votes=ones(2, 2, 20), votes_left_out=never(2, 2, 10)), ["votes_left_out", "[2, 2, 10]"]),
        (damaged(votes_prompts=torch.tensor([[0, 21, -1]])), ["votes_prompts", "20"]),
        (damaged(votes_marks=torch.tensor([[0], [20]]), votes_at_marks=ones(2, 2, 19)), ["votes_at_marks", "19"]),
        (damaged(**queries(at=[3, 2])), ["votes_columns", "[3, 2]"]),
        (damaged(**queries(votes_known=-1)), ["votes_known", "-1"]),
        (damaged(votes_most=3), ["votes_most"]),
    ],
)
def test_a_damaged_state_is_refused_before_anything_changes(damage, words):
    state = filled(make())
    state.encode()
    cache = filled(make(), 5)
    cache.encode()
    before = snapshot(cache)
    wrong = damage(state.state_dict())
    raises_naming((TypeError, ValueError), *words)(lambda: cache.load_state_dict(wrong))
    assert equal(snapshot(cache), before)
    cache.load_state_dict(state.state_dict())
    assert equal(snapshot(cache), snapshot(state))


def test_a_state_of_float16_norms_loads():
    cache = filled(make())
    cache.encode()
    state = cache.state_dict()
    twin = make()
    twin.load_state_dict(state | {"norms": state["norms"].half()})
    assert torch.equal(twin.norms, cache.norms)


def test_a_state_saved_after_the_encoder_was_fitted_loads():
    q, k, v = qkv(0, tokens=4, keys=80)
    encoder = AsymmetricHash(64, query_hidden=(8,), centring=Centring(1.0, 6))
    attn = HashAttention(encoder, FlatHamming(), TopK(k=3), engine="reference")
    cache, twin = attn.new_cache(1, 2, 16), attn.new_cache(1, 2, 16)
    cache.append(k, v)
    with pytest.warns(UserWarning, match="not fitted"):
        cache.encode()
    encoder.fit(q, k, steps=2, queries=2)
    twin.load_state_dict(cache.state_dict())
    assert torch.equal(twin.codes, cache.codes)
