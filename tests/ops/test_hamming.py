import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn.ops import hamming
from tests.structured import generator, hamming_numpy, heads, odd_bits, odd_lengths, seeds


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(1, 200), st.sampled_from([(1,), (3,), (2, 5)]))
def test_packing_and_unpacking_is_a_round_trip_at_any_length(seed, length, shape):
    bits = torch.rand(*shape, length, generator=generator(seed)) < 0.5
    codes = hamming.pack_bits(bits)
    assert codes.dtype == torch.int64
    assert codes.shape == (*shape, hamming.words(length))
    assert torch.equal(hamming.unpack_bits(codes, length), bits)


@settings(deadline=None, max_examples=40)
@given(seeds, odd_bits)
def test_bytes_of_a_code_are_numpys_little_endian_packbits(seed, length):
    bits = torch.rand(3, length, generator=generator(seed)) < 0.5
    octets = hamming.pack_bits(bits).numpy().view(np.uint8)
    packed = np.packbits(bits.numpy(), axis=-1, bitorder="little")
    assert np.array_equal(octets[:, : packed.shape[1]], packed)
    assert not octets[:, packed.shape[1] :].any()  # bits beyond the code are zero


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_popcount_counts_the_bits_of_negative_words_too(words):
    expected = [(w & (2**64 - 1)).bit_count() for w in words]
    assert hamming.popcount(torch.tensor(words)).tolist() == expected


@pytest.mark.parametrize(("word", "count"), [(0, 0), (-1, 64), (-(2**63), 1), (2**63 - 1, 63)])
def test_popcount_at_the_ends_of_int64(word, count):
    assert hamming.popcount(torch.tensor([word])).item() == count


@pytest.mark.parametrize("engine", ["reference", "cpu", "cpu without faiss"])
@pytest.mark.parametrize("planes", [None, 1, 4, 8])
@settings(deadline=None, max_examples=12)
@given(seed=seeds, shape=heads, tokens=st.sampled_from([1, 3]), keys=odd_lengths, words=st.sampled_from([1, 2, 16]))
def test_distances_are_the_plane_weighted_hamming_distances_of_the_bits(
    engine, planes, seed, shape, tokens, keys, words
):
    kv_heads, group = shape
    g = generator(seed)
    ends = (-(2**63), 2**63 - 1)
    lead = (2, kv_heads * group, tokens)
    query = torch.randint(*ends, (*lead, words) if planes is None else (*lead, planes, words), generator=g)
    codes = torch.randint(*ends, (2, kv_heads, keys, words), generator=g)
    with pytest.MonkeyPatch.context() as patch:
        if engine == "cpu without faiss":
            patch.setattr(hamming.cpu, "faiss", lambda: None)
        found = hamming.distances(query, codes, host=engine != "reference")
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), hamming_numpy(query, codes))


@pytest.mark.parametrize("host", [False, True])
@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_distances_of_views_are_those_of_their_copies(host, seed):
    g = generator(seed)
    room = torch.randint(-(2**63), 2**63 - 1, (2, 3, 130, 2), generator=g)
    codes = room[:, :, 1:66]  # what a cache hands out: a part of a longer buffer
    query = torch.randint(-(2**63), 2**63 - 1, (2, 4, 6, 2), generator=g).transpose(1, 2)  # 6 heads, 4 tokens
    expected = hamming.distances(query.contiguous(), codes.contiguous(), host=host)
    assert torch.equal(hamming.distances(query, codes, host=host), expected)
    assert np.array_equal(expected.numpy(), hamming_numpy(query, codes))


def test_the_numpy_scan_is_exact_across_its_blocks(monkeypatch):
    monkeypatch.setattr(hamming.cpu, "faiss", lambda: None)
    g = generator(0)
    query = torch.randint(-(2**63), 2**63 - 1, (1, 8, 8, 2), generator=g)
    codes = torch.randint(-(2**63), 2**63 - 1, (1, 1, 5000, 2), generator=g)  # blocks are 2**18 / (64 * 2) = 2048 keys
    assert torch.equal(hamming.distances(query, codes, host=True), hamming.distances(query, codes))


@pytest.mark.parametrize("host", [False, True])
def test_the_largest_distance_fits(host):
    query = torch.full((1, 1, 1, 8, 16), -1)
    codes = torch.zeros(1, 1, 1, 16, dtype=torch.int64)
    assert hamming.distances(query, codes, host=host).item() == 1024 * 255


@pytest.mark.parametrize("host", [False, True])
@settings(deadline=None, max_examples=15)
@given(seed=seeds, shape=heads, tokens=st.sampled_from([1, 3]), keys=odd_lengths, words=st.sampled_from([1, 2]))
def test_a_bias_in_the_last_byte_is_added_to_the_distance_of_the_other_bits(host, seed, shape, tokens, keys, words):
    kv_heads, group = shape
    g = generator(seed)
    query = torch.randint(-(2**63), 2**63 - 1, (2, kv_heads * group, tokens, words), generator=g)
    query[..., -1] &= (1 << 56) - 1
    codes = torch.randint(-(2**63), 2**63 - 1, (2, kv_heads, keys, words), generator=g)
    octets = codes.numpy().view(np.uint8)
    bias = octets[..., -1].astype(int).repeat(group, axis=1)  # [B, Hq, N]
    signs = octets.copy()
    signs[..., -1] = 0
    expected = hamming_numpy(query, torch.from_numpy(signs.view(np.int64))) + bias[:, :, None]
    before = codes.clone()
    assert np.array_equal(hamming.distances(query, codes, biased=True, host=host).numpy(), expected)
    assert torch.equal(codes, before)
