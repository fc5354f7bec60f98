"""DeviceState: what fused steps keep of a cache on its device, beside keys, values and codes."""

from __future__ import annotations

import torch
from torch import Tensor

from hashattn.core.lasting import lasting
from hashattn.ops.decode import Scratch


class DeviceState:
    """The rows' first columns, and what a step leaves for the next one like it.

    A captured CUDA graph may point to what was handed out: it changes in place and stays allocated.

    Args:
        scratch: memory that steps write within themselves, which caches of one model may share.
    """

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch
        self._starts: tuple[list[int], Tensor] | None = None
        self.prepared: dict[tuple[int, int, bool], object] = {}  # steps, by query heads, queries and whether causal,
        self.memory: tuple[int, ...] = ()  # for keys, values and codes that lie here
        self._held: dict[tuple[str, tuple[int, ...], torch.dtype, torch.device], Tensor] = {}

    def starts(self, starts: list[int], device: torch.device) -> Tensor:
        """These as int32 [B]; copied to the device when they change."""
        held = self._starts
        if held is None or held[0] != starts or held[1].device != device:
            held = self._starts = list(starts), self._copied(starts, device)
        return held[1]

    def follow(self, starts: list[int]) -> None:
        """Let what was handed out say that rows begin at these columns."""
        if self._starts is not None:
            self.starts(starts, self._starts[1].device)

    @lasting
    def _copied(self, starts: list[int], device: torch.device) -> Tensor:
        fresh = torch.tensor(starts, dtype=torch.int32, device=device)
        held = self._starts[1] if self._starts is not None else fresh
        return held.copy_(fresh) if held.shape == fresh.shape and held.device == device else fresh

    def bounds(self, shape: tuple[int, int], device: torch.device) -> Tensor:
        """What steps of Sizes.state `shape` leave for the next one, int32, zeros at first: see ops.decode."""
        return self.held("bounds", shape, torch.int32, device)

    @lasting
    def held(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A few numbers of this name and kind, zeros at first, which every step that asks for them writes and reads."""
        key = name, shape, dtype, device
        if key not in self._held:
            self._held[key] = torch.zeros(shape, dtype=dtype, device=device)
        return self._held[key]
