"""RaBitQ: an unbiased estimate of the product, from signs and two numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.ops.decode.inputs import Inputs
from hashattn.ops.decode.request import KernelRequest
from hashattn.ops.rabitq import reference
from hashattn.ops.select.family import Family, Scores

MOST_BITS = 256


class RaBitQ(Family):
    """Codes int64 [B, Hkv, room, W + 1], queries float32 [B, Hq, T, 1, bits + 2]; see the specification."""

    scores = "rabitq"

    def why_not(self, request: KernelRequest) -> list[str]:
        bits = request.words - 2
        return [] if bits <= MOST_BITS else [f"it serves RaBitQ of up to {MOST_BITS} bits, not {bits}"]

    def distances(self, x: Inputs, filled: int) -> Tensor:
        return reference.distances(x.query.squeeze(3), x.stored.codes[:, :, :filled])

    def in_triton(self, like: Inputs) -> Scores:
        from hashattn.ops.rabitq.triton import load, score

        codes, bits = like.stored.codes, like.query.shape[4] - 2
        parts = max(16, 1 << (2 * like.q.shape[1] // like.stored.keys.shape[1] - 1).bit_length())
        halves = codes.view(torch.int32)
        return Scores(load, score, halves, halves.shape[2] * halves.shape[3], (codes.shape[3] - 1, bits, parts), 128)
