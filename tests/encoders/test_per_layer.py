import pytest
import torch

from hashattn import AsymmetricHash, Centring, FlatHamming, HashAttention, PerLayer, SimHash, SymmetricHash, TopK
from tests.structured import qkv, raises_naming

pytestmark = pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")


def attention(layers: int = 3) -> HashAttention:
    encoders = [SymmetricHash(64, seed=i, centring=Centring(1.0, 8)) for i in range(layers)]
    return HashAttention(PerLayer(encoders), FlatHamming(), TopK(k=5), engine="reference")


def test_each_layer_has_its_own_encoder():
    q, k, v = qkv(0)
    attn = attention()
    for i in range(3):
        alone = attn.replace(encoder=SymmetricHash(64, seed=i, centring=Centring(1.0, 8)))
        assert torch.equal(attn.layer(i)(q, k, v), alone(q, k, v))
    assert attn.layer(1) == attn.layer(1)
    assert attn.layer(1) != attn.layer(2)


def test_parts_that_serve_every_layer_stay_the_same_object():
    attn = HashAttention(SimHash(), FlatHamming(), TopK(k=5))
    assert attn.layer(7) is attn


def test_encoding_without_a_layer_is_refused():
    q, k, v = qkv(1)
    raises_naming(TypeError, "layer(i)")(lambda: attention()(q, k, v))


def test_a_cache_of_one_layer_is_refused_in_another():
    q, k, v = qkv(2)
    attn = attention()
    cache = attn.layer(0).new_cache(1, 2, 16)
    cache.append(k, v)
    raises_naming(ValueError, "another composition", "encoder")(lambda: attn.layer(1)(q, cache))


def test_bad_lists_of_encoders_are_refused():
    raises_naming(ValueError, "at least one")(lambda: PerLayer([]))
    raises_naming(TypeError, "encoders[1]", "Linear")(lambda: PerLayer([SymmetricHash(), torch.nn.Linear(2, 2)]))
    raises_naming(ValueError, "[32, 64]")(lambda: PerLayer([SymmetricHash(32), SymmetricHash(64)]))
    raises_naming(ValueError, "layer 3", "3")(lambda: attention().layer(3))
    raises_naming(ValueError, "layer -1")(lambda: attention().layer(-1))


def test_a_state_dict_restores_every_layer():
    q, k, _ = qkv(3, tokens=4)
    layers = PerLayer([AsymmetricHash(64, query_hidden=(8,)).fit(q, k, steps=2, queries=2), AsymmetricHash(64)])
    twin = PerLayer([AsymmetricHash(64, query_hidden=(8,)), AsymmetricHash(64)])
    twin.load_state_dict(layers.state_dict())
    assert [layer.fitted for layer in twin.encoders.values()] == [True, False]
    assert torch.equal(twin.layer(0).encode_key(k), layers.layer(0).encode_key(k))
