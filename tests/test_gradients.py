"""Gradients of queries, keys and values, whatever the engine; and what was made in inference mode serves training."""

import copy
import itertools
import pickle

import pytest
import torch

from hashattn import (
    ITQ,
    L2ALSH,
    PCA,
    PQ,
    AsymmetricHash,
    Centring,
    Consensus,
    CrossPolytope,
    ExactAttend,
    FlatBuckets,
    FlatDot,
    FlatHamming,
    HashAttention,
    HeavyChannels,
    HeavyHitters,
    Identity,
    MixedPrecision,
    Momentum,
    RaBitQ,
    RandomTail,
    Recent,
    SampledAttend,
    SimHash,
    SimpleLSH,
    Sink,
    SymmetricHash,
    Tiers,
    TopK,
    TopP,
)
from tests.structured import qkv, visible_mask

EVERYTHING = Sink(2) | Recent(3) | TopK(share=1.0)
PLAIN = SimHash(64, centring=None)
ASKED = [names for n in (1, 2, 3) for names in itertools.combinations("qkv", n)]


def composed(engine, selector=EVERYTHING, attend=None, encoder=PLAIN, index=None):
    return HashAttention(encoder, index or FlatHamming(), selector, attend or ExactAttend(), engine=engine)


def dense64(q, k, v, keep, weights):
    """Gradients of sum(weights * attention) in float64, by autograd over the whole matrix."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    some = keep.any(-1, keepdim=True)
    p = torch.softmax(logits.masked_fill(~keep & some, -torch.inf), -1) * keep
    (weights.double() * (p @ v.repeat_interleave(group, 1))).sum().backward()
    return {"q": q.grad, "k": k.grad, "v": v.grad}


@pytest.mark.parametrize("engine", ["reference", "cpu", "dense", "auto"])
@pytest.mark.parametrize("asked", ASKED, ids="".join)
def test_a_budget_of_everything_has_the_gradients_of_dense_attention(engine, asked):
    given = dict(zip("qkv", qkv(1, 2, tokens=3, keys=30), strict=True))
    weights = torch.randn(given["q"].shape, generator=torch.Generator().manual_seed(2))
    expected = dense64(*given.values(), visible_mask(3, 30, [0, 28]), weights)
    for name in asked:
        given[name].requires_grad_()
    (composed(engine)(**given, start=torch.tensor([0, 28])) * weights).sum().backward()
    for name in asked:  # the second row sees two keys or fewer: it has empty slots
        assert (given[name].grad.double() - expected[name]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("selector", "attend"),
    [
        (Sink(1) | Recent(2) | TopK(k=5), ExactAttend()),
        (Sink(1) | Tiers(0.1, 0.4), MixedPrecision()),
        (RandomTail(TopK(k=5), k=4), SampledAttend()),
        (TopP(TopK(k=9), 0.7), ExactAttend()),
    ],
    ids=str,
)
def test_the_engines_give_the_same_gradients(selector, attend):
    found = []
    for engine in ("reference", "cpu"):
        given = [x.requires_grad_() for x in qkv(3, 2, tokens=2, keys=40)]
        composed(engine, selector, attend)(*given, start=torch.tensor([0, 36])).square().sum().backward()
        found.append([x.grad for x in given])
    assert all(torch.allclose(a, b, atol=1e-6) and bool(a.any()) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("engine", ["reference", "cpu", "dense"])
def test_a_stream_of_keys_with_gradients_chains_no_graph(engine):
    attn = composed(engine)
    cache = attn.new_cache(1, 2, 16)
    parameter = torch.ones((), requires_grad=True)
    for step in range(40):
        _, k, v = qkv(step, keys=1)
        newest = k * parameter
        cache.append(newest, v * parameter)
    assert not cache.kv.keys.storage.requires_grad
    q, _, _ = qkv(99)
    newest.retain_grad()
    attn(q.requires_grad_(), cache).sum().backward()
    assert q.grad.any()
    assert newest.grad.any()  # the last append's keys are reached, those before are constants
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert not twin.keys.requires_grad
        assert torch.equal(twin.keys, cache.keys)
    cache.reorder(torch.tensor([0]))
    assert not cache.keys.requires_grad


def test_without_gradients_none_are_traced():
    k = qkv(0)[1].requires_grad_()
    cache = composed("cpu").new_cache(1, 2, 16)
    with torch.no_grad():
        cache.append(k, k)
    assert not cache.keys.requires_grad
    cache.append(k, k)
    assert cache.keys.requires_grad
    with torch.no_grad():
        assert not cache.keys.requires_grad


# ---- inference mode


def fitted(make):
    q, k, _ = qkv(5, tokens=64, keys=200)
    return lambda: make().fit(q, k)


PARTS = {  # an encoder and its index, made in inference mode
    "AsymmetricHash": (lambda: AsymmetricHash(64, query_hidden=(8,), centring=Centring(keys=8)), FlatHamming()),
    "CrossPolytope": (lambda: CrossPolytope(9, 8, None), FlatBuckets()),
    "HeavyChannels": (fitted(lambda: HeavyChannels(4)), FlatDot()),
    "ITQ": (fitted(lambda: ITQ(24, iterations=3)), FlatHamming()),
    "Identity": (Identity, FlatDot()),
    "L2ALSH": (fitted(lambda: L2ALSH(64)), FlatHamming()),
    "PCA": (fitted(lambda: PCA(4)), FlatDot()),
    "SimHash": (lambda: SimHash(64, 2, Centring(keys=8), seed=77), FlatHamming()),
    "SimHash, independent": (lambda: SimHash(64, centring=None, seed=78, orthogonal=False), FlatHamming()),
    "SimpleLSH": (fitted(lambda: SimpleLSH(64)), FlatHamming()),
    "SymmetricHash": (lambda: SymmetricHash(64, heads=2, centring=None), FlatHamming()),
}


@pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")
@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("name", PARTS)
def test_what_was_made_in_inference_mode_serves_training(name, engine):
    make, index = PARTS[name]
    q, k, v = qkv(4, 2, tokens=2, keys=40)
    with torch.inference_mode():
        encoder = make()
        attn = composed(engine, HeavyHitters(k=9) if engine == "cpu" else TopK(k=9), encoder=encoder, index=index)
        cache = attn.new_cache(2, 2, 16)
        cache.append(k, v, start=torch.tensor([0, 5]))
        attn(q, cache)
        cache.search(encoder.encode_query(q), 3) if all(cache.ready) else None
        cache.select_rows([1, 0])
        attn(q, cache)
    leaf = [x.clone().requires_grad_() for x in (q, k, v)]
    cache.append(*leaf[1:])
    cache.crop(60)
    cache.set_start(torch.tensor([2, 0]))
    cache.append(*leaf[1:])
    attn(leaf[0], cache).sum().backward()
    assert all(x.grad.any() for x in leaf)
    for parameter in encoder.parameters() if isinstance(encoder, torch.nn.Module) else ():
        assert not parameter.is_inference()
    assert not any(x.is_inference() for x in cache.state_dict().values() if isinstance(x, torch.Tensor))


def test_planes_made_in_inference_mode_can_be_trained_through():
    with torch.inference_mode():
        SimHash(32, centring=None, seed=901).encode_query(torch.ones(1, 1, 1, 24))
        RaBitQ(centring=None, seed=902).encode_query(torch.ones(1, 1, 1, 24))
    for encoder in (SimHash(32, centring=None, seed=901), RaBitQ(centring=None, seed=902)):
        encoder.encode_query(torch.ones(1, 1, 1, 24, requires_grad=True))
    x = torch.ones(1, 1, 1, 24, requires_grad=True)
    RaBitQ(centring=None, seed=902).encode_query(x).sum().backward()
    assert x.grad.any()


def test_parts_with_weights_made_in_inference_mode_can_be_fitted():
    q, k, v = qkv(6, tokens=80, keys=200)
    with torch.inference_mode():
        selector, attend = Momentum(Consensus(Tiers(0.1, 0.4))), MixedPrecision(hidden=4)
        encoder = SymmetricHash(64, centring=None)
        encoder.fit(q, k, steps=2)
        encoder.encode_key(k)
    encoder.fit(q, k, steps=2)
    attend.fit(q, k, encoder, steps=2)
    attn = composed("reference", selector, attend, encoder)
    attn(q[:, :, -1:], k, v).sum().backward()
    assert attend.a.grad is not None
    assert selector.inner.discount.grad is not None
    loaded = SymmetricHash(64, centring=None)
    with torch.inference_mode():
        loaded.load_state_dict(encoder.state_dict())
        attend.fit(q, k, encoder, steps=2)
    loaded.fit(q, k, steps=2)


def test_a_quantiser_made_in_inference_mode_is_a_plain_tensor():
    _, k, _ = qkv(7, keys=200)
    with torch.inference_mode():
        assert not PQ(4, sub_bits=4).fit(None, k).codebooks.is_inference()
