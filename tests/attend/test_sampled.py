import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import (
    CollisionSample,
    ExactAttend,
    FlatHamming,
    HashAttention,
    RandomTail,
    SampledAttend,
    Selection,
    SimHash,
    Sink,
    TopK,
)
from hashattn.core.collisions import Collisions
from tests.structured import attention64, odd_lengths, qkv, raises_naming, seeds, tolerance, visible_mask

PLAIN = SimHash(64, centring=None)
DRAWS = 400


def sums64(q, k, v):
    """The softmax's denominator and numerator over all keys, in float64: [B, Hq, T] and [B, Hq, T, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    e = (q.double() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).exp()
    return e.sum(-1), e @ v


def within_its_error(estimates, truth):
    """The mean of independent estimates [n, ...] is the truth [...] but for 4.5 standard errors."""
    error = estimates.std(0) / len(estimates) ** 0.5
    return ((estimates.mean(0) - truth).abs() <= 4.5 * error).all()


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_a_random_tail_estimates_both_sums_without_bias_and_knows_its_error(engine):
    one, k, v = qkv(3, 1, 1, 1, 1, 300)
    q = one.expand(1, DRAWS, 1, 16).contiguous()  # heads draw independently
    selector = Sink(1) | RandomTail(TopK(k=20), k=40)
    attn = HashAttention(PLAIN, FlatHamming(), selector, SampledAttend(errors=True), engine=engine)
    cache = attn.new_cache(1, 1, 16)
    cache.append(k, v)
    output, selection = attn.run(q, cache, need_lse=True)
    denominator, numerator = sums64(one, k, v)
    lse, out = output.lse.double()[0, :, 0], output.out.double()[0, :, 0]
    assert within_its_error(lse.exp(), denominator[0, 0, 0])
    assert within_its_error(lse.exp()[:, None] * out, numerator[0, 0, 0])
    exact, weights = attention64(one, k, v, visible_mask(1, 300, [0]))
    away = (out - exact[0, 0, 0]).square().sum(-1).mean().sqrt()
    told = output.error[0, :, 0].double().square().mean().sqrt()
    assert 0.85 < told / away < 1.15  # .963 observed
    top = selection.ids[0, 0, 0, :20].long()
    missed = 1 - weights[0, 0, 0, top].sum()
    assert within_its_error(output.tail[0, :, 0].double(), missed) or (output.tail.mean() - missed).abs() < 0.01


def test_collisions_estimate_both_sums_without_bias_and_know_their_error():
    q, k, v = qkv(5, 1, 1, 2, 1, 200, 32)
    denominator, numerator = sums64(q, k, v)
    exact = attention64(q, k, v, visible_mask(1, 200, [0]))[0]
    sample, d, n, away, told, found = CollisionSample(64, 6), [], [], [], [], []
    for seed in range(120):
        encoder = SimHash(sample.code_bits, centring=None, seed=seed, orthogonal=False)
        attn = HashAttention(encoder, FlatHamming(), Sink(4) | sample, SampledAttend(errors=True), engine="reference")
        cache = attn.new_cache(1, 1, 32)
        cache.append(k, v)
        output, selection = attn.run(q, cache, need_lse=True)
        lse, out = output.lse.double()[0, :, 0], output.out.double()[0, :, 0]
        d.append(lse.exp())
        n.append(lse.exp()[:, None] * out)
        away.append((out - exact[0, :, 0]).square().sum(-1))
        told.append(output.error[0, :, 0].double().square())
        found.append(selection.count.double().mean() / 200)
    assert within_its_error(torch.stack(d), denominator[0, :, 0])
    assert within_its_error(torch.stack(n), numerator[0, :, 0])
    ratio = torch.stack(told).mean().sqrt() / torch.stack(away).mean().sqrt()
    assert 0.85 < ratio < 1.15  # .985 observed
    assert torch.stack(found).mean() < 0.4  # .322 observed


def test_centred_keys_are_weighed_by_the_angle_to_their_centre():
    q, k, v = qkv(6, 1, 2, 2, 1, 400, 32)
    k = k + 3  # without the centre every key would be at nearly the same angle
    denominator, _ = sums64(q, k, v)
    sample, estimates = CollisionSample(64, 6), []
    for seed in range(50):
        attn = HashAttention(
            SimHash(sample.code_bits, seed=seed, orthogonal=False),
            FlatHamming(),
            Sink(4) | sample,
            SampledAttend(),
            engine="cpu",
        )
        cache = attn.new_cache(1, 2, 32)
        cache.append(k, v)
        estimates.append(attn.run(q, cache, need_lse=True)[0].lse.double()[0, :, 0].exp())
    assert within_its_error(torch.stack(estimates), denominator[0, :, 0])


@settings(deadline=None, max_examples=8)
@given(seed=seeds, keys=odd_lengths, per=st.sampled_from(["query_head", "kv_head"]))
def test_without_sampled_keys_it_is_exact_attention_and_has_no_error(seed, keys, per):
    q, k, v = qkv(seed, 2, tokens=min(2, keys), keys=keys)
    attn = HashAttention(PLAIN, FlatHamming(), TopK(share=0.5, per=per), SampledAttend(errors=True), engine="reference")
    cache = attn.new_cache(2, 2, 16)
    cache.append(k, v, start=torch.tensor([0, keys // 2]))
    output, _ = attn.run(q, cache, need_lse=True, need_weights=True)
    exact, _ = attn.replace(attend=ExactAttend()).run(q, cache, need_lse=True, need_weights=True)
    for name in ("out", "lse", "weights"):
        assert torch.equal(getattr(output, name), getattr(exact, name))
    assert (output.error == 0).all()
    assert (output.tail == 0).all()


@settings(deadline=None, max_examples=8)
@given(seed=seeds, keys=odd_lengths, per=st.sampled_from(["query_head", "kv_head"]))
def test_a_sample_of_all_has_no_error(seed, keys, per):
    q, k, v = qkv(seed, keys=keys)
    selector = RandomTail(TopK(share=0.1, per=per), share=1.0)
    attn = HashAttention(PLAIN, FlatHamming(), selector, SampledAttend(errors=True), engine="reference")
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    output, _ = attn.run(q, cache)
    keep = visible_mask(1, keys, [0])
    assert (output.error <= 1e-3).all()
    assert (output.out - attention64(q, k, v, keep)[0]).abs().max() <= tolerance(q, k, v, keep)


def test_one_drawn_key_tells_nothing_about_its_error():
    q, k, v = qkv(0, keys=65)
    selector = RandomTail(TopK(k=9), k=1)
    attn = HashAttention(PLAIN, FlatHamming(), selector, SampledAttend(errors=True), engine="reference")
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    output, _ = attn.run(q, cache)
    assert output.error.isnan().all()
    assert output.out.isfinite().all()


def test_what_it_cannot_weigh_is_refused():
    q, k, v = qkv(0, keys=65)
    attn = HashAttention(PLAIN, FlatHamming(), TopK(k=3), SampledAttend(), engine="reference")
    assert eval(repr(attn)) == attn
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    shared = Selection(torch.zeros(1, 2, 1, 1, dtype=torch.int32), collisions=Collisions(64, 4))
    raises_naming(ValueError, "collisions", "query heads")(lambda: attn.attend.attend(q, cache, shared, 1.0))
    raises_naming(ValueError, "selection", "DenseAttend")(lambda: attn.attend.attend(q, cache, None, 1.0))
