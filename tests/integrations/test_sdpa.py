import pytest
import torch
import torch.nn.functional as F

from hashattn import FlatHamming, HashAttention, SimHash, TopK
from hashattn.integrations.sdpa import scaled_dot_product_attention
from tests.structured import qkv

EVERYTHING = HashAttention(SimHash(64, centring=None), FlatHamming(), TopK(share=1.0), engine="reference")


@pytest.mark.parametrize("causal", [False, True])
def test_everything_is_torch(causal):
    q, k, v = qkv(0, tokens=40, keys=40)
    out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True, scale=0.3, index=EVERYTHING)
    exact = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=causal, enable_gqa=True, scale=0.3
    )
    assert (out - exact).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"dropout_p": 0.1}, "dropout_p"),
        ({"is_causal": True}, "is_causal"),
        ({"attn_mask": torch.ones(1, 1)}, "attn_mask"),
        ({"enable_gqa": False}, "enable_gqa"),
    ],
)
def test_what_cannot_be_served_is_refused(options, word):
    q, k, v = qkv(0, tokens=3, keys=40)
    with pytest.raises(ValueError, match=word):
        scaled_dot_product_attention(q, k, v, **{"enable_gqa": True, **options}, index=EVERYTHING)
