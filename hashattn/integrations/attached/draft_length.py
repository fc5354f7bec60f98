"""DraftLength: how many tokens to draft before the next check, from what was accepted and what it cost."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

REMEMBERED = 0.95  # of the weight of what was accepted, a pass later
ASSUMED, WEIGHT = 0.9, 2.0  # acceptance before anything was seen, as so many tokens
PROBES = 16, 512  # plain steps between two probes: at first, at most


@dataclass
class Cost:
    """Seconds that something takes: the median of the last few times.

    The first time is left out, which loads kernels and captures graphs.
    """

    latest: deque[float] = field(default_factory=lambda: deque(maxlen=7))
    begun: bool = False

    def add(self, seconds: float) -> None:
        """It took so long once more."""
        if self.begun:
            self.latest.append(seconds)
        self.begun = True

    @property
    def seconds(self) -> float | None:
        """None if not known yet."""
        return statistics.median(self.latest) if self.latest else None


class DraftLength:
    """Chooses the length of the next draft, 0 to `most`, that promises the most tokens a second.

    A draft of n tokens takes n searched steps and a check of n + 1 tokens, and writes one token more than it gets
    accepted, in the mean of rows that go on apart. Where no length pays, steps are plain, and now and then a draft
    probes whether that has changed.

    The same observations lead to the same lengths.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._tries, self._hits = [0.0] * most, [0.0] * most
        self._step = Cost()  # a searched one
        self._check = [Cost() for _ in range(most + 1)]  # by the draft's length; 0 is a plain step
        self._plain, self._wait = 0, PROBES[0]

    def next(self, most: int) -> int:
        """The length of the next draft, of at most so many tokens."""
        return min(most, self._next())

    def saw(self, length: int, rows: Sequence[tuple[int, bool]], drafting: float, checking: float) -> None:
        """What a pass took, in seconds, and what came of its draft.

        Args:
            rows: that go on apart: how many of the draft's tokens were accepted, and whether the token after them was
                not; otherwise nobody looked at it.
        """
        self._check[length].add(checking)
        if length:
            self._step.add(drafting / length)
            self._tries, self._hits = ([REMEMBERED * x for x in held] for held in (self._tries, self._hits))
            for accepted, rejected in rows:
                for i in range(min(accepted + rejected, length)):
                    self._tries[i] += 1 / len(rows)
                    self._hits[i] += (i < accepted) / len(rows)

    def acceptance(self) -> list[float]:
        """How likely the token at each position is accepted if those before it were."""
        tries, hits = sum(self._tries) + WEIGHT, sum(self._hits) + WEIGHT * ASSUMED
        return [(h + WEIGHT * hits / tries) / (t + WEIGHT) for t, h in zip(self._tries, self._hits, strict=True)]

    def _next(self) -> int:
        if self._step.seconds is None or self._check[self.most].seconds is None:
            return self.most
        if self._check[0].seconds is None:
            return 0
        rates = self._rates()
        best = max(range(len(rates)), key=rates.__getitem__)  # the shortest of equals
        if best:
            self._plain, self._wait = 0, PROBES[0]
            return best
        self._plain += 1
        if self._plain <= self._wait:
            return 0
        self._plain, self._wait = 0, min(2 * self._wait, PROBES[1])
        return max(range(1, len(rates)), key=rates.__getitem__)

    def _rates(self) -> list[float]:
        """Tokens a second, by the draft's length."""
        tokens, reached, rates = 1.0, 1.0, []
        for length, chance in enumerate([1.0, *self.acceptance()]):
            if length:
                reached *= chance
                tokens += reached
            rates.append(tokens / (length * (self._step.seconds or 0.0) + self._checking(length)))
        return rates

    def _checking(self, length: int) -> float:
        """A check's seconds; where none was measured, those of the nearest that was, the longer of two."""
        known = [(abs(n - length), -n, cost.seconds) for n, cost in enumerate(self._check) if cost.seconds is not None]
        return min(known)[2] or 1e-9
