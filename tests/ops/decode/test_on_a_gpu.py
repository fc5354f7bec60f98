"""The fused decode step compiled, on a GPU, against its reference. Run with pytest -m gpu."""

from dataclasses import replace

import pytest
import torch

from hashattn import (
    AsymmetricHash,
    Consensus,
    ExactAttend,
    FlatHamming,
    HashAttention,
    LocalTopK,
    MixedPrecision,
    Recent,
    SimHash,
    Sink,
    Tiers,
    TopK,
)
from hashattn.ops.decode import Rule
from tests.ops.decode.cases import CASES, LOCAL_CASES, TIER_CASES, agrees, by_column, inputs, moved, ready, same
from tests.ops.decode.encoding import same_norms
from tests.structured import qkv

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["cuda", "triton"])
def decode(request):
    if request.param == "triton":
        from hashattn.ops.decode.triton.decode import decode
    else:
        from hashattn.ops.decode.cuda.decode import decode
    return decode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "rule"), CASES + LOCAL_CASES)
def test_it_selects_and_attends_as_the_reference_does(decode, shape, rule, dtype):
    agrees(decode, moved(inputs(1, **shape, dtype=dtype), "cuda"), rule)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "rule"), TIER_CASES)
def test_medium_keys_are_estimated_as_the_reference_does_and_not_read(decode, shape, rule, dtype):
    agrees(decode, moved(inputs(1, **shape, dtype=dtype), "cuda"), rule)


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize(
    "rule",
    [
        Rule(k=1024), Rule(share=0.02, shared=True, sinks=4, recents=64), Rule(k=1024, chunks=64, sinks=4, recents=64),
        Rule(k=256, chunks=8),
    ],
    ids=str,
)  # fmt: skip
def test_long_rows(decode, rule, clustered):
    shape = {"kv_heads": 2, "dim": 128, "filled": 131_000, "room": 131_072, "clustered": clustered}
    agrees(decode, moved(inputs(2, **shape, dtype=torch.bfloat16), "cuda"), rule)


@pytest.mark.parametrize("rule", [Rule(share=0.05, recents=8), Rule(k=64, chunks=4, recents=8)], ids=str)
def test_one_captured_step_serves_growing_lengths(decode, rule):
    x = ready(moved(inputs(3, filled=1000, room=4096), "cuda"), rule)
    x.stored.keys.normal_(), x.stored.values.normal_()
    decode(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode(x)
    for length in (1000, 1001, 1500, 4096, 3, 700):
        x.stored.length.fill_(length)
        graph.replay()
        assert same(captured, decode(ready(x, rule))), length


@pytest.mark.parametrize(
    "rule", [Rule(k=512), Rule(share=0.02, shared=True, sinks=4), Rule(k=512, chunks=32), Rule(k=64)], ids=str
)
@pytest.mark.parametrize("filled", [1500, 40_000])
def test_steps_that_start_while_the_last_ones_end_see_nothing_of_theirs(decode, rule, filled):
    x = inputs(6, kv_heads=8, dim=128, filled=filled, room=40_960, dtype=torch.bfloat16)
    x = ready(moved(x, "cuda"), rule, scale=0.1)
    steps = [(torch.randn_like(x.q), torch.randint_like(x.query, -(2**62), 2**62)) for _ in range(16)]

    def step(q, query):
        return decode(replace(x, q=q, query=query))

    expected = []
    for one in steps:
        expected.append(step(*one))
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [step(*one) for one in steps]
    for _ in range(5):
        graph.replay()
        assert all(same(own, alone) for own, alone in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:this AsymmetricHash is not fitted:UserWarning")
@pytest.mark.parametrize("encoder", [SimHash(64), AsymmetricHash(128)], ids=str)
@pytest.mark.parametrize("selector", [TopK(k=256), LocalTopK(k=256)], ids=str)
@torch.inference_mode()
def test_so_do_steps_with_their_encoding(encoder, selector):
    attn = HashAttention(encoder, FlatHamming(), Sink(4) | selector, engine="gpu").to("cuda")
    k, v = (torch.randn(1, 8, 5016, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    queries = torch.randn(16, 1, 32, 1, 128, dtype=torch.bfloat16, device="cuda")
    caches = [attn.new_cache(1, 8, 128, capacity=5016) for _ in range(2)]
    for cache in caches:
        cache.append(k[:, :, :5000], v[:, :, :5000])
    alone, at_once = (attn.decoder(cache) for cache in caches)
    newest = [(k[:, :, 5000 + i : 5001 + i].contiguous(), v[:, :, 5000 + i : 5001 + i].contiguous()) for i in range(16)]
    expected = []
    for q, new in zip(queries, newest, strict=True):
        expected.append(alone(q, *new))
        torch.cuda.synchronize()
    at_once.prepare(32)
    at_once.warm_up(32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [at_once(q, *new) for q, new in zip(queries, newest, strict=True)]
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    codes = (decoder.finish().storage("codes")[:, :, :5016] for decoder in (at_once, alone))
    assert torch.equal(*codes)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it takes two GPUs")
@pytest.mark.filterwarnings("ignore:this AsymmetricHash is not fitted:UserWarning")
@torch.inference_mode()
def test_a_step_runs_where_its_tensors_are_whichever_gpu_is_current():
    attn = HashAttention(AsymmetricHash(64), FlatHamming(), TopK(k=32), engine="gpu").to("cuda:1")
    q, k, v = (x.to("cuda:1") for x in qkv(9, 1, keys=501, dim=64, group=4))
    cache, plain = attn.new_cache(1, k.shape[1], 64, capacity=501), attn.replace(engine="reference")
    cache.append(k[:, :, :500], v[:, :, :500])
    assert torch.cuda.current_device() == 0
    found = attn.decoder(cache)(q, k[:, :, 500:], v[:, :, 500:])
    other = plain.new_cache(1, k.shape[1], 64)
    other.append(k, v)
    assert (found - plain(q, other)).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_the_step_waits_for_nothing(decode):
    x = ready(moved(inputs(4), "cuda"), Rule(k=9))
    decode(x)
    try:
        torch.cuda.set_sync_debug_mode("error")
        decode(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "selector",
    [TopK(share=0.05), TopK(share=0.05, per="kv_head"), LocalTopK(64, 16)],
    ids=["query_head", "kv_head", "local"],
)
def test_the_engine_gives_what_the_reference_gives_while_decoding(selector):
    q, k, v = (x.cuda() for x in qkv(5, 2, keys=900, dim=64, group=4, dtype=torch.bfloat16))
    attn = HashAttention(SimHash(128), FlatHamming(), Sink(4) | Recent(8) | selector, engine="gpu")
    plain, caches = attn.replace(engine="reference"), [attn.new_cache(2, 2, 64) for _ in range(2)]
    start = torch.tensor([0, 70], device="cuda")
    for cache in caches:
        cache.append(k[:, :, :800], v[:, :, :800], start=start)
    for n in range(800, 900, 20):
        for cache in caches:
            cache.append(k[:, :, n : n + 20], v[:, :, n : n + 20])
        (out, found), (exact, expected) = attn.run(q, caches[0]), plain.run(q, caches[1])
        assert torch.equal(found.ids.sort(-1).values[..., -expected.ids.shape[-1] :], expected.ids.sort(-1).values)
        assert (out.out - exact.out).abs().max() < 2e-2
        assert attn.choice(q, caches[0]).engine.name == "gpu"
        if n == 840:
            for cache in caches:
                cache.crop(700)
                cache.append(k[:, :, 700:n], v[:, :, 700:n])
                cache.reorder(torch.tensor([1, 0]))
                cache.set_start(torch.tensor([70, 0]))


@torch.inference_mode()
@pytest.mark.parametrize("per", ["query_head", "kv_head"])
@pytest.mark.parametrize("query_bits", [1, 2])
def test_tiers_of_a_composition(per, query_bits):
    q, k, v = (x.cuda() for x in qkv(9, 2, tokens=3, keys=900, dim=64, group=4, dtype=torch.bfloat16))
    selector = Sink(4) | Recent(8) | Tiers(0.05, 0.2, per=per)
    attn = HashAttention(SimHash(128, query_bits), FlatHamming(), selector, MixedPrecision(), engine="gpu")
    cache = attn.new_cache(2, 2, 64)
    cache.append(k + 1, v, start=torch.tensor([0, 70], device="cuda"))
    exact, expected = attn.replace(engine="reference").run(q, cache)
    for again in (False, True):  # with the bounds of the step before
        out, found = attn.run(q, cache)
        (ids, tier), (wanted, tiers) = (by_column(x, expected.ids.shape[-1]) for x in (found, expected))
        assert torch.equal(ids, wanted) and torch.equal(tier, tiers) and tier.any(), again
        assert (out.out - exact.out).abs().max() < 2e-2, again
        read = torch.zeros_like(cache.keys[..., 0], dtype=torch.bool)
        critical = ids.masked_fill(tier == 1, 0).unflatten(1, (2, -1)).flatten(2).clamp(min=0)  # of each KV head
        cache.keys.masked_fill_(~read.scatter(2, critical.long(), True).unsqueeze(-1), torch.nan)
    assert found.ids.shape[-1] % 64 == 0  # the fused step it was


def test_what_it_cannot_take_is_refused_by_name_and_left_alone_by_auto():
    q, k, v = (x.cuda() for x in qkv(6, keys=700, dim=80, dtype=torch.bfloat16))
    attn = HashAttention(SimHash(128), FlatHamming(), TopK(k=9), engine="gpu")
    with pytest.raises(ValueError, match="head_dim 64, 96, 128, 256, not 80"):
        attn(q, k, v)
    assert torch.isfinite(attn.replace(engine="auto")(q, k, v)).all()


def test_auto_searches_long_rows():
    attn = HashAttention(SimHash(128), FlatHamming(), TopK(k=64))
    plan = attn.explain(batch=8, q_heads=32, kv_heads=8, head_dim=128, keys=1 << 20, device="cuda")
    assert plan.engine == ("gpu" if torch.cuda.get_device_capability() == (9, 0) else "dense")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:this AsymmetricHash is not fitted:UserWarning")
@pytest.mark.parametrize(
    "encoder",
    [SimHash(64), AsymmetricHash(128, query_bits=2), AsymmetricHash(64, heads=2)],
    ids=["sign", "planes", "in PyTorch"],
)
@pytest.mark.parametrize("per", ["query_head", "kv_head"])
@pytest.mark.parametrize("tiers", [False, True], ids=["exact", "tiers"])
def test_a_captured_decoder_serves_until_the_cache_is_full(encoder, per, tiers):
    q, k, v = (x.cuda() for x in qkv(7, 2, keys=1024, dim=64, group=4, dtype=torch.bfloat16))
    queries = torch.randn(1024, *q.shape, device="cuda", dtype=q.dtype)
    selector, attend = TopK(share=0.1, per=per), ExactAttend()
    if tiers:
        selector, attend = Tiers(0.05, 0.1, per=per), MixedPrecision()
    attn = HashAttention(encoder, FlatHamming(), Sink(4) | selector, attend, engine="gpu").to("cuda")
    caches = [attn.new_cache(2, 2, 64, capacity=1024) for _ in range(2)]
    for cache in caches:
        cache.append(k[:, :, :600], v[:, :, :600], start=torch.tensor([0, 50], device="cuda"))
    decoder, plain = attn.decoder(caches[0]), attn.replace(engine="reference")
    step = [x[:, :, 600:601].clone() for x in (k, v)]
    decoder(q, *step)
    decoder.length.fill_(600)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decoder(q, *step)
    close = []
    for n in range(600, 1024):
        for held, new in zip((q, *step), (queries[n], k[:, :, n : n + 1], v[:, :, n : n + 1]), strict=True):
            held.copy_(new)
        graph.replay()
        caches[1].append(*step)
        if n % 20 == 0 or n == 1023:
            close.append((out - plain(q, caches[1])).abs().amax(-1) < 2e-2)
    assert torch.stack(close).float().mean() > 0.95  # a bit within rounding of zero may move a key at the cut
    assert len(decoder.finish()) == 1024
    assert torch.equal(caches[0].keys, caches[1].keys) and torch.equal(caches[0].values, caches[1].values)
    assert (caches[0].codes != caches[1].codes).float().mean() < 1e-3  # a bit within rounding of zero
    if tiers:
        same_norms(caches[0].norms, caches[0].keys, caches[0].centre)
    graph.replay()
    assert out.isnan().all()
    with pytest.raises(ValueError, match="capacity is 1024 columns, but 1025"):
        decoder.finish()
    assert torch.equal(caches[0].keys, caches[1].keys)
    assert torch.isfinite(plain(q, caches[0])).all()


def test_a_decoder_needs_room_and_a_served_composition():
    q, k, v = (x.cuda() for x in qkv(8, keys=600, dim=64, dtype=torch.bfloat16))
    attn = HashAttention(SimHash(64), FlatHamming(), TopK(k=9), engine="gpu")
    growing, short = attn.new_cache(1, 2, 64), attn.new_cache(1, 2, 64, capacity=700)
    growing.append(k, v)
    short.append(k[:, :, :9], v[:, :, :9])
    with pytest.raises(ValueError, match="capacity"):
        attn.decoder(growing)
    with pytest.raises(ValueError, match="the shortest holds 9"):
        attn.decoder(short)
    other = attn.replace(selector=Consensus(Consensus(TopK(k=9))))
    short.append(k, v)
    with pytest.raises(ValueError, match="it serves TopK, LocalTopK, Threshold and Tiers"):
        other.decoder(short)(q, k[:, :, :1], v[:, :, :1])
    assert len(short) == 609 and len(attn.decoder(short).finish()) == 609
