"""What every encoder with a closed-form fit keeps to."""

import pytest
import torch

from hashattn import (
    ITQ,
    L2ALSH,
    PCA,
    FlatDot,
    FlatHamming,
    HashAttention,
    ModelFacts,
    PerLayer,
    SimpleLSH,
    SpectralHash,
    TopK,
    from_pretrained,
    save_pretrained,
    stored,
)
from tests.structured import qkv, raises_naming

MAKE = {
    "ITQ": lambda: ITQ(40, iterations=3),
    "L2ALSH": lambda: L2ALSH(40, powers=2, norm=0.7, width=2.0, seed=3),
    "PCA": lambda: PCA(5),
    "SimpleLSH": lambda: SimpleLSH(40, query_bits=4, seed=3),
    "SpectralHash": lambda: SpectralHash(40),
}
makes = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def composed(encoder):
    return HashAttention(
        encoder, FlatDot() if encoder.code == "vector" else FlatHamming(), TopK(k=5), engine="reference"
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@makes
@pytest.mark.parametrize("fitted", [True, False])
def test_a_state_dict_gives_a_fresh_instance_the_same_codes(make, fitted):
    q, k, _ = qkv(2, keys=60)
    encoder, twin = make(), make()
    if fitted:
        encoder.fit(None, k)
    before = twin.fits
    twin.load_state_dict(encoder.state_dict())
    assert twin.fits > before
    assert twin.fitted == fitted
    if fitted:
        assert same((twin.encode_key(k), twin.encode_query(q)), (encoder.encode_key(k), encoder.encode_query(q)))


@makes
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_loaded_encoder_encodes_exactly_as_the_saved_one(tmp_path, make, dtype):
    q, k, v = qkv(3, tokens=3, keys=70)
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    facts = ModelFacts("small", "llama", 2, (0, 1), 4, 2, 16, rope, 97)
    encoder = PerLayer([make().fit(None, keys) for keys in (k, 3 * k * k)], facts)
    if dtype == "float16":
        stored.round_weights(encoder)
    loaded = from_pretrained(save_pretrained(encoder, tmp_path / "new", dtype=dtype)).encoder
    assert loaded.code == encoder.code
    for i in range(2):
        assert repr(loaded.layer(i)) == repr(encoder.layer(i))
        assert stored.describe(loaded.layer(i)) == stored.describe(encoder.layer(i))
        assert torch.equal(composed(loaded).layer(i)(q, k, v), composed(encoder).layer(i)(q, k, v))
    assert not same([loaded.layer(0).encode_key(k)], [loaded.layer(1).encode_key(k)])


@makes
def test_rows_of_a_batch_are_pooled_and_heads_are_not(make):
    _, k, _ = qkv(4, batch=2, keys=40)
    pooled = k.transpose(0, 1).flatten(1, 2).unsqueeze(0)
    one = make().fit(None, k)
    assert same(make().fit(None, pooled).state_dict().values(), one.state_dict().values())
    swapped = make().fit(None, pooled.flip(1))
    assert all(torch.allclose(x.flip(0), y) for x, y in zip(swapped.buffers(), one.buffers(), strict=True)) or (
        isinstance(one, ITQ)  # the heads' random starts differ
    )


@makes
def test_query_heads_are_encoded_as_their_kv_head_is(make):
    q, k, _ = qkv(5, kv_heads=2, group=3, tokens=2, keys=60)
    encoder = make().fit(None, k)
    whole = encoder.encode_query(q)
    assert whole.shape[:3] == q.shape[:3]
    alone = torch.cat([encoder.encode_query(q[:, [h] * 6])[:, [h]] for h in range(6)], 1)
    of_first = torch.cat([encoder.encode_query(q.roll(-h, 1))[:, :1] for h in range(3)], 1)
    assert torch.allclose(whole.double(), alone.double())
    assert torch.allclose(whole[:, :3].double(), of_first.double())


@makes
def test_an_unfitted_encoder_says_so_and_the_cache_stays_as_it_was(make):
    q, k, v = qkv(6)
    attn = composed(make())
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    raises_naming(RuntimeError, type(attn.encoder).__name__, "fit(q, k)")(lambda: attn(q, cache))
    raises_naming(RuntimeError, type(attn.encoder).__name__, "fit(q, k)")(lambda: attn.encoder.encode_query(q))
    assert (len(cache), cache.encoded) == (65, 0)
    attn.encoder.fit(None, k)
    assert attn(q, cache).isfinite().all()


@makes
def test_a_fit_to_bad_keys_is_refused_and_the_encoder_is_as_it_was(make):
    _, k, _ = qkv(7, keys=60)
    encoder = make().fit(None, k)
    before, fits = [x.clone() for x in encoder.buffers()], encoder.fits
    few = 0 if isinstance(encoder, SimpleLSH | L2ALSH) else 15
    raises_naming(ValueError, "k must hold", str(few))(lambda: encoder.fit(None, k[:, :, :few]))
    raises_naming(ValueError, "k must be finite")(lambda: encoder.fit(None, k.masked_fill(k > 2, torch.nan)))
    assert same(encoder.buffers(), before)
    assert encoder.fits == fits
    raises_naming(ValueError, "2 KV heads", "4")(lambda: composed(encoder)(*qkv(5, kv_heads=4)))


@makes
def test_a_cache_encodes_anew_after_a_fit(make):
    _, k, v = qkv(8, keys=60)
    attn = composed(make().fit(None, k))
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    before = cache.codes.clone()
    attn.encoder.fit(None, 3 * k[..., torch.randperm(16, generator=torch.Generator().manual_seed(0))].square())
    assert not torch.equal(cache.codes, before)
    assert torch.equal(cache.codes, attn.encoder.encode_key(k))


def test_encoders_of_two_kinds_of_codes_are_not_mixed():
    binary = SimpleLSH(8)
    binary.bits = 0  # lengths alone do not tell them apart
    raises_naming(ValueError, "one kind of code")(lambda: PerLayer([PCA(4), binary]))


def test_parts_of_other_dimensions_are_refused():
    _, k, _ = qkv(9, keys=60)
    for make in (MAKE["ITQ"], MAKE["PCA"], MAKE["SpectralHash"]):
        raises_naming(ValueError, "head_dim 16", "8")(lambda make=make: composed(make().fit(None, k))(*qkv(5, dim=8)))
