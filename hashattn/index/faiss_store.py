"""FaissStore: packed codes, and FAISS's indexes over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hashattn.index.base import Spans, Store
from hashattn.ops.hamming.cpu import as_bytes


@dataclass
class Searcher:
    """FAISS's index over the codes of a row and head from column `first` on."""

    index: Any
    first: int
    fitted: bool

    @property
    def end(self) -> int:
        return self.first + int(self.index.ntotal)


class FaissStore(Store):
    """Keeps the codes, and for each row and head an index that is brought up to date when a search needs it.

    Args:
        make: makes an empty index for codes of so many bits, fitted later or (where it needs that) flat.
        needed: keys that it is fitted to, the first of a row; 0 if it needs none.
        crops: whether it can remove its last keys; it is made anew otherwise.
    """

    movable = False

    def __init__(self, make: Callable[[int, bool], Any], needed: int, crops: bool, capacity: int | None = None) -> None:
        super().__init__(capacity)
        self._make, self._needed, self._crops = make, needed, crops
        self._searchers: dict[tuple[int, int], Searcher] = {}

    @property
    def nbytes(self) -> int:
        """Bytes allocated for codes, here and (without lists and graphs) in FAISS."""
        return super().nbytes + sum(s.index.ntotal * s.index.code_size for s in self._searchers.values())

    def truncate(self, length: int) -> None:
        super().truncate(length)
        for at, held in list(self._searchers.items()):
            if held.end <= length:
                continue
            if not self._crops or length <= held.first or (held.fitted and length - held.first < self._needed):
                del self._searchers[at]
            else:
                from faiss import IDSelectorRange  # whoever made an index has it

                held.index.remove_ids(IDSelectorRange(length - held.first, held.end - held.first))

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        picked: list[int] = rows.tolist()
        place = {old: new for new, old in reversed(list(enumerate(picked)))}  # a repeated row's index goes to the first
        self._searchers = {(place[b], h): held for (b, h), held in self._searchers.items() if b in place}

    def searcher(self, row: int, head: int, first: int) -> Any:
        """FAISS's index over the codes of a row and head, from column `first` to the last."""
        held = self._searchers.get((row, head))
        keys = len(self) - first
        fit = self._needed > 0 and keys >= self._needed
        if held is None or held.first != first or held.fitted != fit:
            held = Searcher(self._make(64 * self.codes.shape[-1], fit), first, fit)
            if fit:
                held.index.train(self._bytes(row, head, first, first + self._needed))
        if held.end < len(self):
            held.index.add(self._bytes(row, head, held.end, len(self)))
        self._searchers[row, head] = held
        return held.index

    def scan(self, planes: Tensor) -> Tensor:
        """Hamming distances of int64 planes [B, Hq, T, b, W] to every key, int32 [B, Hq, T, b, N]."""
        self._check(planes)
        heads, keys = self.codes.shape[1:3]
        out = planes.new_empty(*planes.shape[:4], keys, dtype=torch.int32)
        grouped = planes.cpu().unflatten(1, (heads, -1))
        for b in range(len(planes)):
            for h in range(heads):
                rows = as_bytes(grouped[b, h].flatten(0, 2).contiguous())
                _, found, _ = self.searcher(b, h, 0).range_search(rows, 8 * rows.shape[-1] + 1)  # all, in their order
                part = out[b].unflatten(0, (heads, -1))[h]
                part.copy_(torch.from_numpy(found).view(part.shape))
        return out

    def search(self, query: Tensor, k: int, spans: Spans) -> tuple[Tensor, Tensor]:
        """What FAISS finds for int64 queries [B, Hq, T, W]; see :meth:`hashattn.index.Index.search`."""
        self._check(query)
        heads, keys = self.codes.shape[1:3]
        shape = (*query.shape[:3], k)
        ids = torch.full(shape, -1, dtype=torch.int32, device=query.device)
        distances = torch.zeros(shape, dtype=torch.int32, device=query.device)
        grouped = query.unflatten(1, (heads, -1))  # [B, H, G, T, W]
        for b, row in enumerate(spans):
            first, ends = row[0][0], [end for _, end in row]
            asked = min(k + keys - min(ends), keys - first)
            if asked < 1:
                continue
            end = torch.tensor(ends, device=query.device).view(1, -1, 1)
            for h in range(heads):
                near, found = _find(self.searcher(b, h, first), grouped[b, h].flatten(0, 1).contiguous(), asked)
                found = torch.where(found < 0, -1, found + first).view(*grouped.shape[2:4], -1)
                seen = (found >= 0) & (found < end)
                order = (~seen).to(torch.int8).argsort(dim=-1, stable=True)[..., :k]  # nearest first, unseen last
                part = slice(h * grouped.shape[2], (h + 1) * grouped.shape[2])
                width = order.shape[-1]
                ids[b, part, :, :width] = found.masked_fill(~seen, -1).gather(-1, order).to(torch.int32)
                near = near.view(found.shape).masked_fill(~seen, 0)
                distances[b, part, :, :width] = near.gather(-1, order).to(torch.int32)
        return ids, distances

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_searchers": {}}  # FAISS's part is made anew when it is needed

    def _bytes(self, row: int, head: int, first: int, end: int) -> Any:
        return as_bytes(self.codes[row, head, first:end].cpu().contiguous())

    def _check(self, query: Tensor) -> None:
        if query.is_floating_point() or query.shape[-1] != self.codes.shape[-1]:
            raise ValueError(
                f"query must hold int64 codes of {self.codes.shape[-1]} words, as the keys do, got {query.dtype} of "
                f"{query.shape[-1]} words"
            )


def _find(index: Any, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances and ids (-1 for none) of the k nearest of int64 queries [n, W], on their device."""
    distances, ids = index.search(as_bytes(query.cpu()), k)
    return torch.from_numpy(distances).to(query.device), torch.from_numpy(ids).to(query.device)
