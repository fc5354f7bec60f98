"""On a GPU: the same selections as on the CPU, growth and row operations. Run with pytest -m gpu."""

import pytest
import torch

from hashattn import PRESETS, FlatHamming, HashAttention, Recent, SimHash, Sink, TopK
from hashattn.encoders.learned import LearnedHash
from tests.structured import qkv

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:this .* is not fitted:UserWarning")]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_give_what_they_give_on_the_cpu(name):
    attn = HashAttention.from_preset(name)
    attn = attn.replace(engine="reference") if attn.attend.needs_selection else attn
    q, k, v = qkv(0, 2, keys=700, dim=32)
    start = torch.tensor([0, 9])
    if hasattr(attn.encoder, "fit") and not isinstance(attn.encoder, LearnedHash):
        attn.encoder.fit(q, k)
    exact = attn(q, k, v, start=start)
    found = attn.to("cuda")(q.cuda(), k.cuda(), v.cuda(), start=start.cuda()).cpu()
    close = (found - exact).abs().amax(-1) < 1e-3  # a bit within rounding of zero may move one key at the cut
    assert close.float().mean() >= 0.75, close


def test_a_budget_of_everything_is_dense_in_bfloat16():
    q, k, v = (x.cuda().bfloat16() for x in qkv(1, 2, keys=600, dim=64))
    attn = HashAttention(SimHash(128), FlatHamming(), Sink(4) | Recent(8) | TopK(share=1.0), engine="reference")
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    assert (attn(q, k, v) - exact).abs().max() < 2e-2
    assert (HashAttention.from_preset("full")(q, k, v) - exact).abs().max() < 2e-2


def test_caches_grow_and_reorder():
    _, k, v = (x.cuda() for x in qkv(2, 2, keys=900, dim=32))
    attn = HashAttention(SimHash(128), FlatHamming(), TopK(k=9), engine="reference")
    cache = attn.new_cache(2, 2, 32)
    for first in range(0, 900, 300):
        cache.append(k[:, :, first : first + 300], v[:, :, first : first + 300])
        cache.encode()
    cache.reorder(torch.tensor([1, 0]))
    cache.crop(700)
    assert torch.equal(cache.keys, k.flip(0)[:, :, :700])
    wrong = cache.codes != attn.encoder.encode_key(cache.keys, cache.centre)
    assert wrong.float().mean() < 1e-3
