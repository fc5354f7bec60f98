import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import ExactAttend, HashAttention, HeavyHitters, Recent, Sink, TopK, TopP
from tests.structured import (
    attention64,
    heads,
    qkv,
    raises_naming,
    sdpa,
    seeds,
    selected,
    tolerance,
    visible_mask,
)

PREFILL = 40


def composed(selector, engine="reference"):
    return HashAttention(selector=selector, attend=ExactAttend(), engine=engine)


def filled(attn, k, v, q, start=None, chunks=(PREFILL,)):
    """A cache whose first keys were prefilled densely, in chunks."""
    cache, first = attn.new_cache(k.shape[0], k.shape[1], k.shape[3]), 0
    dense = attn.replace(engine="dense")
    for size in chunks:
        part = slice(first, first + size)
        cache.append(k[:, :, part], v[:, :, part], start=start if first == 0 else None)
        dense.run(q[:, :, part], cache)
        first += size
    return cache


def decode(attn, cache, q, k, v, first, last):
    """One token at a time: outputs and masks of kept keys."""
    outs, masks = [], []
    for t in range(first, last):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        output, selection = attn.run(q[:, :, t : t + 1], cache)
        outs.append(output.out)
        masks.append(selected(selection.ids, t + 1, q.shape[1])[:, :, 0])
    return outs, masks


def evicting(q, k, v, start, selector, steps, sinks=0):
    """H2O with a cache of one row and KV head that really evicts, in float64: kept columns and outputs of each step."""
    scale = q.shape[-1] ** -0.5
    votes = {c: 0.0 for c in range(start, PREFILL)}
    for t in range(start, PREFILL):
        w = torch.softmax(q[:, t].double() @ k[start : t + 1].double().T * scale, -1).sum(0)
        for i, c in enumerate(range(start, t + 1)):
            votes[c] += w[i].item()
    kept, outs = [], []
    for t in range(PREFILL, PREFILL + steps):
        votes[t] = 0.0
        visible = t + 1 - start
        budget = max(selector.budget(visible), min(sinks, visible))
        recent = set(range(max(start, t + 1 - math.ceil(selector.recent * selector.budget(visible))), t + 1))
        ranked = sorted(votes, key=lambda c: (c >= start + sinks, c not in recent, -votes[c]))
        votes = {c: votes[c] for c in ranked[:budget]}
        columns = sorted(votes)
        w = torch.softmax(q[:, t].double() @ k[columns].double().T * scale, -1)
        for i, c in enumerate(columns):
            votes[c] += w[:, i].sum().item()
        kept.append(set(columns))
        outs.append(w @ v[columns].double())
    return kept, outs


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@settings(deadline=None, max_examples=5)
@given(
    seed=seeds, shape=heads, sinks=st.sampled_from([0, 2]), chunks=st.sampled_from([(40,), (10, 1, 29), (20, 20)]),
    selector=st.sampled_from([HeavyHitters(k=8), HeavyHitters(k=9, recent=0.3), HeavyHitters(share=0.2)]),
)  # fmt: skip
def test_outputs_are_those_of_a_cache_that_evicts(engine, seed, shape, sinks, chunks, selector):
    kv_heads, group = shape
    q, k, v = qkv(seed, 2, *shape, tokens=52, keys=52)
    q, start = 2 * q, [0, 9]
    attn = composed(Sink(sinks) | selector if sinks else selector, engine)
    cache = filled(attn, k, v, q, torch.tensor(start), chunks)
    outs, masks = decode(attn, cache, q, k, v, PREFILL, 52)
    for b in range(2):
        for h in range(kv_heads):
            own = slice(h * group, (h + 1) * group)
            kept, exact = evicting(q[b, own], k[b, h], v[b, h], start[b], selector, 12, sinks)
            for t in range(12):
                assert set(masks[t][b, h * group].nonzero().flatten().tolist()) == kept[t]
                assert (outs[t][b, own, 0].double() - exact[t]).abs().max() < 1e-4  # float32, |v| of a few units


def test_votes_follow_crops_reordered_rows_and_copies():
    q, k, v = qkv(0, 2, tokens=60, keys=60)
    attn = composed(HeavyHitters(k=10))
    cache = filled(attn, k, v, q, torch.tensor([0, 9]))
    decode(attn, cache, q, k, v, PREFILL, 45)
    twin, saved = copy.deepcopy(cache), attn.new_cache(2, 2, 16)
    saved.load_state_dict(cache.state_dict())
    expected = decode(attn, cache, q, k, v, 45, 50)
    for other in (twin, saved):
        found = decode(attn, other, q, k, v, 45, 50)
        assert all(torch.equal(a, b) for a, b in zip(expected[0], found[0], strict=True))
    one = copy.deepcopy(twin)
    one.select_rows(torch.tensor([1, 1, 0]))
    rows = torch.tensor([1, 1, 0])
    turned = decode(attn, one, q[rows], k[rows], v[rows], 50, 55)
    expected = decode(attn, twin, q, k, v, 50, 55)
    for a, b in zip(expected[0], turned[0], strict=True):
        assert torch.allclose(a[rows], b, atol=1e-6)
    # what the cropped queries dropped is there again, and goes again with them
    alive, (outs, masks) = twin.attention_sums.of(55, twin.keys), decode(attn, copy.deepcopy(twin), q, k, v, 55, 57)
    twin.crop(52)
    assert len(twin.attention_sums) == 52
    assert ((twin.attention_sums.of(52, twin.keys) == -torch.inf) < (alive[..., :52] == -torch.inf)).any()
    decode(attn, twin, q, k, v, 52, 55)
    assert torch.equal(twin.attention_sums.of(55, twin.keys) == -torch.inf, alive == -torch.inf)
    again = decode(attn, twin, q, k, v, 55, 57)
    assert all(torch.equal(a, b) for a, b in zip(masks, again[1], strict=True))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(outs, again[0], strict=True))
    twin.reset()
    assert len(twin.attention_sums) == 0


@settings(deadline=None, max_examples=6)
@given(seed=seeds, shape=heads, keys=st.sampled_from([1, 64, 65]), tokens=st.sampled_from([1, 3]))
def test_a_budget_of_everything_and_keys_that_nobody_voted_on_are_dense_attention(seed, shape, keys, tokens):
    q, k, v = qkv(seed, 2, *shape, min(tokens, keys), keys)
    start = torch.tensor([0, keys // 2])
    keep = visible_mask(q.shape[2], keys, start.tolist())
    expected, most = sdpa(q, k, v, keep), 2 * tolerance(q, k, v, keep)
    assert (composed(HeavyHitters(share=1.0))(q, k, v, start=start) - expected).abs().max() <= most
    out = composed(HeavyHitters(k=3))(q, k, v, start=start)  # a stateless call has no past: its first query keeps all
    assert (out - expected)[:, :, 0].abs().max() <= most


def test_queries_of_one_call_choose_as_they_do_one_at_a_time():
    q, k, v = qkv(1, 2, tokens=48, keys=48)
    start = torch.tensor([0, 9])
    attn = composed(HeavyHitters(k=12))
    cache = filled(attn, k, v, q, start)
    alone = copy.deepcopy(cache)
    cache.append(k[:, :, 40:43], v[:, :, 40:43])
    output, selection = attn.run(q[:, :, 40:43], cache, need_lse=True, need_weights=True)
    keep = selected(selection.ids, 43, 4)
    assert (keep <= visible_mask(3, 43, [0, 9])).all()
    assert (keep.sum(-1) == 12).all()
    exact = attention64(q[:, :, 40:43], k[:, :, :43], v[:, :, :43], keep)[0]
    assert (output.out - exact).abs().max() <= tolerance(q[:, :, 40:43], k[:, :, :43], v[:, :, :43], keep)
    assert output.lse.shape == (2, 4, 3) and output.weights.shape == (2, 4, 3, selection.ids.shape[-1])
    outs, masks = decode(attn, alone, q, k, v, 40, 43)
    for t in range(3):
        assert torch.equal(keep[:, :, t, : 41 + t], masks[t])
        assert torch.equal(output.out[:, :, t], outs[t][:, :, 0])
    assert torch.equal(cache.attention_sums.of(43, cache.keys), alone.attention_sums.of(43, alone.keys))
    attn.run(q[:, :, 42:43], cache)  # a query that is asked again does not vote again
    assert torch.equal(cache.attention_sums.of(43, cache.keys), alone.attention_sums.of(43, alone.keys))


@settings(deadline=None, max_examples=5)
@given(seed=seeds)
def test_a_larger_budget_keeps_more_attention(seed):
    q, k, v = qkv(seed, tokens=41, keys=41)
    weights = attention64(q[:, :, 40:], k, v, visible_mask(1, 41, [0]))[1][:, :, 0]
    before = torch.zeros(4, dtype=torch.float64)
    for budget in (2, 6, 20, 41):
        attn = composed(HeavyHitters(k=budget))
        mask = decode(attn, filled(attn, k, v, q), q, k, v, 40, 41)[1][0]
        mass = (weights * mask).sum(-1)[0]
        assert (mass >= before - 1e-12).all()
        before = mass
    assert torch.allclose(before, torch.ones_like(before))


def test_a_budget_of_no_more_than_the_sinks_keeps_the_sinks():
    q, k, v = qkv(2, 2, tokens=46, keys=46)
    attn = composed(Sink(3) | HeavyHitters(k=2))
    for mask in decode(attn, filled(attn, k, v, q), q, k, v, PREFILL, 46)[1]:
        assert mask[..., :3].all() and not mask[..., 3:].any()


def test_it_needs_no_index_and_counts_its_votes():
    selector = Sink(4) | HeavyHitters(share=0.05)
    attn = composed(selector)
    assert eval(repr(attn)) == attn
    assert (selector.ranked, selector.accumulates, selector.shared, selector.budget(100)) == (False, True, True, 5)
    q, k, v = qkv(0, tokens=40, keys=40)
    cache = filled(attn, k, v, q)
    assert cache.code_nbytes == cache.attention_sums.nbytes > 0
    plan = attn.explain(q_heads=4, kv_heads=2, head_dim=16, keys=1000)
    assert "HeavyHitters" in str(plan)


@pytest.mark.parametrize(
    ("error", "make", "words"),
    [
        (ValueError, lambda: HeavyHitters(), ["k", "share"]),
        (ValueError, lambda: HeavyHitters(k=3, share=0.1), ["k=3", "share=0.1"]),
        (ValueError, lambda: HeavyHitters(k=0), ["k", "0"]),
        (ValueError, lambda: HeavyHitters(k=3, recent=0.0), ["recent", "0.0"]),
        (ValueError, lambda: Recent(4) | HeavyHitters(k=3) | TopK(k=3), ["HeavyHitters", "TopK"]),
        (TypeError, lambda: TopP(HeavyHitters(k=3)), ["inner", "HeavyHitters"]),
    ],
)
def test_bad_input_is_refused_by_name(error, make, words):
    raises_naming(error, *words)(make)
