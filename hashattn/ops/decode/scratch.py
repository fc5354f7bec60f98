"""Scratch: device memory that decode steps write and read within themselves, shared by the layers of a model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Scratch:
    """Buffers by name, allocated when first needed and again when a step needs more.

    What was handed out stays allocated as long as this object lives, because a captured CUDA graph may point to it.
    Steps of one Scratch must run on one stream: they overwrite each other's buffers.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.device], list[Tensor]] = {}

    def borrow(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer of this shape; its contents are whatever the last user left, zeros at first."""
        numel = math.prod(shape)
        held = self._held.setdefault((name, device), [])
        if not held or held[-1].numel() < numel or held[-1].dtype != dtype:
            held.append(torch.zeros(numel, dtype=dtype, device=device))
        return held[-1][:numel].view(shape)

    def workspace(self, nbytes: int, device: torch.device) -> Tensor:
        """At least so many bytes, uint8, for one step at a time."""
        held = self._held.setdefault(("workspace", device), [])
        if not held or held[-1].numel() < nbytes:
            held.append(torch.empty(nbytes, dtype=torch.uint8, device=device))
        return held[-1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Scratch:
        """Another one: what is copied is used on its own."""
        memo[id(self)] = twin = Scratch()
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.numel() * x.element_size() for held in self._held.values() for x in held)
