"""Ranking: the order in which keys are nearest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ranking:
    """How a search over packed codes ranks the keys that a query sees.

    Attributes:
        shared: the query heads of each head of codes make one choice, by the sum of their distances.
        sinks, recents: this many first and last visible keys are ranked before every distance.
        radius: the largest distance (or sum) of a key that is not forced; None for any.
        biased: whether the last byte of a code is a number to add; see :func:`hashattn.ops.hamming.distances`.
    """

    shared: bool = False
    sinks: int = 0
    recents: int = 0
    radius: int | None = None
    biased: bool = False
