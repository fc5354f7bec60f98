import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn.ops.nearest import nearest, nearest_visible
from hashattn.ops.nearest.cpu import nearest_columns, select
from tests.structured import brute_nearest, generator, make_view, odd_lengths, seeds


@settings(deadline=None, max_examples=60)
@given(seeds, odd_lengths, st.sampled_from([1, 2, 7, 64, 200]), st.sampled_from([1, 3, 50]), st.booleans())
def test_nearest_keeps_the_k_nearest_ties_to_the_most_recent(seed, keys, k, high, masks):
    g = generator(seed)
    distances = torch.randint(-high, high, (2, keys), generator=g, dtype=torch.int32)
    keep = torch.rand(2, keys, generator=g) < (0.6 if masks else 2)
    forced = torch.rand(2, keys, generator=g) < 0.1 if masks else None
    ids = nearest(distances, k, keep, forced)
    assert ids.dtype == torch.int32
    assert ids.shape == (2, min(k, keys))
    for row in range(2):
        brute = brute_nearest(
            distances[row].numpy(), k, keep[row].numpy(), None if forced is None else forced[row].numpy()
        )
        assert ids[row].tolist() == brute + [-1] * (ids.shape[1] - len(brute))


@settings(deadline=None, max_examples=30)
@given(seeds, odd_lengths, st.sampled_from([1, 7, 64]))
def test_permuting_the_keys_permutes_the_nearest_up_to_ties_at_the_cut(seed, keys, k):
    g = generator(seed)
    distances = torch.randint(0, 5, (keys,), generator=g)
    order = torch.randperm(keys, generator=g)
    keep = torch.ones(keys, dtype=torch.bool)
    ids, moved = nearest(distances, k, keep).long(), order[nearest(distances[order], k, keep).long()]
    assert torch.equal(distances[ids], distances[moved])
    cut = distances[ids].max()
    assert {*ids[distances[ids] < cut].tolist()} == {*moved[distances[moved] < cut].tolist()}


@settings(deadline=None, max_examples=30)
@given(seeds, odd_lengths)
def test_the_k_nearest_are_the_first_of_the_k_plus_one_nearest(seed, keys):
    distances = torch.randint(0, 5, (keys,), generator=generator(seed))
    keep = torch.ones(keys, dtype=torch.bool)
    everything = nearest(distances, keys, keep)
    for k in (1, 2, keys // 2 + 1):
        assert torch.equal(nearest(distances, k, keep), everything[:k])


@settings(deadline=None, max_examples=30)
@given(seeds, odd_lengths, st.sampled_from([1, 7, 200]))
def test_float_distances_rank_exactly_where_nothing_ties(seed, keys, k):
    g = generator(seed)
    distances = torch.randperm(keys, generator=g).float() - keys / 2
    keep, forced = torch.rand(keys, generator=g) < 0.7, torch.rand(keys, generator=g) < 0.1
    ids = nearest(distances.masked_fill(~keep, torch.nan), k, keep, forced)  # what may not be selected is not read
    brute = brute_nearest(distances.numpy(), k, keep.numpy(), forced.numpy())
    ahead = [c for c in brute if forced[c]]
    first = ids[: len(ahead)].tolist()
    assert len({*first}) == len(ahead)  # which of too many forced keys is not promised
    assert all(forced[c] and keep[c] for c in first)
    assert ids[len(ahead) :].tolist() == brute[len(ahead) :] + [-1] * (len(ids) - len(brute))


def test_nothing_may_be_kept():
    assert nearest(torch.tensor([3, 1]), 2, torch.tensor([False, False])).tolist() == [-1, -1]


def test_extreme_distances_keep_their_order():
    distances = torch.tensor([2**31 - 1, -(2**31), 0], dtype=torch.int32)
    assert nearest(distances, 3, torch.ones(3, dtype=torch.bool)).tolist() == [1, 2, 0]


@settings(deadline=None, max_examples=60)
@given(
    seeds, odd_lengths, st.sampled_from([1, 7, 64, 200]), st.sampled_from([1, 3, 2**30]),
    st.sampled_from([(0, 0), (1, 0), (0, 3), (4, 64)]), st.booleans(), st.booleans(), st.data(),
)  # fmt: skip
def test_the_cpu_finds_what_the_reference_finds(seed, keys, k, high, forced, masks, ordered, data):
    g = generator(seed)
    tokens = data.draw(st.integers(1, min(3, keys)))
    start = [0, data.draw(st.integers(0, keys))]
    distances = torch.randint(-high, high, (2, 3, tokens, keys), generator=g, dtype=torch.int32)
    kept = torch.rand(distances.shape, generator=g) < 0.5 if masks else None
    view = make_view(distances, 3, start, sinks=forced[0], recents=forced[1], kept=kept)
    keep = view.seen if kept is None else kept & view.seen
    if kept is not None and view.forced is not None:
        keep = keep | view.forced
    before = distances.clone()
    counts = [[[k] for _ in row] for row in view.spans]
    ids = nearest_visible(distances, counts, view.spans, sinks=forced[0], recents=forced[1], kept=kept, ordered=ordered)
    expected = nearest(distances, k, keep, view.forced)
    expected = torch.nn.functional.pad(expected, (0, k - expected.shape[-1]), value=-1)
    assert torch.equal(ids if ordered else ids.sort().values, expected if ordered else expected.sort().values)
    assert torch.equal(distances, before)
    if k <= view.longest:
        for host in (False, True):
            view = make_view(distances, 3, start, sinks=forced[0], recents=forced[1], kept=kept, host=host)
            assert torch.equal(view.search(k), expected)


@settings(deadline=None, max_examples=30)
@given(seeds, st.sampled_from([20_000, 40_001]), st.sampled_from([1, 2, 300, 2**20]), st.data())
def test_long_rows_which_are_sampled_first_are_exact(seed, keys, high, data):
    g = np.random.default_rng(seed)
    rows = g.integers(0, high, (2, keys), dtype=np.int32)
    near = g.integers(0, keys, 50)
    rows[0, near] = -high  # far below what the sample sees
    rows[1, :: keys // 4096] = 2 * high  # the sample sees the worst alone
    k = data.draw(st.sampled_from([1, 49, 1000, keys // 2, keys - 1, keys, keys + 1]))
    found = nearest_columns(rows, k)
    order = np.lexsort((-np.arange(keys), rows[0])), np.lexsort((-np.arange(keys), rows[1]))
    for row, best in zip(found, order, strict=True):
        assert np.array_equal(row, np.sort(best[:k]))


@settings(deadline=None, max_examples=30)
@given(seeds, odd_lengths, st.integers(0, 70), st.integers(0, 70))
def test_what_the_first_budget_takes_stands_before_the_rest(seed, keys, few, more):
    rows = np.random.default_rng(seed).integers(0, 5, (3, keys))
    found = select(rows, [few, few + more])
    assert found.shape == (3, min(few + more, keys))
    for row, first, both in zip(rows, found[:, :few], found, strict=True):
        best = np.lexsort((-np.arange(keys), row))
        assert {*first.tolist()} == {*best[:few].tolist()}
        assert {*both.tolist()} == {*best[: few + more].tolist()}
