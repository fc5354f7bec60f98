import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import ExactAttend, HashAttention, ObservationWindow, Sink, Step, pyramid
from tests.structured import (
    attention64,
    generator,
    heads,
    qkv,
    raises_naming,
    sdpa,
    seeds,
    selected,
    tolerance,
    visible_mask,
)

SMALL = {"window": 8, "pool": 3}


def composed(selector, engine="reference"):
    return HashAttention(selector=selector, attend=ExactAttend(), engine=engine)


def prefilled(attn, q, k, v, start=None, layer=0):
    cache = attn.new_cache(k.shape[0], k.shape[1], k.shape[3])
    cache.append(k, v, start=start)
    attn.accumulate(q, cache, step=Step(layer))
    return cache


def kept_by_hand(q, k, start, budget, window, pool):
    """The columns that one row's KV head keeps, in float64: q [G, N, D], k [N, D]."""
    keys = k.shape[0]
    votes = torch.zeros(keys, dtype=torch.float64)
    for t in range(keys - window, keys):
        w = torch.softmax(q[:, t].double() @ k[start : t + 1].double().T * q.shape[-1] ** -0.5, -1)
        votes[start : t + 1] += w.sum(0)
    before = votes[: keys - window]
    pooled = F.pad(before, (pool // 2, pool // 2 + 1)).unfold(0, pool, 1).mean(-1)
    order = sorted(range(start, keys - window), key=lambda c: -pooled[c].item())
    return {*order[: max(0, budget - window)], *range(max(start, keys - window), keys)}


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@settings(deadline=None, max_examples=6)
@given(
    seed=seeds, shape=heads, keys=st.sampled_from([8, 9, 64, 65]), budget=st.sampled_from([{"k": 12}, {"share": 0.3}]),
    sinks=st.booleans(),
)  # fmt: skip
def test_the_last_queries_choose_and_the_choice_stays(engine, seed, shape, keys, budget, sinks):
    kv_heads, group = shape
    q, k, v = qkv(seed, 2, *shape, keys + 3, keys + 3)
    q, start = 2 * q, [0, keys // 3]
    selector = ObservationWindow(**budget, **SMALL)
    attn = composed(Sink(1) | selector if sinks else selector, engine)
    cache = prefilled(attn, q[:, :, :keys], k[:, :, :keys], v[:, :, :keys], torch.tensor(start))
    for t in range(keys, keys + 3):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        output, selection = attn.run(q[:, :, t : t + 1], cache)
        keep = selected(selection.ids, t + 1, q.shape[1])
        for b in range(2):
            visible = keys - start[b]
            wanted = budget["k"] if "k" in budget else math.ceil(budget["share"] * visible)
            for h in range(kv_heads):
                own = slice(h * group, (h + 1) * group)
                hand = kept_by_hand(q[b, own, :keys], k[b, h, :keys], start[b], min(visible, wanted), **SMALL)
                hand |= {*range(keys, t + 1), *([start[b]] if sinks else [])}
                assert {*keep[b, h * group, 0].nonzero().flatten().tolist()} == hand
        now = q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1]
        assert (output.out - attention64(*now, keep)[0]).abs().max() <= tolerance(*now, keep)


@settings(deadline=None, max_examples=5)
@given(seed=seeds, shape=heads, keys=st.sampled_from([1, 64, 65]))
def test_a_budget_of_everything_and_keys_that_nobody_voted_on_are_dense_attention(seed, shape, keys):
    q, k, v = qkv(seed, 2, *shape, keys, keys)
    start = torch.tensor([0, keys // 2])
    keep = visible_mask(1, keys, start.tolist())
    last = q[:, :, -1:]
    for selector in (ObservationWindow(share=1.0, **SMALL), ObservationWindow(k=keys, **SMALL)):
        attn = composed(selector)
        out = attn.run(last, prefilled(attn, q, k, v, start))[0].out
        assert (out - sdpa(last, k, v, keep)).abs().max() <= 2 * tolerance(last, k, v, keep)
    out = composed(ObservationWindow(k=9, **SMALL))(last, k, v, start=start)  # a stateless call has no past
    assert (out - sdpa(last, k, v, keep)).abs().max() <= 2 * tolerance(last, k, v, keep)


@settings(deadline=None, max_examples=5)
@given(seed=seeds)
def test_a_larger_budget_keeps_what_a_smaller_one_keeps(seed):
    q, k, v = qkv(seed, tokens=64, keys=64)
    before = torch.zeros(1, 4, 1, 64, dtype=torch.bool)
    for budget in (8, 12, 30, 64):
        attn = composed(ObservationWindow(k=budget, **SMALL))
        mask = selected(attn.run(q[:, :, -1:], prefilled(attn, q, k, v))[1].ids, 64, 4)
        assert (before <= mask).all()
        assert (mask.sum(-1) == budget).all()
        before = mask


def test_searches_change_nothing_and_a_second_prompt_chooses_again():
    q, k, v = qkv(3, 2, tokens=80, keys=80)
    attn = composed(ObservationWindow(k=20, **SMALL))
    cache = prefilled(attn, q[:, :, :60], k[:, :, :60], v[:, :, :60])
    chosen = cache.attention_sums.of(60, cache.keys) > -torch.inf
    assert (chosen.sum(-1) == 20).all()
    cache.append(k[:, :, 60:64], v[:, :, 60:64])
    output, selection = attn.run(q[:, :, 60:64], cache)
    keep = selected(selection.ids, 64, 4)
    seen = visible_mask(4, 64, [0, 0])
    expected = F.pad(chosen, (0, 4), value=True).repeat_interleave(2, 1).unsqueeze(2) & seen
    assert torch.equal(keep, expected)
    assert len(cache.attention_sums) == 60
    exact = attention64(q[:, :, 60:64], k[:, :, :64], v[:, :, :64], keep)[0]
    assert (output.out - exact).abs().max() <= tolerance(q[:, :, 60:64], k[:, :, :64], v[:, :, :64], keep)
    cache.append(k[:, :, 64:80], v[:, :, 64:80])
    attn.run(q[:, :, 64:80], cache)
    assert len(cache.attention_sums) == 60  # what searches does not choose for others
    attn.accumulate(q[:, :, 64:80], cache)
    again = cache.attention_sums.of(80, cache.keys) > -torch.inf
    assert (again.sum(-1) == 20).all()
    assert again[..., 72:].all()
    assert (again[..., :60] <= chosen).all()  # what was left out stays out


def test_the_choice_follows_crops_reordered_rows_and_copies():
    q, k, v = qkv(4, 3, tokens=70, keys=70)
    start = torch.tensor([0, 9, 20])
    attn = composed(ObservationWindow(k=20, **SMALL))
    cache = prefilled(attn, q[:, :, :60], k[:, :, :60], v[:, :, :60], start)
    saved = attn.new_cache(3, 2, 16)
    saved.load_state_dict(cache.state_dict())
    rows = torch.tensor([2, 0, 0, 1])
    turned = copy.deepcopy(cache)
    turned.select_rows(rows)
    for other, of in ((saved, torch.arange(3)), (turned, rows)):
        other.append(k[of, :, 60:61], v[of, :, 60:61])
        assert torch.equal(
            other.attention_sums.of(60, other.keys) > -torch.inf,
            (cache.attention_sums.of(60, cache.keys) > -torch.inf)[of],
        )
    cache.append(k[:, :, 60:], v[:, :, 60:])
    cache.crop(61)
    expected = attn.run(q[:, :, 60:61], cache)[0].out
    assert torch.equal(attn.run(q[:, :, 60:61], saved)[0].out, expected)
    assert torch.allclose(attn.run(q[rows, :, 60:61], turned)[0].out, expected[rows], atol=1e-6)
    cache.crop(50)
    keep = selected(attn.run(q[:, :, 49:50], cache)[1].ids, 50, 4)
    assert (keep.sum(-1) > 0).all()
    assert (keep.sum(-1) <= 20).all()


def test_layers_have_budgets_of_their_own():
    q, k, v = qkv(5, tokens=64, keys=64)
    attn = composed(ObservationWindow(shares=(0.5, 0.25), **SMALL))
    assert eval(repr(attn)) == attn
    for layer, kept in ((0, 32), (1, 16)):
        selection = attn.run(q[:, :, -1:], prefilled(attn, q, k, v, layer=layer), step=Step(layer))[1]
        assert (selected(selection.ids, 64, 4).sum(-1) == kept).all()
    assert attn.selector.budget(64) == 32  # plans take the largest
    raises_naming(ValueError, "shares", "layer 2")(lambda: prefilled(attn, q, k, v, layer=2))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 80), st.floats(0.001, 1), st.floats(1, 50))
def test_a_pyramid_falls_evenly_and_keeps_its_mean(layers, share, beta):
    shares = pyramid(layers, share, beta=beta)
    assert len(shares) == layers
    assert all(0 < s <= 1 for s in shares)
    assert sum(shares) / layers == pytest.approx(share, rel=1e-9)
    steps = [a - b for a, b in itertools.pairwise(shares)]
    assert all(s >= -1e-12 for s in steps)
    assert max(steps, default=0) - min(steps, default=0) < 1e-9
    if layers > 1 and 2 * share - share / beta <= 1:
        assert shares[-1] == pytest.approx(share / beta)


def pyramid_by_hand(capacity, window, keys, layer, layers, beta=20):
    """Keys that PyramidKV gives a layer (arXiv 2406.02069): a window, and a part of what is beside it."""
    beside = capacity - window
    if keys < capacity:
        return keys
    if keys < 2 * beside:
        return capacity
    least = beside // beta
    most = 2 * beside - least
    if most >= keys - window:
        most, least = keys - window, 2 * beside - (keys - window)
    return window + most - layer * ((most - least) // (layers - 1))


@settings(deadline=None, max_examples=200)
@given(st.integers(9, 5000), st.integers(0, 5000), st.integers(2, 80), st.sampled_from([1, 8, 64]))
def test_layers_of_a_pyramid_keep_their_window_beside_their_share(keys, more, layers, window):
    capacity = window + 1 + more
    selector = ObservationWindow(k=capacity, window=window, layers=layers)
    assert selector.budget(keys) == pyramid_by_hand(capacity, window, keys, 0, layers)
    kept = [selector._kept(i, keys) for i in range(layers)]
    assert kept == [pyramid_by_hand(capacity, window, keys, i, layers) for i in range(layers)]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] >= min(keys, window)


@pytest.mark.parametrize("start", [0, 20])
def test_every_layer_of_a_pyramid_keeps_votes_beside_its_window(start):
    q, k, v = qkv(8, 1, tokens=200, keys=200)
    selector = ObservationWindow(share=0.2, layers=4, beta=4.0, **SMALL)
    attn = composed(selector)
    assert eval(repr(attn)) == attn
    capacity = math.ceil(0.2 * (200 - start))
    for layer in range(4):
        cache = prefilled(attn, q, k, v, torch.tensor([start]), layer=layer)
        keep = selected(attn.run(q[:, :, -1:], cache, step=Step(layer))[1].ids, 200, 4)
        wanted = pyramid_by_hand(capacity, 8, 200 - start, layer, 4, 4)
        assert wanted > 8
        for h in range(2):
            hand = kept_by_hand(q[0, 2 * h : 2 * h + 2], k[0, h], start, wanted, **SMALL)
            assert {*keep[0, 2 * h, 0].nonzero().flatten().tolist()} == hand
    raises_naming(ValueError, "layers=4", "layer 4")(lambda: prefilled(attn, q, k, v, layer=4))


def test_a_pyramid_of_a_budget_of_everything_is_dense_and_of_the_window_alone_keeps_that():
    q, k, v = qkv(9, tokens=64, keys=64)
    for layer in (0, 2):
        for budget, kept in (({"share": 1.0}, 64), ({"k": 8}, 8), ({"k": 3}, 8)):
            attn = composed(ObservationWindow(**budget, layers=3, **SMALL))
            cache = prefilled(attn, q, k, v, layer=layer)
            keep = selected(attn.run(q[:, :, -1:], cache, step=Step(layer))[1].ids, 64, 4)
            assert (keep.sum(-1) == kept).all()


def test_permuting_what_lies_before_the_window_permutes_the_choice_without_pooling():
    q, k, v = qkv(6, tokens=64, keys=64)
    order = torch.cat([torch.randperm(56, generator=generator(0)), torch.arange(56, 64)])
    attn = composed(ObservationWindow(k=20, window=8, pool=1))
    masks = []
    for columns in (torch.arange(64), order):
        cache = prefilled(attn, q, k[:, :, columns], v[:, :, columns])
        masks.append(selected(attn.run(q[:, :, -1:], cache)[1].ids, 64, 4))
    assert torch.equal(masks[0][..., order], masks[1])


@pytest.mark.parametrize(
    ("error", "make", "words"),
    [
        (ValueError, lambda: ObservationWindow(), ["k", "share", "shares"]),
        (ValueError, lambda: ObservationWindow(k=3, share=0.1), ["k", "share", "0.1"]),
        (ValueError, lambda: ObservationWindow(share=1.5), ["share", "1.5"]),
        (ValueError, lambda: ObservationWindow(shares=(0.5, 0.0)), ["shares", "0.0"]),
        (TypeError, lambda: ObservationWindow(shares=[0.5]), ["shares", "[0.5]"]),
        (ValueError, lambda: ObservationWindow(k=3, window=0), ["window", "0"]),
        (ValueError, lambda: ObservationWindow(k=3, pool=4), ["pool", "odd", "4"]),
        (ValueError, lambda: ObservationWindow(k=3, layers=0), ["layers", "0"]),
        (ValueError, lambda: ObservationWindow(k=3, layers=2, beta=0.5), ["beta", "0.5"]),
        (ValueError, lambda: ObservationWindow(shares=(0.5,), layers=1), ["layers=1", "shares=(0.5,)"]),
        (ValueError, lambda: pyramid(0, 0.5), ["layers", "0"]),
        (ValueError, lambda: pyramid(3, 0.0), ["share", "0.0"]),
        (ValueError, lambda: pyramid(3, 0.5, beta=0.5), ["beta", "0.5"]),
    ],
)
def test_bad_input_is_refused_by_name(error, make, words):
    raises_naming(error, *words)(make)
