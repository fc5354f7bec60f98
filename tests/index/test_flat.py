import pytest
import torch
from hypothesis import given, settings

from hashattn import FlatDot, FlatHamming
from tests.structured import generator, hamming_numpy, heads, odd_lengths, qkv, seeds


def stored(index, codes, capacity=None):
    store = index.new_store(capacity)
    for part in codes.split(7, 2):
        store.add(part)
    return store


@pytest.mark.parametrize("host", [False, True])
@settings(deadline=None, max_examples=10)
@given(seed=seeds, shape=heads, keys=odd_lengths)
def test_flat_hamming_scans_what_was_added(host, seed, shape, keys):
    g = generator(seed)
    codes = torch.randint(-(2**63), 2**63 - 1, (2, shape[0], keys, 2), generator=g)
    query = torch.randint(-(2**63), 2**63 - 1, (2, shape[0] * shape[1], 1, 4, 2), generator=g)
    for capacity in (None, keys):
        store = stored(FlatHamming(), codes, capacity)
        found = FlatHamming().distances(store, query, host=host)
        assert (found.numpy() == hamming_numpy(query, codes)).all()


@settings(deadline=None, max_examples=10)
@given(seed=seeds, shape=heads, keys=odd_lengths)
def test_flat_dot_is_the_negated_inner_product_of_each_heads_keys(seed, shape, keys):
    q, k, _ = qkv(seed, 2, *shape, tokens=3, keys=keys)
    found = FlatDot().distances(stored(FlatDot(), k), q)
    exact = -(q.double() @ k.double().repeat_interleave(shape[1], 1).transpose(-1, -2))
    # a float32 sum of D = 16 products errs by at most D eps |q| |k|
    bound = 16 * torch.finfo(torch.float32).eps * q.norm(dim=-1).max() * k.norm(dim=-1).max()
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= bound


def test_a_store_crops_and_reorders_its_rows():
    codes = torch.arange(2 * 3 * 5).view(2, 3, 5, 1)
    store = stored(FlatHamming(), codes)
    store.truncate(4)
    store.truncate(9)  # nothing to forget
    store.select_rows(torch.tensor([1, 1, 0]))
    assert len(store) == 4
    assert torch.equal(store.codes, codes[[1, 1, 0], :, :4])
    store.add(codes[[0, 0, 0], :, :2])
    assert torch.equal(store.codes[:, :, 4:], codes[[0, 0, 0], :, :2])


def test_a_store_of_fixed_capacity_is_allocated_once():
    store = FlatHamming().new_store(100)
    store.add(torch.zeros(1, 1, 1, 2, dtype=torch.int64))
    assert store.nbytes == 100 * 2 * 8
    store.add(torch.zeros(1, 1, 99, 2, dtype=torch.int64))
    assert store.nbytes == 100 * 2 * 8


def test_growing_copies_each_row_a_bounded_number_of_times():
    store, sizes = FlatHamming().new_store(), set()
    for _ in range(2000):
        store.add(torch.zeros(1, 1, 1, 1, dtype=torch.int64))
        sizes.add(store.nbytes)
    assert len(sizes) <= 20  # by a quarter each time: about 64 * 1.25^n
    assert store.nbytes <= 8 * (2000 * 5 // 4 + 64)


def test_indexes_say_what_they_accept():
    assert FlatHamming().accepts("binary")
    assert not FlatHamming().accepts("vector")
    assert FlatDot().accepts("vector")
    assert not FlatDot().accepts("binary")
