"""Rows: a batch whose rows accept different numbers of tokens, in a cache whose columns they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicSlidingWindowLayer

from hashattn.integrations.attached.mask import read_padding
from hashattn.integrations.transformers.lossless.columns import close_holes, cut_window, move, why_not_move

ROOM = 4096  # columns that are noted at once


class Rows:
    """Keeps rows contiguous and ending at one column: who accepts fewer tokens begins later.

    What stands in a row's first columns closes the hole at its end; see :func:`close_holes`. Where each column would
    stand without that is noted, and :meth:`restore` brings all back in order.

    Args:
        cache: filled by the prompt.
        starts: first column of each row, the prompt's padding being before it.
        offsets: int64 [B], position of each row's token less its column.
        take_back: lets layers of the cache that keep all columns forget their last ones.
        moved: told the rows' first columns, and whether they may be earlier than they were.

    Attributes:
        columns: that the cache holds.
        later: columns that each row begins later than it did.
    """

    def __init__(
        self,
        cache: Cache,
        starts: list[int],
        offsets: Tensor,
        take_back: Callable[[int], None],
        moved: Callable[[list[int], bool], None],
    ) -> None:
        self._cache, self._first, self._offsets = cache, starts, offsets
        self._take_back, self._moved = take_back, moved
        self.columns, self.later = int(cache.get_seq_length()), [0] * len(starts)
        self._places = torch.arange(self.columns).expand(len(starts), -1)  # of columns, had nothing been moved

    @staticmethod
    def why_not(cache: Cache, kwargs: dict[str, Any]) -> str | None:
        """Why rows of a cache that a prompt has filled cannot go on apart; None if they can."""
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if cache.is_compileable:
            return "it has no columns to spare for rows that begin later"
        if not isinstance(positions, Tensor) or positions.ndim != 2:
            return "it counts positions in its own way"
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            return "its mask is no padding"
        if mask is not None and read_padding(mask, len(mask), mask.shape[1])[1] is not None:
            return "its mask has holes"
        if typed := [name for name in kwargs if name.endswith("token_type_ids") and kwargs[name] is not None]:
            return f"it is given {typed[0]}"
        return next((reason for layer in cache.layers if (reason := why_not_move(layer))), None)

    @property
    def starts(self) -> list[int]:
        """First column of each row."""
        return [first + later for first, later in zip(self._first, self.later, strict=True)]

    def given(self, new: int, ahead: int) -> dict[str, Tensor]:
        """What a call with so many new tokens is given, so many columns beyond those that count."""
        device, end = self._offsets.device, self.columns + ahead + new
        later, starts = (torch.tensor(x, device=device)[:, None] for x in (self.later, self.starts))
        columns = torch.arange(end, device=device)
        positions = columns[end - new :] - later + self._offsets[:, None]
        return {"attention_mask": (columns >= starts).long(), "position_ids": positions}

    def take_back(self, columns: int) -> None:
        """Let the cache forget its last columns, of which there is one at least."""
        self._take_back(columns)
        for layer in self._windows:
            layer.keys, layer.values = layer.keys[:, :, :-columns], layer.values[:, :, :-columns]
            layer.cumulative_length -= columns

    def settle(self, kept: list[int], appended: int) -> None:
        """Keep the first columns of each row that a check appended."""
        before, most = self.columns, max(kept)
        self._note(before + appended)
        for row, later in enumerate(self.later):
            self._places[row, before : before + appended] = torch.arange(before, before + appended) - later
        self._take_back(appended - most)
        self.columns, holes = before + most, [most - n for n in kept]
        old, ends = self.starts, [before + n for n in kept]
        self.later = [later + hole for later, hole in zip(self.later, holes, strict=True)]
        for layer in self._windows:
            cut_window(layer, [appended - n for n in kept], self.columns, max(self.later) - min(self.later))
        if any(holes):
            self._move(*close_holes(old, ends, holes), earlier=False)

    def restore(self) -> None:
        """Leave what the row with the fewest tokens holds of each, every token in its column."""
        self._arrange([0] * len(self.later), self.columns - max(self.later))

    # ---- inside

    @property
    def _windows(self) -> list[Any]:
        return [layer for layer in self._cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]

    def _arrange(self, later: list[int], columns: int) -> None:
        """Put all rows in order, which begin so many columns later than at first and end at this column."""
        sources = torch.arange(columns).repeat(len(later), 1)
        for row, start in enumerate(self.starts):
            order = self._places[row, start : self.columns].argsort() + start
            begin = self._first[row] + later[row]
            sources[row, begin:] = order[: max(0, columns - begin)]
        targets, gone = torch.arange(columns).expand_as(sources), self.columns - columns
        dropped = [gone - old + new for old, new in zip(self.later, later, strict=True)]
        for layer in self._windows:
            cut_window(layer, dropped, columns, max(later) - min(later))
        self.later = later
        if not torch.equal(sources, targets):
            self._move(sources, targets, earlier=True)
        self.columns = columns
        self._take_back(gone)

    def _move(self, sources: Tensor, targets: Tensor, earlier: bool) -> None:
        self._places.scatter_(1, targets, self._places.gather(1, sources))
        starts, device = self.starts, self._offsets.device
        sources, targets = (x.to(device, non_blocking=True) for x in (sources, targets))
        for layer in self._cache.layers:
            if not isinstance(layer, DynamicSlidingWindowLayer):
                move(layer, sources, targets, starts)
        self._moved(starts, earlier)

    def _note(self, columns: int) -> None:
        """Make room to note so many columns."""
        held = self._places.shape[1]
        if columns > held:
            more = torch.zeros(len(self.later), columns + ROOM - held, dtype=torch.int64)
            self._places = torch.cat([self._places, more], 1)
