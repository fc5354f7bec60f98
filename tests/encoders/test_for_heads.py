"""A part of the KV heads of an encoder, as tensor parallelism deals them out: what the whole does for these heads."""

import pytest
import torch

from hashattn import ITQ, PCA, PQ, AsymmetricHash, HeavyChannels, Identity, PerLayer, SimHash, SimpleLSH, SpectralHash
from hashattn.encoders import SymmetricHash
from tests.structured import generator, raises_naming

KV, GROUP, DIM = 4, 2, 16
K = torch.randn(1, KV, 300, DIM, generator=generator(0)) + 1
Q = torch.randn(1, KV * GROUP, 300, DIM, generator=generator(1))
FITTED = {
    "ITQ": lambda: ITQ(32).fit(None, K),
    "PCA": lambda: PCA(4).fit(None, K),
    "SpectralHash": lambda: SpectralHash(32).fit(None, K),
    "SimpleLSH": lambda: SimpleLSH(32).fit(None, K),
    "PQ": lambda: PQ(4, sub_bits=4, iterations=2).fit(None, K),
    "PQ shared": lambda: PQ(4, sub_bits=4, iterations=2, shared=True).fit(None, K),
    "HeavyChannels": lambda: HeavyChannels(4).fit(Q, K),
    "AsymmetricHash shared": lambda: AsymmetricHash(32, query_hidden=(8,)).fit(Q, K, steps=2),
    "AsymmetricHash a KV head": lambda: AsymmetricHash(32, query_hidden=(8,), heads=KV).fit(Q, K, steps=2),
    "AsymmetricHash a query head": lambda: AsymmetricHash(32, query_hidden=(), heads=KV * GROUP).fit(Q, K, steps=2),
    "SymmetricHash with a bias": lambda: SymmetricHash(64, bias_bits=8).fit(Q, K, steps=2),
    "SimHash": lambda: SimHash(32),
    "Identity": lambda: Identity(),
}


@pytest.mark.parametrize("make", FITTED.values(), ids=FITTED)
def test_a_part_encodes_its_heads_as_the_whole_does(make):
    whole = make()
    codes, queries = whole.encode_key(K), whole.encode_query(Q)
    each = codes.shape[1] // KV
    for first, count in ((0, 2), (1, 3), (3, 1), (0, 4)):
        part = whole.for_heads(first, count)
        own = slice(first, first + count)
        part.check_model(count * GROUP, count, DIM)
        assert torch.equal(part.encode_key(K[:, own]), codes[:, first * each : (first + count) * each])
        assert torch.equal(
            part.encode_query(Q[:, first * GROUP : (first + count) * GROUP]),
            queries[:, first * GROUP : (first + count) * GROUP],
        )
    assert torch.equal(whole.encode_key(K), codes)


def test_a_part_shares_memory_with_the_whole():
    whole = ITQ(32).fit(None, K)
    assert whole.for_heads(2, 2).projection.data_ptr() == whole.projection[2:].data_ptr()


def test_a_part_of_a_model_is_a_part_of_every_layer():
    whole = PerLayer({0: ITQ(32).fit(None, K), 3: ITQ(32, seed=1).fit(None, K)})
    part = whole.for_heads(1, 2)
    assert part.layers == (0, 3)
    for i in part.layers:
        assert torch.equal(part.layer(i).encode_key(K[:, 1:3]), whole.layer(i).encode_key(K)[:, 1:3])


def test_heads_that_are_not_there_are_refused():
    whole = ITQ(32).fit(None, K)
    for first, count, words in (
        (4, 1, ("first", "4")),
        (-1, 1, ("first", "-1")),
        (0, 0, ("count", "0")),
        (3, 2, ("heads 3 to 4",)),
        (0, 5, ("heads 0 to 4", "fitted to 4")),
    ):
        raises_naming(ValueError, *words)(lambda f=first, c=count: whole.for_heads(f, c))
    with pytest.raises(RuntimeError, match="not fitted"):
        ITQ(32).for_heads(0, 1)
    with pytest.raises(RuntimeError, match="not fitted"):
        AsymmetricHash(32, heads=KV).for_heads(0, 1)
