"""LocalTopK against a sort of each chunk."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import (
    Centring,
    Consensus,
    FlatDot,
    FlatHamming,
    HashAttention,
    Identity,
    LocalTopK,
    Recent,
    SimHash,
    Sink,
    Step,
    TopK,
)
from tests.structured import (
    attention64,
    brute_nearest,
    cones,
    hamming_numpy,
    heads,
    make_view,
    odd_bits,
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

locals_ = st.builds(lambda chunks, t: LocalTopK(chunks * t, t), st.sampled_from([1, 2, 3, 8, 40]), st.integers(1, 20))
forced_numbers = st.sampled_from([(0, 0), (1, 0), (0, 3), (4, 64), (30, 30)])


def brute_local(distances: np.ndarray, selector: LocalTopK, see: np.ndarray, sinks: int, recents: int) -> list[int]:
    """Kept columns of one row, ascending."""
    columns = np.flatnonzero(see)
    forced = np.isin(np.arange(len(see)), [*columns[:sinks], *columns[max(0, len(columns) - recents) :]])
    kept = []
    for chunk in range(selector.k // selector.per_chunk):
        mine = see & (np.arange(len(see)) // 8 % (selector.k // selector.per_chunk) == chunk)
        kept += brute_nearest(distances, max(selector.per_chunk, (forced & mine).sum()), mine, forced)
    return sorted(kept)


def filled(ids: torch.Tensor) -> list[int]:
    return [c for c in ids.tolist() if c >= 0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32], ids=str)
@settings(deadline=None, max_examples=60)
@given(seed=seeds, local=locals_, shape=heads, keys=odd_lengths, forced=forced_numbers, data=st.data())
def test_each_chunk_keeps_its_nearest_forced_first_ties_to_the_most_recent(
    dtype, seed, local, shape, keys, forced, data
):
    tokens = data.draw(st.integers(1, min(3, keys)))
    start = [0, data.draw(st.integers(0, keys))]
    distances = tied_distances(seed, 2, shape[0] * shape[1], tokens, keys)
    if dtype == torch.float32:  # whose ties are in no promised order
        distances = distances + torch.rand(distances.shape, generator=torch.Generator().manual_seed(seed))
    view = make_view(distances, shape[0], start, sinks=forced[0], recents=forced[1])
    selection = local.select(view, Step())
    assert selection.ids.dtype == torch.int32
    seen = visible_mask(tokens, keys, start)
    for b, h, t in np.ndindex(distances.shape[:3]):
        expected = brute_local(distances[b, h, t].numpy(), local, seen[b, 0, t].numpy(), *forced)
        assert filled(selection.ids[b, h, t]) == expected


@pytest.mark.parametrize("combine", ["sum", "union", "vote"])
@settings(deadline=None, max_examples=30)
@given(seed=seeds, local=locals_, group=st.sampled_from([1, 2, 3]), keys=odd_lengths, forced=forced_numbers)
def test_a_group_chooses_as_brute_force_does(combine, seed, local, group, keys, forced):
    distances = tied_distances(seed, 1, 2 * group, 1, keys)
    together = LocalTopK(local.k, local.per_chunk, per="kv_head", combine=combine)
    view = make_view(distances, 2, sinks=forced[0], recents=forced[1])
    ids, see = together.select(view, Step()).ids, np.ones(keys, bool)
    assert ids.shape[1] == 2
    for h in range(2):
        own = distances[0, h * group : (h + 1) * group, 0].numpy()
        choices = [brute_local(d, local, see, *forced) for d in own]
        votes = np.array([sum(c in choice for choice in choices) for c in range(keys)])
        expected = {
            "sum": lambda own=own: brute_local(own.sum(0), local, see, *forced),
            "union": lambda votes=votes: np.flatnonzero(votes).tolist(),
            "vote": lambda own=own, votes=votes: brute_local(own.sum(0) - 1000 * votes, local, see, *forced),
        }[combine]()
        assert sorted(filled(ids[0, h, 0])) == expected


@settings(deadline=None, max_examples=40)
@given(seeds, locals_, odd_lengths)
def test_chunks_are_balanced(seed, local, keys):
    ids = local.select(make_view(tied_distances(seed, 1, 1, 1, keys), 1), Step()).ids[0, 0, 0]
    chunks = local.k // local.per_chunk
    size = np.bincount(np.arange(keys) // 8 % chunks, minlength=chunks)
    held = np.bincount(np.array(filled(ids)) // 8 % chunks, minlength=chunks)
    assert np.array_equal(held, np.minimum(size, local.per_chunk))
    assert len(filled(ids)) <= local.budget(keys)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@settings(deadline=None, max_examples=15)
@given(seed=seeds, bits=odd_bits, shape=heads, keys=odd_lengths, planes=st.sampled_from([1, 4]), cut=st.integers(0, 99))
def test_a_call_keeps_the_nearest_codes_however_the_keys_came(engine, seed, bits, shape, keys, planes, cut):
    q, k, v = qkv(seed, 2, *shape, keys=keys)
    local = LocalTopK(24, 8)
    attn = HashAttention(
        SimHash(bits, planes, centring=None), FlatHamming(), Sink(1) | Recent(2) | local, engine=engine
    )
    cache, start, cut = attn.new_cache(2, shape[0], 16), torch.tensor([0, keys // 3]), min(cut, keys - 1)
    cache.append(k[:, :, : keys - cut], v[:, :, : keys - cut], start=start.clamp(max=keys - cut))
    if cut:
        cache.append(k[:, :, keys - cut :], v[:, :, keys - cut :])
    selection = attn.run(q, cache)[1]
    distances = hamming_numpy(attn.encoder.encode_query(q), cache.codes)
    seen = visible_mask(1, keys, start.clamp(max=keys - cut).tolist())
    for b, h in np.ndindex(distances.shape[:2]):
        expected = brute_local(distances[b, h, 0], local, seen[b, 0, 0].numpy(), 1, 2)
        assert filled(selection.ids[b, h, 0]) == expected


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@settings(deadline=None, max_examples=10)
@given(seed=seeds, shape=heads, keys=odd_lengths, per=st.sampled_from(["query_head", "kv_head"]))
def test_a_budget_of_everything_is_dense_attention(engine, seed, shape, keys, per):
    q, k, v = qkv(seed, 2, *shape, keys=keys)
    start = torch.tensor([0, keys // 3])
    attn = HashAttention(SimHash(64, centring=None), FlatHamming(), LocalTopK(160, 40, per=per), engine=engine)
    out = attn(q, poison(k, start), poison(v, start), start=start)
    keep = visible_mask(1, keys, start.tolist())
    assert (out.double() - attention64(q, k, v, keep)[0]).abs().max() <= tolerance(q, k, v, keep)


@settings(deadline=None, max_examples=10)
@given(seeds, st.permutations(range(3)))
def test_rows_do_not_mix(seed, order):
    q, k, v = qkv(seed, 3, keys=100, tokens=2)
    attn = HashAttention(SimHash(64, centring=None), FlatHamming(), LocalTopK(24, 8), engine="reference")
    start = torch.tensor([0, 50, 9])
    assert torch.equal(attn(q[order], k[order], v[order], start=start[order]), attn(q, k, v, start=start)[order])


def test_exact_scores_and_calibrations_are_served():
    data = cones(3, tokens=1)
    oracle = HashAttention(Identity(), FlatDot(), LocalTopK(128, 32), engine="reference")
    cache = oracle.new_cache(1, 2, 32)
    cache.append(data.k, data.v)
    ids = oracle.run(data.q, cache)[1].ids
    assert selected(ids, 640, 4).gather(-1, data.truth).float().mean() == 1.0  # 8 best, 32 from each chunk
    view = make_view(tied_distances(0, 1, 4, 1, 100), 2)
    agreed = Consensus(LocalTopK(24, 8), discount=2.0)
    with torch.no_grad():
        assert agreed.select(view, Step()).ids.shape == (1, 4, 1, 24)


@pytest.mark.parametrize(
    ("selector", "floor"),
    [
        (TopK(k=64), 0.55),  # 0.577
        (LocalTopK(64, 32), 0.54),  # 0.572
        (LocalTopK(64, 16), 0.54),  # 0.569
        (LocalTopK(64, 4), 0.53),  # 0.557
    ],
)
def test_recall_is_nearly_that_of_topk(selector, floor):
    data = cones(1)
    attn = HashAttention(SimHash(64, centring=Centring(1.0)), FlatHamming(), selector, engine="cpu")
    cache = attn.new_cache(1, 2, 32)
    cache.append(data.k, data.v)
    ids = attn.run(data.q, cache, causal=False)[1].ids
    assert selected(ids, 640, 4).gather(-1, data.truth).float().mean() >= floor


def test_a_plan_names_it():
    attn = HashAttention(SimHash(64), FlatHamming(), LocalTopK(1024, 32), engine="cpu")
    plan = attn.explain(q_heads=32, kv_heads=8, head_dim=128, keys=65536)
    assert "LocalTopK: numpy or PyTorch" in str(plan)
    assert plan.attend_bytes == 2 * 32 * 1024 * 128 * 2


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (TypeError, {"k": 0.05}, ["k", "0.05"]),
        (ValueError, {"k": 0}, ["k", "0"]),
        (ValueError, {"k": 100}, ["k", "per_chunk=16", "100", "96 or 112"]),
        (ValueError, {"k": 9}, ["k", "9", "take 16"]),
        (ValueError, {"k": 16, "per_chunk": 0}, ["per_chunk", "0"]),
        (ValueError, {"k": 16, "per_chunk": 2.0}, ["per_chunk", "2.0"]),
        (ValueError, {"k": 16, "per": "head"}, ["per", "head", "kv_head"]),
        (ValueError, {"k": 16, "combine": "max"}, ["combine", "max", "union"]),
    ],
)
def test_bad_budgets_are_refused_by_name(error, options, words):
    raises_naming(error, *words)(lambda: LocalTopK(**options))
