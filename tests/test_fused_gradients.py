"""Gradients where engine="gpu" is asked for: the reference gives them, whichever of q, k and v wants one."""

import pytest
import torch

from hashattn import FlatHamming, HashAttention, SimHash, Sink, TopK
from hashattn.ops import decode
from hashattn.ops.decode import Rule, library
from hashattn.ops.decode.sizes import counters
from tests.ops.decode.cases import inputs
from tests.structured import qkv

pytest.importorskip("triton")
DECODE = {"q": 0, "keys": 2, "values": 3}


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_each_of_q_k_and_v_is_asked(wanted, monkeypatch):
    monkeypatch.setattr(decode, "DEVICES", ("cuda", "cpu"))
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


@pytest.mark.parametrize("wanted", DECODE)
def test_operators_say_that_they_are_not_differentiable(wanted):
    x, rule = inputs(1, filled=60, room=64), Rule(k=9)
    bounds, workspace = x.state(rule)
    x.all[DECODE[wanted]].requires_grad_()
    with pytest.raises(
        RuntimeError, match=f"hashattn::decode is not differentiable, and a gradient is wanted of {wanted}"
    ):
        library.decode(*x.all, bounds, rule, workspace, scale=1.0)
    with torch.no_grad():
        out, _, _ = library.decode(*x.all, bounds, rule, workspace, scale=1.0)
    assert not out.requires_grad


@pytest.mark.parametrize("wanted", ["k", "v"])
def test_so_do_those_that_write(wanted):
    x = inputs(2, filled=60, room=64)
    named = {name: torch.randn(1, 1, 1, 64) for name in ("k", "v")}
    named[wanted].requires_grad_()
    held = x.keys, x.values, x.codes, x.length
    arrived, code = torch.zeros(counters(4, 1), dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    maps, centre = SimHash(64).maps(64, torch.device("cpu")), torch.zeros(1, 1, 64)
    with pytest.raises(RuntimeError, match=f"append is not differentiable, and a gradient is wanted of {wanted}"):
        library.append(*named.values(), code, *held, arrived)
    with pytest.raises(RuntimeError, match=f"encode is not differentiable, and a gradient is wanted of {wanted}"):
        library.encode(x.q, *named.values(), centre, maps, 1, *held, arrived, torch.zeros(9, dtype=torch.uint8))
    assert int(x.length) == 60
    with torch.no_grad():
        library.append(*named.values(), code, *held, arrived)
    assert int(x.length) == 61


def test_compiled_code_says_so_too():
    x, rule = inputs(3, filled=60, room=64), Rule(k=9)
    bounds, workspace = x.state(rule)

    @torch.compile(backend="eager", fullgraph=True)
    def step(q):
        return library.decode(q, *x.all[1:], bounds, rule, workspace, scale=1.0)[0]

    assert step(x.q).shape == x.q.shape
    with pytest.raises(Exception, match="hashattn::decode is not differentiable"):
        step(x.q.clone().requires_grad_())
