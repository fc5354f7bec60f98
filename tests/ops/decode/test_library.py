"""The operators that torch.compile sees: registered soundly, and on the CPU what the specifications say."""

from dataclasses import replace

import pytest
import torch

from hashattn import (
    AsymmetricHash,
    ExactAttend,
    FlatHamming,
    HashAttention,
    MixedPrecision,
    Recent,
    SimHash,
    Sink,
    Tiers,
)
from hashattn.core.types import Step
from hashattn.engines.base import Call, Request
from hashattn.engines.fused import FusedStep
from hashattn.ops.decode import Newest, Rule, Stored, library, reference
from hashattn.ops.decode.estimate import key_norms
from hashattn.ops.hamming import query_planes
from tests.ops.decode.cases import CASES, TIER_CASES, by_column, inputs, norms_of, ready
from tests.ops.decode.encoding import SMALL, encodes, encoding, randomised, twin
from tests.structured import qkv


@pytest.mark.parametrize(("shape", "rule"), CASES[1:5] + TIER_CASES[1:3])
def test_decode_is_the_reference_and_sound(shape, rule):
    x = inputs(1, **shape)
    x = ready(x, rule, estimate=norms_of(x, 60) if rule.critical is not None else None)
    exact, flat = reference(x), library.flat_inputs(x, x.q, x.query, x.scale)
    for out, lse, ids, tier, _ in (library.Decode(x)(x.q, x.query, x.scale), torch.ops.hashattn.decode(*flat)):
        assert torch.equal(out, exact.out) and torch.equal(lse, exact.lse)
        assert torch.equal(ids[..., : exact.ids.shape[-1]], exact.ids)
        assert (ids[..., exact.ids.shape[-1] :] == -1).all()
        if rule.critical is not None:
            assert torch.equal(tier[..., : exact.ids.shape[-1]], exact.tier)
            assert not tier[..., exact.ids.shape[-1] :].any()
    torch.library.opcheck(torch.ops.hashattn.decode, flat)


@torch.inference_mode()
@pytest.mark.parametrize("per", ["query_head", "kv_head"])
@pytest.mark.parametrize("attend", [MixedPrecision(a=1.3), ExactAttend()], ids=["mixed", "exact"])
def test_tiers_of_a_composition(per, attend):
    q, k, v = qkv(8, 2, tokens=2, keys=400, dim=64)
    selector = Sink(4) | Recent(8) | Tiers(0.1, 0.3, per=per)
    attn = HashAttention(SimHash(100, 2), FlatHamming(), selector, attend, engine="reference")
    cache = attn.new_cache(2, 2, 64)
    cache.append(k + 1, v, start=torch.tensor([0, 70]))
    step = FusedStep(attn.parts, Request.of(q, cache))
    (exact, expected), (out, found) = attn.run(q, cache, need_lse=True), step(q, cache, Call(0.125, True, Step()))
    assert (found.tier is None) == isinstance(attend, ExactAttend)  # which ignores tiers
    if found.tier is None:
        found, expected = (replace(x, tier=torch.zeros_like(x.ids)) for x in (found, expected))
    pairs = zip(*(by_column(x, expected.ids.shape[-1]) for x in (found, expected)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert (out.out - exact.out).abs().max() <= 1e-5 * v.abs().max()
    assert (out.lse - exact.lse).abs().max() <= 1e-5 * exact.lse.abs().max()


def test_a_length_beyond_the_room_gives_nan():
    x = ready(inputs(2, filled=64, room=64), Rule(k=9))
    x.stored.length.fill_(70)
    assert library.Decode(x)(x.q, x.query, x.scale).out.isnan().all()


def encode(x):
    return library.Encode(x)(x.q, x.k, x.v)


@pytest.mark.parametrize(("encoder", "shape"), SMALL)
def test_queries_and_keys_are_encoded_and_appended(encoder, shape):
    encodes(encode, encoder, **shape)
    encodes(encode, encoder, **shape, norms=True)


@pytest.mark.parametrize("encoder", [SimHash(64, query_bits=2), AsymmetricHash(64, key_hidden=(9,))], ids=str)
@pytest.mark.parametrize(("filled", "with_norms"), [(40, False), (40, True), (63, True), (64, True)])
def test_append_and_encode_are_sound(encoder, filled, with_norms):
    x, encoder = inputs(3, batch=2, kv_heads=2, tokens=2, filled=filled, room=64), randomised(encoder, 64)
    k, v, centre = torch.randn(2, 2, 2, 64), torch.randn(2, 2, 2, 64), torch.randn(2, 2, 64)
    held = x.stored.keys.nan_to_num(), x.stored.values.nan_to_num(), x.stored.codes, x.stored.length
    norms = torch.zeros(2, 2, 64, 1, dtype=torch.bfloat16) if with_norms else None
    new_norms, maps = key_norms(k, centre) if with_norms else None, encoder.maps(64, torch.device("cpu"))
    newest = encoding(Newest(x.q, k, v, centre, maps, encoder.query_bits, Stored(*held, norms)))
    codes = query_planes(maps[1](k - centre.unsqueeze(2)), 1)
    torch.library.opcheck(torch.ops.hashattn.filled, (x.stored.length,))
    torch.library.opcheck(torch.ops.hashattn.append, (k, v, codes, new_norms, *held, newest.arrived, norms))
    torch.library.opcheck(torch.ops.hashattn.encode, library.flat_newest(newest, x.q, k, v))
    other = twin(newest)
    encode(newest)
    library.append(k, v, codes, new_norms, other.stored, other.arrived)
    for name in ("keys", "values", "codes", "length", *(["norms"] if with_norms else [])):
        assert torch.equal(getattr(newest.stored, name), getattr(other.stored, name))
    assert int(held[3]) == filled + 2
    fits = max(0, min(2, 64 - filled))
    assert torch.equal(held[0][:, :, filled : filled + fits], k[:, :, :fits])
