import numpy as np
import pytest
import torch
from hypothesis import given, settings

from hashattn import SimHash
from hashattn.encoders.simhash import orthogonal_planes
from hashattn.ops import hamming
from tests.structured import generator, odd_bits, odd_dims, odd_lengths, raises_naming, seeds


@settings(deadline=None, max_examples=25)
@given(seeds, odd_bits, odd_dims, odd_lengths)
def test_codes_are_the_signs_of_centred_projections_up_to_rounding(seed, bits, dim, keys):
    g = generator(seed)
    k, centre = torch.randn(2, 3, keys, dim, generator=g), torch.randn(2, 3, dim, generator=g)
    codes = SimHash(bits).encode_key(k, centre)
    assert codes.shape == (2, 3, keys, hamming.words(bits))
    centred = k.double() - centre.double().unsqueeze(2)
    projection = centred @ orthogonal_planes(dim, bits, 0, torch.device("cpu")).double()
    clear = projection.abs() > 1e-5 * centred.norm(dim=-1, keepdim=True)
    assert ((hamming.unpack_bits(codes, bits) == (projection >= 0)) | ~clear).all()
    assert clear.float().mean() > 0.99


@settings(deadline=None, max_examples=15)
@given(seeds, odd_bits, odd_dims)
def test_planes_are_blocks_of_orthonormal_directions(seed, bits, dim):
    planes = orthogonal_planes(dim, bits, seed, torch.device("cpu")).double().numpy()
    assert planes.shape == (dim, bits)
    for first in range(0, bits, dim):
        block = planes[:, first : first + dim]
        assert np.abs(block.T @ block - np.eye(block.shape[1])).max() < 1e-6


def test_bits_differ_with_probability_angle_over_pi():
    g = generator(0)
    a, b = torch.randn(2, 1, 1, 200, 32, generator=g)
    b = a + 0.7 * b
    encoder = SimHash(1024, centring=None)
    distance = hamming.popcount(encoder.encode_key(a) ^ encoder.encode_key(b)).sum(-1) / 1024
    angle = torch.acos(torch.cosine_similarity(a, b, dim=-1)) / torch.pi
    # a Bernoulli mean of 1024 draws has a deviation below 0.5 / 32; orthogonal planes only lower it
    assert (distance - angle).abs().max() < 5 * 0.5 / 32
    assert (distance - angle).mean().abs() < 0.005


def test_independent_planes_agree_independently():
    g = generator(1)
    a, b = torch.randn(2, 1, 1, 200, 16, generator=g)
    b = a + 0.7 * b
    encoder = SimHash(4096, centring=None, orthogonal=False)
    assert torch.equal(encoder.encode_query(a), encoder.encode_key(a))
    differ = hamming.unpack_bits(encoder.encode_key(a) ^ encoder.encode_key(b), 4096).float()
    p = torch.acos(torch.cosine_similarity(a, b, dim=-1)) / torch.pi
    # a Bernoulli mean of 4096 draws, and one of 2048 pairs, whose chance is p^2 exactly
    assert ((differ.mean(-1) - p).abs() < 5 * (p * (1 - p) / 4096).sqrt()).all()
    both = (differ[..., 0::2] * differ[..., 1::2]).mean(-1)
    assert ((both - p**2).abs() < 5 * (p**2 * (1 - p**2) / 2048).sqrt()).all()
    assert (both - p**2).mean().abs() < 0.001  # .0001 observed; in orthogonal blocks .0023 too few


def test_another_seed_draws_other_planes():
    k = torch.randn(1, 1, 5, 16, generator=generator(0))
    assert not torch.equal(SimHash(64).encode_key(k), SimHash(64, seed=1).encode_key(k))


def test_without_centring_no_row_is_too_short():
    assert SimHash(centring=None) != SimHash()


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (ValueError, {"bits": 7}, ["bits", "7"]),
        (ValueError, {"bits": 4097}, ["bits", "4097"]),
        (TypeError, {"bits": 64.0}, ["bits", "64.0"]),
        (TypeError, {"bits": True}, ["bits", "True"]),
        (ValueError, {"query_bits": 3}, ["query_bits", "2"]),
    ],
)
def test_bad_hyperparameters_are_refused_by_name(error, options, words):
    raises_naming(error, *words)(lambda: SimHash(**options))
