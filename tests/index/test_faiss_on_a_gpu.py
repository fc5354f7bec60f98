import pytest
import torch

from hashattn import FaissBinary, FlatHamming, HashAttention, SimHash, TopK
from tests.structured import qkv, raises_naming

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tokens", [1, 3])
def test_faiss_finds_the_nearest_on_a_gpu_at_every_step(tokens):
    encoder = SimHash(128, centring=None)
    attn = HashAttention(encoder, FaissBinary(device="cuda"), TopK(k=64), engine="reference")
    q, k, v = (x.cuda() for x in qkv(0, 2, tokens=tokens, keys=3000, dim=64))
    cache = attn.new_cache(2, 2, 64)
    cache.append(k[:, :, :2900], v[:, :, :2900], start=torch.tensor([0, 50]))
    query = encoder.encode_query(q)
    for n in (2900, 2950, 3000):
        if n > len(cache):
            cache.append(k[:, :, len(cache) : n], v[:, :, len(cache) : n])
        view = cache.view(query, 4, cache.spans(tokens))
        ids, distances = view.find(64)
        exact = FlatHamming().distances(cache.indexed.store, query).masked_fill(~view.seen, 10_000)
        assert torch.equal(distances, exact.sort(-1).values[..., :64])
        assert torch.equal(distances, exact.gather(-1, ids.long()))
    cache.crop(2000)
    assert int(cache.search(query, 64)[0].max()) < 2000


def test_more_keys_than_faiss_finds_on_a_gpu_are_refused():
    attn = HashAttention(SimHash(128, centring=None), FaissBinary(device="cuda"), TopK(k=2049), engine="reference")
    q, k, v = (x.cuda() for x in qkv(1, keys=3000))
    raises_naming(ValueError, "2048", "2049", 'device="cpu"')(lambda: attn(q, k, v))
