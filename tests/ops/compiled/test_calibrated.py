"""Compiled steps calibrate distances as Consensus and Momentum do: the same keys, tiers and outputs, and weights."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import (
    AsymmetricHash,
    Consensus,
    ExactAttend,
    HashAttention,
    Momentum,
    Recent,
    Selection,
    SimHash,
    Sink,
    Step,
    SymmetricHash,
    Threshold,
    Tiers,
    TopK,
)
from hashattn.attend.mixed import CodeResidual
from hashattn.core.types import MEDIUM
from hashattn.engines.base import Request
from hashattn.engines.host import why_not_compiled
from hashattn.ops import scratch
from hashattn.ops.attend.reference import logits, weigh
from hashattn.ops.compiled import step as compiled
from hashattn.ops.compiled import why_not
from hashattn.ops.decode import Inputs, KernelRequest, Rule
from hashattn.ops.decode.reference import estimated
from hashattn.ops.hamming.reference import distances
from tests.ops.decode.cases import inputs, norms_of, only_read, poisoned
from tests.structured import generator, make_view, seeds

INNER = {
    "TopK": TopK(share=0.2),
    "TopK of a group": TopK(k=30, per="kv_head"),
    "Tiers": Tiers(0.1, 0.25),
    "Tiers of a group": Tiers(0.1, 0.3, per="kv_head", min_k=2),
    "Threshold": Threshold(28),
    "Threshold of a group": Threshold(28, limit=40, per="kv_head"),
    "everything": TopK(share=1.0),
}


def calibrated(inner, *, votes=2.0, share=0.5, prior=3.0, ratio=1.0, forced=(2, 5)):
    """The selector inside Consensus and Momentum, of discounts that may be below zero; None leaves one out."""
    if votes is not None:
        inner = Consensus(inner, vote_share=share)
        inner.discount.data.fill_(votes)
    if prior is not None:
        inner = Momentum(inner, ratio=ratio)
        inner.discount.data.fill_(prior)
    return Sink(forced[0]) | Recent(forced[1]) | inner


def before_it(x: Inputs, shared: bool = False, slots: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, some of them empty, and weights, a few of which are large, of the layer before."""
    (batch, q_heads, tokens, _), kv_heads = x.q.shape, x.stored.keys.shape[1]
    g, filled = generator(7), int(x.stored.length)
    heads = kv_heads if shared else q_heads
    ids = torch.rand(batch, heads, tokens, filled, generator=g).argsort(-1)[..., :slots].to(torch.int32)
    ids = ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.2, -1)
    given = torch.softmax(4 * torch.randn(batch, q_heads, tokens, ids.shape[-1], generator=g), -1)
    return ids, given.masked_fill(ids.repeat_interleave(q_heads // heads, 1) < 0, 0)


def by_column(ids: torch.Tensor, *held: torch.Tensor) -> list[torch.Tensor]:
    ids, order = ids.sort(-1)
    group = [x.shape[1] // ids.shape[1] for x in held]
    return [ids, *(x.gather(-1, order.repeat_interleave(n, 1)) for x, n in zip(held, group, strict=True))]


@torch.no_grad()
def agrees(x: Inputs, selector, before=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Twice, in scratch memory that holds NaN. Returns what the reference kept, and its weights."""
    (_, q_heads, _, _), kv_heads = x.q.shape, x.stored.keys.shape[1]
    filled, bits = int(x.stored.length), 64 * x.stored.codes.shape[3]
    rule = replace(selector.rule(q_heads // kv_heads), biased=x.rule.biased)
    query = x.query.squeeze(3) if x.query.shape[3] == 1 else x.query
    raw = distances(query, x.stored.codes[:, :, :filled], biased=rule.biased)
    view = make_view(raw, kv_heads, x.starts.tolist(), x.causal)
    step = Step() if before is None else Step(1, Selection(before[0]), before[1])
    expected = selector.select(view, step)
    if not expected.ids.shape[-1]:  # of queries that see nothing
        expected = Selection(torch.full((*expected.ids.shape[:3], 1), -1, dtype=torch.int32))
    estimate = norms_of(x, bits - 3) if rule.critical is not None else None
    x = replace(x, rule=rule, estimate=estimate)
    tier = torch.zeros_like(expected.ids, dtype=torch.int8) if expected.tier is None else expected.tier
    scores = logits(x.q, x.stored.keys, expected.ids, x.scale)
    if estimate is not None:
        scores = torch.where((tier == MEDIUM).unsqueeze(3), estimated(x, expected.ids) * x.scale, scores)
    out, lse, weights = weigh(scores, x.stored.values, expected.ids, x.q.dtype, need_lse=True, need_weights=True)
    assert lse is not None and weights is not None
    readable = x if estimate is None else only_read(x, expected.ids, tier)
    centre = torch.zeros(*x.stored.keys.shape[:2], x.q.shape[3]) if estimate is None else estimate.centre
    ready = compiled.Step(readable, bits if estimate is None else estimate.bits, (None, None), centre)
    columns = max(0, filled - int(x.starts.min())), filled, filled
    for _ in range(2):
        for buffer in scratch._BUFFERS.held.values():
            buffer.fill(255)
        with poisoned():
            found = ready(x.q, x.query, columns, x.scale, True, True, before)
        assert found.weights is not None and (found.tier is None) == (rule.critical is None)
        own = by_column(found.ids, torch.zeros_like(found.ids) if found.tier is None else found.tier, found.weights)
        kept = by_column(expected.ids, tier, weights)
        slots = min(own[0].shape[-1], kept[0].shape[-1])
        assert all((ids[..., :-slots] == -1).all() for ids, *_ in (own, kept))
        (ids, tiers, given), (as_ids, as_tiers, as_weights) = ([t[..., -slots:] for t in y] for y in (own, kept))
        assert torch.equal(ids, as_ids) and torch.equal(tiers * (ids >= 0), as_tiers * (ids >= 0))
        assert torch.allclose(given, as_weights, atol=1e-5, rtol=1e-4)
        assert torch.allclose(found.out.float(), out.float(), atol=2e-5 if x.q.dtype == torch.float32 else 2e-2)
        assert torch.allclose(found.lse, lse, atol=1e-4, equal_nan=True)
    return expected.ids, weights


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    "sizes",
    [
        {"kv_heads": 3, "group": 3, "filled": 900, "room": 1000},
        {"kv_heads": 2, "group": 2, "batch": 2, "tokens": 3, "words": 2, "starts": (0, 77), "filled": 333, "room": 340},
        {"kv_heads": 1, "group": 5, "filled": 64, "room": 64, "dim": 24, "dtype": torch.bfloat16},
        {"kv_heads": 2, "group": 2, "words": 4, "planes": 2, "filled": 700, "room": 704, "clustered": True},
        {"kv_heads": 2, "group": 2, "batch": 2, "biased": True, "starts": (0, 290), "filled": 300, "room": 320},
    ],
    ids=lambda sizes: "-".join(f"{name}={size}" for name, size in sizes.items()),
)
def test_keys_tiers_weights_and_outputs_are_the_references(inner, sizes):
    x = inputs(3, **sizes)
    x = replace(x, rule=Rule(k=1, biased=sizes.get("biased", False)))
    if sizes.get("biased") and "Tiers" in inner:
        pytest.skip("estimates are of codes without a bias")
    for options in ({}, {"votes": None}, {"prior": None, "share": 0.2}, {"votes": 9.0, "prior": -4.0}):
        for before in (None, before_it(x), before_it(x, shared=True)):
            agrees(x, calibrated(INNER[inner], **options), before)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    keys=st.integers(1, 300),
    inner=st.sampled_from(sorted(INNER)),
    kinds=st.integers(1, 9),
    votes=st.sampled_from([-3.0, 0.0, 1.0, 5.0, 16.0]),
    prior=st.sampled_from([-2.0, 0.4, 3.0, 8.0]),
    share=st.sampled_from([0.05, 1 / 3, 0.5, 1.0]),
    ratio=st.sampled_from([0.0, 1.0, 3.0]),
    forced=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    start=st.integers(0, 320),
    causal=st.booleans(),
)
def test_ties_votes_and_windows(seed, keys, inner, kinds, votes, prior, share, ratio, forced, start, causal):
    """Few different codes, so that most distances tie and discounts break or make ties."""
    x = inputs(seed, filled=keys, room=keys, kv_heads=2, group=2, dim=8, tokens=min(2, keys))
    few = x.stored.codes[:, :, torch.randint(0, keys, (keys,), generator=generator(seed)) % kinds % keys]
    first = torch.tensor([min(start, keys)], dtype=torch.int32)
    x = replace(x, stored=replace(x.stored, codes=few), starts=first, causal=causal)
    selector = calibrated(INNER[inner], votes=votes, prior=prior, share=share, ratio=ratio, forced=forced)
    agrees(x, selector, before_it(x))


@pytest.mark.parametrize("words", [5, 16])
def test_distances_that_a_byte_does_not_hold(words):
    """Bytes are above a base, which moves when either pass ends elsewhere."""
    for planes in (1, 4):
        x = inputs(words, words=words, planes=planes, kv_heads=2, group=2, dim=8, filled=999, room=1000)
        for share, inner in ((0.02, TopK(share=0.02)), (0.9, TopK(share=0.9)), (0.5, Tiers(0.01, 0.97))):
            for amount in (3.0, 25.0):
                selector = calibrated(inner, votes=amount, prior=amount, share=min(share, 0.5))
                agrees(x, selector, before_it(x, slots=300))
        shared = calibrated(Tiers(0.05, 0.5, per="kv_head"), votes=20.0, prior=5.0, share=0.2)
        agrees(x, shared, before_it(x, slots=300))


def test_momentum_crosses_the_layers_of_a_pass():
    before = own = None
    for layer in range(4):
        x = inputs(layer, kv_heads=3, group=3, filled=800, room=900, tokens=2)
        before = agrees(x, calibrated(INNER["Tiers"]), before)
        assert own is None or not torch.equal(own[0], before[0])
        own = before


def test_threads_that_share_the_heads_of_a_query_and_threads_that_share_rows_give_what_one_gives(monkeypatch):
    monkeypatch.setattr("hashattn.ops.compiled.threads._WORTH", 1.0)
    cases = [inputs(i, kv_heads=3, group=2, filled=900, room=1000, batch=batch) for i, batch in enumerate((1, 2, 4))]
    selector, found = calibrated(TopK(share=0.1)), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for x in cases:
                rule = selector.rule(2)
                step = compiled.Step(replace(x, rule=rule), 64, (None, None), torch.zeros(len(x.q), 3, 64))
                runs = [step(x.q, x.query, (900, 900, 900), x.scale, True, True, before_it(x)) for _ in range(9)]
                assert all(
                    torch.equal(a, b) for one in runs[1:] for a, b in zip(one, runs[0], strict=True) if a is not None
                )
                found.append(runs[0])
    finally:
        torch.set_num_threads(1)
    for alone, together in zip(found[:3], found[3:], strict=True):
        assert torch.equal(alone.ids, together.ids) and torch.equal(alone.out, together.out)


def test_a_layer_before_of_another_shape_is_refused():
    x = inputs(1, filled=100, room=100)
    step = compiled.Step(replace(x, rule=calibrated(TopK(k=5)).rule(4)), 64, (None, None), torch.zeros(1, 1, 64))
    ids, weights = before_it(x)
    for other in ((ids.repeat(2, 1, 1, 1), weights.repeat(2, 1, 1, 1)), (ids, weights[..., 1:])):
        with pytest.raises(ValueError, match="what the layer before kept must be of"):
            step(x.q, x.query, (100, 100, 100), x.scale, before=other)


def test_what_it_does_not_serve_is_named():
    asked = KernelRequest(torch.device("cpu"), torch.float32, 512, 2, 64, 2, 1, Rule(k=8, vote_share=0.5))
    assert why_not(asked) == ["they count the votes of up to 255 choices, not 512"]
    far = Rule(k=8, shared=True, vote_share=0.5, vote_discount=-8, prior_ratio=1.0, prior_discount=5)
    assert why_not(replace(asked, q_heads=16, rule=far)) == [
        "they serve discounts of Consensus and Momentum up to 100 together, not 104"
    ]


# ---- whole compositions

PRESETS = ("dashkv", "dashkv_hash_only", "dashkv_consensus", "dashkv_momentum", "dashkv_symmetric")


def passes(attn: HashAttention, tokens: int = 1, batch: int = 2, layers: int = 3):
    """Outputs and selections of layers that follow each other, of an attention and of its reference."""
    g = generator(11)
    wants, both = attn.selector.needs_weights, (attn, attn.replace(engine="reference"))
    steps = [Step(1), Step(1)]
    for _ in range(layers):
        k, v = (torch.randn(batch, 3, 400, 32, generator=g) for _ in range(2))
        q, found = torch.randn(batch, 9, tokens, 32, generator=g), []
        for i, one in enumerate(both):
            cache = one.new_cache(batch, 3, 32)
            cache.append(k[:, :, :-1], v[:, :, :-1], start=torch.arange(batch) * 30)
            cache.encode()
            cache.append(k[:, :, -1:], v[:, :, -1:])
            output, selection = one.run(q, cache, step=steps[i], need_weights=wants)
            steps[i] = Step(1, selection, output.weights)
            found.append((output, selection))
        yield found


@pytest.mark.filterwarnings("ignore:.*is not fitted")
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_presets_run_in_the_compiled_step_and_keep_what_the_reference_keeps(name, tokens, monkeypatch):
    attn = HashAttention.from_preset(name, engine="cpu", sinks=2, recent=9)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attn.encoder.build(32)
        for parameter in attn.encoder.parameters():  # an MLP that does something
            parameter.data += 0.05 * torch.randn_like(parameter)
    monkeypatch.setattr("hashattn.engines.host.Stages", None)  # which nothing here may need
    for (output, selection), (expected, kept) in passes(attn, tokens):
        ids, tiers = by_column(selection.ids, selection.tier if selection.tier is not None else selection.ids)
        as_ids, as_tiers = by_column(kept.ids, kept.tier if kept.tier is not None else kept.ids)
        assert torch.equal(ids, as_ids) and torch.equal(tiers * (ids >= 0), as_tiers * (ids >= 0))
        assert torch.allclose(output.out, expected.out, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is not fitted")
def test_discounts_and_scales_are_read_anew_at_every_step():
    attn = HashAttention.from_preset("dashkv", engine="cpu", encoder=SimHash(64), sinks=1, recent=1, vote_share=0.2)
    momentum = attn.selector.ranked_part
    cache, g = attn.new_cache(1, 2, 16), generator(1)
    cache.append(*(torch.randn(1, 2, 500, 16, generator=g) for _ in range(2)))
    q, seen = torch.randn(1, 8, 1, 16, generator=g), []
    with torch.no_grad():
        for change in (None, momentum.inner.discount, momentum.discount, attn.attend.a):
            if change is not None:
                change.data.mul_(5)
            before = Step(1, *attn.replace(engine="reference").run(q, cache, need_weights=True)[::-1])
            before = replace(before, previous_weights=before.previous_weights.weights)
            output, _ = attn.run(q, cache, step=before)
            expected, _ = attn.replace(engine="reference").run(q, cache, step=before)
            assert torch.allclose(output.out, expected.out, atol=1e-5)
            assert not any(torch.allclose(output.out, other, atol=1e-6) for other in seen)
            seen.append(output.out)


@pytest.mark.filterwarnings("ignore:.*is not fitted")
@pytest.mark.parametrize(("bits", "hidden"), [(128, 32), (100, 5), (250, 40)])
@torch.no_grad()
def test_a_residual_of_estimates_is_the_references(bits, hidden):
    attn = HashAttention.from_preset("dashkv", engine="cpu", encoder=SimHash(bits), sinks=1, recent=2, t2=0.5)
    plain = [found[0][0].out for found in passes(attn, tokens=2)]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        attn.attend.residual = CodeResidual(bits, hidden)
        for parameter in attn.attend.residual.parameters():
            parameter.data = 0.1 * torch.randn_like(parameter)
    asked = Request(torch.device("cpu"), torch.float32, 2, 9, 3, 32)
    assert not why_not_compiled(attn.parts, asked)
    for ((output, selection), (expected, kept)), without in zip(passes(attn, tokens=2), plain, strict=True):
        ids, given = by_column(selection.ids, output.weights)
        as_ids, as_given = by_column(kept.ids, expected.weights)
        assert torch.equal(ids, as_ids) and torch.allclose(given, as_given, atol=1e-5)
        assert torch.allclose(output.out, expected.out, atol=1e-5)
        assert not torch.allclose(output.out, without, atol=1e-3)
    cache = attn.new_cache(1, 2, 16)
    cache.append(torch.randn(1, 2, 500, 16), torch.randn(1, 2, 500, 16))
    for scale in (1.0, 2.0):  # kept steps follow what is learned, and what is put in its place
        attn.attend.residual.out.weight.mul_(scale)
        q = torch.randn(1, 8, 1, 16)
        assert torch.allclose(attn(q, cache), attn.replace(engine="reference")(q, cache), atol=1e-5)
    attn.attend.residual = None
    assert torch.allclose(attn(q, cache), attn.replace(engine="reference")(q, cache), atol=1e-5)
    attn.attend.residual = CodeResidual(bits + 8, hidden)
    with pytest.raises(ValueError, match=f"must be of codes of {bits} bits"):
        attn(q, cache)


def test_gradients_of_discounts_come_from_the_stages():
    selector = Consensus(TopK(share=0.2))
    attn = HashAttention(SimHash(64), HashAttention.from_preset("dashkv").index, selector, ExactAttend(), engine="cpu")
    cache = attn.new_cache(1, 2, 16)
    cache.append(torch.randn(1, 2, 500, 16), torch.randn(1, 2, 500, 16))
    attn(torch.randn(1, 8, 1, 16), cache).square().sum().backward()
    assert selector.discount.grad is not None and selector.discount.grad != 0


def test_encoders_whose_maps_are_deep_are_served_and_deeper_ones_are_encoded_before():
    for encoder, inside in (
        (AsymmetricHash(100, query_hidden=(40,), query_bits=2), True),
        (AsymmetricHash(64, query_hidden=(48, 40, 24)), True),
        (AsymmetricHash(64, query_hidden=(16, 16, 16, 16)), False),
        (SymmetricHash(64), None),
    ):
        attn = HashAttention.from_preset("dashkv_momentum", engine="cpu").replace(encoder=encoder)
        encoder._warned = True
        assert not why_not_compiled(attn.parts, Request(torch.device("cpu"), torch.float32, 1, 9, 3, 32))
        plan = str(attn.explain(q_heads=9, kv_heads=3, head_dim=32, keys=5000, dtype=torch.float32))
        assert inside is None or ("in the step" in plan and ("queries" in plan) == inside), plan
        with torch.no_grad():
            for (_, selection), (_, kept) in passes(attn, layers=2):
                assert torch.equal(by_column(selection.ids)[0], by_column(kept.ids)[0])
