"""How many keys a query may keep: a number, or a share of the visible ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.core.checks import check_int

MOST_KEYS = 1 << 29  # more than a cache holds: larger numbers mean all of them. Sums of three fit an int32


@dataclass(frozen=True)
class Budget:
    """A number of keys, or a share of the visible ones, rounded up in float64. Exactly one of the two is given.

    Attributes:
        min_k: this many keys beyond the forced ones are kept whatever the other says.
    """

    k: int | None = None
    share: float | None = None
    min_k: int = 0

    def count(self, visible: int, forced: int = 0) -> int:
        """Keys kept of so many visible ones, `forced` of which are kept for their position."""
        wanted = self.k if self.k is not None else math.ceil((self.share or 0) * visible)
        return min(visible, max(wanted, forced + self.min_k))

    def counts(self, visible: Tensor, forced: int = 0) -> Tensor:
        """The same for int64 [B, T], without asking the device."""
        if self.k is not None:
            wanted = visible.clamp(max=clamped(self.k))
        else:
            wanted = torch.ceil(visible.double() * (self.share or 0)).long()
        least = clamped(forced + self.min_k)
        return torch.maximum(wanted, visible.clamp(max=least)) if least else wanted


EVERYTHING = Budget(share=1.0)


def clamped(keys: int) -> int:
    """A number of keys that no tensor's arithmetic wraps: what is beyond every cache means all of it."""
    return min(keys, MOST_KEYS)


def check_share(name: str, share: float) -> None:
    """Raise unless 0 < share <= 1."""
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"{name} must be a number above 0 and at most 1, got {share!r}")
    if not 0 < share <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {share!r}")


def check_k(k: int) -> int:
    """A positive number of keys, as an int; raises as check_int()."""
    return check_int("k", k, 1, hint="for a share of the keys: share=")


def check_min_k(min_k: int) -> int:
    """A number of keys, 0 or more, as an int; raises as check_int()."""
    return check_int("min_k", min_k, 0)


def check_one(what: str, k: int | None, share: float | None) -> int | None:
    """Exactly one of k and share is given, and is what it should be: returns k, as an int if there is one.

    Raises:
        TypeError, ValueError: otherwise.
    """
    if (k is None) == (share is None):
        raise ValueError(f"{what} takes either k or share, got k={k!r} and share={share!r}")
    if share is not None:
        check_share("share", share)
    return None if k is None else check_k(k)


def check_finite_number(name: str, number: float) -> None:
    """Raise unless this is a finite number of at least 0."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{name} must be a finite number of at least 0, got {number!r}")
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {number!r}")
