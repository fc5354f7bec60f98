"""DASH-KV and its ablations in fused steps and decoders, layer after layer, against the reference."""

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
    Momentum,
    Recent,
    SimHash,
    Sink,
    Step,
    Threshold,
    Tiers,
    TopK,
)
from hashattn.engines import gpu, gpus
from hashattn.engines.base import Call, Request
from hashattn.engines.choose import choose
from hashattn.engines.fused import FusedStep
from hashattn.engines.gpu import Gpu
from hashattn.ops import decode
from tests.ops.decode.cases import by_column
from tests.structured import qkv

pytestmark = pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")
BATCH, KV_HEADS, DIM, LAYERS = 2, 2, 64, 3
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FORCED = Sink(4) | Recent(8)
SELECTORS = {
    "dashkv": (FORCED | Momentum(Consensus(Tiers(0.1, 0.3), vote_share=0.3)), MixedPrecision()),
    "consensus": (FORCED | Consensus(TopK(share=0.1), vote_share=0.3), ExactAttend()),
    "momentum": (FORCED | Momentum(Consensus(TopK(share=0.1), vote_share=0.3), discount=5), ExactAttend()),
    "for a group": (Momentum(Consensus(TopK(k=40, per="kv_head")), ratio=2.0, discount=9), ExactAttend()),
    "tiers of a group": (FORCED | Momentum(Tiers(0.1, 0.3, per="kv_head", min_k=9)), MixedPrecision(a=1.3)),
}


def composition(name, encoder=None, engine="gpu"):
    selector, attend = SELECTORS[name]
    return HashAttention(encoder or SimHash(128), FlatHamming(), selector, attend, engine=engine)


def layers_of(attn, device, tokens=1, filled=400, capacity=440):
    """Queries, keys and values of layers, those of the next positions, and their caches."""
    made = []
    for seed in range(LAYERS):
        q, k, v = (x.to(device) for x in qkv(seed, BATCH, KV_HEADS, 3, tokens, filled + tokens, DIM))
        cache = attn.new_cache(BATCH, KV_HEADS, DIM, capacity=capacity)
        cache.append(k[:, :, :filled] + 1, v[:, :, :filled], start=torch.tensor([0, 70]))
        made.append((q, k[:, :, filled:] + 1, v[:, :, filled:], cache))
    return made


def alike(found, expected):
    """Selections keep the same keys, in the same tiers."""
    slots = expected.ids.shape[-1]
    if found.tier is None:  # ExactAttend ignores tiers
        found, expected = (replace(x, tier=torch.zeros_like(x.ids)) for x in (found, expected))
    return all(torch.equal(a, b) for a, b in zip(*(by_column(x, slots) for x in (found, expected)), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", SELECTORS)
@torch.no_grad()
def test_layers_keep_what_the_reference_keeps(name, tokens, device):
    attn = composition(name, engine="reference").to(device)
    wants, step, own = attn.selector.needs_weights, Step(), Step()
    for number, (q, k, v, cache) in enumerate(layers_of(attn, device, tokens)):
        cache.append(k, v)
        run = FusedStep(attn.parts, Request.of(q, cache))
        exact, expected = attn.run(q, cache, scale=0.3, step=step, need_weights=wants)
        for _ in range(2):  # the second time as it was made ready
            out, found = run(q, cache, Call(0.3, True, own, need_weights=wants))
            assert alike(found, expected)
            assert (out.out - exact.out).abs().max() <= 1e-5 * v.abs().max() * 4
        assert (out.weights is not None) == wants
        step = Step(number + 1, expected, exact.weights)
        own = Step(number + 1, found, out.weights)


@pytest.fixture
def anywhere(monkeypatch):
    monkeypatch.setattr(decode.request, "DEVICES", ("cuda", "cpu"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SELECTORS)
@torch.no_grad()
def test_decoders_hand_on_what_they_kept(name, device, anywhere):
    attn = composition(name, AsymmetricHash(64, query_hidden=(24, 24))).to(device)
    plain, layers = attn.replace(engine="reference"), layers_of(attn, device)
    twins, wants = layers_of(plain, device), attn.selector.needs_weights
    decoders = [attn.decoder(cache) for *_, cache in layers]
    for decoder in decoders:
        decoder.prepare(layers[0][0].shape[1])
        decoder.warm_up(layers[0][0].shape[1])
        assert decoder.kept is None

    def one_pass():
        outs, before = [], None
        for (q, k, v, _), decoder in zip(layers, decoders, strict=True):
            outs.append(decoder(q, k, v, scale=0.3, before=before))
            before = decoder.kept
            assert (before is not None) == wants
        return outs

    replay, outs = one_pass, None
    if device == "cuda":
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            one_pass()  # compiles the kernels of layers that follow one
        torch.cuda.synchronize()
        for decoder in decoders:
            decoder.follow()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outs = one_pass()
        replay = graph.replay
    for _ in range(3):
        outs = replay() or outs
        step = Step()
        for number, (out, (q, k, v, cache)) in enumerate(zip(outs, twins, strict=True)):
            cache.append(k, v)
            exact, expected = plain.run(q, cache, scale=0.3, step=step, need_weights=wants)
            step = Step(number + 1, expected, exact.weights)
            close = (out - exact.out).abs().amax(-1) <= 1e-4 * v.abs().max()
            assert close.all() if device == "cpu" else close.float().mean() > 0.9  # a bit near zero may round


def test_a_discount_that_is_learned_meanwhile_counts():
    attn = composition("momentum", engine="reference")
    momentum = attn.selector.ranked_part
    (q, k, v, cache), step = layers_of(attn, "cpu")[0], Step()
    cache.append(k, v)
    run = FusedStep(attn.parts, Request.of(q, cache))
    for amount in (0.0, 7.0, -3.0):
        with torch.no_grad():
            momentum.inner.discount.fill_(amount)
            found = run(q, cache, Call(0.3, True, step, need_weights=True))[1]
            expected = attn.run(q, cache, scale=0.3, step=step, need_weights=True)[1]
        assert alike(found, expected)


def test_gradients_of_discounts_are_the_references():
    attn = composition("consensus", engine="reference")
    q, k, v, cache = layers_of(attn, "cpu")[0]
    cache.append(k, v)
    out, _ = FusedStep(attn.parts, Request.of(q, cache))(q, cache, Call(0.3, True, Step()))
    out.out.sum().backward()
    assert attn.selector.ranked_part.discount.grad is not None


@pytest.mark.parametrize(
    ("selector", "reason"),
    [
        (Consensus(LocalTopK(k=64)), "not around LocalTopK and Threshold"),
        (Momentum(Threshold(9, limit=40)), "not around LocalTopK and Threshold"),
        (Consensus(TopK(k=9), discount=300), "up to 240 together, not 300 and 0"),
        (Consensus(Momentum(TopK(k=9))), "Consensus and Momentum around them, not Consensus"),
        (Consensus(TopK(k=9, per="kv_head", combine="union")), 'with combine="sum"'),
    ],
    ids=repr,
)
def test_what_is_not_served_is_named(selector, reason):
    attn = HashAttention(SimHash(128), FlatHamming(), selector)
    reasons = Gpu().why_not(attn.parts, Request(torch.device("cuda"), torch.bfloat16, 1, 32, 8, 128))
    assert len(reasons) == 1 and reason in reasons[0]


def test_auto_does_not_search_before_such_steps_were_measured(monkeypatch):
    figures, plain = gpus.Gpu((9, 0), 1 << 24, 1 << 23, "a file"), HashAttention(SimHash(128), FlatHamming(), TopK(k=9))
    asked = Request(torch.device("cuda"), torch.bfloat16, 1, 32, 8, 128)  # 4,096 bytes a key
    votes = plain.replace(selector=Consensus(TopK(k=9)))
    for measured, expected in ((None, None), ((6144 * 4096, 1 << 23), 6144)):
        own = replace(figures, calibrated=measured)
        monkeypatch.setattr(gpu, "this_gpu", lambda _, own=own: ("a GPU", own))
        assert Gpu().crossover(plain.parts, asked) == 4096
        assert Gpu().crossover(votes.parts, asked) == expected
        assert bool(Gpu().measured(votes.parts, asked)) == (expected is not None)
        chosen = choose(votes.parts, asked)
        assert (chosen.engine.name, chosen.crossover) == (("gpu", 6144) if expected else ("dense", None))


@pytest.mark.parametrize("name", ["dashkv", "dashkv_consensus", "dashkv_momentum", "dashkv_symmetric"])
def test_the_plan_of_a_preset_names_the_kernels(name):
    attn = HashAttention.from_preset(name, engine="gpu")
    plan = str(attn.explain(q_heads=32, kv_heads=8, head_dim=128, keys=131_072, device="cuda"))
    assert "CUDA C++, one kernel that counts votes and discounts what is listed (calibrate)" in plan
