import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashattn import SimHash
from hashattn.encoders.base import key_bits, query_planes
from hashattn.ops import hamming
from tests.structured import generator, odd_bits, odd_dims, seeds


def levels_of(planes: torch.Tensor, bits: int) -> np.ndarray:
    """The integer level of each bit of a query: int64 [..., bits]."""
    return sum(hamming.unpack_bits(planes[..., j, :], bits).numpy().astype(int) << j for j in range(planes.shape[-2]))


@pytest.mark.parametrize("query_bits", [2, 4, 8])
@settings(deadline=None, max_examples=20)
@given(seed=seeds, bits=odd_bits)
def test_distance_is_an_affine_decreasing_function_of_the_quantised_inner_product(query_bits, seed, bits):
    g = generator(seed)
    planes = query_planes(torch.randn(1, 2, 3, bits, generator=g), query_bits)
    signs = torch.randn(1, 1, 9, bits, generator=g)
    distances = hamming.distances(planes, key_bits(signs)).numpy()
    # level u in 0 .. 2^b - 1 stands for 2u - (2^b - 1), symmetric about zero; keys for -1 and +1
    top = (1 << query_bits) - 1
    quantised = 2 * levels_of(planes, bits) - top
    inner = quantised @ np.where(signs[:, :1] >= 0, 1, -1).swapaxes(-1, -2)
    assert np.array_equal(4 * distances, 2 * (top * bits - inner))


@pytest.mark.parametrize("query_bits", [2, 4, 8])
@settings(deadline=None, max_examples=20)
@given(seed=seeds, bits=odd_bits)
def test_levels_round_the_projection_to_half_a_step_and_keep_every_sign(query_bits, seed, bits):
    projection = torch.randn(2, 2, 1, bits, generator=generator(seed))
    planes = query_planes(projection, query_bits)
    assert planes.shape == (2, 2, 1, query_bits, hamming.words(bits))
    half = 1 << (query_bits - 1)
    value = (levels_of(planes, bits) + 0.5 - half) / half * projection.abs().amax(-1, keepdim=True).numpy()
    step = projection.abs().amax(-1, keepdim=True).numpy() / half
    assert (np.abs(value - projection.numpy()) <= step * 0.5001).all()
    assert torch.equal(planes[..., -1, :], query_planes(projection, 1))  # the last plane is the one-plane code


@settings(deadline=None, max_examples=20)
@given(seeds, odd_bits, odd_dims)
def test_the_last_plane_of_an_encoded_query_is_its_one_bit_code(seed, bits, dim):
    q = torch.randn(1, 4, 3, dim, generator=generator(seed))
    one = SimHash(bits).encode_query(q)
    for query_bits in (2, 4, 8):
        assert torch.equal(SimHash(bits, query_bits).encode_query(q)[..., -1, :], one)


@pytest.mark.parametrize("query_bits", [1, 2, 4, 8])
def test_planes_of_a_query_do_not_depend_on_its_length(query_bits):
    q = torch.randn(1, 2, 5, 16, generator=generator(0))
    encoder = SimHash(64, query_bits)
    assert torch.equal(encoder.encode_query(q * 4), encoder.encode_query(q))


@pytest.mark.parametrize("query_bits", [1, 2, 4, 8])
@settings(deadline=None, max_examples=10)
@given(value=st.sampled_from([0.0, 1e-30, 1e30]))
def test_zero_and_extreme_projections_have_codes(query_bits, value):
    projection = torch.tensor([value, -value, 0.0, value] * 2).view(1, 1, 1, 8)
    planes = query_planes(projection, query_bits)
    last = planes if query_bits == 1 else planes[..., -1, :]
    assert torch.equal(hamming.unpack_bits(last, 8), projection >= 0)


@pytest.mark.parametrize("query_bits", [1, 2, 4, 8])
@settings(deadline=None, max_examples=20)
@given(seeds, odd_bits)
def test_planes_of_the_cpu_are_those_of_the_specification(query_bits, seed, bits):
    projection = torch.randn(2, 3, 2, bits, generator=generator(seed))
    expected = hamming.reference.query_planes(projection, query_bits)
    assert torch.equal(hamming.cpu.query_planes(projection, query_bits), expected)
