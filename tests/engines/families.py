"""Compositions of every family of scores that the GPU engine serves, for 2 KV heads of head_dim 64."""

from __future__ import annotations

import torch

from hashattn import (
    PCA,
    PQ,
    Channels,
    FlatDot,
    FlatPQ,
    FlatRaBitQ,
    HashAttention,
    Identity,
    Pages,
    RaBitQ,
    Recent,
    Sink,
    TopK,
)
from tests.structured import generator, qkv


def quantiser() -> PQ:
    """Codebooks as a file would fill them, of few centroids."""
    encoder = PQ(8, sub_bits=4)
    encoder.prepare(2, 64, torch.device("cpu"))
    encoder.codebooks.normal_(generator=generator(3))
    return encoder


FAMILIES = {
    "pq": HashAttention(quantiser(), FlatPQ(), Sink(4) | Recent(8) | TopK(share=0.1)),
    "rabitq": HashAttention(RaBitQ(), FlatRaBitQ(), TopK(k=30, per="kv_head")),
    "pages": HashAttention(Identity(), Pages(16), TopK(share=0.1)),
    "components": HashAttention(PCA(16).fit(None, qkv(5, 2, keys=80, dim=64)[1]), FlatDot(), TopK(k=30)),
    "channels": HashAttention(Identity(), Channels(16), Recent(8) | TopK(k=30, per="kv_head")),
    "positions": HashAttention(selector=Sink(4) | Recent(30)),
}
