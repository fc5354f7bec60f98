"""View: one layer's queries looking at one index. What a selector sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hashattn.core.attention_sums import AttentionSums
from hashattn.core.budget import Budget
from hashattn.core.types import Table
from hashattn.ops.nearest import group_total, nearest, nearest_of_pool, nearest_visible, within
from hashattn.ops.search import Ranking, search


@dataclass(frozen=True, eq=False)
class View:
    """Distances of queries to the keys that they may see.

    Attributes:
        spans: [B][T], (first, end): the columns that each query sees: left padding, and causality for T > 1.
        q_heads: Hq.
        kv_heads: Hkv.
        keys: N, the columns of the cache.
        scan: returns the raw distances, [B, Hq, T, N].
        device: where the tensors are.
        query: what the encoder made of the queries; None if nothing is ranked.
        codes: packed codes int64 [B, heads, N, W]: of a flat index, which the CPU may scan and search in one pass, or
            of one that only searches.
        host: whether the CPU's implementation searches (numpy, FAISS) instead of plain PyTorch.
        sinks: this many first visible keys are ranked before every distance.
        recents: this many last visible keys too.
        biased: whether the last byte of a code is a number that is added to its distance.
        calibrated: distances that replace the raw ones, [B, H, T, N].
        kept: bool [B, H, T, N], keys that may be selected; None means all visible ones.
        logits: exact logits of the keys at ids int32 [B, H, T, K] (H = Hq or Hkv): float32 [B, H, T, Hq / H, K], of no
            meaning in empty slots. It reads these keys; None where the view was made without the queries.
        attention_sums: of past queries, for selectors that accumulate; None where none does.
        find: returns ids and raw distances of the k nearest keys, [B, Hq, T, k], where the index only searches. Then
            there are no distances, and neither calibrations nor a radius.
    """

    spans: Table
    q_heads: int
    kv_heads: int
    keys: int
    scan: Callable[[], Tensor]
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    query: Tensor | None = None
    codes: Tensor | None = None
    host: bool = False
    sinks: int = 0
    recents: int = 0
    biased: bool = False
    calibrated: Tensor | None = None
    kept: Tensor | None = None
    logits: Callable[[Tensor], Tensor] | None = None
    attention_sums: AttentionSums | None = None
    find: Callable[[int], tuple[Tensor, Tensor]] | None = None

    @cached_property
    def raw(self) -> Tensor:
        """Distances before any calibration: int32 (float for exact scores) [B, Hq, T, N]; smaller is nearer."""
        return self.scan()

    @property
    def scanned(self) -> bool:
        """Whether the raw distances were computed already."""
        return "raw" in self.__dict__

    def distances(self) -> Tensor:
        """Distances with every calibration so far, [B, heads, T, N]; entries of invisible keys mean nothing."""
        return self.raw if self.calibrated is None else self.calibrated

    def calibrate(self, distances: Tensor, kept: Tensor | None = None) -> View:
        """The same view with other distances (and, if given, fewer keys to choose from). Raw ones stay as they are."""
        view = replace(self, calibrated=distances, kept=kept if kept is not None else self.kept, find=None)
        for name in ("raw", "visible", "counts", "seen", "forced"):  # computed once
            if name in self.__dict__:
                view.__dict__[name] = self.__dict__[name]
        return view

    @cached_property
    def visible(self) -> Tensor:
        """The spans as int64 [B, T, 2], on the device."""
        return torch.tensor(self.spans, device=self.device)

    @property
    def longest(self) -> int:
        """No query sees more keys than this."""
        return max(0, max(end - first for row in self.spans for first, end in row))

    @cached_property
    def counts(self) -> Tensor:
        """Keys that each query sees, int64 [B, T]."""
        return (self.visible[..., 1] - self.visible[..., 0]).clamp(min=0)

    @cached_property
    def seen(self) -> Tensor:
        """bool [B, 1, T, N]: which keys each query sees."""
        columns = torch.arange(self.keys, device=self.device)
        return ((columns >= self.visible[..., :1]) & (columns < self.visible[..., 1:])).unsqueeze(1)

    @cached_property
    def forced(self) -> Tensor | None:
        """bool [B, 1, T, N]: visible keys ranked before every distance; None if there are none."""
        if not self.sinks and not self.recents:
            return None
        columns = torch.arange(self.keys, device=self.device)
        first, end = self.visible[..., :1], self.visible[..., 1:]
        return ((columns < first + self.sinks) | (columns >= end - self.recents)).unsqueeze(1) & self.seen

    @property
    def attention_so_far(self) -> Tensor | None:
        """What past queries gave each key, float32 [B, Hkv, N], zero for new keys; None if there is none yet."""
        sums = self.attention_sums
        return sums.of(self.keys, self.nothing) if sums is not None and len(sums) else None

    @property
    def nothing(self) -> Tensor:
        """Distances for those who rank nothing: zeros, int32 [B, Hkv, T, N]."""
        shape = len(self.spans), self.kv_heads, len(self.spans[0]), self.keys
        return torch.zeros((), dtype=torch.int32, device=self.device).expand(shape)

    def wanted(self, budget: Budget) -> Tensor:
        """Keys that each query keeps under a budget, at least its forced ones: int64 [B, T]."""
        return budget.counts(self.counts, self.sinks + self.recents)

    def slots(self, budget: Budget) -> int:
        """No query keeps more keys than this under a budget."""
        return budget.count(self.longest, self.sinks + self.recents)

    def search(self, k: int) -> Tensor:
        """The k nearest visible keys, forced ones first, ties to the most recent: int32 [B, heads, T, K], -1 empty."""
        if self.find is not None:
            return self._found(min(k, self.longest), shared=False)
        distances = self.distances()
        if self.host and not distances.is_floating_point():
            counts = [[[min(k, self.longest)] for _ in row] for row in self.spans]
            return nearest_visible(
                distances, counts, self.spans, sinks=self.sinks, recents=self.recents, kept=self.kept, ordered=True
            )
        keep = self.seen if self.kept is None else self.kept & self.seen
        if self.kept is not None and self.forced is not None:
            keep = keep | self.forced
        return nearest(distances, min(k, self.longest), keep, self.forced)

    def nearest_with_distances(self, k: int) -> tuple[Tensor, Tensor]:
        """What search() gives, and the distances of these keys, of the same shape."""
        if self.find is not None:
            return self.find(min(k, self.longest))
        ids = self.search(k)
        return ids, self.raw.gather(-1, ids.clamp(min=0).long())

    def nearest(self, budgets: Sequence[Budget], *, shared: bool = False, radius: int | None = None) -> Tensor:
        """The nearest keys of each query under ascending budgets, those of the first budget before the others.

        Args:
            shared: the heads of a KV head make one choice, by the sum of their distances.
            radius: the largest distance (or sum) of a key that is not forced; None for any.

        Returns:
            int32 [B, heads, T, K], in no promised order within a budget's keys, -1 in empty slots.
        """
        if not self.host or self.find is not None:
            if self.find is not None:
                ids = self._found(self.slots(budgets[-1]), shared)
            else:
                ids = self._within(shared, radius).search(self.slots(budgets[-1]))
            slot = torch.arange(ids.shape[-1], device=ids.device)
            return ids.masked_fill(slot >= self.wanted(budgets[-1])[:, None, :, None], -1)
        forced = self.sinks + self.recents
        counts = [[[b.count(end - first, forced) for b in budgets] for first, end in row] for row in self.spans]
        fused = self.codes is not None and self.calibrated is None and self.kept is None and not self.scanned
        if fused and self.codes is not None and (not shared or self.codes.shape[1] == self.kv_heads):
            assert self.query is not None
            ranking = Ranking(shared, self.sinks, self.recents, radius, self.biased)
            return search(self.query, self.codes, counts, self.spans, ranking)
        view = self._within(shared, radius)
        if view.distances().is_floating_point():
            return replace(view, host=False).nearest(budgets)
        return nearest_visible(
            view.distances(), counts, self.spans, sinks=self.sinks, recents=self.recents, kept=view.kept
        )

    def _found(self, k: int, shared: bool) -> Tensor:
        """What the index finds, behind the forced keys: of its k nearest, enough are not forced.

        A group's heads share the nearest, by the sum of their distances, of the keys that any of them finds.
        """
        assert self.find is not None
        ids = self.find(k)[0]
        if shared:
            assert self.query is not None and self.codes is not None
            ids = nearest_of_pool(ids, self.query, self.codes, self.kv_heads, k)
        if not self.sinks and not self.recents:
            return self._never_empty(ids)
        first, end = (x.unsqueeze(1) for x in (self.visible[..., :1], self.visible[..., 1:]))  # [B, 1, T, 1]
        ids = ids.masked_fill((ids < first + self.sinks) | (ids >= end - self.recents), -1)
        forced = forced_ids(self, self.sinks, self.recents).repeat_interleave(ids.shape[1] // self.kv_heads, 1)
        ids = torch.cat([forced, ids], -1)
        return ids.gather(-1, (ids < 0).to(torch.int8).argsort(dim=-1, stable=True)[..., :k])

    def _never_empty(self, ids: Tensor) -> Tensor:
        """The last visible key for a query that found nothing, in ids [B, H, T, K]."""
        if ids.shape[-1] == 0:
            return ids
        last = (self.visible[..., 1] - 1).masked_fill(self.counts == 0, -1).unsqueeze(1)  # [B, 1, T]
        first = torch.where((ids < 0).all(-1), last, ids[..., 0]).to(torch.int32).unsqueeze(-1)
        return torch.cat([first, ids[..., 1:]], -1)

    def _within(self, shared: bool, radius: int | None) -> View:
        """The view whose own distances are what a call of nearest() ranks."""
        view = self
        if shared:
            total = group_total(self.distances(), self.kv_heads)
            if total.is_floating_point():  # padding may hold anything
                total = total.masked_fill(~self.seen, 0)
            view = self.calibrate(
                total, None if self.kept is None else self.kept.unflatten(1, (self.kv_heads, -1)).any(2)
            )
        if radius is not None:
            near = within(view.distances(), radius)
            view = view.calibrate(view.distances(), near if view.kept is None else near & view.kept)
        return view


def forced_ids(view: View, sinks: int, recents: int) -> Tensor:
    """Columns of the first and last visible keys, int32 [B, Hkv, T, sinks + recents], none twice, -1 empty."""
    first, end = view.visible[..., :1], view.visible[..., 1:]  # [B, T, 1]
    head = first + torch.arange(min(sinks, view.longest), device=first.device)
    tail = end - 1 - torch.arange(min(recents, view.longest), device=first.device)
    head = head.masked_fill(head >= end, -1)
    tail = tail.masked_fill(tail < first + head.shape[-1], -1)
    ids = torch.cat([head, tail], dim=-1).to(torch.int32)
    return ids.unsqueeze(1).expand(-1, view.kv_heads, -1, -1).contiguous()
