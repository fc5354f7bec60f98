import sys

import pytest
import torch

from hashattn import ITQ, FlatHamming, HashAttention, TopK
from hashattn.ops import hamming
from tests.structured import cones, generator, qkv, raises_naming


@pytest.mark.parametrize("bits", [8, 16, 33])  # shorter than, equal to and longer than head_dim
def test_every_block_of_a_code_is_an_orthonormal_projection(bits):
    _, k, _ = qkv(0, keys=200, dim=16)
    itq = ITQ(bits, iterations=5).fit(None, k)
    assert itq.projection.shape == (2, 16, bits)
    for first in range(0, bits, 16):
        block = itq.projection[:, :, first : first + 16].double()
        gram = block.transpose(1, 2) @ block
        assert (gram - torch.eye(gram.shape[1], dtype=torch.float64)).abs().max() < 1e-6
    assert itq.encode_key(k).shape == (1, 2, 200, hamming.words(bits))


def test_the_rotation_loses_less_to_the_signs_than_its_random_start():
    data = cones(0)

    def loss(iterations: int) -> float:
        itq = ITQ(32, iterations=iterations).fit(None, data.k)
        v = (data.k - itq.mean.unsqueeze(1)) @ itq.projection
        return (v - v.sign()).square().mean().item()

    assert loss(20) < loss(1)


def test_fitting_is_the_same_for_the_same_seed_and_batch_rows_are_pooled():
    _, k, _ = qkv(1, batch=2, keys=60, dim=16)
    pooled = k.transpose(0, 1).flatten(1, 2).unsqueeze(0)
    a, b = ITQ(24, iterations=3).fit(None, k), ITQ(24, iterations=3).fit(None, pooled)
    assert torch.equal(a.encode_key(k), b.encode_key(k))
    assert not torch.equal(a.projection, ITQ(24, iterations=3, seed=1).fit(None, k).projection)


@pytest.mark.parametrize("fitted", [True, False])
def test_a_state_dict_gives_a_fresh_instance_the_same_codes(fitted):
    q, k, _ = qkv(2, keys=60)
    itq = ITQ(40, iterations=3)
    if fitted:
        itq.fit(None, k)
    twin = ITQ(40)
    twin.load_state_dict(itq.state_dict())
    assert twin.fitted == fitted
    if fitted:
        assert torch.equal(twin.encode_key(k), itq.encode_key(k))
        assert torch.equal(twin.encode_query(q), itq.encode_query(q))


def test_query_heads_use_the_rotation_of_their_kv_head():
    q, k, _ = qkv(3, kv_heads=2, group=3, tokens=2, keys=60)
    itq = ITQ(40, iterations=3).fit(None, k)
    as_keys = q.unflatten(1, (2, 3)).flatten(2, 3) + itq.mean.unsqueeze(1)  # encode_key subtracts the mean
    clear = (q.unflatten(1, (2, 3)).flatten(2, 3) @ itq.projection).abs() > 1e-4
    a = hamming.unpack_bits(itq.encode_query(q), 40).unflatten(1, (2, 3)).flatten(2, 3)
    assert torch.equal(a & clear, hamming.unpack_bits(itq.encode_key(as_keys), 40) & clear)
    assert clear.float().mean() > 0.99


def test_an_unfitted_itq_says_so_and_the_cache_stays_as_it_was():
    q, k, v = qkv(4)
    attn = HashAttention(ITQ(64), FlatHamming(), TopK(k=3), engine="reference")
    cache = attn.new_cache(1, 2, 16)
    cache.append(k, v)
    raises_naming(RuntimeError, "ITQ", "fit")(lambda: attn(q, cache))
    assert (len(cache), cache.encoded) == (65, 0)
    assert torch.equal(cache.keys, k)


def test_a_model_of_other_heads_or_dimension_is_refused():
    _, k, _ = qkv(5, keys=60)
    attn = HashAttention(ITQ(40, iterations=2).fit(None, k), FlatHamming(), TopK(k=3), engine="reference")
    raises_naming(ValueError, "2 KV heads", "4")(lambda: attn(*qkv(5, kv_heads=4)))
    raises_naming(ValueError, "head_dim 16", "8")(lambda: attn(*qkv(5, dim=8)))


def test_too_few_keys_are_refused():
    _, k, _ = qkv(6, keys=15)
    raises_naming(ValueError, "k", "16", "15")(lambda: ITQ(8).fit(None, k))
    raises_naming(ValueError, "iterations", "0")(lambda: ITQ(iterations=0))
    raises_naming(ValueError, "bits", "4")(lambda: ITQ(4))


def test_an_interrupted_fit_leaves_the_encoder_as_it_was(monkeypatch):
    import scipy.linalg as scipy_linalg

    _, k, _ = qkv(7, keys=60)
    itq = ITQ(40, iterations=3).fit(None, k)
    before = {name: x.clone() for name, x in itq.state_dict().items()}
    calls, svd = [], scipy_linalg.svd

    def interrupted(x):
        calls.append(x)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return svd(x)

    monkeypatch.setattr(scipy_linalg, "svd", interrupted)
    with pytest.raises(KeyboardInterrupt):
        itq.fit(None, torch.randn(k.shape, generator=generator(8)))
    assert all(torch.equal(x, before[name]) for name, x in itq.state_dict().items())


def test_without_scipy_fit_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    _, k, _ = qkv(9)
    raises_naming(ImportError, "ITQ", 'pip install "hashattn[fit]"')(lambda: ITQ(8).fit(None, k))
