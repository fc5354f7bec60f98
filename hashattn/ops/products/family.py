"""Exact dot products, and partial ones over some channels or components."""

from __future__ import annotations

from torch import Tensor

from hashattn.ops.decode.inputs import Inputs
from hashattn.ops.decode.request import DTYPES, KernelRequest
from hashattn.ops.products import reference
from hashattn.ops.select.family import Family, Scores

MOST_DIMS = 256
_AT_ONCE = 4096  # numbers of a tile


class Products(Family):
    """Codes are vectors [B, Hkv, room, r], queries float32 [B, Hq, T, 1, r], zero where a channel does not count."""

    def __init__(self, scores: str) -> None:
        self.scores = scores

    def why_not(self, request: KernelRequest) -> list[str]:
        if request.dtype in DTYPES and 1 <= request.words <= MOST_DIMS:
            return []
        return [f"it multiplies vectors of up to {MOST_DIMS} numbers, not of {request.words}"]

    def distances(self, x: Inputs, filled: int) -> Tensor:
        return reference.distances(x.query.squeeze(3), x.stored.codes[:, :, :filled])

    def in_triton(self, like: Inputs) -> Scores:
        from hashattn.ops.products.triton import load, score

        codes, dim = like.stored.codes, like.query.shape[4]
        width = max(16, 1 << (dim - 1).bit_length())
        shape, tile, many = (dim, width, 0), min(256, _AT_ONCE // width), like.rule.shared  # a group's products at once
        return Scores(load, score, codes, codes.shape[2] * dim, shape, tile, many)
