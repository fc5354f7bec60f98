"""Every index with every kind of selector: engines agree, padding changes nothing, everything kept is dense."""

import pytest
import torch

from hashattn import (
    PQ,
    Centring,
    Channels,
    FaissBinary,
    FlatDot,
    FlatPQ,
    HashAttention,
    HeavyChannels,
    Identity,
    MultiProbe,
    Pages,
    Recent,
    SimHash,
    Sink,
    Tiers,
    TopK,
)
from tests.structured import qkv, tolerance, visible_mask

Q, K, V = qkv(0, 2, tokens=3, keys=300, dim=32)
START = torch.tensor([0, 21])
CODES = SimHash(128, centring=Centring(keys=100))
PAIRS = {
    "bflat": lambda: (CODES, FaissBinary()),
    "bflat_planes": lambda: (SimHash(128, query_bits=8, centring=Centring(keys=290)), FaissBinary()),  # row 1 is short
    "ivf": lambda: (CODES, FaissBinary("BIVF4", nprobe=4)),
    "multi_probe": lambda: (SimHash(128, query_bits=8), MultiProbe(8, 4, 16)),
    "pq": lambda: (PQ(8, sub_bits=4).fit(None, K), FlatPQ()),
    "pages": lambda: (Identity(), Pages()),
    "channels": lambda: (Identity(), Channels(8)),
    "heavy_channels": lambda: (HeavyChannels(8).fit(Q, K), FlatDot()),
}
SELECTORS = [Sink(4) | Recent(16) | TopK(share=0.1), TopK(k=30, per="kv_head"), Tiers(0.05, 0.1)]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("selector", SELECTORS)
def test_engines_agree_and_padding_changes_nothing(pair, selector):
    attn = HashAttention(*PAIRS[pair](), selector, engine="reference")
    close = tolerance(Q, K, V, visible_mask(3, 300, START.tolist()))
    found = attn(Q, K, V, start=START)
    assert (found - attn.replace(engine="cpu")(Q, K, V, start=START)).abs().max() <= close
    alone = attn(Q[1:], K[1:, :, 21:], V[1:, :, 21:])
    assert (found[1:] - alone).abs().max() <= close
    everything, dense = attn.replace(selector=TopK(share=1.0)), attn.replace(engine="dense")
    assert (everything(Q, K, V, start=START) - dense(Q, K, V, start=START)).abs().max() <= close
