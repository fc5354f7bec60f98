"""Budgets mean what they say: floors, other budgets for every part and preset, numbers beyond every cache."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hashattn import (
    PRESETS,
    CollisionSample,
    Consensus,
    ExactAttend,
    FaissBinary,
    FlatHamming,
    HashAttention,
    HeavyHitters,
    LocalTopK,
    LogitMap,
    Momentum,
    MultiProbe,
    ObservationWindow,
    RandomTail,
    Recent,
    Refine,
    Reuse,
    SampledAttend,
    SimHash,
    Sink,
    Step,
    Threshold,
    Tiers,
    TopK,
    TopP,
    pyramid,
)
from hashattn.core.budget import MOST_KEYS, Budget
from hashattn.engines.base import Request
from hashattn.engines.cost import step_microseconds
from hashattn.ops.decode.rule import Rule
from hashattn.presets import budget_options, options_of
from hashattn.presets.parsing import parse
from hashattn.selectors import Selector
from hashattn.selectors.observation_window import rescaled
from hashattn.selectors.wrapper import Wrapper
from tests.structured import make_view, odd_lengths, qkv, raises_naming, seeds, tied_distances

TOP = TopK(share=0.1)
RANDOM = SimHash(64, centring=None)
COUNTED = {"streaming"}  # of a fixed size: no share
UNCOUNTED = {"magicpig", "full"}  # as many as the data has, or everything


@pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")
@pytest.mark.parametrize("name", [n for n in PRESETS if n not in COUNTED | UNCOUNTED])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.6, 1.0])
def test_a_share_is_the_whole_budgets_in_every_preset(name, share):
    selector = HashAttention.from_preset(name).selector.with_budget(share=share)
    for keys in (10_000, 123_457):
        kept, forced = math.ceil(share * keys), selector.sinks + selector.recents
        if name == "pyramidkv":  # a mean over the layers
            own = HashAttention.from_preset(name, share=share).selector.shares
            assert selector.shares == pytest.approx(own)
            continue
        extra = 1 if name == "vattention" else 0  # two parts, each rounded up
        assert max(kept, forced) <= selector.budget(keys) <= max(kept, forced) + extra
    if "share" in options_of(name) and share < 1:
        assert selector == HashAttention.from_preset(name, **budget_options(name, share, 10_000)).selector or name in (
            "dashkv_consensus", "dashkv_momentum", "pyramidkv",  # modules and rounded numbers
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")
@pytest.mark.parametrize("name", [n for n in PRESETS if n not in UNCOUNTED])
def test_a_count_is_the_whole_budgets_in_every_preset(name):
    selector = HashAttention.from_preset(name).selector
    if name.startswith("dashkv") and "t1" in options_of(name):
        raises_naming(ValueError, "k=600", "Tiers", "share=")(lambda: selector.with_budget(k=600))
        return
    selector = selector.with_budget(k=600)
    if name == "pyramidkv":  # a mean over the layers, of which the first keeps most
        assert selector.k == 600 and selector.budget(10_000) > 600
        return
    assert (selector.budget(10_000), selector.budget(100)) == (600, 100)


@pytest.mark.parametrize(
    ("selector", "given", "words"),
    [
        (Sink(4) | Recent(64), {"share": 0.1}, ["share=0.1", "k=", "sinks=", "recent="]),
        (Sink(4) | Recent(64), {"k": 4}, ["room", "4 sinks", "got 4"]),
        (Sink(4), {"k": 9}, ["Sink", "sinks="]),
        (Threshold(9), {"share": 0.1}, ["share=0.1", "Threshold", "radius=", "limit="]),
        (Threshold(9, limit=4), {"k": 9}, ["k=9", "Threshold", "limit="]),
        (CollisionSample(20, 4), {"k": 9}, ["CollisionSample", "tables=", "bits="]),
        (LocalTopK(32), {"share": 0.1}, ["LocalTopK", "k="]),
        (LocalTopK(32), {"k": 33}, ["multiple of per_chunk=16"]),
        (Tiers(), {"k": 9}, ["Tiers", "share=", "t1="]),
        (RandomTail(TOP, k=3), {"k": 1}, ["at least 2", "RandomTail"]),
        (Sink(2) | TOP, {"k": 3, "share": 0.2}, ["either k or share"]),
        (TOP, {}, ["either k or share"]),
        (TopP(TOP), {"share": float("nan")}, ["share", "nan"]),
        (Momentum(Consensus(TOP)), {"share": 2.0}, ["share", "2.0"]),
    ],
    ids=repr,
)
def test_budgets_that_a_part_cannot_have_are_refused_with_what_it_takes(selector, given, words):
    raises_naming(ValueError, *words)(lambda: selector.with_budget(**given))


def test_samples_and_tiers_keep_their_part_of_the_whole():
    whole = RandomTail(TopK(share=0.06), share=0.02)
    found = whole.with_budget(share=0.4)
    assert (found.inner.share, found.share) == (pytest.approx(0.3), pytest.approx(0.1))
    assert whole.settings()["share"] == pytest.approx(0.08)
    assert whole.with_budget(k=40) == RandomTail(TopK(k=30), k=10)
    assert RandomTail(TopK(k=8), share=0.1).with_budget(k=9) == RandomTail(TopK(k=5), k=4)  # counted otherwise: halves
    assert RandomTail(TopK(k=8), k=4, seed=3).revised(seed=5, min_k=2) == RandomTail(TopK(k=8, min_k=2), k=4, seed=5)
    assert Tiers(0.025, 0.125).with_budget(share=0.5) == Tiers(0.1, 0.5)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.floats(0.01, 1), st.floats(0.01, 1), st.floats(1, 40))
def test_a_pyramid_is_rescaled_to_the_pyramid_of_the_other_mean(layers, before, after, beta):
    shares = rescaled(pyramid(layers, before, beta=beta), after)
    assert sum(shares) / layers == pytest.approx(after)
    assert all(0 < x <= 1 for x in shares)
    if max(pyramid(layers, before, beta=beta)) < 1:  # else it was flattened already
        assert shares == pytest.approx(pyramid(layers, after, beta=beta))


def test_calibrations_keep_their_weights_and_take_their_own_settings():
    momentum = Momentum(Consensus(TOP, discount=3.0), discount=5.0)
    found = (Sink(2) | momentum).revised(share=0.3, vote_share=0.7, ratio=2.0, sinks=5)
    outer = found.ranked_part
    assert (outer.ratio, outer.inner.vote_share, outer.inner.inner, found.sinks) == (2.0, 0.7, TopK(share=0.3), 5)
    assert (outer.discount is momentum.discount, outer.inner.discount is momentum.inner.discount) == (True, True)
    assert (momentum.inner.inner, momentum.ratio) == (TOP, 1.0)
    assert found.weighted() == (outer, outer.inner)
    with pytest.raises(ValueError, match="vote_share"):
        momentum.revised(vote_share=2.0)
    fitted = momentum.revised(consensus=7.0)
    assert (fitted.inner.discount.item(), fitted.discount is momentum.discount) == (7.0, True)
    assert (momentum.inner.discount.item(), momentum.settings()["momentum"]) == (3.0, 5.0)


def test_a_misspelt_setting_is_hinted_at_before_anything_else():
    attn = HashAttention(RANDOM, FlatHamming(), Sink(2) | TOP)
    for call, word in (
        (lambda: attn.selector.revised(shar=0.2), "did you mean 'share'"),
        (lambda: Refine(TOP).revised(facto=2), "did you mean 'factor'"),
        (lambda: attn.replace(selctor=TOP), "did you mean 'selector'"),
        (lambda: attn.replace(share=0.2), "attn.selector.revised"),
    ):
        with pytest.raises(TypeError) as caught:
            call()
        message = str(caught.value)
        assert word in message
        assert message.index(word) < 60
        assert "HashAttention(" not in message
        assert "SimHash" not in message


# ---- the floor


@settings(deadline=None, max_examples=60)
@given(
    seed=seeds, keys=odd_lengths, share=st.floats(0.001, 0.3), min_k=st.integers(0, 9),
    forced=st.sampled_from([(0, 0), (2, 3)]), engine=st.sampled_from(["reference", "cpu"]),
    per=st.sampled_from(["query_head", "kv_head"]),
)  # fmt: skip
def test_a_floor_is_ranked_beyond_the_forced_keys(seed, keys, share, min_k, forced, engine, per):
    tokens = min(2, keys)
    q, k, v = qkv(seed, 2, keys=keys, tokens=tokens)
    start = torch.tensor([0, keys // 3])
    selector = TopK(share=share, min_k=min_k, per=per)
    for joined in (selector, Sink(forced[0]) | Recent(forced[1]) | selector if forced[0] else selector):
        attn = HashAttention(RANDOM, FlatHamming(), joined, engine=engine)
        cache = attn.new_cache(2, 2, 16)
        cache.append(k, v, start=start)
        found = attn.run(q, cache)[1].count
        for b, h, t in np.ndindex(*found.shape):
            visible = max(0, keys - tokens + 1 + t - int(start[b]))
            ahead = 0 if joined is selector else sum(forced)
            wanted = min(visible, max(math.ceil(share * visible), ahead + min_k))
            assert found[b, h, t] == wanted == joined.budget(visible)
            assert joined.chooses_at(visible) == (wanted > min(visible, ahead))


@pytest.mark.parametrize("ranked", [TopK(share=0.01), Tiers(0.005, 0.01), HeavyHitters(share=0.01)], ids=repr)
def test_below_the_forced_keys_only_a_floor_is_searched_for(ranked):
    joined = Sink(4) | Recent(64) | ranked
    assert (joined.budget(2000), joined.chooses_at(2000), joined.chooses_at(9000)) == (68, False, True)
    floored = joined.revised(min_k=32)
    assert (floored.budget(2000), floored.chooses_at(2000), floored.budget(80)) == (100, True, 80)
    for wrapped in (Refine(TopK(share=0.01)), Momentum(TopK(share=0.01)), RandomTail(TopK(share=0.01), k=5)):
        extra = 5 * wrapped.samples
        assert (Sink(4) | Recent(64) | wrapped.revised(min_k=32)).budget(2000) == 100 + extra


@pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_of_a_share_or_a_number_takes_a_floor(name):
    if name in COUNTED | UNCOUNTED:
        raises_naming(TypeError, name, "takes no option 'min_k'")(lambda: HashAttention.from_preset(name, min_k=9))
        return
    _, options = parse(f"{name}:min_k=50,{'share=0.01' if 'share' in options_of(name) else ''}".rstrip(","))
    attn = HashAttention.from_preset(name, **options)
    assert attn.selector.settings()["min_k"] == 50
    window = attn.selector.settings().get("window", 0)
    share = HashAttention.from_preset(name, **{**options, "min_k": 0}).selector
    for visible in (40, 200, 1000):
        least = min(visible, window + 50)
        assert attn.selector.budget(visible) >= max(least, share.budget(visible))
    without = HashAttention.from_preset(name, **{option: x for option, x in options.items() if option != "min_k"})
    assert repr(attn.replace(selector=attn.selector.revised(min_k=0))) == repr(without)
    raises_naming(ValueError, "min_k", "-1")(lambda: HashAttention.from_preset(name, min_k=-1))


@pytest.mark.parametrize("layers", [None, 4])
def test_a_prompt_keeps_the_floor_beside_its_window(layers):
    q, k, v = qkv(0, tokens=60, keys=60)
    for min_k, kept in ((0, 6 if layers is None else 7), (20, 25), (100, 60)):
        selector = ObservationWindow(share=0.1, window=5, pool=1, layers=layers, min_k=min_k)
        attn = HashAttention(selector=selector, engine="reference")
        cache = attn.new_cache(1, 2, 16)
        cache.append(k, v)
        attn.accumulate(q, cache, step=Step(3))
        cache.append(k[:, :, :1], v[:, :, :1])
        _, selection = attn.run(q[:, :, :1], cache, step=Step(3))
        assert ((selection.ids >= 0).sum(-1) == kept + 1).all()


def test_critical_keys_have_the_same_floor():
    tiers = Sink(4) | Tiers(0.01, 0.02, min_k=10)
    assert (tiers.critical(100), tiers.budget(100), tiers.critical(2000), tiers.budget(2000)) == (14, 14, 20, 40)
    view = make_view(tied_distances(0, 1, 2, 1, 100), 2, [0])
    selection = tiers.select(view, Step())
    assert ((selection.tier == 0) & (selection.ids >= 0)).sum(-1).unique().tolist() == [14]
    rule = tiers.rule(1)
    assert (rule.slots(100), rule.medium(100), rule.slots(2000), rule.medium(2000)) == (14, 0, 40, 20)


@pytest.mark.parametrize("wrong", [-1, True, 1.5, None])
def test_bad_floors_are_refused(wrong):
    for selector in (TopK(k=3), Tiers(), HeavyHitters(k=3)):
        with pytest.raises((TypeError, ValueError), match="min_k"):
            selector.revised(min_k=wrong)


# ---- numbers beyond every cache

HUGE = [2**31 - 1, 2**31, 2**32, 2**63, 2**70]


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("huge", HUGE)
def test_numbers_beyond_every_cache_mean_all_of_it(huge, engine):
    q, k, v = qkv(3, 2, keys=40, tokens=2)
    start = torch.tensor([0, 7])
    every = HashAttention(RANDOM, FlatHamming(), TopK(share=1.0), ExactAttend(), engine=engine)
    expected = every(q, k, v, start=start)
    for selector in (
        TopK(k=huge), TopK(k=huge, per="kv_head"), TopK(share=0.1, min_k=huge), Sink(huge) | TopK(k=1),
        Recent(huge) | TopK(k=1), Sink(huge) | Recent(huge) | TopK(k=1), Sink(huge) | Recent(huge), Recent(huge),
        Sink(huge) | Recent(huge) | Threshold(0), Threshold(huge, limit=huge), HeavyHitters(k=huge),
        RandomTail(TopK(k=huge), k=huge), Refine(TopK(k=huge)), Sink(huge) | LocalTopK(16, 8),
    ):  # fmt: skip
        attend_with = SampledAttend() if selector.samples else ExactAttend()
        out = every.replace(selector=selector, attend=attend_with)(q, k, v, start=start)
        assert (out - expected).abs().max() < 1e-5, selector
        assert selector.budget(40) == 40


def test_rules_hold_what_int32_holds():
    for huge in HUGE:
        rule = (Sink(huge) | Recent(huge) | TopK(k=huge, min_k=huge)).rule(2)
        assert (rule.k, rule.sinks, rule.recents, rule.min_k) == (MOST_KEYS,) * 4
        assert rule.least < 2**31
        assert rule.slots(1000) == 1000
        assert (Sink(huge) | Threshold(huge, per="kv_head")).rule(4).radius == MOST_KEYS
    assert Rule(k=5, sinks=2, recents=3, min_k=4).slots(100) == 9


def test_local_chunks_are_those_that_hold_columns():
    q, k, v = qkv(4, keys=50)
    for k_wanted, per_chunk in ((1 << 20, 16), (1 << 20, 1 << 20), (MOST_KEYS, 1 << 28)):
        attn = HashAttention(RANDOM, FlatHamming(), LocalTopK(k_wanted, per_chunk), engine="reference")
        every = attn.replace(selector=TopK(share=1.0))
        assert (attn(q, k, v) - every(q, k, v)).abs().max() < 1e-6
    raises_naming(ValueError, "at most", "TopK")(lambda: LocalTopK(1 << 40, 1 << 20))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 200), st.integers(1, 80), st.integers(0, 30), st.integers(0, 30),
    st.sampled_from([(8, 8), (16, 4), (32, 16), (64, 8)]),
)  # fmt: skip
def test_local_budgets_hold_with_forced_keys(seed, keys, sinks, recents, local):
    forced = [part(n) for part, n in ((Sink, sinks), (Recent, recents)) if n]
    joined = LocalTopK(*local)
    for part in forced:
        joined = part | joined
    view = make_view(tied_distances(seed, 1, 2, 1, keys), 2, [0])
    found = joined.select(view, Step()).count.max()
    assert found <= joined.budget(keys)


def test_samples_are_counted_beside_the_forced_keys():
    joined = Sink(4) | Recent(64) | RandomTail(TopK(share=0.05), share=0.05)
    view = make_view(tied_distances(0, 1, 2, 1, 1000), 2, [0])
    assert joined.select(view, Step()).count.max() == joined.budget(1000) == 118


# ---- plans ask the part


@dataclass(frozen=True)
class Around(Wrapper):
    """A wrapper that calls what it wraps otherwise."""

    chooser: Selector

    @property
    def inner(self):
        return self.chooser

    def around(self, inner, **own):
        return Around(inner, **own)

    def select(self, view, step):
        return self.chooser.select(view, step)


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (TopK(k=9), (8, 1)),
        (TopK(k=9, per="kv_head"), (2, 1)),
        (TopK(k=9, per="kv_head", combine="union"), (2, 4)),
        (Threshold(9, limit=5, per="kv_head", combine="union"), (2, 1)),  # the limit is the group's
        (LocalTopK(16, 8, per="kv_head", combine="union"), (2, 4)),
        (Sink(2) | Refine(TopK(k=9, per="kv_head")), (2, 1)),
        (Sink(2) | Recent(3), (2, 1)),
        (HeavyHitters(k=9), (2, 1)),
    ],
    ids=repr,
)
def test_a_wrapper_is_planned_as_what_it_wraps_whatever_it_calls_it(inner, expected):
    shape, attend_with = Request(torch.device("cpu"), torch.bfloat16, 1, 8, 2, 64, threads=2), ExactAttend()
    for selector in (inner, Around(inner), Sink(3) | Around(inner) if not isinstance(inner, Sink) else inner):
        assert selector.choices(8, 2) == expected
    if inner.ranked:
        plain = HashAttention(RANDOM, FlatHamming(), inner, attend_with)
        own = step_microseconds(plain.parts, shape, 5000)
        assert step_microseconds(plain.replace(selector=Around(inner)).parts, shape, 5000) == own
        assert Around(inner).revised(**({"k": 16} if "k" in inner.settings() else {"limit": 16})) == Around(
            inner.revised(**({"k": 16} if "k" in inner.settings() else {"limit": 16}))
        )


def test_what_is_looked_at_is_counted_with_forced_keys_and_inside_others():
    refine = Refine(TopK(share=0.01, per="kv_head"), 4)
    assert refine.keys_read(1010) == 41  # 4% of 1010, rounded once
    assert (Sink(4) | Recent(64) | refine).keys_read(1000) == 68
    assert Momentum(refine).keys_read(1000) == Reuse(refine, every=2).keys_read(1000) == 40
    assert TopP(Refine(TopK(k=10), 3)).keys_read(1000) == 30 + 10
    attn = HashAttention(RANDOM, FlatHamming(), refine, engine="cpu")
    shape = {"q_heads": 8, "kv_heads": 2, "head_dim": 64, "keys": 10_000}
    plain = attn.replace(selector=refine.inner).explain(**shape)
    assert attn.explain(**shape).step_bytes - plain.step_bytes == 2 * 400 * 64 * 2  # 2 heads, 16-bit keys


def test_a_fused_plan_asks_for_the_group(monkeypatch):
    asked = []

    @dataclass(frozen=True)
    class Groups(Wrapper):
        inner: Selector

        def select(self, view, step):
            return self.inner.select(view, step)

        def rule(self, group):
            asked.append(group)
            return self.inner.rule(group) if group == 4 else None

    pytest.importorskip("triton")
    attn = HashAttention(RANDOM, FlatHamming(), Groups(TopK(share=0.1, per="kv_head")), engine="gpu")
    plan = attn.explain(q_heads=8, kv_heads=2, head_dim=64, keys=10_000, device="cuda")
    assert plan.engine == "gpu"
    assert set(asked) == {4}


# ---- nothing found


@pytest.mark.parametrize(
    "index", [MultiProbe(1, 16, 1), FaissBinary("BHash1x32", nflip=0), FaissBinary("BHash2x24", nflip=0)], ids=repr
)
@pytest.mark.parametrize("per", ["query_head", "kv_head"])
def test_a_query_that_finds_nothing_keeps_its_last_key(index, per):
    q, k, v = qkv(6, 2, keys=9, tokens=2, dim=32)
    encoder = SimHash(64, centring=None)
    attn = HashAttention(encoder, index, TopK(k=3, per=per), engine="reference")
    cache = attn.new_cache(2, 2, 32)
    cache.append(k, v, start=torch.tensor([0, 2]))
    output, selection = attn.run(q, cache)
    bare = cache.view(encoder.encode_query(q), 4, cache.spans(2)).find(3)[0]
    nothing = (bare < 0).all(-1)
    if per == "kv_head":
        nothing = nothing.unflatten(1, (2, 2)).all(2)
    assert nothing.any()
    last = torch.tensor([7, 8]).expand_as(nothing)
    assert (selection.count > 0).all()
    assert (selection.ids[..., 0][nothing] == last[nothing]).all()
    assert (selection.count[nothing] == 1).all()
    assert (output.out != 0).any(-1).all()


def test_rows_without_keys_stay_empty():
    q, k, v = qkv(7, 2, keys=5)
    attn = HashAttention(RANDOM, MultiProbe(1, 16, 1), TopK(k=3), engine="reference")
    cache = attn.new_cache(2, 2, 16)
    cache.append(k, v, start=torch.tensor([5, 0]))
    _, selection = attn.run(q, cache)
    assert (selection.count[0] == 0).all()
    assert (selection.count[1] > 0).all()


# ---- siblings among the fields


@pytest.mark.parametrize(
    "make",
    [
        lambda: Consensus(TOP, discount=True), lambda: Consensus(TOP, discount="2"),
        lambda: Consensus(TOP, discount=float("nan")), lambda: Consensus(TOP, vote_share=float("nan")),
        lambda: Momentum(TOP, ratio="1"), lambda: Momentum(TOP, ratio=float("inf")), lambda: Momentum(TOP, ratio=True),
        lambda: TopK(share=float("nan")), lambda: TopK(share=float("inf")), lambda: TopK(share=True),
        lambda: TopK(k=True), lambda: TopK(k=3.0), lambda: Tiers(float("nan"), 0.2), lambda: TopP(TOP, p=0),
        lambda: TopP(TOP, p=float("nan")), lambda: Refine(TOP, ties=1), lambda: Refine(TOP, factor=True),
        lambda: HeavyHitters(share=0.1, recent=float("nan")), lambda: ObservationWindow(k=3, window=True),
        lambda: ObservationWindow(shares=(0.1, float("nan"))), lambda: Reuse(TOP, every=True),
        lambda: RandomTail(TOP, k=True), lambda: RandomTail(TOP, share=0.1, seed=True), lambda: LocalTopK(True),
        lambda: Sink(True), lambda: Recent(float("nan")), lambda: Threshold(3, limit=True),
        lambda: LogitMap((1.0, float("inf")), (0.0, -1.0)), lambda: LogitMap((1.0,), (float("-inf"),)),
        lambda: CollisionSample(True), lambda: MultiProbe(True), lambda: MultiProbe(bits=True),
        lambda: type(Sink() | Recent())(()), lambda: type(Sink() | Recent())([Sink(2)]),
        lambda: type(Sink() | Recent())((Sink(2), 3)),
    ],
)  # fmt: skip
def test_values_of_other_kinds_are_refused(make):
    with pytest.raises((TypeError, ValueError)):
        make()


def test_a_budget_counts_the_same_on_both_sides():
    visible = torch.tensor([[0, 1, 5, 100, 4097]])
    for k, share, min_k, forced in itertools.product((None, 7, 2**70), (0.013, 1.0), (0, 9, 2**70), (0, 68, 2**70)):
        budget = Budget(k, None if k else share, min_k)
        counts = budget.counts(visible, forced)[0].tolist()
        assert counts == [budget.count(n, forced) for n in visible[0].tolist()]


def test_modules_inside_other_parts_are_found():
    consensus = Consensus(TOP)
    nested = Sink(2) | Momentum(Recent(3) | consensus)
    assert [type(m) for m in nested.weighted()] == [Momentum, Consensus]
    attn = HashAttention(RANDOM, FlatHamming(), nested)
    attn.to("meta")
    assert all(p.is_meta for m in nested.weighted() if isinstance(m, nn.Module) for p in m.parameters())
