"""Encoders with an index of their own or a fit in closed form, from keys to attention."""

import copy

import pytest
import torch

import hashattn
from hashattn import (
    L2ALSH,
    PCA,
    Centring,
    CrossPolytope,
    FlatBuckets,
    FlatDot,
    FlatHamming,
    FlatRaBitQ,
    HashAttention,
    PerLayer,
    RaBitQ,
    Recent,
    SimpleLSH,
    Sink,
    SpectralHash,
    TopK,
)
from hashattn.cache.check_codes import alike
from tests.structured import attention64, poison, qkv, selected, tolerance, visible_mask

SMALL = Centring(0.5, 16)
PARTS = {
    "pca": (lambda: PCA(12), FlatDot()),
    "rabitq": (lambda: RaBitQ(centring=SMALL), FlatRaBitQ()),
    "simple-lsh": (lambda: SimpleLSH(100, query_bits=4), FlatHamming()),
    "l2-alsh": (lambda: L2ALSH(100), FlatHamming()),
    "cross-polytope": (lambda: CrossPolytope(12, 16, SMALL), FlatBuckets()),
    "spectral": (lambda: SpectralHash(100), FlatHamming()),
}
parts = pytest.mark.parametrize("name", PARTS)


def composed(name, k, selector=None):
    make, index = PARTS[name]
    encoder = make()
    if hasattr(encoder, "fit"):
        encoder.fit(None, k)
    return HashAttention(encoder, index, selector or Sink(2) | Recent(8) | TopK(k=24), engine="reference")


def near(a, b):
    """Whether codes are the same up to the rounding of another shape of product."""
    return torch.allclose(a, b, atol=1e-5) if a.is_floating_point() else alike(a, b)


@parts
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_heads_of_every_size_in_either_dtype(name, dim):
    dtype = torch.float32 if dim == 96 else torch.bfloat16
    q, k, v = qkv(0, 2, kv_heads=2, group=3, tokens=2, keys=200, dim=dim, dtype=dtype)
    attn = composed(name, k)
    cache = attn.new_cache(2, 2, dim)
    cache.append(k, v)
    out, selection = attn.run(q, cache)
    assert out.out.dtype == dtype
    assert selection.ids.shape == (2, 6, 2, 24)
    width = cache.codes.shape[-1] * cache.codes.element_size()
    assert width == attn.encoder.code_bytes(dim, k.element_size())
    keep = selected(selection.ids, 200, 6)
    assert (out.out.double() - attention64(q, k, v, keep)[0]).abs().max() <= tolerance(q, k, v, keep)


@parts
def test_chunks_crops_and_reorders_leave_the_codes_that_one_append_makes(name):
    q, k, v = qkv(2, 2, keys=90)
    attn = composed(name, k)
    whole, parted = attn.new_cache(2, 2, 16), attn.new_cache(2, 2, 16, capacity=100)
    whole.append(k, v)
    for first, end in ((0, 40), (40, 41), (41, 71)):
        parted.append(k[:, :, first:end], v[:, :, first:end])
        attn(q, parted)
    parted.crop(50)
    attn(q, parted)
    parted.append(k[:, :, 50:], v[:, :, 50:])
    assert near(parted.codes, whole.codes)
    parted.reorder(torch.tensor([1, 0]))
    whole.reorder(torch.tensor([1, 0]))
    assert near(parted.codes, whole.codes)
    assert near(attn.encoder.encode_key(k.flip(0), parted.centre if attn.encoder.centring else None), whole.codes)
    twin = copy.deepcopy(parted)
    parted.crop(30)
    assert near(twin.codes, whole.codes)
    assert torch.equal(attn(q, twin), attn(q, twin))


@parts
def test_padding_changes_nothing_in_a_row(name):
    q, k, v = qkv(3, 2, keys=80)
    attn = composed(name, k)
    start = torch.tensor([0, 30])
    out = attn(q, poison(k, start), poison(v, start), start=start)
    alone = attn(q[1:], k[1:, :, 30:], v[1:, :, 30:])
    assert torch.allclose(out[1:], alone, atol=1e-5)
    assert out.isfinite().all()


@parts
def test_a_budget_of_everything_is_full_attention(name):
    q, k, v = qkv(4, tokens=3, keys=70)
    keep = visible_mask(3, 70, [0])
    found = composed(name, k, TopK(k=70))(q, k, v)
    assert (found.double() - attention64(q, k, v, keep)[0]).abs().max() <= tolerance(q, k, v, keep)


@parts
@pytest.mark.parametrize("per", ["query_head", "kv_head"])
def test_engines_select_the_same_keys(name, per):
    q, k, v = qkv(7, 2, kv_heads=2, group=2, tokens=3, keys=90)
    attn = composed(name, k, Sink(2) | Recent(4) | TopK(k=20, per=per))
    cache = attn.new_cache(2, 2, 16)
    cache.append(k, v, start=torch.tensor([0, 11]))
    found = [attn.replace(engine=engine).run(q, cache)[1].ids for engine in ("reference", "cpu")]
    assert torch.equal(*(ids.sort(-1).values for ids in found))


@parts
def test_a_saved_cache_comes_back(name):
    q, k, v = qkv(5, keys=70)
    attn = composed(name, k)
    cache, other = attn.new_cache(1, 2, 16), attn.new_cache(1, 2, 16)
    cache.append(k, v)
    before = attn(q, cache)
    other.load_state_dict(cache.state_dict())
    assert torch.equal(other.codes, cache.codes)
    assert torch.equal(attn(q, other), before)


@parts
def test_it_describes_itself(name):
    q, k, v = qkv(6, keys=70)
    attn = composed(name, k)
    assert type(attn.encoder).__name__ in repr(attn)
    assert eval(repr(attn.index), {**vars(hashattn)}) == attn.index
    if hasattr(attn.encoder, "fit"):
        assert "fitted=True" in repr(attn.encoder)
        layers = attn.replace(encoder=PerLayer({3: attn.encoder}))
        assert torch.equal(layers.layer(3)(q, k, v), attn(q, k, v))
        assert layers.encoder.code == attn.encoder.code
        assert layers.encoder.angular == attn.encoder.angular
        assert layers.encoder.code_bytes(16, 4) == attn.encoder.code_bytes(16, 4)
    else:
        assert eval(repr(attn.encoder), {**vars(hashattn)}) == attn.encoder
        assert eval(repr(attn), {**vars(hashattn)}) == attn
        assert attn.layer(3) is attn
    assert attn.explain(q_heads=4, kv_heads=2, head_dim=16, keys=1000).engine == "reference"
