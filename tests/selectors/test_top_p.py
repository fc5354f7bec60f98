import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import (
    Centring,
    FlatDot,
    FlatHamming,
    HashAttention,
    Identity,
    LogitMap,
    Momentum,
    Recent,
    SimHash,
    Sink,
    Step,
    TopK,
    TopP,
)
from tests.structured import (
    attention64,
    cones,
    heads,
    make_view,
    odd_lengths,
    qkv,
    raises_naming,
    seeds,
    selected,
    tied_distances,
    tolerance,
    visible_mask,
)

PLAIN = SimHash(64, centring=None)


def chosen(selector, q, k, v, start=None, engine="reference", encoder=PLAIN, index=None):
    attn = HashAttention(encoder, index or FlatHamming(), selector, engine=engine)
    cache = attn.new_cache(k.shape[0], k.shape[1], k.shape[3])
    cache.append(k, v, start=start)
    output, selection = attn.run(q, cache)
    return selected(selection.ids, k.shape[2], q.shape[1]), output.out, selection


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@settings(deadline=None, max_examples=10)
@given(
    seed=seeds, shape=heads, keys=odd_lengths, tokens=st.sampled_from([1, 3]), p=st.sampled_from([0.2, 0.85, 0.99]),
    share=st.sampled_from([0.3, 1.0]), per=st.sampled_from(["query_head", "kv_head"]), forced=st.booleans(),
)  # fmt: skip
def test_the_fewest_candidates_that_reach_p_are_kept(engine, seed, shape, keys, tokens, p, share, per, forced):
    q, k, v = qkv(seed, 2, *shape, min(tokens, keys), keys)
    start = torch.tensor([0, keys // 3])
    inner = TopK(share=share, per=per)
    wrap = (lambda s: Sink(1) | Recent(2) | s) if forced else (lambda s: s)
    candidates = chosen(wrap(inner), 3 * q, k, v, start, engine)[0]
    kept, _, selection = chosen(wrap(TopP(inner, p)), 3 * q, k, v, start, engine)
    if per == "kv_head":  # what any head of the group keeps
        assert selection.ids.shape[1] == shape[0]
    must = torch.zeros_like(candidates)
    if forced:
        for b, first in enumerate(start.tolist()):
            for t in range(q.shape[2]):
                seen = list(range(first, keys - q.shape[2] + t + 1))
                must[b, :, t, seen[:1] + seen[-2:]] = True
    weights = attention64(3 * q, k, v, candidates)[1]
    own = kept if per == "query_head" else torch.zeros_like(kept)
    for b, h, t in itertools.product(*map(range, weights.shape[:3])):
        w, total = weights[b, h, t], 0.0
        for c in w.argsort(descending=True).tolist():
            if not candidates[b, h, t, c] or total >= p + 1e-5:
                break
            if total < p - 1e-5:  # what float32 may round is left open
                own[b, h, t, c] = True
                assert kept[b, h, t, c]
            total += w[c].item()
    if per == "query_head":
        assert (must <= kept).all()
        sums = (weights * kept).sum(-1)
        assert (sums[candidates.any(-1)] >= p - 1e-5).all()
        least = weights.masked_fill(~kept | must, torch.inf).amin(-1)  # without its lightest key, p is not reached
        lightest = least.where(least < torch.inf, 0)
        assert ((sums - lightest < p + 1e-5) | must.any(-1) | (lightest == 0)).all()
    else:
        assert (own <= kept).all()
    assert (kept <= candidates).all()


@settings(deadline=None, max_examples=6)
@given(seed=seeds, keys=odd_lengths, per=st.sampled_from(["query_head", "kv_head"]))
def test_a_larger_p_keeps_what_a_smaller_one_keeps_and_all_of_it_is_the_candidates(seed, keys, per):
    q, k, v = qkv(seed, keys=keys)
    inner = TopK(share=0.6, per=per)
    masks = [chosen(TopP(inner, p), q, k, v)[0] for p in (0.1, 0.5, 0.9, 1.0)]
    for small, large in itertools.pairwise(masks):
        assert (small <= large).all()
    assert torch.equal(masks[-1], chosen(inner, q, k, v)[0])


@settings(deadline=None, max_examples=6)
@given(seed=seeds, shape=heads, keys=odd_lengths, p=st.sampled_from([0.9, 1.0]))
def test_the_output_misses_no_more_than_p_leaves(seed, shape, keys, p):
    q, k, v = qkv(seed, 1, *shape, 1, keys)
    _, out, _ = chosen(TopP(TopK(share=1.0), p), q, k, v)
    keep = visible_mask(1, keys, [0])
    exact = attention64(q, k, v, keep)[0]
    largest = v.repeat_interleave(shape[1], 1).abs().amax((2, 3))[..., None, None]
    assert ((out - exact).abs() <= 2 * (1 - p) * largest + tolerance(q, k, v, keep)).all()


@settings(deadline=None, max_examples=6)
@given(seed=seeds, keys=odd_lengths)
def test_permuting_the_keys_permutes_the_selection(seed, keys):
    q, k, v = qkv(seed, keys=keys)
    order = torch.randperm(keys, generator=torch.Generator().manual_seed(seed % 2**31))
    inner = TopK(share=1.0)
    kept = chosen(TopP(inner, 0.7), q, k, v)[0]
    moved = chosen(TopP(inner, 0.7), q, k[:, :, order], v[:, :, order])[0]
    differ = (kept[..., order] != moved).sum(-1)
    assert (differ <= 1).all()  # a key at the cut, where float32 sums in another order


def test_a_fitted_map_of_exact_distances_is_the_logit():
    data = cones(0)
    q = data.q - data.q.mean((0, 2, 3), keepdim=True)
    logits = LogitMap((-40.0, 40.0), (40.0, -40.0))  # -distance: q.k itself
    by_map = chosen(TopP(TopK(share=0.5), 0.8, logits), q / 6, data.k, data.v, encoder=Identity(), index=FlatDot())
    # scale is 1 / sqrt(32): a query that is so much larger has q.k for a logit
    exact = chosen(TopP(TopK(share=0.5), 0.8), q / 6 * 32**0.5, data.k, data.v, encoder=Identity(), index=FlatDot())
    # the candidates are the same, the logits equal to rounding
    assert (by_map[0] != exact[0]).sum() <= 0.001 * exact[0].sum()


def test_a_fitted_map_falls_and_keeps_about_p_on_data_of_its_kind():
    pytest.importorskip("scipy")
    encoder, index = SimHash(256, centring=Centring(1.0)), FlatHamming()
    fit, data = cones(1, keys=800), cones(2, keys=800)
    logits = LogitMap.fit(fit.q, fit.k, encoder, index)
    assert eval(repr(logits)) == logits
    assert len(logits.distances) <= 64
    x = torch.arange(0, 257, dtype=torch.int32)
    assert (logits(x).diff() <= 0).all()
    assert logits(x)[0] > logits(x)[-1]
    weights = attention64(data.q, data.k, data.v, visible_mask(24, 800, [0]))[1]
    masses, sizes = [], []
    for p in (0.5, 0.85):
        kept = chosen(TopP(TopK(share=1.0), p, logits), data.q, data.k, data.v, encoder=encoder)[0]
        masses.append((weights * kept).sum(-1).mean().item())
        sizes.append(kept.float().mean().item())
    assert abs(masses[0] - 0.5) < 0.05  # .491 observed
    assert abs(masses[1] - 0.85) < 0.05  # .842 observed
    assert sizes[0] < 0.25  # .178 observed
    assert sizes[1] < 0.65  # .558 observed


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=8, unique=True), st.lists(st.integers(0, 100)))
def test_a_map_interpolates_between_its_knots_and_is_level_beyond(places, at):
    x = sorted(map(float, places))
    y = [-(v**1.5) for v in x]
    import numpy as np

    found = LogitMap(tuple(x), tuple(y))(torch.tensor(at, dtype=torch.int32))
    assert np.allclose(found.numpy(), np.interp(at, x, y), rtol=1e-5, atol=1e-4)


def test_it_costs_what_its_candidates_cost():
    top_p = TopP(TopK(share=0.5, per="kv_head"), 0.5)
    assert (top_p.budget(100), top_p.critical(100), top_p.shared, top_p.ranked) == (50, 50, True, True)
    assert eval(repr(top_p)) == top_p
    assert top_p.rule(1) is None
    assert (top_p.keys_read(100), (Sink(1) | top_p).keys_read(100)) == (50, 50)
    assert TopP(logits=LogitMap((1.0,), (0.0,))).keys_read(100) == TopP(p=1.0).keys_read(100) == 0
    assert not TopP().needs_weights


def test_it_nests_in_momentum_and_tells_what_it_needs():
    view = make_view(tied_distances(0, 1, 2, 1, 65), 2)
    raises_naming(TypeError, "without the queries")(lambda: TopP(TopK(k=9)).select(view, Step()))
    q, k, v = qkv(0)
    assert chosen(Momentum(TopP(TopK(k=9), 1.0)), q, k, v)[2].count.tolist() == [[[9]] * 4]


@pytest.mark.parametrize(
    ("error", "make", "words"),
    [
        (TypeError, lambda: TopP(Sink(4)), ["inner", "Sink"]),
        (TypeError, lambda: TopP(Momentum(TopK(k=3))), ["inner", "Momentum(TopP("]),
        (TypeError, lambda: TopP(0.85), ["inner", "0.85"]),
        (ValueError, lambda: TopP(p=0.0), ["p", "0.0"]),
        (ValueError, lambda: TopP(p=1.5), ["p", "1.5"]),
        (TypeError, lambda: TopP(logits=abs), ["logits", "LogitMap.fit"]),
        (ValueError, lambda: LogitMap((), ()), ["distances", "logits", "0"]),
        (ValueError, lambda: LogitMap((1.0,), (1.0, 2.0)), ["1", "2"]),
        (ValueError, lambda: LogitMap((2.0, 1.0), (1.0, 0.0)), ["distances", "rise", "(2.0, 1.0)"]),
        (ValueError, lambda: LogitMap((1.0, 2.0), (0.0, 1.0)), ["logits", "fall", "(0.0, 1.0)"]),
        (ValueError, lambda: LogitMap((1.0, float("nan")), (1.0, 0.0)), ["distances", "nan"]),
    ],
)
def test_bad_input_is_refused_by_name(error, make, words):
    raises_naming(error, *words)(make)
