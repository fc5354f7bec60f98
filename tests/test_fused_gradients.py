"""Gradients where engine="gpu" is asked for: the reference gives them, whichever of q, k and v wants one."""

import pytest
import torch

from hashattn import FlatHamming, HashAttention, SimHash, Sink, TopK
from hashattn.ops import decode
from hashattn.ops.decode import Newest, Rule, library
from tests.ops.decode.cases import inputs, ready
from tests.ops.decode.encoding import encoding
from tests.structured import qkv

pytest.importorskip("triton")


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_each_of_q_k_and_v_is_asked(wanted, monkeypatch):
    monkeypatch.setattr(decode.request, "DEVICES", ("cuda", "cpu"))
    named = dict(zip("qkv", qkv(3, 1, keys=90, dim=64), strict=True))
    named[wanted].requires_grad_()
    attn = HashAttention(SimHash(64), FlatHamming(), Sink(2) | TopK(k=20), engine="gpu")
    found, expected = [], []
    for own, gradients in ((attn, found), (attn.replace(engine="reference"), expected)):
        out = own(*named.values())
        gradients.append(torch.autograd.grad(out.square().sum(), named[wanted])[0])
    assert torch.equal(found[0], expected[0]) and found[0].any()
    with torch.no_grad():
        assert not attn(*named.values()).requires_grad


@pytest.mark.parametrize("wanted", ["q", "keys", "values"])
def test_steps_say_that_they_are_not_differentiable(wanted):
    x = ready(inputs(1, filled=60, room=64), Rule(k=9))
    getattr(x if wanted == "q" else x.stored, wanted).requires_grad_()
    words = f"hashattn::decode is not differentiable, and a gradient is wanted of {wanted}"
    with pytest.raises(RuntimeError, match=words):
        library.Decode(x)(x.q, x.query, x.scale)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.hashattn.decode(*library.flat_inputs(x, x.q, x.query, x.scale))
    with torch.no_grad():
        assert not library.Decode(x)(x.q, x.query, x.scale).out.requires_grad


@pytest.mark.parametrize("wanted", ["k", "v"])
def test_so_do_those_that_write(wanted):
    x = inputs(2, filled=60, room=64)
    stored = x.stored
    k, v = (torch.randn(1, 1, 1, 64).requires_grad_(wanted == name) for name in "kv")
    maps, centre = SimHash(64).maps(64, torch.device("cpu")), torch.zeros(1, 1, 64)
    newest, code = encoding(Newest(x.q, k, v, centre, maps, 1, stored)), torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=f"append is not differentiable, and a gradient is wanted of {wanted}"):
        library.append(k, v, code, None, stored, newest.arrived)
    with pytest.raises(RuntimeError, match=f"encode is not differentiable, and a gradient is wanted of {wanted}"):
        library.Encode(newest)(x.q, k, v)
    assert int(stored.length) == 60
    with torch.no_grad():
        library.append(k, v, code, None, stored, newest.arrived)
    assert int(stored.length) == 61


def test_compiled_code_says_so_too():
    x = ready(inputs(3, filled=60, room=64), Rule(k=9))
    prepared = library.Decode(x)

    @torch.compile(backend="eager", fullgraph=True)
    def step(q):
        return prepared(q, x.query, 1.0).out

    assert step(x.q).shape == x.q.shape
    with pytest.raises(Exception, match="hashattn::decode is not differentiable"):
        step(x.q.clone().requires_grad_())
