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
from hashattn.engines.gpu import FusedStep
from hashattn.ops.decode import Rule, library, reference, reference_tiers
from hashattn.ops.decode.estimate import key_norms
from hashattn.ops.hamming import query_planes
from tests.ops.decode.cases import CASES, TIER_CASES, by_column, inputs, norms_of
from tests.ops.decode.encoding import SMALL, encodes, encoding_state, randomised
from tests.structured import qkv


def fields(rule):
    return [getattr(rule, name) for name in library._NAMES]


@pytest.mark.parametrize(("shape", "rule"), CASES[1:5])
def test_decode_is_the_reference_and_sound(shape, rule):
    x = inputs(1, **shape)
    bounds, workspace = x.state(rule)
    out, lse, ids = library.decode(*x.all, bounds, rule, workspace, scale=0.3)
    exact = reference(*x.all, rule, scale=0.3)
    assert torch.equal(out, exact[0]) and torch.equal(lse, exact[1])
    assert torch.equal(ids[..., : exact[2].shape[-1]], exact[2]) and (ids[..., exact[2].shape[-1] :] == -1).all()
    torch.library.opcheck(torch.ops.hashattn.decode, (*x.all, bounds, workspace, 0.3, True, *fields(rule)))


@pytest.mark.parametrize(("shape", "rule"), TIER_CASES[1:3])
def test_decode_tiers_is_the_reference_and_sound(shape, rule):
    x = inputs(1, **shape)
    estimate, (bounds, workspace) = norms_of(x, 60), x.state(rule)
    found = library.decode_tiers(*x.all, bounds, estimate, rule, workspace, scale=0.3)
    exact = reference_tiers(*x.all, estimate, rule, scale=0.3)
    assert torch.equal(found[0], exact[0]) and torch.equal(found[1], exact[1])
    for own, expected, empty in zip(found[2:], exact[2:], (-1, 0), strict=True):
        assert torch.equal(own[..., : expected.shape[-1]], expected)
        assert (own[..., expected.shape[-1] :] == empty).all()
    given = estimate.norms, estimate.centre, estimate.a, estimate.bits
    torch.library.opcheck(
        torch.ops.hashattn.decode_tiers, (*x.all, bounds, *given, workspace, 0.3, True, *fields(rule))
    )


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


def test_an_outgrown_length_gives_nan():
    x, rule = inputs(2, filled=64, room=64), Rule(k=9)
    x.length.fill_(70)
    assert library.decode(*x.all, *x.state(rule)[:1], rule, x.state(rule)[1], scale=1.0)[0].isnan().all()


@pytest.mark.parametrize(("encoder", "shape"), SMALL)
def test_queries_and_keys_are_encoded_and_appended(encoder, shape):
    encodes(library.encode, encoder, **shape)
    encodes(library.encode, encoder, **shape, norms=True)


@pytest.mark.parametrize("encoder", [SimHash(64, query_bits=2), AsymmetricHash(64, key_hidden=(9,))], ids=str)
@pytest.mark.parametrize(("filled", "with_norms"), [(40, False), (40, True), (63, True), (64, True)])
def test_append_and_encode_are_sound(encoder, filled, with_norms):
    x, encoder = inputs(3, batch=2, kv_heads=2, tokens=2, filled=filled, room=64), randomised(encoder, 64)
    k, v, centre = torch.randn(2, 2, 2, 64), torch.randn(2, 2, 2, 64), torch.randn(2, 2, 64)
    held = [t.nan_to_num() if t.is_floating_point() else t for t in (x.keys, x.values, x.codes, x.length)]
    of_query, of_key = maps = encoder.maps(64, torch.device("cpu"))
    codes, state = query_planes(of_key(k - centre.unsqueeze(2)), 1), encoding_state(x.q, k, x.codes, maps)
    torch.library.opcheck(torch.ops.hashattn.filled, (x.length,))
    norms = [torch.zeros(2, 2, 64, 1, dtype=torch.bfloat16)] if with_norms else []
    new_norms = [key_norms(k, centre)] if with_norms else []
    torch.library.opcheck(torch.ops.hashattn.append, (k, v, codes, *held, state[0], *new_norms, *norms))
    given = x.q, k, v, centre, of_query.tensors, of_key.tensors, of_query.unit, encoder.query_bits, *held, *state
    torch.library.opcheck(torch.ops.hashattn.encode, (*given, *norms))
    twin, twin_norms = ([t.clone() for t in one] for one in (held, norms))
    library.encode(x.q, k, v, centre, maps, encoder.query_bits, *held, *state, *norms)
    library.append(k, v, codes, *twin, state[0], *new_norms, *twin_norms)
    assert all(torch.equal(a, b) for a, b in zip((*held, *norms), (*twin, *twin_norms), strict=True))
    assert int(held[3]) == filled + 2
    fits = max(0, min(2, 64 - filled))
    assert torch.equal(held[0][:, :, filled : filled + fits], k[:, :, :fits])
