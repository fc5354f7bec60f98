import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import FlatDot, FlatHamming, HashAttention, Identity, Recent, Refine, SimHash, Sink, Step, Tiers, TopK
from tests.structured import (
    cones,
    hamming_numpy,
    heads,
    make_view,
    odd_lengths,
    qkv,
    raises_naming,
    sdpa,
    seeds,
    selected,
    tied_distances,
    tolerance,
    visible_mask,
)

SHORT = SimHash(8, centring=None)  # many ties
budgets = st.sampled_from([{"k": 1}, {"k": 7}, {"share": 0.1}, {"share": 1.0}])


def run(selector, q, k, v, start=None, engine="reference", encoder=SHORT, index=None):
    attn = HashAttention(encoder, index or FlatHamming(), selector, engine=engine)
    cache = attn.new_cache(k.shape[0], k.shape[1], k.shape[3])
    cache.append(k, v, start=start)
    output, selection = attn.run(q, cache)
    return selected(selection.ids, k.shape[2], q.shape[1]), output.out, cache


def forced_mask(seen, sinks, recents):
    age = seen.flip(-1).cumsum(-1).flip(-1)
    return seen & ((seen.cumsum(-1) <= sinks) | (age <= recents))


def group_scores(q, k, candidates, per, group):
    """What candidates are ranked by, float64 [B, Hq, T, N]: logits, or the sum of a group's softmax."""
    logits = q.double() @ k.double().repeat_interleave(group, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    if per == "query_head" or group == 1:
        return logits
    total = logits.masked_fill(~candidates, -torch.inf).softmax(-1).unflatten(1, (-1, group)).sum(2)
    return total.repeat_interleave(group, 1)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@settings(deadline=None, max_examples=10)
@given(
    seed=seeds, budget=budgets, shape=heads, keys=odd_lengths, factor=st.sampled_from([1, 2, 5]),
    per=st.sampled_from(["query_head", "kv_head"]), forced=st.booleans(), tokens=st.sampled_from([1, 3]),
)  # fmt: skip
def test_the_best_candidates_by_exact_logits_are_kept(engine, seed, budget, shape, keys, factor, per, forced, tokens):
    q, k, v = qkv(seed, 2, *shape, min(tokens, keys), keys)
    start = torch.tensor([0, keys // 3])
    seen = visible_mask(q.shape[2], keys, start.tolist())
    wide = {name: min(1.0, factor * x) if name == "share" else factor * x for name, x in budget.items()}
    join = (lambda s: Sink(1) | Recent(2) | s) if forced else (lambda s: s)
    candidates = run(join(TopK(**wide, per=per)), q, k, v, start, engine)[0]
    narrow = run(join(TopK(**budget, per=per)), q, k, v, start, engine)[0]
    kept = run(join(Refine(TopK(**budget, per=per), factor)), q, k, v, start, engine)[0]
    must = forced_mask(seen, 1, 2) if forced else torch.zeros_like(seen)
    assert (kept <= candidates).all()
    assert (must & seen <= kept).all()
    assert torch.equal(kept.sum(-1), narrow.sum(-1))
    if factor == 1:
        assert torch.equal(kept, narrow)
    score = group_scores(q, k, candidates, per, shape[1])
    worst = score.masked_fill(~kept | must, torch.inf).amin(-1)
    best_left = score.masked_fill(kept | ~candidates, -torch.inf).amax(-1)
    assert (worst >= best_left - 1e-5).all()  # float32 logits of a few units


@settings(deadline=None, max_examples=12)
@given(
    seed=seeds, budget=budgets, shape=heads, keys=odd_lengths, per=st.sampled_from(["query_head", "kv_head"]),
    forced=st.booleans(), engine=st.sampled_from(["reference", "cpu"]),
)  # fmt: skip
def test_ties_alone_are_ranked_again(seed, budget, shape, keys, per, forced, engine):
    q, k, v = qkv(seed, 2, *shape, min(2, keys), keys)
    start = torch.tensor([0, keys // 3])
    seen = visible_mask(q.shape[2], keys, start.tolist())
    join = (lambda s: Sink(1) | Recent(2) | s) if forced else (lambda s: s)
    kept, _, cache = run(join(Refine(TopK(**budget, per=per), 100, ties=True)), q, k, v, start, engine)
    narrow = run(join(TopK(**budget, per=per)), q, k, v, start, engine)[0]
    must = (forced_mask(seen, 1, 2) if forced else torch.zeros_like(seen)).expand_as(kept)
    distances = torch.from_numpy(hamming_numpy(SHORT.encode_query(q), cache.codes))
    group = shape[1]
    if per == "kv_head":
        distances = distances.unflatten(1, (-1, group)).sum(2).repeat_interleave(group, 1)
    assert torch.equal(kept.sum(-1), narrow.sum(-1))
    assert (must <= kept).all()
    free = kept & ~must
    cut = distances.masked_fill(~(narrow & ~must), -1).amax(-1, keepdim=True)
    open_to_all = seen & ~must
    assert (open_to_all & (distances < cut) <= kept).all()
    assert (free <= (distances <= cut)).all()
    score = group_scores(q, k, seen.expand_as(kept), per, group)
    tied = open_to_all & (distances == cut)
    worst = score.masked_fill(~(free & tied), torch.inf).amin(-1)
    best_left = score.masked_fill(kept | ~tied, -torch.inf).amax(-1)
    # a group's softmax is over the candidates, here all that are seen
    assert (worst >= best_left - 1e-5).all()


@settings(deadline=None, max_examples=6)
@given(seed=seeds, shape=heads, keys=odd_lengths, ties=st.booleans(), per=st.sampled_from(["query_head", "kv_head"]))
def test_a_budget_of_everything_is_dense_attention(seed, shape, keys, ties, per):
    q, k, v = qkv(seed, 2, *shape, min(3, keys), keys)
    start = torch.tensor([0, keys // 2])
    keep = visible_mask(q.shape[2], keys, start.tolist())
    out = run(Refine(TopK(share=1.0, per=per), 2, ties), q, k, v, start)[1]
    assert (out - sdpa(q, k, v, keep)).abs().max() <= 2 * tolerance(q, k, v, keep)


@settings(deadline=None, max_examples=6)
@given(seed=seeds, keys=odd_lengths)
def test_refining_everything_is_exact_top_k(seed, keys):
    q, k, v = qkv(seed, keys=keys)
    kept = run(Refine(TopK(k=5), factor=keys), q, k, v)[0]
    exact = run(TopK(k=5), q, k, v, encoder=Identity(), index=FlatDot())[0]
    assert ((kept != exact).sum(-1) <= 2).all()  # two logits may be one in float32
    assert (kept == exact).float().mean() > 0.9


def test_recall_grows_with_the_factor():
    data, encoder = cones(4), SimHash(128)
    found = []
    for factor in (1, 2, 4, 8):
        kept = run(Refine(TopK(k=32), factor), data.q, data.k, data.v, encoder=encoder)[0]
        found.append(kept.gather(-1, data.truth).float().mean().item())
    for less, more in itertools.pairwise(found):
        assert less <= more
    assert found[0] > 0.45  # .500 observed
    assert found[2] > 0.72  # .779 observed


def test_it_costs_what_inner_costs():
    refine = Refine(TopK(share=0.1, per="kv_head"))
    assert (refine.budget(100), refine.critical(100), refine.shared) == (10, 10, True)
    assert eval(repr(refine)) == refine
    assert refine.rule(1) is None
    assert (refine.keys_read(100), Refine(TopK(k=50), 3).keys_read(100)) == (40, 100)
    shape = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "keys": 1000}
    plans = [HashAttention(SHORT, FlatHamming(), s, engine="cpu").explain(**shape) for s in (refine.inner, refine)]
    assert plans[1].scan_bytes - plans[0].scan_bytes == 2 * 400 * 16 * 2  # KV heads, candidates, bfloat16 keys
    view = make_view(tied_distances(0, 1, 2, 1, 65), 2)
    raises_naming(TypeError, "without the queries")(lambda: refine.select(view, Step()))


@pytest.mark.parametrize(
    ("error", "make", "words"),
    [
        (TypeError, lambda: Refine(Tiers()), ["inner", "Tiers"]),
        (TypeError, lambda: Refine(64), ["inner", "64"]),
        (ValueError, lambda: Refine(TopK(k=3), 0), ["factor", "0"]),
        (ValueError, lambda: Refine(TopK(k=3), 2.5), ["factor", "2.5"]),
        (ValueError, lambda: Refine(TopK(k=3, per="kv_head", combine="union")), ["inner", "union", 'combine="sum"']),
        (ValueError, lambda: Refine(TopK(k=3, per="kv_head", combine="vote"), ties=True), ["ties=True", "vote"]),
    ],
)
def test_bad_input_is_refused_by_name(error, make, words):
    raises_naming(error, *words)(make)
