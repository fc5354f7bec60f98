"""Pages: bounds of whole pages of keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.core.budget import clamped
from hashattn.core.checks import keep_ints
from hashattn.index.base import Index, Store
from hashattn.ops.bounds import reference as bounds


@dataclass(frozen=True)
class Pages(Index):
    """Upper bounds from the extremes of each channel in pages of keys: Quest (Tang et al. 2024, arXiv 2406.10774, 3.2).

    No key k of a page has a product q.k above sum_c max(q_c low_c, q_c high_c). The distance of a key is the negated
    bound of its page, in whole units of 1/1024 rounded down: int32, so that keys of one page tie, and a budget that
    ends within a page keeps its most recent keys. (Quest keeps whole pages.) Pages begin at a row's first visible key.
    The queries of a block (T > 1) see bounds of all its keys.

    Takes vectors and keeps two for each page, 2 D / page numbers a key.

    Args:
        page: keys of a page; the paper takes 16.
    """

    scores = "pages"

    page: int = 16

    def __post_init__(self) -> None:
        keep_ints(self, page=1)

    def accepts(self, code: str) -> bool:
        return code == "vector"

    def new_store(self, capacity: int | None = None) -> Store:
        return PageStore(clamped(self.page), capacity)

    def key_bytes(self, row: int) -> float:
        return 2 * row / self.page

    def read_bytes(self, row: int) -> float:
        return 2 * row / self.page

    def distances(self, store: Store, query: Tensor, *, biased: bool = False, host: bool = False) -> Tensor:
        """int32 [B, Hq, T, N] from queries [B, Hq, T, D]."""
        assert isinstance(store, PageStore)
        found = bounds.distances(query, store.codes)
        pages = store.pages()[:, None, None].expand(*found.shape[:3], -1)
        return found.gather(-1, pages)

    def packed(self, query: Tensor, kv_heads: int) -> Tensor:
        """Queries as float32 [B, Hq, T, 1, D]."""
        return query.float().unsqueeze(3).contiguous()


class PageStore(Store):
    """The least value of k and of -k in each channel of each page, [B, H, P, 2 D], in the keys' dtype.

    It holds no keys: a crop within a page forgets the page, and the cache gives its keys anew.
    """

    per_key = False
    movable = False

    def __init__(self, page: int, capacity: int | None = None) -> None:
        super().__init__(None if capacity is None else -(-capacity // page))
        self._page, self._length = page, 0
        self._reach = 0  # no page knows of a key from this column on: rows that begin elsewhere are cropped elsewhere
        self._starts: list[int] = []

    def __len__(self) -> int:
        return self._length

    def align(self, starts: list[int]) -> None:
        if starts != self._starts:
            self._starts = list(starts)
            self.truncate(0)

    def pages(self) -> Tensor:
        """The page of each column, int64 [B, N]; 0 in the padding."""
        return self._page_of(0, self._length, self._codes.storage.device).clamp(min=0)

    def add(self, codes: Tensor) -> None:
        batch, heads, new, dim = codes.shape
        if len(self._starts) != batch:
            self._starts = [0] * batch
        end, far = self._length + new, torch.finfo(codes.dtype).max
        missing = -(-end // self._page) - self._codes.length
        if missing > 0:
            room = self._room
            self._codes.append(codes.new_full((batch, heads, missing, 2 * dim), far))
            self._clear(room)
        pages = self._page_of(self._length, end, codes.device)
        both = torch.cat([codes, -codes], -1).masked_fill((pages < 0)[:, None, :, None], far)
        at = pages.clamp(min=0)[:, None, :, None].expand_as(both)
        self.codes.scatter_reduce_(2, at, both, "amin")
        self._length = self._reach = end

    def truncate(self, length: int) -> None:
        """Forget the keys after the first `length`, and those before them in their page."""
        if length >= self._reach:
            return
        self._reach, self._length = length, min(length, self._length)
        for row, start in enumerate(self._starts):
            whole = max(0, length - start) // self._page
            self._length = min(self._length, start + whole * self._page)
            self.codes[row, :, whole:] = torch.finfo(self.codes.dtype).max
        self._codes.truncate(-(-self._length // self._page))

    @property
    def _room(self) -> int:
        return 0 if self._codes.empty else self._codes.storage.shape[2]

    def _clear(self, room: int) -> None:
        """Let no page know of a key beyond those that are kept, in memory that is not the room's any more."""
        if self._room != room:
            self._codes.storage[:, :, self._codes.length :] = torch.finfo(self._codes.storage.dtype).max

    def reserve(self, length: int) -> None:
        room = self._room
        self._codes.reserve(-(-length // self._page))
        self._clear(room)

    def adopt(self, length: int) -> None:
        self._codes.adopt(-(-length // self._page))
        self._length = self._reach = length

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        if not self._codes.empty:
            self._clear(0)
        self._starts = [self._starts[row] for row in rows.tolist()] if self._starts else []

    def _page_of(self, first: int, end: int, device: torch.device) -> Tensor:
        starts = torch.tensor(self._starts, device=device).unsqueeze(1)
        return (torch.arange(first, end, device=device) - starts).div(self._page, rounding_mode="floor")
