"""NaN in, NaN out: no engine makes a number of what is none, and no broken query hides a key from a later one."""

import pytest
import torch

from hashattn import (
    Channels,
    CollisionSample,
    Consensus,
    CrossPolytope,
    DenseAttend,
    FlatBuckets,
    FlatDot,
    FlatHamming,
    FlatRaBitQ,
    HashAttention,
    HeavyHitters,
    Identity,
    LocalTopK,
    MixedPrecision,
    Momentum,
    MultiProbe,
    ObservationWindow,
    Pages,
    RaBitQ,
    RandomTail,
    Recent,
    Refine,
    Reuse,
    SampledAttend,
    SimHash,
    Sink,
    Threshold,
    Tiers,
    TopK,
    TopP,
)
from hashattn.integrations.attached.simulate import Simulation
from hashattn.ops import attend as ops
from hashattn.ops.hamming import cpu, reference
from tests.structured import qkv

PLAIN = SimHash(64, centring=None)
SAMPLES = SimHash(CollisionSample(20, 4).code_bits, centring=None, orthogonal=False)
COMPOSITIONS = {
    "Channels": HashAttention(Identity(), Channels(4), TopK(k=3)),
    "CollisionSample": HashAttention(SAMPLES, FlatHamming(), Sink(1) | CollisionSample(20, 4), SampledAttend()),
    "Consensus": HashAttention(PLAIN, FlatHamming(), Sink(1) | Consensus(TopK(k=3))),
    "CrossPolytope": HashAttention(CrossPolytope(9, 8, None), FlatBuckets(), TopK(k=3)),
    "FlatDot": HashAttention(Identity(), FlatDot(), TopK(k=3)),
    "FlatDot of a group": HashAttention(Identity(), FlatDot(), TopK(k=3, per="kv_head")),
    "FlatRaBitQ": HashAttention(RaBitQ(centring=None), FlatRaBitQ(), TopK(k=3)),
    "HeavyHitters": HashAttention(selector=HeavyHitters(k=9)),
    "LocalTopK": HashAttention(PLAIN, FlatHamming(), LocalTopK(4, 2)),
    "MixedPrecision": HashAttention(PLAIN, FlatHamming(), Tiers(0.1, 0.3), MixedPrecision()),
    "Momentum": HashAttention(PLAIN, FlatHamming(), Momentum(TopK(k=3))),
    "MultiProbe": HashAttention(SimHash(64, 4, None), MultiProbe(4, 4, 8), Sink(2) | TopK(k=5)),
    "ObservationWindow": HashAttention(selector=ObservationWindow(k=9, window=2, pool=1)),
    "Pages": HashAttention(Identity(), Pages(4), TopK(k=3)),
    "RandomTail": HashAttention(PLAIN, FlatHamming(), RandomTail(TopK(k=3), k=3), SampledAttend(errors=True)),
    "Refine": HashAttention(PLAIN, FlatHamming(), Refine(TopK(k=3))),
    "Refine, ties": HashAttention(PLAIN, FlatHamming(), Refine(TopK(k=3, per="kv_head"), ties=True)),
    "Reuse": HashAttention(PLAIN, FlatHamming(), Reuse(TopK(k=3), every=2)),
    "Sink and Recent": HashAttention(selector=Sink(2) | Recent(2)),
    "Threshold": HashAttention(PLAIN, FlatHamming(), Sink(1) | Threshold(32)),
    "TopK": HashAttention(PLAIN, FlatHamming(), TopK(k=3)),
    "TopK of 4 planes": HashAttention(SimHash(64, 4, None), FlatHamming(), TopK(k=3)),
    "TopP": HashAttention(PLAIN, FlatHamming(), TopP(TopK(k=9), 0.5)),
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("engine", ["reference", "cpu", "dense"])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_broken_query_has_a_broken_output_and_no_other(name, engine, value):
    attn = COMPOSITIONS[name].replace(engine=engine)
    q, k, v = qkv(1, 2, tokens=2, keys=40)
    start = torch.tensor([0, 38])  # the second row sees one key or two: it has empty slots
    cache = attn.new_cache(2, 2, 16)
    cache.append(k, v, start=start)
    clean = attn(q, cache)
    broken = q.clone()
    broken[:, 1, 1] = value
    found = attn(broken, cache)
    assert found[:, 1, 1].isnan().all()
    found[:, 1, 1] = 0
    assert found.isfinite().all()
    if COMPOSITIONS[name].selector.shared or not name.startswith(("Heavy", "Consensus", "Momentum")):
        assert clean.isfinite().all()
    assert attn(q, cache).isfinite().all()  # and what it left behind breaks nobody


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("engine", ["reference", "cpu", "dense"])
@pytest.mark.parametrize("where", ["k", "v", "scale"])
def test_what_is_kept_is_not_made_finite(where, engine, value):
    attn = HashAttention(PLAIN, FlatHamming(), Sink(4) | TopK(k=6), engine=engine)
    q, k, v = qkv(2, 2, tokens=2, keys=40)
    scale = value if where == "scale" else None
    if where != "scale":
        {"k": k, "v": v}[where][:, :, 38, :] = value  # what the last rows keep, among sinks
    found = attn(q, k, v, start=torch.tensor([0, 38]), scale=scale)
    assert not found[1].isfinite().any()
    if where == "scale":
        assert not found.isfinite().any()


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_a_query_that_sees_nothing_gives_zeros_beside_values_that_are_none(engine):
    attn = HashAttention(PLAIN, FlatHamming(), TopK(k=3), engine=engine)
    q, k, v = qkv(3, 2, keys=20)
    v[1] = torch.nan
    cache = attn.new_cache(2, 2, 16)
    cache.append(k, v)
    cache.set_start(torch.tensor([0, 20]))  # padding that was not zeroed
    output, _ = attn.run(q, cache, need_lse=True)
    assert output.out[0].isfinite().all()
    assert not output.out[1].any()
    assert (output.lse[1] == -torch.inf).all()


def test_the_engines_agree_on_softmaxes_of_everything():
    values = torch.randn(1, 1, 6, 4)
    ids = torch.tensor([[0, 1, 2, -1], [3, -1, -1, -1], [-1, -1, -1, -1], [0, 2, 4, 5]], dtype=torch.int32).view(
        1, 1, 4, 4
    )
    for given in (
        [0.0, torch.nan, 1.0],
        [torch.inf, 1.0, 0.0],
        [-torch.inf] * 3,
        [-torch.inf, 2.0, 1.0],
        [0.0, 1.0, 2.0],
    ):
        logits = torch.tensor([*given, 7.0]).expand(1, 1, 4, 1, 4).clone()
        for chosen in (ids, ids.clamp(min=0)):
            parts = [
                ops.weigh(logits, values, chosen, torch.float32, need_lse=True, need_weights=True, host=host)
                for host in (False, True)
            ]
            for a, b in zip(*parts, strict=True):
                assert torch.allclose(a, b, equal_nan=True), given


def test_planes_of_what_is_not_finite_are_the_same():
    x = torch.randn(3, 65)
    x[0, 3], x[1, 5], x[2] = torch.nan, torch.inf, torch.nan
    for bits in (1, 2, 4, 8):
        assert torch.equal(cpu.query_planes(x, bits), reference.query_planes(x, bits))


def test_norms_beyond_float16_are_kept():
    attn = HashAttention(PLAIN, FlatHamming(), Tiers(0.1, 1.0), MixedPrecision(), engine="reference")
    q, k, v = qkv(4, keys=30)
    for engine in ("reference", "cpu"):
        cache = attn.new_cache(1, 2, 16)
        cache.append(1e5 * k, v)
        out = attn.replace(engine=engine)(1e-5 * q, cache)
        norms = (1e5 * k.double()).norm(dim=-1, keepdim=True)
        assert ((cache.norms.double() - norms).abs() <= 2**-8 * norms).all()
        small = attn.new_cache(1, 2, 16)
        small.append(k, v)
        assert torch.allclose(out, attn.replace(engine=engine)(q, small), atol=0.02)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("engine", ["reference", "cpu", "dense"])
@pytest.mark.parametrize("name", [*COMPOSITIONS, "DenseAttend"])
def test_keys_that_a_query_does_not_see_do_not_matter_to_it(name, engine, value):
    attn = COMPOSITIONS[name] if name in COMPOSITIONS else HashAttention(attend=DenseAttend())
    attn = attn.replace(engine=engine)
    q, k, v = qkv(5, 2, tokens=2, keys=40)

    def outputs(fill, last):
        keys, values = k.clone(), v.clone()
        for x in (keys, values):
            x[1, :, :20] = fill
            x[:, :, -1] += last
        cache = attn.new_cache(2, 2, 16)
        cache.append(keys, values)
        cache.set_start(torch.tensor([0, 20]))  # padding that was not zeroed
        output, _ = attn.run(q, cache, need_lse=True, need_weights=True)
        return output

    clean = outputs(0.0, 0.0)
    for last in (0.0, value):
        if last and name == "Pages" and engine != "dense":  # its bounds are of all keys of a block
            continue
        found, queries = outputs(value, last), slice(0, 1 if last else 2)  # the last key is seen by one query alone
        assert torch.equal(found.out[:, :, queries], clean.out[:, :, queries])
        assert torch.equal(found.lse[:, :, queries], clean.lse[:, :, queries])
        if last and isinstance(attn.selector, Recent | None):
            assert found.out[:, :, 1].isnan().all()


def test_gradients_of_what_a_query_sees_are_finite_beside_what_it_does_not_see():
    q, k, v = qkv(6, tokens=2, keys=9)
    k[:, :, 0] = v[:, :, 0] = torch.nan
    k, v, q = (x.requires_grad_() for x in (k, v, q))
    HashAttention(attend=DenseAttend())(q, k, v, start=torch.tensor([1])).sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("name", ["Sink and Recent", "TopK", "HeavyHitters"])
def test_padding_does_not_matter_to_what_is_simulated(name):
    q, k, v = qkv(7, 2, tokens=30, keys=40)
    starts = [0, 15]
    outs = []
    for fill in (0.0, torch.nan):
        for x in (k, v):
            x[1, :, :15] = fill
        outs.append(Simulation(COMPOSITIONS[name], 0, starts, None).attend(q, k, v, ())[0])
    assert torch.equal(*outs)


def test_a_captured_dense_step_reads_nothing_that_is_not_there():
    attn = HashAttention(selector=Sink(1), engine="dense")
    q, k, v = qkv(8, 2, keys=40)
    outs = []
    for fill in (0.0, torch.nan):
        cache = attn.new_cache(2, 2, 16, capacity=48)
        keys, values = k.clone(), v.clone()
        for x in (keys, values):
            x[1, :, :20] = fill
            x[:, :, 30:] = fill
        cache.append(keys, values)
        cache.crop(30)
        cache.set_start(torch.tensor([0, 20]))
        outs.append(attn.decoder(cache)(q, k[:, :, :1], v[:, :, :1]))
    assert torch.equal(*outs)
