"""Scratch: device memory that decode steps write and read within themselves, shared by the layers of a cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hashattn.core.lasting import lasting
from hashattn.ops.decode.device import stream_of

Key = tuple[str, torch.device, int]


class Scratch:
    """Buffers by name and stream, allocated when first needed and again when a step needs more.

    A buffer that is too small is freed, unless it was handed out while a CUDA graph was captured, which may point to
    it. Who captures later what was handed out before (a Decoder) keeps it. Steps on one stream overwrite each other's
    buffers.
    """

    def __init__(self) -> None:
        self._held: dict[Key, Tensor] = {}
        self._captured: dict[int, Tensor] = {}

    @lasting
    def borrow(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer of this shape; its contents are whatever the last user left, zeros at first."""
        numel, key = math.prod(shape), (name, device, stream_of(device))
        held = self._held.get(key)
        if held is None or held.numel() < numel or held.dtype != dtype:
            self._held.pop(key, None)
            held = self._held[key] = torch.zeros(numel, dtype=dtype, device=device)
        return self._handed_out(held)[:numel].view(shape)

    def workspace(self, nbytes: int, device: torch.device) -> Tensor:
        """At least so many bytes, uint8, for one step at a time."""
        key = ("workspace", device, stream_of(device))
        held = self._held.get(key)
        if held is None or held.numel() < nbytes:
            del held
            self._held.pop(key, None)  # before there is another
            held = self._held[key] = self._bytes(nbytes, device)
        return self._handed_out(held)

    @lasting
    def _bytes(self, count: int, device: torch.device) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, device=device)

    def _handed_out(self, held: Tensor) -> Tensor:
        if held.is_cuda and torch.cuda.is_current_stream_capturing():
            self._captured[held.data_ptr()] = held
        return held

    def __deepcopy__(self, memo: dict[int, Any]) -> Scratch:
        """Another one: what is copied is used on its own."""
        memo[id(self)] = twin = Scratch()
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        held = {x.data_ptr(): x for x in self._held.values()} | self._captured
        return sum(x.numel() * x.element_size() for x in held.values())
