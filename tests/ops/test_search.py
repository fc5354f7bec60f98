"""The search of the CPU against its specification."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn.ops import hamming
from hashattn.ops.hamming.cpu import merge_planes
from hashattn.ops.search import Ranking, reference, scan, search
from tests.structured import generator, hamming_numpy, heads, odd_lengths, seeds


def words(g, *shape):
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=g)


def pad(ids, slots):
    return torch.nn.functional.pad(ids, (0, slots - ids.shape[-1]), value=-1)


def check(query, codes, counts, visible, **options):
    """Both find the same keys in each part of the slots."""
    slots = max(c[-1] for row in counts for c in row)
    tensors = [torch.tensor([[c[i] for c in row] for row in counts]) for i in range(len(counts[0][0]))]
    expected = reference(query, codes, tensors, slots, visible, Ranking(**options))
    found = pad(search(query, codes, counts, visible.tolist(), Ranking(**options)), slots)
    assert found.dtype == torch.int32
    assert torch.equal(found.sort().values, expected.sort().values)
    if len(tensors) > 1:  # what the first count takes comes first
        slot = torch.arange(slots)
        first = slot < tensors[0][:, None, :, None]
        assert torch.equal(found.masked_fill(~first, -1).sort().values, expected.masked_fill(~first, -1).sort().values)


@pytest.mark.parametrize("planes", [None, 1, 4, 8])
@settings(deadline=None, max_examples=25)
@given(
    seed=seeds, shape=heads, tokens=st.sampled_from([1, 3]), keys=odd_lengths, n_words=st.sampled_from([1, 2, 16]),
    shared=st.booleans(), forced=st.sampled_from([(0, 0), (1, 0), (0, 3), (4, 64)]),
    radius=st.sampled_from([None, 0, 0.45, 1]), similar=st.booleans(), biased=st.booleans(), data=st.data(),
)  # fmt: skip
def test_the_search_finds_what_its_specification_finds(
    planes, seed, shape, tokens, keys, n_words, shared, forced, radius, similar, biased, data
):
    kv_heads, group = shape
    tokens = min(tokens, keys)
    g = generator(seed)
    lead = (2, kv_heads * group, tokens)
    query = words(g, *lead, n_words) if planes is None else words(g, *lead, planes, n_words)
    codes = words(g, 2, kv_heads, keys, n_words)
    if similar:  # most distances tie
        codes &= 7
    if biased := biased and (planes or 1) == 1:
        query[..., -1] &= (1 << 56) - 1
    start = torch.tensor([0, data.draw(st.integers(0, keys))])
    end = torch.arange(keys - tokens + 1, keys + 1)
    visible = torch.stack(torch.broadcast_tensors(start[:, None], end), -1)
    k = data.draw(st.sampled_from([1, 7, 64, 200]))
    more = data.draw(st.sampled_from([0, 5]))
    counts = [
        [[max(n, min(sum(forced), max(0, e - f))) for n in ([k] if more == 0 else [k, k + more])] for f, e in row]
        for row in visible.tolist()
    ]
    largest = 64 * n_words * (group if shared else 1) * ((1 << (planes or 1)) - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "AT_ONCE", data.draw(st.sampled_from([1, 1 << 17])))
        check(
            query, codes, counts, visible, shared=shared, sinks=forced[0], recents=forced[1],
            radius=None if radius is None else int(radius * largest), biased=biased,
        )  # fmt: skip


@pytest.mark.parametrize("library", ["faiss", "numpy"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_search_is_exact_across_its_blocks(monkeypatch, library, shared):
    if library == "numpy":
        monkeypatch.setattr(hamming.cpu, "faiss", lambda: None)
    monkeypatch.setattr(hamming.cpu, "BLOCK", 9000)
    g = generator(0)
    query, codes = words(g, 1, 6, 1, 2), words(g, 1, 2, 33_000, 2)
    check(query, codes, [[[900, 1000]]], torch.tensor([[[5, 33_000]]]), shared=shared, sinks=4, recents=64)


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(1, 17), st.sampled_from([1, 4, 8]))
def test_merged_planes_keep_every_weighted_sum(seed, group, bits):
    g = np.random.default_rng(seed)
    planes = [(1 << j, int.from_bytes(g.bytes(16))) for j in range(bits) for _ in range(group)]
    merged = merge_planes(planes)
    keys = [int.from_bytes(g.bytes(16)) for _ in range(50)]

    def total(pairs):
        return [sum(w * (plane ^ key).bit_count() for w, plane in pairs) for key in keys]

    assert total(merged) == total(planes)
    weights = [w for w, _ in merged]
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] == 1
    assert sum(weights) == group * (2**bits - 1)
    assert all(weights.count(w) <= 2 for w in weights)


def test_strides_that_the_scan_cannot_take_are_copied():
    g = generator(1)
    query = words(g, 1, 2, 1, 4)[..., ::2]
    codes = words(g, 1, 2, 2, 300).transpose(2, 3)  # words of a key far apart
    assert not codes[0, 0].is_contiguous()
    check(query, codes, [[[9]]], torch.tensor([[[0, 300]]]))
    assert np.array_equal(hamming.distances(query, codes, host=True).numpy(), hamming_numpy(query, codes))
