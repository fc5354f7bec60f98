"""Which keys of the text were read while the question was answered, and the fact's against all others."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Reads:
    """How often query heads read each position.

    Keys that are kept for their position, sinks and recent ones, are no finding: no average and no scale counts them.

    Attributes:
        counts: [layers][positions].
        tokens: of the text; positions behind them are those of the answer.
        fact: its positions [first, end); None if there is none.
        sinks, recents: keys that are kept for their position, at the text's start and its end.
        searched: layers that searched; the others read all keys.
    """

    counts: list[list[int]]
    tokens: int
    fact: tuple[int, int] | None
    sinks: int
    recents: int
    searched: tuple[int, ...]

    @cached_property
    def over_others(self) -> list[float | None]:
        """By layer, how many times as often the fact's keys were read as the average of the others; None if unknown."""
        return [self._ratio([layer]) for layer in range(len(self.counts))]

    @cached_property
    def over_others_searching(self) -> float | None:
        """The same over all layers that searched."""
        return self._ratio(self.searched)

    def bins(self, width: int) -> list[list[float]]:
        """[layers][width]: the text in so many parts, each read so many times as often as the layer's average key."""
        edges = [i * self.tokens // width for i in range(width + 1)]
        found = []
        for layer, counts in enumerate(self.counts):
            average = self._mean(layer, self._others()) or 1.0
            means = (sum(counts[a:b]) / max(1, b - a) for a, b in itertools.pairwise(edges))
            found.append([mean / average for mean in means])
        return found

    def darkest(self, bins: list[list[float]]) -> float:
        """The largest of such parts without keys that are kept for their position; 2 at least."""
        width = len(bins[0])
        first, end = -(-self.sinks * width // self.tokens), (self.tokens - self.recents) * width // self.tokens
        return max([2.0, *(value for row in bins for value in row[first:end])])

    def _ratio(self, layers: list[int] | tuple[int, ...]) -> float | None:
        if self.fact is None or self.fact[0] < self.sinks or self.fact[1] > self.tokens - self.recents:
            return None
        others = sum(self._mean(layer, self._others()) for layer in layers)
        return sum(self._mean(layer, range(*self.fact)) for layer in layers) / others if others else None

    def _others(self) -> list[int]:
        """Positions of the text that are neither the fact's nor kept for their position."""
        fact = range(*self.fact) if self.fact else range(0)
        return [i for i in range(self.sinks, self.tokens - self.recents) if i not in fact]

    def _mean(self, layer: int, positions: list[int] | range) -> float:
        return sum(self.counts[layer][i] for i in positions) / len(positions) if positions else 0.0
