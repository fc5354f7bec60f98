import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import (
    ITQ,
    AsymmetricHash,
    Centring,
    ExactAttend,
    FlatHamming,
    HashAttention,
    MixedPrecision,
    Recent,
    Selection,
    SimHash,
    Sink,
    Tiers,
)
from hashattn.attend.mixed import CodeResidual
from hashattn.core.types import MEDIUM
from hashattn.ops import hamming
from tests.structured import (
    cones,
    generator,
    odd_bits,
    poison,
    qkv,
    raises_naming,
    seeds,
)


def signs(codes, bits):
    return hamming.unpack_bits(codes, bits).double() * 2 - 1


def by_hand(attn, q, cache, selection, scale):
    """The documented logits of every slot in float64, [B, Hq, T, K]; and the output over them."""
    attend, encoder = attn.attend, attn.encoder
    ids = selection.ids.repeat_interleave(q.shape[1] // selection.ids.shape[1], 1).clamp(min=0).long()

    def rows(x):  # [B, H, N, X] -> [B, Hq, T, K, X]
        x = x.repeat_interleave(q.shape[1] // x.shape[1], 1)
        return (
            x.unsqueeze(2)
            .expand(-1, -1, ids.shape[2], -1, -1)
            .gather(3, ids.unsqueeze(-1).expand(*ids.shape, x.shape[-1]))
        )

    code = encoder.encode_query(q)
    h_q = signs(code if code.ndim == 4 else code[..., -1, :], encoder.bits).unsqueeze(-2)
    h_k = rows(signs(cache.codes, encoder.bits))
    centre = cache.centre.double().repeat_interleave(q.shape[1] // cache.centre.shape[1], 1)[:, :, None, None]
    residual = 0 if attend.residual is None else attend.residual.double()(h_q, h_k)
    if attend.residual is not None:
        attend.residual.float()
    similarity = (h_q * h_k).sum(-1) / encoder.bits + residual
    qd = q.double().unsqueeze(-2)
    norms = (rows(cache.keys.double()) - centre).norm(dim=-1).bfloat16().double()
    estimate = (qd * centre).sum(-1) + attend.a.double() * qd.norm(dim=-1) * norms * similarity
    exact = (qd * rows(cache.keys.double())).sum(-1)
    tier = selection.tier.repeat_interleave(q.shape[1] // selection.tier.shape[1], 1)
    logits = scale * torch.where(tier == MEDIUM, estimate, exact)
    empty = selection.ids.repeat_interleave(q.shape[1] // selection.ids.shape[1], 1) < 0
    logits = logits.masked_fill(empty, -torch.inf)
    weights = torch.nan_to_num(torch.softmax(logits, -1))
    return logits, (weights.unsqueeze(-2) @ rows(cache.values.double())).squeeze(-2)


@settings(deadline=None, max_examples=30)
@given(
    seed=seeds, bits=odd_bits, query_bits=st.sampled_from([1, 4, 8]), per=st.sampled_from(["query_head", "kv_head"]),
    centred=st.booleans(), engine=st.sampled_from(["reference", "cpu"]), with_residual=st.booleans(),
    tokens=st.sampled_from([1, 2]),
)  # fmt: skip
def test_critical_slots_are_exact_and_medium_ones_follow_the_formula(
    seed, bits, query_bits, per, centred, engine, with_residual, tokens
):
    q, k, v = qkv(seed, 2, tokens=tokens, keys=65)
    encoder = SimHash(bits, query_bits, centring=Centring(1.0, 8, 2) if centred else None)
    attend = MixedPrecision(a=1.3)
    if with_residual:
        attend.residual = CodeResidual(bits, 4)
        torch.nn.init.normal_(attend.residual.out.weight, std=0.1, generator=generator(seed))
    attn = HashAttention(encoder, FlatHamming(), Sink(1) | Tiers(0.1, 0.5, per=per), attend, engine=engine)
    cache = attn.new_cache(2, 2, 16)
    cache.append(k + 1.0, v, start=torch.tensor([0, 30]))
    with torch.no_grad():
        output, selection = attn.run(q, cache, need_lse=True)
        logits, out = by_hand(attn, q, cache, selection, 0.25)
    assert (selection.tier == MEDIUM).any()
    # a bfloat16 norm may round either way where float32 and float64 norms straddle its midpoint: 2^-7 of the norm
    bound = 2**-7 * 0.25 * attend.a.item() * (q.norm(dim=-1).max() * (k + 1).norm(dim=-1).max()).item() * 1.5
    assert (output.lse - logits.logsumexp(-1)).abs().max() <= bound
    assert (output.out - out).abs().max() <= 2 * bound * v.abs().max()


def test_estimates_equal_the_formula_to_float32_rounding():
    q, k, v = qkv(0, keys=65)
    k = torch.round(k * 2) / 2  # bfloat16 holds no norm exactly, but float32 and float64 round these alike
    attn = HashAttention(SimHash(128, centring=None), FlatHamming(), Tiers(0.1, 0.9), MixedPrecision(), engine="cpu")
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    with torch.no_grad():
        _, selection = attn.run(q, cache)
        logits, _ = by_hand(attn, q, cache, selection, 1.0)
        view = cache.view(attn.encoder.encode_query(q), 4, cache.spans(1), host=True)
        found = attn.attend.estimate(q, cache, selection.ids, view).squeeze(3)
    medium = selection.tier == MEDIUM
    bound = 16 * torch.finfo(torch.float32).eps * logits[medium].abs().max()
    assert (found[medium] - logits[medium]).abs().max() <= bound


@pytest.mark.parametrize("encoder", [SimHash(64, centring=Centring(1.0, 16)), "heads", "fitted", "itq"])
@pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")
def test_every_encoder_serves_medium_keys(encoder):
    q, k, v = qkv(1, keys=80, tokens=4)
    if encoder == "heads":
        encoder = AsymmetricHash(64, query_hidden=(8,), heads=4, centring=Centring(1.0, 16))
    elif encoder == "fitted":
        encoder = AsymmetricHash(64, query_hidden=(8,)).fit(q, k, steps=3, queries=4)
    elif encoder == "itq":
        encoder = ITQ(24, iterations=3).fit(None, k)
    for per in ("query_head", "kv_head"):
        if per == "kv_head" and getattr(encoder, "heads", None) == 4:
            continue  # the formula by hand has one code a slot there
        attn = HashAttention(encoder, FlatHamming(), Tiers(0.1, 0.5, per=per), MixedPrecision(), engine="reference")
        cache = attn.new_cache(1, 2, 16)
        cache.append(k, v)
        with torch.no_grad():
            output, selection = attn.run(q, cache)
            _, out = by_hand(attn, q, cache, selection, 0.25)
        bound = 2**-10 * 0.25 * 1.6 * (q.norm(dim=-1).max() * (k - cache.centre[:, :, None]).norm(dim=-1).max()).item()
        assert (output.out - out).abs().max() <= 3 * bound * v.abs().max()


@pytest.mark.parametrize("per", ["query_head", "kv_head"])
def test_medium_keys_are_not_read(per):
    q, k, v = qkv(2, keys=65)
    attn = HashAttention(
        SimHash(64, centring=None), FlatHamming(), Recent(2) | Tiers(0.1, 0.5, per=per), MixedPrecision(),
        engine="reference",
    )  # fmt: skip
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    clean, selection = attn.run(q, cache)
    critical = torch.zeros(1, 2, 65, dtype=torch.bool)
    for head in range(2):
        chosen = selection.ids.unflatten(1, (2, -1))[0, head]
        exact = selection.tier.unflatten(1, (2, -1))[0, head] != MEDIUM
        critical[0, head, chosen[exact & (chosen >= 0)].long()] = True
    cache.keys.masked_fill_(~critical.unsqueeze(-1), torch.nan)  # in place, after encoding
    assert cache.keys.isnan().any()
    assert torch.equal(attn.run(q, cache)[0].out, clean.out)


def test_gradients_pass_by_medium_keys_and_padding():
    q, k, v = qkv(3, batch=2, keys=65)
    start = torch.tensor([0, 20])
    attn = HashAttention(
        SimHash(64, centring=None), FlatHamming(), Recent(2) | Tiers(0.1, 0.5), MixedPrecision(), engine="reference"
    )
    q.requires_grad_()
    attn(q, poison(k, start), poison(v, start), start=start).square().sum().backward()
    assert q.grad.isfinite().all()
    assert attn.attend.a.grad.isfinite()
    assert attn.attend.a.grad != 0


@pytest.mark.parametrize("bits", [128, 1000])
def test_unfitted_estimates_follow_the_true_logits(bits):
    data = cones(0)
    attn = HashAttention(
        SimHash(bits), FlatHamming(), Tiers(0.1, 1.0), MixedPrecision(a=math.pi / 2), engine="reference"
    )
    cache = attn.new_cache(1, 2, 32)
    cache.append(data.k, data.v)
    view = cache.view(attn.encoder.encode_query(data.q), 4, cache.spans(24, causal=False))
    ids = torch.arange(640, dtype=torch.int32).expand(1, 4, 24, 640).contiguous()
    estimate = attn.attend.estimate(data.q, cache, ids, view).squeeze(3).detach()
    true = data.q @ data.k.repeat_interleave(2, 1).transpose(-1, -2)
    within = [
        np.corrcoef(a, b)[0, 1] for a, b in zip(estimate.flatten(0, 2).numpy(), true.flatten(0, 2).numpy(), strict=True)
    ]
    floor = {128: 0.5, 1000: 0.5}[bits]  # OBS
    assert np.mean(within) > floor, np.mean(within)
    slope = ((estimate - estimate.mean()) * (true - true.mean())).sum() / (true - true.mean()).square().sum()
    assert 0.8 < slope < 1.2, slope


def divergence(encoder, attend, data):
    """The mean KL of its weights from the true ones, over the keys it selects."""
    attn = HashAttention(encoder, FlatHamming(), Tiers(0.05, 0.1), attend, engine="reference")
    cache = attn.new_cache(1, 2, 32)
    cache.append(data.k, data.v)
    with torch.no_grad():
        mixed, selection = attn.run(data.q, cache, need_weights=True)
        exact = ExactAttend().attend(data.q, cache, selection, 32**-0.5, need_weights=True)
    there = selection.ids >= 0
    terms = exact.weights * (exact.weights.log() - mixed.weights.log())
    return float(terms[there].sum() / there[..., 0].sum())


def test_a_fitted_scale_brings_the_weights_closer_to_the_true_ones_and_a_useless_residual_is_left_out():
    data, other, encoder = cones(0), cones(1), SimHash(128)
    torch.manual_seed(0)
    plain, fitted = MixedPrecision(a=0.3), MixedPrecision(a=0.3).fit(data.q, data.k, encoder)
    assert fitted.residual is None  # planes of centred keys say all there is
    assert divergence(encoder, fitted, data) < 0.85 * divergence(encoder, plain, data)  # 0.263 of 0.341
    assert divergence(encoder, fitted, other) < 0.85 * divergence(encoder, plain, other)  # 0.241 of 0.335


def test_a_residual_mends_what_codes_of_uncentred_keys_get_wrong():
    data, other = cones(0, tokens=64, keys=900), cones(1, tokens=64, keys=900)
    encoder = SimHash(128, centring=None)
    torch.manual_seed(0)
    scaled, full = (MixedPrecision(hidden=hidden).fit(data.q, data.k, encoder) for hidden in (0, 32))
    assert full.residual is not None
    assert divergence(encoder, full, data) < 0.6 * divergence(encoder, scaled, data)  # 0.215 of 0.501
    assert divergence(encoder, full, other) < divergence(encoder, scaled, other)  # 0.458, 0.521


@pytest.mark.parametrize(("critical", "share"), [(0.1, 0.1), (0.0, 0.1), (0.5, 1.5)])
def test_shares_without_medium_keys_are_refused(critical, share):
    q, k, _ = qkv(0, keys=65)
    raises_naming(ValueError, "critical", "share", str(share))(
        lambda: MixedPrecision().fit(q, k, SimHash(64), critical=critical, share=share)
    )


def test_without_medium_keys_it_is_exact_attention():
    q, k, v = qkv(4, keys=65)
    attn = HashAttention(
        SimHash(64, centring=None), FlatHamming(), Tiers(0.5, 1.0), MixedPrecision(), engine="reference"
    )
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    view = cache.view(attn.encoder.encode_query(q), 4, cache.spans(1))
    _, selection = attn.run(q, cache)
    critical = Selection(selection.ids, torch.zeros_like(selection.tier))
    mixed = attn.attend.attend(q, cache, critical, 0.25, view=view).out
    assert torch.equal(mixed, ExactAttend().attend(q, cache, critical, 0.25).out)


def test_bad_hyperparameters_are_refused_by_name():
    raises_naming(ValueError, "hidden", "-1")(lambda: MixedPrecision(hidden=-1))
