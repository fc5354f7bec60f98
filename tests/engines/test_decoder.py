"""Decoder on the CPU, where its operators run their specifications: plain, and compiled as one graph."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from hashattn import (
    AsymmetricHash,
    ExactAttend,
    FlatHamming,
    HashAttention,
    MixedPrecision,
    Recent,
    SimHash,
    Sink,
    Threshold,
    Tiers,
    TopK,
)
from hashattn.attend.mixed import CodeResidual
from hashattn.ops import decode
from tests.engines.families import FAMILIES
from tests.ops.decode.encoding import same_norms
from tests.structured import qkv

pytestmark = pytest.mark.filterwarnings("ignore:this AsymmetricHash is not fitted:UserWarning")
FUSED = {
    "sign": HashAttention(SimHash(64), FlatHamming(), Sink(4) | Recent(8) | TopK(share=0.1), engine="gpu"),
    "networks": HashAttention(
        AsymmetricHash(128, query_bits=2), FlatHamming(), TopK(k=30, per="kv_head"), engine="gpu"
    ),
    "networks of heads": HashAttention(AsymmetricHash(64, heads=2), FlatHamming(), TopK(k=30), engine="gpu"),
    "tiers": HashAttention(
        SimHash(128, 2), FlatHamming(), Sink(4) | Recent(8) | Tiers(0.05, 0.2), MixedPrecision(a=1.3), engine="gpu"
    ),
    "tiers of heads": HashAttention(
        AsymmetricHash(64, heads=2), FlatHamming(), Tiers(0.1, 0.3, per="kv_head"), MixedPrecision(), engine="gpu"
    ),
    "radius": HashAttention(SimHash(64, centring=None), FlatHamming(), Sink(2) | Threshold(radius=29), engine="gpu"),
    **{name: attn.replace(engine="gpu") for name, attn in FAMILIES.items()},
}
DENSE = FUSED["sign"].replace(engine="dense")


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    monkeypatch.setattr(decode.request, "DEVICES", ("cuda", "cpu"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def filled(attn, n=600, capacity=620):
    q, k, v = qkv(0, 2, keys=640, dim=64, group=4)
    cache = attn.new_cache(2, 2, 64, capacity=capacity)
    cache.append(k[:, :, :n], v[:, :, :n], start=torch.tensor([0, 50]))
    return q, k, v, cache


@pytest.mark.parametrize("attn", [*FUSED.values(), DENSE], ids=[*FUSED, "dense"])
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_steps_are_those_of_the_engine_in_one_graph_for_all_lengths(attn, backend):
    q, k, v, cache = filled(attn)
    decoder = attn.decoder(cache)
    decoder.prepare(q.shape[1])
    step = decoder.step
    if backend is not None:
        counter = CompileCounterWithBackend(backend)
        step = torch.compile(decoder.step, fullgraph=True, backend=counter)
    plain = filled(attn)[3]
    exact = attn.replace(engine="reference" if attn.engine == "gpu" else "dense")
    for n in range(600, 608):
        new = k[:, :, n : n + 1], v[:, :, n : n + 1]
        plain.append(*new)
        with torch._dynamo.config.patch(error_on_recompile=n > 600):
            out = step(q, *new, 0.1)
        assert (out - exact(q, plain, scale=0.1)).abs().max() < 1e-5
    assert backend is None or counter.frame_count == 1
    assert len(decoder.finish()) == 608
    assert torch.equal(cache.keys, plain.keys) and torch.equal(cache.values, plain.values)
    if cache.index is not None:  # vectors are rounded as a product of matrices of their number is
        torch.testing.assert_close(
            cache.codes, plain.codes, rtol=0, atol=1e-6 if cache.codes.is_floating_point() else 0
        )
    if cache.with_norms:
        same_norms(cache.norms, cache.keys, cache.centre)
    if attn is FUSED["radius"]:
        assert 0 < int(decoder.found) < 8 * 8 * 600


@pytest.mark.parametrize("attn", [FUSED["sign"], FUSED["tiers"], DENSE], ids=["fused", "tiers", "dense"])
def test_an_outgrown_cache_gives_nan_keeps_what_fitted_and_says_so(attn):
    q, k, v, cache = filled(attn, n=618)
    decoder = attn.decoder(cache)
    outs = [decoder(q, k[:, :, n : n + 1], v[:, :, n : n + 1]) for n in range(618, 622)]
    assert [bool(out.isnan().all()) for out in outs] == [False, False, True, True]
    assert not outs[1].isnan().any()
    with pytest.raises(ValueError, match="capacity is 620 columns, but 622"):
        decoder.finish()
    assert torch.equal(cache.keys[0], k[0, :, :620])
    if cache.with_norms:
        same_norms(cache.norms, cache.keys, cache.centre)
    assert len(decoder.finish()) == 620


def test_several_queries_at_a_time_and_what_is_refused():
    attn = FUSED["sign"]
    q, k, v, cache = filled(attn)
    decoder, plain = attn.decoder(cache), filled(attn)[3]
    three = torch.randn(2, 8, 3, 64)
    plain.append(k[:, :, 600:603], v[:, :, 600:603])
    out = decoder(three, k[:, :, 600:603], v[:, :, 600:603])
    assert (out - attn.replace(engine="reference")(three, plain)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="same positions, got T = 3 and 4"):
        decoder(three, k[:, :, :4], v[:, :, :4])
    with pytest.raises(ValueError, match="up to 16 queries at a time, not 17"):
        decoder(q.expand(-1, -1, 17, -1), k[:, :, :17], v[:, :, :17])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("encoder", "heads", "group", "dim", "per"),
    [
        (SimHash(64), 1, 1, 64, "query_head"),
        (SimHash(100, 2), 2, 3, 96, "kv_head"),
        (AsymmetricHash(128), 3, 5, 128, "query_head"),
        (AsymmetricHash(64, heads=2, centring=None), 2, 7, 64, "kv_head"),
    ],
    ids=["one head", "sum", "MLP", "in PyTorch"],
)
def test_tiers_of_any_shape_and_what_the_host_changes_between(encoder, heads, group, dim, per, dtype):
    selector = Sink(2) | Recent(3) | Tiers(0.1, 0.4, per=per)
    attn = HashAttention(encoder, FlatHamming(), selector, MixedPrecision(), engine="gpu")
    queries, k, v = qkv(1, 3, kv_heads=heads, group=group, tokens=420, keys=420, dim=dim, dtype=dtype)
    k = k + 1
    caches = [attn.new_cache(3, heads, dim, capacity=420) for _ in range(2)]
    for cache in caches:
        cache.append(k[:, :, :337], v[:, :, :337], start=torch.tensor([0, 41, 7]))
    decoder, plain = attn.decoder(caches[0]), attn.replace(engine="reference")
    near = (2e-5 if dtype == torch.float32 else 2**-7) * v.abs().max()
    for n, tokens in ((337, 1), (338, 3), (341, 16), (331, 2), (333, 1)):
        if n == 331:  # both have gone on to 357
            decoder.finish()
            for cache in caches:
                cache.crop(331)
                cache.reorder(torch.tensor([2, 0, 1]))
                cache.set_start(torch.tensor([12, 40, 7]))
            decoder.follow()
        q, new_k, new_v = (x[:, :, n : n + tokens] for x in (queries, k, v))
        out = decoder(q, new_k, new_v)
        caches[1].append(new_k, new_v)
        assert (out - plain(q, caches[1])).abs().max() <= near
    assert len(decoder.finish()) == 334
    assert torch.equal(caches[0].codes, caches[1].codes)
    same_norms(caches[0].norms, caches[0].keys, caches[0].centre)


@pytest.mark.parametrize("change", [{"attend": ExactAttend()}, {"engine": "dense"}], ids=["exact", "dense"])
def test_norms_stay_right_where_they_are_not_needed(change):
    attn = FUSED["tiers"]
    q, k, v, cache = filled(attn)
    decoder = attn.replace(**change).decoder(cache)
    for n in range(600, 604):
        decoder(q, k[:, :, n : n + 1], v[:, :, n : n + 1])
    assert len(decoder.finish()) == 604
    same_norms(cache.norms, cache.keys, cache.centre)


def test_a_fitted_residual_is_refused():
    attn = FUSED["tiers"].replace(attend=MixedPrecision(hidden=4))
    q, k, v, cache = filled(attn)
    attn.attend.residual = CodeResidual(attn.encoder.bits, 4)
    with pytest.raises(ValueError, match="or MixedPrecision without a residual"):
        attn.decoder(cache)(q, k[:, :, :1], v[:, :, :1])
    assert len(cache) == 600
