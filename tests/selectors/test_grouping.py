"""One choice for the query heads of a KV head, against brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import FlatDot, HashAttention, Identity, Step, Threshold, Tiers, TopK
from hashattn.core.types import CRITICAL, MEDIUM
from tests.structured import (
    attention64,
    brute_nearest,
    make_view,
    odd_lengths,
    poison,
    qkv,
    raises_naming,
    seeds,
    selected,
    tied_distances,
    tolerance,
    visible_mask,
)


def brute_group(distances: np.ndarray, k: int, see: np.ndarray, forced: np.ndarray, combine: str) -> set[int]:
    """Kept columns of a group with distances [G, N]."""
    if combine == "normalised" and see.any():
        own = distances[:, see].astype(np.float64)
        spread = np.maximum(own.std(1), 1e-6)[:, None]
        distances = np.round(256 * (distances - own.mean(1)[:, None]) / spread).astype(np.int64)
    total = distances.sum(0)
    if combine in ("sum", "normalised"):
        return {*brute_nearest(total, k, see, forced)}
    choices = [brute_nearest(d, k, see, forced) for d in distances]
    if combine == "union":
        return {c for choice in choices for c in choice}
    votes = np.array([sum(c in choice for choice in choices) for c in range(len(see))])
    return {*sorted(np.flatnonzero(see), key=lambda c: (not forced[c], -votes[c], total[c], -c))[:k]}


def kept(ids: torch.Tensor) -> set[int]:
    found = [c for c in ids.tolist() if c >= 0]
    assert len(found) == len({*found})
    return {*found}


@pytest.mark.parametrize("combine", ["sum", "union", "vote", "normalised"])
@settings(deadline=None, max_examples=30)
@given(
    seed=seeds,
    keys=odd_lengths,
    group=st.sampled_from([1, 2, 3]),
    share=st.sampled_from([0.05, 0.3, 1.0]),
    forced=st.sampled_from([(0, 0), (2, 3)]),
    data=st.data(),
)
def test_a_group_chooses_as_brute_force_does(combine, seed, keys, group, share, forced, data):
    tokens = data.draw(st.integers(1, min(2, keys)))
    start = [0, data.draw(st.integers(0, keys - 1))]
    sinks, recents = forced
    distances = tied_distances(seed, 2, 2 * group, tokens, keys)
    view = make_view(distances, 2, start, sinks=sinks, recents=recents)
    selection = TopK(share=share, per="kv_head", combine=combine).select(view, Step())
    assert selection.ids.shape[1] == 2
    seen = visible_mask(tokens, keys, start)
    for b, h, t in np.ndindex(2, 2, tokens):
        see = seen[b, 0, t].numpy()
        columns = np.flatnonzero(see)
        ahead = np.isin(np.arange(keys), [*columns[:sinks], *columns[max(0, len(columns) - recents) :]])
        k = max(int(np.ceil(share * len(columns))), ahead.sum())
        own = distances[b, h * group : (h + 1) * group, t].numpy()
        assert kept(selection.ids[b, h, t]) == brute_group(own, k, see, ahead, combine)


@pytest.mark.parametrize("combine", ["sum", "union", "vote", "normalised"])
@settings(deadline=None, max_examples=20)
@given(seed=seeds, keys=st.sampled_from([20, 63, 100]))
def test_tiers_of_a_group_are_its_two_choices(combine, seed, keys):
    distances = tied_distances(seed, 1, 4, 1, keys)
    view = make_view(distances, 2)
    both = Tiers(0.1, 0.3, per="kv_head", combine=combine).select(view, Step())
    medium = both.tier == MEDIUM
    everything = selected(both.ids, keys, 2)
    critical = selected(both.ids.masked_fill(medium, -1), keys, 2)
    options = {"per": "kv_head", "combine": combine}
    assert torch.equal(everything, selected(TopK(share=0.3, **options).select(view, Step()).ids, keys, 2))
    if combine != "vote":  # votes are counted over the whole budget, so its critical keys are not a TopK's own
        assert torch.equal(critical, selected(TopK(share=0.1, **options).select(view, Step()).ids, keys, 2))
    assert (both.tier[both.ids < 0] == CRITICAL).all()


@pytest.mark.parametrize("combine", ["sum", "union", "vote", "normalised"])
def test_a_group_of_one_chooses_as_a_head_does(combine):
    view = make_view(tied_distances(0, 1, 3, 2, 65), 3)
    own = TopK(k=7).select(view, Step()).ids
    assert torch.equal(TopK(k=7, per="kv_head", combine=combine).select(view, Step()).ids, own)


@pytest.mark.parametrize("combine", ["sum", "union", "vote", "normalised"])
def test_a_group_of_equal_heads_chooses_as_one_of_them(combine):
    distances = tied_distances(1, 1, 1, 1, 65)
    own = TopK(k=7).select(make_view(distances, 1), Step()).ids
    shared = TopK(k=7, per="kv_head", combine=combine).select(make_view(distances.expand(1, 3, 1, 65), 1), Step()).ids
    assert kept(shared[0, 0, 0]) == kept(own[0, 0, 0])


@pytest.mark.parametrize("combine", ["sum", "union", "vote", "normalised"])
def test_float_scores_ignore_poisoned_padding(combine):
    q, k, v = qkv(2, batch=2)
    start = torch.tensor([0, 20])
    attn = HashAttention(Identity(), FlatDot(), TopK(share=1.0, per="kv_head", combine=combine), engine="reference")
    keep = visible_mask(1, 65, [0, 20])
    out = attn(q, poison(k, start), poison(v, start), start=start)
    assert (out - attention64(q, k, v, keep)[0]).abs().max() <= tolerance(q, k, v, keep)
    for selector in (TopK(k=9, per="kv_head", combine=combine), Tiers(0.1, 0.4, per="kv_head", combine=combine)):
        part = attn.replace(selector=selector)
        assert torch.equal(part(q, poison(k, start), poison(v, start), start=start), part(q, k, v, start=start))


def test_a_head_whose_distances_differ_little_counts_as_much_as_the_others():
    g = torch.Generator().manual_seed(3)
    near, wide = torch.randint(0, 4, (1, 1, 1, 65), generator=g), torch.randint(0, 60, (1, 1, 1, 65), generator=g)
    view = make_view(torch.cat([near, wide], 1).int(), 1)
    chosen = {
        c: TopK(k=9, per="kv_head", combine=c).select(view, Step()).ids[0, 0, 0].long() for c in ("sum", "normalised")
    }
    assert near[0, 0, 0, chosen["normalised"]].sum() < near[0, 0, 0, chosen["sum"]].sum()
    raises_naming(ValueError, "combine", "vote", "normalised")(lambda: Threshold(9, combine="normalised"))
