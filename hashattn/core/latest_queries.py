"""Queries: the latest queries that a cache was asked, for selectors that look back."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hashattn.core.buffer import TokenBuffer


class LatestQueries:
    """Queries by the columns of their positions, ascending: [B, Hq, n, D].

    Attributes:
        at: their columns.
        ends: the columns that each saw ended here.
        narrow: whether each attended to what was kept alone.
        known: no query from this column on has been forgotten.
        wanted: how many queries a choice asks for.
    """

    def __init__(self) -> None:
        self._held = TokenBuffer()
        self.at: list[int] = []
        self.ends: list[int] = []
        self.narrow: list[bool] = []
        self.known = 0
        self.wanted = 0

    def __len__(self) -> int:
        return len(self.at)

    @property
    def empty(self) -> bool:
        return not self.at

    @property
    def end(self) -> int:
        """The column after the last one's."""
        return self.at[-1] + 1 if self.at else 0

    @property
    def nbytes(self) -> int:
        return self._held.nbytes

    def append(self, q: Tensor, end: int, ends: Sequence[int], narrow: bool) -> None:
        """Add queries [B, Hq, n, D] of the last n columns before `end`, all of them later than those that are held."""
        self._held.append(q)
        self.at += range(end - q.shape[2], end)
        self.ends += ends
        self.narrow += [narrow] * q.shape[2]

    def since(self, column: int) -> int:
        """How many are of this column or later ones."""
        return len(self.at) - bisect_left(self.at, column)

    def within(self, first: int, end: int) -> tuple[Tensor, list[int], list[int], list[bool]]:
        """Those of columns first to end: the queries, where what they saw ended, their columns, and whether narrow."""
        part = slice(bisect_left(self.at, first), bisect_left(self.at, end))
        return self._held.view[:, :, part], self.ends[part], self.at[part], self.narrow[part]

    def truncate(self, end: int) -> None:
        """Forget those of column `end` and later ones, as if they had never come."""
        last = bisect_left(self.at, end)
        self._held.truncate(last)
        self.at, self.narrow = self.at[:last], self.narrow[:last]
        self.ends = [min(x, end) for x in self.ends[:last]]
        self.known = min(self.known, end)

    def forget(self, column: int) -> None:
        """Forget those before this column."""
        first = bisect_left(self.at, column)
        if first:
            rest = self._held.view[:, :, first:].clone()
            self._held = TokenBuffer()
            self._held.append(rest)
            self.at, self.ends, self.narrow = self.at[first:], self.ends[first:], self.narrow[first:]
        self.known = max(self.known, column)

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order."""
        self._held.select(rows)

    def state_dict(self) -> dict[str, Any]:
        """As a part of AttentionSums.state_dict."""
        return {
            "votes_queries": self._held.view.clone(),
            "votes_columns": torch.tensor([self.at, self.ends, self.narrow]),
            "votes_known": self.known,
            "votes_wanted": self.wanted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.at, self.ends, narrow = state["votes_columns"].tolist()
        self.narrow = [bool(x) for x in narrow]
        self.known, self.wanted = state["votes_known"], state["votes_wanted"]
        self._held = TokenBuffer()
        self._held.append(state["votes_queries"])
