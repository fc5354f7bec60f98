import pytest
import torch

from hashattn import L2ALSH, MixedPrecision, SimpleLSH
from hashattn.ops import hamming
from tests.structured import cones, qkv, raises_naming, recall


@pytest.mark.parametrize("make", [SimpleLSH, L2ALSH])
def test_the_limit_is_the_longest_key_of_each_head_and_longer_ones_count_as_that_long(make):
    _, k, _ = qkv(0, 2, keys=50)
    encoder = make(64).fit(None, k)
    assert torch.allclose(encoder.limit, k.norm(dim=-1).amax(2).amax(0))
    longest = k * (encoder.limit[:, None] / k.norm(dim=-1)).unsqueeze(-1)
    codes = [hamming.unpack_bits(encoder.encode_key(x), 64) for x in (longest, 1.5 * longest, 4 * longest)]
    for other in codes[1:]:
        assert (codes[0] != other).float().mean() < 0.01  # sqrt(1 - 1) is within rounding of zero


def test_queries_may_have_any_size():
    q, k, _ = qkv(1)
    for encoder in (SimpleLSH(64).fit(None, k), L2ALSH(64).fit(None, k)):
        a, b = (hamming.unpack_bits(encoder.encode_query(x), 64) for x in (q, 1000 * q))
        assert (a != b).float().mean() < 0.01
        assert encoder.encode_query(torch.zeros_like(q)).shape == (1, 4, 1, 1)


def test_keys_of_size_zero_can_be_fitted_to_and_encoded():
    for encoder in (SimpleLSH(64), L2ALSH(64)):
        assert encoder.fit(None, torch.zeros(1, 2, 5, 16)).encode_key(torch.zeros(1, 2, 5, 16)).shape == (1, 2, 5, 1)


def test_a_query_of_more_bit_planes_finds_more():
    data = cones(0)
    one, four = (recall(SimpleLSH(128, query_bits=b).fit(None, data.k), data) for b in (1, 4))
    assert one > 0.25  # observed .34; SimHash, centred: .49
    assert four > one + 0.03  # observed .44


def test_longer_codes_find_more():
    data = cones(0)
    for make, floors in ((SimpleLSH, (0.25, 0.7)), (L2ALSH, (0.1, 0.33))):
        found = [recall(make(bits).fit(None, data.k), data) for bits in (128, 1024)]
        assert found[0] > floors[0]  # observed .34 and .17
        assert found[1] > floors[1]  # observed .80 and .43


def test_their_codes_tell_no_angles_and_no_engine_multiplies_with_their_maps():
    for encoder in (SimpleLSH(), L2ALSH()):
        assert not encoder.angular
        assert encoder.widths() is None
        assert encoder.centring is None
        q, k, _ = qkv(2)
        raises_naming(ValueError, "angles", "SimHash")(
            lambda encoder=encoder, q=q, k=k: MixedPrecision().fit(q, k, encoder.fit(None, k))
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 7}, ["bits", "7"]),
        ({"powers": 0}, ["powers", "0"]),
        ({"norm": 1.0}, ["norm", "1.0"]),
        ({"width": 0}, ["width", "0"]),
    ],
)
def test_bad_hyperparameters_are_refused_by_name(options, words):
    raises_naming(ValueError, *words)(lambda: L2ALSH(**options))
