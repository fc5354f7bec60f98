import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import FlatDot, HashAttention, Identity, Pages, Recent, SimHash, Sink, TopK
from hashattn.ops.bounds.reference import UNIT
from tests.structured import heads, odd_lengths, poison, qkv, raises_naming, seeds, visible_mask

EPS = torch.finfo(torch.float32).eps


def compose(page=16, selector=None, **options):
    return HashAttention(Identity(), Pages(page), selector or TopK(k=12), engine="reference", **options)


def filled(attn, k, v, start=None):
    cache = attn.new_cache(*k.shape[:2], k.shape[3])
    cache.append(k, v, start=start)
    return cache


def distances(cache, q):
    return cache.view(q, q.shape[1], cache.spans(q.shape[2])).raw


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds, shape=heads, keys=odd_lengths, page=st.sampled_from([1, 3, 16, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_the_bound_is_never_below_a_product_and_is_that_of_the_page(seed, shape, keys, page, dtype):
    q, k, v = qkv(seed, 2, *shape, tokens=2, keys=keys, dtype=dtype)
    start = [0, keys // 3]
    cache = filled(compose(page), k, v, torch.tensor(start))
    found = -distances(cache, q).double() / UNIT
    wide = k.double().repeat_interleave(shape[1], 1)
    exact = q.double() @ wide.transpose(-1, -2)
    # a float32 sum of 2 D = 32 products errs by at most 32 eps |q|_1 max|k|
    rounding = 32 * EPS * q.double().abs().sum(-1, keepdim=True) * k.abs().max()
    seen = visible_mask(2, keys, start, causal=False).expand_as(exact)
    assert (found >= exact - rounding)[seen].all()
    for b, first in enumerate(start):  # Quest's formula, page by page
        for p in range(first, keys, page):
            held = wide[b, :, p : p + page]
            low, high = held.amin(1).unsqueeze(1), held.amax(1).unsqueeze(1)
            bound = torch.maximum(q[b].double() * low, q[b].double() * high).sum(-1, keepdim=True)
            off = found[b, :, :, p : p + page] - bound
            assert (off >= -rounding[b]).all()
            assert (off <= rounding[b] + 1 / UNIT).all()


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds, page=st.sampled_from([1, 4, 16]), first=st.integers(0, 20),
    sizes=st.lists(st.integers(1, 40), max_size=4), crops=st.lists(st.integers(0, 60), max_size=4),
    look=st.booleans(), capacity=st.sampled_from([None, 240]),
)  # fmt: skip
def test_appends_crops_and_reorders_end_where_a_fresh_cache_does(seed, page, first, sizes, crops, look, capacity):
    attn = compose(page)
    cache = attn.new_cache(2, 2, 16, capacity=capacity)
    q, k, v = qkv(seed, 2, keys=30)
    cache.append(k, v, start=torch.tensor([0, first]))
    for i, size in enumerate(sizes):
        if look:
            cache.encode()
        if i < len(crops):
            cache.crop(min(len(cache), crops[i]))
        _, k, v = qkv(seed + i + 1, 2, keys=size)
        cache.append(k, v)
        cache.reorder(torch.tensor([1, i % 2]))
    fresh = attn.new_cache(2, 2, 16)
    fresh.append(cache.keys, cache.values)
    fresh._starts = list(cache._starts)
    cache.encode()
    fresh.encode()
    seen = torch.arange(len(cache)) >= cache.start[:, None]
    mask = seen[:, None, None].expand(2, 4, 1, -1)
    assert torch.equal(distances(cache, q)[mask], distances(fresh, q)[mask])


def test_two_crops_in_a_row_forget_all_that_they_cut():
    attn = compose(16)
    q, k, v = qkv(7, 2, keys=40)
    cache = filled(attn, k, v, torch.tensor([0, 5]))
    cache.encode()
    for length in (36, 25):  # the first forgets columns 21 on of row 1, but only 32 on of row 0
        cache.crop(length)
    _, other, _ = qkv(8, 2, keys=15)
    cache.append(other * 0.1, other)
    assert torch.equal(attn(q, cache), attn(q, cache.keys, cache.values, start=torch.tensor([0, 5])))
    cache.encode()
    fresh = filled(attn, cache.keys, cache.values, torch.tensor([0, 5]))
    assert torch.equal(distances(cache, q)[0], distances(fresh, q)[0])


def test_padding_changes_nothing():
    attn = compose(8, Sink(2) | Recent(3) | TopK(k=21))
    q, k, v = qkv(1, 2, keys=100)
    start = torch.tensor([0, 13])
    together = attn(q, poison(k, start), poison(v, start), start=start)
    alone = attn(q[1:], k[1:, :, 13:], v[1:, :, 13:])
    assert torch.equal(together[1:], alone)


def test_a_start_that_changes_moves_the_pages():
    attn = compose(8)
    q, k, v = qkv(2, 2, keys=50)
    cache = filled(attn, k, v)
    attn(q, cache)
    cache.set_start(torch.tensor([0, 5]))
    assert torch.equal(attn(q, cache), attn(q, k, v, start=torch.tensor([0, 5])))


def test_copies_and_states_answer_as_the_original():
    attn = compose(8)
    q, k, v = qkv(3, 2, keys=50)
    cache = filled(attn, k, v, torch.tensor([0, 3]))
    expected = attn(q, cache)
    loaded, twin = attn.new_cache(2, 2, 16), copy.deepcopy(cache)
    loaded.load_state_dict(cache.state_dict())
    cache.crop(20)
    assert torch.equal(attn(q, loaded), expected)
    assert torch.equal(attn(q, twin), expected)


def test_whole_pages_are_kept_and_the_last_one_by_recency():
    attn = compose(4, TopK(k=10))
    q, k, v = qkv(4, keys=40)
    cache = filled(attn, k, v)
    ids = attn.run(q, cache)[1].ids
    for row in ids.flatten(0, 2).tolist():
        pages = {p: sorted(c % 4 for c in row if c // 4 == p) for p in {c // 4 for c in row}}
        assert sorted(map(len, pages.values())) == [2, 4, 4]
        assert [2, 3] in pages.values()


def test_pages_of_one_key_rank_as_the_exact_products_do():
    q, k, v = qkv(5, keys=60)
    attn = compose(1, TopK(k=9))
    assert torch.equal(attn(q, k, v), attn.replace(index=FlatDot())(q, k, v))


def test_memory_is_two_vectors_a_page():
    _, k, v = qkv(6, 1, 2, keys=1600, dim=64)
    cache = compose().new_cache(1, 2, 64, capacity=1600)
    cache.append(k, v)
    cache.encode()
    assert cache.code_nbytes == 2 * 100 * 2 * 64 * 4
    plan = compose().explain(q_heads=4, kv_heads=2, head_dim=64, keys=1600, dtype=torch.float32)
    assert plan.code_bytes == cache.code_nbytes


def test_bad_input_is_refused():
    for wrong in (0, -1, 2.0, True):
        raises_naming(ValueError, "page", repr(wrong))(lambda w=wrong: Pages(w))
    raises_naming(ValueError, "Pages", "SimHash", "FlatHamming()", "Identity()")(
        lambda: compose().replace(encoder=SimHash())
    )
    assert eval(repr(Pages(8))) == Pages(8)
