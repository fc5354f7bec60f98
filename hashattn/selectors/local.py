"""LocalTopK: the nearest keys of each chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hashattn.core.budget import MOST_KEYS, check_k
from hashattn.core.checks import keep_ints
from hashattn.core.types import Selection, Step
from hashattn.index.view import View
from hashattn.ops.decode.rule import Rule
from hashattn.ops.nearest import most_of_span, nearest_of_chunks
from hashattn.ops.nearest.local import RUN
from hashattn.selectors.base import Selector
from hashattn.selectors.grouping import check_grouping, choices_of, chosen_mask, group_sum, voted


@dataclass(frozen=True)
class LocalTopK(Selector):
    """The `per_chunk` nearest visible keys of each of k / per_chunk chunks, ties to the most recent.

    Columns are dealt to the chunks in runs of 8: column n of the cache belongs to chunk n // 8 % chunks. No threshold
    is agreed on between chunks, which suits a GPU, and what is found is nearly what TopK finds (docs/selectors.md).
    Forced keys count in their chunk's budget; a chunk with more of them than per_chunk keeps exactly these.
    There is no `share`: the number of chunks must not change while a cache grows.

    Args:
        k: number of keys, a multiple of per_chunk.
        per_chunk: of them from each chunk. More come closer to TopK, fewer are quicker to find on a GPU.
        per: "query_head" or "kv_head"; see :func:`hashattn.selectors.grouping.take`.
        combine: "sum", "union" or "vote", for per="kv_head".
    """

    k: int
    per_chunk: int = 16
    per: str = "query_head"
    combine: str = "sum"

    matrices = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", check_k(self.k))
        keep_ints(self, per_chunk=1)
        if self.k > MOST_KEYS:
            raise ValueError(f"k must be at most {MOST_KEYS:,}, got {self.k}; TopK(share=1.0) keeps every key")
        if self.k % self.per_chunk:
            low = self.k // self.per_chunk * self.per_chunk
            near = f"{low} or {low + self.per_chunk}" if low else f"{self.per_chunk}"
            raise ValueError(f"k must be a multiple of per_chunk={self.per_chunk}, got {self.k}: take {near}")
        check_grouping(self.per, self.combine)

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return self.k // self.per_chunk

    @property
    def shared(self) -> bool:
        return self.per == "kv_head"

    def budget(self, visible: int, forced: int = 0) -> int:
        most = sum(most_of_span(n, self.chunks) for n in (forced, 1)) if forced else 0  # in a chunk, as two spans
        return min(visible, self.k + (max(0, forced - self.per_chunk) if most > self.per_chunk else 0))

    def choices(self, q_heads: int, kv_heads: int) -> tuple[int, int]:
        return choices_of(self.per, self.combine, q_heads, kv_heads)

    def rule(self, group: int) -> Rule | None:
        together = self.shared and group > 1
        return Rule(self.k, shared=together, chunks=self.chunks) if not together or self.combine == "sum" else None

    def select(self, view: View, step: Step) -> Selection:
        if not self.shared or view.q_heads == view.kv_heads:
            return Selection(self._nearest(view))
        group = view.q_heads // view.kv_heads
        if self.combine == "sum":
            kept = None if view.kept is None else view.kept.unflatten(1, (-1, group)).any(2)
            return Selection(self._nearest(view.calibrate(group_sum(view), kept)))
        own = self._nearest(view)
        chosen = chosen_mask(own, view.keys).unflatten(1, (-1, group))
        if self.combine == "vote":
            return Selection(self._nearest(voted(view, chosen)))
        together = view.calibrate(group_sum(view), chosen.any(2))
        return Selection(together.search(min(group * own.shape[-1], view.longest)))

    def _nearest(self, view: View) -> Tensor:
        """int32 [B, H, T, K], ascending, -1 in empty slots."""
        keep = view.seen if view.kept is None else view.kept & view.seen
        if view.kept is not None and view.forced is not None:
            keep = keep | view.forced
        runs = -(-view.keys // RUN)
        chunks = max(1, min(self.chunks, runs))  # the others hold no column, nor a chunk more than these places:
        places = RUN * -(-runs // chunks)
        most_forced = sum(min(places, most_of_span(n, chunks)) for n in (view.sinks, view.recents))
        ids = nearest_of_chunks(
            view.distances(),
            chunks,
            min(self.per_chunk, places),
            keep,
            view.forced,
            most_forced=min(places, most_forced),
        ).flatten(-2)
        last = torch.iinfo(torch.int32).max
        ids = torch.where(ids < 0, last, ids).sort(-1).values[..., : max(1, view.longest)]
        return ids.masked_fill(ids == last, -1)

    def _budgeted(self, k: int | None = None, share: float | None = None) -> dict[str, Any]:
        if k is None:
            raise ValueError(f"share={share} cannot be given to LocalTopK, which counts its keys: k= would work")
        return {"k": k}
