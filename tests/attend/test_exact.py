import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import (
    DenseAttend,
    ExactAttend,
    FlatHamming,
    HashAttention,
    MixedPrecision,
    Recent,
    Selection,
    SimHash,
    Sink,
    TopK,
)
from tests.structured import (
    attention64,
    generator,
    heads,
    odd_dims,
    odd_lengths,
    poison,
    qkv,
    raises_naming,
    sdpa,
    seeds,
    selected,
    tolerance,
    visible_mask,
)

PLAIN = SimHash(64, centring=None)
EVERYTHING = TopK(share=1.0)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("attend", [ExactAttend(), MixedPrecision()], ids=["exact", "mixed"])
@settings(deadline=None, max_examples=25)
@given(
    seed=seeds, dtype=dtypes, shape=heads, keys=odd_lengths, dim=odd_dims, tokens=st.sampled_from([1, 3, 100]),
    scale=st.sampled_from([None, 0.3]), causal=st.booleans(), padding=st.sampled_from([0, 1, 40]),
    poisoned=st.booleans(),
)  # fmt: skip
def test_a_budget_of_everything_is_dense_attention(
    engine, attend, seed, dtype, shape, keys, dim, tokens, scale, causal, padding, poisoned
):
    q, k, v = qkv(seed, 2, *shape, min(tokens, keys), keys, dim, dtype)
    start = torch.tensor([0, min(padding, keys)])
    keep = visible_mask(q.shape[2], keys, start.tolist(), causal)
    attn = HashAttention(PLAIN, FlatHamming(), EVERYTHING, attend, engine=engine)
    held = (poison(k, start), poison(v, start)) if poisoned else (k, v)
    out = attn(q, *held, scale=scale, causal=causal, start=start)
    assert out.dtype == dtype
    exact = attention64(q, k, v, keep, scale)[0]
    assert (out.double() - exact).abs().max() <= tolerance(q, k, v, keep, scale)
    assert (out.double() - sdpa(q, k, v, keep, scale).double()).abs().max() <= 2 * tolerance(q, k, v, keep, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peaked_attention_is_as_exact_as_scaled_dot_product_attention(dtype):
    q, k, v = qkv(0, 2, 2, 2, 3, 300, 64, dtype)
    keep = visible_mask(3, 300, [0, 0])
    out = HashAttention(PLAIN, FlatHamming(), EVERYTHING, engine="reference")(q * 3, k, v)
    exact = attention64(q * 3, k, v, keep)[0]
    assert (out.double() - exact).abs().max() <= tolerance(q * 3, k, v, keep)


def test_half_precision_logits_do_not_overflow():
    q, k, v = qkv(1, keys=20, dim=64, dtype=torch.float16)
    q, k = q * 60, k * 60
    keep = visible_mask(1, 20, [0])
    out = HashAttention(PLAIN, FlatHamming(), EVERYTHING, engine="reference")(q, k, v, scale=1e-4)
    assert out.isfinite().all()
    exact = attention64(q, k, v, keep, 1e-4)[0]
    assert (out.double() - exact).abs().max() <= tolerance(q, k, v, keep, 1e-4)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, share=st.sampled_from([0.05, 0.2, 0.6]), keys=odd_lengths, sharp=st.sampled_from([1.0, 4.0]))
def test_the_error_is_bounded_by_the_mass_that_is_missed(seed, share, keys, sharp):
    q, k, v = qkv(seed, keys=keys)
    q = q * sharp
    attn = HashAttention(PLAIN, FlatHamming(), TopK(share=share), engine="reference")
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    output, selection = attn.run(q, cache)
    keep = visible_mask(1, keys, [0])
    exact, weights = attention64(q, k, v, keep)
    mass = (weights * selected(selection.ids, keys, 4)).sum(-1, keepdim=True)
    largest = v.repeat_interleave(2, 1).abs().amax((2, 3))[..., None, None]
    error = (output.out - exact).abs()
    assert (error <= 2 * (1 - mass) * largest + tolerance(q, k, v, keep)).all()


@settings(deadline=None, max_examples=20)
@given(seed=seeds, keys=odd_lengths, forced=st.booleans(), query_bits=st.sampled_from([1, 8]))
def test_kept_mass_grows_with_the_budget(seed, keys, forced, query_bits):
    q, k, v = qkv(seed, keys=keys, tokens=min(2, keys))
    weights = attention64(q, k, v, visible_mask(q.shape[2], keys, [0]))[1]
    cache, before = None, torch.zeros(weights.shape[:3], dtype=torch.float64)
    for share in (0.02, 0.1, 0.3, 0.7, 1.0):
        ranked = TopK(share=share)
        selector = Sink(1) | Recent(2) | ranked if forced else ranked
        attn = HashAttention(SimHash(64, query_bits, centring=None), FlatHamming(), selector, engine="reference")
        if cache is None:
            cache = attn.new_cache(1, 2, 16)
            cache.append(k, v)
        mass = (weights * selected(attn.run(q, cache)[1].ids, keys, 4)).sum(-1)
        assert (mass >= before).all()
        before = mass
    assert torch.allclose(before, torch.ones_like(before))


@settings(deadline=None, max_examples=20)
@given(seed=seeds, shape=heads, keys=odd_lengths)
def test_grouped_heads_equal_explicitly_repeated_keys_and_values(seed, shape, keys):
    q, k, v = qkv(seed, 1, *shape, min(2, keys), keys)
    attn = HashAttention(PLAIN, FlatHamming(), Sink(1) | TopK(share=0.3), engine="reference")
    repeated = attn(q, k.repeat_interleave(shape[1], 1), v.repeat_interleave(shape[1], 1))
    out = attn(q, k, v)
    keep = visible_mask(q.shape[2], keys, [0])
    assert (out - repeated).abs().max() <= tolerance(q, k, v, keep)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, per_kv=st.booleans(), tokens=st.sampled_from([1, 3]))
def test_weights_and_lse_are_those_of_the_selection(seed, per_kv, tokens):
    q, k, v = qkv(seed, 2, tokens=tokens, keys=65)
    attn = HashAttention(PLAIN, FlatHamming(), TopK(k=9, per="kv_head" if per_kv else "query_head"), engine="reference")
    cache = attn.new_cache(2, 2, 16)
    cache.append(k, v, start=torch.tensor([0, 60]))
    output, selection = attn.run(q, cache, need_lse=True, need_weights=True)
    keep = selected(selection.ids, 65, 4)
    exact, weights = attention64(q, k, v, keep)
    ids = selection.ids.repeat_interleave(4 // selection.ids.shape[1], 1)
    logits = (q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) / 4).masked_fill(~keep, -torch.inf)
    assert output.lse.dtype == output.weights.dtype == torch.float32
    assert (output.weights[ids < 0] == 0).all()
    close = {"rtol": 1e-5, "atol": tolerance(q, k, v, keep)}
    assert torch.allclose(output.weights.double(), weights.gather(-1, ids.clamp(min=0).long()) * (ids >= 0), **close)
    assert torch.allclose(output.lse.double(), logits.logsumexp(-1), **close)
    assert torch.allclose(output.out.double(), exact, **close)


@settings(deadline=None, max_examples=15)
@given(seed=seeds, by_head=st.booleans())
def test_log_weights_are_added_to_the_logits(seed, by_head):
    q, k, v = qkv(seed, keys=20)
    attn = HashAttention(PLAIN, FlatHamming(), TopK(k=9), engine="reference")
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    g = generator(seed)
    ids = torch.rand(1, 4 if by_head else 2, 1, 20, generator=g).argsort(-1)[..., :9].to(torch.int32)
    log_weights = torch.randn(ids.shape, generator=g)
    out = ExactAttend().attend(q, cache, Selection(ids, log_weights=log_weights), 0.25).out
    bias = torch.full((1, ids.shape[1], 1, 20), -torch.inf).scatter(-1, ids.long(), log_weights)
    bias = bias.repeat_interleave(4 // ids.shape[1], 1)
    weights = torch.softmax(q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) / 4 + bias, -1)
    expected = weights @ v.double().repeat_interleave(2, 1)
    assert (out - expected).abs().max() <= tolerance(q, k, v, torch.isfinite(bias))


@pytest.mark.parametrize("attend", [ExactAttend(), MixedPrecision()], ids=["exact", "mixed"])
def test_empty_slots_may_stand_anywhere_and_read_no_padding(attend):
    q, k, v = qkv(2, batch=2, keys=30)
    start = torch.tensor([0, 10])
    attn = HashAttention(PLAIN, FlatHamming(), EVERYTHING, attend, engine="reference")
    cache = attn.new_cache(2, 2, 16)
    cache.append(poison(k, start), poison(v, start), start=start)
    tail = torch.tensor([12, 29, 20], dtype=torch.int32).expand(2, 4, 1, 3)
    gaps = torch.tensor([-1, 12, -1, 29, -1, 20], dtype=torch.int32).expand(2, 4, 1, 6)
    out = [attend.attend(q, cache, Selection(ids.contiguous()), 0.25).out for ids in (tail, gaps)]
    keep = selected(tail.contiguous(), 30, 4)
    exact = attention64(q, k, v, keep, 0.25)[0]
    for found in out:
        assert (found - exact).abs().max() <= tolerance(q, k, v, keep, 0.25)


@pytest.mark.parametrize("attend", [ExactAttend(), MixedPrecision()], ids=["exact", "mixed"])
@pytest.mark.parametrize("engine", ["reference", "dense"])
def test_queries_that_see_nothing_give_zeros(attend, engine):
    q, k, v = qkv(3, batch=2, tokens=5, keys=12)
    start = torch.tensor([0, 9])  # the first two queries of row 1 are padding
    attn = HashAttention(PLAIN, FlatHamming(), EVERYTHING, attend, engine=engine)
    cache = attn.new_cache(2, 2, 16)
    cache.append(k, v, start=start)
    output, _ = attn.run(q, cache, need_lse=True, need_weights=True)
    assert (output.out[1, :, :2] == 0).all()
    assert (output.lse[1, :, :2] == -torch.inf).all()
    assert (output.weights[1, :, :2] == 0).all()
    assert output.out.isfinite().all()
    assert output.lse[0].isfinite().all()
    assert output.lse[1, :, 2:].isfinite().all()


def test_gradients_of_a_full_budget_are_those_of_dense_attention():
    q, k, v = (x.requires_grad_() for x in qkv(4, tokens=3, keys=20))
    attn = HashAttention(PLAIN, FlatHamming(), EVERYTHING, engine="reference")
    keep = visible_mask(3, 20, [0])
    attn(q, k, v).square().sum().backward()
    own = [x.grad for x in (q, k, v)]
    exact = torch.autograd.grad(attention64(q, k, v, keep)[0].square().sum(), (q, k, v))
    plain = torch.autograd.grad(sdpa(q, k, v, keep).square().sum(), (q, k, v))
    for mine, true, theirs in zip(own, exact, plain, strict=True):
        bound = 4 * (theirs - true).abs().max() + torch.finfo(torch.float32).eps * true.abs().max()
        assert (mine - true).abs().max() <= bound


def test_stages_without_a_selection_say_so():
    q, k, v = qkv(5)
    cache = HashAttention(attend=DenseAttend()).new_cache(1, 2, 16)
    cache.append(k, v)
    raises_naming(ValueError, "ExactAttend", "selection")(lambda: ExactAttend().attend(q, cache, None, 0.25))
    raises_naming(ValueError, "MixedPrecision", "selection")(lambda: MixedPrecision().attend(q, cache, None, 0.25))
    tiers = Selection(torch.zeros(1, 4, 1, 1, dtype=torch.int32), torch.ones(1, 4, 1, 1, dtype=torch.int8))
    raises_naming(ValueError, "view")(lambda: MixedPrecision().attend(q, cache, tiers, 0.25))
