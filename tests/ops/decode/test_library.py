"""The operators that torch.compile sees: registered soundly, and on the CPU what the specifications say."""

import pytest
import torch

from hashattn import AsymmetricHash, SimHash
from hashattn.ops.decode import Rule, library, reference
from hashattn.ops.hamming import query_planes
from tests.ops.decode.cases import CASES, inputs
from tests.ops.decode.encoding import SMALL, encodes, encoding_state, randomised


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


def test_an_outgrown_length_gives_nan():
    x, rule = inputs(2, filled=64, room=64), Rule(k=9)
    x.length.fill_(70)
    assert library.decode(*x.all, *x.state(rule)[:1], rule, x.state(rule)[1], scale=1.0)[0].isnan().all()


@pytest.mark.parametrize(("encoder", "shape"), SMALL)
def test_queries_and_keys_are_encoded_and_appended(encoder, shape):
    encodes(library.encode, encoder, **shape)


@pytest.mark.parametrize("encoder", [SimHash(64, query_bits=2), AsymmetricHash(64, key_hidden=(9,))], ids=str)
@pytest.mark.parametrize("filled", [40, 63, 64])
def test_append_and_encode_are_sound(encoder, filled):
    x, encoder = inputs(3, batch=2, kv_heads=2, tokens=2, filled=filled, room=64), randomised(encoder, 64)
    k, v, centre = torch.randn(2, 2, 2, 64), torch.randn(2, 2, 2, 64), torch.randn(2, 2, 64)
    held = [t.nan_to_num() if t.is_floating_point() else t for t in (x.keys, x.values, x.codes, x.length)]
    of_query, of_key = maps = encoder.maps(64, torch.device("cpu"))
    codes, state = query_planes(of_key(k - centre.unsqueeze(2)), 1), encoding_state(x.q, k, x.codes, maps)
    torch.library.opcheck(torch.ops.hashattn.filled, (x.length,))
    torch.library.opcheck(torch.ops.hashattn.append, (k, v, codes, *held, state[0]))
    given = x.q, k, v, centre, of_query.tensors, of_key.tensors, of_query.unit, encoder.query_bits, *held, *state
    torch.library.opcheck(torch.ops.hashattn.encode, given)
    twin = [t.clone() for t in held]
    library.encode(x.q, k, v, centre, maps, encoder.query_bits, *held, *state)
    library.append(k, v, codes, *twin, state[0])
    assert all(torch.equal(a, b) for a, b in zip(held, twin, strict=True))
    assert int(held[3]) == filled + 2
    fits = max(0, min(2, 64 - filled))
    assert torch.equal(held[0][:, :, filled : filled + fits], k[:, :, :fits])
