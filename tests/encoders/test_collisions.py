"""Locality-sensitive hashes collide with the probabilities that their papers prove."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hashattn import L2ALSH, CrossPolytope, FlatBuckets, FlatHamming, SimHash, SimpleLSH
from tests.structured import generator, seeds

PAIRS, BITS = 40, 1024
# A share of 1024 independent draws deviates by at most .5 / 32; the largest of 40 of them by 5 times that once in
# 40,000 sets. Orthogonal planes only lower it.
BOUND = 5 * 0.5 / math.sqrt(BITS)


def pairs(seed: int, dim: int, spread: float = 0.7) -> tuple[Tensor, Tensor]:
    """Queries and keys [1, PAIRS, 1, D]: a pair a head, at many angles, keys of many norms."""
    g = generator(seed)
    q, noise = torch.randn(2, 1, PAIRS, 1, dim, generator=g)
    share = torch.linspace(-1, 1, PAIRS)[:, None, None]
    return q, (share * q + spread * noise) * torch.rand(PAIRS, 1, 1, generator=g).clamp(min=0.05)


def differing(index: FlatHamming | FlatBuckets, key: Tensor, query: Tensor) -> Tensor:
    """Distances of the pairs, float64 [PAIRS]."""
    store = index.new_store()
    store.add(key)
    return index.distances(store, query).double().flatten()


@settings(deadline=None, max_examples=20)
@given(seeds, seeds, st.sampled_from([8, 33, 64, 128]))
def test_simhash_bits_differ_with_probability_angle_over_pi(seed, planes, dim):
    q, k = pairs(seed, dim)
    encoder = SimHash(BITS, centring=None, seed=planes)
    share = differing(FlatHamming(), encoder.encode_key(k), encoder.encode_query(q)) / BITS
    expected = torch.acos(torch.cosine_similarity(q, k, dim=-1).double()).flatten() / math.pi
    assert (share - expected).abs().max() < BOUND


@settings(deadline=None, max_examples=20)
@given(seeds, seeds, st.sampled_from([8, 33, 64, 128]))
def test_simple_lsh_bits_differ_with_the_angle_of_the_lifted_vectors(seed, planes, dim):
    q, k = pairs(seed, dim)
    encoder = SimpleLSH(BITS, seed=planes).fit(None, k.expand(1, -1, 2, -1))
    encoder.limit.fill_(float(encoder.limit.max()))  # one norm for all heads: each holds one key
    share = differing(FlatHamming(), encoder.encode_key(k), encoder.encode_query(q)) / BITS
    inner = (q * k).sum(-1).double() / (q.norm(dim=-1) * encoder.limit[0])
    assert (share - torch.acos(inner).flatten() / math.pi).abs().max() < BOUND


@settings(deadline=None, max_examples=20)
@given(seeds, seeds, st.sampled_from([8, 33, 64, 128]), st.sampled_from([1.0, 2.5, 4.0]))
def test_l2_alsh_bits_differ_with_the_distance_of_the_lifted_vectors(seed, hashes, dim, width):
    q, k = pairs(seed, dim)
    encoder = L2ALSH(BITS, width=width, seed=hashes).fit(None, k)
    encoder.limit.fill_(float(encoder.limit.max()))
    share = differing(FlatHamming(), encoder.encode_key(k), encoder.encode_query(q)) / BITS
    q, x = q.double(), k.double() * 0.83 / encoder.limit[0].double()
    squared = 1 + 3 / 4 - 2 * (q * x).sum(-1) / q.norm(dim=-1) + x.square().sum(-1) ** 8
    n = torch.arange(1, 2001, 2).double()  # the rest of the series is below 1e-4
    waves = torch.exp(-((n * math.pi / width) ** 2) * squared.flatten()[:, None] / 2) / n**2
    assert (share - (0.5 - 4 / math.pi**2 * waves.sum(-1))).abs().max() < BOUND


def test_the_longest_key_in_the_direction_of_the_query_collides_most():
    """What sign codes of the keys alone cannot tell: keys of one direction and several norms."""
    direction = torch.randn(64, generator=generator(0))
    k = torch.linspace(0.1, 1, 10)[:, None] * direction
    for encoder in (SimpleLSH(BITS), L2ALSH(BITS)):
        encoder.fit(None, k[None, None])
        store = FlatHamming().new_store()
        store.add(encoder.encode_key(k[None, None]))
        distances = FlatHamming().distances(store, encoder.encode_query(direction[None, None, None]))[0, 0, 0]
        assert (distances.diff() < 0).all()


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from([(2, 1.0), (4, 2.0)]))
def test_in_the_plane_cross_polytopes_collide_linearly_in_the_angle(seed, case):
    buckets, per = case  # two half planes, or four quadrants
    angle = torch.linspace(0, math.pi, PAIRS, dtype=torch.float64)
    k = torch.stack((angle.cos(), angle.sin()), -1).float()[None, :, None]
    q = torch.tensor([1.0, 0.0]).expand_as(k)
    rounds = 128
    encoder = CrossPolytope(rounds, buckets, centring=None, seed=seed)
    share = 1 - differing(FlatBuckets(), encoder.encode_key(k), encoder.encode_query(q)) / rounds
    expected = (1 - per * angle / math.pi).clamp(min=0)
    assert (share - expected).abs().max() < 5 * 0.5 / math.sqrt(rounds)
    assert share[0] == 1


def test_cross_polytopes_collide_less_at_larger_angles():
    g, dim = generator(1), 64
    cosine = torch.linspace(1, -1, 9)[:, None, None]
    q = torch.randn(1, 9, 64, dim, generator=g)
    q = q / q.norm(dim=-1, keepdim=True)
    other = torch.randn(1, 9, 64, dim, generator=g)
    other = other - (other * q).sum(-1, keepdim=True) * q
    k = cosine * q + (1 - cosine**2).sqrt() * other / other.norm(dim=-1, keepdim=True)
    encoder = CrossPolytope(64, 16, centring=None)
    equal = encoder.encode_query(q).view(torch.uint8) == encoder.encode_key(k).view(torch.uint8)
    share = equal.double().mean((0, 2, 3))  # of 4096 rounds and pairs: deviations below .008
    assert share[0] == 1
    assert (share.diff()[:5] < -0.02).all()  # beyond a right angle both are near zero
    assert share[-1] == 0


def test_one_round_of_two_buckets_is_a_bit_of_simhash():
    q, k = pairs(2, 32)
    encoder = CrossPolytope(128, 2, centring=None)
    share = differing(FlatBuckets(), encoder.encode_key(k), encoder.encode_query(q)) / 128
    expected = torch.acos(torch.cosine_similarity(q, k, dim=-1).double()).flatten() / math.pi
    assert (share - expected).abs().max() < 5 * 0.5 / math.sqrt(128)
