"""Product quantisation: bytes that are looked up in tables of the query."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from hashattn.ops.adc import reference
from hashattn.ops.decode.inputs import Inputs
from hashattn.ops.decode.request import KernelRequest
from hashattn.ops.select.family import Family, Scores

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MOST_BYTES = 64


class Adc(Family):
    """Codes uint8 [B, Hkv, room, m], queries' tables int32 [B, Hq, T, m, C]."""

    scores = "pq"

    def why_not(self, request: KernelRequest) -> list[str]:
        m = request.planes  # of the tables
        return [] if m <= MOST_BYTES else [f"it serves codes of up to {MOST_BYTES} bytes, not {m}"]

    def distances(self, x: Inputs, filled: int) -> Tensor:
        return reference.distances(x.query, x.stored.codes[:, :, :filled])

    def in_triton(self, like: Inputs) -> Scores:
        from hashattn.ops.adc.triton import load, score

        m, centroids = like.query.shape[3:]
        width = gcd(m, 8)
        words = like.stored.codes.view(_WORDS[width])
        return Scores(load, score, words, words.shape[2] * words.shape[3], (width, m, centroids), 512)
