"""Centres: what is subtracted from the keys of each row before they are encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hashattn.encoders.base import Encoder


class Centres:
    """The centres of a cache's rows, each frozen as soon as its row holds keys enough; see encoders.Centring.

    Args:
        encoder: of the cache; None, as one that asks for no centring, has every row ready from the start.

    Attributes:
        ready: of each row, whether its centre is frozen.
        frozen: float32 [B, Hkv, D], zero for rows that are not ready; None before any is.
    """

    def __init__(self, encoder: Encoder | None, batch: int) -> None:
        self.encoder = encoder
        self.ready = [self.warmup == 0] * batch
        self.frozen: Tensor | None = None

    @property
    def warmup(self) -> int:
        """Visible keys that a row needs before its centre is frozen; 0 if the encoder asks for none."""
        centring = self.encoder.centring if self.encoder is not None else None
        return centring.warmup if centring is not None else 0

    @property
    def subtracted(self) -> Tensor | None:
        """The encoder's fitted centre, or the rows' own, [B, Hkv, D]; None for zero."""
        fitted = self.encoder.fitted_centre if self.encoder is not None else None
        return self.frozen if fitted is None else fitted.expand(len(self.ready), -1, -1)

    @property
    def nbytes(self) -> int:
        return 0 if self.frozen is None else self.frozen.numel() * self.frozen.element_size()

    def could_be_ready(self, columns: int, starts: Sequence[int]) -> list[bool]:
        """Of each row of so many columns, whether its centre is frozen or could be."""
        return [r or columns - s >= self.warmup for r, s in zip(self.ready, starts, strict=True)]

    @torch.no_grad()
    def freeze(self, keys: Tensor, starts: Sequence[int]) -> None:
        """Fix the centre of rows of keys [B, Hkv, N, D] that have become long enough."""
        assert self.encoder is not None and self.encoder.centring is not None
        now = self.could_be_ready(keys.shape[2], starts)
        if self.frozen is None:
            self.frozen = torch.zeros(*keys.shape[:2], keys.shape[3], device=keys.device)
        for row, first in enumerate(starts):
            if now[row] and not self.ready[row]:
                self.frozen[row] = self.encoder.centring.centre(keys[row, :, first:])
        self.ready = now

    def forget(self, row: int) -> bool:
        """Let a row wait for a new one. Returns whether it had one."""
        had = self.warmup > 0 and self.ready[row]
        if had:
            self.ready[row] = False
            if self.frozen is not None:
                self.frozen[row] = 0
        return had

    def select_rows(self, rows: Tensor) -> None:
        """Keep these batch rows, int64 [n], in this order."""
        self.ready = [self.ready[row] for row in rows.tolist()]
        if self.frozen is not None:
            self.frozen = self.frozen.index_select(0, rows)

    def state_dict(self) -> dict[str, Any]:
        """As a part of KVCache.state_dict."""
        centre = {} if self.frozen is None else {"centre": self.frozen.clone()}
        return {"ready": torch.tensor(self.ready), **centre}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "ready" in state:
            self.ready = state["ready"].tolist()
            self.frozen = state["centre"].clone() if "centre" in state else None
