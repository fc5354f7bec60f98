import functools
import operator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import Consensus, FlatHamming, HashAttention, Recent, SimHash, Sink, Step, TopK
from tests.structured import make_view, odd_lengths, qkv, raises_naming, seeds, tied_distances, visible_mask


@settings(deadline=None, max_examples=40)
@given(seeds, odd_lengths, st.sampled_from([(0, 1), (0, 70), (1, 0), (5, 0), (1, 1), (4, 3), (4, 70)]), st.data())
def test_sinks_and_recents_are_the_first_and_last_visible_keys(seed, keys, sizes, data):
    sinks, recents = sizes
    tokens = data.draw(st.integers(1, min(3, keys)))
    start = [0, data.draw(st.integers(0, keys))]
    parts = [kind(size) for kind, size in ((Sink, sinks), (Recent, recents)) if size]
    selector = functools.reduce(operator.or_, parts)
    selection = selector.select(make_view(tied_distances(seed, 2, 4, tokens, keys), 2, start), Step())
    assert selection.ids.shape[1] == 2
    seen = visible_mask(tokens, keys, start)
    for b, h, t in np.ndindex(2, 2, tokens):
        columns = np.flatnonzero(seen[b, 0, t])
        found = [c for c in selection.ids[b, h, t].tolist() if c >= 0]
        assert len(found) == len({*found})
        assert {*found} == {*columns[:sinks], *columns[max(0, len(columns) - recents) :]}


def test_forced_keys_count_in_the_budget_and_come_first():
    view = make_view(tied_distances(0, 1, 1, 1, 65), 1)
    ids = (Sink(2) | Recent(3) | TopK(k=8)).select(view, Step()).ids
    assert ids.shape[-1] == 8
    assert {*ids[0, 0, 0, :5].tolist()} == {0, 1, 62, 63, 64}


def test_where_the_budget_is_smaller_only_forced_keys_are_kept():
    view = make_view(tied_distances(0, 1, 1, 1, 65), 1)
    selector = Sink(2) | Recent(3) | TopK(k=1)
    assert {*selector.select(view, Step()).ids[0, 0, 0].tolist()} == {0, 1, 62, 63, 64}
    assert selector.budget(65) == 5


def test_budgets_of_joined_parts():
    assert (Sink(4) | Recent(64)).budget(1000) == 68
    assert (Sink(4) | Recent(64)).budget(10) == 10
    assert (Sink(4) | Recent(64) | TopK(share=0.5)).budget(1000) == 500


def test_joining_is_associative_and_keeps_the_larger_of_two_sinks():
    assert (Sink(1) | Recent(2)) | TopK(k=3) == Sink(1) | (Recent(2) | TopK(k=3))
    assert (Sink(1) | Sink(4)).sinks == 4


def test_two_ranked_selectors_cannot_be_joined():
    raises_naming(ValueError, "TopK(k=3", "TopK(k=4")(lambda: TopK(k=3) | Sink(1) | TopK(k=4))
    raises_naming(ValueError, "Consensus")(lambda: TopK(k=3) | Consensus(TopK(k=4)))
    raises_naming(TypeError, "|")(lambda: Sink(1) | 3)


@pytest.mark.parametrize("part", [Sink, Recent])
@pytest.mark.parametrize("keys", [0, -1, 1.5, True, "4"])
def test_bad_numbers_of_forced_keys_are_refused_by_name(part, keys):
    raises_naming(ValueError, part.__name__, repr(keys))(lambda: part(keys))


def test_forced_keys_of_an_outer_join_stay_forced():
    q, k, v = qkv(0, keys=65)
    attn = HashAttention(
        SimHash(64, centring=None), FlatHamming(), Sink(8) | Consensus(Sink(2) | TopK(k=3)), engine="reference"
    )
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    _, selection = attn.run(q, cache)
    assert (selection.ids.sort().values == torch.arange(8)).all()


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_a_row_that_is_all_padding_gives_zeros(engine):
    q, k, v = qkv(0, keys=12)
    attn = HashAttention(SimHash(64, centring=None), FlatHamming(), TopK(k=3), engine=engine)
    assert (attn(q, k, v, start=torch.tensor([12])) == 0).all()
