import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import CrossPolytope, FlatBuckets
from hashattn.encoders.cross_polytope import rotations
from tests.structured import generator, heads, odd_lengths, qkv, raises_naming, seeds


@settings(deadline=None, max_examples=20)
@given(seeds, heads, odd_lengths, st.sampled_from([(1, 2), (5, 16), (8, 64), (17, 6)]), st.sampled_from([33, 64]))
def test_buckets_are_the_argmax_of_the_rotated_vector_and_its_negative(seed, shape, keys, case, dim):
    rounds, buckets = case
    _, k, _ = qkv(seed, 2, *shape, keys=keys, dim=dim)
    centre = torch.randn(2, shape[0], dim, generator=generator(seed))
    encoder = CrossPolytope(rounds, buckets, seed=seed)
    codes = encoder.encode_key(k, centre)
    assert codes.shape == (2, shape[0], keys, -(-rounds // 8))
    assert encoder.code_bytes(dim, 2) == 8 * codes.shape[-1]
    found = codes.view(torch.uint8)
    assert (found[..., rounds:] == 0).all()
    x = (k - centre.unsqueeze(2)).double()
    projection = (x @ rotations(dim, rounds, buckets // 2, seed, x.device).double()).unflatten(-1, (rounds, -1))
    both = torch.cat((projection, -projection), -1)
    best = both.topk(2).values
    clear = best[..., 0] - best[..., 1] > 1e-4
    assert ((found[..., :rounds] == both.argmax(-1)) | ~clear).all()
    assert clear.double().mean() > 0.99


@settings(deadline=None, max_examples=15)
@given(seeds, heads, odd_lengths, st.sampled_from([1, 8, 13]))
def test_distances_count_the_rounds_that_differ(seed, shape, keys, rounds):
    q, k, _ = qkv(seed, 2, *shape, tokens=3, keys=keys)
    encoder = CrossPolytope(rounds, 8)
    codes, query = encoder.encode_key(k), encoder.encode_query(q)
    store = FlatBuckets().new_store()
    for part in codes.split(7, 2):
        store.add(part)
    a = query.view(torch.uint8)[..., :rounds].unsqueeze(3)
    b = codes.view(torch.uint8)[..., :rounds].repeat_interleave(shape[1], 1).unsqueeze(2)
    found = FlatBuckets().distances(store, query)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), (a != b).sum(-1))


def test_rounds_draw_rotations_of_their_own():
    planes = rotations(16, 4, 8, 0, torch.device("cpu")).view(16, 4, 8)
    for i in range(4):
        assert (planes[:, i].T @ planes[:, i] - torch.eye(8)).abs().max() < 1e-6
    assert not torch.allclose(planes[:, 0], planes[:, 1])


def test_what_cannot_be_is_refused_by_name():
    raises_naming(ValueError, "rounds", "0")(lambda: CrossPolytope(0))
    raises_naming(ValueError, "buckets", "even", "7")(lambda: CrossPolytope(buckets=7))
    raises_naming(ValueError, "buckets", "256", "258")(lambda: CrossPolytope(buckets=258))
    wide = CrossPolytope(buckets=64)
    raises_naming(ValueError, "buckets", "2 * head_dim = 32", "64")(lambda: wide.encode_key(torch.zeros(1, 1, 1, 16)))
    store = FlatBuckets().new_store()
    store.add(wide.encode_key(torch.zeros(1, 1, 4, 32)))
    query = CrossPolytope(24, 64).encode_query(torch.zeros(1, 1, 1, 32))
    raises_naming(ValueError, "query", "2 words", "3 words")(lambda: FlatBuckets().distances(store, query))
    raises_naming(ValueError, "query", "float32")(lambda: FlatBuckets().distances(store, torch.zeros(1, 1, 1, 2)))


@pytest.mark.parametrize("code", ["binary", "vector", "rabitq"])
def test_the_index_takes_its_own_codes_alone(code):
    assert FlatBuckets().accepts("buckets")
    assert not FlatBuckets().accepts(code)
