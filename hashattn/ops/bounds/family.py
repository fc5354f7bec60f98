"""Page bounds: the largest product that a key of a page can have."""

from __future__ import annotations

from torch import Tensor

from hashattn.ops.bounds import reference
from hashattn.ops.decode.inputs import Inputs
from hashattn.ops.decode.request import KernelRequest
from hashattn.ops.select.family import Family, Scores

PAGES = 8  # that are read at a time, about
MOST_COLUMNS = 1024  # that these are given to


class Bounds(Family):
    """Codes are pages [B, Hkv, pages, 2 D], the least of k and of -k in each channel; queries float32 [B, Hq, T, 1, D].

    Pages are whole: queries of a block see bounds of all its keys.
    """

    scores = "pages"

    def why_not(self, request: KernelRequest) -> list[str]:
        return []

    def distances(self, x: Inputs, filled: int) -> Tensor:
        pages = reference.distances(x.query.squeeze(3), x.stored.codes)
        return reference.of_columns(pages, x.starts, x.page, filled)

    def in_triton(self, like: Inputs) -> Scores:
        from hashattn.ops.bounds.triton import load, score

        codes, page = like.stored.codes, like.page
        tile = max(16, min(MOST_COLUMNS, PAGES << (page.bit_length() - 1)))
        pages = 1 << (tile // page + 1).bit_length()
        shape, stride = (page, codes.shape[3] // 2, pages), codes.shape[2] * codes.shape[3]
        return Scores(load, score, codes, stride, shape, tile)
