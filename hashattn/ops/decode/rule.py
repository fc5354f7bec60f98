"""Rule: which keys a fused decode step keeps, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hashattn.core.budget import MOST_KEYS, Budget
from hashattn.ops.nearest.local import most_of_span


@dataclass(frozen=True)
class Rule:
    """What a selector asks of a fused step. Numbers beyond every cache and distance are brought down to MOST_KEYS.

    Attributes:
        k, share: keys wanted of the visible ones: a number, or a share rounded up in float64. One of the two is given.
        shared: the heads of a KV head make one choice, by the sum of their distances.
        sinks, recents: this many first and last visible keys are ranked before every distance and count in the budget.
        radius: the largest distance (or sum) of a key that is not forced; None for any.
        critical: share of the visible keys, rounded up in float64, that are critical, and all forced ones; the other
            keys that are kept are medium. None if all are critical.
        chunks: k / chunks keys are kept of each chunk that columns are dealt to in runs of 8; None for k of all.
        min_k: keys wanted beyond the forced ones, critical ones too, whatever k, share and critical say.
        biased: the last byte of a key's code is a number that is added to its distance; queries of one plane.
        vote_share: keys that more than this share of the layer's query heads would keep come nearer in every head, by
            vote_discount. A head votes for the keys that the rule keeps of raw distances; a shared choice has the votes
            of its group. None for no votes.
        prior_ratio: keys whose prior is above so many times the uniform share, 1 / visible keys, come nearer in every
            head, by prior_discount. A key's prior is the mean over query heads of the softmax weights that the layer
            before gave it in the same step, zero where it kept it not; after a layer that ran dense nothing changes.
            None for no prior.
        vote_discount, prior_discount: subtracted from the distance of each head, before these are summed for a shared
            choice, and compared with a radius. They may be below zero.
    """

    k: int | None = None
    share: float | None = None
    shared: bool = False
    sinks: int = 0
    recents: int = 0
    radius: int | None = None
    critical: float | None = None
    chunks: int | None = None
    min_k: int = 0
    biased: bool = False
    vote_share: float | None = None
    vote_discount: int = 0
    prior_ratio: float | None = None
    prior_discount: int = 0

    def __post_init__(self) -> None:
        """Bring down what a user may give to what the kernels' int32 holds, sums and columns included: here alone."""
        for name in ("k", "sinks", "recents", "radius", "min_k"):
            given = getattr(self, name)
            if given is not None and given > MOST_KEYS and not (name == "k" and self.chunks is not None):
                object.__setattr__(self, name, MOST_KEYS)

    def within(self, room: int) -> Rule:
        """The same in smaller numbers, for queries that see no more than so many keys."""
        if max(self.sinks, self.recents, self.min_k, 0 if self.chunks is not None else self.k or 0) <= room:
            return self
        k = self.k if self.k is None or self.chunks is not None else min(self.k, room)
        return replace(
            self, k=k, sinks=min(self.sinks, room), recents=min(self.recents, room), min_k=min(self.min_k, room)
        )

    @property
    def calibrated(self) -> bool:
        """Whether it ranks other distances than the raw ones."""
        return self.vote_share is not None or self.prior_ratio is not None

    @property
    def discounts(self) -> tuple[int, int]:
        """Of votes and of a prior; zero where there are none."""
        votes = self.vote_discount if self.vote_share is not None else 0
        return votes, self.prior_discount if self.prior_ratio is not None else 0

    def votes(self, q_heads: int) -> int:
        """The fewest votes that are more than the share of so many heads, compared in float32 as the reference does."""
        return int(np.floor(np.float32((self.vote_share or 0.0) * q_heads))) + 1

    @property
    def least(self) -> int:
        """Keys kept at least, where so many are visible and no radius leaves any out."""
        return self.sinks + self.recents + self.min_k

    @property
    def per_chunk(self) -> int:
        """Keys kept of each chunk."""
        return (self.k or 0) // (self.chunks or 1)

    @property
    def most_forced(self) -> int:
        """No chunk has more forced keys."""
        return sum(most_of_span(n, self.chunks or 1) for n in (self.sinks, self.recents))

    def slots(self, visible: int) -> int:
        """Keys kept by a query that sees so many."""
        if self.chunks is not None:
            return self.chunks * max(self.per_chunk, self.most_forced)
        return Budget(self.k, self.share, self.min_k).count(visible, self.sinks + self.recents)

    def medium(self, visible: int) -> int:
        """How many of them are not critical, where no radius leaves any out."""
        if self.critical is None:
            return 0
        critical = Budget(share=self.critical, min_k=self.min_k).count(visible, self.sinks + self.recents)
        return max(0, self.slots(visible) - critical)
