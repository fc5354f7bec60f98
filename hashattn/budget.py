"""How many keys a query may keep: a number, or a share of the visible ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.shapes import check_int

_MOST = 2**31 - 1  # columns are int32: nothing has more keys


@dataclass(frozen=True)
class Budget:
    """A number of keys, or a share of the visible ones, rounded up in float64. Exactly one of the two is given."""

    k: int | None = None
    share: float | None = None

    def count(self, visible: int) -> int:
        """Keys kept of so many visible ones."""
        return min(visible, self.k) if self.k is not None else math.ceil((self.share or 0) * visible)

    def counts(self, visible: Tensor) -> Tensor:
        """The same for int64 [B, T], without asking the device."""
        if self.k is not None:
            return visible.clamp(max=min(self.k, _MOST))
        return torch.ceil(visible.double() * (self.share or 0)).long()


EVERYTHING = Budget(share=1.0)


def check_share(name: str, share: float) -> None:
    """Raise unless 0 < share <= 1."""
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"{name} must be a number above 0 and at most 1, got {share!r}")
    if not 0 < share <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {share!r}")


def check_k(k: int) -> int:
    """A positive number of keys, as an int; raises as check_int()."""
    return check_int("k", k, 1, hint="for a share of the keys: share=")
