"""DeviceState: what fused steps keep of a cache on its device, beside keys, values and codes."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.ops.decode import Scratch


class DeviceState:
    """The rows' first columns, and what a step leaves for the next one like it.

    Args:
        scratch: memory that steps write within themselves, which caches of one model may share.
    """

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch
        self._starts: tuple[list[int], Tensor] | None = None
        self._bounds: Tensor | None = None

    def starts(self, starts: list[int], device: torch.device) -> Tensor:
        """These as int32 [B]; copied to the device when they change."""
        if self._starts is None or self._starts[0] != starts or self._starts[1].device != device:
            self._starts = list(starts), torch.tensor(starts, dtype=torch.int32, device=device)
        return self._starts[1]

    def bounds(self, rows: int, device: torch.device) -> Tensor:
        """How far steps of this many rows look for candidates, int32 [rows], zeros at first: see ops.decode."""
        if self._bounds is None or self._bounds.shape[0] != rows or self._bounds.device != device:
            self._bounds = torch.zeros(rows, dtype=torch.int32, device=device)
        return self._bounds
