"""A bias of keys in the last byte of their codes: learned, exact in every engine, and kept."""

import pytest
import torch

from hashattn import AsymmetricHash, FlatHamming, HashAttention, MixedPrecision, Recent, SimHash, Sink, TopK
from hashattn.encoders.bias import NEUTRAL, KeyBias, write_bias
from hashattn.encoders.fitting import fit
from hashattn.encoders.sample import Sample
from hashattn.lab.recall import recall_and_mass
from tests.structured import generator, qkv, raises_naming

unfitted = pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")


def uneven(seed, heads=2, group=2, keys=600, dim=16, queries=64):
    """Keys of which one in eight matters to every query, the more the longer it is: what signs cannot tell."""
    g = generator(seed)
    k = torch.randn(heads, keys, dim, generator=g)
    common = torch.randn(1, 1, dim, generator=generator(99))
    long = (torch.rand(heads, keys, 1, generator=g) < 0.125) * torch.rand(heads, keys, 1, generator=g)
    q = 0.5 * torch.randn(heads * group, queries, dim, generator=g) + common
    return Sample(q, k + 6 * long * common, torch.arange(keys - queries, keys), keys)


def fitted(**options):
    encoder = AsymmetricHash(64, query_hidden=(), bias_bits=8, **options)
    fit(encoder, [uneven(0), uneven(1)], steps=150, queries=32, keys=0)
    return encoder


def byte(codes):
    return (codes[..., -1] >> 56) & 0xFF


@unfitted
def test_before_a_fit_it_is_simhash_of_the_other_bits_and_the_same_for_every_key():
    _, k, _ = qkv(0)
    codes = AsymmetricHash(128, bias_bits=8).encode_key(k, torch.zeros(1, 2, 16))
    assert (byte(codes) == NEUTRAL).all()
    assert torch.equal(write_bias(SimHash(120).encode_key(k, torch.zeros(1, 2, 16)), NEUTRAL), codes)


def test_a_bias_finds_more_where_keys_matter_to_every_query():
    plain = AsymmetricHash(64, query_hidden=())
    fit(plain, [uneven(0), uneven(1)], steps=150, queries=32, keys=0)
    without, _ = recall_and_mass(plain, [uneven(2)])
    found, mass = recall_and_mass(fitted(), [uneven(2)])
    assert found > without + 0.03, (without, found)
    assert 0 < mass <= 1


@pytest.mark.parametrize("per", ["query_head", "kv_head"])
def test_both_engines_attend_to_the_same_keys(per):
    encoder, sample = fitted(), uneven(3)
    q, k = sample.q[None, :, -2:], sample.k[None]
    attn = HashAttention(encoder, FlatHamming(), Sink(2) | Recent(3) | TopK(k=40, per=per), engine="reference")
    chosen = {}
    for engine in ("reference", "cpu"):
        cache = attn.new_cache(1, 2, 16)
        cache.append(k, k)
        chosen[engine] = attn.replace(engine=engine).run(q, cache)[1].ids.sort().values
    assert torch.equal(chosen["reference"], chosen["cpu"])
    flat = attn.replace(encoder=AsymmetricHash(64, query_hidden=()).fit(q.expand(-1, -1, 2, -1), k, steps=1))
    assert not torch.equal(flat(q, k, k), attn(q, k, k))


def test_penalties_fill_a_byte_and_are_the_rounded_bias():
    bias = KeyBias(2, 16, 0)
    with torch.no_grad():
        bias.out.normal_(0, 4, generator=generator(1))
    x = 3 * torch.randn(1, 2, 500, 16, generator=generator(2))
    raw, penalties = bias(x), bias.penalties(x)
    assert (penalties.min(), penalties.max()) == (0, 255)
    within = (raw > -127) & (raw < 128)
    assert torch.equal(penalties[within], (NEUTRAL - raw[within].round()).long())
    grown = bias.relaxed(x, hard=True)
    (gradient,) = torch.autograd.grad(grown.sum(), bias.shift)
    assert torch.equal(gradient.flatten(), KeyBias.REACH * within.sum((0, 2)).float())


def test_a_state_dict_keeps_the_bias():
    encoder = fitted()
    twin = AsymmetricHash(64, query_hidden=(), bias_bits=8)
    twin.load_state_dict(encoder.state_dict())
    k = uneven(4).k[None]
    assert torch.equal(twin.encode_key(k), encoder.encode_key(k))
    assert len(byte(twin.encode_key(k)).unique()) > 3


def test_what_cannot_hold_a_bias_is_refused():
    raises_naming(ValueError, "bias_bits", "0 or 8", "7")(lambda: AsymmetricHash(64, bias_bits=7))
    raises_naming(ValueError, "multiple of 64", "100")(lambda: AsymmetricHash(100, bias_bits=8))
    raises_naming(ValueError, "query_bits=1", "4")(lambda: AsymmetricHash(64, query_bits=4, bias_bits=8))
    raises_naming(ValueError, "MixedPrecision", "bias_bits=0", "ExactAttend")(
        lambda: HashAttention(AsymmetricHash(64, bias_bits=8), FlatHamming(), TopK(k=9), MixedPrecision())
    )


def test_the_fused_step_serves_a_bias_where_sums_of_distances_are_small_enough():
    attn = HashAttention(AsymmetricHash(128, bias_bits=8), FlatHamming(), TopK(k=64, per="kv_head"), engine="gpu")
    shape = {"kv_heads": 2, "head_dim": 64, "keys": 4096, "device": "cuda"}
    assert attn.explain(q_heads=8, **shape).engine == "gpu"
    raises_naming(ValueError, "6,128", "fewer bits")(lambda: attn.explain(q_heads=32, **shape))
