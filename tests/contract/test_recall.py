"""What every family finds on two offset cones with planted neighbours: the observed recall beside each floor.

Encoders are fitted to other cones. Recall is the share of a query's 8 keys of largest q.k (of 640) that a budget of 32
holds: .05 by chance. Floors of ITQ and of learned encoders are in tests/encoders/test_recall.py, those of SimHash there
too; how much of the Hamming neighbours MultiProbe and FAISS find is with their tests.
"""

import pytest

from hashattn import (
    L2ALSH,
    PCA,
    PQ,
    Channels,
    CrossPolytope,
    FaissBinary,
    FlatBuckets,
    FlatDot,
    FlatHamming,
    FlatPQ,
    FlatRaBitQ,
    HashAttention,
    HeavyChannels,
    Identity,
    LocalTopK,
    MultiProbe,
    Pages,
    RaBitQ,
    Refine,
    SimHash,
    SimpleLSH,
    SpectralHash,
    TopK,
)
from tests.structured import Cones, cones

SIGNS, PLANES, TOPK = SimHash(128), SimHash(128, query_bits=8), TopK(k=32)


def recall(encoder, index, selector, data: Cones) -> float:
    """Every query sees every key."""
    attn = HashAttention(encoder, index, selector, engine="reference")
    cache = attn.new_cache(1, data.k.shape[1], data.k.shape[3])
    cache.append(data.k, data.v)
    ids = attn.run(data.q, cache, causal=False)[1].ids.long()
    ids = ids.repeat_interleave(data.truth.shape[1] // ids.shape[1], 1)
    assert (ids >= 0).sum(-1).max() <= 32
    return (data.truth.unsqueeze(-1) == ids.unsqueeze(-2)).any(-1).float().mean().item()


FAMILIES = {
    "exact products": (Identity(), FlatDot(), TOPK, 1.0),
    "SimHash": (SIGNS, FlatHamming(), TOPK, 0.47),  # .512
    "SimHash, query of 8 planes": (PLANES, FlatHamming(), TOPK, 0.64),  # .678
    "SpectralHash": (SpectralHash(128), FlatHamming(), TOPK, 0.09),  # .124: queries are no keys
    "SimpleLSH": (SimpleLSH(128, query_bits=4), FlatHamming(), TOPK, 0.35),  # .395
    "L2ALSH": (L2ALSH(128), FlatHamming(), TOPK, 0.12),  # .151
    "CrossPolytope": (CrossPolytope(16, 16), FlatBuckets(), TOPK, 0.19),  # .223
    "RaBitQ of 32 bits": (RaBitQ(), FlatRaBitQ(), TOPK, 0.36),  # .400
    "RaBitQ of 128 bits": (RaBitQ(128), FlatRaBitQ(), TOPK, 0.69),  # .727
    "PQ of 12 bits": (PQ(2, sub_bits=6), FlatPQ(), TOPK, 0.09),  # .113
    "PQ of 32 bits": (PQ(8, sub_bits=4), FlatPQ(), TOPK, 0.35),  # .391
    "PQ of 128 bits": (PQ(16), FlatPQ(), TOPK, 0.95),  # .995
    "PCA to 16": (PCA(16), FlatDot(), TOPK, 0.63),  # .673
    "HeavyChannels, 8": (HeavyChannels(8), FlatDot(), TOPK, 0.15),  # .177
    "HeavyChannels, 16": (HeavyChannels(16), FlatDot(), TOPK, 0.31),  # .342
    "Pages of 4": (Identity(), Pages(4), TOPK, 0.11),  # .134: neighbours lie anywhere
    "Pages of 16": (Identity(), Pages(16), TOPK, 0.06),  # .079
    "Channels, 8": (Identity(), Channels(8, per="query_head"), TOPK, 0.5),  # .535
    "Channels, 16": (Identity(), Channels(16, per="query_head"), TOPK, 0.84),  # .868
    "MultiProbe": (PLANES, MultiProbe(8, 10, 64), TOPK, 0.54),  # .576
    "FAISS, flat": (SIGNS, FaissBinary("BFlat"), TOPK, 0.47),  # .512
    "FAISS, cells": (SIGNS, FaissBinary("BIVF8", nprobe=4), TOPK, 0.35),  # .410
    "FAISS, graph": (SIGNS, FaissBinary("BHNSW16", ef_search=64), TOPK, 0.4),  # .453
    "FAISS, hashes": (SIGNS, FaissBinary("BHash4x12", nflip=2), TOPK, 0.12),  # .154
    "LocalTopK": (PLANES, FlatHamming(), LocalTopK(32, 8), 0.62),  # .656
    "TopK of a group": (PLANES, FlatHamming(), TopK(k=32, per="kv_head"), 0.33),  # .363
    "Refine": (PLANES, FlatHamming(), Refine(TOPK), 0.9),  # .938
}


@pytest.mark.parametrize("family", FAMILIES)
def test_recall_stays_above_its_floor(family):
    encoder, index, selector, floor = FAMILIES[family]
    train = cones(0, keys=1280)
    if hasattr(encoder, "fit"):
        encoder.fit(train.q, train.k)
    assert recall(encoder, index, selector, cones(1)) >= floor
