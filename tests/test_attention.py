import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hashattn
from hashattn import (
    AsymmetricHash,
    Centring,
    Consensus,
    CrossPolytope,
    DenseAttend,
    ExactAttend,
    FlatBuckets,
    FlatDot,
    FlatHamming,
    HashAttention,
    Identity,
    LocalTopK,
    MixedPrecision,
    Momentum,
    PerLayer,
    Recent,
    SimHash,
    Sink,
    Step,
    SymmetricHash,
    Threshold,
    Tiers,
    TopK,
)
from hashattn.attend.mixed import CodeResidual
from hashattn.engines import cost
from hashattn.engines.base import Request
from hashattn.engines.choose import choose
from tests.structured import (
    attention64,
    poison,
    qkv,
    raises_naming,
    sdpa,
    seeds,
    selected,
    tolerance,
    visible_mask,
)

WARM = SimHash(65, centring=Centring(1.0, 16, 4))  # a row is short below 20 keys
ATTN = HashAttention(WARM, FlatHamming(), Sink(1) | Recent(2) | TopK(share=0.2), engine="reference")

# ---- compositions without weights

per = st.sampled_from([{}, {"per": "kv_head"}, {"per": "kv_head", "combine": "vote"}])
ranked = st.one_of(
    st.builds(lambda k, p: TopK(k=k, **p), st.integers(1, 9), per),
    st.builds(lambda s, p: TopK(share=s, **p), st.floats(0.01, 1), per),
    st.builds(lambda r, n, p: Threshold(r, n, **p), st.integers(0, 40), st.sampled_from([None, 3]), per),
    st.builds(lambda a, b, p: Tiers(a, a + b, **p), st.floats(0.01, 0.4), st.floats(0.01, 0.4), per),
    st.builds(lambda c, t, p: LocalTopK(c * t, t, **p), st.integers(1, 9), st.integers(1, 9), per),
)
forced = st.one_of(st.builds(Sink, st.integers(1, 9)), st.builds(Recent, st.integers(1, 9)))
joined = st.builds(lambda a, b, r: a | b | r, forced, forced, ranked)
centrings = st.one_of(st.none(), st.builds(Centring, st.floats(0.1, 1), st.integers(1, 9), st.integers(0, 9)))
hashes = st.builds(
    SimHash, st.sampled_from([8, 65, 1000]), st.sampled_from([1, 4, 8]), centrings, st.integers(0, 9)
)  # fmt: skip
binary = st.tuples(hashes, st.just(FlatHamming()))
oracle = st.just((Identity(), FlatDot()))
engines = st.sampled_from(["auto", "dense", "reference", "cpu"])
layers = st.lists(st.integers(-3, 3), max_size=3).map(tuple)
compositions = st.one_of(
    st.builds(
        lambda parts, s, e, d: HashAttention(*parts, s, engine=e, dense_layers=d),
        st.one_of(binary, oracle), st.one_of(ranked, joined), engines, layers,
    ),
    st.builds(lambda a, b, e: HashAttention(selector=a | b, engine=e), forced, forced, engines),
    st.builds(lambda a, e: HashAttention(selector=a, engine=e), forced, engines),
    st.builds(lambda d: HashAttention(attend=DenseAttend(), dense_layers=d), layers),
)  # fmt: skip


@settings(deadline=None, max_examples=80)
@given(compositions)
def test_a_composition_without_weights_is_what_its_repr_says(attn):
    assert eval(repr(attn), vars(hashattn).copy()) == attn


@settings(deadline=None, max_examples=20)
@given(compositions, engines)
def test_replace_swaps_one_part_and_leaves_the_rest(attn, engine):
    other = attn.replace(engine=engine)
    assert other.engine == engine
    assert other.replace(engine=attn.engine) == attn


def test_compositions_with_weights_are_equal_only_to_themselves():
    encoder = SymmetricHash(64)
    attn = HashAttention(encoder, FlatHamming(), TopK(k=3))
    assert attn == HashAttention(encoder, FlatHamming(), TopK(k=3))
    assert attn != HashAttention(SymmetricHash(64), FlatHamming(), TopK(k=3))


BINARY = {"encoder": SimHash(64), "index": FlatHamming()}


@pytest.mark.parametrize(
    ("error", "parts", "words"),
    [
        (ValueError, {}, ["ExactAttend()", "selector", "DenseAttend()"]),
        (ValueError, BINARY, ["ExactAttend()", "selector"]),
        (ValueError, {"selector": TopK(k=3)}, ["TopK(k=3", "SimHash(bits=128)", "FlatHamming()"]),
        (ValueError, {"encoder": SimHash(64), "selector": TopK(k=3)}, ["SimHash(bits=64", "index=FlatHamming()"]),
        (ValueError, {"encoder": Identity(), "selector": TopK(k=3)}, ["Identity()", "index=FlatDot()"]),
        (
            ValueError,
            {"index": FlatHamming(), "selector": TopK(k=3)},
            ["FlatHamming()", "encoder", "SimHash(bits=128)"],
        ),
        (ValueError, {"index": FlatDot(), "selector": TopK(k=3)}, ["FlatDot()", "encoder", "Identity()"]),
        (
            ValueError,
            {"encoder": Identity(), "index": FlatHamming(), "selector": TopK(k=3)},
            ["FlatHamming()", "Identity()", "FlatDot()", "SimHash(bits=128)"],
        ),
        (
            ValueError,
            {"encoder": SimHash(64), "index": FlatDot(), "selector": TopK(k=3)},
            ["FlatDot()", "SimHash(bits=64", "index=FlatHamming()", "Identity()"],
        ),
        (ValueError, {**BINARY, "selector": TopK(k=3), "attend": DenseAttend()}, ["DenseAttend()", "TopK(k=3"]),
        (
            ValueError,
            {"encoder": Identity(), "index": FlatDot(), "selector": Tiers(), "attend": MixedPrecision()},
            ["MixedPrecision", "binary", "Identity()", "SimHash(bits=128)"],
        ),
        (ValueError, {"selector": Sink(4), "attend": MixedPrecision()}, ["MixedPrecision", "binary", "None"]),
        (ValueError, {**BINARY, "selector": TopK(k=3), "engine": "npu"}, ["engine", "npu", "reference"]),
        (TypeError, {"encoder": "simhash", "index": FlatHamming(), "selector": TopK(k=3)}, ["encoder", "simhash"]),
        (TypeError, {**BINARY, "selector": 3}, ["selector", "3"]),
        (TypeError, {**BINARY, "index": SimHash(), "selector": TopK(k=3)}, ["index", "SimHash"]),
        (TypeError, {**BINARY, "selector": TopK(k=3), "attend": None}, ["attend", "None"]),
        (TypeError, {**BINARY, "selector": TopK(k=3), "dense_layers": ("a",)}, ["dense_layers", "a"]),
        (TypeError, {**BINARY, "selector": TopK(k=3), "dense_layers": 3}, ["dense_layers", "3"]),
    ],
)
def test_parts_that_do_not_fit_are_refused_and_what_would_fit_is_named(error, parts, words):
    raises_naming(error, *words)(lambda: HashAttention(**parts))


# ---- calls


def test_a_call_with_tensors_equals_a_call_with_a_cache():
    q, k, v = qkv(0, 2, keys=65)
    start = torch.tensor([0, 20])
    cache = ATTN.new_cache(2, 2, 16)
    cache.append(k, v, start=start)
    assert torch.equal(ATTN(q, cache), ATTN(q, k, v, start=start))


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize(
    "selector",
    [Sink(1) | TopK(share=0.2), TopK(k=9, per="kv_head"), Tiers(0.1, 0.4), Threshold(30), Consensus(Tiers(0.1, 0.4))],
    ids=lambda s: type(s).__name__,
)
@settings(deadline=None, max_examples=8)
@given(seed=seeds, padding=st.integers(1, 60), tokens=st.sampled_from([1, 3]))
def test_batch_mates_and_padding_change_nothing(engine, selector, seed, padding, tokens):
    q, k, v = qkv(seed, 2, tokens=tokens, keys=100)
    start = torch.tensor([0, padding])
    attn = HashAttention(WARM, FlatHamming(), selector, MixedPrecision(), engine=engine)
    caches = attn.new_cache(2, 2, 16), attn.new_cache(1, 2, 16)
    caches[0].append(poison(k, start), poison(v, start), start=start)
    caches[1].append(k[1:, :, padding:], v[1:, :, padding:])
    with torch.no_grad():
        together, alone = (attn.run(x, cache)[0].out for x, cache in zip((q, q[1:]), caches, strict=True))
    codes = caches[0].codes[1:, :, padding:], caches[1].codes
    assert together.isfinite().all()
    if torch.equal(*codes):  # else a projection lies within rounding of zero, and selections may differ
        keep = visible_mask(tokens, 100, [0, padding])
        assert (together[1:] - alone).abs().max() <= tolerance(q, k, v, keep)
    assert (codes[0] != codes[1]).float().mean() < 0.01


@settings(deadline=None, max_examples=25)
@given(
    seed=seeds, keys=st.integers(1, 45), tokens=st.sampled_from([1, 3, 30]), padding=st.integers(0, 45),
    mixed=st.booleans(), engine=st.sampled_from(["reference", "cpu"]), poisoned=st.booleans(),
)  # fmt: skip
def test_queries_that_see_fewer_keys_than_the_warm_up_attend_densely(
    seed, keys, tokens, padding, mixed, engine, poisoned
):
    q, k, v = qkv(seed, 3, tokens=min(tokens, keys), keys=keys)
    start = torch.tensor([0, min(padding, keys), keys // 2])
    selector, attend = (Tiers(0.1, 0.3), MixedPrecision()) if mixed else (TopK(k=2), ExactAttend())
    attn = HashAttention(WARM, FlatHamming(), selector, attend, engine=engine)
    ready = (keys - start >= WARM.centring.warmup).any()
    held = (poison(k, start), poison(v, start)) if poisoned and ready else (k, v)  # else it is all dense
    out = attn(q, *held, start=start)
    keep = visible_mask(q.shape[2], keys, start.tolist())
    short = (keep.sum(-1) < 20).expand(out.shape[:3])
    error = (out - attention64(q, k, v, keep)[0]).abs().amax(-1)
    assert (error[short] <= tolerance(q, k, v, keep)).all()
    assert out.isfinite().all()
    assert (out[~keep.any(-1).expand(out.shape[:3])] == 0).all()


def test_long_queries_do_not_attend_densely():
    q, k, v = qkv(0, keys=65)
    keep = visible_mask(1, 65, [0])
    sparse = HashAttention(WARM, FlatHamming(), TopK(k=2), engine="reference")(q, k, v)
    assert (sparse - sdpa(q, k, v, keep)).abs().max() > 0.01


def test_a_short_row_of_codes_per_group_attends_densely_too():
    q, k, v = qkv(1, 2, keys=45)
    start = torch.tensor([0, 30])
    for combine in ("sum", "union", "vote"):
        selector = TopK(k=2, per="kv_head", combine=combine)
        out = HashAttention(WARM, FlatHamming(), selector, engine="reference")(q, k, v, start=start)
        keep = visible_mask(1, 45, [0, 30])
        assert (out[1] - attention64(q, k, v, keep)[0][1]).abs().max() <= tolerance(q, k, v, keep)


def test_decoding_token_by_token_equals_one_causal_call():
    q, k, v = qkv(2, tokens=40, keys=65)
    whole = ATTN(q, k, v)
    cache = ATTN.new_cache(1, 2, 16)
    cache.append(k[:, :, :25], v[:, :, :25])
    keep = visible_mask(40, 65, [0])
    for t in range(40):
        cache.append(k[:, :, 25 + t : 26 + t], v[:, :, 25 + t : 26 + t])
        one = ATTN(q[:, :, t : t + 1], cache)
        assert (one - whole[:, :, t : t + 1]).abs().max() <= tolerance(q, k, v, keep)


def test_without_causality_each_query_sees_every_key():
    q, k, v = qkv(3, tokens=4, keys=65)
    cache = ATTN.new_cache(1, 2, 16)
    cache.append(k, v)
    out, selection = ATTN.run(q, cache, causal=False)
    for t in range(4):
        one, own = ATTN.run(q[:, :, t : t + 1], cache)
        assert torch.equal(selected(selection.ids, 65, 4)[:, :, t : t + 1], selected(own.ids, 65, 4))
        assert torch.allclose(out.out[:, :, t : t + 1], one.out, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ["reference", "cpu", "dense"])
def test_every_float_dtype_is_served_and_kept(dtype, engine):
    q, k, v = qkv(4, keys=65, dtype=dtype)
    for attend, selector in ((ExactAttend(), TopK(share=0.3)), (MixedPrecision(), Tiers(0.1, 0.4))):
        out = HashAttention(WARM, FlatHamming(), selector, attend, engine=engine)(q, k, v)
        assert out.dtype == dtype
        assert out.isfinite().all()


def test_layers_hand_their_selection_on():
    q, k, v = qkv(5, keys=65)
    selector = Momentum(TopK(k=9), discount=30.0)
    attn = HashAttention(WARM, FlatHamming(), selector, engine="reference")
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    output, first = attn.run(q, cache, need_weights=True)
    _, second = attn.run(q.flip(1), cache, step=Step(1, first, output.weights))
    prior = torch.zeros(1, 4, 1, 65).scatter_(-1, first.ids.long(), output.weights.detach()).mean(1)[0, 0]
    attended = {*(prior * 65 > 1).nonzero().flatten().tolist()}
    assert attended
    for head in range(4):
        own = {*second.ids[0, head, 0].tolist()}
        assert own <= attended or attended <= own  # a discount beyond the usual spread


@pytest.mark.parametrize(("engine", "runs"), [("dense", False), ("reference", True), ("cpu", True)])
def test_a_forced_engine_is_the_one_that_runs(engine, runs):
    q, k, v = qkv(6, keys=65)
    attn = ATTN.replace(engine=engine)
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    assert (attn.run(q, cache)[1] is not None) == runs


def test_auto_searches_from_the_crossover_on(monkeypatch):
    q, k, v = qkv(7, keys=65)
    attn = HashAttention(WARM, FlatHamming(), Sink(1) | Momentum(TopK(share=0.2, per="kv_head")))
    for bound in (64, 65, 66, None):
        monkeypatch.setattr(cost, "crossover", lambda *_, least=bound, **__: least)
        attn = attn.replace()  # which knows no choices yet
        cache = attn.new_cache(1, 2, 16)
        cache.append(k, v)
        searches = bound is not None and bound <= 65
        assert (attn.run(q, cache)[1] is not None) == searches
        plan = attn.explain(q_heads=4, kv_heads=2, head_dim=16, keys=65)
        assert plan.engine == ("cpu" if searches else "dense")
        assert plan.crossover == bound


def test_the_crossover_follows_what_a_step_reads_and_does():
    shape = Request(torch.device("cpu"), torch.float32, 1, 32, 8, 128)

    def crossover(attn, **changes):
        return choose(attn.parts, replace(shape, **changes)).crossover

    def least(selector, attend=ExactAttend(), encoder=SimHash(128), **changes):  # noqa: B008
        return crossover(HashAttention(encoder, FlatHamming(), selector, attend), **{"threads": 1, **changes})

    shared = TopK(k=256, per="kv_head")
    assert 256 <= least(shared) <= 4096
    assert least(shared) < least(TopK(k=256))
    assert least(shared) < least(Consensus(shared))
    assert least(shared) < least(TopK(k=2048, per="kv_head"))
    assert least(shared, dtype=torch.bfloat16) < 2 * least(shared)  # 16-bit keys are converted to be read
    assert least(shared) < least(shared, q_heads=9, kv_heads=3, head_dim=64)
    assert least(TopK(k=256), encoder=SimHash(128, 8)) > least(TopK(k=256))
    assert least(shared, threads=2) > least(shared)
    assert least(Tiers(0.3, 0.9), MixedPrecision()) is None  # reads more than dense attention does
    assert least(Tiers(0.02, 0.1), MixedPrecision()) < least(TopK(share=0.1))  # of some keys only codes are read
    attn = HashAttention(SimHash(128), FlatHamming(), shared)
    assert crossover(attn, device=torch.device("cuda")) is None
    assert crossover(HashAttention(attend=DenseAttend())) is None
    assert crossover(HashAttention(Identity(), FlatDot(), shared)) is None
    assert crossover(HashAttention(selector=Sink(4) | Recent(60)), threads=1) < least(shared)
    with pytest.raises(ValueError, match="threads must be an int of at least 1, got 0"):
        crossover(attn, threads=0)


@pytest.mark.parametrize("other", [HashAttention(selector=Sink(1) | Recent(3), engine="reference")])
@pytest.mark.parametrize("keys", [10, 65])
def test_a_composition_that_ranks_nothing_reads_any_cache_as_it_reads_its_own(other, keys):
    q, k, v = qkv(8, keys=keys)
    cache = ATTN.new_cache(1, 2, 16)
    cache.append(k, v)
    assert torch.equal(other(q, cache), other(q, k, v))


@pytest.mark.parametrize(
    ("attn", "name"),
    [
        (ATTN.replace(encoder=SimHash(128)), "encoder"),
        (ATTN.replace(encoder=Identity(), index=FlatDot()), "encoder"),
        (ATTN.replace(attend=MixedPrecision()), "norms"),
    ],
)
def test_a_cache_of_another_composition_is_refused(attn, name):
    q, k, v = qkv(9, keys=65)
    cache = ATTN.new_cache(1, 2, 16)
    cache.append(k, v)
    raises_naming(ValueError, "another composition", name)(lambda: attn(q, cache))


def test_norms_that_are_not_needed_do_no_harm():
    q, k, v = qkv(9, keys=65)
    cache = ATTN.replace(attend=MixedPrecision()).new_cache(1, 2, 16)
    cache.append(k, v)
    assert torch.equal(ATTN(q, cache), ATTN(q, k, v))


# ---- what is refused


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


Q, K = ones(1, 4, 1, 16), ones(1, 2, 30, 16)


@pytest.mark.parametrize(
    ("error", "call", "words"),
    [
        (TypeError, lambda a, c: a(Q, K), ["v is missing"]),
        (TypeError, lambda a, c: a(Q, c, K), ["neither v nor start"]),
        (TypeError, lambda a, c: a(Q, c, start=torch.tensor([0])), ["neither v nor start"]),
        (TypeError, lambda a, c: a([1.0], K, K), ["q", "list"]),
        (TypeError, lambda a, c: a([1.0], c), ["q", "list"]),
        (TypeError, lambda a, c: a(Q, K.tolist(), K), ["k", "list"]),
        (TypeError, lambda a, c: a(Q.half(), K, K), ["q and k", "float16", "float32"]),
        (TypeError, lambda a, c: a(Q.half(), c), ["q and keys", "float16"]),
        (TypeError, lambda a, c: a(Q.long(), K, K), ["q", "int64"]),
        (TypeError, lambda a, c: a(Q, K, K.bfloat16()), ["v", "bfloat16"]),
        (ValueError, lambda a, c: a(Q, K[0], K[0]), ["k", "[B, Hkv, N, D]", "[2, 30, 16]"]),
        (ValueError, lambda a, c: a(Q, K, K[:, :, 1:]), ["k and v", "[1, 2, 29, 16]"]),
        (ValueError, lambda a, c: a(Q, K[:, :, :0], K[:, :, :0]), ["at least one column", "0"]),
        (ValueError, lambda a, c: a(Q[0], K, K), ["q", "[B, Hq, T, D]", "[4, 1, 16]"]),
        (ValueError, lambda a, c: a(ones(2, 4, 1, 16), c), ["q", "[2, 4, 1, 16]"]),
        (ValueError, lambda a, c: a(ones(1, 4, 1, 8), c), ["q", "[1, 4, 1, 8]", "16"]),
        (ValueError, lambda a, c: a(ones(1, 3, 1, 16), c), ["q", "Hkv = 2", "Hq = 3"]),
        (ValueError, lambda a, c: a(ones(1, 0, 1, 16), c), ["q", "Hq = 0"]),
        (ValueError, lambda a, c: a(ones(1, 4, 0, 16), c), ["q", "T = 0"]),
        (ValueError, lambda a, c: a(ones(1, 4, 31, 16), c), ["q", "T = 31", "N = 30"]),
        (ValueError, lambda a, c: a(ones(1, 4, 31, 16), K, K), ["q", "T = 31", "N = 30"]),
        (ValueError, lambda a, c: a(Q, K, K, start=torch.tensor([31])), ["start", "31"]),
        (ValueError, lambda a, c: a(Q, K, K, start=torch.tensor([0, 0])), ["start", "(1,)"]),
        (TypeError, lambda a, c: a(Q, K.to_sparse(), K), ["k", "dense tensor", "sparse_coo"]),
        (TypeError, lambda a, c: a(Q, c, scale="0.1"), ["scale", "'0.1'"]),
        (TypeError, lambda a, c: a(Q, c, scale=True), ["scale", "True"]),
        (TypeError, lambda a, c: a(Q, c, scale=1j), ["scale", "1j"]),
        (TypeError, lambda a, c: a(Q, c, scale=[0.1]), ["scale", "[0.1]"]),
        (TypeError, lambda a, c: a(Q, c, scale=ones(2)), ["scale", "tensor([1., 1.])"]),
        (TypeError, lambda a, c: a(Q, c, scale=ones(1).requires_grad_()), ["scale", "gradients"]),
        (ValueError, lambda a, c: a(Q, c, scale=10**400), ["scale", "1000"]),
        (TypeError, lambda a, c: a(Q, c, causal="no"), ["causal", "'no'"]),
        (TypeError, lambda a, c: a.run(Q, None), ["cache", "KVCache", "NoneType"]),
        (TypeError, lambda a, c: c.search([1], 3), ["query", "list"]),
        (ValueError, lambda a, c: c.search(torch.zeros(2, 4, 1, 1).long(), 3), ["query", "B = 1", "[2, 4, 1, 1]"]),
        (ValueError, lambda a, c: c.search(torch.zeros(1, 3, 1, 1).long(), 3), ["query", "Hkv = 2", "[1, 3, 1, 1]"]),
        (ValueError, lambda a, c: c.gather("code", torch.zeros(1, 2, 1, 1).int()), ["what", "codes", "'code'"]),
        (TypeError, lambda a, c: c.select_rows("0"), ["rows", "'0'"]),
        (TypeError, lambda a, c: c.reorder(None), ["rows", "None"]),
    ],
)
def test_bad_input_is_refused_by_name_and_the_cache_stays_as_it_was(error, call, words):
    cache = ATTN.new_cache(1, 2, 16)
    cache.append(K, K)
    cache.encode()
    codes = cache.codes.clone()
    raises_naming(error, *words)(lambda: call(ATTN, cache))
    assert (len(cache), cache.encoded) == (30, 30)
    assert torch.equal(cache.codes, codes)
    assert torch.equal(cache.keys, K)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_only_on_request(name, value):
    inputs = dict(zip("qkv", qkv(0, keys=30), strict=True))
    inputs[name][0, 1, 0, 3] = value
    raises_naming(ValueError, name, str(value), "(0, 1, 0, 3)")(lambda: ATTN(**inputs, validate=True))
    assert ATTN(**inputs).shape == (1, 4, 1, 16)
    assert torch.equal(ATTN(*qkv(0, keys=30), validate=True), ATTN(*qkv(0, keys=30)))


def test_validation_does_not_look_at_padding():
    q, k, v = qkv(0, 2, keys=65)
    start = torch.tensor([0, 20])
    padded = poison(k, start), poison(v, start)
    expected = ATTN(q, *padded, start=start)
    assert torch.equal(ATTN(q, *padded, start=start, validate=True), expected)
    cache = ATTN.new_cache(2, 2, 16)
    cache.append(*padded)
    cache.set_start(start)  # padding that was not zeroed
    assert torch.equal(ATTN(q, cache, validate=True), expected)


@pytest.mark.parametrize("engine", ["reference", "cpu", "dense"])
def test_a_scale_of_any_kind_of_number_is_the_same(engine):
    attn, inputs = ATTN.replace(engine=engine), qkv(1, keys=30)
    expected = attn(*inputs, scale=0.5)
    for scale in (np.float64(0.5), np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])):
        assert torch.equal(attn(*inputs, scale=scale), expected)


# ---- query plans

SIZES = {"batch": 3, "q_heads": 8, "kv_heads": 2, "head_dim": 64, "keys": 1000}
ROW = 64 * 2  # bytes of a bfloat16 key or value


def planned(attn, **sizes):
    return attn.replace(engine="reference").explain(**{**SIZES, **sizes})


def test_explain_counts_the_bytes_of_an_exact_step():
    plan = planned(HashAttention(SimHash(100), FlatHamming(), Sink(4) | TopK(share=0.05)))
    assert plan.kv_bytes == plan.dense_bytes == 2 * 3 * 2 * 1000 * ROW
    assert plan.code_bytes == plan.scan_bytes == 3 * 2 * 1000 * 16  # two words a code
    assert plan.attend_bytes == 3 * 8 * 50 * 2 * ROW
    assert plan.step_bytes == plan.scan_bytes + plan.attend_bytes
    assert plan.engine == "reference"
    assert planned(HashAttention(SimHash(100), FlatHamming(), TopK(k=7)), dtype=torch.float32).attend_bytes == (
        3 * 8 * 7 * 2 * 2 * ROW
    )


def test_explain_counts_the_bytes_of_a_mixed_step():
    plan = planned(HashAttention(SimHash(64), FlatHamming(), Tiers(0.05, 0.1), MixedPrecision()))
    assert plan.code_bytes == 3 * 2 * 1000 * (8 + 2)
    assert plan.attend_bytes == 3 * 8 * (50 * 2 * ROW + 50 * (ROW + 2 + 8))


def test_explain_counts_a_shared_choice_once_a_kv_head():
    shared = TopK(k=50, per="kv_head")
    expected = 3 * 2 * 50 * 2 * ROW
    for selector in (
        shared,
        Sink(4) | shared,
        Consensus(shared),
        Momentum(Consensus(shared)),
        Sink(4) | Momentum(shared),
    ):
        assert planned(HashAttention(SimHash(64), FlatHamming(), selector)).attend_bytes == expected, selector
    assert planned(HashAttention(selector=Sink(4) | Recent(6))).attend_bytes == 3 * 2 * 10 * 2 * ROW
    assert planned(HashAttention(selector=Sink(4) | Recent(6))).scan_bytes == 0


def test_explain_gives_an_upper_bound_for_a_union():
    selector = TopK(k=50, per="kv_head", combine="union")
    plan = planned(HashAttention(SimHash(64), FlatHamming(), selector))
    assert plan.attend_bytes == 3 * 2 * (4 * 50) * 2 * ROW  # heads that agree on nothing


def test_explain_counts_codes_of_every_query_head():
    own = planned(HashAttention(AsymmetricHash(64, heads=8), FlatHamming(), TopK(k=5)))
    assert own.code_bytes == own.scan_bytes == 3 * 8 * 1000 * 8
    layers = PerLayer([AsymmetricHash(64, heads=8)])
    assert planned(HashAttention(layers, FlatHamming(), TopK(k=5))).code_bytes == own.code_bytes


def test_explain_of_the_oracle_reads_every_key():
    plan = planned(HashAttention(Identity(), FlatDot(), TopK(k=5)))
    assert plan.scan_bytes == plan.code_bytes == 3 * 2 * 1000 * ROW


def test_explain_of_dense_attention_reads_keys_and_values_once():
    for attn in (
        HashAttention(attend=DenseAttend()),
        HashAttention(SimHash(64), FlatHamming(), TopK(k=5), engine="dense"),
    ):
        plan = attn.explain(**SIZES)
        assert (plan.engine, plan.scan_bytes, plan.attend_bytes) == ("dense", 0, plan.dense_bytes)


def test_explain_says_what_auto_would_run_and_why():
    shared = ATTN.replace(engine="auto", selector=TopK(share=0.2, per="kv_head"))
    least = choose(shared.parts, Request(torch.device("cpu"), torch.bfloat16, 3, 8, 2, 64)).crossover
    assert shared.explain(**{**SIZES, "keys": least}).engine == "cpu"
    below = str(shared.explain(**{**SIZES, "keys": least - 1}))
    assert below.startswith("engine: dense")
    assert "below the crossover" in below
    assert f"dense below {least:,} keys" in below
    assert "nothing faster was measured" in str(ATTN.replace(engine="auto").explain(**SIZES, device="cuda"))
    text = str(ATTN.explain(**SIZES))
    assert 'engine="cpu" is faster here' in text
    assert "full attention reads" in text


def test_what_is_explained_is_what_a_cache_allocates():
    attn = HashAttention(SimHash(100, centring=None), FlatHamming(), Tiers(), MixedPrecision(), engine="reference")
    _, k, v = qkv(0, keys=65)
    cache = attn.new_cache(1, 2, 16, capacity=65)
    cache.append(k, v)
    cache.encode()
    plan = attn.explain(q_heads=4, kv_heads=2, head_dim=16, keys=65, dtype=torch.float32)
    assert cache.code_nbytes == plan.code_bytes
    assert cache.nbytes == plan.kv_bytes + plan.code_bytes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, ["batch", "0"]),
        ({"keys": 1.5}, ["keys", "1.5"]),
        ({"head_dim": -1}, ["head_dim", "-1"]),
        ({"q_heads": 3}, ["q_heads", "3", "2"]),
        ({"device": "cuda"}, ["cpu", "cuda", "reference"]),
    ],
)
def test_sizes_that_cannot_be_planned_are_refused_by_name(options, words):
    attn = ATTN.replace(engine="cpu")
    raises_naming(ValueError, *words)(lambda: attn.explain(**{**SIZES, **options}))


def test_an_unfitted_encoder_warns_in_a_call():
    q, k, v = qkv(0, keys=30)
    attn = HashAttention(SymmetricHash(64, centring=Centring(1.0, 8)), FlatHamming(), TopK(k=3), engine="reference")
    with pytest.warns(UserWarning, match="SymmetricHash is not fitted"):
        attn(q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn(q, k, v)


def test_the_fused_engine_says_what_it_cannot_take():
    q, k, v = qkv(1, keys=400, dim=64)
    attn = HashAttention(SimHash(128), FlatHamming(), TopK(k=9), engine="gpu")
    with pytest.raises(ValueError, match='engine="gpu" cannot take this step: its kernels need an NVIDIA GPU'):
        attn(q, k, v)
    shape = {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "keys": 4000, "device": "cuda"}
    pytest.importorskip("triton")
    assert "C++, one kernel" in str(attn.explain(**shape)) or "Triton, one kernel" in str(attn.explain(**shape))
    plain, with_residual = attn.replace(engine="auto"), MixedPrecision()
    with_residual.residual = CodeResidual(128, 4)
    for other, reason in (
        (plain.replace(attend=with_residual), "MixedPrecision without a residual"),
        (
            plain.replace(selector=TopK(k=9, per="kv_head", combine="vote")),
            "it serves TopK, LocalTopK, Threshold and Tiers",
        ),
        (plain.replace(selector=Tiers(0.1, 0.2, per="kv_head", combine="union")), 'with combine="sum"'),
        (plain.replace(selector=Sink(4) | Consensus(Consensus(TopK(k=9)))), "it serves TopK, LocalTopK, Threshold and"),
        (plain.replace(selector=LocalTopK(64, per="kv_head")), "one choice per query head"),
        (plain.replace(encoder=SimHash(160)), "64, 128 or 256 bits, not 192"),
        (plain.replace(encoder=CrossPolytope(), index=FlatBuckets()), "binary codes"),
        (plain.replace(encoder=AsymmetricHash(64, heads=4)), "one code a key"),
    ):
        assert reason in str(other.explain(**shape))
        with pytest.raises(ValueError, match=reason):
            other.replace(engine="gpu").explain(**shape)
    for served in (
        TopK(k=9, per="kv_head"), Sink(4) | Recent(4) | TopK(share=0.1), Threshold(radius=20, limit=9),
        Recent(4) | Tiers(0.1, 0.2, per="kv_head"),
    ):  # fmt: skip
        for attend in (ExactAttend(), MixedPrecision()):
            assert attn.replace(selector=served, attend=attend).explain(**shape).engine == "gpu"
    local = attn.replace(selector=Sink(4) | LocalTopK(64)).explain(**shape)
    assert local.engine == "gpu" and "keeps the nearest of each chunk" in str(local)


def test_a_decoder_refuses_what_a_graph_could_not_keep():
    _, k, v = qkv(2, keys=400, dim=64)
    attn = HashAttention(SimHash(64), FlatHamming(), TopK(k=9), engine="reference")
    growing, short = attn.new_cache(1, 2, 64), attn.new_cache(1, 2, 64, capacity=500)
    growing.append(k, v)
    short.append(k[:, :, :9], v[:, :, :9])
    for cache, words in ((growing, "must have a capacity"), (short, "the shortest holds 9")):
        with pytest.raises(ValueError, match=words):
            attn.decoder(cache)
    short.append(k[:, :, 9:], v[:, :, 9:])
    decoder, q = attn.decoder(short), torch.randn(1, 4, 1, 64)
    for wrong, words in (
        ((q, k[:, :1, :1], v[:, :1, :1]), "k must be"),
        ((q[..., :32], k[:, :, :1], v[:, :, :1]), "q must be"),
        ((q[:, :3], k[:, :, :1], v[:, :, :1]), "a multiple of Hkv"),
        ((q, k[:, :, :2], v[:, :, :2]), "same positions"),
        ((q, k[:, :, :1], v[:, :, :1]), "its kernels need an NVIDIA GPU"),
    ):
        with pytest.raises(ValueError, match=words):
            decoder(*wrong)
    with pytest.raises(TypeError, match="must have one dtype"):
        decoder(q.half(), k[:, :, :1].half(), v[:, :, :1].half())
    assert len(decoder.finish()) == 400
