"""View: one layer's queries looking at one index. What a selector sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hashattn.ops.nearest import nearest, nearest_visible


@dataclass(frozen=True, eq=False)
class View:
    """Distances of queries to the keys that they may see.

    Attributes:
        visible: int64 [B, T, 2], each query's [first, end) columns: left padding, and causality for T > 1.
        q_heads: Hq.
        kv_heads: Hkv.
        keys: N, the columns of the cache.
        longest: no query sees more keys than this (known to the host, so that no device has to be asked).
        scan: returns the raw distances, [B, Hq, T, N].
        query: what the encoder made of the queries; None if nothing is ranked.
        engine: "reference" or "cpu".
        sinks: this many first visible keys are ranked before every distance.
        recents: this many last visible keys too.
        calibrated: distances that replace the raw ones, [B, H, T, N].
        kept: bool [B, H, T, N], keys that may be selected; None means all visible ones.
    """

    visible: Tensor
    q_heads: int
    kv_heads: int
    keys: int
    longest: int
    scan: Callable[[], Tensor]
    query: Tensor | None = None
    engine: str = "reference"
    sinks: int = 0
    recents: int = 0
    calibrated: Tensor | None = None
    kept: Tensor | None = None

    @cached_property
    def raw(self) -> Tensor:
        """Distances before any calibration: int32 (float for exact scores) [B, Hq, T, N]; smaller is nearer."""
        return self.scan()

    def distances(self) -> Tensor:
        """Distances with every calibration so far, [B, heads, T, N]; entries of invisible keys mean nothing."""
        return self.raw if self.calibrated is None else self.calibrated

    def calibrate(self, distances: Tensor, kept: Tensor | None = None) -> View:
        """The same view with other distances (and, if given, fewer keys to choose from). Raw ones stay as they are."""
        view = replace(self, calibrated=distances, kept=kept if kept is not None else self.kept)
        for name in ("raw", "counts", "seen", "forced"):  # computed once
            if name in self.__dict__:
                view.__dict__[name] = self.__dict__[name]
        return view

    @cached_property
    def counts(self) -> Tensor:
        """Keys that each query sees, int64 [B, T]."""
        return (self.visible[..., 1] - self.visible[..., 0]).clamp(min=0)

    @cached_property
    def seen(self) -> Tensor:
        """bool [B, 1, T, N]: which keys each query sees."""
        columns = torch.arange(self.keys, device=self.visible.device)
        return ((columns >= self.visible[..., :1]) & (columns < self.visible[..., 1:])).unsqueeze(1)

    @cached_property
    def forced(self) -> Tensor | None:
        """bool [B, 1, T, N]: visible keys ranked before every distance; None if there are none."""
        if not self.sinks and not self.recents:
            return None
        columns = torch.arange(self.keys, device=self.visible.device)
        first, end = self.visible[..., :1], self.visible[..., 1:]
        return ((columns < first + self.sinks) | (columns >= end - self.recents)).unsqueeze(1) & self.seen

    @property
    def forced_counts(self) -> Tensor:
        """Forced keys of each query, int64 [B, T]."""
        return self.counts.clamp(max=self.sinks + self.recents)

    def search(self, k: int) -> Tensor:
        """The k nearest visible keys, forced ones first, ties to the most recent: int32 [B, heads, T, K], -1 empty."""
        if self.engine == "cpu" and not self.distances().is_floating_point():
            return nearest_visible(
                self.distances(), min(k, self.longest), self.visible, sinks=self.sinks, recents=self.recents,
                kept=self.kept,
            )  # fmt: skip
        keep = self.seen if self.kept is None else self.kept & self.seen
        if self.kept is not None and self.forced is not None:
            keep = keep | self.forced
        return nearest(self.distances(), min(k, self.longest), keep, self.forced)
