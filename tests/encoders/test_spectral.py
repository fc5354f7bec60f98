import math

import pytest
import torch

from hashattn import SpectralHash
from hashattn.ops import hamming
from tests.structured import generator, qkv, raises_naming


def box(seed: int, *extent: float, keys: int = 4000):
    """Keys [1, 1, keys, len(extent)], uniform in a box."""
    return (torch.rand(1, 1, keys, len(extent), generator=generator(seed)) - 0.5) * torch.tensor(extent)


def test_the_smoothest_waves_of_all_axes_are_kept():
    """In a box of 8 by 3, j / extent is 1/8, 2/8, 1/3, 3/8, 4/8, 5/8, 2/3, 6/8 for the first eight waves."""
    encoder = SpectralHash(8).fit(None, box(0, 8, 3))
    waves = encoder.projection[0] / math.pi  # [2, 8]
    expected = torch.tensor([1 / 8, 2 / 8, 1 / 3, 3 / 8, 4 / 8, 5 / 8, 2 / 3, 6 / 8])
    assert torch.allclose(waves.norm(dim=0), expected, rtol=0.02)  # the range of 4000 draws is a little short
    assert (waves[0].abs() > 10 * waves[1].abs()).tolist() == [True, True, False, True, True, True, False, True]


def test_bits_are_the_signs_of_the_waves():
    k = box(1, 8)
    encoder = SpectralHash(8).fit(None, k)
    low, high = k.double().amin(), k.double().amax()
    share = (k.double() - low) / (high - low)
    wave = torch.cos(math.pi * torch.arange(1, 9) * share)  # [1, 1, N, 8]
    wave = wave if torch.sign(encoder.projection[0, 0, 0]) > 0 else wave * (-1.0) ** torch.arange(1, 9)  # axis reversed
    found = hamming.unpack_bits(encoder.encode_key(k), 8)
    assert ((found == (wave >= 0)) | (wave.abs() < 1e-3)).all()


def test_near_keys_have_near_codes():
    k = box(2, 8, 6, 4, keys=600)
    codes = SpectralHash(32).fit(None, k).encode_key(k)
    apart = torch.cdist(k, k)[0, 0]
    differing = hamming.differing(codes.unsqueeze(3), codes.unsqueeze(2))[0, 0].double()
    rings = [differing[(apart > r) & (apart <= r + 0.5)].mean().item() for r in (0.0, 0.5, 1.0, 1.5)]
    assert rings == sorted(rings)
    assert rings[0] < 7  # observed 5.6 of 32
    assert rings[-1] > 13  # observed 14.9


def test_queries_are_points_at_the_typical_distance_from_the_mean():
    q, k, _ = qkv(3, kv_heads=2, group=3, tokens=2, keys=90)
    encoder = SpectralHash(40).fit(None, k + 5)
    radius = (k - k.mean(2, keepdim=True)).square().sum(-1).mean(2).sqrt()[0]
    assert torch.allclose(encoder.radius, radius, rtol=1e-4)
    point = q / q.norm(dim=-1, keepdim=True) * radius.repeat_interleave(3)[None, :, None, None]
    as_keys = point.unflatten(1, (2, 3)).flatten(2, 3) + encoder.mean.unsqueeze(1)
    a = hamming.unpack_bits(encoder.encode_query(q), 40).unflatten(1, (2, 3)).flatten(2, 3)
    assert (a == hamming.unpack_bits(encoder.encode_key(as_keys), 40)).double().mean() > 0.995  # but for rounding


def test_keys_without_extent_are_fitted_all_the_same():
    k = box(4, 3, 2, keys=50)
    flat = torch.cat((k, torch.zeros(1, 1, 50, 1)), -1)
    for keys in (flat, torch.ones(1, 1, 50, 3)):
        encoder = SpectralHash(16).fit(None, keys)
        assert all(x.isfinite().all() for x in encoder.buffers())
        assert encoder.encode_key(keys).shape == (1, 1, 50, 1)


@pytest.mark.parametrize("bits", [7, 1025])
def test_bad_lengths_are_refused(bits):
    raises_naming(ValueError, "bits", str(bits))(lambda: SpectralHash(bits))
