"""Dense attention of few queries to a long cache: keys are split over a GPU's programs, and read once for a group."""

from __future__ import annotations

from hashattn.ops.dense import reference
from hashattn.ops.dense.steps import append, attend, attend_all, splits

__all__ = ["append", "attend", "attend_all", "reference", "register", "splits"]


def register() -> None:
    """Let torch.compile know these steps, before one is traced."""
    from hashattn.ops.dense import library as library
