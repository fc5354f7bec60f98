"""How many keys a selector may keep: a number, or a share of the visible ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hashattn.view import View


def check_share(name: str, share: float) -> None:
    """Raise unless 0 < share <= 1."""
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"{name} must be a number above 0 and at most 1, got {share!r}")
    if not 0 < share <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {share!r}")


def check_k(k: int) -> None:
    """Raise unless k is a positive int."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int of at least 1 (for a share of the keys: share=), got {k!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def count_keys(visible: int, share: float) -> int:
    """ceil(share * visible), computed in float64, as :func:`share_counts` does."""
    return math.ceil(share * visible)


def share_counts(view: View, share: float) -> Tensor:
    """ceil(share * visible) of each query, at least the forced keys: int64 [B, T]."""
    counts = torch.ceil(view.counts.double() * share).long()
    return torch.maximum(counts, view.forced_counts)
